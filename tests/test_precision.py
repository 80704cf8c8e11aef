"""Lower precision: where it is used, and where it isn't."""

import pytest
import torch
from adaptation import CLASS_NAMES, adapt

from microclip_hf import MicroCLIPForImageClassification, modeling_microclip


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
