"""
What a CLIP knows of the bird world: retrieval and attributes on the source domain, species on development domains.

    cd examples && python -m birdworld.measure birdworld/clip

Report domains aren't touched.
"""

import json
import random
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPModel

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.saliency import saliency_mask
from microclip_hf.text_heads import encode_texts, load_tokenizer

from .birds import ATTRIBUTES
from .domains import DOMAINS, source_example
from .texts import PHRASES, attribute_caption


NUM_SOURCE, NUM_TEST, NUM_CAPTIONS = 1000, 600, 8
# All that a caption may say.
FACTS = {**ATTRIBUTES, "place": tuple(PHRASES["place"])}


def measure(folder: Path) -> dict[str, dict]:
    """Fractions in [0, 1], rounded to three places: `source`, `development` and `masks`."""
    development = [name for name, own in DOMAINS.items() if own.role == "development" and own.imbalance == 1]
    return {
        "source": measure_source(folder),
        "development": {name: measure_domain(folder, name) for name in development},
        "masks": {name: measure_masks(folder, name) for name in development},
    }


def measure_source(folder: Path) -> dict:
    """Retrieval of captions among 1000 unseen images, and accuracy per attribute of [CLS] and of [FG]."""
    tokenizer, clip = load_tokenizer(str(folder), {}), CLIPModel.from_pretrained(folder, dtype=torch.float32)
    examples = [source_example(random.Random(f"validation {index}")) for index in range(NUM_SOURCE)]
    images, facts, captions = zip(*examples, strict=True)
    model = MicroCLIPForImageClassification.from_clip(str(folder), ["one", "other"], prior_weighting="uniform")
    cls_embeds, fg_embeds = embed(model, images)
    texts = torch.nn.functional.normalize(encode_texts(clip, tokenizer, captions), dim=-1)
    targets = torch.arange(len(captions))
    results = {
        "image_to_text_at_1": accuracy(cls_embeds @ texts.T, targets),
        "text_to_image_at_1": accuracy(texts @ cls_embeds.T, targets),
    }
    rng = random.Random("captions of attributes")
    for attribute, values in FACTS.items():
        sentences = [attribute_caption(attribute, value, rng) for value in values for _ in range(NUM_CAPTIONS)]
        features = torch.nn.functional.normalize(encode_texts(clip, tokenizer, sentences), dim=-1)
        head = torch.nn.functional.normalize(features.view(len(values), NUM_CAPTIONS, -1).mean(1), dim=-1)
        targets = torch.tensor([values.index(own[attribute]) for own in facts])
        results[attribute] = {
            "cls": accuracy(cls_embeds @ head.T, targets),
            "fg": accuracy(fg_embeds @ head.T, targets),
            "chance": round(1 / len(values), 3),
        }
    return results


def measure_domain(folder: Path, name: str) -> dict[str, float]:
    """Accuracy on a domain's test images of everything that isn't adapted."""
    domain = DOMAINS[name]
    examples = domain.examples("test", NUM_TEST)
    labels = torch.tensor([example["label"] for example in examples])
    by_name = MicroCLIPForImageClassification.from_clip(str(folder), domain.class_names)
    model = MicroCLIPForImageClassification.from_clip(
        str(folder), domain.class_names, descriptions=domain.descriptions
    )
    cls_embeds, fg_embeds = embed(model, [example["image"] for example in examples])
    with torch.no_grad():
        return {
            "zero_shot": accuracy(by_name.classifier(cls_embeds), labels),
            "cupl": accuracy(model.classifier(cls_embeds), labels),
            "name_weighted": accuracy(model.prior_head(cls_embeds), labels),
            "fg": accuracy(model.classifier(fg_embeds), labels),
            "fused": accuracy(model.classifier(cls_embeds + fg_embeds), labels),
        }


@torch.no_grad()
def measure_masks(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """Saliency against the bird's true pixels, on a domain's test images.

    `iou`: intersection over union of salient patches and patches that are bird for at least half, mean over images;
    `accuracy`: of the mean over the salient patches. `truth` has the true patches for salient ones.
    """
    domain = DOMAINS[name]
    examples = domain.examples("test", NUM_TEST, with_masks=True)
    labels = torch.tensor([example["label"] for example in examples])
    model = MicroCLIPForImageClassification.from_clip(
        str(folder), domain.class_names, descriptions=domain.descriptions
    )
    grid = 2 * [int(model.clip.vision_model.embeddings.num_patches**0.5)]
    truth = torch.stack(
        [torch.tensor(list(example["mask"].resize(grid, Image.BOX).getdata())) for example in examples]
    )
    truth = truth > 127
    pixel_values = model.image_processor([example["image"] for example in examples], return_tensors="pt")
    batches = pixel_values["pixel_values"].split(100)
    patches = torch.cat([model.encode_image(batch).patch_embeds for batch in batches])
    masks = {
        f"{affinity}/{statistic}": torch.cat(
            [saliency_mask(own, affinity, model.config.saliency_threshold, statistic) for own in patches.split(100)]
        )
        for affinity in ("dot", "cosine")
        for statistic in ("std", "mean")
    }
    results = {}
    for key, mask in {**masks, "truth": truth}.items():
        iou = (mask & truth).sum(-1) / (mask | truth).sum(-1)
        means = (patches * mask[..., None]).sum(1)
        embeds = torch.nn.functional.normalize(model.clip.visual_projection(means), dim=-1)
        results[key] = {"iou": round(iou.mean().item(), 3), "accuracy": accuracy(model.classifier(embeds), labels)}
    return results


@torch.no_grad()
def embed(model: MicroCLIPForImageClassification, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """[CLS] and [FG] embeddings, two tensors of shape `(len(images), projection_dim)`."""
    pixel_values = model.image_processor(list(images), return_tensors="pt")["pixel_values"]
    encoded = [model.encode_image(batch) for batch in pixel_values.split(100)]
    return torch.cat([own.cls_embeds for own in encoded]), torch.cat([own.fg_embeds for own in encoded])


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows whose largest score is the label's."""
    return round((scores.argmax(-1) == labels).float().mean().item(), 3)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1])), indent=1))
