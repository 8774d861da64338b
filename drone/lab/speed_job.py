"""How much faster thin layers are on this device: BERT-base's shapes, and a decoder's.

    python -m drone.lab.speed_job --cases FOLDER

Times depend on shapes and not on weights, so these are random. Each setting is a case.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from drone.devices import placed
from drone.lab.cases import run_case
from drone.layers.linear import LowRankLinear
from drone.math.factorize import break_even_rank
from drone.model.calibrate import calibrate
from drone.search.costs import grid_ranks
from drone.timing import LatencyReport, time_calls

DTYPES = ("float32", "bfloat16", "float16")
BATCHES = (1, 8, 32, 128)
SHARES = (0.25, 0.5, 0.75)  # of break-even
LENGTH = 128
REPEATS = 30


def bert_base() -> PreTrainedModel:
    """Make BERT-base's shapes: 12 layers, hidden 768, inner 3072; random weights."""
    model = BertModel(BertConfig(), add_pooling_layer=False)
    model.eval()
    return model


def decoder() -> PreTrainedModel:
    """Make a decoder of 12 layers, hidden 768, 12 heads on 4 groups of keys."""
    config = LlamaConfig(
        vocab_size=10_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def thin(model: nn.Module, share: float) -> nn.Module:
    """Replace, in place, every Linear but the vocabulary's by random factors.

    Args:
        model: any; its dtype and device are kept.
        share: rank over break-even rank, rounded down to a multiple of 8.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            m, n = module.weight.shape
            rank = grid_ranks(break_even_rank(m, n), [share])[-1]
            left = torch.randn(m, rank).mul(rank**-0.5).to(module.weight)
            right = torch.randn(rank, n).mul(n**-0.5).to(module.weight)
            new = LowRankLinear(left, right, module.bias).eval()
            model.set_submodule(name, new)
    return model


def batch_of(settings: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Draw random words, no pads: ids and mask (batch, length)."""
    draw = torch.Generator().manual_seed(0)
    shape = (settings["batch"], settings["length"])
    ids = torch.randint(1000, 9000, shape, generator=draw).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def graphed(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Any]:
    """Record a pass once as a CUDA graph; a call then launches all kernels at once."""
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their kernels before the recording
                model(**batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(**batch)
    return graph.replay


def speedups(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Time calls in turns; the first is the dense one.

    Returns:
        {name: milliseconds (median), speedup over the first, its bounds}.
    """
    with torch.inference_mode():
        report = LatencyReport(time_calls(calls, REPEATS, warmup=5), {})
    found = {}
    for name in calls:
        ratio, low, high = report.speedup(name)
        found[name] = {
            "ms": 1000 * report.median(name),
            "speedup": ratio,
            "low": low,
            "high": high,
        }
    return found


def models_of(
    make: Callable[[], PreTrainedModel], settings: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """Make the dense model, and thin ones by their share, where they are timed."""
    torch.manual_seed(0)
    device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
    models: dict[str, nn.Module] = {"dense": placed(make(), device, dtype)}
    for share in settings["shares"]:
        models[f"{share:g}"] = thin(placed(make(), device, dtype), share)
    return models


def encoder_case(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time dense BERT-base beside thin ones, launched one by one and as a graph."""
    device = torch.device(settings["device"])
    batch, models = batch_of(settings, device), models_of(bert_base, settings)
    result = {"launched": speedups({n: partial(m, **batch) for n, m in models.items()})}
    if device.type == "cuda":
        graphs = {name: graphed(model, batch) for name, model in models.items()}
        result["graph"] = speedups(graphs)
    return result


def decoder_case(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time a decoder's reading of a prompt, and one word after it."""
    batch = batch_of(settings, torch.device(settings["device"]))
    models = models_of(decoder, settings)
    one = batch["input_ids"][:, -1:]

    def step(model: nn.Module, cache: DynamicCache) -> None:
        model(input_ids=one, past_key_values=cache)
        cache.crop(-1)  # the next call finds the cache as long as this one did

    words = {}
    with torch.inference_mode():
        for name, model in models.items():
            cache = DynamicCache()
            model(**batch, past_key_values=cache)
            words[name] = partial(step, model, cache)
    prompt = {n: partial(m, **batch, use_cache=False) for n, m in models.items()}
    return {"prompt": speedups(prompt), "word": speedups(words)}


def calibration_case(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Say what calibration costs, in forward passes of the same batch."""
    torch.manual_seed(0)
    device = torch.device(settings["device"])
    model, batch = placed(bert_base(), device), batch_of(settings, device)

    def forward() -> None:
        model(**batch)

    calls = {"forward": forward, "calibrate": lambda: calibrate(model, [batch])}
    with torch.inference_mode():
        times = time_calls(calls, settings["repeats"], warmup=2)
    median = {name: float(sorted(t)[len(t) // 2]) for name, t in times.items()}
    return {
        "forward_ms": 1000 * median["forward"],
        "calibrate_ms": 1000 * median["calibrate"],
        "passes": median["calibrate"] / median["forward"],
    }


def main() -> None:
    """Run every case that is not there yet, a line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = {"device": device, "length": LENGTH}
    todo: list[tuple[str, dict[str, Any], Callable[..., Any]]] = [
        ("speed-calibration", shared | {"batch": 32, "repeats": 5}, calibration_case)
    ]
    for batch in arguments.batches:
        for dtype in arguments.dtypes:
            settings = shared | {"batch": batch, "dtype": dtype, "shares": list(SHARES)}
            todo.append(("speed-encoder", settings, encoder_case))
            if batch in (1, 32) and dtype != "float16":
                todo.append(("speed-decoder", settings, decoder_case))
    for job, settings, function in todo:
        case = run_case(arguments.cases, job, settings, function)
        print(
            f"{time.strftime('%H:%M:%S')} {job} {settings} {case.seconds:.1f} s "
            f"{case.result}",
            flush=True,
        )


if __name__ == "__main__":
    main()
