"""What each module costs at each rank it may have: weights and milliseconds."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drone.layers.attention import (
    ATTENTION,
    LowRankSelfAttention,
    attention_heads,
    query_and_key,
)
from drone.layers.linear import (
    LowRankLinear,
    as_linear,
    is_linear,
    linear_multiply_adds,
)
from drone.layers.lstm import Recurrent
from drone.math.attention import AttentionFactorization
from drone.math.factorize import break_even_rank
from drone.model.adapters import encoder_linears, known_blocks, module_named
from drone.model.calibrate import to_device
from drone.timing import time_calls

# Shares of the largest rank that saves multiply-adds.
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
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
        seconds: measured, of one call on the batch that was timed. Of a block: with
            its values (and output projection, where it has one) dense.
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


def grid_ranks(largest: int, grid: Sequence[float] = GRID) -> tuple[int, ...]:
    """Turn shares of the largest rank into ranks, ascending, each once.

    Args:
        largest: rank that still saves. Where it is 32 or more, ranks are rounded down
            to multiples of 8.
        grid: shares in (0, 1].

    Raises:
        ValueError: the grid is empty or has a share outside (0, 1].
    """
    if not grid or not all(0 < share <= 1 for share in grid):
        raise ValueError(f"the grid is {list(grid)}; shares in (0, 1] are needed.")
    step = ALIGNED if largest >= 4 * ALIGNED else 1
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

    One module of each kind is timed, on the input it gets in this batch; all kinds and
    ranks take turns, so that each finds the caches as another left them. Thin modules
    are filled with random numbers: time does not depend on them. Chapter 5.

    Args:
        model: in eval mode.
        batch: keyword arguments of the forward pass.
        names: of Linears and attention blocks; None: `searchable(model)`.
        grid: ranks as shares of the largest one that saves.
        repeats: rounds; the median counts.

    Raises:
        ValueError: a name the model does not have, a module that cannot be compressed
            or is never reached, a model in training mode.
    """
    names = searchable(model) if names is None else list(names)
    modules = {name: module_named(model, name) for name in names}
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call its eval() first.")
    batch = to_device(batch, model)
    calls: dict[str, Callable[[], Any]] = {"whole": partial(model, **batch)}
    ranks: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, str] = {}
    times_made: dict[str, int] = {}  # in one pass, on the input that is timed
    with torch.inference_mode():
        inputs = _inputs(model, modules, batch)
        for name, module in modules.items():
            args, kwargs = inputs[name]
            try:
                kinds[name] = kind = _kind(module, args[0])
                if kind in ranks:
                    continue
                if isinstance(module, Recurrent):  # made a step at a time
                    times_made[kind] = args[0].shape[1]
                    args = (args[0][:, 0].contiguous(),)
                ranks[kind] = grid_ranks(largest_rank(module), grid)
                thins = [_thin(module, rank) for rank in ranks[kind]]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            for option, candidate in enumerate([*thins, module]):
                calls[f"{kind}/{option}"] = partial(candidate, *args, **kwargs)
        times = time_calls(calls, repeats)
    median = {call: float(np.median(seconds)) for call, seconds in times.items()}
    found = {}
    for name, module in modules.items():
        kind = kinds[name]
        weights = (*(_weights(module, r) for r in ranks[kind]), _weights(module, None))
        made = times_made.get(kind, 1)
        seconds = tuple(made * median[f"{kind}/{o}"] for o in range(len(weights)))
        found[name] = ModuleCosts(kind, ranks[kind], weights, seconds)
    return Costs(median["whole"], found)


def _inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run the model once and keep what each module is called with."""
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[name] = (args, kwargs)

        return module.register_forward_pre_hook(keep, with_kwargs=True)

    handles = [watch(name, module) for name, module in modules.items()]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in modules if name not in inputs]
    if missed:
        raise ValueError(f"never reached by this batch: {', '.join(missed)}.")
    return inputs


def _kind(module: nn.Module, x: Tensor) -> str:
    """Describe a module so that two of one kind cost the same."""
    shape = "×".join(map(str, x.shape))
    if is_linear(module):
        bias = "" if module.bias is not None else ", no bias"
        size = "×".join(map(str, as_linear(module).weight.shape))
        if isinstance(module, Recurrent):
            bias += ", a step at a time,"
        return f"Linear {size}{bias} on {shape}"
    query, _ = query_and_key(module)
    return (
        f"{type(module).__name__} {attention_heads(module)} heads of "
        f"{query.out_features // attention_heads(module)} on {shape}"
    )


def _thin(module: nn.Module, rank: int) -> nn.Module:
    """Make a module of this rank to be timed."""
    if is_linear(module):
        module = as_linear(module)
        weight = module.weight
        left = torch.randn(weight.shape[0], rank).to(weight)
        right = torch.randn(rank, weight.shape[1]).to(weight)
        return LowRankLinear(left, right, module.bias).eval()
    query, _ = query_and_key(module)
    rows, dim = query.weight.shape
    heads = attention_heads(module)
    factor = torch.randn(heads, rows // heads, dim + 1, dtype=torch.float64) / dim
    errors = torch.zeros(heads, rows // heads + 1, dtype=torch.float64)
    found = AttentionFactorization(factor, factor, errors, query.weight.dtype)
    return LowRankSelfAttention.from_attention(module, rank, found)


def _weights(module: nn.Module, rank: int | None) -> int:
    """Count the numbers in a module's matrices at a rank, or dense."""
    if is_linear(module):
        if rank is None:
            return linear_multiply_adds(module)
        return rank * sum(as_linear(module).weight.shape)
    query, _ = query_and_key(module)
    rows = query.out_features if rank is None else attention_heads(module) * rank
    return 2 * rows * query.in_features
