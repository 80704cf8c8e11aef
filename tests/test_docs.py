"""Every command of README and docs, with ids replaced by local folders."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_inputs
from accelerate.commands.launch import launch_command_parser
from chat_server import ChatServer
from datasets import concatenate_datasets
from hub_server import HubServer

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.commands import main as microclip
from microclip_hf.data.sources import load_image_folder


ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# Ids, names and endpoints, and what stands for them here; a random text tower relates no name to its descriptions.
STAND_INS = {
    "openai/clip-vit-base-patch32": "clip",
    "--dataset_name user/photos": "--dataset_name repo",
    "me/birds": "user/birds",
}
ADAPT = """ --config_overrides '{"prior_weighting": "uniform"}' --num_train_epochs """
PAGES = [("README.md", 16), ("docs/training.md", 10), ("docs/descriptions.md", 2), ("docs/prediction.md", 7)]
PUSHED = {
    "README.md": {"user/birds"},
    "docs/training.md": {"user/shapes"},
    "docs/descriptions.md": set(),
    "docs/prediction.md": set(),
}
PLACES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/birdworld/README.md", "examples/space/README.md")
APART = ("trust_remote_code", "--push_to_hub", "microclip push", "OPENAI_API_KEY")


@pytest.fixture
def workplace(inputs, tmp_path):
    """A folder with all that README and docs name."""
    for name in ("clip", "photos", "test", "names.txt", "descriptions.json"):
        (tmp_path / name).symlink_to(inputs / name)
    shares = [f"{name},{share}" for share, name in enumerate(tiny_inputs.DESCRIPTIONS, start=1)]
    (tmp_path / "shares.csv").write_text("\n".join(["class,share", *shares]))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "photo.png").symlink_to(min((inputs / "photos").iterdir()))
    names = list(tiny_inputs.DESCRIPTIONS)
    test = load_image_folder(inputs / "test", names)
    enough = concatenate_datasets([test] * 16)  # for all steps: each pass over Parquet files ends with a pause of 5 s
    for path in ("shards/0.parquet", "repo/data/train-0.parquet", "repo/data/test-0.parquet"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (enough if path.startswith("shards") else test).to_parquet(tmp_path / path)
    return tmp_path


def run_block(language, block, monkeypatch):
    """A code block in this process, as a Python or a command of its own would run it."""
    if language == "python":
        exec(block, {})
        return
    program, *rest = shlex.split(block.replace("\\\n", " "))
    if program == "microclip":
        monkeypatch.setattr(sys, "argv", [program, *rest])
        microclip()
        return
    assert (program, rest[0]) == ("accelerate", "launch")
    options = launch_command_parser().parse_args(rest[1:])
    monkeypatch.setattr(sys, "argv", [options.training_script, *options.training_script_args])
    runpy.run_path(options.training_script, run_name="__main__")


def run_block_apart(language, block, hub, folder):
    """A code block in processes of its own, whose Hub is `hub`."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": str(folder / "hf")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = ["bash", "-ec", block] if language == "bash" else [sys.executable, "-c", block]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"


def label_photos(table):
    """What a person does between two commands."""
    head, *rows = table.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 48 and all(row.endswith(".png,") for row in rows)
    table.write_text("\n".join([head, *(f"{row}red disc" for row in rows)]), encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "count"), PAGES)
def test_every_code_block(workplace, page, count, monkeypatch):
    """In their order, in one folder. `pip install` made this environment; `make demo` and the benchmarks have tests of
    their own; two processes on a CPU take the place of two GPUs, a Hub and an endpoint on loopback that of the real
    ones. README's first adaptation, and what needs that Hub, several processes, or a Python without the package, runs
    apart; its second one begins anew."""
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == count
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would also forbid endpoints
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workplace / "hf")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", workplace / "hf")
    first = blocks[1][1] if page == "README.md" else None
    if page == "docs/prediction.md":
        names = list(tiny_inputs.DESCRIPTIONS)
        MicroCLIPForImageClassification.from_clip("clip", names, prior_weighting="uniform").save_pretrained("adapted")
    with HubServer() as hub, ChatServer() as chat:
        for language, block in blocks:
            is_apart = block == first or any(text in block for text in APART)
            if "git clone" in block or block == "make demo\n" or "benchmark_" in block:
                continue
            for name, here in STAND_INS.items():
                block = block.replace(name, here)
            if "microclip describe" in block:
                for file in Path().glob("descriptions.json*"):  # of before
                    file.unlink()
                block, found = re.subn(r"--base_url \S+", f"--base_url {chat.base_url}", block)
                block = block if found else f"{block.rstrip()} --base_url {chat.base_url}\n"
            elif "microclip adapt" in block or "examples/adapt.py" in block:
                if "--output_dir adapted\n" in block:
                    shutil.rmtree("adapted", ignore_errors=True)
                epochs = 2 if "resume" in block else 0 if "quick --streaming" in block else 1
                block = f"{block.rstrip()}{ADAPT}{epochs}\n"
            elif "check --finish" in block:
                label_photos(Path("check", "to_label.csv"))
            if "--config_file" in block:
                block = re.sub(
                    r"accelerate launch --config_file \S+", "torchrun --standalone --nproc_per_node 2", block
                )
                on_cpu = "--device cpu" if "predict.py" in block else "--use_cpu true"
                run_block_apart(language, f"{block.rstrip()} {on_cpu}\n", hub, workplace)
            elif is_apart:
                run_block_apart(language, block, hub, workplace)
            else:
                run_block(language, block, monkeypatch)
        assert hub.repos.keys() == PUSHED.get(page, set())
    if page == "README.md":
        assert (workplace / "adapted_in_python" / "model.safetensors").exists()
        assert len((workplace / "labels.csv").read_text().splitlines()) == 1 + 48
        assert (workplace / "results" / "results.json").exists()
        assert (workplace / "check" / "check.json").exists()


@pytest.mark.parametrize(
    ("page", "example", "command"),
    [
        ("README.md", "adapt.py", r"--model_name_or_path.*?--output_dir adapted"),
        ("README.md", "describe_classes.py", r"--class_names names.txt\s+--domain.*?--output descriptions.json"),
    ],
)
def test_the_examples_show_the_commands_of_the_readme(page, example, command):
    texts = [path.read_text().replace("\\\n", " ") for path in (ROOT / page, ROOT / "examples" / example)]
    on_page, in_example = (re.search(command, text, re.DOTALL)[0].split() for text in texts)
    assert on_page == in_example


def headings(path):
    """The anchors of a page, as GitHub makes them: lower case, spaces to hyphens, other marks left out."""
    lines = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [*PLACES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_within_the_repository(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in headings(path), link
