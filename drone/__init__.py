"""Data-aware low-rank compression of neural networks: the library of The DRONE Book."""

from drone import agreement, data, figures, models, records, training
from drone.compress import (
    AboveBreakEvenWarning,
    compress,
    encoder_linears,
    factorize_linears,
    report,
)
from drone.factorize import Factorization, break_even_rank, factorize
from drone.layers import LowRankLinear
from drone.timing import LatencyReport, compare_latency, multiply_adds

__all__ = [
    "AboveBreakEvenWarning",
    "Factorization",
    "LatencyReport",
    "LowRankLinear",
    "agreement",
    "break_even_rank",
    "compare_latency",
    "compress",
    "data",
    "encoder_linears",
    "factorize",
    "factorize_linears",
    "figures",
    "models",
    "multiply_adds",
    "records",
    "report",
    "training",
]
