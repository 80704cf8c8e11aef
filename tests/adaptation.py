"""One small adaptation run, in this process or, as a program, in each process of `torchrun`; there, several runs too.

python tests/adaptation.py CLIP_FOLDER '{"output_dir": "out", "num_train_epochs": 1}' ...
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from datasets import Dataset
from tiny_inputs import DESCRIPTIONS, draw_shape

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.report.record import write_record


CLASS_NAMES = list(DESCRIPTIONS)


def draw_images(count: int = 20) -> Dataset:
    """The same images at every call, with labels."""
    rng = np.random.default_rng(0)
    labels = [i % len(CLASS_NAMES) for i in range(count)]
    images = [draw_shape(CLASS_NAMES[label], rng) for label in labels]
    return Dataset.from_dict({"image": images, "label": labels})


def adapt(
    clip,
    output_dir,
    dataset=None,
    num_images=20,
    num_shards=None,
    resume=None,
    attention="sdpa",
    callbacks=None,
    **kwargs,
):
    """Adapt to `draw_images(num_images)`, as a stream where they have `num_shards`, or to another data set; settings
    as in `MicroCLIPTrainingArguments`.
    """
    model = MicroCLIPForImageClassification.from_clip(
        clip, CLASS_NAMES, prior_weighting="uniform", attn_implementation=attention
    )
    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "num_crops": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
    }
    args = MicroCLIPTrainingArguments(str(output_dir), **{**defaults, **kwargs})
    dataset = draw_images(num_images) if dataset is None else dataset
    dataset = dataset if num_shards is None else dataset.to_iterable_dataset(num_shards=num_shards)
    trainer = MicroCLIPTrainer(model=model, args=args, train_dataset=dataset, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    clip, *runs = sys.argv[1:]
    for run in runs:
        trainer = adapt(clip, **json.loads(run))
        trainer.save_model()
        if trainer.is_world_process_zero():
            write_record(trainer)
            Path(trainer.args.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
    trainer.leave_group()
    threads = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # of one that has just ended
            threads.append(path.read_text())
    assert not [name for name in threads if "gloo" in name], threads  # one that is left may abort the exit
