"""Grade one notebook in this process; `grade` starts it for each submission.

The clock is SIGALRM, which Windows does not have: grade there in the container or WSL.
"""

import json
import signal
import sys
import tempfile
from pathlib import Path

import nbformat
from otter.api import grade_submission

# A tick every so many seconds while a cell runs. otter-grader counts a test that
# raises as failed and goes on, so a loop without end costs only its own tests.
CLOCK = """
import signal

def _late(*_):
    raise TimeoutError("stopped after {seconds} s")

signal.signal(signal.SIGALRM, _late)
for _event, _seconds in (("pre_run_cell", {seconds}), ("post_run_cell", 0)):
    get_ipython().events.register(
        _event,
        lambda *_, s=_seconds: signal.setitimer(signal.ITIMER_REAL, s, s),
    )
"""


def main(autograder: str, notebook: str, marks: str, cell_seconds: str) -> None:
    """Write the points of each question as JSON."""
    if not hasattr(signal, "SIGALRM"):
        raise SystemExit(
            "Grading needs SIGALRM, which this system (Windows?) does not have: grade "
            "in the container of book/course/lab.md or under WSL."
        )
    submission = nbformat.read(notebook, as_version=4)
    clock = nbformat.v4.new_code_cell(CLOCK.format(seconds=int(cell_seconds)))
    submission.cells.insert(0, clock)
    with tempfile.TemporaryDirectory() as temporary:
        timed = Path(temporary, Path(notebook).name)
        nbformat.write(submission, timed)
        graded = grade_submission(str(timed), autograder, quiet=True)
    points = {name: float(test.score) for name, test in graded.results.items()}
    Path(marks).write_text(json.dumps(points))


if __name__ == "__main__":
    main(*sys.argv[1:])
