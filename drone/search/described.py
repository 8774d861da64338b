"""Anything a loss may depend on, told in words that are the same in every process."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drone.files import tensors_sha256

# What every module has; its weights, buffers and submodules are told of elsewhere.
OWN = {*vars(nn.Module()), "training"}
APART = {"logging", "threading", "_thread"}  # their objects lead everywhere
DEPTH = 6  # of nested attributes; what lies deeper decides no loss that was ever seen
# Whose repr says all. Of a path, attributes come as they are first asked for.
SPELT = (
    *(bool, int, float, complex, str, bytes, range, torch.dtype, torch.device),
    *(np.generic, PurePath),
)
Known = dict[int, tuple[str, Any]]  # id of an object met before → its name, itself


def described(value: Any) -> str:
    """Tell one function, or one setting, from another: by what it computes with.

    A function is its code, its defaults, what it closes over and the plain globals it
    reads; an object its class and its attributes. No address in memory is told.

    >>> def scaled(by):
    ...     return lambda x: by * x
    >>> described(scaled(1.0)) == described(scaled(1.0))
    True
    >>> described(scaled(1.0)) == described(scaled(5.0))
    False
    """
    return str(_told(value, {}, 0))


def attributes(model: nn.Module) -> list[str]:
    """Tell the attributes of a model's modules that are no weights and no modules.

    Configurations are left out: a pass writes into them.

    >>> one, other = nn.Identity(), nn.Identity()
    >>> one.scale, other.scale = 1.0, 3.0
    >>> attributes(one) == attributes(other)
    False
    """
    names: Known = {id(m): (f"module {n}", m) for n, m in model.named_modules()}
    return [
        f"{name} {key} {_told(value, names, 0)}"
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if key not in OWN and not _is_config(value)
    ]


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "to_json_string")


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _told(value: Any, known: Known, depth: int) -> Any:
    """Return a value as nested lists of texts; `known` names what was met above."""
    if value is None or isinstance(value, SPELT):
        return repr(value)
    if isinstance(value, np.ndarray):  # whose repr leaves out the middle
        return [
            "array",
            str(value.dtype),
            value.shape,
            hashlib.sha256(value.tobytes()).hexdigest(),
        ]
    if isinstance(value, type | BuiltinFunctionType):
        return getattr(value, "__qualname__", str(value))
    if id(value) in known:
        return known[id(value)][0]
    if depth > DEPTH:
        return type(value).__qualname__
    if not isinstance(value, Tensor | Mapping | set | frozenset | list | tuple):
        # Told once, however many lead to it; kept alive, so that its id stays its own.
        known[id(value)] = f"number {len(known)}", value

    def tell(part: Any) -> Any:
        return _told(part, known, depth + 1)

    if isinstance(value, Tensor):
        return tensors_sha256({"": value.detach()})
    if isinstance(value, Mapping):
        return ["map", [[tell(k), tell(v)] for k, v in value.items()]]
    if isinstance(value, set | frozenset):
        return ["set", sorted(map(str, map(tell, value)))]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [tell(each) for each in value]]
    if isinstance(value, CodeType):
        consts = [tell(each) for each in value.co_consts]
        return [value.co_code.hex(), consts, value.co_names, value.co_varnames]
    if isinstance(value, functools.partial):
        return ["partial", tell(value.func), tell(value.args), tell(value.keywords)]
    if isinstance(value, MethodType):
        return ["method", tell(value.__func__), tell(value.__self__)]
    if isinstance(value, FunctionType):
        return [_name(value), *_of_function(value, tell)]
    if _is_config(value) or type(value).__module__.split(".")[0] in APART:
        return type(value).__qualname__
    parts = [_name(type(value)), tell(_attributes(value))]
    if isinstance(value, nn.Module):  # one that is no part of the model
        parts += [attributes(value), tell(dict(value.state_dict()))]
    return parts


def _of_function(function: FunctionType, tell: Any) -> list[Any]:
    """Tell a function's code, defaults, closure and the plain globals it reads."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(tell(cell.cell_contents))
        except ValueError:  # not filled yet
            cells.append("empty")
    read = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    plain = {
        name: tell(value)
        for name, value in sorted(read.items())
        if isinstance(value, bool | int | float | str | tuple)
    }
    defaults = [function.__defaults__, function.__kwdefaults__]
    return [tell(function.__code__), tell(defaults), cells, plain]


def _attributes(value: Any) -> dict[str, Any]:
    """Return an object's attributes, those in slots too, without a module's own."""
    slots = [s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ())]
    found = {s: getattr(value, s) for s in slots if hasattr(value, s)}
    found |= getattr(value, "__dict__", {})
    own = OWN if isinstance(value, nn.Module) else {"__weakref__", "__dict__"}
    return {name: each for name, each in sorted(found.items()) if name not in own}
