"""The finished models once more, on rows that no development set has. Chapters 5, 7.

MRPC has 408 development rows, and a point is four of them. The corpus itself came with
1,725 further pairs and their labels, which GLUE hides and nothing here has looked at.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drone.lab import data
from drone.lab.arms import Arm
from drone.lab.cases import Case, pack, read_cases, run_case, unpack
from drone.lab.clocks import DENSE
from drone.lab.glue import Bench
from drone.lab.glue_read import Study
from drone.lab.loop import logits_of
from drone.lab.metrics import METRICS

SPLIT = "test"


def examine(
    bench: Bench,
    method: str,
    speedup: float = 1.0,
    name: str = "none",
    rate: float | None = None,
) -> Case:
    """Make a finished model again and score it on the test rows, or read the case.

    A case keeps no weights, so the model is made from the kept ranks and the chosen
    rate; what it says of the development rows must be what the case holds.

    Args:
        bench: of the dense model, whose weights are at hand.
        method: of `drone.lab.methods.METHODS`, or `dense`.
        speedup: the predicted one; of `dense` any.
        name: of the retraining, as in `drone.lab.arms.Arm.named`.
        rate: the only one that was tried; None: those of `drone.lab.ladder`.

    Returns:
        The case: `test`, its scores in points, and `test_logits`.

    Raises:
        ValueError: made again, the model is another, as on another processor; or the
            task has no labelled test rows.
    """
    dense = method == DENSE
    case = bench.dense() if dense else bench.retrain(method, speedup, name, rate)

    def measure(_: Mapping[str, Any]) -> dict[str, Any]:
        best = case.result.get("rate")
        model = (
            bench.model
            if dense
            else bench.retrained(method, speedup, Arm.named(name), best)
        )
        if pack(logits_of(model, bench.dev).cpu()) != case.result["dev_logits"]:
            raise ValueError(
                f"{case.path}: made again, the model says something else of the "
                f"development rows. The case was run on {case.device}; run the "
                "examination on such a machine, with as many threads."
            )
        rows = bench.rows_of(SPLIT)
        logits = logits_of(model, rows)
        return {
            "test": bench.scores(logits, rows.labels),
            "test_logits": pack(logits.cpu()),
        }

    return run_case(bench.store, "exam", case.settings | {"split": SPLIT}, measure)


def with_test(study: Study, store: Path, source: str = "local") -> Study:
    """Return a study of the examined cases, judged on development and test rows.

    Args:
        study: as `drone.lab.glue_read.studies` gives it.
        store: folder of the cases.
        source: of the test labels, as in `drone.lab.data.load`.

    Returns:
        The same encoder, task and plans; `labels` and logits of all rows, development
        rows first; only seeds, methods and retrainings that were examined. Without
        any: a study with no cases.

    Raises:
        ValueError, FileNotFoundError: as `read_cases` and `drone.lab.data.load`.

    >>> study = Study("minilm", "agreement", labels=np.array([0, 1, 1]))
    >>> with_test(study, Path("a folder with no cases")).dense
    {}
    """
    exams = [
        case
        for case in read_cases(store, "exam")
        if (case.settings["encoder"], case.settings["task"])
        == (study.encoder, study.task)
    ]
    empty = replace(study, dense={}, arms={})
    if not exams:
        return empty
    test = data.load(study.task, source, [SPLIT])[SPLIT]
    labels = np.concatenate([study.labels, np.asarray(test["label"])])
    arms = {key: _joined(cases, exams, labels) for key, cases in study.arms.items()}
    return replace(
        study,
        labels=labels,
        dense=_joined(study.dense, exams, labels),
        arms={key: cases for key, cases in arms.items() if cases},
    )


def _joined(
    cases: Mapping[int, Case], exams: Iterable[Case], labels: np.ndarray
) -> dict[int, Case]:
    """The cases that were examined, with what they said of all rows."""
    found = {}
    for seed, case in cases.items():
        wanted = case.settings | {"split": SPLIT}
        same = [exam.result for exam in exams if exam.settings == wanted]
        if same:
            both = case.result["dev_logits"], same[0]["test_logits"]
            logits = np.concatenate([unpack(each) for each in both])
            scores = {
                metric: 100 * function(logits.astype(np.float32), labels)
                for metric, function in METRICS[case.settings["task"]].items()
            }
            told = {"dev_logits": pack(torch.from_numpy(logits)), "dev": scores}
            found[seed] = replace(case, result=case.result | told)
    return found
