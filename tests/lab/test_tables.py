"""Tables of results: what a reader, a screen reader and a plain notebook get."""

from xml.etree import ElementTree

import pytest

from drone.lab.tables import Estimate, Row, table

ROWS = [
    Row("dense", [79.2, None, 1.0], "MRPC", reference=True),
    Row("majority class", [68.38, 10.82, None], "MRPC", reference=True),
    Row("SVD", [71.9, Estimate(7.3, 5.1, 9.6), 1.98], "MRPC"),
    Row("DRONE", [77.04, Estimate(2.2, -0.9, 3.6), 2.01], "MRPC"),
    Row("keys & values <alone>", [60.0, 19.2, 2.0], "MRPC", failed=True),
    Row("DRONE", [90.0, 1.0, 2.0], "SST-2"),
]
COLUMNS = ["model", "points", "lost", "speed-up"]


def made(rows=ROWS, **given):
    given = {
        "best": {"points": "max", "lost": "min"},
        "formats": {"speed-up": ".2f"},
    } | given
    return table("DRONE loses least.", COLUMNS, rows, **given)


def parsed(html):
    return ElementTree.fromstring(f"<div>{html.replace('hidden', '')}</div>")


def cells(row):
    return ["".join(cell.itertext()) for cell in row]


def test_cells_are_written_with_one_decimal_and_the_interval_beside_its_number():
    table_ = parsed(made(shown=9).html())
    (svd,) = [row for row in table_.iter("tr") if row[0].text == "SVD"]
    assert cells(svd) == ["SVD", "71.9", "7.3 [5.1, 9.6]", "1.98"]
    (drone, _) = [row for row in table_.iter("tr") if row[0].text == "DRONE"]
    assert cells(drone)[2] == "2.2 [−0.9, 3.6]"
    (dense,) = [row for row in table_.iter("tr") if row[0].text == "dense"]
    assert cells(dense)[2] == "–"


@pytest.mark.parametrize(
    "spec", [".1f", "+.1f", ".2f", ".0f", ".1%", "+.2%", ".3g", "d"]
)
@pytest.mark.parametrize("value", [-0.0, -0.001, -0.04, -0.06, -3, 0, 0.04, -1000, 7])
def test_zero_has_no_minus_and_other_numbers_keep_theirs(value: float, spec: str):
    if spec == "d" and not isinstance(value, int):
        return
    shown = table("c", ["", "x"], [Row("r", [value])], formats={"x": spec})
    (cell,) = shown.cells(shown.rows[0])
    # Told from the number read back: below zero if, and only if, it has a minus.
    read = float(cell.removesuffix("%"))
    assert cell.startswith("-") == (read < 0)
    assert cell.lstrip("+-") == f"{value:{spec}}".lstrip("+-")
    assert f"{Estimate(value, value, value):{spec}}" == f"{cell} [{cell}, {cell}]"


def test_the_best_of_each_group_is_marked_and_a_reference_never():
    html = parsed(made(shown=9).html())
    best = [
        (row[0].text, cell.text)
        for row in html.iter("tr")
        for cell in row
        if cell.get("class") == "best"
    ]
    assert best == [
        ("DRONE", "77.0"),
        ("DRONE", "2.2 [−0.9, 3.6]"),
        ("DRONE", "90.0"),
        ("DRONE", "1.0"),
    ]


def test_what_reads_equal_is_equally_good():
    two = [Row("a", [77.04, 1.0, 1.0]), Row("b", [76.96, 1.0, 1.0])]
    assert made(two).html().count('<td class="best">77.0</td>') == 2


def test_rows_of_a_group_stand_together_under_its_name():
    mixed = [ROWS[5], ROWS[2], Row("SVD", [80.0, 11.0, 2.0], "SST-2")]
    bodies = list(parsed(made(mixed).html()).iter("tbody"))
    assert [[cells(row)[0] for row in body] for body in bodies] == [
        ["SST-2", "DRONE", "SVD"],
        ["MRPC", "SVD"],
    ]


def test_kinds_of_rows_are_told_by_class_and_names_are_escaped():
    rows = {row[0].text: row.get("class") for row in parsed(made().html()).iter("tr")}
    assert rows["keys & values <alone>"] == "failed"
    assert rows["dense"] == rows["majority class"] == "reference"
    assert rows["SVD"] is None


def test_five_rows_are_shown_and_all_are_folded_beneath():
    html = parsed(made().html())
    first, whole = html.iter("table")
    assert len(list(first.iter("td"))) == 3 * 5
    assert len(list(whole.iter("td"))) == 3 * 6
    (fold,) = html.iter("details")
    assert whole in list(fold.iter("table"))
    assert fold[0].text == "All 6 rows"


def test_the_caller_may_choose_what_is_folded_and_the_best_may_be_there():
    rows = [Row("SVD", [71.9, 7.3, 2.0]), Row("DRONE", [77.0, 2.2, 2.0], folded=True)]
    first, whole = parsed(made(rows).html()).iter("table")
    assert [cells(row)[0] for row in first.iter("tr")] == ["model", "SVD"]
    assert not [c for c in first.iter("td") if c.get("class")]
    assert [c.text for c in whole.iter("td") if c.get("class")] == ["77.0", "2.2"]


def test_a_screen_reader_gets_caption_and_headers():
    html = parsed(made(shown=9).html())
    assert [c.text for c in html.iter("caption")] == ["DRONE loses least."]
    scopes = [cell.get("scope") for cell in html.iter("th")]
    assert scopes[:4] == ["col"] * 4
    assert set(scopes[4:]) == {"row", "rowgroup"}
    assert all("".join(cell.itertext()) for cell in html.iter("th"))


def test_plain_text_is_the_fallback_with_all_rows():
    bundle = made()._repr_mimebundle_()
    text = bundle["text/plain"]
    assert text.splitlines()[0] == "DRONE loses least."
    (svd,) = [line for line in text.splitlines() if "SVD" in line]
    assert svd.split() == ["SVD", "71.9", "7.3", "[5.1,", "9.6]", "1.98"]
    assert "77.0*" in text
    assert "(failed)" in text
    assert text.count("DRONE") == 3
    widths = [len(line) for line in text.splitlines()[1:] if "1.98" in line]
    assert widths == [len(line) for line in text.splitlines() if "2.01" in line]


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match="'SVD' has 1 cells; 3"):
        made([Row("SVD", [1.0])])
    with pytest.raises(ValueError, match="0 rows"):
        made([])
    with pytest.raises(ValueError, match="columns of"):
        made(best={"speed": "max"})
    with pytest.raises(ValueError, match="'max' or 'min'"):
        made(best={"points": "most"})
