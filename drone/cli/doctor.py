"""What a bug report pastes: versions, processor, threads, no secrets."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from drone.timing import processor

PACKAGES = ("drone", "torch", "transformers", "tokenizers", "safetensors", "numpy")
SETTINGS = (
    "DRONE_DATA",
    "DRONE_MODELS",
    "DRONE_CACHE",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
)  # no other variable is looked at: some hold tokens


def without_home(text: str) -> str:
    """Write a path without the name of whoever's it is."""
    return text.replace(str(Path.home()), "~")


def diagnose() -> dict[str, str]:
    """Describe this machine, one fact a line."""
    facts = {"python": f"{platform.python_version()} ({sys.platform})"}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["system"] = f"{platform.system()} {platform.release()}"
    facts["processor"] = processor()
    facts["cores"] = str(os.cpu_count())
    facts["threads of torch"] = str(torch.get_num_threads())
    numbers = range(torch.cuda.device_count())
    gpus = [torch.cuda.get_device_name(number) for number in numbers]
    facts["GPU"] = ", ".join(gpus) or "none"
    if gpus:
        facts["CUDA"] = str(torch.version.cuda)
        facts["bfloat16 on the GPU"] = str(torch.cuda.is_bf16_supported())
    facts["bfloat16 in the processor"] = str(torch.cpu._is_avx512_bf16_supported())
    for name in SETTINGS:
        if name in os.environ:
            facts[name] = without_home(os.environ[name])
    return facts
