"""Moments of several processes against one process that reads all rows."""

import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import drone
from drone.math.moments import SecondMoment
from drone.model.processes import merge_over_processes

DIM, PROCESSES = 7, 4


def rows(number: int) -> torch.Tensor:
    """The rows of one process: another count, another size of the inputs."""
    generator = torch.Generator().manual_seed(number)
    return 10.0**number * torch.randn(5 + number, DIM, generator=generator)


def found(number: int) -> dict[str, SecondMoment]:
    model = nn.Sequential(nn.Linear(DIM, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    return drone.calibrate(model, [rows(number)], ["0", "2"])


def work(rank: int, folder: str) -> None:
    """One process: all four, then the first two alone, then a mistake."""
    torch.set_num_threads(1)  # a forked process must not start OpenMP anew
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=PROCESSES,
        )
        pair = dist.new_group([0, 1])
        own = found(rank)
        told = {"four": merge_over_processes(own)}
        if rank < 2:
            told["two"] = merge_over_processes(own, pair)
        result: dict[str, object] = {
            which: {n: (m.matrix, m.total, m.count) for n, m in moments.items()}
            for which, moments in told.items()
        }
        result["untouched"] = own["0"].count
        try:
            # the last process leaves a module out
            merge_over_processes({"0": own["0"]} if rank == 3 else own)
        except ValueError as error:
            result["error"] = str(error)
        torch.save(result, f"{folder}/{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        os._exit(0)  # a fork of pytest: none of its own endings


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("processes")
    context = mp.get_context("fork")  # seconds less than importing torch four times
    started = [
        context.Process(target=work, args=(rank, str(folder)))
        for rank in range(PROCESSES)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    told = [path.read_text() for path in folder.glob("*.txt")]
    assert not told, told[0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize(("which", "size"), [("two", 2), ("four", 4)])
def test_it_is_what_one_process_finds_on_all_rows(
    results: list[dict[str, dict[str, tuple[torch.Tensor, torch.Tensor, int]]]],
    which: str,
    size: int,
) -> None:
    alone = found(0)
    for number in range(1, size):
        for name, moment in found(number).items():
            alone[name].merge(moment)
    at_once = SecondMoment(DIM)
    at_once.update(torch.cat([rows(number) for number in range(size)]))
    assert torch.allclose(alone["0"].matrix, at_once.matrix, rtol=1e-12, atol=0)
    for result in results[:size]:
        for name, expected in alone.items():
            matrix, total, count = result[which][name]
            scale = expected.matrix.abs().max()
            assert (matrix - expected.matrix).abs().max() <= 1e-12 * scale
            assert torch.allclose(total / count, expected.mean, rtol=1e-12, atol=0)
            assert count == expected.count == sum(5 + n for n in range(size))


def test_the_moments_given_stay_as_they_were(results: list[dict[str, int]]) -> None:
    assert [result["untouched"] for result in results] == [5, 6, 7, 8]


def test_other_modules_are_an_error_everywhere(results: list[dict[str, str]]) -> None:
    for result in results:
        assert "other modules or sizes, 2;" in result["error"]


def test_without_processes_it_is_refused() -> None:
    with pytest.raises(ValueError, match="not initialised"):
        merge_over_processes({"0": SecondMoment(2)})
