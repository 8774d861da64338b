"""Measure what the figure on the page *Explore* shows: each layer at many ranks.

    DRONE_DATA=/path/to/data python -m book.explore   # writes RECORDS

MiniLM as it comes, calibrated on some rows of MRPC; errors are those on other rows.
"""

from pathlib import Path

import torch
from torch import nn

import drone
from drone.lab import batches, data, encoders, records
from drone.lab.names import module_kind

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "book" / "results" / "explore-minilm.jsonl"
TASK, ROWS, STEP = "mrpc", 256, 8


def lost(factors: drone.Factorization, fresh: torch.Tensor) -> torch.Tensor:
    """‖(W − U_k U_kᵀ W)X‖ / ‖WX‖ for k = 0..r, from the moment C (in, in) of X."""
    kept = (factors.right @ fresh * factors.right).sum(1)  # diagonal of UᵀWC(UᵀW)ᵀ
    rest = (kept.sum() - kept.cumsum(0)).clamp_min(0) / kept.sum()
    return torch.cat([torch.ones(1), rest.sqrt()])  # (r + 1,)


def measured(
    linear: nn.Linear, seen: drone.SecondMoment, fresh: drone.SecondMoment
) -> dict[str, object]:
    """One layer: its size, its spectrum, and both methods' errors on fresh tokens."""
    weight = linear.weight.detach().double()  # (out, in)
    svd, aware = drone.factorize(weight), drone.factorize(weight, seen)
    values = torch.linalg.svdvals(weight)
    ranks = list(range(0, len(values) + 1, STEP))
    curves = {
        "lost_svd": lost(svd, fresh.matrix),
        "lost_drone": lost(aware, fresh.matrix),
        "spectrum": torch.cat([values, torch.zeros(1)]) / values[0],
    }
    rounded = {
        name: [round(float(curve[k]), 4) for k in ranks]
        for name, curve in curves.items()
    }
    out_features, in_features = weight.shape
    return {"out": out_features, "in": in_features, "ranks": ranks, **rounded}


def main() -> None:
    """Measure all layers of MiniLM, write the records."""
    model, tokenizer = encoders.encoder("minilm", "embedded")
    train = data.load(TASK, "local", ["train"])["train"]
    text = batches.tokenize(data.sample(train, ROWS, 0), tokenizer, TASK)
    seen, fresh = (
        drone.calibrate(model, batches.batches(text.select(half), tokenizer))
        for half in (range(ROWS // 2), range(ROWS // 2, ROWS))
    )
    found = []
    for name, linear in drone.encoder_linears(model).items():
        number = next(int(part) for part in name.split(".") if part.isdecimal())
        what = {"layer": number + 1, "kind": module_kind(name)}
        tokens = {"tokens": seen[name].count, "task": TASK, "encoder": "minilm"}
        found.append(what | tokens | measured(linear, seen[name], fresh[name]))
    records.save(RECORDS, found)
    print(f"written: {RECORDS.relative_to(ROOT)}, {len(found)} layers")


if __name__ == "__main__":
    main()
