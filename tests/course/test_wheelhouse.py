"""The folder for a room without a network: its sums, and what its installer checks."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

from book.course import wheelhouse


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a-1-py3-none-any.whl").write_bytes(b"a wheel")
    (tmp_path / "book.tar.gz").write_bytes(b"a book")
    (tmp_path / "python-version").write_text("3.99.0")
    wheelhouse.write_sums(tmp_path)
    return tmp_path


def test_sums_are_what_sha256sum_reads(folder):
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


def install(folder, python=sys.executable):
    shutil.copy(wheelhouse.INSTALLER, folder)
    command = ["sh", "install.sh", str(folder / "course")]
    environment = os.environ | {"PYTHON": str(python)}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment
    )


def test_a_damaged_file_stops_the_installer(folder):
    (folder / "book.tar.gz").write_bytes(b"another book")
    done = install(folder)
    assert done.returncode != 0
    assert "book.tar.gz" in done.stdout + done.stderr
    assert not (folder / "course").exists()


def test_another_python_stops_the_installer(folder):
    done = install(folder)
    assert done.returncode != 0
    assert "are for Python 3.99.0 or a later 3.99, and this is 3." in done.stderr
    assert not (folder / "course").exists()


@pytest.fixture
def whole(tmp_path):
    """A folder whose wheels and Python are a shim: what is unpacked is real."""
    book, site, folder = (tmp_path / name for name in ("book", "html", "whole"))
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "drone-1-py3-none-any.whl").write_bytes(b"a wheel")
    book.mkdir()
    (book / "requirements.lock").write_text("")
    with tarfile.open(folder / "book.tar.gz", "w:gz") as tar:
        tar.add(book / "requirements.lock", "requirements.lock")
    (site / "_static" / "course").mkdir(parents=True)
    (site / "index.html").write_text("the book")
    (site / "_static" / "course" / "slides-01.html").write_text("a deck")
    (folder / "python-version").write_text(".".join(map(str, sys.version_info[:3])))
    shim = tmp_path / "python"  # its venv has a pip that does nothing
    shim.write_text(
        f"""#!/bin/sh
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"; printf '#!/bin/sh\\n' > "$3/bin/python"; chmod +x "$3/bin/python"
else exec "{sys.executable}" "$@"; fi
"""
    )
    shim.chmod(0o755)
    return folder, site, shim


@pytest.mark.parametrize("built", [True, False])
def test_the_room_gets_the_site_and_make_calls_no_pip(whole, built):
    folder, site, shim = whole
    wheelhouse.pack_site(folder, site if built else site / "gone")
    wheelhouse.write_sums(folder)
    done = install(folder, shim)
    assert done.returncode == 0, done.stderr
    course = folder / "course"
    deck = course / "_build" / "html" / "_static" / "course" / "slides-01.html"
    assert deck.is_file() == built
    stamp, lock = course / ".venv" / ".installed", course / "requirements.lock"
    assert stamp.stat().st_mtime >= lock.stat().st_mtime
    assert ("slides" in done.stdout or "Decks" in done.stdout) == built


def instructions():
    """The container file's lines as (instruction, what it says)."""
    text = (wheelhouse.ROOT / "Containerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def test_the_image_is_made_of_what_the_wheelhouse_is():
    said = dict(instructions())
    source, inside = said["COPY"].split()
    makefile = (wheelhouse.ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"book.course.wheelhouse {source}\n" in makefile
    installed = [text for name, text in instructions() if name == "RUN"][-1]
    assert installed == f"sh {inside}/install.sh {said['WORKDIR']}"


def test_the_images_python_is_one_the_lock_was_made_for():
    (found,) = re.findall(
        r"FROM python:(\d+\.\d+)", "\n".join(map(" ".join, instructions()))
    )
    project = (wheelhouse.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={found}"' in project


def test_what_the_image_starts_is_installed_and_has_its_folder():
    said = dict(instructions())
    program, *arguments = json.loads(said["CMD"])
    assert said["ENV"] == f"PATH={said['WORKDIR']}/.venv/bin:$PATH"
    lock = (wheelhouse.ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert f"\n{program}{arguments[0]}==" in lock  # jupyter lab
    assert (wheelhouse.ROOT / arguments[-1]).is_dir()
