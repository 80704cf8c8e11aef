"""Checkpoints and models that are whole: under its final name lies what is complete, however a run ends."""

import os
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import CONFIG_NAME


# In the output folder: where files are written before they get their final name.
INCOMPLETE = "_incomplete"
# In a checkpoint: what self-training remembers besides weights.
STATE_NAME = "self_training.safetensors"


def turns(accelerator: Accelerator) -> Iterator[bool]:
    """Who writes files: the first process of all, then the first of each machine, whose disk may be its own."""
    for has_turn in (accelerator.is_main_process, accelerator.is_local_main_process):
        accelerator.wait_for_everyone()
        yield has_turn
    accelerator.wait_for_everyone()


def remove_incomplete(output_dir: str) -> None:
    """Clear away what a run that was killed was writing."""
    shutil.rmtree(os.path.join(output_dir, INCOMPLETE), ignore_errors=True)


def load_state(checkpoint: str) -> dict[str, torch.Tensor] | None:
    """What self-training remembered at a checkpoint; `None`, with a warning, where that is missing."""
    path = os.path.join(checkpoint, STATE_NAME)
    if os.path.exists(path):
        return load_file(path)
    warnings.warn(f"{checkpoint} has no {STATE_NAME}; the run goes on a little differently.", stacklevel=2)
    return None


class SavingTrainer(Trainer):
    """The Trainer's overrides for what it writes; subclasses say what a checkpoint holds besides the base class's."""

    def prepare_state(self) -> dict[str, torch.Tensor]:
        """What self-training remembers, for a checkpoint; every process calls it. A `NonFiniteError` if the weights
        must not be saved.
        """
        raise NotImplementedError

    @property
    def image_facts(self) -> dict[str, str]:
        """What a checkpoint says of the images."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the base class; it never pushes, which `push_to_hub` does once all is there."""
        super().save_model(output_dir, _internal_call=True)

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), INCOMPLETE)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As in the base class, with self-training's state; a checkpoint has its final name once it is complete."""
        state = self.prepare_state()
        incomplete = self._get_output_dir(trial)
        folder = os.path.join(incomplete, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            save_file(state, os.path.join(folder, STATE_NAME), metadata=self.image_facts)
        super()._save_checkpoint(model, trial)
        for has_turn in turns(self.accelerator):
            if has_turn and os.path.exists(folder):
                self._finish_checkpoint(folder, os.path.dirname(incomplete))

    def _finish_checkpoint(self, folder: str, run_dir: str) -> None:
        """Give a checkpoint its name, and remove old ones."""
        final = os.path.join(run_dir, os.path.basename(folder))
        if os.path.exists(final):  # of an earlier life of this run
            os.replace(final, folder + "-earlier")
        os.replace(folder, final)
        incomplete = os.path.dirname(folder)
        if self.args.save_total_limit:  # moved before they are deleted: none is ever half there
            for old in sort_checkpoints(run_dir, use_mtime=True)[: -self.args.save_total_limit]:
                os.replace(old, os.path.join(incomplete, os.path.basename(old)))
        shutil.rmtree(incomplete)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in the base class, each file complete under its final name, config.json last. Settings are saved as JSON:
        the Trainer's own file is a pickle that nothing reads back.
        """
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        incomplete = os.path.join(output_dir, INCOMPLETE)
        if self.args.should_save:
            remove_incomplete(output_dir)
        super()._save(incomplete, state_dict)
        if not self.args.should_save:
            return
        os.remove(os.path.join(incomplete, TRAINING_ARGS_NAME))
        with open(os.path.join(incomplete, "training_args.json"), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())
        for name in sorted(os.listdir(incomplete), key=lambda name: name == CONFIG_NAME):
            os.replace(os.path.join(incomplete, name), os.path.join(output_dir, name))
        os.rmdir(incomplete)
