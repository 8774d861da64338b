"""A model as one ONNX file, for a runtime that knows no PyTorch."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drone.devices import placed
from drone.files import whole_file
from drone.model.inputs import LABELS, prepare
from drone.progress import quiet

PACKAGES = "onnx, onnxruntime and onnxscript"
LARGEST = 2**31  # bytes: protobuf, the format of the file, counts no further
TOLERANCE = 1e-4  # of the largest output: float32 sums in another order


class _OneOutput(nn.Module):
    """A model that takes a dict and returns its logits, or its hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A decoder's keys and values would be outputs of the file, too.
        cached = getattr(getattr(model, "config", None), "use_cache", False)
        self.options = {"use_cache": False} if cached else {}

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        found = self.model(**inputs, **self.options)
        if isinstance(found, Tensor):
            return found
        # `[0]` would be the loss where a batch has labels; here none has.
        first: Tensor = found[0]
        return first


def export_onnx(
    model: nn.Module,
    path: Path | str,
    batch: Mapping[str, Any],
    tolerance: float = TOLERANCE,
) -> float:
    """Write a dense or compressed model as one ONNX file, and see that it is the same.

    The file takes any number of rows of any length. Thin layers stay two products. It
    is checked before it gets its name: its form by `onnx`, and its outputs in ONNX
    Runtime against PyTorch's, on the batch and on its first row less one token.

    Args:
        model: float32, at most 2 GB; it is left as it was. Its first output is
            exported, of a classifier the logits; of a decoder without the cache.
        path: of the file to write; a new one.
        batch: keyword arguments of the model, each (batch, length), with pads, if
            rows will have any; labels are left out. A batch that uses pads checks
            that they are masked.
        tolerance: how far an output may be off, as a share of the largest output.

    Returns:
        The largest difference between the two, in the outputs' own unit. Outputs at
        pads are not compared.

    Raises:
        ModuleNotFoundError: onnx, onnxruntime or onnxscript is not installed.
        FileExistsError: the file exists.
        ValueError: a model of another dtype or too large, an input that is not
            (batch, length), a model PyTorch cannot export, or outputs that differ; the
            message says by how much and where. Nothing is written.

    >>> import tempfile
    >>> words, ids = nn.Embedding(10, 2), torch.arange(8).reshape(2, 4)
    >>> path = Path(tempfile.mkdtemp(), "words.onnx")
    >>> export_onnx(words, path, {"input": ids}) < 1e-6
    True
    """
    onnx, runtime = _packages()
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; name another file.")
    _check(model)
    inputs = _inputs(model, batch)
    plain = _OneOutput(placed(copy.deepcopy(model), "cpu")).eval()
    with whole_file(path) as temporary:
        _program(plain, inputs).save(temporary, external_data=False)
        onnx.checker.check_model(temporary, full_check=True)
        session = runtime.InferenceSession(
            temporary, providers=["CPUExecutionProvider"]
        )
        _check_sizes(session)
        shorter = {name: tensor[:1, :-1] for name, tensor in inputs.items()}
        return max(
            _apart(plain, session, some, tolerance) for some in (inputs, shorter)
        )


def _packages() -> tuple[Any, Any]:
    """Load what an export needs and `import drone` does not.

    Raises:
        ModuleNotFoundError: one is missing; the message says how to get it.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx translates with it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"an export needs {PACKAGES}, and {error.name} is not installed: "
            "the extra `onnx` brings them.",
            name=error.name,
        ) from error
    return onnx, onnxruntime


def _check(model: nn.Module) -> None:
    """Refuse a model that the file could not hold.

    Raises:
        ValueError: another dtype than float32, or too many parameters.
    """
    odd = {p.dtype for p in model.parameters() if p.is_floating_point()}
    odd -= {torch.float32}
    if odd:
        raise ValueError(f"the model is in {odd.pop()}; float32 is needed.")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size >= LARGEST:
        raise ValueError(
            f"the model has {size / 1e9:.1f} GB; an ONNX file holds less than 2."
        )


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the batch's tensors on the CPU, without labels; one row becomes two.

    PyTorch takes a dimension of 1 for one that is always 1.

    Raises:
        ValueError: an input that is not (batch, length), or too short a batch.
    """
    (made,) = prepare(dict(batch), model)
    inputs = {name: t for name, t in made.items() if name not in LABELS}
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or tensor.shape[1] < 3:
            shape = getattr(tensor, "shape", type(tensor).__name__)
            raise ValueError(
                f"{name} is {shape}; (batch, length), of at least 3 tokens, is needed."
            )
    return {
        name: (tensor if len(tensor) > 1 else tensor.repeat(2, 1)).cpu()
        for name, tensor in inputs.items()
    }


def _program(plain: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Translate a model, whatever the number and length of its rows.

    Raises:
        ValueError: PyTorch cannot.
    """
    any_size = {name: {0: "batch", 1: "length"} for name in inputs}
    try:
        with quiet(), _without_notes(), torch.no_grad():
            program: Any = torch.onnx.export(
                plain,
                kwargs={"inputs": inputs},  # a dict in args would be taken for kwargs
                input_names=list(inputs),
                output_names=["output"],
                dynamic_shapes={"inputs": any_size},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(
            f"PyTorch cannot export this {type(plain.model).__name__}: "
            f"{error.__cause__ or error}"
        ) from error
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of this machine
    return program


@contextmanager
def _without_notes() -> Iterator[None]:
    """Leave out what PyTorch's exporter tells its own developers."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _check_sizes(session: Any) -> None:
    """Refuse a file that takes rows of one number or length only.

    Raises:
        ValueError: an input has a fixed size; the message names it.
    """
    for value in session.get_inputs():
        if any(isinstance(size, int) for size in value.shape):
            raise ValueError(
                f"the export fixed the size of {value.name}: {value.shape}; the model "
                "computes something from a size that PyTorch's exporter cannot follow."
            )


def _apart(
    plain: nn.Module, session: Any, inputs: dict[str, Tensor], tolerance: float
) -> float:
    """Return the largest difference between ONNX Runtime's output and PyTorch's.

    Raises:
        ValueError: it is above what is allowed, or not a number.
    """
    with torch.no_grad():
        expected = plain(inputs).numpy()
    (found,) = session.run(None, {name: t.numpy() for name, t in inputs.items()})
    if found.shape != expected.shape:
        raise ValueError(
            f"the file's output is {found.shape} where PyTorch's is {expected.shape}."
        )
    apart = np.abs(found - expected)
    mask = inputs.get("attention_mask")
    if mask is not None and apart.shape[:2] == tuple(mask.shape):
        apart[mask.numpy() == 0] = 0
    where = np.unravel_index(apart.argmax(), apart.shape)  # NaN counts as the largest
    allowed = tolerance * float(np.abs(expected).max())
    if not apart[where] <= allowed:
        row, *rest = (int(place) for place in where)
        raise ValueError(
            f"the file's output and PyTorch's differ by {apart[where]:.3g} in row {row}"
            f", at {rest}, of a batch of {apart.shape[0]}; {allowed:.3g} is allowed."
        )
    return float(apart[where])
