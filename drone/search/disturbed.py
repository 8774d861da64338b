"""A clock that something else on the machine has disturbed is no measurement."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drone.search.costs import ModuleCosts

# So many times faster than its share of the multiply-adds a thin module may be. What a
# call costs besides them makes it slower than that; caches that hold its factors and
# not the dense weight make it faster: 2 times, of 5,296 times in the book's tables.
BEYOND = 5
# Seconds. A shorter call is what calling costs, and one hold-up of its dense module
# says nothing of what a plan will take.
SHORT = 1e-4


def refuse_disturbed(modules: Mapping[str, "ModuleCosts"]) -> None:
    """Refuse times that no quiet machine gives, before a plan is searched with them.

    A process beside may hold up the dense module, which needs all cores, and not the
    thin ones, which do not. Of those that look too fast, the worst is named.

    Raises:
        ValueError: a rank is more than `BEYOND` times faster than its share of the
            dense module's multiply-adds, and its calls are not `SHORT`.
    """
    worst, told = float(BEYOND), ""
    for name, costs in modules.items():
        *weights, all_weights = costs.weights
        *seconds, dense = costs.seconds
        for rank, weight, thin in zip(costs.ranks, weights, seconds, strict=True):
            share = weight / all_weights
            if thin >= SHORT and share * dense > worst * thin:
                worst = share * dense / thin
                told = (
                    f"{name}: at rank {rank} it was timed at {1000 * thin:.3g} ms, "
                    f"dense at {1000 * dense:.3g} ms: {dense / thin:.3g} times faster "
                    f"with {100 * share:.0f} % of the multiply-adds"
                )
    if told:
        raise ValueError(
            f"{told}. No quiet machine does that (at most {BEYOND} times faster than "
            "its share is believed): something else ran while the clock did. Measure "
            "again on a quiet machine, or with fewer threads than free cores "
            "(torch.set_num_threads)."
        )
