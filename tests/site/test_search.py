"""What a reader's search finds first: chapters and the ledger, then the library."""

import pytest
from built_site import needs_browser

API = "book/api.html"
FOUND = """all => all.map(
  (each) => each.querySelector("a").getAttribute("href").replace(/#.*/, ""))"""


@pytest.fixture
def find(address, page):
    """Pages that a search finds, the first one first."""

    def search(words):
        page.goto(f"{address}search.html?q={words}", wait_until="load")
        page.locator(".search-summary", has_text="earch").wait_for(timeout=60_000)
        return page.eval_on_selector_all("#search-results li", FOUND)

    # it is there at once; the pieces of text below each result are not asked for
    page.route("**/book/**", lambda route: route.abort())
    return search


@needs_browser
@pytest.mark.parametrize("words", ["rank", "batch", "factorize"])
def test_chapters_come_before_the_library(find, words):
    found = find(words)
    chapters = [n for n, name in enumerate(found) if name.startswith("book/chapters/")]
    assert chapters[0] < 3
    assert chapters[-1] < found.index(API)


@needs_browser
@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("Algorithm 2", "book/chapters/05-algorithm-2.html"),
        ("Algorithm 1", "book/chapters/03-algorithm-1.html"),
        ("headline", "book/ledger.html"),
        ("Theorem 2.1", "book/chapters/02-data-aware-derivation.html"),
        ("factorize_attention", API),
        ("LowRankLinear", API),
    ],
)
def test_what_is_meant_comes_first(find, words, first):
    assert find(words)[0] == first


@needs_browser
def test_a_decimal_is_found(find):
    found = find("1.92")
    assert found[0] == "book/ledger.html"
    assert "book/chapters/05-algorithm-2.html" in found


@needs_browser
def test_a_query_is_split_as_the_index_is(find, page):
    find("rank")
    split = "words => words.map(splitQuery)"
    assert page.evaluate(
        split, ["1.92× on MRPC", "Exercise 3.2 (code)", "...", ""]
    ) == [
        ["1.92", "on", "MRPC"],
        ["Exercise", "code"],
        [],
        [],
    ]
