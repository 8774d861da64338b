"""Clocks apart from scores: what shapes cost on this processor, over fresh processes.

A latency depends on shapes alone, so ranks found anywhere are timed here, filled with
random numbers. One process finds its memory and threads laid out once, and all its
rounds share that: the process is the unit of the interval, not the round. Chapter 9.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from transformers import PreTrainedModel

from drone.lab import encoders
from drone.lab.cases import Case, run_case
from drone.lab.depth import only_layers
from drone.lab.language import language_model
from drone.lab.lstm_model import LSTMConfig
from drone.lab.lstm_train import SIZES
from drone.lab.tables import Estimate
from drone.model.quantize import int8
from drone.search.thin import thin_model
from drone.timing import compare_latency, processor

DENSE = "dense"  # the baseline's name
PROCESSES = 5  # fewer say nothing about how processes differ
LSTM = "lstm-"  # with a size of chapter 6: that language model, drawn at random
WORDS = 10_000  # in its vocabulary, as in Penn Treebank

Plan = Mapping[str, Any]  # of `drone.lab.methods`: `ranks` or `layers`
# A number format → a model in it.
FORMATS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": lambda model: model,
    "int8": int8,
}
PLANNED = ("ranks", "layers", "format")  # of a plan, what its time depends on


def shaped(model: PreTrainedModel, plan: Plan) -> nn.Module:
    """Return a copy of the shape a plan describes; what is thin holds random numbers.

    Args:
        model: dense.
        plan: with `ranks`, {module name: rank}, or `layers`, numbers of those kept, or
            `format`, `int8` or `float32`; with a format beside them, that comes last.

    Raises:
        ValueError: a plan with none, or another format; and what the modules raise.
    """
    form = plan.get("format", "float32")
    if form not in FORMATS:
        raise ValueError(f"no format {form!r}; there are {', '.join(FORMATS)}.")
    if "layers" in plan:
        small: nn.Module = only_layers(model, plan["layers"])
    elif "ranks" in plan or "format" in plan:
        ranks = plan.get("ranks", {})
        small, put = thin_model(model, ranks)
        gone = sorted(ranks.keys() - put)
        if gone:
            raise ValueError(
                f"a thin block has no {gone[0]}; one of the two is needed."
            )
    else:
        raise ValueError(f"a plan has ranks or layers; this one {sorted(plan)}.")
    return FORMATS[form](small)


def dense_model(encoder: str, source: str) -> PreTrainedModel:
    """Make the baseline, in eval mode.

    Args:
        encoder: one of `drone.lab.encoders.ENCODERS`, or `lstm-` and one of
            `drone.lab.lstm_train.SIZES`.
        source: as in `drone.lab.encoders.encoder`; no LSTM needs one.

    Raises:
        ValueError: no such size; and what `drone.lab.encoders.encoder` raises.

    >>> dense_model("lstm-tiny", "").config.hidden_size
    32
    """
    if encoder.startswith(LSTM):
        size = encoder.removeprefix(LSTM)
        if size not in SIZES:
            raise ValueError(f"no LSTM {size!r}; there are {', '.join(SIZES)}.")
        hidden = SIZES[size].hidden
        return language_model(LSTMConfig(vocab_size=WORDS, hidden_size=hidden))
    return encoders.encoder(encoder, source)[0]


def time_shapes(settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Time all shapes in this process, interleaved, each round in an order drawn anew.

    Args:
        settings: `encoder`, `source`, `plans`, `batch`, `length`, `threads`, `rounds`.

    Returns:
        {name: seconds of each round}, the dense model's among them.
    """
    torch.set_num_threads(settings["threads"])
    model = dense_model(settings["encoder"], settings["source"])
    models: dict[str, nn.Module] = {DENSE: model}
    for name, plan in settings["plans"].items():
        models[name] = shaped(model, plan)
    size = (settings["batch"], settings["length"])
    words = torch.randint(1000, model.config.vocab_size, size)
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    report = compare_latency(models, batch, repeats=settings["rounds"])
    return {name: list(map(float, s)) for name, s in report.seconds.items()}


def speedup(
    processes: Sequence[Mapping[str, Sequence[float]]], name: str, level: float = 0.95
) -> tuple[float, float, float]:
    """Speed-up over the dense model, with an interval over processes.

    Of each process the median over its rounds of dense time / this shape's time; of
    these, Student's interval of the mean logarithm.

    Args:
        processes: what `time_shapes` returned in each, at least two.
        name: of a shape.
        level: of the interval.

    Returns:
        (ratio, low, high).

    Raises:
        ValueError: fewer than two processes.

    >>> one, two = {"dense": [2.0], "a": [1.0]}, {"dense": [4.0], "a": [2.0]}
    >>> speedup([one, two], "a")
    (2.0, 2.0, 2.0)
    """
    logs = [np.log(np.median(np.divide(each[DENSE], each[name]))) for each in processes]
    found = over_processes(logs, level)
    return found.value, found.low, found.high


def over_processes(logs: Sequence[float] | np.ndarray, level: float = 0.95) -> Estimate:
    """Mean speed-up of logarithms of it, one a process, with Student's interval.

    Raises:
        ValueError: fewer than two processes.

    >>> round(over_processes(np.log([2.0, 2.0])).value, 6)
    2.0
    """
    count = len(logs)
    if count < 2:
        raise ValueError(f"{count} processes; at least 2 give an interval.")
    mean, error = np.mean(logs), np.std(logs, ddof=1) / count**0.5
    reach = stats.t.ppf((1 + level) / 2, count - 1) * error
    ratio, low, high = np.exp([mean, mean - reach, mean + reach])
    return Estimate(float(ratio), float(low), float(high))


def clock(
    store: Path,
    encoder: str,
    source: str,
    plans: Mapping[str, Plan],
    *,
    batch: int = 8,
    length: int = 128,
    threads: int = 2,
    rounds: int = 20,
    processes: int = PROCESSES,
) -> Case:
    """Time shapes in fresh processes, one after another, as one case.

    Args:
        store: folder of the cases.
        encoder: as in `dense_model`.
        source: as in `drone.lab.encoders.encoder`.
        plans: {name: plan}; the dense model is the baseline and need not be there.
        batch: rows.
        length: tokens of each row.
        threads: of PyTorch.
        rounds: of each process, at least 2.
        processes: at least 5.

    Returns:
        The case: `speedups`, {name: [ratio, low, high]}, and `seconds`, each process's
        median seconds by name.

    Raises:
        ValueError: too few processes, or a plan called `dense`.
        CalledProcessError: one of the processes failed; what it said stands above.
    """
    if processes < PROCESSES or DENSE in plans:
        raise ValueError(
            f"{processes} processes and plans {', '.join(plans)}; at least "
            f"{PROCESSES}, and {DENSE!r} is the baseline's name."
        )
    settings = {
        "encoder": encoder,
        "source": source,
        "plans": {
            name: {key: plan[key] for key in PLANNED if key in plan}
            for name, plan in plans.items()
        },
        "batch": batch,
        "length": length,
        "threads": threads,
        "rounds": rounds,
        "processes": processes,
        "processor": processor(),
    }

    def measure(asked: Mapping[str, Any]) -> dict[str, Any]:
        command = [sys.executable, "-m", "drone.lab.clocks", "--one"]
        found: list[dict[str, list[float]]] = []
        for _ in range(processes):
            done = subprocess.run(
                command,
                input=json.dumps(dict(asked)),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
        return {
            "speedups": {name: list(speedup(found, name)) for name in plans},
            "seconds": [
                {name: float(np.median(s)) for name, s in each.items()}
                for each in found
            ],
        }

    return run_case(store, "clocks", settings, measure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, time, and print one line a shape."""
    parser = argparse.ArgumentParser(
        prog="python -m drone.lab.clocks", description=__doc__
    )
    parser.add_argument(
        "--one", action="store_true", help="time in this process; settings on stdin"
    )
    parser.add_argument("--store", type=Path, help="folder of the cases")
    parser.add_argument("--plans", type=Path, help="JSON: {name: plan}")
    parser.add_argument("--encoder")
    parser.add_argument("--source", default="embedded")
    for name, usual in (("batch", 8), ("length", 128), ("threads", 2), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    asked = vars(parser.parse_args(arguments))
    if asked.pop("one"):
        print(json.dumps(time_shapes(json.load(sys.stdin))))
        return
    store, plans = asked.pop("store"), asked.pop("plans")
    encoder, source = asked.pop("encoder"), asked.pop("source")
    if store is None or plans is None or encoder is None:
        parser.error("--store, --plans and --encoder are needed.")
    case = clock(store, encoder, source, json.loads(plans.read_text()), **asked)
    for name, (ratio, low, high) in case.result["speedups"].items():
        print(f"{name:24} {ratio:.3f}x ({low:.3f}-{high:.3f})", flush=True)


if __name__ == "__main__":
    main()
