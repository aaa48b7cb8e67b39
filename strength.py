"""Preference strength: the vote of M reward models on every label, and what to do with labels that they doubt.

1. Train M models on the same pairs; only the order of the data differs.
2. For pair i: d_im = r_m(chosen) - r_m(rejected); strength is the mean over m, disagreement the std.
3. A low mean marks a wrong label, a mean near zero an ambiguous one, a high mean a strong one.
4. A treatment turns the mean into three numbers per pair, (swap, p, margin), for `losses.bradley_terry`.

Source: arXiv 2401.06080, sec. 2.2 and 2.3.  M members, N pairs.
"""
import torch


def strength(gaps):
    """The members' vote.  (M, N) differences of reward, chosen - rejected -> mean (N,), std (N,)"""
    return gaps.mean(0), gaps.std(0, correction=0)  # the paper's mu-hat and sigma-hat; it divides by M


def treat(mean, method, q=0.1, alpha=0.2, k=1.5, margin_scale=1.0, margin_cap=0.0):
    """What each pair asks of the reward model, from its strength.

        method              swap           p                          margin
        baseline            no             1                          0
        flip                the q lowest   1                          0
        smooth              no             1 - alpha                  0
        soft                no             sigmoid(k mean)            0         "soft label" as the paper's Fig. 8 behaves
        margin              no             1                          m
        soft_margin         no             1 - alpha where mean < 0   m         "soft + margin" as the paper's text has it
        smooth_margin       no             1 - alpha                  m         ... as its Fig. 6 behaves
        soft_target_margin  no             sigmoid(k mean)            m         ... as its Fig. 8 behaves
        flip_margin         the q lowest   1                          m, negated where swapped
        drop                no             nan for the q lowest, 1    0

    mean: (N,) strength.  q: share of the pairs; round(q N) of them, ties by input order.
    m = margin_scale mean, cut to [-margin_cap, margin_cap]; a cap of 0 cuts nothing
    returns swap (N,) bool, p (N,), margin (N,) in units of reward.  The margin of a swapped pair is meant for the swapped
    order: it is negated here, and nowhere else.
    drop: p = 0 would train on the reversed label and p = 0.5 pull the rewards together, so a pair that is to be left out
    has no p at all: it is nan, and the pair never enters a batch.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32)
    if mean.dim() != 1:
        raise ValueError(f"treat: mean must be (N,), not {tuple(mean.shape)}")
    lowest = torch.zeros(len(mean), dtype=torch.bool)
    lowest[mean.argsort(stable=True)[:round(q * len(mean))]] = True
    none, one, zero = torch.zeros_like(lowest), torch.ones_like(mean), torch.zeros_like(mean)
    soft, m = (k * mean).sigmoid(), margin_scale * mean
    if margin_cap > 0:
        m = m.clamp(-margin_cap, margin_cap)
    table = {
        "baseline": (none, one, zero),
        "flip": (lowest, one, zero),
        "smooth": (none, one - alpha, zero),
        "soft": (none, soft, zero),
        "margin": (none, one, m),
        "soft_margin": (none, torch.where(mean < 0, one - alpha, one), m),
        "smooth_margin": (none, one - alpha, m),
        "soft_target_margin": (none, soft, m),
        "flip_margin": (lowest, one, torch.where(lowest, -m, m)),
        "drop": (none, torch.where(lowest, torch.nan, one), zero),
    }
    if method not in table:
        raise ValueError(f"treat: method must be one of {', '.join(table)}, not {method!r}")
    return table[method]


M = ("margin_scale", "margin_cap")
NEEDS = {  # which settings a treatment depends on
    "baseline": (), "flip": ("q",), "smooth": ("alpha",), "soft": ("k",), "margin": M, "soft_margin": ("alpha", *M),
    "smooth_margin": ("alpha", *M), "soft_target_margin": ("k", *M), "flip_margin": ("q", *M), "drop": ("q",)}


def verdicts(mean, std):
    """What the vote says of each label, on the scale of its own disagreement.  (N,), (N,) -> (N,) int64

    0 suspected wrong: the mean lies below zero by more than the std, so most members contradict the label
    1 ambiguous: within one std of zero
    2 strong: above it
    """
    return 1 + (mean > std).long() - (mean < -std).long()


VERDICTS = ("suspected wrong", "ambiguous", "strong")


def groups(mean, n):
    """The ascending group, 0..n-1, that each pair falls into by its strength; sizes differ by one at most.  (N,) -> (N,)"""
    mean = torch.as_tensor(mean)
    n = min(n, len(mean))
    group = torch.empty(len(mean), dtype=torch.int64)
    group[mean.argsort(stable=True)] = torch.arange(len(mean)) * n // max(len(mean), 1)
    return group


# ---------------------------------------------------------------------------------------------------------------------
# How well a score finds what is wrong (for evaluation; `positive` is the hidden truth)

def auroc(score, positive):
    """Probability that a positive has a higher score than a negative, ties counting half.  (N,), (N,) bool -> float"""
    score, positive = torch.as_tensor(score).double(), torch.as_tensor(positive).bool()
    n = int(positive.sum())
    if n == 0 or n == len(score):
        return float("nan")
    values, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # 1-based, averaged over ties
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def average_precision(score, positive):
    """Area under the precision-recall curve, as a step function; ties are taken together.  -> float"""
    score, positive = torch.as_tensor(score).double(), torch.as_tensor(positive).bool()
    if not positive.any():
        return float("nan")
    order = score.argsort(descending=True, stable=True)
    hits, seen = positive[order].cumsum(0), torch.arange(1, len(score) + 1)
    last = torch.cat((score[order][1:] != score[order][:-1], torch.ones(1, dtype=torch.bool)))  # of each run of ties
    hits, seen = hits[last].double(), seen[last]
    gained = torch.cat((hits[:1], hits.diff()))
    return float((gained * hits / seen).sum() / positive.sum())


def precision_recall(score, positive, share):
    """Precision and recall when the highest `share` of the scores is called positive -> float, float"""
    positive = torch.as_tensor(positive).bool()
    called = torch.as_tensor(score).argsort(descending=True, stable=True)[:round(share * len(positive))]
    hits = int(positive[called].sum())
    return hits / max(len(called), 1), hits / max(int(positive.sum()), 1)
