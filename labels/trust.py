"""How far to trust the suspects, and what may be done to their labels.

A vote is a reward difference in the direction of the label, of voters that were not trained on the
pair: below zero it contradicts the label.  N pairs; intervals are 95 %.

1. Self-test.  On a copy of the labels some are flipped at random, and the same voters, trained anew
   on the copy, must find them, surely better than "the longer answer wins" does.

2. What votes can say.  Let pi < 1/2 be the share of wrong labels, and let errors not depend on the
   pair.  Of the lowest share c of all votes, F_W of the wrong and F_R of the right labels are part,
   and T of the planted flips (a flip of a wrong label is right):

       c = pi F_W + (1 - pi) F_R          T = (1 - pi) F_W + pi F_R

   So F_W > c if and only if T > c, whatever pi is: the self-test alone says whether wrong labels
   are more frequent among the called ones than elsewhere.  Then the rest has a smaller share of
   wrong labels, and the called ones may be dropped.

3. What votes cannot say.  With e, how often the voters err, they contradict the share
   d = e + (1 - 2e) pi of the labels: one equation, two unknowns.  A planted flip turns a vote
   around, so T is 1 - c at the opposite vote: it adds no equation.  eps more flips raise d by
   (1 - 2d) eps, where e does not occur.  Voters without error at pi = .185, and voters that share
   a bias on 15 % of the pairs at pi = .05, cast the same votes; to exchange the called labels mends
   nearly all of them in the one case and spoils three of four in the other.
   So d, among the surest votes too, is an upper bound of pi, and it comes near to pi where the
   surest votes are right ("anchor points").  Where people err on hard pairs, the surest votes have
   fewer wrong labels than the rest, and it is too low.

4. The precision pi F_W / c is at least pi T / c.  It needs pi, so labels are exchanged by evidence
   from outside the votes: repeated pairs with contradicting labels, or a person's review.

5. People's errors are harder to find than random flips: precision and recall are upper bounds for
   them.  If people err as the voters do, only a reviewer finds that out.
"""
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import DataError, pair_key
from runtime import findings

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)  # 1.96, two sides
MIN_PAIRS = 40      # of a self-test
MIN_FLIPS = 20
RESAMPLES = 200     # of a bootstrap
MAX_LOGIT = 30.0    # sigmoid(30) is still below 1
SUREST = 0.1        # share of the pairs whose votes count as surest
MIN_SUREST = 50
NUM_CUTS = 20       # numbers of labels to call that are tried
TAIL = 0.1          # share of the called labels that must be worth it by themselves
MIN_TAIL = 50       # labels, or half of the called ones
ALPHA = (1 - LEVEL) / 2 / (2 * NUM_CUTS)  # one side, for all cuts and their tails together
MIN_REPEATS = 20    # repeated pairs that estimate the share of wrong labels
MIN_REVIEWED = 20   # decisions of a person that replace the estimated precision
ACTIONS = ("keep", "drop", "exchange")


class Estimate(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


UNKNOWN = Estimate(math.nan, 0.0, 1.0)


class Copy(NamedTuple):
    """A copy of the labels with planted flips, and what was found on it."""
    planted: Tensor  # (N,) bool
    vote: Tensor     # (N,) in the direction of the copy's labels


# --------------------------------------------------------------------------------------------------
# Intervals of shares


def wilson(count: float, total: float) -> Estimate:
    """Share with Wilson's interval (1927); of nothing, anything from 0 to 1"""
    if total == 0:
        return UNKNOWN
    low, high = findings.wilson(count, total, LEVEL)
    low = max(0.0, low) if count else 0.0  # exactly, whatever the rounding
    high = min(1.0, high) if count < total else 1.0
    return Estimate(count / total, low, high)


def exact_low(count: int, total: int, alpha: float) -> float:
    """Lower bound of a share, wrong with probability alpha at most (Clopper and Pearson 1934).

    The share at which `count` or more of `total` have probability alpha, by bisection.  Wilson's
    bound is far too high at a few counts and small alpha.
    """
    if count <= 0:
        return 0.0
    last = min(total, count + 60 + round(10 * count ** 0.5))  # more have no probability to speak of
    counts = torch.arange(count, last + 1, dtype=torch.float64)
    log_ways = log_choose(total, counts)
    low = 0.0
    high = count / total
    for _ in range(40):
        middle = (low + high) / 2
        log_terms = counts * math.log(middle) + (total - counts) * math.log1p(-middle)
        if float((log_ways + log_terms).logsumexp(0)) < math.log(alpha):
            low = middle
        else:
            high = middle
    return low


def log_choose(n, k) -> Tensor:
    """log of the number of ways to choose k of n"""
    n = torch.as_tensor(n, dtype=torch.float64)
    k = torch.as_tensor(k, dtype=torch.float64)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


# --------------------------------------------------------------------------------------------------
# 1. The self-test


def groups_of_pairs(pairs: list) -> Tensor:
    """The same number for pairs of equal texts, whichever answer was chosen.  -> (N,) int64"""
    number: dict = {}
    for pair in pairs:
        number.setdefault(pair_key(pair), len(number))
    return torch.tensor([number[pair_key(pair)] for pair in pairs])


def draw_planted(pairs: list, share: float, copies: int, seed: int) -> list[Tensor]:
    """Labels to flip on each copy, disjoint -> [(N,) bool].

    Pairs of equal texts are flipped together; those that are more often there than labels are to be
    flipped stay as they are.  A copy has at least MIN_FLIPS flips, but at most a quarter.
    Raises DataError where there are too few pairs.
    """
    N = len(pairs)
    count = min(max(MIN_FLIPS, round(share * N)), N // 4, N // copies)
    if N < MIN_PAIRS or count < MIN_FLIPS // 4:
        need = max(MIN_PAIRS, copies * (MIN_FLIPS // 4))
        fewer = N // (MIN_FLIPS // 4) if N >= MIN_PAIRS else 0
        raise DataError(f"{pairs[0].source if pairs else 'data.train'}: {N} pairs are too few to "
                        f"test the voters on {copies} copies; give {need} or more, or set "
                        f"clean.tests = {fewer}" + ("" if fewer else " (no self-test)"))
    group = groups_of_pairs(pairs).numpy()
    sizes = np.bincount(group)
    order = np.random.default_rng([seed, 15]).permutation(len(sizes))
    copy_of_group = np.full(len(sizes), -1)
    copy = 0
    room = count
    for g in order:
        if sizes[g] > room:
            continue
        copy_of_group[g] = copy
        room -= sizes[g]
        if room == 0:
            copy += 1
            room = count
        if copy == copies:
            break
    planted = [torch.from_numpy(copy_of_group == c)[group] for c in range(copies)]
    return [flips for flips in planted if flips.any()]


def found_flips(scores: list[Tensor], planted: list[Tensor], group: Tensor) -> Estimate:
    """AUROC of planted flips, over all copies.

    scores: (N,) of each copy, high where a label is suspect; group: (N,) number of equal texts
    The interval is DeLong's (1988) on the scale of log odds, so that it stays within 0 and 1; where
    nothing varies, as where all flips are found, it is Wilson's.
    """
    value, influence = auroc(scores, planted)
    half = half_interval(influence, planted, group)
    if half == 0 or not 0 < value < 1:
        num_flips = sum(int(flips.sum()) for flips in planted)
        return wilson(value * num_flips, num_flips)
    middle = math.log(value / (1 - value))
    half = half / (value * (1 - value))
    return Estimate(value, *(float(torch.tensor(end).sigmoid())
                             for end in (middle - half, middle + half)))


def found_better(
    scores: list[Tensor], others: list[Tensor], planted: list[Tensor], group: Tensor
) -> Estimate:
    """AUROC of scores minus that of other scores on the same copies, paired.  DeLong et al. 1988"""
    value, influence = auroc(scores, planted)
    other_value, other_influence = auroc(others, planted)
    diff = value - other_value
    half = half_interval(influence - other_influence, planted, group)
    return Estimate(diff, max(-1.0, diff - half), min(1.0, diff + half))


def auroc(scores: list[Tensor], planted: list[Tensor]) -> tuple[float, Tensor]:
    """Mean AUROC of the copies, weighted by their flips, and the influence of each pair on it.

    The placement of a flip is the share of other labels with a lower score, that of another label
    the share of flips with a higher one.  The influence is (placement - AUROC) / number of its
    kind; the sum of its squares is DeLong's variance.  A pair that is a flip on one copy is another
    label on the rest: its influences are added before they are squared.
    -> AUROC, influence (N,)
    """
    num_flips = sum(int(flips.sum()) for flips in planted)
    influence = torch.zeros(len(planted[0]), dtype=torch.float64)
    total = 0.0
    for score, is_flip in zip(scores, planted):
        score = score.double()
        flips = score[is_flip].sort().values
        others = score[~is_flip].sort().values
        placement = torch.where(
            is_flip,
            rank(others, score).double() / len(others),
            1 - rank(flips, score).double() / len(flips),
        )
        value = float(placement[is_flip].mean())
        weight = len(flips) / num_flips
        size = torch.where(is_flip, len(flips), len(others))
        influence += weight * (placement - value) / size
        total += weight * value
    return total, influence


def rank(values, x):
    """Number of sorted values below each x; equal ones count half"""
    low = torch.searchsorted(values, x)
    high = torch.searchsorted(values, x, right=True)
    return (low + high) / 2


def half_interval(influence: Tensor, planted: list[Tensor], group: Tensor) -> float:
    """Half the width of the interval of an estimate, from the influence (N,) of each pair.

    Pairs of equal texts are one cluster (Obuchowski 1997).  As flips may be few, their number is
    corrected as in a variance, and Student's quantile is used, as Z + (Z^3 + Z) / (4 (n - 1)).
    """
    total = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    total.index_add_(0, group, influence)
    n = max(2, len(group[torch.stack(planted).any(0)].unique()))
    quantile = Z + (Z ** 3 + Z) / (4 * (n - 1))
    return quantile * float(total.square().sum().sqrt()) * (n / (n - 1)) ** 0.5


def by_bootstrap(
    statistic: Callable, scores: list[Tensor], planted: list[Tensor], seed: int
) -> Estimate:
    """Mean over copies of statistic(scores of flips, share of others before each, their number).

    Flips are resampled, and the other labels, which are many more, taken as they are.
    """
    rng = np.random.default_rng(seed)
    num_flips = sum(int(flips.sum()) for flips in planted)
    value = 0.0
    draws = np.zeros(RESAMPLES)
    for score, is_flip in zip(scores, planted):
        flips = score[is_flip].double().numpy()
        before = before_flips(score, is_flip).numpy()
        num_others = len(score) - len(flips)
        weight = len(flips) / num_flips
        value += weight * statistic(flips, before, num_others)
        for i in range(RESAMPLES):
            index = rng.integers(0, len(flips), len(flips))
            draws[i] += weight * statistic(flips[index], before[index], num_others)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def before_flips(score: Tensor, is_flip: Tensor) -> Tensor:
    """Share of the other labels that are as suspect as each flip, or more.  -> (flips,)"""
    score = score.double()
    others = (-score[~is_flip]).sort().values
    return torch.searchsorted(others, -score[is_flip], right=True).double() / len(others)


def average_precision(flips, before, num_others: int) -> float:
    """As strength.average_precision.  flips: (F,) scores; before: (F,) of before_flips"""
    found = num_found(flips)
    return float(np.mean(found / (found + num_others * before)))


def precision_at_count(flips, before, num_others: int) -> float:
    """Share of flips among the most suspect labels, as many as there are flips; ties against it"""
    found = num_found(flips)
    called = found + num_others * before
    return float(np.max(found, where=called <= len(flips) + 1e-6, initial=0) / len(flips))


def num_found(flips):
    """Number of flips that are as suspect as each, or more"""
    return np.searchsorted(np.sort(-flips), -flips, side="right")


class SelfTest(NamedTuple):
    flips: int            # planted, over all copies
    auroc: dict           # of the vote and of each baseline -> Estimate
    better: dict          # AUROC of the vote minus that of each baseline -> Estimate
    ap: dict              # average precision of each -> Estimate
    precision: dict       # at the number of flips, of each -> Estimate
    finds_flips: bool     # surely better than length, and than chance


def self_test(copies: list[Copy], baselines: dict, group: Tensor, seed: int) -> SelfTest:
    """baselines: {name: (N,) votes in the direction of the given labels, or a list of them, one of
    each copy in the direction of its labels}; "length" must be one of them"""
    planted = [copy.planted for copy in copies]
    scores = {"vote": [-copy.vote for copy in copies]}
    for name, votes in baselines.items():
        if isinstance(votes, Tensor):
            votes = [torch.where(flips, -votes, votes) for flips in planted]
        scores[name] = [-vote for vote in votes]
    found = {name: found_flips(score, planted, group) for name, score in scores.items()}
    better = {}
    for name in baselines:
        better[name] = found_better(scores["vote"], scores[name], planted, group)
    ap = {}
    precision = {}
    for name, score in scores.items():
        ap[name] = by_bootstrap(average_precision, score, planted, seed)
        precision[name] = by_bootstrap(precision_at_count, score, planted, seed)
    finds = better["length"].low > 0 and found["vote"].low > 0.5
    flips = int(sum(is_planted.sum() for is_planted in planted))
    return SelfTest(flips, found, better, ap, precision, finds)


def length_vote(pairs: list) -> Tensor:
    """Characters of chosen minus rejected, negated where the given labels prefer shorter answers.
    -> (N,)"""
    longer = torch.tensor([float(len(pair.chosen) - len(pair.rejected)) for pair in pairs])
    return -longer if longer.sign().sum() < 0 else longer


# --------------------------------------------------------------------------------------------------
# 2. The share of wrong labels


def label_scores(vote: Tensor) -> Tensor:
    """Probability that a label is the given one, sigmoid(a vote): cleanlab's self-confidence.

    vote: (N,) of voters that have not seen the pair; a >= 0 maximises the likelihood of the labels
    -> (N,) float64, between 0 and 1
    """
    vote = vote.double()
    vote = vote / vote.abs().mean().clamp(min=1e-12)
    a = torch.zeros((), dtype=torch.float64)
    for _ in range(50):  # Newton; the likelihood is concave in a
        p = torch.sigmoid(a * vote)
        slope = ((1 - p) * vote).sum()
        curvature = (p * (1 - p) * vote.square()).sum() + 1e-9 * len(vote)
        a = (a + (slope / curvature).clamp(-1, 1)).clamp(0, MAX_LOGIT)
    return torch.sigmoid((a * vote).clamp(-MAX_LOGIT, MAX_LOGIT))


def share_wrong(score: Tensor) -> Estimate:
    """Share of wrong labels, from scores of labels (N,): a range, not an interval.

    The value is the share of contradicted labels among those of which the votes are surest (the
    surest tenth, at least 50; "anchor points", Liu and Tao 2016, arXiv 1411.7718): right if the
    voters do not err there and errors do not depend on the pair.  The low end is its Wilson bound.
    The high end is that of the confident joint (Northcutt et al. 2021, arXiv 1911.00068, eq. 1).
    With a pair and its mirror image as the two classes both thresholds are the mean score, so the
    joint is the share of contradicted labels among votes that are surer than the mean: it counts
    more of the voters' errors as wrong labels.
    Too high where the voters share a bias, too low where people err on hard pairs.
    """
    count = min(len(score), max(MIN_SUREST, round(SUREST * len(score))))
    sureness = (score - 0.5).abs()
    least = sureness.topk(count).values[-1]
    anchors = contradicted(score, sureness >= least)
    joint = contradicted(score, torch.maximum(score, 1 - score) >= score.mean())
    return Estimate(anchors.value, anchors.low, max(anchors.high, joint.high))


def contradicted(score, chosen):
    """Share of the chosen labels that the vote contradicts; a score of 0.5 counts half"""
    score = score[chosen]
    return wilson(float((score < 0.5).sum() + (score == 0.5).sum() / 2), len(score))


def share_from_repeats(pairs: list) -> Estimate | None:
    """Share of wrong labels by pairs of equal texts that have several labels; None of fewer than 20

    Two labels of independent errors contradict each other with probability D = 2 pi (1 - pi).  D is
    the mean of the pairs' shares of contradictions, with Wilson's interval: that of two labels a
    pair, too wide for more.
    Too low by errors that all annotators make, and by lines that were copied with their label.
    """
    first = torch.tensor([pair.chosen <= pair.rejected for pair in pairs]).double()
    group = groups_of_pairs(pairs)
    n = torch.bincount(group).double()
    num_first = torch.bincount(group, first)
    is_repeated = (n >= 2) & torch.tensor(answers_differ(pairs, group))
    num_repeated = int(is_repeated.sum())
    if num_repeated < MIN_REPEATS:
        return None
    contradictions = num_first * (n - num_first) / (n * (n - 1) / 2)
    D = wilson(float(contradictions[is_repeated].sum()), num_repeated)
    return Estimate(*((1 - max(0.0, 1 - 2 * end) ** 0.5) / 2 for end in D))


def answers_differ(pairs, group):
    """Whether the two answers of each group differ -> list, by the number of the group"""
    differ = [True] * (int(group.max()) + 1)
    for pair, number in zip(pairs, group.tolist()):
        differ[number] = pair.chosen != pair.rejected
    return differ


# --------------------------------------------------------------------------------------------------
# 3. and 4. What may be done


class Decision(NamedTuple):
    called: Tensor       # (N,) bool: labels called wrong
    action: str          # what becomes of those that are not exchanged: "keep" or "drop"
    precision: Estimate  # share of wrong labels among the called; unless reviewed, an upper bound
    tpr: Estimate        # share of planted flips that the same threshold finds
    reviewed: int        # called labels that a person has decided on
    reason: str          # in words
    exchanged: Tensor    # (N,) bool: those of the called ones that are exchanged
    vote: Tensor         # (N,) on the given labels


class Cut(NamedTuple):
    """A number of labels that could be called."""
    num_called: int
    threshold: float    # the highest vote that is called
    tpr: Estimate       # of planted flips; the ends hold for all cuts together
    ratio: float        # lower bound of TPR / share called, of all and of the tail


NO_CUT = Cut(0, -math.inf, UNKNOWN, 0.0)


def decide(
    vote: Tensor, copies: list[Copy], test: SelfTest, share: Estimate, action: str,
    drop_precision: float = 0.0, repeats: Estimate | None = None, group: Tensor | None = None,
) -> Decision:
    """Which labels are called wrong, and what becomes of them.

    vote: (N,) on the given labels; action: the strongest one wanted, of ACTIONS
    share: of share_wrong; repeats: of share_from_repeats; group: (N,) number of equal texts
    drop_precision: lower bound of the precision from which labels are dropped; 0: the share of
    wrong labels, so that the file keeps no larger share of them: pi cancels (point 2)

    The largest number of labels is called for which this bound holds, of NUM_CUTS up to the number
    of wrong labels by the value of `share`.  Labels are exchanged where pi TPR / called is
    surely above one half, pi being the lower end by repeated pairs; without these, never.
    """
    if action not in ACTIONS:
        raise ValueError(f"decide: action is {action!r}; give one of {', '.join(ACTIONS)}")
    tried = cuts(vote, copies, share.value, group) if test.finds_flips else []
    pi = share if repeats is None else repeats
    if drop_precision:
        cut = largest(tried, drop_precision / max(pi.low, 1e-9))
    else:
        cut = largest(tried, 1.0)
    exchange = NO_CUT
    if repeats is not None and action == "exchange":
        exchange = largest(tried, 0.5 / max(repeats.low, 1e-9))
    called = vote.double() <= cut.threshold
    precision = UNKNOWN
    if cut.num_called:
        ends = zip((pi.value, pi.low, max(pi.high, share.high)), cut.tpr)
        precision = Estimate(*(min(1.0, p * tpr * len(vote) / cut.num_called) for p, tpr in ends))
    return Decision(
        called=called,
        action="keep" if action == "keep" or not cut.num_called else "drop",
        precision=precision,
        tpr=cut.tpr,
        reviewed=0,
        reason=reason_of(test, tried, cut, exchange, action, drop_precision, repeats),
        exchanged=called & (vote.double() <= exchange.threshold),
        vote=vote,
    )


def largest(tried, ratio):
    """The cut of most labels whose bound is above the ratio"""
    good = [cut for cut in tried if cut.ratio > ratio]
    return good[-1] if good else NO_CUT


def cuts(
    vote: Tensor, copies: list[Copy], most: float, group: Tensor | None = None
) -> list[Cut]:
    """Numbers of labels to call, the lowest votes below zero first, up to the share `most`.

    A planted flip counts as found where at most the same share of the other labels of its copy have
    such a vote or a lower one: voters that were trained anew may be less sure.  Equal votes are
    called together.  The bounds are exact binomial ones, by Bonferroni for all cuts and their
    tails.  The tail is the last tenth of the called labels, at least 50 or half of them: a good
    beginning must not carry it.
    """
    N = len(vote)
    before = torch.cat([before_flips(-copy.vote, copy.planted) for copy in copies])
    num_flips = count_flips(copies, group)
    ordered = vote.double().sort().values
    num_below = int((ordered < 0).sum())
    out: list[Cut] = []
    for i in range(1, NUM_CUTS + 1):
        count = whole_ties(ordered, min(math.floor(most * N * i / NUM_CUTS), num_below))
        if count == 0 or (out and count == out[-1].num_called):
            continue
        tail = max(math.ceil(TAIL * count), min(MIN_TAIL, math.ceil(count / 2)))
        is_found = before <= count / N
        in_tail = is_found & (before > (count - tail) / N)
        found = math.floor(float(is_found.double().mean()) * num_flips + 1e-6)
        found_in_tail = math.floor(float(in_tail.double().mean()) * num_flips + 1e-6)
        tpr = Estimate(
            found / num_flips,
            exact_low(found, num_flips, ALPHA),
            1 - exact_low(num_flips - found, num_flips, ALPHA),
        )
        tail_low = exact_low(found_in_tail, num_flips, ALPHA)
        ratio = min(tpr.low * N / count, tail_low * N / tail)
        out.append(Cut(count, float(ordered[count - 1]), tpr, ratio))
    return out


def count_flips(copies, group):
    """Number of flips; those of equal texts are one"""
    if group is None:
        return sum(int(copy.planted.sum()) for copy in copies)
    return sum(len(group[copy.planted].unique()) for copy in copies)


def whole_ties(ordered, count):
    """The largest number up to count that does not part equal votes"""
    if count == 0 or count == len(ordered) or ordered[count - 1] < ordered[count]:
        return count
    return int(torch.searchsorted(ordered, ordered[count]))


def reason_of(test, tried, cut, exchange, action, drop_precision, repeats):
    if not test.finds_flips:
        return "planted flips are not found surely better than by length"
    if not tried:
        return "the surest votes contradict too few labels to call any of them wrong"
    if not cut.num_called:
        return "no set of suspects holds surely enough of the planted flips"
    bound = f"above {drop_precision:.2f}" if drop_precision else "higher than among the rest"
    text = f"the share of wrong labels among the called ones is surely {bound}"
    if action == "exchange" and exchange.num_called:
        text += f", and above one half among the first {exchange.num_called:,}, by repeated pairs"
    elif action == "exchange" and repeats is None:
        text += (f"; whether it is above one half votes cannot say: review {MIN_REVIEWED} of them "
                 "or more to have them exchanged")
    elif action == "exchange":
        text += "; by repeated pairs it is not surely above one half, so none is exchanged"
    return text


def review(decision: Decision, decisions: list, share: Estimate, action: str) -> Decision:
    """The decision where a person has reviewed called labels: their share of wrong ones replaces
    the estimated precision.

    decisions: "wrong", "right", "unsure" or "" of each pair
    Above one half, labels are exchanged down to the last one that was reviewed: the review says
    nothing of less suspect ones.  Not above the share of all, called labels are kept.
    """
    is_wrong = torch.tensor([d == "wrong" for d in decisions]) & decision.called
    is_right = torch.tensor([d == "right" for d in decisions]) & decision.called
    wrong = int(is_wrong.sum())
    reviewed = wrong + int(is_right.sum())
    if reviewed < MIN_REVIEWED:
        return decision._replace(reviewed=reviewed)
    precision = wilson(wrong, reviewed)
    kind = "drop" if action != "keep" and precision.low > share.value else "keep"
    exchanged = torch.zeros_like(decision.called)
    if action == "exchange" and precision.low > 0.5:
        last = decision.vote[is_wrong | is_right].max()
        exchanged = decision.called & (decision.vote <= last)
    reason = f"of {reviewed} called labels that were reviewed, {wrong} are wrong"
    return decision._replace(
        precision=precision, exchanged=exchanged, action=kind, reviewed=reviewed, reason=reason)


def actions(decision: Decision, decisions: list, action: str) -> list[str]:
    """What becomes of each pair: "keep", "drop" or "exchange".  A person's decision beats the vote:
    "right" keeps the label, "wrong" changes it as far as `action` allows."""
    out = []
    columns = decision.called.tolist(), decision.exchanged.tolist(), decisions
    for is_called, is_exchanged, decided in zip(*columns):
        if decided == "right":
            out.append("keep")
        elif decided == "wrong":
            out.append(action)
        elif is_exchanged:
            out.append("exchange")
        else:
            out.append(decision.action if is_called else "keep")
    return out


# --------------------------------------------------------------------------------------------------
# Groups of pairs


def doubt_by_group(vote: Tensor, columns: dict, min_pairs: int = 20) -> list[dict]:
    """Share of contradicted labels by the values of each column.

    columns: {name: value of each pair as text} -> rows for the review page; stands_out: the share
    is higher than that of the other pairs, by Fisher's exact test, at 5 % by Holm's correction for
    all groups looked at
    """
    doubted = (vote < 0).numpy()
    rows = []
    p_values = []
    for column, values in columns.items():
        values = np.array(values)
        for value in dict.fromkeys(values.tolist()):
            inside = values == value
            count = int(inside.sum())
            if count < min_pairs or count == len(values):
                continue
            num_doubted = int(doubted[inside].sum())
            share = wilson(num_doubted, count)
            p_values.append(fisher(num_doubted, count, int(doubted.sum()), len(values)))
            rows.append({
                "column": column, "value": value, "pairs": count, "doubted": share.value,
                "low": share.low, "high": share.high,
            })
    for row, rejected in zip(rows, holm(p_values)):
        row["stands_out"] = rejected
    return rows


def fisher(doubted: int, size: int, all_doubted: int, total: int) -> float:
    """Probability of `doubted` or more in a group of `size` if groups do not matter; one side"""
    counts = torch.arange(doubted, min(size, all_doubted) + 1, dtype=torch.float64)
    counts = counts[size - counts <= total - all_doubted]
    log_terms = log_choose(all_doubted, counts) - log_choose(total, size)
    log_terms += log_choose(total - all_doubted, size - counts)
    return min(1.0, float(log_terms.exp().sum()))


def holm(p_values: list, level: float = 0.05) -> list[bool]:
    """Which hypotheses Holm's procedure (1979) rejects"""
    rejected = [False] * len(p_values)
    for k, i in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[i] > level / (len(p_values) - k):
            break
        rejected[i] = True
    return rejected
