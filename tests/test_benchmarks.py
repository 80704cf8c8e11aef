"""The benchmark scripts run, and count what arithmetic says; how fast it is isn't tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CLIPConfig


EXAMPLES = Path(__file__).parents[1] / "examples"
STEP_KEYS = {"images_per_second", "gflops", "gflop_per_image", "over_plain_forward", "share_of_gemm_peak"}
STEP_KEYS |= {"peak_memory_gb"}


def run(script, folder, *options):
    output = folder / "result.json"
    command = [sys.executable, str(EXAMPLES / script), *map(str, options), "--json", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text())


def tower_flops(config, num_images):
    """Linear layers and the patch embedding of a vision tower; a multiplication and an addition each count."""
    vision = config.vision_config
    width, num_patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    layer = (num_patches + 1) * width * (4 * width + 2 * vision.intermediate_size)
    embedding = num_patches * width * 3 * vision.patch_size**2
    return 2 * num_images * (vision.num_hidden_layers * layer + embedding + width * config.projection_dim)


@pytest.mark.slow
def test_steps(clip_folder, tmp_path):
    options = ["--model", clip_folder, "--batch_size", 4, "--num_crops", 2, "--steps", 1, "--num_processes", 2]
    result = run("benchmark_step.py", tmp_path, *options, "--crops", 0, 4)
    kinds = ("plain_forward", "exact_step", "checkpointed_step", "kept_prior_step", "naive_step")
    added = ("exact_step_0_crops", "exact_step_4_crops", "one_thread_step", "distributed_step")
    others = {"inference_ratio", "gemm_gflops"}
    assert {name for name, own in result.items() if isinstance(own, dict)} == {*kinds, *added, *others}
    assert result["plain_forward"]["over_plain_forward"] == 1
    assert 0 < result["gemm_gflops"]["least"] <= result["gemm_gflops"]["median"] <= result["gemm_gflops"]["most"]
    for name in (*kinds, *added):
        assert set(result[name]) == STEP_KEYS and min(result[name].values()) >= 0 < result[name]["share_of_gemm_peak"]
    assert set(result["inference_ratio"]) == {"1", "4"}


@pytest.mark.slow
def test_flops_of_steps(tmp_path):
    """Mid-sized, so that GFLOPs have digits: a forward, its 10 or 1 without gradient, and the student's two or so."""
    config = CLIPConfig(
        vision_config={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    )
    config.save_pretrained(tmp_path)
    result = run("benchmark_step.py", tmp_path, "--model", tmp_path, "--batch_size", 2, "--steps", 1)
    forward = tower_flops(config, 1) / 1e9
    counted = {
        name: own["gflop_per_image"] for name, own in result.items() if isinstance(own, dict) and "gflops" in own
    }
    assert counted["plain_forward"] == pytest.approx(forward, rel=0.02)
    assert 9.5 * forward < counted["exact_step"] < 11 * forward
    assert 2.5 * forward < counted["kept_prior_step"] < 3.2 * forward
    assert counted["exact_step"] < counted["checkpointed_step"] < counted["exact_step"] + forward
    assert counted["naive_step"] > 11 * forward


@pytest.mark.slow
def test_views(tmp_path):
    result = run("benchmark_views.py", tmp_path, "--num_workers", 0)
    assert result.keys() == {"500 x 375", "4000 x 3000"}
    for own in result.values():
        assert own["milliseconds"].keys() == {"decoding", "weak", "strong", "crops", "all"}
        assert min(*own["milliseconds"].values(), *own["images_per_second"].values()) > 0
