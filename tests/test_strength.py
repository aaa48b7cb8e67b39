import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from config import METHODS
from strength import NEEDS, VERDICTS, auroc, average_precision, groups, precision_recall, strength, treat, verdicts

# few distinct scores, so that ties are common
scored = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30)


def test_strength_is_the_members_mean_and_population_std():
    gaps = torch.randn(5, 40)
    mean, std = strength(gaps)
    np.testing.assert_allclose(mean, gaps.numpy().mean(0), atol=1e-6)
    np.testing.assert_allclose(std, gaps.numpy().std(0), atol=1e-6)  # numpy divides by M, like the paper


MEAN = [2.0, -1.0, 0.0, -3.0, 0.5]
NO, ONE, ZERO = [False] * 5, [1.0] * 5, [0.0] * 5
TABLE = {  # q 0.4: the two lowest, which are pairs 1 and 3
    "baseline": (NO, ONE, ZERO),
    "flip": ([False, True, False, True, False], ONE, ZERO),
    "smooth": (NO, [0.7] * 5, ZERO),
    "margin": (NO, ONE, MEAN),
    "soft_margin": (NO, [1.0, 0.7, 1.0, 0.7, 1.0], MEAN),
    "smooth_margin": (NO, [0.7] * 5, MEAN),
    "soft": (NO, [1 / (1 + math.exp(-2 * m)) for m in MEAN], ZERO),
    "soft_target_margin": (NO, [1 / (1 + math.exp(-2 * m)) for m in MEAN], MEAN),
    "flip_margin": ([False, True, False, True, False], ONE, [2.0, 1.0, 0.0, 3.0, 0.5]),  # of the swapped order
    "drop": (NO, [1.0, math.nan, 1.0, math.nan, 1.0], ZERO),
}


@pytest.mark.parametrize("method", TABLE)
def test_treatment_table(method):
    swap, p, margin = treat(torch.tensor(MEAN), method, q=0.4, alpha=0.3, k=2.0)
    assert swap.dtype == torch.bool and swap.tolist() == TABLE[method][0]
    np.testing.assert_allclose(p, TABLE[method][1], atol=1e-6)
    np.testing.assert_allclose(margin, TABLE[method][2], atol=1e-6)


def test_a_margin_is_scaled_then_cut_then_negated_where_swapped():
    m = torch.tensor(MEAN)
    assert treat(m, "margin", margin_scale=0.5, margin_cap=0.6)[2].tolist() == pytest.approx([0.6, -0.5, 0.0, -0.6, 0.25])
    assert treat(m, "flip_margin", q=0.4, margin_scale=0.5, margin_cap=0.6)[2].tolist() == pytest.approx([0.6, 0.5, 0.0, 0.6, 0.25])


def test_verdicts_by_hand():
    mean, std = torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    assert [VERDICTS[v] for v in verdicts(mean, std)] == ["suspected wrong"] + ["ambiguous"] * 4 + ["strong"]


def test_the_table_is_complete():
    assert set(TABLE) == set(METHODS) == set(NEEDS)


@pytest.mark.parametrize("method", METHODS)
def test_a_treatment_depends_on_the_settings_it_names_alone(method):
    mean = torch.linspace(-2, 2, 20)
    base, other = dict(q=0.1, alpha=0.2, k=1.5, margin_scale=1.0, margin_cap=0.0), dict(q=0.5, alpha=0.4, k=3.0, margin_scale=0.5, margin_cap=1.0)
    same = lambda a, b: all(torch.equal(x.float().nan_to_num(9), y.float().nan_to_num(9)) for x, y in zip(a, b))
    for name in base:
        assert same(treat(mean, method, **base), treat(mean, method, **base | {name: other[name]})) == (name not in NEEDS[method])


@given(st.lists(st.integers(-3, 3), max_size=40), st.floats(0, 1))
def test_flip_turns_round_q_n_of_the_lowest_by_input_order(mean, q):
    swap = treat(mean, "flip", q=q)[0]
    order = sorted(range(len(mean)), key=lambda i: (mean[i], i))
    assert swap.nonzero()[:, 0].tolist() == sorted(order[:round(q * len(mean))])
    assert torch.equal(treat(mean, "drop", q=q)[1].isnan(), swap)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="must be one of baseline, flip.* not 'flop'"):
        treat(torch.zeros(3), "flop")
    with pytest.raises(ValueError, match=r"mean must be \(N,\), not \(2, 3\)"):
        treat(torch.zeros(2, 3), "flip")


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.integers(1, 12))
def test_groups_are_balanced_and_ascending(mean, n):
    group = groups(torch.tensor(mean), n)
    sizes = [int((group == g).sum()) for g in range(n)]
    assert sum(sizes) == len(mean) and max(sizes) - min(sizes) <= 1
    for (a, g), (b, h) in itertools.product(zip(mean, group.tolist()), repeat=2):
        assert not (torch.tensor(a) < torch.tensor(b) and g > h)  # compared as float32, like the groups


# ---------------------------------------------------------------------------------------------------------------------
# Scores of a detector

def same(a, b):
    return a == pytest.approx(b, nan_ok=True)


@given(scored)
def test_auroc_is_the_share_of_ordered_pairs(data):
    score, positive = zip(*data)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, p in data for b, q in data if p and not q]
    assert same(auroc(score, positive), sum(wins) / len(wins) if wins else math.nan)


@given(scored)
def test_average_precision_is_a_sum_over_thresholds(data):
    score, positive = zip(*data)
    total, recall = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        called = [p for s, p in data if s >= threshold]
        if any(positive):
            total += (sum(called) / sum(positive) - recall) * sum(called) / len(called)
            recall = sum(called) / sum(positive)
    assert same(average_precision(score, positive), total if any(positive) else math.nan)


def test_detector_scores_by_hand():
    assert auroc([3, 2, 1, 0], [True, True, False, False]) == 1
    assert auroc([3, 2, 1, 0], [False, False, True, True]) == 0
    assert auroc([1, 1, 1, 1], [True, False, True, False]) == 0.5
    assert average_precision([3, 2, 1], [True, False, True]) == pytest.approx((1 + 2 / 3) / 2)


def test_precision_and_recall_of_the_highest_share():
    score, positive = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [True, False, True, True, False, True, False, False, False, False]
    assert precision_recall(score, positive, 0.3) == (pytest.approx(2 / 3), pytest.approx(2 / 4))
    assert precision_recall(score, positive, 0.37) == (3 / 4, 3 / 4)  # rounded to four
    assert precision_recall(score, positive, 1.0) == (pytest.approx(0.4), 1.0)
    assert precision_recall(score, positive, 0.0) == (0.0, 0.0)
