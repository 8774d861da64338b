"""Write `book/evidence.md`: what the finished cases say so far.

    DRONE_DATA=/path/to/data python book/evidence.py        # make the page
    DRONE_DATA=/path/to/data python book/evidence.py read   # and say it was read again

Every number of the page is computed here from the files in `book/cases` and set into
the sentences of `book/readings/evidence.md`. They were written about those files: when
the cases change, a test is red until someone has read the page again and stamped it.
What they decide goes to `book/results/evidence.json`, where the ledger reads it.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from drone.files import whole_file
from drone.lab import readings
from drone.lab.cases import read_cases, unpack
from drone.lab.glue_read import studies
from drone.lab.tables import Estimate

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "book" / "cases"
PAGE = ROOT / "book" / "evidence.md"
WRITTEN = ROOT / "book" / "readings" / "evidence.md"
DECIDED = ROOT / "book" / "results" / "evidence.json"
JOBS = ("dense", "ranks", "retrain", "lstm-train", "lstm-shares", "clocks")
KINDS = {"products": "all products", "but recurrent": "all but the recurrent ones"}
BAR = 0.02  # how much the perplexity may grow: chapter 6's
FAST = 2.0  # one word at a time: chapter 6's
USUAL = 2.0  # the speed-up of chapter 7
SPEEDS = (USUAL, 1.5, 3.0)


def digest(folder: Path = CASES) -> str:
    """SHA-256 over the names and the content of the cases this page tells of."""
    found = hashlib.sha256()
    for job in JOBS:
        for path in sorted((folder / job).glob("*.json")):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def short(encoder: str) -> str:
    """Name an encoder as the sentences do: `mpnet` or `minilm`."""
    return encoder.partition("-")[0]


def interval(found: Estimate, sign: str = "") -> str:
    """Write a value and its 95 % interval; the space between does not break."""
    # + 0.0: what rounds to nothing has no sign
    value, low, high = (round(x, 1) + 0.0 for x in (found.value, found.low, found.high))
    return f"{value:{sign}.1f} [{low:.1f},\u00a0{high:.1f}]"


def encoder_values() -> dict[str, Any]:
    """Return the points lost in every case of an encoder, as chapters 5 and 7 do.

    A name tells the speed where it is not the usual one: `minilm_mrpc_15_...`.
    """
    values: dict[str, Any] = {}
    for speed in SPEEDS:
        for (encoder, task), study in studies(CASES, speedup=speed).items():
            at = "" if speed == USUAL else f"_{10 * speed:.0f}"
            for method, arm in study.arms:
                found = study.lost((method, arm))
                name = f"{short(encoder)}_{task}{at}_{method}_{arm}"
                name = name.replace("-", "_")
                values[name] = found.value
                values[f"{name}_low"], values[f"{name}_high"] = found.low, found.high
    return values


def lstm_values() -> dict[str, Any]:
    """Return the table and all numbers of the large LSTM, and what they decide."""
    (train,) = read_cases(CASES, "lstm-train")
    dense = train.result["losses"]
    base = np.asarray(train.result["test_blocks"])
    values: dict[str, Any] = {
        "dense": math.exp(dense["test"]),
        "epochs": len(train.result["history"]),
        "dropout": train.settings["dropout"],
        "machine": train.device,
    }
    lines = []
    for case in read_cases(CASES, "lstm-shares"):
        kind = case.settings["kind"]
        lines += [
            f"**{KINDS[kind].capitalize()}**",
            "",
            "| share of their weights | SVD | data-aware | data-aware over SVD |",
            "|---:|---:|---:|---:|",
        ]
        rows: dict[float, dict[str, dict[str, Any]]] = {}
        for row in case.result:
            rows.setdefault(row["share"], {})[row["method"]] = row
        for share, pair in rows.items():
            grown = {
                name: 100 * math.expm1(row["test"] - dense["test"])
                for name, row in pair.items()
            }
            blocks = {
                name: unpack(row["test_blocks"]).astype(float)
                for name, row in pair.items()
            }
            draw = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))
            gap = (blocks["data-aware"] - blocks["SVD"])[draw].mean(axis=1)
            low, high = 100 * np.expm1(np.percentile(gap, [2.5, 97.5]))
            over = Estimate(100 * np.expm1(gap.mean()), low, high)
            lines.append(
                f"| {100 * share:.0f} % | +{grown['SVD']:.1f} % | "
                f"+{grown['data-aware']:.1f} % | {interval(over, '+')} % |"
            )
        lines.append("")
        # Chapter 6's rule: the smallest within the bar on *validation* text
        for name in ("SVD", "data-aware"):
            within = [
                row
                for row in case.result
                if row["method"] == name
                and math.expm1(row["valid"] - dense["valid"]) <= BAR
            ]
            least = min(within, key=lambda row: row["multiply_adds"])
            key = f"{kind}_{name}".lower().replace(" ", "_").replace("-", "_")
            values[key] = 100 * least["share"]
            values[f"{key}_test"] = 100 * math.expm1(least["test"] - dense["test"])
            values[f"{key}_valid"] = 100 * math.expm1(least["valid"] - dense["valid"])
            values[f"{key}_millions"] = least["multiply_adds"] / 1e6
    return values | {"lstm_table": "\n".join(lines)} | lstm_speed(values)


def lstm_speed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Say how fast the smallest models within the bar are, and what is decided."""
    found: dict[str, Any] = {}
    lines = [
        "| made thin | share | growth, validation | growth, test | a word at a time "
        "| batch of 32 × 35 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    timed = {
        case.settings["length"]: case.result["speedups"]
        for case in read_cases(CASES, "clocks")
        if case.settings["encoder"] == "lstm-large"
    }
    clocks = {"word": timed[1], "batch": timed[35]}
    for kind, title in KINDS.items():
        for method in ("SVD", "data-aware"):
            key = f"{kind}_{method}".lower().replace(" ", "_").replace("-", "_")
            share = values[key]
            cells = []
            for name, speedups in clocks.items():
                three = speedups[f"{kind} {share / 100:g}"]
                found[f"{key}_{name}"] = three[0]
                found[f"{key}_{name}_low"], found[f"{key}_{name}_high"] = three[1:]
                cells.append("{:.2f}× [{:.2f},\u00a0{:.2f}]".format(*three))
            lines.append(
                f"| {title}, {method} | {share:.0f} % | "
                f"+{values[f'{key}_valid']:.1f} % | "
                f"+{values[f'{key}_test']:.1f} % | {' | '.join(cells)} |"
            )
    fewer = values["products_data_aware_millions"] < values["products_svd_millions"]
    kept = values["products_data_aware_test"] <= 100 * BAR
    low, high = (
        found["products_data_aware_word_low"],
        found["products_data_aware_word_high"],
    )
    found["lstm_trained_fewer"] = "yes" if fewer and kept else "no"
    found["lstm_trained_fast"] = (
        "yes" if low >= FAST else "no" if high < FAST else "not decided"
    )
    return found | {"lstm_speed_table": "\n".join(lines)}


def page(values: Mapping[str, Any]) -> str:
    """Return the page: the written text with all numbers and tables set in."""
    return readings.fill(readings.load(WRITTEN).text, values)


def main() -> None:
    """Write the page and what is decided, each whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", nargs="?", choices=["read"])
    arguments = parser.parse_args()
    values = encoder_values() | lstm_values()
    with whole_file(PAGE) as temporary:
        temporary.write_text(page(values))
    print(f"written: {PAGE.relative_to(ROOT)}")
    numbers = {k: v for k, v in values.items() if not k.endswith("_table")}
    with whole_file(DECIDED) as temporary:
        temporary.write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n")
    if arguments.what == "read":
        readings.stamp(WRITTEN, digest())


if __name__ == "__main__":
    main()
