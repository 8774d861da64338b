"""What the data says about a layer: the second moment of its inputs, C = Σ x xᵀ."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from drone import progress
from drone.adapters import encoder_linears, module_named
from drone.files import whole_file

BLOCK = 192  # columns computed at once; divides 384, 768, 1536 and 3072
FORMAT_VERSION = 1


class SecondMoment:
    """C = Σ x xᵀ and Σ x over a stream of vectors, in float64. Chapter 2.

    All that the data-aware factorization needs of the inputs: memory is O(dim²)
    however many vectors come, and moments add (over batches, processes, machines).

    Attributes:
        dim: length of a vector.
        count: vectors seen.
        total: (dim,) float64, their sum Σ x.
    """

    def __init__(self, dim: int) -> None:
        """Start with no vectors.

        Raises:
            ValueError: `dim` is below 1.
        """
        if dim < 1:
            raise ValueError(f"dim is {dim}; at least 1.")
        self.dim = dim
        self.count = 0
        with torch.inference_mode(False):  # else no sum could go on outside that mode
            self.total = torch.zeros(dim, dtype=torch.float64)
            self._matrix = torch.zeros(dim, dim, dtype=torch.float64)
        self._mirrored = True  # after an update only the lower part holds, until read

    def __repr__(self) -> str:
        """Show the size and the number of vectors."""
        return f"SecondMoment(dim={self.dim}, count={self.count})"

    @property
    def matrix(self) -> Tensor:
        """C = Σ x xᵀ, (dim, dim) float64, symmetric. Not a copy."""
        if not self._mirrored:
            for start in range(0, self.dim, BLOCK):
                stop = start + BLOCK
                self._matrix[start:stop, stop:] = self._matrix[stop:, start:stop].T
            self._mirrored = True
        return self._matrix

    @property
    def mean(self) -> Tensor:
        """μ = Σ x / count, (dim,) float64.

        Raises:
            ValueError: no vector has been seen.
        """
        if self.count == 0:
            raise ValueError("no vector has been seen; there is no mean.")
        return self.total / self.count

    @property
    def centred(self) -> Tensor:
        """Σ (x − μ)(x − μ)ᵀ = C − count · μ μᵀ, (dim, dim) float64.

        Raises:
            ValueError: no vector has been seen.
        """
        return self.matrix - torch.outer(self.total, self.mean)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add vectors.

        Args:
            x: (..., dim), any floating dtype and device; summed in float64.
            mask: (...), True or 1 for a vector that counts, False or 0 for a pad.

        Raises:
            ValueError: a shape or dtype that does not fit, a mask with other values
                than 0 and 1, or NaN or Inf in a vector that counts.
        """
        if x.ndim == 0 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}; a floating tensor "
                f"(..., {self.dim}) is needed."
            )
        if mask is None:
            rows = x.detach().reshape(-1, self.dim)
        else:
            rows = x.detach()[_checked_mask(mask, x.shape[:-1]).to(x.device)]
        # MPS has no float64: there the sums are made on the CPU.
        rows = rows.cpu().double() if rows.device.type == "mps" else rows.double()
        total = rows.sum(0).to(self.total.device)
        if not total.isfinite().all():  # NaN and Inf survive a sum
            raise ValueError("x has NaN or Inf in a vector that counts.")
        add_gram(self._matrix, rows)
        self.total += total
        self.count += len(rows)
        self._mirrored = False

    def merge(self, other: "SecondMoment") -> None:
        """Add the vectors another moment has seen.

        Raises:
            ValueError: it is of another dimension.
        """
        if other.dim != self.dim:
            raise ValueError(f"dim is {other.dim} there and {self.dim} here.")
        self.matrix.add_(other.matrix)
        self.total += other.total
        self.count += other.count

    def copy(self) -> "SecondMoment":
        """Return a moment of its own with the same sums."""
        new = SecondMoment(self.dim)
        new.merge(self)
        return new


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows = Σ x xᵀ to the lower triangle of blocks of `total`, in place.

    The sum is symmetric: half of the multiply-adds are enough.

    Args:
        total: (dim, dim).
        rows: (count, dim), one vector x a row.
    """
    for start in range(0, len(total), BLOCK):
        stop = start + BLOCK
        part, before = rows[:, start:stop].T, rows[:, :stop]
        if rows.device == total.device:
            total[start:stop, :stop].addmm_(part, before)
        else:  # multiplied where the vectors are, say on a GPU; kept where the sum is
            total[start:stop, :stop] += (part @ before).to(total.device)


def _checked_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask as booleans, if it says of each vector whether it counts."""
    if mask.shape != shape:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}; {tuple(shape)} is needed, one "
            "value a vector."
        )
    # An additive mask (0 and -inf) means the opposite: refuse it, do not guess.
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("the mask has values other than 0 (pad) and 1 (counts).")
    return mask.bool()


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


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    modules: Iterable[str] | None = None,
) -> dict[str, SecondMoment]:
    """Run the model over data and collect the second moment of each module's inputs.

    The model runs in eval mode and without gradients; its modes are restored and
    nothing stays attached to it, whatever happens. Modules called one after another
    with the same tensor (queries, keys and values) are summed once. Chapter 3.

    Args:
        model: any module; the named ones take a tensor (..., in) as first argument.
        batches: keyword arguments of the model. `attention_mask` (batch, length), 1
            for a token and 0 for a pad, says which vectors count; a batch with
            `input_ids` must have one. Tensors are moved to the model's device.
        modules: names of the modules; None: every Linear of the encoder's layers.

    Returns:
        {module name: its own `SecondMoment`}, in the order of `modules`.

    Raises:
        ValueError: no batch, a name the model does not have, a module that was never
            reached, a missing mask or one of the wrong shape, NaN or Inf in an input.
            The message names the module and the batch.
    """
    # A name given twice must not count its inputs twice.
    names = list(dict.fromkeys(encoder_linears(model) if modules is None else modules))
    collector = Collector()
    number = -1
    with frozen(model), watch_inputs(model, names, collector.see):
        for number, batch in enumerate(progress.bar(batches, desc="calibrate")):
            collector.start(number, mask_of(batch, number))
            model(**to_device(batch, model))
    if number < 0:
        raise ValueError("no batch to calibrate on; at least one is needed.")
    return collector.finish(names)


class Collector:
    """Sum what the hooks see: one moment a group of modules with the same input."""

    def __init__(self) -> None:
        self.moments: dict[str, SecondMoment] = {}
        self.leader: dict[str, str] = {}  # the first module of each one's group
        self.last: tuple[str, Tensor, int] | None = None

    def start(self, number: int, mask: Tensor | None) -> None:
        """Begin a batch."""
        self.number, self.mask, self.last = number, mask, None

    def see(self, name: str, x: Tensor) -> None:
        """Add the input of one module, unless its group's leader has added it."""
        # The version tells a tensor changed in place from the one seen before.
        version = 0 if x.is_inference() else x._version
        same = self.last is not None and self.last[1] is x and self.last[2] == version
        leader = self.leader[self.last[0]] if same and self.last else name
        known = self.leader.setdefault(name, leader)
        if known != leader:
            raise ValueError(
                f"{name}: in batch {self.number} its input is no longer that of "
                f"{known}; calibrate such modules one at a time."
            )
        self.last = (name, x, version)
        if leader != name:
            return
        moment = self.moments.setdefault(name, SecondMoment(x.shape[-1]))
        mask = self.mask
        if mask is not None and x.shape[:-1] == mask.shape[:1]:
            mask = None  # one vector a sentence (a pooler's, a head's): none is a pad
        try:
            moment.update(x, mask)
        except ValueError as error:
            raise ValueError(f"{name}, batch {self.number}: {error}") from error

    def finish(self, names: Iterable[str]) -> dict[str, SecondMoment]:
        """Give every module a moment of its own."""
        missed = [name for name in names if name not in self.leader]
        if missed:
            raise ValueError(f"never reached by these batches: {', '.join(missed)}.")
        return {
            name: self.moments[name]
            if self.leader[name] == name
            else self.moments[self.leader[name]].copy()
            for name in names
        }


def mask_of(batch: Mapping[str, Any], number: int) -> Tensor | None:
    """Return a batch's mask of real tokens; text without one would count its pads.

    Raises:
        ValueError: the batch has `input_ids` and no `attention_mask`.
    """
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None and "input_ids" in batch:
        raise ValueError(
            f"batch {number} has input_ids and no attention_mask; without one, pads "
            "would count as tokens."
        )
    return mask


def to_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Move a batch's tensors to where the model is."""
    first = next(model.parameters(), None)
    return {
        key: value.to(first.device)
        if isinstance(value, Tensor) and first is not None
        else value
        for key, value in batch.items()
    }


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def watch_inputs(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `see(name, input)` before each run of the named modules.

    Raises:
        ValueError: the model has no module of that name.
    """
    handles = []

    def attach(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise ValueError(f"{name}: its first argument is no tensor.")
            see(name, args[0])

        handles.append(module_named(model, name).register_forward_pre_hook(hook))

    try:
        for name in names:
            attach(name)
        yield
    finally:
        for handle in handles:
            handle.remove()
