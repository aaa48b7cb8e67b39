"""Fig. 8, 19, 20, 27 and 28 on a small world, and their arithmetic by hand."""
import math

import numpy as np
import pytest
import torch

from data import Pair
from experiments import treatments
from experiments.shared import METHODS


def check_treatments(rows):
    assert list(rows) == [*METHODS, "longer answer wins"]
    assert set(rows["longer answer wins"]) == {"labels, end", "gold, end", "intersection, end"}
    for method in METHODS:
        for name in ("labels", "gold", "loss"):
            assert rows[method][f"{name}, end"] == rows[method][f"curve: {name}"][-1]


def check_reliability(rows):
    assert list(rows) == list(METHODS)
    for row in rows.values():
        assert len(row["curve: confidence"]) == len(row["curve: share right"]) == 10
        assert row["curve: confidence"] == sorted(row["curve: confidence"])
        assert 0.5 <= row["confidence"] <= 1 and row["nll"] > 0
        assert np.mean(row["curve: share right"]) == pytest.approx(row["accuracy"])


def check_bins(rows):
    assert len(rows) == 10
    columns = []
    for method in METHODS:
        columns += [f"{method}: labels", f"{method}: gold"]
    assert set(rows["1"]) == set(columns)


def check_inflation(rows):
    assert list(rows) == ["training pairs", "validation pairs"]
    for row in rows.values():
        gap = np.subtract(row["curve: chosen"], row["curve: rejected"])
        np.testing.assert_allclose(gap, row["curve: gap"], atol=1e-6)
        assert row["gap at the end"] == row["curve: gap"][-1]
        # relative to the first evaluation
        assert row["curve: chosen"][0] + row["curve: rejected"][0] == pytest.approx(0, abs=1e-6)


CHECKS = {
    "treatments": check_treatments,
    "reliability": check_reliability,
    "bins": check_bins,
    "inflation": check_inflation,
}


@pytest.mark.parametrize("name", CHECKS)
def test_an_experiment_on_a_small_world(small, out, name, capsys):
    small.check_twice(out, name, CHECKS[name], capsys, "--ppo.methods=")


def test_confidence_by_hand():
    ln3 = math.log(3)  # sigmoid is 3/4
    row = treatments.confidence(np.array([ln3, -ln3, 0.0, ln3]))
    assert row["accuracy"] == 0.5
    assert row["confidence"] == pytest.approx((3 * 0.75 + 0.5) / 4)
    assert row["nll"] == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4)
    assert row["curve: confidence"] == pytest.approx([0.5, 0.75, 0.75, 0.75])
    assert row["curve: share right"] == [0.0, 1.0, 0.0, 1.0]  # ties in input order


def test_mean_rewards_are_relative_to_the_first_evaluation():
    rewards = torch.tensor([  # two evaluations an epoch, two epochs, one pair
        [[1.0, 3.0]],
        [[4.0, 3.0]],
        [[5.0, 3.0]],
        [[6.0, 2.0]],
    ])
    row = treatments.mean_rewards(rewards, epochs=2)
    assert row["curve: chosen"] == [-1.0, 2.0, 3.0, 4.0]
    assert row["curve: rejected"] == [1.0, 1.0, 1.0, 0.0]
    assert row["gap after one epoch"] == 1.0 and row["gap at the end"] == 4.0
    assert row["chosen at the end"] == 4.0 and row["rejected at the end"] == 0.0


def test_length_is_a_reward_of_no_strength():
    """The lengths of the last pair are equal, which counts a half."""
    pairs = [
        Pair("", "long", "s"), Pair("", "s", "long"), Pair("", "long", "s"), Pair("", "a", "b"),
    ]
    row = treatments.length_accuracy(pairs, np.array([1.0, -1.0, -1.0, 1.0]))
    assert row == {"labels, end": 2.5 / 4, "gold, end": 2.5 / 4, "intersection, end": 1.5 / 2}
    assert treatments.length_accuracy(pairs, None) == {"labels, end": 2.5 / 4}
