"""What a photo is: links, folders of systems and of ours, endings, pixels of every depth, strips."""

import errno
import os
import re
import tracemalloc
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from adaptation import CLASS_NAMES, draw_images
from datasets import Dataset
from decisions import ClearDecisions
from PIL import Image, features
from tiny_inputs import LOGIT_SCALE, draw_shape
from tolerances import within

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import adapt, evaluate, predict
from microclip_hf.data.folders import match_files
from microclip_hf.data.photo_files import photo_files
from microclip_hf.data.sources import load_image_folder, load_images
from microclip_hf.evaluation.predictions import EvaluationSettings, ImageReader
from microclip_hf.explain.explanation import explain
from microclip_hf.images import CROP_RATIO, MAX_RATIO, UNREADABLE, cut_strip, decode, photo_endings, to_rgb
from microclip_hf.prediction import Prediction, find_photos, predict_photos
from microclip_hf.training.view_datasets import ViewCollator, ViewDataset, ViewSettings


@pytest.fixture
def photos(tmp_path):
    """`photos/` with `0.png`, `a/1.png`, `a/deep/2.png` and `b/3.png`."""
    folder = tmp_path / "photos"
    for index, place in enumerate(("", "a", "a/deep", "b")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        draw_shape(CLASS_NAMES[index % 3], np.random.default_rng(index)).save(folder / place / f"{index}.png")
    return folder


NAMES = ["0.png", "a/1.png", "a/deep/2.png", "b/3.png"]


def found(folder):
    """In order; no warning is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [file.as_posix() for file in photo_files(folder)]


# Links, from -> to, as they stand in the folder of photos.
LOOPS = {
    "to itself": {"again": "."},
    "to an ancestor": {"a/deep/up": "../..", "a/deep/home": ".."},
    "to a folder above all": {"parent": ".."},
    "of one another": {"a/to_b": "../b", "b/to_a": "../a"},
    "to a sibling": {"0_copy": "a", "z_copy": "b"},
    "of a link": {"one": "two", "two": "a"},
    "to a file": {"0_same.png": "0.png", "b/same.png": "../a/1.png"},
}


@pytest.mark.parametrize("name", LOOPS)
def test_each_photo_counts_once_by_its_own_name(photos, name):
    for link, target in LOOPS[name].items():
        (photos / link).symlink_to(target)
    assert found(photos) == NAMES
    assert len(load_image_folder(photos, CLASS_NAMES)) == 4
    assert match_files(f"{photos}/**/*.png") == [f"{photos}/{name}" for name in NAMES]


def test_links_to_the_outside_count_once(photos, tmp_path):
    outside = tmp_path / "outside"
    (outside / "more").mkdir(parents=True)
    for name in ("5.png", "more/6.png"):
        Image.new("RGB", (8, 8)).save(outside / name)
    for link, target in (("x", "outside"), ("y", "outside/more"), ("z.png", "outside/5.png"), ("v.png", "v")):
        (photos / link).symlink_to(tmp_path / target)
    Image.new("RGB", (8, 8)).save(tmp_path / "v", "png")
    assert found(photos) == sorted([*NAMES, "x/5.png", "x/more/6.png", "v.png"])
    (outside / "back").symlink_to(photos)
    assert len(found(photos)) == 7


def test_a_cache_of_contents(photos, tmp_path):
    """As the Hub's, where equal photos of two classes are one file."""
    Image.new("RGB", (8, 8)).save(tmp_path / "content", "png")
    for link in ("a/7.png", "b/7.png", "b/same.png"):
        (photos / link).symlink_to(tmp_path / "content")
    assert found(photos) == sorted([*NAMES, "a/7.png", "b/7.png"])


def test_each_name_of_a_folder_of_a_class_must_be_a_class(photos):
    """Though its photos count once."""
    (photos / "0.png").unlink()
    (photos / "c").symlink_to("b")
    for number, names in enumerate((["a", "b"], ["a", "b", "c"])):
        dataset = load_image_folder(photos, names)
        assert len(dataset) == 3 and ("label" in dataset.features) == (number == 1)
    assert dataset["label"] == [0, 0, 1]


def test_links_that_lead_nowhere_are_told_of(photos):
    """One by the name of a photo is a photo that can't be read."""
    (photos / "nas").symlink_to("/mnt/not mounted")
    (photos / "loop").symlink_to("loop")
    (photos / "lost.jpg").symlink_to("nowhere.jpg")
    with pytest.warns(UserWarning, match="Links that lead nowhere: 'loop', 'nas'"):
        assert [file.as_posix() for file in photo_files(photos)] == [*NAMES, "lost.jpg"]


SYSTEM = [
    "@eaDir/IMG_1.jpg",
    "a/#recycle",
    "#snapshot/GMT-2024.01.01",
    "$RECYCLE.BIN/S-1-5-21",
    "RECYCLER",
    "@Recycle",
]
SYSTEM += ["System Volume Information", "lost+found", "__MACOSX/photos", ".Trash-1000/files", ".@__thumb", ".zfs/a"]
SYSTEM += [
    "Birds Previews.lrdata/0/01",
    "Birds Smart Previews.lrdata",
    ".picasaoriginals",
    ".AppleDouble",
    "FOUND.000",
]


def test_what_systems_keep_beside_photos_is_passed_over(photos):
    for folder in SYSTEM:
        (photos / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(photos / folder / "x.png")
    (photos / "a" / "._1.png").write_bytes(b"\x00\x05\x16\x07AppleDouble")
    assert found(photos) == NAMES
    assert match_files(f"{photos}/**/*.png") == [f"{photos}/{name}" for name in NAMES]
    assert found(photos / "a" / "#recycle") == ["x.png"]  # if it's asked for


def test_endings_are_those_of_pictures_that_pillow_opens():
    """And of none that isn't a photo."""
    endings = photo_endings()
    assert endings >= {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".mpo",
        ".png",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".webp",
        ".ppm",
        ".tga",
    }
    others = {".mpg", ".mpeg", ".pdf", ".eps", ".ps", ".h5", ".hdf", ".grib", ".wmf", ".fits", ".cr2", ".mp4"}
    assert not endings & others
    assert not features.check("jpg_2000") or ".jp2" in endings


def test_other_pictures_and_films_are_counted(photos, monkeypatch):
    for name in ("a.heic", "b/b.HEIC", "c.CR2", "c.nef", "b/d.mov", "f.avif", "g.svg", "notes.txt", "data.h5"):
        (photos / name).write_bytes(b"")
    Image.init()
    for ending in (".avif", ".heic"):  # as in a Pillow that doesn't open them
        monkeypatch.delitem(Image.EXTENSION, ending, raising=False)
    told = re.escape(
        'Passed over: 2 HEIC photos (.heic; pip install "microclip_hf[heic]" reads them), 2 raw files (.cr2, .nef; '
        "export them as JPEG), 1 picture (.avif; save them as JPEG or PNG), 1 drawing (.svg; save them as PNG), 1 "
        "film (.mov)."
    )
    for search in (
        photo_files,
        lambda folder: find_photos([str(folder)]),
        lambda folder: load_image_folder(folder, []),
    ):
        with pytest.warns(UserWarning, match=told) as warned:
            assert len(search(photos)) == 4
        assert len(warned) == 1
    for name in NAMES:
        (photos / name).unlink()
    with pytest.raises(ValueError, match=f"holds no image files that can be opened here; .*{told}"):
        load_image_folder(photos, CLASS_NAMES)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow opens no AVIF")
def test_avif_counts_where_pillow_opens_it(photos):
    Image.open(photos / "0.png").save(photos / "4.avif")
    assert found(photos) == ["0.png", "4.avif", *NAMES[1:]]


@pytest.fixture
def heic(photos):
    """A photo as a phone saves it, red on the left and blue on the right, among the others."""
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    heif.from_pillow(image).save(photos / "4.heic")
    return photos / "4.heic"


def assert_red_and_blue(image):
    """As far as HEIC, which loses some, keeps it."""
    image = to_rgb(decode(image))
    assert image.size == (64, 32)
    for place, color in ((8, (255, 0, 0)), (56, (0, 0, 255))):
        np.testing.assert_allclose(image.getpixel((place, 16)), color, atol=16)


def test_heic_counts_where_pillow_heif_opens_it(heic, photos, clip_folder, tmp_path):
    """In folders, in tables and by its name."""
    assert found(photos) == ["0.png", "4.heic", *NAMES[1:]]
    assert_red_and_blue(load_image_folder(photos, CLASS_NAMES)[1]["image"])
    table = Dataset.from_dict({"image": [{"path": "4.heic", "bytes": heic.read_bytes()}]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "table.parquet")
    assert_red_and_blue(load_images(str(tmp_path / "table.parquet"), CLASS_NAMES)[0]["image"])
    assert list(find_photos([f"{photos}/*.heic"])) == [str(heic)]
    model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
    settings = ViewSettings(16, 1, (0.5, 0.9), 0)
    assert ViewDataset(load_image_folder(photos, CLASS_NAMES), settings)[1]["index"] == 1
    (answer,) = predict_photos(model, [heic])
    assert answer.label in CLASS_NAMES


def test_damaged_heic_is_told_of(heic):
    content = heic.read_bytes()
    for damaged in (content[:-5], content[: len(content) // 2], content[:24]):
        with pytest.raises(UNREADABLE):
            to_rgb(decode({"path": None, "bytes": damaged}))


def fail_on(monkeypatch, folder, number):
    """Listing the folder fails, as without permission or where a network drive is gone."""
    scandir = os.scandir

    def failing(path):
        if Path(path).name == folder:
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_folders_that_cannot_be_listed_are_errors(photos, monkeypatch, number):
    fail_on(monkeypatch, "deep", number)
    message = rf"photos/a/deep can't be looked into: {os.strerror(number)}"
    for search in (lambda: load_image_folder(photos, CLASS_NAMES), lambda: find_photos([str(photos)])):
        with pytest.raises(ValueError, match=message):
            search()
    for pattern in ("**/*.png", "*/*/*.png", "*/deep/2.png", "a/**"):
        with pytest.raises(ValueError, match=message):
            find_photos([f"{photos}/{pattern}"])
    assert list(find_photos([f"{photos}/*.png", f"{photos}/b/*.png"])) == [f"{photos}/0.png", f"{photos}/b/3.png"]
    with pytest.raises(SystemExit, match=message):
        predict.main([str(photos), "--model", "nowhere"])


def test_files_that_may_not_be_read_are_named(photos, monkeypatch, clip_folder):
    opened = Image.open

    def forbidding(file, *arguments, **options):
        if str(file).endswith("1.png"):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Image, "open", forbidding)
    model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES)
    first, second, *_ = predict_photos(model, [photos / name for name in NAMES])
    assert isinstance(first, Prediction) and isinstance(second, PermissionError)
    views = ViewDataset(load_image_folder(photos, CLASS_NAMES), ViewSettings(16, 0, CROP_RATIO, 0, 0.0))
    with pytest.raises(ValueError, match=r"1 of 4 images can't be read \(.*a/1.png\).*Permission denied"):
        views[1]


def test_names_that_are_no_text_are_refused_where_tables_hold_them(photos):
    try:
        (photos / "0.png").rename(photos / os.fsdecode(b"n\xe9e.png"))
    except OSError:
        pytest.skip("this file system takes no such names")
    with pytest.raises(
        ValueError, match=r"names of 1 of 4 images aren't valid Unicode: .*n\\udce9e.png'. Rename them"
    ):
        load_image_folder(photos, CLASS_NAMES)
    assert len(find_photos([str(photos)])) == 4  # a CSV file can hold them


PATTERNS = {
    "*.png": ["0.png"],
    "[0-9].png": ["0.png"],
    "?/*.png": ["a/1.png", "b/3.png"],
    "**/*.png": NAMES,
    "a/**": NAMES[1:3],
    "**/deep/*": NAMES[2:3],
    "*/**/2.*": NAMES[2:3],
    "b/../*.png": ["b/../0.png"],
    "c/*.png": [],
    "*.jpg": [],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(photos, pattern, monkeypatch):
    """With the names that they are given by."""
    for head in (f"{photos}/", "photos/", "./photos/", ""):
        monkeypatch.chdir(photos if not head else photos.parent)
        assert match_files(head + pattern) == [head + name for name in PATTERNS[pattern]]


def test_runs_below_the_photos_are_left_out(photos, clip_folder):
    """Their reports and pictures would be photos otherwise."""
    run = photos / "b" / "adapted"
    MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES).save_pretrained(run)
    (run / "report").mkdir()
    for name in ("adaptation.png", "report/loss_light.png"):
        Image.new("RGB", (8, 8)).save(run / name)
    told = "Folders of adapted models, whose pictures are no photos: 'b/adapted'"
    with pytest.warns(UserWarning, match=told):
        assert [file.as_posix() for file in photo_files(photos)] == NAMES
    with pytest.warns(UserWarning, match=told):
        assert len(match_files(f"{photos}/**/*.png")) == 4
    for content in ('{"model_type": "clip"}', "[1]", "no JSON"):  # of others
        (run / "config.json").write_text(content)
        assert len(found(photos)) == 6


def test_results_are_not_written_among_the_photos(photos, clip_folder):
    (photos.parent / "names.txt").write_text("\n".join(CLASS_NAMES))
    options = ["--model_name_or_path", str(clip_folder), "--class_names", str(photos.parent / "names.txt")]
    for folder in (photos, photos / "a" / ".."):
        with pytest.raises(SystemExit, match="is the folder of the images"):
            adapt.main([*options, "--train_dir", str(photos), "--output_dir", str(folder)])
    for folder in (photos, photos / "new" / "results"):
        with pytest.raises(SystemExit, match=r"lies in --test_dir .*; choose a folder outside"):
            evaluate.main([*options, "--test_dir", str(photos), "--output_dir", str(folder)])
    assert len(list(photos.iterdir())) == 3


def saved(values, path):
    Image.fromarray(values).save(path)
    return Image.open(path)


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int32", "float32"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_of_any_depth_counts_like_8_bits(bits, dtype, tmp_path):
    """Brightest pixels of the full range, and of a quarter of it, the least that tells the depth."""
    deep = (RAMP << (bits - 8)) + (1 << (bits - 8)) - 1
    image = saved(deep.astype(dtype), tmp_path / "image.tif")
    assert np.array_equal(np.asarray(to_rgb(image))[..., 1], RAMP)
    quarter = to_rgb(saved((deep // 4).astype(dtype), tmp_path / "quarter.tif"))
    assert np.asarray(quarter).max() == (63 if bits == 8 else 255)


def test_big_endian_and_signed_tiffs(tmp_path):
    """Written byte by byte, as Pillow writes neither."""
    cases = [
        (b"MM", 1, np.array([[0, 256, 65535, 32768]], ">u2"), [0, 1, 255, 128]),
        (b"MM", 2, np.array([[-100, 0, 16, 4080, 4095]], ">i2"), [0, 0, 1, 255, 255]),
        (b"II", 2, np.array([[-100, 0, 16, 4080, 4095]], "<i2"), [0, 0, 1, 255, 255]),
        (b"II", 2, np.array([[-100, 0, 256, 65535]], "<i4"), [0, 0, 1, 255]),
    ]
    for order, sample_format, values, expected in cases:
        (tmp_path / "image.tif").write_bytes(tiff(order, sample_format, values))
        assert np.asarray(to_rgb(Image.open(tmp_path / "image.tif")))[0, :, 0].tolist() == expected


def tiff(order, sample_format, values):
    """A grey TIFF of one strip."""
    kind = ">" if order == b"MM" else "<"
    height, width = values.shape
    bits = 8 * values.itemsize
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, values.nbytes), (339, 3, sample_format)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, size, value in tags:
        number = np.array([start if tag == 273 else value], f"{kind}u{size if size == 4 else 2}").tobytes()
        entries += np.array([tag, size], f"{kind}u2").tobytes() + np.array([1], f"{kind}u4").tobytes()
        entries += number.ljust(4, b"\x00")
    header = order + np.array([42], f"{kind}u2").tobytes() + np.array([8], f"{kind}u4").tobytes()
    return header + np.array([len(tags)], f"{kind}u2").tobytes() + entries + bytes(4) + values.tobytes()


FLOATS = {
    "0 to 1": ([0, 0.2, 0.5, 1], [0, 51, 128, 255]),
    "dark, 0 to 1": ([0, 0.01, 0.02], [0, 3, 5]),
    "a little beyond": ([-0.01, 0, 0.2, 1, 1.02], [0, 0, 51, 255, 255]),
    "highlights": ([0, 0.2, 0.4, 7.5], [0, 51, 102, 255]),
    "no data": ([np.nan, 0.2, 1, np.inf, -np.inf], [0, 51, 255, 255, 0]),
    "8 bits": ([0, 0.6, 128, 255], [0, 1, 128, 255]),
    "8 bits, no data": ([np.nan, 1, 128, 255, np.inf], [0, 1, 128, 255, 255]),
    "12 bits, no data": ([np.nan, 16, 4095, np.inf, -np.inf], [0, 1, 255, 255, 0]),
    "black": ([0, 0, 0], [0, 0, 0]),
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats(name, tmp_path):
    values, expected = FLOATS[name]
    image = saved(np.array([values], np.float32), tmp_path / "image.tif")
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected


NO_BRIGHTNESS = {
    "only NaN": (np.full(4, np.nan, np.float32), "no pixel with a value"),
    "negative": (np.array([-5, -1, -3, 0], np.int32), "values go from -5 to 0"),
    "standardised": (np.array([-1.5, -0.5, 0.5, 1.5], np.float32), "values go from -1.5 to 1.5"),
    "of some unit": (np.array([2, 3.5, 7, 9], np.float32), "values go from 2 to 9"),
    "a mark for no data": (np.array([0.1, 0.5, 1, 3e38], np.float32), r"values go from 0.1 to 3e\+38"),
    "32 bits": (np.array([1, 2**20, 2**29, 2**30], np.int32), r"values go from 1 to 1.07374e\+09"),
}


@pytest.mark.parametrize("name", NO_BRIGHTNESS)
def test_what_is_no_brightness_is_unreadable(name, tmp_path):
    values, message = NO_BRIGHTNESS[name]
    with pytest.raises(ValueError, match=f"picture.* {message}"):
        to_rgb(saved(values[None], tmp_path / "image.tif"))
    assert issubclass(ValueError, UNREADABLE)


def test_colours_of_16_bits_that_would_be_black(tmp_path):
    """Pillow writes none: the one grey of a TIFF becomes three."""
    colors = np.array([[4095, 100, 7], [0, 2000, 16]], "<u2")
    plain = tiff(b"II", 1, colors.reshape(1, 6))
    start = len(plain) - colors.nbytes - 6
    tags = {256: 2, 262: 2, 277: 3}
    content = bytearray(plain[: -colors.nbytes])
    for place in range(10, start, 12):
        tag = int.from_bytes(content[place : place + 2], "little")
        if tag in tags:
            content[place + 8 : place + 10] = tags[tag].to_bytes(2, "little")
        if tag == 258:
            content[place + 4 : place + 12] = (3).to_bytes(4, "little") + len(plain).to_bytes(4, "little")
    for shift, is_black in ((0, True), (4, False)):
        path = tmp_path / f"{shift}.tif"
        path.write_bytes(bytes(content) + (colors << shift).tobytes() + 3 * (16).to_bytes(2, "little"))
        image = Image.open(path)
        assert image.mode == "RGB"
        if is_black:
            with pytest.raises(ValueError, match="brightest colour is 15 of 255"):
                to_rgb(image)
        else:
            assert np.array_equal(np.asarray(to_rgb(image))[0], colors >> 4)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "P with transparency"])
@pytest.mark.parametrize("color, expected", [(0, 255 - RAMP), (30, None), (255, RAMP)])
def test_pictures_drawn_by_alpha_alone_are_seen(mode, color, expected, tmp_path):
    """A black logo without a ground is laid on white, a white one on black."""
    grey = Image.new("L", (16, 16), color)
    alpha = Image.fromarray(RAMP.astype(np.uint8))
    if mode == "P with transparency":
        image = Image.frombytes("P", (16, 16), alpha.tobytes())
        image.putpalette([color] * 768)
        image.save(tmp_path / "image.png", transparency=bytes(range(256)))
        image = Image.open(tmp_path / "image.png")
    else:
        image = grey.convert(mode)
        image.putalpha(alpha)
    result = np.asarray(to_rgb(image)).astype(int)
    expected = 255 - RAMP * (255 - color) / 255 if expected is None else expected
    assert np.abs(result - expected[..., None]).max() <= 1


def test_alpha_is_dropped_where_there_are_colours(recwarn, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(values))), values[..., :3])
    paletted = Image.fromarray(values[..., :3]).quantize(8)
    paletted.save(tmp_path / "image.png", transparency=bytes([0, 128, 255]))
    assert np.array_equal(np.asarray(to_rgb(Image.open(tmp_path / "image.png"))), np.asarray(paletted.convert("RGB")))
    assert not recwarn


def test_of_several_frames_the_first_counts(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (200, 0)]
    for name in ("image.gif", "image.tif", "image.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.asarray(to_rgb(Image.open(tmp_path / name))).min() == 200


def test_bits_are_black_and_white(tmp_path):
    bits = RAMP % 3 == 0
    assert np.array_equal(np.asarray(to_rgb(saved(bits, tmp_path / "image.tif")))[..., 0], 255 * bits)


# ---------------------------------------------------------------------------------------------------------- strips


@pytest.fixture(scope="module")
def model(clip_folder):
    return MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES).eval()


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (3003, 20), (20, 1001)])
def test_strips_are_cut_about_their_middle(size):
    short, long = min(size), max(size)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    pixels = np.asarray(image) if size[0] > size[1] else np.asarray(image).swapaxes(0, 1)
    cut = np.asarray(cut_strip(image)) if size[0] > size[1] else np.asarray(cut_strip(image)).swapaxes(0, 1)
    left = (long - MAX_RATIO * short) // 2
    assert np.array_equal(cut, pixels[:, left : long - left])
    assert cut.shape[1] - MAX_RATIO * short in (0, 1)


@pytest.mark.parametrize("size", [(64, 48), (1, 50), (500, 10), (1, 1), (51, 1)])
def test_other_pictures_stay_as_they_are(size):
    image = Image.new("RGB", size)
    assert cut_strip(image) is image


@pytest.mark.parametrize("size", [(1203, 20), (20, 1203)])
def test_the_centre_crop_of_a_strip_is_the_same(model, size):
    """But for bicubic weights, since the whole strip's length is rounded otherwise: two levels of 255."""
    ramp = np.linspace(0, 255, max(size))[:, None] * np.ones(3)
    pixels = np.broadcast_to(ramp if size[0] > size[1] else ramp[:, None], (*size[::-1], 3)).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    expected, cut = (
        model.image_processor(own, return_tensors="pt")["pixel_values"] for own in (image, cut_strip(image))
    )
    levels = 255 * min(model.image_processor.image_std)
    assert (expected - cut).abs().max() * levels <= 2


def test_strips_take_no_more_memory_than_photos_of_their_ratio(model, tmp_path):
    """32 x 32 pixels in 32-bit floats, 50 times, and copies of them; uncut they'd be 61 MB of bytes alone."""
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1, 20000, 3), np.uint8))
    strip.save(tmp_path / "strip.png")
    middle = strip.crop((9975, 0, 10025, 1))
    expected = model.image_processor(middle, return_tensors="pt")["pixel_values"][0]
    dataset = [{"image": strip, "label": 0}]
    tracemalloc.start()
    try:
        collated = ViewCollator(model.image_processor)(dataset)["pixel_values"][0]
        reader = ImageReader([model.image_processor], 32, EvaluationSettings())
        evaluated = reader(strip, (0, 0))["pixel_values"][0]
        (predicted,) = predict_photos(model, [tmp_path / "strip.png"])
        (explained,) = explain(model, [strip])
        views = ViewSettings(32, 8, CROP_RATIO, 0).make_example({"image": strip}, 0, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 * 32 * 32 * 3 * 4 * 10
    assert torch.equal(collated, expected) and torch.equal(evaluated, expected)
    with ClearDecisions():
        scores = model(expected[None]).logits.softmax(-1)[0]
    close = within(LOGIT_SCALE / 2)["atol"]
    assert predicted.score == pytest.approx(scores.max().item(), abs=close)
    assert explained.scores.max() == pytest.approx(scores.max().item(), abs=close)
    assert explained.image.size == (20000, 1) and explained.grid.box == (9999.5, 0, 10000.5, 1)
    assert views["weak"].shape == (3, 32, 32) and views["crops"].shape == (8, 3, 32, 32)


def test_normal_photos_are_prepared_to_the_last_bit_as_before(model):
    for example in draw_images(3):
        expected = model.image_processor(example["image"], return_tensors="pt")["pixel_values"]
        assert torch.equal(ViewCollator(model.image_processor)([example])["pixel_values"], expected)
