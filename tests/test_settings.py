"""Whatever the settings are, the Trainer does what the plain step does: no constant stands in for a setting."""

import copy

import pytest
import torch
from naive_step import NaiveStep
from test_golden import Recorder
from test_naive_step import assert_certain
from tolerances import LOSS
from torch.testing import assert_close

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification, MicroCLIPTrainingArguments


pytestmark = pytest.mark.numerical
NUM_LABELS = 7
RATE = 1e-3


def draw_blocks(*shape, seed):
    """Pictures (*shape, 3, 32, 32) of 4 x 4 blocks of random colours, uint8: coarse enough for patches to differ."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(256, (*shape, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return colors.repeat_interleave(8, -1).repeat_interleave(8, -2)


class RandomViews(torch.utils.data.Dataset):
    """The same in each epoch."""

    def __init__(self, num_images, num_crops):
        self.views = draw_blocks(num_images, 2 + num_crops, seed=4)

    def __len__(self):
        return len(self.views)

    def __getitem__(self, index):
        weak, strong, *crops = self.views[index]
        return {"weak": weak, "strong": strong, "crops": torch.stack(crops)}


@torch.no_grad()
def spread_heads(clip):
    """Two heads (C, E) that give images different labels: to random weights all images look nearly the same."""
    images = draw_blocks(2 * NUM_LABELS, seed=0)
    features = clip.get_image_features((images / 255 - 0.45) / 0.27).pooler_output
    return torch.nn.functional.normalize(features - features.mean(0), dim=-1).chunk(2)


# gamma, lambda, K, the logit scale, images a batch, images, epochs. A last batch may be smaller than the others, and
# an epoch may be one step.
@pytest.mark.parametrize(
    ("gamma", "fusion_ratio", "num_crops", "scale", "batch_size", "num_images", "num_epochs"),
    [
        (0.8, 0.2, 1, 30, 5, 13, 2),
        (0.1, 0.9, 3, 7, 4, 8, 3),
        (0.6, 0.0, 2, None, 6, 12, 2),
        (0.0, 1.0, 5, 20, 3, 7, 1),
    ],
)
def test_settings(clip, tmp_path, gamma, fusion_ratio, num_crops, scale, batch_size, num_images, num_epochs):
    dataset = RandomViews(num_images, num_crops)
    config = MicroCLIPConfig(
        clip_config=clip.config.to_dict(), num_labels=NUM_LABELS, fusion_ratio=fusion_ratio, logit_scale=scale
    )
    model = MicroCLIPForImageClassification(config)
    model.clip.load_state_dict(clip.state_dict(), strict=False)
    classifier, prior_head = spread_heads(clip)
    model.classifier.weight.data.copy_(classifier)
    model.prior_head.weight.copy_(prior_head)
    step = NaiveStep(
        copy.deepcopy(clip),
        classifier,
        prior_head,
        logit_scale=scale,
        learning_rate=RATE,
        prior_ratio=gamma,
        fusion_ratio=fusion_ratio,
    )
    for group in step.optimizer.param_groups:
        assert group["weight_decay"] == 0.1

    args = MicroCLIPTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=batch_size,
        num_train_epochs=num_epochs,
        num_crops=num_crops,
        prior_ratio=gamma,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Recorder(model=model, args=args, train_dataset=dataset)
    trainer.train()

    losses, labels = [], []
    for _ in range(num_epochs):
        step.start_epoch()
        for batch in torch.utils.data.DataLoader(dataset, batch_size):
            assert_certain(step, **batch)
            loss, pseudo_labels = step.step(**batch)
            losses.append(loss)
            labels.append(pseudo_labels)
    assert len(losses) == len(trainer.losses)
    for found, expected in zip(trainer.labels, labels, strict=True):
        assert found.equal(expected)
    assert len(torch.cat(labels).unique()) > 1
    assert_close(torch.stack(trainer.losses), torch.tensor(losses), rtol=LOSS, atol=0)
