"""Measure what the products of each LSTM cost, on the reference processor.

python book/remote/measure_costs.py FILE.json 10000 medium large

A search on another machine reads them: a time depends on shapes, not on weights.
"""

import json
import sys
from pathlib import Path

import torch

from drone import timing
from drone.files import whole_file
from drone.lab import language
from drone.lab.lstm_model import LSTMConfig
from drone.lab.lstm_train import SIZES
from drone.search.costs import measure

# Chapter 6: writing, a word at a time, and reading; with the rounds each is timed in.
SHAPES = {"word": ((1, 1), 60), "batch": ((32, 35), 6)}


def main(path: Path, words: int, sizes: list[str]) -> None:
    """Write one file for all sizes, whole or not at all; `words` in the vocabulary."""
    found: dict[str, dict[str, str]] = {}
    for size in sizes:
        config = LSTMConfig(vocab_size=words, hidden_size=SIZES[size].hidden)
        model = language.language_model(config)
        found[size] = {
            clock: measure(
                model,
                {"input_ids": torch.ones(shape, dtype=torch.int64)},
                repeats=rounds,
            ).to_json()
            for clock, (shape, rounds) in SHAPES.items()
        }
    content = {
        "processor": timing.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sizes": found,
    }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
