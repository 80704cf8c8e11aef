"""The page of examples/space: gathered as a Space elsewhere, served, and used over HTTP and in a real browser."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import requests
from odd_files import encode, picture, write_odd_files
from PIL import Image, ImageOps
from transformers import AutoProcessor, CLIPModel


pytestmark = pytest.mark.slow
gradio_client = pytest.importorskip("gradio_client", reason="gradio isn't installed; it is in the extra demo")
ROOT = Path(__file__).parents[1]
BIRD = ROOT / "examples" / "birdworld" / "bird.png"
BIRD_MODEL = "rendered birds (built in)"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, clip_folder):
    """A model whose card names its CLIP, one without a card, and one whose card can't be read."""
    from microclip_hf import MicroCLIPForImageClassification

    folders = [tmp_path_factory.mktemp(name) for name in ("with_card", "without_card", "odd_card")]
    for folder in folders:
        names = ["red disc", "blue bar"]
        MicroCLIPForImageClassification.from_clip(clip_folder, names, prior_weighting="uniform").save_pretrained(
            folder
        )
    (folders[0] / "README.md").write_text(f"---\nbase_model: {clip_folder}\n---\n", encoding="utf-8")
    (folders[2] / "README.md").write_text("---\nbase_model: [\n---\n", encoding="utf-8")
    return list(map(str, folders))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A model as a run leaves it: its card doesn't name a folder, which the record of the run does."""
    from microclip_hf import MicroCLIPForImageClassification

    folder = tmp_path_factory.mktemp("demo")
    names = (ROOT / "examples" / "space" / "birds" / "names.txt").read_text().splitlines()
    MicroCLIPForImageClassification.from_clip(BIRD.parent / "clip", names, fusion_ratio=1).save_pretrained(folder)
    (folder / "README.md").write_text("---\ntags: [microclip]\n---\n", encoding="utf-8")
    (folder / "report").mkdir()
    (folder / "report" / "run.json").write_text(json.dumps({"model": str(BIRD.parent / "clip")}), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory, adapted, demo):
    """Address and log of the page, which runs from the gathered folder alone."""
    yield from serve(tmp_path_factory, {"MICROCLIP_MODELS": ",".join([demo, *adapted, "/no/such/model"])})


def serve(tmp_path_factory, variables):
    space = tmp_path_factory.mktemp("space") / "flat"
    subprocess.run(["make", "space-folder", f"SPACE_FOLDER={space}"], cwd=ROOT, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(space.parent / "cache"),
        **variables,
    }
    log = space.parent / "log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env=environment, stdout=stream, stderr=stream
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                requests.get(address, timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield address, log
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def client(server):
    return gradio_client.Client(server[0], verbose=False)


def classify(client, path, model=BIRD_MODEL, alpha=0.5):
    file = gradio_client.handle_file(str(path))
    return client.predict(model, file, "[FG] attention", alpha, api_name="/classify")


def scores(label):
    return {entry["label"]: entry["confidence"] for entry in label["confidences"]}


def test_both_labels_and_the_overlay_are_the_models(client):
    """CLIP's bars are those of transformers' own zero-shot pipeline."""
    from transformers import pipeline

    microclip, clip, drawing, notes = classify(client, BIRD)
    names = (ROOT / "examples" / "space" / "birds" / "names.txt").read_text().splitlines()
    zero_shot = pipeline("zero-shot-image-classification", model=str(BIRD.parent / "clip"))
    expected = zero_shot(str(BIRD), candidate_labels=names, hypothesis_template="a photo of a {}.")
    for answer in expected[:5]:
        assert scores(clip)[answer["label"]] == pytest.approx(answer["score"], abs=2e-2)
    assert microclip["label"] == "tangerine-crowned jay" and "tangerine-crowned jay" in notes
    assert Image.open(drawing).size == (512, 512)


def test_strength_zero_is_the_photo(client):
    shown = Image.open(classify(client, BIRD, alpha=0)[2]).convert("RGB")
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(ImageOps.contain(Image.open(BIRD), (512, 512))))


def test_odd_files_one_by_one(client, server, tmp_path):
    """Each gets a prediction or a message that could be a person's."""
    files = write_odd_files(tmp_path / "odd")
    assert len(files) > 50
    for path, good in files.items():
        try:
            answer = classify(client, path)[3]
        except gradio_client.exceptions.AppError as error:  # noqa: PERF203
            assert not good, (path.name, error)
            assert len(str(error)) > 20 and not re.search(r"Traceback|/tmp|object at 0x|Error\b", str(error)), (
                path.name
            )
        else:
            assert good, (path.name, answer)
            assert ("frames" in answer) == (path.name.startswith("animated") or path.name == "pages.tif")
    assert "Traceback" not in server[1].read_text()


def test_odd_files_as_csv(client, server, tmp_path):
    files = write_odd_files(tmp_path / "odd")
    _, file = client.predict(
        BIRD_MODEL, list(map(gradio_client.handle_file, map(str, files))), api_name="/label_files"
    )
    with open(file, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [bool(row["label"]) for row in rows] == list(files.values())
    assert all(row["label"] or row["remark"] for row in rows)
    assert "Traceback" not in server[1].read_text()


def test_a_rotated_photo_is_upright(client, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photo.jpg").write_bytes(encode(picture(64, 32), "JPEG", exif=exif))
    assert Image.open(classify(client, tmp_path / "photo.jpg")[2]).size == (256, 512)


def test_a_photo_of_a_phone(client, tmp_path):
    pytest.importorskip("pillow_heif", reason="needs the extra heic").from_pillow(picture(64, 32)).save(
        tmp_path / "photo.heic"
    )
    assert Image.open(classify(client, tmp_path / "photo.heic")[2]).size == (512, 256)


def test_adapted_models(client, adapted, clip_folder):
    """CLIP is shown where the card names it; else the page says why not."""
    about, *_ = client.predict(adapted[0], api_name="/choose")
    assert "2 classes" in about and "CLIP isn't shown" not in about
    names = ["red disc", "blue bar"]  # not in the order of the alphabet
    processor = AutoProcessor.from_pretrained(clip_folder, backend="pil")
    texts = [f"a photo of a {name}." for name in names]
    inputs = processor(text=texts, images=Image.open(BIRD).convert("RGB"), return_tensors="pt", padding=True)
    expected = CLIPModel.from_pretrained(clip_folder)(**inputs).logits_per_image[0].softmax(-1).tolist()
    assert abs(expected[0] - expected[1]) > 0.01
    shown = scores(classify(client, BIRD, adapted[0])[1])
    assert shown == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-3)
    for model in adapted[1:]:
        about, *_ = client.predict(model, api_name="/choose")
        assert "neither card nor report names the CLIP" in about
    assert set(scores(classify(client, BIRD, adapted[1])[0])) == {"red disc", "blue bar"}


def test_a_run_names_its_clip(client, demo):
    about, *_ = client.predict(demo, api_name="/choose")
    assert about == "30 classes."
    assert scores(classify(client, BIRD, demo)[1]) == scores(classify(client, BIRD)[1])


@pytest.mark.parametrize(("model", "message"), [("/no/such/model", "can't be loaded"), ("../..", "not in the list")])
def test_models_that_are_none(client, model, message):
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        classify(client, BIRD, model)
    assert classify(client, BIRD)[3]


@pytest.mark.parametrize(
    ("files", "variables", "models"),
    [
        (["config.json"], {}, "outputs/demo"),
        (["README.md"], {}, ""),  # of a run that was stopped
        (["config.json"], {"MICROCLIP_MODELS": "me/birds, $HOME"}, "me/birds, $HOME"),
    ],
)
def test_make_space_offers_the_model_of_the_demo(tmp_path, files, variables, models):
    """Unless others are named; `make` runs here without an installation, and `python` only says what it was told."""
    for name in ("constraints.txt", "setup.cfg", "pyproject.toml", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf %s "$MICROCLIP_MODELS"')
    python.chmod(0o755)
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    for name in files:
        (tmp_path / "outputs" / "demo" / name).touch()
    environment = {name: value for name, value in os.environ.items() if name != "MICROCLIP_MODELS"} | variables
    command = ["make", "--silent", "-f", str(ROOT / "Makefile"), "-C", str(tmp_path), "--no-print-directory", "space"]
    assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout == models


def test_requirements_are_the_packages():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = config["options"]["install_requires"].split("\n") + config["options.extras_require"]["demo"].split("\n")
    lines = (ROOT / "examples" / "space" / "requirements.txt").read_text().splitlines()
    assert sorted(lines[1:]) == sorted(line for line in needed if line and not line.startswith("gradio"))


# In the browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium isn't installed; it is in the extra dev")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium and chromedriver aren't installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for switch in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"),
    ):
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def open_page(browser, server, width, height=1000):
    """At a width in CSS pixels, which a window can't go below 500 of."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(server[0])
    wait_for(browser, "#photo input[type=file]")


def wait_for(browser, selector, condition=lambda element: True):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def found(_):
        return next((own for own in browser.find_elements(By.CSS_SELECTOR, selector) if condition(own)), False)

    return WebDriverWait(browser, 60, ignored_exceptions=[StaleElementReferenceException]).until(found, selector)


def upload(browser, path, selector="#photo input[type=file]"):
    wait_for(browser, selector).send_keys(str(path))


def overlay_of(browser, other_than=None):
    shown = wait_for(browser, "#overlay img", lambda image: image.get_attribute("src") not in (None, "", other_than))
    return shown.get_attribute("src")


def console_errors(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("width", [390, 1280])
def test_photo_slider_and_bad_file(browser, server, demo, tmp_path, width):
    """The first model is chosen. Upload, prediction, overlay; the slider changes it; a bad file gets a message, and
    the next photo works."""
    open_page(browser, server, width)
    assert wait_for(browser, "#model input").get_attribute("value") == demo
    wait_for(browser, "body", lambda body: "30 classes." in body.text)
    upload(browser, BIRD)
    wait_for(browser, "#microclip", lambda label: "tangerine-crowned jay" in label.text)
    wait_for(browser, "#clip", lambda label: "tangerine-crowned jay" in label.text)
    first = overlay_of(browser)
    from selenium.webdriver.common.keys import Keys

    wait_for(browser, "#alpha input[type=range]").send_keys(Keys.ARROW_RIGHT * 4)
    assert Image.open(requests.get(overlay_of(browser, first), stream=True, timeout=30).raw).size == (512, 512)
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) <= 0
    save_screenshot(browser, f"{width}.png")
    assert console_errors(browser) == []
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    open_page(browser, server, width)
    upload(browser, tmp_path / "bad.png")
    wait_for(browser, "[data-testid=toast-body], .toast-body", lambda toast: "no picture" in toast.text)
    save_screenshot(browser, f"{width}_error.png")
    open_page(browser, server, width)
    upload(browser, BIRD)
    wait_for(browser, "#microclip", lambda label: "tangerine-crowned jay" in label.text)


def save_screenshot(browser, name):
    """Kept where somebody wants to look at them."""
    if folder := os.environ.get("SPACE_SCREENSHOTS"):
        import base64

        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(folder, name).write_bytes(base64.b64decode(shot["data"]))


def test_tab_reaches_everything(browser, server):
    open_page(browser, server, 1280)
    upload(browser, BIRD)
    overlay_of(browser)
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(60):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(
            browser.execute_script("return (document.activeElement.closest('[id]:not([id^=component])') || {}).id")
        )
    order = [reached.index(name) for name in ("photo", "classify", "view", "alpha")]
    assert order == sorted(order), reached


def test_an_example_is_classified_at_a_click(browser, server):
    open_page(browser, server, 1280)
    wait_for(browser, "button.gallery-item").click()
    wait_for(browser, "#microclip", lambda label: "tangerine-crowned jay" in label.text)


def test_many_photos(browser, server, tmp_path):
    open_page(browser, server, 1280)
    wait_for(browser, "button[role=tab]", lambda tab: tab.text == "Many photos").click()
    (tmp_path / "bad.png").write_bytes(b"")
    upload(browser, f"{BIRD}\n{tmp_path / 'bad.png'}", "#files input[type=file]")
    wait_for(browser, "#files", lambda files: "bad" in files.text and "bird" in files.text)
    wait_for(browser, "#label_files").click()
    wait_for(browser, "#table", lambda table: "The file is empty" in table.text and "tangerine" in table.text)
    link = wait_for(browser, "#csv a[href]").get_attribute("href")
    assert requests.get(link, timeout=30).text.splitlines()[0] == "file,label,score,runner_up,runner_up_score,remark"
    save_screenshot(browser, "many.png")


def test_nothing_is_fetched_from_elsewhere(browser, server):
    open_page(browser, server, 1280)
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert [url for url in browser.execute_script(script) if not url.startswith((server[0], "data:", "blob:"))] == []
    assert console_errors(browser) == []


# Labelling


@pytest.fixture(scope="module")
def check_folder(tmp_path_factory):
    """A check of twelve photos, of models that differ on half of them; one photo is gone."""
    from microclip_hf.check import CheckInputs, start_check
    from microclip_hf.prediction.predictions import column_names

    folder = tmp_path_factory.mktemp("check")
    (folder / "photos").mkdir()
    names = ["red disc", "blue *bar*", "green square"]
    for index in range(12):
        Image.new("RGB", (64, 48), "tan").save(folder / "photos" / f"{index}.png")
    for step, file in ((1, "clip.csv"), (2, "adapted.csv")):
        rows = [[f"{i}.png", names[i * step % 3], 0.9, names[(i * step + 1) % 3], 0.1] for i in range(12)]
        with open(folder / file, "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([column_names(2), *rows])
    inputs = CheckInputs(str(folder / "photos"), str(folder / "adapted.csv"), str(folder / "clip.csv"))
    start_check(inputs, folder / "check", num_labels=12)
    return folder / "check"


@pytest.fixture(scope="module")
def check_server(tmp_path_factory, check_folder):
    yield from serve(tmp_path_factory, {"MICROCLIP_CHECK": str(check_folder)})


def labels_of(folder):
    with open(folder / "to_label.csv", encoding="utf-8", newline="") as file:
        return [row[1] for row in csv.reader(file)][1:]


def open_labelling(browser, server, folder, width, scheme):
    """The tab, before there is any label; returns the files in its order."""
    from microclip_hf.check.labels import read_rows, set_label

    files = [row[0] for row in read_rows(folder / "to_label.csv")]
    for file in files:
        set_label(folder / "to_label.csv", file, "")
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(f"{server[0]}?__theme={scheme}")
    wait_for(browser, "#label_heading", lambda heading: "Photo 1:" in heading.text)
    wait_for(browser, "#label_photo img")
    return files


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_photos_are_labelled_by_keys_and_saved_at_once(browser, check_server, check_folder, width, scheme):
    """Each key labels the photo that is shown, goes on, and is in the table; the arrows only go."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    from microclip_hf.check.folder import read_check

    files = open_labelling(browser, check_server, check_folder, width, scheme)
    own = read_check(check_folder)

    def press(key, text):
        ActionChains(browser).send_keys(key).perform()
        wait_for(browser, "#label_heading", lambda heading: text in heading.text)

    press("2", "Photo 2:")
    press("0", "Photo 3:")
    press("u", "Photo 4:")
    press(Keys.ARROW_LEFT, "This one: unknown")
    press("1", "Photo 4:")  # corrected, and on to the next without a label
    press(Keys.ARROW_RIGHT, "Photo 5:")
    expected = [own.candidates(files[0])[1], "none of these", own.candidates(files[2])[0]]
    assert labels_of(check_folder) == [*expected, *[""] * 9]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    save_screenshot(browser, f"label_{width}_{scheme}.png")
    for number in range(12):
        if not labels_of(check_folder)[(number + 4) % 12]:
            press(
                "1",
                "All are labelled" if number == 11 else f"{len(list(filter(None, labels_of(check_folder)))) + 1} of",
            )
    assert all(labels_of(check_folder)) and console_errors(browser) == []


def test_another_class_is_typed_and_keys_work_again(browser, check_server, check_folder):
    """Its letters label nothing meanwhile; once it is chosen the keys are the next photo's."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    open_labelling(browser, check_server, check_folder, 1280, "light")
    wait_for(browser, "#label_other input").click()
    ActionChains(browser).send_keys("blu").perform()
    wait_for(browser, "#label_other [role=option]", lambda option: option.text.strip().endswith("blue *bar*"))
    assert not any(labels_of(check_folder))
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    wait_for(browser, "#label_heading", lambda heading: "Photo 2:" in heading.text)
    assert browser.find_element("css selector", "#label_other input").get_attribute("value") == ""
    ActionChains(browser).send_keys("0").perform()
    wait_for(browser, "#label_heading", lambda heading: "Photo 3:" in heading.text)
    assert labels_of(check_folder) == ["blue *bar*", "none of these", *[""] * 10]
    assert console_errors(browser) == []


def test_a_folder_that_is_no_check_is_told(tmp_path):
    environment = {**os.environ, "MICROCLIP_CHECK": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "space" / "app.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith(f"app.py: {tmp_path} has no draw.json")
