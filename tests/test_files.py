"""Files are written whole or not at all, and are what their digest says."""

import stat
from pathlib import Path

import pytest

from drone.files import check_sha256, sha256, whole_file, whole_folder

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_sha256_is_that_of_the_standards_example(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256(path) == ABC
    check_sha256(path, ABC)


def test_another_content_is_refused_and_file_and_digests_named(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abd")
    with pytest.raises(ValueError, match=f"expected {ABC}") as error:
        check_sha256(path, ABC)
    assert str(path) in str(error.value) and sha256(path) in str(error.value)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        check_sha256(tmp_path / "none", ABC)


def test_a_file_appears_when_it_is_whole_and_replaces_the_old_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with whole_file(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() != text
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_file_whose_writing_fails_leaves_the_old_one_and_nothing_else(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "result"
    with whole_folder(path) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("path", [".", "../here", ""])
def test_an_empty_folder_is_filled_by_any_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with whole_folder(Path(path)) as temporary:
        (temporary / "a.txt").write_text("whole")
    assert (here / "a.txt").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_a_folder_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with whole_folder(tmp_path / "result"):
        pass
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "result")}
    assert len(modes) == 1


def test_a_folder_whose_writing_fails_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "result") as temporary:
            (temporary / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def write() -> None:
        with whole_folder(tmp_path):
            pytest.fail("begun")

    with pytest.raises(FileExistsError, match="delete it"):
        write()
    assert (tmp_path / "a").read_text() == "old"
