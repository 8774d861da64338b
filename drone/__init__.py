"""Data-aware low-rank compression of neural networks: the library of The DRONE Book.

One verb makes a model smaller, `compress`; `search_ranks` chooses ranks for a loss, a
speed or a size; `save` and `load` keep the result as an ordinary Hugging Face folder.
Below them stand the parts: `calibrate` collects what each layer sees, `factorize` finds
the best factors for it.

>>> import torch, transformers
>>> import drone
>>> config = transformers.BertConfig(vocab_size=50, hidden_size=32,
...     num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
>>> model = transformers.BertForSequenceClassification(config)
>>> ids = torch.randint(5, 50, (8, 12))  # your text, by your tokenizer
>>> batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
>>> small = drone.compress(model, 0.5, batches=batches)  # a copy
>>> small.compressed.kept <= 0.5
True
>>> type(small.bert.encoder.layer[0].output.dense).__name__
'LowRankLinear'
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
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
from drone.model import family, quantize
from drone.model.adapters import (
    SkippedModuleWarning,
    attention_blocks,
    encoder_linears,
)
from drone.model.calibrate import calibrate
from drone.model.cautions import (
    AboveBreakEvenWarning,
    BrokenTieWarning,
    FewTokensWarning,
    NothingReplacedWarning,
)
from drone.model.compress import factorize_modules
from drone.model.inputs import prepare
from drone.model.loss import OneClassWarning
from drone.model.masks import LeftPaddingWarning, NoMaskWarning
from drone.model.moment_files import load_moments, save_moments
from drone.model.onnx import export_onnx
from drone.model.processes import merge_over_processes
from drone.model.report import report
from drone.model.storage import load, save
from drone.search import costs
from drone.search.algorithm2 import search_ranks
from drone.search.goal import Goal
from drone.search.plan import RankPlan
from drone.search.verb import Compressed, compress
from drone.timing import (
    LatencyReport,
    compare_latency,
    multiply_adds,
    profile_modules,
)

try:
    __version__ = version("drone")
except PackageNotFoundError:  # taken from a folder on PYTHONPATH, not installed
    __version__ = "not installed"

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
    "Compressed",
    "Factorization",
    "FewTokensWarning",
    "Goal",
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
    "export_onnx",
    "factorize",
    "factorize_attention",
    "factorize_embedding",
    "factorize_modules",
    "family",
    "lab",
    "load",
    "load_moments",
    "merge_over_processes",
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
