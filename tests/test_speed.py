"""What is done to be fast gives the numbers of the plain way, and does without what it is meant to do without."""

import pytest
import torch
from adaptation import CLASS_NAMES, adapt, draw_images
from decisions import ClearDecisions
from naive_step import NaiveStep
from test_invariance import assert_same_run
from tiny_inputs import make_clip, make_tokenizer
from tolerances import within
from torch.nn.functional import normalize
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import QuickGELUActivation

from microclip_hf import (
    MicroCLIPForImageClassification,
    MicroCLIPTrainer,
    MicroCLIPTrainingArguments,
    modeling_microclip,
)
from microclip_hf.machine import MAX_WORKERS
from microclip_hf.modeling_microclip import QuickGELU


pytestmark = pytest.mark.numerical


@pytest.fixture
def trainer(clip_folder, tmp_path):
    return make_trainer(clip_folder, tmp_path)


def make_trainer(clip, folder, **options):
    model = MicroCLIPForImageClassification.from_clip(
        clip, CLASS_NAMES, prior_weighting="uniform", tokenizer=make_tokenizer()
    )
    args = MicroCLIPTrainingArguments(str(folder), use_cpu=True, num_crops=2, **options)
    return MicroCLIPTrainer(model=model, args=args, train_dataset=draw_images(6))


def make_batch(trainer):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(6)])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_last_layer_of_needed_tokens_is_the_last_layer(clip, attention):
    clip.set_attn_implementation(attention)
    model = MicroCLIPForImageClassification.from_clip(
        clip, CLASS_NAMES, prior_weighting="uniform", tokenizer=make_tokenizer()
    )
    plain, layer = clip.vision_model.encoder.layers[-1], model.clip.vision_model.encoder.layers[-1]
    states = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0))
    values = plain.self_attn.out_proj(plain.self_attn.v_proj(plain.layer_norm1(states)))
    expected = states + values
    expected = expected + plain.mlp(plain.layer_norm2(expected))
    close = within(expected.abs().max())
    assert_close(layer(states, None), plain(states, None), **close)
    assert_close(layer(states, tokens="cls"), plain(states, None)[:, :1], **close)
    assert_close(layer(states, tokens="all")[:, 0], plain(states, None)[:, 0], **close)
    assert_close(layer(states, tokens="all")[:, 1:], expected[:, 1:], **close)


def test_quick_gelu_is_transformers_own():
    inputs = torch.linspace(-20, 20, 1001, dtype=torch.float64, requires_grad=True)
    outputs = [module(inputs) for module in (QuickGELU(), QuickGELUActivation())]
    gradients = [torch.autograd.grad(output.sum(), inputs)[0] for output in outputs]
    assert_close(outputs[0], outputs[1], atol=1e-14, rtol=1e-12)
    assert_close(gradients[0], gradients[1], atol=1e-14, rtol=1e-12)
    before = inputs.detach().clone()
    with torch.no_grad():
        assert_close(QuickGELU()(inputs), outputs[1], atol=1e-14, rtol=1e-12)
    assert inputs.detach().equal(before)


def test_labels_do_not_depend_on_the_chunks(trainer):
    batch, views = make_batch(trainer), []
    encode = trainer.model.coarse_embeds
    for chunk_size in (1, 4, 1000):
        trainer.labeler.chunk_size = chunk_size
        with ClearDecisions():
            labels = trainer.refine_pseudo_labels(batch)
        views.append((labels, trainer.encode_views(encode, batch["crops"].flatten(0, 1))))
    for labels, embeds in views[1:]:
        assert labels.equal(views[0][0])
        assert_close(embeds, views[0][1], **within())


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host has to wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item"):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("prior_refresh", ["step", "never"])
def test_a_step_reads_nothing_from_the_device(clip_folder, tmp_path, monkeypatch, prior_refresh):
    """The check for NaN is the only one that reads, and only on a CPU."""
    monkeypatch.setattr(modeling_microclip, "check_finite", lambda *args: None)
    monkeypatch.setattr("microclip_hf.saliency.check_finite", lambda *args: None)
    trainer = make_trainer(clip_folder, tmp_path)
    batch = {**make_batch(trainer), "labels": torch.tensor([0, 1, -100, 2, 0, 1])}
    if prior_refresh == "never":
        batch["prior_scores"] = torch.zeros(6, 3)
        del batch["crops"]
    trainer.model.train()
    trainer.start_epoch(0)
    trainer.compute_loss(trainer.model, batch).backward()  # one an epoch: whether the first class mean is finite
    with HostReads() as reads:
        trainer.compute_loss(trainer.model, batch).backward()
    assert reads.found == []
    with HostReads() as reads:
        torch.ones(()).item()
    assert reads.found


def saved_bytes(run):
    """What autograd keeps for the backward pass, each storage once."""
    sizes = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(sizes.values())


def test_a_step_keeps_less_than_the_reference(tmp_path):
    """As wide inside as CLIP's layers are: four times."""
    clip = make_clip(make_tokenizer())
    config = clip.config
    config.vision_config.intermediate_size, config.vision_config.num_hidden_layers = 128, 12
    clip = type(clip)(config)
    trainer = make_trainer(clip, tmp_path)
    trainer.model.train()
    batch = make_batch(trainer)
    naive = NaiveStep(clip, trainer.model.classifier.weight, normalize(trainer.model.prior_head.weight, dim=-1))
    own = saved_bytes(lambda: trainer.model(trainer.normalize(batch["strong"])).logits)
    assert own < 0.75 * saved_bytes(lambda: naive.logits(batch["strong"]))
    trainer.model.gradient_checkpointing_enable()
    assert saved_bytes(lambda: trainer.model(trainer.normalize(batch["strong"])).logits) < 0.35 * own


def test_labels_under_autocast(clip_folder, tmp_path):
    """Other labels than in float32 may come out where scores nearly tie; weights and gradients stay float32."""
    runs = [
        adapt(clip_folder, tmp_path / str(low), bf16=True, autocast_pseudo_labels=low, num_train_epochs=1)
        for low in (False, True)
    ]
    first = [run.state.log_history[0]["pseudo_label_confidence"] for run in runs]
    assert first[0] != first[1]
    assert first[1] == pytest.approx(first[0], rel=0.05)
    assert {parameter.dtype for parameter in runs[1].model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="autocast_pseudo_labels needs bf16 or fp16"):
        MicroCLIPTrainingArguments(str(tmp_path), autocast_pseudo_labels=True)


@pytest.mark.slow
def test_a_compiled_run_is_the_run(clip_folder, tmp_path, monkeypatch):
    """Teacher and student, by a back end that needs no compiler; few graphs, not one for each step."""
    with ClearDecisions():
        reference = adapt(clip_folder, tmp_path / "one")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", None)
    trainer = adapt(clip_folder, tmp_path / "two", torch_compile=True, torch_compile_backend="eager")
    assert_same_run(trainer.state.log_history, trainer.model.state_dict(), reference)
    assert 3 <= counters["stats"]["unique_graphs"] <= 9


def test_workers_by_default(tmp_path, monkeypatch):
    """None beside a model on the CPU; beside a GPU this process's share of the cores."""
    assert MicroCLIPTrainingArguments(str(tmp_path), use_cpu=True).dataloader_num_workers == 0
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: "fork")
    assert MicroCLIPTrainingArguments(str(tmp_path)).dataloader_num_workers == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    args = MicroCLIPTrainingArguments(str(tmp_path))
    assert args.dataloader_num_workers == 1 and args.accelerator_config.non_blocking
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(256), raising=False)
    assert MicroCLIPTrainingArguments(str(tmp_path)).dataloader_num_workers == MAX_WORKERS
    assert MicroCLIPTrainingArguments(str(tmp_path), dataloader_num_workers=3).dataloader_num_workers == 3
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: "spawn")
    assert MicroCLIPTrainingArguments(str(tmp_path)).dataloader_num_workers == 0
