"""
How much of what a model looks at is bird, by every way of cutting, before and after adaptation; and a contact sheet.

    make demo
    cd examples && python -m birdworld.score_saliency ../outputs/demo ../docs/results/saliency

writes `saliency.json`, `saliency.md` and `saliency.png`. The model must be adapted to one of the world's domains; what
is scored are that domain's test pictures.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.explain.explanation import Explanation, explain, overlay
from microclip_hf.explain.patch_grid import PatchGrid

from .domains import DOMAINS, TARGET_SIZE, Domain
from .tiny_clip import FOLDER


NUM_TEST = 600
# Heads of the table.
COLUMNS = {
    "iou": "IoU",
    "on_bird": "attention on the bird",
    "pointing": "pointing game",
    "null_share": "null token",
    "correct": "right labels",
}
AFFINITIES, CUTS = ("dot", "cosine"), ("std", "mean")
NUM_SHOWN, MARGIN = 10, 150


def score(explanation: Explanation, bird: np.ndarray, name: str) -> dict[str, float]:
    """One picture's scores.

    Args:
        explanation ([`Explanation`]): of the picture.
        bird (`np.ndarray` of shape `(height, width)`): True at the bird's pixels.
        name (`str`): the true species.

    Returns:
        `iou`, `on_bird` and `pointing` as in [`score_places`]; `null_share`; `correct`: whether the label is right.
    """
    places = score_places(explanation.grid, explanation.saliency_mask, explanation.fg_attention, bird)
    return {**places, "null_share": explanation.null_share, "correct": float(explanation.label == name)}


def score_places(grid: PatchGrid, mask: np.ndarray, attention: np.ndarray, bird: np.ndarray) -> dict[str, float]:
    """How well patches find the bird.

    Args:
        grid ([`PatchGrid`]): where they lie.
        mask (`np.ndarray` of shape `(rows, columns)`): the salient ones.
        attention (`np.ndarray` of shape `(rows, columns)`): their weights, of any sum.
        bird (`np.ndarray` of shape `(height, width)`): True at the bird's pixels.

    Returns:
        `iou`: intersection over union, in pixels, of the bird and what lies at least half in salient patches;
        `on_bird`: the bird's share of the attention, which is spread evenly over each patch; `pointing`: the share of
        patches that are at least half bird among those with the most attention (mostly one).
    """
    salient, birds = grid.to_image(mask) >= 0.5, grid.to_patches(bird)
    return {
        "iou": float((salient & bird).sum() / (salient | bird).sum()),
        "on_bird": float((attention * birds).sum() / attention.sum()),
        "pointing": float((birds[attention == attention.max()] >= 0.5).mean()),
    }


def fixed_masks(grid: PatchGrid, bird: np.ndarray) -> dict[str, np.ndarray]:
    """What to compare with: two masks that don't look at the picture, and the best that a grid of patches can do."""
    rows, columns = grid.shape
    middle = np.zeros(grid.shape, dtype=bool)
    middle[rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4] = True
    birds = grid.to_patches(bird)
    # Of a small bird perhaps no patch is half bird.
    own = birds >= min(0.5, birds.max())
    return {"every patch": np.ones_like(middle), "middle quarter": middle, "the bird's patches": own}


def summarize(scores: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and its standard error over pictures, in percent."""
    values = {name: 100 * np.array([own[name] for own in scores]) for name in scores[0]}
    return {
        name: {"mean": round(float(own.mean()), 1), "error": round(float(own.std(ddof=1) / len(own) ** 0.5), 1)}
        for name, own in values.items()
    }


def as_before(adapted: MicroCLIPForImageClassification, domain: Domain) -> MicroCLIPForImageClassification:
    """The CLIP that comes with the world, with the adapted model's settings."""
    config = adapted.config
    settings = {name: vars(config)[name] for name in config.architecture_names() if name != "keep_text_model"}
    return MicroCLIPForImageClassification.from_clip(
        FOLDER, domain.class_names, descriptions=domain.descriptions, **settings
    )


def measure(models: dict[str, MicroCLIPForImageClassification], domain: Domain) -> dict[str, dict]:
    """Summaries by what was looked at: `{model}, {affinity}/{cut}`, and the [`fixed_masks`]."""
    examples = domain.examples("test", NUM_TEST, with_masks=True)
    images, names = [own["image"] for own in examples], [domain.class_names[own["label"]] for own in examples]
    birds = [np.asarray(own["mask"]) > 127 for own in examples]
    results = {}
    for (title, model), affinity, cut in itertools.product(models.items(), AFFINITIES, CUTS):
        model.config.saliency_affinity, model.config.saliency_cut = affinity, cut
        explanations = explain(model, images, batch_size=100)
        scores = [score(*own) for own in zip(explanations, birds, names, strict=True)]
        results[f"{title}, {affinity}/{cut}"] = summarize(scores)
    grid = explanations[0].grid  # all pictures are of one size
    masks = [fixed_masks(grid, bird) for bird in birds]
    for title in masks[0]:
        scores = [score_places(grid, own[title], own[title], bird) for own, bird in zip(masks, birds, strict=True)]
        results[title] = summarize(scores)
    return results


def make_table(results: dict[str, dict]) -> str:
    """Markdown: a row for each entry, means in percent."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", f"|---|{'---|' * len(COLUMNS)}"]
    for title, own in results.items():
        cells = [f"{own[name]['mean']:.1f}" if name in own else "" for name in COLUMNS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_sheet(models: dict[str, MicroCLIPForImageClassification], domain: Domain) -> Image.Image:
    """The first test pictures, the bird's pixels, and each model's attention and salient patches."""
    examples = domain.examples("test", NUM_SHOWN, with_masks=True)
    images = [own["image"] for own in examples]
    rows = {
        "picture": images,
        "bird": [Image.composite(own["image"], Image.new("RGB", own["image"].size), own["mask"]) for own in examples],
    }
    for title, model in models.items():
        explanations = explain(model, images)
        rows[f"{title}:\n[FG] attention"] = [overlay(own, 0.65) for own in explanations]
        rows[f"{title}:\nsalient patches"] = [overlay(own, 0.85, "saliency_mask") for own in explanations]
    sheet = Image.new("RGB", (MARGIN + NUM_SHOWN * TARGET_SIZE, len(rows) * TARGET_SIZE), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (title, pictures) in enumerate(rows.items()):
        draw.multiline_text((8, row * TARGET_SIZE + 30), title, fill="black", font_size=15)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (MARGIN + column * TARGET_SIZE, row * TARGET_SIZE))
    return sheet


def find_domain(model: MicroCLIPForImageClassification) -> Domain:
    """The domain whose species are the model's classes.

    Raises:
        ValueError: if there is none.
    """
    names = model.config.class_names
    for domain in DOMAINS.values():
        if domain.class_names == names:
            return domain
    raise ValueError(
        f"The model's classes ({', '.join(names[:3])}, ...) are no domain's species; `make demo` makes one."
    )


def main(arguments: list[str] | None = None) -> None:
    """Draw the sheet, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model adapted to one of the world's domains")
    parser.add_argument("output", type=Path, help="files to write, without their endings")
    options = parser.parse_args(arguments)
    adapted = MicroCLIPForImageClassification.from_pretrained(options.model)
    domain = find_domain(adapted)
    models = {"before": as_before(adapted, domain), "adapted": adapted}
    draw_sheet(models, domain).quantize(192).save(options.output.with_suffix(".png"), optimize=True)
    results = measure(models, domain)
    table = make_table(results)
    print(table)
    options.output.with_suffix(".md").write_text(table, encoding="utf-8")
    report = {"domain": domain.name, "num_pictures": NUM_TEST, "percent": results}
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
