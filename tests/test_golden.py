"""Every stage, the text heads and training agree with the published implementation."""

import pytest
import torch
from conftest import PUBLISHED_SCALE
from tolerances import LOSS, assert_gradients_close, assert_weights_close, within
from torch.testing import assert_close

from microclip_hf import MicroCLIPTrainer, MicroCLIPTrainingArguments
from microclip_hf.pseudo_labels import aggregate_scores, composite_embeds, fuse_embeds
from microclip_hf.saliency import fiedler_vector, patch_affinity
from microclip_hf.text_heads import build_heads


pytestmark = pytest.mark.numerical


def golden_arguments(golden, folder, **kwargs):
    return MicroCLIPTrainingArguments(
        str(folder),
        per_device_train_batch_size=golden.meta["batch"],
        num_train_epochs=len(golden.meta["epochs_of_steps"]),
        learning_rate=golden.tensors["train.lr"][0].item(),
        weight_decay=golden.meta["weight_decay"],
        num_crops=golden.meta["n_crops"],
        prior_ratio=golden.meta["gamma"],
        save_strategy="no",
        use_cpu=True,
        **kwargs,
    )


def test_golden_text_heads(golden, golden_features):
    prompts, _ = golden_features
    names = torch.stack([torch.nn.functional.normalize(p.mean(0), dim=-1) for p in prompts])
    assert_close(names, golden.tensors["text.classname_embeddings"], **within())
    classifier, prior_head = build_heads(*golden_features)
    assert_close(classifier, golden.tensors["text.learnable_init"], **within())
    assert_close(prior_head, golden.tensors["text.frozen_classifier"], **within())


@torch.no_grad()
def test_golden_stages(golden, golden_model, tmp_path):
    trainer = MicroCLIPTrainer(model=golden_model, args=golden_arguments(golden, tmp_path))
    views, stage = golden.tensors["views.0"], {}
    output = golden_model(trainer.normalize(views[:, 0]), output_patch_embeds=True)
    stage["global"], stage["local"] = output.cls_embeds, output.fg_embeds
    stage["attention"] = output.fg_attention
    stage["fiedler_abs"] = fiedler_vector(patch_affinity(output.patch_embeds)).abs()
    stage["fused"] = fuse_embeds(output.cls_embeds, output.fg_embeds, 0.5)
    crops = [golden_model.coarse_embeds(trainer.normalize(crop)) for crop in views[:, 2:].unbind(1)]
    stage["composite"] = composite_embeds(torch.stack(crops, 1), output.cls_embeds)
    stage["pseudo_logits"] = aggregate_scores(
        golden_model.prior_head(stage["composite"]), golden_model.classifier(stage["fused"]), golden.meta["gamma"]
    )
    for name, value in stage.items():
        assert_close(value, golden.tensors[f"stage.{name}"], **within(), msg=lambda text, name=name: f"{name}: {text}")
    tokens = golden.tensors["stage.patch_tokens"]
    assert_close(output.patch_embeds, tokens, **within(tokens.abs().max()))
    assert output.saliency_mask.equal(golden.tensors["stage.mask"])
    assert stage["pseudo_logits"].argmax(-1).equal(golden.tensors["stage.pseudo_labels"])
    eval_logits = golden_model(trainer.normalize(views[:, 1])).logits
    assert_close(eval_logits, golden.tensors["stage.eval_logits"], **within(PUBLISHED_SCALE))


class GoldenViews(torch.utils.data.Dataset):
    """The recorded views in their order; each epoch has its own."""

    def __init__(self, golden):
        self.steps, self.batch = golden.meta["epochs_of_steps"][0], golden.meta["batch"]
        self.views = torch.cat([golden.tensors[f"views.{i}"] for i in range(sum(golden.meta["epochs_of_steps"]))])
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.steps * self.batch

    def __getitem__(self, index):
        views = self.views[self.epoch * len(self) + index]
        return {"weak": views[0], "strong": views[1], "crops": views[2:]}


class Recorder(MicroCLIPTrainer):
    """Reads along without changing the training."""

    losses, labels, gradients = (), (), None

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def refine_pseudo_labels(self, inputs):
        self.labels = (*self.labels, super().refine_pseudo_labels(inputs))
        return self.labels[-1]

    def training_step(self, *args, **kwargs):
        self.losses = (*self.losses, super().training_step(*args, **kwargs))
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad}
        return self.losses[-1]


def recorded(golden, prefix):
    return {name.removeprefix(prefix): value for name, value in golden.tensors.items() if name.startswith(prefix)}


def test_golden_training(golden, golden_model, tmp_path):
    """None of its labels and masks hangs on rounding, see test_naive_step.py."""
    rates = golden.tensors["train.lr"].double()
    trainer = Recorder(model=golden_model, args=golden_arguments(golden, tmp_path), train_dataset=GoldenViews(golden))
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: (rates[min(step, len(rates) - 1)] / rates[0]).item()
    )
    trainer.train()

    assert torch.stack(trainer.labels).equal(golden.tensors["train.pseudo_labels"])
    assert_close(torch.stack(trainer.losses), golden.tensors["train.losses"], rtol=LOSS, atol=0)

    def published_name(name):
        name = name.removeprefix("clip.").removeprefix("fg_pooling.")
        return "classifier" if name == "classifier.weight" else name

    gradients = {published_name(name): value for name, value in trainer.gradients.items()}
    finals = {published_name(n): p.detach() for n, p in golden_model.named_parameters() if p.requires_grad}
    assert_gradients_close(gradients, recorded(golden, "train.grad0."))
    assert_weights_close(finals, recorded(golden, "train.final."), rates.sum().item())


@pytest.mark.parametrize("epochs", [1, 3])
def test_learning_rate_is_the_published_schedule(golden, golden_model, tmp_path, epochs):
    """Cosine from 1e-4 to 2e-6 over all steps, no warm-up, AdamW with torch's defaults."""
    args = golden_arguments(golden, tmp_path)
    args.num_train_epochs, args.learning_rate = epochs, MicroCLIPTrainingArguments(str(tmp_path)).learning_rate
    rates = []

    class Rates(MicroCLIPTrainer):
        def training_step(self, *args, **kwargs):
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(*args, **kwargs)

    dataset = GoldenViews(golden)
    dataset.set_epoch = lambda epoch: None
    trainer = Rates(model=golden_model, args=args, train_dataset=dataset)
    trainer.train()
    progress = torch.arange(len(rates), dtype=torch.float64) / len(rates)
    expected = 2e-6 + (1e-4 - 2e-6) * (1 + torch.cos(torch.pi * progress)) / 2
    assert_close(torch.tensor(rates, dtype=torch.float64), expected, rtol=1e-6, atol=0)
    (group,) = [group for group in trainer.optimizer.param_groups if group["params"]]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (golden.meta["weight_decay"], (0.9, 0.999), 1e-8)
