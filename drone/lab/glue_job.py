"""The command that fills chapter 7's table: `python -m drone.lab.glue_job --help`.

Runs the stages of one encoder, task and seed in the order of what they tell, each kept
as soon as it is finished: a job that is killed goes on where it was. The same command
serves a laptop and a GPU.
"""

import argparse
import math
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from drone.lab.arms import Arm
from drone.lab.cases import Case
from drone.lab.clocks import DENSE, FORMATS
from drone.lab.exam import SPLIT, examine
from drone.lab.formats import score
from drone.lab.glue import Bench, settings_of
from drone.lab.methods import METHODS
from drone.lab.metrics import METRICS
from drone.lab.speeds import Speeds
from drone.lab.training import Recipe

# The most telling first: what is finished when time runs out then says most.
ORDER = (
    "drone-algorithm2",
    "svd-latency",
    "alternate-layers",
    "drone-latency",
    "svd-fraction",
    "drone-fraction",
    "first-layers",
)

# Encoder and task → epochs and rate, the best of those tried on held rows.
RECIPES = {
    ("mpnet-base", "mrpc"): (5, 3e-5),
    ("mpnet-base", "rte"): (10, 2e-5),
    ("mpnet-base", "stsb"): (5, 3e-5),
    ("mpnet-base", "cola"): (5, 2e-5),
    ("mpnet-base", "sst2"): (2, 2e-5),
    ("minilm", "mrpc"): (4, 1e-4),
    ("minilm", "rte"): (6, 1e-4),
    ("minilm", "stsb"): (4, 1e-4),
    ("minilm", "cola"): (5, 1e-4),
    ("minilm", "sst2"): (2, 1e-4),
}


def run(
    bench: Bench,
    speedups: Sequence[float],
    methods: Sequence[str],
    arms: Sequence[str],
    rates_of: int | None = None,
    forms: Sequence[str] = (),
    exam: bool = False,
) -> None:
    """Run all stages that are not finished, and say so in a line each.

    Args:
        bench: of one dense model.
        speedups: predicted, above 1, one after the other; what a search measured
            serves the later ones too.
        methods: of `drone.lab.methods.METHODS`, in this order.
        arms: names of retrainings, in this order, every method at one before the next.
        rates_of: take the rates that this seed chose; None: choose.
        forms: of `drone.lab.clocks.FORMATS`: the dense model and each that is not
            retrained, scored in each.
        exam: score all on the task's test rows as well.
    """
    _say(bench, "dense", bench.dense())
    for speedup in speedups:
        for method in methods:
            case = bench.ranks(method, speedup)
            _say(bench, f"{method} {case.result['speedup']:.3f}x", case)
        for name in arms:
            for method in methods:
                rate = _rate(bench, rates_of, method, speedup, name)
                case = bench.retrain(method, speedup, name, rate)
                what = f"{method} {speedup:g}x + {name}, rate {case.result['rate']}"
                _say(bench, what, case)
        for form in forms:
            for method, speed in [(DENSE, 1.0), *((m, speedup) for m in methods)]:
                found = score(bench, method, speed, form)
                _say(bench, f"{method} {speed:g}x in {form}", found)
        if exam:
            _say(bench, f"{DENSE}, examined", examine(bench, DENSE))
            for name, method in product(arms, methods):
                rate = _rate(bench, rates_of, method, speedup, name)
                what = f"{method} {speedup:g}x + {name}, examined"
                _say(bench, what, examine(bench, method, speedup, name, rate))


def _rate(
    bench: Bench, rates_of: int | None, method: str, speedup: float, name: str
) -> float | None:
    """The rate another seed chose, where one is named; None: choose."""
    if rates_of is None or not Arm.named(name).share:
        return None
    return bench.rate_of_seed(rates_of, method, speedup, name)


def _say(bench: Bench, what: str, case: Case) -> None:
    """Print one line, at once: who watches a machine by the minute needs it."""
    settings = bench.settings
    who = f"{settings['encoder']} {settings['task']} seed {settings['seed']}"
    score, metric = "", next(iter(METRICS[bench.task]))
    for rows in {"dev", SPLIT} & case.result.keys():
        score = f": {metric} {case.result[rows][metric]}"
    took = "found" if case.found else f"{case.seconds:.0f} s"
    print(f"{time.strftime('%H:%M:%S')} {who} {what}{score} ({took})", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m drone.lab.glue_job", description=__doc__
    )
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", default="embedded", help="of the encoder")
    parser.add_argument("--data-source", default="local")
    parser.add_argument("--speeds", type=Path, required=True, help="table of seconds")
    parser.add_argument("--store", type=Path, required=True, help="folder of cases")
    parser.add_argument(
        "--weights", type=Path, help="folder of dense weights; default: STORE/weights"
    )
    parser.add_argument("--speedup", default="2", help="one, or several: 1.5,2,3")
    parser.add_argument(
        "--budget", type=float, default=0.15, help="that Algorithm 2 tries first"
    )
    parser.add_argument("--methods", default=",".join(ORDER))
    parser.add_argument("--arms", default="none,paper,full")
    parser.add_argument("--formats", default="", help="float32,int8: scored in each")
    parser.add_argument(
        "--exam", action="store_true", help="score all on the task's test rows too"
    )
    parser.add_argument(
        "--rates-of", type=int, help="take the rates this seed chose; default: choose"
    )
    parser.add_argument("--epochs", type=int, help="of the fine-tuning")
    parser.add_argument("--rate", type=float, help="of the fine-tuning")
    parser.add_argument("--rows", type=int, default=0, help="of train; 0: all")
    parser.add_argument("--dev-rows", type=int, default=0, help="0: all")
    parser.add_argument("--calibration-rows", type=int, default=1000)
    parser.add_argument("--retrain-rows", type=int, default=0, help="0: all")
    asked = parser.parse_args(arguments)
    methods = [name for name in asked.methods.split(",") if name]
    arms = [name for name in asked.arms.split(",") if name]
    forms = [name for name in asked.formats.split(",") if name]
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        parser.error(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}.")
    unknown = [name for name in forms if name not in FORMATS]
    if unknown:
        parser.error(f"no format {unknown[0]!r}; there are {', '.join(FORMATS)}.")
    for name in arms:
        try:
            Arm.named(name)
        except ValueError as error:
            parser.error(str(error))
    try:
        speedups = [float(each) for each in asked.speedup.split(",")]
    except ValueError:
        parser.error(f"--speedup {asked.speedup}: numbers such as 1.5,2,3 are needed.")
    if not all(1 < each < math.inf for each in speedups):
        parser.error(f"--speedup {asked.speedup}: each is to be above 1.")
    usual = RECIPES.get((asked.encoder.removesuffix("-float16"), asked.task))
    if usual is None and not (asked.epochs and asked.rate):
        parser.error("no recipe for this encoder and task: give --epochs and --rate.")
    epochs, rate = usual or (asked.epochs, asked.rate)
    settings = settings_of(
        asked.encoder,
        asked.task,
        asked.seed,
        Recipe(epochs=asked.epochs or epochs, learning_rate=asked.rate or rate),
        source=asked.source,
        data_source=asked.data_source,
        rows=asked.rows,
        dev_rows=asked.dev_rows,
        calibration_rows=asked.calibration_rows,
        retrain_rows=asked.retrain_rows,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and "int8" in forms:
        parser.error("int8 runs on a processor only; leave --formats out on a GPU.")
    if (
        device.type == "cuda"
    ):  # products of float32 numbers in TF32: several times as fast
        torch.set_float32_matmul_precision("high")
    speeds = Speeds.from_json(asked.speeds.read_text())
    bench = Bench(
        settings,
        speeds,
        asked.store,
        asked.weights or asked.store / "weights",
        device,
        asked.budget,
    )
    run(bench, speedups, methods, arms, asked.rates_of, forms, asked.exam)


if __name__ == "__main__":
    main()
