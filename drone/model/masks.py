"""Which of the vectors a module sees count: masks belong to modules, not to shapes.

A batch may hold several sequences (a source and a target, a text and an image), and a
layer may see them transposed, flattened or shortened. So the mask is taken from the
calls *around* a module: the innermost one that was given the tokens or a mask says
which sequence runs inside it. Shapes only decide how that mask lies over the input.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from drone.callers import warn
from drone.model.inputs import arguments, flat

# What begins a sequence: a call that is given one of these runs on that sequence.
IMAGES = ("pixel_values", "pixel_values_videos", "input_features")  # none is padded
TOKENS = ("input_ids", "inputs_embeds", "src", "tgt", "input_values", *IMAGES)
# The other sequence a decoder looks at, and the mask that belongs to it.
MEMORIES = {
    "encoder_hidden_states": "encoder_attention_mask",
    "memory": "memory_key_padding_mask",
}
# Models that lengthen their input at its end, to a multiple of a block.
LENGTHEN = ("_pad_to_window_size", "_pad_to_block_size")
SHORTEN = "_get_feature_vector_attention_mask"  # audio: few frames of many samples
HELPERS = (*LENGTHEN, SHORTEN)
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


class NoMaskWarning(UserWarning):
    """No mask was known for some module: every position counted, pads too."""


class LeftPaddingWarning(UserWarning):
    """Rows are padded on the left and the model counts positions from the left."""


@dataclass(frozen=True)
class Stream:
    """The sequence that runs at some place of a model, and what of it counts.

    Attributes:
        mask: (batch, length) or (length,) booleans, True for a token; None: all count.
        padded: whether the mask has pads.
        known: whether somebody said so, or there can be no pads.
        odd: shape of a mask that was given and is no such mask.
        memories: (hidden states, their own stream) of encoders a decoder looks at.
        helpers: modules around, which know how they shorten or lengthen a mask.
    """

    mask: Tensor | None = None
    padded: bool = False
    known: bool = False
    odd: tuple[int, ...] | None = None
    memories: tuple[tuple[Tensor, "Stream"], ...] = ()
    helpers: tuple[nn.Module, ...] = field(default=(), repr=False)


class Streams:
    """Follows the calls inside a model and says which stream reaches each module.

    Use `with streams.watching():` around the passes and `start` before each.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], mask: Override | None = None
    ) -> None:
        self.model, self.names, self.override = model, list(names), mask
        self.layouts: dict[tuple[str, int], str] = {}  # how each call's input lies
        self.calls: dict[str, int] = {}
        self.unmasked: dict[str, None] = {}  # modules without a known mask, in order
        self.stack: list[Stream] = [Stream()]
        self._lengthens = any(
            hasattr(type(m), each) for m in model.modules() for each in LENGTHEN
        )
        for name in self.names:
            layout = _layout_by_structure(model, name)
            if layout:
                self.layouts[name, 0] = layout

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
        return replace(stream, mask=None, known=tokens in IMAGES, odd=None)

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
                return self._fitted(name, call, x, Stream(mask, pads, known=True))
        stream = next(
            (inner for states, inner in self.stack[-1].memories if _same(x, states)),
            self.stack[-1],
        )
        if x.is_nested:
            return None, 1  # PyTorch has cut the pads away
        if not stream.known and stream.odd is None and x.ndim > 2 and len(x) > 1:
            self.unmasked[name] = None
        return self._fitted(name, call, x, stream)

    def _told(self, name: str, x: Tensor) -> tuple[bool, Tensor | None]:
        """Return whether the caller's `mask` speaks of this module, and the mask."""
        if callable(self.override):
            return True, _as_counts(self.override(name, self.batch, x), name)
        assert self.override is not None
        inside = [
            prefix
            for prefix in self.override
            if not prefix or f"{name}.".startswith(f"{prefix}.")
        ]
        if not inside:
            return False, None
        key = self.override[max(inside, key=len)]
        if key is None:
            return True, None
        if not isinstance(self.given.get(key), Tensor):
            raise ValueError(
                f"{name}: batch {self.number} has no {key!r}, which mask= names."
            )
        mask = _as_counts(self.given[key], name)
        inverted = key.endswith("key_padding_mask")
        return True, ~mask if inverted and mask is not None else mask

    def _fitted(
        self, name: str, call: int, x: Tensor, stream: Stream
    ) -> tuple[Tensor | None, int]:
        """Lay a stream's mask over the vectors of x."""
        shape, mask = tuple(x.shape[:-1]), stream.mask
        if stream.odd is not None:
            raise ValueError(
                f"{name}, batch {self.number}: the mask has shape {stream.odd}; "
                f"{shape} is needed, one value a vector: 1 for a token, 0 for a pad."
            )
        if mask is None:
            return None, 1
        if mask.ndim != 2:
            return self._unfitted(name, shape, mask)
        rows, length = mask.shape
        for helper in stream.helpers:
            if len(shape) < 2 or rows not in shape[:2]:
                continue
            other = shape[1] if shape[0] == rows else shape[0]
            lengthens = any(hasattr(helper, each) for each in LENGTHEN)
            if lengthens and other > length:
                mask = nn.functional.pad(mask, (0, other - length))
                stream = replace(stream, padded=True)
            shorten: Any = getattr(helper, SHORTEN, None)
            if shorten is not None and other < length:
                mask = shorten(other, mask).bool()
            rows, length = mask.shape
        layout = self._layout(name, call, shape, mask, stream.padded)
        if layout == "one a row":
            return None, 1
        if layout == "fixed":  # the same for every row of the batch: once for each
            return None, rows
        if not stream.padded:
            return None, 1
        if layout == "rows":
            return _spread(mask, shape), 1
        if layout == "columns":
            return _spread(mask.T, shape), 1
        if layout == "flat":
            return mask.reshape(shape), 1
        return self._unfitted(name, shape, mask)

    def _unfitted(
        self, name: str, shape: tuple[int, ...], mask: Tensor
    ) -> tuple[Tensor | None, int]:
        """Take a mask that lies on x as it is, or that has no pads; else refuse."""
        if tuple(mask.shape) == shape:
            return mask, 1
        real = int(mask.sum())
        if real == mask.numel() or shape in ((real,), (1, real)):
            return None, 1  # there are no pads, or the model has cut them away
        raise ValueError(
            f"{name}, batch {self.number}: the mask has shape {tuple(mask.shape)}; "
            f"{shape} is needed, one value a vector. Say which vectors count with "
            "mask=, or give batches without pads."
        )

    def _layout(
        self, name: str, call: int, shape: tuple[int, ...], mask: Tensor, padded: bool
    ) -> str:
        """Say how rows and tokens lie in an input, from its shape or from before."""
        rows, length = mask.shape
        if 1 < rows != length and shape[:2] == (rows, length):  # nearly always so
            self.layouts.setdefault((name, call), "rows")
            return "rows"
        told = self.layouts.get((name, call)) or self.layouts.get((name, 0), "")
        fits = [
            layout
            for layout, right in [
                ("rows", shape[:2] == (rows, length)),
                ("columns", shape[:2] == (length, rows)),
                ("flat", shape == (rows * length,)),
                ("one a row", shape in ((rows,), (rows, 1))),
                ("fixed", len(shape) > 1 and shape[0] == 1),
            ]
            if right
        ]
        if len(fits) > 1 and told in fits:
            return told
        if padded and len(set(fits) & {"rows", "columns", "fixed"}) > 1:
            raise ValueError(
                f"{name}, batch {self.number}: its input {shape} may lie one way or "
                f"another under a mask of {rows} rows and {length} tokens. Give "
                "batches of another size, or mask=."
            )
        if len(fits) == 1:
            self.layouts.setdefault((name, call), fits[0])
        return fits[0] if fits else ""

    def in_doubt(self) -> bool:
        """Whether the batch has as many rows as tokens, or one, and some pads.

        Then an input's shape does not say which of its axes are the tokens.
        """
        if all((name, 0) in self.layouts for name in self.names):
            return False
        if self._lengthens and not self.layouts:
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


def one_row_more(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a batch whose last row stands twice: then no other axis is as long."""
    return {
        key: one_row_more(value, rows)
        if isinstance(value, Mapping)
        else torch.cat([value, value[-1:]])
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        else value
        for key, value in batch.items()
    }


def mask_of(batch: Mapping[str, Any], number: int) -> Tensor | None:
    """Return a batch's mask of real tokens; text without one would count its pads.

    Raises:
        ValueError: the batch has `input_ids` and no `attention_mask`.
    """
    given = flat(batch)
    mask: Tensor | None = given.get("attention_mask")
    if mask is None and "input_ids" in given:
        raise ValueError(
            f"batch {number} has input_ids and no attention_mask; without one, pads "
            "would count as tokens."
        )
    return mask


def warn_of_left_pads(model: nn.Module, batch: Mapping[str, Any], number: int) -> bool:
    """Warn if rows are padded on the left and positions counted from the left.

    A model with learnt positions takes them from a token's place in the row; pads in
    front then shift every real token.

    Returns:
        Whether it warned.
    """
    given = flat(batch)
    mask = given.get("attention_mask")
    if "position_ids" in given or not isinstance(mask, Tensor) or mask.ndim != 2:
        return False
    if not bool(((mask[:, 0] == 0) & (mask[:, -1] != 0)).any()):
        return False
    table = _position_table(model)
    if table is None:
        return False
    warn(
        f"batch {number} is padded on the left, and {table} gives positions from the "
        "left, pads included: each token gets the position of another. Pad on the "
        "right (tokenizer.padding_side = 'right'), or give position_ids.",
        LeftPaddingWarning,
    )
    return True


def _position_table(model: nn.Module) -> str | None:
    """Name the table of learnt absolute positions that counts from the left."""
    ends = ("wpe", "position_embeddings", "embed_positions", "positions_embed")
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.Embedding) or not name.endswith(ends):
            continue
        # RoBERTa and MPNet count from the first token that is no pad; so does OPT.
        if module.padding_idx is None and "OPT" not in type(module).__name__:
            return name
    return None


def _layout_by_structure(model: nn.Module, name: str) -> str:
    """Say how the input of a module of PyTorch's own Transformer lies, if it is one."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        for child in model.get_submodule(".".join(parts[:end])).children():
            if isinstance(child, nn.MultiheadAttention):
                return "rows" if child.batch_first else "columns"
    return ""


def _as_counts(mask: Any, name: str) -> Tensor | None:
    """Return a caller's mask as booleans."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{name}: mask= gives no tensor of 0 (pad) and 1 (counts) for it."
        )
    return mask.bool()


def _without_pads(stream: Stream) -> bool:
    return stream.mask is None or not stream.padded


def _spread(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat a mask (a, b) over the further axes of (a, b, ...)."""
    if mask.ndim == len(shape):
        return mask
    return mask.reshape(*mask.shape, *[1] * (len(shape) - 2)).expand(shape)


def _same(x: Tensor, states: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, seen the same way."""
    return x is states or (
        x.data_ptr() == states.data_ptr()
        and x.shape == states.shape
        and x.stride() == states.stride()
    )
