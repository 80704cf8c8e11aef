"""Evaluation with the Trainer: of images that can be read, by labels that are numbered like the classes."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import BaseImageProcessor
from transformers.trainer_utils import EvalLoopOutput

from ..data.eval_datasets import EvalDatasets
from ..saliency import NonFiniteError
from .publishing import PublishingTrainer


class EvaluatingTrainer(PublishingTrainer):
    """The Trainer's overrides for evaluation, on what `eval_datasets` prepares."""

    _processing_class: BaseImageProcessor | None = None

    def __init__(self, eval_datasets: EvalDatasets, eval_dataset: Any = None, **kwargs: Any) -> None:
        self.eval_datasets = eval_datasets
        super().__init__(eval_dataset=eval_datasets.align(eval_dataset), **kwargs)

    @property
    def processing_class(self) -> BaseImageProcessor:
        """The image processor, which the views and the evaluation agree with; chosen when the Trainer is made."""
        return self._processing_class

    @processing_class.setter
    def processing_class(self, processor: BaseImageProcessor) -> None:
        if self._processing_class not in (None, processor):
            raise ValueError(
                "Views are made for the image processor that the Trainer began with; pass another one as "
                "MicroCLIPTrainer(processing_class=...)."
            )
        self._processing_class = processor

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in the base class, without images that can't be read, and with labels numbered as the classes are."""
        if eval_dataset is None or isinstance(eval_dataset, str):  # the Trainer's own, or one of them
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        return super().get_eval_dataloader(self.eval_datasets.prepare(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """As in the base class, without images that can't be read, and with labels numbered as the classes are."""
        return super().get_test_dataloader(self.eval_datasets.prepare(test_dataset))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in the base class; the loss is the mean over the images that have a label, and absent where none has."""
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        except NonFiniteError as error:  # in the images, since weights are looked at in training
            raise ValueError(str(error)) from error
        if output.predictions is None or output.label_ids is None or self.preprocess_logits_for_metrics is not None:
            return output
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        labels = torch.as_tensor(output.label_ids)
        is_known = labels >= 0
        name = f"{metric_key_prefix}_loss"
        output.metrics.pop(name, None)
        if is_known.any():
            output.metrics[name] = cross_entropy(torch.as_tensor(logits)[is_known].float(), labels[is_known]).item()
        return output
