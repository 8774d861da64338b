"""Files written whole or not at all, and the SHA-256 that names their content."""

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose content is not the expected one.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the digest differs; the message names both and the file.
    """
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{path}: SHA-256 is {found}, expected {expected}. The file is damaged "
            "or not the one this book was made with; delete it and get it again."
        )


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the names, shapes and values of tensors, in order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # bfloat16 is unknown to numpy; the bytes of any dtype can be looked at
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def user_folder(variable: str, default: str) -> Path:
    """Return the folder an environment variable names, or one below the user's home.

    Args:
        variable: blank counts as not set; `~` is the user's home.
        default: relative to the home.

    Raises:
        RuntimeError: the variable is not set and there is no home.
    """
    named = os.environ.get(variable, "").strip()
    try:
        return Path(named).expanduser() if named else Path.home() / default
    except RuntimeError as error:
        raise RuntimeError(
            f"this user has no home folder ({error}); set {variable} to a folder, "
            "written without ~."
        ) from error


def _partial(folder: Path) -> Path:
    """Make a folder for unfinished writing, and remove those whose writers are dead.

    The name tells the owner, machine and process: a kill -9 cannot clean up, so the
    next who writes here does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"\W", "_", platform.node())
    if os.name == "posix":  # elsewhere a process cannot be asked without harm
        for left in folder.glob(f".partial-{host}-*-*"):
            owner = left.name.removeprefix(f".partial-{host}-").split("-")[0]
            if owner.isdigit() and not _alive(int(owner)):
                shutil.rmtree(left, ignore_errors=True)  # or another was faster
    return Path(tempfile.mkdtemp(prefix=f".partial-{host}-{os.getpid()}-", dir=folder))


def _alive(process: int) -> bool:
    """Whether a process of this machine is there, whoever owns it."""
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it is renamed to `path`, else removed."""
    folder = _partial(path.parent)
    try:
        temporary = folder / path.name
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(folder)


def check_free(path: Path) -> None:
    """Refuse a path at which something stands; an empty folder is nothing.

    Raises:
        FileExistsError: a file, or a folder with something in it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists already; delete it to write it anew, or name another."
        )


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it becomes `path`, else it is removed.

    Raises:
        FileExistsError: `path` is a file, or a folder with something in it; a result
            is never overwritten.
    """
    check_free(path)
    path = path.resolve()  # "." has no name, and stands in no folder of its own
    # mkdtemp makes the folder private (0700); the child has ordinary permissions.
    outer = _partial(path.parent)
    try:
        temporary = outer / path.name
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()  # refused if something came into it meanwhile
        temporary.rename(path)
    finally:
        shutil.rmtree(outer)
