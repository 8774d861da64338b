"""DRONE and its relatives as one choice: what is weighed on either side. Chapter 10.

Each is a small frozen configuration that turns what was collected into the two weights
of `drone.math.weighted`: `moment` of the inputs, `rows` of the outputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drone import progress
from drone.layers.linear import LowRankLinear, as_linear, is_linear
from drone.math.factorize import Factorization
from drone.math.moments import SecondMoment
from drone.math.shared import factorize_shared
from drone.math.shifted import check_shift
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


@dataclass(frozen=True)
class SharedBasis:
    """Σ_i ‖(W_i − A_i B) X‖_F: neighbouring layers share B. Wang et al., 2024.

    X are the inputs of all of them. `compress` lets them hold one tensor B, so that the
    model has fewer parameters at the same multiply-adds; `save` refuses it for that.

    Attributes:
        layers: how many layers, one after another, share.
    """

    layers: int = 2
    inputs = True
    gradients = False

    def __post_init__(self) -> None:
        """Refuse to share among fewer than two.

        Raises:
            ValueError: `layers` is below 2.
        """
        if self.layers < 2:
            raise ValueError(f"layers is {self.layers}; at least 2 can share.")

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Sort modules into those that share: one kind, neighbours in the order given.

        >>> SharedBasis(2).groups(["l.0.a", "l.0.b", "l.1.a", "l.1.b", "l.2.a"])
        [['l.0.a', 'l.1.a'], ['l.2.a'], ['l.0.b', 'l.1.b']]
        """
        kinds: dict[str, list[str]] = {}
        for name in names:  # a module's name without the numbers of layers is its kind
            parts = ["#" if part.isdigit() else part for part in name.split(".")]
            kinds.setdefault(".".join(parts), []).append(name)
        size = self.layers
        return [k[i : i + size] for k in kinds.values() for i in range(0, len(k), size)]

    def check(self, ranks: Mapping[str, int]) -> None:
        """Refuse different ranks for modules that share.

        Raises:
            ValueError: there are some; the message names them.
        """
        for group in self.groups(ranks):
            if len({ranks[name] for name in group}) > 1:
                told = ", ".join(f"{name} {ranks[name]}" for name in group)
                raise ValueError(f"one basis, and several ranks: {told}; give one.")

    def tie(self, small: nn.Module, names: Iterable[str]) -> None:
        """Let the low-rank modules that share hold one tensor."""
        for first, *others in self.groups(names):
            basis = small.get_submodule(first)
            for name in others:
                thin = small.get_submodule(name)
                assert isinstance(basis, LowRankLinear)
                assert isinstance(thin, LowRankLinear)
                thin.right = basis.right


@dataclass(frozen=True)
class Shifted:
    """‖W X − Ŵ X'‖_F: the inputs a layer will get, X', and the outputs it had.

    Layer by layer, each after those below it have been replaced: `drone.math.shifted`.
    With `anchor` 1 it is AA-SVD's first step (Sinha and Fleuret, 2026); with 0 the
    paper's sequential DRONE; between, the weighted sum of both of SAES-SVD (Hu et al.,
    2026), at one weight for all layers. The moments it needs change with the ranks
    below, so that no factorization serves a second choice of ranks. With `gradients` it
    is ‖G^½ (W X − Ŵ X')‖_F, G = Σ g gᵀ of the dense model as in `BothSides`.

    Attributes:
        anchor: 1 for the outputs of the dense model, 0 for what W would give now.
        ridge: how much of the mean square input is added as unshifted tokens, without
            which a regression learns chance where there are few.
        gradients: weigh the outputs by what the loss feels of them; needs labels.
    """

    anchor: float = 1.0
    ridge: float = 1e-3
    gradients: bool = False
    inputs = True

    def __post_init__(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ValueError: an anchor outside [0, 1], a ridge below 0.
        """
        check_shift(self.anchor, self.ridge)


def check_linears(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse modules that are no Linears.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name in names:
        if not is_linear(module_named(model, name)):
            kind = type(module_named(model, name)).__name__
            raise ValueError(f"{name}: a {kind}; this family knows Linears only.")


def factorize_relative(
    model: Any,
    names: Iterable[str],
    relative: "Relative | SharedBasis",
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
    check_linears(model, names)
    needs = relative.inputs or relative.gradients
    if needs and batches is None:
        raise ValueError(f"{relative} needs batches; give batches=….")
    kept = [] if batches is None else list(batches)
    moments = calibrate(model, kept, names) if relative.inputs else {}
    found: dict[str, Gradients] = {}
    if relative.gradients:
        found = calibrate_gradients(model, kept, names, loss)
    if isinstance(relative, SharedBasis):
        return _shared(model, relative.groups(names), moments)
    result = {}
    for name in progress.bar(names, desc="factorize"):
        linear = as_linear(module_named(model, name))
        moment, rows = relative.weights(moments.get(name), found.get(name))
        try:
            result[name] = factorize_weighted(linear.weight, moment, rows)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return result


def _shared(
    model: nn.Module,
    groups: Iterable[Sequence[str]],
    moments: Mapping[str, SecondMoment],
) -> dict[str, Factorization]:
    """Decompose each group of Linears together."""
    result: dict[str, Factorization] = {}
    for group in progress.bar(list(groups), desc="factorize"):
        weights = [as_linear(module_named(model, name)).weight for name in group]
        try:
            made = factorize_shared(weights, [moments[name] for name in group])
        except ValueError as error:
            raise ValueError(f"{', '.join(group)}: {error}") from error
        result |= dict(zip(group, made, strict=True))
    return result
