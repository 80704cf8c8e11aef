"""Where images come from: every source gives the same pictures, streams and unreadable files included."""

import io
import tarfile

import numpy as np
import pytest
import torch
from adaptation import CLASS_NAMES, adapt, draw_images
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset

from microclip_hf.data.image_columns import undecoded
from microclip_hf.data.sources import load_images
from microclip_hf.images import decode
from microclip_hf.training.view_datasets import ViewCollator, ViewDataset, ViewSettings, ViewStream


@pytest.fixture(scope="module")
def images():
    return draw_images(12).cast_column("label", ClassLabel(names=[name.replace(" ", "_") for name in CLASS_NAMES]))


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(images, tmp_path_factory):
    """The same pictures in the same order as a folder of files, Arrow on disk, Parquet and WebDataset shards."""
    root = tmp_path_factory.mktemp("sources")
    for name in ("folder", "parquet", "shards"):
        (root / name).mkdir()
    for index, example in enumerate(images):
        example["image"].save(root / "folder" / f"{index:03}.png")
    images.save_to_disk(root / "arrow")
    for shard in range(2):
        part = images.select(range(6 * shard, 6 * shard + 6))
        part.to_parquet(root / "parquet" / f"{shard}.parquet")
        with tarfile.open(root / "shards" / f"{shard}.tar", "w") as tar:
            for index, example in enumerate(part):
                for ending, content in (("png", png(example["image"])), ("cls", str(example["label"]).encode())):
                    member = tarfile.TarInfo(f"{shard}{index}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["folder", "arrow", "parquet", "parquet/*.parquet", "shards"])
def test_sources(sources, images, name, streaming, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    arguments = (str(sources / name), CLASS_NAMES)
    if name == "folder" and streaming:
        with pytest.raises(ValueError, match="leave out streaming"):
            load_images(*arguments, streaming=True)
        return
    dataset = load_images(*arguments, streaming=streaming, label_column="cls" if name == "shards" else "label")
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    found = list(dataset)
    assert [decode(example["image"]).tobytes() for example in found] == [
        example["image"].tobytes() for example in images
    ]
    assert [example.get("label") for example in found] == ([None] * 12 if name == "folder" else images["label"])


def test_labels_of_sources_are_matched_by_name(sources, images, tmp_path):
    reverse = CLASS_NAMES[::-1]
    for streaming in (False, True):
        dataset = load_images(str(sources / "arrow"), reverse, streaming=streaming, labels_required=True)
        assert [example["label"] for example in dataset] == [2 - label for label in images["label"]]
        assert "label" not in load_images(str(sources / "arrow"), ["a", "b"], streaming=streaming).features
    words = images.remove_columns("label").add_column("word", [CLASS_NAMES[label] for label in images["label"]])
    words.rename_column("image", "photo").to_parquet(tmp_path / "words.parquet")
    dataset = load_images(str(tmp_path / "words.parquet"), CLASS_NAMES, label_column="word", labels_required=True)
    assert dataset["label"] == images["label"] and set(dataset.column_names) == {"image", "label"}


def test_a_labelled_stream_outlives_a_corrupt_image(tmp_path, images, clip_folder):
    rows = [{"image": {"path": None, "bytes": png(row["image"])}, "label": row["label"]} for row in images]
    rows[4]["image"]["bytes"] = b"no image"
    rows[5]["image"] = None
    Dataset.from_list(rows, features=images.features).to_parquet(tmp_path / "shard.parquet")
    stream = load_images(str(tmp_path / "shard.parquet"), CLASS_NAMES[::-1], streaming=True)
    trainer = adapt(clip_folder, tmp_path / "out", stream, max_steps=2)
    assert all("pseudo_label_accuracy" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_wrong_sources(sources, tmp_path, images):
    with pytest.raises(ValueError, match="nobody/nothing can't be loaded"):
        load_images("nobody/nothing", CLASS_NAMES, hub=True)
    with pytest.raises(ValueError, match="nothing isn't a folder"):
        load_images("nothing", CLASS_NAMES)
    with pytest.raises(ValueError, match=r"has the columns 'image', 'label'; .* Say which one with label_column"):
        load_images(str(sources / "arrow"), CLASS_NAMES, label_column="class", labels_required=True)
    with pytest.raises(ValueError, match="labels 'green_square', 'blue_bar' are none of the 2 classes"):
        load_images(str(sources / "arrow"), ["red disc", "star"], labels_required=True)
    two = Dataset.from_dict({"image": images["image"], "other": images["image"]})
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="say which one is meant with image_column"):
        load_images(str(tmp_path / "two"), CLASS_NAMES)
    DatasetDict(train=images).save_to_disk(tmp_path / "several")
    with pytest.raises(ValueError, match="holds several splits; pass the folder of one of them"):
        load_images(str(tmp_path / "several"), CLASS_NAMES)
    (tmp_path / "mixed").mkdir()
    images[0]["image"].save(tmp_path / "mixed" / "a.png")
    (tmp_path / "mixed" / "b.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds both images and \.tar files"):
        load_images(str(tmp_path / "mixed"), CLASS_NAMES)
    one_based = images.remove_columns("label").add_column("label", [label + 1 for label in images["label"]])
    one_based.save_to_disk(tmp_path / "one_based")
    with pytest.raises(ValueError, match="The highest label is 3, and there are 3 classes, numbered from 0"):
        load_images(str(tmp_path / "one_based"), CLASS_NAMES, labels_required=True)


@pytest.mark.numerical
def test_stream_run_is_the_run_on_the_same_images_in_order(clip_folder, tmp_path, images):
    """Three steps of four are a pass over twelve images; a stream has no epochs, so fairness is left out."""
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "num_train_epochs": 1}
    whole = adapt(clip_folder, tmp_path / "1", images, train_sampling_strategy="sequential", **options)
    stream = adapt(clip_folder, tmp_path / "2", images.to_iterable_dataset(), **options)
    logs = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, stream)]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert all(value.equal(stream.model.state_dict()[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.numerical
def test_resume_of_a_stream(clip_folder, tmp_path, images):
    """Within its second pass."""
    options = {"max_steps": 5, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 4}
    whole = adapt(clip_folder, tmp_path, images.to_iterable_dataset(), **options)
    resumed = adapt(
        clip_folder, tmp_path, images.to_iterable_dataset(), resume=str(tmp_path / "checkpoint-4"), **options
    )
    assert all(value.equal(resumed.model.state_dict()[name]) for name, value in whole.model.state_dict().items())


SETTINGS = ViewSettings(16, 1, (0.5, 0.9), 0, max_corrupt_share=0.2)


def test_a_stream_is_read_again_with_other_views(images):
    stream = iter(ViewStream(undecoded(images.to_iterable_dataset()), SETTINGS))
    examples = [next(stream) for _ in range(24)]
    data = ViewDataset(images, SETTINGS)
    for index, example in enumerate(examples):
        data.set_epoch(index // 12)
        assert all(np.array_equal(data[index % 12][name], example[name]) for name in ("weak", "strong", "crops"))
    assert not np.array_equal(examples[0]["strong"], examples[12]["strong"])


def test_workers_share_a_stream(images):
    """Each reads shards of its own; where there is one shard, a worker has nothing to do."""
    for num_shards in (1, 3):
        stream = ViewStream(undecoded(images.to_iterable_dataset(num_shards=num_shards)), SETTINGS)
        loader = iter(torch.utils.data.DataLoader(stream, batch_size=4, num_workers=2, collate_fn=ViewCollator()))
        batches = [next(loader) for _ in range(2)]
        del loader
        views = torch.cat([batch["strong"] for batch in batches])
        assert len(views.flatten(1).unique(dim=0)) == 8


@pytest.fixture
def broken(images, tmp_path):
    """Twenty files: one truncated, one empty, one of text, one missing."""
    for index in range(20):
        images[index % 12]["image"].save(tmp_path / f"{index:02}.png")
    content = (tmp_path / "03.png").read_bytes()
    (tmp_path / "03.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "07.png").write_bytes(b"")
    (tmp_path / "08.png").write_text("not an image")
    dataset = load_images(str(tmp_path), CLASS_NAMES)
    (tmp_path / "19.png").unlink()
    return dataset


def test_unreadable_images_are_replaced_and_named(broken, clip_folder, tmp_path):
    data = ViewDataset(broken, SETTINGS)
    assert [data[index]["index"] for index in (2, 3, 7, 8, 19)] == [2, 4, 9, 9, 0]
    with pytest.warns(
        UserWarning, match=r"4 of 20 images can't be read \(.*03.png, .*07.png, .*08.png, ...\)"
    ) as found:
        trainer = adapt(clip_folder, tmp_path / "out", broken, max_corrupt_share=0.2, dataloader_num_workers=2)
    assert sum("can't be read" in str(warning.message) for warning in found) == 1
    assert trainer.state.global_step == 6


def test_too_many_unreadable_images_are_an_error(broken, clip_folder, tmp_path):
    with pytest.raises(ValueError, match=r"2 of 20 images can't be read .*or raise max_corrupt_share \(0.05\)"):
        adapt(clip_folder, tmp_path / "out", broken)


def test_unreadable_images_of_a_stream_are_passed_over(images, monkeypatch):
    def examples():
        for index, image in enumerate(images["image"]):
            yield {"image": {"path": None, "bytes": b"" if index % 4 == 1 else png(image)}}

    features = images.remove_columns("label").features
    stream = ViewStream(undecoded(IterableDataset.from_generator(examples, features=features)), SETTINGS)
    iterator, data = iter(stream), ViewDataset(images, SETTINGS)
    for index in (0, 2, 3, 4, 6, 7, 8, 10, 11):
        assert np.array_equal(next(iterator)["strong"], data[index]["strong"])
    for _ in range(3):
        next(iterator)
    monkeypatch.setattr("microclip_hf.training.view_datasets.LEAST_SEEN", 10)
    with pytest.raises(ValueError, match=r"5 of the first 18 images of the stream can't be read"):
        list(iterator)


def test_folders_without_any_readable_image(clip_folder, tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match="None of the first 1 images can be read"):
        adapt(clip_folder, tmp_path / "out", load_images(str(tmp_path), CLASS_NAMES))


def test_streams_need_max_steps(clip_folder, tmp_path, images):
    with pytest.raises(ValueError, match="is a stream, whose end can't be known; set max_steps"):
        adapt(clip_folder, tmp_path, images.to_iterable_dataset())
