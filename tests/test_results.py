"""The kept cases of an edition: of its parameters, and in its published table.

Scores are checked where the real corpora are at hand (DRONE_DATA).
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from drone import data, records, training

BOOK = Path(__file__).resolve().parent.parent / "book"
CASES = sorted((BOOK / "results" / "07-cases").glob("*.json"))
PARAMETERS = yaml.safe_load((BOOK / "params" / "07.yaml").read_text())


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    kept = json.loads(path.read_text())
    case = records.load_case(path, kept["settings"])
    assert case is not None
    return kept["settings"], case


def as_text(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


@cache
def labels(task: str) -> np.ndarray:
    split = data.TASKS[task].dev_split
    return np.array(data.load(task, "local", [split])[split]["label"])


def test_there_are_cases() -> None:
    assert CASES


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_kept_case_was_made_with_the_editions_settings(path: Path) -> None:
    settings, _ = read(path)
    jobs = [
        job
        for job in PARAMETERS["jobs"]
        if all(settings[name] == job[name] for name in job.keys() & settings.keys())
        and settings["seed"] in job["seeds"]
        and settings["budget"] in job.get("budgets", [PARAMETERS["budget"]])
    ]
    assert len(jobs) == 1
    shared = (settings.keys() & PARAMETERS.keys()) - jobs[0].keys() - {"budget"}
    assert {"again", "grid", "held_rows", "repeats"} <= shared
    assert {n: settings[n] for n in shared} == {n: PARAMETERS[n] for n in shared}


def test_the_published_records_are_those_of_the_kept_cases() -> None:
    kept = []
    for settings, case in map(read, CASES):
        made = [record["method"] for record in case["records"]]
        assert made == list(case["logits"]) == settings["methods"]
        kept += case["records"]
    published = (BOOK / "results" / "07-bert-on-glue.jsonl").read_text()
    lines = [json.loads(line) for line in published.splitlines()]
    assert sorted(map(as_text, lines)) == sorted(map(as_text, kept))


@pytest.mark.skipif(not os.environ.get("DRONE_DATA"), reason="needs the real corpora")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_scores_are_those_of_the_kept_opinions(path: Path) -> None:
    _, case = read(path)
    for record in case["records"]:
        task, said = record["task"], np.array(case["logits"][record["method"]])
        top = np.sort(said, axis=1)
        # opinions are kept to four decimals: some may tie, a correlation feels it
        ties = int((top[:, -1:] == top[:, -2:-1]).sum())
        for name, metric in training.METRICS[task].items():
            assert 100 * metric(said, labels(task)) == pytest.approx(
                record[name], abs=0.01 + 300 * ties / len(said)
            )
