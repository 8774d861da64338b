"""Numbers for the sentences of `06.md`, from the finished cases and clocks."""

from pathlib import Path

from drone.lab.cases import read_cases
from drone.lab.lstm_cases import clocked, trained

BOOK = Path(__file__).parents[1]
PAPERS = {"zaremba_large": 78.4, "zaremba_medium": 82.7, "bar": 2}  # published; ours
KINDS = {"products": "all", "but recurrent": "kept"}
METHODS = {"SVD": "svd", "data-aware": "aware"}


def values() -> dict[str, float]:
    """Name → number: `large_all_aware_50_more`, `_left`, `_word` and so on."""
    found: dict[str, float] = dict(PAPERS)
    clocks = read_cases(BOOK / "cases" / "lstm", "clocks")
    for size, each in trained(BOOK / "cases" / "lstm").items():
        found[f"{size}_perplexity"] = each.perplexity
        for row in each.shares:
            kind = KINDS.get(row.name, row.name)
            share = f"{100 * row.share:.0f}"
            name = f"{size}_{kind}_{METHODS[row.method]}_{share}"
            found[f"{name}_more"], found[f"{name}_valid"] = row.test.value, row.valid
            found[f"{name}_left"] = 100 * row.left
            found[f"{name}_ppl"] = each.perplexity * (1 + row.test.value / 100)
            for clock, length in (("word", 1), ("batch", 35)):
                timed = clocked(clocks, each.size, row.ranks, length)
                if timed is not None:
                    found[f"{name}_{clock}"] = timed.value
                    found[f"{name}_{clock}_low"] = timed.low
                    found[f"{name}_{clock}_high"] = timed.high
            over = each.over(row.name, row.share)
            found[f"{size}_{kind}_over_{share}"] = over.value
            found[f"{size}_{kind}_over_{share}_low"] = over.low
            found[f"{size}_{kind}_over_{share}_high"] = over.high
    return found
