"""Second moments as one safetensors file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drone.files import whole_file
from drone.math.moments import SecondMoment

FORMAT_VERSION = 1
ROUNDING = 1e-8  # of the trace: what float64 sums over many vectors may be off by


def save_moments(moments: Mapping[str, SecondMoment], path: Path | str) -> None:
    """Write moments to one safetensors file, whole or not at all.

    Raises:
        ValueError: there are none.
    """
    if not moments:
        raise ValueError("there are no moments to save.")
    tensors = {}
    for name, moment in moments.items():
        # A copy: safetensors refuses one tensor under two names, as the moment of
        # inputs that several products share may be given.
        tensors[f"{name}/matrix"] = moment.matrix.clone()
        tensors[f"{name}/total"] = moment.total.clone()
        tensors[f"{name}/count"] = torch.tensor(moment.count)
    with whole_file(Path(path)) as temporary:
        save_file(tensors, temporary, {"drone_moments": str(FORMAT_VERSION)})


def load_moments(path: Path | str) -> dict[str, SecondMoment]:
    """Read moments back, bit-equal, sorted by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another format version, no file of moments, or
            sums that no vectors have: NaN, another dtype, a negative count, a matrix
            that is not symmetric or has a negative eigenvalue. The message names it.
    """
    try:
        with safe_open(path, "pt") as file:
            version = (file.metadata() or {}).get("drone_moments")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not safetensors ({error}).") from error
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"{path}: moments of format {version}; {FORMAT_VERSION} is what this "
            "version of drone reads."
        )
    parts = ("matrix", "total", "count")
    for key in tensors:
        if key.rpartition("/")[2] not in parts or "/" not in key:
            raise ValueError(f"{path}: {key!r} is no part of a moment.")
    moments = {}
    for name in sorted({key.rpartition("/")[0] for key in tensors}):
        found = {part: tensors.get(f"{name}/{part}") for part in parts}
        if None in found.values():
            raise ValueError(f"{path}: {name} lacks its matrix, total or count.")
        try:
            moments[name] = _moment(**found)  # type: ignore[arg-type]  # none is None
        except ValueError as error:
            raise ValueError(f"{path}: {name} {error}") from error
    return moments


def _moment(matrix: Tensor, total: Tensor, count: Tensor) -> SecondMoment:
    """Put a moment together, if vectors exist that have these sums.

    Raises:
        ValueError: there are none. The message goes on after the moment's name.
    """
    for part, tensor in (("matrix", matrix), ("total", total)):
        if tensor.dtype != torch.float64:
            raise ValueError(f"has a {part} of {tensor.dtype}; float64 is needed.")
        if not tensor.isfinite().all():
            raise ValueError(f"has NaN or Inf in its {part}.")
    if total.ndim != 1 or not len(total):
        raise ValueError(f"has a total of shape {tuple(total.shape)}; (dim,) needed.")
    if matrix.shape != (len(total), len(total)):
        raise ValueError(
            f"has a matrix of shape {tuple(matrix.shape)}; {len(total)} rows and "
            "columns are needed."
        )
    if count.dtype != torch.int64 or count.ndim or count < 0:
        raise ValueError(
            f"has a count of {count.tolist()} ({count.dtype}); a whole number from 0 "
            "is needed."
        )
    moment = SecondMoment(len(total))
    moment._matrix, moment.total, moment.count = matrix, total, int(count)
    if moment.count == 0:
        if matrix.any() or total.any():
            raise ValueError("has seen no vector, but its sums are not 0.")
        return moment
    rounding = ROUNDING * float(matrix.diagonal().abs().sum())
    if (matrix - matrix.T).abs().max() > rounding:
        raise ValueError("has a matrix that is not symmetric.")
    # Σ (x − μ)(x − μ)ᵀ has no negative eigenvalue, and with it Σ x xᵀ has none. A
    # Cholesky factor exists just then, and costs a tenth of the eigenvalues.
    shifted = moment.centred
    shifted.diagonal().add_(rounding + torch.finfo(torch.float64).tiny)
    if torch.linalg.cholesky_ex(shifted).info:
        raise ValueError(
            "has a matrix that is no sum of x xᵀ with this total and count: an "
            "eigenvalue is negative."
        )
    return moment
