"""One kind of progress bar: gone when it is done, and silent when asked."""

import os
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def bar(
    items: Iterable[Any] | None = None, *, desc: str, total: int | None = None
) -> Any:
    """Wrap an iterable, or count by hand up to `total`, with a bar that leaves nothing.

    Silent if the environment variable TQDM_DISABLE is set: tqdm heeds it in a
    terminal, but not in a notebook, where a bar would count as an output of its cell.
    """
    silent = bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(items, desc=desc, total=total, leave=False, disable=silent)
