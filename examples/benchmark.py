"""
Compare microCLIP with its peers (`peers.py`) on the same CLIP, texts and views.

    python examples/benchmark.py                                                  # all of the bird world's table
    python examples/benchmark.py --methods microclip dpa --domains dusk --seeds 0  # some cells of it
    python examples/benchmark.py --config mine.yaml --output_dir outputs/mine      # any CLIP, your own folders

A cell is one method on one domain with one seed, and a file in `cells/` of the output folder; what is there isn't run
again, so that a table can be interrupted and goes on. At the end `results.json`, `results.csv`, `results.md` and
`results.png` tell of all cells that are there.

The configuration (see `configs/benchmark_birdworld.yaml`) names the CLIP, the domains, the seeds and each method's
settings. A domain is one of the bird world's, or a folder with `train/` (images, labels unknown or not), `test/` (a
sub-folder a class), perhaps `names.txt` (default: the sub-folders' names) and `descriptions.json`.
"""

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
import torch
import transformers
import yaml
from birdworld.domains import DOMAINS
from matplotlib.figure import Figure
from peers import ADAPTING, TRAINING_FREE, Task, load_images
from tqdm import tqdm
from transformers.trainer_callback import PrinterCallback

from microclip_hf import MicroCLIPForImageClassification, MicroCLIPTrainingArguments
from microclip_hf.data.class_names import read_class_names
from microclip_hf.data.sources import load_image_folder
from microclip_hf.descriptions.files import read_descriptions
from microclip_hf.recipes import load_recipe
from microclip_hf.text_heads import DEFAULT_TEMPLATES
from microclip_hf.training.mixing import merge_mixture


CONFIG = Path(__file__).parent / "configs" / "benchmark_birdworld.yaml"
# What a cell holds besides numbers and names.
LISTS = ("pseudo_label_accuracy", "last_log")
ROLES = ("development", "report")
# The method that the others are compared with.
REFERENCE = "recommended"
MAX_CURVES = 10  # as many as there are colours
# What a run logs that needs no labels.
UNLABELLED = (
    "mixture_agreement",
    "first_mixture_agreement",
    "training_was_kept",
    "student_agreement",
    "pseudo_label_confidence",
    "head_agreement",
    "label_changes",
    "effective_classes",
)


@dataclass(frozen=True)
class Cell:
    """One number of the table."""

    method: str
    domain: str
    role: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.method}.{Path(self.domain).name}.{self.seed}.json"


def load_config(path: Path) -> dict[str, Any]:
    """The configuration of a file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def list_cells(config: dict[str, Any]) -> list[Cell]:
    """The cells that a configuration asks for, in the order of domains, seeds, methods."""
    cells = {}
    for table in config["tables"]:
        for domain in table["domains"]:
            for seed in table["seeds"]:
                for method in table["methods"]:
                    cells[Cell(method, domain, table["role"], seed)] = None
    return list(cells)


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, if it makes sense.

    Raises:
        ValueError: on a role, method or domain that there isn't, or two domains of one name.
    """
    for table in config["tables"]:
        if table["role"] not in ROLES:
            raise ValueError(f"A table has the role {table['role']!r}; expected one of {', '.join(ROLES)}.")
        for method in table["methods"]:
            settings_of(config, method)
        for domain in table["domains"]:
            if domain not in DOMAINS and not Path(domain, "test").is_dir():
                raise ValueError(
                    f"There is no domain {domain}: neither a folder with 'test' in it, nor one of the bird world's "
                    f"({', '.join(DOMAINS)})."
                )
            if domain in DOMAINS and DOMAINS[domain].role != table["role"]:
                raise ValueError(f"The domain {domain} is for {DOMAINS[domain].role}, its table for {table['role']}.")
    places: dict[str, Cell] = {}
    for cell in list_cells(config):
        if (other := places.setdefault(cell.file_name, cell)) != cell:
            raise ValueError(f"{other} and {cell} would share the file {cell.file_name}; rename a domain.")
    return config


def settings_of(config: dict[str, Any], method: str) -> dict[str, Any]:
    """What a method of the configuration is run with: the CLIP, `base`, `described`, `config`, `args`, `options`, ...

    A method with `of` differs from that other one in what it names, one with `recipe` from the recipe.

    Raises:
        ValueError: if there is no such method.
    """
    known = config["methods"]
    if method not in known:
        raise ValueError(f"There is no method {method}; the configuration has {', '.join(known)}.")
    own = known[method] or {}
    shared = {name: config[name] for name in ("model", "templates", "num_images") if name in config}
    merged = {**shared, "base": method, "described": True, "args": {} if method in TRAINING_FREE else config["args"]}
    if "of" in own:
        merged = settings_of(config, own["of"])
    if "recipe" in own:
        recipe = load_recipe(own["recipe"])
        merged |= {"base": "microclip", "config": recipe.config, "args": recipe.args}
    merged["described"] = own.get("described", merged["described"])
    if merged["base"] not in (*ADAPTING, *TRAINING_FREE):
        raise ValueError(
            f"There is no method {merged['base']}; there are {', '.join((*TRAINING_FREE, *ADAPTING))}, and 'of' makes "
            "a variant."
        )
    for part in ("config", "args", "options"):
        merged[part] = {**merged.get(part, {}), **own.get(part, {})}
    return merged


def load_task(config: dict[str, Any], domain: str, seed: int) -> Task:
    """A domain's images and texts."""
    templates = config.get("templates", list(DEFAULT_TEMPLATES))
    common = {"clip": config["model"], "templates": templates, "seed": seed}
    if domain in DOMAINS:
        own = DOMAINS[domain]
        images = {split: own.dataset(split, config["num_images"][split]) for split in ("train", "test")}
        return Task(class_names=own.class_names, descriptions=own.descriptions, **images, **common)
    folder = Path(domain)
    names = sorted(own.name for own in (folder / "test").iterdir() if own.is_dir())
    if (folder / "names.txt").exists():
        names = read_class_names(folder / "names.txt")
    descriptions = None
    if (folder / "descriptions.json").exists():
        descriptions = read_descriptions(folder / "descriptions.json", names)
    return Task(
        class_names=names,
        train=load_image_folder(folder / "train", names),
        test=load_image_folder(folder / "test", names, labels_required=True),
        descriptions=descriptions,
        **common,
    )


def run_cell(config: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """The record of a cell; `accuracy` in percent of the test images, `seconds` for all but reading them."""
    settings = settings_of(config, cell.method)
    task = load_task(config, cell.domain, cell.seed)
    if not settings["described"]:
        task.descriptions = None
    labels, start = torch.tensor(task.test["label"]), time.perf_counter()
    extra = {}
    if settings["base"] in TRAINING_FREE:
        scores = TRAINING_FREE[settings["base"]](task, **settings["options"])
    else:
        scores, extra = adapt(task, settings)
    seconds = time.perf_counter() - start

    def percent(scores: torch.Tensor) -> float:
        return round(100 * (scores.argmax(-1).cpu() == labels).double().mean().item(), 2)

    extra = {name: percent(own) if isinstance(own, torch.Tensor) else own for name, own in extra.items()}
    return {
        "method": cell.method,
        "domain": Path(cell.domain).name,
        "role": cell.role,
        "seed": cell.seed,
        "accuracy": percent(scores),
        "seconds": round(seconds, 1),
        **extra,
        "commit": config["commit"],
        "settings": settings,
    }


def adapt(task: Task, settings: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Scores `(num_test, C)` after adaptation; by name those of each path, without logit adjustment, and of the
    mixture before training, where there are such, the pseudo-labels' accuracy, in percent, at every log, and what was
    logged last that needs no labels.
    """
    kind = ADAPTING[settings["base"]]
    model = task.build(**{**kind.config, **settings["config"]})
    untrained = copy.deepcopy(model)
    args = settings["args"] if kind.uses_crops else {**settings["args"], "num_crops": 0}
    with tempfile.TemporaryDirectory() as folder:
        args = MicroCLIPTrainingArguments(
            output_dir=folder, seed=task.seed, save_strategy="no", report_to="none", disable_tqdm=True, **args
        )
        options = settings["options"] | ({"task": task} if kind.needs_task else {})
        trainer = kind(model=model, args=args, train_dataset=task.train, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    outputs = predict(model, task)
    logits, adjustment = outputs["logits"], model.logit_adjustment
    extra = {}
    if model.config.fusion_ratio < 1:
        extra |= {f"{name}_accuracy": outputs[f"{name}_logits"] for name in ("cls", "fg")}
    if adjustment.bias.any():
        extra["unadjusted_accuracy"] = (logits + adjustment.bias) / adjustment.scale
    if trainer.mixer.first is not None and trainer.state.global_step > 0:
        merge_mixture(untrained, trainer.mixer.first.mixture)
        extra["first_mixture_accuracy"] = predict(untrained, task)["logits"]
    logs = trainer.state.log_history
    if right := [round(100 * own["pseudo_label_accuracy"], 2) for own in logs if "pseudo_label_accuracy" in own]:
        extra["pseudo_label_accuracy"] = right
    last = {name: value for own in logs for name, value in own.items()}
    extra["last_log"] = {name: round(last[name], 4) for name in UNLABELLED if name in last}
    return logits, extra


@torch.no_grad()
def predict(model: MicroCLIPForImageClassification, task: Task) -> dict[str, torch.Tensor]:
    """The model's logits of the test images `(num_test, C)`, fused and of each path."""
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    outputs = [model(pixel_values=pixel_values) for pixel_values in load_images(task.test, model)]
    return {name: torch.cat([own[name] for own in outputs]) for name in ("logits", "cls_logits", "fg_logits")}


def describe_commit() -> str:
    """The commit of the code that runs, "-dirty" where files differ from it; "unknown" outside of a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_records(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of all cells that the configuration asks for and that are there.

    Raises:
        ValueError: if a cell was run with other settings.
    """
    records = []
    for cell in list_cells(config):
        path = folder / "cells" / cell.file_name
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["settings"] != json.loads(json.dumps(settings_of(config, cell.method))):
                raise ValueError(
                    f"{path} was run with other settings than those of the configuration. Move it away to run the "
                    "cell again, or choose another --output_dir."
                )
            records.append(record)
    return records


def write_atomically(path: Path, text: str) -> None:
    """A file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def run_and_write(config: dict[str, Any], cell: Cell, folder: Path) -> dict[str, Any]:
    """Run a cell and keep its record; for a process of a pool."""
    with contextlib.redirect_stdout(io.StringIO()):
        record = run_cell(config, cell)
    write_atomically(folder / "cells" / cell.file_name, json.dumps(record, indent=1) + "\n")
    return record


def start_process(num_threads: int) -> None:
    """A process of the pool is quiet, leaves cores to the others, and ends with the one that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def run(config: dict[str, Any], cells: list[Cell], folder: Path, num_processes: int) -> None:
    """Run the cells that aren't there yet."""
    missing = [cell for cell in cells if not (folder / "cells" / cell.file_name).exists()]
    if not missing:
        return
    num_threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ["TQDM_DISABLE"] = "1"  # for the processes of the pool: tqdm reads it when it is imported
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, start_process, (num_threads,)) as pool:
        running = [pool.submit(run_and_write, config, cell, folder) for cell in missing]
        try:
            for done in tqdm(as_completed(running), "Cells", len(missing), unit="cell"):
                record = done.result()
                tqdm.write("{method} on {domain}, seed {seed}: {accuracy:.1f} % in {seconds:.0f} s".format(**record))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def summarize(records: list[dict[str, Any]], reference: str = REFERENCE) -> pandas.DataFrame:
    """A row for each method and role, best first.

    `accuracy`: mean over domains of the mean over seeds, NaN where a domain isn't there yet; `spread`: standard
    deviation over seeds of the mean over domains; `difference`, `difference_spread`: mean and standard deviation over
    (domain, seed) of the reference's accuracy minus the method's in the same cell; `wins`, `pairs`: in how many cells
    of how many the reference is better. Only seeds and domains that the reference has too count for differences.
    """
    frame = pandas.DataFrame(records)
    own = frame[frame.method == reference].set_index(["role", "domain", "seed"]).accuracy
    rows = []
    for (role, method), group in frame.groupby(["role", "method"]):
        complete = group.domain.nunique() == frame[frame.role == role].domain.nunique()
        differences = (own - group.set_index(["role", "domain", "seed"]).accuracy).dropna()
        rows.append(
            {
                "role": role,
                "method": method,
                "accuracy": group.groupby("domain").accuracy.mean().mean() if complete else float("nan"),
                "spread": group.groupby("seed").accuracy.mean().std()
                if complete and group.seed.nunique() > 1
                else float("nan"),
                "difference": differences.mean(),
                "difference_spread": differences.std(),
                "wins": int((differences > 0).sum()),
                "pairs": len(differences),
                "seconds": group.seconds.mean(),
                **group.groupby("domain").accuracy.mean(),
            }
        )
    return pandas.DataFrame(rows).sort_values(["role", "accuracy"], ascending=False, ignore_index=True)


def as_markdown(records: list[dict[str, Any]], reference: str = REFERENCE) -> str:
    """A table for each role: accuracies by domain, their mean and spread, paired differences, seconds a cell."""
    tables = []
    for role, summary in summarize(records, reference).groupby("role", sort=False):
        domains = list(dict.fromkeys(own["domain"] for own in records if own["role"] == role))
        seeds = sorted({own["seed"] for own in records if own["role"] == role})
        lines = [
            f"{role.capitalize()} domains, seeds {', '.join(map(str, seeds))}; top-1 in percent.",
            "",
            f"| method | mean ± over seeds | {' | '.join(domains)} | {reference} is better by | in cells | s |",
            "|" + "---|" * (5 + len(domains)),
        ]
        for row in summary.to_dict("records"):
            cells = [_number(row[domain]) for domain in domains]
            better = (
                ""
                if row["method"] == reference
                else f"{_number(row['difference'], True)} ± " + _number(row["difference_spread"])
            )
            wins = "" if row["method"] == reference else f"{row['wins']} of {row['pairs']}"
            mean = f"{_number(row['accuracy'])} ± {_number(row['spread'])}"
            lines.append(f"| {' | '.join([row['method'], mean, *cells, better, wins])} | {row['seconds']:.0f} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def _number(value: float, signed: bool = False) -> str:
    return "-" if value != value else f"{value:+.1f}" if signed else f"{value:.1f}"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """For each role bars of the means, with a dot for every seed, and how right the pseudo-labels were at each log."""
    summary = summarize(records)
    roles = list(summary.role.unique())
    height = 0.3 * summary.role.value_counts().max() + 1.2
    figure = Figure(figsize=(12, max(3.5, height) * len(roles)), layout="constrained")
    for (bars, curves), role in zip(figure.subplots(len(roles), 2, squeeze=False), roles, strict=True):
        frame = pandas.DataFrame([own for own in records if own["role"] == role])
        rows = summary[summary.role == role].dropna(subset="accuracy").iloc[::-1]
        colors = ["tab:orange" if method == REFERENCE else "tab:blue" for method in rows.method]
        bars.barh(rows.method, rows.accuracy, color=colors, alpha=0.6)
        for place, row in enumerate(rows.itertuples()):
            means = frame[frame.method == row.method].groupby("seed").accuracy.mean()
            bars.plot(means, [place] * len(means), "k.", markersize=4)
            bars.annotate(f"{row.accuracy:.1f}", (1, place), va="center", fontsize=8)
        bars.set(title=f"{role} domains", xlabel="top-1 in percent, mean over domains; dots: seeds")
        for method in rows.method[::-1] if "pseudo_label_accuracy" in frame else ():
            logs = frame[frame.method == method].pseudo_label_accuracy.dropna()
            if len(logs) and len(curves.lines) < MAX_CURVES:
                mean = pandas.DataFrame([dict(enumerate(own)) for own in logs]).mean()
                curves.plot(mean.index + 1, mean, "o-", markersize=3, label=method)
        curves.set(title="right pseudo-labels of the best methods", xlabel="log", ylabel="percent, mean over cells")
        if curves.lines:
            curves.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def write_results(records: list[dict[str, Any]], folder: Path) -> None:
    """`results.json`, `.csv`, `.md` and `.png`."""
    write_atomically(folder / "results.json", json.dumps(records, indent=1) + "\n")
    table = pandas.DataFrame(records).drop(columns=["settings", *LISTS], errors="ignore").to_csv(index=False)
    write_atomically(folder / "results.csv", table)
    write_atomically(folder / "results.md", as_markdown(records))
    plot(records, folder / "results.png")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML file of domains, seeds and settings")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"), help="where cells are kept")
    parser.add_argument("--methods", nargs="+", help="only these methods of the configuration")
    parser.add_argument("--domains", nargs="+", help="only these domains")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    default = 1 if torch.accelerator.is_available() else os.cpu_count() or 1
    parser.add_argument("--num_processes", type=int, default=default, help="cells that run at a time")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run what isn't there yet, and tell of all that is."""
    options = parse_arguments(arguments)
    try:
        config = check_config(load_config(options.config))
        config["commit"] = describe_commit()
        read_records(options.output_dir, config)
        chosen = {"method": options.methods, "domain": options.domains, "seed": options.seeds}
        cells = list_cells(config)
        asked = ""
        for name, values in chosen.items():
            for value in set(values or ()) - {getattr(cell, name) for cell in cells}:
                raise ValueError(f"No cell of {options.config} has {asked}the {name} {value}; see its tables.")
            cells = [cell for cell in cells if values is None or getattr(cell, name) in values]
            if values:
                asked += f"the {name} {' or '.join(map(str, values))} and "
    except KeyError as error:
        sys.exit(f"benchmark.py: {options.config} lacks {error}; see {CONFIG}.")
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"benchmark.py: {error}")
    run(config, cells, options.output_dir, options.num_processes)
    write_results(read_records(options.output_dir, config), options.output_dir)
    print((options.output_dir / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
