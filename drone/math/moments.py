"""The second moment of a layer's inputs, C = Σ x xᵀ: what the data says about it."""

import torch
from torch import Tensor

from drone.devices import double

BLOCK = 192  # columns computed at once; divides 384, 768, 1536 and 3072
# On a GPU a product of 192 columns leaves most of it idle; of 3072, two are enough.
GPU_BLOCK = 1536


class SecondMoment:
    """C = Σ x xᵀ and Σ x over a stream of vectors, in float64. Chapter 2.

    All that the data-aware factorization needs of the inputs: memory is O(dim²)
    however many vectors come, and moments add (over batches, processes, machines).

    The sums are made where the first vectors are, on a GPU too if half of its memory
    stays free, and remain there; `to("cpu")` gives a copy for NumPy.

    Attributes:
        dim: length of a vector.
        count: vectors seen.
        total: (dim,) float64, their sum Σ x.

    >>> moment = SecondMoment(2)
    >>> moment.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> moment.count, moment.matrix.tolist()
    (2, [[2.0, 2.0], [2.0, 4.0]])
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
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._matrix.device

    def to(self, device: torch.device | str) -> "SecondMoment":
        """Return a moment of its own with the same sums, on a device."""
        new = SecondMoment(self.dim)
        with torch.inference_mode(False):
            new._matrix = self.matrix.to(device, copy=True)
            new.total = self.total.to(device, copy=True)
        new.count = self.count
        return new

    @property
    def matrix(self) -> Tensor:
        """C = Σ x xᵀ, (dim, dim) float64, symmetric, on `device`. Not a copy."""
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
        rows = double(_counted(x.detach(), mask))
        if self.count == 0 and rows.device != self.device:
            self._settle(rows.device)
        total = rows.sum(0)
        if not total.isfinite().all():  # NaN and Inf survive a sum
            raise ValueError("x has NaN or Inf in a vector that counts.")
        add_gram(self._matrix, rows)
        self.total += total.to(self.device)
        self.count += len(rows)
        self._mirrored = False

    def _settle(self, device: torch.device) -> None:
        """Move the sums, still zero, to a device, if it has the room."""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            if free - self._matrix.nbytes < total / 2:
                device = torch.device("cpu")
        with torch.inference_mode(False):
            self._matrix = torch.zeros_like(self._matrix, device=device)
            self.total = torch.zeros_like(self.total, device=device)

    def merge(self, other: "SecondMoment") -> None:
        """Add the vectors another moment has seen, be it on another device.

        Raises:
            ValueError: it is of another dimension.
        """
        if other.dim != self.dim:
            raise ValueError(f"dim is {other.dim} there and {self.dim} here.")
        self.matrix.add_(other.matrix.to(self.device))
        self.total += other.total.to(self.device)
        self.count += other.count

    def copy(self) -> "SecondMoment":
        """Return a moment of its own with the same sums, on the same device."""
        return self.to(self.device)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows = Σ x xᵀ to the lower triangle of blocks of `total`, in place.

    The sum is symmetric: half of the multiply-adds are enough.

    Args:
        total: (dim, dim).
        rows: (count, dim), one vector x a row.
    """
    block = GPU_BLOCK if rows.device.type == "cuda" else BLOCK
    for start in range(0, len(total), block):
        stop = start + block
        part, before = rows[:, start:stop].T, rows[:, :stop]
        if rows.device == total.device:
            total[start:stop, :stop].addmm_(part, before)
        else:  # multiplied where the vectors are, say on a GPU; kept where the sum is
            total[start:stop, :stop] += (part @ before).to(total.device)


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the vectors that count, (count, dim)."""
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    counts = _checked_mask(mask, x.shape[:-1])
    if counts.device == x.device:
        return x[counts]
    # Their places are found where the mask is: asking a GPU how many there are would
    # make it wait in every module.
    places = counts.flatten().nonzero().flatten().to(x.device, non_blocking=True)
    return x.reshape(-1, x.shape[-1])[places]


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
