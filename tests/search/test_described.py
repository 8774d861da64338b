"""A trace serves one search only: what decides a loss is in its key."""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drone import search_ranks
from drone.search.described import described
from drone.search.trials import search_key

Act = Callable[[Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, scale: float, act: Act, **more: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(2))
        self.scale, self.act = scale, act
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = self.act(layer(x)) * self.scale
        return {"loss": (x.mean(1) - labels).square().mean()}


BATCHES = [{"x": torch.randn(16, 32), "labels": torch.randn(16)}]


def times(by: float) -> Act:
    return lambda x: by * x


def power(x: Tensor, exponent: float = 1.0) -> Tensor:
    return x**exponent


class Settings:
    def __init__(self, by: float) -> None:
        self.by = by


@pytest.mark.parametrize(
    "other",
    [
        lambda: Net(3.0, torch.relu),
        lambda: Net(1.0, torch.tanh),
        lambda: Net(1.0, torch.relu, _private=1),
        lambda: Net(1.0, torch.relu, table={"a": 1}),
        lambda: Net(1.0, torch.relu, bare=torch.ones(2)),
        lambda: Net(1.0, torch.relu, told=Settings(2.0)),
    ],
)
def test_an_attribute_of_a_module_is_in_the_key(other: Callable[[], Net]) -> None:
    key = search_key(Net(1.0, torch.relu), BATCHES)
    assert key == search_key(copy.deepcopy(Net(1.0, torch.relu)), BATCHES)
    assert key != search_key(other(), BATCHES)
    assert search_key(other(), BATCHES) == search_key(copy.deepcopy(other()), BATCHES)


def test_one_attribute_with_another_value_is_another_key() -> None:
    one, two = (
        search_key(Net(1.0, act, told=Settings(by), bare=torch.tensor(by)), BATCHES)
        for act, by in [(times(2.0), 2.0), (times(3.0), 3.0)]
    )
    assert one != two


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    how = {
        "method": "uniform", "layers": "layers", "keep": 0.5,
        "modules": ["layers.0.0", "layers.1.0"], "trace": tmp_path / "trace",
    }  # fmt: skip
    search_ranks(Net(1.0, torch.relu), BATCHES, **how)
    search_ranks(Net(1.0, torch.relu), BATCHES, **how)  # the same one goes on
    with pytest.raises(ValueError, match="the trace of another model"):
        search_ranks(Net(3.0, torch.tanh), BATCHES, **how)


def test_closures_defaults_and_what_is_bound_tell_functions_apart() -> None:
    pairs = [
        (times(1.0), times(5.0)),
        (partial(power, exponent=1.0), partial(power, exponent=2.0)),
        (Settings(1.0), Settings(2.0)),
        (lambda x, by=1: x * by, lambda x, by=2: x * by),
    ]
    for one, other in pairs:
        assert described(one) == described(copy.deepcopy(one))
        assert described(one) != described(other)
    assert described(None) != described(power)


def test_a_function_is_told_alike_in_every_process() -> None:
    code = (
        "from drone.search.described import described\n"
        "def f(x, s=frozenset('abc')):\n"
        "    return [y for y in map(lambda z: z in {'p', 'q', 'r'}, x)]\n"
        "print(described(f))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, text=True
        ).stdout
        for _ in range(3)
    }
    assert len(said) == 1 and "0x" not in said.pop()


def test_a_pass_does_not_change_the_key(
    family: PreTrainedModel, task: Callable[..., list[dict[str, Tensor]]]
) -> None:
    batches = task(family)
    key = search_key(family, batches)
    with torch.no_grad():
        family(**batches[0])
    assert search_key(family, batches) == key
