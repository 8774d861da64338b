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
from drone.devices import device_of, to_device

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
        batch: keyword arguments of the forward pass; each model gets a copy on its
            own device, made before the clock starts.
        repeats: measured rounds, at least 2 (20 or more for a result one publishes).
        warmup: unmeasured rounds before them.
        seed: of the order in each round.
        threads: of PyTorch while timing; None leaves it as it is.

    Returns:
        A `LatencyReport`.

    Raises:
        ValueError: no model, an empty batch, a model in training mode, too few
            repeats, or an output that is not finite. The message names the model.
        TypeError: the models or the batch are no mapping.
    """
    for what, given in [("models", models), ("batch", batch)]:
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{what} is a {type(given).__name__}; a mapping is needed: "
                "{name: model}, and {input's name: tensor}."
            )
    tensors = _tensors(batch)
    if not models or not tensors:
        raise ValueError("at least one model and a batch with a tensor are needed.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least 1, or None.")
    for name, model in models.items():
        if any(module.training for module in model.modules()):
            raise ValueError(f"{name} is in training mode; call its eval() first.")
    calls = {
        n: partial(model, **to_device(batch, model)) for n, model in models.items()
    }
    devices = {name: clock_of(model, batch) for name, model in models.items()}
    with _threads(threads), torch.inference_mode():
        for name, call in calls.items():
            _check_finite(name, call())
        seconds = time_calls(calls, repeats, warmup, seed, devices)
        conditions = _conditions(next(iter(models.values())), tensors[0], repeats)
    return LatencyReport(seconds, conditions)


def time_calls(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 30,
    warmup: int = 3,
    seed: int = 0,
    devices: Mapping[str, torch.device] | None = None,
) -> dict[str, np.ndarray]:
    """Time several calls, each once a round, in an order drawn anew each round.

    Args:
        calls: {name: function of no arguments}.
        repeats: measured rounds, at least 2.
        warmup: unmeasured rounds before them.
        seed: of the order.
        devices: {name: where its work is done}: the GPU's own clock counts there, and
            on the CPU no GPU is waited for. A call that is left out is timed by the
            CPU's clock until the GPU, if one is in use, is done.

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
            elapsed = _time_once(calls[name], (devices or {}).get(name))
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

    On a GPU the hooks mark its own time line and nothing is waited for, but the marks
    delay a pass of many small kernels: there a share is that of a pass with hooks.

    Args:
        model: in eval mode.
        batch: keyword arguments of the forward pass; moved to the model's device.
        repeats: measured rounds of one pass with hooks and one without, at least 2.
        warmup: unmeasured rounds before them.

    Returns:
        One row a kind, a module's name with `*` for the numbers in it, in the order
        they first run: `calls` a pass, `milliseconds` of their own (medians over the
        rounds) and `share` of a pass. On a CPU that is one without hooks, and the
        shares add up to 1 within what the hooks cost and the clock's noise: 5 % on a
        quiet machine. On a GPU they add up to 1.

    Raises:
        ValueError: the model is in training mode, or there are too few rounds.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call its eval() first.")
    device = clock_of(model, batch)
    batch = to_device(batch, model)
    mark, between = _clock(device)
    passes: list[list[_Span]] = []

    def watched() -> None:
        with _spans(model, mark) as spans:
            model(**batch)
        passes.append(spans)

    with torch.inference_mode():
        calls: dict[str, Callable[[], Any]] = {
            "plain": partial(model, **batch),
            "watched": watched,
        }
        times = time_calls(calls, repeats, warmup, devices=dict.fromkeys(calls, device))
    own = [_own_seconds(spans, between) for spans in passes[warmup:]]
    medians = {
        kind: float(np.median([sum(each[kind]) for each in own])) for kind in own[0]
    }
    on_gpu = device.type == "cuda"
    whole = sum(medians.values()) if on_gpu else float(np.median(times["plain"]))
    import pandas as pd  # half a second: only who asks for a table pays it

    rows = {
        kind or type(model).__name__: {
            "calls": len(own[0][kind]),
            "milliseconds": 1000 * seconds,
            "share": seconds / whole,
        }
        for kind, seconds in medians.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


@dataclass
class _Span:
    """One call of a module: when it was entered and left, and from which other one."""

    kind: str
    caller: "_Span | None"
    start: Any
    end: Any = None


@contextmanager
def _spans(model: nn.Module, mark: Callable[[], Any]) -> Iterator[list[_Span]]:
    """Watch all modules; what is yielded fills with their calls, as they are entered.

    Marks are only taken here and compared later: on a GPU that must not be waited for.
    """
    spans: list[_Span] = []
    running: list[_Span] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)

        def enter(*_: Any) -> None:
            caller = running[-1] if running else None
            spans.append(_Span(kind, caller, mark()))
            running.append(spans[-1])

        def leave(*_: Any) -> None:
            running.pop().end = mark()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    try:
        for name, module in model.named_modules():
            watch(name, module)
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def _own_seconds(
    spans: list[_Span], between: Callable[[Any, Any], float]
) -> dict[str, list[float]]:
    """Return {kind: [own seconds of a call]}: of each span, less those it called."""
    own = [between(span.start, span.end) for span in spans]
    place = {id(span): number for number, span in enumerate(spans)}
    for span, whole in zip(spans, list(own), strict=True):
        if span.caller is not None:
            own[place[id(span.caller)]] -= whole
    kinds: dict[str, list[float]] = {}
    for span, seconds in zip(spans, own, strict=True):
        kinds.setdefault(span.kind, []).append(seconds)
    return kinds


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

    >>> multiply_adds(nn.Linear(5, 3), {"input": torch.ones(2, 5)})  # 2 · 5 · 3
    30
    """
    counter = FlopCounterMode(display=False, custom_mapping=CPU_KERNELS)
    with torch.inference_mode(), counter:
        model(**to_device(batch, model))
    return int(counter.get_total_flops()) // 2


def processor() -> str:
    """Name of this machine's processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def accelerator() -> str | None:
    """Name of the GPU that PyTorch would use, with the count if there are several."""
    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name()
    return f"{count} × {name}" if count > 1 else name


def clock_of(model: nn.Module, batch: Mapping[str, Any]) -> torch.device:
    """Return the device whose clock times a model: its own, or else its batch's."""
    device = device_of(model)
    if device is not None:
        return device
    tensors = _tensors(batch)
    return tensors[0].device if tensors else torch.device("cpu")


def _tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(batch)) if isinstance(leaf, Tensor)]


def _time_once(call: Callable[[], Any], device: torch.device | None) -> float:
    """Seconds of one call, by the clock of a device."""
    mark, between = _clock(device)
    _wait(device)
    start = mark()
    call()
    return between(start, mark())


def _clock(
    device: torch.device | None,
) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Return what marks a moment, and what gives the seconds between two of them."""
    if device is not None and device.type == "cuda":
        stream = torch.cuda.current_stream(device)

        def record() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream)
            return event

        def elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
            end.synchronize()  # until then it has not been reached
            return float(start.elapsed_time(end)) / 1000

        return record, elapsed

    def now() -> float:
        _wait(device)
        return time.perf_counter()

    return now, lambda start, end: float(end - start)


def _wait(device: torch.device | None) -> None:
    """Wait for a device: its kernels run on after the call that started them.

    None: for the GPU in use, if one is. Nothing is to be waited for on a CPU.
    """
    if device is None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    elif device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize()


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


def _conditions(model: nn.Module, first: Tensor, repeats: int) -> dict[str, Any]:
    shape = first.shape
    weight = next(model.parameters(), first)
    gpu = accelerator() if weight.device.type == "cuda" else None
    return {
        "batch": shape[0],
        "length": shape[1] if len(shape) > 1 else 1,
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "processor": processor(),
        "repeats": repeats,
    } | ({} if gpu is None else {"gpu": gpu})
