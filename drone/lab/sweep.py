"""Many jobs on Dask: this machine, one heavy job at a time, or a cluster.

A finished job is never run again, a failed one is tried again and then reported by its
name; a sweep that was killed goes on where it was. Chapter 7's cases, clocks, and
`make sweep` are run by this. The workers must see the sweep's folder.

    python -m drone.lab.sweep JOBS.json runs/sweep [--at-once 1] [--scheduler tcp://…]
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster, as_completed

import drone
import drone.lab.job as job_module
from drone import progress
from drone.files import sha256
from drone.lab.cases import case_key
from drone.lab.job import LOG, Job, done, place

TAIL = 20  # lines of a failed job's log that are told


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        job: itself.
        folder: its log, its note, and what it was told to write there.
        found: it was done before.
        error: why it failed, with the end of its log; empty if it did not.
    """

    job: Job
    folder: Path
    found: bool
    error: str = ""


def combinations(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every combination of a grid: a list has values to try, others are fixed.

    Raises:
        ValueError: an empty list, or no list at all.

    >>> list(combinations({"rank": [8, 16], "task": "rte"}))
    [{'rank': 8, 'task': 'rte'}, {'rank': 16, 'task': 'rte'}]
    """
    axes = {name: v if isinstance(v, list) else [v] for name, v in grid.items()}
    empty = [name for name, values in axes.items() if not values]
    if empty or not any(isinstance(values, list) for values in grid.values()):
        raise ValueError(
            f"{', '.join(empty) or 'the grid'}: a list of values to try is needed, "
            "such as `rank: [64, 96]`; a list as a value is a list in the list."
        )
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def library() -> str:
    """Return a SHA-256 over the library's own files: an input of every job.

    >>> len(library())
    64
    """
    package = Path(drone.__file__).parent
    files = sorted(package.rglob("*.py"))
    return case_key("library", {str(f.relative_to(package)): sha256(f) for f in files})


def sweep(
    jobs: Iterable[Job],
    folder: Path,
    *,
    scheduler: str | None = None,
    at_once: int = 1,
    retries: int = 1,
) -> list[Outcome]:
    """Run jobs that are not done.

    Args:
        jobs: names may not repeat.
        folder: of the sweep; each job has a folder of its own in it.
        scheduler: address of a Dask scheduler; None: workers on this machine.
        at_once: of those workers, each with its share of the processors.
        retries: of a job that failed, or whose worker died.

    Returns:
        An `Outcome` a job, in their order. A failed job does not stop the others.

    Raises:
        ValueError: two jobs of one name, or less than one at once.
    """
    chosen = list(jobs)
    names = [job.name for job in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or at_once < 1:
        raise ValueError(
            f"{at_once} jobs at once, names that repeat: {', '.join(twice) or 'none'}; "
            "at least 1, and a name for each, are needed."
        )
    folders = {job.name: place(job, folder.resolve()) for job in chosen}
    found = {name for name, place_ in folders.items() if done(place_)}
    errors: dict[str, str] = {}
    if len(found) < len(chosen):
        with _client(scheduler, at_once) as client:
            # No worker needs anything of drone for it, so none loads PyTorch.
            waiting = {
                client.submit(
                    subprocess.check_call,
                    command(folders[name]),
                    env=None if scheduler else share(at_once),
                    retries=retries,
                    pure=False,
                ): name
                for name in names
                if name not in found
            }
            bar = progress.bar(as_completed(waiting), desc="jobs", total=len(waiting))
            for future in bar:
                if future.status == "error":
                    name = waiting[future]
                    errors[name] = why(name, folders[name], future.exception())
    return [
        Outcome(job, folders[job.name], job.name in found, errors.get(job.name, ""))
        for job in chosen
    ]


@contextmanager
def _client(scheduler: str | None, at_once: int) -> Iterator[Client]:
    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
        return
    # A job is a process of its own: the workers here are threads that wait for one.
    with (
        LocalCluster(
            n_workers=at_once,
            threads_per_worker=1,
            processes=False,
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def share(at_once: int) -> dict[str, str]:
    """Return the environment of a job here: its share of the processors.

    >>> share(10_000)["OMP_NUM_THREADS"]
    '1'
    """
    threads = max(1, (os.cpu_count() or 1) // at_once)
    return os.environ | {"OMP_NUM_THREADS": str(threads)}


def command(folder: Path) -> list[str]:
    """Return what a worker starts, a process of its own for each job."""
    # -I: the file's own folder must not be where Python looks for modules
    return [sys.executable, "-I", job_module.__file__, str(folder)]


def why(name: str, folder: Path, error: BaseException) -> str:
    """Say why a job failed: its name, how it ended, and the end of its log."""
    if not isinstance(error, subprocess.CalledProcessError):
        return f"{name}: {error}"  # its workers died
    rc, log = error.returncode, folder / LOG
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    end = "\n".join(text.splitlines()[-TAIL:])
    how = f"killed by {signal.Signals(-rc).name}" if rc < 0 else f"exit code {rc}"
    return f"{name}: {how}; its log, {log}, ends so:\n{end}"


def tell(outcomes: Sequence[Outcome]) -> int:
    """Print one line a job, and return how many failed.

    >>> job = Job("one", ("true",))
    >>> tell([Outcome(job, job.folder(Path("runs")), found=True)])
    one: done before
    0
    """
    for each in outcomes:
        said = each.error and f"FAILED, {each.error}"
        print(f"{each.job.name}: {said or ('done before' if each.found else 'done')}")
    return sum(bool(each.error) for each in outcomes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run; exit code 1 if a job failed."""
    parser = argparse.ArgumentParser(prog="python -m drone.lab.sweep")
    parser.add_argument(
        "jobs", type=Path, help="JSON: {name: arguments of python}, as book/remote has"
    )
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--scheduler", help="address of a Dask scheduler")
    asked = parser.parse_args(arguments)
    listed = json.loads(asked.jobs.read_text(encoding="utf-8"))
    here, inputs = str(Path.cwd()), {"library": library()}
    jobs = [
        Job(name, (sys.executable, *words), cwd=here, inputs=inputs)
        for name, words in listed.items()
    ]
    outcomes = sweep(
        jobs, asked.folder, scheduler=asked.scheduler, at_once=asked.at_once
    )
    sys.exit(min(1, tell(outcomes)))


if __name__ == "__main__":
    main()
