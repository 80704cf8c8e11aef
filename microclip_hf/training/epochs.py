"""When a run, and each epoch of it, begins and ends."""

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy


class HasEpochs(Protocol):
    """What is told."""

    def start_training(self) -> None:
        """The run begins."""

    def start_epoch(self, epoch: int) -> None:
        """An epoch, counted from 0, begins."""

    def finish_epoch(self) -> None:
        """It is complete."""


class EpochCallback(TrainerCallback):
    """Tells the Trainer when its run, and each epoch of it, begins and ends; logs ends of runs and of short epochs."""

    def __init__(self, trainer: HasEpochs) -> None:
        self.trainer = trainer
        self.epoch = 0  # epochs that were complete as this one began

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.start_training()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0)
        self.trainer.start_epoch(self.epoch)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.finish_epoch()
        is_logged = any("loss" in entry and entry["epoch"] > self.epoch for entry in state.log_history)
        is_last = state.global_step >= state.max_steps
        if args.logging_strategy != IntervalStrategy.NO and (is_last or not is_logged):
            control.should_log = True
