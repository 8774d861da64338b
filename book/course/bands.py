"""What a student's score may be, from the records of the published runs.

Seeds differ, so a rerun under a new seed gives another score. If scores over seeds are
roughly normal, the next one lies in mean ± t·s·√(1 + 1/n) in 95 of 100 cases.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Band:
    """One kind of record, the same under several seeds."""

    title: str
    file: str  # in book/results
    where: dict[str, Any]  # what its records have in common
    field: str  # which of their numbers
    scale: float = 1.0  # to points
    dense: str = ""  # its dense model's score; given, the band is of the points lost


MRPC = {"encoder": "minilm", "task": "mrpc"}
SEARCHED = {"encoder": "minilm", "asked": 2.0, "retrained": "none"}
SEARCHED |= {"way": "drone-latency"}  # Algorithm 2 has two seeds: no band that helps
BANDS = [
    Band("1: dense", "01-svd-baseline", MRPC | {"method": "dense"}, "accuracy"),
    Band(
        "1: SVD, rank 192",
        "01-svd-baseline",
        MRPC | {"method": "svd", "knob": 192},
        "accuracy",
    ),
    Band(
        "1: three of six layers",
        "01-svd-baseline",
        MRPC | {"method": "layers", "knob": 3},
        "accuracy",
    ),
    Band(
        "3: SVD, rank 128",
        "03-algorithm-1",
        MRPC | {"method": "svd", "rank": 128},
        "score",
        100,
    ),
    Band(
        "3: DRONE, rank 128",
        "03-algorithm-1",
        MRPC | {"method": "drone", "rank": 128},
        "score",
        100,
    ),
    # A search inherits its dense model's luck; the points lost beside it do not.
    Band(
        "5: dense",
        "05-algorithm-2",
        SEARCHED,
        "dense",
    ),
    Band(
        "5: *points lost* by the latency search for 2×",
        "05-algorithm-2",
        SEARCHED,
        "score",
        dense="dense",
    ),
]


# What a project is measured by: points lost at 2× beside the dense model of the seed.
LEVELS = [
    Band(
        f"{title} at 2×, {way}",
        "05-algorithm-2",
        SEARCHED | {"way": f"{key}-{spent}"},
        "score",
        dense="dense",
    )
    for key, title in (("svd", "plain SVD"), ("drone", "DRONE"))
    for spent, way in (("fraction", "one share"), ("latency", "its own search"))
]


def next_seed(scores: list[float]) -> tuple[float, float]:
    """Where the score of one more seed lies in 95 of 100 cases."""
    count = len(scores)
    if count < 2:
        raise ValueError(f"{count} seed: a band needs two at least.")
    width = float(student_t.ppf(0.975, count - 1)) * statistics.stdev(scores)
    middle, width = statistics.mean(scores), width * (1 + 1 / count) ** 0.5
    return middle - width, middle + width


def scores(band: Band, folder: Path = RESULTS) -> list[float]:
    """A band's scores, or what they lose beside their dense model, one a seed."""
    path = folder / f"{band.file}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {
        record["seed"]: band.scale * _of(record, band)
        for record in records
        if all(record.get(key) == value for key, value in band.where.items())
    }
    if not found:
        raise LookupError(f"{path.name} has no record with {band.where}.")
    return list(found.values())


def _of(record: dict[str, Any], band: Band) -> float:
    score = float(record[band.field])
    return float(record[band.dense]) - score if band.dense else score


def levels(folder: Path = RESULTS) -> str:
    """What the levels of the project lost under each seed, as a Markdown table."""
    lines = ["| compressed by | lost under each seed | mean |", "|---|---:|---:|"]
    for level in LEVELS:
        each = scores(level, folder)
        lost = ", ".join(f"{points:.1f}" for points in sorted(each))
        lines.append(f"| {level.title} | {lost} | {statistics.mean(each):.1f} |")
    return "\n".join(lines)


def table(folder: Path = RESULTS) -> str:
    """The bands as a Markdown table."""
    lines = [
        "| chapter and model | seeds | mean | a new seed |",
        "|---|---:|---:|---:|",
    ]
    for band in BANDS:
        each = scores(band, folder)
        low, high = next_seed(each)
        mean = statistics.mean(each)
        # Seeds that all give one score say nothing of a spread: no normal law is there.
        span = f"{low:.1f} to {high:.1f}" if high > low else "each time the same"
        lines.append(f"| {band.title} | {len(each)} | {mean:.1f} | {span} |")
    return "\n".join(lines)
