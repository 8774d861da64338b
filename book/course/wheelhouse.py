"""Everything a room without a network needs, in one folder.

    python -m book.course.wheelhouse runs/wheelhouse

Packages are those of requirements.lock, for the system and Python this runs on.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"
INSTALLER = Path(__file__).with_name("install.sh")


def make(target: Path) -> Path:
    """Fill the folder: wheels/, book.tar.gz, python-version, install.sh, SHA256SUMS.

    If the site is built (`make book`), it comes along as site.tar.gz.
    """
    wheels = target / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(wheels)]
    lock = str(ROOT / "requirements.lock")
    subprocess.run([*pip, "--requirement", lock], check=True)
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    book = ["git", "archive", "--format=tar.gz", "-o", str(target / "book.tar.gz")]
    subprocess.run([*book, "HEAD"], check=True, cwd=ROOT)
    pack_site(target)
    # the lock names other releases for other Pythons, down to the third number
    made_with = ".".join(map(str, sys.version_info[:3]))
    (target / "python-version").write_text(made_with)
    shutil.copy(INSTALLER, target)
    write_sums(target)
    return target


def pack_site(target: Path, site: Path = SITE) -> None:
    """The built site as site.tar.gz: decks, quizzes, students' notebooks; else none."""
    packed = target / "site.tar.gz"
    packed.unlink(missing_ok=True)  # an old one beside a new book would mislead
    if not (site / "index.html").is_file():
        print(f"{site} is not built: no decks and quizzes go along. Try `make book`.")
        return
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(site, "_build/html")


def write_sums(target: Path) -> None:
    """SHA256SUMS over all files, in the form that `sha256sum --check` reads."""
    sums = target / "SHA256SUMS"
    lines = []
    for path in sorted(target.rglob("*")):
        if path.is_file() and path != sums:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(target).as_posix()}\n")
    sums.write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    print(make(parser.parse_args().target.resolve()))
