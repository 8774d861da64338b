"""What was noticed in chapter 9's records after its run; see `09.md`."""

from pathlib import Path

from drone.lab import formats, records

RESULTS = Path(__file__).parents[1] / "results" / "09-hardware-timing.jsonl"
SERVED = RESULTS.with_name("09-served.json")


def values() -> dict[str, float]:
    """Name → number for the passages of `09.md`."""
    table = records.load(RESULTS)
    sweep, products = table[table.what == "setting"], table[table.what == "product"]
    found: dict[str, float] = {}
    for threads in (1, 2):
        seen = sweep[sweep.threads == threads].set_index(["batch", "length"])["speedup"]
        found[f"one_short_{threads}"] = seen[1, 16]
        found[f"many_short_{threads}"] = seen[64, 16]
        found[f"one_long_{threads}"] = seen[1, 384]

    def product(name: str, out: int, rank: int, tokens: int) -> None:
        """Keep what one thin layer gained, and what was promised."""
        rows = products[(products.out == out) & (products["rank"] == rank)]
        ((_, row),) = rows[rows.tokens == tokens].iterrows()
        found[name], found[f"{name}_promised"] = row["measured"], row["arithmetic"]

    product("half_one", 768, 184, 1)
    product("half_many", 768, 184, 256)
    product("quarter_one", 3072, 152, 1)
    product("quarter_many", 3072, 152, 256)
    product("edge", 768, 376, 1)
    product("tiny_many", 3072, 32, 256)
    product("tiny_one", 3072, 32, 1)
    thin = products[products["rank"] > 0]
    reached = thin["measured"] / thin["arithmetic"]
    for tokens in (1, 16, 256):
        found[f"reached_{tokens}"] = 100 * reached[thin.tokens == tokens].median()
    speeds = {m.speedup for m in formats.read(SERVED)[1] if m.method != "dense"}
    found["mild"], found["steep"] = min(speeds), max(speeds)
    return found
