"""The folder for a room without a network: its sums, and what its installer checks."""

import shutil
import subprocess

import pytest

from book.course import wheelhouse


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a-1-py3-none-any.whl").write_bytes(b"a wheel")
    (tmp_path / "book.tar.gz").write_bytes(b"a book")
    wheelhouse.write_sums(tmp_path)
    return tmp_path


def test_sums_are_what_sha256sum_reads(folder):
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_a_damaged_file_stops_the_installer(folder):
    shutil.copy(wheelhouse.INSTALLER, folder)
    (folder / "book.tar.gz").write_bytes(b"another book")
    target = folder / "course"
    done = subprocess.run(
        ["sh", "install.sh", str(target)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "book.tar.gz" in done.stdout + done.stderr
    assert not target.exists()
