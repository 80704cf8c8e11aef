"""Why a model said what it said of a picture: where it looked, and what each of its two paths thought.

These are the model's own numbers, not a theory about them: the salient patches, the weights with which patches make
the [FG] token, and the answers of [CLS] and [FG] alone (arXiv:2510.02270, section 3.2). Of where [CLS] looked, which
sees the whole picture, they say nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..configuration_microclip import default_image_processor
from ..images import cut_strip, to_rgb
from ..modeling_microclip import MicroCLIPForImageClassification
from .patch_grid import PatchGrid


# Red, green and blue of no attention, half of an image's largest, and the largest.
HEAT = np.array([(24, 16, 80), (204, 48, 96), (255, 240, 96)], dtype=np.float32)
# Greys of the hatching over what the model didn't see.
HATCHING = (96, 160)


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a model says of one picture, and why.

    Args:
        image (`PIL.Image.Image`): the picture, upright, RGB, at its own size.
        class_names (`tuple[str, ...]`): the model's classes, in the order of the scores.
        label (`str`): the class of the largest score.
        scores (`np.ndarray` of shape `(num_labels,)`): probabilities, float32, as in `MicroCLIPOutput.logits`.
        cls_scores, fg_scores (`np.ndarray` of shape `(num_labels,)`): probabilities by the [CLS] or [FG] path alone,
            whose logits go through the model's `logit_adjustment`, as the fused ones, which are their weighted mean.
        saliency_mask (`np.ndarray` of shape `(rows, columns)`): the salient patches, bool.
        fg_attention (`np.ndarray` of shape `(rows, columns)`): weight of each patch in the [FG] token, float32.
        null_share (`float`): weight of the null token; with `fg_attention` it sums to 1.
        grid ([`PatchGrid`]): where the patches lie in `image`.
    """

    image: Image.Image
    class_names: tuple[str, ...]
    label: str
    scores: np.ndarray
    cls_scores: np.ndarray
    fg_scores: np.ndarray
    saliency_mask: np.ndarray
    fg_attention: np.ndarray
    null_share: float
    grid: PatchGrid


@torch.no_grad()
def explain(
    model: MicroCLIPForImageClassification,
    images: Sequence[Image.Image],
    batch_size: int = 32,
    interpolate_pos_encoding: bool = False,
) -> list[Explanation]:
    """Predict pictures and say why, with an [`Explanation`] for each, in their order.

    Args:
        model ([`MicroCLIPForImageClassification`]): its image processor prepares the pictures (CLIP's own, where it
            has none). It predicts in evaluation mode and is handed back in the mode that it was in.
        images (`Sequence[PIL.Image.Image]`): of any size and mode.
        batch_size (`int`, *optional*, defaults to 32): pictures at once, neighbours of one prepared size.
        interpolate_pos_encoding (`bool`, *optional*, defaults to `False`): accept prepared sizes other than the
            checkpoint's.

    Raises:
        TypeError, ValueError: if something isn't a picture, has no pixels, or is prepared in a way that can't be
            traced back to it (see [`PatchGrid.locate`]).
    """
    _check(images, batch_size)
    was_training = model.training
    model.eval()
    try:
        explanations = []
        # Neighbours of one prepared size, as a batch has to be; the third of each is the model's input.
        for _, group in groupby(_prepare(model, images), key=lambda prepared: prepared[2].shape):
            for batch in iter(lambda group=group: list(islice(group, batch_size)), []):
                explanations += _explain_batch(model, *zip(*batch, strict=True), interpolate_pos_encoding)
        return explanations
    finally:
        model.train(was_training)


def overlay(
    explanation: Explanation, alpha: float = 0.5, show: Literal["fg_attention", "saliency_mask"] = "fg_attention"
) -> Image.Image:
    """The picture with its explanation drawn over it, RGB, at its own size.

    Args:
        alpha (`float`, *optional*, defaults to 0.5): from 0, the picture alone, to 1, the drawing alone.
        show (`"fg_attention"` or `"saliency_mask"`, *optional*): attention from dark blue (none) to yellow (the
            picture's largest), or what isn't salient darkened. What the model didn't see is hatched.

    Raises:
        ValueError: if `alpha` isn't in [0, 1] or `show` is something else.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1].")
    picture = np.asarray(explanation.image, dtype=np.float32)
    if show == "fg_attention":
        values = explanation.grid.to_image(explanation.fg_attention)
        # Of a picture's own largest: of many patches each has a small share.
        drawing = _heat(values / explanation.fg_attention.max())
    elif show == "saliency_mask":
        values = explanation.grid.to_image(explanation.saliency_mask)
        drawing = picture * values[..., None]
    else:
        raise ValueError(f"show is {show!r}; it must be 'fg_attention' or 'saliency_mask'.")
    drawing = np.where(np.isnan(values)[..., None], _hatching(*values.shape), drawing)
    return Image.fromarray((picture + alpha * (drawing - picture)).round().clip(0, 255).astype(np.uint8))


def _heat(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] or NaN, `(height, width)`, to colours `(height, width, 3)`."""
    places = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, places, channel) for channel in HEAT.T], -1).astype(np.float32)


def _hatching(height: int, width: int) -> np.ndarray:
    """Diagonal stripes, about forty to the longer side, `(height, width, 1)`."""
    stripe = max(1, max(height, width) // 40)
    odd = (np.arange(height)[:, None] + np.arange(width)) // stripe % 2
    return np.take(np.array(HATCHING, dtype=np.float32), odd)[..., None]


def _check(images: Any, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if isinstance(images, Image.Image):
        raise TypeError("images is one picture; pass a list, explain(model, [image]).")
    if not isinstance(images, Sequence):
        raise TypeError(f"images is a {type(images).__name__}; pass a list of pictures.")
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"images[{index}] is a {type(image).__name__}; expected a PIL image (PIL.Image.open reads a file)."
            )
        if 0 in image.size:
            raise ValueError(f"images[{index}] is {image.width} x {image.height}; a picture without pixels.")


def _prepare(
    model: MicroCLIPForImageClassification, images: Sequence[Image.Image]
) -> Iterator[tuple[Image.Image, PatchGrid, torch.Tensor]]:
    """Upright pictures, where their patches lie, and the model's inputs `(num_channels, height, width)`."""
    processor = model.image_processor or default_image_processor(model.config)
    patch_size = model.config.clip_config.vision_config.patch_size
    for image in map(to_rgb, images):
        grid = PatchGrid.locate(image.size, processor, patch_size)
        pixel_values = processor(cut_strip(image), return_tensors="pt")["pixel_values"][0]
        height, width = pixel_values.shape[1:]
        if (height // patch_size, width // patch_size) != grid.shape:
            raise ValueError(
                f"The image processor made {width} x {height} pixels of a picture of {image.width} x {image.height}, "
                f"which aren't the {grid.shape[1]} x {grid.shape[0]} patches of {patch_size} that its size and crop "
                "amount to. Pass a model whose image processor resizes and crops about the middle, and no more."
            )
        yield image, grid, pixel_values


def _explain_batch(
    model: MicroCLIPForImageClassification,
    images: Sequence[Image.Image],
    grids: Sequence[PatchGrid],
    pixel_values: Sequence[torch.Tensor],
    interpolate_pos_encoding: bool,
) -> list[Explanation]:
    output = model(
        torch.stack(pixel_values).to(model.device),
        interpolate_pos_encoding=interpolate_pos_encoding,
        output_patch_embeds=True,
        return_dict=True,
    )
    names = tuple(model.config.class_names)
    paths = (output.logits, model.logit_adjustment(output.cls_logits), model.logit_adjustment(output.fg_logits))
    scores = [logits.float().softmax(-1).cpu().numpy() for logits in paths]
    masks = output.saliency_mask.cpu().numpy()
    attention = output.fg_attention.float().cpu().numpy()
    return [
        Explanation(
            image=image,
            class_names=names,
            label=names[int(fused.argmax())],
            scores=fused,
            cls_scores=cls,
            fg_scores=fg,
            saliency_mask=mask.reshape(grid.shape),
            fg_attention=weights[:-1].reshape(grid.shape),
            null_share=float(weights[-1]),
            grid=grid,
        )
        for image, grid, fused, cls, fg, mask, weights in zip(images, grids, *scores, masks, attention, strict=True)
    ]
