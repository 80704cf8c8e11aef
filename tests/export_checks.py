"""An exported model against the one in PyTorch, wherever float64 knows an image's cut for sure."""

import numpy as np
import torch
from exact_cut import known_masks
from tolerances import within


@torch.no_grad()
def assert_agrees(logits, masks, model, pixel_values):
    """Masks and logits are the model's on every image with a known mask; return how many have one."""
    expected = model(pixel_values, output_patch_embeds=True)
    known = {i: mask for i, mask in enumerate(known_masks(expected.patch_embeds, model.config)) if mask is not None}
    assert len(logits) == len(pixel_values)
    for i, mask in known.items():
        if masks is not None:
            np.testing.assert_array_equal(masks[i], mask)
        np.testing.assert_allclose(logits[i], expected.logits[i], **within(model.logit_scale))
    return len(known)


def run_onnx(path, pixel_values):
    """Logits and masks of onnxruntime on a CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits", "saliency_mask"], {"pixel_values": pixel_values.numpy()})
