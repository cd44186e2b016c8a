"""The page in a real browser: Chromium, headless, from the system's packages, driven by selenium."""

import base64
import json
import shutil

import pytest

pytest.importorskip("selenium", reason="needs selenium: pip install -e '.[browser]'")
pytest.importorskip("transformers")

from demo_document import demo_document
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from rr_flex.view.page import make_page, read_runs

BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
)
QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-sync",
        "--hide-scrollbars",
        profile,
        *QUIET,
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "run.json").write_text(json.dumps(demo_document(tokens=[f" <b>t{n}" for n in range(1000)])))
    (folder / "page.html").write_text(make_page(read_runs(folder / "run.json")))
    return (folder / "page.html").as_uri()


@pytest.fixture
def opened(browser, page):
    """The page in a window of ordinary size; at the end no error may stand in the browser's log."""
    size(browser, 1200, 900)
    browser.get(page)
    assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"
    yield browser
    emulate(browser, "no-preference")
    assert browser.get_log("browser") == []


def size(browser, width: int, height: int) -> None:
    """Of what the page has to itself; a real window has a least width."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def emulate(browser, scheme: str, media: str = "") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def picture(browser) -> str:
    return browser.execute_script("return document.querySelector('.maps canvas').toDataURL()")


def test_every_picker_changes_the_picture(opened):
    seen = {picture(opened)}
    for name, value in (("layer", "1"), ("head", "2"), ("view", "kept"), ("view", "difference"), ("view", "estimated")):
        Select(opened.find_element(By.CSS_SELECTOR, f"select.{name}")).select_by_value(value)
        seen.add(picture(opened))
    assert len(seen) == 6


def test_hovering_shows_block_tokens_mass_and_state(opened):
    canvas = opened.find_element(By.CSS_SELECTOR, ".maps canvas")
    # The map's left margin is 58 pixels, its right one 14, its top one 6; query block 5, key block 0.
    side = canvas.size["width"] - 58 - 14
    x, y = 58 + 0.05 * side, 6 + 5.5 * 128 / 1000 * side
    half = canvas.size["width"] / 2, canvas.size["height"] / 2
    ActionChains(opened).move_to_element_with_offset(canvas, round(x - half[0]), round(y - half[1])).perform()
    shown = opened.find_element(By.CSS_SELECTOR, ".readout").text
    assert "query block 5, key block 0" in shown and "state kept" in shown.replace("\n", " ")
    assert "queries 640–767" in shown and "keys 0–127" in shown
    assert "<b>t640 <b>t641" in shown and "<b>t0 <b>t1" in shown and "<b>t127" in shown
    # Half of the row's mass and a share of the rest, which every row of the document puts on its first block.
    share = float(shown.replace("\n", " ").split("true mass ")[1].split()[0])
    assert 50 <= share < 100
    # Above the diagonal is nothing.
    ActionChains(opened).move_by_offset(round(0.9 * side), 0).perform()
    assert "Hidden by the mask" in opened.find_element(By.CSS_SELECTOR, ".readout").text


def test_the_keyboard_reaches_every_block(opened):
    canvas = opened.find_element(By.CSS_SELECTOR, ".maps canvas")
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert "query block 2, key block 1" in opened.find_element(By.CSS_SELECTOR, ".readout").text
    canvas.send_keys(*[Keys.ARROW_DOWN] * 9)
    shown = opened.find_element(By.CSS_SELECTOR, ".readout").text
    assert "query block 7" in shown and "queries 896–999" in shown


def test_a_click_on_a_head_shows_its_map(opened):
    canvas = opened.find_element(By.CSS_SELECTOR, ".grid-of-heads canvas")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    width, height = canvas.size["width"], canvas.size["height"]
    # Layer 2 is the last of three rows of 14 pixels, head 3 the last of four columns.
    x, y = 58 + 0.9 * (width - 58), 2.5 * 14
    ActionChains(opened).move_to_element_with_offset(
        canvas, round(x - width / 2), round(y - height / 2)
    ).click().perform()
    picked = [
        opened.find_element(By.CSS_SELECTOR, f"select.{name}").get_property("value") for name in ("layer", "head")
    ]
    assert picked == ["2", "3"]
    # (2 + 1) · (3 + 1) / 12
    assert "layer 2, head 3: 1.000" in opened.find_element(By.CSS_SELECTOR, ".grid-of-heads").text


def test_a_heading_sorts_its_table(opened):
    table = next(each for each in opened.find_elements(By.TAG_NAME, "table") if each.text.startswith("layers"))
    heading = table.find_element(By.TAG_NAME, "button")
    rows = "return [...arguments[0].tBodies[0].rows].map(row => row.cells[0].textContent)"
    assert opened.execute_script(rows, table) == ["0", "1", "2"]
    heading.click()
    heading.click()
    assert opened.execute_script(rows, table) == ["2", "1", "0"]


@pytest.mark.parametrize("width", [320, 390, 800])
def test_nothing_sticks_out_at_a_narrow_width(width, opened):
    size(opened, width, 800)
    opened.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    canvas = opened.find_element(By.CSS_SELECTOR, ".maps canvas")
    assert 0 < canvas.size["width"] <= width
    # Redrawn for its width, not stretched.
    assert opened.execute_script("return arguments[0].width", canvas) == canvas.size["width"]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of an rgb(r, g, b)."""
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(scheme, opened):
    before = picture(opened)
    emulate(opened, scheme)
    opened.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    style = "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.color, s.backgroundColor]"
    _, paper = opened.execute_script(style, "body")
    assert (luminance(paper) < 0.2) == (scheme == "dark")
    assert (picture(opened) != before) == (scheme == "dark")
    for element in ("body", "dt", "footer", "summary", "td", ".legend"):
        ink, behind = opened.execute_script(style, element)
        behind = paper if behind == "rgba(0, 0, 0, 0)" else behind
        bright, dark = sorted((luminance(ink), luminance(behind)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (element, ink, behind)


def test_it_prints_light_and_on_few_pages(opened):
    emulate(opened, "dark", media="print")
    assert luminance(opened.execute_script("return getComputedStyle(document.body).backgroundColor")) > 0.9
    printed = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    pdf = base64.b64decode(printed)
    assert pdf.startswith(b"%PDF") and 1 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 3
