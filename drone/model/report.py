"""Say of each layer of a model whether it was replaced, and what that saved."""

import inspect
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from drone.layers.attention import LowRankSelfAttention
from drone.layers.linear import (
    LowRankLinear,
    as_linear,
    is_linear,
    linear_multiply_adds,
    parameters,
)
from drone.model.adapters import names_of

if TYPE_CHECKING:
    from drone.model.report_table import Report


def report(model: nn.Module) -> "Report":
    """Say of each layer whether it was replaced, at what rank, and what that saved.

    Returns:
        One row a Linear, Conv1D or LowRankLinear, in network order, indexed by module
        name: `out`, `in`, `rank` (None: dense), `parameters` and `parameters_dense`,
        `multiply_adds` and `multiply_adds_dense` (a token), and `note`. The queries
        and keys of a LowRankSelfAttention have its rank, that of each head. `totals`
        are of the whole model, each tensor counted once; printed, it has 80 columns.

    Raises:
        ValueError: the model has no such layer.

    >>> from torch import nn
    >>> from drone import compress
    >>> small = compress(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"0": 2})
    >>> report(small).totals
    {'parameters': 40, 'parameters_dense': 72}
    """
    rows = {}
    for name, module in model.named_modules():
        if is_linear(module) or isinstance(module, LowRankLinear):
            rows[name] = _row(model, name, module)
    if not rows:
        raise ValueError(f"{type(model).__name__} has no Linear to report on.")
    import pandas as pd  # half a second: only who asks for a table pays it

    from drone.model.report_table import Report

    table = pd.DataFrame.from_dict(rows, orient="index").astype({"rank": "Int64"})
    found = Report(table)
    found.totals = _totals(model, rows)
    return found


def _totals(model: nn.Module, rows: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Count the whole model's parameters as it is, and as it was dense."""
    now = parameters(model)  # a tensor with two names counts once
    saved = 0
    for name, row in rows.items():
        saved += row["parameters_dense"] - row["parameters"]
        if tied_to(model, name) is not None:  # the dense weight was no extra one
            saved -= row["out"] * row["in"]
    return {"parameters": now, "parameters_dense": now + saved}


def tied_to(model: nn.Module, name: str) -> str | None:
    """Name the module that has the dense weight which a thin one shared with it.

    A Hugging Face model knows its ties from its config, also when read from a folder.
    """
    module = model.get_submodule(name)
    if not isinstance(module, LowRankLinear):
        return None
    if module.tied_to is not None:
        return module.tied_to
    for prefix, inner in model.named_modules():
        # The class says what the config ties; the model forgets it when a tie breaks.
        declared = getattr(type(inner), "_tied_weights_keys", None)
        tying = getattr(getattr(inner, "config", None), "tie_word_embeddings", False)
        if not isinstance(declared, dict) or not tying:
            continue
        for one, other in declared.items():
            if f"{prefix}.{one}".strip(".") == f"{name}.weight":
                return f"{prefix}.{other}".strip(".").removesuffix(".weight")
    return None


def _row(model: nn.Module, name: str, module: nn.Module) -> dict[str, Any]:
    above, _, own = name.rpartition(".")
    parent = model.get_submodule(above)
    rank, note = None, "left dense: no rank was given for it"
    if isinstance(module, LowRankLinear):
        out, into, rank = module.out_features, module.in_features, module.rank
        note = "replaced" if module.saves else "replaced; above break-even: bigger"
        other = tied_to(model, name)
        if other is not None:
            note += f"; {other} keeps the dense weight: the model grows"
        if _reads_weight(parent, own):
            note += f"; {type(parent).__name__} reads its weight: smaller, not faster"
    else:
        linear = as_linear(module)
        out, into = linear.out_features, linear.in_features
        if isinstance(parent, LowRankSelfAttention) and own in parent.projections:
            rank, out = parent.rank, parent.heads * parent.head_size
            note = f"replaced: {rank} of {parent.head_size} numbers a head"
            if parent.leaves_fused_kernel:
                note += "; slow here: not a multiple of 16 bytes"
    others = names_of(model, module)[1:]
    if others:
        note += f"; also {', '.join(others)}"
    dense = out * into
    return {
        "out": out,
        "in": into,
        "rank": rank,
        "parameters": parameters(module),
        "parameters_dense": dense + (0 if module.bias is None else out),
        "multiply_adds": linear_multiply_adds(module),
        "multiply_adds_dense": dense,
        "note": note,
    }


def _reads_weight(parent: nn.Module, name: str) -> bool:
    """Whether the parent's forward multiplies with a part's weight by itself.

    Read from its code: `nn.TransformerEncoderLayer` passes `self.linear1.weight` to a
    kernel. T5 only asks for `self.wo.weight.dtype`, which costs a product.
    """
    try:
        code = inspect.getsource(type(parent).forward)
    except (OSError, TypeError):  # a class made without a file has no code to read
        return False
    return re.search(rf"self\.{re.escape(name)}\.weight\b", code) is not None
