"""Honest latency: warmed up, interleaved, repeated, and given with an interval."""

import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from drone import progress

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LatencyReport:
    """Forward-pass times of several models on one batch.

    Attributes:
        seconds: {model name: (rounds,) seconds}; round i of each ran side by side.
        conditions: batch size, length, threads, dtype, device and processor.
    """

    seconds: dict[str, np.ndarray]
    conditions: dict[str, Any]

    @property
    def baseline(self) -> str:
        """The first model given: the others are compared with it."""
        return next(iter(self.seconds))

    def median(self, name: str) -> float:
        """Median seconds of one forward pass."""
        return float(np.median(self.seconds[name]))

    def speedup(self, name: str, level: float = 0.95) -> tuple[float, float, float]:
        """Median over rounds of baseline time / this model's time, with an interval.

        Returns:
            (ratio, low, high): low and high are the percentile bootstrap's bounds at
            `level`, from 2,000 seeded resamples of the paired rounds.
        """
        ratios = self.seconds[self.baseline] / self.seconds[name]
        draws = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
        medians = np.median(ratios[draws], axis=1)
        tail = 100 * (1 - level) / 2
        low, high = np.percentile(medians, [tail, 100 - tail])
        return float(np.median(ratios)), float(low), float(high)

    def table(self) -> "pd.DataFrame":
        """One row a model: median milliseconds, speed-up over the first, interval."""
        import pandas as pd  # half a second: only who asks for a table pays it

        rows = {}
        for name in self.seconds:
            ratio, low, high = self.speedup(name)
            rows[name] = {
                "median_ms": 1000 * self.median(name),
                "speedup": ratio,
                "low": low,
                "high": high,
            }
        return pd.DataFrame.from_dict(rows, orient="index")


def compare_latency(
    models: Mapping[str, nn.Module],
    batch: Mapping[str, Tensor],
    repeats: int = 30,
    warmup: int = 3,
    seed: int = 0,
    threads: int | None = None,
) -> LatencyReport:
    """Time forward passes of several models on the same batch, side by side.

    Each round runs every model once, in an order drawn anew, so that whatever slows
    the machine for a while slows all of them. Chapter 1; chapter 9 shows why.

    Args:
        models: {name: model in eval mode}; the first is the baseline.
        batch: keyword arguments of the forward pass, on the models' device.
        repeats: measured rounds, at least 2 (20 or more for a result one publishes).
        warmup: unmeasured rounds before them.
        seed: of the order in each round.
        threads: of PyTorch while timing; None leaves it as it is.

    Returns:
        A `LatencyReport`.

    Raises:
        ValueError: no model, an empty batch, a model in training mode, too few
            repeats, or an output that is not finite. The message names the model.
    """
    if not models or not batch:
        raise ValueError("at least one model and a batch with a tensor are needed.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least 1, or None.")
    for name, model in models.items():
        if any(module.training for module in model.modules()):
            raise ValueError(f"{name} is in training mode; call its eval() first.")
    calls = {name: partial(model, **batch) for name, model in models.items()}
    with _threads(threads), torch.inference_mode():
        for name, call in calls.items():
            _check_finite(name, call())
        seconds = time_calls(calls, repeats, warmup, seed)
        conditions = _conditions(next(iter(models.values())), batch, repeats)
    return LatencyReport(seconds, conditions)


def time_calls(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 30,
    warmup: int = 3,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Time several calls, each once a round, in an order drawn anew each round.

    Args:
        calls: {name: function of no arguments}.
        repeats: measured rounds, at least 2.
        warmup: unmeasured rounds before them.
        seed: of the order.

    Returns:
        {name: (repeats,) seconds}; round i of each ran side by side.

    Raises:
        ValueError: too few rounds.
    """
    if repeats < 2 or warmup < 0:
        raise ValueError(
            f"repeats is {repeats} and warmup {warmup}; at least 2 and 0 are needed."
        )
    order, rng = list(calls), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in progress.bar(range(-warmup, repeats), desc="time"):
        rng.shuffle(order)
        for name in order:
            elapsed = _time_once(calls[name])
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: np.array(times) for name, times in seconds.items()}


def profile_modules(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    repeats: int = 10,
    warmup: int = 2,
) -> "pd.DataFrame":
    """Say where the time of a forward pass goes, by kind of module.

    Hooks on every module stop the clock as it is entered and left; a module's own
    time is what its children do not take. Passes without hooks run in between, so
    that one sees what the hooks themselves cost. Chapter 9.

    Args:
        model: in eval mode.
        batch: keyword arguments of the forward pass, on the model's device.
        repeats: measured rounds of one pass with hooks and one without, at least 2.
        warmup: unmeasured rounds before them.

    Returns:
        One row a kind, a module's name with `*` for the numbers in it, in the order
        they first run: `calls` a pass, `milliseconds` of their own (medians over the
        rounds) and `share` of a pass without hooks. The shares add up to 1, within
        what the hooks cost and the clock's noise: 5 % on a quiet machine.

    Raises:
        ValueError: the model is in training mode, or there are too few rounds.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call its eval() first.")
    passes: list[dict[str, list[float]]] = []

    def watched() -> None:
        with _own_times(model) as own:
            model(**batch)
        passes.append(own)

    with torch.inference_mode():
        calls: dict[str, Callable[[], Any]] = {
            "plain": partial(model, **batch),
            "watched": watched,
        }
        whole = float(np.median(time_calls(calls, repeats, warmup)["plain"]))
    import pandas as pd  # half a second: only who asks for a table pays it

    rows = {}
    for kind, spans in passes[0].items():
        own = float(np.median([sum(each[kind]) for each in passes[warmup:]]))
        rows[kind or type(model).__name__] = {
            "calls": len(spans),
            "milliseconds": 1000 * own,
            "share": own / whole,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


@contextmanager
def _own_times(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Watch all modules; what is yielded fills with {kind: [own seconds of a call]}."""
    own: dict[str, list[float]] = {}
    running: list[list[float]] = []  # of each module entered: start, children's seconds
    handles = []
    on_gpu = torch.cuda.is_available()  # asked once: the question itself takes time

    def watch(name: str, module: nn.Module) -> None:
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)

        def enter(*_: Any) -> None:
            own.setdefault(kind, [])
            if on_gpu:
                torch.cuda.synchronize()
            running.append([time.perf_counter(), 0.0])

        def leave(*_: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            start, children = running.pop()
            whole = time.perf_counter() - start
            own[kind].append(whole - children)
            if running:
                running[-1][1] += whole

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    try:
        for name, module in model.named_modules():
            watch(name, module)
        yield own
    finally:
        for handle in handles:
            handle.remove()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _lstm_flops(x: Any, weight_ih: Any, weight_hh: Any, *_: Any, **__: Any) -> int:
    """All steps of one layer; each weight is multiplied once a step and sequence."""
    weights = weight_ih[0] * weight_ih[1] + weight_hh[0] * weight_hh[1]
    return int(2 * x[0] * x[1] * weights)


# PyTorch's counter does not know what is fused for a CPU: attention, and an LSTM layer.
CPU_KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: _lstm_flops,
}


def multiply_adds(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Count the multiply-adds of one forward pass (matrix products only).

    Counted by `torch.utils.flop_counter`, which counts two operations for each.
    """
    counter = FlopCounterMode(display=False, custom_mapping=CPU_KERNELS)
    with torch.inference_mode(), counter:
        model(**batch)
    return int(counter.get_total_flops()) // 2


def processor() -> str:
    """Name of this machine's processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _time_once(call: Callable[[], Any]) -> float:
    """Seconds of one call: of the GPU's own clock where there is one."""
    _synchronize()
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        _synchronize()
        return float(start.elapsed_time(end)) / 1000
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _synchronize() -> None:
    """Wait for the GPU: its kernels run on after the call that started them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_finite(name: str, output: Any) -> None:
    """Every floating tensor of the output is finite; a fast wrong answer is no gain."""
    for tensor in tree_leaves(output):  # of nested tuples and mappings too
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if floating and not tensor.isfinite().all():
            raise ValueError(f"{name}: the output has NaN or Inf; nothing is timed.")


def _conditions(
    model: nn.Module, batch: Mapping[str, Tensor], repeats: int
) -> dict[str, Any]:
    first = next(iter(batch.values()))
    shape = first.shape
    weight = next(model.parameters(), first)
    return {
        "batch": shape[0],
        "length": shape[1] if len(shape) > 1 else 1,
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "processor": processor(),
        "repeats": repeats,
    }
