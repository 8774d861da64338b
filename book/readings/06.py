"""What was noticed in chapter 6's records after its run; see `06.md`."""

import math
from pathlib import Path

from drone.lab import records
from drone.lab.cases import read_cases

BOOK = Path(__file__).parents[1]
PAPERS = {"zaremba_large": 78.4, "zaremba_medium": 82.7, "bar": 2}  # published; ours


def values() -> dict[str, float]:
    """Name → number for the passages of `06.md`."""
    table = records.load(BOOK / "results" / "06-lstm-on-ptb.jsonl")
    found: dict[str, float] = dict(PAPERS)

    def note(name: str, model: str, method: str, share: float) -> None:
        """Keep one model's growth of perplexity and its two speeds."""
        rows = table[(table.model == model) & (table.method == method)]
        ((_, row),) = rows[rows.setting == share].iterrows()
        found[f"{name}_more"] = row["increase"]
        found[f"{name}_left"] = 100 * row["left"]
        for clock in ("word", "batch"):
            found[f"{name}_{clock}"] = row[clock]
            found[f"{name}_{clock}_low"] = row[f"{clock} low"]
            found[f"{name}_{clock}_high"] = row[f"{clock} high"]

    for size in ("medium", "large"):
        shares = (0.1, 0.25, 0.75) if size == "medium" else (0.25, 0.5, 0.75)
        for share in shares:
            for short, method in (("aware", "data-aware"), ("svd", "SVD")):
                note(f"{size}_{short}_{round(100 * share)}", size, method, share)
        note(f"{size}_search", size, "Algorithm 2", 0.02)
        for short, method in (("aware", "data-aware"), ("svd", "SVD")):
            note(f"{size}_{short}_again", size, f"{method}, retrained", 0.25)
    note("kept", "large", "recurrent dense", 0.5)
    note("smaller", "large", "dense medium", 650)
    return found | _trained()


def _trained() -> dict[str, float]:
    """The large size trained to its end; see the page *Cases so far*."""
    (train,) = read_cases(BOOK / "cases", "lstm-train")
    (case,) = (
        case
        for case in read_cases(BOOK / "cases", "lstm-shares")
        if case.settings["kind"] == "products"
    )
    dense = train.result["losses"]["test"]
    found = {"trained": math.exp(dense), "trained_epochs": len(train.result["history"])}
    for short, method in (("aware", "data-aware"), ("svd", "SVD")):
        within = {
            row["share"]: 100 * math.expm1(row["test"] - dense)
            for row in case.result
            if row["method"] == method
        }
        small = min(s for s, more in within.items() if more <= PAPERS["bar"])
        found[f"trained_{short}_share"] = 100 * small
        if short == "aware":
            found["trained_quarter"] = math.exp(dense) * (1 + within[0.25] / 100)
    return found
