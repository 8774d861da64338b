"""What a search is asked for: a loss, a speed or a size, one of the three."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite

from drone.search.costs import Costs

TARGETS = ("loss", "parameters", "multiply_adds", "latency")  # of the old spelling
NOISE = 1e-9  # of sums and quotients of measured times, which differ by rounding


@dataclass(frozen=True)
class Goal:
    """One of three wishes; the other two are None.

    Attributes:
        loss_increase: by how much the loss may grow, 0.1 being 10 %; finite, ≥ 0.
        speedup: the dense model's predicted time over the small one's; finite, ≥ 1.
        keep: the share of the parameters in the searched modules' matrices that stays,
            in (0, 1]. Each is used once a token, so it is the share of the modules'
            multiply-adds too.

    Raises:
        ValueError: none or more than one is given, or a number that is not allowed.

    >>> print(Goal(speedup=2))
    speed-up ≥ 2
    """

    loss_increase: float | None = None
    speedup: float | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        given = {
            name: value for name, value in asdict(self).items() if value is not None
        }
        if len(given) != 1:
            raise ValueError(
                f"give one of loss_increase, speedup and keep; {len(given)} were given"
                f"{': ' if given else ''}{', '.join(given)}."
            )
        ((name, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}; a number is needed.")
        if name == "loss_increase" and not (isfinite(value) and value >= 0):
            raise ValueError(
                f"loss_increase is {value}; a finite number ≥ 0, 0.1 being 10 %."
            )
        if name == "speedup" and not (isfinite(value) and value >= 1):
            raise ValueError(
                f"speedup is {value}; a finite number ≥ 1, 2 being twice as fast."
            )
        if name == "keep" and not 0 < value <= 1:
            raise ValueError(f"keep is {value}; a share in (0, 1].")

    @classmethod
    def old(cls, budget: float, target: str) -> "Goal":
        """Read the old spelling, one number whose meaning another argument gives.

        Raises:
            ValueError: there is no such target, or the number is not allowed for it.
        """
        if target not in TARGETS:
            raise ValueError(f"no target {target!r}; there are {', '.join(TARGETS)}.")
        if target == "loss":
            if not isfinite(budget) or budget < 0:
                raise ValueError(f"the budget is {budget}; a finite number ≥ 0.")
            return cls(loss_increase=budget)
        if not 0 < budget <= 1:
            raise ValueError(f"the budget is {budget}; a share to keep, in (0, 1].")
        return cls(speedup=1 / budget) if target == "latency" else cls(keep=budget)

    def reached(self, costs: Costs, ranks: Mapping[str, int]) -> float:
        """Divide the speed or the saving that these ranks give by the one wanted.

        At least 1 where the goal is reached. Of a loss, costs say nothing.
        """
        if self.speedup is not None:
            return costs.speedup(ranks) / self.speedup * (1 + NOISE)
        assert self.keep is not None
        share = costs.weights(ranks) / costs.weights({})
        return self.keep / share * (1 + NOISE)

    def check(self, costs: Costs, smallest: Mapping[str, int]) -> None:
        """Refuse a speed or a size that even the smallest ranks do not reach.

        Raises:
            ValueError: they do not; the message says how far one gets.
        """
        if self.reached(costs, smallest) >= 1:
            return
        if self.speedup is not None:
            raise ValueError(
                f"a speed-up of {self.speedup:.3g} is wanted; with the smallest ranks "
                f"{costs.speedup(smallest):.3g} is predicted."
            )
        left = costs.weights(smallest) / costs.weights({})
        raise ValueError(
            f"a share of {self.keep:.3g} of the parameters is to be kept; with the "
            f"smallest ranks {left:.3g} is left."
        )

    def __str__(self) -> str:
        if self.loss_increase is not None:
            return f"loss ≤ {1 + self.loss_increase:.6g} × the dense loss"
        if self.speedup is not None:
            return f"speed-up ≥ {self.speedup:.6g}"
        return f"parameters kept ≤ {self.keep:.6g}"
