"""
Speed and memory of an adaptation step and of inference, on random weights.

    python examples/benchmark_step.py --model B/32 --batch_size 32 --json step.json

Each kind of step runs in a process of its own, and they take turns, since a machine's speed drifts: a plain CLIP
vision forward, the published step ("exact"), the same with activation checkpointing, a step with
`prior_refresh="never"` ("kept prior"), and a plain reference (`naive_step.py`). "Of plain" is a step's GFLOP/s over
the plain forward's in the same turn. Just before each step the speed of a large matrix product is measured too, in the
same precision; it may range widely, which is said. Ratios are medians over the turns. Memory is what a step needs
above weights and views, measured in a process that gives back at once what isn't in use.

`--crops 0 2 4 8 16` adds exact steps with as many crops, `--num_processes 2` compares that many processes of one
thread each with one. `--dtype bfloat16` is a run with `--bf16 true --autocast_pseudo_labels true`, and a plain forward
with weights in bfloat16; where the processor has no instructions for it, float32 is measured.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import re
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from naive_step import NaiveStep
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection, TrainerCallback
from transformers.utils import logging

from microclip_hf import MicroCLIPConfig, MicroCLIPForImageClassification, MicroCLIPTrainer, MicroCLIPTrainingArguments


NUM_CLASSES = 102
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SIZES = {
    "B/32": {"patch_size": 32},
    "B/16": {"patch_size": 16},
    "L/14": {**LARGE, "patch_size": 14},
    "L/14@336": {**LARGE, "patch_size": 14, "image_size": 336},
}
STEPS = ("plain_forward", "exact_step", "checkpointed_step", "kept_prior_step", "naive_step")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows and columns of the matrix product that stands for the machine's peak.
GEMM_SIZE = 8192 if DEVICE == "cuda" else 2048
# Of processors that compute in bfloat16, as Linux calls them.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def has_bfloat16() -> bool:
    """Whether the processor, or the device, computes in bfloat16."""
    if DEVICE == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(bfloat16_instructions())


def bfloat16_instructions() -> list[str]:
    """Those of `INSTRUCTIONS` that the processor has."""
    words = set(Path("/proc/cpuinfo").read_text().split()) if os.path.exists("/proc/cpuinfo") else set()
    return [name for name in INSTRUCTIONS if name in words]


def make_config(model: str) -> MicroCLIPConfig:
    """The architecture of a size's name, or of a folder or Hub id that holds a CLIP."""
    if model in SIZES:
        return MicroCLIPConfig(clip_config={"vision_config": SIZES[model]}, num_labels=NUM_CLASSES)
    return MicroCLIPConfig.from_pretrained(model, num_labels=NUM_CLASSES)


def make_model(model: str) -> MicroCLIPForImageClassification:
    """Random weights, the same at every call."""
    torch.manual_seed(0)
    microclip = MicroCLIPForImageClassification(make_config(model))
    torch.nn.init.normal_(microclip.prior_head.weight)
    return microclip.float().to(DEVICE)


def make_views(vision: CLIPVisionConfig, batch_size: int, num_crops: int) -> dict[str, torch.Tensor]:
    """Random views, the same at every call."""
    shape = (3, vision.image_size, vision.image_size)
    shapes = {"weak": shape, "strong": shape, "crops": (num_crops, *shape)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(256, (batch_size, *own), dtype=torch.uint8, generator=generator)
        for name, own in shapes.items()
    }


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def gemm_speed(dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product into memory that is there already, the best of three."""
    matrix = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=DEVICE)
    product = matrix.clone()
    return 2 * GEMM_SIZE**3 / min(seconds(lambda: torch.mm(matrix, matrix, out=product)) for _ in range(3))


class Probe(TrainerCallback):
    """Measures steps, what and when the parent asks for it."""

    def __init__(self, connection: Connection, dtype: torch.dtype) -> None:
        self.connection, self.dtype = connection, dtype

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for one's turn."""
        measures = {"memory": self.measure_memory, "flops": self.count_flops, "speed": self.measure_speed}
        self.measurement = measures[self.connection.recv()]()
        next(self.measurement)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Answer."""
        self.connection.send(next(self.measurement))

    def measure_memory(self) -> Iterator[int]:
        """Bytes of memory at the peak, above what there was before."""
        before = memory()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with open("/proc/self/clear_refs", "w") as file:  # the peak begins anew (Linux)
                file.write("5")
        yield
        yield memory(peak=True) - before

    def count_flops(self) -> Iterator[int]:
        """FLOPs of matrix products and convolutions."""
        with FlopCounterMode(display=False) as counter:
            yield
        yield counter.get_total_flops()

    def measure_speed(self) -> Iterator[tuple[float, float]]:
        """Seconds of the step, and the speed of a matrix product just before."""
        peak = gemm_speed(self.dtype)
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        yield time.perf_counter() - start, peak


def memory(peak: bool = False) -> int:
    """Bytes in use, or their peak."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    with open("/proc/self/status") as file:
        name = "VmHWM" if peak else "VmRSS"
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", file.read()).group(1))


def run_steps(kind: str, options: argparse.Namespace, num_crops: int, connection: Connection) -> None:
    """The program of a process: steps of one kind, endlessly."""
    logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype)
    probe, model = Probe(connection, dtype), make_model(options.model)
    vision = model.config.clip_config.vision_config
    views = make_views(vision, options.batch_size, num_crops)
    if kind == "plain_forward":
        step = plain_forward(vision, options, dtype)
    elif kind == "naive_step":
        step = naive_step(model, views, dtype)
    else:
        return run_trainer(kind, model, views, options, probe)
    while True:
        probe.on_step_begin()
        step()
        probe.on_step_end()


def plain_forward(vision: CLIPVisionConfig, options: argparse.Namespace, dtype: torch.dtype) -> Callable[[], Any]:
    """CLIP's image features, without gradient."""
    clip = CLIPVisionModelWithProjection(vision).to(DEVICE, dtype).eval()
    pixel_values = torch.randn(options.batch_size, 3, vision.image_size, vision.image_size, device=DEVICE, dtype=dtype)
    return torch.no_grad()(lambda: clip(pixel_values))


def naive_step(
    model: MicroCLIPForImageClassification, views: dict[str, torch.Tensor], dtype: torch.dtype
) -> Callable[[], Any]:
    """The reference, on a CLIP that is transformers' own; all of it under autocast in a lower precision."""
    clip = CLIPModel(model.config.clip_config).float()
    clip.load_state_dict(model.clip.state_dict(), strict=False)
    prior_head = torch.nn.functional.normalize(model.prior_head.weight, dim=-1)
    naive = NaiveStep(clip.to(DEVICE), model.classifier.weight, prior_head)

    def step() -> None:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            naive.step(**{name: value.to(DEVICE) for name, value in views.items()})

    return step


def run_trainer(
    kind: str,
    model: MicroCLIPForImageClassification,
    views: dict[str, torch.Tensor],
    options: argparse.Namespace,
    probe: Probe,
) -> None:
    """The steps of a real run."""
    if kind == "kept_prior_step":
        views["prior_scores"] = torch.zeros(options.batch_size, NUM_CLASSES)
        del views["crops"]
    examples = [{name: value[i] for name, value in views.items()} for i in range(options.batch_size)]
    low = options.dtype == "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        args = MicroCLIPTrainingArguments(
            folder,
            per_device_train_batch_size=options.batch_size,
            max_steps=10**6,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=DEVICE == "cpu",
            bf16=low,
            autocast_pseudo_labels=low,
            gradient_checkpointing=kind == "checkpointed_step",  # the name that all versions know
            torch_compile=options.compile,
        )
        world = int(os.environ.get("WORLD_SIZE", 1))
        MicroCLIPTrainer(model=model, args=args, train_dataset=examples * world, callbacks=[probe]).train()


class Runner:
    """Processes that run steps of one kind together.

    Args:
        kind (`str`): of `STEPS`.
        options: the command's.
        num_crops (`int`): K.
        num_processes, threads (`int`, *optional*): default: one, with all cores.
    """

    def __init__(
        self,
        kind: str,
        options: argparse.Namespace,
        num_crops: int,
        num_processes: int = 1,
        threads: int | None = None,
    ) -> None:
        self.num_images = options.batch_size * num_processes
        arguments = (kind, options, num_crops)
        env = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        # Each tensor in pages of its own, given back at once: resident memory is then what is in use.
        self.start(arguments, num_processes, {**env, "MALLOC_MMAP_THRESHOLD_": str(2**20)})
        self.memory = max(self.step("memory"))
        self.close()
        self.start(arguments, num_processes, env)
        self.flops = sum(self.step("flops"))
        self.turns: list[tuple[float, float]] = []

    def start(self, arguments: tuple, num_processes: int, env: dict[str, str]) -> None:
        """Start the processes, with this environment."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        spawn, before = multiprocessing.get_context("spawn"), dict(os.environ)
        self.connections, self.processes = [], []
        for rank in range(num_processes):
            ours, theirs = spawn.Pipe()
            self.processes.append(spawn.Process(target=run_steps, args=(*arguments, theirs), daemon=True))
            os.environ.update(env)
            if num_processes > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes}
                os.environ.update({name: str(value) for name, value in ranks.items()})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            self.processes[-1].start()
            os.environ.clear()
            os.environ.update(before)
            theirs.close()
            self.connections.append(ours)

    def step(self, measure: str) -> list[Any]:
        """One step of every process, and what each measured."""
        for connection in self.connections:
            connection.send(measure)
        return [connection.recv() for connection in self.connections]

    def measure(self) -> None:
        """One turn: FLOPs a second of the step, and of a matrix product."""
        answers = self.step("speed")
        duration, peak = max(own for own, _ in answers), sum(own for _, own in answers)
        self.turns.append((self.flops / duration, peak))

    def result(self, plain: "Runner") -> dict[str, float]:
        """Medians over the turns, in which the plain forward took its turns too."""
        speed = statistics.median(own for own, _ in self.turns)
        ratios = [own / other for (own, _), (other, _) in zip(self.turns, plain.turns, strict=True)]
        return {
            "images_per_second": round(speed * self.num_images / self.flops, 3),
            "gflops": round(speed / 1e9, 1),
            "gflop_per_image": round(self.flops / self.num_images / 1e9, 2),
            "over_plain_forward": round(statistics.median(ratios), 3),
            "share_of_gemm_peak": round(statistics.median(own / peak for own, peak in self.turns), 4),
            "peak_memory_gb": round(self.memory / 2**30, 3),
        }

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
            process.join()


def measure_steps(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All kinds of steps, in turns, and the range of the matrix product's GFLOP/s with all cores."""
    plans = {kind: (kind, options, options.num_crops) for kind in STEPS}
    plans |= {f"exact_step_{num_crops}_crops": ("exact_step", options, num_crops) for num_crops in options.crops}
    if options.num_processes > 1:
        plans["one_thread_step"] = ("exact_step", options, options.num_crops, 1, 1)
        plans["distributed_step"] = ("exact_step", options, options.num_crops, options.num_processes, 1)
    runners = {}
    try:
        for name in tqdm(plans, "Starting"):
            runners[name] = Runner(*plans[name])
        for _ in tqdm(range(options.steps), "Turns"):
            for runner in runners.values():
                runner.measure()
        results = {name: runner.result(runners["plain_forward"]) for name, runner in runners.items()}
        peaks = sorted(peak / 1e9 for kind in STEPS for _, peak in runners[kind].turns)
        gemm = {"least": peaks[0], "median": statistics.median(peaks), "most": peaks[-1]}
        return results | {"gemm_gflops": {name: round(peak, 1) for name, peak in gemm.items()}}
    finally:
        for runner in runners.values():
            runner.close()


def inference_ratio(options: argparse.Namespace, batch_size: int) -> float:
    """Median cost of our forward over that of `CLIPVisionModelWithProjection`, over pairs of runs in one process."""
    dtype = getattr(torch, options.dtype)
    ours = make_model(options.model).to(dtype).eval()
    vision = ours.config.clip_config.vision_config
    plain = CLIPVisionModelWithProjection(vision).to(DEVICE, dtype).eval()
    pixel_values = torch.randn(batch_size, 3, vision.image_size, vision.image_size, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        pairs = [[seconds(functools.partial(model, pixel_values)) for model in (ours, plain)] for _ in range(11)]
    return round(statistics.median(own / other for own, other in pairs[1:]), 4)


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="B/32", help=f"{', '.join(SIZES)}, or a folder or Hub id of a CLIP")
    parser.add_argument("--batch_size", type=int, default=32, help="images a step")
    parser.add_argument("--num_crops", type=int, default=8, help="K")
    parser.add_argument("--steps", type=int, default=5, help="turns of each kind")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision")
    parser.add_argument("--crops", type=int, nargs="*", default=[], help="further exact steps with these K")
    parser.add_argument("--num_processes", type=int, default=1, help="compare processes of one thread each")
    parser.add_argument("--compile", action="store_true", help="torch.compile our steps")
    parser.add_argument("--json", help="file to write to")
    options = parser.parse_args()
    if options.model not in SIZES:
        make_config(options.model)
    if options.dtype == "bfloat16" and not has_bfloat16():
        print("This processor has no instructions for bfloat16, so float32 is measured.")
        options.dtype = "float32"
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.processor() or platform.machine()}"
    result = {"model": options.model, "batch_size": options.batch_size, "dtype": options.dtype, "machine": machine}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result["bfloat16_instructions"] = bfloat16_instructions()
    result |= measure_steps(options)
    result["inference_ratio"] = {str(size): inference_ratio(options, size) for size in (1, options.batch_size)}
    print(f"{options.model}, batch {options.batch_size}, K = {options.num_crops}, {options.dtype}, {machine}")
    print(f"{'':24}{'images/s':>10}{'GFLOP/s':>10}{'GFLOP/image':>13}{'of plain':>10}{'of GEMM':>9}{'memory GB':>11}")
    for name, own in result.items():
        if isinstance(own, dict) and "gflops" in own:
            print(f"{name:24}{own['images_per_second']:10.2f}{own['gflops']:10.1f}", end="")
            print(f"{own['gflop_per_image']:13.2f}{own['over_plain_forward']:10.3f}", end="")
            print(f"{own['share_of_gemm_peak']:9.3f}{own['peak_memory_gb']:11.3f}")
    print("matrix product (GEMM): {least} to {most} GFLOP/s, median {median}".format(**result["gemm_gflops"]))
    for size, ratio in result["inference_ratio"].items():
        print(f"inference, batch {size}: {ratio:.3f} x a plain CLIP forward")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
