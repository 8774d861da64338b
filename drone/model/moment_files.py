"""Second moments as one safetensors file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from drone.files import whole_file
from drone.math.moments import SecondMoment

FORMAT_VERSION = 1


def save_moments(moments: Mapping[str, SecondMoment], path: Path) -> None:
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
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {"drone_moments": str(FORMAT_VERSION)})


def load_moments(path: Path) -> dict[str, SecondMoment]:
    """Read moments back, bit-equal, sorted by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another format version, or no file of moments.
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
    moments = {}
    for name in sorted({key.rpartition("/")[0] for key in tensors}):
        parts = [tensors.get(f"{name}/{part}") for part in ("matrix", "total", "count")]
        matrix, total, count = parts
        if matrix is None or total is None or count is None:
            raise ValueError(f"{path}: {name} lacks its matrix, total or count.")
        if matrix.shape != (len(total), len(total)):
            raise ValueError(
                f"{path}: {name} has a matrix of shape {tuple(matrix.shape)}; "
                f"{len(total)} rows and columns are needed."
            )
        moment = moments[name] = SecondMoment(len(total))
        moment._matrix, moment.total, moment.count = matrix, total, int(count)
    return moments
