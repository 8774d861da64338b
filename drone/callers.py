"""Warnings at the line of the caller, however deep in the library they arise."""

import sys
import warnings


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first line outside of drone that led here.

    A fixed `stacklevel` would be wrong as soon as one function of the library calls
    another that warns.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as said:
    ...     warn("few tokens")
    >>> said[0].message.args
    ('few tokens',)
    """
    level, frame = 1, sys._getframe()
    while frame is not None and _inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]  # ends None
    warnings.warn(message, category, stacklevel=level)


def _inside(module: str) -> bool:
    return module == "drone" or module.startswith("drone.")
