"""The benchmark's plain step gives the published numbers too, so it is a fair thing to compare with."""

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import PUBLISHED_SCALE
from exact_cut import known_masks
from naive_step import NaiveStep, saliency_mask
from test_golden import recorded
from tolerances import LOSS, assert_clear, assert_weights_close, within
from torch.testing import assert_close

from microclip_hf import MicroCLIPConfig
from microclip_hf.text_heads import build_heads


pytestmark = pytest.mark.numerical


@pytest.fixture
def golden_step(golden, golden_features):
    """As benchmarks use it: without the text tower."""
    clip = copy.deepcopy(golden.clip)
    del clip.text_model
    clip.text_projection = None
    step = NaiveStep(
        clip,
        *build_heads(*golden_features),
        logit_scale=PUBLISHED_SCALE,
        learning_rate=golden.tensors["train.lr"][0].item(),
        prior_ratio=golden.meta["gamma"],
        fusion_ratio=golden.meta["fusion"],
    )
    step.optimizer.param_groups[0]["weight_decay"] = golden.meta["weight_decay"]
    return step


def views_of(golden, step):
    views = golden.tensors[f"views.{step}"]
    return {"weak": views[:, 0], "strong": views[:, 1], "crops": views[:, 2:]}


@torch.no_grad()
def test_golden_stages(golden, golden_step):
    views = views_of(golden, 0)
    output = golden_step.vision_tower(views["weak"])
    stage = {
        "global": golden_step.cls_embeds(output),
        "local": golden_step.fg_embeds(output),
        "pseudo_logits": golden_step.pseudo_scores(views["weak"], views["crops"]),
    }
    for name, value in stage.items():
        assert_close(value, golden.tensors[f"stage.{name}"], **within(), msg=lambda text, name=name: f"{name}: {text}")
    tokens = golden.tensors["stage.patch_tokens"]
    assert_close(golden_step.patch_tokens(output), tokens, **within(tokens.abs().max()))
    assert saliency_mask(golden_step.patch_tokens(output)).equal(golden.tensors["stage.mask"])
    eval_logits = golden_step.logits(views["strong"])
    assert_close(eval_logits, golden.tensors["stage.eval_logits"], **within(PUBLISHED_SCALE))


@torch.no_grad()
def assert_certain(golden_step, weak, crops, strong):
    """No label and no mask of a step hangs on rounding; the masks are those of float64."""
    assert_clear(golden_step.pseudo_scores(weak, crops))
    for views in (weak, strong):
        tokens = golden_step.patch_tokens(golden_step.vision_tower(views))
        masks = known_masks(tokens, MicroCLIPConfig())
        assert not any(mask is None for mask in masks)
        assert saliency_mask(tokens).equal(torch.tensor(np.stack(masks)))


def test_golden_training(golden, golden_step):
    losses, labels, rates = [], [], golden.tensors["train.lr"].tolist()
    epoch_starts = list(itertools.accumulate(golden.meta["epochs_of_steps"]))
    untrained = {name: p.clone() for name, p in golden_step.clip.named_parameters() if not p.requires_grad}
    for step, rate in enumerate(rates):
        if step in epoch_starts:
            golden_step.start_epoch()
        golden_step.optimizer.param_groups[0]["lr"] = rate
        assert_certain(golden_step, **views_of(golden, step))
        loss, pseudo_labels = golden_step.step(**views_of(golden, step))
        losses.append(loss)
        labels.append(pseudo_labels)
    assert torch.stack(labels).equal(golden.tensors["train.pseudo_labels"])
    assert_close(torch.tensor(losses), golden.tensors["train.losses"], rtol=LOSS, atol=0)

    finals = {name: p.detach() for name, p in golden_step.clip.named_parameters() if p.requires_grad}
    finals |= {f"{n}.weight": getattr(golden_step, n).detach() for n in ("query_proj", "key_proj", "value_proj")}
    finals["classifier"] = golden_step.classifier.detach()
    assert_weights_close(finals, recorded(golden, "train.final."), sum(rates))
    for name, value in untrained.items():
        parameter = golden_step.clip.get_parameter(name)
        assert parameter.grad is None and parameter.equal(value)


def test_logit_scale_is_the_checkpoints_own(clip):
    heads = torch.eye(3, clip.config.projection_dim)
    assert NaiveStep(clip, heads, heads).logit_scale == clip.logit_scale.exp().item()


# The last two: each patch like itself only, and two equal blocks, whose eigenvector is nowhere above its deviation.
@pytest.mark.parametrize(
    "patches", [torch.zeros(4, 8), torch.ones(4, 8), torch.eye(4), torch.eye(2).repeat_interleave(4, 0)]
)
def test_no_mask_is_empty(patches):
    assert saliency_mask(patches.repeat(2, 1, 1)).any(-1).all()


def test_blank_images_leave_finite_weights(golden_step):
    size = golden_step.clip.config.vision_config.image_size
    blank = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    golden_step.step(blank, blank.unsqueeze(1), blank)
    assert all(parameter.isfinite().all() for parameter in golden_step.trained)
