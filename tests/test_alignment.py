"""Distribution alignment in a run, against its definition, and what a model keeps of it."""

import math

import numpy as np
import pytest
import torch
from adaptation import adapt
from tiny_inputs import LOGIT_SCALE
from tolerances import LOSS, assert_clear, within
from torch.testing import assert_close

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.training.labeler import ALIGNED_BATCHES


pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def aligned(clip_folder, tmp_path_factory):
    return adapt(clip_folder, tmp_path_factory.mktemp("aligned"), distribution_alignment=True)


def test_labels_are_those_of_the_definition(aligned, monkeypatch):
    """Both heads' probabilities over the means of the batches so far, in float64; the older, the less they count."""
    monkeypatch.setattr(aligned.state, "global_step", 0)
    aligned.labeler.head_means.log_means = None
    mean, ratio, scale = None, aligned.args.prior_ratio, float(aligned.model.logit_scale)
    recorded, batches = [], list(aligned.get_train_dataloader())
    hooks = [
        head.register_forward_hook(lambda module, args, output: recorded.append(output.double()))
        for head in (aligned.model.prior_head, aligned.model.classifier)
    ]
    for step, batch in enumerate(batches):
        monkeypatch.setattr(aligned.state, "global_step", step)
        recorded.clear()
        labels = aligned.refine_pseudo_labels(batch)
        heads = (scale * torch.stack(recorded)).softmax(-1)
        weight = 1 / min(step + 1, ALIGNED_BATCHES)
        mean = heads.mean(1) if mean is None else (1 - weight) * mean + weight * heads.mean(1)
        prior, fused = heads / mean.unsqueeze(1) / (heads / mean.unsqueeze(1)).sum(-1, keepdim=True)
        scores = ratio * prior + (1 - ratio) * fused
        assert_clear(scores)
        np.testing.assert_array_equal(labels, scores.argmax(-1))
    for hook in hooks:
        hook.remove()
    assert len(batches) > 1
    assert_close(aligned.model.logit_adjustment.bias.double(), mean[1].log() + math.log(3), atol=LOSS, rtol=0)


def test_a_model_predicts_with_its_adjustment_and_learns_without(aligned, tmp_path):
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    aligned.save_model(tmp_path)
    model = MicroCLIPForImageClassification.from_pretrained(tmp_path)
    bias = model.logit_adjustment.bias
    assert bias.abs().max() > 1e-4 and bias.equal(aligned.model.logit_adjustment.bias)
    adjusted, learning = model.eval()(pixel_values), model.train()(pixel_values)
    assert_close(adjusted.logits, learning.logits - bias, **within(LOGIT_SCALE))
    ratio = model.config.fusion_ratio
    fused = ratio * adjusted.cls_logits + (1 - ratio) * adjusted.fg_logits
    assert_close(learning.logits, fused, **within(LOGIT_SCALE))


def test_without_alignment_nothing_is_adjusted(clip_folder, tmp_path):
    assert not adapt(clip_folder, tmp_path).model.logit_adjustment.bias.any()
