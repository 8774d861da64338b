"""A bar shows in a terminal, leaves nothing, and can be silenced."""

from drone import progress


def test_a_bar_passes_the_items_on(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert list(progress.bar([1, 2, 3], desc="count")) == [1, 2, 3]
    assert "count" in capsys.readouterr().err


def test_a_silenced_bar_prints_nothing(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(progress.bar([1, 2, 3], desc="count")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
