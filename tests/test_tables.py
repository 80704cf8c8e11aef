"""Tables of images: under any name, of any type, and what is none."""

import glob
import io
import random
import shutil
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adaptation import CLASS_NAMES, draw_images
from datasets import Dataset, Features, Image, Value
from packaging.version import Version
from tiny_inputs import write_tar

from microclip_hf.data.parquet_stream import BUFFER
from microclip_hf.data.photo_sources import open_photos
from microclip_hf.data.sources import load_images
from microclip_hf.prediction import find_photos
from microclip_hf.training.view_datasets import decode


ODD_NAMES = [
    *(
        "a[v2]",
        "[",
        "[a-",
        "a]b",
        "a{a,b}",
        "a#b",
        "a b",
        "a%20b",
        "-a",
        "~a",
        "__a",
        "ü日",
        "a!b",
        "a$NOT_SET",
        "a@b",
    ),
    # Not on Windows:
    *("a*", "a?", "hf:", "C:x", "file:", "a\\b"),
]
# What the oldest versions of `datasets` don't do.
CASTS_LARGE_TYPES = Version(datasets.__version__) >= Version("4.8")
SAVES_NO_ROWS = Version(datasets.__version__) >= Version("5.2")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def images():
    return draw_images(3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_folder(name):
    folder = Path(name)
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no name for a folder here")
    return folder


@pytest.fixture
def plain(images, tmp_path, monkeypatch):
    """The images as `saved`, `table.parquet` and `table.tar`; from here on paths are relative to it."""
    monkeypatch.chdir(tmp_path)
    images.save_to_disk("saved")
    images.to_parquet("table.parquet")
    with tarfile.open("table.tar", "w") as tar:
        for index, row in enumerate(images):
            for ending, content in (("png", png(row["image"])), ("label", str(row["label"]).encode())):
                member = tarfile.TarInfo(f"{index}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return tmp_path


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_files_and_folders(plain, images, name):
    """What a name holds is no pattern, no protocol and no option; a folder beside it isn't read."""
    folder = make_folder(name)
    for other in ("av", "ab", "a1"):
        Path(other).mkdir(exist_ok=True)
        shutil.copy("table.parquet", Path(other, "more.parquet"))
    for kind, file in (("parquet", "table.parquet"), ("arrow", glob.glob("saved/*.arrow")[0]), ("tar", "table.tar")):
        (folder / kind).mkdir()
        shutil.copy(file, folder / kind / f"{name}.{kind}")
    shutil.copytree("saved", folder / "saved")
    (folder / "photos").mkdir()
    for index, image in enumerate(images["image"]):
        image.save(folder / "photos" / f"{name}{index}.png")
    sources = ["parquet", "arrow", "tar", "saved", f"parquet/{name}.parquet", "parquet/*.parquet", "**/*.parquet"]
    for source in (f"{name}/{source}" for source in sources):
        for path in (source, str(plain / source)):
            for streaming in (False, True):
                found = [decode(row["image"]).tobytes() for row in load_images(path, CLASS_NAMES, streaming=streaming)]
                assert found == [image.tobytes() for image in images["image"]], (path, streaming)
    for path in (f"{name}/photos", str(plain / name / "photos")):
        assert [row["image"].tobytes() for row in load_images(path, CLASS_NAMES)] == found
        assert list(find_photos([f"{path}/*.png"])) == [f"{path}/{name}{index}.png" for index in range(3)]


@pytest.mark.parametrize("name", ["a::b", "a$IS_SET", "a*", "a?", "a[v2]"])
def test_names_that_datasets_cannot_take(plain, images, name, monkeypatch):
    """They are named, before anything else is read in their place; wildcards only in a copy of a repository."""
    monkeypatch.setenv("IS_SET", "value")
    folder = make_folder(name)
    shutil.copy("table.parquet", folder / "train.parquet")
    character = {"a::b": "::", "a$IS_SET": r"\$", "a*": r"\*", "a?": r"\?", "a[v2]": r"\["}[name]
    with pytest.raises(ValueError, match=f"has '{character}', which .* rename the file or folder"):
        load_images(name, CLASS_NAMES, hub=True)
    if name in ("a::b", "a$IS_SET"):
        with pytest.raises(ValueError, match=f"has '{character}', which .* rename the file or folder"):
            load_images(name, CLASS_NAMES)


def test_a_copy_of_a_repository_under_an_odd_name(plain, images):
    for name in ("-a", "~a", "a{a,b}", "a#b", "a%20b", "hf:"):
        make_folder(name)
        shutil.copy("table.parquet", Path(name, "train.parquet"))
        assert len(load_images(name, CLASS_NAMES, hub=True)) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_any_type(images, tmp_path, streaming):
    """Contents and paths become images where it is clear what they are."""
    contents = [png(image) for image in images["image"]]
    paths = []
    for index, content in enumerate(contents):
        path = tmp_path / f"{index}.png"
        path.write_bytes(content)
        paths.append(str(path))
    rows = [{"bytes": content, "path": None} for content in contents]
    wide = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    for column, name in (
        (pa.array(contents, pa.binary()), "picture"),
        *([(pa.array(contents, pa.large_binary()), "picture")] if CASTS_LARGE_TYPES else []),
        (pa.array(rows, STRUCT), "picture"),
        (pa.array(rows, wide), "picture"),
        (pa.array(paths, pa.string()), "image"),
        *([(pa.array(paths, pa.large_string()), "image")] if CASTS_LARGE_TYPES else []),
    ):
        pq.write_table(pa.table({name: column, "title": ["a", "b", "c"]}), tmp_path / "table.parquet")
        dataset = load_images(str(tmp_path / "table.parquet"), CLASS_NAMES, streaming=streaming)
        assert isinstance(dataset.features["image"], Image) and list(dataset.features) == ["image"]
        found = [decode(row["image"]).tobytes() for row in dataset]
        assert found == [image.tobytes() for image in images["image"]], column.type
    pq.write_table(pa.table({"photo": paths, "title": ["a", "b", "c"]}), tmp_path / "table.parquet")
    path = str(tmp_path / "table.parquet")
    assert len(list(load_images(path, CLASS_NAMES, image_column="photo", streaming=streaming))) == 3
    with pytest.raises(ValueError, match="of which none hold images; say which one is meant with image_column"):
        load_images(path, CLASS_NAMES, streaming=streaming)
    with pytest.raises(ValueError, match=r"holds Value.*, not images; the first, 'a', is no file's path"):
        load_images(path, CLASS_NAMES, image_column="title", streaming=streaming)
    numbers = pa.table({"image": [1, 2, 3], "title": ["a", "b", "c"]})
    pq.write_table(numbers, tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"holds Value\('int64'\), not images, nor their bytes or paths"):
        load_images(path, CLASS_NAMES, image_column="image", streaming=streaming)


@pytest.mark.parametrize("group", [2**10, 2**16])
def test_parquet_is_streamed_in_constant_memory(tmp_path, group):
    content = random.Random(0).randbytes(2**26)
    rows = [{"bytes": content[start : start + 2**10], "path": None} for start in range(0, len(content), 2**10)]
    pq.write_table(pa.table({"image": pa.array(rows, STRUCT)}), tmp_path / "table.parquet", row_group_size=group)
    shard = open_photos([str(tmp_path / "table.parquet")]).open(0, 0)
    before, most = pa.total_allocated_bytes(), 0
    for start in range(0, len(rows), 256):
        photos = shard.take(start, start + 256)
        assert [photo.image for photo in photos] == rows[start : start + 256]
        most = max(most, pa.total_allocated_bytes() - before)
    assert shard.take(len(rows), len(rows) + 1) == [] and shard.end == len(rows)
    # Pyarrow looks at a page's size after each 1,024 rows, here 1 MiB. What is held: the dictionary, a page as stored
    # and as read, and what is read at once of two columns. As much again is room for what is built of it.
    assert most < 2 * (3 * 2**20 + 2 * BUFFER) < len(content) / 8


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["parquet", "tar"])
def test_files_here_are_not_taken_for_rows(images, tmp_path, monkeypatch, ending, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rows = [{"path": f"{number}.png", "bytes": png(image)} for number, image in enumerate(images["image"])]
    if ending == "parquet":
        pq.write_table(pa.table({"image": pa.array(rows, STRUCT)}), "table.parquet")
    else:
        write_tar("table.tar", rows)
    for row in rows:
        Path(row["path"]).write_bytes(b"another photo")
    found = load_images(f"table.{ending}", CLASS_NAMES, streaming=streaming)
    assert [decode(row["image"]).tobytes() for row in found] == [image.tobytes() for image in images["image"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_differ(images, tmp_path, streaming):
    """Columns that later files lack are empty there; a file that the first one's columns don't fit is named."""
    stored = pa.array([{"bytes": png(image), "path": None} for image in images["image"]], STRUCT)
    pq.write_table(pa.table({"label": [0, 1, 2], "image": stored}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": stored}), tmp_path / "1.parquet")
    found = list(load_images(str(tmp_path), CLASS_NAMES, streaming=streaming))
    assert [decode(row["image"]).tobytes() for row in found] == 2 * [image.tobytes() for image in images["image"]]
    assert [row["label"] for row in found] == [0, 1, 2, None, None, None]
    if streaming:
        pq.write_table(pa.table({"size": [1, 2, 3], "image": stored}), tmp_path / "1.parquet")  # which isn't used
        assert len(list(load_images(str(tmp_path), CLASS_NAMES, streaming=True))) == 6
        for table, problem in (
            (pa.table({"label": [1, 2, 3]}), r"1\.parquet has no column 'image', which .*0\.parquet has"),
            (
                pa.table({"image": [b"1"]}),
                r"column 'image' of .*1\.parquet is of the type binary, and that of .*0\.par",
            ),
        ):
            pq.write_table(table, tmp_path / "1.parquet")
            with pytest.raises(ValueError, match=problem):  # before anything is read
                load_images(str(tmp_path), CLASS_NAMES, streaming=True)


def test_streamed_files_need_the_images_alone(images, tmp_path):
    content = [png(image) for image in images["image"]]
    pq.write_table(pa.table({"photo": content, "hash": [b"1", b"2", b"3"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"photo": content}), tmp_path / "1.parquet")
    assert len(list(load_images(str(tmp_path), CLASS_NAMES, image_column="photo", streaming=True))) == 6
    pq.write_table(pa.table({"photo": ["0.png", "1.png", "2.png"]}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet is of the type string, and that of .*0\.parquet is Value"):
        load_images(str(tmp_path), CLASS_NAMES, image_column="photo", streaming=True)
    pq.write_table(pa.table({"hash": content}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet has no column 'photo'"):
        load_images(str(tmp_path), CLASS_NAMES, image_column="photo", streaming=True)


def test_what_cannot_be_chosen(images, tmp_path):
    stored = pa.array([{"bytes": png(image), "path": None} for image in images["image"]], STRUCT)
    pq.write_table(pa.table({"photo": stored, "mask": stored}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="of which 'photo', 'mask' hold images; say which one is meant"):
        load_images(str(tmp_path), CLASS_NAMES)
    with pytest.raises(ValueError, match=r"no column 'foto': .* of which 'photo', 'mask' hold images"):
        load_images(str(tmp_path), CLASS_NAMES, image_column="foto")
    (tmp_path / "1.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"both \.tar files and \.parquet files; pass '.*\*\.parquet' for these"):
        load_images(str(tmp_path), CLASS_NAMES)
    datasets.DatasetDict(train=images).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds several splits; pass the folder of one of them"):
        open_photos([str(tmp_path / "splits")])


@pytest.mark.parametrize("ending", ["arrow", "tar"])
def test_a_file_that_ends_too_early_is_named(tmp_path, ending):
    path = tmp_path / f"table.{ending}"
    rows = [{"bytes": random.Random(number).randbytes(2**12), "path": f"{number}.png"} for number in range(64)]
    if ending == "arrow":
        table = pa.table({"image": pa.array(rows, STRUCT)})
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=16)
    else:
        write_tar(path, rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shard = open_photos([str(path)]).open(0, 0)
    with pytest.raises(ValueError, match=rf"table\.{ending} can't be read to its end"):
        shard.take(0, len(rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_without_rows(images, tmp_path, streaming):
    full = pa.table({"image": pa.array([{"bytes": png(images[0]["image"]), "path": None}], STRUCT)})
    (tmp_path / "shards").mkdir()
    pq.write_table(full[:0], tmp_path / "shards" / "0.parquet")
    with pytest.raises(ValueError, match="shards has no rows"):
        load_images(str(tmp_path / "shards"), CLASS_NAMES, streaming=streaming)
    pq.write_table(full, tmp_path / "shards" / "1.parquet")
    assert len(list(load_images(str(tmp_path / "shards"), CLASS_NAMES, streaming=streaming))) == 1
    pq.write_table(pa.table({}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none\.parquet has no rows"):
        load_images(str(tmp_path / "none.parquet"), CLASS_NAMES, streaming=streaming)
    features = Features({"image": Image(), "label": Value("string")})
    if not streaming and SAVES_NO_ROWS:
        Dataset.from_dict({"image": [], "label": []}, features=features).save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match="saved has no rows"):
            load_images(str(tmp_path / "saved"), CLASS_NAMES)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["parquet", "arrow", "tar"])
def test_files_that_are_none(images, tmp_path, ending, streaming):
    path = tmp_path / f"table.{ending}"
    for content in (b"", b"<html>404</html>" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"table\.{ending} can't be"):
            load_images(str(path), CLASS_NAMES, streaming=streaming)
    columns = [pa.array([{"bytes": png(images[0]["image"]), "path": None}], STRUCT), pa.array([0]), pa.array(["a"])]
    twice = pa.table(columns, names=["image", "label", "label"])
    if ending == "parquet":
        pq.write_table(twice, path)
    elif ending == "arrow":
        with pa.ipc.new_file(path, twice.schema) as writer:
            writer.write_table(twice)
    else:
        with tarfile.open(path, "w"):
            pass
    message = "can't be loaded" if ending == "tar" else "has several columns called 'label'; rename them"
    with pytest.raises(ValueError, match=message):
        load_images(str(path), CLASS_NAMES, streaming=streaming)
