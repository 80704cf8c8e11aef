"""The running mean of class probabilities that fairness needs, over accumulation steps and processes.

A batch may be spread: over the steps whose gradients are accumulated, and over processes. Each of these is a part, and
fairness is the whole batch's. C classes, P parts (steps of the first process, then of the second, ...).
"""

import torch
from accelerate import Accelerator

from ..pseudo_labels import fairness_loss


def log_sum(logits: torch.Tensor) -> torch.Tensor:
    """Of a part's logits `(batch_size, C)`: log of the sum of class probabilities, and the images; `(C + 1,)`."""
    log_sums = logits.float().log_softmax(-1).logsumexp(0)
    return torch.cat([log_sums, log_sums.new_tensor([len(logits)])])


class ClassMeans:
    """The fairness loss and what it carries from batch to batch (arXiv:2510.02270, section 3.4)."""

    def __init__(self, accelerator: Accelerator, frequencies: torch.Tensor | None = None) -> None:
        self.accelerator = accelerator
        self.frequencies = frequencies  # (C,), none where all are equal
        self.epoch: int | None = None
        self.log_mean: torch.Tensor | None = None  # (C,), of the epoch so far
        self.next_part = 0  # of an accumulated batch, in this process
        self._parts: torch.Tensor | None = None  # (P, C + 1), of an accumulated batch

    def start_epoch(self, epoch: int) -> None:
        """The mean starts afresh, unless a checkpoint of the same epoch brought it along."""
        if epoch != self.epoch:
            self.log_mean = None
        self.epoch = epoch

    def start_batch(self, log_sums: list[torch.Tensor] | None = None) -> None:
        """Begin a batch; where it is accumulated, with the [`log_sum`] of each step of this process."""
        self.next_part = 0
        self._parts = None if log_sums is None else self.accelerator.gather(torch.stack(log_sums))

    def fairness(self, logits: torch.Tensor) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Fairness of the whole batch, from the student's logits `(batch_size, C)` of its next part, with gradient.

        Returns the loss, a scalar whose gradients add up over the parts; and by how much a mean over this part counts
        in the mean over parts.
        """
        log_probabilities = logits.log_softmax(-1)
        num_processes = self.accelerator.num_processes
        if self._parts is None and num_processes == 1:
            fairness, log_mean = fairness_loss(log_probabilities, self.log_mean, frequencies=self.frequencies)
            self._remember(log_mean)
            return fairness, 1.0
        parts = self._parts
        place = self.accelerator.process_index
        is_last = True
        if parts is None:
            parts = self.accelerator.gather(log_sum(logits.detach()).unsqueeze(0))
        else:
            num_steps = len(parts) // num_processes
            place = place * num_steps + self.next_part
            is_last = self.next_part == num_steps - 1
            self.next_part += 1
        num_images = parts[:, -1].sum()
        rest = torch.cat([parts[:place], parts[place + 1 :]])[:, :-1].logsumexp(0)
        fairness, log_mean = fairness_loss(log_probabilities, self.log_mean, rest, num_images, self.frequencies)
        if is_last:
            self._remember(log_mean)
        # The Trainer takes the mean of losses over steps, and of gradients over processes: the value is the same in
        # each part, and gradients, each of one part alone, are multiplied by their number to be summed.
        value = fairness.detach()
        return value + len(parts) * (fairness - value), len(logits) * len(parts) / num_images

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        state = {"epoch": torch.tensor(self.epoch)}
        if self.log_mean is not None:
            state["log_class_mean"] = self.log_mean
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint, of whose tensors the other ones are passed over."""
        self.epoch = state["epoch"].item()
        log_mean = state.get("log_class_mean")
        self.log_mean = None if log_mean is None else log_mean.to(self.accelerator.device)

    def _remember(self, log_mean: torch.Tensor) -> None:
        """The mean for the next batch; after an overflow, whose step fp16 skips, the one before stays."""
        is_finite = log_mean.isfinite().all()
        if self.log_mean is not None:
            self.log_mean = torch.where(is_finite, log_mean, self.log_mean)
        elif is_finite:  # the host waits for the device once an epoch
            self.log_mean = log_mean
