import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from detect import area_under_margin, confident_learning, dropout_uncertainty, small_loss, vote_entropy

LN3 = math.log(3)  # sigmoid(LN3) is 3/4


# ---------------------------------------------------------------------------------------------------------------------
# Traces of one training

def test_traces_by_hand():
    trace = torch.tensor([[0.0, LN3, -LN3], [LN3, LN3, -LN3]])  # two moments, three pairs
    np.testing.assert_allclose(small_loss(trace), [(math.log(2) + math.log(4 / 3)) / 2, math.log(4 / 3), math.log(4)], rtol=1e-6)
    np.testing.assert_allclose(area_under_margin(trace), [-LN3 / 2, -LN3, LN3], rtol=1e-6)


def test_what_is_learned_later_is_more_suspect():
    learned = torch.tensor([0, 2, 4, 6, 8])  # when; the last one never
    trace = 2.0 * (torch.arange(8)[:, None] >= learned) - 1.0
    for signal in (small_loss, area_under_margin):
        assert (signal(trace).diff() > 0).all()


def test_the_two_traces_are_bound_by_the_swapped_label():
    """softplus(-d) - softplus(d) = -d: the loss of a label less the loss of its opposite is the negative margin."""
    trace = 3 * torch.randn(7, 50)
    torch.testing.assert_close(small_loss(trace) - small_loss(-trace), area_under_margin(trace))


# ---------------------------------------------------------------------------------------------------------------------
# Spread of votes and of passes

@pytest.mark.parametrize("against, of", [(0, 4), (1, 4), (2, 4), (4, 4), (3, 10), (0, 1)])
def test_the_entropy_of_votes_by_hand(against, of):
    gaps = torch.tensor([-0.1] * against + [5.0] * (of - against))[:, None]  # how sure a vote is does not count
    shares = [s for s in (against / of, 1 - against / of) if s]
    assert vote_entropy(gaps).item() == pytest.approx(-sum(s * math.log(s) for s in shares))


def test_the_entropy_of_votes_does_not_know_the_label():
    gaps = torch.randn(5, 40)
    torch.testing.assert_close(vote_entropy(gaps), vote_entropy(-gaps))
    assert 0 <= vote_entropy(gaps).min() and vote_entropy(gaps).max() <= math.log(2)


def test_dropout_uncertainty_is_the_std_over_passes():
    passes = torch.tensor([[1.0, 2.0, 0.0], [1.0, -2.0, 3.0]])
    assert dropout_uncertainty(passes).tolist() == [0.0, 2.0, 1.5]
    passes = torch.randn(10, 30)
    torch.testing.assert_close(dropout_uncertainty(7 - 3 * passes), 3 * dropout_uncertainty(passes))


# ---------------------------------------------------------------------------------------------------------------------
# Confident learning

def slow(gaps, turned):
    """The docstring, pair by pair"""
    n = len(gaps)
    right = [1 / (1 + math.exp(-g)) for g in gaps]
    p = [(1 - right[i], right[i]) if turned[i] else (right[i], 1 - right[i]) for i in range(n)]
    issue, threshold = [], []
    for j in (0, 1):
        own = [p[i][j] for i in range(n) if turned[i] == j]
        threshold.append(sum(own) / len(own) if own else math.inf)
    for i in range(n):
        confident = [j for j in (0, 1) if p[i][j] >= threshold[j] - 1e-6]
        best = max(confident, key=lambda j: p[i][j], default=turned[i])
        issue.append(best != turned[i] and p[i][best] > 0.5)
    return issue, [1 - r for r in right]


# whole numbers, so that thresholds and halves are hit
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_confident_learning_is_its_docstring(pairs):
    gaps, turned = zip(*pairs)
    issue, suspicion = confident_learning(torch.tensor(gaps), torch.tensor(turned))
    wanted = slow(gaps, turned)
    assert issue.tolist() == wanted[0]
    np.testing.assert_allclose(suspicion, wanted[1], atol=1e-12)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_which_side_is_called_the_first_does_not_matter(pairs):
    gaps, turned = (torch.tensor(x) for x in zip(*pairs))
    for a, b in zip(confident_learning(gaps, turned), confident_learning(gaps, ~turned)):
        assert torch.equal(a, b)


def test_an_issue_is_contradicted_as_surely_as_others_are_affirmed():
    gaps = torch.tensor([4.0, 4.0, 3.0, 3.0, -0.5, -3.0])
    turned = torch.tensor([False, True, False, True, False, True])
    assert confident_learning(gaps, turned)[0].tolist() == [False] * 5 + [True]  # -0.5 is below zero, but says little
    assert not confident_learning(gaps.abs(), turned)[0].any()


def test_a_model_that_knows_nothing_finds_no_issue():
    assert not confident_learning(torch.zeros(8), torch.tensor([True, False] * 4))[0].any()


@pytest.mark.parametrize("level, of_turned", [(3, 3), (1, 1), (0, 0), (-1, -1), (2, -1), (0, 3)])  # also of models that are often wrong
def test_confident_learning_is_cleanlabs(level, of_turned):
    filter = pytest.importorskip("cleanlab.filter")
    rank = pytest.importorskip("cleanlab.rank")
    rng = np.random.default_rng(0)
    turned = rng.random(400) < 0.4
    gaps = rng.normal(np.where(turned, of_turned, level), 2.0)
    right = 1 / (1 + np.exp(-gaps))
    first = np.where(turned, 1 - right, right)
    classes = np.stack((first, 1 - first), 1)
    issue, suspicion = confident_learning(gaps, turned)
    theirs = filter.find_label_issues(turned.astype(int), classes, filter_by="confident_learning", n_jobs=1)
    assert theirs.any() and issue.tolist() == theirs.tolist()
    quality = rank.get_label_quality_scores(turned.astype(int), classes, method="self_confidence")
    np.testing.assert_allclose(1 - suspicion, quality, atol=1e-12)
