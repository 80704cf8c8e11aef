"""Saved folders: Auto classes, the pipeline on every kind of photo, and loading without our package."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from decisions import ClearDecisions
from PIL import Image
from tiny_inputs import LOGIT_SCALE, draw_shape
from tolerances import COSINE, within
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPModel,
    pipeline,
)
from transformers.utils import is_torchvision_available

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification


@pytest.fixture(scope="module")
def saved(clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform").save_pretrained(
        folder
    )
    return folder


def picture():
    """Left half dark, with a shape on it, so that orientation and channels show."""
    image = draw_shape("red disc", np.random.default_rng(0)).resize((96, 72))
    image.paste((10, 40, 90), (0, 0, 30, 72))
    return image


def test_auto_classes(saved):
    assert type(AutoConfig.from_pretrained(saved)) is MicroCLIPConfig
    assert type(AutoModelForImageClassification.from_pretrained(saved)) is MicroCLIPForImageClassification
    assert AutoImageProcessor.from_pretrained(saved, backend="pil").crop_size["height"] == 32


def test_saved_files(saved):
    names = {path.name for path in saved.iterdir()}
    modules = {f"{name}.py" for name in ("configuration_microclip", "modeling_microclip", "saliency", "text_heads")}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", *modules}
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_microclip.MicroCLIPConfig",
        "AutoModelForImageClassification": "modeling_microclip.MicroCLIPForImageClassification",
    }


def test_a_loaded_model_saved_again_keeps_its_code(saved, tmp_path):
    MicroCLIPForImageClassification.from_pretrained(saved).save_pretrained(tmp_path)
    assert (tmp_path / "modeling_microclip.py").exists()


def expected_scores(folder, images):
    model = MicroCLIPForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad(), ClearDecisions():
        return model(**processor(images, return_tensors="pt")).logits.softmax(-1)


BACKENDS = [
    "pil",
    pytest.param(
        "torchvision",
        marks=pytest.mark.skipif(not is_torchvision_available(), reason="torchvision isn't installed"),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.numerical
def test_pipeline_by_name_and_by_object(saved, tmp_path, backend, batch_size):
    """Scores are the softmax of the fused logits; back ends differ by a rounding of the bicubic resize."""
    images = [picture().rotate(angle) for angle in range(0, 180, 9)]
    paths = []
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
        paths.append(str(tmp_path / f"{index}.png"))
    processor = AutoImageProcessor.from_pretrained(saved, backend=backend)
    by_name = pipeline("image-classification", model=str(saved), image_processor=processor)
    model = MicroCLIPForImageClassification.from_pretrained(saved)
    by_object = pipeline("image-classification", model=model, image_processor=processor)
    expected = expected_scores(saved, images)
    for answers in (by_name(paths, batch_size=batch_size), by_object(images, batch_size=batch_size)):
        for answer, row in zip(answers, expected, strict=True):
            scores = torch.tensor([{a["label"]: a["score"] for a in answer}[name] for name in CLASS_NAMES])
            close = within(LOGIT_SCALE / 2) if backend == "pil" else {"rtol": 0, "atol": 2e-2}
            torch.testing.assert_close(scores, row, **close)


def kinds_of_photos():
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return {
        "greyscale.png": (image.convert("L"), {}, image.convert("L")),
        "rgba.png": (image.convert("RGBA"), {}, image),
        "palette.png": (image.quantize(256), {}, image.quantize(256)),
        "cmyk.tif": (image.convert("CMYK"), {}, image.convert("CMYK")),
        "one_bit.png": (image.convert("1"), {}, image.convert("1")),
        "rotated.png": (image.transpose(Image.Transpose.ROTATE_90), {"exif": exif}, image),
        "grey16.png": (grey16, {}, None),
    }


@pytest.mark.parametrize("name", kinds_of_photos())
@pytest.mark.numerical
def test_kinds_of_photos_in_the_pipeline(saved, tmp_path, name):
    """As the same picture in plain RGB; 16-bit grey, which the pipeline clips, gives an answer."""
    image, options, plain = kinds_of_photos()[name]
    image.save(tmp_path / name, **options)
    processor = AutoImageProcessor.from_pretrained(saved, backend="pil")
    answer = pipeline("image-classification", model=str(saved), image_processor=processor)(str(tmp_path / name))
    scores = torch.tensor([{a["label"]: a["score"] for a in answer}[label] for label in CLASS_NAMES])
    assert scores.sum().item() == pytest.approx(1, abs=COSINE)
    if plain is not None:
        expected = expected_scores(saved, [plain.convert("RGB")])[0]
        torch.testing.assert_close(scores, expected, **within(LOGIT_SCALE / 2))


REMOTE = """
import importlib.util, sys
sys.path.append({site!r})
if importlib.util.find_spec("microclip_hf") is not None:
    sys.exit(77)
import json
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline
folder, again, photo = sys.argv[1:]
try:
    AutoModelForImageClassification.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error) or "microclip" in str(error), error
else:
    raise AssertionError("loaded without trust_remote_code")
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
answers = []
for path in (folder, again):
    model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
    by_name = pipeline("image-classification", model=path, trust_remote_code=True, image_processor=processor)
    by_object = pipeline("image-classification", model=model, image_processor=processor)
    answers += [by_name([photo] * 16, batch_size=16)[15], by_object(photo)]
    model.save_pretrained(again)
print("\\n" + json.dumps(answers))
"""


def assert_loads_without_the_package(saved, tmp_path):
    """In a process that can't import microclip_hf; a model loaded there and saved again loads, too."""
    picture().save(tmp_path / "photo.png")
    site = sysconfig.get_paths()["purelib"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-S", "-c", REMOTE.format(site=site), str(saved), str(tmp_path / "again")]
    result = subprocess.run(
        [*command, str(tmp_path / "photo.png")], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    if result.returncode == 77:
        pytest.skip("microclip_hf is installed in site-packages, not as an editable checkout")
    assert result.returncode == 0, result.stderr
    expected = expected_scores(saved, [picture()])[0]
    for answer in json.loads(result.stdout.strip().splitlines()[-1]):
        scores = torch.tensor([{a["label"]: a["score"] for a in answer}[label] for label in CLASS_NAMES])
        torch.testing.assert_close(scores, expected, **within(LOGIT_SCALE / 2))
    assert (tmp_path / "again" / "modeling_microclip.py").exists()


def test_remote_code_without_the_package(saved, tmp_path):
    assert_loads_without_the_package(saved, tmp_path)


def test_modules_that_travel_import_nothing_else_of_ours():
    folder = importlib.util.find_spec("microclip_hf").submodule_search_locations[0]
    travelling = ("configuration_microclip", "modeling_microclip", "saliency", "text_heads")
    for name in travelling:
        lines = Path(folder, f"{name}.py").read_text(encoding="utf-8").splitlines()
        imports = [line for line in lines if line.startswith("from .") or "microclip_hf" in line.split("#")[0]]
        assert all(line.split()[1].lstrip(".") in travelling for line in imports), (name, imports)


def test_processors_of_the_source_are_kept(clip_folder, tmp_path):
    """An own mean survives; a CLIP without a processor gets CLIP's for its size."""
    processor = AutoImageProcessor.from_pretrained(clip_folder, backend="pil")
    processor.image_mean = [0.1, 0.2, 0.3]
    model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, image_processor=processor)
    model.save_pretrained(tmp_path / "own")
    assert AutoImageProcessor.from_pretrained(tmp_path / "own", backend="pil").image_mean == (0.1, 0.2, 0.3)
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    bare = MicroCLIPForImageClassification.from_clip(tmp_path / "bare", CLASS_NAMES, tokenizer=tokenizer)
    assert bare.image_processor.crop_size["height"] == 32
    with pytest.raises(ValueError, match="holds no tokenizer"):
        MicroCLIPForImageClassification.from_clip(tmp_path / "bare", CLASS_NAMES)


def test_processors_survive_loading_and_saving_again(clip_folder, tmp_path):
    processor = AutoImageProcessor.from_pretrained(clip_folder, backend="pil")
    processor.image_mean = [0.1, 0.2, 0.3]
    model = MicroCLIPForImageClassification.from_clip(
        clip_folder, CLASS_NAMES, image_processor=processor, keep_text_model=True, prior_weighting="uniform"
    )
    model.save_pretrained(tmp_path / "first")
    loaded, _ = MicroCLIPForImageClassification.from_pretrained(tmp_path / "first", output_loading_info=True)
    loaded.set_classes(["one", "two"])
    loaded.save_pretrained(tmp_path / "second")
    assert AutoImageProcessor.from_pretrained(tmp_path / "second", backend="pil").image_mean == (0.1, 0.2, 0.3)
    assert MicroCLIPForImageClassification.from_pretrained(tmp_path / "second").tokenizer is not None


@pytest.mark.numerical
def test_flowers_in_the_pipeline(clip_folder, flowers, tmp_path):
    """Real photos, by name and by object, one by one and in batches."""
    names = sorted(path.name for path in (flowers / "test").iterdir())
    descriptions = json.loads((flowers / "descriptions.json").read_text())
    with pytest.warns(UserWarning, match="bluebell, lily-valley"):
        model = MicroCLIPForImageClassification.from_clip(
            clip_folder, names, descriptions=descriptions, prior_weighting="uniform"
        )
    model.save_pretrained(tmp_path)
    photos = [str(path) for path in sorted((flowers / "test").glob("*/*.jpg"))[:40]]
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    by_object = pipeline("image-classification", model=model, image_processor=processor)
    by_name = pipeline("image-classification", model=str(tmp_path), image_processor=processor)
    with ClearDecisions():
        answers = [by(photos, batch_size=size, top_k=12) for by in (by_name, by_object) for size in (1, 16)]
    for answer in answers[1:]:
        for one, other in zip(answers[0], answer, strict=True):
            assert {a["label"] for a in one} == set(names)
            assert {a["label"]: pytest.approx(a["score"], abs=within(LOGIT_SCALE / 2)["atol"]) for a in one} == {
                a["label"]: a["score"] for a in other
            }
