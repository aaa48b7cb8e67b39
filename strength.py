"""Preference strength: the vote of M reward models on every label, and the treatment of labels.

1. Train M reward models on the same pairs in different orders.  With ensemble.folds each member
   also leaves out a part of the pairs; with dropout each has its own dropout masks.
2. For pair i: d_im = r_m(chosen) - r_m(rejected).  Strength is the mean over m; the std over m is
   the members' disagreement.
3. A low mean marks a wrong label, a mean near zero an ambiguous one, a high mean a strong one.
4. A treatment turns the mean into three numbers per pair, (swap, p, margin), for
   `losses.bradley_terry`.

All members start from one SFT model with one reward head, so the std measures what the order of
the data changes, not the whole uncertainty of a reward model.

Source: arXiv 2401.06080, sec. 2.2 to 2.4.  M members, N pairs.
"""
from typing import NamedTuple

import torch
from torch import Tensor


def strength(reward_diffs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the members' preference differences.  arXiv 2401.06080, eq. 4.

    reward_diffs: (M, N), r_m(chosen) - r_m(rejected) -> mean (N,), std (N,)
    Raises ValueError where a difference is not finite: such a vote says nothing.
    """
    check_finite("strength: a reward difference", reward_diffs)
    mean = reward_diffs.mean(0)
    std = reward_diffs.std(0, correction=0)  # population std: the paper divides by M
    return mean, std


def check_finite(what: str, values: Tensor):
    if not torch.isfinite(values).all():
        raise ValueError(f"{what} is not finite")


class Treatment(NamedTuple):
    """One row of the table of treatments: three choices, and what the paper calls it."""
    swap: str       # "none", or "lowest": exchange chosen and rejected in the lowest share q
    target: str     # how p is set: "one", "smooth", "smooth_below_zero", "soft" or "drop"
    margin: bool    # whether the pair gets a margin
    note: str


# m = margin_scale * mean, clipped to [-margin_cap, margin_cap]; a cap of 0 means no clipping
TREATMENTS = {
    "baseline": Treatment("none", "one", False, "plain Bradley-Terry"),
    "flip": Treatment("lowest", "one", False, "flip the labels of the lowest share q"),
    "smooth": Treatment("none", "smooth", False, "p = 1 - alpha"),
    "soft": Treatment("none", "soft", False, "p = sigmoid(k mean)"),
    "margin": Treatment("none", "one", True, "margin m"),
    "soft_margin": Treatment(
        "none", "smooth_below_zero", True, "p = 1 - alpha where mean < 0: the paper's text"
    ),
    "smooth_margin": Treatment("none", "smooth", True, "the loss curve of the paper's Fig. 6"),
    "soft_target_margin": Treatment("none", "soft", True, "the flat loss of the paper's Fig. 8"),
    "flip_margin": Treatment("lowest", "one", True, "m is negated where the pair is swapped"),
    "flip_soft": Treatment(
        "lowest", "soft_after_swap", False, "flip the lowest, soften the middle: arXiv 2603.07211"
    ),
    "drop": Treatment("none", "drop", False, "leave out the lowest share q; not in the paper"),
    "given": Treatment("none", "one", False, "the margin of the data file (train.treat_pairs)"),
}
TARGET_SETTINGS = {
    "one": (),
    "smooth": ("alpha",),
    "smooth_below_zero": ("alpha",),
    "soft": ("k",),
    "soft_after_swap": ("k",),
    "drop": ("q",),
}


def treatment_settings(method: str) -> tuple[str, ...]:
    """Names of the [strength] settings that a treatment depends on."""
    treatment = TREATMENTS[method]
    names = ["q"] if treatment.swap == "lowest" else []
    names += TARGET_SETTINGS[treatment.target]
    if treatment.margin:
        names += ["margin_scale", "margin_cap"]
    return tuple(names)


def needs_vote(method: str) -> bool:
    """Whether a treatment depends on strength."""
    return method not in ("baseline", "given")


def treat(
    mean: Tensor, method: str, q: float = 0.1, alpha: float = 0.2, k: float = 1.5,
    margin_scale: float = 1.0, margin_cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn strength into (swap, p, margin) for each pair, by a row of TREATMENTS.

    mean: (N,) strength
    q: share of the pairs that count as lowest: round(q N) of them, ties by input order
    alpha: probability that a smoothed label is wrong; k: slope of the soft target sigmoid(k mean)
    margin_scale, margin_cap: margin = margin_scale * mean, clipped to the cap (0: not clipped)
    returns swap (N,) bool, p (N,), margin (N,) in units of reward

    The margin of a swapped pair belongs to the swapped order: it is negated here and nowhere else.
    A dropped pair has p = nan and never enters a batch: p = 0 would train on the reversed label and
    p = 0.5 would pull the two rewards together.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32)
    if mean.dim() != 1:
        raise ValueError(f"treat: mean must be (N,), not {tuple(mean.shape)}")
    check_finite("treat: a mean strength", mean)
    if method not in TREATMENTS:
        raise ValueError(f"treat: method must be one of {', '.join(TREATMENTS)}, not {method!r}")
    treatment = TREATMENTS[method]
    lowest = torch.zeros(len(mean), dtype=torch.bool)
    lowest[mean.argsort(stable=True)[:round(q * len(mean))]] = True
    one = torch.ones_like(mean)

    swap = lowest if treatment.swap == "lowest" else torch.zeros_like(lowest)
    targets = {
        "one": one,
        "smooth": one - alpha,
        "smooth_below_zero": torch.where(mean < 0, one - alpha, one),
        "soft": (k * mean).sigmoid(),
        "soft_after_swap": (k * torch.where(swap, -mean, mean)).sigmoid(),
        "drop": torch.where(lowest, torch.nan, one),
    }
    p = targets[treatment.target]

    margin = torch.zeros_like(mean)
    if treatment.margin:
        margin = margin_scale * mean
        if margin_cap > 0:
            margin = margin.clamp(-margin_cap, margin_cap)
        margin = torch.where(swap, -margin, margin)
    return swap, p, margin


VERDICTS = ("suspected wrong", "ambiguous", "strong")


def verdicts(mean: Tensor, std: Tensor) -> Tensor:
    """Class of each label, on the scale of the members' disagreement.  (N,), (N,) -> (N,) int64

    0 suspected wrong: the mean is below -std, so most members contradict the label
    1 ambiguous: within one std of zero
    2 strong: above std
    """
    return 1 + (mean > std).long() - (mean < -std).long()


def groups(mean: Tensor, n: int) -> Tensor:
    """Group 0..n-1 of each pair by ascending strength, sizes equal within one.  (N,) -> (N,)"""
    mean = torch.as_tensor(mean)
    n = min(n, len(mean))
    rank_to_group = torch.arange(len(mean)) * n // max(len(mean), 1)
    group = torch.empty(len(mean), dtype=torch.int64)
    group[mean.argsort(stable=True)] = rank_to_group
    return group


# ----------------------------------------------------------------------------------------------
# How well a score detects wrong labels (evaluation only; `positive` is the hidden truth)


def auroc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: probability that a positive scores above a negative, ties half.

    score: (N,), positive: (N,) bool -> float; nan where one of the two classes is empty
    """
    score = torch.as_tensor(score).double()
    positive = torch.as_tensor(positive).bool()
    num_positive = int(positive.sum())
    num_negative = len(score) - num_positive
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    _, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # 1-based, averaged over ties
    rank_sum = rank[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(rank_sum / (num_positive * num_negative))


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Area under the precision-recall curve, as a step function; ties count together.  -> float"""
    score = torch.as_tensor(score).double()
    positive = torch.as_tensor(positive).bool()
    if not positive.any():
        return float("nan")
    order = score.argsort(descending=True, stable=True)
    score = score[order]
    hits = positive[order].cumsum(0)
    called = torch.arange(1, len(score) + 1)
    last_of_ties = torch.cat((score[1:] != score[:-1], torch.ones(1, dtype=torch.bool)))
    hits = hits[last_of_ties].double()
    called = called[last_of_ties]
    new_hits = torch.cat((hits[:1], hits.diff()))
    return float((new_hits * hits / called).sum() / positive.sum())


def precision_recall(score: Tensor, positive: Tensor, share: float) -> tuple[float, float]:
    """Precision and recall when the highest `share` of the scores is called positive.  -> floats"""
    positive = torch.as_tensor(positive).bool()
    num_called = round(share * len(positive))
    called = torch.as_tensor(score).argsort(descending=True, stable=True)[:num_called]
    hits = int(positive[called].sum())
    return hits / max(len(called), 1), hits / max(int(positive.sum()), 1)
