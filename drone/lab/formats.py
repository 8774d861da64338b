"""A fine-tuned model in several number formats: score, bytes and speed. Chapter 9.

Scores and bytes are one case a model and format; the clock times all of them side by
side, in fresh processes.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from drone.files import whole_file
from drone.lab.cases import Case, read_cases, run_case, unpack
from drone.lab.clocks import DENSE, FORMATS, clock
from drone.lab.differences import paired
from drone.lab.glue import Bench, plan_digest
from drone.lab.metrics import METRICS
from drone.lab.tables import Estimate
from drone.model.quantize import as_linears, int8

DRAWS = 1000  # of the bootstrap
CLOCK = ("batch", "length", "rounds", "processes", "processor")  # of all clocks alike


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all weights, 8-bit ones with their scales.

    Args:
        model: its dynamically quantized layers keep one scale and one zero a row.

    >>> weight_bytes(nn.Linear(3, 2))  # 6 weights and 2 biases of 4 bytes
    32
    >>> weight_bytes(int8(nn.Sequential(nn.Linear(3, 2)).eval()))  # 6 + 2 · 16 + 2 · 4
    46
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight, bias = module.weight(), module.bias()
            total += weight.int_repr().nbytes + weight.q_per_channel_scales().nbytes
            total += weight.q_per_channel_zero_points().nbytes
            total += 0 if bias is None else bias.nbytes
    return total


def score(bench: Bench, method: str, speedup: float, form: str) -> Case:
    """Score a model that is not retrained in one format, or read the case.

    Args:
        bench: of the dense model, on a CPU.
        method: of `drone.lab.methods.METHODS`, or `dense`.
        speedup: the predicted one; 1 for the dense model.
        form: of `drone.lab.clocks.FORMATS`.

    Returns:
        The case: `dev` scores, `dev_logits`, `lost` against the dense float32 model,
        [points, low, high], `bytes` of the weights, `plan`, for the clock; of thin
        layers in int8 also `uneven`, points lost without `unit_rows`.

    Raises:
        ValueError: no such format; or what `drone.quantize.int8` raises.

    >>> score(None, "dense", 1.0, "int4")  # said before the bench is looked at
    Traceback (most recent call last):
    ValueError: no format 'int4'; there are float32, int8.
    """
    if form not in FORMATS:
        raise ValueError(f"no format {form!r}; there are {', '.join(FORMATS)}.")
    dense = method == DENSE
    plan = {} if dense else bench.ranks(method, speedup).result
    settings = bench.on_dense() | {"method": method, "speedup": speedup}
    settings |= {"plan": plan_digest(plan), "format": form, "draws": DRAWS}

    def measure(_: Mapping[str, Any]) -> dict[str, Any]:
        model = bench.model if dense else bench.compressed(method, speedup)
        made = FORMATS[form](model)
        assert isinstance(made, PreTrainedModel)  # the model itself, or a copy
        found = bench.report(made)
        small, whole = (
            unpack(result["dev_logits"])[None].astype(np.float32)
            for result in (found, bench.dense().result)
        )
        lost = paired(bench.task, bench.dev_labels, small, whole, DRAWS)
        uneven = None
        if form == "int8" and "ranks" in plan:
            metric = next(iter(METRICS[bench.task]))
            bare: Any = int8(as_linears(model))  # factors as they came
            plain = bench.report(bare)
            uneven = bench.dense().result["dev"][metric] - plain["dev"][metric]
        shape = {key: plan[key] for key in ("ranks", "layers") if key in plan}
        return found | {
            "lost": [lost.value, lost.low, lost.high],
            "uneven": uneven,
            "bytes": weight_bytes(made),
            "plan": shape | {"format": form},
        }

    return run_case(bench.store, "formats", settings, measure)


@dataclass(frozen=True)
class Served:
    """One model in one format, as a user meets it.

    Attributes:
        method: of `drone.lab.methods.METHODS`, or `dense`.
        speedup: predicted, in float32.
        form: of `drone.lab.clocks.FORMATS`.
        lost: points, against dense float32, with 95 % over rows.
        uneven: points lost by thin layers in int8 whose factors are left as they came;
            None: of any other model.
        megabytes: of its weights, 10⁶ bytes.
        faster: {threads: measured speed-up over dense float32}.
    """

    method: str
    speedup: float
    form: str
    lost: Estimate
    uneven: float | None
    megabytes: float
    faster: dict[int, Estimate]


def name_of(case: Case) -> str:
    """What the clock calls a case's shape.

    >>> from drone.lab.cases import keep_case
    >>> which = {"encoder": "minilm", "task": "cola", "method": "drone-latency"}
    >>> told = which | {"speedup": 2.0, "format": "int8"}
    >>> name_of(keep_case(Path("cases"), "formats", told, {}, 1.0))
    'drone-latency 2.0 int8'
    """
    return "{method} {speedup} {format}".format(**case.settings)


def _scored(store: Path, encoder: str, task: str) -> dict[str, Case]:
    """All scored models of an encoder on a task, by the clock's names.

    Raises:
        ValueError: two cases of one name, such as of two seeds: none may win unseen.
    """
    found: dict[str, Case] = {}
    for case in read_cases(store, "formats"):
        if (case.settings["encoder"], case.settings["task"]) == (encoder, task):
            other = found.setdefault(name_of(case), case)
            if other is not case:
                raise ValueError(
                    f"{case.path} and {other.path}: {name_of(case)} twice; keep one."
                )
    return found


def _timed(store: Path, encoder: str, cases: Mapping[str, Case]) -> list[Case]:
    """All clocks that timed these models together, one a number of threads.

    Raises:
        ValueError: they were timed twice, on other batches or another processor.
    """
    plans = {name: case.result["plan"] for name, case in cases.items()}
    clocks = [
        clock
        for clock in read_cases(store, "clocks")
        if clock.settings["encoder"] == encoder
        and plans.items() <= clock.settings["plans"].items()
    ]
    alike = {tuple(each.settings[name] for name in CLOCK) for each in clocks}
    threads = {each.settings["threads"] for each in clocks}
    if len(alike) > 1 or len(threads) < len(clocks):
        raise ValueError(
            f"{', '.join(str(each.path) for each in clocks)}: the same models timed in "
            f"more than one way; one of each number of threads, with the same "
            f"{', '.join(CLOCK)}, is needed."
        )
    return clocks


def served(store: Path, encoder: str, task: str) -> list[Served]:
    """Read what is finished: scores, and the clocks that timed all of them together.

    Args:
        store: folder of cases.
        encoder: of `drone.lab.encoders.ENCODERS`.
        task: of `drone.lab.data.TASKS`.

    Returns:
        The dense model first, then by method and speed, each in every format.

    Raises:
        ValueError: a case is damaged, or no clock timed these models.

    >>> from drone.lab.cases import keep_case
    >>> store, form = Path("cases"), {"format": "int8"}
    >>> which = {"encoder": "minilm", "task": "rte", "method": "dense", "speedup": 1.0}
    >>> scored = {"lost": [0.7, 0.1, 1.3], "uneven": None, "bytes": 2e6, "plan": form}
    >>> _ = keep_case(store, "formats", which | form, scored, 1.0)
    >>> timed = {"encoder": "minilm", "plans": {"dense 1.0 int8": form}, "threads": 2}
    >>> ratio = {"speedups": {"dense 1.0 int8": [1.9, 1.8, 2.0]}}
    >>> _ = keep_case(store, "clocks", timed | dict.fromkeys(CLOCK), ratio, 1.0)
    >>> [(one.form, one.megabytes, one.faster[2].value)
    ...     for one in served(store, "minilm", "rte")]
    [('int8', 2.0, 1.9)]
    """
    cases = _scored(store, encoder, task)
    timed = _timed(store, encoder, cases)
    if not cases or not timed:
        raise ValueError(
            f"{store}: {len(cases)} models of {encoder} on {task}, and no clock that "
            "timed them all; `python -m drone.lab.formats --help` says how."
        )
    order = sorted(
        cases,
        key=lambda n: (
            cases[n].settings["method"] != DENSE,
            cases[n].settings["method"],
            cases[n].settings["speedup"],
            list(FORMATS).index(cases[n].settings["format"]),
        ),
    )
    return [
        Served(
            cases[name].settings["method"],
            cases[name].settings["speedup"],
            cases[name].settings["format"],
            Estimate(*cases[name].result["lost"]),
            cases[name].result["uneven"],
            cases[name].result["bytes"] / 1e6,
            {
                each.settings["threads"]: Estimate(*each.result["speedups"][name])
                for each in timed
            },
        )
        for name in order
    ]


def record(store: Path, encoder: str, task: str) -> dict[str, Any]:
    """Collect what a page needs, as JSON.

    Args:
        store: folder of cases.
        encoder: of `drone.lab.encoders.ENCODERS`.
        task: of `drone.lab.data.TASKS`.

    Returns:
        `encoder`, `task`, `metric`, `score` of the dense model in points, `rows` it
        was taken over, `clock`: the settings of the clocks, and `models`, each a
        `Served` as a dict.

    Raises:
        ValueError: as `served`.

    >>> from drone.lab.cases import keep_case, pack
    >>> store, form = Path("cases"), {"format": "float32"}
    >>> which = {"encoder": "minilm", "task": "sst2", "method": "dense", "speedup": 1.0}
    >>> scored = {"lost": [0.0, 0.0, 0.0], "uneven": None, "bytes": 8e6, "plan": form}
    >>> scored |= {"dev": {"accuracy": 91.5}, "dev_logits": pack(np.zeros((872, 2)))}
    >>> _ = keep_case(store, "formats", which | form, scored, 1.0)
    >>> name = "dense 1.0 float32"
    >>> timed = {"encoder": "minilm", "plans": {name: form}, "threads": 1}
    >>> ratio = {"speedups": {name: [1.0, 1.0, 1.0]}}
    >>> _ = keep_case(store, "clocks", timed | dict.fromkeys(CLOCK, 8), ratio, 1.0)
    >>> told = record(store, "minilm", "sst2")
    >>> told["metric"], told["score"], told["rows"], told["clock"]["batch"]
    ('accuracy', 91.5, 872, 8)
    """
    models = served(store, encoder, task)
    cases = _scored(store, encoder, task)
    dense = cases[f"{DENSE} 1.0 float32"].result
    metric = next(iter(METRICS[task]))
    clocks = _timed(store, encoder, cases)
    return {
        "encoder": encoder,
        "task": task,
        "metric": metric,
        "score": dense["dev"][metric],
        "rows": len(unpack(dense["dev_logits"])),
        "clock": {name: clocks[0].settings[name] for name in CLOCK},
        "models": [asdict(each) for each in models],
    }


def read(path: Path) -> tuple[dict[str, Any], list[Served]]:
    """Read what `record` collected: all but the models, and the models.

    >>> faster = {1: Estimate(3.1, 3.0, 3.2)}
    >>> one = Served("dense", 1.0, "int8", Estimate(1.5, 0.5, 2.5), None, 22.8, faster)
    >>> path = Path("served.json")
    >>> _ = path.write_text(json.dumps({"task": "rte", "models": [asdict(one)]}))
    >>> read(path) == ({"task": "rte"}, [one])
    True
    """
    told = json.loads(path.read_text(encoding="utf-8"))
    models = [
        Served(
            **each
            | {
                "lost": Estimate(**each["lost"]),
                "faster": {int(n): Estimate(**x) for n, x in each["faster"].items()},
            }
        )
        for each in told.pop("models")
    ]
    return told, models


def main(arguments: Sequence[str] | None = None) -> None:
    """Time all scored models of an encoder and task, and write what chapter 9 reads."""
    parser = argparse.ArgumentParser(
        prog="python -m drone.lab.formats", description=main.__doc__
    )
    parser.add_argument("--store", type=Path, required=True, help="folder of cases")
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--source", default="embedded", help="of the encoder")
    parser.add_argument("--task", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, required=True, help="tokens of each row")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="JSON that is written")
    asked = parser.parse_args(arguments)
    cases = _scored(asked.store, asked.encoder, asked.task)
    if not cases:
        parser.error(f"no models of {asked.encoder} on {asked.task} in {asked.store}.")
    for threads in asked.threads:
        case = clock(
            asked.store,
            asked.encoder,
            asked.source,
            {name: case.result["plan"] for name, case in cases.items()},
            batch=asked.batch,
            length=asked.length,
            threads=threads,
            rounds=asked.rounds,
        )
        for name, (ratio, low, high) in case.result["speedups"].items():
            print(
                f"{threads} {name:28} {ratio:.2f}x ({low:.2f}-{high:.2f})", flush=True
            )
    text = json.dumps(record(asked.store, asked.encoder, asked.task), indent=1)
    with whole_file(asked.out) as temporary:
        temporary.write_text(text + "\n")


if __name__ == "__main__":
    main()
