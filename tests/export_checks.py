"""An exported model against the one in PyTorch, wherever float64 knows an image's cut for sure."""

import numpy as np
import torch
from test_saliency import known_mask

from microclip_hf.saliency import EPSILON


def known_masks(patch_embeds, config):
    """By another eigensolver, in float64; None where a mask hangs on float32's rounding."""
    masks = []
    for patches in patch_embeds.double().numpy():
        if config.saliency_affinity == "cosine":
            patches /= np.linalg.norm(patches, axis=-1, keepdims=True)
        affinity = patches @ patches.T
        near = np.abs(affinity - config.saliency_threshold).min() < 1e-5 * np.abs(affinity).max()
        graph = np.where(affinity > config.saliency_threshold, 1, EPSILON)
        masks.append(None if near else known_mask(graph, config.saliency_cut))
    return masks


@torch.no_grad()
def assert_agrees(logits, masks, model, pixel_values):
    """Masks are equal and logits within 1e-4 on every image with a known mask; return how many have one."""
    expected = model(pixel_values, output_patch_embeds=True)
    known = {i: mask for i, mask in enumerate(known_masks(expected.patch_embeds, model.config)) if mask is not None}
    assert len(logits) == len(pixel_values)
    for i, mask in known.items():
        if masks is not None:
            np.testing.assert_array_equal(masks[i], mask)
        np.testing.assert_allclose(logits[i], expected.logits[i], atol=1e-4)
    return len(known)


def run_onnx(path, pixel_values):
    """Logits and masks of onnxruntime on a CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits", "saliency_mask"], {"pixel_values": pixel_values.numpy()})
