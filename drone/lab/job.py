"""One command, run once: a lock, a log, and a note when it is done.

A sweep's worker starts this as a process of its own. If the worker is killed, the
command goes on and notes its end; whoever is given the same job meanwhile waits for it
and finds it done.

    python -I drone/lab/job.py FOLDER        FOLDER/job.json: what to run

It imports nothing of drone: to start a process, no process needs to load PyTorch.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock

LOG, DONE = "log.txt", "done.json"


@dataclass(frozen=True)
class Job:
    """A command, and where its log and the note of its end go.

    Attributes:
        name: what people call it.
        command: arguments of a process; the first is a program. `{folder}` in one
            stands for the job's own folder.
        cwd: where it runs.
        files: texts that are put into its folder first, {name: text}.
        inputs: SHA-256 of files it reads, {name: digest}; they are part of its key.
        environment: variables beside those of the worker.
    """

    name: str
    command: tuple[str, ...]
    cwd: str = "."
    files: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def key(self) -> str:
        """Return the SHA-256 over all of it.

        >>> len(Job("one", ("true",)).key())
        64
        """
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def folder(self, sweep: Path) -> Path:
        """Return where it lies in a sweep's folder: its name, and 8 digits of its key.

        >>> Job("one", ("true",)).folder(Path("runs")).parent.name
        'runs'
        """
        return sweep / f"{self.name}-{self.key()[:8]}"


def place(job: Job, sweep: Path) -> Path:
    """Write what is to be run into its folder, and return the folder."""
    folder = job.folder(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in job.files.items():
        _write(folder / name, text)
    _write(folder / "job.json", json.dumps(asdict(job), indent=1))
    return folder


def done(folder: Path) -> bool:
    """Whether a job has ended well."""
    return (folder / DONE).is_file()


def run_once(folder: Path) -> int:
    """Run a job unless it is done; wait if another process runs it. Return its rc."""
    with FileLock(folder / ".lock"):
        if done(folder):
            return 0
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        started = time.time()
        with (folder / LOG).open("ab") as log:
            rc = subprocess.run(
                [word.replace("{folder}", str(folder)) for word in job["command"]],
                cwd=job["cwd"],
                env=os.environ | job["environment"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        if rc == 0:
            note = {"started": started, "seconds": time.time() - started}
            _write(folder / DONE, json.dumps(note))
    return rc


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(run_once(Path(sys.argv[1])))
