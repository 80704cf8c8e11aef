"""microCLIP: unsupervised adaptation of CLIP to fine-grained image classification (arXiv:2510.02270)."""

import os
from typing import TYPE_CHECKING, Any


# On a CPU, PyTorch's threads then sleep while they wait for each other, which is faster beside other busy jobs
# (docs/training.md). OpenMP reads it as it is loaded, so nothing changes where torch was imported before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from transformers import AutoConfig, AutoModelForImageClassification

from .configuration_microclip import MicroCLIPConfig
from .modeling_microclip import MicroCLIPForImageClassification, MicroCLIPOutput


if TYPE_CHECKING:
    from .training.trainer import MicroCLIPTrainer
    from .training.training_args import MicroCLIPTrainingArguments

__version__ = "0.1.0"
__all__ = [
    "MicroCLIPConfig",
    "MicroCLIPForImageClassification",
    "MicroCLIPOutput",
    "MicroCLIPTrainer",
    "MicroCLIPTrainingArguments",
]

AutoConfig.register(MicroCLIPConfig.model_type, MicroCLIPConfig)
AutoModelForImageClassification.register(MicroCLIPConfig, MicroCLIPForImageClassification)
# Saved folders then carry the code, and load with `trust_remote_code=True` where this package isn't installed.
MicroCLIPConfig.register_for_auto_class()
MicroCLIPForImageClassification.register_for_auto_class("AutoModelForImageClassification")


def __getattr__(name: str) -> Any:
    """Training needs the extra `train`; classification shouldn't import it."""
    if name == "MicroCLIPTrainer":
        from .training.trainer import MicroCLIPTrainer

        return MicroCLIPTrainer
    if name == "MicroCLIPTrainingArguments":
        from .training.training_args import MicroCLIPTrainingArguments

        return MicroCLIPTrainingArguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
