"""Views against independent arithmetic: numpy from the definitions, PIL on whole images, statistics of the draws."""

import io
import math
import random
import zipfile
from collections import Counter
from functools import partial
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from microclip_hf.images import UNREADABLE
from microclip_hf.training import views
from microclip_hf.training.view_datasets import VIEW_NAMES, ViewCollator, ViewDataset, ViewSettings
from microclip_hf.training.views import FILL_COLOR, OPERATIONS, make_views, to_rgb


BICUBIC = Image.Resampling.BICUBIC
CROP_RATIO = (0.5, 0.9)


def noise(width, height, low=0, high=256, seed=0):
    values = np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def ramp(width, height):
    """Red is x, green is y, blue is noise."""
    values = np.array(noise(width, height))
    values[..., 0], values[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(values)


def view(name, image, size, rng):
    return make_views(image, size, 0, CROP_RATIO, rng)[name].transpose(1, 2, 0)


def ints(image):
    return np.asarray(image).astype(np.int16)


def same(first, second):
    return all(np.array_equal(first[name], second[name]) for name in VIEW_NAMES)


def assert_uniform(values, low=0, high=1):
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


WEAK_SIZES = [(60, 40, 24), (40, 60, 24), (40, 40, 24), (55, 37, 24), (37, 55, 24), (333, 500, 65), (10, 7, 24)]
WEAK_SIZES += [(24, 31, 24), (1, 3000, 8), (3000, 1, 8), (1, 1, 8)]


@pytest.mark.parametrize("width, height, size", WEAK_SIZES)
def test_weak_view_is_a_crop_of_the_resized_image(width, height, size):
    # Values that bicubic overshoot doesn't clip: with clipping, the order of PIL's two passes shows.
    image = noise(width, height, 64, 192)
    short = min(width, height)
    resized = ints(image.resize((int(size * width / short), int(size * height / short)), BICUBIC))
    windows = np.lib.stride_tricks.sliding_window_view(resized, (size, size, 3))[:, :, 0].reshape(-1, size, size, 3)
    positions = set()
    for seed in range(100 if len(windows) < 100 else 3):
        weak = view("weak", image, size, np.random.default_rng(seed))
        difference = np.abs(windows - ints(weak)).max((1, 2, 3))
        assert difference.min() <= 1
        positions.add(int(difference.argmin()))
    assert len(positions) == len(windows) if len(windows) < 20 else len(positions) > 1


def test_crops_are_squares_anywhere_in_the_image():
    rng = np.random.default_rng(0)
    boxes = np.array([views.crop_box(160, 100, CROP_RATIO, rng) for _ in range(2000)])
    lefts, tops, rights, bottoms = boxes.T
    sides = rights - lefts
    assert boxes.dtype == int
    assert np.array_equal(sides, bottoms - tops)
    assert (boxes.min(), rights.max(), bottoms.max()) == (0, 160, 100)
    assert (sides.min(), sides.max()) == (50, 90)
    assert sides.mean() == pytest.approx(70, abs=1)
    # Integers, made continuous.
    assert_uniform(sides + rng.uniform(-0.5, 0.5, 2000), 50, 90)
    assert_uniform((lefts + rng.random(2000)) / (160 - sides + 1))
    assert_uniform((tops + rng.random(2000)) / (100 - sides + 1))


def test_crops_are_cut_from_the_original():
    """Crops of exactly the input size are blocks of the original, not resized; every position and corner comes."""
    pixels = np.asarray(ramp(53, 52)).transpose(2, 0, 1)
    crops = make_views(ramp(53, 52), 50, 600, (50 / 52, 50 / 52), np.random.default_rng(0))["crops"]
    corners = Counter(map(tuple, crops[:, :2, 0, 0].tolist()))
    assert set(corners) == {(left, top) for left in range(4) for top in range(3)}
    assert stats.chisquare(list(corners.values())).pvalue > 1e-3
    for crop in crops:
        left, top = crop[:2, 0, 0]
        assert np.array_equal(crop, pixels[:, top : top + 50, left : left + 50])


def test_crops_are_resized_to_the_input_size():
    crops = make_views(ramp(160, 100), 32, 100, CROP_RATIO, np.random.default_rng(0))["crops"].astype(float)
    lines = np.concatenate([crops[:, 0, 16, 5:27], crops[:, 1, 5:27, 16]])
    across, down = np.polyfit(np.arange(22), lines.T, 1)[0].reshape(2, 100) * 32
    assert np.allclose(across, down, atol=2)
    assert 49 < across.min() < 52
    assert 88 < across.max() < 91


@pytest.mark.parametrize("width, height", [(200, 160), (160, 200)])
def test_random_resized_crop_and_flip(width, height, monkeypatch):
    """The rectangle of a ramp shows in the slope and the start of its colours."""
    monkeypatch.setattr(views, "OPERATION_PROBABILITY", 0)
    image, rng, inner, draws = ramp(width, height), np.random.default_rng(0), np.arange(8, 56), []
    for _ in range(600):
        strong = ints(view("strong", image, 64, rng))
        x_slope, x_start = np.polyfit(inner + 0.5, strong[:, inner, 0].mean(0), 1)
        y_slope, y_start = np.polyfit(inner + 0.5, strong[inner, :, 1].mean(1), 1)
        draws.append((abs(x_slope) * 64, y_slope * 64, min(x_start, x_start + 64 * x_slope), y_start, x_slope < 0))
    widths, heights, lefts, tops, flips = np.transpose(draws)
    shares, ratios = widths * heights / (width * height), widths / heights
    assert (shares.min(), ratios.min(), ratios.max()) == pytest.approx((0.3, 3 / 4, 4 / 3), abs=0.03)
    assert 0.92 < shares.max() < 1.01
    wanted_shares, wanted_ratios = rng.uniform(0.3, 1, 9999), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 9999))
    areas = wanted_shares * width * height
    fits = (areas * wanted_ratios <= width**2) & (areas / wanted_ratios <= height**2)
    assert stats.ks_2samp(shares, wanted_shares[fits]).pvalue > 1e-3
    assert stats.ks_2samp(ratios, wanted_ratios[fits]).pvalue > 1e-3
    assert_uniform((lefts + 0.5 + rng.random(600)) / (width - widths + 1))
    assert_uniform((tops + 0.5 + rng.random(600)) / (height - heights + 1))
    assert flips.mean() == pytest.approx(0.5, abs=0.06)


NARROW = [(400, 20, (186, 0, 213, 20)), (20, 400, (0, 186, 20, 213)), (3000, 1, (1499, 0, 1500, 1))]


@pytest.mark.parametrize("width, height, box", NARROW)
def test_strong_views_of_narrow_images_are_their_centre(width, height, box, monkeypatch):
    monkeypatch.setattr(views, "OPERATION_PROBABILITY", 0)
    expected = np.asarray(noise(width, height).resize((24, 24), BICUBIC, box=box))
    strong = view("strong", noise(width, height), 24, np.random.default_rng(0))
    assert np.array_equal(strong, expected) or np.array_equal(strong, expected[:, ::-1])


# The 15 operations; m is the magnitude, 0 to 10, and x an int array (height, width, 3).
def truncate(values):
    return np.clip(np.floor(values), 0, 255)


def luma(x):
    return np.floor(x @ np.array([0.299, 0.587, 0.114]) + 0.5)[..., None]


def smooth(x):
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    result = x.astype(float)
    result[1:-1, 1:-1] = np.floor(ndimage.convolve(result, kernel[..., None]) + 0.5)[1:-1, 1:-1]
    return result


def stretch(x):
    return x if np.ptp(x) == 0 else truncate((x - x.min()) * (255 / np.ptp(x)))


def equalize(x):
    histogram = np.bincount(x.ravel(), minlength=256)
    step = (x.size - histogram[x.max()]) // 255
    return x if step == 0 else np.minimum((step // 2 + np.cumsum(histogram) - histogram) // step, 255)[x]


def by_channel(function):
    return lambda x, m, sign: np.stack([function(x[..., channel]) for channel in range(3)], -1)


def blend(base):
    return lambda x, m, sign: truncate(base(x) + max(0.1, 1 + sign * 0.9 * m / 10) * (x - base(x)))


def rotated(x, y, m, sign, width, height):
    """Positive angles turn the picture counterclockwise about its centre."""
    turn = np.exp(1j * math.radians(sign * 30 * m / 10)) * (x - width / 2 + 1j * (y - height / 2))
    return turn.real + width / 2, turn.imag + height / 2


COLOR_ORACLES = {
    "auto_contrast": by_channel(stretch),
    "equalize": by_channel(equalize),
    "invert": lambda x, m, sign: 255 - x,
    "posterize": lambda x, m, sign: x & (0xFF00 >> max(1, 4 - int(4 * m / 10)) & 0xFF),
    "solarize": lambda x, m, sign: np.where(x < 256 - int(256 * m / 10), x, 255 - x),
    "solarize_add": lambda x, m, sign: np.where(x < 128, np.minimum(x + min(128, int(110 * m / 10)), 255), x),
    "color": blend(luma),
    "contrast": blend(lambda x: np.floor(luma(x).mean() + 0.5)),
    "brightness": blend(np.zeros_like),
    "sharpness": blend(smooth),
}
EXACT = {"equalize", "invert", "posterize", "solarize", "solarize_add"}
# Where a point of the result comes from.
GEOMETRY_ORACLES = {
    "rotate": rotated,
    "shear_x": lambda x, y, m, sign, width, height: (x + sign * 0.3 * m / 10 * y, y),
    "shear_y": lambda x, y, m, sign, width, height: (x, y + sign * 0.3 * m / 10 * x),
    "translate_x": lambda x, y, m, sign, width, height: (x + sign * 0.45 * m / 10 * width, y),
    "translate_y": lambda x, y, m, sign, width, height: (x, y + sign * 0.45 * m / 10 * height),
}
SIGNS = pytest.mark.parametrize("sign", [-1, 1])
MAGNITUDES = pytest.mark.parametrize("magnitude", [0, 4.2, 7.5, 9, 9.6, 10])


def test_every_operation_has_an_oracle():
    assert len(OPERATIONS) == 15
    assert set(OPERATIONS) == set(COLOR_ORACLES) | set(GEOMETRY_ORACLES)
    assert FILL_COLOR == (123, 117, 104)


@SIGNS
@MAGNITUDES
@pytest.mark.parametrize("name", COLOR_ORACLES)
def test_color_operation(name, magnitude, sign):
    every_value = np.add.outer(7 * np.arange(20), np.arange(256)).astype(np.uint8)
    skewed = np.random.default_rng(0).normal([90, 120, 160], [15, 40, 25], (60, 50, 3)).clip(5, 250)
    colors = np.stack([every_value, every_value[::-1], 255 - every_value], -1), skewed.astype(np.uint8)
    images = [noise(40, 30, 60, 180), Image.new("RGB", (9, 8), (200, 100, 3)), *map(Image.fromarray, colors)]
    for image in images:
        result = OPERATIONS[name](image, magnitude / 10, sign)
        assert (result.mode, result.size) == ("RGB", image.size)
        expected = COLOR_ORACLES[name](np.asarray(image).astype(int), magnitude, sign)
        assert np.abs(ints(result) - expected).max() <= (0 if name in EXACT else 1)


@SIGNS
@MAGNITUDES
@pytest.mark.parametrize("name", GEOMETRY_ORACLES)
def test_geometric_operation(name, magnitude, sign):
    """A smooth picture is known between its pixels too; what comes from outside has the fill colour."""

    def picture(x, y):
        return 128 + 100 * np.sin(np.stack([x / 14 + y / 60, y / 14 - x / 60, (x + y) / 20], -1))

    width, height = 60, 44
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    image = Image.fromarray(np.round(picture(x, y)).astype(np.uint8))
    result = ints(OPERATIONS[name](image, magnitude / 10, sign))
    x, y = GEOMETRY_ORACLES[name](x, y, magnitude, sign, width, height)
    inset = np.minimum(np.minimum(x, width - x), np.minimum(y, height - y))
    # PIL's bicubic truncates: half a level lower in the mean.
    difference = np.abs(result + 0.5 - picture(x, y))[inset > 2]
    assert difference.max() < 2.5
    assert difference.mean() < 0.7
    assert np.all(result[inset < -0.01] == FILL_COLOR)
    assert np.any(inset < -0.01) == (magnitude > 0)


def test_rand_augment_statistics(monkeypatch):
    calls, rng, count = [], np.random.default_rng(0), 6000

    def record(name, image, level, sign):
        calls[-1].append((name, level, sign, image.size))
        return image

    monkeypatch.setattr(views, "OPERATIONS", {name: partial(record, name) for name in OPERATIONS})
    image = noise(30, 20)
    for _ in range(count):
        calls.append([])
        views.rand_augment(image, rng)
    applied = np.bincount([len(call) for call in calls])
    assert stats.chisquare(applied, count * np.array([0.25, 0.5, 0.25])).pvalue > 1e-3
    twice = [first[0] == second[0] for first, second in (call for call in calls if len(call) == 2)]
    assert np.mean(twice) == pytest.approx(1 / 15, abs=0.02)
    names, levels, signs, _ = zip(*chain.from_iterable(calls), strict=True)
    counts = Counter(names)
    assert set(counts) == set(OPERATIONS)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert (np.mean(levels), np.std(levels)) == pytest.approx((0.9, 0.05), abs=0.003)
    assert max(levels) == 1
    assert np.mean(np.array(levels) == 1) == pytest.approx(stats.norm.sf(2), abs=0.008)
    assert set(signs) == {-1, 1}
    assert np.mean(signs) == pytest.approx(0, abs=0.05)
    calls.append([])
    for _ in range(20):
        view("strong", image, 16, rng)
    assert {call[3] for call in calls[-1]} == {(16, 16)}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.sampled_from(["RGB", "L", "P", "RGBA", "1"]), *[st.integers(1, 60)] * 3, st.integers(0, 3))
def test_shapes_and_types(mode, width, height, size, num_crops):
    made = make_views(noise(width, height).convert(mode), size, num_crops, CROP_RATIO, np.random.default_rng(0))
    shapes = [made[name].shape for name in VIEW_NAMES]
    assert shapes == [(3, size, size), (3, size, size), (num_crops, 3, size, size)]
    assert all(view.dtype == np.uint8 for view in made.values())


def dataset(seed, epoch, num_crops=2):
    """Every item is the same image: views differ by their draws alone."""
    examples = [{"image": noise(60, 40), "label": 9 - index} for index in range(6)]
    result = ViewDataset(examples, ViewSettings(16, num_crops, CROP_RATIO, seed))
    result.set_epoch(epoch)
    return result


def test_views_depend_on_seed_epoch_and_index_alone():
    first, second = dataset(7, 3), dataset(7, 3)
    forwards = [first[index] for index in range(len(first))]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    backwards = [second[index] for index in reversed(range(len(first)))][::-1]
    assert len(forwards) == 6
    assert all(map(same, forwards, backwards))
    others = dataset(8, 3)[0], dataset(7, 4)[0], dataset(3, 7)[0]
    for one, other in combinations([*forwards, *others], 2):
        assert not np.array_equal(one["strong"], other["strong"])
        assert not np.array_equal(one["crops"], other["crops"])


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_worker_processes_make_the_same_views(persistent_workers):
    data, workers = dataset(7, 0), dict(num_workers=2, persistent_workers=persistent_workers)
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True, collate_fn=ViewCollator(), **workers)
    epochs = {}
    for epoch in (3, 4):
        data.set_epoch(epoch)
        epochs[epoch] = list(loader)
    del loader  # ends the workers, before any failure could keep them
    for epoch, batches in epochs.items():
        expected = dataset(7, epoch)
        found = {int(index): (batch, row) for batch in batches for row, index in enumerate(batch["index"])}
        assert sorted(found) == list(range(6))
        for index, (batch, row) in found.items():
            assert same({name: batch[name][row] for name in VIEW_NAMES}, expected[index])


RNG = np.random.default_rng(5)
GREY, INKS, PALETTE = (RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((5, 7), (5, 7, 4), (256, 3)))
BANDS = Image.fromarray(INKS).split()
DEEP, BYTES = np.array([[65535, 32768, 256, 255, 4096, 0]], np.uint16), np.array([[255, 128, 1, 0, 16, 0]])
WIDE, CLIPPED = np.array([[-7, 2**31 - 1, 65536, 65535, 32768]], np.int32), np.array([[0, 255, 255, 255, 128]])
PALETTED = Image.fromarray(GREY).convert("P")
PALETTED.putpalette(PALETTE.tobytes())
MODES = [
    ("L", Image.fromarray(GREY), "png", GREY),
    ("LA", Image.merge("LA", BANDS[:2]), "png", INKS[..., 0]),
    ("RGBA", Image.merge("RGBA", BANDS), "png", INKS[..., :3]),
    ("P", PALETTED, "png", PALETTE[GREY]),
    ("CMYK", Image.merge("CMYK", BANDS), "tiff", (255 - INKS[..., :3]) * ((255 - INKS[..., 3:]) / 255)),
    ("1", Image.fromarray(GREY > 127), "png", np.where(GREY > 127, 255, 0)),
    ("I;16", Image.fromarray(DEEP), "png", BYTES),
    ("I;16", Image.fromarray(DEEP), "tiff", BYTES),
    ("I", Image.fromarray(DEEP.astype(np.int32)), "tiff", BYTES),
    ("I", Image.fromarray(GREY.astype(np.int32)), "tiff", GREY),
    ("I", Image.fromarray(WIDE), "tiff", CLIPPED),
]


@pytest.mark.parametrize("mode, image, suffix, expected", MODES)
def test_to_rgb(mode, image, suffix, expected, tmp_path):
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    with Image.open(path) as reopened:
        assert reopened.mode in (mode, "I")  # as which older versions of Pillow open a PNG of 16 bits
        result = to_rgb(reopened)
    assert result.mode == "RGB"
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert np.abs(ints(result) - expected).max() <= (mode == "CMYK")


UPRIGHT = [lambda x: x, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: x.swapaxes(0, 1)]
UPRIGHT += [lambda x: np.rot90(x, -1), lambda x: np.rot90(x, 2).swapaxes(0, 1), np.rot90]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_view_is_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(60, 40).save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as photo:
        expected = UPRIGHT[orientation - 1](np.asarray(photo))
        assert np.array_equal(to_rgb(photo), expected)
        made = make_views(photo, 16, 2, CROP_RATIO, np.random.default_rng(4))
    assert same(made, make_views(Image.fromarray(expected), 16, 2, CROP_RATIO, np.random.default_rng(4)))


def waves(width, height):
    """A picture whose colours tell places apart: half a pixel of an eighth of its size is eight levels."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    colors = [np.sin(x / 50), np.sin(y / 50), np.sin((x + y) / 40)]
    return Image.fromarray((128 + 100 * np.stack(colors, -1)).astype(np.uint8))


def encoded(image, kind="jpeg", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def decoded_sizes(monkeypatch):
    sizes, to_rgb = [], views.to_rgb
    monkeypatch.setattr(views, "to_rgb", lambda image: (sizes.append(image.size), to_rgb(image))[1])
    return sizes


def views_of(image, size, num_crops=2, index=0, ratio=CROP_RATIO):
    return ViewSettings(size, num_crops, ratio, 0).make_example({"image": image}, 0, index)


DRAFTED = [("RGB", {}), ("L", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0})]


@pytest.mark.parametrize("mode, options", DRAFTED)
@pytest.mark.parametrize("width, height, size, scale", [(1203, 905, 48, 8), (905, 1203, 99, 4), (609, 677, 129, 2)])
def test_drafted_views_show_the_same_places(width, height, size, scale, mode, options, monkeypatch, tmp_path):
    monkeypatch.setattr(views, "OPERATION_PROBABILITY", 0)
    content = encoded(waves(width, height).convert(mode), quality=95, **options)
    (tmp_path / "photo.jpg").write_bytes(content)
    local, whole = str(tmp_path / "photo.jpg"), Image.open(io.BytesIO(content))
    sizes = decoded_sizes(monkeypatch)
    for index in range(10):
        drafted = views_of({"path": None, "bytes": content}, size, index=index)
        expected = views_of(whole, size, index=index)
        assert sizes[-2:] == [(math.ceil(width / scale), math.ceil(height / scale)), (width, height)]
        for name in VIEW_NAMES:
            difference = np.abs(ints(drafted[name]) - ints(expected[name]))
            assert 0 < difference.mean() < 0.6
            assert difference.max() <= 6
    assert same(drafted, views_of({"path": local, "bytes": None}, size, index=index))
    assert sizes[-1] == sizes[-3]


# The smallest side is half of the shorter side, or sqrt(0.3 * 3 / 4) = 0.474 of that of a square of the same area.
SCALES = [(270, 270, 32, 4), (269, 269, 32, 2), (256, 1000, 32, 4), (1000, 255, 32, 2), (540, 540, 32, 8)]
SCALES += [(539, 539, 32, 4), (500, 375, 224, 1), (500, 375, 64, 2), (15, 15, 1, 4), (9, 3000, 1, 4), (60, 40, 64, 1)]


@pytest.mark.parametrize("width, height, size, scale", SCALES)
def test_drafts_leave_every_view_its_pixels(width, height, size, scale, monkeypatch):
    sizes = decoded_sizes(monkeypatch)
    image = {"path": None, "bytes": encoded(noise(width, height))}
    few, many = (views_of(image, size, num_crops) for num_crops in (0, 8))
    assert sizes == [(math.ceil(width / scale), math.ceil(height / scale))] * 2
    assert np.array_equal(few["weak"], many["weak"]) and np.array_equal(few["strong"], many["strong"])
    rng = np.random.default_rng(0)
    boxes = [views.crop_box(width, height, CROP_RATIO, rng) for _ in range(300)]
    boxes = np.array(boxes + [views.strong_box(width, height, rng) for _ in range(300)])
    assert scale == 1 or (boxes[:, 2:] - boxes[:, :2]).min() >= scale * size


UNDRAFTED = [("png", "RGB", {}), ("webp", "RGB", {"lossless": True}), ("jpeg", "CMYK", {})]
UNDRAFTED += [("jpeg", "RGB", {"exif": rotated_exif()})]


@pytest.mark.parametrize("kind, mode, options", UNDRAFTED)
def test_all_else_is_decoded_whole(kind, mode, options, tmp_path):
    content = encoded(waves(400, 300).convert(mode), kind, **options)
    (tmp_path / "photo").write_bytes(content)
    expected = views_of(Image.open(io.BytesIO(content)), 16)
    assert same(views_of({"path": None, "bytes": content}, 16), expected)
    assert same(views_of({"path": str(tmp_path / "photo"), "bytes": None}, 16), expected)


def test_images_from_elsewhere_are_decoded_whole(tmp_path):
    """A member of an archive, and an image that is open, which stays as it is."""
    content = encoded(waves(400, 300))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.writestr("photo.jpg", content)
    member = {"path": f"zip://photo.jpg::{tmp_path / 'photos.zip'}", "bytes": None}
    opened = Image.open(io.BytesIO(content))
    expected = views_of(Image.open(io.BytesIO(content)).convert("RGB"), 16)
    assert same(views_of(member, 16), expected)
    assert same(views_of(opened, 16), expected) and same(views_of(opened, 16), expected)
    assert opened.size == (400, 300)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_truncated_files_are_unreadable(kind, tmp_path):
    content = encoded(waves(400, 300), kind)
    path = tmp_path / "photo"
    for end in (0, 1, 100, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:end])
        for image in ({"path": None, "bytes": content[:end]}, {"path": str(path), "bytes": None}):
            with pytest.raises(UNREADABLE):
                views_of(image, 16)
    path.unlink()
    for image in (None, {"path": None, "bytes": None}, {"path": str(path), "bytes": None}):
        with pytest.raises(UNREADABLE):
            views_of(image, 16)


@pytest.mark.parametrize("width, height", [(60, 40), (40, 300)])
def test_crops_change_no_other_view(width, height):
    for seed in range(20):
        made = [make_views(noise(width, height), 24, k, CROP_RATIO, np.random.default_rng(seed)) for k in (0, 1, 8)]
        for name in ("weak", "strong"):
            assert np.array_equal(made[0][name], made[1][name]) and np.array_equal(made[0][name], made[2][name])
        assert np.array_equal(made[1]["crops"], made[2]["crops"][:1])
        assert len({crop.tobytes() for crop in made[2]["crops"]}) == 8


@pytest.mark.parametrize("num_crops", [0, 3])
def test_collator_stacks_views(num_crops):
    examples = [dataset(0, 0, num_crops)[index] for index in (4, 0, 5)]
    batch = ViewCollator()(examples)
    assert set(batch) == {*VIEW_NAMES, "index", "labels"}
    assert batch["weak"].shape == batch["strong"].shape == (3, 3, 16, 16)
    assert batch["crops"].shape == (3, num_crops, 3, 16, 16)
    assert all(batch[name].dtype == torch.uint8 for name in VIEW_NAMES)
    assert same(batch, {name: np.stack([example[name] for example in examples]) for name in VIEW_NAMES})
    assert (batch["index"].tolist(), batch["labels"].tolist()) == ([4, 0, 5], [5, 9, 4])
    unlabelled = ViewDataset([{"image": noise(30, 20)}], ViewSettings(16, num_crops, CROP_RATIO, 0))
    assert set(ViewCollator()([unlabelled[0]])) == {*VIEW_NAMES, "index"}


LABELS = [({}, None), ({"label": 5}, [5, 5]), ({"labels": 5}, [5, 5]), ({"label": None}, [-100, -100])]


@pytest.mark.parametrize("label, labels", LABELS)
def test_collator_prepares_images(label, labels):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    images = [noise(20, 30).convert("L"), noise(30, 20)]
    upright = [images[0].convert("RGB"), images[1].rotate(180)]
    images[1].getexif()[0x0112] = 3
    batch = ViewCollator(processor)([{"image": image, **label} for image in images])
    expected = processor(upright, return_tensors="pt")["pixel_values"]
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == labels if labels else set(batch) == {"pixel_values"}


def test_collator_stacks_pixel_values():
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for rows in (pixels, pixels.numpy()):
        batch = ViewCollator()([{"pixel_values": row, "label": label} for label, row in enumerate(rows)])
        assert torch.equal(batch["pixel_values"], pixels)
        assert batch["labels"].tolist() == [0, 1]
    partly = [{"pixel_values": pixels[0], "label": 3}, {"pixel_values": pixels[1]}]
    assert ViewCollator()(partly)["labels"].tolist() == [3, -100]


@pytest.mark.parametrize("example", [{"photo": noise(8, 8), "label": 1}, {"image": noise(8, 8)}])
def test_collator_names_what_it_got(example):
    with pytest.raises(ValueError, match=f"holds {', '.join(map(repr, example))}; expected 'image'"):
        ViewCollator()([example])
