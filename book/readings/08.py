"""What was noticed in chapter 8's records after its run; see `08.md`."""

import json
import re
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
    "layers_eight": "student, fewer layers, int8",
    "teacher_eight": "teacher, int8",
}
ALL = [*REST, "rte"]
# name → the method, the one it loses more than, the tasks
PAIRS = {
    "rest": (JUDGED, ALONE, REST),
    "rest_eight": (JUDGED, f"{ALONE}, int8", REST),
    "rest_teaching": (FIRST, f"{FIRST}, distil", REST),
    "rest_budget": (JUDGED, f"{FIRST}, distil", REST),
    "first_over": (f"{FIRST}, distil", ALONE, ALL),
    "first_eight": (f"{FIRST}, distil", f"{ALONE}, int8", ALL),
    "layers_bits": ("student, fewer layers, int8", "student, fewer layers", ALL),
    "opinions": ("student, labels", ALONE, ALL),
    "teaching": (FIRST, f"{FIRST}, distil", ALL),
    "order": ("compress 20%, distil", f"{FIRST}, distil", ALL),
    "sst2": (JUDGED, ALONE, ["sst2"]),
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
    found["eight_less_low"] = -found["eight_gap_high"]
    found["eight_less_high"] = -found["eight_gap_low"]
    for name in ("judged", "eight"):
        found[f"{name}_more"] = found[f"{name}_lost"] - found["alone_lost"]
    found["thin_eight_more"] = found["thin_eight_lost"] - found["judged_lost"]
    found["margin"] = found["judged_low"] - PAPER["bar"]
    found["commonest"] = readings.shown(page, "verdict", "rte")[0]
    for name, (method, than, tasks) in PAIRS.items():
        more = np.mean([_loses_more(table, t, method, than) for t in tasks], axis=0)
        found[f"{name}_low"], found[f"{name}_high"] = np.percentile(more, [2.5, 97.5])
        gaps = [table.score[than, t] - table.score[method, t] for t in tasks]
        found[f"{name}_more"] = np.mean(gaps)
    # what the page prints itself is quoted, not drawn a second time
    for name, row in (("teaching", FIRST), ("order", "compress 20%, distil")):
        span = readings.shown(page, "orders-table", row)[-2:]
        found[f"{name}_low"], found[f"{name}_high"] = span
    found["opinions_low"], found["opinions_high"] = _printed(page, "distil-read")
    opinions = table.score[ALONE] - table.score["student, labels"]
    found["opinions_mrpc"] = opinions["mrpc"]
    found["rte_rows"] = rte_rows = len(_logits("rte")[ALONE])
    sure = (found["commonest"] * (100 - found["commonest"]) / rte_rows) ** 0.5
    found["alone_rte_errors"] = (found["alone_rte"] - found["commonest"]) / sure
    found["untaught_one_class"] = _commonest_said(f"{JUDGED.rpartition(',')[0]}", "rte")
    less = [found["layers_speed"], found["eight_speed"] / found["alone_speed"]]
    found["layers_product"] = less[0] * less[1]
    parts = [found[f"{n}_speed"] / found["alone_speed"] for n in ("judged", "eight")]
    found["product"] = found["alone_speed"] * parts[0] * parts[1]
    found["bits_on_thin"] = found["thin_eight_speed"] / found["judged_speed"]
    return found


def _printed(page: nbformat.NotebookNode, cell: str) -> tuple[float, float]:
    """The first interval in a cell's sentence, `(-0.7 to +3.5)`."""
    (output,) = next(c.outputs for c in page.cells if c.id == cell)
    found = re.search(r"\(([+-][\d.]+) to ([+-][\d.]+)\)", output.data["text/markdown"])
    if found is None:
        raise ValueError(f"cell {cell!r} prints no interval.")
    return float(found[1]), float(found[2])


def _logits(task: str) -> dict[str, np.ndarray]:
    """What each model said of a task's rows, {method: (rows, 2)}."""
    path = BOOK / "results" / "08-cases" / f"{task}-0.json"
    logits = json.loads(path.read_text())["case"]["logits"]
    return {name: np.asarray(each) for name, each in logits.items()}


def _commonest_said(method: str, task: str) -> int:
    """On how many rows a model says what it says most often."""
    return int(np.bincount(_logits(task)[method].argmax(axis=1)).max())


def _loses_more(table: pd.DataFrame, task: str, method: str, than: str) -> np.ndarray:
    """Draw how many points more a method loses on a task than another, (DRAWS,).

    A paired bootstrap over rows that needs no labels: of two classes, just one of two
    models is right on a row where they differ, and the scores tell on how many each is.

    Raises:
        ValueError: the scores do not fit the logits.
    """
    logits = _logits(task)
    one, other = (logits[name].argmax(axis=1) for name in (method, than))
    rows, differ = len(one), int((one != other).sum())
    more = round((table.score[than, task] - table.score[method, task]) * rows / 100)
    if (differ + more) % 2 or abs(more) > differ:
        raise ValueError(f"{task}: {differ} rows differ, and the scores by {more}.")
    worse, better = (differ + more) // 2, (differ - more) // 2
    shares = [worse / rows, better / rows, 1 - differ / rows]
    drawn = np.random.default_rng(ALL.index(task)).multinomial(rows, shares, DRAWS)
    lost: np.ndarray = 100 * (drawn[:, 0] - drawn[:, 1]) / rows
    return lost
