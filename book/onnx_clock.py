"""Time one request in PyTorch and in ONNX Runtime, dense against compressed.

    python -m book.onnx_clock

The record, `book/results/onnx.json`, is what *Compress your model* shows. The model is
MiniLM with a head of two classes, and its compressed version has the ranks that a
finished case of chapter 7 chose for twice the speed. Its weights are not trained: time
depends on shapes alone. Each runtime has processes of its own, for the threads of one
would take the processor from the other. A quiet machine with two cores takes two
minutes. Needs `drone[lab]` and `drone[onnx]`.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from transformers import PreTrainedModel

import drone
from drone.files import whole_file
from drone.lab.cases import read_cases, versions
from drone.lab.encoders import encoder
from drone.timing import processor, time_calls

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "book" / "results" / "onnx.json"
CASE = {
    "encoder": "minilm",
    "task": "mrpc",
    "method": "drone-latency",
    "speedup": 2.0,
    "seed": 0,
}
MODELS, RUNTIMES, THREADS = ("dense", "small"), ("pytorch", "onnx"), (1, 2)
TOKENS, ROUNDS, PROCESSES = 64, 100, 5
Call = Callable[[], Any]
FIRST_WORD = 1000  # ids below it are special in BERT's vocabulary


def ranks() -> dict[str, int]:
    """Return the ranks of the case.

    Raises:
        ValueError: there is not one such case.
    """
    cases = read_cases(ROOT / "book" / "cases", "ranks")
    found = [c for c in cases if CASE.items() <= c.settings.items()]
    if len(found) != 1:
        raise ValueError(f"{len(found)} cases of ranks have {CASE}; one is needed.")
    chosen: dict[str, int] = found[0].result["ranks"]
    return chosen


def rows(count: int) -> dict[str, Tensor]:
    """Draw rows of words; each has one pad more than the row above it."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_WORD, 20_000, (count, TOKENS), generator=draw)
    mask = (torch.arange(TOKENS) < TOKENS - torch.arange(count)[:, None]).long()
    kinds = torch.zeros_like(ids)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": kinds}


@cache
def models() -> dict[str, PreTrainedModel]:
    """Make the dense model and the compressed one, once a process."""
    dense, _ = encoder("minilm")
    small: Any = drone.compress(dense, ranks())
    return {"dense": dense, "small": small}


def export(folder: Path) -> dict[str, float]:
    """Write both models for ONNX Runtime; say how large the files are, how far off."""
    found: dict[str, float] = {}
    for name, model in models().items():
        path = folder / f"{name}.onnx"
        found[f"{name}_apart"] = drone.export_onnx(model, path, rows(8))
        found[f"{name}_megabytes"] = path.stat().st_size / 1e6
    return found


def seconds(folder: Path, runtime: str, seed: int) -> dict[str, list[float]]:
    """Time both models, side by side: {"onnx_dense_1": seconds of each round, …}."""
    ready = {"pytorch": in_pytorch, "onnx": in_onnxruntime}[runtime]
    found: dict[str, list[float]] = {}
    for threads in THREADS:
        calls = ready(folder, threads)
        with torch.inference_mode():
            for name, times in time_calls(calls, ROUNDS, 10, seed).items():
                found[f"{runtime}_{name}_{threads}"] = times.tolist()
    return found


def in_pytorch(folder: Path, threads: int) -> dict[str, Call]:
    """Return {model: a call that answers one request} of PyTorch."""
    torch.set_num_threads(threads)
    return {name: partial(model, **rows(1)) for name, model in models().items()}


def in_onnxruntime(folder: Path, threads: int) -> dict[str, Call]:
    """Return {model: a call that answers one request} of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of one model rest while the other one's work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    request = {key: tensor.numpy() for key, tensor in rows(1).items()}
    paths = {name: folder / f"{name}.onnx" for name in MODELS}
    sessions = {
        name: onnxruntime.InferenceSession(path, options)
        for name, path in paths.items()
    }
    return {n: partial(each.run, None, request) for n, each in sessions.items()}


def in_a_process(folder: Path, runtime: str, seed: int) -> dict[str, list[float]]:
    """Run `seconds` in a process of its own."""
    command = [sys.executable, "-m", "book.onnx_clock"]
    command += [str(folder), runtime, str(seed)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def summary(runs: list[dict[str, list[float]]]) -> dict[str, float]:
    """Return p50 and p99 of all rounds in ms, and how much faster the small model is.

    Faster is the median, the least and the most of the processes' own median ratios.
    """
    found: dict[str, float] = {}
    for setting in runs[0]:
        times = 1000 * np.concatenate([run[setting] for run in runs])
        for percent in (50, 99):
            found[f"{setting}_p{percent}"] = float(np.percentile(times, percent))
    for runtime in RUNTIMES:
        for threads in THREADS:
            dense, small = (
                np.array([run[f"{runtime}_{name}_{threads}"] for run in runs])
                for name in MODELS
            )
            ratios = np.median(dense / small, axis=1)
            where = f"{runtime}_faster_{threads}"
            found[where] = float(np.median(ratios))
            found[f"{where}_low"] = float(ratios.min())
            found[f"{where}_high"] = float(ratios.max())
    return found


def main() -> None:
    """Measure and write the record; or, in a process of its own, only time."""
    if sys.argv[1:]:
        folder, runtime, turn = sys.argv[1:]
        print(json.dumps(seconds(Path(folder), runtime, int(turn))))
        return
    with tempfile.TemporaryDirectory() as made:
        found: dict[str, Any] = dict(export(Path(made)))
        runs = []
        for seed in range(PROCESSES):
            each = [in_a_process(Path(made), runtime, seed) for runtime in RUNTIMES]
            runs.append(each[0] | each[1])
    found |= summary(runs)
    found |= {"tokens": TOKENS, "requests": ROUNDS * PROCESSES, "processes": PROCESSES}
    found["machine"], found["date"] = processor(), datetime.now(UTC).date().isoformat()
    found["versions"] = versions() | {"onnxruntime": version("onnxruntime")}
    named = {f"onnx_{name}": value for name, value in sorted(found.items())}
    with whole_file(RECORD) as temporary:
        temporary.write_text(json.dumps(named, indent=1) + "\n")


if __name__ == "__main__":
    main()
