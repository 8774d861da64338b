"""What works with each family of models, and the page that says so."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import drone

SPEC = importlib.util.spec_from_file_location(
    "families", Path(__file__).with_name("families.py")
)
assert SPEC is not None and SPEC.loader is not None
families = importlib.util.module_from_spec(SPEC)
sys.modules["families"] = families
SPEC.loader.exec_module(families)

ALONE = "is no Hugging Face model; save its state_dict"
# What does not work: {family: {check, or "all": what the one clear error says}}.
LIMITS = {
    "SqueezeBERT": {"all": "no list of layers with a Linear in it; name the modules"},
    "FNet": {"masks": families.PADS_MATTER},
    "Nyströmformer": {"masks": families.PADS_MATTER},
    "ConvBERT": {"masks": families.PADS_MATTER},
    "nn.Sequential": {"saved": ALONE},
    "nn.TransformerEncoder": {"saved": ALONE},
    "nn.LSTM and a Linear": {"saved": ALONE},
}


def test_there_are_many_families_of_every_kind() -> None:
    assert len(families.FAMILIES) >= 45
    assert {f.kind for f in families.FAMILIES} == set(families.KINDS)
    assert set(LIMITS) <= {f.name for f in families.FAMILIES}


@pytest.mark.parametrize(
    "index", range(len(families.FAMILIES)), ids=[f.name for f in families.FAMILIES]
)
def test_every_check_holds_or_gives_the_one_error_that_is_known(index: int) -> None:
    found = families.outcome(index)
    limits = LIMITS.get(found.name, {})
    for check in families.CHECKS:
        said = getattr(found, check)
        expected = limits.get(check, limits.get("all"))
        if expected is None:
            assert families._good(said), f"{check}: {said}"
        else:
            assert expected in said, f"{check}: {said}"
    assert (found.modules > 0) is ("all" not in limits)


def test_the_page_says_what_came_of_it() -> None:
    expected = families.page(families.outcomes())
    assert families.PAGE.read_text(encoding="utf-8") == expected, "make models"


def test_a_new_process_loads_them_bit_equal(tmp_path: Path) -> None:
    wanted = ("BERT", "ModernBERT", "GPT-2", "T5", "ViT", "CLIP")
    expected = {}
    for family in families.FAMILIES:
        if family.name not in wanted:
            continue
        with families.seeded(family.name):
            model, batch = family.build(), family.collate(family.rows())
            names = families.named(family, model)
            small = drone.compress(model, families.ranks_of(model, names))
        drone.save(small, tmp_path / family.name)
        with torch.no_grad():
            expected[family.name] = batch, families.first_tensor(small(**batch))
    torch.save(expected, tmp_path / "expected.pt")
    code = (
        "import sys, torch, drone\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[1])\n"
        "for name, (batch, want) in torch.load(folder / 'expected.pt').items():\n"
        "    with torch.no_grad():\n"
        "        output = drone.load(folder / name)(**batch)\n"
        "    tensors = [v for v in output.values() if hasattr(v, 'ndim') and v.ndim]\n"
        "    assert torch.equal(tensors[0], want), name\n"
        "    print(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(wanted)
