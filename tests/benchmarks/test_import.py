"""What `import drone` costs beyond the packages it stands on, in processor seconds."""

import resource
import subprocess
import sys

import pytest

THEIRS = "import torch; from transformers import AutoConfig, AutoModel, PreTrainedModel"


def processor_seconds(code: str) -> float:
    """Return the seconds of a fresh interpreter; others on the machine do not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.benchmark(group="import")
def test_import_costs_at_most_1_3_times_torch_and_transformers(benchmark) -> None:
    ours, theirs = [], []
    for _ in range(3):  # in turns; the least counts, what is above it is noise
        ours.append(processor_seconds("import drone"))
        theirs.append(processor_seconds(THEIRS))
    benchmark.pedantic(processor_seconds, ("import drone",), rounds=1)
    assert min(ours) <= 1.3 * min(theirs), f"{min(ours):.2f} s, {min(theirs):.2f} s"
