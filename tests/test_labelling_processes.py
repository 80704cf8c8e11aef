"""`accelerate launch examples/predict.py` and its like: several processes, two machines, and kills at any moment."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import CLASS_NAMES
from test_distributed import free_port
from tiny_inputs import draw_shape

from microclip_hf.commands import predict


TESTS = Path(__file__).parent
PROGRAM = TESTS / "labelling.py"
EXAMPLE = TESTS.parent / "examples" / "predict.py"
TWO = ["--standalone", "--nproc_per_node", "2"]


@pytest.fixture
def label(adapted, tmp_path, monkeypatch):
    """Draws photos, and labels them by one process: the file, and the options of the same for other processes."""
    monkeypatch.chdir(tmp_path)

    def label(num_photos, batch_size):
        rng = np.random.default_rng(0)
        Path("photos").mkdir()
        for index in range(num_photos):
            draw_shape(CLASS_NAMES[index % 3], rng).save(f"photos/{index:04d}.png")
        options = ["photos", "--model", str(adapted), "--output"]
        predict.main([*options, "whole.csv", "--batch_size", str(batch_size)])
        return Path("whole.csv").read_bytes(), [*options, "labels.csv"]

    return label


def launch(log, *arguments):
    """`torchrun`, whose processes are its children."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    with open(log, "a") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def finish(log, *launches):
    for process in launches:
        assert process.wait(timeout=300) == 0, Path(log).read_text()[-3000:]


def launch_machines(log, *arguments):
    """Two launches that find each other by an address."""
    place = ["--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", free_port()]
    return [launch(log, *place, "--node_rank", rank, *arguments) for rank in (0, 1)]


def kill_later(run, rng, folder="labels.csv.parts"):
    """Kill all processes, or one of those that compute, at a random moment after the first parts are written anew."""
    folder = Path(folder)
    before = set(folder.glob("*.parquet"))
    while run.poll() is None and set(folder.glob("*.parquet")) <= before:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    assert run.poll() is None, "the run ended before it was killed"
    launcher = psutil.Process(run.pid)
    children = launcher.children()
    killed = [launcher, *children] if rng.random() < 0.5 else [rng.choice(children)]
    for process in killed:
        process.kill()
    assert run.wait(timeout=300) != 0  # of one process torchrun ends the others
    psutil.wait_procs(children)


def kill_often(options, num_kills):
    rng = random.Random(0)
    for _ in range(num_kills):
        kill_later(launch("log", *TWO, PROGRAM, *options), rng)
        assert not Path("labels.csv").exists()


def test_two_processes_of_which_one_is_killed_go_on_as_two_machines(label):
    """The file is the same to the last byte, and nothing else is left."""
    expected, options = label(160, batch_size=4)
    kill_often(options, 1)
    finish("log", *launch_machines("log", PROGRAM, *options))
    assert Path("labels.csv").read_bytes() == expected
    assert {path.name for path in Path().iterdir()} == {"photos", "whole.csv", "labels.csv", "log"}


@pytest.mark.slow
def test_twenty_kills(label):
    expected, options = label(2000, batch_size=4)
    kill_often(options, 20)
    finish("log", launch("log", *TWO, PROGRAM, *options))
    assert Path("labels.csv").read_bytes() == expected


@pytest.mark.slow
def test_two_thousand_photos_by_two_processes_and_two_machines(label):
    expected, options = label(2000, batch_size=32)
    finish("log", launch("log", *TWO, EXAMPLE, *options))
    assert Path("labels.csv").read_bytes() == expected
    Path("labels.csv").unlink()
    finish("log", *launch_machines("log", EXAMPLE, *options))
    assert Path("labels.csv").read_bytes() == expected
