"""Image processors: training, evaluation and prediction get the same pixels, or one line says what is wrong."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from decisions import ClearDecisions
from PIL import Image
from tiny_inputs import LOGIT_SCALE
from tolerances import within
from torch.testing import assert_close
from transformers import AutoImageProcessor, pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.evaluation.predictions import EvaluationSettings, ImageReader
from microclip_hf.explain.explanation import explain
from microclip_hf.images import cut_squares
from microclip_hf.loading import load_adapted, load_clip
from microclip_hf.prediction import predict_photos
from microclip_hf.preparation import Preparation


SQUARE = {"height": 32, "width": 32}


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_processor(**settings):
    return CLIPImageProcessorPil(**{"size": {"shortest_edge": 32}, "crop_size": SQUARE, **settings})


def make_trainer(model, folder, photo, **kwargs):
    arguments = MicroCLIPTrainingArguments(
        str(folder), use_cpu=True, max_steps=1, num_crops=1, disable_tqdm=True, save_strategy="no"
    )
    dataset = [{"image": photo, "label": 0}] * 2
    return MicroCLIPTrainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset, **kwargs)


SAME_PIXELS = {
    "CLIP's own": make_processor(),
    "no normalisation": make_processor(do_normalize=False),
    "another mean": make_processor(image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3]),
    "numbers": make_processor(image_mean=0.5, image_std=0.25),
    "-1 to 1": make_processor(rescale_factor=1 / 127.5, image_mean=[1, 1, 1], image_std=[1, 1, 1]),
    "1 / 256": make_processor(rescale_factor=1 / 256),
    "of 0 to 255": make_processor(do_rescale=False, image_mean=[123, 117, 104], image_std=[58, 57, 56]),
    "no RGB": make_processor(do_convert_rgb=False),
    "squashed": make_processor(size=SQUARE, do_center_crop=False),
    "squashed and cropped": make_processor(size=SQUARE),
    "ViT": ViTImageProcessorPil(size=SQUARE),
    "SigLIP": SiglipImageProcessorPil(size=SQUARE),
    **{f.name: make_processor(resample=f) for f in Image.Resampling},
}


@pytest.mark.numerical
@pytest.mark.parametrize("name", SAME_PIXELS)
def test_a_square_photos_weak_view_is_what_the_processor_makes_of_it(model, tmp_path, name):
    """It has no room to choose a square: all that is left is resizing and normalisation."""
    processor, photo = SAME_PIXELS[name], noise(77, 77)
    trainer = make_trainer(model, tmp_path, photo, processing_class=processor)
    view = torch.from_numpy(trainer.train_dataset[0]["weak"].copy())[None]
    expected = processor(photo, return_tensors="pt")["pixel_values"]
    assert_close(trainer.normalize(view), expected, **within(expected.abs().max()))


@pytest.mark.numerical
@pytest.mark.parametrize("name", SAME_PIXELS)
def test_photos_of_any_shape_are_trained_on_and_predicted(model, tmp_path, name):
    """The Trainer's processor is the model's afterwards; pipeline, command and evaluation agree on a wide photo."""
    photo = noise(90, 40)
    trainer = make_trainer(model, tmp_path, photo, processing_class=SAME_PIXELS[name])
    trainer.train()
    assert model.image_processor is SAME_PIXELS[name]
    (explanation,) = explain(model, [noise(32, 32)])
    assert explanation.image == noise(32, 32) and explanation.grid.box == (0, 0, 32, 32)
    trainer.save_model()
    photo.save(tmp_path / "photo.png")
    adapted = load_adapted(str(tmp_path))
    (prediction,) = predict_photos(adapted, [tmp_path / "photo.png"])
    classify = pipeline("image-classification", model=adapted, image_processor=adapted.image_processor)
    assert classify(photo)[0]["score"] == pytest.approx(prediction.score, abs=within(LOGIT_SCALE / 2)["atol"])
    with ClearDecisions():
        logits = adapted(**adapted.image_processor(photo, return_tensors="pt")).logits[0]
    np.testing.assert_allclose(
        trainer.predict(trainer.eval_dataset).predictions[0], logits.detach(), **within(LOGIT_SCALE)
    )


@pytest.mark.parametrize("resample", Image.Resampling)
def test_crops_are_resized_by_the_processors_filter(resample):
    """A crop that is the whole photo; torch rounds bilinear and bicubic otherwise than PIL, by two levels."""
    photo, processor = noise(77, 77), make_processor(resample=resample, do_normalize=False)
    (crop,) = cut_squares(photo, [(0, 0, 77, 77)], 32, resample=resample)
    expected = 255 * processor(photo, return_tensors="np")["pixel_values"][0]
    assert np.abs(crop - expected).max() <= 2.01
    read = ImageReader([processor], 32, EvaluationSettings(num_crops=1))
    crops = read.normalize(read(photo, (0, 0))["crops"])
    assert crops.min() >= 0 and crops.max() <= 1


REFUSED = {
    "no crop": ({"do_center_crop": False}, r"makes \(1, 3, 32, 48\) pixel values .*set do_center_crop=True"),
    "a smaller crop": ({"crop_size": {"height": 24, "width": 24}}, r"24\) .*takes \(1, 3, 32, 32\); .*crop_size="),
    "an oblong crop": ({"crop_size": {"height": 24, "width": 32}}, r"crop_size="),
    "another square": ({"size": {"height": 36, "width": 36}, "do_center_crop": False}, r"\(1, 3, 36, 36\)"),
    "a margin": ({"size": {"shortest_edge": 24}}, r"in a margin; resize to at least 32"),
    "padding": ({"do_pad": True, "pad_size": {"height": 40, "width": 40}}, r"\(1, 3, 40, 40\)"),
    "longest edge": ({"size": {"longest_edge": 32}}, r"can't make pixel values .*longest_edge"),
    "no resize": ({"do_resize": False}, r"doesn't resize photos.*do_resize=True"),
    "no rescale": ({"do_rescale": False}, r"doesn't rescale photos.*do_rescale=True"),
    "bytes": ({"do_rescale": False, "do_normalize": False}, r"torch.uint8 pixel values; set do_rescale=True"),
    "factor 0": ({"rescale_factor": 0.0}, r"rescale_factor=0.0; pass a number above 0"),
    "factor of text": ({"rescale_factor": "1/255"}, r"rescale_factor='1/255'"),
    "four means": ({"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, r"image_mean=.*; pass three numbers"),
    "a mean of text": ({"image_mean": "half"}, r"image_mean='half'; pass three numbers"),
    "no spread": ({"image_std": [0.0, 0.1, 0.1]}, r"image_std=\(0.0, 0.1, 0.1\); pass numbers above 0"),
    "NaN": ({"image_std": [float("nan")] * 3}, r"pass numbers above 0"),
    "no filter": ({"resample": 9}, r"resample=9; pass a filter of PIL's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_processor_that_views_cannot_match_is_refused_when_the_trainer_is_made(model, tmp_path, name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=r"The image processor \(CLIPImageProcessor\w*\) .*" + message):
        make_trainer(model, tmp_path, noise(40, 40), processing_class=make_processor(**settings))


def test_another_class_of_processor_is_tried_not_trusted():
    class Swapped(CLIPImageProcessorPil):
        """Blue first, as OpenCV has it."""

        def __call__(self, images, **kwargs):
            inputs = super().__call__(images, **kwargs)
            inputs["pixel_values"] = inputs["pixel_values"].flip(1)
            return inputs

    class Frames(CLIPImageProcessorPil):
        """A video's."""

        def __call__(self, images, **kwargs):
            return {"pixel_values": super().__call__(images, **kwargs)["pixel_values"][None]}

    settings = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
    with pytest.raises(ValueError, match=r"\(Swapped\) makes other pixel values"):
        Preparation.of(Swapped(**settings, image_mean=0.5, image_std=0.5), 32)
    with pytest.raises(ValueError, match=r"\(Frames\) makes \(1, 1, 3, 32, 32\) .*take a CLIPImageProcessor"):
        Preparation.of(Frames(**settings), 32)


def test_torchvisions_names_of_filters():
    class Filter:
        name = "LANCZOS"

    class Fast(CLIPImageProcessorPil):
        def to_dict(self):
            return {**super().to_dict(), "resample": Filter()}

    assert Preparation.of(Fast(size={"shortest_edge": 32}, crop_size=SQUARE), 32).resample == Image.Resampling.LANCZOS


def test_the_trainers_processor_is_chosen_once(model, tmp_path):
    trainer = make_trainer(model, tmp_path, noise(40, 40))
    trainer.processing_class = model.image_processor
    with pytest.raises(ValueError, match=r"MicroCLIPTrainer\(processing_class="):
        trainer.processing_class = make_processor(image_mean=0.5, image_std=0.5)


def edited(clip_folder, folder, **settings):
    """The CLIP with other settings of its image processor."""
    shutil.copytree(clip_folder, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def test_a_checkpoint_without_crop_gets_clips_own(clip_folder, tmp_path):
    folder = edited(clip_folder, tmp_path / "clip", do_center_crop=False)
    with pytest.warns(UserWarning, match="doesn't crop, .*the middle 32 x 32 pixels"):
        model = MicroCLIPForImageClassification.from_clip(folder, CLASS_NAMES, prior_weighting="uniform")
    photo = noise(90, 40)
    expected = AutoImageProcessor.from_pretrained(clip_folder, backend="pil")(photo, return_tensors="pt")
    assert_close(model.image_processor(photo, return_tensors="pt")["pixel_values"], expected["pixel_values"])
    trainer = make_trainer(model, tmp_path / "out", photo)
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["do_center_crop"] is True


def test_commands_check_the_processor_before_the_weights(clip_folder, tmp_path):
    folder = edited(clip_folder, tmp_path / "clip", do_resize=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"set do_resize=True, in its preprocessor_config.json"):
        load_clip(str(folder), {"class_names": CLASS_NAMES, "templates": None}, {})
