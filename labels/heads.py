"""Linear reward heads on fixed features of the answers, and their votes out of fold.

A head gives an answer the reward w . x.  The vote on a pair is the reward difference w . d, where
d is the difference of the features, chosen - rejected; w minimises the Bradley-Terry loss

    sum_i -log sigmoid(w . d_i) + l2 / 2 |w|^2

of the pairs outside the fold, so no head votes on a pair that it was trained on.
N pairs, D features, R = min(N, D), K folds.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from losses import bradley_terry

L2S = tuple(10 ** (e / 2) for e in range(2, -5, -1))  # 10 to 0.01, of differences of mean norm 1
MAX_STEPS = 100
TOLERANCE = 1e-4  # of a step, relative to the largest weight


class Features(NamedTuple):
    """Differences of features in the basis of their principal axes; signs of rows do not matter."""
    diff: Tensor   # (N, R), of root mean square norm 1
    power: Tensor  # (R,) sum of squares of each column


def principal_axes(diff: Tensor) -> Features:
    """diff: (N, D) differences of features -> Features, with which the same heads are fitted"""
    diff = diff.double()
    diff = diff / diff.square().sum(1).mean().sqrt().clamp(min=1e-12)
    N, D = diff.shape
    if D < N:
        _, axes = torch.linalg.eigh(diff.T @ diff)
        rotated = diff @ axes
    else:
        power, axes = torch.linalg.eigh(diff @ diff.T)
        rotated = axes * power.clamp(min=0).sqrt()
    return Features(rotated.float(), rotated.square().sum(0).float())


def out_of_fold(
    features: Features, sign: Tensor, fold: Tensor, l2s: tuple = L2S
) -> tuple[Tensor, float, float]:
    """Votes of K heads, each on the fold that it was not trained on.

    sign: (N,) 1 for a label as given, -1 where it is exchanged
    fold: (N,) int64, 0..K-1; -1 for a pair that no head is trained on, which gets the mean vote
    The l2 of least mean loss out of fold is taken: the labels alone choose it.
    -> reward differences (N,) in the direction of the labels, their mean loss in nats, the l2
    """
    diff = features.diff * sign[:, None]
    is_labelled = fold >= 0
    heads = torch.arange(int(fold.max()) + 1)
    trained_on = (fold[:, None] != heads) & is_labelled[:, None]  # (N, K)
    weights = diff.new_zeros(diff.shape[1], len(heads))           # (R, K)
    best = None
    for l2 in sorted(l2s, reverse=True):  # each starts from the solution of the one before
        weights = fit(diff, features.power, trained_on, l2, weights)
        rewards = diff @ weights  # (N, K)
        own = rewards[torch.arange(len(diff)), fold.clamp(min=0)]
        votes = torch.where(is_labelled, own, rewards.mean(1))
        loss = mean_loss(votes[is_labelled])
        if best is None or loss < best[1]:
            best = (votes, loss, l2)
    assert best is not None, "l2s is empty"
    return best


def mean_loss(votes: Tensor) -> float:
    """Mean Bradley-Terry loss, in nats.  votes: (N,) reward differences"""
    return float(bradley_terry(votes, torch.zeros_like(votes)).mean())


def fit(diff, power, trained_on, l2, weights):
    """Minimise the loss of every head from the weights given.  -> (R, K)

    The second derivative of the loss is at most power / 4 + l2 along each axis, so that a step of
    gradient / (power / 4 + l2) never raises it (Böhning and Lindsay 1988).  The steps are taken
    with Nesterov's momentum, anew where it points against the step (O'Donoghue and Candès 2015).
    """
    bound = (power / 4 + l2)[:, None]
    ahead = weights
    t = 1.0
    for _ in range(MAX_STEPS):
        error = torch.sigmoid(-diff @ ahead) * trained_on  # (N, K)
        step = (diff.T @ error - l2 * ahead) / bound
        last, weights = weights, ahead + step
        if step.abs().max() <= TOLERANCE * weights.abs().max():
            break
        if (step * (weights - last)).sum() < 0:
            t = 1.0
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        ahead = weights + (t - 1) / t_next * (weights - last)
        t = t_next
    return weights
