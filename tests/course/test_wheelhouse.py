"""The folder for a room without a network: its sums, and what its installer checks."""

import os
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
