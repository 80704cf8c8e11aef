"""How a run went, in a sentence: by the classes that labels use, by how settled they are, or by true labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .text_heads import abbreviate


Status = Literal["collapsed", "worse", "undecided", "better", "as expected"]
# Below this share of all classes in use a run has collapsed, unless more than so many are: photos may well show 40 of
# 200 classes. Of two or three one may be rare.
COLLAPSE_SHARE = 0.25
SURELY_IN_USE = 5
MIN_EFFECTIVE_CLASSES = 1.5
# Below this share it may have.
DOUBT_SHARE = 0.5
# Shares of images: where both heads agree on fewer, or more labels still change, nothing is settled.
MIN_HEAD_AGREEMENT = 0.6
MAX_LABEL_CHANGES = 0.2
# The same of a class mixture, by features alone, and the texts. On rendered birds it was 0.66 to 0.95 with
# descriptions, and 0.53 to 0.65 with names that say nothing.
MIN_MIXTURE_AGREEMENT = 0.67
NEXT_STEPS: dict[Status, str] = {
    "collapsed": "Unless your images are so uneven, don't use this model. Check that the class names and descriptions "
    "are about these images. Then lower learning_rate. Where classes are about equally frequent, set "
    "distribution_alignment to true; else raise fairness_weight.",
    "worse": "Use CLIP itself, or try other settings.",
    "undecided": "Before you use this model, look at the images of each class, or label sixty (microclip check).",
    "better": "The command microclip evaluate says how sure this difference is.",
    "as expected": "This is no proof: look at the images of each class, or label sixty (microclip check).",
}


@dataclass(frozen=True)
class Verdict:
    """A judgement and the reasons for it."""

    status: Status
    reasons: str

    @property
    def next_steps(self) -> str:
        """What to do, in sentences."""
        return NEXT_STEPS[self.status]

    def __str__(self) -> str:
        return f"{self.status.capitalize()}: {self.reasons}. {self.next_steps}"


def judge(
    class_names: Sequence[str],
    counts: Sequence[int],
    log_history: Sequence[Mapping[str, float]] = (),
    results: Mapping[str, float] | None = None,
    undescribed: Sequence[str] = (),
) -> Verdict:
    """Say how a run went.

    Args:
        class_names (`Sequence[str]`): all classes.
        counts (`Sequence[int]`): images of each class by the last pseudo-labels; zeros where they aren't known.
        log_history (`Sequence[Mapping[str, float]]`): the Trainer's; of each value the last counts.
        results (`Mapping[str, float]`, *optional*): `zero_shot_accuracy`, `cupl_accuracy` and `adapted_accuracy`,
            fractions, as far as they were measured; they go before every sign, save that a model which isn't better
            may have collapsed.
        undescribed (`Sequence[str]`): classes without descriptions, where others have some.
    """
    last = {name: value for entry in log_history for name, value in entry.items()}
    effective = count_effective(counts) if sum(counts) else last.get("effective_classes", math.nan)
    measured = _judge_accuracy(results or {})
    status, reasons = measured or _judge_labels(last, effective, len(class_names))
    if sum(counts) and sum(counts) < len(class_names):
        if measured is None:
            status = "undecided"
            reasons = f"{sum(counts)} images are too few to judge {len(class_names)} classes by"
    elif status != "better" and has_collapsed(effective, len(class_names)):
        status = "collapsed"
        reasons = _describe_classes(class_names, counts, effective)
    if last.get("training_was_kept", 1) == 0:
        reasons += "; training led away from what the texts say, so that the model is as before it"
    if undescribed:
        reasons += (
            f"; {len(undescribed)} of {len(class_names)} classes had no descriptions ({abbreviate(undescribed)})"
        )
    return Verdict(status, reasons)


def count_effective(counts: Sequence[int]) -> float:
    """`exp(entropy)` of the classes' shares, from 1 to their number: as many classes of equal size are as uneven."""
    shares = np.asarray(counts, dtype=float) / sum(counts)
    used = shares[shares > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def has_collapsed(effective_classes: float, num_classes: int) -> bool:
    """Whether so few classes are in use that the labels tell nothing apart."""
    return effective_classes < max(MIN_EFFECTIVE_CLASSES, min(COLLAPSE_SHARE * num_classes, SURELY_IN_USE))


def _describe_classes(class_names: Sequence[str], counts: Sequence[int], effective: float) -> str:
    if not sum(counts):
        return f"the labels use {effective:.1f} of {len(class_names)} classes, if classes are weighed by their images"
    largest = int(np.argmax(counts))
    unused = sum(not count for count in counts)
    others = f", and {unused} of {len(class_names)} classes have none" if unused else ""
    return f"{counts[largest]} of {sum(counts)} images are labelled {class_names[largest]!r}{others}"


def _judge_accuracy(results: Mapping[str, float]) -> tuple[Status, str] | None:
    """By true labels; `None` where they measured too little."""
    adapted = results.get("adapted_accuracy")
    clip = max((results[name] for name in ("zero_shot_accuracy", "cupl_accuracy") if name in results), default=None)
    if adapted is None or clip is None:
        return None
    status = "better" if adapted > clip else "worse" if adapted < clip else "undecided"
    return status, f"of the test images this model has {100 * adapted:.1f} % right, CLIP {100 * clip:.1f} %"


def _judge_labels(last: Mapping[str, float], effective: float, num_classes: int) -> tuple[Status, str]:
    """By signs that need no true labels."""
    agreement = last.get("head_agreement", 1.0)
    changes = last.get("label_changes", 0.0)
    if math.isnan(effective):
        return "undecided", "nothing is known of its labels"
    doubts = []
    if effective < DOUBT_SHARE * num_classes:
        doubts.append(f"few classes have most images, as if about {effective:.0f} of {num_classes} were in use")
    if agreement < MIN_HEAD_AGREEMENT:
        share = f"{100 * agreement:.0f} %"
        doubts.append(f"the frozen and the learned text classifier agree on only {share} of the images")
    was_kept = last.get("training_was_kept", 1) == 1
    mixture_agreement = last.get("mixture_agreement" if was_kept else "first_mixture_agreement", 1.0)
    if mixture_agreement < MIN_MIXTURE_AGREEMENT:
        share = f"{100 * mixture_agreement:.0f} %"
        doubts.append(f"what the images look like agrees with what the texts say of them on only {share}")
    if changes > MAX_LABEL_CHANGES:
        doubts.append(f"{100 * changes:.0f} % of the labels still change")
    if doubts:
        return "undecided", ", and ".join(doubts)
    spread = f"as if about {effective:.0f} of {num_classes} classes were equally frequent"
    settled = ", and labels have settled" if "label_changes" in last else ""
    return "as expected", f"images are spread {spread}{settled}"
