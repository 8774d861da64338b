"""The process is the unit: its own luck must be in the interval."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drone.lab import clocks
from drone.lab.clocks import clock, shaped, speedup
from drone.lab.formats import weight_bytes
from drone.layers.attention import LowRankSelfAttention
from drone.layers.linear import LowRankLinear
from drone.model.adapters import encoder_layers
from drone.model.compress import compress
from tests.lab.test_methods import make_model


def processes(
    draw: np.random.Generator, ratio: float, count: int = 5
) -> list[dict[str, list[float]]]:
    """Rounds that hardly vary, in processes that do: as one finds them."""
    found = []
    for _ in range(count):
        luck = np.exp(draw.normal(0, 0.05))
        dense = draw.uniform(0.9, 1.1, 20)  # slow spells hit both alike
        thin = dense / ratio * luck * np.exp(draw.normal(0, 0.005, 20))
        found.append({"dense": dense.tolist(), "a": thin.tolist()})
    return found


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        _, low, high = speedup(processes(draw, 2.0), "a")
        inside += low <= 2.0 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_the_same_shape_twice_overlaps() -> None:
    draw = np.random.default_rng(1)
    overlaps = 0
    for _ in range(100):
        _, low, high = speedup(processes(draw, 2.0), "a")
        _, other_low, other_high = speedup(processes(draw, 2.0), "a")
        overlaps += low <= other_high and other_low <= high
    assert overlaps >= 95


def test_the_language_model_of_chapter_6_is_timed_too() -> None:
    plan = {"ranks": {"stack.0.recurrent": 8, "stack.2.decoder": 8}}
    found = clocks.time_shapes(
        {"encoder": "lstm-tiny", "source": "", "plans": {"a": plan}, "batch": 1}
        | {"length": 3, "threads": 1, "rounds": 2}
    )
    assert {name: len(rounds) for name, rounds in found.items()} == {"dense": 2, "a": 2}
    small = shaped(clocks.dense_model("lstm-tiny", ""), plan)
    assert [n for n, m in small.named_modules() if isinstance(m, LowRankLinear)] == [
        "stack.0.recurrent",
        "stack.2.decoder",
    ]


def test_one_process_gives_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        speedup(processes(np.random.default_rng(0), 2.0, count=1), "a")


def test_a_shape_is_that_of_the_compressed_model() -> None:
    model = make_model()
    ranks = {
        "bert.encoder.layer.0.attention.self.value": 8,
        "bert.encoder.layer.0.attention.self": 8,
        "bert.encoder.layer.1.intermediate.dense": 16,
    }
    made, real = shaped(model, {"ranks": ranks}), compress(model, ranks)
    for (name, a), (other, b) in zip(
        made.named_parameters(), real.named_parameters(), strict=True
    ):
        assert name == other and a.shape == b.shape
    kinds = [type(made.get_submodule(name)) for name in ranks]
    assert issubclass(kinds[1], LowRankSelfAttention)
    assert kinds[0] is kinds[2] is LowRankLinear
    assert len(encoder_layers(shaped(model, {"layers": [0, 3]}))) == 2
    with pytest.raises(ValueError, match="ranks or layers"):
        shaped(model, {"speedup": 2.0})


def test_a_shape_has_a_format() -> None:
    model = make_model()
    ranks = {"bert.encoder.layer.0.attention.self.value": 8}
    for plan in ({}, {"ranks": ranks}, {"layers": [0]}):
        plain = shaped(model, plan | {"format": "float32"})
        eight = shaped(model, plan | {"format": "int8"})
        assert weight_bytes(eight) < weight_bytes(plain)
    with pytest.raises(ValueError, match="no format 'int4'"):
        shaped(model, {"format": "int4"})


def test_a_clock_runs_in_fresh_processes_and_is_a_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **how: Any) -> Any:
        started.append(command)
        settings = how["input"]
        assert '"rounds": 3' in settings and "speedup" not in settings
        return subprocess.CompletedProcess(
            command, 0, 'a line of noise\n{"dense": [2.0, 2.0], "thin": [1.0, 1.0]}\n'
        )

    monkeypatch.setattr(clocks.subprocess, "run", run)
    plans = {"thin": {"layers": [0, 1, 2], "speedup": 2.0}}
    for _ in range(2):
        case = clock(tmp_path, "minilm", "embedded", plans, rounds=3)
        assert case.result["speedups"] == {"thin": [2.0, 2.0, 2.0]}
        assert len(case.result["seconds"]) == 5
    assert len(started) == 5 and case.found
    with pytest.raises(ValueError, match="at least 5"):
        clock(tmp_path, "minilm", "embedded", plans, processes=4)
    with pytest.raises(ValueError, match="baseline"):
        clock(tmp_path, "minilm", "embedded", {"dense": {"layers": [0]}})


def test_one_process_times_all_shapes_on_one_batch() -> None:
    threads = torch.get_num_threads()
    try:
        found = clocks.time_shapes(
            {
                "encoder": "minilm",
                "source": "embedded",
                "plans": {"one layer": {"layers": [0]}, "all": {"layers": range(6)}},
                "batch": 2,
                "length": 8,
                "threads": 1,
                "rounds": 3,
            }
        )
    finally:
        torch.set_num_threads(threads)
    assert {name: len(s) for name, s in found.items()} == {
        "dense": 3,
        "one layer": 3,
        "all": 3,
    }
    assert min(found["one layer"]) < min(found["dense"])
