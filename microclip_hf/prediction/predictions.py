"""The best classes of photos by a model, in batches."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..loading import digest_model
from ..machine import num_threads
from ..modeling_microclip import MicroCLIPForImageClassification
from ..passes.photo_batches import PixelReader, read_ahead
from ..text_heads import abbreviate, contrast_spellings, name_positions, normalize_name


Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Prediction:
    """The names of the two best classes of a photo, and their probabilities among all classes."""

    label: str
    score: float
    runner_up: str
    runner_up_score: float


class Classifier:
    """A model that names the best of its classes, or of some of them.

    Args:
        model ([`MicroCLIPForImageClassification`]): in evaluation mode, on any device. In bfloat16 its vision tower is
            cast, for good; heads, scores and the cut stay in float32.
        class_names (`Sequence[str]`, *optional*): the classes of the model that count, among which scores sum to one.
        top_k (`int`): how many classes a photo gets.

    Raises:
        ValueError: if a name is none of the model's classes, or there are fewer than `top_k`.
    """

    def __init__(
        self,
        model: MicroCLIPForImageClassification,
        class_names: Sequence[str] | None = None,
        top_k: int = 2,
        precision: Precision = "float32",
    ) -> None:
        self.model = model
        self.precision = precision
        self.top_k = top_k
        self._index = None if class_names is None else _find_classes(model.config.class_names, class_names)
        names = model.config.class_names
        self.class_names = names if self._index is None else [names[index] for index in self._index]
        if not 1 <= top_k <= len(self.class_names):
            raise ValueError(f"`top_k` is {top_k}; pass a number from 1 to {len(self.class_names)}, the classes.")
        if precision == "bfloat16":
            for module in (model.clip.vision_model, model.clip.visual_projection, model.fg_pooling):
                module.to(torch.bfloat16)
        self._dtype = model.clip.visual_projection.weight.dtype

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores, and indices into `class_names`, `(batch_size, top_k)`, best first, of pixels on any device."""
        pixel_values = pixel_values.to(self.model.device, self._dtype, non_blocking=True)
        logits = self.model(pixel_values=pixel_values).logits.float()
        if self._index is not None:
            logits = logits[:, self._index]
        best = logits.softmax(-1).topk(self.top_k)
        return best.values.cpu(), best.indices.cpu()

    def facts(self) -> dict[str, str]:
        """What scores depend on, as text: weights, image processor, classes, precision, and how many are named."""
        classes = hashlib.sha256("\n".join(self.class_names).encode()).hexdigest()[:16]
        # Weights, which precision changes too, come last.
        return {
            "precision": self.precision,
            "top_k": str(self.top_k),
            "classes": f"{len(self.class_names)} names, {classes}",
            "model": digest_model(self.model),
        }


def column_names(top_k: int) -> list[str]:
    """The columns of the labels: the photo, and name and score of each class."""
    titles = ["label", "runner_up", *(f"label_{rank}" for rank in range(3, top_k + 1))][:top_k]
    scores = ["score", "runner_up_score", *(f"score_{rank}" for rank in range(3, top_k + 1))]
    return ["file", *(name for pair in zip(titles, scores, strict=False) for name in pair)]


def predict_photos(
    model: MicroCLIPForImageClassification, photos: Iterable[str | os.PathLike], batch_size: int = 32
) -> Iterator[Prediction | Exception]:
    """Classify photo after photo; the scores are those of transformers' pipeline with the model's own processor.

    While the model works on a batch, threads prepare the next one. Grey of more than 8 bits is scaled to 8, as in
    adaptation, where the pipeline clips it.

    Args:
        model ([`MicroCLIPForImageClassification`]): in evaluation mode, on any device.
        photos, batch_size: image files, and how many of them are classified at once.

    Returns:
        `Iterator[Prediction | Exception]`, for each photo in turn; the exception is why one can't be read.

    Example:
    ```python
    >>> from microclip_hf import MicroCLIPForImageClassification
    >>> from microclip_hf.prediction import predict_photos

    >>> model = MicroCLIPForImageClassification.from_clip("openai/clip-vit-base-patch32", ["red disc", "blue bar"])
    >>> best, problem = predict_photos(model, ["photo.jpg", "notes.txt"])
    >>> best.label in model.config.class_names
    True
    >>> problem
    UnidentifiedImageError("cannot identify image file 'notes.txt'")
    ```
    """
    classify = Classifier(model)
    reader = PixelReader(model.image_processor, exact=True)
    files = ({"path": os.fspath(photo), "bytes": None} for photo in photos)
    batches = iter(lambda: list(itertools.islice(files, batch_size)), [])
    for _, batch in read_ahead(batches, list, reader, num_threads()):
        readable = [pixels for pixels in batch if isinstance(pixels, torch.Tensor)]
        predictions = iter(_predictions(classify, torch.stack(readable)) if readable else ())
        yield from (next(predictions) if isinstance(pixels, torch.Tensor) else pixels for pixels in batch)


def _predictions(classify: Classifier, pixel_values: torch.Tensor) -> Iterator[Prediction]:
    names = classify.class_names
    for scores, classes in zip(*(best.tolist() for best in classify(pixel_values)), strict=True):
        yield Prediction(names[classes[0]], scores[0], names[classes[1]], scores[1])


def _find_classes(model_names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """The indices of names among a model's classes, in the model's order."""
    position = name_positions(model_names)
    unknown = [name for name in class_names if normalize_name(name) not in position]
    if unknown:
        raise ValueError(
            f"The model's {len(model_names)} classes don't include {abbreviate(unknown)}."
            f"{contrast_spellings(unknown[0], model_names, 'the model')} Leave them out, or adapt a CLIP to them too."
        )
    return sorted({position[normalize_name(name)] for name in class_names})
