"""What is shown while work goes on: one kind of progress bar, and silence."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing its load report and bars into a notebook."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def bar(
    items: Iterable[Any] | None = None, *, desc: str, total: int | None = None
) -> Any:
    """Wrap an iterable, or count by hand up to `total`, with a bar that leaves nothing.

    Silent if the environment variable TQDM_DISABLE is set: tqdm heeds it in a
    terminal, but not in a notebook, where a bar would count as an output of its cell.
    """
    silent = bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(items, desc=desc, total=total, leave=False, disable=silent)
