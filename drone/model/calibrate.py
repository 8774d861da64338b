"""Run a model over data and collect the second moment of each module's inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drone import progress
from drone.devices import to_device
from drone.math.moments import SecondMoment
from drone.model.adapters import encoder_linears, module_named


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    modules: Iterable[str] | None = None,
) -> dict[str, SecondMoment]:
    """Run the model over data and collect the second moment of each module's inputs.

    The model runs in eval mode and without gradients; its modes are restored and
    nothing stays attached to it, whatever happens. Modules called one after another
    with the same tensor (queries, keys and values) are summed once. Chapter 3.

    Args:
        model: any module; the named ones take a tensor (..., in) as first argument.
        batches: keyword arguments of the model. `attention_mask` (batch, length), 1
            for a token and 0 for a pad, says which vectors count; a batch with
            `input_ids` must have one. Tensors are moved to the model's device.
        modules: names of the modules; None: every Linear of the encoder's layers.

    Returns:
        {module name: its own `SecondMoment`}, in the order of `modules`.

    Raises:
        ValueError: no batch, a name the model does not have, a module that was never
            reached, a missing mask or one of the wrong shape, NaN or Inf in an input.
            The message names the module and the batch.
    """
    # A name given twice must not count its inputs twice.
    names = list(dict.fromkeys(encoder_linears(model) if modules is None else modules))
    collector = Collector()
    number = -1
    with frozen(model), watch_inputs(model, names, collector.see):
        for number, batch in enumerate(progress.bar(batches, desc="calibrate")):
            collector.start(number, mask_of(batch, number))
            model(**to_device(batch, model))
    if number < 0:
        raise ValueError("no batch to calibrate on; at least one is needed.")
    return collector.finish(names)


class Collector:
    """Sum what the hooks see: one moment a group of modules with the same input."""

    def __init__(self) -> None:
        self.moments: dict[str, SecondMoment] = {}
        self.leader: dict[str, str] = {}  # the first module of each one's group
        self.last: tuple[str, Tensor, int] | None = None

    def start(self, number: int, mask: Tensor | None) -> None:
        """Begin a batch."""
        self.number, self.mask, self.last = number, mask, None

    def see(self, name: str, x: Tensor) -> None:
        """Add the input of one module, unless its group's leader has added it."""
        # The version tells a tensor changed in place from the one seen before.
        version = 0 if x.is_inference() else x._version
        same = self.last is not None and self.last[1] is x and self.last[2] == version
        leader = self.leader[self.last[0]] if same and self.last else name
        known = self.leader.setdefault(name, leader)
        if known != leader:
            raise ValueError(
                f"{name}: in batch {self.number} its input is no longer that of "
                f"{known}; calibrate such modules one at a time."
            )
        self.last = (name, x, version)
        if leader != name:
            return
        moment = self.moments.setdefault(name, SecondMoment(x.shape[-1]))
        mask = self.mask
        if mask is not None and x.shape[:-1] == mask.shape[:1]:
            mask = None  # one vector a sentence (a pooler's, a head's): none is a pad
        try:
            moment.update(x, mask)
        except ValueError as error:
            raise ValueError(f"{name}, batch {self.number}: {error}") from error

    def finish(self, names: Iterable[str]) -> dict[str, SecondMoment]:
        """Give every module a moment of its own."""
        missed = [name for name in names if name not in self.leader]
        if missed:
            raise ValueError(f"never reached by these batches: {', '.join(missed)}.")
        return {
            name: self.moments[name]
            if self.leader[name] == name
            else self.moments[self.leader[name]].copy()
            for name in names
        }


def mask_of(batch: Mapping[str, Any], number: int) -> Tensor | None:
    """Return a batch's mask of real tokens; text without one would count its pads.

    Raises:
        ValueError: the batch has `input_ids` and no `attention_mask`.
    """
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None and "input_ids" in batch:
        raise ValueError(
            f"batch {number} has input_ids and no attention_mask; without one, pads "
            "would count as tokens."
        )
    return mask


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def watch_inputs(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `see(name, input)` before each run of the named modules.

    Raises:
        ValueError: the model has no module of that name.
    """
    handles = []

    def attach(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise ValueError(f"{name}: its first argument is no tensor.")
            see(name, args[0])

        handles.append(module_named(model, name).register_forward_pre_hook(hook))

    try:
        for name in names:
            attach(name)
        yield
    finally:
        for handle in handles:
            handle.remove()
