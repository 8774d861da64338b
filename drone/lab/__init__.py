"""What the book needs and a practitioner does not: data, training, records, figures.

`import drone` loads none of it; `drone.lab.data` and the others load when asked for.
"""

import importlib
from types import ModuleType

__all__ = [
    "agreement",
    "batches",
    "cache",
    "cases",
    "data",
    "dense",
    "differences",
    "encoders",
    "figures",
    "keys",
    "known",
    "language",
    "lstm_model",
    "maps",
    "metrics",
    "names",
    "parameters",
    "ranges",
    "readings",
    "records",
    "stamps",
    "tables",
    "training",
]


def __getattr__(name: str) -> ModuleType:
    """Load a module of the lab at its first use (PEP 562)."""
    if name in __all__:
        try:
            return importlib.import_module(f"drone.lab.{name}")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"drone.lab.{name} needs {error.name}: the extra `lab` brings it",
                name=error.name,
            ) from error
    raise AttributeError(f"module 'drone.lab' has no attribute {name!r}")
