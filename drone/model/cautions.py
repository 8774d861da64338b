"""What a user should know of a compressed model, said once and with a way out."""

from collections.abc import Mapping

from torch import nn

from drone.callers import warn
from drone.layers.linear import LowRankLinear
from drone.math.factorize import break_even_rank

# With half as many tokens as inputs the factors are still near the best (chapter 2); at
# a quarter it is time to say so.
FEW = 4
Seen = dict[str, tuple[int, int]]  # module's name → tokens it saw, inputs it has


class AboveBreakEvenWarning(UserWarning):
    """Some layer got bigger and slower than the dense one it replaced."""


class BrokenTieWarning(UserWarning):
    """A replaced module shared its weight with one that still has it."""


class FewTokensWarning(UserWarning):
    """A layer has many times more inputs than tokens were seen to calibrate it."""


class NothingReplacedWarning(UserWarning):
    """No module was given a rank; the copy is as dense as the model."""


def warn_above_break_even(small: nn.Module, ranks: Mapping[str, int]) -> None:
    """Warn of thin layers that are bigger than what they replace.

    Args:
        small: the compressed model.
        ranks: {module name: rank}, of those that were replaced.
    """
    worse = [
        f"{name} (rank {rank}, break-even {break_even_rank(out, into)})"
        for name, rank in ranks.items()
        for module in [small.get_submodule(name)]
        if isinstance(module, LowRankLinear) and not module.saves
        for out, into in [(module.out_features, module.in_features)]
    ]
    if worse:
        more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
        warn(
            f"{len(worse)} of {len(ranks)} layers are bigger than the dense ones they "
            f"replace: {', '.join(worse[:3])}{more}.",
            AboveBreakEvenWarning,
        )


def warn_ties(ties: Mapping[str, str]) -> None:
    """Warn of weights that are shared no longer.

    Args:
        ties: {module name: the other that keeps the weight}, from
            `drone.model.compress.broken_ties`.
    """
    if ties:
        which = ", ".join(f"{name} (with {other})" for name, other in ties.items())
        warn(
            f"a shared weight is no longer shared: {which}. The other module keeps it, "
            "so that the model grows by the new factors; leave such a module out "
            "unless speed is worth that.",
            BrokenTieWarning,
        )


def warn_few_tokens(seen: Seen) -> None:
    """Warn of modules that saw far fewer tokens than they have inputs.

    Args:
        seen: {module name: (tokens, inputs)}.
    """
    few = [name for name, (tokens, inputs) in seen.items() if FEW * tokens < inputs]
    if few:
        worst = min(few, key=lambda n: seen[n][0] / seen[n][1])
        warn(
            f"few tokens for {len(few)} of {len(seen)} modules: {worst} has "
            f"{seen[worst][1]} inputs and saw {seen[worst][0]} tokens, so that "
            "most of what it keeps is chance. Calibrate on more rows; ten tokens an "
            "input are plenty.",
            FewTokensWarning,
        )
