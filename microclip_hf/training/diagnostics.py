"""What can be seen of self-training without labels: means over images, and how the pseudo-labels move."""

import time
import warnings
from collections import Counter

import torch
from accelerate import Accelerator
from torch.nn.functional import pad

from ..verdict import count_effective, has_collapsed


METRICS = (
    "cross_entropy",
    "fairness",
    "student_agreement",
    "pseudo_label_confidence",
    "head_agreement",
    "label_changes",
    "pseudo_label_accuracy",
)
# Of images without an `index` so many of the latest labels a class tell how often each class is used.
LATEST_LABELS = 20
# What is remembered of the images, and kept in checkpoints.
IMAGE_STATE = ("pseudo_labels", "confidences", "changes", "swaps")


class Diagnostics:
    """Collects values step by step on the device; [`summarize`] brings them together, over all processes.

    `METRICS`: both parts of the loss; the pseudo-label's probability; shares of images where the student agrees with
    the pseudo-label, where both heads agree, whose pseudo-label is another than one epoch ago, or (with labels) right.
    Of each image, by the batches' `index`, it keeps the latest pseudo-label, its probability and how often it changed.
    """

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        self.pseudo_labels = torch.empty(0, dtype=torch.int32)  # (num_images,), the latest, -1 where there is none yet
        self.confidences = torch.empty(0)  # (num_images,), of these labels, NaN where it isn't known
        self.changes = torch.empty(0, dtype=torch.int32)  # (num_images,), how often it was another than before
        self._warned = False
        self._started = time.perf_counter()
        self._sums: dict[str, torch.Tensor] = {}
        self._pending: list[tuple[torch.Tensor, ...]] = []
        self._unnumbered = self.pseudo_labels[:0]  # the latest labels of images without an `index`
        self._counts: list[int] | None = None  # images of each class, where that alone is known
        self._swaps: Counter[tuple[int, int]] = Counter()

    def record(self, known: torch.Tensor | None = None, **values: torch.Tensor) -> None:
        """Add values of `METRICS`: one an image, `(batch_size,)`, any dtype; only those of `known` images count."""
        for name, value in values.items():
            counts = torch.ones_like(value, dtype=torch.float) if known is None else known.float()
            added = torch.stack([(value.detach() * counts).sum(), counts.sum()])
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def record_labels(
        self, pseudo_labels: torch.Tensor, index: torch.Tensor | None, confidences: torch.Tensor | None = None
    ) -> None:
        """Add the pseudo-labels of a batch, which images they belong to, and their probabilities, `(batch_size,)`."""
        index = torch.full_like(pseudo_labels, -1) if index is None else index
        if confidences is None:
            confidences = torch.full(pseudo_labels.shape, torch.nan, device=pseudo_labels.device)
        self._pending.append((index, pseudo_labels, confidences.detach().float()))

    def record_counts(self, counts: torch.Tensor) -> None:
        """How many images each class has `(num_labels,)`, where labels aren't kept image by image."""
        self._counts = counts.tolist()

    def summarize(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last call over the images of all processes; every process must call it.

        They are `METRICS` as far as there are any, `images_per_second`, and `effective_classes`: `exp(entropy)` of how
        often each class is used by the latest pseudo-labels (`LATEST_LABELS` a class, where images have no `index`),
        from 1 to `num_labels`.
        """
        self.flush(accelerator)
        nothing = torch.zeros(2, device=accelerator.device)
        sums = torch.stack([self._sums.get(name, nothing) for name in METRICS])
        totals = accelerator.reduce(sums, "sum").tolist()
        metrics = {name: total / count for name, (total, count) in zip(METRICS, totals, strict=True) if count}
        now = time.perf_counter()
        metrics["images_per_second"] = totals[0][1] / (now - self._started)
        self._started = now
        self._sums = {}
        counts = self.class_counts
        if sum(counts):
            metrics["effective_classes"] = count_effective(counts)
            self._warn_of_collapse(metrics["effective_classes"], sum(counts))
        return metrics

    def flush(self, accelerator: Accelerator) -> None:
        """Bring `pseudo_labels` up to date, at least once an epoch; every process must call it."""
        if not self._pending:
            return
        columns = tuple(torch.cat(values) for values in zip(*self._pending, strict=True))
        self._pending = []
        # Processes may have seen different numbers of images; what pads the shorter ones is no label.
        gathered = accelerator.gather(accelerator.pad_across_processes(columns, pad_index=-1))
        index, labels, confidences = (values.cpu() for values in gathered)
        is_label = labels >= 0
        index = index[is_label]
        labels = labels[is_label].int()
        confidences = confidences[is_label]
        if (index >= 0).all():
            self._update(index, labels, confidences, accelerator.device)
        else:
            self._unnumbered = torch.cat([self._unnumbered, labels])[-LATEST_LABELS * self.num_labels :]

    def _update(
        self, index: torch.Tensor, labels: torch.Tensor, confidences: torch.Tensor, device: torch.device
    ) -> None:
        """The latest label of each image; of one that comes again, in place of others, the last counts."""
        index, order = index.sort(stable=True)
        is_last = torch.cat([index[1:] != index[:-1], torch.ones(1, dtype=torch.bool)])
        index = index[is_last]
        labels = labels[order[is_last]]
        confidences = confidences[order[is_last]]
        missing = (0, max(0, int(index.max()) + 1 - len(self.pseudo_labels)))
        self.pseudo_labels = pad(self.pseudo_labels, missing, value=-1)
        self.confidences = pad(self.confidences, missing, value=torch.nan)
        self.changes = pad(self.changes, missing)
        earlier = self.pseudo_labels[index]
        changed = (earlier != labels) & (earlier >= 0)
        self.record(label_changes=changed[earlier >= 0].to(device))
        self.pseudo_labels[index] = labels
        self.confidences[index] = confidences
        self.changes[index] += changed.int()
        self._swaps.update(zip(earlier[changed].tolist(), labels[changed].tolist(), strict=True))

    @property
    def class_counts(self) -> list[int]:
        """Images of each class by the latest pseudo-labels, of some where images have no `index`."""
        if self._counts is not None:
            return self._counts
        numbered = self.pseudo_labels[self.pseudo_labels >= 0]
        return (numbered if len(numbered) else self._unnumbered).bincount(minlength=self.num_labels).tolist()

    @property
    def swaps(self) -> torch.Tensor:
        """How often a label changed from which class to which, `(num_swaps, 3)`: old class, new class, images."""
        rows = [(*pair, count) for pair, count in sorted(self._swaps.items())]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the images, once it is flushed."""
        return {name: getattr(self, name) for name in IMAGE_STATE}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint; one of an earlier version knows no more than the pseudo-labels."""
        self.pseudo_labels = state["pseudo_labels"]
        self.confidences = state.get("confidences", torch.full(self.pseudo_labels.shape, torch.nan))
        self.changes = state.get("changes", torch.zeros_like(self.pseudo_labels))
        self._swaps = Counter({(old, new): count for old, new, count in state.get("swaps", self.swaps).tolist()})

    def _warn_of_collapse(self, effective_classes: float, num_images: int) -> None:
        if self._warned or num_images < self.num_labels or not has_collapsed(effective_classes, self.num_labels):
            return
        self._warned = True
        warnings.warn(
            f"The pseudo-labels use few classes: effectively {effective_classes:.1f} of {self.num_labels}. Unless the "
            "images are so uneven, the run is collapsing, and you may stop it.",
            stacklevel=2,
        )
