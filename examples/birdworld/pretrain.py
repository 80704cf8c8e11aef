"""
Pre-train the bird world's CLIP from nothing, with the source domain's pictures and captions, drawn as they are needed.

    cd examples && OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 --module birdworld.pretrain

Two processes of one thread each are faster on two cores than one of two. An interrupted run goes on from the last
checkpoint when the command is repeated; a checkpoint is written every four minutes. The loss has three parts:

- InfoNCE between an image's [CLS] feature and its caption;
- for each attribute, cross-entropy of the [CLS] feature between captions that name one value each;
- the same for patch tokens of the last layer's value path: every caption attends to the patches that are like it, and
  their weighted mean is classified. Without it patch tokens mean nothing to the text tower of so small a CLIP. Neither
  the mean over all patches nor any mask is favoured.
"""

import argparse
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from microclip_hf.modeling_microclip import run_tower, with_own_layers

from .domains import SOURCE_LOOK, source_example
from .measure import FACTS, measure
from .render import Look
from .texts import attribute_caption
from .tiny_clip import FOLDER, make_clip, make_tokenizer, save


CLS_WEIGHT, PATCH_WEIGHT = 4, 2
SECONDS_BETWEEN_CHECKPOINTS = 240
CHECKPOINT = Path(__file__).parents[2] / "outputs" / "pretrain" / "checkpoint.pt"


class PretrainingLoss(nn.Module):
    """CLIP and its loss, in one module for the data-parallel wrapper."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = with_own_layers(clip)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The loss and its parts; see [`make_batch`]."""
        vision, projection = self.clip.vision_model, self.clip.visual_projection
        hidden_states = run_tower(vision, batch["pixel_values"], interpolate_pos_encoding=False)
        tokens = vision.post_layernorm(vision.encoder.layers[-1](hidden_states, tokens="all"))
        # The captions of single attributes are short: apart from the others they need less padding.
        texts = [self.clip.get_text_features(**batch[name]).pooler_output for name in ("captions", "values")]
        scale = self.clip.logit_scale.exp()
        embeds = (projection(tokens[:, 0]), projection(tokens[:, 1:]), *texts)
        images, patches, captions, values = (normalize(own.float(), dim=-1) for own in embeds)
        logits = scale * images @ captions.T
        targets = torch.arange(len(images), device=logits.device)
        contrast = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
        similar = patches @ values.T
        found = ((scale * similar).softmax(1) * similar).sum(1)
        cls_loss = attribute_loss(scale * images @ values.T, batch["facts"])
        patch_loss = attribute_loss(scale * found, batch["facts"])
        loss = contrast + CLS_WEIGHT * cls_loss + PATCH_WEIGHT * patch_loss
        return {"loss": loss, "contrast": contrast, "cls_attributes": cls_loss, "patch_attributes": patch_loss}


def attribute_loss(logits: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over attributes; logits `(B, all values)`, facts `(B, attributes)`."""
    groups = logits.split([len(values) for values in FACTS.values()], dim=1)
    return torch.stack([cross_entropy(group, facts[:, index]) for index, group in enumerate(groups)]).mean()


def make_batch(tokenizer: CLIPTokenizer, indices: range, progress: float, seed: int) -> dict[str, Any]:
    """Images and captions of these indices, and for every value of every attribute a caption that names it.

    Args:
        tokenizer (`CLIPTokenizer`): the world's.
        indices (`range`): which images of the endless source domain; each depends on its index and `seed` alone.
        progress (`float`): share of the training done, in [0, 1].
        seed (`int`): of the whole run.
    """
    look = source_look(progress)
    examples = [source_example(random.Random(f"source {seed} {index}"), look) for index in indices]
    rng = random.Random(f"captions {seed} {indices.start}")
    values = [attribute_caption(name, value, rng) for name, own in FACTS.items() for value in own]
    captions = [text for _, _, text in examples]
    return {
        "pixel_values": to_pixel_values(np.stack([np.asarray(image) for image, _, _ in examples])),
        "facts": torch.tensor([[own.index(facts[name]) for name, own in FACTS.items()] for _, facts, _ in examples]),
        "captions": dict(tokenizer(captions, padding=True, truncation=True, return_tensors="pt")),
        "values": dict(tokenizer(values, padding=True, return_tensors="pt")),
    }


def source_look(progress: float) -> Look:
    """Birds of like size and pose in the middle first, then all of them, at last facing both ways."""
    ease = max(0, 1 - progress / 0.4)
    low, high = SOURCE_LOOK.scale
    return replace(
        SOURCE_LOOK,
        scale=(low + 16 * ease, high - 16 * ease),
        offset=SOURCE_LOOK.offset * (1 - 0.8 * ease),
        tilt=SOURCE_LOOK.tilt * (1 - 0.8 * ease),
        mirrored=SOURCE_LOOK.mirrored * min(1, max(0, progress - 0.4) / 0.2),
    )


def to_pixel_values(images: np.ndarray) -> torch.Tensor:
    """`(B, H, W, 3)` uint8 to `(B, 3, H, W)`, normalised as CLIP's image processor does."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over 4 % of the training, then a cosine to a hundredth."""
    return peak * min(1, progress / 0.04) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def main() -> None:
    """Train, or go on training, then save and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=600_000, help="images drawn in all")
    parser.add_argument("--batch_size", type=int, default=64, help="images a step in each process")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    module = PretrainingLoss(make_clip(tokenizer))
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    settings = {name: getattr(options, name) for name in ("num_images", "batch_size", "learning_rate", "seed")}
    settings["processes"] = accelerator.num_processes
    start, seconds, log = load_checkpoint(options.checkpoint, module, optimizer, settings)
    module, optimizer = accelerator.prepare(module, optimizer)
    clip = accelerator.unwrap_model(module).clip
    step_size = options.batch_size * accelerator.num_processes
    num_steps = options.num_images // step_size
    began = saved = time.monotonic()
    progress_bar = tqdm(
        range(start, num_steps), initial=start, total=num_steps, disable=not accelerator.is_main_process
    )
    for step in progress_bar:
        progress = step / num_steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, options.learning_rate)
        first = step * step_size + accelerator.process_index * options.batch_size
        batch = make_batch(tokenizer, range(first, first + options.batch_size), progress, options.seed)
        parts = module(send_to_device(batch, accelerator.device))
        accelerator.backward(parts["loss"])
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        elapsed = seconds + time.monotonic() - began
        if step % 100 == 0 and accelerator.is_main_process:
            figures = {name: round(value.item(), 4) for name, value in parts.items()}
            log.append({"images": step * step_size, "seconds": round(elapsed), **figures})
            tqdm.write(json.dumps(log[-1]))
        if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS and accelerator.is_main_process:
            save_checkpoint(options.checkpoint, clip, optimizer, settings, step + 1, elapsed, log)
            saved = time.monotonic()
    if accelerator.is_main_process:
        elapsed = round(seconds + time.monotonic() - began)
        save_checkpoint(options.checkpoint, clip, optimizer, settings, num_steps, elapsed, log)
        save(clip, tokenizer, options.output_dir)
        run = {"images": num_steps * step_size, "seconds": elapsed, "settings": settings}
        results = {**run, "log": log, **measure(options.output_dir)}
        (options.output_dir / "pretraining.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        options.checkpoint.unlink()
    accelerator.end_training()


def save_checkpoint(
    path: Path,
    clip: CLIPModel,
    optimizer: Any,
    settings: dict[str, float],
    step: int,
    seconds: float,
    log: list[dict[str, float]],
) -> None:
    """All that a run needs to go on; never half-written under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    state = {"clip": clip.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "settings": settings, "step": step, "seconds": seconds, "log": log}, partial)
    partial.replace(path)


def load_checkpoint(
    path: Path, module: PretrainingLoss, optimizer: Any, settings: dict[str, float]
) -> tuple[int, float, list[dict[str, float]]]:
    """The next step, the seconds spent so far and the log; zeros where there is no checkpoint.

    Raises:
        ValueError: if the checkpoint is of a run with other settings.
    """
    if not path.exists():
        return 0, 0.0, []
    checkpoint = torch.load(path, weights_only=True)
    if checkpoint["settings"] != settings:
        raise ValueError(
            f"{path} is of a run with {checkpoint['settings']}, this one has {settings}. Repeat that run's command, "
            "or remove the file to start afresh."
        )
    module.clip.load_state_dict(checkpoint["clip"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"], checkpoint["seconds"], checkpoint["log"]


if __name__ == "__main__":
    main()
