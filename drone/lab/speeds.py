"""A table of seconds measured once on a reference processor, to predict speed-ups.

    python -m drone.lab.speeds --encoder minilm --batch 8 --length 54 --out FILE

Times depend on shapes alone. So a search may run anywhere, on a GPU too, and still aim
at a speed on the reference processor: it takes this table along.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drone.files import whole_file
from drone.lab import encoders
from drone.lab.depth import only_layers
from drone.model.adapters import encoder_layers, encoder_linears
from drone.search.costs import (
    ALIGNED,
    GRID,
    Costs,
    ModuleCosts,
    measure_alone,
    searchable,
)
from drone.search.disturbed import refuse_disturbed
from drone.timing import processor, time_calls


@dataclass(frozen=True)
class Speeds:
    """Seconds of one model on one batch.

    Attributes:
        costs: of every module that some method replaces: the attention blocks, and
            all Linears of the layers, those inside a block too.
        layers: of the encoder.
        kept: layers of a shorter model that was timed beside it.
        shorter: that one's seconds.
        conditions: batch, length, threads, processor, and `agreement`: the largest
            relative difference of two independent tables.
    """

    costs: Costs
    layers: int
    kept: int
    shorter: float
    conditions: dict[str, Any]

    def of(self, names: Iterable[str]) -> Costs:
        """Return the costs of these modules only, in network order.

        Raises:
            ValueError: a module that is not in the table.
        """
        wanted = set(names)
        unknown = sorted(wanted - set(self.costs.modules))
        if unknown:
            raise ValueError(f"no times of {', '.join(unknown[:3])} in the table.")
        modules = {n: c for n, c in self.costs.modules.items() if n in wanted}
        return Costs(self.costs.whole, modules)

    def depth_speedup(self, kept: int) -> float:
        """Predict the speed-up of a dense model with so many of the layers."""
        whole = self.costs.whole
        layer = (whole - self.shorter) / (self.layers - self.kept)
        return whole / (whole - (self.layers - kept) * layer)

    def to_json(self) -> str:
        """Write all numbers as text; `from_json` reads them back, equal."""
        return json.dumps(vars(self) | {"costs": self.costs.to_json()})

    @classmethod
    def from_json(cls, text: str) -> "Speeds":
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return cls(**(fields | {"costs": Costs.from_json(fields["costs"])}))


def measure_speeds(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    most: int = 30,
    agree: float = 0.05,
) -> Speeds:
    """Measure until two independent tables agree; the least seconds count.

    Whatever else the machine does can only add time, so the minimum over many rounds
    is the best guess at what a quiet machine needs.

    Args:
        model: an encoder of at least two layers, in eval mode.
        batch: keyword arguments of the forward pass.
        most: tables measured at most, at least 2; they go to two piles in turn.
        agree: largest relative difference of the piles' minima that is good enough.

    Raises:
        ValueError: `most` is below 2; even the least seconds are those of a disturbed
            clock; and what `drone.costs.measure_alone` raises.
    """
    if most < 2:
        raise ValueError(f"most is {most}; at least 2 tables are compared.")
    piles: list[Speeds] = []
    apart = np.inf
    for turn in range(most):
        found = _measure_once(model, batch)
        if turn < 2:
            piles.append(found)
        else:
            piles[turn % 2] = _least(piles[turn % 2], found)
        if turn > 2:  # two tables on either pile
            apart = _apart(*piles)
            if apart <= agree:
                break
    size = next(iter(batch.values())).shape
    conditions = {
        "batch": size[0],
        "length": size[1],
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "agreement": round(float(apart), 4) if np.isfinite(apart) else None,
    }
    best = _least(*piles)
    refuse_disturbed(best.costs.modules)  # every table may have been
    return replace(best, conditions=conditions)


def _measure_once(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Speeds:
    # blocks too, beside the queries and keys inside them: a method takes one or other
    wanted = set(searchable(model)) | set(encoder_linears(model))
    names = [name for name, _ in model.named_modules() if name in wanted]
    # unscaled: the least of many tables counts, and a factor has no least
    alone = measure_alone(model, batch, names, GRID, repeats=3)
    layers = len(encoder_layers(model))
    kept = layers // 2
    half = only_layers(model, range(kept))
    with torch.inference_mode():
        calls = {"whole": partial(model, **batch), "half": partial(half, **batch)}
        times = time_calls(calls, repeats=3, warmup=1)
    whole = float(times["whole"].min())
    shorter = float(times["half"].min())
    return Speeds(Costs(whole, alone), layers, kept, shorter, {})


def _least(a: Speeds, b: Speeds) -> Speeds:
    """Take the smaller of two numbers everywhere."""
    modules = {
        name: ModuleCosts(
            one.kind,
            one.ranks,
            one.weights,
            tuple(map(min, one.seconds, b.costs.modules[name].seconds)),
        )
        for name, one in a.costs.modules.items()
    }
    costs = Costs(min(a.costs.whole, b.costs.whole), modules)
    return Speeds(costs, a.layers, a.kept, min(a.shorter, b.shorter), {})


def _apart(a: Speeds, b: Speeds) -> float:
    """Largest relative difference of two tables."""

    def numbers(table: Speeds) -> np.ndarray:
        modules = table.costs.modules.values()
        seconds = [s for module in modules for s in module.seconds]
        return np.array([table.costs.whole, table.shorter, *seconds])

    first, second = numbers(a), numbers(b)
    return float(np.abs(first / second - 1).max())


def fill(costs: Costs, step: int = ALIGNED) -> Costs:
    """Add the ranks between the measured ones, their times interpolated.

    A fraction of all ranks can then be set finely enough to meet a speed within 1 %.

    Args:
        costs: as measured.
        step: ranks added are its multiples, between the smallest and the largest.
    """
    modules = {}
    for name, module in costs.modules.items():
        if not module.ranks:  # nothing saves: only dense
            modules[name] = module
            continue
        low, high = module.ranks[0], module.ranks[-1]
        between = range(-(-low // step) * step, high + 1, step)
        ranks = sorted({*module.ranks, *between})
        each = module.weights[0] // low  # a rank's weights, for blocks and Linears
        seconds = np.interp(ranks, module.ranks, module.seconds[:-1])
        modules[name] = ModuleCosts(
            module.kind,
            tuple(ranks),
            (*(each * rank for rank in ranks), module.weights[-1]),
            (*map(float, seconds), module.seconds[-1]),
        )
    return Costs(costs.whole, modules)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the table of an encoder on this machine, and write it."""
    parser = argparse.ArgumentParser(
        prog="python -m drone.lab.speeds", description=__doc__
    )
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--source", default="embedded", help="of the encoder")
    for name, usual in (("batch", 8), ("length", 54), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--most", type=int, default=80, help="tables at most")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    model, _ = encoders.encoder(asked.encoder, asked.source)
    draw, size = torch.Generator().manual_seed(0), (asked.batch, asked.length)
    words = torch.randint(model.config.vocab_size, size, generator=draw)
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    speeds = measure_speeds(model, batch, asked.most)
    with whole_file(asked.out) as temporary:
        temporary.write_text(speeds.to_json())
    print(f"written: {asked.out}, {speeds.conditions}")


if __name__ == "__main__":
    main()
