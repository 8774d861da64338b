"""Write `book/evidence.md`: what the finished cases say so far.

    DRONE_DATA=/path/to/data python book/evidence.py        # make the page
    DRONE_DATA=/path/to/data python book/evidence.py read   # and say it was read again

Every number of the page is computed here from the files in `book/cases` and set into
the sentences of `book/readings/evidence.md`. They were written about those files: when
the cases change, a test is red until someone has read the page again and stamped it.
"""

import argparse
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drone.files import whole_file
from drone.lab import data, readings
from drone.lab.cases import Case, read_cases, unpack
from drone.lab.metrics import METRICS, paired_bootstrap

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "book" / "cases"
PAGE = ROOT / "book" / "evidence.md"
WRITTEN = ROOT / "book" / "readings" / "evidence.md"
JOBS = ("dense", "ranks", "retrain", "lstm-train", "lstm-shares")
METHODS = {
    "svd-fraction": "SVD, one fraction",
    "svd-latency": "SVD, its own search",
    "drone-fraction": "DRONE, one fraction",
    "drone-latency": "DRONE, latency search",
    "drone-algorithm2": "DRONE, Algorithm 2",
    "alternate-layers": "every second layer",
    "first-layers": "the first layers",
}
ARMS = {(0, False): "none", (1, False): "paper", (3, True): "full"}
KINDS = {"products": "all products", "but recurrent": "all but the recurrent ones"}
BAR = 0.02  # how much the perplexity may grow


def digest(folder: Path = CASES) -> str:
    """SHA-256 over the names and the content of the cases this page tells of."""
    found = hashlib.sha256()
    for job in JOBS:
        for path in sorted((folder / job).glob("*.json")):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def interval(draws: np.ndarray) -> str:
    """Write the middle 95 % of bootstrap draws."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"[{low:.1f},\u00a0{high:.1f}]"  # no break inside


def labels_of(task: str) -> np.ndarray:
    """Labels of a task's development rows, (rows,)."""
    rows = data.load(task, "local", [data.TASKS[task].dev_split])
    return np.asarray(rows[data.TASKS[task].dev_split]["label"])


def encoder_table(
    task: str, dense: Case, plans: Sequence[Case], arms: Sequence[Case]
) -> tuple[list[str], dict[tuple[str, str], float]]:
    """Return the lines of a task's table and {(method, arm): points lost}."""
    labels = labels_of(task)
    metric = next(iter(METRICS[task]))
    before = unpack(dense.result["dev_logits"]).astype(np.float32)
    score = dense.result["dev"][metric]
    commonest = 100 * np.bincount(labels).max() / len(labels)
    lost: dict[tuple[str, str], float] = {}
    cells: dict[tuple[str, str], str] = {}
    for case in arms:
        arm = case.settings["arm"]
        name = ARMS.get((arm["epochs"], arm["teacher"]))
        if name is None:
            continue
        after = unpack(case.result["dev_logits"]).astype(np.float32)
        key = (case.settings["method"], name)
        lost[key] = score - case.result["dev"][metric]
        draws = paired_bootstrap(task, labels, before, after)
        cells[key] = f"{lost[key]:.1f} {interval(draws)}"
    speed = {case.settings["method"]: case.result["speedup"] for case in plans}
    lines = [
        "| method | speed, predicted | not retrained | the paper's retraining | full |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, title in METHODS.items():
        row = [cells.get((method, name), "missing") for name in ARMS.values()]
        lines.append(f"| {title} | {speed[method]:.2f}× | {' | '.join(row)} |")
    head = (
        f"Points of {metric} lost of {score:.1f} (the dense model), with 95 % over "
        f"the {len(labels)} development rows. A model that always gives the commonest "
        f"label loses {score - commonest:.1f}."
    )
    return [head, "", *lines], lost


def lstm_tables() -> tuple[list[str], dict[str, float]]:
    """Return the lines on the large LSTM, and the numbers its sentences quote."""
    (train,) = read_cases(CASES, "lstm-train")
    dense = train.result["losses"]["test"]
    base = np.asarray(train.result["test_blocks"])
    numbers = {"dense": math.exp(dense), "epochs": len(train.result["history"])}
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
                name: 100 * math.expm1(row["test"] - dense)
                for name, row in pair.items()
            }
            blocks = {
                name: unpack(row["test_blocks"]).astype(float)
                for name, row in pair.items()
            }
            draw = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))
            gap = (blocks["data-aware"] - blocks["SVD"])[draw].mean(axis=1)
            lines.append(
                f"| {100 * share:.0f} % | +{grown['SVD']:.1f} % | "
                f"+{grown['data-aware']:.1f} % | "
                f"{100 * np.expm1(gap.mean()):+.1f} % {interval(100 * np.expm1(gap))} |"
            )
            for name, value in grown.items():
                if value <= 100 * BAR:
                    key = f"{kind} {name}".lower().replace(" ", "_").replace("-", "_")
                    numbers.setdefault(key, 100 * share)
        lines.append("")
    return lines, numbers


def page() -> str:
    """Return the page: the written text with all numbers and tables set in."""
    dense = {c.settings["task"]: c for c in read_cases(CASES, "dense")}
    plans, arms = read_cases(CASES, "ranks"), read_cases(CASES, "retrain")

    def of(task: str, cases: Sequence[Case]) -> list[Case]:
        return [case for case in cases if case.settings["task"] == task]

    tables: dict[str, list[str]] = {}
    lost: dict[str, dict[tuple[str, str], float]] = {}
    for task, case in dense.items():
        tables[task], lost[task] = encoder_table(
            task, case, of(task, plans), of(task, arms)
        )
    lstm, numbers = lstm_tables()
    (train,) = read_cases(CASES, "lstm-train")
    values: dict[str, Any] = numbers | {
        "machine": train.device,
        "dropout": train.settings["dropout"],
        "lstm_table": "\n".join(lstm),
    }
    for task, table in tables.items():
        values[f"{task}_table"] = "\n".join(table)
        for (method, arm), points in lost[task].items():
            values[f"{task}_{method}_{arm}".replace("-", "_")] = points
    return readings.fill(readings.load(WRITTEN).text, values)


def main() -> None:
    """Write the page, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", nargs="?", choices=["read"])
    arguments = parser.parse_args()
    with whole_file(PAGE) as temporary:
        temporary.write_text(page())
    print(f"written: {PAGE.relative_to(ROOT)}")
    if arguments.what == "read":
        readings.stamp(WRITTEN, digest())


if __name__ == "__main__":
    main()
