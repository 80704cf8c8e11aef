"""The bars of a run: one while it adapts, with what matters beside it, and one while it is measured."""

from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging


# Of what is logged: its name and format beside the bar.
SHOWN = {"loss": "loss {:.3g}", "effective_classes": "{:.1f} classes in use"}


class ProgressBar(ProgressCallback):
    """transformers' bars with names, and the latest figures in them in place of a dictionary after each period.

    The dictionaries are in `trainer_state.json`; those of evaluations are printed. The bar of an evaluation goes when
    it is over, and `transformers.logging.disable_progress_bar()` leaves it out.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As in the base class, with a name, and no bar where there is no step to take."""
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, desc="Adapting", dynamic_ncols=True, disable=state.max_steps == 0
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Figures of training go beside the bar, its sum at the end nowhere, and all else is printed."""
        if self.training_bar is None or "train_runtime" in logs:
            return
        if "loss" not in logs:
            super().on_log(args, state, control, logs, **kwargs)
            return
        self.training_bar.set_postfix_str(", ".join(SHOWN[name].format(logs[name]) for name in SHOWN if name in logs))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """As in the base class."""
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self.prediction_bar is None:
            total = len(eval_dataloader)
            self.prediction_bar = logging.tqdm(total=total, desc="Evaluating", leave=False, dynamic_ncols=True)
        self.prediction_bar.update(1)
