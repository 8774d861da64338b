"""A training runs once: keys of everything, a lock a key, whole checkpoints."""

import copy
import functools
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess as Process
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from drone.files import user_folder, whole_file
from drone.lab import cache, keys
from drone.lab.cache import cached_training, newest_whole, seal

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def bert(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**(SIZES | changes)))


# --- what a key holds --------------------------------------------------------------


def freeze(model: nn.Module) -> None:
    model.bert.encoder.requires_grad_(False)


def eager(model: nn.Module) -> None:
    model.config._attn_implementation = "eager"


def drop(model: nn.Module) -> None:
    model.dropout.p = 0.5  # in the module alone, not in the config


def heads(model: nn.Module) -> None:
    model.bert.encoder.layer[0].attention.self.num_attention_heads = 4


def buffer(model: nn.Module) -> None:
    model.bert.embeddings.position_ids += 1  # not in state_dict


def activation(model: nn.Module) -> None:
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()


def function(model: nn.Module) -> None:
    model.bert.encoder.activation = torch.tanh  # no module: known by its name


def other_function(model: nn.Module) -> None:
    model.bert.encoder.activation = torch.relu


def tie(model: nn.Module) -> None:
    layer = model.bert.encoder.layer[0].attention.self
    layer.key.weight = layer.query.weight


def loosen(model: nn.Module) -> None:
    layer = model.bert.encoder.layer[0].attention.self
    layer.key.weight = nn.Parameter(layer.query.weight.detach().clone())


def nudge(model: nn.Module) -> None:
    model.classifier.bias.data[0] = torch.nextafter(
        torch.tensor(0.0), torch.tensor(1.0)
    )


def test_of_model_tells_every_change_apart() -> None:
    plain = keys.of_model(bert())
    assert keys.of_model(bert()) == plain == json.loads(json.dumps(plain))
    found = [keys.digest(plain)]
    changes = (freeze, eager, drop, heads, buffer, activation, function)
    for change in (*changes, other_function, tie, loosen, nudge):
        model = bert()
        change(model)
        found.append(keys.digest(keys.of_model(model)))
    for kw in (
        {"hidden_dropout_prob": 0.5},
        {"hidden_act": "relu"},
        {"num_attention_heads": 4},
        {"problem_type": "multi_label_classification"},
        {"layer_norm_eps": 1e-3},
    ):
        found.append(keys.digest(keys.of_model(bert(**kw))))
    found.append(keys.digest(keys.of_model(bert().bfloat16())))
    found.append(keys.digest(keys.of_model(bert().bert)))
    assert len(set(found)) == len(found)


# Equal to Python, most of them, and other settings all the same.
leaves = st.sampled_from(
    [
        *(None, False, True, 0, 1, 0.0, -0.0, 1.0, 1 + 0j, "1", "True", "None", b"1"),
        *(np.int64(1), np.int32(1), np.float32(1), np.float64(1), np.bool_(True)),
        *(Path("1"), PurePosixPath("1"), torch.float16, "torch.float16", range(1)),
    ]
)
hashed = leaves | st.tuples(leaves)
values = st.recursive(
    leaves | st.frozensets(hashed, max_size=2),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(hashed, inner, max_size=2)
    ),
    max_leaves=4,
)


def spelt(value: Any) -> Any:
    """A value with the type of each of its parts: what tells one from another."""
    if isinstance(value, dict):
        parts: Any = [(spelt(k), spelt(v)) for k, v in value.items()]
    elif isinstance(value, frozenset):
        parts = sorted(map(spelt, value), key=repr)
    elif isinstance(value, list | tuple):
        parts = [spelt(each) for each in value]
    else:
        parts = str(value)
    return (type(value).__name__, parts)


def key_of(value: Any) -> str:
    module = nn.Identity()
    module.setting = value
    return str(keys.of_model(module)["modules"])


@given(values, values)
def test_two_settings_of_a_module_never_have_one_key(one: Any, other: Any) -> None:
    assert (key_of(one) == key_of(other)) is (spelt(one) == spelt(other))
    assert key_of(copy.deepcopy(one)) == key_of(one)


def test_settings_of_every_kind_are_told_apart() -> None:
    def times(by: float) -> Callable[[float], float]:
        return lambda x: by * x

    found = [
        *({"a": 1}, {"a": 2}, {1: "a"}, {"1": "a"}, [{"a": 1}], [{"a": 2}]),
        *({"a", "b"}, {"a", "c"}, Path("a"), Path("b"), np.int64(1), np.int64(2)),
        *(
            np.arange(5000),
            np.arange(5000) * (np.arange(5000) != 2500),
            np.ones((1, 2)),
        ),
        *(torch.ones(2), torch.zeros(2), times(1.0), times(2.0)),
        *(functools.partial(max, 1), functools.partial(max, 2)),
    ]
    assert len(set(map(key_of, found))) == len(found)
    path = Path("a/b")
    before = key_of(path)
    assert {hash(path), str(path), path.parts} and key_of(path) == before


def test_a_name_that_json_would_spell_as_another_is_refused() -> None:
    with pytest.raises(TypeError, match="the name 1 is of type int"):
        keys.digest({"labels": [{1: "yes"}]})
    with pytest.raises(TypeError, match="the name True is of type bool"):
        keys.of_rows([{True: "yes"}])


def test_mode_and_origin_of_a_model_do_not_matter(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "somewhere")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "somewhere")
    assert keys.of_model(again.train())["modules"] == keys.of_model(model)["modules"]
    config = keys.of_model(again)["config"]
    assert str(tmp_path) not in json.dumps(config)


def tokenizer(**changes: Any) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = changes.pop("words", ["[PAD]", "[UNK]", "a", "b"])
    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if changes.pop("lower", False):
        made.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **({"pad_token": "[PAD]", "unk_token": "[UNK]"} | changes),
    )


def test_of_tokenizer_tells_every_change_apart_but_not_what_a_call_left() -> None:
    plain = keys.of_tokenizer(tokenizer())
    called = tokenizer()
    called(["a b", "a"], truncation=True, max_length=1, padding="max_length")
    assert keys.of_tokenizer(called) == plain
    changes: list[dict[str, Any]] = [
        {"words": ["[PAD]", "[UNK]", "b", "a"]},
        {"words": ["[PAD]", "[UNK]"]},
        {"lower": True},
        {"padding_side": "left"},
        {"truncation_side": "left"},
        {"pad_token": "a"},
        {"model_max_length": 7},
    ]
    found = [keys.digest(keys.of_tokenizer(tokenizer(**change))) for change in changes]
    assert len({keys.digest(plain), *found}) == 1 + len(changes)


def test_rows_are_told_apart_by_order_names_and_values() -> None:
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    others = [rows[::-1], rows[:1], [{"a": 1, "c": "x"}, rows[1]], []]
    others.append([{"a": 1.0, "b": "x"}, rows[1]])
    assert len({keys.of_rows(each) for each in [rows, *others]}) == 6


def test_the_machine_is_part_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [keys.of_machine("transformers")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found.append(keys.of_machine("transformers"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found.append(keys.of_machine("transformers"))
    monkeypatch.setattr(keys, "version", lambda package: "0.0")
    found.append(keys.of_machine("transformers"))
    assert len({keys.digest(each) for each in found}) == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        keys.of_machine()


# --- one training ------------------------------------------------------------------


def step(model: nn.Linear, checkpoints: Path) -> Mapping[str, float]:
    with torch.no_grad():
        model.weight += torch.rand(())
    return {"seconds": 1.0}


def train(folder: Path, how: Callable[..., Any] = step, **inputs: Any) -> Any:
    torch.manual_seed(0)
    return cached_training("a test", nn.Linear(2, 2), inputs, how, folder)


def test_the_second_call_reads_the_very_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tmp_path, a=(1, 2))
    second = train(tmp_path, lambda *_: pytest.fail("trained again"), a=[1, 2])
    assert (first.cached, second.cached) == (False, True)
    assert torch.equal(first.model.weight, second.model.weight)
    assert first.record == second.record and first.key == second.key
    assert capsys.readouterr().out == f"cache hit: a test, key {first.key[:12]}\n"
    assert not train(tmp_path, a=[1, 3]).cached


def test_a_hit_needs_no_right_to_write(tmp_path: Path) -> None:
    train(tmp_path)
    for path in (tmp_path / ".locks").iterdir():
        path.unlink()
    (tmp_path / ".locks").rmdir()
    assert train(tmp_path).cached
    assert not (tmp_path / ".locks").exists()  # nothing was written


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_training_is_an_error_and_not_kept(
    tmp_path: Path, value: float
) -> None:
    def diverge(model: nn.Linear, checkpoints: Path) -> Mapping[str, float]:
        model.bias.data[1] = value
        return {"seconds": 1.0}

    for _ in range(2):
        with pytest.raises(ValueError, match="bias is not finite"):
            train(tmp_path, diverge)
    assert not train(tmp_path).cached


def test_checkpoints_left_beside_a_result_are_removed(tmp_path: Path) -> None:
    key = train(tmp_path).key
    left = tmp_path / f"{key[:20]}.checkpoints"
    (left / "checkpoint-1").mkdir(parents=True)
    assert train(tmp_path).cached and not left.exists()


# --- checkpoints -------------------------------------------------------------------


def checkpoint(folder: Path, number: int, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{number}"
    (path / "deep").mkdir(parents=True)
    (path / "weights").write_bytes(b"w" * 100)
    (path / "deep" / "state").write_bytes(b"s" * 100)
    if sealed:
        seal(path)
    return path


def truncate(path: Path) -> None:
    (path / "weights").write_bytes(b"w" * 50)


def lose(path: Path) -> None:
    (path / "deep" / "state").unlink()


def empty(path: Path) -> None:
    (path / "weights").write_bytes(b"")


def add(path: Path) -> None:
    (path / "more").write_bytes(b"x")


def unseal(path: Path) -> None:
    (path / cache.MANIFEST).unlink()


def spoil_seal(path: Path) -> None:
    (path / cache.MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", [truncate, lose, empty, add, unseal, spoil_seal])
def test_the_newest_whole_checkpoint_is_taken_and_broken_ones_removed(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    assert newest_whole(tmp_path) is None
    for number in (9, 100):  # by number, not by name
        checkpoint(tmp_path, number)
    broken = checkpoint(tmp_path, 200)
    damage(broken)
    (tmp_path / "tmp-checkpoint").mkdir()
    (tmp_path / "stray").touch()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-100"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-9", "checkpoint-100"}


# --- processes ---------------------------------------------------------------------

START = """
import os, signal, time
import torch
from torch import nn
from drone.lab.cache import cached_training, newest_whole, seal

def train(model, checkpoints):
    last = newest_whole(checkpoints)
    begin = 0 if last is None else int(last.name.split("-")[1])
    for epoch in range(begin + 1, 4):
        with (folder / "log").open("a") as log:
            log.write(f"{epoch}\\n")
        time.sleep(seconds)
        checkpoint = checkpoints / f"epoch-{epoch}"
        checkpoint.mkdir()
        (checkpoint / "weights").write_text(str(epoch))
        if how == f"cut-{epoch}":
            os.kill(os.getpid(), signal.SIGKILL)
        seal(checkpoint)
        if how == f"kill-{epoch}":
            os.kill(os.getpid(), signal.SIGKILL)
    with torch.no_grad():
        model.weight.fill_(3.0)
    return {"seconds": 0.0}

kept = cached_training("x", nn.Linear(1, 1, bias=False), {}, train, folder)
with said.open("a") as lines:
    lines.write(f"cached {kept.cached} {kept.model.weight.item()}\\n")
"""


def start(folder: Path, said: Path, seconds: float = 0.0, how: str = "go") -> Process:
    """Start a process, a fork of one that has loaded PyTorch."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["drone.lab.cache"])
    given = {"folder": folder, "said": said, "seconds": seconds, "how": how}
    process = server.Process(target=exec, args=(START, given))
    process.start()
    return process


def log(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "log").read_text().split()]


@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
def test_of_two_processes_one_trains_and_kills_cost_an_epoch(tmp_path: Path) -> None:
    """Killed after a whole checkpoint, then in the middle of one; then two at once."""
    kept, said = tmp_path / "kept", tmp_path / "said"
    kept.mkdir()
    for how in ("kill-1", "cut-2"):
        killed = start(kept, said, how=how)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
    assert log(kept) == [1, 2]
    both = [start(kept, said, 1.0), start(kept, said, 1.0)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert said.read_text().split("\n") == ["cached False 3.0", "cached True 3.0", ""]
    assert log(kept) == [1, 2, 2, 3]  # nobody did an epoch again but the cut one
    names = {path.name for path in kept.iterdir()} - {"log", ".locks"}
    assert len(names) == 1  # the result: no checkpoints, no partial folders


@pytest.mark.skipif(os.name != "posix", reason="asks for processes")
def test_what_a_dead_process_left_half_written_is_removed_and_no_more(
    tmp_path: Path,
) -> None:
    host = "".join(c if c.isalnum() or c == "_" else "_" for c in platform.node())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f".partial-{host}-{gone.pid}-abc"
    alive = tmp_path / f".partial-{host}-{os.getppid()}-abc"
    elsewhere = tmp_path / f".partial-another_host-{gone.pid}-abc"
    nameless = tmp_path / ".partial-abc"
    for folder in (dead, alive, elsewhere, nameless):
        folder.mkdir()
        (folder / "half").touch()
    with whole_file(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {alive.name, elsewhere.name, nameless.name, "file"}


# --- where it is kept --------------------------------------------------------------


def test_the_folder_of_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".cache" / "drone" / "fine-tuned" / "k"
    for blank in ("", "  "):
        monkeypatch.setenv("DRONE_CACHE", blank)
        assert cache.cache_folder(None, "k") == default
    monkeypatch.delenv("DRONE_CACHE")
    assert cache.cache_folder(None, "k") == default
    monkeypatch.setenv("DRONE_CACHE", "~/mine")
    assert cache.cache_folder(None, "k") == tmp_path / "mine" / "k"
    assert cache.cache_folder(tmp_path / "given", "k") == tmp_path / "given" / "k"


def test_without_a_home_the_variable_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(Path, "expanduser", lambda path: path)
    monkeypatch.delenv("DRONE_CACHE", raising=False)
    with pytest.raises(RuntimeError, match="set DRONE_CACHE to a folder"):
        user_folder("DRONE_CACHE", "x")
    monkeypatch.setenv("DRONE_CACHE", str(tmp_path))
    assert user_folder("DRONE_CACHE", "x") == tmp_path


def test_no_home_does_not_break_an_import() -> None:
    """A user id without an entry and no HOME: Path.home() raises."""
    code = (
        "from pathlib import Path\n"
        "def none(*_): raise RuntimeError('no home')\n"
        "Path.home = none\n"
        "import drone.lab.cache, drone.lab.encoders, drone.lab.language"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DRONE")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": "/nowhere"}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert time.perf_counter() - started < 300
