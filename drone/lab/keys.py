"""What a training depends on, told in values JSON knows: the parts of a cache's key."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from importlib.metadata import version
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from drone.files import tensors_sha256
from drone.search.described import described

# Of a config and of a module: where it was read from says nothing about what it is.
ORIGIN = {"_name_or_path", "name_or_path", "transformers_version"}
# Nor do its mode, and what `tied` tells.
LEFT_OUT = {"training", "all_tied_weights_keys", *ORIGIN}
# Of these, beside what `repr` tells whole, two may differ and be another training each.
SETTINGS = (
    complex,
    bytes,
    range,
    np.generic,
    np.ndarray,
    Tensor,
    PurePath,
    Enum,
    FunctionType,
    BuiltinFunctionType,
    functools.partial,
)
# Of a tokenizer's backend: left there by its last call, set anew by the next.
CALL_STATE = {"padding", "truncation"}


def digest(value: Any) -> str:
    """SHA-256 over canonical JSON: names sorted, one spelling of each value.

    Raises:
        TypeError: a value JSON does not know, a name that is no text.
        ValueError: NaN or infinity: it is equal to nothing, a key must be.

    >>> digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1})
    True
    """
    _check_names(value)
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_names(value: Any) -> None:
    """Refuse names that JSON writes as texts: 1 would be "1", and None "null"."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(
                    f"the name {name!r} is of type {type(name).__name__}, and JSON "
                    "spells it as a text; a str is needed."
                )
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for each in value:
        _check_names(each)


def of_model(model: nn.Module) -> dict[str, Any]:
    """Tell everything of a model that a training of it depends on.

    Args:
        model: any module; only its mode (train or eval) is left out.

    Returns:
        `class`; `config` whole (None if it has none); and digests of `weights`
        (parameters and buffers: names, dtypes, shapes, values), of `frozen` (which
        parameters do not learn), `tied` (names of one parameter) and `modules`: the
        class of each, and its plain attributes, such as dropout's p.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> _ = b.load_state_dict(a.state_dict())
    >>> of_model(a) == of_model(b)
    True
    >>> _ = b.bias.requires_grad_(False)
    >>> of_model(a) == of_model(b)
    False
    """
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    return {
        "class": _name(type(model)),
        "config": _config(model),
        "weights": tensors_sha256(model.state_dict() | dict(model.named_buffers())),
        "frozen": digest(frozen),
        "tied": digest([names for names in shared.values() if len(names) > 1]),
        "modules": digest(
            [
                [name, _name(type(module)), _plain(vars(module))]
                for name, module in model.named_modules(remove_duplicate=False)
            ]
        ),
    }


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _config(model: nn.Module) -> dict[str, Any] | None:
    """Return a transformers config as it would be written, but for its origin."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    told: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # Not in the file, but eager and fused attention draw dropout differently.
    told["attention"] = getattr(config, "_attn_implementation", None)
    return {name: value for name, value in told.items() if name not in ORIGIN}


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Pick settings and the names of functions; submodules tell of themselves.

    repr, not JSON: a dropout of NaN or an eps of infinity must not stop a key.
    """
    told = {}
    for name, value in attributes.items():
        if name.startswith("_") or name in LEFT_OUT:
            continue
        if isinstance(value, FunctionType) and "<" in value.__qualname__:
            told[name] = described(value)  # others that are made there have its name
        elif isinstance(value, FunctionType | BuiltinFunctionType):
            told[name] = _name(value)
        elif _is_plain(value):
            told[name] = repr(value)
        elif _is_setting(value):
            told[name] = described(value)
    return told


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _is_setting(value: Any) -> bool:
    """Whether a value says all of itself, and says the same in every process."""
    if isinstance(value, Mapping):
        return all(_is_setting(k) and _is_setting(v) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_setting, value))
    return _is_plain(value) or isinstance(value, SETTINGS)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Tell everything of a tokenizer that its ids and its pads depend on.

    Args:
        tokenizer: from transformers. What its last call left behind (padding,
            truncation) is no part of it.

    Returns:
        Its `class`, and digests of `words` (for a fast one the whole backend:
        vocabulary, normalization, splitting, what is put around) and of `pads`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        told = json.loads(backend.to_str())
        words = {name: told[name] for name in told.keys() - CALL_STATE}
    else:
        words = {"vocabulary": tokenizer.get_vocab(), "class": repr(tokenizer)}
    pads = [
        tokenizer.pad_token_id,
        tokenizer.pad_token_type_id,
        tokenizer.padding_side,
        tokenizer.truncation_side,
        tokenizer.model_input_names,
        tokenizer.model_max_length,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return {
        "class": _name(type(tokenizer)),
        "words": digest(words),
        "pads": digest(pads),
    }


def of_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over all rows in order, each with its columns' names.

    Raises:
        TypeError: a value JSON does not know, a name that is no text.

    >>> of_rows([{"a": 1}]) == of_rows([{"a": 1}, {"a": 2}])
    False
    """
    found = hashlib.sha256()
    for row in rows:
        _check_names(row)
        found.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def of_machine(*packages: str) -> dict[str, Any]:
    """Tell what of this machine changes a training's numbers.

    Args:
        packages: whose versions matter, besides torch's.

    Returns:
        `device` (its kind), `gpus` (Trainer gives each of them a batch of its own, so
        their number changes the batch) and `versions`.

    Raises:
        ValueError: this is one of several processes that train together: they would
            wait for each other for ever.
    """
    world = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if world != "1":
        raise ValueError(
            f"WORLD_SIZE is {world}: a cached training runs in one process; start it "
            "without torchrun or accelerate launch."
        )
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "gpus": torch.cuda.device_count(),
        "versions": {"torch": torch.__version__}
        | {package: version(package) for package in packages},
    }
