"""Run a chapter over a grid of parameters: one notebook and one record a run.

    python book/sweep.py 03 grid.yaml --at-once 1

    # grid.yaml: a list has values to try, anything else is fixed
    rank: [64, 96]
    seeds: [[0], [1]]

What `make sweep` calls. Every combination is checked before the first one runs. What
is finished is not run again: a sweep that was stopped goes on. Change the notebook,
the library or a parameter, and the run is another one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from publish import KERNEL, ROOT, check_parameters, source

from drone.files import sha256
from drone.lab import parameters
from drone.lab.job import Job
from drone.lab.sweep import combinations, library, sweep, tell


def chapter_job(path: Path, given: dict[str, Any], label: str) -> Job:
    """Return the job that runs a notebook with some parameters, already checked."""
    words = [sys.executable, "-m", "papermill", str(path), "{folder}/run.ipynb"]
    words += [
        "--parameters_file",
        "{folder}/parameters.yaml",
        "--cwd",
        str(path.parent),
    ]
    words += ["--kernel", KERNEL["name"], "--no-progress-bar"]
    return Job(
        label,
        (*words, "--parameters", "results", "{folder}/record.jsonl"),
        cwd=str(ROOT),
        files={"parameters.yaml": yaml.safe_dump(given)},
        inputs={"notebook": sha256(path), "library": library()},
        environment={"TQDM_DISABLE": "1"},
    )


def chapter_jobs(chapter: str, grid: dict[str, Any]) -> list[Job]:
    """Check every combination of a grid, and return a job for each.

    Raises:
        ValueError: an unknown parameter, a wrong type or range, `results` (each run has
            its own), or no list in the grid.
    """
    path = source(chapter)
    if "results" in grid:
        raise ValueError("results: each run of a sweep keeps its record in its folder.")
    tried = [name for name, value in grid.items() if isinstance(value, list)]
    jobs = []
    for given in combinations(grid):
        check_parameters(path, given)
        label = ",".join(f"{name}={given[name]}" for name in tried)
        label = "".join(c if c.isalnum() or c in "=,.-_" else "_" for c in label)
        jobs.append(chapter_job(path, given, f"{path.name[:2]}-{label}"[:100]))
    return jobs


def main() -> None:
    """Read the command line and run; exit code 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("chapter", help="its number, such as 03")
    parser.add_argument("grid", type=Path, help="a YAML file")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--scheduler", help="address of a Dask scheduler")
    asked = parser.parse_args()
    try:
        jobs = chapter_jobs(asked.chapter, parameters.load(asked.grid))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    folder = ROOT / "runs" / f"sweep-{jobs[0].name[:2]}"
    outcomes = sweep(jobs, folder, scheduler=asked.scheduler, at_once=asked.at_once)
    failed = tell(outcomes)
    print(
        f"{len(jobs) - failed} of {len(jobs)} runs stand in {folder.relative_to(ROOT)}"
    )
    sys.exit(min(1, failed))


if __name__ == "__main__":
    main()
