"""The numbers of the finished cases are made from the cases."""

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "evidence", ROOT / "book" / "evidence.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif("DRONE_DATA" not in os.environ, reason="needs the labels of MRPC")
def test_the_numbers_are_made_from_the_cases(
    evidence: ModuleType,
) -> None:
    decided = json.loads(evidence.DECIDED.read_text())
    assert decided == evidence.encoder_values()
