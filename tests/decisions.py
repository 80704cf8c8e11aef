"""That what is compared decides nothing by rounding."""

from unittest import mock

import torch
from exact_cut import known_masks
from tolerances import assert_clear
from torch.overrides import TorchFunctionMode

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification, modeling_microclip
from microclip_hf.saliency import saliency_mask


class ClearDecisions(TorchFunctionMode):
    """No argmax of scores and no mask of a model that is computed in here would be another after other rounding.

    Where a run is compared with one that is rounded differently, its inputs must be such; the comparison says nothing
    otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores = []
        self.tokens = []
        self.patch = mock.patch.object(modeling_microclip, "saliency_mask", self._record_tokens)

    def __enter__(self) -> "ClearDecisions":
        self.patch.start()
        return super().__enter__()

    def __exit__(self, error, *args) -> None:
        super().__exit__(error, *args)
        self.patch.stop()
        if error is not None:
            return
        assert self.scores or self.tokens
        for scores in self.scores:
            assert_clear(scores)
        for tokens, config in self.tokens:
            unclear = [index for index, mask in enumerate(known_masks(tokens, config)) if mask is None]
            assert not unclear, f"the masks of the images {unclear} of {len(tokens)} hang on rounding"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.argmax, torch.Tensor.argmax) and args[0].ndim == 2 and args[0].is_floating_point():
            self.scores.append(args[0].detach().clone())
        return function(*args, **(kwargs or {}))

    def _record_tokens(self, patch_embeds, affinity, threshold, statistic):
        config = MicroCLIPConfig(saliency_affinity=affinity, saliency_threshold=threshold, saliency_cut=statistic)
        self.tokens.append((patch_embeds.detach().clone(), config))
        return saliency_mask(patch_embeds, affinity, threshold, statistic)


@torch.no_grad()
def assert_clear_answers(folder, images) -> None:
    """A saved model's answers to PIL images hang on no rounding."""
    model = MicroCLIPForImageClassification.from_pretrained(folder)
    with ClearDecisions():
        logits = model(**model.image_processor(list(images), return_tensors="pt")).logits
    assert_clear(logits)
