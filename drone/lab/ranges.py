"""One check for the numbers of a recipe: each error names its field and the range."""

import math
from typing import Any


def check_fields(
    settings: Any,
    *,
    counts: tuple[str, ...] = (),
    positive: tuple[str, ...] = (),
    not_negative: tuple[str, ...] = (),
    shares: tuple[str, ...] = (),
    least: int = 1,
) -> None:
    """Refuse a field of an object that is of another type or out of its range.

    Args:
        settings: has the fields as attributes.
        counts: whole numbers of at least `least`.
        positive: finite numbers above 0.
        not_negative: finite numbers of at least 0.
        shares: numbers from 0 to below 1.
        least: of the counts.

    Raises:
        TypeError: not a number, or not a whole one where one is needed.
        ValueError: a number out of range.

    >>> from types import SimpleNamespace
    >>> check_fields(SimpleNamespace(clip=-1.0), positive=("clip",))
    Traceback (most recent call last):
    ValueError: clip is -1.0; a number above 0.
    """
    for name in counts:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; a whole number is needed.")
        if value < least:
            raise ValueError(f"{name} is {value}; at least {least}.")
    for name in (*positive, *not_negative, *shares):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r}; a number is needed.")
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; a finite number is needed.")
        if name in positive and value <= 0:
            raise ValueError(f"{name} is {value}; a number above 0.")
        if name in not_negative and value < 0:
            raise ValueError(f"{name} is {value}; a number from 0.")
        if name in shares and not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; a share from 0 to below 1.")
