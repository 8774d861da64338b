"""Records of runs: written whole, read back equal, each with where it was made."""

import platform
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from drone.lab import records

FIELDS = {"date", "processor", "threads", "system", "python"}
FIELDS |= {"torch", "transformers", "datasets", "numpy", "drone"}


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    runs = [
        {"method": "svd", "rank": 4, "error": 0.1 + 0.2, "text": "σ\u2028\n"},
        {"method": "dense", "rank": 8, "error": 1e-300, "text": ""},
    ]
    records.save(tmp_path / "new" / "runs.jsonl", runs)
    found = records.load(tmp_path / "new" / "runs.jsonl")
    assert found[list(runs[0])].to_dict("records") == runs
    assert set(found.columns) == set(runs[0]) | FIELDS


def test_a_records_own_field_is_not_replaced_by_the_environments(
    tmp_path: Path,
) -> None:
    # `LatencyReport.conditions` has the threads that were set while timing.
    records.save(tmp_path / "runs", [{"threads": 7, "processor": "another"}])
    (found,) = records.load(tmp_path / "runs").to_dict("records")
    assert (found["threads"], found["processor"]) == (7, "another")


def test_records_that_cannot_be_written_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    records.save(path, [{"rank": 1}])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        records.save(path, [{"rank": 2}, {"rank": object()}])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("line", ['{"rank": ', "", "rank 4"])
def test_a_line_that_is_not_json_is_refused_with_its_number(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "runs"
    path.write_text(f'{{"rank": 1}}\n{line}\n{{"rank": 2}}\n')
    with pytest.raises(ValueError, match="line 2: not JSON") as error:
        records.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("line", ["[1]", "3", "null", '"text"'])
def test_a_line_that_is_no_object_is_refused_with_its_number(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "runs"
    path.write_text(f'{{"rank": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2: .* an object is needed"):
        records.load(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        records.load(tmp_path / "none")


def test_the_environment_names_date_machine_and_versions() -> None:
    found = records.environment()
    assert set(found) - {"gpu"} == FIELDS
    assert all(isinstance(value, str) and value for value in found.values())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["threads"] == str(torch.get_num_threads())
    assert platform.node() not in found.values()


def test_provenance_lists_parameters_environment_and_time() -> None:
    table = records.provenance({"rank": 8, "fast": True}, seconds=61.7)
    assert isinstance(table, pd.DataFrame)
    values = table["value"]
    assert values["parameter rank"] == "8" and values["parameter fast"] == "True"
    assert values["seconds"] == "62"
    assert set(table.index) == FIELDS | {"parameter rank", "parameter fast", "seconds"}


SETTINGS = {"task": "rte", "rates": (2e-5, 1e-4), "seed": 0, "again": {"epochs": 1}}


def test_a_kept_case_is_read_back_for_the_same_settings_only(tmp_path: Path) -> None:
    path, case = tmp_path / "new" / "rte.json", {"scores": [0.1 + 0.2], "key": "σ"}
    assert records.load_case(path, SETTINGS) is None  # nothing there yet
    records.save_case(path, SETTINGS, case)
    assert records.load_case(path, dict(reversed(SETTINGS.items()))) == case
    for change in ({"seed": 1}, {"rates": (2e-5,)}, {"again": {}}, {"more": 0}):
        assert records.load_case(path, SETTINGS | change) is None
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"case": {}}', '{"settings": 1}']
)
def test_a_damaged_case_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rte.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a kept case") as error:
        records.load_case(path, SETTINGS)
    assert str(path) in str(error.value)


def test_a_case_json_does_not_know_leaves_no_file(tmp_path):
    path = tmp_path / "case.json"
    with pytest.raises(TypeError, match="Tensor"):
        records.save_case(path, {}, {"logits": torch.zeros(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [{"dev_rows": 0}, None], ids=["other", "damaged"])
def test_a_case_of_other_settings_is_never_written_over(
    tmp_path: Path, there: dict[str, int] | None
) -> None:
    path, quick = tmp_path / "minilm-mrpc-0-0.2.json", {"dev_rows": 100}
    if there is None:
        path.write_text("half a ca")
    else:
        records.save_case(path, there, {"took": "10 hours"})
    before = path.read_bytes()
    beside = records.save_case(path, quick, {"took": "1 minute"})
    assert path.read_bytes() == before and beside.parent == tmp_path
    if there is not None:
        assert records.load_case(path, there) == {"took": "10 hours"}
        assert records.load_case(path, quick) == {"took": "1 minute"}
        assert records.load_case(path, {"dev_rows": 7}) is None
    # The same settings again are the same case, not a third file.
    assert records.save_case(path, quick, {"took": "2 minutes"}) == beside
    assert len(list(tmp_path.iterdir())) == 2


def test_records_name_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("gpu" in records.environment()) is torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert records.environment()["gpu"] == "NVIDIA H100"
