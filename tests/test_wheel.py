"""The wheel without extras: it calibrates, compresses, saves and loads by itself."""

import shutil
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

USE = """
import sys
import torch
from transformers import BertConfig, BertForSequenceClassification
import drone

torch.manual_seed(0)
sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=32, max_position_embeddings=20)
model = BertForSequenceClassification(BertConfig(**sizes)).eval()
ids = torch.randint(1, 50, (8, 10))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
moments = drone.calibrate(model, [batch])
small = drone.compress(model, dict.fromkeys(moments, 4), moments)
drone.save(small, "small")
again = drone.load("small")
assert torch.equal(again(**batch).logits, small(**batch).logits)
labels = torch.arange(8) % 2
plan = drone.search_ranks(model, [{**batch, "labels": labels}], budget=0.5)
assert plan.apply(model)(**batch).logits.shape == (8, 2)
drone.report(small)
assert not any(name.startswith("drone.lab") for name in sys.modules)
try:
    drone.lab.figures.show
except ImportError as error:
    print("lab:", error)
print("where:", drone.__file__)
"""


def needed(name: str, seen: set[str]) -> None:
    """Collect a package and all it needs without extras, as pip would."""
    if name in seen:
        return
    try:
        requirements = distribution(name).requires or []
    except PackageNotFoundError:  # of another platform
        return
    seen.add(name)
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, seen)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # pip builds it in an environment of its own, as for anyone who installs it
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            folder,
            ".",
        ],
        cwd=ROOT,
        check=True,
    )
    (found,) = folder.glob("drone-*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and, by links, what it needs and no more."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
         "--target", site, wheel],
        check=True,
    )  # fmt: skip
    closure: set[str] = set()
    for text in distribution("drone").requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, closure)
    for name in closure:
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top in ("..", "__pycache__") or (site / top).exists():
                continue
            (site / top).symlink_to(Path(distribution(name).locate_file(top)))
    return folder / "bin" / "python"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_a_plain_install_compresses_saves_and_loads(
    python: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [python, "-c", USE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout.split("where:")[1]  # not this checkout
    # what the lab needs is said by name, with how to get it
    assert "the extra `lab` brings it" in done.stdout
    shutil.rmtree(tmp_path / "small")


def test_the_wheel_holds_the_rooms_and_no_notebook(wheel: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True
    ).stdout
    for room in ("math", "layers", "model", "search", "lab"):
        assert f"drone/{room}/__init__.py" in listed
    assert "py.typed" in listed
    assert "notebooks" not in listed and "tests" not in listed
