"""What was noticed in chapter 5's records after its run; see `05.md`."""

from pathlib import Path

from drone.lab import records

ROWS = 408  # of MRPC's development part
PAPER = {"paper_speed": 1.92, "paper_lost": 1.5}  # its headline


def values() -> dict[str, float]:
    """Name → number for the passages of `05.md`."""
    results = Path(__file__).parents[1] / "results"
    table = records.load(results / "05-algorithm-2.jsonl")
    table["lost"] = table["dense"] - table["score"]
    found: dict[str, float] = dict(PAPER)

    def note(name: str, study: str, method: str, setting: float) -> None:
        """Keep the mean loss and speed over the seeds, and the span of both."""
        rows = table[(table.study == study) & (table.method == method)]
        rows = rows[rows.setting == setting]
        found[f"{name}_lost"] = rows.lost.mean()
        found[f"{name}_least"] = rows.lost.min()
        found[f"{name}_most"] = rows.lost.max()
        found[f"{name}_speed"] = rows["speed-up"].mean()
        found[f"{name}_low"] = rows.low.min()
        found[f"{name}_high"] = rows.high.max()
        found[f"{name}_slowest"] = rows["speed-up"].min()
        found[f"{name}_fastest"] = rows["speed-up"].max()

    for name, study in (("large", "mpnet-base"), ("small", "MiniLM")):
        depth = 6 if name == "large" else 4
        budgets = (0.05, 0.2) if name == "large" else (0.02, 0.2)
        for which, budget in zip(("tight", "loose"), budgets, strict=True):
            note(f"{name}_{which}", study, "Algorithm 2", budget)
        for method in ("uniform", "latency"):
            note(f"{name}_{method}", study, method, 0.2)
        for way in ("light", "teacher"):
            note(f"{name}_{way}", study, f"Algorithm 2, {way}", 0.2)
        note(f"{name}_layers", study, "fewer layers", depth)
        note(f"{name}_taught", study, "fewer layers, teacher", depth)
        dense = table[table.study == study].groupby("seed").dense.first()
        found[f"{name}_dense"] = dense.mean()
    note("thin", "mpnet-base", "greedy, by share", 0.33)
    note("thin_taught", "mpnet-base", "greedy, teacher", 0.33)
    found["large_rows"] = round(found["large_loose_lost"] * ROWS / 100)
    return found
