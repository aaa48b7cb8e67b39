"""strength.py: the vote, the table of treatments by hand, the scores of a detector."""
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strength import (
    TREATMENTS,
    VERDICTS,
    auroc,
    average_precision,
    groups,
    needs_vote,
    precision_recall,
    strength,
    treat,
    treatment_settings,
    verdicts,
)

EPS = torch.finfo(torch.float32).eps
# few distinct scores, so that ties are common
scored = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30)


def test_strength_is_the_mean_and_population_std_over_members():
    reward_diffs = torch.randn(5, 40, dtype=torch.float64)
    mean, std = strength(reward_diffs)
    assert mean.shape == std.shape == (40,)
    np.testing.assert_allclose(mean, reward_diffs.numpy().mean(0), atol=1e-12)
    # numpy divides by M, like the paper
    np.testing.assert_allclose(std, reward_diffs.numpy().std(0), atol=1e-12)


def test_strength_by_hand():
    mean, std = strength(torch.tensor([[1.0, -2.0], [3.0, -2.0]]))
    assert mean.tolist() == [2.0, -2.0]
    assert std.tolist() == [1.0, 0.0]


# ----------------------------------------------------------------------------------------------
# Treatments

MEAN = [2.0, -1.0, 0.0, -3.0, 0.5]
NO = [False] * 5
LOWEST = [False, True, False, True, False]  # q = 0.4 of five pairs: pairs 1 and 3
ONE = [1.0] * 5
ZERO = [0.0] * 5
SIGMOID = [1 / (1 + math.exp(-2 * m)) for m in MEAN]  # k = 2
SIGMOID_AFTER = [1 / (1 + math.exp(-2 * m)) for m in (2.0, 1.0, 0.0, 3.0, 0.5)]
TABLE = {
    "baseline": (NO, ONE, ZERO),
    "flip": (LOWEST, ONE, ZERO),
    "smooth": (NO, [0.7] * 5, ZERO),  # alpha = 0.3
    "margin": (NO, ONE, MEAN),
    "soft_margin": (NO, [1.0, 0.7, 1.0, 0.7, 1.0], MEAN),
    "smooth_margin": (NO, [0.7] * 5, MEAN),
    "soft": (NO, SIGMOID, ZERO),
    "soft_target_margin": (NO, SIGMOID, MEAN),
    "flip_margin": (LOWEST, ONE, [2.0, 1.0, 0.0, 3.0, 0.5]),  # of the swapped order
    "flip_soft": (LOWEST, SIGMOID_AFTER, ZERO),
    "drop": (NO, [1.0, math.nan, 1.0, math.nan, 1.0], ZERO),
    "given": (NO, ONE, ZERO),  # train.treat_pairs puts the margins of the data in
}


@pytest.mark.parametrize("method", TABLE)
def test_treatment_table(method):
    swap, p, margin = treat(torch.tensor(MEAN), method, q=0.4, alpha=0.3, k=2.0)
    expected_swap, expected_p, expected_margin = TABLE[method]
    assert swap.dtype == torch.bool
    assert p.dtype == margin.dtype == torch.float32
    assert swap.tolist() == expected_swap
    # float32: one rounding of 1 - alpha; of a sigmoid at most 6, times k |mean| for its argument
    np.testing.assert_allclose(p, expected_p, rtol=0, atol=8 * EPS)
    assert margin.tolist() == expected_margin  # multiples of 1/2: exact


def test_a_margin_is_scaled_then_clipped_then_negated_where_swapped():
    mean = torch.tensor(MEAN)
    _, _, margin = treat(mean, "margin", margin_scale=0.5, margin_cap=0.6)
    assert margin.tolist() == pytest.approx([0.6, -0.5, 0.0, -0.6, 0.25])
    _, _, margin = treat(mean, "flip_margin", q=0.4, margin_scale=0.5, margin_cap=0.6)
    assert margin.tolist() == pytest.approx([0.6, 0.5, 0.0, 0.6, 0.25])


def test_the_table_is_complete():
    assert set(TABLE) == set(TREATMENTS)


def test_the_baseline_and_given_margins_need_no_vote():
    assert [method for method in TREATMENTS if not needs_vote(method)] == ["baseline", "given"]


def same_treatment(a, b):
    """Whether two results of treat are equal; a nan equals a nan."""
    for x, y in zip(a, b):
        if not torch.equal(x.float().nan_to_num(9), y.float().nan_to_num(9)):
            return False
    return True


@pytest.mark.parametrize("method", TREATMENTS)
def test_a_treatment_depends_only_on_the_settings_it_names(method):
    mean = torch.linspace(-2, 2, 20)
    base = dict(q=0.1, alpha=0.2, k=1.5, margin_scale=1.0, margin_cap=0.0)
    other = dict(q=0.5, alpha=0.4, k=3.0, margin_scale=0.5, margin_cap=1.0)
    for name in base:
        changed = base | {name: other[name]}
        is_equal = same_treatment(treat(mean, method, **base), treat(mean, method, **changed))
        assert is_equal == (name not in treatment_settings(method))


@given(st.lists(st.integers(-3, 3), max_size=40), st.floats(0, 1))
def test_flip_swaps_the_q_n_lowest_by_input_order(mean, q):
    swap, _, _ = treat(mean, "flip", q=q)

    def mean_then_order(i):
        return mean[i], i

    order = sorted(range(len(mean)), key=mean_then_order)
    expected = sorted(order[:round(q * len(mean))])
    assert swap.nonzero()[:, 0].tolist() == expected
    _, p, _ = treat(mean, "drop", q=q)
    assert torch.equal(p.isnan(), swap)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="must be one of baseline, flip.* not 'flop'"):
        treat(torch.zeros(3), "flop")
    with pytest.raises(ValueError, match=r"mean must be \(N,\), not \(2, 3\)"):
        treat(torch.zeros(2, 3), "flip")


# ----------------------------------------------------------------------------------------------
# Verdicts and groups


def test_verdicts_by_hand():
    mean = torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    std = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    names = [VERDICTS[v] for v in verdicts(mean, std)]
    assert names == ["suspected wrong"] + ["ambiguous"] * 4 + ["strong"]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.integers(1, 12))
def test_groups_are_balanced_and_ascending(mean, n):
    mean = torch.tensor(mean)  # float32, like the groups
    group = groups(mean, n)
    sizes = [int((group == g).sum()) for g in range(n)]
    assert sum(sizes) == len(mean)
    assert max(sizes) - min(sizes) <= 1
    values = list(zip(mean.tolist(), group.tolist()))
    for (a, g), (b, h) in itertools.product(values, repeat=2):
        assert not (a < b and g > h)


# ----------------------------------------------------------------------------------------------
# Scores of a detector


def equal_or_nan(a, b):
    return a == pytest.approx(b, nan_ok=True)


@given(scored)
def test_auroc_is_the_share_of_ordered_pairs(data):
    score, positive = zip(*data)
    wins = []
    for a, a_is_positive in data:
        for b, b_is_positive in data:
            if a_is_positive and not b_is_positive:
                wins.append(0.5 if a == b else float(a > b))
    expected = sum(wins) / len(wins) if wins else math.nan
    assert equal_or_nan(auroc(score, positive), expected)


@given(scored)
def test_average_precision_is_a_sum_over_thresholds(data):
    score, positive = zip(*data)
    total = 0.0
    recall = 0.0
    for threshold in sorted(set(score), reverse=True):
        called = [p for s, p in data if s >= threshold]
        if any(positive):
            new_recall = sum(called) / sum(positive)
            total += (new_recall - recall) * sum(called) / len(called)
            recall = new_recall
    expected = total if any(positive) else math.nan
    assert equal_or_nan(average_precision(score, positive), expected)


def test_both_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        score = rng.integers(0, 8, 50)
        positive = rng.random(50) < 0.3
        assert auroc(score, positive) == pytest.approx(metrics.roc_auc_score(positive, score))
        expected = metrics.average_precision_score(positive, score)
        assert average_precision(score, positive) == pytest.approx(expected)


def test_detector_scores_by_hand():
    assert auroc([3, 2, 1, 0], [True, True, False, False]) == 1
    assert auroc([3, 2, 1, 0], [False, False, True, True]) == 0
    assert auroc([1, 1, 1, 1], [True, False, True, False]) == 0.5
    assert average_precision([3, 2, 1], [True, False, True]) == pytest.approx((1 + 2 / 3) / 2)


def test_precision_and_recall_of_the_highest_share():
    score = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    positive = [True, False, True, True, False, True, False, False, False, False]
    expected = {
        0.3: (pytest.approx(2 / 3), pytest.approx(2 / 4)),
        0.37: (3 / 4, 3 / 4),  # rounded to four
        1.0: (pytest.approx(0.4), 1.0),
        0.0: (0.0, 0.0),
    }
    for share in expected:
        assert precision_recall(score, positive, share) == expected[share]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_vote_that_is_not_finite_is_refused(value):
    diffs = torch.ones(3, 4)
    diffs[1, 2] = value
    with pytest.raises(ValueError, match="a reward difference is not finite"):
        strength(diffs)
    with pytest.raises(ValueError, match="a mean strength is not finite"):
        treat(diffs[1], "flip")
