"""The model card: what was done, what it cost, how to load it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from drone.search.verb import Compressed
from drone.timing import LatencyReport

Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Result:
    """What the command knows when the model is small.

    Attributes:
        source: name of the folder it came from.
        data: name of the file, and how many rows were searched and held.
        compressed: from `drone.compress`.
        losses: (dense, small) means over held rows.
        loss: growth of the loss, with its interval.
        rights: (dense, small) accuracies on held rows; None: a regression.
        right: difference of accuracies, with its interval.
        clock: of "dense" and "small".
        missed: what was asked for and not reached; "" where nothing was.
    """

    source: str
    data: str
    compressed: Compressed
    losses: tuple[float, float]
    loss: Interval
    rights: tuple[float, float] | None
    right: Interval | None
    clock: LatencyReport
    missed: str


def percent(interval: Interval) -> str:
    """Write a change and its interval in percent."""
    value, low, high = (f"{100 * x:+.2f}" for x in interval)
    return f"{value} % ({low} to {high})"


def points(interval: Interval) -> str:
    """Write a difference of accuracies and its interval in points."""
    value, low, high = (f"{100 * x:+.2f}" for x in interval)
    return f"{value} points ({low} to {high})"


def summary(result: Result) -> list[str]:
    """Say in a few lines what came out."""
    ratio, low, high = result.clock.speedup("small")
    lines = [
        str(result.compressed),
        f"speed: {ratio:.2f}× ({low:.2f} to {high:.2f}), "
        f"{1000 * result.clock.median('dense'):.1f} → "
        f"{1000 * result.clock.median('small'):.1f} ms a batch",
        f"loss on held rows: {result.losses[0]:.4f} → {result.losses[1]:.4f}, "
        f"{percent(result.loss)}",
    ]
    if result.rights is not None and result.right is not None:
        lines.append(
            f"accuracy on held rows: {result.rights[0]:.1%} → {result.rights[1]:.1%}, "
            f"{points(result.right)}"
        )
    return lines + ([f"missed: {result.missed}"] if result.missed else [])


def card(result: Result, kind: str) -> str:
    """Write the README of the folder, in Markdown; `kind` is the model's class."""
    conditions: dict[str, Any] = result.clock.conditions
    ranks = Counter(result.compressed.ranks.values())
    listed = ", ".join(f"{rank} ({count}×)" for rank, count in sorted(ranks.items()))
    done, *found = summary(result)
    plan = result.compressed.plan
    how = f" by the method `{plan.method}`" if plan is not None else ""
    facts = ", ".join(f"{key} {value}" for key, value in conditions.items())
    return f"""---
tags: [drone, low-rank]
library_name: transformers
---
# {result.source}, compressed

Made from `{result.source}` with [drone](https://github.com/drone-book/drone-book){how}.

- {done}
{chr(10).join(f"- {line}" for line in found)}

Intervals hold 95 %. Those of loss and accuracy are a paired bootstrap over held rows,
which neither the calibration nor the search has seen; that of the speed is over rounds
in which both models ran side by side ({facts}).

Rows: {result.data}. Ranks (inner dimension; of an attention block, of each head):
{listed}.

## Load it

```python
import drone  # first: it teaches transformers the thin layers
from transformers import AutoTokenizer, {kind}

model = {kind}.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```
"""
