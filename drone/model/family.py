"""DRONE and its relatives as one choice: what is weighed on either side. Chapter 10.

Each is a small frozen configuration that turns what was collected into the two weights
of `drone.math.weighted`: `moment` of the inputs, `rows` of the outputs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from drone import progress
from drone.layers.linear import as_linear, is_linear
from drone.math.factorize import Factorization
from drone.math.moments import SecondMoment
from drone.math.weighted import factorize_weighted
from drone.model.adapters import module_named
from drone.model.calibrate import calibrate
from drone.model.gradients import Gradients, calibrate_gradients
from drone.model.loss import LossFunction

Weights = tuple[SecondMoment | Tensor | None, SecondMoment | Tensor | None]


class Relative(Protocol):
    """One of the family."""

    @property
    def inputs(self) -> bool:
        """Whether it needs the moment of the inputs."""

    @property
    def gradients(self) -> bool:
        """Whether it needs gradients, and so labels."""

    def weights(self, moment: SecondMoment | None, found: Gradients | None) -> Weights:
        """Return (moment, rows) of `factorize_weighted`."""


@dataclass(frozen=True)
class SVD:
    """‖W − Ŵ‖_F: nothing is weighed. Eckart and Young, 1936."""

    inputs = False
    gradients = False

    def weights(self, moment: SecondMoment | None, found: Gradients | None) -> Weights:
        """Neither."""
        return None, None


@dataclass(frozen=True)
class DRONE:
    """‖(W − Ŵ) X‖_F: the inputs. Chen et al., 2021; SVD-LLM's whitening ends there."""

    inputs = True
    gradients = False

    def weights(self, moment: SecondMoment | None, found: Gradients | None) -> Weights:
        """C = Σ x xᵀ of the inputs."""
        return moment, None


@dataclass(frozen=True)
class ASVD:
    """‖(W − Ŵ) S‖_F, S diagonal: the size of each input. Yuan et al., 2023.

    S_jj = rms(x_j)^alpha. The authors take the mean absolute value for the root mean
    square; the two differ by a factor that is nearly the same for every input.
    """

    alpha: float = 0.5
    inputs = True
    gradients = False

    def __post_init__(self) -> None:
        """Refuse an exponent that is not in [0, 1]: 0 is plain SVD.

        Raises:
            ValueError: it is not.
        """
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; 0 to 1 is allowed.")

    def weights(self, moment: SecondMoment | None, found: Gradients | None) -> Weights:
        """S Sᵀ = diag(mean(x_j²)^alpha)."""
        assert moment is not None
        squares = moment.matrix.diagonal() / moment.count
        return torch.diag(squares**self.alpha), None


@dataclass(frozen=True)
class FWSVD:
    """‖D (W − Ŵ)‖_F, D diagonal: how the loss feels each row. Hsu et al., 2022.

    D_ii² = Σ_j of the Fisher information of W_ij, each training row by itself.
    """

    inputs = False
    gradients = True

    def weights(self, moment: SecondMoment | None, found: Gradients | None) -> Weights:
        """The Fisher information, summed over each row of W."""
        assert found is not None
        return None, found.fisher


@dataclass(frozen=True)
class BothSides:
    """‖G^½ (W − Ŵ) X‖_F: inputs on the right, the loss's gradients on the left.

    G = Σ g gᵀ of the outputs' gradients. With both, the error is the second-order term
    of the loss, where inputs and gradients are independent (Kronecker-factored
    curvature, Martens and Grosse, 2015).
    """

    inputs = True
    gradients = True

    def weights(self, moment: SecondMoment | None, found: Gradients | None) -> Weights:
        """C of the inputs and G of the gradients."""
        assert found is not None
        return moment, found.outputs


@dataclass(frozen=True)
class WeightedInputs:
    """‖(W − Ŵ) X D‖_F, D diagonal: tokens count by how the loss feels their outputs.

    D_tt = ‖g_t‖, g_t the gradient of the loss by the output of token t.
    """

    inputs = False
    gradients = True

    def weights(self, moment: SecondMoment | None, found: Gradients | None) -> Weights:
        """Σ ‖g‖² x xᵀ."""
        assert found is not None
        return found.inputs, None


def factorize_relative(
    model: Any,
    names: Iterable[str],
    relative: Relative,
    batches: Iterable[Mapping[str, Any]] | None = None,
    loss: LossFunction | None = None,
) -> dict[str, Factorization]:
    """Decompose the named Linears as one of the family does; `compress` takes them.

    Args:
        model: any module; it is left as it was.
        names: of Linears.
        relative: such as `DRONE()` or `FWSVD()`.
        batches: as in `calibrate`; with labels where it needs gradients.
        loss: as in `calibrate_gradients`.

    Raises:
        ValueError: no batches where they are needed, a module that is no Linear; and
            what calibrating raises.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> found = factorize_relative(model, ["0"], DRONE(), [torch.randn(50, 8)])
    >>> found["0"].max_rank
    8
    """
    names = list(names)
    for name in names:
        if not is_linear(module_named(model, name)):
            kind = type(module_named(model, name)).__name__
            raise ValueError(f"{name}: a {kind}; this family knows Linears only.")
    needs = relative.inputs or relative.gradients
    if needs and batches is None:
        raise ValueError(f"{relative} needs batches; give batches=….")
    kept = [] if batches is None else list(batches)
    moments = calibrate(model, kept, names) if relative.inputs else {}
    found: dict[str, Gradients] = {}
    if relative.gradients:
        found = calibrate_gradients(model, kept, names, loss)
    result = {}
    for name in progress.bar(names, desc="factorize"):
        linear = as_linear(module_named(model, name))
        moment, rows = relative.weights(moments.get(name), found.get(name))
        try:
            result[name] = factorize_weighted(linear.weight, moment, rows)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return result
