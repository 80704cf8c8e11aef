"""Explanations: numbers against the model's own, places of patches against what the processor does to pixels."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_inputs
import torch
from birdworld import score_saliency
from birdworld.domains import DOMAINS
from birdworld.tiny_clip import FOLDER
from decisions import ClearDecisions
from PIL import Image
from tiny_inputs import LOGIT_SCALE
from tolerances import COSINE, assert_clear, within
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import adapt
from microclip_hf.explain.explanation import HATCHING, HEAT, explain, overlay
from microclip_hf.explain.figure import plot
from microclip_hf.explain.patch_grid import PatchGrid


DOCS = Path(__file__).parents[1] / "docs"
SIDE, PATCH = 32, 8
CROP = {"height": SIDE, "width": SIDE}
NEAREST = Image.Resampling.NEAREST
# Width and height: tall, wide, odd, smaller than the crop, a pixel thick, a pixel.
SIZES = [(50, 171), (300, 77), (97, 97), (20, 13), (7, 31), (1, 60), (90, 1), (1, 1), (32, 32)]
KINDS = {
    "clip": {"size": {"shortest_edge": SIDE}, "crop_size": CROP},
    "larger first": {"size": {"shortest_edge": 37}, "crop_size": CROP},
    "padded": {"size": {"shortest_edge": 12}, "crop_size": CROP},
    "only cropped": {"do_resize": False, "crop_size": CROP},
    "squashed": {"size": CROP, "do_center_crop": False},
    "oblong": {"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 40}},
    "no multiple": {"size": {"shortest_edge": 36}, "crop_size": {"height": 36, "width": 35}},
    "whole": {"size": {"shortest_edge": SIDE}, "do_center_crop": False},
}


def make_processor(**kwargs):
    return CLIPImageProcessorPil(**{"resample": Image.Resampling.BICUBIC, **kwargs})


def process(processor, pixels):
    """A picture `(height, width, 3)` through the processor without rescaling and normalisation."""
    image = Image.fromarray(pixels.astype(np.uint8))
    return processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]


def patch_means(output, grid):
    rows, columns = grid.shape
    covered = output[:, : rows * PATCH, : columns * PATCH].astype(float)
    return covered.reshape(-1, rows, PATCH, columns, PATCH).mean((0, 2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_each_input_pixel_comes_from_where_its_patch_lies(kind, size):
    """Pixels that hold their own coordinates (plus 1; 0 is padding), picked by a processor that only picks."""
    (width, height), processor = size, make_processor(**KINDS[kind], resample=NEAREST)
    grid = PatchGrid.locate(size, processor, PATCH)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    output = process(processor, np.stack([(x + 1) % 256, y + 1, (x + 1) // 256], -1)).astype(int)
    rows, columns = grid.shape
    assert (output.shape[1] // PATCH, output.shape[2] // PATCH) == (rows, columns)
    output = output[:, : rows * PATCH, : columns * PATCH]
    padding, found_x, found_y = output[1] == 0, output[0] + 256 * output[2] - 1, output[1] - 1
    left, top, right, bottom = np.moveaxis(grid.boxes().repeat(PATCH, 0).repeat(PATCH, 1), -1, 0)
    # Where the middle of each pixel of the input lies: in the picture, the pixel that was picked; else in the padding.
    steps = (np.arange(PATCH) + 0.5) / PATCH
    at_x = left + (right - left) * np.tile(steps, columns)
    at_y = top + (bottom - top) * np.tile(steps, rows)[:, None]
    inside = (at_x > 0) & (at_x < width) & (at_y > 0) & (at_y < height)
    assert (inside == ~padding).all()
    for at, found in ((at_x, found_x), (at_y, found_y)):
        assert (at[inside] >= found[inside] - 1e-9).all() and (at[inside] <= found[inside] + 1 + 1e-9).all()


@pytest.mark.parametrize("kind", ["clip", "larger first", "padded", "squashed", "oblong"])
@pytest.mark.parametrize("size", [(161, 420), (500, 143), (200, 200)])
def test_a_patch_painted_on_the_picture_is_that_patch_of_the_input(kind, size):
    processor = make_processor(**KINDS[kind])
    grid = PatchGrid.locate(size, processor, PATCH)
    padded = np.isnan(grid.to_patches(np.ones(size[::-1])))
    assert padded.any() == (kind == "padded")
    for place in np.argwhere(~padded):
        one_hot = np.zeros(grid.shape)
        one_hot[tuple(place)] = 1
        painted = np.nan_to_num(grid.to_image(one_hot))
        # Of a patch that reaches into the padding, the painted part.
        reached = process(processor, np.full((*painted.shape, 3), 255))
        share = patch_means(reached, grid)[tuple(place)] / 255
        seen = patch_means(process(processor, np.repeat(255 * painted.round()[..., None], 3, -1)), grid) / 255
        assert seen.argmax() == one_hot.argmax() and seen[tuple(place)] > 0.85 * share
        assert seen.sum() - seen.max() < 0.35 * share  # bicubic edges


@pytest.mark.parametrize("size", [(40, 95), (110, 48), (48, 48), (9, 30)])
def test_probing_finds_the_same_pixels(size):
    """One row or column of the picture at a time is made white: which patches change, and most of all which."""
    (width, height), processor = size, make_processor(**KINDS["clip"])
    grid = PatchGrid.locate(size, processor, PATCH)
    grey = np.full((height, width, 3), 64)
    before = process(processor, grey).astype(int)
    rows, columns = grid.shape
    indices = np.arange(rows * columns).reshape(grid.shape)
    for length, parts, along in ((height, rows, 0), (width, columns, 1)):
        patch_at = grid.to_image(indices // columns if along == 0 else indices % columns)
        if along == 1:
            patch_at = patch_at.T
        with np.errstate(all="ignore"):
            patch_at = [line[~np.isnan(line)].mean() if not np.isnan(line).all() else np.nan for line in patch_at]
        for index in range(length):
            picture = grey.copy()
            picture[(index, slice(None)) if along == 0 else (slice(None), index)] = 255
            change = np.abs(process(processor, picture).astype(int) - before).sum(0)
            change = change.reshape(rows, PATCH, columns, PATCH).sum((1, 3)).sum(1 - along)
            if np.isnan(patch_at[index]):  # at most what the filter draws in over the edge
                assert change.sum() == change[[0, -1]].sum()
            elif abs(patch_at[index] - round(patch_at[index])) < 1e-6:
                assert change.argmax() == round(patch_at[index]), (along, index)
            else:  # on an edge between two
                assert patch_at[index] - 1 < change.argmax() < patch_at[index] + 1
        assert {round(own) for own in patch_at if not np.isnan(own)} == set(range(parts))


def test_maps_are_means_over_areas():
    """By hand: 5 x 4 pixels, of which 2 x 1 patches cover x from 1.5 to 5.5 and y from -2 to 3."""
    grid = PatchGrid((5, 4), (1.5, -2.0, 5.5, 3.0), (1, 2))
    expected = np.array([[np.nan, 10, 10, (10 + 20) / 2, 20]] * 3 + [[np.nan] * 5])
    np.testing.assert_allclose(grid.to_image(np.array([[10, 20]])), expected)
    # The first patch covers half of column 1, column 2 and half of column 3; the second the other half and column 4.
    columns = np.tile([100.0, 1, 2, 3, 4], (4, 1))
    columns[3] = 1000
    np.testing.assert_allclose(grid.to_patches(columns), [[(0.5 + 2 + 1.5) / 2, (1.5 + 4) / 1.5]])
    np.testing.assert_allclose(grid.boxes(), [[[1.5, -2, 3.5, 3], [3.5, -2, 5.5, 3]]])
    with pytest.raises(ValueError, match=r"values has the shape \(2, 1\); expected \(1, 2\)"):
        grid.to_image(np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"values has the shape \(5, 4\); expected \(4, 5\)"):
        grid.to_patches(np.ones((5, 4)))


def make_images():
    """Modes and sizes of all kinds."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]
    modes = [noise[0].convert(mode) for mode in ("L", "P", "RGBA", "CMYK", "1")]
    sixteen = Image.fromarray(rng.integers(0, 65536, (40, 50)).astype(np.uint16))
    return [*noise, *modes, sixteen]


@pytest.mark.numerical
def test_numbers_are_the_models(model):
    model.logit_adjustment.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    model.config.fusion_ratio = 0.3
    images = make_images()
    model.train()
    state = torch.random.get_rng_state()
    explanations = explain(model, images, batch_size=4)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    model.eval()
    for image, own in zip(images, explanations, strict=True):
        rgb = own.image
        assert rgb.mode == "RGB" and rgb.size == image.size == own.grid.image_size
        with torch.no_grad(), ClearDecisions():
            output = model(**model.image_processor(rgb, return_tensors="pt"), output_patch_embeds=True)
        assert_clear(output.logits, LOGIT_SCALE)
        np.testing.assert_allclose(own.scores, output.logits.softmax(-1)[0], **within(LOGIT_SCALE / 2))
        assert own.label == own.class_names[int(output.logits.argmax())] == model.config.id2label[own.scores.argmax()]
        # The fused opinion is the normalised geometric mean of the two.
        mean = own.cls_scores.astype(float) ** 0.3 * own.fg_scores.astype(float) ** 0.7
        np.testing.assert_allclose(mean / mean.sum(), own.scores, **within(LOGIT_SCALE / 2))
        assert own.saliency_mask.dtype == bool and own.saliency_mask.shape == own.fg_attention.shape == (4, 4)
        assert own.saliency_mask.ravel().tolist() == output.saliency_mask[0].tolist()
        np.testing.assert_allclose([*own.fg_attention.ravel(), own.null_share], output.fg_attention[0], **within())
        assert own.fg_attention.sum() + own.null_share == pytest.approx(1, abs=COSINE)
        assert {own.scores.dtype, own.cls_scores.dtype, own.fg_scores.dtype, own.fg_attention.dtype} == {
            np.dtype(np.float32)
        }
    assert explain(model, []) == []


@pytest.mark.numerical
def test_pictures_are_upright(model):
    """EXIF orientation 6: to be turned by 90 degrees clockwise."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    one, other = explain(model, [upright, turned])
    assert one.image == other.image and one.grid == other.grid
    np.testing.assert_allclose(one.fg_attention, other.fg_attention, **within())


def test_pictures_of_several_sizes_without_a_crop(model):
    """Rows and columns are those of the prepared picture."""
    model.image_processor = make_processor(**KINDS["whole"])
    images = [Image.new("RGB", size, color) for size, color in (((40, 90), "red"), ((40, 90), "blue"), ((64, 32), 0))]
    explanations = explain(model, images, interpolate_pos_encoding=True)
    assert [own.fg_attention.shape for own in explanations] == [(9, 4), (9, 4), (4, 8)]
    assert not np.isnan(explanations[2].grid.to_image(explanations[2].fg_attention)).any()
    with pytest.raises(ValueError, match="size"):
        explain(model, images)
    assert not model.training


def test_half_precision(model):
    image = make_images()[0]
    (own,) = explain(model.to(torch.bfloat16), [image])
    assert own.fg_attention.dtype == own.scores.dtype == np.float32
    assert own.fg_attention.sum() + own.null_share == pytest.approx(1, abs=0.02)


def test_overlay(model):
    """A wide picture, of which the outer parts are cut away."""
    image = Image.new("RGB", (128, 32), (200, 100, 50))
    (own,) = explain(model, [image])
    assert own.grid.box == (48, 0, 80, 32)
    assert overlay(own, 0) == overlay(own, 0, "saliency_mask") == image
    attention, mask = (np.asarray(overlay(own, 1, show)).astype(int) for show in ("fg_attention", "saliency_mask"))
    for drawing in (attention, mask):
        cut_away = np.concatenate([drawing[:, :48], drawing[:, 80:]], 1)
        assert set(np.unique(cut_away)) == set(HATCHING)
    seen = mask[:, 48:80]
    expected = np.where(own.saliency_mask.repeat(8, 0).repeat(8, 1)[..., None], (200, 100, 50), 0)
    assert (seen == expected).all()
    brightest = np.unravel_index(own.fg_attention.argmax(), (4, 4))
    x, y = 48 + 8 * brightest[1] + 4, 8 * brightest[0] + 4
    assert np.abs(attention[y, x] - HEAT[-1]).max() <= 1
    half = np.asarray(overlay(own, 0.5)).astype(int)
    assert np.abs(half - (attention + np.asarray(image)) / 2).max() <= 1
    with pytest.raises(ValueError, match=r"alpha is 1.5; it must lie in \[0, 1\]"):
        overlay(own, 1.5)
    with pytest.raises(ValueError, match="show is 'gradient'; it must be"):
        overlay(own, show="gradient")


@pytest.mark.parametrize("size", [(128, 32), (1, 60), (300, 200)])
def test_plot(model, size, tmp_path):
    (own,) = explain(model, [Image.new("RGB", size, "white")])
    figure = plot(own, num_classes=2)
    picture, attention, salient, bars = figure.axes
    corners = picture.patches[0].get_window_extent().transformed(picture.transData.inverted())
    np.testing.assert_allclose(np.array([*corners.min, *corners.max]) + 0.5, own.grid.box, atol=1e-6)
    assert attention.images[0].get_array().shape == salient.images[0].get_array().shape == (*size[::-1], 3)
    best = np.sort(own.scores)[::-1][:2]
    np.testing.assert_allclose([bar.get_width() for bar in bars.containers[0]], best)
    assert bars.get_yticklabels()[0].get_text() == own.label
    figure.savefig(tmp_path / "why.png")
    assert Image.open(tmp_path / "why.png").width > 1000
    with pytest.raises(ValueError, match="num_classes is 0"):
        plot(own, num_classes=0)


def test_bad_input_is_refused(model):
    image = Image.new("RGB", (40, 40))
    with pytest.raises(TypeError, match=r"pass a list, explain\(model, \[image\]\)"):
        explain(model, image)
    with pytest.raises(TypeError, match=r"images\[1\] is a str; expected a PIL image"):
        explain(model, [image, "photo.png"])
    with pytest.raises(ValueError, match=r"images\[0\] is 0 x 5"):
        explain(model, [Image.new("RGB", (0, 5))])
    with pytest.raises(ValueError, match="batch_size is 0"):
        explain(model, [image], batch_size=0)
    with pytest.raises(ValueError, match=r"'longest_edge': 64.*shortest_edge, or a height and a width"):
        PatchGrid.locate((40, 40), make_processor(size={"shortest_edge": SIDE, "longest_edge": 64}), PATCH)
    model.image_processor = make_processor(**KINDS["clip"], do_pad=True, pad_size={"height": 48, "width": 48})
    with pytest.raises(
        ValueError, match="made 48 x 48 pixels of a picture of 40 x 40, which aren't the 4 x 4 patches"
    ):
        explain(model, [image])


def test_a_run_whose_image_processor_cannot_be_traced_has_a_picture_without_images(tmp_path):
    tiny_inputs.write_inputs(tmp_path)
    make_processor(size={"shortest_edge": SIDE, "longest_edge": 64}, crop_size=CROP).save_pretrained(tmp_path / "clip")
    options = {"model_name_or_path": "clip", "train_dir": "photos", "class_names": "names.txt", "output_dir": "out"}
    command = [text for name, path in options.items() for text in (f"--{name}", str(tmp_path / path))]
    command += ["--config_overrides", '{"prior_weighting": "uniform"}', "--use_cpu", "true", "--report", "false"]
    with pytest.warns(UserWarning, match=r"adaptation\.png will show no images, .*shortest_edge, or a height"):
        adapt.main([*command, "--num_crops", "1", "--max_steps", "1"])
    assert (tmp_path / "out" / "adaptation.png").exists()


def test_scores_by_hand():
    """Patches of 2 x 2 pixels; the bird is the left half of the picture, without its last row."""
    grid = PatchGrid((4, 4), (0.0, 0.0, 4.0, 4.0), (2, 2))
    bird = np.zeros((4, 4), dtype=bool)
    bird[:3, :2] = True
    mask, attention = np.array([[1, 1], [0, 0]], dtype=bool), np.array([[0.1, 0.2], [0.3, 0.2]])
    scores = score_saliency.score_places(grid, mask, attention, bird)
    assert scores == pytest.approx({"iou": 4 / 10, "on_bird": (0.1 + 0.3 / 2) / 0.8, "pointing": 1})
    assert score_saliency.score_places(grid, mask, mask, bird)["pointing"] == 0.5
    fixed = score_saliency.fixed_masks(grid, bird)
    assert fixed["the bird's patches"].tolist() == [[True, False], [True, False]]
    summary = score_saliency.summarize([{"iou": 0.1}, {"iou": 0.2}, {"iou": 0.6}])
    assert summary == {"iou": {"mean": 30.0, "error": 15.3}}  # sqrt(0.07 / 3)


def test_scores_of_the_bird_world(tmp_path, monkeypatch):
    """A model that wasn't adapted scores as before; the settings don't change fixed masks, and do change the cut."""
    monkeypatch.setattr(score_saliency, "NUM_TEST", 6)
    domain = DOMAINS["mist"]
    model = MicroCLIPForImageClassification.from_clip(
        FOLDER, domain.class_names, descriptions=domain.descriptions, prior_weighting="uniform"
    )
    model.save_pretrained(tmp_path / "model")
    score_saliency.main([str(tmp_path / "model"), str(tmp_path / "scores")])
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["domain"] == "mist" and report["num_pictures"] == 6
    rows = report["percent"]
    settings = [f"{affinity}/{cut}" for affinity in ("dot", "cosine") for cut in ("std", "mean")]
    assert all(rows[f"before, {own}"] == rows[f"adapted, {own}"] for own in settings)
    assert len({str(rows[f"before, {own}"]) for own in settings}) == 4
    birds = [np.asarray(own["mask"]) > 127 for own in domain.examples("test", 6, with_masks=True)]
    assert rows["every patch"]["iou"]["mean"] == pytest.approx(100 * np.mean(birds), abs=0.06)
    assert rows["every patch"]["on_bird"] == rows["every patch"]["iou"]
    assert (tmp_path / "scores.md").read_text() == score_saliency.make_table(rows)
    assert Image.open(tmp_path / "scores.png").height == 6 * 96
    with pytest.raises(ValueError, match="are no domain's species"):
        model.config.id2label = {index: str(index) for index in range(model.num_labels)}
        score_saliency.find_domain(model)


def test_the_page_runs_and_shows_the_scores(model, tmp_path, monkeypatch):
    page = (DOCS / "explain.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model.save_pretrained(tmp_path / "adapted")
    Image.new("RGB", (50, 70), "green").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert Image.open("where.png").size == (50, 70) and Image.open("why.png").width > 1000
    table = (DOCS / "results" / "saliency.md").read_text(encoding="utf-8")
    report = json.loads((DOCS / "results" / "saliency.json").read_text(encoding="utf-8"))
    assert table in page and table == score_saliency.make_table(report["percent"])
