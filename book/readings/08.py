"""What was noticed in chapter 8's records after its run; see `08.md`."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

from drone.lab import readings, records

BOOK = Path(__file__).parents[1]
PAPER = {"bar": 12.3, "bar_points": 1.5}  # its headline, our bar
DRAWS = 20_000  # of a bootstrap
REST = ["mrpc", "sst2"]  # the tasks without RTE
ALONE, FIRST = "student, distilled", "distil, compress 20%"
JUDGED = "distil, compress 50%, distil"
NAMES = {
    "judged": JUDGED,
    "alone": ALONE,
    "eight": f"{ALONE}, int8",
    "thin_eight": f"{JUDGED}, int8",
    "first": f"{FIRST}, distil",
    "first_untaught": FIRST,
    "layers": "student, fewer layers",
    "teacher_eight": "teacher, int8",
}


def values() -> dict[str, float]:
    """Name → number for the passages of `08.md`."""
    page = nbformat.read(BOOK / "chapters" / "08-distillation.ipynb", 4)
    table = records.load(BOOK / "results" / "08-distillation.jsonl")
    table = table.set_index(["method", "task"])
    found: dict[str, float] = dict(PAPER)
    for name, method in NAMES.items():
        rows = table.loc[method]
        lost = table.score["teacher"] - rows.score
        found[f"{name}_lost"] = lost.mean()
        found[f"{name}_rest_lost"] = lost[REST].mean()
        found[f"{name}_speed"] = np.exp(np.log(rows["speed-up"]).mean())
        found[f"{name}_rest_speed"] = np.exp(np.log(rows["speed-up"][REST]).mean())
        found[f"{name}_low"] = rows.low.min()
        for task in rows.index:
            found[f"{name}_{task}"] = rows.score[task]
            found[f"{name}_{task}_speed"] = rows["speed-up"][task]
    for name in ("eight", "first", "layers"):
        span = readings.shown(page, "beside-the-judged", NAMES[name])[-2:]
        found[f"{name}_gap_low"], found[f"{name}_gap_high"] = span
    for name in ("judged", "eight"):
        found[f"{name}_more"] = found[f"{name}_lost"] - found["alone_lost"]
    found["thin_eight_more"] = found["thin_eight_lost"] - found["judged_lost"]
    found["margin"] = found["judged_low"] - PAPER["bar"]
    found["commonest"] = readings.shown(page, "verdict", "rte")[0]
    for name, pair in {
        "rest": (JUDGED, ALONE),
        "rest_eight": (JUDGED, f"{ALONE}, int8"),
        "rest_teaching": (FIRST, f"{FIRST}, distil"),
    }.items():
        more = np.mean([_loses_more(table, task, *pair) for task in REST], axis=0)
        found[f"{name}_low"], found[f"{name}_high"] = np.percentile(more, [2.5, 97.5])
        found[f"{name}_more"] = np.mean(
            [table.score[pair[1], task] - table.score[pair[0], task] for task in REST]
        )
    opinions = table.score[ALONE] - table.score["student, labels"]
    found["opinions"] = opinions.mean()
    found["opinions_mrpc"] = opinions["mrpc"]
    parts = [found[f"{n}_speed"] / found["alone_speed"] for n in ("judged", "eight")]
    found["product"] = found["alone_speed"] * parts[0] * parts[1]
    found["bits_on_thin"] = found["thin_eight_speed"] / found["judged_speed"]
    return found


def _loses_more(table: pd.DataFrame, task: str, method: str, than: str) -> np.ndarray:
    """Draw how many points more a method loses on a task than another, (DRAWS,).

    A paired bootstrap over rows that needs no labels: of two classes, just one of two
    models is right on a row where they differ, and the scores tell on how many each is.

    Raises:
        ValueError: the scores do not fit the logits.
    """
    path = BOOK / "results" / "08-cases" / f"{task}-0.json"
    logits = json.loads(path.read_text())["case"]["logits"]
    one, other = (np.argmax(logits[name], axis=1) for name in (method, than))
    rows, differ = len(one), int((one != other).sum())
    more = round((table.score[than, task] - table.score[method, task]) * rows / 100)
    if (differ + more) % 2 or abs(more) > differ:
        raise ValueError(f"{task}: {differ} rows differ, and the scores by {more}.")
    worse, better = (differ + more) // 2, (differ - more) // 2
    shares = [worse / rows, better / rows, 1 - differ / rows]
    drawn = np.random.default_rng(0).multinomial(rows, shares, DRAWS)
    lost: np.ndarray = 100 * (drawn[:, 0] - drawn[:, 1]) / rows
    return lost
