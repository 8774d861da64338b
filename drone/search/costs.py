"""What each module costs at each rank it may have: weights and milliseconds."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from drone.devices import to_device
from drone.layers.attention import (
    ATTENTION,
    attention_heads,
    query_and_key,
)
from drone.layers.linear import (
    as_linear,
    is_linear,
    linear_multiply_adds,
)
from drone.layers.lstm import Recurrent
from drone.math.factorize import break_even_rank
from drone.model.adapters import encoder_linears, known_blocks, module_named
from drone.search.disturbed import refuse_disturbed
from drone.search.thin import thin_model, thin_module
from drone.timing import clock_of, time_calls

# Shares of the largest rank that saves multiply-adds.
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LEAST = 0.05  # of a pass: whoever saves less cannot be told from the clock's noise
VERSION = 2  # since 2 seconds say what modules save together; part of a search's key
ALIGNED = 8  # ranks are multiples of it: kernels work on blocks of so many numbers


@dataclass(frozen=True)
class ModuleCosts:
    """One module's costs at each rank it may have. The last entry is the dense module.

    Attributes:
        kind: what modules of the same shapes on the same input share.
        ranks: ascending; all save multiply-adds.
        weights: numbers in its matrices, one entry more than `ranks`. Each is used
            once a token, so these are its multiply-adds a token too. Of an attention
            block: in the queries and keys.
        seconds: measured, of all its calls in one pass of the batch that was timed, as
            they count in that pass (`measure`). Of a block: with its values (and output
            projection, where it has one) dense.
        grid: all ranks that were measured, where `faster` has left some out; else ().
    """

    kind: str
    ranks: tuple[int, ...]
    weights: tuple[int, ...]
    seconds: tuple[float, ...]
    grid: tuple[int, ...] = ()

    def option(self, rank: int | None) -> int:
        """Index of a rank in the lists; None: of the dense module, the last."""
        return len(self.ranks) if rank is None else self.ranks.index(rank)

    def faster(self) -> "ModuleCosts":
        """Leave out the ranks that were measured no faster than the dense module."""
        dense = len(self.ranks)
        kept = [i for i in range(dense) if self.seconds[i] < self.seconds[dense]]
        if len(kept) == dense:
            return self
        return ModuleCosts(
            self.kind,
            tuple(self.ranks[i] for i in kept),
            tuple(self.weights[i] for i in [*kept, dense]),
            tuple(self.seconds[i] for i in [*kept, dense]),
            self.grid or self.ranks,
        )


@dataclass(frozen=True)
class Costs:
    """The costs of all modules of a search, and of the whole model. Made by `measure`.

    Attributes:
        whole: seconds of the dense model's forward pass.
        modules: {name: its costs}, in network order.
    """

    whole: float
    modules: dict[str, ModuleCosts]

    def weights(self, ranks: Mapping[str, int]) -> int:
        """Sum the weights of all modules, those without a rank dense."""
        return sum(
            costs.weights[costs.option(ranks.get(name))]
            for name, costs in self.modules.items()
        )

    def latency(self, ranks: Mapping[str, int]) -> float:
        """Predict the seconds of a pass: the whole less what each module saves."""
        saved = sum(
            costs.seconds[-1] - costs.seconds[costs.option(ranks.get(name))]
            for name, costs in self.modules.items()
        )
        return self.whole - saved

    def speedup(self, ranks: Mapping[str, int]) -> float:
        """Predict the dense model's time over the compressed one's."""
        return self.whole / self.latency(ranks)

    def faster(self) -> "Costs":
        """Leave out the ranks that were measured no faster than the dense module."""
        return Costs(self.whole, {n: c.faster() for n, c in self.modules.items()})

    def smallest(self, by_seconds: bool) -> dict[str, int]:
        """Return the rank of each module that takes least: seconds, or weights.

        Measured times need not grow with the rank.

        >>> one = ModuleCosts("wide", (2, 4), (20, 40, 80), (3e-5, 1e-5, 4e-5))
        >>> costs = Costs(9e-5, {"dense": one})
        >>> costs.smallest(by_seconds=True), costs.smallest(by_seconds=False)
        ({'dense': 4}, {'dense': 2})
        """
        found = {}
        for name, module in self.modules.items():
            cost = module.seconds if by_seconds else module.weights
            if module.ranks:
                found[name] = min(zip(cost, module.ranks, strict=False))[1]
        return found

    def to_json(self) -> str:
        """Write all numbers as text; `from_json` reads them back, equal."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Costs":
        """Read what `to_json` wrote."""
        read = json.loads(text)
        modules = {
            name: ModuleCosts(
                each["kind"],
                tuple(each["ranks"]),
                tuple(each["weights"]),
                tuple(each["seconds"]),
                tuple(each.get("grid", ())),  # plans of format 1 have none
            )
            for name, each in read["modules"].items()
        }
        return cls(read["whole"], modules)


def searchable(
    model: nn.Module, layers: str | Iterable[str] | None = None
) -> list[str]:
    """Name what a search compresses: attention blocks, and Linears outside of Q and K.

    In network order; of a model without a known attention block, all Linears of its
    encoder layers.
    """
    linears = encoder_linears(model, layers)
    blocks = known_blocks(model)
    inside = {
        f"{name}.{part}"
        for name, block in blocks.items()
        for names in [ATTENTION[type(block).__name__]]
        for part in (names.query, names.key)
    }
    wanted = (set(linears) - inside) | set(blocks)
    return [name for name, _ in model.named_modules() if name in wanted]


def largest_rank(module: nn.Module) -> int:
    """Return the largest rank that saves multiply-adds: break-even, or head size − 1.

    Raises:
        ValueError: the module is neither a Linear nor a known, dense attention block.
    """
    if is_linear(module):
        return break_even_rank(*as_linear(module).weight.shape)
    query, _ = query_and_key(module)
    return query.out_features // attention_heads(module) - 1


def grid_ranks(
    largest: int, grid: Sequence[float] = GRID, *, aligned: bool = False
) -> tuple[int, ...]:
    """Turn shares of the largest rank into ranks, ascending, each once.

    Args:
        largest: rank that still saves. Where it is 32 or more, ranks are rounded down
            to multiples of 8.
        grid: shares in (0, 1].
        aligned: round to multiples of 8 below 32 too; there may be none. `measure`
            does so for heads on a GPU, whose fused attention takes no others.

    >>> grid_ranks(31), grid_ranks(31, aligned=True)
    ((3, 6, 9, 12, 15, 18, 21, 24, 27, 31), (8, 16, 24))

    Raises:
        ValueError: the grid is empty or has a share outside (0, 1].
    """
    if not grid or not all(0 < share <= 1 for share in grid):
        raise ValueError(f"the grid is {list(grid)}; shares in (0, 1] are needed.")
    step = ALIGNED if aligned or largest >= 4 * ALIGNED else 1
    ranks = {max(step, int(share * largest + 1e-9) // step * step) for share in grid}
    return tuple(sorted(rank for rank in ranks if rank <= largest))


def measure(
    model: nn.Module,
    batch: Mapping[str, Any],
    names: Iterable[str] | None = None,
    grid: Sequence[float] = GRID,
    repeats: int = 20,
) -> Costs:
    """Measure what each module costs dense and at each rank of the grid.

    Modules are timed alone (`measure_alone`), and what they save alone is not quite
    what they save in a pass: there a thin one finds its inputs in the caches. So the
    model with each module at its quickest rank is timed beside the dense one, and all
    seconds get the one factor that makes the prediction right for it. Where these ranks
    save less than `LEAST` of the pass, nothing is scaled. Chapter 5.

    Args:
        model: in eval mode.
        batch: keyword arguments of the forward pass; moved to the model's device.
        names: of Linears and attention blocks; None: `searchable(model)`.
        grid: ranks as shares of the largest one that saves.
        repeats: rounds; the median counts.

    Raises:
        ValueError: a name the model does not have, a module that cannot be compressed
            or is never reached, a model in training mode, a clock that something else
            on the machine has disturbed (`refuse_disturbed`).

    Warns:
        UserWarning: the thinnest model is no faster than the dense one, though its
            modules are, alone; then nothing is scaled.
    """
    alone = measure_alone(model, batch, names, grid, repeats)
    refuse_disturbed(alone)
    return _together(model, to_device(batch, model), alone, repeats)


def measure_alone(
    model: nn.Module,
    batch: Mapping[str, Any],
    names: Iterable[str] | None = None,
    grid: Sequence[float] = GRID,
    repeats: int = 20,
) -> dict[str, ModuleCosts]:
    """Measure each module by itself: {name: costs}.

    One module of each kind is timed, on each input it gets in this batch: one that is
    called several times in a pass costs the sum of its calls. All kinds and ranks take
    turns, so that each finds the caches as another left them. Thin modules are filled
    with random numbers.

    Args, Raises: those of `measure`; but a disturbed clock is for the caller to refuse,
    who may take the least of several tables.

    >>> model = nn.Sequential(nn.Linear(32, 32)).eval()
    >>> alone = measure_alone(model, {"input": torch.ones(1, 32)}, ["0"], repeats=2)
    >>> alone["0"].weights[-1], len(alone["0"].seconds) == len(alone["0"].ranks) + 1
    (1024, True)
    """
    names = searchable(model) if names is None else list(names)
    modules = {name: module_named(model, name) for name in names}
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call its eval() first.")
    batch = to_device(batch, model)
    calls: dict[str, Callable[[], Any]] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, str] = {}
    made: dict[str, list[int]] = {}  # of each kind: how often each of its inputs comes
    with torch.inference_mode():
        inputs = _inputs(model, modules, batch)
        for name, module in modules.items():
            try:
                kinds[name] = kind = _kind(module, inputs[name])
                if kind in ranks:
                    continue
                ranks[kind] = _ranks(module, grid)
                thins = [thin_module(module, rank) for rank in ranks[kind]]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            made[kind] = [seen.count for seen in inputs[name]]
            for option, candidate in enumerate([*thins, module]):
                for number, seen in enumerate(inputs[name]):
                    call = partial(candidate, *seen.args, **seen.kwargs)
                    calls[f"{kind}/{option}/{number}"] = call
        clock = dict.fromkeys(calls, clock_of(model, batch))
        times = time_calls(calls, repeats, devices=clock)
    median = {call: float(np.median(seconds)) for call, seconds in times.items()}
    found = {}
    for name, module in modules.items():
        kind = kinds[name]
        weights = (*(_weights(module, r) for r in ranks[kind]), _weights(module, None))
        seconds = tuple(
            sum(n * median[f"{kind}/{o}/{i}"] for i, n in enumerate(made[kind]))
            for o in range(len(weights))
        )
        found[name] = ModuleCosts(kind, ranks[kind], weights, seconds)
    return found


def _together(
    model: nn.Module,
    batch: Mapping[str, Any],
    alone: dict[str, ModuleCosts],
    repeats: int,
) -> Costs:
    """Scale what modules take alone to what they save in a pass; add the whole's time.

    Ranks that are slower alone stay out, as they do in a search, and products that are
    made a step at a time, which leave a fused kernel of their own.
    """
    quick = {
        name: costs.faster()
        for name, costs in alone.items()
        if not isinstance(module_named(model, name), Recurrent)
    }
    quickest = Costs(0.0, quick).smallest(by_seconds=True)
    thin, put = thin_model(model, quickest)
    calls = {"whole": partial(model, **batch), "thin": partial(thin, **batch)}
    with torch.inference_mode():
        clock = dict.fromkeys(calls, clock_of(model, batch))
        times = time_calls(calls, repeats, devices=clock)
    whole = float(np.median(times["whole"]))
    saved = float(np.median(np.subtract(times["whole"], times["thin"])))  # in turn
    saved_alone = -Costs(0.0, alone).latency({name: quickest[name] for name in put})
    if saved_alone < LEAST * whole:
        return Costs(whole, alone)
    if saved <= 0:
        warnings.warn(
            f"the model with every module at its quickest rank takes "
            f"{1000 * (whole - saved):.3g} ms, the dense one {1000 * whole:.3g} ms: "
            "thin modules are faster alone and not together, and a predicted speed-up "
            "means little here. Time a whole model with drone.compare_latency.",
            stacklevel=3,
        )
        return Costs(whole, alone)
    factor = saved / saved_alone
    scaled = {
        name: replace(costs, seconds=tuple(factor * s for s in costs.seconds))
        for name, costs in alone.items()
    }
    return Costs(whole, scaled)


def _ranks(module: nn.Module, grid: Sequence[float]) -> tuple[int, ...]:
    """Return the ranks a module may have, where it is."""
    on_gpu = next(module.parameters()).device.type == "cuda"
    heads = not is_linear(module)
    return grid_ranks(largest_rank(module), grid, aligned=heads and on_gpu)


@dataclass
class _Input:
    """What a module is called with, and how often with such shapes in one pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    count: int = 1


def _inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> dict[str, list[_Input]]:
    """Run the model once and keep what each module is called with."""
    inputs: dict[str, list[_Input]] = {name: [] for name in modules}

    def watch(name: str, module: nn.Module) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            count = 1
            if isinstance(module, Recurrent):  # made a step at a time
                count = args[0].shape[1]
                args = (args[0][:, 0].contiguous(),)
            shapes = tuple(
                tuple(leaf.shape)
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, Tensor)
            )
            for seen in inputs[name]:
                if seen.shapes == shapes:
                    seen.count += count
                    return
            inputs[name].append(_Input(args, kwargs, shapes, count))

        return module.register_forward_pre_hook(keep, with_kwargs=True)

    handles = [watch(name, module) for name, module in modules.items()]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in modules if not inputs[name]]
    if missed:
        raise ValueError(f"never reached by this batch: {', '.join(missed)}.")
    return inputs


def _kind(module: nn.Module, inputs: list[_Input]) -> str:
    """Describe a module and its calls so that two of one kind cost the same."""
    met = "; ".join(
        ", ".join("×".join(map(str, shape)) for shape in seen.shapes)
        + (f" {seen.count} times" if seen.count > 1 else "")
        for seen in inputs
    )
    if is_linear(module):
        bias = "" if module.bias is not None else ", no bias"
        size = "×".join(map(str, as_linear(module).weight.shape))
        return f"Linear {size}{bias} on {met}"
    query, _ = query_and_key(module)
    return (
        f"{type(module).__name__} {attention_heads(module)} heads of "
        f"{query.out_features // attention_heads(module)} on {met}"
    )


def _weights(module: nn.Module, rank: int | None) -> int:
    """Count the numbers in a module's matrices at a rank, or dense."""
    if is_linear(module):
        if rank is None:
            return linear_multiply_adds(module)
        return rank * sum(as_linear(module).weight.shape)
    query, _ = query_and_key(module)
    rows = query.out_features if rank is None else attention_heads(module) * rank
    return 2 * rows * query.in_features
