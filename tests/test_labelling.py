"""Labelling that can be interrupted and shared out: no row twice, none lost; tables; what doesn't fit is refused."""

import csv
import errno
import io
import itertools
import os
import re
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASS_NAMES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from test_predict import run
from tiny_inputs import draw_shape, write_tar
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.data.photo_sources import PhotoList, PhotoStream
from microclip_hf.images import TORCH_FILTERS, cut_strip
from microclip_hf.passes import photo_batches, row_pass
from microclip_hf.passes.photo_batches import PixelReader, RowBatches
from microclip_hf.passes.row_parts import RowParts, WrittenRows
from microclip_hf.prediction import labelling


NUM_PHOTOS = 20
CUTS = (0, 7, 12, NUM_PHOTOS)  # of the files of a table
STORED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def rows():
    """Photos as tables store them; one can't be read."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(NUM_PHOTOS):
        draw_shape(CLASS_NAMES[index % 3], rng).save(file := io.BytesIO(), "png")
        rows.append({"bytes": file.getvalue(), "path": f"{index:02d}.png"})
    rows[9]["bytes"] = rows[9]["bytes"][:100]
    return rows


@pytest.fixture
def place(rows, tmp_path, monkeypatch):
    """The photos in a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(photo_batches, "BLOCK", 4)
    Path("photos").mkdir()
    for row in rows:
        Path("photos", row["path"]).write_bytes(row["bytes"])
    return tmp_path


def write_parquet(path, rows, **columns):
    Path(path).parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"photo": pa.array(rows, STORED), **columns}), path, row_group_size=3)


def write_tables(kind, rows):
    """The photos in a folder of three files; returns how the command takes them."""
    folder = Path("tables")
    folder.mkdir()
    for number, (first, stop) in enumerate(itertools.pairwise(CUTS)):
        part = rows[first:stop]
        if kind == "tar":
            write_tar(folder / f"{number}.tar", part)
        elif kind == "arrow":
            table = pa.table({"image": pa.array(part, STORED)})
            with pa.ipc.new_stream(str(folder / f"{number}.arrow"), table.schema) as writer:
                writer.write_table(table)
        else:
            columns = {"label": [[1.5]] * len(part), "other": ["text"] * len(part)}  # no labels, and none are wanted
            write_parquet(folder / f"train-{number}.parquet", part, **columns)
    if kind == "saved":
        dataset = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
        shutil.rmtree(folder)
        dataset.save_to_disk(folder, num_shards=3)
    return {
        "Parquet files by a pattern": ["tables/*.parquet"],
        "Parquet files one by one": sorted(map(str, folder.iterdir())),
        "Hub": ["--dataset_name", "tables"],
        "Hub, streamed": ["--dataset_name", "tables", "--streaming", "true"],
    }.get(kind, ["tables"])


KINDS = [
    *("Parquet", "Parquet files by a pattern", "Parquet files one by one"),
    *("tar", "arrow", "saved", "Hub", "Hub, streamed"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_get_the_answers_of_files(adapted, place, rows, kind, capsys):
    assert run("photos", "--model", adapted, "--output", "of_files.csv") == 3
    source = write_tables(kind, rows)
    assert run(*source, "--model", adapted, "--output", "labels.csv") == 3
    printed = capsys.readouterr()
    assert "1 of 20 photos can't be read" in printed.err and "warning" not in printed.err
    assert Path("labels.csv").read_bytes() == Path("of_files.csv").read_bytes()
    assert run(*source, "--model", adapted) == 3  # printed
    assert capsys.readouterr().out.encode() == Path("labels.csv").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_files_here_are_not_taken_for_rows(adapted, place, rows, kind):
    source = write_tables(kind, rows)
    assert run(*source, "--model", adapted, "--output", "labels.csv") == 3
    for row in rows:
        Path(row["path"]).parent.mkdir(exist_ok=True)
        Path(row["path"]).write_bytes(b"another photo")
    assert run(*source, "--model", adapted, "--output", "again.csv") == 3
    assert Path("again.csv").read_bytes() == Path("labels.csv").read_bytes()


def test_rows_without_names_are_called_by_their_numbers(adapted, place, rows):
    nameless = [{**row, "path": None} for row in rows]
    for number, (first, stop) in enumerate(itertools.pairwise(CUTS)):
        write_parquet(f"tables/{number}.parquet", nameless[first:stop])
    assert run("tables", "--model", adapted, "--output", "labels.parquet", "--image_column", "photo") == 3
    assert pq.read_table("labels.parquet")["file"].to_pylist() == [str(number) for number in range(NUM_PHOTOS)]


def test_parquet_holds_what_csv_does(adapted, place):
    for name in ("labels.csv", "labels.parquet"):
        assert run("photos", "--model", adapted, "--output", name) == 3
    with open("labels.csv", encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file))
    table = pq.read_table("labels.parquet").to_pylist()
    assert list(table[0]) == list(expected[0])
    texts = [
        {name: "" if value is None else f"{value:.6f}" if isinstance(value, float) else value for name, value in row}
        for row in (row.items() for row in table)
    ]
    assert texts == expected


@st.composite
def sources(draw):
    """Lengths of shards, whether they are known, and parts of them that are written already."""
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    written = WrittenRows()
    for shard, length in enumerate(lengths):
        pairs = draw(st.lists(st.tuples(*[st.integers(0, length)] * 2), max_size=4))
        written.parts[shard] = [tuple(sorted(pair)) for pair in pairs if pair[0] != pair[1]]
        if draw(st.booleans()):
            written.ends[shard] = length
    return lengths, len(lengths) == 1 and draw(st.booleans()), written


def generate(shards):
    for shard, length in shards:
        yield from ({"image": {"path": f"{shard} {row}", "bytes": None}} for row in range(length))


def open_source(lengths, is_list):
    """Photos that are called by their shard and row."""
    if is_list:
        return PhotoList({f"0 {row}": Path("photo.png") for row in range(lengths[0])})
    shards = list(enumerate(lengths))
    stream = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": shards})
    return PhotoStream(stream, {}, None)


@settings(max_examples=60)
@given(sources(), st.integers(1, 7), st.integers(1, 5))
def test_every_missing_row_is_read_once(source, num_readers, batch_size):
    """Whatever was there, by any number of processes, and every shard's end is found."""
    lengths, is_list, written = source
    found, ends = [], dict(written.ends)
    for reader in range(num_readers):
        rows = RowBatches(open_source(lengths, is_list), written, None, batch_size, (reader, num_readers))
        rows.block = 2 * batch_size
        for batch in rows._raw_batches(reader, num_readers):
            names = [f"{batch.shard} {batch.first + row}" for row in range(len(batch.photos))]
            assert [photo.name for photo in batch.photos] == names and len(names) <= batch_size
            found += names
            if batch.end is not None:
                assert ends.setdefault(batch.shard, batch.end) == batch.end
    done = {
        f"{shard} {row}"
        for shard, parts in written.parts.items()
        for first, stop in parts
        for row in range(first, stop)
    }
    names = {f"{shard} {row}" for shard, length in enumerate(lengths) for row in range(length)}
    assert sorted(found) == sorted(names - done)
    assert written.num_rows == len(done)
    assert ends == dict(enumerate(lengths))


class Interruption:
    """A forward that is interrupted at some batches, and counts the images of the others."""

    def __init__(self, monkeypatch, error, moments):
        self.forward = MicroCLIPForImageClassification.forward
        self.error = error
        self.moments = moments
        self.calls = self.num_images = 0
        monkeypatch.setattr(MicroCLIPForImageClassification, "forward", lambda model, **kwargs: self(model, **kwargs))

    def __call__(self, model, pixel_values):
        self.calls += 1
        if self.calls in self.moments:
            raise self.error
        self.num_images += len(pixel_values)
        return self.forward(model, pixel_values=pixel_values)


@pytest.mark.parametrize("kind", ["Parquet", "tar", "saved", "Hub, streamed"])
def test_a_table_goes_on_where_it_was_interrupted(adapted, place, rows, kind, monkeypatch, capsys):
    source = write_tables(kind, rows)
    options = [*source, "--model", adapted, "--batch_size", 2, "--output"]
    assert run(*options, "whole.csv") == 3
    count = Interruption(monkeypatch, KeyboardInterrupt(), moments=(3, 4, 8))
    for _ in count.moments:
        assert run(*options, "labels.csv") == 128 + signal.SIGINT
    capsys.readouterr()
    assert run(*options, "labels.csv") == 3
    assert re.search(r"Photos: .*\b20(/20|photo)", capsys.readouterr().err)  # those that were there already counted
    assert Path("labels.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert count.num_images == NUM_PHOTOS - 1  # which can be read
    assert not Path("labels.csv.parts").exists()


def test_a_full_disk_loses_nothing(adapted, place, monkeypatch):
    """While parts are written, and when they are joined."""
    options = ["photos", "--model", adapted, "--batch_size", 2, "--output"]
    assert run(*options, "whole.csv") == 3
    write = pq.write_table
    calls = []

    def fail(table, path):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, path)

    monkeypatch.setattr(pq, "write_table", fail)
    assert "No space left on device" in run(*options, "labels.csv")
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "_text", lambda value: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*options, "labels.csv")
    assert not Path("labels.csv").exists()
    assert run(*options, "labels.csv") == 3
    assert len(calls) == 6  # parts of 4 of 20 photos, and the one that failed
    assert Path("labels.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert {path.name for path in place.iterdir()} == {"photos", "whole.csv", "labels.csv"}


CHANGES = {  # What is done before the command is given again, further options, and what the error says.
    "top_k": (None, ["--top_k", 3], "whose top k was '2' and is now '3'"),
    "precision": (None, ["--precision", "bfloat16"], "whose precision was 'float32' and is now 'bfloat16'"),
    "exact_pixels": (None, ["--exact_pixels", "true"], "whose exact pixels was 'False' and is now 'True'"),
    "classes": (None, ["--classes", "names.txt"], "whose classes was '3 names, "),
    "photos": (lambda: Path("photos/04.png").rename("photos/4.png"), [], "whose photos was '20 files, "),
    "another photo of that name": (lambda: Path("photos/04.png").write_bytes(b"another"), [], "whose photos was '20"),
    "fewer photos": (lambda: Path("photos/04.png").unlink(), [], "and is now '19 files, "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parts_of_something_else_are_refused(adapted, place, monkeypatch, name):
    change, further, message = CHANGES[name]
    options = ["photos", "--model", adapted, "--batch_size", 2, "--output", "labels.csv"]
    with monkeypatch.context() as patch:
        Interruption(patch, KeyboardInterrupt(), moments=(3,))
        assert run(*options) == 128 + signal.SIGINT
    before = {path.name: path.read_bytes() for path in Path("labels.csv.parts").iterdir()}
    Path("names.txt").write_text("Red_Disc\nblue bar\n")
    if change is not None:
        change()
    error = run(*options, *further)
    assert message in error and "labels.csv.parts holds rows of an earlier run" in error
    assert {path.name: path.read_bytes() for path in Path("labels.csv.parts").iterdir()} == before


def test_parts_of_another_model_are_refused(adapted, place, monkeypatch):
    """Another weight of the tower, another adjustment, another image processor."""
    options = ["photos", "--batch_size", 2, "--output", "labels.csv", "--model"]
    with monkeypatch.context() as patch:
        Interruption(patch, KeyboardInterrupt(), moments=(3,))
        assert run(*options, adapted) == 128 + signal.SIGINT
    for change in ("weight", "bias", "processor"):
        model = MicroCLIPForImageClassification.from_pretrained(adapted)
        with torch.no_grad():
            if change == "weight":
                model.clip.vision_model.pre_layrnorm.bias[3] += 1e-3
            elif change == "bias":
                model.logit_adjustment.bias[1] += 1e-3
            else:
                model.image_processor.resample = Image.Resampling.BILINEAR
        model.save_pretrained("other")
        assert "whose model was " in run(*options, "other")
    assert run(*options, adapted) == 3


def test_a_folder_in_the_way_is_left_alone(adapted, place):
    Path("labels.csv.parts").mkdir()
    Path("labels.csv.parts/mine.txt").write_text("mine")
    error = run("photos", "--model", adapted, "--output", "labels.csv")
    assert "labels.csv.parts is in the way" in error
    assert Path("labels.csv.parts/mine.txt").read_text() == "mine" and not Path("labels.csv").exists()


def test_missing_rows_are_an_error_and_repeated_ones_count_once(place):
    """As where the folder was meddled with."""
    parts = RowParts("labels.parts", {"of": "a test"})
    parts.create()
    table = pa.table({"file": ["a", "b"]})
    for first in (0, 4):
        parts.write(0, first, table)
    parts.write_end(0, 6)
    with pytest.raises(ValueError, match="lacks the row 2 of shard 0"):
        list(parts.read(1))
    parts.write(0, 1, pa.table({"file": ["b", "a", "b"]}))  # as of a process that outlived its launch
    assert pa.concat_tables(parts.read(1))["file"].to_pylist() == ["a", "b"] * 3
    parts.remove()
    assert not Path("labels.parts").exists()


def test_a_table_that_is_named_twice_is_labelled_once(adapted, place, rows):
    write_tables("Parquet", rows)
    tables = sorted(map(str, Path().rglob("*.parquet")))
    assert run(*tables, f"./{tables[0]}", "--model", adapted, "--output", "labels.csv") == 3
    assert Path("labels.csv").read_text().count("\n") == NUM_PHOTOS + 1


def test_processes_agree_on_the_number_of_workers(adapted, place, monkeypatch):
    """Readers share the rows by their number: machines with other cores must not have more of them."""
    used = []
    load = RowBatches.load
    monkeypatch.setattr(row_pass, "gather_object", lambda own: [*own, 1])
    monkeypatch.setattr(RowBatches, "load", lambda self, workers, **own: used.append(workers) or load(self, 0, **own))
    assert run("photos", "--model", adapted, "--output", "labels.csv", "--num_workers", 5) == 3
    assert used == [1]


def test_two_processes_may_write_one_file_at_a_time(place, monkeypatch):
    parts = RowParts("labels.parts", {"of": "a test"})
    parts.create()
    with parts.whole_file("labels.csv") as first:
        Path(first).write_text("whole\n")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with parts.whole_file("labels.csv") as second:
            Path(second).write_text("wh")
            Path(second).write_text("whole\n")
        assert Path("labels.csv").read_text() == "whole\n"
    assert Path("labels.csv").read_text() == "whole\n"


def test_workers_give_the_same_rows(adapted, place, rows):
    """Two processes read the photos, whose blocks come in turns."""
    write_tables("Parquet", rows)
    for source in ("photos", "tables"):
        for workers in (0, 2):
            options = ["--output", f"{source}{workers}.csv", "--num_workers", workers, "--batch_size", 2]
            assert run(source, "--model", adapted, *options) == 3
        assert Path(f"{source}2.csv").read_bytes() == Path(f"{source}0.csv").read_bytes()


@settings(max_examples=60)
@given(st.tuples(*[st.integers(1, 300)] * 2), st.sampled_from(Image.Resampling), st.integers(0, 99))
def test_pixels_are_the_processors(size, resample, seed):
    """To the last bit, whatever the picture's shape and the processor's filter; large pictures to two levels of 255,
    since two filters in turn round to a level each, unless exact pixels are asked for.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, resample=resample
    )
    expected = processor(cut_strip(Image.fromarray(pixels)), return_tensors="pt")["pixel_values"][0]
    for exact in (True, False):
        reader = PixelReader(processor, exact)
        assert reader.edge == 36
        found = reader({"path": None, "bytes": file.getvalue()})
        levels = (found - expected).mul(torch.tensor(processor.image_std)[:, None, None] * 255).abs()
        is_torchs = not exact and min(size) >= 72 and resample in TORCH_FILTERS
        assert levels.max() < 2.01 if is_torchs else found.equal(expected)


def test_large_pictures_are_resized_by_torch(monkeypatch):
    """But for very large ones, of which it isn't faster."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    reader = PixelReader(processor)
    assert not reader(picture).equal(expected)
    monkeypatch.setattr(photo_batches, "MOST_PIXELS", 90 * 120 - 1)
    assert reader(picture).equal(expected)


def test_large_jpegs_are_decoded_smaller(adapted, tmp_path):
    """As little as still holds what the model sees, turned or not; and whole where that is asked for."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = smooth.resize((800, 600), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth.save(tmp_path / "plain.jpg", quality=95)
    smooth.save(tmp_path / "turned.jpg", quality=95, exif=turned)
    processor = MicroCLIPForImageClassification.from_pretrained(adapted).image_processor
    sizes = []

    def process(picture, **kwargs):
        sizes.append(picture.size)
        return processor(picture, **kwargs)

    for name in ("plain.jpg", "turned.jpg"):
        image = {"path": str(tmp_path / name), "bytes": None}
        exact = processor(ImageOps.exif_transpose(Image.open(tmp_path / name)), return_tensors="pt")["pixel_values"][0]
        assert PixelReader(processor, exact=True)(image).equal(exact)
        reader = PixelReader(processor)
        # In standard deviations of colours, which are about a quarter of white: of a smooth picture it is little.
        found = reader(image)
        assert 0 < (found - exact).abs().max() < 0.2
        assert reader.size == 32
        reader.processor = process
        reader.edge = None
        assert (reader(image) - found).abs().max() < 0.05  # three levels
    assert sizes == [(200, 150), (150, 200)]  # the side of 75 isn't three times 32
