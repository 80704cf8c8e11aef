"""What is known before a run trains is an error before it; what goes wrong later is one line and costs nothing."""

import collections
import errno
import json
import os
import shutil
import sys
import tempfile
import warnings

import pytest
import torch
from adaptation import CLASS_NAMES, adapt, draw_images
from datasets import load_dataset
from safetensors.torch import load_file
from test_adapt import UNIFORM, flags
from tiny_inputs import make_clip, make_tokenizer
from tqdm import tqdm

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.commands import INTERRUPTED, command_frame
from microclip_hf.commands import adapt as command
from microclip_hf.saliency import NonFiniteError


Usage = collections.namedtuple("Usage", "total used free")


def make_trainer(clip_folder, folder, dataset=None, **kwargs):
    model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
    args = MicroCLIPTrainingArguments(str(folder), use_cpu=True, **kwargs)
    return MicroCLIPTrainer(model=model, args=args, train_dataset=draw_images(4) if dataset is None else dataset)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"dataloader_drop_last": True},
            ValueError,
            "4 images don't fill one of 64. Lower per_device_train_batch_size",
        ),
        ({"num_train_epochs": 0}, ValueError, "num_train_epochs is 0"),
        ({"lr_scheduler_kwargs": {"mim_lr": 1}}, ValueError, "lr_scheduler_kwargs {'mim_lr': 1}"),
        ({"optim": "adamw_bnb_8bit"}, ImportError, "bitsandbytes"),
        ({"optim": "galore_adamw"}, (ImportError, ValueError), "(?i)galore|optim_target_modules"),
    ],
)
def test_settings_without_a_step_to_take(clip_folder, tmp_path, kwargs, error, message):
    with pytest.raises(error, match=message):
        make_trainer(clip_folder, tmp_path, **kwargs).check_run()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "# Notes of three weeks"),
        ("descriptions.json", '{"other": ["A thing of another run."]}'),
        ("pseudo_labels.csv", "corrected by hand"),
        ("modeling_microclip.py", "print(1)"),
        ("model-00001-of-00002.safetensors", "weights"),
    ],
)
def test_what_lies_in_the_output_folder_is_never_overwritten(inputs, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (tmp_path / "names.txt").write_text("mine")  # nothing that a run writes
    with pytest.raises(SystemExit, match=f"holds '{name}', which this run would overwrite"):
        command.main(flags(inputs, tmp_path))
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_folder_that_cannot_be_written(inputs, tmp_path, monkeypatch, exists):
    """Found before the model is loaded; nobody is root on a read-only disk."""

    def refuse(**kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    folder = tmp_path if exists else tmp_path / "new" / "one"
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(MicroCLIPForImageClassification, "from_clip", None)
    with pytest.raises(SystemExit, match=f"output_dir {folder} can't be written: Read-only file system"):
        command.main(flags(inputs, folder))


def test_an_output_folder_below_a_file(inputs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="can't be written: Not a directory"):
        command.main(flags(inputs, tmp_path / "file" / "out"))


def test_a_disk_that_is_too_small_for_the_checkpoints(tokenizer, tmp_path, monkeypatch):
    """What two checkpoints, a third while it is written, and the model weigh, measured on files."""
    make_tokenizer().save_pretrained(tmp_path / "wide")
    make_clip(tokenizer, width=256).save_pretrained(tmp_path / "wide")
    measured = make_trainer(tmp_path / "wide", tmp_path / "measured", num_train_epochs=1, num_crops=0)
    measured.train()
    measured.save_model()
    (checkpoint,) = (tmp_path / "measured").glob("checkpoint-*")
    checkpoint_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    model_bytes = (tmp_path / "measured" / "model.safetensors").stat().st_size
    trainer = make_trainer(tmp_path / "wide", tmp_path / "new", num_train_epochs=9)
    for limit, kept in ((2, 3), (1, 2), (None, 9)):
        trainer.args.save_total_limit = limit
        needed = model_bytes + kept * checkpoint_bytes
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=1.1 * needed: Usage(free, 0, free))
        trainer.check_run()
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=0.9 * needed: Usage(free, 0, free))
        with pytest.raises(ValueError, match=f"{kept} checkpoints need about .* Make room, lower save_total_limit"):
            trainer.train()
    trainer.args.save_strategy = "no"
    trainer.check_run()


@pytest.fixture(scope="module")
def interrupted(inputs, tmp_path_factory):
    """An epoch of two of a run on photos, with descriptions, which left a checkpoint."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(inputs / "photos", folder / "photos")
    command.main(flags(folder, folder / "out", **options_of(inputs, folder), report=False))
    return folder


def options_of(inputs, folder, **options):
    texts = {"class_names": inputs / "names.txt", "descriptions": inputs / "descriptions.json"}
    return {
        "model_name_or_path": inputs / "clip",
        "train_dir": folder / "photos",
        "config_overrides": UNIFORM,
        **texts,
        **options,
    }


@pytest.fixture
def resume(inputs, interrupted, tmp_path):
    """Go on in a copy of its folder, where other things lie than the run began with."""
    folder = tmp_path / "copy"
    shutil.copytree(interrupted, folder)

    def go_on(**options):
        more = {"num_train_epochs": 2, "resume_from_checkpoint": True, "report": False}
        command.main(flags(folder, folder / "out", **options_of(inputs, folder, **options), **more))
        return folder / "out"

    go_on.photos = folder / "photos"
    return go_on


def test_resuming_with_the_same_photos_in_another_place(resume):
    rows = (resume() / "pseudo_labels.csv").read_text().splitlines()
    assert len(rows) == 49


def test_resuming_with_fewer_photos(resume):
    for path in sorted(resume.photos.iterdir())[:24]:
        path.unlink()
    with pytest.raises(SystemExit, match=r"began with 48 images, and now there are 24\. Resume"):
        resume()


def test_resuming_with_another_photo(resume):
    photo = sorted(resume.photos.iterdir())[20]
    photo.rename(photo.with_name("new.png"))
    with pytest.raises(SystemExit, match="began with images of other names, or in another order"):
        resume()


def test_resuming_with_other_descriptions(resume, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({name: ["Something else altogether."] for name in CLASS_NAMES}))
    with pytest.raises(SystemExit, match="began with another CLIP, other descriptions or other templates"):
        resume(descriptions=tmp_path / "other.json")


def test_resuming_with_another_architecture(resume):
    overrides = '{"prior_weighting": "uniform", "fg_query": "cls"}'
    with pytest.raises(SystemExit, match="had fg_query='saliency', and now it is 'cls'"):
        resume(config_overrides=overrides)


def test_resuming_from_a_folder_that_is_not_there(inputs, tmp_path):
    with pytest.raises(SystemExit, match="--resume_from_checkpoint no/such: there is no such folder"):
        command.main(flags(inputs, tmp_path, resume_from_checkpoint="no/such"))


def test_resuming_on_a_stream_or_in_memory_is_as_before(clip_folder, tmp_path):
    adapt(clip_folder, tmp_path, num_train_epochs=1, save_strategy="epoch")
    adapt(clip_folder, tmp_path, num_train_epochs=2, save_strategy="epoch", resume=True)
    with pytest.raises(ValueError, match="began with 20 images, and now there are 19"):
        adapt(clip_folder, tmp_path, num_images=19, resume=True)


def test_divergence_names_the_learning_rate(inputs, tmp_path):
    options = {"per_device_train_batch_size": 8, "config_overrides": UNIFORM}
    with pytest.raises(SystemExit, match=r"Training diverged: .*lower learning_rate; it is 1e\+30"):
        command.main(flags(inputs, tmp_path, learning_rate=1e30, **options))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("strategy", ["no", "epoch", "steps"])
def test_weights_that_are_not_finite_replace_no_checkpoint(clip_folder, tmp_path, strategy):
    """Infinite from the very last step, which no loss shows any more."""
    kwargs = {"save_strategy": strategy, "save_steps": 1, "per_device_train_batch_size": 20, "save_total_limit": 1}

    class Diverging(MicroCLIPTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 1:
                model.classifier.weight.grad.fill_(torch.inf)
            return loss

    trainer = make_trainer(clip_folder, tmp_path, draw_images(), num_train_epochs=2, num_crops=1, **kwargs)
    trainer.__class__ = Diverging
    with pytest.raises(ValueError, match="Training diverged: the weights hold NaN or infinite values after step 2"):
        trainer.train()
    weights = [load_file(path) for path in tmp_path.glob("checkpoint-*/model.safetensors")]
    assert len(weights) == (0 if strategy == "no" else 1)
    assert all(value.isfinite().all() for state in weights for value in state.values())


def test_a_step_that_fp16_skips_is_no_divergence(clip_folder, tmp_path):
    """Its loss isn't finite, the weights are."""
    trainer = make_trainer(clip_folder, tmp_path)
    trainer.log({"loss": float("nan")})
    trainer.model.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="the weights hold NaN or infinite values after step 0"):
        trainer.log({"loss": float("nan")})


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_photos_are_one_line(inputs, tmp_path, workers):
    """In training, and where another process reads them."""
    shutil.copytree(inputs / "photos", tmp_path / "photos")
    for index in range(6):
        (tmp_path / "photos" / f"{index}.png").write_bytes(b"<html>404</html>")
    options = {"train_dir": tmp_path / "photos", "dataloader_num_workers": workers, "config_overrides": UNIFORM}
    with pytest.raises(SystemExit) as end:
        command.main(flags(inputs, tmp_path / "out", **options))
    message = str(end.value.code)
    assert message.startswith("microclip adapt: ") and len(message.splitlines()) == 1
    assert "of 54 images can't be read" in message and "raise max_corrupt_share" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("is wrong"), "microclip try: is wrong"),
        (
            OSError(errno.ENOSPC, "No space left on device", "file"),
            r"microclip try: \[Errno 28\] No space left .*'file'",
        ),
        (ImportError("pip install galore"), "microclip try: pip install galore"),
        (RuntimeError(), "microclip try: RuntimeError"),
    ],
)
def test_expected_errors_are_one_line(error, message):
    with pytest.raises(SystemExit, match=message), command_frame("try", "nothing"):
        raise error


def test_an_error_has_a_line_of_its_own(capsys):
    """Also where it cuts a progress bar short."""
    with pytest.raises(SystemExit), command_frame("try", "nothing"):
        bar = tqdm([1, 2])
        next(iter(bar))
        raise ValueError
    assert capsys.readouterr().err.endswith("\n")


def test_warnings_are_one_line():
    place = ("two photos are passed over", UserWarning, "data.py", 64)
    with command_frame("try", "nothing"):
        assert warnings.formatwarning(*place) == "microclip try: warning: two photos are passed over\n"
    assert "data.py:64" in warnings.formatwarning(*place)


def test_a_pipe_that_breaks_elsewhere_is_told():
    with pytest.raises(SystemExit, match="microclip try: the worker is gone"), command_frame("try", "nothing"):
        raise BrokenPipeError("the worker is gone")


def test_a_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("MICROCLIP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is wrong"), command_frame("try", "nothing"):
        raise ValueError("is wrong")


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError), command_frame("try", "nothing"):
        raise KeyError("name")


@pytest.mark.parametrize(("text", "said"), [((), "nothing was written"), (("go on",), "go on")])
def test_an_interrupt_says_what_it_leaves(capsys, text, said):
    with pytest.raises(SystemExit) as end, command_frame("try", "nothing was written"):
        raise KeyboardInterrupt(*text)
    assert end.value.code == INTERRUPTED and f"interrupted; {said}." in capsys.readouterr().err


def test_printing_does_not_fail_for_want_of_a_letter(tmp_path, monkeypatch):
    with open(tmp_path / "printed", "w", encoding="cp1252") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with command_frame("try", "nothing"):
            print("é 红")
    assert (tmp_path / "printed").read_text(encoding="cp1252") == "é \\u7ea2" + os.linesep


def test_facts_of_images(inputs, clip_folder, tmp_path):
    """Photos may lie elsewhere when a run goes on, in the same order."""
    photos = load_dataset("imagefolder", data_dir=str(inputs / "photos"), split="train")
    args = {"num_train_epochs": 1, "save_strategy": "epoch", "num_crops": 1}
    adapt(clip_folder, tmp_path, photos, **args)
    with pytest.raises(ValueError, match="images of other names, or in another order"):
        adapt(clip_folder, tmp_path, photos.select(range(47, -1, -1)), resume=True, **args)
