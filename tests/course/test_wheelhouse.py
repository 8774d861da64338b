"""The folder for a room without a network: its sums, and what its installer checks."""

import json
import os
import re
import shutil
import subprocess
import sys

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


def install(folder):
    shutil.copy(wheelhouse.INSTALLER, folder)
    command = ["sh", "install.sh", str(folder / "course")]
    environment = os.environ | {"PYTHON": sys.executable}
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
