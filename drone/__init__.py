"""Data-aware low-rank compression of neural networks: the library of The DRONE Book."""

from drone import (
    agreement,
    costs,
    data,
    figures,
    language,
    models,
    quantize,
    records,
    training,
)
from drone.adapters import attention_blocks, encoder_linears
from drone.attention import (
    AttentionFactorization,
    LowRankSelfAttention,
    factorize_attention,
)
from drone.compress import (
    AboveBreakEvenWarning,
    compress,
    factorize_modules,
    report,
)
from drone.embedding import LowRankEmbedding, factorize_embedding
from drone.factorize import Factorization, break_even_rank, factorize, theorem1
from drone.layers import LowRankLinear
from drone.lstm import LowRankLSTM, LSTMConfig, LSTMLanguageModel, LSTMLayer
from drone.moments import SecondMoment, calibrate, load_moments, save_moments
from drone.search import RankPlan, search_ranks
from drone.storage import load, save
from drone.timing import (
    LatencyReport,
    compare_latency,
    multiply_adds,
    profile_modules,
)

__all__ = [
    "AboveBreakEvenWarning",
    "AttentionFactorization",
    "Factorization",
    "LSTMConfig",
    "LSTMLanguageModel",
    "LSTMLayer",
    "LatencyReport",
    "LowRankEmbedding",
    "LowRankLSTM",
    "LowRankLinear",
    "LowRankSelfAttention",
    "RankPlan",
    "SecondMoment",
    "agreement",
    "attention_blocks",
    "break_even_rank",
    "calibrate",
    "compare_latency",
    "compress",
    "costs",
    "data",
    "encoder_linears",
    "factorize",
    "factorize_attention",
    "factorize_embedding",
    "factorize_modules",
    "figures",
    "language",
    "load",
    "load_moments",
    "models",
    "multiply_adds",
    "profile_modules",
    "quantize",
    "records",
    "report",
    "save",
    "save_moments",
    "search_ranks",
    "theorem1",
    "training",
]
