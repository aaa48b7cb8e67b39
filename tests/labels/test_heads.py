"""Linear heads against scikit-learn, and what an out-of-fold vote must not depend on."""
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from labels import heads
from strength import auroc


def pairs(n, d, seed=0):
    """-> differences (n, d) whose first feature decides most labels"""
    generator = torch.Generator().manual_seed(seed)
    diff = torch.randn(n, d, generator=generator, dtype=torch.float64)
    wins = diff[:, 0] + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64) > 0
    return torch.where(wins[:, None], diff, -diff)


def sklearn_votes(diff, fold, l2):
    """Bradley-Terry is logistic regression on each difference and its opposite, without intercept.

    The double number of rows halves its C.
    """
    votes = torch.zeros(len(diff), dtype=torch.float64)
    for k in range(int(fold.max()) + 1):
        rows = diff[fold != k].numpy()
        x = np.concatenate((rows, -rows))
        y = np.concatenate((np.ones(len(rows)), np.zeros(len(rows))))
        model = LogisticRegression(C=0.5 / l2, fit_intercept=False, tol=1e-10, max_iter=1000)
        w = torch.from_numpy(model.fit(x, y).coef_[0])
        votes[fold == k] = diff[fold == k] @ w
    return votes


@pytest.mark.parametrize("n, d", [(80, 12), (30, 50)])
@pytest.mark.parametrize("l2", [10.0, 1.0, 0.1])
def test_votes_are_those_of_scikit_learn(n, d, l2):
    diff = pairs(n, d)
    diff = diff / diff.square().sum(1).mean().sqrt()
    fold = torch.arange(n) % 5
    votes, _, _ = heads.out_of_fold(heads.principal_axes(diff), torch.ones(n), fold, (l2,))
    expected = sklearn_votes(diff, fold, l2).float()
    # the last step is at most TOLERANCE of the weights; those left out add up to less than this
    torch.testing.assert_close(votes, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("n, d", [(80, 12), (30, 50)])
def test_an_exchanged_label_is_one_whose_difference_is_negated(n, d):
    """So planted flips need no new axes."""
    diff = pairs(n, d)
    fold = torch.arange(n) % 5
    sign = torch.where(torch.arange(n) % 7 == 0, -1.0, 1.0)
    votes, loss, l2 = heads.out_of_fold(heads.principal_axes(diff), sign, fold)
    again = heads.out_of_fold(heads.principal_axes(diff * sign[:, None]), torch.ones(n), fold)
    # axes in float64, rounded to float32: the sums differ in their rounding alone
    torch.testing.assert_close(votes, again[0], rtol=0, atol=1e-4 * float(votes.abs().max()))
    assert again[1:] == (pytest.approx(loss), l2)


def test_no_head_votes_on_a_pair_it_was_trained_on():
    """Another label of a pair changes its vote in sign alone."""
    diff = heads.principal_axes(pairs(60, 5))
    fold = torch.arange(60) % 5
    sign = torch.ones(60)
    before, _, _ = heads.out_of_fold(diff, sign, fold, (1.0,))
    sign[fold == 2] = -1.0
    after, _, _ = heads.out_of_fold(diff, sign, fold, (1.0,))
    # the heads of other folds decide after how many steps all are done
    tolerance = 0.01 * float(before.abs().max())
    torch.testing.assert_close(after[fold == 2], -before[fold == 2], rtol=0, atol=tolerance)


def test_planted_flips_are_found_and_noise_votes_for_nothing():
    diff = pairs(400, 20)
    planted = torch.arange(400) % 10 == 0
    sign = torch.where(planted, -1.0, 1.0)
    fold = torch.arange(400) // 2 % 5
    votes, loss, _ = heads.out_of_fold(heads.principal_axes(diff), sign, fold)
    assert auroc(-votes, planted) > 0.9 and loss < 0.6
    noise = torch.randn(400, 20, generator=torch.Generator().manual_seed(1))
    _, loss, l2 = heads.out_of_fold(heads.principal_axes(noise), torch.ones(400), fold)
    assert loss > 0.68 and l2 >= 1.0


def test_a_pair_without_a_fold_gets_the_mean_vote_and_trains_no_head():
    diff = pairs(60, 5)
    fold = torch.arange(60) % 4
    fold[50:] = -1
    features = heads.principal_axes(diff)
    votes, _, _ = heads.out_of_fold(features, torch.ones(60), fold, (1.0,))
    labelled = heads.Features(features.diff[:50], features.power)
    own, _, _ = heads.out_of_fold(labelled, torch.ones(50), fold[:50], (1.0,))
    tolerance = 0.01 * float(votes.abs().max())
    torch.testing.assert_close(votes[:50], own, rtol=0, atol=tolerance)
    by_head = []
    for k in range(4):  # a head's votes on the last ten, as if they were its fold
        of_head = fold.clone()
        of_head[50:] = k
        by_head.append(heads.out_of_fold(features, torch.ones(60), of_head, (1.0,))[0][50:])
    # the other heads then learn from these ten, but not the one that votes
    torch.testing.assert_close(
        votes[50:], torch.stack(by_head).mean(0), rtol=0, atol=2 * tolerance)
