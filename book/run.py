"""Rerun a chapter into runs/, its parameters checked before anything starts.

    python book/run.py 01                      # the defaults
    python book/run.py 01 my-parameters.yaml   # -> runs/01-my-parameters.ipynb

What `make run` calls.
"""

import argparse
from pathlib import Path

import papermill
from filelock import FileLock, Timeout
from publish import KERNEL, ROOT, check_parameters, source

from drone.lab import parameters


def main() -> None:
    """Read the command line and run one chapter."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("chapter", help="its number, such as 01")
    parser.add_argument("parameters", nargs="?", type=Path, help="a YAML file")
    arguments = parser.parse_args()
    try:
        path = source(arguments.chapter)
        given = {}
        if arguments.parameters is not None:
            given = parameters.load(arguments.parameters)
        check_parameters(path, given)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    name = "default" if arguments.parameters is None else arguments.parameters.stem
    target = ROOT / "runs" / f"{path.name[:2]}-{name}.ipynb"
    target.parent.mkdir(exist_ok=True)
    try:
        with FileLock(target.with_suffix(".lock"), timeout=0):
            papermill.execute_notebook(
                path, target, given, cwd=path.parent, kernel_name=KERNEL["name"]
            )
    except Timeout:
        raise SystemExit(
            f"another run is writing {target.relative_to(ROOT)}; wait for it, or give "
            "this one a YAML file of another name."
        ) from None
    print(f"written: {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
