"""Which of the vectors a module sees count: masks belong to modules, not to shapes.

A batch may hold several sequences (a source and a target, a text and an image), and a
layer may see them transposed, flattened or shortened. So the mask is taken from the
calls *around* a module: the innermost one that was given the tokens or a mask says
which sequence runs inside it. How it lies over the input is `drone.model.masks`.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from drone.callers import warn
from drone.model.inputs import arguments, flat
from drone.model.masks import (
    HELPERS,
    LENGTHEN,
    SHORTEN,
    Layouts,
    NoMaskWarning,
    Stream,
    as_counts,
)

# What begins a sequence: a call that is given one of these runs on that sequence.
IMAGES = ("pixel_values", "pixel_values_videos", "input_features")  # seldom padded
PIXELS = "pixel_mask"  # of the image that a model reads after the text
TOKENS = ("input_ids", "inputs_embeds", "src", "tgt", "input_values", *IMAGES)
# The other sequence a decoder looks at, and the mask that belongs to it.
MEMORIES = {
    "encoder_hidden_states": "encoder_attention_mask",
    "memory": "memory_key_padding_mask",
}
MASKS = ("attention_mask", "key_padding_mask")
# Arguments that say which sequence runs in a call, or which of it counts.
TELLING = {
    *TOKENS,
    *MASKS,
    "src_key_padding_mask",
    "tgt_key_padding_mask",
    *MEMORIES,
}

Override = (
    Callable[[str, Mapping[str, Any], Tensor], Tensor | None] | Mapping[str, str | None]
)


class Streams:
    """Follows the calls inside a model and says which stream reaches each module.

    Use `with streams.watching():` around the passes and `start` before each.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], mask: Override | None = None
    ) -> None:
        self.model, self.names, self.override = model, list(names), mask
        self.layouts = Layouts(model, self.names)
        self.calls: dict[str, int] = {}
        self.unmasked: dict[str, None] = {}  # modules without a known mask, in order
        self.stack: list[Stream] = [Stream()]
        # Of frames of sound a model that shortens a mask ignores some, if it gets one.
        self._shortens = any(hasattr(type(m), SHORTEN) for m in model.modules())
        self._lengthens = any(
            hasattr(type(m), each) for m in model.modules() for each in LENGTHEN
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Attach hooks to the modules around the named ones; remove them at the end."""
        owner, handles = threading.get_ident(), []
        around = dict.fromkeys(
            name[:end]
            for name in self.names
            for end in range(1, len(name))
            if name[end] == "."
        )
        for name in around:
            handles += self._attach(self.model.get_submodule(name), owner)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, module: nn.Module, owner: int) -> list[Any]:
        names, takes_any = arguments(module)
        helps = any(hasattr(type(module), each) for each in HELPERS)
        if not (helps or takes_any or TELLING.intersection(names)):
            return []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == owner:  # others may use the model meanwhile
                # What is given without a name (*args) is no mask.
                given = flat({**dict(zip(names, args, strict=False)), **kwargs})
                inner = self._inner(given, self.stack[-1])
                if helps:
                    inner = replace(inner, helpers=(*inner.helpers, module))
                self.stack.append(inner)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            if threading.get_ident() != owner:
                return
            inner = self.stack.pop()
            # What comes after an encoder, beside it, works on what it returned.
            if inner is not self.stack[-1]:
                self.stack[-1] = replace(inner, memories=self.stack[-1].memories)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]

    def start(
        self, number: int, batch: Mapping[str, Any], base: Stream | None = None
    ) -> None:
        """Begin a pass over a batch; `base` is the stream where the pass begins.

        Raises:
            ValueError: a mask with other values than 0 and 1.
        """
        self.number, self.batch, self.given = number, batch, flat(batch)
        self.calls = {}
        self._own = {id(v) for v in self.given.values() if isinstance(v, Tensor)}
        self._read: dict[int, tuple[Tensor, Tensor, bool]] = {}  # mask → what it says
        outside = Stream()
        if base is None:
            base = self._inner(self.given, outside)
            if any(hasattr(type(self.model), each) for each in HELPERS):
                base = replace(base, helpers=(self.model,))
        self.stack = [base]

    def here(self) -> Stream:
        """Return the stream at this moment of a pass."""
        return self.stack[-1]

    def _inner(self, given: Mapping[str, Any], outer: Stream) -> Stream:
        """Return the stream inside a call, from what it is given."""
        stream, pixels = self._of_tokens(given, outer), given.get(PIXELS)
        text = any(isinstance(given.get(k), Tensor) for k in ("input_ids", *MASKS))
        if not text or not isinstance(pixels, Tensor) or id(pixels) not in self._own:
            return stream
        if id(pixels) not in self._read:
            self._read[id(pixels)] = (pixels, pixels, not bool(pixels.all()))
        # Text and image in one row: which patches are pads, no mask of tokens says.
        padded = self._read[id(pixels)][2]
        return replace(stream, odd=tuple(pixels.shape)) if padded else stream

    def _of_tokens(self, given: Mapping[str, Any], outer: Stream) -> Stream:
        """Return the stream inside a call, were there no mask of pixels."""
        tokens = next((k for k in TOKENS if isinstance(given.get(k), Tensor)), None)
        key = {"src": "src_key_padding_mask", "tgt": "tgt_key_padding_mask"}.get(
            tokens or ""
        ) or next(
            (k for k in MASKS if k in given),
            "attention_mask",
        )
        mask, memories = given.get(key), outer.memories
        for states, its_mask in MEMORIES.items():
            if isinstance(given.get(states), Tensor):
                # Without a mask of its own: the stream that ran last, its encoder's.
                before = replace(outer, memories=())
                told = given.get(its_mask)
                inner = before if told is None else self._masked(its_mask, told, before)
                memories = (*memories, (given[states], inner))
        stream = replace(outer, memories=memories) if memories else outer
        if tokens and memories is not outer.memories and id(mask) not in self._own:
            counts = self._decoder_mask(given[tokens])
            if counts is not None:
                pads = not bool(counts.all())
                return replace(stream, mask=counts, padded=pads, known=True, odd=None)
        if mask is not None:
            return self._masked(key, mask, stream)
        if tokens is None or (tokens == "inputs_embeds" and _without_pads(outer)):
            return stream
        heard = tokens == "input_features" and self._shortens
        known = tokens in IMAGES and not heard
        return replace(stream, mask=None, known=known, odd=None)

    def _masked(self, key: str, mask: Any, stream: Stream) -> Stream:
        """Return the stream with a mask, if that is one of tokens."""
        if not isinstance(mask, Tensor) or (
            mask.ndim > 2 and id(mask) not in self._own
        ):
            return stream  # made by the model for its attention, of the one outside
        own = id(mask) in self._own
        if mask.ndim > 2:
            return replace(stream, mask=None, odd=tuple(mask.shape))
        if mask.is_floating_point() and not own:
            return stream  # additive, made by the model
        if id(mask) not in self._read:  # once a batch: each look waits for the device
            # An additive mask (0 and -inf) means the opposite: refuse it.
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError(
                    f"batch {self.number}: {key} has values other than 0 (pad) and 1 "
                    "(counts)."
                )
            # PyTorch's own layers mark the pads, transformers' models the tokens.
            counts = mask == 0 if key.endswith("key_padding_mask") else mask != 0
            self._read[id(mask)] = (mask, counts, not bool(counts.all()))
        _, counts, padded = self._read[id(mask)]
        return replace(stream, mask=counts, padded=padded, known=True, odd=None)

    def _decoder_mask(self, tokens: Tensor) -> Tensor | None:
        """Take a decoder's mask from its labels: -100 at the end stands for a pad.

        The model shifts labels to the right to make the decoder's inputs, so input t
        is a real one where label t is: a row of n labels has n inputs, start included.
        """
        labels = self.given.get("labels")
        if not isinstance(labels, Tensor) or labels.shape != tokens.shape[:2]:
            return None
        counts = (labels != -100).flip(1).cummax(1).values.flip(1)
        return counts  # one left out in the middle is a token all the same

    def at(self, name: str, x: Tensor) -> tuple[Tensor | None, int]:
        """Say which of the vectors x a module is given count.

        Returns:
            (a mask of x.shape[:-1] or None: all, how often each vector counts).

        Raises:
            ValueError: no mask fits; the message names the module and the batch.
        """
        call = self.calls[name] = self.calls.get(name, -1) + 1
        if self.override is not None:
            known, mask = self._told(name, x)
            if known:
                pads = mask is not None and not bool(mask.all())
                told = Stream(mask, pads, known=True)
                return self.layouts.lay(told, (name, call), self.number, x)
        stream = next(
            (inner for states, inner in self.stack[-1].memories if same(x, states)),
            self.stack[-1],
        )
        if x.is_nested:
            return None, 1  # PyTorch has cut the pads away
        if not stream.known and stream.odd is None and x.ndim > 2 and len(x) > 1:
            self.unmasked[name] = None
        return self.layouts.lay(stream, (name, call), self.number, x)

    def _told(self, name: str, x: Tensor) -> tuple[bool, Tensor | None]:
        """Return whether the caller's `mask` speaks of this module, and the mask."""
        if callable(self.override):
            return True, as_counts(self.override(name, self.batch, x), name)
        prefix = self._prefix(name)
        if prefix is None:
            return False, None
        assert self.override is not None
        key = self.override[prefix]
        if key is None:
            return True, None
        if not isinstance(self.given.get(key), Tensor):
            raise ValueError(
                f"{name}: batch {self.number} has no {key!r}, which mask= names."
            )
        mask = as_counts(self.given[key], name)
        inverted = key.endswith("key_padding_mask")
        return True, ~mask if inverted and mask is not None else mask

    def _prefix(self, name: str) -> str | None:
        """Return which of the prefixes in the caller's `mask` speaks of a module."""
        if not isinstance(self.override, Mapping):
            return None
        inside = [
            prefix
            for prefix in self.override
            if not prefix or f"{name}.".startswith(f"{prefix}.")
        ]
        return max(inside, key=len) if inside else None

    def told_by(self, name: str) -> str | None:
        """Say whose word on a module counts: a key of the batch, or a function's."""
        if self.override is None:
            return None
        if callable(self.override):
            return name  # it may answer differently for each
        prefix = self._prefix(name)
        return None if prefix is None else self.override[prefix] or ""

    def in_doubt(self) -> bool:
        """Whether the batch has as many rows as tokens, or one, and some pads.

        Then an input's shape does not say which of its axes are the tokens.
        """
        if all((name, 0) in self.layouts.known for name in self.names):
            return False
        if self._lengthens and not self.layouts.known:
            return True
        stream = self.stack[0]
        masks = [stream.mask]
        labels = self.given.get("labels")
        if isinstance(labels, Tensor) and labels.ndim == 2:
            masks.append(labels != -100)
        return any(
            mask is not None
            and mask.ndim == 2
            and not bool(mask.all())
            and (mask.shape[0] == 1 or mask.shape[0] == mask.shape[1])
            for mask in masks
        )

    def rows(self) -> int:
        """Return how many rows the batch has."""
        mask = self.stack[0].mask
        labels = self.given.get("labels")
        return (
            len(mask) if mask is not None else len(labels) if labels is not None else 0
        )

    def warn(self) -> None:
        """Say, once, for which modules no mask was known."""
        if self.unmasked:
            names = list(self.unmasked)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warn(
                f"no mask is known for {', '.join(names[:3])}{more}: every position "
                "counts, pads too. Give a mask in the batch (attention_mask, "
                "decoder_attention_mask, src_key_padding_mask, or labels with -100), "
                "or mask= to calibrate; mask={'': None} says that all count.",
                NoMaskWarning,
            )


def _without_pads(stream: Stream) -> bool:
    return stream.mask is None or not stream.padded


def same(x: Tensor, states: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, seen the same way."""
    return x is states or (
        x.data_ptr() == states.data_ptr()
        and x.shape == states.shape
        and x.stride() == states.stride()
    )
