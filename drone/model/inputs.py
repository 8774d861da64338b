"""What a model is run on: batches in any usual form, made dicts of tensors once."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drone.devices import check_weights_are_here, device_of
from drone.math.moments import SecondMoment

LABELS = (
    "labels",
    "start_positions",
    "end_positions",
)  # how a model's targets are named
# Other names of `labels`, as transformers' own collator knows them.
LABEL_ALIASES = ("label", "label_ids")


class Prepared(list[dict[str, Any]]):
    """Batches that `prepare` has made, and where they are: not made a second time."""

    device: torch.device | None = None


def prepare(batches: Any, model: nn.Module) -> list[dict[str, Any]]:
    """Make batches dicts of tensors on the model's device, once.

    Args:
        batches: an iterable of batches, or one dict alone. A batch is a mapping of
            keyword arguments, of tensors, arrays or lists (a dict may stand inside); a
            tensor or array, the model's first argument; or a pair (inputs, labels). A
            row of a `datasets.Dataset`, without a batch axis, is a batch of one.
        model: whose device and argument names count.

    Returns:
        A list of dicts; what is prepared already comes back as it is.

    Raises:
        ValueError: what is no batch; the message says which, and what is allowed.

    >>> model = torch.nn.Linear(3, 2)
    >>> prepare([(np.ones((4, 3)), [0, 1, 1, 0])], model)[0].keys()
    dict_keys(['input', 'labels'])
    """
    device = _where_it_runs(model)
    if isinstance(batches, Prepared) and batches.device == device:
        return batches
    made = Prepared(prepared(batches, model))
    made.device = device
    return made


def prepared(batches: Any, model: nn.Module) -> Iterator[dict[str, Any]]:
    """As `prepare`, one batch at a time: a stream need not fit in memory.

    Raises:
        ValueError: as `prepare`; what is no iterable of batches, at once.
    """
    check_model(model)
    many = _many(batches)
    device = _where_it_runs(model)
    if isinstance(batches, Prepared) and batches.device == device:
        return iter(batches)
    names, _ = arguments(model)
    return (_one(batch, number, names, device) for number, batch in enumerate(many))


def check_model(model: Any) -> None:
    """Refuse what is no model, where arguments are easily swapped.

    Raises:
        ValueError: it is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the model is a {type(model).__name__}; an nn.Module is needed. The model "
            "comes first, then the batches."
        )


def check_moments(moments: Any) -> None:
    """Refuse what is no dict of moments, where batches are easily given for them.

    Raises:
        ValueError: it is not {module name: SecondMoment}, nor None.
    """
    if moments is None:
        return
    if not isinstance(moments, Mapping) or not all(
        isinstance(each, SecondMoment) for each in moments.values()
    ):
        raise ValueError(
            f"the moments are a {type(moments).__name__}; calibrate(model, batches) "
            "makes them of batches: {module name: SecondMoment}."
        )


def _many(batches: Any) -> Iterable[Any]:
    """Return what gives batch after batch; one dict alone is one batch."""
    if isinstance(batches, str | bytes | PurePath | int | float | nn.Module):
        raise ValueError(
            f"the batches are {_shown(batches)}; a list of dicts of tensors is needed, "
            "as a tokenizer gives them."
        )
    if isinstance(batches, Mapping):
        values = list(batches.values())
        if any(isinstance(each, SecondMoment) for each in values):
            raise ValueError("these are moments, not batches; give them as moments=.")
        if values and all(hasattr(each, "column_names") for each in values):
            raise ValueError(
                f"the batches are a DatasetDict; choose one of {', '.join(batches)}."
            )
        return [batches]
    if isinstance(batches, Tensor | np.ndarray) or (
        isinstance(batches, tuple) and all(_is_array(each) for each in batches)
    ):
        raise ValueError(
            f"the batches are {_shown(batches)}, which may be one batch or several; "
            "put it in a list: [batch]."
        )
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"the batches are {_shown(batches)}; an iterable of batches is needed."
        )
    return batches


def _one(
    batch: Any, number: int, names: list[str], device: torch.device | None
) -> dict[str, Any]:
    """Make one batch a dict of tensors where the model is."""
    where = f"batch {number}"
    first = names[0] if names else "input"
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(inputs, Mapping) and isinstance(labels, Mapping):
            raise ValueError(
                f"{where} is a pair of dicts, two rows perhaps; a pair is read as "
                "(inputs, labels). Give one dict: leave collate_fn out, or stack rows "
                "with torch.utils.data.default_collate."
            )
        if names[1:2] == ["attention_mask"] and _is_mask(inputs, labels):
            raise ValueError(
                f"{where} is a pair whose second part looks like a mask; a pair is "
                "read as (inputs, labels). Give a dict: {'input_ids': ..., "
                "'attention_mask': ...}."
            )
        inputs = inputs if isinstance(inputs, Mapping) else {first: inputs}
        batch = {**inputs, "labels": labels}
    elif _is_array(batch):
        batch = {first: batch}
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{where} is {_shown(batch)}; a dict of tensors (the model's keyword "
            "arguments), a tensor, or a pair (inputs, labels) is needed."
        )
    if not batch:
        raise ValueError(f"{where} is empty: {{}}.")
    made = {str(key): _value(key, value, where, device) for key, value in batch.items()}
    for alias in LABEL_ALIASES:
        if alias in made and alias not in names and "labels" not in made:
            made["labels"] = made.pop(alias)
    tokens = made.get("input_ids")
    if isinstance(tokens, Tensor) and tokens.ndim == 1:  # a row of a data set
        made = {
            key: value[None] if isinstance(value, Tensor) else value
            for key, value in made.items()
        }
    return made


def _value(key: Any, value: Any, where: str, device: torch.device | None) -> Any:
    """Make arrays and lists of numbers tensors; leave None and flags as they are."""
    if isinstance(value, Mapping):
        return {k: _value(k, v, where, device) for k, v in value.items()}
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, str | bytes) or (
        isinstance(value, list) and any(isinstance(each, str) for each in value)
    ):
        raise ValueError(
            f"{where}: {key!r} is text; a model takes numbers. Tokenize it, or leave "
            "that column out."
        )
    if isinstance(value, np.ndarray | list):
        try:
            # A list may hold tensors, as the rows of a data set do.
            if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
                value = torch.stack(value)
            else:
                value = torch.as_tensor(np.asarray(value))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{where}: {key!r} is no array of numbers ({error}); rows of unlike "
                "length must be padded first."
            ) from error
        if value.dtype == torch.float64:  # what NumPy and Python make of every number
            value = value.to(torch.get_default_dtype())
    if isinstance(value, int | float) and key in (*LABELS, *LABEL_ALIASES):
        value = torch.tensor(value)  # the label of one row
    if isinstance(value, Tensor) and device is not None:
        return value.to(device)
    return value


def _is_mask(inputs: Any, other: Any) -> bool:
    """Whether two tensors are token ids and 0 or 1 for each."""
    both = isinstance(inputs, Tensor) and isinstance(other, Tensor)
    return (
        both
        and inputs.shape == other.shape
        and bool(((other == 0) | (other == 1)).all())
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _shown(value: Any) -> str:
    """Name a value that was given in the wrong place, briefly."""
    if isinstance(value, str | bytes | PurePath | int | float):
        return f"the {type(value).__name__} {str(value)[:60]!r}"
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{size}"


@cache
def _signature(forward: Any) -> tuple[list[str], list[str], bool]:
    """Return a function's arguments, those it needs, and whether it takes any other."""
    kinds = inspect.Parameter
    parameters = inspect.signature(forward).parameters.values()
    named = [
        p.name
        for p in parameters
        if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    needed = [p.name for p in parameters if p.name in named and p.default is p.empty]
    return named, needed, any(p.kind is p.VAR_KEYWORD for p in parameters)


def arguments(module: nn.Module) -> tuple[list[str], bool]:
    """Name what a module's forward takes, in order, and whether it takes any other."""
    own = vars(module).get("forward")  # set on the object itself, as accelerate does
    if own is not None:
        named, _, takes_any = _signature(own)
        return named, takes_any
    named, _, takes_any = _signature(type(module).forward)
    return named[1:], takes_any  # without self


def run(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a model on a prepared batch and return what it returns.

    Labels are left out where the model takes none (its loss is then computed outside);
    a model whose one needed argument is the whole dict, as that of SentenceTransformer,
    gets it so.
    """
    named, takes_any = arguments(model)
    _, needed, _ = _signature(type(model).forward)
    needed = [name for name in needed[1:] if name not in batch]
    if len(needed) == 1 and needed[0] == named[0] and not set(named) & set(batch):
        return model(dict(batch))
    if not takes_any:
        batch = {k: v for k, v in batch.items() if k in named or k not in LABELS}
    return model(**batch)


def _where_it_runs(model: nn.Module) -> torch.device | None:
    """Return where a model's inputs belong; None if it has no tensor.

    Raises:
        ValueError: a weight is on the meta device and nothing brings it.
    """
    hook = getattr(model, "_hf_hook", None)  # accelerate's, of weights kept elsewhere
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        check_weights_are_here(model)  # such hooks fetch them for each call
    return device_of(model)


def flat(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch's values by their own names, also those of dicts inside it."""
    found = {
        key: value for key, value in batch.items() if not isinstance(value, Mapping)
    }
    for value in batch.values():
        if isinstance(value, Mapping):
            found = {**flat(value), **found}
    return found
