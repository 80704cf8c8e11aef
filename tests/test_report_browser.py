"""The page about a run, and photos to label, in a browser: as wide as a phone and a desktop, light and dark."""

import csv
import json
import shutil

import pytest
from PIL import Image
from test_report import HISTORY, STRANGE, write_run

from microclip_hf.check import CheckInputs, start_check
from microclip_hf.check.page import write_page
from microclip_hf.prediction.predictions import column_names
from microclip_hf.report.page import write_report


webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver"),
]
# WCAG 2's contrast of every text with what lies behind it; 4.5 is asked for.
CONTRASTS = """
const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parse = (color) => color.match(/[\\d.]+/g).map(Number);
const behind = (node) => { for (; node; node = node.parentElement) {
    const color = parse(getComputedStyle(node).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color; } return [255, 255, 255]; };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), lowest = [];
for (let text; (text = walker.nextNode());) if (text.data.trim()) {
    const pair = [light(parse(getComputedStyle(text.parentElement).color)), light(behind(text.parentElement))];
    lowest.push((Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)); }
return Math.min(...lowest);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    for argument in ("headless", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in off)):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Long and strange names, true labels, changes: every part of the page."""
    folder = tmp_path_factory.mktemp("a run")
    names = [*STRANGE, "a-very-long-name-without-any-space-" * 4, *(f"class {index}" for index in range(20))]
    rows = [[f"{i}.png", names[i % 23], 0.2 + i % 7 / 10, i % 4, names[i % 25]] for i in range(100)]
    write_run(folder, names, rows, [[names[i], names[i * 2 + 1], i + 1] for i in range(10)], HISTORY, noise=60)
    write_report(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def labelling_page(tmp_path_factory):
    """Long and strange names with descriptions, and a photo that is gone."""
    folder = tmp_path_factory.mktemp("a check")
    (folder / "photos").mkdir()
    names = [*STRANGE[:2], "a-very-long-name-without-any-space-" * 4]
    for index in range(10):
        Image.new("RGB", (40 + 30 * index, 90), "tan").save(folder / "photos" / f"{index}.png")
    for step, file in ((1, "clip.csv"), (2, "adapted.csv")):
        rows = [[f"{i}.png", names[i * step % 3], 0.9, names[(i + 1) % 3], 0.1] for i in range(10)]
        with open(folder / file, "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([column_names(2), *rows])
    described = {name: ["It is <b>tan</b> & wide."] * 3 for name in names}
    (folder / "descriptions.json").write_text(json.dumps(described), encoding="utf-8")
    sources = {"photos": "photos", "model": "adapted.csv", "clip": "clip.csv", "descriptions": "descriptions.json"}
    inputs = CheckInputs(**{name: str(folder / file) for name, file in sources.items()})
    check = start_check(inputs, folder / "check", num_labels=10)
    (folder / "photos" / "0.png").unlink()
    write_page(check)
    return folder / "check" / "label.html"


def open_page(browser, page, width, scheme):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_photos_to_label_fit_and_are_large(browser, labelling_page, width, scheme):
    """Tab goes from one photo to the next, and shows where it is."""
    open_page(browser, labelling_page, width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    sizes = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.clientWidth])")
    assert len(sizes) == 9 and all(own > 0 and shown >= 300 for own, shown in sizes)
    assert browser.execute_script(CONTRASTS) >= 4.5
    for number in (1, 2):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        label = browser.execute_script("return document.activeElement.getAttribute('aria-label')")
        assert label == f"Photo {number} of 10"
    outline = "return parseFloat(getComputedStyle(document.activeElement).outlineWidth)"
    assert browser.execute_script(outline) >= 2


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_can_be_read(browser, page, width, scheme):
    open_page(browser, page, width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    folded = "return [...document.querySelectorAll('.gallery')].filter(d => d.open).length"
    assert browser.execute_script(folded) == 1
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.currentSrc.slice(0, 11)])"
    )
    assert len(images) > 100
    assert all(complete and own > 0 and shown > 0 and start == "data:image/" for complete, own, shown, start in images)
    curve = "return [...document.querySelectorAll('.curve')].map(i => i.currentSrc == i.getAttribute('src'))"
    assert set(browser.execute_script(curve)) == {scheme == "light"}
    assert browser.execute_script(CONTRASTS) >= 4.5
    smallest = (
        "return Math.min(...[...document.querySelectorAll('*')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert browser.execute_script(smallest) >= 12
