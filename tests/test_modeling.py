"""The model as a transformers user meets it."""

import json

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES
from decisions import ClearDecisions
from safetensors.torch import load_file
from tiny_inputs import LOGIT_SCALE, TOKENIZERS, make_clip, save_clip
from tolerances import assert_gradients_close, within
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, CLIPConfig, CLIPVisionModelWithProjection

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification, MicroCLIPOutput
from microclip_hf.modeling_microclip import MicroCLIPPooling, clip_class


pytestmark = pytest.mark.numerical


@pytest.fixture(params=TOKENIZERS)
def any_clip(request):
    return make_clip(TOKENIZERS[request.param](), kind=request.param)


def variant(clip, **kwargs):
    """Random heads and projections on the weights of `clip`."""
    torch.manual_seed(1)
    model = MicroCLIPForImageClassification(MicroCLIPConfig(clip_config=clip.config, num_labels=3, **kwargs))
    model.clip.load_state_dict(clip.state_dict(), strict=False)
    for projection in model.fg_pooling.children():
        torch.nn.init.normal_(projection.weight, std=0.2)
    return model.eval()


def test_cls_path_is_clips_own_image_feature(model, clip, pixel_values):
    expected = torch.nn.functional.normalize(clip.get_image_features(pixel_values).pooler_output, dim=-1)
    assert_close(model(pixel_values).cls_embeds, expected, **within())
    assert_close(model.coarse_embeds(pixel_values), expected, **within())


def test_outputs_and_their_shapes(model, pixel_values):
    output = model(pixel_values)
    assert isinstance(output, MicroCLIPOutput)
    assert list(output) == ["logits", "cls_logits", "fg_logits", "cls_embeds", "fg_embeds"]
    output = model(
        pixel_values, labels=torch.tensor([0, 1, 2, 0]), output_patch_embeds=True, output_hidden_states=True
    )
    assert output.loss.shape == ()
    assert output.logits.shape == output.cls_logits.shape == output.fg_logits.shape == (4, 3)
    assert output.cls_embeds.shape == output.fg_embeds.shape == (4, 16)
    assert output.patch_embeds.shape == (4, 16, 32)
    assert output.saliency_mask.shape == (4, 16) and output.saliency_mask.dtype == torch.bool
    assert output.fg_attention.shape == (4, 17)
    assert_close(output.fg_attention.sum(-1), torch.ones(4), **within())
    assert len(output.hidden_states) == 3 and output.attentions is None
    assert_close(output.logits, 0.5 * output.cls_logits + 0.5 * output.fg_logits, **within(LOGIT_SCALE))
    assert isinstance(model(pixel_values, return_dict=False), tuple)


def test_hidden_states_and_attentions_are_the_vision_towers(any_clip, pixel_values):
    any_clip.set_attn_implementation("eager")
    model = variant(any_clip)
    model.set_attn_implementation("eager")
    kwargs = {"output_hidden_states": True, "output_attentions": True}
    own, clips = model(pixel_values, **kwargs), any_clip.vision_model(pixel_values, **kwargs)
    for name in ("hidden_states", "attentions"):
        for found, expected in zip(own[name], clips[name], strict=True):
            assert_close(found, expected, **within(expected.abs().max()))
    model.clip.vision_model(pixel_values, **kwargs)
    again = model(pixel_values, **kwargs)
    assert len(again.hidden_states) == 3 and len(again.attentions) == 2
    assert_close(again.logits, model(pixel_values).logits, **within(LOGIT_SCALE))
    assert model(pixel_values, output_attentions=True).hidden_states is None


def reference_fg_token(model, pixel_values):
    """The [FG] token from METHOD's sections 2 and 3, step by step for one image, in float64."""
    config, double = model.config, {name: value.double() for name, value in model.state_dict().items()}
    clip = clip_class(config.clip_config)(config.clip_config).double()
    clip.load_state_dict(
        {n.removeprefix("clip."): v for n, v in double.items() if n.startswith("clip.")}, strict=False
    )
    vision = clip.vision_model
    x = vision(pixel_values[None].double(), output_hidden_states=True).hidden_states[-2][0]
    layer = vision.encoder.layers[-1]
    v = x + layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(x)))
    patches = vision.post_layernorm(v + layer.mlp(layer.layer_norm2(v)))[1:]
    cls = vision.post_layernorm(layer(x[None], None)[0, 0])
    mask = model(pixel_values[None], output_patch_embeds=True).saliency_mask[0]
    queries = {"saliency": patches[mask].mean(0), "cls": cls, "mean": patches.mean(0)}
    if config.fg_pooling == "masked_mean":
        pooled = patches[mask].mean(0)
    elif config.fg_pooling == "mean":
        pooled = patches.mean(0)
    else:
        w_q, w_k, w_v = (double[f"fg_pooling.{name}_proj.weight"] for name in ("query", "key", "value"))
        tokens = torch.cat([patches, torch.zeros_like(patches[:1])])
        scores = torch.stack([(w_q @ queries[config.fg_query]) @ (w_k @ token) for token in tokens])
        weights = (scores / patches.shape[1] ** 0.5).softmax(0)
        pooled = sum(weight * (w_v @ token) for weight, token in zip(weights, tokens, strict=True))
    return torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)


@pytest.mark.parametrize("query", ["saliency", "cls", "mean"])
@pytest.mark.parametrize("pooling", ["attention", "masked_mean", "mean"])
@torch.no_grad()
def test_ablations_equal_their_definition(any_clip, pixel_values, query, pooling):
    model = variant(any_clip, fg_query=query, fg_pooling=pooling)
    expected = torch.stack([reference_fg_token(model, image) for image in pixel_values])
    assert_close(model(pixel_values).fg_embeds.double(), expected, **within())


@torch.no_grad()
def test_random_query_is_one_patch_and_repeats(clip, pixel_values):
    model = variant(clip, fg_query="random")
    patches = model(pixel_values, output_patch_embeds=True).patch_embeds
    query = model.fg_pooling._query(patches, None, None)
    assert all((row == image).all(-1).any() for row, image in zip(query, patches, strict=True))
    assert model(pixel_values).logits.equal(model(pixel_values).logits)
    assert_close(model(pixel_values).logits[2:], model(pixel_values[2:]).logits, **within(LOGIT_SCALE))


@pytest.mark.parametrize("ratio", [0, 0.3, 1])
def test_fusion_and_scale(clip, pixel_values, ratio):
    output = variant(clip, fusion_ratio=ratio, logit_scale=7)(pixel_values)
    weight = torch.nn.functional.normalize(variant(clip).classifier.weight, dim=-1)
    expected = 7 * (ratio * output.cls_embeds @ weight.T + (1 - ratio) * output.fg_embeds @ weight.T)
    assert_close(output.logits, expected, **within(7))


def test_scale_comes_from_the_checkpoint_by_default(clip, pixel_values):
    clip.logit_scale.data.fill_(3.0)
    scale = float(np.exp(3.0))
    expected = variant(clip, logit_scale=scale)(pixel_values).logits
    assert_close(variant(clip)(pixel_values).logits, expected, **within(scale))


def test_rows_of_the_classifier_may_have_any_norm(model, pixel_values):
    expected = model(pixel_values).logits
    model.classifier.weight.data.mul_(torch.tensor([[0.1], [3.0], [100.0]]))
    assert_close(model(pixel_values).logits, expected, **within(LOGIT_SCALE))


def test_hidden_states_are_not_stored_for_the_second_path(any_clip, pixel_values, monkeypatch):
    """While the last layer runs, the inputs of the earlier ones are gone."""
    import weakref

    model, inputs, alive = variant(any_clip), [], []
    layers = model.clip.vision_model.encoder.layers
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    layers[-1].register_forward_hook(lambda *_: alive.extend(ref() is not None for ref in inputs))
    with torch.no_grad():
        model(pixel_values)
    assert alive == [False] * (len(layers) - 1) + [True]


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_other_sizes_with_interpolated_positions(model, clip, size):
    pixel_values = torch.randn(2, 3, *size)
    output = model(pixel_values, interpolate_pos_encoding=True, output_patch_embeds=True)
    assert output.saliency_mask.shape == (2, size[0] * size[1] // 64)
    features = clip.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output
    assert_close(output.cls_embeds, torch.nn.functional.normalize(features, dim=-1), **within())
    assert_close(model.coarse_embeds(pixel_values, interpolate_pos_encoding=True), output.cls_embeds, **within())
    with pytest.raises(ValueError, match="doesn't match model"):
        model(pixel_values)


def test_bad_pixels(model, pixel_values):
    for bad in (torch.randn(2, 1, 32, 32), torch.randn(3, 32, 32), torch.randn(2, 4, 32, 32)):
        with pytest.raises(ValueError, match=r"shape .*; expected \(batch_size, 3"):
            model(bad)
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model()
    pixel_values[1, 0, 3, 3] = float("nan")
    for method in (model, model.coarse_embeds):
        with pytest.raises(ValueError, match=r"pixel_values .*NaN"):
            method(pixel_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(model, dtype):
    """Rounded patch tokens may move a patch over the threshold; images whose mask stays keep their logits."""
    pixel_values = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(pixel_values, output_patch_embeds=True)
    output = model.to(dtype)(pixel_values.to(dtype), output_patch_embeds=True)
    assert output.logits.dtype == torch.float32
    assert (output.cls_embeds * expected.cls_embeds).sum(-1).min() > 0.999
    same = (output.saliency_mask == expected.saliency_mask).all(-1)
    assert same.sum() >= 8
    assert (output.fg_embeds * expected.fg_embeds).sum(-1)[same].min() > 0.999
    assert_close(output.logits[same], expected.logits[same], rtol=0, atol=0.02 * model.logit_scale.item())


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtypes_by_name(clip, clip_folder, tokenizer, dtype, expected):
    for source in (clip_folder, clip):
        model = MicroCLIPForImageClassification.from_clip(source, CLASS_NAMES, tokenizer=tokenizer, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_autocast_keeps_cosines_in_float32(model, pixel_values):
    expected = model(pixel_values)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values)
        again = model.classifier(output.cls_embeds)
    assert_close(output.cls_embeds, expected.cls_embeds, rtol=0, atol=0.03)
    assert_close(output.cls_logits, model.logit_scale * model.classifier(output.cls_embeds), **within(LOGIT_SCALE))
    assert again.dtype == torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_back_ends_agree(clip_folder, pixel_values, attention):
    kwargs = {"class_names": CLASS_NAMES, "prior_weighting": "uniform"}
    with ClearDecisions():
        expected = MicroCLIPForImageClassification.from_clip(clip_folder, **kwargs)(pixel_values)
    model = MicroCLIPForImageClassification.from_clip(clip_folder, attn_implementation=attention, **kwargs)
    assert model.clip.vision_model.config._attn_implementation == attention
    assert_close(model(pixel_values).logits, expected.logits, **within(LOGIT_SCALE))


def test_activation_checkpointing_gives_the_same_gradients(any_clip, pixel_values):
    gradients = []
    for checkpointing in (False, True):
        model = variant(any_clip).train()
        model.freeze_for_adaptation()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(pixel_values, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert_gradients_close(gradients[1], gradients[0])


@pytest.mark.parametrize("query", ["saliency", "cls", "mean", "random"])
def test_torch_compile_without_graph_breaks(clip, pixel_values, query):
    model = variant(clip, fg_query=query)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), ClearDecisions():
        expected = model(pixel_values).logits
    with torch.no_grad():
        assert_close(compiled(pixel_values).logits, expected, **within(LOGIT_SCALE))


def test_torch_export(any_clip, pixel_values):
    model = variant(any_clip)
    program = torch.export.export(model, (), {"pixel_values": pixel_values}, strict=False)
    with ClearDecisions():
        expected = model(pixel_values).logits
    assert_close(program.module()(pixel_values=pixel_values)["logits"], expected, **within(LOGIT_SCALE))


def test_offloaded_to_disk(model, pixel_values, tmp_path):
    """Accelerate's hooks bring each block in; none may be used behind their back."""
    expected = model(pixel_values).logits
    model.save_pretrained(tmp_path / "model")
    on_disk = [
        "clip.vision_model",
        "clip.visual_projection",
        "fg_pooling",
        "classifier",
        "prior_head",
        "logit_adjustment",
    ]
    device_map = {"clip.logit_scale": "cpu", **dict.fromkeys(on_disk, "disk")}
    offloaded = MicroCLIPForImageClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert_close(offloaded(pixel_values).logits, expected, **within(LOGIT_SCALE))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_built_from_a_clip_spread_over_devices(kind, pixel_values, tmp_path):
    """The last layer, which gets another class, has a hook that keeps the forward of its first one."""
    save_clip(tmp_path / "clip", kind=kind)
    settings = {"class_names": ["red disc", "blue bar"], "prior_weighting": "uniform"}
    expected = MicroCLIPForImageClassification.from_clip(tmp_path / "clip", **settings)(pixel_values)
    layers = "vision_model.encoder.layers."
    rest = ["text_model", "text_projection", "visual_projection", "logit_scale", "vision_model.embeddings"]
    rest += ["vision_model.pre_layrnorm", "vision_model.post_layernorm", layers + "0"]
    device_map = {**dict.fromkeys(rest, "cpu"), layers + "1": "disk"}
    spread = MicroCLIPForImageClassification.from_clip(
        tmp_path / "clip", **settings, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert "_old_forward" in vars(spread.clip.vision_model.encoder.layers[-1])
    assert_close(spread(pixel_values).logits, expected.logits, **within(LOGIT_SCALE))


def test_builds_on_the_meta_device(clip):
    with torch.device("meta"):
        model = MicroCLIPForImageClassification(MicroCLIPConfig(clip_config=clip.config, num_labels=3))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_projections_start_as_the_identity(clip_folder):
    model = MicroCLIPForImageClassification.from_pretrained(clip_folder)
    for pooling in (model.fg_pooling, MicroCLIPPooling(model.config)):
        assert all(projection.weight.equal(torch.eye(32)) for projection in pooling.children())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_of_every_parameter_and_buffer(clip, tokenizer, tmp_path, keep, dtype):
    model = MicroCLIPForImageClassification.from_clip(
        clip, CLASS_NAMES, tokenizer=tokenizer, prior_weighting="uniform", keep_text_model=keep, dtype=dtype
    )
    torch.nn.init.normal_(model.fg_pooling.key_proj.weight)
    model.save_pretrained(tmp_path)
    for loader in (MicroCLIPForImageClassification, AutoModelForImageClassification):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is MicroCLIPForImageClassification and not loaded.training
        own, other = model.state_dict(), loaded.state_dict()
        assert own.keys() == other.keys() and "prior_head.weight" in own
        assert all(value.equal(other[name]) for name, value in own.items())
        assert any("text_model" in name for name in own) == keep
        assert dict(loaded.named_buffers()).keys() == dict(model.named_buffers()).keys()
        for name, buffer in model.named_buffers():
            assert buffer.equal(loaded.get_buffer(name)), name
        assert loaded.config.id2label == model.config.id2label
    assert (tmp_path / "tokenizer.json").exists() == keep


def test_text_tower_is_absent_from_the_file_by_default(model, clip, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not [name for name in weights if "text" in name]
    assert sum(value.numel() for value in weights.values()) == sum(v.numel() for v in model.state_dict().values())
    towers = sum(p.numel() for p in clip.vision_model.parameters()) + clip.visual_projection.weight.numel() + 1
    own = 3 * 32 * 32 + 2 * 3 * 16
    assert model.num_parameters() + model.prior_head.weight.numel() == towers + own


def test_a_plain_clip_checkpoint_loads_with_new_heads(clip, clip_folder):
    model, info = MicroCLIPForImageClassification.from_pretrained(clip_folder, num_labels=5, output_loading_info=True)
    heads = {"classifier.weight", "prior_head.weight"}
    assert set(info["missing_keys"]) == heads | {
        f"fg_pooling.{name}_proj.weight" for name in ("query", "key", "value")
    }
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in clip.vision_model.state_dict().items():
        assert value.equal(model.clip.vision_model.state_dict()[name])
    assert model.classifier.weight.isfinite().all() and model.prior_head.weight.isfinite().all()
    assert model.config.clip_config.vision_config.image_size == 32


def test_a_plain_clip_checkpoint_with_its_text_tower(clip, clip_folder):
    model = MicroCLIPForImageClassification.from_pretrained(
        clip_folder, keep_text_model=True, prior_weighting="uniform"
    )
    assert all(value.equal(model.clip.text_model.state_dict()[n]) for n, value in clip.text_model.state_dict().items())
    model.set_classes(CLASS_NAMES)
    assert model.config.num_labels == 3


def test_another_number_of_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    kwargs = {"id2label": {i: str(i) for i in range(5)}, "label2id": {str(i): i for i in range(5)}}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MicroCLIPForImageClassification.from_pretrained(tmp_path, **kwargs)
    loaded = MicroCLIPForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **kwargs)
    assert loaded.classifier.weight.shape == loaded.prior_head.weight.shape == (5, 16)
    assert loaded.classifier.weight.isfinite().all() and loaded.prior_head.weight.isfinite().all()


SIZES = {
    "B/32": ({}, {}, 512, 102, 1_861_632),
    "L/14": (
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
        768,
        102,
        3_326_464,
    ),
}


@pytest.mark.parametrize(("vision", "text", "projection_dim", "num_labels", "trainable"), SIZES.values(), ids=SIZES)
def test_number_of_trained_parameters(vision, text, projection_dim, num_labels, trainable):
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection_dim)
    with torch.device("meta"):
        model = MicroCLIPForImageClassification(MicroCLIPConfig(clip_config=config, num_labels=num_labels))
    model.freeze_for_adaptation()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_poolings_without_projections_freeze_them(clip):
    for pooling in ("masked_mean", "mean"):
        model = variant(clip, fg_pooling=pooling)
        model.freeze_for_adaptation()
        assert not any(parameter.requires_grad for parameter in model.fg_pooling.parameters())


@pytest.mark.parametrize(
    ("image_size", "patch_size", "width"), [(32, 8, 32), (28, 14, 64), (42, 14, 48), (16, 16, 32)]
)
def test_any_clip_size(tokenizer, image_size, patch_size, width):
    """No width is hard-coded; one patch is enough."""
    clip = make_clip(tokenizer, image_size, patch_size, width)
    model = MicroCLIPForImageClassification.from_clip(clip, ["a", "b"], tokenizer=tokenizer)
    assert model(torch.randn(2, 3, image_size, image_size)).logits.shape == (2, 2)
    assert model.image_processor.crop_size["height"] == image_size


def test_flops_over_a_plain_clip(clip, pixel_values):
    """The second path costs one MLP and two projections of one layer, not of all."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(pixel_values)
        return counter.get_total_flops()

    plain = CLIPVisionModelWithProjection(clip.vision_model.config)
    layer = 2 * len(pixel_values) * 16 * 32 * 32 * (1 + 1 + 2 * 2)
    pooling = 2 * len(pixel_values) * 32 * (16 * 32 + 2 * 32 + 3 * 16 + 16)
    heads = 2 * len(pixel_values) * 16 * 3 * 2 + 2 * len(pixel_values) * 32 * 16
    graph = 2 * len(pixel_values) * 16 * 16 * 32
    assert flops(variant(clip)) - flops(plain) <= layer + pooling + heads + graph


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fusion_ratio": 1.5}, "fusion_ratio is 1.5; it must lie in"),
        ({"logit_scale": 0}, "logit_scale is 0; it must be a positive"),
        ({"saliency_threshold": float("nan")}, "finite"),
        ({"fg_query": "centre"}, "expected one of .*'saliency'"),
        ({"keep_text_model": "yes"}, "expected bool"),
        ({"clip_config": {"model_type": "siglip"}}, "model type 'siglip'.*CLIP; SigLIP has no .CLS. token. Pass one"),
    ],
)
def test_bad_configurations(kwargs, message):
    with pytest.raises(Exception, match=message):
        MicroCLIPConfig(**kwargs)


def test_class_names_are_in_the_order_of_the_logits(tmp_path):
    """Also where JSON sorted the indices, of more than ten classes, as words."""
    names = [f"class {chr(122 - index)}" for index in range(12)]
    config = MicroCLIPConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    config.save_pretrained(tmp_path)
    assert config.class_names == MicroCLIPConfig.from_pretrained(tmp_path).class_names == names
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    loaded = MicroCLIPConfig.from_pretrained(tmp_path)
    assert list(loaded.id2label.values()) != names and loaded.class_names == names


def test_config_round_trip(tmp_path):
    config = MicroCLIPConfig(
        clip_config={"projection_dim": 64, "vision_config": {"patch_size": 16}},
        fg_query="cls",
        logit_scale=50,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
    )
    config.save_pretrained(tmp_path)
    loaded = MicroCLIPConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.clip_config.vision_config.patch_size == 16 and loaded.id2label == {0: "a", 1: "b", 2: "c"}
    assert MicroCLIPConfig.from_dict(CLIPConfig(projection_dim=64).to_dict()).clip_config.projection_dim == 64
