"""The page about a run in a real browser, at a phone's and a desktop's width, light and dark."""

import shutil

import pytest
from test_report import HISTORY, STRANGE, write_run

from microclip_hf.report.page import write_report


webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
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


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_can_be_read(browser, page, width, scheme):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
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
