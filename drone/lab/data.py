"""Corpora by name, as `datasets.DatasetDict`: embedded, from a folder, or from a hub.

Columns, label names and splits are those of the hub's `nyu-mll/glue` and
`ptb-text-only/ptb_text_only`, whatever the source. The source is never switched
silently: what is missing is an error that names the three ways to get it.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Value,
    load_dataset,
    logging,
)

from drone.files import user_folder
from drone.lab import agreement
from drone.lab.known import check_whole

SOURCES = ("embedded", "local", "hub")
TRAIN_DEV = {"train": "train.tsv", "validation": "dev.tsv"}
TRAIN_DEV_MNLI = {
    "train": "train.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
}
PTB_FILES = {
    "train": "ptb.train.txt",
    "validation": "ptb.valid.txt",
    "test": "ptb.test.txt",
}


@dataclass(frozen=True)
class Task:
    """How one task looks: on the hub (columns, labels) and in the classic files."""

    columns: tuple[str, ...]  # the text columns, as on the hub
    labels: tuple[str, ...] | None  # class names in order; None: a score (regression)
    folder: str = ""  # under $DRONE_DATA/glue; empty: not a GLUE task
    header: tuple[str, ...] = ()  # the files' text columns; () = same as `columns`
    label_header: str = "label"
    label_texts: tuple[str, ...] = ()  # how classes are written; () = as in `labels`
    files: tuple[tuple[str, str], ...] = tuple(TRAIN_DEV.items())
    no_header: tuple[str, ...] = ()  # the column names of a file that states none
    test_file: str = ""  # of further rows whose labels are public; empty: none

    @property
    def dev_split(self) -> str:
        """The split that reports; MNLI has two, the matched one is meant."""
        return "validation_matched" if len(self.files) > 2 else "validation"


ENTAILMENT = ("entailment", "not_entailment")
BINARY = ("0", "1")
TASKS: dict[str, Task] = {
    "cola": Task(
        ("sentence",),
        ("unacceptable", "acceptable"),
        folder="CoLA",
        label_texts=BINARY,
        no_header=("source", "label", "original_judgement", "sentence"),
    ),
    "sst2": Task(
        ("sentence",), ("negative", "positive"), folder="SST-2", label_texts=BINARY
    ),
    "mrpc": Task(
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        folder="MRPC",
        header=("#1 String", "#2 String"),
        label_header="Quality",
        label_texts=BINARY,
        test_file="msr_paraphrase_test.txt",  # the corpus's own; GLUE's has no labels
    ),
    "stsb": Task(
        ("sentence1", "sentence2"), None, folder="STS-B", label_header="score"
    ),
    "qqp": Task(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        folder="QQP",
        label_header="is_duplicate",
        label_texts=BINARY,
    ),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        folder="MNLI",
        header=("sentence1", "sentence2"),
        label_header="gold_label",
        files=tuple(TRAIN_DEV_MNLI.items()),
    ),
    "qnli": Task(("question", "sentence"), ENTAILMENT, folder="QNLI"),
    "rte": Task(("sentence1", "sentence2"), ENTAILMENT, folder="RTE"),
    "agreement": Task(("sentence",), ("ungrammatical", "grammatical")),
}
LANGUAGE_CORPORA = ("ptb", "python-docs")
EMBEDDED = ("agreement", "python-docs")
NAMES = (*LANGUAGE_CORPORA, *TASKS)
# Where the hub keeps them: (repository, configuration, revision).
HUB: dict[str, tuple[str, str | None, str | None]] = {
    name: ("nyu-mll/glue", name, None) for name, task in TASKS.items() if task.folder
} | {
    # Its loading script no longer runs (datasets >= 4); the hub's own conversion does.
    "ptb": ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet"),
}


def load(
    name: str, source: str = "embedded", splits: Sequence[str] | None = None
) -> DatasetDict:
    """Load a corpus.

    Args:
        name: one of `drone.lab.data.NAMES`: `ptb`, a GLUE task (`cola sst2 mrpc
            stsb qqp mnli qnli rte`), `agreement` or `python-docs`.
        source: `embedded` (only `agreement` and `python-docs`; needs nothing but the
            installed packages), `local` (`$DRONE_DATA/ptb/ptb.{train,valid,test}.txt`,
            `$DRONE_DATA/glue/<TASK>/{train,dev}.tsv`, and for a `test` split of MRPC
            the corpus's own `msr_paraphrase_test.txt` beside them) or `hub`.
        splits: which splits; None means all that the source has, of local files those
            it must have.

    Returns:
        One `datasets.Dataset` a split. Classification: the text columns, `label`
        (a `ClassLabel`; for `stsb` a float from 0 to 5) and `idx`, the row's number in
        its file from 0. Language modelling: `sentence`, words separated by one space.

    Raises:
        ValueError: an unknown name, source or split; a malformed file or one that is
            cut off (the message names the file, the row and what is allowed).
        FileNotFoundError: a folder or file is missing.
        ConnectionError: the hub cannot be reached or does not have it.

    Warns:
        UserWarning: a local file is another vintage than this book's; see
            `drone.lab.known`.
    """
    if name not in NAMES:
        raise ValueError(f"no corpus {name!r}; there are {', '.join(NAMES)}.")
    if source not in SOURCES:
        raise ValueError(f"no source {source!r}; there are {', '.join(SOURCES)}.")
    if source == "hub":
        return _hub(name, splits)
    readers = _embedded(name) if source == "embedded" else _local(name, splits)
    chosen = _choose(name, source, splits, readers)
    return DatasetDict({split: readers[split]() for split in chosen})


def dev_labels(task: str, source: str = "local", rows: int = 0) -> np.ndarray:
    """Labels of a task's development rows.

    Args:
        task: one of `TASKS`.
        source: as in `load`.
        rows: those of a `sample` of so many, with seed 0; 0: of all.

    Returns:
        (rows,): int64 classes or float scores.

    Raises:
        FileNotFoundError, ValueError: as `load` and `sample`.
    """
    split = TASKS[task].dev_split
    dev = load(task, source, [split])[split]
    return np.asarray((sample(dev, rows, 0) if rows else dev)["label"])


def sample(rows: Dataset, count: int, seed: int) -> Dataset:
    """Draw rows at random, without repetition: the same ones for the same seed.

    Raises:
        ValueError: `count` is below 1 or above the number of rows.
    """
    if not 1 <= count <= len(rows):
        raise ValueError(f"rows is {count}; allowed are 1 to {len(rows)}.")
    return rows.select(np.random.default_rng(seed).permutation(len(rows))[:count])


def _choose(
    name: str, source: str, splits: Sequence[str] | None, has: Iterable[str]
) -> list[str]:
    """The splits asked for, all of them if None; refuse one that is not there."""
    there = list(has)
    unknown = sorted(set(splits or ()) - set(there))
    if unknown:
        raise ValueError(
            f"{name} from {source} has no split {', '.join(unknown)}; "
            f"it has {', '.join(there)}."
        )
    return there if splits is None else list(splits)


Readers = Mapping[str, Callable[[], Dataset]]


def _missing(name: str, what: str) -> str:
    """Say what is missing and the three ways to get it."""
    folder = TASKS[name].folder if name in TASKS else ""
    classic = f"$DRONE_DATA/glue/{folder}/" if folder else "$DRONE_DATA/ptb/"
    ways = [
        f"source='embedded' ({' and '.join(EMBEDDED)} only)",
        f"source='local': put the files under {classic} and set DRONE_DATA",
        f"source='hub': {HUB[name][0]}" if name in HUB else "source='hub': not there",
    ]
    return f"{name}: {what}. Three ways to data: " + "; ".join(ways) + "."


def _embedded(name: str) -> Readers:
    if name not in EMBEDDED:
        raise ValueError(_missing(name, "is not embedded in any package"))
    if name == "agreement":
        return _agreement()
    blocks = _python_docs()
    return {
        split: partial(Dataset.from_dict, {"sentence": lines})
        for split, lines in blocks.items()
    }


def _agreement(pairs_per_phenomenon: int = 800, seed: int = 0) -> Readers:
    """Split the minimal pairs 75 / 12.5 / 12.5 %; a pair stays in one split."""
    pairs = agreement.generate(pairs_per_phenomenon, seed)
    eighth = len(pairs) // 8
    parts = {
        "train": pairs[: -2 * eighth],
        "validation": pairs[-2 * eighth : -eighth],
        "test": pairs[-eighth:],
    }

    def build(part: list[agreement.Pair]) -> Dataset:
        rows = [
            {"sentence": sentence, "phenomenon": pair.phenomenon, "label": label}
            for pair in part
            for label, sentence in enumerate((pair.bad, pair.good))
        ]
        features = _features(TASKS["agreement"])
        features["phenomenon"] = Value("string")
        return Dataset.from_list(
            [row | {"idx": i} for i, row in enumerate(rows)], features=features
        )

    return {split: partial(build, part) for split, part in parts.items()}


def _python_docs(block: int = 20) -> dict[str, list[str]]:
    """English prose of CPython's own help topics, treated as Mikolov treated PTB.

    Lower case, no punctuation, numbers as `N`, words seen once in train as `<unk>`.
    Blocks of 20 consecutive sentences go to train (8 of 10), validation and test; a
    sentence that occurs twice is kept once. The text differs between Python versions.
    """
    from pydoc_data.topics import topics

    sentences: dict[str, None] = {}  # a dict keeps the order, a set does not
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            text = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
                # Prose begins with a capital, ends with a stop, is mostly letters.
                letters = sum(c.isalpha() or c == " " for c in sentence)
                if re.match(r"[A-Z].*[.!?]$", sentence) and letters > 0.85 * len(
                    sentence
                ):
                    words = re.findall(r"[a-z]+(?:['’-][a-z]+)*|\d+", sentence.lower())
                    if len(words) >= 4:
                        line = " ".join("N" if w.isdigit() else w for w in words)
                        sentences[line] = None
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for i, line in enumerate(sentences):
        parts[("train", "validation", "test")[max(0, i // block % 10 - 7)]].append(line)
    counts: dict[str, int] = {}
    for word in " ".join(parts["train"]).split():
        counts[word] = counts.get(word, 0) + 1
    return {
        split: [
            " ".join(w if counts.get(w, 0) > 1 else "<unk>" for w in line.split())
            for line in lines
        ]
        for split, lines in parts.items()
    }


def _local(name: str, splits: Sequence[str] | None) -> Readers:
    if name not in HUB:
        raise ValueError(_missing(name, "is embedded, there are no files of it"))
    if not os.environ.get("DRONE_DATA", "").strip():
        raise FileNotFoundError(_missing(name, "DRONE_DATA is not set"))
    root = user_folder("DRONE_DATA", "")
    if name == "ptb":
        folder = root / "ptb"
        readers = {
            split: partial(_read_ptb, folder / file)
            for split, file in PTB_FILES.items()
        }
    else:
        task = TASKS[name]
        folder = root / "glue" / task.folder
        readers = {
            split: partial(_read_glue, name, folder / file)
            for split, file in task.files
        }
        if task.test_file and splits is not None:  # read only when it is asked for
            readers["test"] = partial(_read_glue, name, folder / task.test_file)
    if not folder.is_dir():
        raise FileNotFoundError(_missing(name, f"there is no folder {folder}"))
    return readers


def _lines(name: str, path: Path) -> list[str]:
    """Lines of a UTF-8 file; a byte-order mark (MRPC has one) is not content.

    Only a newline ends a line: `str.splitlines` would also cut at U+2028 and others.
    """
    if not path.is_file():
        raise FileNotFoundError(_missing(name, f"there is no file {path}"))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}.") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    ends = lines[-1] == ""
    if ends:
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty; at least one row is needed.")
    check_whole(path, lines, ends)
    return lines


def _read_ptb(path: Path) -> Dataset:
    """One sentence a line, words separated by spaces."""
    lines = [" ".join(line.split()) for line in _lines("ptb", path)]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(
                f"{path}, line {number}: blank; each line is one sentence."
            )
    return Dataset.from_dict({"sentence": lines})


def _features(task: Task) -> Features:
    label = (
        Value("float32") if task.labels is None else ClassLabel(names=list(task.labels))
    )
    text = {column: Value("string") for column in task.columns}
    return Features(text | {"label": label, "idx": Value("int32")})


def _read_glue(name: str, path: Path) -> Dataset:
    """One example a row, tab-separated; a quote is a character like any other."""
    task = TASKS[name]
    lines = _lines(name, path)
    if task.no_header:
        header, first = list(task.no_header), 1
    else:
        header, first = lines.pop(0).split("\t"), 2  # rows count from 1, as editors do
    wanted = [*(task.header or task.columns), task.label_header]
    absent = [column for column in wanted if column not in header]
    if absent:
        raise ValueError(
            f"{path}, row 1: no column {', '.join(absent)}; the header has "
            f"{', '.join(header)} and {', '.join(wanted)} are needed."
        )
    if not lines:
        raise ValueError(f"{path}: a header and no rows; at least one row is needed.")
    places = [header.index(column) for column in wanted]
    rows = []
    for number, line in enumerate(lines, start=first):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, row {number}: {len(cells)} columns; {len(header)} are "
                f"expected ({', '.join(header)}). Quotes do not protect a tab here."
            )
        *texts, label = (cells[place] for place in places)
        rows.append(
            dict(zip(task.columns, texts, strict=True))
            | {"label": _label(task, label, path, number), "idx": number - first}
        )
    return Dataset.from_list(rows, features=_features(task))


def _label(task: Task, text: str, path: Path, number: int) -> int | float:
    if task.labels is None:
        try:
            score = float(text)
        except ValueError:
            score = float("nan")
        if not 0 <= score <= 5:
            raise ValueError(
                f"{path}, row {number}: the score is {text!r}; a number from 0 to 5 "
                "is allowed."
            )
        return score
    allowed = task.label_texts or task.labels
    if text not in allowed:
        raise ValueError(
            f"{path}, row {number}: the label is {text!r}; allowed are "
            f"{', '.join(allowed)}."
        )
    return allowed.index(text)


def _hub(name: str, splits: Sequence[str] | None) -> DatasetDict:
    if name not in HUB:
        raise ValueError(_missing(name, "is embedded, it is not on the hub"))
    repository, configuration, revision = HUB[name]
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one small file; a bar would be noise
    try:
        loaded = load_dataset(repository, configuration, revision=revision)
    # No network, offline mode, not found; a ValueError: offline, and only another
    # configuration is in the cache.
    except (OSError, RuntimeError, ValueError) as error:
        what = f"the hub did not give {repository} ({type(error).__name__}: {error})"
        raise ConnectionError(_missing(name, what)) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    chosen = _choose(name, "hub", splits, loaded)
    return DatasetDict({split: loaded[split] for split in chosen})
