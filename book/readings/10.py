"""What was noticed in chapter 10's records after its run; see `10.md`."""

from pathlib import Path

from drone.lab import records

RESULTS = Path(__file__).parents[1] / "results" / "10-beyond.jsonl"


def values() -> dict[str, float]:
    """Name → number for the passages of `10.md`."""
    table = records.load(RESULTS)
    family = table[table.what == "family"]
    shares = sorted(family["share"].unique())
    found: dict[str, float] = {
        "small_share": 100 * shares[0],
        "settings": len(shares) * family["task"].nunique(),
    }
    for share in shares:
        rows = family[family["share"] == share]
        for method, some in rows.groupby("method"):
            found[f"mean_{method}_{100 * share:.0f}"] = some["lost"].mean()
    decoder = table[table.what == "decoder"].set_index(["method", "share"])
    heard = decoder["perplexity"]
    for method, share in heard.index:
        if share < 1:
            over = heard[method, share] / heard["dense", 1.0] - 1
            found[f"over_{method}_{100 * share:.0f}"] = 100 * over
    return found
