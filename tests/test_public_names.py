"""What README and docs name can be imported and called: public names, commands with their options, `make` targets.

The lists are written by hand, so that a name that moves away is missed here, whatever the pages say by then.
"""

import dataclasses
import importlib
import inspect
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from microclip_hf import (
    MicroCLIPForImageClassification,
    MicroCLIPOutput,
    MicroCLIPTrainer,
    MicroCLIPTrainingArguments,
)
from microclip_hf.commands import main as microclip
from microclip_hf.explain import Explanation


ROOT = Path(__file__).parents[1]
NAMES = [
    ("microclip_hf.hub", "push_folder"),
    ("microclip_hf.images", "to_rgb"),
    ("microclip_hf", "MicroCLIPConfig"),
    ("microclip_hf", "MicroCLIPForImageClassification"),
    ("microclip_hf", "MicroCLIPOutput"),
    ("microclip_hf", "MicroCLIPTrainer"),
    ("microclip_hf", "MicroCLIPTrainingArguments"),
    ("microclip_hf.check", "compare"),
    ("microclip_hf.check", "draw_photos"),
    ("microclip_hf.check", "extend_check"),
    ("microclip_hf.check", "finish_check"),
    ("microclip_hf.check", "start_check"),
    ("microclip_hf.evaluation", "make_report"),
    ("microclip_hf.evaluation", "predict_all_ways"),
    ("microclip_hf.explain", "explain"),
    ("microclip_hf.explain", "overlay"),
    ("microclip_hf.explain", "plot"),
    ("microclip_hf.export", "export_onnx"),
    ("microclip_hf.metrics", "MicroCLIPMetric"),
    ("microclip_hf.open_clip", "convert"),
    ("microclip_hf.open_clip", "read_open_clip"),
    ("microclip_hf.prediction", "Classifier"),
    ("microclip_hf.prediction", "open_photos"),
    ("microclip_hf.prediction.labelling", "label_photos"),
    ("microclip_hf.presets", "load_preset"),
    ("microclip_hf.presets", "load_split"),
    ("microclip_hf.recipes", "list_recipes"),
    ("microclip_hf.recipes", "load_recipe"),
    ("microclip_hf.report", "write_record"),
    ("microclip_hf.report", "write_report"),
]
# The same by the modules that they were in once.
EARLIER_NAMES = [
    ("microclip_hf.hub", "push_folder"),
    ("microclip_hf.images", "to_rgb"),
    ("microclip_hf.evaluation_report", "make_report"),
    ("microclip_hf.explain_plot", "plot"),
    ("microclip_hf.run_record", "write_record"),
    ("microclip_hf.views", "to_rgb"),
]
ATTRIBUTES = {
    MicroCLIPForImageClassification: ["from_clip", "from_pretrained", "save_pretrained", "set_classes"],
    MicroCLIPTrainer: ["train", "evaluate", "predict", "save_model", "save_state", "push_to_hub"],
}
FIELDS = {
    Explanation: {"image", "label", "scores", "cls_scores", "fg_scores", "saliency_mask", "fg_attention", "grid"},
    MicroCLIPOutput: {"loss", "logits", "cls_logits", "fg_logits", "saliency_mask", "fg_attention"},
    MicroCLIPTrainingArguments: {"distribution_alignment", "fairness_weight", "label_fusion_ratio", "prior_ratio"},
}
ADAPT = "adapt --model_name_or_path clip --class_names names.txt --output_dir out"
EVALUATE = "evaluate --model_name_or_path clip --output_dir out"
DESCRIBE = "describe --class_names names.txt --llm name --output descriptions.json"
COMMANDS = [
    f"{ADAPT} --train_dir photos/ --descriptions descriptions.json --test_dir test/ --report false",
    f"{ADAPT} --train_dir photos/ --resume_from_checkpoint true --full_determinism true --report_to tensorboard",
    f"{ADAPT} --train_dir photos/ --max_corrupt_share 0.1 --dataloader_num_workers 2 --use_cpu true",
    f"{ADAPT} --train_dir photos/ --gradient_accumulation_steps 2 --per_device_train_batch_size 8",
    f"{ADAPT} --train_dir photos/ --fp16 true --gradient_checkpointing true",
    f"{ADAPT} --train_dir photos/ --bf16 true --autocast_pseudo_labels true --activation_checkpointing true",
    f"{ADAPT} --train_dir photos/ --prior_refresh never --torch_compile true",
    f"{ADAPT} --train_dir photos/ --recipe recommended --prior_ratio 0.6",
    f"{ADAPT} --train_dir photos/ --distribution_alignment true --fairness_weight 0",
    f"""{ADAPT} --train_dir photos/ --config_overrides '{{"prior_weighting": "uniform"}}'""",
    f"""{ADAPT} --train_dir photos/ --config_overrides '{{"fg_query": "cls"}}'""",
    f"{ADAPT} --train_dir photos/ --push_to_hub true --hub_model_id user/shapes --license mit",
    f"{ADAPT} --train_dir shards/ --streaming true --max_steps 3 --save_steps 2 --save_strategy steps",
    f"{ADAPT} --train_dir shards/ --streaming true --max_steps 3 --shuffle_buffer 10",
    f"{ADAPT} --dataset_name user/photos --dataset_split train --streaming true --recipe quick",
    f"{ADAPT} --dataset_name user/photos --dataset_split train --test_split test --dataset_revision main",
    f"{ADAPT} --dataset_name user/photos --dataset_config small --image_column image --label_column json.label",
    f"{ADAPT} --train_dir photos/ --descriptions_dataset user/descriptions --descriptions_columns class sentences",
    "adapt --preset cub --model_name_or_path openai/clip-vit-base-patch32 --output_dir adapted",
    "adapt --preset cub --train_dir CUB/train --test_dir CUB/test --model_name_or_path clip --output_dir adapted",
    "adapt --preset cub --templates 'a {}.' --dataset_split train+validation --model_name_or_path clip "
    "--output_dir adapted",
    "adapt --config examples/configs/birdworld.yaml",
    "adapt --model_name_or_path clip --output_dir out --num_crops 4 --crop_ratio 0.85 1 --learning_rate 3e-3",
    f"{EVALUATE} --clip openai/clip-vit-base-patch32 --descriptions descriptions.json --test_dir test/",
    f"{EVALUATE} --class_names names.txt --test_dir test/ --num_crops 0 --seed 1 --update_card true",
    f"{EVALUATE} --dataset_name user/photos --dataset_split test --image_column image --label_column label",
    f"{EVALUATE} --preset cub --dataset_config default",
    "predict photos/ --model adapted --output labels.csv",
    "predict shards/*.parquet --model adapted --output labels.parquet --image_column image --num_workers 2",
    "predict photos/ --model adapted --classes names.txt --top_k 3 --precision bfloat16 --exact_pixels true",
    "predict --dataset_name user/photos --dataset_split test --streaming true --model adapted --device cpu",
    "check photos/ --model adapted --clip clip --descriptions descriptions.json --output_dir check",
    "check --finish check --update_card true",
    "check --more 40 --output_dir check",
    "explain photo.png --model adapted --output why.png --show fg_attention",
    "push adapted --repo_id me/birds --private",
    "export --model_name_or_path adapted --output adapted.onnx --int8 true",
    "report adapted/",
    "convert RemoteCLIP-ViT-B-32.pt remoteclip --quick_gelu false --tokenizer clip",
    f"{DESCRIBE} --domain 'a species of flower' --base_url http://localhost:8000/v1 --num_workers 4",
    f"{DESCRIBE} --questions 'What does {{}} look like?' 'How does {{}} differ from {{similar}}?'",
    f"{DESCRIBE} --model_name_or_path openai/clip-vit-base-patch32",
    f"""{DESCRIBE} --extra_body '{{"max_tokens": null, "max_completion_tokens": 2000}}'""",
]
SCRIPTS = {
    "predict.py": ["--model", "--output"],
    "check_simulation.py": ["--predict", "--num_draws"],
    "adapt.py": ["--model_name_or_path", "--train_dir", "--class_names", "--descriptions", "--output_dir"],
    "benchmark.py": ["--config", "--output_dir", "--methods", "--domains", "--seeds"],
    "benchmark_predict.py": ["--json"],
    "benchmark_step.py": ["--model", "--batch_size", "--json"],
    "benchmark_views.py": ["--json"],
    "describe_classes.py": ["--class_names", "--domain", "--llm", "--output"],
    "evaluate_model.py": ["--model_name_or_path", "--clip", "--descriptions", "--test_dir", "--output_dir"],
}
TARGETS = ["demo", "space", "space-folder", "test", "test-lowest", "test-any-cpu", "slow-test", "style", "quality"]


class ParsedError(Exception):
    """A command has read its options, so that it may stop."""


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_public_names(module, name):
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("module", "name"), EARLIER_NAMES)
def test_names_by_their_earlier_modules(module, name):
    (new_module,) = [new for new, same in NAMES if same == name]
    earlier, new = (getattr(importlib.import_module(path), name) for path in (module, new_module))
    assert earlier is new


def test_methods_parameters_and_fields():
    for owner, names in ATTRIBUTES.items():
        assert all(callable(getattr(owner, name)) for name in names)
    for owner, names in FIELDS.items():
        assert names <= {field.name for field in dataclasses.fields(owner)}
    parameters = inspect.signature(MicroCLIPForImageClassification.from_clip).parameters
    assert {"descriptions", "image_processor", "tokenizer", "templates"} <= parameters.keys()
    assert "alpha" in inspect.signature(importlib.import_module("microclip_hf.explain").overlay).parameters


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_the_options_of_the_pages(command, monkeypatch):
    """As the shell hands them over; the command stops once its parser has read them."""
    if "activation_checkpointing" not in MicroCLIPTrainingArguments.__dataclass_fields__:  # before transformers 5.23
        command = command.replace("--activation_checkpointing", "--gradient_checkpointing")
    name, *options = shlex.split(command)
    parse = ArgumentParser.parse_known_args

    def parse_and_stop(self, *args, **kwargs):
        namespace, rest = parse(self, *args, **kwargs)
        if self.prog == f"microclip {name}":
            raise ParsedError(rest)
        return namespace, rest

    monkeypatch.setattr(ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", ["microclip", name, *options])
    monkeypatch.chdir(ROOT)
    with pytest.raises(ParsedError) as parsed:
        microclip()
    assert parsed.value.args == ([],)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_take_the_options_of_the_pages(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert not ended.value.code
    text = capsys.readouterr().out
    assert not [option for option in SCRIPTS[script] if not re.search(rf"{option}\b", text)]


def test_make_has_the_targets_of_the_pages():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(TARGETS) <= set(targets)
