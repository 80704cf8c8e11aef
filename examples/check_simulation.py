"""
How often the intervals of `microclip check` hold the truth, and how wide they are, where all labels are known.

    python examples/check_simulation.py              # from the predictions in docs/results/check_photos.json
    python examples/check_simulation.py --predict    # makes these first (minutes), on the development domains

A draw is 60 labels, drawn as the command does it, with another seed each time. Beside it 60 photos are drawn at random
from all, with the interval of the same kind. `docs/results/check.json` and `check.md` get the table.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from microclip_hf.check import compare, draw_photos, stratified_estimate
from microclip_hf.check.estimates import Estimate
from microclip_hf.check.results import MORE
from microclip_hf.check.run import NUM_LABELS
from microclip_hf.evaluation.page import markdown_table


RESULTS = Path(__file__).parents[1] / "docs" / "results"
PHOTOS = RESULTS / "check_photos.json"
DOMAINS = ("garden", "dusk", "mist", "steppe", "bog")
NUM_TEST = 1000


@dataclass(frozen=True)
class Population:
    """Photos of which everything is known.

    Args:
        right (`np.ndarray` of shape `(num_photos, 2)`): whether CLIP, and the adapted model, are right.
        differs (`np.ndarray` of shape `(num_photos,)`): whether they give different classes.
        scores (`np.ndarray` of shape `(num_photos, 2)`): of the adapted model, and of CLIP.
    """

    right: np.ndarray
    differs: np.ndarray
    scores: np.ndarray

    @property
    def truth(self) -> np.ndarray:
        """The difference, and both accuracies."""
        clip, adapted = self.right.mean(0)
        return np.array([adapted - clip, clip, adapted])


def predict() -> dict[str, Any]:
    """What CLIP with descriptions and the recipe `quick` say of each domain's test pictures, and the truth."""
    import torch
    from benchmark import CONFIG, adapt, load_config, load_task, settings_of
    from peers import load_images

    config = load_config(CONFIG)
    config["num_images"] = {**config["num_images"], "test": NUM_TEST}
    found = {}
    for domain in DOMAINS:
        task = load_task(config, domain, seed=0)
        adapted, _ = adapt(task, settings_of(config, "quick"))
        clip = task.build(fusion_ratio=1.0).eval()
        with torch.no_grad():
            own = torch.cat([clip(pixel_values=pixels).logits for pixels in load_images(task.test, clip)])
        found[domain] = {"labels": task.test["label"][:]}
        for name, logits in (("clip", own), ("adapted", adapted)):
            best = logits.float().softmax(-1).max(-1)
            scores = [round(score, 6) for score in best.values.tolist()]
            found[domain][name] = {"labels": best.indices.tolist(), "scores": scores}
    return found


def read_population(found: dict[str, Any]) -> Population:
    """A domain of `check_photos.json`."""
    labels, clip, adapted = map(np.array, (found["labels"], found["clip"]["labels"], found["adapted"]["labels"]))
    scores = np.stack([found["adapted"]["scores"], found["clip"]["scores"]], 1)
    return Population(np.stack([clip == labels, adapted == labels], 1), clip != adapted, scores)


def make_population(num: int, differ: int, wins: int, losses: int, agree_right: float) -> Population:
    """Photos on `differ` of which two models differ; on `wins` the adapted one alone is right, on `losses` CLIP.

    The surer one model is, compared with the other, the likelier it is right, but for noise.
    """
    rng = np.random.default_rng(0)
    scores = rng.random((num, 2))
    differs = np.arange(num) < differ
    right = np.repeat((rng.random(num) < agree_right)[:, None], 2, 1)
    order = np.argsort(scores[:differ] @ (-1, 1) + rng.normal(size=differ))
    right[:differ] = False
    right[order[:wins], 1] = True
    right[order[differ - losses :], 0] = True
    return Population(right, differs, scores)


def list_populations() -> dict[str, Population]:
    """The domains, and what no domain has."""
    found = json.loads(PHOTOS.read_text(encoding="utf-8"))
    return {
        **{f"`{domain}`": read_population(found[domain]) for domain in DOMAINS},
        "equal models": make_population(1000, 300, 110, 110, 0.8),
        "equal, both bad": make_population(1000, 300, 30, 30, 0.3),
        "one far better": make_population(1000, 400, 370, 8, 0.9),
        "one right wherever they differ": make_population(1000, 400, 400, 0, 0.9),
        "2 % differ": make_population(1000, 20, 9, 5, 0.8),
        "2 % of 5000 differ": make_population(5000, 100, 45, 25, 0.8),
        "2 % of 50,000 differ": make_population(50_000, 1000, 450, 250, 0.8),
        "300 classes": make_population(6000, 2100, 950, 420, 0.75),
        "300 classes, most differ": make_population(6000, 3600, 1200, 500, 0.75),
        "150 photos": make_population(150, 60, 30, 12, 0.8),
    }


def simulate(photos: Population, num_draws: int, num_labels: int = NUM_LABELS) -> dict[str, Any]:
    """Of many draws how often intervals hold the truth (shares), and their mean widths, for the difference and both
    accuracies; `random` is of photos drawn from all, and their difference.
    """
    drawn, at_random = [], []
    for seed in range(num_draws):
        draw = draw_photos(photos.differs, photos.scores, num_labels, seed)
        chosen = draw.order[:num_labels]
        found = compare(photos.right[chosen], draw.strata[chosen], draw.differs, draw.sizes)
        drawn.append([(each.low, each.high) for each in (found.difference, *found.accuracies)])
        each = estimate_at_random(photos, num_labels, seed)
        at_random.append([(each.low, each.high)])
    covers, widths = _measure(np.array(drawn), photos.truth)
    random_covers, random_widths = _measure(np.array(at_random), photos.truth[:1])
    return {
        "photos": len(photos.differs),
        "differ": float(photos.differs.mean()),
        "truth": photos.truth.tolist(),
        "covers": covers,
        "widths": widths,
        "random_covers": random_covers[0],
        "random_width": random_widths[0],
        "ratio": widths[0] / random_widths[0],
    }


def estimate_at_random(photos: Population, num_labels: int, seed: int) -> Estimate:
    """The difference by photos drawn from all, without regard to what the models say."""
    num = len(photos.differs)
    chosen = np.random.default_rng(seed).permutation(num)[:num_labels]
    gains = photos.right[chosen, 1].astype(int) - photos.right[chosen, 0]
    values = np.array([1, -1, 0])
    return stratified_estimate((gains[:, None] == values).sum(0)[None], values, np.array([num]), num)


def _measure(intervals: np.ndarray, truth: np.ndarray) -> tuple[list[float], list[float]]:
    """Of `(num_draws, num_estimates, 2)`, how often they hold the truth but for rounding, and their mean widths."""
    low, high = intervals[..., 0], intervals[..., 1]
    return ((low <= truth + 1e-9) & (truth - 1e-9 <= high)).mean(0).tolist(), (high - low).mean(0).tolist()


def simulate_looks(photos: Population, num_draws: int) -> dict[str, float]:
    """How often equal models are called better or worse: by one look, and where undecided ones are looked at again
    after 40 more labels, once and three times.
    """
    wrong = np.zeros((num_draws, 4), dtype=bool)
    for seed in range(num_draws):
        draw = draw_photos(photos.differs, photos.scores, NUM_LABELS, seed)
        for look in range(4):
            chosen = draw.order[: NUM_LABELS + look * MORE]
            found = compare(photos.right[chosen], draw.strata[chosen], draw.differs, draw.sizes).difference
            if found.low > 0 or found.high < 0:
                wrong[seed, look:] = True
                break
    shares = wrong.mean(0)
    return {"one_look": float(shares[0]), "two_looks": float(shares[1]), "four_looks": float(shares[3])}


def as_markdown(results: dict[str, Any]) -> str:
    """The table of the docs."""
    head = ["in percent", "photos", "differ", "difference", "held", "width", "of random", "CLIP held", "adapted held"]
    rows = [head]
    for name, case in results["cases"].items():
        numbers = [case["differ"], case["truth"][0], case["covers"][0], case["widths"][0]]
        others = [case["ratio"], *case["covers"][1:]]
        texts = [f"{100 * each:.1f}" for each in (*numbers, *others)]
        texts[4] = f"{case['ratio']:.2f}"
        rows.append([name, str(case["photos"]), *texts])
    return markdown_table(rows) + "\n"


def main() -> None:
    """Simulate, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true", help="make the predictions anew")
    parser.add_argument("--num_draws", type=int, default=2000, help="draws of 60 labels in each case")
    options = parser.parse_args()
    if options.predict:
        PHOTOS.write_text(json.dumps(predict()) + "\n", encoding="utf-8")
    populations = list_populations()
    cases = {name: simulate(own, options.num_draws) for name, own in tqdm(populations.items(), "Cases")}
    looks = simulate_looks(populations["equal models"], options.num_draws)
    results = {"num_draws": options.num_draws, "num_labels": NUM_LABELS, "looks": looks, "cases": cases}
    (RESULTS / "check.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "check.md").write_text(as_markdown(results), encoding="utf-8")
    print(f"{as_markdown(results)}\n{looks}")


if __name__ == "__main__":
    main()
