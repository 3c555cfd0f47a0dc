"""The pages in a real browser without a network: no error, no request elsewhere, links, keyboard, accessibility.

Screenshots go to the directory CLIPMINI_SCREENSHOTS, if it is set.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import QUICK
from forked import run_forked, run_python
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from test_serve import serving

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: tests/install_packages.sh installs it")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address, and see at the end that nothing was fetched from elsewhere and nothing went wrong."""
    problems: list[str] = []
    pages = []

    def open_address(address: str, **options: str) -> Page:
        page = browser.new_page(viewport={"width": 1200, "height": 900}, **options)  # type: ignore[arg-type]
        own = address if address.startswith("file:") else re.findall(r"http://[^/]+", address)[0]

        def see(url: str) -> None:
            if not url.startswith((own, "data:", "blob:")):
                problems.append(f"asked for {url}")

        page.on("request", lambda request: see(request.url))
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        pages.append(page)
        return page

    yield open_address
    for page in pages:
        page.close()
    assert not problems


def check_access(page: Page, name: str) -> None:
    """See that axe finds nothing serious, and keep a picture of the page."""
    found = [one for one in Axe().run(page).response["violations"] if one["impact"] in ("serious", "critical")]
    assert not found, [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]
    if directory := os.environ.get("CLIPMINI_SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def trained(tiny_json: Path, shards: Path, classification_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of two runs, and of the page that compares them."""
    directory = tmp_path_factory.mktemp("trained")
    given = (*QUICK, f"model.name={tiny_json}", f"data.train={shards}", f"evaluation.datasets=[{classification_set}]")
    for seed in (1, 2):
        result = run_forked(["train", *given, f"name=run{seed}", f"seed={seed}"], directory)
        assert result.returncode == 0, result.stderr
    result = run_forked(["compare", "outputs/run1", "outputs/run2", "output=outputs/both.html"], directory)
    assert result.returncode == 0, result.stderr
    return directory / "outputs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run1/report.html", "both.html"])
def test_report(name: str, scheme: str, trained: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(f"file://{trained / name}", color_scheme=scheme)
    links = page.locator("nav a")
    assert links.count() >= 3
    for number in range(links.count()):
        links.nth(number).click()
        assert page.evaluate("document.querySelector(location.hash).getBoundingClientRect().height") > 0
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    assert dark == (scheme == "dark")
    curve = "document.querySelector('svg [style*=\"--curve-0\"]')"
    assert page.evaluate(f"getComputedStyle({curve}).stroke") == ("rgb(109, 185, 239)" if dark else "rgb(0, 99, 160)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    check_access(page, f"{Path(name).stem}-{scheme}")


def test_report_in_print_and_on_a_phone(trained: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(f"file://{trained / 'run1/report.html'}", color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 375, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_search_with_the_keyboard(made_index: Path, folder: Path, open_page: Callable[..., Page]) -> None:
    with serving(made_index, "top_k=6") as (address, _):
        page = open_page(address)
        status, results = page.locator("#status"), page.locator("#results button")
        page.evaluate("new Promise((see) => requestAnimationFrame(() => requestAnimationFrame(see)))")
        page.keyboard.type("thing 7")  # the box has the focus, of who sees it: keys before the first frame may be lost
        expect(page.locator("#query")).to_have_value("thing 7")
        page.keyboard.press("Enter")
        expect(status).to_have_text("6 nearest to “thing 7”", timeout=30_000)
        assert results.count() == 6 and "percentile" in results.first.inner_text()
        page.wait_for_load_state("networkidle")
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        check_access(page, "search")

        results.first.focus()
        page.keyboard.press("ArrowRight")
        name = results.nth(1).locator(".text").inner_text()
        page.keyboard.press("Enter")  # more like this
        page.get_by_text(f"6 nearest to {name}").wait_for()
        assert results.first.locator(".text").inner_text() == name and "score 1.000" in results.first.inner_text()
        assert "similar=" in page.url
        page.go_back()
        page.get_by_text("6 nearest to “thing 7”").wait_for()
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "query"

        page.set_input_files("#file", folder / "011.webp")
        page.get_by_text("6 nearest to the picture 011.webp").wait_for()
        assert "score 1.000" in results.first.inner_text()
        page.goto(f"{address}/?query=cat")  # an address that was kept
        page.get_by_text("6 nearest to “cat”").wait_for()
        assert status.get_attribute("aria-live") == "polite"
        page.close()  # before the server ends, which its pictures would tell as an error


def test_search_says_what_is_wrong(made_index: Path, tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with serving(made_index) as (address, process):
        page = browser.new_page()
        page.goto(address)
        page.fill("#query", "cat - ")
        page.keyboard.press("Enter")
        page.get_by_text("a part of it is empty").wait_for()
        assert "error" in (page.locator("#status").get_attribute("class") or "")
        page.set_input_files("#file", tmp_path / "text.png")
        page.get_by_text("not a JPEG, PNG or WebP").wait_for()
        check_access(page, "search-error")
        process.kill()
        page.fill("#query", "cat")
        page.keyboard.press("Enter")
        page.get_by_text("Failed to fetch").wait_for()
        page.close()


def test_pictures_of_the_readme(trained: Path, tmp_path: Path) -> None:
    arguments = ["scripts/readme_pictures.py", str(trained / "run1"), "--output", str(tmp_path)]
    result = run_forked(arguments, tmp_path, main=run_python)
    assert result.returncode == 0, result.stderr
    for name in ("report", "search"):
        with Image.open(tmp_path / f"{name}.webp") as picture:
            assert picture.width == 1800 and len(picture.convert("L").getcolors()) > 20  # more than an empty page
