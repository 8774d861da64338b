"""Lint, format, types, and the schemas of the files that cannot be run here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def run(*command):
    done = subprocess.run(
        [str(BIN / command[0]), *map(str, command[1:])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint():
    run("ruff", "check", ".")


def test_format():
    run("ruff", "format", "--check", ".")


def test_types():
    run("mypy")


def test_workflows_follow_their_schema():
    run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)


def test_the_citation_follows_its_schema():
    schema = "vendor.citation-file-format"
    run("check-jsonschema", "--builtin-schema", schema, ROOT / "CITATION.cff")


def test_a_workflow_with_a_fault_is_noticed(tmp_path):
    bad = tmp_path / "bad.yml"
    bad.write_text("name: bad\non: push\njobs: {a: {runs-on: 3}}\n")
    with pytest.raises(AssertionError):
        run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", bad)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash to check .ci/run with")
def test_the_ci_script_parses():
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_the_lock_pins_every_direct_dependency_and_names_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    assert "torch==2.13.0\n" in lock
    assert "jupyter-book==1." in lock
    assert "://" not in lock
