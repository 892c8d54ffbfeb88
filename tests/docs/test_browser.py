"""The site in a browser: every page at the width of a desktop and of a phone, and the search."""

import functools
import http.server
import shutil
import threading

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.xdist_group("site")]
WIDTHS = {"desktop": 1366, "phone": 412}
SEARCHABLE = """() => {
  const state = document.querySelector(".md-search-result__meta")
  return state && !state.textContent.includes("Initializing")
}"""
# The smallest text of each chart, in pixels of the screen.
CHARTS = """() => Promise.all([...document.images].filter(i => i.src.endsWith(".svg")).map(
  async image => {
    const source = await (await fetch(image.src)).text()
    const chart = new DOMParser().parseFromString(source, "image/svg+xml").documentElement
    const scale = image.getBoundingClientRect().width / chart.viewBox.baseVal.width
    const sizes = [...chart.querySelectorAll("text, tspan")].map(text => {
      const style = text.getAttribute("style") ?? ""
      const size = /(?:font-size|font):[^;]*?([0-9.]+)px/.exec(style)?.[1]
      return Number(size ?? text.getAttribute("font-size") ?? Infinity)
    })
    const smallest = scale * Math.min(...sizes)
    return { name: image.src.split("/").pop(), text: sizes.length, smallest }
  }
))"""
SETTLED = "() => document.fonts.ready.then(() => true)"
# Facts of a page, as the browser laid it out.
LOOK = """() => {
  const box = element => element.getBoundingClientRect()
  const article = document.querySelector("article")
  const raised = [...document.querySelectorAll("math msup")].filter(
    power => box(power.children[1]).bottom < box(power.children[0]).bottom
  )
  return {
    width: document.documentElement.scrollWidth,
    heading: article?.querySelector("h1")?.innerText ?? "",
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
    formulas: document.querySelectorAll("math").length,
    flat: [...document.querySelectorAll("math")].filter(m => !box(m).width).length,
    powers: document.querySelectorAll("math msup").length,
    raised: raised.length,
    source: [...(article?.querySelectorAll("p, li, td") ?? [])]
      .map(element => element.cloneNode(true))
      .map(copy => (copy.querySelectorAll("code").forEach(c => c.remove()), copy.innerText))
      .filter(text => /\\$|\\\\[a-z]/.test(text)),
  }
}"""


@pytest.fixture(scope="module")
def address(site):
    """Serve the site, whose search is a script that a browser does not load from a file."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if path is None:
        pytest.skip("no Chromium: Debian's package is chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """Open a tab, in which nothing may fail to load or complain, and nothing is external."""
    page = browser.new_page()
    complaints = []

    def sent(request):
        if "://127.0.0.1:" not in request.url:
            complaints.append(f"external: {request.url}")

    def answered(response):
        if response.status >= 400:
            complaints.append(f"{response.status}: {response.url}")

    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", sent)
    page.on("response", answered)
    yield page
    page.close()
    assert complaints == []


def test_every_page_looks_right(page, address, site):
    formulas, charts = 0, set()
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    assert len(names) > 30
    for name in names:
        page.set_viewport_size({"width": WIDTHS["desktop"], "height": 800})
        page.goto(f"{address}/{name}", wait_until="load")
        for device, width in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": 800})
            page.evaluate(SETTLED)
            look = page.evaluate(LOOK)
            place = f"{name} on a {device}"
            assert look["width"] <= width, f"{place} scrolls sideways: {look['width']} px"
            assert look["heading"], f"{place} has no heading"
            assert look["broken"] == [], place
            assert look["flat"] == 0, f"{place} has formulas that are not drawn"
            assert look["raised"] == look["powers"], f"{place} has powers that are not raised"
            assert look["source"] == [], f"{place} shows the source of a formula"
            for chart in page.evaluate(CHARTS):
                assert chart["text"], f"{place}: {chart['name']} has no text"
                assert chart["smallest"] >= 10, f"{place}: {chart}"
                charts.add(chart["name"])
        formulas += look["formulas"]
    assert formulas > 50
    assert len(charts) > 8


@pytest.mark.parametrize("device", WIDTHS)
def test_the_search_finds_a_function(page, address, device):
    page.set_viewport_size({"width": WIDTHS[device], "height": 800})
    page.goto(f"{address}/index.html", wait_until="load")
    page.wait_for_function(SEARCHABLE)
    if device == "phone":  # a desktop shows the field itself
        page.locator('label.md-header__button[for="__search"]').click()
    page.locator("input.md-search__input").press_sequentially("accelerate")
    page.locator(".md-search-result__meta", has_text="matching").wait_for()
    results = page.locator(".md-search-result__item a")
    targets = [results.nth(i).get_attribute("href") or "" for i in range(results.count())]
    assert any("api.html" in target for target in targets), targets
    results.first.click()
    page.wait_for_url("**/*.html?*", timeout=10_000)
    assert "accelerate" in page.locator("article").inner_text()
