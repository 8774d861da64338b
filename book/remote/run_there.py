"""Run jobs on a bare machine without a network, and bring their cases back.

    run_there.py setup runs/remote            unpack code, wheels, data, weights
    run_there.py start JOBS.json --at-once 2  start a list of jobs, which live on;
                                              --only NAME,NAME some of them
    run_there.py status                       one line a job
    run_there.py collect FOLDER               finished cases and logs, packed
    run_there.py bring FILE FOLDER --first 0  a large file in parts, four a time

Everything lies under THERE. A list of jobs is JSON: {name: [arguments of python]}, in
the order to be run; `{there}` and `{python}` in an argument are replaced. A job that
ended well is not started again; one that was killed or failed is, and reads the cases
it had finished. Needs nothing but Python.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

THERE = Path(os.environ.get("DRONE_THERE", "/tmp/there"))
PART = 15_000_000  # bytes of a file that comes back
PARTS = 4  # parts of a large file in one go
FILES = 8  # that may come back at once


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- setup ----------------------------------------------------------------------


def setup(bundle: Path) -> None:
    """Unpack what has arrived so far; what has been unpacked is left alone."""
    base = bundle / "base"
    manifest = json.loads((base / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        path = bundle / name
        if path.parts[-2].startswith("weights-") and not path.exists():
            continue  # comes with a later transfer
        if sha256(path) != digest:
            raise SystemExit(f"{path}: not what was packed.")
    THERE.mkdir(parents=True, exist_ok=True)
    # A copy: running jobs must not read a working tree that is being replaced
    if not (THERE / "code").exists():
        for name in ("drone", "book/remote"):
            shutil.copytree(name, THERE / "code.new" / name)
        (THERE / "code.new").rename(THERE / "code")
    if not (THERE / "data").exists():
        with tarfile.open(base / "data.tar.gz") as tar:
            tar.extractall(THERE / "data.new", filter="data")
        (THERE / "data.new").rename(THERE / "data")
    if not (THERE / "site").exists():
        wheels = sorted(str(wheel) for wheel in (base / "wheels").glob("*.whl"))
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index"]
        command += ["--no-deps", "--no-compile", "--no-cache-dir", "--target"]
        subprocess.run([*command, str(THERE / "site.new"), *wheels], check=True)
        name_version(THERE / "site.new")
        (THERE / "site.new").rename(THERE / "site")
    kept = THERE / "parts"
    kept.mkdir(exist_ok=True)
    for part in bundle.glob("weights-*/part-*"):
        if not (kept / part.name).exists():
            shutil.copy(part, kept / part.name)
    count = manifest.get("parts", 0)
    have = sorted(kept.glob("part-*"))
    print(f"code, data, wheels; {len(have)} of {count} parts of the weights")
    model = THERE / "models" / manifest.get("model", "")
    if count and len(have) == count and not (model / "model.safetensors").exists():
        put_together(have, base / "model", model, manifest["weights"])


def name_version(site: Path) -> None:
    """Tell Python which version of drone this is: it runs uninstalled."""
    version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    info = site / f"drone-{version}.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: drone\nVersion: {version}\n"
    (info / "METADATA").write_text(text)


def put_together(parts: list[Path], files: Path, model: Path, digest: str) -> None:
    """Join the parts; write the weights in float32, as every loader expects."""
    new = model.with_name(model.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(files, new)
    rounded = new / "model.f16.safetensors"
    with rounded.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    if sha256(rounded) != digest:
        raise SystemExit(f"{rounded}: not the weights that were packed.")
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, torch; from safetensors.torch import load_file, save_file\n"
            "old, new = sys.argv[1:]\n"
            "save_file({n: w.float() if w.is_floating_point() else w\n"
            "           for n, w in load_file(old).items()}, new, {'format': 'pt'})",
            str(rounded),
            str(new / "model.safetensors"),
        ],
        check=True,
    )
    rounded.unlink()
    new.rename(model)
    print(f"{model}: put together, float16 rounded, written as float32")


# --- jobs -----------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return what a job's process sees."""
    return os.environ | {
        "PYTHONPATH": f"{THERE / 'code'}:{THERE / 'site'}",
        "DRONE_DATA": str(THERE / "data"),
        "DRONE_MODELS": str(THERE / "models"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def start(jobs: Path, at_once: int, only: str) -> None:
    """Start a process of its own that runs the list; it outlives this command."""
    chosen = json.loads(jobs.read_text())
    if only:
        chosen = {name: chosen[name] for name in only.split(",")}
    (THERE / "jobs").mkdir(parents=True, exist_ok=True)
    own = THERE / "jobs" / f"list-{time.time_ns()}.json"
    own.write_text(json.dumps(chosen))
    script = str(THERE / "code/book/remote/run_there.py")
    with (THERE / "jobs" / f"{own.stem}.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, script, "supervise", str(own), "--at-once", str(at_once)],
            env=environment() | {"DRONE_THERE": str(THERE)},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=THERE,
            start_new_session=True,
        )
    print(f"{', '.join(chosen)}: {at_once} at once, supervised by {process.pid}")


def supervise(jobs: Path, at_once: int) -> None:
    """Run a list of jobs, so many at a time; each has a log and a state."""
    waiting = list(json.loads(jobs.read_text()).items())
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                write_state(name, ended=time.time(), rc=process.returncode)
                del running[name]
        while waiting and len(running) < at_once:
            name, arguments = waiting.pop(0)
            if (state := read_state(name)).get("rc") == 0 or alive(state):
                continue
            places = {"{there}": str(THERE), "{python}": sys.executable}
            command = [sys.executable]
            for argument in arguments:
                for place, value in places.items():
                    argument = argument.replace(place, value)
                command.append(argument)
            with (THERE / "jobs" / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            write_state(
                name, pid=running[name].pid, started=time.time(), ended=None, rc=None
            )
        time.sleep(0.2)


def read_state(name: str) -> dict[str, float]:
    """Return what is known of a job; nothing if it never ran."""
    path = THERE / "jobs" / f"{name}.state"
    return json.loads(path.read_text()) if path.exists() else {}


def write_state(name: str, **new: float | None) -> None:
    """Note something of a job, whole or not at all."""
    path = THERE / "jobs" / f"{name}.state"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(read_state(name) | new))
    part.replace(path)


def alive(state: dict[str, float]) -> bool:
    """Whether a job that has not ended still has its process."""
    if "pid" not in state or state.get("rc") is not None:
        return False
    return Path(f"/proc/{int(state['pid'])}").exists()


def status() -> None:
    """Print one line a job: how it stands, since when, its log's last line."""
    for path in sorted((THERE / "jobs").glob("*.state")):
        state = json.loads(path.read_text())
        if state.get("rc") is not None:
            how = "done" if state["rc"] == 0 else f"FAILED {state['rc']}"
        else:
            how = "running" if alive(state) else "KILLED"
        seconds = state.get("ended") or time.time()
        log = path.with_suffix(".log").read_text(errors="replace").splitlines()
        last = log[-1][:150] if log else ""
        taken = f"{seconds - state['started']:5.0f} s"
        print(f"{path.stem:20} {state['pid']:>7} {how:10} {taken}  {last}")
    cases = list((THERE / "cases").glob("*/*.json"))
    print(f"{len(cases)} cases, {sum(c.stat().st_size for c in cases) / 1e6:.1f} MB")
    smi = shutil.which("nvidia-smi")
    if smi:
        asked = "--query-gpu=utilization.gpu,memory.used,power.draw"
        subprocess.run([smi, asked, "--format=csv,noheader"], check=False)


# --- what comes back ------------------------------------------------------------


def collect(folder: Path) -> None:
    """Pack finished cases and logs into files small enough to come back."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = THERE / "cases.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted((THERE / "cases").glob("*/*.json")):
            tar.add(path, str(path.relative_to(THERE)))
        for pattern in ("*.log", "*.state"):
            for path in sorted((THERE / "jobs").glob(pattern)):
                tar.add(path, str(path.relative_to(THERE)))
    count = write_parts(archive, folder, 0, FILES)
    print(f"{archive.stat().st_size / 1e6:.1f} MB of cases and logs in {count} files")


def bring(file: Path, folder: Path, first: int) -> None:
    """Write a few parts of a large file, beginning with part `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    count = write_parts(file, folder, first, PARTS)
    print(f"{file.name}: {count} parts from {first}, SHA-256 {sha256(file)}")


def write_parts(file: Path, folder: Path, first: int, most: int) -> int:
    """Cut a file; write parts `first` to at most `first + most - 1`."""
    size, written = file.stat().st_size, 0
    with file.open("rb") as whole:
        for number in range(first, min(first + most, -(-size // PART))):
            whole.seek(number * PART)
            part = folder / f"{file.name}.{number:02d}"
            part.write_bytes(whole.read(PART))
            written += 1
    if first == 0 and size > most * PART:
        print(f"{file.name}: {-(-size // PART)} parts in all, more remain")
    return written


def main() -> None:
    """Do one of the things above."""
    parser = argparse.ArgumentParser(description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    ways.add_parser("setup").add_argument("bundle", type=Path)
    for name in ("start", "supervise"):
        way = ways.add_parser(name)
        way.add_argument("jobs", type=Path)
        way.add_argument("--at-once", type=int, default=1)
        if name == "start":
            way.add_argument("--only", default="", help="names, with commas")
    ways.add_parser("status")
    ways.add_parser("collect").add_argument("folder", type=Path)
    way = ways.add_parser("bring")
    way.add_argument("file", type=Path)
    way.add_argument("folder", type=Path)
    way.add_argument("--first", type=int, default=0)
    asked = vars(parser.parse_args())
    each = (setup, start, supervise, status, collect, bring)
    {way.__name__: way for way in each}[asked.pop("way")](**asked)


if __name__ == "__main__":
    main()
