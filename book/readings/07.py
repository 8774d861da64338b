"""What was noticed in chapter 7's records after its run; see `07.md`."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from drone.lab import parameters, readings, records

BOOK = Path(__file__).parents[1]
KEPT = BOOK / "results" / "07-cases"
METRICS = ["matthews", "pearson", "accuracy"]  # a task's first is one of these
NAMES = {
    "plain": "DRONE",
    "labels": "DRONE + retrain",
    "taught": "DRONE + teacher",
    "svd": "SVD",
    "svd_again": "SVD + retrain",
    "cut_labels": "fewer layers + retrain",
    "cut_taught": "fewer layers + teacher",
    "cut_whole": "fewer layers, whole recipe",
}
PAIRS = ["mrpc", "rte", "stsb"]  # tasks of two sentences a row


def values() -> dict[str, Any]:
    """Name → number for the passages of `07.md`."""
    page = nbformat.read(BOOK / "chapters" / "07-bert-on-glue.ipynb", 4)
    table = records.load(BOOK / "results" / "07-bert-on-glue.jsonl")
    table["points"] = table[METRICS].bfill(axis=1).iloc[:, 0]
    case = ["encoder", "task", "seed"]
    dense = table[table.method == "dense"].set_index(case).points
    table["lost"] = table.set_index(case).index.map(dense) - table.points
    tasks = table.groupby(["encoder", "method", "task"])  # seeds first
    tasks = tasks[["points", "lost", "speed-up", "multiply-adds"]].mean()
    plan = json.loads((KEPT / "mpnet-base-mrpc-0-0.2.json").read_text())["case"]
    return (
        _asked(table)
        | _losses(tasks)
        | _rivals(table, tasks)
        | _rte(page, tasks)
        | _spread(page, table)
        | _floor(plan["ranks"])
        | _travel()
        | _turned(page)
        | _paired()
    )


def _asked(table: pd.DataFrame) -> dict[str, int]:
    """Cases finished, and cases asked for."""
    jobs = parameters.load(BOOK / "params" / "07.yaml")["jobs"]
    asked = sum(len(job["seeds"]) * len(job.get("budgets", [0])) for job in jobs)
    return {"cases_done": int((table.method == "dense").sum()), "cases_asked": asked}


def _losses(tasks: pd.DataFrame) -> dict[str, float]:
    """Means over the tasks, and single tasks, of each kind of model."""
    found = {}
    for name, method in NAMES.items():
        small = tasks.loc["minilm", method]
        found[f"{name}_lost"] = small.lost.mean()
        found[f"{name}_speed"] = small["speed-up"].mean()
        for task in small.index:
            found[f"{name}_{task}"] = small.lost[task]
            found[f"{name}_{task}_score"] = small.points[task]
        large = tasks.loc["mpnet-base", method].loc["mrpc"]
        found[f"large_{name}_lost"] = large.lost
        found[f"large_{name}_score"] = large.points
        found[f"large_{name}_speed"] = large["speed-up"]
    adds = tasks.loc["minilm"]["multiply-adds"].groupby("method").mean()
    found["fewer_adds"] = 100 * (1 - adds["DRONE"] / adds["fewer layers + teacher"])
    speeds = tasks.loc["minilm", "DRONE"]["speed-up"]
    dense = tasks.loc["minilm", "dense"].points
    found["stsb_dense"] = dense["stsb"]
    return found | {"slowest": speeds.min(), "fastest": speeds.max()}


def _rivals(table: pd.DataFrame, tasks: pd.DataFrame) -> dict[str, float]:
    """What the better of two, and of three, rivals loses more; the rates chosen."""
    lost = tasks.loc["minilm"].lost.unstack("method")
    three = [name for name in lost if name.startswith("fewer layers")]
    judged = [name for name in three if not name.endswith("retrain")]
    rates = parameters.load(BOOK / "params" / "07.yaml")["again"]["learning_rates"]
    ours, rival = (
        table[table.method == f"{name} + teacher"].rate
        for name in ("DRONE", "fewer layers")
    )
    return {
        "cut_lost": lost[judged].min(axis=1).mean(),
        "lead": (lost[judged].min(axis=1) - lost["DRONE + teacher"]).mean(),
        "lead_of_three": (lost[three].min(axis=1) - lost["DRONE + teacher"]).mean(),
        "rival_at_top": int((rival == max(rates)).sum()),
        "ours_at_bottom": int((ours == min(rates)).sum()),
    }


def _rte(page: nbformat.NotebookNode, tasks: pd.DataFrame) -> dict[str, float]:
    """How far RTE's dense model is above the commonest label; means without RTE."""
    case = json.loads((KEPT / "minilm-rte-0-0.2.json").read_text())["case"]
    rows = len(case["logits"]["dense"])
    dense = tasks.loc["minilm", "dense"].points["rte"]
    commonest = readings.shown(page, "seeds", "rte")[-1]
    error = (commonest * (100 - commonest) / rows) ** 0.5
    rest = tasks.loc["minilm", "DRONE + teacher"].drop("rte")
    return {
        "rte_rows": rows,
        "rte_dense": dense,
        "rte_commonest": commonest,
        "rte_errors": (dense - commonest) / error,
        "rest_lost": rest.lost.mean(),
        "rest_speed": rest["speed-up"].mean(),
    }


def _spread(page: nbformat.NotebookNode, table: pd.DataFrame) -> dict[str, float]:
    """Intervals as the page shows them; CoLA's seeds beside its rows."""
    found = {}
    for name, row in {
        "taught": "lost,",
        "speed": "speed-up,",
        "lead": "... loses more,",
    }.items():
        for end in ("low", "high"):
            found[f"{name}_{end}"] = readings.shown(page, "9a180337", f"{row} {end}")[0]
    cola = table[(table.task == "cola") & (table.encoder == "minilm")]
    for name, method in NAMES.items():
        spans = readings.shown(page, "table-spread", method)
        # MiniLM's five tasks come first (MRPC, CoLA, RTE, STS-B, SST-2), then MPNet
        found[f"{name}_cola_low"], found[f"{name}_cola_high"] = spans[2:4]
        found[f"{name}_stsb_low"], found[f"{name}_stsb_high"] = spans[6:8]
        found[f"large_{name}_low"], found[f"large_{name}_high"] = spans[10:]
        seeds = cola[cola.method == method].lost
        found[f"{name}_cola_least"] = seeds.min()
        found[f"{name}_cola_most"] = seeds.max()
    return found


def _floor(ranks: dict[str, int]) -> dict[str, int]:
    """How many of MPNet's layers have every module at the smallest rank of its kind."""
    kinds: dict[str, dict[int, int]] = {}
    for module, rank in ranks.items():
        layer, _, kind = module.partition("layer.")[2].partition(".")
        kinds.setdefault(kind, {})[int(layer)] = rank
    least = {kind: min(layers.values()) for kind, layers in kinds.items()}
    at_floor = [
        layer
        for layer in range(12)
        if all(layers.get(layer) == least[kind] for kind, layers in kinds.items())
    ]
    if at_floor != list(range(at_floor[0], 12)):
        raise ValueError(f"not the last layers are at the floor: {at_floor}")
    return {
        "floor_layers": len(at_floor),
        "floor_value": least["attention.attn.v"],
        "floor_head": least["attention.attn"],
    }


def _travel() -> dict[str, float]:
    """What ranks and text of other tasks cost."""
    case = json.loads((KEPT / "travel" / "minilm.json").read_text())["case"]
    moved = pd.DataFrame(case["moved"]).set_index(["what", "from", "to"])
    text = moved.loc["text"].lost.reset_index()
    own, pair = text["from"] == text.to, text["from"].isin(PAIRS)
    to_pair = text.to.isin(PAIRS)
    lost, size = moved.lost, moved["size"]
    return {
        "own_pairs": text[own & to_pair].lost.mean(),
        "pairs_to_pairs": text[pair & ~own & to_pair].lost.mean(),
        "singles_to_pairs": text[~pair & to_pair].lost.mean(),
        "pairs_to_singles": text[pair & ~to_pair].lost.mean(),
        "cola_text": lost["text", "cola", "mrpc"],
        "cola_ranks": lost["ranks", "cola", "mrpc"],
        "mrpc_ranks": lost["ranks", "mrpc", "mrpc"],
        "cola_size": size["ranks", "cola", "mrpc"],
        "mrpc_size": size["ranks", "mrpc", "mrpc"],
        "rte_size": size["ranks", "rte", "mrpc"],
        "stsb_size": size["ranks", "stsb", "mrpc"],
        "stsb_ranks": lost["ranks", "stsb", "mrpc"],
        "own_singles_gain": -text[own & ~to_pair].lost.mean(),
        "cola_gain": -lost["text", "cola", "cola"],
    }


def _paired() -> dict[str, float]:
    """Differences of two models on the same rows, from `book/paired.py`."""
    kept = json.loads((BOOK / "results" / "07-paired.json").read_text())
    return {
        f"pair_{name}{end}": number
        for name, three in kept.items()
        for end, number in zip(("", "_low", "_high"), three, strict=True)
    }


def _turned(page: nbformat.NotebookNode) -> dict[str, float]:
    """Share of the rows that turned wrong in the least sure quarter: MRPC, and others.

    The columns are MiniLM's tasks (CoLA, MRPC, RTE, SST-2, STS-B), then MPNet on MRPC;
    STS-B has no classes.
    """
    rows = [
        "turned wrong",
        "of these in the least sure quarter",
        "turned, were shifts dealt at random",
        "... of these in that quarter",
    ]
    columns = {"mrpc": (1, 5), "others": (0, 2, 3)}
    found: dict[str, float] = {}
    for name, which in columns.items():
        turned, least, dealt, dealt_least = (
            sum(readings.shown(page, "wrong-quartiles", row)[i] for i in which)
            for row in rows
        )
        found[f"turned_{name}"] = int(turned)
        found[f"turned_{name}_least"] = int(least)
        found[f"unsure_{name}"] = 100 * least / turned
        found[f"dealt_{name}"] = 100 * dealt_least / dealt
    return found
