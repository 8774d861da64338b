"""Corpora: small files the tests write, a folder as hub, the embedded ones, real ones.

What a good file gives is stated here by hand, as the hub's `nyu-mll/glue` has it.
"""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Value, config
from hypothesis import given
from hypothesis import strategies as st

from drone.lab import agreement, data, known

REAL = os.environ.get("DRONE_DATA")

ENTAILMENT = ["entailment", "not_entailment"]
# name: (folder, text columns, label names), as on the hub
HUB_LOOK = {
    "cola": ("CoLA", ["sentence"], ["unacceptable", "acceptable"]),
    "sst2": ("SST-2", ["sentence"], ["negative", "positive"]),
    "mrpc": ("MRPC", ["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "stsb": ("STS-B", ["sentence1", "sentence2"], None),
    "qqp": ("QQP", ["question1", "question2"], ["not_duplicate", "duplicate"]),
    "mnli": (
        "MNLI",
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
    ),
    "qnli": ("QNLI", ["question", "sentence"], ENTAILMENT),
    "rte": ("RTE", ["sentence1", "sentence2"], ENTAILMENT),
}
MNLI = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse"]
MNLI += ["sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
FILLED = list("12gabcd")  # a cell for each of these columns but the first
MNLI += ["sentence1", "sentence2"]
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
# The files' classic layouts: the lines of a train.tsv of two rows, and the rows.
CLASSIC: dict[str, tuple[list[list[str]], list[tuple[object, ...]]]] = {
    "cola": (
        [["gj04", "1", "", "They left."], ["gj04", "0", "*", 'He "left her.']],
        [("They left.", 1), ('He "left her.', 0)],
    ),
    "sst2": (
        [["sentence", "label"], ["a ' good film ", "1"], ['" bad \u2028one', "0"]],
        [("a ' good film ", 1), ('" bad \u2028one', 0)],
    ),
    "mrpc": (
        [
            ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            ["1", "7", "8", 'He said " so .', "He said so ."],
            ["0", "9", "3", "A", 'B "'],
        ],
        [('He said " so .', "He said so .", 1), ("A", 'B "', 0)],
    ),
    "stsb": (
        [
            STSB.split(),
            ["0", "g", "f", "2012", "1", "none", "none", "A", "B", "5.000"],
            ["1", "g", "f", "2012", "2", "none", "none", "C", "D", "0.25"],
        ],
        [("A", "B", 5.0), ("C", "D", 0.25)],
    ),
    "qqp": (
        [
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            ["5", "1", "2", "Why?", "How?", "0"],
            ["6", "3", "4", "What?", "What now?", "1"],
        ],
        [("Why?", "How?", 0), ("What?", "What now?", 1)],
    ),
    "mnli": (
        [
            [*MNLI, "label1", "gold_label"],
            ["0", *FILLED, "P", "H", "neutral", "neutral"],
            ["1", *FILLED, "Q", "K", "contradiction", "contradiction"],
        ],
        [("P", "H", 1), ("Q", "K", 2)],
    ),
    "qnli": (
        [
            ["index", "question", "sentence", "label"],
            ["0", "Who?", "Me.", "entailment"],
            ["1", "When?", "Here.", "not_entailment"],
        ],
        [("Who?", "Me.", 0), ("When?", "Here.", 1)],
    ),
    "rte": (
        [
            ["index", "sentence1", "sentence2", "label"],
            ["0", "A", "B", "not_entailment"],
            ["1", "C", "D", "entailment"],
        ],
        [("A", "B", 1), ("C", "D", 0)],
    ),
}
WAYS = ["source='embedded'", "source='local'", "source='hub'"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRONE_DATA", str(tmp_path))
    return tmp_path


def write(root: Path, name: str, text: str, file: str = "train.tsv") -> Path:
    path = root / "glue" / HUB_LOOK[name][0] / file
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = bool(text.strip("\ufeff")) and not text.endswith("\n")
    path.write_bytes(text.encode() + b"\n" * ends)
    return path


def lines_of(name: str) -> list[str]:
    return ["\t".join(cells) for cells in CLASSIC[name][0]]


def train(name: str) -> Dataset:
    return data.load(name, "local", ["train"])["train"]


def assert_looks_as_on_the_hub(rows: Dataset, name: str) -> None:
    _, columns, labels = HUB_LOOK[name]
    label = Value("float32") if labels is None else ClassLabel(names=labels)
    text = {column: Value("string") for column in columns}
    assert dict(rows.features) == text | {"label": label, "idx": Value("int32")}


def assert_rows(rows: Dataset, name: str) -> None:
    expected = CLASSIC[name][1]
    _, columns, _ = HUB_LOOK[name]
    assert [tuple(r[c] for c in [*columns, "label"]) for r in rows] == expected
    assert rows["idx"][:] == [0, 1]


# --- good files ------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", CLASSIC)
def test_a_classic_file_is_read_as_the_hub_gives_it(
    root: Path, name: str, end: str, last: bool
) -> None:
    write(root, name, end.join(lines_of(name)) + end * last)
    rows = train(name)
    assert_looks_as_on_the_hub(rows, name)
    assert_rows(rows, name)


@pytest.mark.parametrize("name", [n for n in CLASSIC if n != "mnli"])
def test_splits_are_train_and_validation(root: Path, name: str) -> None:
    write(root, name, "\n".join(lines_of(name)))
    write(root, name, "\n".join(lines_of(name)[:-1]), "dev.tsv")
    found = data.load(name, "local")
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 2,
        "validation": 1,
    }
    assert data.TASKS[name].dev_split == "validation"


def test_mnli_has_two_validation_splits_and_more_columns_there(root: Path) -> None:
    write(root, "mnli", "\n".join(lines_of("mnli")))
    header = [*MNLI, *(f"label{i}" for i in range(1, 6)), "gold_label"]
    texts = [("P", "H", "entailment"), ("Q", "K", "neutral")]
    for file, (premise, hypothesis, gold) in zip(
        ["dev_matched.tsv", "dev_mismatched.tsv"], texts, strict=True
    ):
        row = ["0", *FILLED, premise, hypothesis, *["-"] * 5, gold]
        write(root, "mnli", "\t".join(header) + "\n" + "\t".join(row) + "\n", file)
    found = data.load("mnli", "local")
    assert list(found) == ["train", "validation_matched", "validation_mismatched"]
    assert found["validation_matched"][0]["label"] == 0
    assert found["validation_mismatched"][0]["premise"] == "Q"
    assert data.TASKS["mnli"].dev_split == "validation_matched"


def test_the_test_rows_of_mrpc_are_read_when_they_are_asked_for(root: Path) -> None:
    for file in ("train.tsv", "dev.tsv", "msr_paraphrase_test.txt"):
        write(root, "mrpc", "\n".join(lines_of("mrpc")), file)
    assert list(data.load("mrpc", "local")) == ["train", "validation"]
    rows = data.load("mrpc", "local", ["test"])["test"]
    assert_looks_as_on_the_hub(rows, "mrpc")
    assert_rows(rows, "mrpc")
    (root / "glue" / "MRPC" / "msr_paraphrase_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*msr_paraphrase_test\.txt"):
        data.load("mrpc", "local", ["test"])


def test_ptb_has_a_sentence_a_line_with_single_spaces(root: Path) -> None:
    (root / "ptb").mkdir()
    for split in ("train", "valid", "test"):
        text = f" no it was n't {split} \n <unk>  N \u2028 years\n"
        (root / "ptb" / f"ptb.{split}.txt").write_text(text, encoding="utf-8")
    found = data.load("ptb", "local")
    assert list(found) == ["train", "validation", "test"]
    assert found["validation"]["sentence"][:] == [
        "no it was n't valid",
        "<unk> N years",
    ]
    assert dict(found["train"].features) == {"sentence": Value("string")}


# --- malformed files -------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIC)
def test_a_row_with_a_column_too_many_is_refused_with_its_number(
    root: Path, name: str
) -> None:
    lines = lines_of(name)
    path = write(root, name, "\n".join([*lines[:-1], lines[-1] + "\tmore"]))
    with pytest.raises(ValueError, match=f"row {len(lines)}: .* columns") as error:
        train(name)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", CLASSIC)
def test_a_row_with_a_column_too_few_is_refused_with_its_number(
    root: Path, name: str
) -> None:
    lines = lines_of(name)
    short = lines[-1].rsplit("\t", 1)[0]
    write(root, name, "\n".join([*lines[:-1], short]))
    with pytest.raises(ValueError, match=f"row {len(lines)}: .* columns"):
        train(name)


def test_a_quote_does_not_join_two_rows(root: Path) -> None:
    write(root, "sst2", 'sentence\tlabel\n"one\t0\ntwo"\t1\n')
    assert train("sst2")["sentence"][:] == ['"one', 'two"']


@pytest.mark.parametrize("label", ["2", "-1", "", "1.0", "positive", " 1"])
def test_a_label_outside_the_set_is_refused(root: Path, label: str) -> None:
    write(root, "sst2", f"sentence\tlabel\ngood\t1\nbad\t{label}\n")
    with pytest.raises(ValueError, match=r"row 3: the label is .*; allowed are 0, 1"):
        train("sst2")


def test_a_number_is_no_label_of_a_task_that_writes_names(root: Path) -> None:
    lines = lines_of("rte")
    write(root, "rte", "\n".join([lines[0], lines[1].replace("not_entailment", "1")]))
    with pytest.raises(ValueError, match="allowed are entailment, not_entailment"):
        train("rte")


def test_rows_of_a_file_without_header_count_from_one(root: Path) -> None:
    write(root, "cola", "gj04\t7\t\tThey left.\n")
    with pytest.raises(ValueError, match="row 1: the label is '7'"):
        train("cola")


@pytest.mark.parametrize("score", ["5.5", "-0.1", "nan", "inf", "x", ""])
def test_a_score_that_is_no_number_from_0_to_5_is_refused(
    root: Path, score: str
) -> None:
    lines = lines_of("stsb")
    write(root, "stsb", "\n".join([*lines[:2], lines[2].replace("0.25", score)]))
    with pytest.raises(ValueError, match=r"row 3: the score is .* from 0 to 5"):
        train("stsb")


@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize("text", ["", "\ufeff"], ids=["nothing", "mark"])
def test_an_empty_file_is_refused(root: Path, name: str, text: str) -> None:
    path = write(root, name, text)
    with pytest.raises(ValueError, match="the file is empty") as error:
        train(name)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", [n for n in CLASSIC if n != "cola"])
def test_a_header_without_rows_is_refused(root: Path, name: str) -> None:
    write(root, name, lines_of(name)[0] + "\n")
    with pytest.raises(ValueError, match="a header and no rows"):
        train(name)


@pytest.mark.parametrize("name", [n for n in CLASSIC if n != "cola"])
def test_a_header_without_a_needed_column_is_refused_and_it_is_named(
    root: Path, name: str
) -> None:
    lines = lines_of(name)
    needed = {"mrpc": "#1 String", "mnli": "gold_label", "qqp": "question2"}
    column = needed.get(name, lines[0].split("\t")[-1])
    write(root, name, "\n".join([lines[0].replace(column, "other"), *lines[1:]]))
    with pytest.raises(ValueError, match=f"row 1: no column {column}"):
        train(name)


def test_bytes_that_are_not_utf8_are_refused_with_their_place(root: Path) -> None:
    path = write(root, "sst2", "")
    path.write_bytes(b"sentence\tlabel\n" + "café\t1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 at byte 18"):
        train("sst2")


@pytest.mark.parametrize("blank", ["", "   "])
def test_a_blank_ptb_line_is_refused_with_its_number(root: Path, blank: str) -> None:
    (root / "ptb").mkdir()
    (root / "ptb" / "ptb.train.txt").write_text(f"a b\n{blank}\nc d\n")
    with pytest.raises(ValueError, match="line 2: blank"):
        train("ptb")


# --- files cut off, and other vintages -------------------------------------------

CORPUS = [f"{i}\t1\t\tsentence {i}" for i in range(100)]


@pytest.fixture
def cola(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Dataset]:
    """Write CoLA's training file, of which 100 lines are known, and read it."""
    monkeypatch.setitem(known.KNOWN, "glue/CoLA/train.tsv", known.describe(CORPUS))
    path = write(root, "cola", "")

    def read(content: bytes) -> Dataset:
        path.write_bytes(content)
        return train("cola")

    return read


WHOLE = "\n".join(CORPUS).encode()


@pytest.mark.parametrize(
    "content",
    [WHOLE, WHOLE + b"\n", b"\xef\xbb\xbf" + WHOLE, WHOLE.replace(b"\n", b"\r\n")],
    ids=["no newline", "newline", "byte-order mark", "windows"],
)
def test_a_known_file_is_known_however_its_lines_end(
    cola: Callable[[bytes], Dataset], content: bytes
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cola(content)) == 100


@pytest.mark.parametrize("count", [2, 3, 15, 16, 17, 50, 64, 99])
@pytest.mark.parametrize("end", [b"\n", b"\n5\t1", b"\n5\t1\t\tsen"])
def test_a_known_file_that_is_cut_off_is_refused_wherever_it_ends(
    cola: Callable[[bytes], Dataset], count: int, end: bytes
) -> None:
    with pytest.raises(ValueError, match=r"cut off.*lines of 100") as error:
        cola("\n".join(CORPUS[:count]).encode() + end)
    assert "glue/CoLA/train.tsv" in str(error.value)


def test_another_vintage_is_read_with_a_warning_that_names_both_digests(
    cola: Callable[[bytes], Dataset],
) -> None:
    other = "\n".join(reversed(CORPUS)).encode() + b"\n"
    with pytest.warns(UserWarning, match="another vintage") as said:
        assert len(cola(other)) == 100
    mine, theirs = known.describe(CORPUS[::-1]), known.describe(CORPUS)
    assert mine.sha256 in str(said[0].message) and theirs.sha256 in str(said[0].message)
    with pytest.raises(ValueError, match="no newline at its end"):
        cola(other[:-1])


def test_fewer_rows_than_the_publisher_counts_are_warned_of(root: Path) -> None:
    write(root, "qnli", "\n".join(lines_of("qnli")))
    with pytest.warns(UserWarning, match="its publisher's has 104744"):
        train("qnli")


@pytest.mark.skipif(not os.environ.get("DRONE_DATA"), reason="needs the real corpora")
@pytest.mark.parametrize("name", known.KNOWN)
def test_the_real_files_are_the_known_ones_and_half_of_each_is_refused(
    name: str, tmp_path: Path
) -> None:
    file = Path(os.environ["DRONE_DATA"], name)
    optional = {task.test_file for task in data.TASKS.values()}
    if file.name in optional and not file.is_file():
        pytest.skip(f"$DRONE_DATA has no {name}, and need not have it")
    content = file.read_bytes()
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data._lines("cola", path)
    half = content[: len(content) // 2]
    for part in (half, half[: half.rindex(b"\n") + 1], content[: len(content) // 3]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="cut off"):
            data._lines("cola", path)


# --- what is missing -------------------------------------------------------------


def assert_names_three_ways(error: pytest.ExceptionInfo[BaseException]) -> None:
    assert all(way in str(error.value) for way in WAYS)


@pytest.mark.parametrize("name", ["ptb", *CLASSIC])
def test_without_drone_data_the_three_ways_are_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRONE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="DRONE_DATA is not set") as error:
        data.load(name, "local")
    assert_names_three_ways(error)


@pytest.mark.parametrize("name", ["ptb", *CLASSIC])
def test_a_missing_folder_and_a_missing_file_are_named(root: Path, name: str) -> None:
    folder = root / ("ptb" if name == "ptb" else f"glue/{HUB_LOOK[name][0]}")
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, "local")
    assert f"no folder {folder}" in str(error.value)
    assert_names_three_ways(error)
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, "local", ["train"])
    assert f"no file {folder}" in str(error.value)
    assert_names_three_ways(error)


@pytest.mark.parametrize("name", ["ptb", *CLASSIC])
def test_what_is_not_embedded_names_the_three_ways(name: str) -> None:
    with pytest.raises(ValueError, match="not embedded") as error:
        data.load(name)
    assert_names_three_ways(error)


@pytest.mark.parametrize("name", ["agreement", "python-docs"])
@pytest.mark.parametrize("source", ["local", "hub"])
def test_what_is_only_embedded_is_refused_elsewhere(
    root: Path, name: str, source: str
) -> None:
    with pytest.raises(ValueError, match="is embedded") as error:
        data.load(name, source)
    assert_names_three_ways(error)


def test_unknown_names_sources_and_splits_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"no corpus 'wnli'; .*mrpc"):
        data.load("wnli")
    with pytest.raises(ValueError, match=r"no source 'web'; .*local"):
        data.load("mrpc", "web")
    with pytest.raises(ValueError, match=r"no split dev; it has train, validation"):
        data.load("agreement", splits=["dev"])
    write(root, "rte", "\n".join(lines_of("rte")))
    with pytest.raises(ValueError, match="no split test; it has train, validation"):
        data.load("rte", "local", ["train", "test"])


# --- the hub ---------------------------------------------------------------------


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as the hub's repository: parquet files and `configs`."""
    for name in CLASSIC:
        write(root, name, "\n".join(lines_of(name)))
    folder = tmp_path / "repository"
    lines = ["---", "configs:"]
    for name in CLASSIC:
        (folder / name).mkdir(parents=True)
        rows = train(name)
        rows.to_parquet(folder / name / "train-00000-of-00001.parquet")
        rows.to_parquet(folder / name / "validation-00000-of-00001.parquet")
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "validation"):
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    places = {name: (str(folder), name, None) for name in CLASSIC}
    monkeypatch.setattr(data, "HUB", data.HUB | places)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("DRONE_DATA")
    return folder


def test_a_repository_in_a_folder_gives_what_the_files_give(hub: Path) -> None:
    for name in ("mrpc", "stsb"):
        found = data.load(name, "hub")
        assert isinstance(found, DatasetDict)
        assert list(found) == ["train", "validation"]
        assert_looks_as_on_the_hub(found["validation"], name)
        assert_rows(found["train"], name)
    assert list(data.load("rte", "hub", ["validation"])) == ["validation"]
    with pytest.raises(ValueError, match="no split dev; it has train, validation"):
        data.load("rte", "hub", ["dev"])


@pytest.mark.parametrize("source", ["embedded", "hub"])
def test_no_split_asked_for_is_no_split_given(hub: Path, source: str) -> None:
    assert not data.load("agreement" if source == "embedded" else "rte", source, [])


def test_the_hubs_glue_and_ptb_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> DatasetDict:
        asked.append((*args, kwargs.get("revision")))
        return DatasetDict({"train": Dataset.from_dict({"sentence": ["a"]})})

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    data.load("cola", "hub")
    data.load("ptb", "hub")
    assert asked == [
        ("nyu-mll/glue", "cola", None),
        ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet"),
    ]


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("offline"),
        FileNotFoundError("no repository"),
        RuntimeError("loading scripts are no longer supported"),
        # What `datasets` raises offline when it has cached another configuration.
        ValueError("Couldn't find cache for nyu-mll/glue for config 'cola'"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_hub_that_does_not_answer_is_a_connection_error(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match="nyu-mll/glue") as error:
        data.load("cola", "hub")
    assert_names_three_ways(error)
    assert str(failure) in str(error.value)


# --- a sample of rows ------------------------------------------------------------


@given(total=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_sample_draws_so_many_rows_and_none_twice(
    total: int, share: float, seed: int
) -> None:
    rows = Dataset.from_dict({"idx": range(total), "twice": range(0, 2 * total, 2)})
    count = max(1, round(share * total))
    found = data.sample(rows, count, seed)
    assert len(found) == len(set(found["idx"])) == count
    assert set(found["idx"]) <= set(range(total))
    assert found["twice"][:] == [2 * i for i in found["idx"]]
    assert data.sample(rows, count, seed)["idx"][:] == found["idx"][:]


def test_a_sample_is_decided_by_its_seed_and_favours_no_row() -> None:
    rows = Dataset.from_dict({"idx": range(10)})
    drawn = [tuple(data.sample(rows, 3, seed)["idx"]) for seed in range(300)]
    assert len(set(drawn)) > 200  # of 720
    times = Counter(row for draw in drawn for row in draw)
    # Each row is in a draw with probability .3: 90 times, standard deviation 8.
    assert all(50 < times[row] < 130 for row in range(10))


def test_a_smaller_sample_is_part_of_a_larger_one() -> None:
    rows = Dataset.from_dict({"idx": range(30)})
    larger = data.sample(rows, 20, seed=4)["idx"][:]
    assert data.sample(rows, 7, seed=4)["idx"][:] == larger[:7]


def test_a_sample_leaves_the_callers_random_state() -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 - the global state is meant
    data.sample(Dataset.from_dict({"idx": range(9)}), 3, seed=0)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@pytest.mark.parametrize("count", [0, -1, 10])
def test_a_sample_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"rows is {count}; allowed are 1 to 9"):
        data.sample(Dataset.from_dict({"idx": range(9)}), count, seed=0)


# --- agreement -------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus() -> DatasetDict:
    return data.load("agreement")


def test_agreement_is_the_same_in_every_load(corpus: DatasetDict) -> None:
    again = data.load("agreement")
    assert {k: v.to_dict() for k, v in again.items()} == {
        k: v.to_dict() for k, v in corpus.items()
    }


def test_agreement_has_thousands_of_sentences_and_none_twice(
    corpus: DatasetDict,
) -> None:
    sentences = [s for rows in corpus.values() for s in rows["sentence"]]
    assert len(sentences) == len(set(sentences)) == 8000
    assert {k: len(v) for k, v in corpus.items()} == {
        "train": 6000,
        "validation": 1000,
        "test": 1000,
    }


def test_agreement_labels_are_balanced_in_every_split(corpus: DatasetDict) -> None:
    for rows in corpus.values():
        assert Counter(rows["label"]) == {0: len(rows) // 2, 1: len(rows) // 2}
        assert rows.features["label"].names == ["ungrammatical", "grammatical"]
        assert rows["idx"][:] == list(range(len(rows)))


def test_agreement_pairs_stay_together(corpus: DatasetDict) -> None:
    known = {(p.bad, p.good, p.phenomenon) for p in agreement.generate(800, seed=0)}
    for rows in corpus.values():
        bad, good = rows[::2], rows[1::2]
        assert set(bad["label"]) == {0} and set(good["label"]) == {1}
        assert bad["phenomenon"] == good["phenomenon"]
        found = zip(bad["sentence"], good["sentence"], bad["phenomenon"], strict=True)
        assert set(found) <= known


def test_agreement_phenomena_are_equally_frequent(corpus: DatasetDict) -> None:
    total = Counter(p for rows in corpus.values() for p in rows["phenomenon"])
    assert set(total.values()) == {1600} and len(total) == 5
    for rows in corpus.values():
        for count in Counter(rows["phenomenon"]).values():
            assert 0.7 < count / (len(rows) / 5) < 1.3


def test_no_single_word_but_what_gives_agreement_away(
    corpus: DatasetDict,
) -> None:
    seen: Counter[str] = Counter()
    grammatical: Counter[str] = Counter()
    for rows in corpus.values():
        for sentence, label in zip(rows["sentence"], rows["label"], strict=True):
            words = set(sentence.lower().rstrip(".").split())
            seen.update(words)
            grammatical.update(words if label else ())
    shares = {w: grammatical[w] / n for w, n in seen.items() if n >= 100}
    assert len(shares) > 50
    telling = {w for w, share in shares.items() if not 0.35 <= share <= 0.65}
    assert telling == {"what"}


def test_agreement_is_not_given_away_by_length(corpus: DatasetDict) -> None:
    for rows in corpus.values():
        lengths: dict[int, list[int]] = {0: [], 1: []}
        for sentence, label in zip(rows["sentence"], rows["label"], strict=True):
            lengths[label].append(len(sentence.split()))
        assert Counter(lengths[0]) == Counter(lengths[1])


def test_members_of_a_pair_differ_in_one_word_or_where_no_stands() -> None:
    for pair in agreement.generate(100, seed=3):
        good, bad = pair.good.split(), pair.bad.split()
        changed = [(g, b) for g, b in zip(good, bad, strict=True) if g != b]
        expected = 2 if pair.phenomenon == "negative-polarity" else 1
        assert len(changed) == expected, pair


def test_generate_is_decided_by_its_seed() -> None:
    assert agreement.generate(20, seed=1) == agreement.generate(20, seed=1)
    assert agreement.generate(20, seed=1) != agreement.generate(20, seed=2)


@pytest.mark.parametrize("count", [0, -1])
def test_generate_refuses_less_than_a_pair(count: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        agreement.generate(count, seed=0)


def test_generate_refuses_more_than_the_grammar_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one_pair(rng: object) -> agreement.Pair:
        return agreement.Pair("She sings.", "She sing.", "only")

    monkeypatch.setattr(agreement, "PHENOMENA", (one_pair,))
    assert len(agreement.generate(1, seed=0)) == 1
    with pytest.raises(ValueError, match="one_pair: the grammar has no 2"):
        agreement.generate(2, seed=0)


# --- python-docs -----------------------------------------------------------------


@pytest.fixture(scope="module")
def docs() -> dict[str, list[str]]:
    return {k: v["sentence"][:] for k, v in data.load("python-docs").items()}


def test_python_docs_is_the_same_in_every_load(docs: dict[str, list[str]]) -> None:
    assert {k: v["sentence"][:] for k, v in data.load("python-docs").items()} == docs


def test_python_docs_has_three_splits_of_a_useful_size(
    docs: dict[str, list[str]],
) -> None:
    assert list(docs) == ["train", "validation", "test"]
    assert len(docs["train"]) > 1000
    for split in ("validation", "test"):
        assert 0.05 < len(docs[split]) / len(docs["train"]) < 0.2


def test_python_docs_has_no_sentence_twice(docs: dict[str, list[str]]) -> None:
    parts = [set(lines) for lines in docs.values()]
    assert not parts[0] & parts[1] and not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_python_docs_held_out_words_are_trains_or_unk(
    docs: dict[str, list[str]],
) -> None:
    counts = Counter(" ".join(docs["train"]).split())
    assert counts["<unk>"] > 0
    assert min(counts.values()) > 1  # words seen once are <unk>
    for split in ("validation", "test"):
        assert set(" ".join(docs[split]).split()) <= set(counts)


def test_python_docs_is_lower_case_words_n_and_unk(docs: dict[str, list[str]]) -> None:
    words = {w for lines in docs.values() for line in lines for w in line.split()}
    assert {"N", "<unk>"} < words
    for word in words:
        letters = word.replace("'", "").replace("’", "").replace("-", "")
        plain = letters.isascii() and letters.isalpha() and letters.islower()
        assert plain or word in ("N", "<unk>"), word


# --- the real files --------------------------------------------------------------

# One row of MRPC's training file is missing from a copy in circulation.
SHORT_MRPC = "f178bcc72ab4c2c1c778b480912e0c8e1dba3ead150dc1d490d70682ab888c1e"


def real(name: str) -> DatasetDict:
    """Load from $DRONE_DATA, or skip and say what is missing."""
    if not REAL:
        pytest.skip("DRONE_DATA is not set: the real corpora are not here")
    folder = "ptb" if name == "ptb" else f"glue/{HUB_LOOK[name][0]}"
    if not (Path(REAL) / folder).is_dir():
        pytest.skip(f"$DRONE_DATA has no {folder}")
    return data.load(name, "local")


@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [
        ("mrpc", 3668, 408),
        ("rte", 2490, 277),
        ("cola", 8551, 1043),
        ("stsb", 5749, 1500),
        ("sst2", 67349, 872),
    ],
)
def test_real_glue_has_the_published_number_of_rows(
    name: str, train: int, validation: int
) -> None:
    found = real(name)
    if name == "mrpc":
        file = Path(str(REAL)) / "glue" / "MRPC" / "train.tsv"
        short = hashlib.sha256(file.read_bytes()).hexdigest() == SHORT_MRPC
        train -= short
        assert Counter(found["train"]["label"]) == {0: 1194, 1: 2474 - short}
    assert {k: len(v) for k, v in found.items()} == {
        "train": train,
        "validation": validation,
    }
    for rows in found.values():
        assert_looks_as_on_the_hub(rows, name)


def test_real_ptb_has_the_published_counts() -> None:
    found = real("ptb")
    words = {k: " ".join(v["sentence"]).split() for k, v in found.items()}
    assert {k: len(v) for k, v in found.items()} == {
        "train": 42068,
        "validation": 3370,
        "test": 3761,
    }
    tokens = {k: len(words[k]) + len(found[k]) for k in words}  # one <eos> a sentence
    assert tokens == {"train": 929589, "validation": 73760, "test": 82430}
    assert len(set(words["train"]) | {"<eos>"}) == 10000
    assert set(words["validation"]) | set(words["test"]) <= set(words["train"])
