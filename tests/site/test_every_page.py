"""The rendered book: built from nothing, then opened in a real browser."""

import re
from collections import defaultdict
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from built_site import (
    AXE,
    CHAPTER,
    DESKTOP,
    PHONE,
    ROOT,
    SET_FORMULAS,
    build,
    needs_axe,
    needs_browser,
    pages,
    soup,
)

MADE_BY_SPHINX = ["genindex.html", "search.html"]
# Rules of colour read marked elements alone.
COLOUR_RULES = {
    "color-contrast": "[data-look]",
    "link-in-text-block": "a[href][data-look]",
}
# Thousands of words a page, and few looks: contrast follows from an element's colour,
# size and weight and from the grounds behind it; a link in a text needs the text's look
# besides. Three of each look are marked, should one lie where axe cannot read it: three
# of the whole site, for `before` has how many of each look were read on other pages.
THREE_OF_EACH_LOOK = """(before) => {
  document.querySelectorAll("[data-aside]").forEach((e) => delete e.dataset.aside);
  const grounds = new Map([[null, ""]]);
  const seen = new Map(Object.entries(before));
  const ground = (element) => {
    if (!grounds.has(element)) {
      const {backgroundColor, backgroundImage, opacity} = getComputedStyle(element);
      const own = [backgroundColor, backgroundImage, opacity].join();
      const clear = own === "rgba(0, 0, 0, 0),none,1";
      grounds.set(element, ground(element.parentElement) + (clear ? "" : own + "|"));
    }
    return grounds.get(element);
  };
  const look = (element) => {
    const style = getComputedStyle(element);
    return [ground(element), style.color, style.fontSize, style.fontWeight,
            style.textDecorationLine].join();
  };
  for (const each of document.body.querySelectorAll("*")) {
    each.removeAttribute("data-look");
    const box = each.getBoundingClientRect();
    const written = [...each.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
      || each.matches("input, select, textarea");
    if (!written || !each.checkVisibility() || box.width < 2 || box.right < 0) continue;
    const link = each.closest("a"), text = link?.closest("p, li, td, dd, dt, div");
    const inside = text?.textContent.length > 2 * link?.textContent.length;
    const key = [each, ...(link ? [link, link.parentElement] : [])].map(look) + inside;
    seen.set(key, (seen.get(key) ?? 0) + 1);
    if (seen.get(key) <= 3) (link ?? each).dataset.look = "";
  }
  // The rest is hidden, for axe takes seconds to see what lies over what in a whole
  // page. It stays in its place, so that no rule of style chooses other elements; and
  // beside a marked link it stays to be seen, for the link is compared with it.
  const hide = (box) => {
    const marked = [...box.children].some((child) => child.matches("[data-look]"));
    for (const child of box.children) {
      if (child.matches("[data-look]")) continue;
      if (child.querySelector("[data-look]")) hide(child);
      else if (!marked) child.dataset.aside = "";
    }
  };
  hide(document.body);
  return Object.fromEntries(seen);
}"""


def broken_links(site):
    """Internal links and anchors that lead nowhere."""
    anchors, links = defaultdict(set), []
    for path in site.rglob("*.html"):
        name = path.relative_to(site).as_posix()
        if name.startswith("_static/"):  # templates of the theme, not pages
            continue
        page = soup(path)
        anchors[name] = {tag["id"] for tag in page.find_all(id=True)}
        links += [
            (name, tag.get("href") or tag.get("src"))
            for tag in page.find_all(["a", "link", "img", "script"])
            if tag.get("href") or tag.get("src")
        ]
    broken = []
    for name, link in links:
        if re.match(r"[a-z]+:", link) or link.startswith("//"):
            continue
        target, anchor = urldefrag(urljoin(name, link))
        target = unquote(target.split("?")[0]) or name
        known = (
            not anchor or target not in anchors or unquote(anchor) in anchors[target]
        )
        if not (site / target).is_file() or not known:
            broken.append(f"{name}: {link}")
    return broken


def images_without_alt(site):
    """Images whose alternative text is missing or is just the file's name."""
    return [
        f"{path.relative_to(site)}: {image.get('src', '')[:60]}"
        for path in site.rglob("*.html")
        for image in soup(path).find_all("img")
        if not image.get("alt", "").strip()
        or image["alt"] in image.get("src", "")
        or re.fullmatch(r"\S+\.(png|svg|jpe?g)", image["alt"])
    ]


def test_every_listed_page_is_built(site):
    listed = re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text())
    assert {f"{name}.html" for name in listed} == set(pages(site))


def test_no_internal_link_is_broken(site):
    assert broken_links(site) == []


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">b</a><a href="#c">c</a>')
    assert broken_links(tmp_path) == ["a.html: b.html", "a.html: #c"]


def test_every_image_has_an_alt_text(site):
    assert images_without_alt(site) == []


def test_a_missing_alt_text_is_noticed(tmp_path):
    (tmp_path / "a.html").write_text('<img src="x.png"><img src="y.png" alt="y.png">')
    assert len(images_without_alt(tmp_path)) == 2


def test_a_warning_fails_the_build(tmp_path):
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: a\n")
    (tmp_path / "_config.yml").write_text("title: t\nonly_build_toc_files: true\n")
    (tmp_path / "a.md").write_text("# A\n\n{ref}`nowhere`\n")
    assert build(tmp_path, tmp_path).returncode != 0


def test_the_edition_on_the_page_is_mrpc(site):
    text = soup(site / CHAPTER).get_text()
    assert "mrpc" in text
    assert "parameter task" in text


def scrolls_sideways(page):
    return page.evaluate(
        "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    )


def visit_all(site, address, browser):
    """Every page opened once: what went wrong, how wide it is, what axe finds.

    Opening a page costs more than asking it something, so all is asked at once, in the
    light scheme and then in the dark one."""
    context = browser.new_context(viewport=DESKTOP, color_scheme="light")
    if AXE.is_file():
        context.add_init_script(path=AXE)
    page = context.new_page()
    found = {"errors": [], "foreign": [], "desktop": [], "phone": []}
    found |= {"faults": [], "dark": []}
    looks = {}

    def hear(message):
        if message.type == "error":
            found["errors"].append(f"{page.url}: {message.text}")

    page.on("console", hear)
    page.on("pageerror", lambda e: found["errors"].append(f"{page.url}: {e}"))
    page.on(
        "request",
        lambda r: (
            None
            if r.url.startswith((address, "data:", "blob:"))
            else found["foreign"].append(r.url)
        ),
    )
    made = [name for name in MADE_BY_SPHINX if (site / name).is_file()]
    for name in [*pages(site), *made]:
        page.goto(address + name, wait_until="load")
        page.evaluate(SET_FORMULAS)  # so that they have a width
        for width, size in (("phone", PHONE), ("desktop", DESKTOP)):
            page.set_viewport_size(size)
            if scrolls_sideways(page):
                found[width].append(name)
        if not AXE.is_file():
            continue
        prepare_for_axe(page)
        assert page.locator("html[data-theme=light]").count() == 1
        each = faults_but_of_colour(page) + faults_of_colour(page, looks)
        found["faults"] += [f"{name}: {fault}" for fault in each]
        # The theme's own switch sets this; the dark scheme changes colours and no more.
        page.evaluate("document.documentElement.dataset.theme = 'dark'")
        found["dark"] += [f"{name}: {fault}" for fault in faults_of_colour(page, looks)]
    context.close()
    return found


@pytest.fixture(scope="module")
def visits(site, address, browser):
    return visit_all(site, address, browser)


@needs_browser
def test_every_page_loads_without_error_or_foreign_request(visits):
    assert visits["errors"] == []
    assert visits["foreign"] == []


@needs_browser
def test_errors_and_foreign_requests_are_noticed(tmp_path, browser):
    (tmp_path / "a.html").write_text(
        "<html data-theme=light lang=en><title>t</title><body style='width: 5000px'>"
        "<style>p { color: #000 } html[data-theme=dark] p { color: #bbb }</style>"
        "<p>faint</p><img src='http://elsewhere.invalid/x.png'>"
        "<script>undefined.x</script>"
        "<script>addEventListener('load', () => setTimeout(() => late.x, 50))</script>"
    )
    found = visit_all(tmp_path, f"file://{tmp_path}/", browser)
    assert len(found["errors"]) == 3  # two scripts, and the image that is not found
    assert found["foreign"] == ["http://elsewhere.invalid/x.png"]
    assert found["phone"] == found["desktop"] == ["a.html"]
    if AXE.is_file():
        assert any("image-alt" in fault for fault in found["faults"])
        assert not any("color-contrast" in fault for fault in found["faults"])
        assert len(found["dark"]) == 1
        assert re.search("color-contrast.*faint", found["dark"][0])


@needs_browser
@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_no_page_scrolls_sideways(visits, width):
    assert visits[width] == []


@needs_browser
def test_formulas_are_rendered(address, page):
    page.goto(address + CHAPTER, wait_until="load")
    page.evaluate(SET_FORMULAS)
    assert page.locator("mjx-container").count() > 50
    assert page.locator("mjx-merror").count() == 0
    assert "\\frac" not in page.locator("article").inner_text()


@needs_browser
def test_the_search_finds_a_word(address, page):
    page.goto(address + "search.html?q=Eckart", wait_until="load")
    page.wait_for_selector("#search-results li", timeout=15_000)
    assert "Chapter 1" in page.locator("#search-results").inner_text()


@needs_browser
def test_the_search_shows_formulas_in_letters(address, page):
    page.goto(address + "search.html?q=Frobenius", wait_until="load")
    # Sphinx says so once all are listed; its dots may go on for ever
    page.locator(".search-summary", has_text="finished").wait_for(timeout=30_000)
    page.wait_for_load_state("networkidle")  # and each has its piece of text
    said = page.evaluate(
        r"""() => [
          "\\(\\lVert W-\\hat W\\rVert_F^2\\)", "\\frac{mn}{m+n}",
          "\\begin{aligned}&\\sigma_{k+1}\\\\ W\\in\\R^{m\\times n}\\end{aligned}",
        ].map(readable)"""
    )
    assert said == ["‖W-W\u0302‖_F^2", "(mn)/(m+n)", "σ_k+1 W∈ℝ^m×n"]
    shown = page.locator("#search-results").inner_text()
    assert "\\" not in shown


@needs_browser
def test_a_solution_opens_on_click(address, page):
    page.goto(address + CHAPTER, wait_until="load")
    solution = page.locator(".solution.dropdown").first
    answer = solution.locator("pre").first
    assert not answer.is_visible()
    solution.locator("button, summary, .toggle-button").first.click()
    answer.wait_for(state="visible", timeout=5_000)


@needs_browser
def test_a_link_opens_the_solution_or_the_cell_it_leads_to(address, page):
    page.goto(address + CHAPTER, wait_until="load")
    for link, shown in [
        ("#solution-ex-01-kind", "#solution-ex-01-kind pre"),
        ("#cell-spectra-table", "#cell-spectra-table .cell_input pre"),
    ]:
        assert not page.locator(shown).first.is_visible()
        page.goto("about:blank")
        page.goto(address + CHAPTER + link, wait_until="load")
        page.locator(shown).first.wait_for(state="visible", timeout=5_000)


def prepare_for_axe(page):
    """Leave out what axe cannot see through, and tell it what to read colours of."""
    # axe reads no contrast over a gradient; the shadows lie at the edges alone. And no
    # colour may be on its way from one scheme to the other.
    page.add_style_tag(
        content="pre { background-image: none !important }"
        "*, ::before, ::after { transition: none !important }"
        "[data-aside] { display: none !important }"
    )
    rules = [{"id": rule, "selector": where} for rule, where in COLOUR_RULES.items()]
    page.evaluate("rules => axe.configure({rules})", rules)


def faults_but_of_colour(page):
    """What axe finds on an open page, whatever the colours are."""
    rules = {rule: {"enabled": False} for rule in COLOUR_RULES}
    return clear_faults(page, {"rules": rules})


def faults_of_colour(page, looks):
    """What axe finds of colours that are hard to read, three elements of each look.

    Those of `looks` were read before; what is read now is added."""
    looks |= page.evaluate(THREE_OF_EACH_LOOK, looks)
    if page.locator("[data-look]").count() == 0:
        return []
    return clear_faults(page, {"runOnly": list(COLOUR_RULES)})


def clear_faults(page, only):
    # no preload: it would ask for each style sheet again, and no rule here reads them
    result = page.evaluate(
        "only => axe.run({resultTypes: ['violations'], preload: false, ...only})", only
    )
    return [
        f"{violation['id']}: {node['html'][:160]}"
        for violation in result["violations"]
        if violation["impact"] in ("moderate", "serious", "critical")
        for node in violation["nodes"][:3]
    ]


@needs_browser
@needs_axe
def test_no_page_has_a_moderate_or_serious_accessibility_fault(visits):
    assert visits["faults"] == []


@needs_browser
@needs_axe
def test_the_dark_colours_are_legible(visits):
    assert visits["dark"] == []


@needs_browser
@needs_axe
@pytest.mark.parametrize(
    "faint",
    [
        "<pre><span style='color: #bbb'>faint</span></pre>",
        "<p style='font-size: 15px; color: #bbb'>faint</p>",
        "<p style='background: #555'><b><span>faint</span></b></p>",
        "<div style='opacity: 0.4'><p>faint</p></div>",
        "<p>more words <a href=# style='color: #222; text-decoration: none'>faint</a>",
    ],
)
def test_faint_words_are_noticed_though_three_of_each_look_are_read(page, faint):
    """Each after many elements that differ from it in one thing only."""
    good = "<p>words <b>bold</b> <a href='#x'>link</a></p><pre><span>code</span></pre>"
    hidden = "<p style='display: none; color: #bbb; font-size: 15px'>hidden</p>"
    alone = "<p><a href='#x' style='color: #222; text-decoration: none'>alone</a></p>"
    page.set_content(
        f"<html lang=en><title>t</title><body>{(good + hidden + alone) * 5}{faint}"
    )
    page.add_script_tag(path=str(AXE))
    prepare_for_axe(page)
    looks = {}
    faults = faults_of_colour(page, looks)
    assert page.locator("[data-look]").count() < 25
    assert len(faults) == 1
    assert "faint" in faults[0]
    # On the next page all that is known; what is new there is read.
    page.set_content(
        f"<html lang=en><title>t</title><body>{good * 5}<p style='color: #ccc'>new"
    )
    page.add_script_tag(path=str(AXE))
    prepare_for_axe(page)
    (fault,) = faults_of_colour(page, looks)
    assert "new" in fault
    assert page.locator("[data-look]").count() == 1
