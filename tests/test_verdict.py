"""How a run went: what the sentence says of labels that are known to be good or bad."""

import csv

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from test_adapt import UNIFORM, flags

from microclip_hf import MicroCLIPTrainer
from microclip_hf.commands import adapt
from microclip_hf.verdict import count_effective, has_collapsed, judge


NAMES = [f"class {number}" for number in range(12)]
EVEN = [60] * 12
SETTLED = [{"head_agreement": 0.8, "label_changes": 0.05}]


@pytest.mark.parametrize("counts", [[1, 0, 0], [5, 5, 5], [90, 9, 1], [1, 2, 3, 4, 0]])
def test_effective_classes_are_the_exponential_of_the_entropy(counts):
    assert count_effective(counts) == pytest.approx(np.exp(entropy(counts)))


@pytest.mark.parametrize(
    ("counts", "log", "status", "part"),
    [
        (EVEN, SETTLED, "as expected", "as if about 12 of 12 classes were equally frequent"),
        ([714, 6] + [0] * 10, SETTLED, "collapsed", "714 of 720 images are labelled 'class 0', and 10 of 12 classes"),
        ([300, 300, 60, 60] + [0] * 8, SETTLED, "undecided", "as if about 3 of 12 were in use"),
        (EVEN, [{"head_agreement": 0.5}], "undecided", "agree on only 50 % of the images"),
        (EVEN, [{"label_changes": 0.6}, {"label_changes": 0.3}], "undecided", "30 % of the labels still change"),
        (EVEN, [{"label_changes": 0.6}, {"label_changes": 0.1}], "as expected", "labels have settled"),
        ([3] + [0] * 11, SETTLED, "undecided", "3 images are too few to judge 12 classes by"),
        # A stream, whose images have no numbers.
        ([0] * 12, [{"effective_classes": 2.0}], "collapsed", "2.0 of 12 classes"),
        ([0] * 12, [{"effective_classes": 11.0}], "as expected", "about 11 of 12 classes"),
        ([0] * 12, [], "undecided", "nothing is known of its labels"),
    ],
)
def test_without_true_labels_classes_in_use_decide(counts, log, status, part):
    verdict = judge(NAMES, counts, log)
    assert verdict.status == status
    assert part in verdict.reasons
    assert str(verdict).startswith(f"{status.capitalize()}: ")


@pytest.mark.parametrize(
    ("adapted", "clip", "status"), [(0.765, 0.487, "better"), (0.4, 0.487, "worse"), (0.487, 0.487, "undecided")]
)
def test_true_labels_decide_where_there_are_any(adapted, clip, status):
    results = {"zero_shot_accuracy": 0.105, "cupl_accuracy": clip, "adapted_accuracy": adapted}
    verdict = judge(NAMES, EVEN, SETTLED, results)
    assert verdict.status == status
    assert f"{100 * adapted:.1f} % right, CLIP {100 * clip:.1f} %" in verdict.reasons


@pytest.mark.parametrize(("adapted", "status"), [(0.1, "collapsed"), (0.9, "better")])
def test_what_was_measured_to_be_better_has_not_collapsed(adapted, status):
    results = {"zero_shot_accuracy": 0.5, "adapted_accuracy": adapted}
    assert judge(NAMES, [714, 6] + [0] * 10, SETTLED, results).status == status


def test_few_images_with_labels_are_judged_by_these():
    results = {"zero_shot_accuracy": 0.8, "adapted_accuracy": 0.3}
    assert judge(NAMES, [2, 1] + [0] * 10, SETTLED, results).status == "worse"


def test_a_long_list_of_classes_of_which_few_are_there_is_no_collapse():
    verdict = judge([f"species {number}" for number in range(200)], [10] * 40 + [0] * 160, SETTLED)
    assert verdict.status == "undecided"
    assert "as if about 40 of 200 were in use" in verdict.reasons


def test_labels_have_settled_only_where_they_were_compared():
    assert "settled" not in judge(NAMES, EVEN, [{"head_agreement": 0.9}]).reasons


def test_two_classes_may_be_uneven():
    assert judge(["rare", "common"], [20, 80]).status == "as expected"
    assert judge(["rare", "common"], [2, 98]).status == "collapsed"
    assert not has_collapsed(1.7, 2)


def test_classes_without_descriptions_are_named():
    verdict = judge(NAMES, EVEN, SETTLED, undescribed=["bluebell", "lily-valley"])
    assert "2 of 12 classes had no descriptions ('bluebell', 'lily-valley')" in str(verdict)


def test_a_collapsed_run_says_so_in_its_last_line_its_card_and_its_report(inputs, tmp_path, monkeypatch, capsys):
    def label_all_alike(trainer, batch):
        return torch.zeros(len(batch["weak"]), dtype=torch.long)

    monkeypatch.setattr(MicroCLIPTrainer, "refine_pseudo_labels", label_all_alike)
    with pytest.warns(UserWarning, match="use few classes"):
        adapt.main(flags(inputs, tmp_path, config_overrides=UNIFORM))
    line = capsys.readouterr().out.splitlines()[-1]
    with open(tmp_path / "pseudo_labels.csv", encoding="utf-8") as file:
        first = next(csv.DictReader(file))["label"]
    assert line.startswith(f"Collapsed: 48 of 48 images are labelled {first!r}, and 2 of 3 classes have none.")
    assert f"> {line}" in (tmp_path / "README.md").read_text(encoding="utf-8")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<p class="verdict bad"><strong>Collapsed:</strong>' in page


def test_a_run_with_missing_descriptions_names_them_at_its_end(inputs, tmp_path, capsys):
    (tmp_path / "some.json").write_text('{"red disc": ["It is red.", "It is round."]}', encoding="utf-8")
    options = {"descriptions": tmp_path / "some.json", "test_dir": inputs / "test", "config_overrides": UNIFORM}
    with pytest.warns(UserWarning, match="2 of 3 classes have no descriptions"):
        adapt.main(flags(inputs, tmp_path / "out", **options))
    assert (
        "2 of 3 classes had no descriptions ('green square', 'blue bar')" in capsys.readouterr().out.splitlines()[-1]
    )
    assert "2 of 3 classes had no descriptions" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_mixture_that_is_kept_counts():
    """Where training was taken back, the one of before."""
    for log, status in (
        ({"mixture_agreement": 0.6}, "undecided"),
        ({"mixture_agreement": 0.8, "first_mixture_agreement": 0.6, "training_was_kept": 1.0}, "as expected"),
        ({"mixture_agreement": 0.6, "first_mixture_agreement": 0.8, "training_was_kept": 0.0}, "as expected"),
    ):
        verdict = judge(NAMES, EVEN, [log])
        assert verdict.status == status
        assert ("on only 60 %" in verdict.reasons) == (status == "undecided")
