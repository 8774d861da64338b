"""Run a model over data and collect the second moment of each module's inputs."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from drone import progress
from drone.devices import to_device
from drone.math.moments import SecondMoment
from drone.model.adapters import encoder_linears, module_named
from drone.model.inputs import arguments, prepared, run
from drone.model.masks import mask_of, one_row_more, warn_of_left_pads
from drone.model.streams import Override, Streams, same

__all__ = ["Collector", "calibrate", "frozen", "mask_of", "to_device", "watch_inputs"]

# One calibration of a model at a time: a second one would restore its modes too early.
_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_OWNERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    modules: Iterable[str] | None = None,
    *,
    mask: Override | None = None,
) -> dict[str, SecondMoment]:
    """Run the model over data and collect the second moment of each module's inputs.

    The model runs in eval mode and without gradients; its modes and the random state
    are restored and nothing stays attached to it, whatever happens. Modules called one
    after another with the same tensor (queries, keys and values) are summed once.
    Chapter 3.

    Args:
        model: any module; the named ones take a tensor (..., in) as first argument.
        batches: keyword arguments of the model, in any form `drone.prepare` takes. A
            mask (batch, length), 1 for a token and 0 for a pad, says which vectors
            count: `attention_mask` in an encoder or a decoder alone;
            `decoder_attention_mask`, else labels that are not -100, in the decoder of a
            pair; `src_key_padding_mask`, True for a pad, in PyTorch's own Transformer.
            A batch with `input_ids` must have one.
        modules: names of modules, Linears or self-attention blocks; None: every Linear
            of the encoder's layers.
        mask: where the batch does not say it. {prefix of module names: key of the batch
            that holds their mask, or None: all count}, or (name, batch, x) → a mask of
            x.shape[:-1], or None. The longest prefix counts.

    Returns:
        {module name: its own `SecondMoment`}, in the order of `modules`. A vector that
        is the same for all rows (DeBERTa's relative positions) counts once a row, so
        that a moment does not depend on how rows are put into batches.

    Raises:
        ValueError: no batch, a name the model does not have, a module that was never
            reached, a missing mask or one of the wrong shape, NaN or Inf in an input,
            what is no batch. The message names the module and the batch.

    Warns:
        NoMaskWarning: a module saw rows of several vectors and no mask was known.
        LeftPaddingWarning: pads in front shift the positions of tokens.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> calibrate(model, [torch.ones(5, 3)], ["0"])
    {'0': SecondMoment(dim=3, count=5)}
    """
    stream = prepared(batches, model)
    if isinstance(modules, str):
        raise ValueError(f"modules is the str {modules!r}; give a list of names.")
    # A name given twice must not count its inputs twice.
    names = list(dict.fromkeys(encoder_linears(model) if modules is None else modules))
    known = dict[str, nn.Module](model.named_modules())
    for name in [name for name in names if name not in known][:1]:
        module_named(model, name)  # raises, and names those that are near
    collector, streams = Collector(), Streams(model, names, mask)
    number, warned = -1, False

    def see(name: str, x: Tensor) -> None:
        try:
            counts, times = streams.at(name, x)
        except ValueError:
            if learning:
                return  # of the probe nothing is counted
            raise
        if not learning:
            collector.see(name, x, counts, times, streams.told_by(name))

    with (
        alone(model),
        frozen(model),
        _slow_path(),
        streams.watching(),
        watch_inputs(model, names, see),
    ):
        for number, batch in enumerate(progress.bar(stream, desc="calibrate")):
            if mask is None:
                mask_of(batch, number)
            streams.start(number, batch)
            warned = warned or warn_of_left_pads(model, batch, number)
            if mask is None and streams.in_doubt():
                learning = True
                probe(model, batch, number, streams)
                streams.start(number, batch)
            learning = False
            collector.start(number)
            run(model, batch)
    if number < 0:
        raise ValueError("no batch to calibrate on; at least one is needed.")
    streams.warn()
    return collector.finish(names)


def probe(
    model: nn.Module, batch: Mapping[str, Any], number: int, streams: Streams
) -> None:
    """Run a batch with one row more: what grows with it is the axis of rows."""
    more = one_row_more(batch, streams.rows())
    streams.start(number, more)
    try:
        run(model, more)
    except Exception as error:  # whatever a model raises that cannot take the row
        raise ValueError(
            f"batch {number} has as many rows as tokens, or one, and pads: it does not "
            "say which axis of an input is which, and the model does not run with one "
            f"row more ({error!r}). Give batches of another size, or mask=."
        ) from error


@dataclass
class _Event:
    """One input tensor, and the modules that have seen it so far, one after another."""

    x: Tensor
    version: int | None  # tells a tensor changed in place from the one seen before
    counts: Tensor | None
    times: int
    told: str | None
    place: tuple[str, int]  # the first module, and which of its calls in this batch
    moment: SecondMoment
    names: list[str]


class Collector:
    """Sum what the hooks see: one moment a group of modules with the same input.

    Which modules will see a tensor is not known when the first one does, and it must be
    summed then: the model may change it in place. So each place in the order of calls,
    (first module, which of its calls), is learnt in the first batch: its sum is kept
    apart until the next tensor comes, and then belongs to the group that saw it. Later
    batches add to that group's sum at once.
    """

    def __init__(self) -> None:
        self.groups: dict[tuple[str, ...], SecondMoment] = {}
        self.expected: dict[tuple[str, int], tuple[str, ...]] = {}
        self.calls: dict[str, int] = {}
        self.event: _Event | None = None
        self.number = 0
        self.mask: Tensor | None = None

    def start(self, number: int, mask: Tensor | None = None) -> None:
        """Begin a batch; `mask` is for the inputs that `see` gets without their own."""
        self._close()
        self.number, self.mask, self.calls = number, mask, {}

    def see(
        self,
        name: str,
        x: Tensor,
        counts: Tensor | None = None,
        times: int = 1,
        told: str | None = None,
    ) -> None:
        """Add the input of one module, unless the one before it saw and counted alike.

        Args:
            name: of the module.
            x: (..., dim), its input.
            counts: x.shape[:-1], which vectors count; None: those of the batch's mask.
            times: how often each counts.
            told: who says what counts; modules that were told by others share nothing,
                be it that their masks are equal in this batch.

        Raises:
            ValueError: a mask that does not fit, NaN or Inf, or a module that shares
                its input in one batch and not in another. It names module and batch.
        """
        version, event = version_of(x), self.event
        if (
            event is not None
            and event.x is x
            and version is not None
            and event.version == version
            and (event.told, event.times) == (told, times)
            and alike(event.counts, counts)
        ):
            event.names.append(name)
            return
        self._close()
        call = self.calls[name] = self.calls.get(name, -1) + 1
        group = self.expected.get((name, call))
        rows = torch.cat(x.unbind()) if x.is_nested else x
        moment = SecondMoment(x.shape[-1]) if group is None else self.groups[group]
        self.event = _Event(
            x, version, counts, times, told, (name, call), moment, [name]
        )
        if counts is None and self.mask is not None:
            alone = x.shape[:-1] == self.mask.shape[:1]
            counts = (
                None if alone else self.mask
            )  # one vector a sentence: none is a pad
        target = moment if times == 1 else SecondMoment(x.shape[-1])
        try:
            target.update(rows, counts)
        except ValueError as error:
            raise ValueError(f"{name}, batch {self.number}: {error}") from error
        if times != 1:
            target.matrix.mul_(times)
            target.total.mul_(times)
            target.count *= times
            moment.merge(target)

    def _close(self) -> None:
        """No module will see this tensor any more: its group is known."""
        event, self.event = self.event, None
        if event is None:
            return
        group = tuple(event.names)
        expected = self.expected.get(event.place)
        if expected is None:
            self.expected[event.place] = group
            if group in self.groups:
                self.groups[group].merge(event.moment)
            else:
                self.groups[group] = event.moment
        elif expected != group:
            odd = next(iter(set(expected) ^ set(group)), group[0])
            raise ValueError(
                f"{odd}: in batch {self.number} its input, or what of it counts, "
                f"is no longer that of {event.place[0]}; calibrate such modules one at "
                "a time."
            )

    def finish(self, names: Iterable[str]) -> dict[str, SecondMoment]:
        """Give every module a moment of its own.

        Raises:
            ValueError: a module that was never reached.
        """
        self._close()
        names = list(names)
        shares: dict[str, list[tuple[str, ...]]] = {}
        for group in self.groups:
            for name in group:  # twice, if it ran twice on one tensor
                shares.setdefault(name, []).append(group)
        missed = [name for name in names if name not in shares]
        if missed:
            raise ValueError(
                f"never reached by these batches: {', '.join(missed)}; leave them out, "
                "or add batches that reach them."
            )
        free = dict(self.groups)  # each sum can be one module's own; others get copies
        found = {}
        for name in names:
            first, *rest = shares[name]
            alone = not rest and first in free
            moment = free.pop(first) if alone else self.groups[first].copy()
            for group in rest:
                moment.merge(self.groups[group])
            found[name] = moment
        return found


def version_of(x: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where nobody counts.

    Tensors made under `torch.inference_mode()` have no counter: one of them may be
    other numbers each time it is seen.
    """
    return None if x.is_inference() else x._version


def alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two masks say the same."""
    if one is None or other is None:
        return one is other
    return same(one, other) or torch.equal(one, other)


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Let other threads that would calibrate the same model wait.

    Raises:
        ValueError: this thread calibrates the model already.
    """
    if _OWNERS.get(model) == threading.get_ident():
        raise ValueError("this model is being calibrated; one calibration at a time.")
    with _LOCKS.setdefault(model, threading.Lock()):
        _OWNERS[model] = threading.get_ident()
        try:
            yield
        finally:
            del _OWNERS[model]


@contextmanager
def _slow_path() -> Iterator[None]:
    """Keep PyTorch's Transformer off its fused path, which runs no module inside."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; modes and random state as before afterwards.

    Some models draw random numbers in eval mode too (Wav2Vec2's layer drop).
    """
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    gpus = [parameter.device] if parameter is not None and parameter.is_cuda else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=gpus):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def first_input(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Return the first argument of a module's call, by place or by name.

    Raises:
        ValueError: it is no tensor.
    """
    x = args[0] if args else kwargs.get((arguments(module)[0] or [""])[0])
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: its first argument is no tensor.")
    return x


@contextmanager
def watch_inputs(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `see(name, input)` before each run of the named modules in this thread.

    Raises:
        ValueError: the model has no module of that name.
    """
    handles, owner = [], threading.get_ident()

    def attach(name: str) -> None:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            if threading.get_ident() == owner:  # else somebody else uses the model
                see(name, first_input(module, name, args, kwargs))

        module = module_named(model, name)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    try:
        for name in names:
            attach(name)
        yield
    finally:
        for handle in handles:
            handle.remove()
