"""Data-aware low-rank compression of neural networks: the library of The DRONE Book."""

import importlib
from importlib.metadata import version
from typing import Any

from drone.layers.attention import LowRankSelfAttention
from drone.layers.embedding import LowRankEmbedding
from drone.layers.linear import LowRankLinear
from drone.layers.lstm import LowRankLSTM, LSTMLayer
from drone.math.attention import AttentionFactorization, factorize_attention
from drone.math.embedding import factorize_embedding
from drone.math.factorize import (
    Factorization,
    break_even_rank,
    factorize,
    theorem1,
)
from drone.math.moments import SecondMoment
from drone.model import quantize
from drone.model.adapters import (
    SkippedModuleWarning,
    attention_blocks,
    encoder_linears,
)
from drone.model.calibrate import calibrate
from drone.model.compress import (
    AboveBreakEvenWarning,
    BrokenTieWarning,
    FewTokensWarning,
    NothingReplacedWarning,
    compress,
    factorize_modules,
)
from drone.model.inputs import prepare
from drone.model.loss import OneClassWarning
from drone.model.masks import LeftPaddingWarning, NoMaskWarning
from drone.model.moment_files import load_moments, save_moments
from drone.model.report import report
from drone.model.storage import load, save
from drone.search import costs
from drone.search.algorithm2 import search_ranks
from drone.search.plan import RankPlan
from drone.timing import (
    LatencyReport,
    compare_latency,
    multiply_adds,
    profile_modules,
)

__version__ = version("drone")

# The lab needs packages that compression does not: it is loaded when first asked for.
_LAB = {
    "LSTMConfig": "drone.lab.lstm_model",
    "LSTMLanguageModel": "drone.lab.lstm_model",
}


def __getattr__(name: str) -> Any:
    """Load `drone.lab`, or a name that lives there, at its first use (PEP 562)."""
    if name == "lab":
        return importlib.import_module("drone.lab")
    if name in _LAB:
        return getattr(importlib.import_module(_LAB[name]), name)
    raise AttributeError(f"module 'drone' has no attribute {name!r}")


__all__ = [
    "AboveBreakEvenWarning",
    "AttentionFactorization",
    "BrokenTieWarning",
    "Factorization",
    "FewTokensWarning",
    "LSTMConfig",
    "LSTMLanguageModel",
    "LSTMLayer",
    "LatencyReport",
    "LeftPaddingWarning",
    "LowRankEmbedding",
    "LowRankLSTM",
    "LowRankLinear",
    "LowRankSelfAttention",
    "NoMaskWarning",
    "NothingReplacedWarning",
    "OneClassWarning",
    "RankPlan",
    "SecondMoment",
    "SkippedModuleWarning",
    "attention_blocks",
    "break_even_rank",
    "calibrate",
    "compare_latency",
    "compress",
    "costs",
    "encoder_linears",
    "factorize",
    "factorize_attention",
    "factorize_embedding",
    "factorize_modules",
    "lab",
    "load",
    "load_moments",
    "multiply_adds",
    "prepare",
    "profile_modules",
    "quantize",
    "report",
    "save",
    "save_moments",
    "search_ranks",
    "theorem1",
]
