"""The numbers of the finished cases are made from the cases."""

import importlib.util
import json
import os
import re
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


def test_what_compress_says_under_its_tables_is_what_they_hold() -> None:
    """Sentences of `book/compress.md` that a new case could make false."""
    lost = json.loads((ROOT / "book" / "results" / "evidence.json").read_text())
    page = (ROOT / "book" / "compress.md").read_text(encoding="utf-8")

    def said(sentence: str) -> None:
        assert sentence in " ".join(page.split()), "the page has changed: read it anew"

    ways = ("latency", "fraction")
    said("On both tasks of that table it loses least without retraining")
    for task in ("mrpc", "rte"):
        rivals = [lost[f"mpnet_{task}_drone_{way}_none"] for way in ways]
        rivals += [lost[f"mpnet_{task}_svd_{way}_none"] for way in ways]
        rivals.append(lost[f"mpnet_{task}_first_layers_none"])
        assert lost[f"mpnet_{task}_drone_algorithm2_none"] < min(rivals)
    said("on the smaller one it alone stays near the dense model")
    assert lost["mpnet_rte_drone_algorithm2_none"] < 6 < 8 < min(rivals)
    said(
        "After retraining with a teacher the two change places on one task, and not on"
    )
    places = [
        lost[f"mpnet_{task}_drone_latency_full"]
        < lost[f"mpnet_{task}_drone_algorithm2_full"]
        for task in ("mrpc", "rte")
    ]
    assert places == [True, False]
    said("At 1.5× little is lost and the shorter search is enough.")
    assert lost["minilm_mrpc_15_drone_latency_none_high"] < 3
    said("At three times the speed nothing keeps this task untrained")
    assert min(v for k, v in lost.items() if re.fullmatch(r"minilm_mrpc_30_\w+_none", k)
    ) > 10  # fmt: skip
