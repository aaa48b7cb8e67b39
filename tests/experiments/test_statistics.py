"""Paired differences and Holm's correction: by hand, by scipy, by simulation."""
import json

import numpy as np
import pytest
from helpers import ROOT
from scipy import stats

from experiments.seeds import load_experiments
from experiments.statistics import (
    Comparison,
    against,
    compare_rows,
    comparison_table,
    couples,
    holm,
    paired_difference,
    within_rows,
)


def test_the_interval_by_hand():
    found = paired_difference([3.0, 5.0, 7.0], [1.0, 1.0, 1.0])
    # differences 2, 4, 6: mean 4, deviation 2, standard error 2 / sqrt 3, t(.975, 2) = 4.303
    assert found["seeds"] == 3 and found["difference"] == 4.0
    assert found["low"] == pytest.approx(4 - 4.3027 * 2 / 3 ** 0.5, abs=1e-3)
    assert found["high"] == pytest.approx(4 + 4.3027 * 2 / 3 ** 0.5, abs=1e-3)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_it_is_the_paired_test_of_scipy(n):
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(size=(2, n))
    found = paired_difference(ours, theirs)
    test = stats.ttest_rel(ours, theirs)
    assert found["p"] == pytest.approx(test.pvalue)
    interval = test.confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))


def test_the_interval_covers_the_truth_in_95_of_100():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.3, 1.0, size=(2000, 5))
    covered = 0
    for draw in draws:
        found = paired_difference(draw, np.zeros(5))
        covered += found["low"] <= 0.3 <= found["high"]
    assert abs(covered / 2000 - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5


def test_the_same_difference_on_every_seed_says_no_more_than_its_sign():
    assert paired_difference([2.0, 3.0], [1.0, 2.0]) == {
        "seeds": 2, "difference": 1.0, "low": 1.0, "high": 1.0, "p": 0.5,
    }
    assert paired_difference([2.0, 3.0], [2.0, 3.0])["p"] == 1.0
    ours = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert paired_difference(ours + 0.7, ours)["p"] == 2 ** -4  # equal but for roundings
    assert paired_difference(ours * 3 / 3, ours)["p"] == 1.0


def test_holm_by_hand():
    """Sorted .01, .02, .03, .04: times 4, 3, 2, 1, never smaller than the one before"""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_error_of_the_family():
    """Of ten true null hypotheses any is rejected in 5 % of the families, not in 40 %."""
    rng = np.random.default_rng(1)
    p = rng.uniform(size=(2000, 10))
    any_alone = (p < 0.05).any(1).mean()
    any_held = np.mean([min(holm(row)) < 0.05 for row in p])
    assert any_alone > 0.35
    assert abs(any_held - 0.05) < 4 * (0.05 * 0.95 / 2000) ** 0.5


def test_rows_are_compared_seed_by_seed_where_both_have_the_column():
    runs = [
        {"old": {"x": 1.0, "y": 0.0}, "new": {"x": 2.0}, "other": {"x": 1.5, "y": 1.0}},
        {"old": {"x": 5.0, "y": 0.0}, "new": {"x": 7.0}, "other": {"x": 5.0}},
    ]
    found = compare_rows(runs, against("old", "x", "y"))
    assert [(c["row"], c["reference"], c["column"]) for c in found] == [
        ("new", "old", "x"), ("other", "old", "x"),
    ]
    assert [c["difference"] for c in found] == [1.5, 0.25]
    assert [c["holm"] for c in found] == holm([c["p"] for c in found])


def test_one_seed_has_no_comparisons():
    assert compare_rows([{"a": {"x": 1.0}, "b": {"x": 2.0}}], against("a", "x")) == []


def test_against_lists_every_other_row():
    assert against("b", "x", "y")(["a", "b", "c"]) == [
        Comparison("a", "b", "x"), Comparison("c", "b", "x"),
        Comparison("a", "b", "y"), Comparison("c", "b", "y"),
    ]
    assert against("b", "x", without=["a"])(["a", "b", "c"]) == [Comparison("c", "b", "x")]
    assert against("d", "x")(["a", "b", "c"]) == []


def test_couples_are_those_whose_rows_exist():
    listed = couples({"a": "b", "c": "d"}, "x")
    assert listed(["a", "b", "c"]) == [Comparison("a", "b", "x")]


def test_two_columns_of_a_row_are_compared_within_it():
    runs = [{"a": {"x": 3.0, "y": 1.0}}, {"a": {"x": 4.0, "y": 1.0}}]
    comparison, = compare_rows(runs, within_rows({"x": "y"}))
    assert comparison["difference"] == 2.5
    line = comparison_table([comparison]).splitlines()[-1]
    assert line.split()[:5] == ["a", "y", "x", "2", "+2.500"]


def test_the_table_of_comparisons():
    found = [
        {"row": "a", "reference": "b", "column": "x", "reference_column": "", "seeds": 3,
         "difference": 0.25, "low": -0.5, "high": 1.0, "p": 0.04, "holm": 0.08},
    ]
    head, _, line = comparison_table(found).splitlines()
    assert head.split() == ["row", "against", "column", "seeds", "difference", "95", "%",
                            "interval", "p", "Holm"]
    assert line.split() == ["a", "b", "x", "3", "+0.250", "-0.500", "to", "+1.000", "0.040",
                            "0.080"]


# Experiments whose comparisons the committed results have rows and columns for
COMPARED = ("headline", "treatments", "contrast", "representations", "shifts", "denoised",
            "overoptimisation", "swapped", "strongest", "deciles", "subsets", "detectors",
            "verifier")


@pytest.mark.parametrize("name", COMPARED)
def test_the_comparisons_of_an_experiment_name_rows_and_columns_that_it_has(name):
    """A name with a typing error would be left out in silence."""
    runs = list(json.loads((ROOT / f"results/{name}.json").read_text())["runs"].values())
    for row, reference, column, reference_column in load_experiments()[name].comparisons(runs[0]):
        assert any(column in run[row] for run in runs), (row, column)
        assert any((reference_column or column) in run[reference] for run in runs), reference
    assert compare_rows(runs, load_experiments()[name].comparisons)
