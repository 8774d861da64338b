"""The command, as a new user runs it: a folder and a CSV in, a smaller folder out."""

import csv
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    RobertaConfig,
    RobertaModel,
)
from typer.testing import CliRunner

import drone
from drone.cli import app as commands
from drone.cli import main
from drone.cli.doctor import diagnose, without_home
from drone.cli.folder import check_fit
from drone.cli.rows import label_ids, make_batches, read_rows, split
from drone.cli.score import interval, score

WORDS = ["good", "fine", "kind", "bad", "poor", "mean", "a", "the", "film", "book"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of good and bad words, whose head knows them, and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tuned"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    made = BertTokenizerFast(str(path / "vocab.txt"), model_max_length=32)
    made.save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
        label2id={"no": 0, "yes": 1},
        id2label={0: "no", 1: "yes"},
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    draw = random.Random(1)
    tokenizer = BertTokenizerFast.from_pretrained(path)
    for _ in range(40):
        texts, labels = zip(*(example(draw) for _ in range(32)), strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        ids = torch.tensor([config.label2id[label] for label in labels])
        model(**batch, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(path)
    return path


def example(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(WORDS[:6])
    rest = [draw.choice(WORDS[6:]) for _ in range(draw.randint(2, 8))]
    return " ".join([*rest, word]), "yes" if word in WORDS[:3] else "no"


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw = random.Random(0)
    pairs = [example(draw) for _ in range(120)]
    return write(tmp_path / "rows.csv", [{"text": t, "label": n} for t, n in pairs])


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(commands.app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_a_folder_and_rows_give_a_smaller_folder_with_all_it_needs(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    code, said = run("compress", folder, "--data", data, "--keep", 0.6, "--out", out)
    assert code == 0, said
    small = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = BertTokenizerFast.from_pretrained(out)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    # What the card says of the held rows is what the saved model does on them.
    rows = read_rows(data, ["text"], "label")
    searched, held = split(rows, 512, 0)
    assert not {r.texts for r in searched} & {r.texts for r in held}
    right = 0
    for row in held:
        with torch.inference_mode():
            logits = small(**tokenizer(*row.texts, return_tensors="pt")).logits
        right += int(logits.argmax()) == {"no": 0, "yes": 1}[row.label]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"→ {right / len(held):.1%}" in card and f"→ {right / len(held):.1%}" in said
    assert f"{len(searched)} searched and {len(held)} held back" in card
    assert "tuned" in card and "from_pretrained" in card and "import drone" in card
    linears = drone.encoder_linears(
        AutoModelForSequenceClassification.from_pretrained(folder)
    )
    parts = [small.get_submodule(name) for name in linears]
    kept = sum(m.rank * (m.in_features + m.out_features) for m in parts)
    dense = sum(m.weight.numel() for m in linears.values())
    assert kept <= 0.6 * dense and f"{kept / dense:.1%} of their weights kept" in card
    code, said = run("bench", folder, out, "--data", data)
    assert code == 0 and "speed: " in said and "accuracy" in said, said
    code, said = run("report", out)
    assert code == 0 and "12 of 14 layers replaced; whole model" in said, said


def steady(calls: dict[str, object], repeats: int, **_: object) -> object:
    """Every rank a little slower than the one below, on any machine."""
    option = {n: int(n.split("/")[-2]) if "/" in n else 500 for n in calls}
    return {n: np.full(repeats, 0.002 * (1 + option[n])) for n in calls}


@pytest.mark.parametrize(
    "wish", [("--rank", 16), ("--loss-increase", 3), ("--speedup", 1.01)], ids=str
)
def test_the_other_wishes(
    folder: Path,
    data: Path,
    tmp_path: Path,
    wish: tuple[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a busy machine so small a model's clock may say that no rank is faster.
    monkeypatch.setattr("drone.search.costs.time_calls", steady)
    out = tmp_path / "small"
    how = [] if wish[0] == "--rank" else ["--method", "greedy"]
    code, said = run("compress", folder, "--data", data, *wish, "--out", out, *how)
    # So small a model need not get faster; then the code says so, and it is written.
    assert code == (1 if "missed: " in said else 0), said
    assert (out / "model.safetensors").is_file()
    assert ("missed: " in said) is (
        "missed: " in (out / "README.md").read_text("utf-8")
    )


def test_what_was_missed_is_a_code_of_its_own(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> drone.LatencyReport:
        times = {"dense": np.full(9, 1.0), "small": np.full(9, 0.99)}
        return drone.LatencyReport(times, {"batch": 1})

    monkeypatch.setattr(commands, "_clock", slow)
    monkeypatch.setattr("drone.search.costs.time_calls", steady)
    given = [
        "compress",
        folder,
        "--data",
        data,
        "--speedup",
        1.02,
        "--method",
        "uniform",
    ]
    code, said = run(*given, "--out", tmp_path / "small")
    assert code == 1 and "missed: a speed-up of 1.02 was asked for" in said, said
    assert (tmp_path / "small" / "README.md").is_file()


def test_a_dry_run_checks_and_writes_nothing(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    given = ["compress", folder, "--data", data, "--keep", 0.5, "--out", out]
    code, said = run(*given, "--dry-run")
    assert code == 0 and "no → 0, yes → 1" in said and not out.exists()
    assert "searched and" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--keep": None}, "give one of --speedup, --loss-increase, --keep, --rank; 0"),
        ({"--rank": 8}, "--rank; 2 were given"),
        ({"--keep": 1.5}, r"a share of 1.5; in (0, 1]"),
        ({"--keep": None, "--speedup": 0.5}, "speedup is 0.5; a finite number ≥ 1"),
        ({"--keep": None, "--speedup": 50}, "speed-up of 50 is wanted"),
        (
            {"--text": "sentence"},
            "rows.csv: no column 'sentence'; there are text",
        ),
        ({"--data": "missing.csv"}, "missing.csv"),
        ({"--out": "."}, "exists already"),
        ({"--out": None}, "give --out"),
        ({"--method": "magic"}, "no method 'magic'"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path,
    data: Path,
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
) -> None:
    options = {"--data": data, "--out": tmp_path / "small", "--keep": 0.5} | changes
    flat = [x for pair in options.items() if pair[1] is not None for x in pair]
    code, said = run("compress", folder, *flat)
    assert code == 2 and message in " ".join(said.split()), said
    assert "Traceback" not in said and not (tmp_path / "small").exists()


def test_a_folder_that_will_not_do_is_refused(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    given = ["--data", data, "--keep", 0.5, "--dry-run"]
    assert "no config.json" in run("compress", tmp_path, *given)[1]
    bare = tmp_path / "bare"
    BertModel.from_pretrained(folder).save_pretrained(bare)
    BertTokenizerFast.from_pretrained(folder).save_pretrained(bare)
    code, said = run("compress", bare, *given)
    assert code == 2 and "no weights for classifier" in said


def without_tokenizer(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


def with_half_the_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] //= 2
    (folder / "config.json").write_text(json.dumps(config))


def with_another_model(folder: Path, vocab_size: int) -> None:
    config = BertConfig.from_pretrained(folder, vocab_size=vocab_size)
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_tokenizer, "has 5 words and its model 15"),
        (with_half_the_layers, "no place for bert.encoder.layer.1.attention"),
        (lambda folder: with_another_model(folder, 7), "15 words and its model 7"),
        (lambda folder: with_another_model(folder, 12), "the model has 12 words"),
        (lambda folder: with_another_model(folder, 40), "15 words and its model 40"),
    ],
)
def test_a_folder_whose_parts_do_not_fit_is_refused(
    folder: Path,
    data: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    bad, out = tmp_path / "bad", tmp_path / "small"
    shutil.copytree(folder, bad)
    spoil(bad)
    code, said = run("compress", bad, "--data", data, "--rank", 4, "--out", out)
    assert code == 2 and message in " ".join(said.split()), said
    assert not out.exists()


def test_a_report_needs_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    without_tokenizer(bare)
    assert run("report", bare)[0] == 0


def test_rows_longer_than_the_models_positions_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    far, out = tmp_path / "far", tmp_path / "small"
    shutil.copytree(folder, far)
    BertTokenizerFast.from_pretrained(folder, model_max_length=9999).save_pretrained(
        far
    )
    table = [{"text": f"{'a ' * i} film", "label": "yes"} for i in range(60)]
    given = ["--data", write(tmp_path / "long.csv", table), "--rank", 4, "--out", out]
    code, said = run("compress", far, *given)
    assert code == 2 and "give --max-length 32" in " ".join(said.split()), said
    assert run("compress", far, *given, "--max-length", 32)[0] == 0
    assert run("compress", far, *given, "--max-length", 32)[0] == 2  # it is full now


def test_an_empty_folder_is_written_into(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    out.mkdir()
    code, said = run("compress", folder, "--data", data, "--rank", 4, "--out", out)
    assert code == 0 and (out / "model.safetensors").is_file(), said


def test_positions_that_a_table_leaves_out_are_not_counted() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    model = RobertaModel(RobertaConfig(max_position_embeddings=12, **sizes)).eval()
    ids = torch.full((1, 11), 5)
    check_fit(model, [{"input_ids": ids[:, :10]}])
    model(input_ids=ids[:, :10])
    with pytest.raises(ValueError, match="has 11 tokens, and the model has 10"):
        check_fit(model, [{"input_ids": ids}])


def test_a_fault_of_ours_is_no_missed_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise IndexError("out of range")

    monkeypatch.setattr(commands, "load_model", lambda _: broken())
    code, said = run("report", ".")
    assert code == 3 and "IndexError: out of range" in said


def test_without_onnx_the_export_says_how_to_get_it(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    out = tmp_path / "tuned.onnx"
    code, said = run("onnx", folder, "--data", data, "--out", out)
    assert code == 2 and "the extra `onnx`" in " ".join(said.split())
    assert not out.exists()


# --- rows ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\ngood,\n", r"rows.csv, row 2: 'label' is empty"),
        ("text,label\ngood,yes\n  ,yes\n", r"row 3: 'text' is empty"),
        ("text,label\ngood\n", r"row 2: 'label' is empty"),
        ("text,label\nwell, good,yes\n", r"row 2: more cells than the header's 2"),
        ("text,label\ngood,yes\n", "1 different rows; at least 24"),
        ("", "no column 'text'"),
        (b"text,label\ngood\xff,yes\n", "rows.csv: not UTF-8"),
        ('text,label\n"good,yes\n', "rows.csv: not a CSV file"),
    ],
    ids=str,
)
def test_rows_that_will_not_do_are_named(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_rows(path, ["text"], "label")


def rows_of(tmp_path: Path, labels: list[str], pair: bool = False) -> list[object]:
    table = [
        {"text": f"{'x' * (i % 7 + 1)} {i}", "other": f"o{i}", "label": n}
        for i, n in enumerate(labels)
    ]
    path = write(tmp_path / "made.csv", table)
    return read_rows(path, ["text", "other"] if pair else ["text"], "label")


def test_equal_rows_are_taken_once_and_no_text_is_on_both_sides(tmp_path: Path) -> None:
    table = [{"t": f"text {i % 30}", "label": str(i % 4 // 2)} for i in range(240)]
    # Some texts have one label, so that a cut at a third falls within a pair, too.
    table += [{"t": f"only {i}", "label": "0"} for i in range(15)]
    rows = read_rows(write(tmp_path / "r.csv", table), ["t"], "label")
    assert len({(r.texts, r.label) for r in rows}) == len(rows) == 75
    for seed in range(20):
        searched, held = split(rows, 1000, seed)
        assert not {r.texts for r in searched} & {r.texts for r in held}
        assert len(searched) + len(held) == 75 and len(held) in (25, 26)
    assert split(rows, 1000, 3) == split(rows, 1000, 3) != split(rows, 1000, 4)
    few, held = split(rows, 9, 3)
    assert len(few) == 9 and held == split(rows, 1000, 3)[1]


def test_labels_go_by_the_configs_names_then_numbers_then_the_alphabet(
    tmp_path: Path,
) -> None:
    where = tmp_path / "r.csv"
    rows = rows_of(tmp_path, ["yes", "no"] * 15)
    assert label_ids(rows, {"yes": 0, "no": 1}, where) == {"yes": 0, "no": 1}
    assert label_ids(rows, {"LABEL_0": 0, "LABEL_1": 1}, where) == {"no": 0, "yes": 1}
    with pytest.raises(ValueError, match=r"r.csv, row 2: the label 'yes' is none"):
        label_ids(rows, {"a": 0, "b": 1, "c": 2}, where)
    with pytest.raises(ValueError, match="'yes' is none"):  # half known: a slip
        label_ids(rows, {"no": 0, "Yes": 1}, where)
    rows = rows_of(tmp_path, ["1", "0", "1"] * 10)
    assert label_ids(rows, {"a": 0, "b": 1, "c": 2}, where) == {"0": 0, "1": 1}
    rows = rows_of(tmp_path, ["1", "3"] * 15)
    with pytest.raises(ValueError, match="the label '1' is none"):
        label_ids(rows, {"a": 0, "b": 1, "c": 2}, where)
    rows = rows_of(tmp_path, ["1.5", "3"] * 15)
    assert label_ids(rows, {"LABEL_0": 0}, where) == {"1.5": 1.5, "3": 3.0}
    rows = rows_of(tmp_path, ["1.5"] * 29 + ["many"])
    with pytest.raises(ValueError, match="row 31: the label 'many' is no number"):
        label_ids(rows, {"LABEL_0": 0}, where)


def test_batches_hold_every_row_once_with_its_label_and_pairs_as_pairs(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    rows = rows_of(tmp_path, [str(i % 2) for i in range(45)], pair=True)
    batches = make_batches(rows, tokenizer, {"0": 0, "1": 1}, 10, 16)
    assert [len(b["labels"]) for b in batches] == [10, 10, 10, 10, 5]
    assert sum(int(b["labels"].sum()) for b in batches) == 22
    assert batches[0]["token_type_ids"].max() == 1  # two segments
    assert max(b["input_ids"].shape[1] for b in batches) <= 16
    floats = make_batches(rows, tokenizer, {"0": 0.0, "1": 1.5}, 10, 16)
    assert floats[0]["labels"].dtype == torch.float


# --- scores ----------------------------------------------------------------------


def test_losses_of_rows_are_the_models_own(folder: Path, data: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    rows = read_rows(data, ["text"], "label")
    batches = make_batches(rows, tokenizer, {"no": 0, "yes": 1}, 7, 32)
    found = score(model, batches)
    with torch.inference_mode():
        means = [float(model(**b).loss) * len(b["labels"]) for b in batches]
    assert found.losses.mean() == pytest.approx(sum(means) / len(rows), rel=1e-5)
    assert found.right.mean() > 0.9  # it has learnt something


def test_an_interval_is_of_paired_rows() -> None:
    rng = np.random.default_rng(1)
    dense = rng.exponential(size=400) * 10
    value, low, high = interval(dense, dense * 1.1, ratio=True)
    assert value == pytest.approx(0.1) and high - low < 1e-9  # each row grows alike
    small = dense + rng.normal(0, 1, 400)
    value, low, high = interval(dense, small, ratio=False)
    assert value == pytest.approx((small - dense).mean())
    # 1.96 standard errors of a mean of 400 unpaired differences are 0.098.
    assert (high - low) / 2 == pytest.approx(0.098, rel=0.2) and low < value < high


# --- the rest --------------------------------------------------------------------


def test_doctor_says_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("DRONE_DATA", f"{Path.home()}/data")
    code, said = run("doctor")
    assert code == 0
    for part in (torch.__version__, "processor: ", "threads of torch: ", "GPU: "):
        assert part in said
    assert "hf_secret" not in said and str(Path.home()) not in said
    assert diagnose()["DRONE_DATA"] == without_home(f"{Path.home()}/data") == "~/data"


def test_without_typer_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "the extra `cli` brings" in capsys.readouterr().err


def test_the_card_of_a_search_names_its_method(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    given = ["--keep", 0.6, "--method", "greedy", "--out", out]
    code, said = run("compress", folder, "--data", data, *given)
    assert code == 0, said
    assert "by the method `greedy`" in (out / "README.md").read_text("utf-8")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ranks"]
