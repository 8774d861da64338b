"""What a mask is, and how it lies over a module's input.

A layer may see a batch's vectors transposed, flattened or shortened; shapes decide how
the mask lies over them. Which mask it is: `drone.model.streams`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from drone.callers import warn
from drone.model.inputs import flat

# Models that lengthen their input at its end, to a multiple of a block.
LENGTHEN = ("_pad_to_window_size", "_pad_to_block_size")
SHORTEN = "_get_feature_vector_attention_mask"  # audio: few frames of many samples
HELPERS = (*LENGTHEN, SHORTEN)
# What transformers' families call a table of learnt absolute positions.
POSITIONS = ("wpe", "position_embeddings", "embed_positions", "positions_embed")
MARKED = "query_global"  # Longformer's: sees one marked token of each row, as (1, rows)
Place = tuple[str, int]  # a module's name, and which of its calls in a pass


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


class Layouts:
    """How the inputs of modules lie: which axis is a batch's rows, which its tokens.

    Attributes:
        known: {place: layout}, from an input's shape where that says it, or from how
            the model is built; it serves where a shape leaves it open.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Know what the model's structure says of the named modules."""
        self.unpads = unpads(model)
        self.known: dict[Place, str] = {}
        for name in names:
            layout = _layout_by_structure(model, name)
            if layout:
                self.known[name, 0] = layout

    def lay(
        self, stream: Stream, place: Place, number: int, x: Tensor
    ) -> tuple[Tensor | None, int]:
        """Lay a stream's mask over the vectors of x.

        Args:
            stream: the sequence x is taken from.
            place: which call of which module is given x.
            number: of the batch, for messages.
            x: (..., features).

        Returns:
            (a mask of x.shape[:-1] or None: all, how often each vector counts).

        Raises:
            ValueError: no mask fits; the message names the module and the batch.
        """
        where = f"{place[0]}, batch {number}"
        shape, mask = tuple(x.shape[:-1]), stream.mask
        if stream.odd is not None:
            raise ValueError(
                f"{where}: the mask has shape {stream.odd}; "
                f"{shape} is needed, one value a vector: 1 for a token, 0 for a pad."
            )
        if mask is None:
            return None, 1
        if mask.ndim != 2:
            return _unfitted(where, shape, mask, self.unpads)
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
        layout = self._layout(place, where, shape, mask, stream.padded)
        if layout == "one a row" and stream.padded and _is_routed(place[0]):
            layout = ""  # as many tokens as there are rows, by chance
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
        return _unfitted(where, shape, mask, self.unpads)

    def _layout(
        self,
        place: Place,
        where: str,
        shape: tuple[int, ...],
        mask: Tensor,
        padded: bool,
    ) -> str:
        """Say how rows and tokens lie in an input, from its shape or from before."""
        rows, length = mask.shape
        if 1 < rows != length and shape[:2] == (rows, length):  # nearly always so
            self.known.setdefault(place, "rows")
            return "rows"
        told = self.known.get(place) or self.known.get((place[0], 0), "")
        if place[0].endswith(MARKED):
            told = "one a row"
        fits = [
            layout
            for layout, right in [
                ("rows", shape[:2] == (rows, length)),
                ("columns", shape[:2] == (length, rows)),
                ("flat", shape == (rows * length,)),
                ("one a row", shape in ((rows,), (rows, 1), (1, rows))),
                ("fixed", len(shape) > 1 and shape[0] == 1),
            ]
            if right
        ]
        if len(fits) > 1 and told in fits:
            return told
        open_ = len(set(fits) & {"rows", "columns", "fixed"}) > 1 and padded
        if open_ or (rows > 1 and {"one a row", "fixed"} <= set(fits)):
            raise ValueError(
                f"{where}: its input {shape} may lie one way or "
                f"another under a mask of {rows} rows and {length} tokens. Give "
                "batches of another size, or mask=."
            )
        if len(fits) == 1:
            self.known.setdefault(place, fits[0])
        return fits[0] if fits else ""


def unpads(model: nn.Module) -> bool:
    """Whether a model cuts pads away: then a module sees as many vectors as tokens.

    ModernBERT does under flash attention. Elsewhere so many are a coincidence, as among
    the tokens that a router sends to one expert.
    """
    config = getattr(model, "config", None)
    kernel = getattr(config, "_attn_implementation", None) or ""
    return isinstance(kernel, str) and "flash" in kernel


def _is_routed(name: str) -> bool:
    """Whether a module is one of several experts, which see some of the tokens each."""
    return re.search(r"(^|\.)(local_)?experts?\.\d+(\.|$)", name) is not None


def _unfitted(
    where: str, shape: tuple[int, ...], mask: Tensor, unpadded: bool
) -> tuple[Tensor | None, int]:
    """Take a mask that lies on x as it is, or that has no pads; else refuse."""
    if tuple(mask.shape) == shape:
        return mask, 1
    real = int(mask.sum())
    if real == mask.numel() or (unpadded and shape in ((real,), (1, real))):
        return None, 1  # there are no pads, or the model has cut them away
    raise ValueError(
        f"{where}: the mask has shape {tuple(mask.shape)}; "
        f"{shape} is needed, one value a vector. Say which vectors count with "
        "mask=, or give batches without pads."
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


def warn_of_any_left_pads(
    model: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> None:
    """Warn, once, if rows of any batch are padded on the left; see above."""
    any(warn_of_left_pads(model, b, number) for number, b in enumerate(batches))


def _position_table(model: nn.Module) -> str | None:
    """Name the table of learnt absolute positions that counts from the left."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.Embedding) or not name.endswith(POSITIONS):
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


def as_counts(mask: Any, name: str) -> Tensor | None:
    """Return a caller's mask as booleans."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{name}: mask= gives no tensor of 0 (pad) and 1 (counts) for it."
        )
    return mask.bool()


def _spread(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat a mask (a, b) over the further axes of (a, b, ...)."""
    if mask.ndim == len(shape):
        return mask
    return mask.reshape(*mask.shape, *[1] * (len(shape) - 2)).expand(shape)
