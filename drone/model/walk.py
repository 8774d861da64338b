"""A model taken layer by layer: the hidden states that enter one are kept."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from drone.layers.attention import ATTENTION
from drone.math.moments import SecondMoment
from drone.model.adapters import encoder_layers, module_named, names_of
from drone.model.calibrate import Collector, alike, probe, version_of, watch_inputs
from drone.model.equal import equal, results
from drone.model.inputs import prepared, run
from drone.model.loss import LossFunction, batch_loss, mean, mean_loss
from drone.model.masks import Layouts, Stream, mask_of
from drone.model.streams import Streams

__all__ = ["Walk", "input_name", "mean_loss"]  # the last one lives in loss.py

LOGGER = logging.getLogger(__name__)


class _Reached(Exception):
    """The last module of interest has its input; the rest of the pass is not needed."""


class Walk:
    """Where a pass over all batches stands: in front of one layer.

    What lies below has run and is not run again, so to try something in a layer costs
    only the layers above. That is right where a model does nothing between its layers
    and gives all of them the same other arguments. Whether it does is proved once, on
    every batch, for a mask may differ from layer to layer in long rows only; if not,
    the whole model stands for its one layer: `loss` and `moments` make whole passes,
    slower and right, and `why_whole` says why. Use inside `frozen(model)`: eval mode,
    no gradients.

    Attributes:
        model: whose modules may be replaced on the way, not yet passed ones only.
        layers: {name: layer}, in network order; {"": model} if it is walked whole.
        number: of the layer in front, from 0.
        layer_forwards: passes of all batches through one layer, made so far. A pass
            through a part of a layer counts as one.
        why_whole: why the layers are not walked one by one; empty if they are.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        names: Iterable[str],
        layers: str | Iterable[str] | None = None,
        loss: LossFunction | None = None,
    ) -> None:
        """Run the model up to its first layer, then to its end as a proof.

        Args:
            model: any module.
            batches: keyword arguments of the model, as in `calibrate`; read once.
            names: of the modules of interest.
            layers: as in `encoder_layers`.
            loss: as in `batch_loss`.

        Raises:
            ValueError: no batch, a mask that is missing, a name the model does not
                have, a wrong name in `layers`.
        """
        self.model, self.number, self.layer_forwards = model, 0, 0
        self.names, self._loss_function = list(names), loss
        self.batches: list[dict[str, Any]] = []
        for number, batch in enumerate(prepared(batches, model)):
            mask_of(batch, number)
            self.batches.append(batch)
        if not self.batches:
            raise ValueError("no batch to calibrate on; at least one is needed.")
        self._states: list[Tensor] = []
        self._streams: list[Stream | None] = [None] * len(self.batches)
        self._layouts = Layouts(self.model, [])
        self._unmasked: dict[str, None] = {}
        # Layers that are walked one by one all get the same other arguments.
        self._rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.layers: dict[str, nn.Module] = {}
        self._inside: dict[str, str] = {}
        self.why_whole = self._not_in_layers(layers)
        if not self.why_whole:
            self._enter()
            self.why_whole = self._prove()
        if self.why_whole:
            LOGGER.info("%s: whole passes: %s", type(model).__name__, self.why_whole)
            self.layers = {"": model}
            self._inside = dict.fromkeys(self.names, "")
            self._states, self._rest = [], []
            self._streams = [None] * len(self.batches)
        self._learn_layouts()

    def _not_in_layers(self, layers: str | Iterable[str] | None) -> str:
        """Find the layers, and which of them each module is in; or say why not."""
        for name in self.names:
            module_named(self.model, name)
        try:
            self.layers = encoder_layers(self.model, layers)
        except ValueError as error:
            if layers is not None:
                raise
            return str(error)
        lists = {name.rpartition(".")[0] for name in self.layers}
        if len(lists) > 1:
            return f"the layers stand in {len(lists)} lists: {', '.join(sorted(lists))}"
        (only,) = lists
        if not isinstance(self.model.get_submodule(only), nn.ModuleList):
            return f"{only or 'the model'} is no ModuleList, which can be cut short"
        for name in self.names:
            inside = [p for p in self.layers if f"{name}.".startswith(f"{p}.")]
            if not inside:
                return f"{name} is outside of the layers"
            every = names_of(self.model, module_named(self.model, name))
            if len(every) > 1:
                return f"{name} is used as {every[-1]} too"
            self._inside[name] = inside[0]
        return ""

    def _enter(self) -> None:
        """Keep what the first layer gets, of every batch."""
        streams = Streams(self.model, self.names[:1])

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args and isinstance(args[0], Tensor):
                self._states.append(args[0])
                self._rest.append((args[1:], kwargs))
            raise _Reached

        handle = self._layer.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with streams.watching():
                for number, batch in enumerate(self.batches):
                    streams.start(number, batch)
                    try:
                        self._whole(batch)
                    except _Reached:
                        self._streams[number] = streams.here()
        finally:
            handle.remove()

    def _learn_layouts(self) -> None:
        """Where a batch's shape leaves it open, see which axis of an input is which."""
        sources = [input_name(self.model.get_submodule(n), n) for n in self.names]
        streams = Streams(self.model, sources)
        self._layouts = streams.layouts

        def see(name: str, x: Tensor) -> None:
            try:
                streams.at(name, x)
            except ValueError:
                return  # of the probe nothing is counted

        with streams.watching(), watch_inputs(self.model, dict.fromkeys(sources), see):
            for number, batch in enumerate(self.batches):
                streams.start(number, batch)
                if streams.in_doubt():
                    probe(self.model, batch, number, streams)

    def _prove(self) -> str:
        """Walk each batch beside a whole pass; say where they part, if they do."""
        if len(self._states) < len(self.batches):
            return "its first layer is not reached, or its first argument is no tensor"
        for number in range(len(self.batches)):
            why = self._prove_on(number)
            if why:
                return f"{why}, in batch {number}"
        return ""

    def _prove_on(self, batch: int) -> str:
        """Walk one batch beside a whole pass."""
        names = list(self.layers)
        calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor | None]] = []
        with _watch_calls(self.layers, calls):
            whole = self._whole(self.batches[batch])
        if [name for name, *_ in calls] != names:
            return "its layers are not run once each, in order"
        state: Tensor | None = self._states[batch]
        for name, args, kwargs, output in calls:
            if not args or not equal(args[0], state):
                return f"something happens to the hidden states in front of {name}"
            if not equal((args[1:], kwargs), self._rest[batch]):
                return f"{name} gets other arguments than {names[0]}"
            if output is None:
                return f"{name} returns no hidden states"
            state = output
        # The last layer alone must lead to the same end: what the model does above.
        self.number, first = len(names) - 1, self._states[batch]
        self._states[batch] = calls[-1][1][0]
        try:
            with self._from_here() as entering:
                entering["number"] = batch
                end = self._whole(self.batches[batch])
        except Exception as error:  # whatever a model raises that needs all its layers
            return f"it does not run without the layers below: {error!r}"
        finally:
            self.number, self._states[batch] = 0, first
        if not equal(results(end), results(whole)):
            return "its last layer alone does not lead to what it returns"
        return ""

    @property
    def _layer(self) -> nn.Module:
        # By name: a layer may itself be a Linear, and by now a thin one.
        return self.model.get_submodule(list(self.layers)[self.number])

    def _whole(self, batch: Mapping[str, Any]) -> Any:
        """Run the model as it is built at this moment."""
        with _uncached(self.model):
            return run(self.model, batch)

    def _run(self, number: int) -> Any:
        """Run the layer in front on a batch's hidden states; or the whole model."""
        if self.why_whole:
            return self._whole(self.batches[number])
        args, kwargs = self._rest[number]
        return self._layer(self._states[number], *args, **kwargs)

    def groups(self) -> list[list[str]]:
        """Sort the layer's modules into groups with one input, in order.

        Of that input the same vectors count for all of a group.

        Raises:
            ValueError: a module is reached by none of the batches, or no mask fits.
        """
        here = list(self.layers)[self.number]
        names = [name for name, layer in self._inside.items() if layer == here]
        source = {n: input_name(self.model.get_submodule(n), n) for n in names}
        streams = Streams(self.model, source.values())
        streams.layouts = self._layouts
        # Of a run of calls with one: the input, its version, which vectors count.
        last: tuple[Tensor, int | None, Tensor | None, int] | None = None
        place = 0  # of that run among all
        runs: dict[str, list[int]] = {}  # of each source, in order
        calls: Counter[tuple[int, str]] = Counter()

        def see(reached: str, x: Tensor) -> None:
            nonlocal last, place
            now = version_of(x)  # changed in place: another
            counts, times = streams.at(reached, x)
            if (
                last is None
                or last[0] is not x
                or now is None
                or (last[1], last[3]) != (now, times)
                or not alike(last[2], counts)
            ):
                place += 1
            last = x, now, counts, times
            runs.setdefault(reached, []).append(place)
            calls[number, reached] += 1

        reached_by = dict.fromkeys(source.values())
        with streams.watching(), watch_inputs(self.model, reached_by, see):
            # All of them: two modules may share an input in one batch only, or one may
            # be called again in another.
            for number, batch in enumerate(self.batches):
                last = None
                streams.start(number, batch, self._streams[number])
                self._run(number)
        missed = [name for name in names if source[name] not in runs]
        if missed:
            raise ValueError(
                f"never reached by these batches: {', '.join(missed)}; leave them out, "
                "or add batches that reach them."
            )
        groups: dict[tuple[int, ...], list[str]] = {}
        # A block comes with its query, before the Linears that the block holds.
        for reached in runs:
            named = [name for name in names if source[name] == reached]
            groups.setdefault(tuple(runs[reached]), []).extend(named)
        again = {reached for (_, reached), count in calls.items() if count > 1}
        self._once = {n: source[n] not in again for n in names}
        return list(groups.values())

    def moments(self, group: list[str]) -> dict[str, SecondMoment]:
        """Run the layer up to a group of modules; collect the moment of their input.

        Args:
            group: one of `groups()`, called in front of this layer.

        Returns:
            {name of the Linear whose inputs they are: that one moment}.
        """
        sources = [input_name(self.model.get_submodule(n), n) for n in group]
        collector = Collector()
        for number, calls in enumerate(self.inputs(group)):
            collector.start(number)
            for x, counts, times in calls:
                collector.see(sources[0], x, counts, times)
        (moment,) = collector.finish(sources[:1]).values()
        return dict.fromkeys(sources, moment)

    def inputs(
        self, group: list[str]
    ) -> Iterator[list[tuple[Tensor, Tensor | None, int]]]:
        """Run the layer up to a group of modules, and tell what they get.

        Args:
            group: as in `moments`.

        Yields:
            For each batch, one entry a call: (x, which of its vectors count, how often
            each does); see `Streams.at`.
        """
        source = input_name(self.model.get_submodule(group[0]), group[0])
        stop = self._once[group[0]]  # one that is called again has more inputs
        streams = Streams(self.model, [source])
        streams.layouts, streams.unmasked = self._layouts, self._unmasked
        calls: list[tuple[Tensor, Tensor | None, int]] = []

        def see(name: str, x: Tensor) -> None:
            # What goes on after this call may change its input in place.
            calls.append((x if stop else x.clone(), *streams.at(name, x)))
            if stop:
                raise _Reached

        for number, batch in enumerate(self.batches):
            calls = []
            with streams.watching(), watch_inputs(self.model, [source], see):
                streams.start(number, batch, self._streams[number])
                with suppress(_Reached):
                    self._run(number)
            yield calls
        self.layer_forwards += 1

    def loss(self) -> float:
        """Mean loss over all batches, running this layer and those above only.

        Raises:
            ValueError: a batch has no labels, or the model returns no loss.
        """
        pairs = []
        with self._from_here() as entering, _uncached(self.model):
            for number, batch in enumerate(self.batches):
                entering["number"] = number
                pair = batch_loss(self.model, batch, number, self._loss_function)
                pairs.append(pair)
        self.layer_forwards += len(self.layers) - self.number
        return mean(pairs)

    @contextmanager
    def _from_here(self) -> Iterator[dict[str, int]]:
        """Inside, the model has no layers below this one; this one gets the states."""
        entering: dict[str, int] = {}
        if self.why_whole:
            yield entering
            return

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (self._states[entering["number"]], *args[1:]), kwargs

        name = next(iter(self.layers)).rpartition(".")[0]
        whole = self.model.get_submodule(name)
        ahead = list(self.layers)[self.number :]
        above = nn.ModuleList([self.model.get_submodule(each) for each in ahead])
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
        if not self.why_whole:
            for number in range(len(self.batches)):
                hidden = _hidden(self._run(number))
                assert hidden is not None  # as it was in the proof
                self._states[number] = hidden
            self.layer_forwards += 1
        self.number += 1
        if self.number == len(self.layers) and self._unmasked:
            streams = Streams(self.model, [])
            streams.unmasked = self._unmasked
            streams.warn()


def _hidden(output: Any) -> Tensor | None:
    """Return the hidden states of what a layer returns."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


@contextmanager
def _watch_calls(
    layers: Mapping[str, nn.Module],
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor | None]],
) -> Iterator[None]:
    """Note each call of a layer: its name, arguments, keywords and hidden states."""

    def attach(name: str, layer: nn.Module) -> Any:
        def note(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            calls.append((name, args, kwargs, _hidden(output)))

        return layer.register_forward_hook(note, with_kwargs=True)

    handles = [attach(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _uncached(model: nn.Module) -> Iterator[None]:
    """Keep decoders from filling a cache of keys and values, which no pass here reads.

    A layer that is run twice would append to it twice.
    """
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    caching = [c for c in configs if getattr(c, "use_cache", False) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


def input_name(module: nn.Module, name: str) -> str:
    """Name of the Linear whose inputs matter: a block's are those of its query."""
    names = ATTENTION.get(type(module).__name__)
    return name if names is None else f"{name}.{names.query}"
