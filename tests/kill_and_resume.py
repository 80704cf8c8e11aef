"""Kill an adaptation run at random moments, resume it each time, and compare its end with an undisturbed run.

python tests/kill_and_resume.py CLIP_FOLDER WORK_FOLDER [NUM_KILLS]

Prints one line a kill, and raises AssertionError if a weight differs or a checkpoint is found half-written. Each run
is a process group of its own, killed with SIGKILL; half of the kills wait until a checkpoint is being written.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint


PROGRAM = Path(__file__).with_name("adaptation.py")
OPTIONS = {"num_train_epochs": 100, "save_strategy": "steps", "save_steps": 1, "dataloader_num_workers": 1}
# What a checkpoint holds; it is complete as soon as it has its final name.
FILES = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def start(clip: str, output: Path) -> subprocess.Popen:
    resume = output.is_dir() and get_last_checkpoint(output) is not None
    options = {**OPTIONS, "output_dir": str(output), "resume": resume}
    command = [sys.executable, str(PROGRAM), clip, json.dumps(options)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    with open(f"{output}.log", "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for_moment(run: subprocess.Popen, output: Path, earlier: str | None, rng: random.Random) -> str:
    """Until the run has made progress and a random moment has passed, or it is writing a checkpoint."""
    while run.poll() is None and (not output.is_dir() or get_last_checkpoint(output) == earlier):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.5))
    if rng.random() < 0.5:
        return "at a random moment"
    while run.poll() is None and not list(output.glob("_incomplete/*/*")):
        pass
    time.sleep(rng.uniform(0, 0.02))
    return "while a checkpoint is written"


def check_checkpoints(output: Path) -> None:
    for checkpoint in output.glob("checkpoint-*"):
        missing = [name for name in FILES if not (checkpoint / name).exists()]
        assert not missing, f"{checkpoint} lacks {missing}"
        load_file(checkpoint / "model.safetensors")


def main(clip: str, work: str, num_kills: str = "20") -> int:
    """Returns the number of kills that hit a run in the middle of writing."""
    work, rng, kills, hits = Path(work), random.Random(0), 0, 0
    whole, parts = work / "whole", work / "parts"
    work.mkdir(parents=True, exist_ok=True)
    assert start(clip, whole).wait() == 0, Path(f"{whole}.log").read_text()
    while True:
        earlier = get_last_checkpoint(parts) if parts.is_dir() else None
        run = start(clip, parts)
        if kills == int(num_kills):
            break
        moment = wait_for_moment(run, parts, earlier, rng)
        assert run.poll() is None, (
            f"The run ended before kill {kills + 1}:\n{Path(f'{parts}.log').read_text()[-3000:]}"
        )
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        kills += 1
        check_checkpoints(parts)
        written = list(parts.glob("_incomplete/*/*"))
        hits += bool(written)
        print(
            f"kill {kills} {moment}, at {Path(get_last_checkpoint(parts)).name}, {len(written)} files unfinished",
            flush=True,
        )
    assert run.wait() == 0, Path(f"{parts}.log").read_text()[-3000:]
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    different = [name for name, value in one.items() if not value.equal(other[name])]
    assert not different, f"these weights differ: {different}"
    print(f"{kills} kills, {hits} of them in the middle of writing a checkpoint: identical weights")
    return hits


if __name__ == "__main__":
    main(*sys.argv[1:])
