"""Make what a bare machine without a network needs beside the repository itself.

    python book/remote/make_bundle.py runs/remote --data DATA --model MODEL_FOLDER

FOLDER/base/       wheels that are missing there, and the corpora, as one archive
FOLDER/weights-0/  a part of the encoder's weights, rounded to float16; -1, -2, ...

Each of these folders is small enough for one transfer. `run_there.py setup` unpacks
them over there; the manifest carries the SHA-256 of everything.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PART = 46_000_000  # bytes of a part
# What a machine with PyTorch and transformers still lacks (seen on one).
WHEELS = ("datasets", "dill", "multiprocess", "xxhash")
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheels(folder: Path, python: str) -> None:
    """Download the wheels of the versions that are installed here."""
    from importlib.metadata import version

    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python]
    command += ["--implementation", "cp", "-d", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *(f"{n}=={version(n)}" for n in WHEELS)], check=True)


def pack_data(source: Path, archive: Path) -> None:
    """Pack the corpora: `ptb/` and `glue/`."""
    with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
        for name in ("ptb", "glue"):
            tar.add(source / name, name)


def round_weights(model: Path, folder: Path) -> Path:
    """Copy a model's folder with its weights in float16; return the weights' path."""
    import torch
    from safetensors.torch import load_file, save_file

    for file in model.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt"):
            shutil.copy(file, folder / file.name)
    rounded = {
        name: weight.half() if weight.dtype == torch.float32 else weight
        for name, weight in load_file(model / "model.safetensors").items()
    }
    save_file(rounded, folder / "model.f16.safetensors", {"format": "pt"})
    return folder / "model.f16.safetensors"


def cut(path: Path, folder: Path) -> int:
    """Cut a file into folders `weights-N` with one part each; return how many."""
    number = 0
    with path.open("rb") as file:
        while data := file.read(PART):
            part = folder / f"weights-{number}"
            part.mkdir()
            (part / f"part-{number:02d}").write_bytes(data)
            number += 1
    path.unlink()
    return number


def main() -> None:
    """Make the bundle anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a folder with model.safetensors")
    parser.add_argument("--python", default="3.12", help="the version over there")
    asked = parser.parse_args()
    if asked.folder.exists():
        raise SystemExit(f"{asked.folder} exists already; delete it to make it anew.")
    base = asked.folder / "base"
    (base / "wheels").mkdir(parents=True)
    fetch_wheels(base / "wheels", asked.python)
    pack_data(asked.data, base / "data.tar.gz")
    manifest: dict[str, object] = {}
    if asked.model:
        (base / "model").mkdir()
        weights = round_weights(asked.model, base / "model")
        manifest["model"] = asked.model.name
        manifest["weights"] = sha256(weights)
        manifest["parts"] = cut(weights, asked.folder)
    manifest["files"] = {
        str(file.relative_to(asked.folder)): sha256(file)
        for file in sorted(asked.folder.rglob("*"))
        if file.is_file()
    }
    (base / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for part in sorted(asked.folder.iterdir()):
        size = sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
        print(f"{size / 1e6:6.1f} MB  {part}")


if __name__ == "__main__":
    main()
