"""Lower precision: where it is used, and where it isn't."""

import pytest
import torch
from adaptation import CLASS_NAMES, adapt
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from microclip_hf import MicroCLIPForImageClassification, modeling_microclip
from microclip_hf.training.attention import WholeAttention


pytestmark = pytest.mark.numerical


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_bf16_run(clip_folder, tmp_path):
    """Close to the float32 run; the trained weights are float32."""
    whole, half = (adapt(clip_folder, tmp_path / str(bf16), bf16=bf16) for bf16 in (False, True))
    assert losses(half) == pytest.approx(losses(whole), rel=2e-2)
    assert losses(half) != losses(whole)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cut_softmaxes_and_logits_stay_in_float32(clip_folder, dtype, monkeypatch):
    model = MicroCLIPForImageClassification.from_clip(clip_folder, CLASS_NAMES, prior_weighting="uniform")
    pixel_values = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    linear, cut = [], []
    model.clip.visual_projection.register_forward_hook(lambda *args: linear.append(args[-1].dtype))
    saliency_mask, eigh = modeling_microclip.saliency_mask, torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: cut.append(matrix.dtype) or eigh(matrix))
    with torch.autocast("cpu", dtype):
        output = model(pixel_values, output_patch_embeds=True)
    assert set(linear) == {dtype} and set(cut) == {torch.float32}
    assert output.logits.dtype == output.cls_logits.dtype == output.cls_embeds.dtype == torch.float32
    assert output.fg_attention.sum(-1).allclose(torch.ones(4), atol=1e-2)
    config = model.config
    own = saliency_mask(
        output.patch_embeds.float(), config.saliency_affinity, config.saliency_threshold, config.saliency_cut
    )
    assert own.equal(output.saliency_mask)


class AttentionTypes(TorchDispatchMode):
    """The precisions of attention's forward and backward passes, in their order."""

    def __init__(self):
        super().__init__()
        self.found = {"forward": [], "backward": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in function.name():
            self.found["backward" if "backward" in function.name() else "forward"].append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_that_trains_is_in_float32_on_a_cpu(clip_folder, tmp_path, checkpointing):
    """That of the labels isn't, nor where it is computed again: there PyTorch would miss the switch."""
    options = {"bf16": True, "autocast_pseudo_labels": True, "gradient_checkpointing": checkpointing}
    with AttentionTypes() as attention:
        trainer = adapt(clip_folder, tmp_path, max_steps=1, **options)
    num_layers = trainer.model.config.clip_config.vision_config.num_hidden_layers
    student = torch.bfloat16 if checkpointing else torch.float32
    labels = 2 * num_layers * [torch.bfloat16]  # of the weak views, then of the crops
    again = num_layers * [student] if checkpointing else []
    expected = [*labels, *num_layers * [student], *again]
    assert attention.found["forward"][-len(expected) :] == expected
    assert attention.found["backward"] == num_layers * [student]


def test_whole_attention_against_float64():
    """Output and gradients are those of the same bfloat16 inputs, rounded once."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, 3, 17, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    doubles = [head.detach().double().requires_grad_() for head in heads]
    weight = torch.randn(2, 3, 17, 8, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), WholeAttention():
        output = scaled_dot_product_attention(*heads, scale=0.5)
    expected = scaled_dot_product_attention(*doubles, scale=0.5)
    assert output.dtype == torch.bfloat16
    results = (output, *torch.autograd.grad(output, heads, weight))
    wanted = (expected, *torch.autograd.grad(expected, doubles, weight.double()))
    for own, other in zip(results, wanted, strict=True):
        # Half a unit of bfloat16's 8 bits, and float32's rounding.
        assert_close(own.double(), other, rtol=2**-8, atol=1e-5)
