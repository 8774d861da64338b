"""A model taken layer by layer: the hidden states that enter one are kept."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from drone.layers.attention import ATTENTION
from drone.math.moments import SecondMoment
from drone.model.adapters import encoder_layers
from drone.model.calibrate import Collector, mask_of, to_device, watch_inputs
from drone.model.loss import batch_loss, mean, mean_loss

__all__ = ["Walk", "input_name", "mean_loss"]  # the last one lives in loss.py


class _Reached(Exception):
    """The last module of interest has its input; the rest of the pass is not needed."""


class Walk:
    """Where a pass over all batches stands: in front of one encoder layer.

    What lies below has run and is not run again, so to try something in a layer costs
    only the layers above. Use inside `frozen(model)`: eval mode, no gradients.

    Attributes:
        model: whose modules may be replaced on the way, not yet passed ones only.
        layers: {name: layer}, in network order.
        number: of the layer in front, from 0.
        layer_forwards: passes of all batches through one layer, made so far. A pass
            through a part of a layer counts as one.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        names: Iterable[str],
    ) -> None:
        """Run the model up to its first layer.

        Args:
            model: an encoder with a list of layers.
            batches: keyword arguments of the model, as in `calibrate`; read once.
            names: of the modules of interest.

        Raises:
            ValueError: no batch, a mask that is missing, no list of layers, or a
                module outside of them.
        """
        self.model, self.number, self.layer_forwards = model, 0, 0
        self.layers = encoder_layers(model)
        self._inside = {
            name: next((p for p in self.layers if name.startswith(f"{p}.")), None)
            for name in names
        }
        outside = [name for name, layer in self._inside.items() if layer is None]
        if outside:
            raise ValueError(
                f"not inside an encoder layer: {', '.join(outside)}; a walk through "
                "the layers cannot reach it."
            )
        self.batches: list[dict[str, Any]] = []
        self._states: list[Tensor] = []
        self._masks: list[Tensor | None] = []
        # The layers of the known families all get the same other arguments.
        self._rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._enter(batches)

    def _enter(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Keep what the first layer gets, of every batch."""

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._states.append(args[0])
            self._rest.append((args[1:], kwargs))
            raise _Reached

        handle = self._layer.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for number, batch in enumerate(batches):
                self._masks.append(mask_of(batch, number))
                self.batches.append(to_device(batch, self.model))
                try:
                    self.model(**self.batches[-1])
                except _Reached:
                    continue
        finally:
            handle.remove()
        if not self.batches:
            raise ValueError("no batch to calibrate on; at least one is needed.")

    @property
    def _layer(self) -> nn.Module:
        return list(self.layers.values())[self.number]

    def groups(self) -> list[list[str]]:
        """Sort the layer's modules into groups with one input, in order."""
        here = list(self.layers)[self.number]
        names = [name for name, layer in self._inside.items() if layer == here]
        source = {n: input_name(self.model.get_submodule(n), n) for n in names}
        order: list[tuple[Tensor, list[str]]] = []

        def see(reached: str, x: Tensor) -> None:
            named = [name for name in names if source[name] == reached]
            if order and order[-1][0] is x:
                order[-1][1].extend(named)
            else:
                order.append((x, named))

        with watch_inputs(self.model, dict.fromkeys(source.values()), see):
            args, kwargs = self._rest[0]
            self._layer(self._states[0], *args, **kwargs)
        return [group for _, group in order]

    def moments(self, group: list[str]) -> dict[str, SecondMoment]:
        """Run the layer up to a group of modules; collect the moment of their input.

        Returns:
            {name of the Linear whose inputs they are: that one moment}.
        """
        sources = [input_name(self.model.get_submodule(n), n) for n in group]
        collector = Collector()

        def see(name: str, x: Tensor) -> None:
            collector.see(name, x)
            raise _Reached

        with watch_inputs(self.model, sources[:1], see):
            for number, (x, mask) in enumerate(
                zip(self._states, self._masks, strict=True)
            ):
                collector.start(number, mask)
                args, kwargs = self._rest[number]
                try:
                    self._layer(x, *args, **kwargs)
                except _Reached:
                    continue
        self.layer_forwards += 1
        (moment,) = collector.finish(sources[:1]).values()
        return dict.fromkeys(sources, moment)

    def loss(self) -> float:
        """Mean loss over all batches, running this layer and those above only.

        Raises:
            ValueError: a batch has no labels, or the model returns no loss.
        """
        pairs = []
        with self._from_here() as entering:
            for number, batch in enumerate(self.batches):
                entering["number"] = number
                pairs.append(batch_loss(self.model, batch, number))
        self.layer_forwards += len(self.layers) - self.number
        return mean(pairs)

    @contextmanager
    def _from_here(self) -> Iterator[dict[str, int]]:
        """Inside, the model has no layers below this one; this one gets the states."""
        entering: dict[str, int] = {}

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (self._states[entering["number"]], *args[1:]), kwargs

        name = next(iter(self.layers)).rpartition(".")[0]
        whole = self.model.get_submodule(name)
        above = nn.ModuleList(list(self.layers.values())[self.number :])
        above.training = whole.training
        handle = self._layer.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            self.model.set_submodule(name, above)
            yield entering
        finally:
            self.model.set_submodule(name, whole)
            handle.remove()

    def advance(self) -> None:
        """Run the layer in front, as it now is, and stand before the next one."""
        for number, (args, kwargs) in enumerate(self._rest):
            output = self._layer(self._states[number], *args, **kwargs)
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            self._states[number] = hidden
        self.layer_forwards += 1
        self.number += 1


def input_name(module: nn.Module, name: str) -> str:
    """Name of the Linear whose inputs matter: a block's are those of its query."""
    names = ATTENTION.get(type(module).__name__)
    return name if names is None else f"{name}.{names.query}"
