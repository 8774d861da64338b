"""Jobs on Dask: each runs once, also when its worker is killed; failures have names."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from drone.lab.job import Job, done, place, run_once
from drone.lab.sweep import Outcome, combinations, main, sweep, tell


def says(name: str, folder: Path, code: str = "", **more: str) -> Job:
    """Append a line to a file of the job's name: how often it ran can be counted."""
    text = f"{code}\nopen({str(folder / name)!r}, 'a').write('ran\\n')"
    return Job(name, (sys.executable, "-c", text), environment=more)


def runs(folder: Path, name: str) -> int:
    path = folder / name
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two workers, each a process of its own."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as two:
        yield two


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)


def test_every_job_runs_once_and_a_second_sweep_runs_none(
    tmp_path: Path, cluster: LocalCluster
) -> None:
    threads = tmp_path / "threads"
    code = (
        f"import os; open({str(threads)!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    )
    jobs = [says("a", tmp_path, code), says("b", tmp_path)]
    first = sweep(jobs, tmp_path / "sweep")
    assert [(o.job.name, o.found, o.error) for o in first] == [
        ("a", False, ""),
        ("b", False, ""),
    ]
    assert threads.read_text() == str(os.cpu_count())  # one at a time has them all
    more, at = [*jobs, says("c", tmp_path)], cluster.scheduler_address
    again = sweep(more, tmp_path / "sweep", scheduler=at)
    assert [o.found for o in again] == [True, True, False]
    assert [runs(tmp_path, name) for name in "abc"] == [1, 1, 1]


def test_a_failed_job_is_tried_again_then_named_and_stops_no_other(
    tmp_path: Path, cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    at = cluster.scheduler_address
    log = tmp_path / "tries"
    code = f"open({str(log)!r}, 'a').write('x'); print('why it fails'); exit(3)"
    jobs = [says("bad", tmp_path, code), says("good", tmp_path)]
    bad, good = sweep(jobs, tmp_path / "sweep", scheduler=at, retries=1)
    assert log.read_text() == "xx"
    assert good.error == ""
    assert "bad: exit code 3" in bad.error
    assert "why it fails" in bad.error
    assert tell([bad, good]) == 1
    assert "bad: FAILED, " in capsys.readouterr().out
    # Mended, it runs; what was done does not.
    found = sweep([says("bad", tmp_path), jobs[1]], tmp_path / "sweep", scheduler=at)
    assert [(o.found, o.error) for o in found] == [(False, ""), (True, "")]


def test_a_worker_killed_in_mid_job_costs_nothing(
    tmp_path: Path, cluster: LocalCluster
) -> None:
    began = tmp_path / "began"
    slow = f"import time; open({str(began)!r}, 'w').close(); time.sleep(3)"
    jobs = [says("slow", tmp_path, slow), says("quick", tmp_path)]
    found: list[Outcome] = []

    def run() -> None:
        found.extend(sweep(jobs, tmp_path / "s", scheduler=cluster.scheduler_address))

    thread = threading.Thread(target=run)
    with Client(cluster) as client:
        pids = client.run(os.getpid)
        thread.start()
        wait_for(began)
        at_work = [worker for worker, keys in client.processing().items() if keys]
        for worker in at_work:
            os.kill(pids[worker], signal.SIGKILL)
        thread.join(240)
    assert at_work
    assert [(o.job.name, o.error) for o in found] == [("slow", ""), ("quick", "")]
    assert [runs(tmp_path, name) for name in ("slow", "quick")] == [1, 1]


def test_a_killed_sweep_goes_on(
    tmp_path: Path, cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    second = (
        f"import time; open({str(tmp_path / 'began')!r}, 'w').close(); "
        f"time.sleep(2); open({str(tmp_path / 'second')!r}, 'a').write('ran\\n')"
    )
    first = f"open({str(tmp_path / 'first')!r}, 'a').write('ran\\n')"
    listed = tmp_path / "jobs.json"
    listed.write_text(json.dumps({"first": ["-c", first], "second": ["-c", second]}))
    words = [str(listed), str(tmp_path / "sweep")]
    command = [sys.executable, "-m", "drone.lab.sweep", *words]
    process = subprocess.Popen(command, start_new_session=True)
    wait_for(tmp_path / "began")
    process.kill()
    process.wait()
    with pytest.raises(SystemExit) as ended:
        main([*words, "--scheduler", cluster.scheduler_address])
    assert ended.value.code == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "first: done before"
    assert said[1].startswith("second: done")
    assert [runs(tmp_path, name) for name in ("first", "second")] == [1, 1]


def test_a_job_is_another_when_anything_in_it_is() -> None:
    one = Job("a", ("true",))
    others = [
        Job("b", ("true",)),
        Job("a", ("false",)),
        Job("a", ("true",), cwd="/"),
        Job("a", ("true",), files={"x": "y"}),
        Job("a", ("true",), inputs={"x": "y"}),
        Job("a", ("true",), environment={"x": "y"}),
    ]
    assert len({job.key() for job in [one, *others]}) == 7


def test_files_and_the_own_folder_reach_the_command(tmp_path: Path) -> None:
    code = "import sys, pathlib; print(pathlib.Path(sys.argv[1]).read_text())"
    job = Job("a", (sys.executable, "-c", code, "{folder}/x"), files={"x": "text"})
    folder = place(job, tmp_path)
    assert not done(folder)
    assert run_once(folder) == 0
    assert done(folder)
    assert (folder / "log.txt").read_text() == "text\n"


@pytest.mark.parametrize(
    ("grid", "said"),
    [({"rank": []}, "rank: a list"), ({"rank": 3}, "the grid: a list")],
)
def test_a_grid_without_values_is_refused(grid: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(combinations(grid))


def test_two_jobs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names that repeat: a"):
        sweep([says("a", tmp_path), says("a", tmp_path, "x = 1")], tmp_path / "sweep")
