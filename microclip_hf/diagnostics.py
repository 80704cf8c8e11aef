"""What can be seen of self-training without labels: means over images, and how the pseudo-labels move."""

import time
import warnings

import torch
from accelerate import Accelerator


METRICS = (
    "cross_entropy",
    "fairness",
    "student_agreement",
    "pseudo_label_confidence",
    "head_agreement",
    "label_changes",
    "pseudo_label_accuracy",
)
# Fewer effective classes than this share of all are worth a warning.
COLLAPSE_SHARE = 0.25


class Diagnostics:
    """Collects values step by step on the device; [`summarize`] brings them together, over all processes.

    `METRICS`: both parts of the loss; the pseudo-label's probability; shares of images where the student agrees with
    the pseudo-label, where both heads agree, whose pseudo-label is another than one epoch ago, or (with labels) right.

    `pseudo_labels`, a `torch.IntTensor` of shape `(num_images,)`, holds the latest pseudo-label of each image, by the
    batches' `index`; -1 where there is none yet.

    Args:
        num_labels (`int`): classes of the model.
    """

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        self.pseudo_labels = torch.empty(0, dtype=torch.int32)
        self._warned = False
        self._started = time.perf_counter()
        self._sums: dict[str, torch.Tensor] = {}
        self._pending: list[torch.Tensor] = []
        self._latest = self.pseudo_labels[:0]

    def record(self, known: torch.Tensor | None = None, **values: torch.Tensor) -> None:
        """Add values of `METRICS`: one an image, `(batch_size,)`, any dtype; only those of `known` images count."""
        for name, value in values.items():
            counts = torch.ones_like(value, dtype=torch.float) if known is None else known.float()
            added = torch.stack([(value.detach() * counts).sum(), counts.sum()])
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def record_labels(self, pseudo_labels: torch.Tensor, index: torch.Tensor | None) -> None:
        """Add the pseudo-labels of a batch, and which images they belong to, both `(batch_size,)`."""
        index = torch.full_like(pseudo_labels, -1) if index is None else index
        self._pending.append(torch.stack([index, pseudo_labels], 1))

    def summarize(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last call over the images of all processes; every process must call it.

        Returns:
            `METRICS` as far as there are any, `images_per_second`, and `effective_classes`: `exp(entropy)` of how
            often each class is used by the latest pseudo-labels (by the last ones flushed, where images have no
            `index`), from 1 to `num_labels`.
        """
        self.flush(accelerator)
        nothing = torch.zeros(2, device=accelerator.device)
        sums = torch.stack([self._sums.get(name, nothing) for name in METRICS])
        totals = accelerator.reduce(sums, "sum").tolist()
        metrics = {name: total / count for name, (total, count) in zip(METRICS, totals, strict=True) if count}
        now = time.perf_counter()
        metrics["images_per_second"] = totals[0][1] / (now - self._started)
        self._sums, self._started = {}, now
        if len(self._latest):
            shares = self._latest.bincount(minlength=self.num_labels) / len(self._latest)
            metrics["effective_classes"] = torch.special.entr(shares).sum().exp().item()
            self._warn_of_collapse(metrics["effective_classes"], len(self._latest))
        return metrics

    def flush(self, accelerator: Accelerator) -> None:
        """Bring `pseudo_labels` up to date, at least once an epoch; every process must call it."""
        if not self._pending:
            return
        pairs = accelerator.pad_across_processes(torch.cat(self._pending), pad_index=-1)
        index, labels = accelerator.gather(pairs).cpu().unbind(1)
        index, labels = index[labels >= 0], labels[labels >= 0].int()
        self._pending, self._latest = [], labels
        if (index >= 0).all():
            missing = max(0, int(index.max()) + 1 - len(self.pseudo_labels))
            self.pseudo_labels = torch.nn.functional.pad(self.pseudo_labels, (0, missing), value=-1)
            earlier = self.pseudo_labels[index]
            self.record(label_changes=(earlier != labels)[earlier >= 0].to(accelerator.device))
            self.pseudo_labels[index] = labels
            self._latest = self.pseudo_labels[self.pseudo_labels >= 0]

    def _warn_of_collapse(self, effective_classes: float, num_images: int) -> None:
        if self._warned or num_images < self.num_labels or effective_classes >= COLLAPSE_SHARE * self.num_labels:
            return
        self._warned = True
        warnings.warn(
            f"The pseudo-labels use few classes: effectively {effective_classes:.1f} of {self.num_labels}. If the "
            "images aren't so uneven, check that the class names and descriptions are about them, lower "
            "learning_rate, or raise fairness_weight.",
            stacklevel=2,
        )
