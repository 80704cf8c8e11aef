"""The class mixture's one pass: of a stream as of a data set, by several processes, interrupted, with bad images."""

import json
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from adaptation import CLASS_NAMES, adapt, draw_images
from datasets import Dataset, IterableDataset, concatenate_datasets
from PIL import Image
from safetensors.torch import load_file
from test_adapt import flags
from test_distributed import TESTS, finish, free_port, launch
from test_invariance import THREE_BATCHES, assert_same_mixture, run_processes
from test_mixing import make_trainer
from torch.testing import assert_close

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import adapt as command
from microclip_hf.data.photo_sources import NumberedPhotos
from microclip_hf.data.sources import load_images
from microclip_hf.passes.row_parts import WrittenRows
from microclip_hf.passes.row_pass import PassSettings
from microclip_hf.training import view_datasets
from microclip_hf.training.kept_rows import ImagePass, KeptRows
from microclip_hf.training.run import adapt as run_adapt
from microclip_hf.training.view_datasets import ViewDataset


NUM_IMAGES = 24
# Of features between 0 and 1 that are kept in half precision, computed in other batches.
HALF = 2e-3


def as_stream(num_shards=1, num_images=NUM_IMAGES):
    return draw_images(num_images).to_iterable_dataset(num_shards=num_shards)


def train(clip_folder, folder, dataset, **options):
    trainer = make_trainer(clip_folder, folder, dataset, **options)
    trainer.train()
    return trainer


def kept_features(folder):
    return np.load(folder / "_features" / "first" / "complete.npy")


def assert_same_weights(one, other):
    assert all(value.equal(other.model.state_dict()[name]) for name, value in one.model.state_dict().items())


@pytest.mark.parametrize(
    ("num_shards", "num_crops", "batch_size"), [(1, 0, 64), (1, 2, 10), (3, 0, 8)], ids=["whole", "crops", "shards"]
)
def test_a_stream_is_as_the_images_one_by_one(clip_folder, tmp_path, num_shards, num_crops, batch_size):
    options = {"num_crops": num_crops, "per_device_eval_batch_size": batch_size}
    images = train(clip_folder, tmp_path / "images", NUM_IMAGES, **options)
    stream = train(clip_folder, tmp_path / "stream", as_stream(num_shards), **options)
    assert_same_weights(images, stream)
    assert np.array_equal(kept_features(tmp_path / "images"), kept_features(tmp_path / "stream"))
    assert stream.diagnostics.class_counts == images.diagnostics.class_counts
    assert stream.num_images == NUM_IMAGES
    assert stream.state.log_history[-1] == images.state.log_history[-1]


def test_workers_that_read(clip_folder, tmp_path):
    options = {"num_crops": 1, "per_device_eval_batch_size": 4}
    runs = [
        train(clip_folder, tmp_path / str(index), dataset, dataloader_num_workers=workers, **options)
        for index, (dataset, workers) in enumerate([(NUM_IMAGES, 0), (NUM_IMAGES, 2), (as_stream(), 2)])
    ]
    for run in runs[1:]:
        assert_same_weights(runs[0], run)


def test_features_are_of_the_views_that_training_makes(clip_folder, tmp_path):
    """Means over the image as the processor makes it and its crops, in the batches of the pass."""
    trainer = train(clip_folder, tmp_path, NUM_IMAGES, num_crops=2)
    images = draw_images(NUM_IMAGES)
    settings = trainer.train_dataset.settings
    pixels = trainer.processing_class(list(images["image"]), return_tensors="pt")["pixel_values"]
    crops = torch.tensor(np.stack([example["crops"] for example in ViewDataset(images, settings)]))
    mean, std = (
        torch.tensor(value).view(3, 1, 1)
        for value in (trainer.processing_class.image_mean, trainer.processing_class.image_std)
    )
    views = torch.cat([pixels[:, None], (crops / 255 - mean) / std], 1)
    model = trainer.model.eval()
    with torch.no_grad():
        outputs = [model.encode_image(image) for image in views]
    means = torch.stack([torch.cat([output.cls_embeds.mean(0), output.fg_embeds.mean(0)]) for output in outputs])
    assert_close(torch.tensor(kept_features(tmp_path)).float(), means, atol=HALF, rtol=0)


def test_large_jpegs_of_a_table_and_of_its_stream(clip_folder, tmp_path):
    """They are decoded at a part of their size, in both."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(9):
        picture = Image.fromarray(rng.integers(0, 255, (5, 7, 3), np.uint8)).resize((280, 200))
        picture.save(tmp_path / f"{index}.jpg")
        rows.append({"image": {"path": f"{index}.jpg", "bytes": (tmp_path / f"{index}.jpg").read_bytes()}})
    Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    runs = [
        train(
            clip_folder,
            tmp_path / str(streaming),
            load_images(str(tmp_path / "table.parquet"), CLASS_NAMES, streaming=streaming),
            num_crops=1,
        )
        for streaming in (False, True)
    ]
    assert_same_weights(*runs)


def test_two_processes(clip_folder, tmp_path):
    options = {"class_mixture": True, "class_frequencies": "estimated", "num_train_epochs": 0}
    options |= {**THREE_BATCHES, "per_device_eval_batch_size": 4, "num_crops": 0}
    one, three = run_processes(clip_folder, tmp_path, 2, options | {"num_shards": 1}, options | {"num_shards": 3})
    reference = adapt(clip_folder, tmp_path / "one", **options)
    for number, run in enumerate((one, three)):
        assert_same_mixture(*run, reference)
        assert np.array_equal(kept_features(tmp_path / str(number)), kept_features(tmp_path / "one"))
    assert len(one[0]) == len(reference.state.log_history)


def interrupt_after(monkeypatch, num_batches):
    """The next pass ends in Ctrl-C after so many batches; returns the sizes of those."""
    encoded = []
    encode = MicroCLIPForImageClassification.encode_image

    def interrupted(model, pixel_values, *args, **kwargs):
        if len(encoded) == num_batches:
            raise KeyboardInterrupt
        encoded.append(len(pixel_values))
        return encode(model, pixel_values, *args, **kwargs)

    monkeypatch.setattr(MicroCLIPForImageClassification, "encode_image", interrupted)
    return encoded


def test_two_machines_with_disks_of_their_own_go_on(clip_folder, tmp_path):
    """One of them has the first rows of an interrupted pass, the other one nothing; both end with all rows."""
    options = {"class_mixture": True, "class_frequencies": "estimated", "num_train_epochs": 0, "seed": 2}
    options |= {"num_images": NUM_IMAGES, "num_shards": 3, "per_device_eval_batch_size": 4, "num_crops": 0}
    reference = adapt(clip_folder, tmp_path / "reference", **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        adapt(clip_folder, tmp_path / "0", **options)
    machines = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--num_processes", "2"]
    launches = {}
    for rank in ("0", "1"):
        run = json.dumps({**options, "output_dir": str(tmp_path / rank)})
        arguments = ["--machine_rank", rank, str(TESTS / "adaptation.py"), str(clip_folder), run]
        log = tmp_path / f"{rank}.log"
        launches[log] = launch(log, "multi_node.yaml", *machines, *arguments)
    finish(launches)
    for rank in ("0", "1"):
        assert np.array_equal(kept_features(tmp_path / rank), kept_features(tmp_path / "reference"))
        assert {path.name for path in (tmp_path / rank / "_features" / "first").iterdir()} == {
            "complete.npy",
            "facts.json",
        }
    history = json.loads((tmp_path / "0" / "log.json").read_text())
    assert_same_mixture(history, load_file(tmp_path / "0" / "model.safetensors"), reference)


def test_an_interrupted_pass_over_a_stream_goes_on(clip_folder, tmp_path, monkeypatch):
    options = {"per_device_eval_batch_size": 3}
    whole = train(clip_folder, tmp_path / "whole", as_stream(3), **options)
    with monkeypatch.context() as patch:
        before = interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt, match="and the same command goes on"):
            train(clip_folder, tmp_path / "again", as_stream(3), **options)
    after = interrupt_after(monkeypatch, -1)
    again = train(clip_folder, tmp_path / "again", as_stream(3), **options)
    assert sum(before) == 3 + 3 + 2 + 3 + 3 and sum(after) == NUM_IMAGES - sum(before)
    assert_same_weights(whole, again)
    after.clear()
    assert_same_weights(whole, train(clip_folder, tmp_path / "again", as_stream(3), **options))
    assert not after  # nothing is computed where all is there


def test_features_of_another_stream_are_not_used(clip_folder, tmp_path):
    train(clip_folder, tmp_path / "used", as_stream())
    first, last = as_stream(2).shard(2, 0), draw_images(2 * NUM_IMAGES).select(range(NUM_IMAGES, 36))
    others = [draw_images(25).select(range(1, 25)).to_iterable_dataset(), as_stream(2)]
    others.append(concatenate_datasets([first, last.to_iterable_dataset()]))  # by its second file alone
    for index, other in enumerate(others):
        fresh = train(clip_folder, tmp_path / f"fresh{index}", other)
        assert_same_weights(fresh, train(clip_folder, tmp_path / "used", other))


def test_training_on_a_stream_is_refused(clip_folder, tmp_path):
    message = r"labels are kept by an image's number, and a stream's images have none .*Set num_train_epochs to 0"
    for options in ({"max_steps": 3}, {"class_mixture": False, "max_steps": 3}, {"num_train_epochs": 1}):
        with pytest.raises(ValueError, match=message):
            make_trainer(clip_folder, tmp_path, as_stream(), **options)


def test_what_is_no_stream_of_images_is_refused(clip_folder, tmp_path):
    class OneByOne(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(draw_images(6))

    with pytest.raises(ValueError, match=r"takes streams of `datasets`.* OneByOne"):
        make_trainer(clip_folder, tmp_path, OneByOne())
    trainer = make_trainer(clip_folder, tmp_path, as_stream(1, 2))
    with pytest.raises(ValueError, match="as many images as classes, and there are 2 images of 3 classes"):
        trainer.train()


def with_bad_images(bad, num_shards):
    rows = list(draw_images(NUM_IMAGES).cast_column("image", view_datasets.datasets.Image(decode=False)))
    for index in bad:
        rows[index]["image"] = {"path": None, "bytes": b"no image"} if index % 2 else None
    features = draw_images(1).features
    return Dataset.from_list(rows, features=features).to_iterable_dataset(num_shards=num_shards)


def test_images_that_cannot_be_read_are_passed_over(clip_folder, tmp_path):
    bad = [0, 5, 6, 7, 13]
    with pytest.warns(UserWarning, match="5 of 24 images of the stream can't be read; they were passed over"):
        trainer = train(
            clip_folder, tmp_path / "stream", with_bad_images(bad, 2), num_crops=0, per_device_eval_batch_size=4
        )
    good = [index for index in range(NUM_IMAGES) if index not in bad]
    reference = train(clip_folder, tmp_path / "good", draw_images(NUM_IMAGES).select(good), num_crops=0)
    found = kept_features(tmp_path / "stream")
    assert np.flatnonzero(np.isnan(found).any(1)).tolist() == bad
    assert_close(found[good], kept_features(tmp_path / "good"), atol=HALF, rtol=0)
    assert trainer.num_images == NUM_IMAGES and sum(trainer.diagnostics.class_counts) == len(good)
    assert trainer.state.log_history[-1]["mixture_agreement"] == pytest.approx(
        reference.state.log_history[-1]["mixture_agreement"], abs=1 / len(good)
    )


def test_too_many_of_them_are_an_error(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(view_datasets, "LEAST_SEEN", 10)
    monkeypatch.setattr("microclip_hf.passes.photo_batches.BLOCK", 4)
    options = {"per_device_eval_batch_size": 4, "max_corrupt_share": 0.15}
    stream = with_bad_images([1, 9, 11, 13], 1)
    for _ in range(2):  # the second time with what the first has left
        with pytest.raises(ValueError, match=r"^3 of the first 12 images of the stream can't be read, the last "):
            train(clip_folder, tmp_path, stream, **options)
        parts = (tmp_path / "_features" / "first" / "parts").glob("*.parquet")
        assert sorted(path.name[:19] for path in parts) == ["000000-000000000000", "000000-000000000004"]
    with pytest.warns(UserWarning, match="4 of 24"):
        train(clip_folder, tmp_path, stream, **{**options, "max_corrupt_share": 0.3})


def test_an_interrupted_pass_is_judged_by_all_that_was_seen(clip_folder, tmp_path, monkeypatch):
    """The images that can't be read come last, and are too many for those alone that are left."""
    monkeypatch.setattr(view_datasets, "LEAST_SEEN", 10)
    monkeypatch.setattr("microclip_hf.passes.photo_batches.BLOCK", 4)
    options = {"per_device_eval_batch_size": 4, "max_corrupt_share": 0.15}
    stream = with_bad_images([21, 22, 23], 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 5)
        train(clip_folder, tmp_path / "again", stream, **options)
    for name in ("whole", "again"):
        with pytest.warns(UserWarning, match="3 of 24"):
            train(clip_folder, tmp_path / name, stream, **options)
    features = [kept_features(tmp_path / name) for name in ("whole", "again")]
    assert np.array_equal(*features, equal_nan=True)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_images_of_a_stream_are_tried_again_once_repaired(clip_folder, tmp_path, monkeypatch, num_shards):
    monkeypatch.setattr("microclip_hf.training.mixing.NUM_SAMPLED", 1)  # or the repair would be noticed
    with pytest.warns(UserWarning, match="3 of 24"):
        train(clip_folder, tmp_path / "again", with_bad_images([5, 6, 21], num_shards), per_device_eval_batch_size=4)
    for name in ("again", "whole"):
        train(clip_folder, tmp_path / name, as_stream(num_shards), per_device_eval_batch_size=4)
    assert np.array_equal(kept_features(tmp_path / "again"), kept_features(tmp_path / "whole"))


def test_files_of_earlier_versions_do_not_stay(tmp_path):
    kept = KeptRows(str(tmp_path), 64, {})
    images = ImagePass(NumberedPhotos(9), lambda number, place: {"value": torch.zeros(64)}, lambda batch: None)
    settings = PassSettings(batch_size=4, num_workers=0, progress=False)
    for clear in (
        kept.remove,
        lambda: kept.fill(images, lambda inputs: inputs["value"], Accelerator(cpu=True), settings),
    ):
        (tmp_path / "incomplete.npy").touch()
        clear()
        assert not (tmp_path / "incomplete.npy").exists()


class Photos(torch.utils.data.Dataset):
    """Photos of anybody's, which aren't read by several at once, and which others hold too."""

    def __init__(self, pictures):
        self.pictures = pictures
        self.threads = set()

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        self.threads.add(threading.get_ident())
        return {"image": self.pictures[index]}


def test_data_sets_of_others_are_read_by_one_thread_and_left_as_they_are(clip_folder, tmp_path):
    for index, example in enumerate(draw_images(9)):
        example["image"].resize((400, 300)).save(tmp_path / f"{index}.jpg")
    photos = Photos([Image.open(tmp_path / f"{index}.jpg") for index in range(9)])
    trainer = make_trainer(clip_folder, tmp_path / "run", photos, num_crops=1)
    photos.threads.clear()
    trainer.train()
    assert photos.threads == {threading.get_ident()}
    for index, picture in enumerate(photos.pictures):
        assert picture.size == (400, 300)
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(tmp_path / f"{index}.jpg")))


def test_a_run_on_a_stream_and_what_it_leaves(clip_folder, tmp_path, capsys):
    trainer = make_trainer(clip_folder, tmp_path, as_stream(3), disable_tqdm=False)
    run_adapt(trainer.model, as_stream(3), trainer.args, draw_images(6))
    printed = capsys.readouterr()
    assert "Each 1000 photos of the stream: less than a minute on this machine." in printed.out
    assert "Features of the images: 24photo [" in printed.err
    assert "to 24 images without labels" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "report" / "run.json").read_text())["num_images"] == NUM_IMAGES
    page = (tmp_path / "report.html").read_text()
    assert "Frequencies with standard errors" in page and "This run knows no label of single images" in page
    assert "Mean confidence at the end" not in page
    assert not (tmp_path / "pseudo_labels.csv").exists()


def test_the_command(inputs, tmp_path):
    table = draw_images(NUM_IMAGES)
    table.to_parquet(tmp_path / "shard.parquet")
    options = {"train_dir": tmp_path / "shard.parquet", "descriptions": inputs / "descriptions.json", "num_crops": 0}
    options |= {"recipe": "quick", "num_train_epochs": 0}
    for name, streaming in (("images", False), ("stream", True)):
        command.main(flags(inputs, tmp_path / name, streaming=streaming, **options))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("images", "stream"))
    assert all(value.equal(other[name]) for name, value in one.items())
    with pytest.raises(SystemExit, match=r"--streaming true and a class mixture .* Set --num_train_epochs 0"):
        command.main(flags(inputs, tmp_path / "new", streaming=True, **{**options, "num_train_epochs": 1}))


def test_rows_do_not_pile_up_in_memory(tmp_path):
    """Forty thousand rows of 256 bytes go through, of a shard whose end isn't known before."""
    num_rows = 40_000

    class Endless(NumberedPhotos):
        def __init__(self):
            super().__init__(num_rows)
            self.total = None

    def read(number, place):
        return {"value": torch.full((64,), float(number))}

    kept = KeptRows(str(tmp_path / "rows"), 64, {})
    images = ImagePass(Endless(), read, lambda batch: None, in_threads=False)
    settings = PassSettings(batch_size=256, num_workers=0, progress=False)
    accelerator = Accelerator(cpu=True)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    kept.fill(images, lambda inputs: inputs["value"], accelerator, settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < num_rows * 256 / 2 and pa.total_allocated_bytes() - before < 2**20
    assert (kept.read(slice(None)) == np.arange(num_rows)[:, None]).all()


def test_a_full_disk_is_found_before_the_pass(tmp_path, monkeypatch):
    """There is room for the file, but not for the parts that it is made of too."""
    kept = KeptRows(str(tmp_path / "rows"), 64, {})
    free = SimpleNamespace(free=150 * 256)
    monkeypatch.setattr("microclip_hf.training.kept_rows.shutil.disk_usage", lambda folder: free)
    images = ImagePass(NumberedPhotos(100), lambda number, place: {"value": torch.zeros(64)}, lambda batch: None)
    settings = PassSettings(batch_size=10, num_workers=0, progress=False)
    with pytest.raises(OSError, match="The numbers of 100 images, 64 each, need"):
        kept.fill(images, lambda inputs: pytest.fail("it is computed"), Accelerator(cpu=True), settings)
    free.free = 200 * 256
    kept.fill(images, lambda inputs: inputs["value"], Accelerator(cpu=True), settings)
    assert kept.num_rows == 100


def test_what_all_machines_have():
    one, other = WrittenRows(), WrittenRows()
    one.parts[0], other.parts[0] = [(0, 4), (4, 8), (8, 12)], [(8, 12), (0, 4)]
    one.ends |= {0: 12, 1: 3}
    other.ends |= {0: 12}
    common = WrittenRows.in_all([one, other])
    assert list(common.gaps(0)) == [(4, 8)] and common.ends == {0: 12} and common.num_rows == 8
    assert list(common.gaps(1)) == [(0, None)]


def test_a_stream_of_pictures_without_features(clip_folder, tmp_path):
    """As `datasets` hands on what a generator gives."""
    stream = IterableDataset.from_generator(lambda: ({"image": row["image"]} for row in draw_images(9)))
    images = train(clip_folder, tmp_path / "images", draw_images(9).remove_columns("label"))
    assert_same_weights(images, train(clip_folder, tmp_path / "stream", stream))
