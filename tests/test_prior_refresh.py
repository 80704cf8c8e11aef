"""The multi-view prior kept for good: the same scores, the same runs, however they are interrupted."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adaptation import CLASS_NAMES, adapt, draw_images
from conftest import DESCRIPTIONS
from decisions import ClearDecisions
from test_invariance import THREE_BATCHES, assert_resume_is_exact, assert_same_run, run_processes
from tolerances import COSINE, within
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.training.kept_rows import COMPLETE_FILE, KeptRows
from microclip_hf.training.labeler import PRIOR_DIR
from microclip_hf.training.view_datasets import ViewDataset, ViewSettings


def kept_scores(folder):
    return torch.tensor(np.load(folder / "_prior" / COMPLETE_FILE))


def scores64(model, num_images=20):
    """Multi-view scores by plain CLIP features of the views of the first epoch, in float64."""
    dataset = ViewDataset(draw_images(num_images), ViewSettings(32, 2, (0.5, 0.9), 42))
    model = model.double().eval()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    scores = []
    for example in dataset:
        views = torch.tensor(np.concatenate([example["weak"][None], example["crops"]])) / 255
        with torch.no_grad():
            features = model.clip.get_image_features(((views - mean) / std).double()).pooler_output
        weak, *crops = normalize(features, dim=-1)
        relevance = torch.stack([crop @ weak for crop in crops]).softmax(0)
        composite = sum(share * crop for share, crop in zip(relevance, crops, strict=True))
        scores.append(normalize(composite, dim=-1) @ normalize(model.prior_head.weight, dim=-1).T)
    return torch.stack(scores)


@pytest.mark.numerical
def test_the_prior_is_that_of_the_first_weights(clip_folder, tmp_path):
    trainer = adapt(clip_folder, tmp_path, prior_refresh="never", num_train_epochs=1)
    clip = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
    assert_close(kept_scores(tmp_path).double(), scores64(clip), **within())
    assert not torch.allclose(kept_scores(tmp_path).double(), scores64(trainer.model), atol=1e-4)


@pytest.mark.numerical
def test_without_movement_it_is_the_prior_of_each_step(clip_folder, tmp_path):
    options = {"learning_rate": 0.0, "lr_scheduler_type": "constant", "num_train_epochs": 1}
    with ClearDecisions():
        reference = adapt(clip_folder, tmp_path / "step", **options)
    trainer = adapt(clip_folder, tmp_path / "never", prior_refresh="never", **options)
    assert_same_run(trainer.state.log_history, trainer.model.state_dict(), reference)


@pytest.mark.numerical
def test_it_moves_with_the_weights(clip_folder, tmp_path):
    """Two different runs, by which one sees that the setting isn't ignored."""
    runs = [adapt(clip_folder, tmp_path / name, prior_refresh=name) for name in ("step", "never")]
    confidences = [run.state.log_history[4]["pseudo_label_confidence"] for run in runs]
    assert abs(confidences[1] - confidences[0]) > 10 * COSINE


@pytest.mark.parametrize("step", [1, 3, 4])
def test_resume_is_exact(whole_run, clip_folder, tmp_path, step):
    options = {"save_strategy": "steps", "save_steps": 1, "prior_refresh": "never"}
    assert_resume_is_exact(whole_run, clip_folder, tmp_path, step, **options)


def test_two_process_runs(clip_folder, tmp_path):
    options = {**THREE_BATCHES, "prior_refresh": "never"}
    (run,) = run_processes(clip_folder, tmp_path, 2, options | {"per_device_train_batch_size": 4})
    with ClearDecisions():
        reference = adapt(clip_folder, tmp_path / "one", **options)
    assert_same_run(*run, reference)
    assert_close(kept_scores(tmp_path / "0"), kept_scores(tmp_path / "one"), **within())


@pytest.mark.numerical
def test_workers_that_outlive_an_epoch(clip_folder, tmp_path):
    with ClearDecisions():
        reference = adapt(clip_folder, tmp_path / "one", prior_refresh="never")
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    trainer = adapt(clip_folder, tmp_path / "two", prior_refresh="never", **workers)
    assert_same_run(trainer.state.log_history, trainer.model.state_dict(), reference)


def test_a_fresh_run_forgets_the_prior_of_another(clip_folder, tmp_path):
    (tmp_path / "_prior").mkdir()
    np.save(tmp_path / "_prior" / COMPLETE_FILE, np.full((20, 3), np.nan, np.float32))
    options = {"per_device_eval_batch_size": 8, "dataloader_drop_last": True}
    adapt(clip_folder, tmp_path, prior_refresh="never", num_train_epochs=1, **options)
    assert kept_scores(tmp_path).isfinite().all()


def test_no_crops_are_made_where_the_prior_is_kept(clip_folder, tmp_path):
    trainer = adapt(clip_folder, tmp_path, prior_refresh="never", num_train_epochs=1)
    example = trainer.train_dataset[5]
    assert example["crops"].shape == (0, 3, 32, 32)
    assert torch.tensor(example["prior_scores"]).equal(kept_scores(tmp_path)[5])
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (3, 1)])
    assert batch["prior_scores"].equal(kept_scores(tmp_path)[[3, 1]])


def test_views_do_not_depend_on_what_is_kept(tmp_path):
    dataset = ViewDataset(draw_images(4), ViewSettings(32, 2, (0.5, 0.9), 0, max_corrupt_share=0.25))
    expected = dataset[2]
    np.save(tmp_path / COMPLETE_FILE, np.array([[0, 0, 0]] * 3 + [[np.nan] * 3], np.float32))
    dataset.kept_prior = KeptRows(str(tmp_path), 3, {})
    assert all(np.array_equal(dataset[2][name], expected[name]) for name in ("weak", "strong"))
    assert dataset[3]["index"] == 0 and dataset.unreadable.tolist() == [False, False, False, True]
    dataset.kept_prior = None
    assert np.array_equal(dataset[2]["crops"], expected["crops"])


def make_trainer(clip_folder, folder, dataset, **options):
    model = MicroCLIPForImageClassification.from_clip(
        clip_folder, CLASS_NAMES, descriptions=DESCRIPTIONS, prior_weighting="uniform"
    )
    args = MicroCLIPTrainingArguments(str(folder), use_cpu=True, prior_refresh="never", **options)
    return MicroCLIPTrainer(model=model, args=args, train_dataset=dataset)


def test_what_cannot_be_counted_is_refused(clip_folder, tmp_path):
    views = ViewDataset(draw_images(3), ViewSettings(32, 1, (0.5, 0.9), 0))
    for dataset in (draw_images(6).to_iterable_dataset(), [views[0], views[1]]):
        with pytest.raises(ValueError, match=r"prior_refresh='never' keeps a prior for each image.*'step'"):
            make_trainer(clip_folder, tmp_path, dataset, max_steps=1)
    with pytest.raises(ValueError, match="one of step, never"):
        MicroCLIPTrainingArguments(str(tmp_path), prior_refresh="always")


def test_a_prior_of_other_images_or_settings_is_refused(clip_folder, tmp_path):
    adapt(clip_folder, tmp_path, prior_refresh="never", save_strategy="epoch", num_train_epochs=1)
    for other in ({"num_crops": 3}, {"seed": 1}):
        with pytest.raises(
            ValueError, match=r'holds numbers of .*"images": 20, .*Resume with what the run began with'
        ):
            adapt(clip_folder, tmp_path, prior_refresh="never", resume=True, **other)
    with pytest.raises(ValueError, match="began with 20 images, and now there are 9"):
        adapt(clip_folder, tmp_path, prior_refresh="never", resume=True, num_images=9)


def test_a_full_disk_is_found_before_anything_is_computed(clip_folder, tmp_path, monkeypatch):
    """A disk that has room for the model and its checkpoints, and the prior's own."""
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 if str(folder).endswith(PRIOR_DIR) else 1e12)
    )
    with pytest.raises(OSError, match=r"need 0.0 GB in .*_prior, where 0.0 GB are free"):
        adapt(clip_folder, tmp_path, prior_refresh="never")
