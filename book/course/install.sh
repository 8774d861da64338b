#!/bin/sh
# Set up the book from the folder this file lies in, asking no network:
#   sh wheelhouse/install.sh course
# PYTHON=python3.12 chooses another Python; it must be the one the wheels are for.
set -eu
target=${1:?where to? for example: sh wheelhouse/install.sh course}
here=$(cd "$(dirname "$0")" && pwd)

(cd "$here" && sha256sum --check --quiet SHA256SUMS)
mkdir -p "$target"
tar -xzf "$here/book.tar.gz" -C "$target"
"${PYTHON:-python3}" -m venv "$target/.venv"
pip() { "$target/.venv/bin/python" -m pip install --quiet --no-index "$@"; }
pip --find-links "$here/wheels" --requirement "$target/requirements.lock"
pip --no-deps "$here"/wheels/drone-*.whl
echo "Ready: $target/.venv/bin/jupyter lab $target/notebooks"
