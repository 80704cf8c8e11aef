"""What a run says it will cost, by a clock of our own, and that the run is the same without it."""

import itertools
import random

import numpy as np
import pytest
import torch
from adaptation import CLASS_NAMES, draw_images
from safetensors.torch import load_file

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.training.cost import describe_cost, describe_duration
from microclip_hf.training.run import adapt


@pytest.fixture
def make_trainer(clip_folder, tmp_path):
    def make(dataset=None, **settings):
        model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
        settings = {"num_train_epochs": 2, "num_crops": 4, "per_device_train_batch_size": 8, **settings}
        args = MicroCLIPTrainingArguments(str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, **settings)
        return MicroCLIPTrainer(model=model, args=args, train_dataset=draw_images(30) if dataset is None else dataset)

    return make


def cost(trainer, seconds=10):
    """By a clock on which all that is timed takes so many seconds."""
    return describe_cost(trainer, list(draw_images(2)), itertools.count(0, seconds).__next__)


@pytest.mark.parametrize(
    ("settings", "amount", "minutes"),
    [
        # Each 10 s: views, the weak view, four crops, and the strong view three times.
        ({}, "30 photos x 2 epochs", 60 * 90 / 60),
        ({"num_train_epochs": 0.5}, "30 photos x 0.5 epochs", 15 * 90 / 60),
        ({"num_crops": 0}, "30 photos x 2 epochs", 60 * 50 / 60),
        ({"max_steps": 5, "gradient_accumulation_steps": 2}, "5 steps x 16 photos", 80 * 90 / 60),
        ({"dataloader_num_workers": 2}, "30 photos x 2 epochs", 60 * 85 / 60),
        # Once views and five crops, then each time views, the weak view, and the strong one.
        ({"prior_refresh": "never"}, "30 photos x 2 epochs", (30 * 60 + 60 * 50) / 60),
    ],
)
def test_the_pieces_make_up_the_run(make_trainer, settings, amount, minutes):
    expected = f"{minutes:.0f} min" if minutes <= 120 else f"{minutes / 60:.0f} hours"
    assert cost(make_trainer(**settings)) == f"{amount}: about {expected} on this machine."


@pytest.mark.parametrize(("seconds", "number"), [(0.02, 8), (0.045, 4)])
def test_a_view_costs_its_share_of_those_encoded_at_once(make_trainer, seconds, number):
    """These are the 8 images of a step, or as many as 0.2 s allow."""
    # For each of the 800,000: making views, then the weak view, four crops, and the strong view three times.
    hours = 800_000 * (seconds + 8 * seconds / number) / 3600
    trainer = make_trainer(max_steps=100_000)
    assert cost(trainer, seconds) == f"100000 steps x 8 photos: about {hours:.0f} hours on this machine."


def test_streams_and_views(make_trainer):
    """A stream isn't read; what holds views of its own isn't timed."""
    stream = make_trainer(draw_images(6).to_iterable_dataset(), max_steps=2)
    stream.train_dataset.dataset = None
    assert cost(stream) == "2 steps x 8 photos: about 24 min on this machine."
    once = make_trainer(draw_images(6).to_iterable_dataset(), num_train_epochs=0, class_mixture=True)
    # Views, and five of them encoded with both embeddings.
    assert cost(once) == f"Each 1000 photos of the stream: about {60_000 / 3600:.0f} hours on this machine."
    assert describe_cost(stream, [], itertools.count().__next__) is None
    images = make_trainer().train_dataset
    assert cost(make_trainer([images[index] for index in range(8)])) is None
    assert cost(make_trainer(torch_compile=True)) is None


def test_photos_that_cannot_be_read_are_not_timed(make_trainer):
    trainer = make_trainer()
    photos = [{"image": {"path": None, "bytes": b"no image"}}] * 8
    trainer.train_dataset.dataset = photos
    assert cost(trainer) is None
    assert not trainer.train_dataset.unreadable.any()
    trainer.train_dataset.dataset = [*photos[:4], *draw_images(4)]
    assert cost(trainer) == "8 photos x 2 epochs: about 24 min on this machine."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((1, "less than a minute"), (59.9, "less than a minute"), (60, "about 1 min"), (1450, "about 24 min")),
        *((7200, "about 120 min"), (9000, "about 2 hours"), (360000, "about 100 hours")),
    ],
)
def test_durations(seconds, text):
    assert describe_duration(seconds) == text


def test_the_run_is_the_same_to_the_last_bit(clip_folder, tmp_path, monkeypatch, capsys):
    def run(name):
        random.seed(1)
        np.random.seed(1)
        model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
        args = MicroCLIPTrainingArguments(
            str(tmp_path / name), use_cpu=True, num_train_epochs=1, num_crops=2, per_device_train_batch_size=8
        )
        adapt(model, draw_images(), args, report=False)
        return load_file(tmp_path / name / "model.safetensors"), random.random(), np.random.random()

    with_cost = run("with")
    assert "20 photos x 1 epoch: less than a minute on this machine." in capsys.readouterr().out
    monkeypatch.setattr("microclip_hf.training.run.describe_cost", lambda trainer, examples: None)
    without = run("without")
    assert "on this machine" not in capsys.readouterr().out
    assert with_cost[1:] == without[1:]
    assert all(value.equal(without[0][name]) for name, value in with_cost[0].items())


def test_nothing_is_left_behind(make_trainer):
    trainer = make_trainer()
    trainer.model.train()
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert describe_cost(trainer, [])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(parameter.grad is None for parameter in trainer.model.parameters()) and trainer.model.training
    assert all(value.equal(weights[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.labeler.head_means.log_means is None and trainer.class_means.log_mean is None
