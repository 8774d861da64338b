"""What was noticed in chapter 3's records after its run; see `03.md`."""

from pathlib import Path

from drone.lab import records

RESULTS = Path(__file__).parents[1] / "results" / "03-algorithm-1.jsonl"
COMMONEST = 0.684  # share of MRPC's development rows with the commonest label


def values() -> dict[str, float]:
    """Name → number for the passages of `03.md`."""
    table = records.load(RESULTS)
    table["points"] = 100 * table["score"]

    def seen(task: str, method: str, rank: int) -> dict[int, float]:
        """Seed → points of one way."""
        rows = table[(table.task == task) & (table.method == method)]
        return dict(rows[rows["rank"] == rank].set_index("seed")["points"])

    def mean(task: str, method: str, rank: int = 128) -> float:
        each = seen(task, method, rank).values()
        return sum(each) / len(each)

    found = {
        "guessing": 100 * (COMMONEST**2 + (1 - COMMONEST) ** 2),
        "svd_all_96": seen("mrpc", "svd", 96)[0],
    }
    for task in ("mrpc", "sst2"):
        svd, own = mean(task, "svd"), mean(task, "drone")
        for name, method in (("prose", "out-of-domain"), ("words", "random words")):
            share = (mean(task, method) - svd) / (own - svd)
            found[f"{task}_{name}"] = 100 * share
    few = table[table.method == "share 0.01"]["points"]
    found |= {"few_least": few.min(), "few_most": few.max()}
    ((_, whole),) = table[(table.method == "dense") & (table.seed == 0)][
        lambda rows: rows.task == "mrpc"
    ].iterrows()
    ((_, plain),) = table[table.method == "svd, values"].iterrows()
    found["values_lost"] = whole["points"] - plain["points"]
    return found
