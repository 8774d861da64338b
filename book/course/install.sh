#!/bin/sh
# Set up the book from the folder this file lies in, asking no network:
#   sh wheelhouse/install.sh course
# PYTHON=python3.12 chooses another Python; it must be the one the wheels are for.
set -eu
target=${1:?where to? for example: sh wheelhouse/install.sh course}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

(cd "$here" && sha256sum --check --quiet SHA256SUMS)
"$python" - "$(cat "$here/python-version")" <<'CHECK'
import sys

wanted, here = sys.argv[1], ".".join(map(str, sys.version_info[:3]))
made_with, found = ([int(n) for n in v.split(".")] for v in (wanted, here))
if found[:2] != made_with[:2] or found < made_with:
    series = ".".join(wanted.split(".")[:2])
    sys.exit(
        f"These wheels are for Python {wanted} or a later {series}, and this is {here}. "
        "Choose another: PYTHON=/path/to/python sh install.sh course"
    )
CHECK
mkdir -p "$target"
tar -xzf "$here/book.tar.gz" -C "$target"
"$python" -m venv "$target/.venv"
pip() { "$target/.venv/bin/python" -m pip install --quiet --no-index "$@"; }
pip --find-links "$here/wheels" --requirement "$target/requirements.lock"
pip --no-deps "$here"/wheels/drone-*.whl
# What make asks before it calls pip; newer than what it is made of.
touch "$target/.venv/.installed"
if [ -f "$here/site.tar.gz" ]; then
    tar -xzf "$here/site.tar.gz" -C "$target"
    # make would build it anew if a source were newer
    touch "$target/_build/html/index.html"
    echo "Decks, quizzes and assignments: $target/_build/html/index.html"
fi
echo "Ready: $target/.venv/bin/jupyter lab $target/notebooks"
