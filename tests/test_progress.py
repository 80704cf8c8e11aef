"""What a run shows while it adapts: one bar with the latest figures beside it."""

import re

import pytest
import transformers
from adaptation import adapt, draw_images


@pytest.fixture
def no_other_bars():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def test_figures_stand_beside_the_bar(clip_folder, tmp_path, capsys, no_other_bars):
    """In place of dictionaries; an evaluation's bar goes with transformers' own."""
    trainer = adapt(clip_folder, tmp_path, disable_tqdm=False, num_train_epochs=1)
    trainer.predict(draw_images(4))
    output, errors = capsys.readouterr()
    last = [entry for entry in trainer.state.log_history if "cross_entropy" in entry][-1]
    figures = f"loss {last['loss']:.3g}, {last['effective_classes']:.1f} classes in use"
    bar = re.split(r"[\r\n]+", errors.strip())
    assert all(line.startswith("Adapting: ") for line in bar) and "3/3 [" in bar[-1] and figures in bar[-1]
    assert output == ""


def test_evaluations_in_between_are_printed(clip_folder, tmp_path, capsys):
    """Their figures belong to an epoch and would be lost; they have a bar of their own."""
    trainer = adapt(clip_folder, tmp_path, disable_tqdm=False, num_train_epochs=1)
    capsys.readouterr()
    trainer.eval_dataset = trainer.eval_datasets.align(draw_images(4))
    trainer.args.eval_strategy = "epoch"
    trainer.control.should_evaluate = True
    trainer.train()
    output, errors = capsys.readouterr()
    assert output.count("'eval_accuracy'") == 1 and "Evaluating: 100%" in errors
