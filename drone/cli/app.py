"""The commands: compress, report, bench, onnx, doctor."""

import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from drone.cli.card import Result, card, summary
from drone.cli.doctor import diagnose
from drone.cli.folder import check_fit, load_model, load_tokenizer
from drone.cli.rows import Row, label_ids, make_batches, read_rows, split
from drone.cli.score import interval, score
from drone.files import check_free, whole_folder
from drone.model.calibrate import to_device
from drone.model.onnx import export_onnx
from drone.model.report import report as report_of
from drone.model.storage import save
from drone.search.verb import Compressed
from drone.search.verb import compress as make_small
from drone.timing import LatencyReport, compare_latency

# Exit codes: not what was asked for; a mistake in the request; a fault of this program.
MISSED, REFUSED, FAILED = 1, 2, 3
ROWS_A_BATCH = 32
PATIENCE = (
    "ranks: by Algorithm 2, in several searches; --method latency is quicker and loses "
    "more"
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Make a fine-tuned classifier smaller and faster by low-rank factors.",
)

Folder = Annotated[Path, typer.Argument(help="a folder of save_pretrained")]
Data = Annotated[Path, typer.Option(help="CSV file with a header, UTF-8")]
Text = Annotated[str, typer.Option(help="column of the text")]
Text2 = Annotated[str | None, typer.Option(help="column of the second text of a pair")]
Label = Annotated[str, typer.Option(help="column of the label")]
Longest = Annotated[int, typer.Option(help="tokens a row; the rest is cut off", min=2)]


@app.command()
def compress(
    folder: Folder,
    data: Data,
    out: Annotated[
        Path | None, typer.Option(help="folder to write; new or empty")
    ] = None,
    text: Text = "text",
    text2: Text2 = None,
    label: Label = "label",
    speedup: Annotated[
        float | None, typer.Option(help="2: twice as fast, as predicted by the search")
    ] = None,
    loss_increase: Annotated[
        float | None, typer.Option(help="0.1: the loss may grow by 10 %")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="0.5: half of the layers' parameters stay")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="one rank for all layers")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="of the search: drone (loses least), latency (quicker), uniform, "
            "energy or greedy"
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option(help="rows the search sees at most", min=8)
    ] = 512,
    max_length: Longest = 128,
    seed: Annotated[int, typer.Option(help="of the split of the rows")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, compress nothing")
    ] = False,
) -> None:
    """Compress the classifier in FOLDER, score it on rows held back, write it to OUT.

    Exit code 1: the model was written, but missed what was asked for; 2: a mistake in
    the request, nothing was written; 3: a fault of this program.
    """
    with _clearly():
        asked = {"speedup": speedup, "loss-increase": loss_increase}
        asked |= {"keep": keep, "rank": rank}
        given = [name for name, value in asked.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of --{', --'.join(asked)}; {len(given)} were given."
            )
        if out is None and not dry_run:
            raise ValueError("give --out, the folder to write, or --dry-run.")
        if out is not None:  # said now, not after minutes of work
            check_free(out)
        columns = [text] if text2 is None else [text, text2]
        rows = read_rows(data, columns, label)
        searched, held = split(rows, max_rows, seed)
        model = load_model(folder)
        tokenizer = load_tokenizer(folder, model)
        ids = label_ids(rows, model.config.label2id, data)
        batches, others = (
            _batches(part, model, tokenizer, ids, max_length)
            for part in (searched, held)
        )
        told = f"{data.name}, {len(searched)} searched and {len(held)} held back"
        typer.echo(f"rows: {told}")
        typer.echo(
            "labels: " + ", ".join(f"{n} → {i:g}" for n, i in list(ids.items())[:9])
        )
        if dry_run:
            typer.echo("nothing was compressed: --dry-run")
            return
        if speedup is not None and method in (None, "drone"):
            typer.echo(PATIENCE)
        size: Any = rank if rank is not None else keep
        small = make_small(
            model,
            size,
            batches=batches,
            speedup=speedup,
            loss_increase=loss_increase,
            method=method,
        )
        result = _compare(model, small, others, folder.resolve().name, told, asked)
        assert out is not None
        _write(small, tokenizer, card(result, type(small).__name__), out)
        for line in summary(result):
            typer.echo(line)
        typer.echo(f"written: {out}")
    if result.missed:
        raise typer.Exit(MISSED)


@app.command()
def report(folder: Folder) -> None:
    """Say of each layer of a model whether it is low-rank, and what that saves."""
    with _clearly():
        table = report_of(load_model(folder))
        columns = ["out", "in", "rank", "parameters", "parameters_dense"]
        typer.echo(table.to_string(columns=columns))
        typer.echo(table.summary())


@app.command()
def bench(
    first: Folder,
    second: Folder,
    data: Data,
    text: Text = "text",
    text2: Text2 = None,
    label: Label = "label",
    max_length: Longest = 128,
    repeats: Annotated[int, typer.Option(help="rounds of the clock", min=2)] = 30,
) -> None:
    """Time two models side by side on one batch of rows, and score both on all rows."""
    with _clearly():
        columns = [text] if text2 is None else [text, text2]
        rows = read_rows(data, columns, label)
        models: dict[str, Any] = {}
        batches: list[dict[str, Tensor]] = []
        for name, folder in (("first", first), ("second", second)):
            model = load_model(folder)
            tokenizer = load_tokenizer(folder, model)
            ids = label_ids(rows, model.config.label2id, data)
            made = _batches(rows, model, tokenizer, ids, max_length)
            if batches and not all(
                torch.equal(a["input_ids"], b["input_ids"])
                for a, b in zip(batches, made, strict=True)
            ):
                raise ValueError(
                    f"{first} and {second} read the rows differently; one tokenizer "
                    "is needed."
                )
            models[name], batches = model, made
        clock = _clock(models, batches, repeats)
        ratio, low, high = clock.speedup("second")
        scores = {name: score(model, batches) for name, model in models.items()}
        for name, folder in (("first", first), ("second", second)):
            said = f"{folder}: {1000 * clock.median(name):.1f} ms a batch, "
            said += f"loss {scores[name].losses.mean():.4f}"
            right = scores[name].right
            if right is not None:
                said += f", accuracy {right.mean():.1%}"
            typer.echo(said)
        typer.echo(f"speed: {ratio:.2f}× ({low:.2f} to {high:.2f})")


@app.command()
def onnx(
    folder: Folder,
    data: Data,
    out: Annotated[Path, typer.Option(help="ONNX file to write; a new one")],
    text: Text = "text",
    text2: Text2 = None,
    label: Label = "label",
    max_length: Longest = 128,
) -> None:
    """Write a model, dense or compressed, as one ONNX file; compare logits on rows."""
    with _clearly():
        columns = [text] if text2 is None else [text, text2]
        rows = read_rows(data, columns, label)
        model = load_model(folder)
        tokenizer = load_tokenizer(folder, model)
        ids = label_ids(rows, model.config.label2id, data)
        batches = _batches(rows, model, tokenizer, ids, max_length)
        # The one with the most pads: that they are masked is what an export may lose.
        batch = min(batches, key=lambda b: float(b["attention_mask"].float().mean()))
        apart = export_onnx(model, out, batch)
        count, length = batch["input_ids"].shape
        typer.echo(
            f"logits: at most {apart:.1e} from PyTorch's, on {count} rows of up to "
            f"{length} tokens"
        )
        typer.echo(f"size: {out.stat().st_size / 1e6:.1f} MB")
        typer.echo(f"written: {out}")


@app.command()
def doctor() -> None:
    """Print what a bug report needs: versions, processor, GPU, threads."""
    for name, fact in diagnose().items():
        typer.echo(f"{name}: {fact}")


@contextmanager
def _clearly() -> Iterator[None]:
    """Turn an error of the request or the data into one line and exit code 2.

    Anything else is our fault: it is shown whole, and is not taken for a missed goal.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(REFUSED) from error
    except Exception as error:
        typer.echo(traceback.format_exc(), err=True)
        raise typer.Exit(FAILED) from error


def _batches(
    rows: Sequence[Row],
    model: Any,
    tokenizer: Any,
    ids: Mapping[str, float],
    max_length: int,
) -> list[dict[str, Tensor]]:
    """Make batches of rows as this model reads them, and see that it can."""
    longest = min(max_length, tokenizer.model_max_length)
    batches = make_batches(rows, tokenizer, ids, ROWS_A_BATCH, longest)
    check_fit(model, batches)
    return batches


def _clock(
    models: dict[str, nn.Module], batches: list[dict[str, Tensor]], repeats: int
) -> LatencyReport:
    """Time models on the batch of middle length."""
    middle = to_device(batches[len(batches) // 2], next(iter(models.values())))
    del middle["labels"]
    return compare_latency(models, middle, repeats=repeats)


def _compare(
    model: nn.Module,
    small: nn.Module,
    batches: list[dict[str, Tensor]],
    source: str,
    data: str,
    asked: dict[str, float | None],
) -> Result:
    """Score and time both models; see whether the small one is what was asked for."""
    dense, thin = score(model, batches), score(small, batches)
    loss = interval(dense.losses, thin.losses, ratio=True)
    clock = _clock({"dense": model, "small": small}, batches, 30)
    missed, rights, right = "", None, None
    if dense.right is not None and thin.right is not None:
        rights = (float(dense.right.mean()), float(thin.right.mean()))
        right = interval(dense.right, thin.right, ratio=False)
    speed, allowed = asked["speedup"], asked["loss-increase"]
    if speed is not None and clock.speedup("small")[2] < speed:
        missed = f"a speed-up of {speed:g} was asked for"
    if allowed is not None and loss[1] > allowed:
        missed = f"a loss increase of at most {allowed:.1%} was asked for"
    compressed: Any = small.compressed
    assert isinstance(compressed, Compressed)
    means = (float(dense.losses.mean()), float(thin.losses.mean()))
    return Result(source, data, compressed, means, loss, rights, right, clock, missed)


def _write(small: Any, tokenizer: Any, text: str, out: Path) -> None:
    """Write weights, tokenizer and card as one folder, whole or not at all."""
    with whole_folder(out) as temporary:
        save(small, temporary / "model")
        for path in (temporary / "model").iterdir():
            shutil.move(path, temporary / path.name)
        (temporary / "model").rmdir()
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(text, encoding="utf-8")
