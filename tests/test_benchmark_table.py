"""The benchmark's table: which cells it holds, how it goes on after an interruption, and what it tells of them."""

import csv
import itertools
import json
import math
import os
import shlex
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import benchmark
import pytest
import torch
import yaml
from benchmark import Cell, as_markdown, check_config, list_cells, load_task, settings_of, summarize
from decisions import ClearDecisions
from PIL import Image
from tiny_inputs import DESCRIPTIONS, write_inputs
from tolerances import LOSS


RESULTS = Path(__file__).parents[1] / "docs" / "results"
COMPARED = (
    *("zero_shot", "cupl", "wca", "self_training", "wca_self_training", "lafter", "dpa", "transclip", "stata"),
    *("published", "quick", "recommended"),
)
KEYS = {"method", "domain", "role", "seed", "accuracy", "seconds", "commit"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A domain in a folder of its own, with the CLIP beside it."""
    folder = tmp_path_factory.mktemp("benchmark") / "toy"
    write_inputs(folder)
    (folder / "photos").rename(folder / "train")
    return folder


@pytest.fixture
def config(toy):
    """Six cells."""
    return {
        "commit": "abc",
        "model": str(toy / "clip"),
        "args": {"max_steps": 1, "per_device_train_batch_size": 4, "num_crops": 1, "use_cpu": True},
        "methods": {
            "zero_shot": None,
            "wca": {"options": {"num_crops": 2}},
            "microclip": {"config": {"prior_weighting": "uniform"}},
        },
        "tables": [
            {
                "role": "report",
                "domains": [str(toy)],
                "seeds": [0, 1],
                "methods": ["zero_shot", "wca", "microclip"],
            }
        ],
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command, on a configuration; it writes to `out/`."""
    monkeypatch.setattr(benchmark, "describe_commit", lambda: "abc")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which the command sets too; here it is taken back

    def run(config, *options):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        files = ["--config", tmp_path / "config.yaml", "--output_dir", tmp_path / "out"]
        benchmark.main([*map(str, [*files, "--num_processes", 1, *options])])

    return run


def make_record(config, cell):
    """A made-up one: 50 % and more for later seeds, and for methods with longer names."""
    return {
        "method": cell.method,
        "domain": Path(cell.domain).name,
        "role": cell.role,
        "seed": cell.seed,
        "accuracy": 50.0 + cell.seed + len(cell.method),
        "seconds": 1.0,
        "commit": config["commit"],
        "settings": settings_of(config, cell.method),
    }


@pytest.fixture
def cells_run(monkeypatch):
    """Cells give made-up records, in a thread of this process; here is which ones were run."""
    cells = []

    def run_cell(config, cell):
        cells.append(cell)
        return make_record(config, cell)

    monkeypatch.setattr(benchmark, "run_cell", run_cell)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda count, *rest: ThreadPoolExecutor(count))
    return cells


def contents(folder):
    """Bytes and time of change of every file."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def assert_same_record(own, record):
    """But for the time that it took; means of the log are rounded to four places."""
    own, record = dict(own), dict(record)
    assert own.pop("seconds") >= 0 and record.pop("seconds") >= 0
    assert own.pop("last_log", {}) == pytest.approx(record.pop("last_log", {}), rel=LOSS, abs=LOSS)
    assert own == record


def test_a_table_from_cells_to_files(run, config, tmp_path, monkeypatch, capsys):
    """In a process of its own; the numbers are those of this process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    run(config)
    out = tmp_path / "out"
    records = json.loads((out / "results.json").read_text(encoding="utf-8"))
    cells = list_cells(config)
    assert [
        Cell(own["method"], config["tables"][0]["domains"][0], own["role"], own["seed"]) for own in records
    ] == cells
    for cell, record in zip(cells, records, strict=True):
        assert json.loads((out / "cells" / cell.file_name).read_text(encoding="utf-8")) == record
        assert record.keys() >= KEYS and record["domain"] == "toy" and record["commit"] == "abc"
        if cell.seed == 1:
            with ClearDecisions():
                own = json.loads(json.dumps(benchmark.run_cell(config, cell)))
            assert_same_record(own, record)
    assert records[2].keys() >= {"cls_accuracy", "fg_accuracy"}
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [record["method"] for record in records]
    assert [float(row["accuracy"]) for row in rows] == [record["accuracy"] for record in records]
    text = (out / "results.md").read_text(encoding="utf-8")
    assert text == as_markdown(records) and text in capsys.readouterr().out
    with Image.open(out / "results.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize("num_finished", [0, 2, 5])
def test_an_interrupted_table_goes_on(run, config, cells_run, tmp_path, monkeypatch, num_finished):
    run_cell = benchmark.run_cell

    def run_or_stop(config, cell):
        if len(cells_run) == num_finished:
            raise KeyboardInterrupt
        return run_cell(config, cell)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(benchmark, "run_cell", run_or_stop)
        run(config)
    cells, folder = list_cells(config), tmp_path / "out" / "cells"
    assert cells_run == cells[:num_finished]
    finished = contents(folder) if num_finished else {}
    assert set(finished) == {cell.file_name for cell in cells[:num_finished]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cells[-1].file_name}.unfinished").write_text("{", encoding="utf-8")  # as a killed process leaves it

    run(config)
    assert cells_run == cells
    after = contents(folder)
    assert {name: after[name] for name in finished} == finished
    records = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert records == json.loads(json.dumps([make_record(config, cell) for cell in cells]))
    run(config)
    assert cells_run == cells and contents(folder) == after


def test_some_cells_of_a_table(run, config, cells_run, tmp_path):
    """Results tell of all cells that are there, in the table's order."""
    domain = config["tables"][0]["domains"][0]
    run(config, "--methods", "microclip", "--seeds", 1)
    run(config, "--methods", "zero_shot", "--domains", domain)
    ran = [(cell.method, cell.seed) for cell in cells_run]
    assert ran == [("microclip", 1), ("zero_shot", 0), ("zero_shot", 1)]
    records = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [(own["method"], own["seed"]) for own in records] == [ran[1], ran[2], ran[0]]


def test_the_commands_of_the_docs(run, config, cells_run):
    """With this configuration in place of theirs, and its domain."""
    text = (RESULTS.parent / "benchmark.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("python examples/benchmark.py")]
    config["methods"] |= {"dpa": None, "recommended": {"recipe": "recommended"}}
    config["tables"][0]["methods"] += ["dpa", "recommended"]
    ran = []
    for command in commands:
        options = shlex.split(command)[2:]
        for name in {"--config", "--output_dir"} & set(options):
            place = options.index(name)
            del options[place : place + 2]
        run(config, *(config["tables"][0]["domains"][0] if option == "dusk" else option for option in options))
        ran.append(len(cells_run))
    assert ran == [10] * 3 and set(cells_run) == set(list_cells(config))


def test_an_error_in_a_cell_ends_the_run_and_keeps_what_is_done(run, config, cells_run, tmp_path, monkeypatch):
    run_cell, stopped = benchmark.run_cell, threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait)

    def run_or_fail(config, cell):
        if cell.method == "wca":
            raise RuntimeError("no crops today")
        if cell.method == "microclip":
            stopped.wait(60)
        return run_cell(config, cell)

    monkeypatch.setattr(benchmark, "run_cell", run_or_fail)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda count, *rest: Pool(count))
    with pytest.raises(RuntimeError, match="no crops today"):
        run(config)
    # The third may have begun before the second's error was seen.
    cells = list_cells(config)
    assert cells_run in ([cells[0]], [cells[0], cells[2]])
    assert set(contents(tmp_path / "out" / "cells")) == {cell.file_name for cell in cells_run}


def test_domains_of_one_name_are_refused(config):
    """Their cells would be the same files."""
    config["tables"].append({**config["tables"][0], "role": "development"})
    with pytest.raises(ValueError, match=r"would share the file zero_shot\.toy\.0\.json; rename a domain"):
        check_config(config)


def test_a_configuration_that_lacks_something(run, config):
    del config["methods"]
    with pytest.raises(SystemExit, match=r"config.yaml lacks 'methods'; see .*benchmark_birdworld.yaml"):
        run(config)


@pytest.mark.parametrize("part", ["args", "options"])
def test_cells_of_other_settings_are_refused(run, config, cells_run, part):
    run(config, "--methods", "microclip")
    own = config if part == "args" else config["methods"]["microclip"]
    own[part] = {**own.get(part, {}), "num_crops": 3}
    count = len(cells_run)
    with pytest.raises(SystemExit, match=r"benchmark.py: .*microclip.toy.0.json was run with other settings than"):
        run(config)
    assert len(cells_run) == count


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("role", "test", "A table has the role 'test'; expected one of development, report."),
        ("methods", ["tent"], "There is no method tent; the configuration has zero_shot, wca, microclip."),
        ("domains", ["mars"], r"There is no domain mars: neither a folder with 'test' in it, nor one of .*\(garden, "),
        ("domains", ["dusk"], "The domain dusk is for development, its table for report."),
    ],
)
def test_tables_that_make_no_sense(run, config, cells_run, name, value, message):
    config["tables"][0][name] = value
    with pytest.raises(SystemExit, match=f"benchmark.py: {message}"):
        run(config)
    assert not cells_run


def test_a_report_domain_is_no_place_to_choose_settings(config):
    config["tables"][0] |= {"role": "development", "domains": ["garden"]}
    assert check_config(config) is config
    config["tables"][0]["domains"] = ["garden", "night"]
    with pytest.raises(ValueError, match="The domain night is for report, its table for development"):
        check_config(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "zero_shot", "tent"], "has the method tent"),
        (["--domains", "garden"], "has the domain garden"),
        (["--seeds", 0, 7], "has the seed 7"),
    ],
)
def test_options_that_name_no_cell(run, config, cells_run, options, message):
    with pytest.raises(SystemExit, match=f"benchmark.py: No cell of .*config.yaml {message}"):
        run(config, *options)
    assert not cells_run


def test_a_variant_differs_in_what_it_names():
    config = {
        "args": {"learning_rate": 1e-4, "num_crops": 8},
        "methods": {
            "microclip": {"config": {"fg_query": "cls", "fusion_ratio": 0.5}, "args": {"learning_rate": 1e-3}},
            "fewer": {"of": "microclip", "args": {"num_crops": 2}, "config": {"fusion_ratio": 0.7}},
            "fixed": {"of": "fewer", "options": {"fits_last": False}, "args": {"num_crops": 1}},
            "names_only": {"of": "microclip", "described": False},
            "cupl": None,
            "mystery": {"args": {}},
            "orphan": {"of": "nobody"},
        },
    }
    before = json.dumps(config)
    fewer = {
        "base": "microclip",
        "described": True,
        "args": {"learning_rate": 1e-3, "num_crops": 2},
        "config": {"fg_query": "cls", "fusion_ratio": 0.7},
        "options": {},
    }
    assert settings_of(config, "fewer") == fewer
    fixed = {"args": {"learning_rate": 1e-3, "num_crops": 1}, "options": {"fits_last": False}}
    assert settings_of(config, "fixed") == {**fewer, **fixed}
    assert settings_of(config, "names_only") == {**settings_of(config, "microclip"), "described": False}
    assert settings_of(config, "cupl") == {"base": "cupl", "described": True, "args": {}, "config": {}, "options": {}}
    changed = {**config, "num_images": {"train": 9}}
    assert settings_of(changed, "cupl") == {**settings_of(config, "cupl"), "num_images": {"train": 9}}
    with pytest.raises(ValueError, match=r"There is no method mystery; there are zero_shot, .*, and 'of' makes a var"):
        settings_of(config, "mystery")
    with pytest.raises(ValueError, match="There is no method nobody; the configuration has"):
        settings_of(config, "orphan")
    assert json.dumps(config) == before


def test_cells_that_two_tables_share_are_run_once(config):
    first = config["tables"][0]
    config["tables"].append({**first, "seeds": [1, 2], "methods": ["microclip"]})
    cells = list_cells(config)
    assert [(cell.seed, cell.method) for cell in cells] == [
        *itertools.product([0, 1], ["zero_shot", "wca", "microclip"]),
        (2, "microclip"),
    ]


def test_a_domain_in_a_folder(config, toy, tmp_path):
    """Names in the order of `names.txt`, or else of the sub-folders; templates are the configuration's."""
    config["templates"] = ["a {}"]
    task = load_task(config, str(toy), 5)
    assert task.class_names == list(DESCRIPTIONS) and task.descriptions == DESCRIPTIONS
    assert (task.clip, task.templates, task.seed) == (config["model"], ["a {}"], 5)
    assert len(task.train) == 48 and "label" not in task.train.column_names
    assert sorted(task.test["label"]) == [0] * 4 + [1] * 4 + [2] * 4
    for split in ("train", "test"):
        shutil.copytree(toy / split, tmp_path / split)
    task = load_task(config, str(tmp_path), 5)
    assert task.class_names == ["blue bar", "green square", "red disc"] and task.descriptions is None
    colors = [image.convert("RGB").getcolors(1 << 16) for image in task.test["image"]]
    expected = [(0, 0, 255), (0, 128, 0), (255, 0, 0)]
    for label, own in zip(task.test["label"], colors, strict=True):
        assert expected[label] in {color for _, color in own}


def test_a_cell_measures_in_percent_and_leaves_descriptions_out_where_it_should(config, toy, monkeypatch):
    """A method that is right but for the first three of twelve images."""
    described = []

    def score(task):
        described.append(task.descriptions)
        labels = torch.tensor(task.test["label"])
        return torch.eye(3)[torch.cat([(labels[:3] + 1) % 3, labels[3:]])]

    monkeypatch.setitem(benchmark.TRAINING_FREE, "cupl", score)
    config["methods"] |= {"cupl": None, "names_only": {"of": "cupl", "described": False}}
    for method in ("cupl", "names_only"):
        record = benchmark.run_cell(config, Cell(method, str(toy), "report", 4))
        assert record["accuracy"] == 75.0 and record["settings"] == settings_of(config, method)
        assert (record["method"], record["domain"], record["role"], record["seed"]) == (method, "toy", "report", 4)
    assert described == [DESCRIPTIONS, None]


def make_table(accuracies):
    """Records from `{(role, method, domain): accuracies by seed}`; None where a cell isn't there."""
    records = []
    for (role, method, domain), values in accuracies.items():
        for seed, accuracy in enumerate(values):
            if accuracy is not None:
                cell = {"method": method, "domain": domain, "role": role, "seed": seed, "accuracy": accuracy}
                records.append({**cell, "seconds": 10.0 + len(records), "commit": "abc", "settings": {}})
    return records


TABLE = {
    ("development", "zero_shot", "garden"): [31.0, 31.0, 31.0],
    ("development", "recommended", "garden"): [55.5, 53.25, 54.0],
    ("report", "zero_shot", "night"): [40.5, 40.5, 40.5],
    ("report", "dpa", "night"): [62.0, 58.5, 61.25],
    ("report", "recommended", "night"): [61.0, 64.75, 61.25],
    ("report", "zero_shot", "reef"): [50.0, 50.0, 50.0],
    ("report", "dpa", "reef"): [70.5, 66.0, 71.0],
    ("report", "recommended", "reef"): [72.0, 69.25, None],
    ("report", "once", "reef"): [20.0, None, None],
}


def by_hand(records, role, method, reference="recommended"):
    """What a row of the table says, in plain Python."""
    found = {(own["domain"], own["seed"]): own for own in records if own["role"] == role and own["method"] == method}
    others = {
        (own["domain"], own["seed"]): own["accuracy"]
        for own in records
        if own["role"] == role and own["method"] == reference
    }
    accuracies = {key: own["accuracy"] for key, own in found.items()}
    domains = {domain: mean(v for (d, _), v in accuracies.items() if d == domain) for domain, _ in accuracies}
    seeds = [mean(v for (_, s), v in accuracies.items() if s == seed) for seed in {seed for _, seed in accuracies}]
    differences = [others[key] - accuracies[key] for key in accuracies if key in others]
    complete = len(domains) == len({own["domain"] for own in records if own["role"] == role})
    return {
        "accuracy": mean(domains.values()) if complete else math.nan,
        "spread": stdev(seeds) if len(seeds) > 1 and complete else math.nan,
        "difference": mean(differences),
        "difference_spread": stdev(differences) if len(differences) > 1 else math.nan,
        "wins": sum(difference > 0 for difference in differences),
        "pairs": len(differences),
        "seconds": mean(own["seconds"] for own in found.values()),
        **domains,
    }


def test_a_summary_is_what_plain_arithmetic_gives():
    records = make_table(TABLE)
    summary = summarize(records)
    order = [("report", name) for name in ("recommended", "dpa", "zero_shot", "once")]
    order += [("development", name) for name in ("recommended", "zero_shot")]
    assert list(zip(summary.role, summary.method, strict=True)) == order
    for row in summary.to_dict("records"):
        expected = by_hand(records, row.pop("role"), row.pop("method"))
        absent = row.keys() - expected.keys()
        assert absent <= {"night", "reef", "garden"} and all(math.isnan(row[name]) for name in absent)
        assert {name: row[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    # In numbers: the cells that both have, a tie among them.
    dpa = summary.set_index(["role", "method"]).loc[("report", "dpa")]
    assert (dpa.wins, dpa.pairs) == (3, 5)
    assert dpa.difference == pytest.approx((-1 + 6.25 + 0 + 1.5 + 3.25) / 5)
    assert dpa.accuracy == pytest.approx((60.583333 + 69.166667) / 2)
    assert dpa.spread == pytest.approx(stdev([66.25, 62.25, 66.125]))


def test_another_reference_and_none():
    records = make_table(TABLE)
    for row in summarize(records, "dpa").to_dict("records"):
        if row["role"] == "report":
            expected = by_hand(records, "report", row["method"], "dpa")
            assert {name: row[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    alone = summarize([own for own in records if own["method"] == "zero_shot"])
    assert list(alone.pairs) == list(alone.wins) == [0, 0] and alone.difference.isna().all()


def read_tables(markdown):
    """`{(role, method): cells by column}` of the tables in a text."""
    rows, role, header = {}, None, None
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if " domains, seeds " in line:
            role = line.split()[0].lower()
        elif line.startswith("| method"):
            header = cells
        elif line.startswith("| "):
            rows[role, cells[0]] = dict(zip(header, cells, strict=True))
    return rows


def test_the_table_shows_the_numbers():
    records = make_table(TABLE)
    text = as_markdown(records)
    rows = read_tables(text)
    assert list(rows) == list(zip(*summarize(records)[["role", "method"]].to_dict("list").values(), strict=True))
    for (role, method), cells in rows.items():
        own = by_hand(records, role, method)

        def number(name, sign="", own=own):
            return "-" if math.isnan(own.get(name, math.nan)) else f"{own[name]:{sign}.1f}"

        domains = ["night", "reef"] if role == "report" else ["garden"]
        better = f"{number('difference', '+')} ± {number('difference_spread')}", f"{own['wins']} of {own['pairs']}"
        assert list(cells.values()) == [
            method,
            f"{number('accuracy')} ± {number('spread')}",
            *map(number, domains),
            *(("", "") if method == "recommended" else better),
            f"{own['seconds']:.0f}",
        ]
    assert rows["report", "dpa"]["recommended is better by"] == "+2.0 ± 2.9"
    assert rows["report", "once"]["night"] == "-" and rows["report", "once"]["mean ± over seeds"] == "- ± -"
    assert "Report domains, seeds 0, 1, 2; top-1 in percent." in text


def test_files_of_cells_that_logged_and_cells_that_did_not(tmp_path):
    records = make_table(TABLE)
    for record in records:
        if record["method"] == "recommended":
            record["pseudo_label_accuracy"] = [50.0, 60.0, 61.5][: 2 + record["seed"] % 2]
    benchmark.write_results(records, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == records
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == as_markdown(records)
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [own["accuracy"] for own in records]
    with Image.open(tmp_path / "results.png") as picture:
        assert min(picture.size) > 100
    assert len(list(tmp_path.iterdir())) == 4


def test_the_published_table_is_that_of_the_published_records():
    records = json.loads((RESULTS / "birdworld.json").read_text(encoding="utf-8"))
    assert (RESULTS / "birdworld.md").read_text(encoding="utf-8") == as_markdown(records)
    assert all(own.keys() >= KEYS for own in records)


def test_the_comparison_is_complete():
    records = json.loads((RESULTS / "birdworld.json").read_text(encoding="utf-8"))
    cells = [(own["domain"], own["seed"], own["method"]) for own in records if own["role"] == "report"]
    domains, seeds = ({cell[part] for cell in cells} for part in (0, 1))
    assert len(domains) >= 8 and len(seeds) >= 3 and len(cells) == len(set(cells))
    assert set(itertools.product(domains, seeds, COMPARED)) <= set(cells)


def test_the_published_configuration_makes_sense():
    assert list_cells(check_config(benchmark.load_config(benchmark.CONFIG)))
