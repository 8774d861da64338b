"""The dense models of chapters 1, 3 and 4: who has seen which rows."""

import pytest

from drone.lab import data, keys
from drone.lab.batches import tokenize
from drone.lab.dense import RECIPES, dense_model
from drone.lab.training import Recipe

QUICK = Recipe(epochs=1, batch_size=16, learning_rate=5e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def dense(folder):
    return dense_model("agreement", 1, rows=60, recipe=QUICK, cache=folder)


def test_the_three_parts_are_disjoint_and_make_up_the_rows(dense):
    sizes = [len(part) for part in (dense.fit, dense.calibration, dense.held)]
    assert sizes == [48, 6, 6]
    train = data.sample(data.load("agreement", splits=["train"])["train"], 60, 0)
    whole = tokenize(train, dense.tokenizer, "agreement")["input_ids"]
    parts = [dense.fit, dense.calibration, dense.held]
    drawn = [ids for part in parts for ids in part["input_ids"]]
    assert sorted(drawn) == sorted(whole)
    assert len(dense.dev) > 60


def test_only_fit_rows_are_trained_on(dense, folder):
    (kept,) = [path for path in folder.iterdir() if (path / "record.json").exists()]
    assert f'"rows": "{keys.of_rows(dense.fit)}"' in (kept / "record.json").read_text()


def test_the_same_call_reads_the_cache(dense, folder, capsys):
    again = dense_model("agreement", 1, rows=60, recipe=QUICK, cache=folder)
    assert "cache hit" in capsys.readouterr().out
    assert again.key == dense.key
    assert list(again.fit["input_ids"]) == list(dense.fit["input_ids"])


def test_a_task_without_a_recipe_is_refused():
    assert "cola" not in RECIPES
    with pytest.raises(ValueError, match="no recipe for 'cola'; there are agreement"):
        dense_model("cola", data_source="hub")
