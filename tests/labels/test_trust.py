"""The statistics of labels/trust.py against scikit-learn, scipy and simulations of known truth.

In the simulations voters differ in what they know, and the same rules must never spoil a file that
is made as point 2 of the module's text assumes.
"""
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from data import DataError, Pair
from labels import trust
from labels.trust import Copy, Estimate


def make_pairs(n, copies_of_each=1):
    return [Pair(f"p{i // copies_of_each}", "a", "b", source=f"f:{i + 1}") for i in range(n)]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# Intervals of shares


@pytest.mark.parametrize("count, total", [(0, 5), (3, 20), (20, 20), (470, 1000)])
def test_wilson_is_that_of_scipy(count, total):
    expected = stats.binomtest(count, total).proportion_ci(method="wilson")
    assert trust.wilson(count, total) == pytest.approx(
        (count / total, expected.low, expected.high), abs=1e-9)


def test_a_share_of_nothing_may_be_anything():
    value, low, high = trust.wilson(0, 0)
    assert math.isnan(value) and (low, high) == (0, 1)


@pytest.mark.parametrize("count, total", [(1, 20), (20, 20), (3, 5000), (900, 20_000)])
@pytest.mark.parametrize("alpha", [0.025, trust.ALPHA])
def test_the_exact_bound_is_that_of_scipy(count, total, alpha):
    expected = stats.beta.ppf(alpha, count, total - count + 1)
    assert trust.exact_low(count, total, alpha) == pytest.approx(expected, rel=1e-6)
    assert trust.exact_low(0, total, alpha) == 0


# --------------------------------------------------------------------------------------------------
# Planted flips


@pytest.mark.parametrize("n, share, copies, expected", [
    (40, 0.05, 1, 10), (80, 0.05, 1, 20), (1000, 0.05, 3, 50),
    (1000, 0.25, 4, 250), (100, 0.05, 10, 10),
])
def test_planted_sets_are_disjoint_and_of_one_size(n, share, copies, expected):
    planted = trust.draw_planted(make_pairs(n), share, copies, 0)
    assert [int(flips.sum()) for flips in planted] == [expected] * copies
    assert int(torch.stack(planted).sum(0).max()) == 1
    again = trust.draw_planted(make_pairs(n), share, copies, 0)
    assert torch.equal(torch.stack(planted), torch.stack(again))
    other = trust.draw_planted(make_pairs(n), share, copies, 1)
    assert not torch.equal(torch.stack(planted), torch.stack(other))


def test_equal_pairs_are_flipped_together():
    pairs = make_pairs(300, 3)
    pairs[1] = Pair("p0", "b", "a")  # the other label of the same texts
    for flips in trust.draw_planted(pairs, 0.1, 2, 0):
        assert int(flips.sum()) == 30
        assert {int(count) for count in flips.view(100, 3).sum(1)} == {0, 3}


def test_a_pair_that_is_there_too_often_is_left_alone():
    pairs = make_pairs(1)[:1] * 500 + make_pairs(500)
    for seed in range(5):
        for flips in trust.draw_planted(pairs, 0.05, 2, seed):
            assert int(flips.sum()) == 50 and not flips[:500].any()


@pytest.mark.parametrize("n, copies, fewer", [(39, 1, 0), (0, 1, 0), (80, 20, 16), (45, 10, 9)])
def test_too_few_pairs_are_an_error_with_a_remedy(n, copies, fewer):
    with pytest.raises(DataError, match="too few to test the voters .* give .* or more") as raised:
        trust.draw_planted(make_pairs(n), 0.05, copies, 0)
    assert "\n" not in str(raised.value) and f" set clean.tests = {fewer}" in str(raised.value)
    if fewer:
        assert len(trust.draw_planted(make_pairs(n), 0.05, fewer, 0)) == fewer


# --------------------------------------------------------------------------------------------------
# AUROC and average precision


def scores_of(n=300, num_flips=40, seed=0, digits=1):
    """-> score with ties (n,), planted (n,)"""
    planted = torch.zeros(n, dtype=torch.bool)
    planted[torch.from_numpy(np.random.default_rng(seed).permutation(n)[:num_flips])] = True
    return (normal(seed, n) + planted).round(decimals=digits), planted


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_auroc_and_average_precision_are_those_of_scikit_learn(digits):
    score, planted = scores_of(digits=digits)
    group = torch.arange(len(score))
    estimate = trust.found_flips([score], [planted], group)
    assert estimate.value == pytest.approx(roc_auc_score(planted, score))
    before = trust.before_flips(score, planted).numpy()
    assert trust.average_precision(score[planted].numpy(), before, 260) == pytest.approx(
        average_precision_score(planted, score))


def test_precision_at_the_number_of_flips():
    score, planted = scores_of(digits=9)
    top = score.topk(40).indices
    expected = float(planted[top].double().mean())
    before = trust.before_flips(score, planted).numpy()
    flips = score[planted].numpy()
    assert trust.precision_at_count(flips, before, 260) == pytest.approx(expected)


def delong(scores, planted):
    """AUROCs and their covariance, straight from the definition of DeLong et al. 1988"""
    placements = []
    for score in scores:
        flips, others = score[planted], score[~planted]
        wins = (flips[:, None] > others).double() + (flips[:, None] == others).double() / 2
        placements.append((wins.mean(1), wins.mean(0)))
    of_flips = torch.stack([p[0] for p in placements])
    of_others = torch.stack([p[1] for p in placements])
    covariance = of_flips.cov() / of_flips.shape[1] + of_others.cov() / of_others.shape[1]
    return of_flips.mean(1), covariance


def test_the_variance_is_delongs():
    score, planted = scores_of(2000, 200)
    other = score + normal(5, 2000)
    group = torch.arange(2000)
    values, covariance = delong([score, other], planted)
    _, influence = trust.auroc([score], [planted])
    assert float(influence.square().sum()) == pytest.approx(float(covariance[0, 0]), rel=0.006)
    diff = trust.found_better([score], [other], [planted], group)
    half = trust.Z * float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5
    assert diff.value == pytest.approx(float(values[0] - values[1]))
    assert diff.high - diff.value == pytest.approx(half, rel=0.02)


def test_the_interval_agrees_with_a_bootstrap():
    score, planted = scores_of(600, 80)
    flips, others = score[planted], score[~planted]
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(1000):
        a = flips[rng.integers(0, 80, 80)]
        b = others[rng.integers(0, 520, 520)]
        is_flip = torch.arange(600) < 80
        draws.append(trust.auroc([torch.cat((a, b))], [is_flip])[0])
    estimate = trust.found_flips([score], [planted], torch.arange(600))
    assert estimate[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.012)


@pytest.mark.parametrize("n, copies, mu, equal", [
    (400, 1, 1.0, 1), (400, 3, 1.0, 1), (1000, 6, 0.5, 1), (400, 1, 2.0, 1), (600, 2, 1.0, 3),
])
def test_intervals_of_auroc_cover_the_truth(n, copies, mu, equal):
    """Beliefs of N(mu, 1) in the direction of the label, and length that is worth less."""
    pairs = make_pairs(n, equal)
    group = trust.groups_of_pairs(pairs)
    truth = NormalDist().cdf(2 * mu / 2 ** 0.5)
    truth_of_length = NormalDist().cdf(2 * 0.3 / 2 ** 0.5)
    covered = covered_diff = 0
    runs = 100
    for seed in range(runs):
        common = normal(seed, n // equal)
        belief = (common + mu).repeat_interleave(equal)
        length = (0.6 * common + 0.8 * normal(seed + 1000, n // equal) + 0.3)
        length = length.repeat_interleave(equal)
        planted = trust.draw_planted(pairs, 0.05, copies, seed)
        scores = [torch.where(flips, belief, -belief) for flips in planted]
        others = [torch.where(flips, length, -length) for flips in planted]
        estimate = trust.found_flips(scores, planted, group)
        diff = trust.found_better(scores, others, planted, group)
        covered += estimate.low <= truth <= estimate.high
        covered_diff += diff.low <= truth - truth_of_length <= diff.high
    assert covered / runs > 0.89 and covered_diff / runs > 0.88


def test_where_all_flips_are_found_the_interval_still_has_a_width():
    planted = torch.arange(100) < 20
    estimate = trust.found_flips([planted.double()], [planted], torch.arange(100))
    assert estimate.value == 1 and 0.8 < estimate.low < 0.9 and estimate.high == 1


# --------------------------------------------------------------------------------------------------
# The self-test, scores and shares


def test_length_counts_in_the_direction_of_the_given_labels():
    pairs = [Pair("p", "a", "bbb"), Pair("p", "a", "bb"), Pair("p", "aaaa", "b")]
    assert trust.length_vote(pairs).tolist() == [2, 1, -3]
    assert trust.length_vote(pairs[2:]).tolist() == [3]


def test_a_vote_that_is_length_does_not_find_flips_better_than_length():
    length = normal(0, 1000) + 1
    copies = [Copy(p, torch.where(p, -length, length))
              for p in trust.draw_planted(make_pairs(1000), 0.05, 2, 0)]
    test = trust.self_test(copies, {"length": length}, torch.arange(1000), 0)
    assert test.better["length"] == (0, 0, 0) and not test.finds_flips
    assert test.auroc["vote"] == test.auroc["length"] and test.auroc["vote"].low > 0.5
    assert test.flips == 100
    test = trust.self_test(copies, {"length": normal(1, 1000)}, torch.arange(1000), 0)
    assert test.finds_flips
    for estimates in (test.auroc, test.ap, test.precision):
        for estimate in estimates.values():
            assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_bootstrap_intervals_of_average_precision_cover_the_truth():
    """The truth is the mean over many drawings."""
    values = []
    covered = 0
    for seed in range(200):
        score, planted = scores_of(1000, 50, seed, digits=9)
        values.append(float(average_precision_score(planted, score)))
    trust_resamples, trust.RESAMPLES = trust.RESAMPLES, 200
    try:
        for seed in range(100):
            score, planted = scores_of(1000, 50, seed, digits=9)
            estimate = trust.by_bootstrap(trust.average_precision, [score], [planted], seed)
            covered += estimate.low <= np.mean(values) <= estimate.high
    finally:
        trust.RESAMPLES = trust_resamples
    assert covered >= 88


def test_scores_are_the_most_likely_logistic_curve():
    vote = 3 * normal(0, 500) + 2
    score = trust.label_scores(vote)
    logit = (score / (1 - score)).log()
    a = float((logit / vote).median())

    def log_likelihood(slope):
        return float(torch.nn.functional.logsigmoid(slope * vote).sum())

    assert log_likelihood(a) > max(log_likelihood(a * 1.01), log_likelihood(a * 0.99))
    torch.testing.assert_close(logit, a * vote, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(trust.label_scores(100 * vote), score)


@pytest.mark.parametrize("vote", [
    torch.zeros(9), torch.full((9,), -2.0), torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 1.0]),
])
def test_votes_that_say_nothing_make_scores_of_one_half(vote):
    torch.testing.assert_close(
        trust.label_scores(vote), torch.full((len(vote),), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_scores_stay_between_zero_and_one(scale):
    score = trust.label_scores(torch.tensor([1.0, 2.0, 500.0]) * scale)
    assert bool(((score > 0.5) & (score < 1)).all())


def confident_joint(score):
    """cleanlab's confident joint of N pairs and their mirror images -> share off the diagonal"""
    probabilities = torch.stack((score, 1 - score), 1)
    probabilities = torch.cat((probabilities, probabilities.flip(1)))
    given = torch.cat((torch.zeros(len(score)), torch.ones(len(score)))).long()
    thresholds = torch.stack([probabilities[given == k, k].mean() for k in (0, 1)])
    is_above = probabilities >= thresholds - 1e-9
    joint = torch.zeros(2, 2)
    for k in (0, 1):
        for j in (0, 1):
            joint[k, j] = (is_above[given == k, j]).sum()
    return float((joint[0, 1] + joint[1, 0]) / joint.sum())


def test_the_share_is_a_range_from_the_surest_votes_to_the_confident_joint():
    vote = 1.5 * normal(0, 4000) + 1
    score = trust.label_scores(vote)
    share = trust.share_wrong(score)
    surest = vote.abs().topk(400).indices
    assert share.value == pytest.approx(float((vote[surest] < 0).double().mean()))
    assert share.low == pytest.approx(trust.wilson(share.value * 400, 400).low)
    threshold = float(score.mean())
    num_sure = int((torch.maximum(score, 1 - score) >= threshold).sum())
    joint = confident_joint(score)
    assert share.high == pytest.approx(trust.wilson(joint * num_sure, num_sure).high)


def test_the_share_is_right_where_the_surest_votes_are():
    wrong = torch.arange(5000) % 10 == 0
    belief = normal(0, 5000) + 2
    share = trust.share_wrong(trust.label_scores(torch.where(wrong, -belief, belief)))
    assert share.low < 0.1 < share.high and share.high < 0.16


def test_two_worlds_of_unequal_shares_cast_the_same_votes():
    """Point 3: why no estimate from votes can be trusted to exchange labels."""
    generator = torch.Generator().manual_seed(0)

    def contradicted(pi, error):
        wrong = torch.rand(200_000, generator=generator) < pi
        errs = torch.rand(200_000, generator=generator) < error
        return float((wrong != errs).double().mean())

    assert contradicted(0.185, 0.0) == pytest.approx(contradicted(0.05, 0.15), abs=0.003)


def repeated(n, times, pi, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for i in range(n):
        for _ in range(times):
            is_wrong = float(torch.rand((), generator=generator)) < pi
            sides = ("b", "a") if is_wrong else ("a", "b")
            pairs.append(Pair(f"p{i}", *sides))
    return pairs


@pytest.mark.parametrize("n, times, pi", [(100, 2, 0.1), (60, 3, 0.2), (40, 5, 0.05)])
def test_repeats_estimate_the_share(n, times, pi):
    estimates = [trust.share_from_repeats(repeated(n, times, pi, seed)) for seed in range(100)]
    covered = sum(e.low <= pi <= e.high for e in estimates)
    assert covered >= 90
    assert np.mean([e.value for e in estimates]) == pytest.approx(pi, abs=0.02)


def test_few_repeats_estimate_nothing():
    assert trust.share_from_repeats(repeated(19, 2, 0.1, 0) + make_pairs(50)) is None
    same = [Pair(f"p{i}", "a", "a") for i in range(50)] * 2
    assert trust.share_from_repeats(same) is None  # no label of two equal answers contradicts


# --------------------------------------------------------------------------------------------------
# Decisions, in worlds of known truth


def simulate(kind, n, seed, num_copies=3, pi=0.1):
    """-> wrong (n,), vote (n,), copies, length (n,); errors do not depend on the pair"""
    generator = torch.Generator().manual_seed(seed)
    noise = normal(seed + 10_000, 4, n)
    wrong = torch.rand(n, generator=generator) < pi
    length = noise[0]                                  # in the direction of the truth
    if kind == "noise":
        belief = noise[1]
    elif kind == "length":
        length = belief = length + 0.5
    elif kind == "weak":
        belief = noise[1] + 0.5
    elif kind == "good":
        belief = 1.3 * noise[1] + 2
    else:                                              # sure, and wrong on 15 % of the pairs
        belief = noise[1].abs() / 2 + 1.5
        belief = torch.where(torch.rand(n, generator=generator) < 0.15, -belief, belief)
    sign = torch.where(wrong, -1.0, 1.0)
    copies = []
    for flips in trust.draw_planted(make_pairs(n), 0.05, num_copies, seed):
        sign_of_copy = torch.where(flips, -sign, sign)
        refitted = 0.9 * belief + 0.3 * normal(seed + 20_000, n)
        copies.append(Copy(flips, refitted * sign_of_copy))
    return wrong, belief * sign, copies, length * sign


def decide(kind, n, seed, action="drop", pi=0.1, drop_precision=0.0, repeats=None):
    """-> wrong (n,), Decision, actions"""
    wrong, vote, copies, length = simulate(kind, n, seed, pi=pi)
    test = trust.self_test(copies, {"length": length}, torch.arange(n), seed)
    share = trust.share_wrong(trust.label_scores(vote))
    decision = trust.decide(vote, copies, test, share, action, drop_precision, repeats)
    return wrong, decision, trust.actions(decision, [""] * n, action)


def shares_after(wrong, actions):
    """Share of wrong labels before, after"""
    after = [w != (a == "exchange") for w, a in zip(wrong.tolist(), actions) if a != "drop"]
    return float(wrong.double().mean()), float(np.mean(after))


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(trust, "RESAMPLES", 20)


@pytest.mark.parametrize("n", [400, 2000])
@pytest.mark.parametrize("kind", ["noise", "length", "weak", "good", "bias"])
def test_what_is_dropped_is_never_better_than_what_stays(kind, n, few_resamples):
    before_after = []
    num_changed = 0
    for seed in range(10):
        wrong, decision, actions = decide(kind, n, seed)
        before_after.append(shares_after(wrong, actions))
        num_changed += any(action != "keep" for action in actions)
    before, after = np.mean(before_after, axis=0)
    assert after <= before
    if kind in ("noise", "length"):
        assert num_changed <= 1
    elif n == 2000:
        assert num_changed >= 9
        assert sum(b < a for b, a in before_after) <= 1


@pytest.mark.parametrize("kind", ["noise", "length", "weak", "good", "bias"])
def test_votes_alone_exchange_no_label(kind, few_resamples):
    """Else half of the exchanged labels would have been right in the world of biased voters."""
    for seed in range(5):
        _, decision, actions = decide(kind, 2000, seed, "exchange")
        assert "exchange" not in actions
        if decision.called.any():
            assert "votes cannot say" in decision.reason


@pytest.mark.parametrize("kind, pi, expected", [("good", 0.1, True), ("bias", 0.05, False)])
def test_repeats_say_whether_labels_may_be_exchanged(kind, pi, expected, few_resamples):
    repeats = trust.wilson(round(1000 * pi), 1000)
    for seed in range(5):
        wrong, decision, actions = decide(kind, 6000, seed, "exchange", pi, repeats=repeats)
        exchanged = torch.tensor([action == "exchange" for action in actions])
        assert bool(exchanged.any()) == expected
        if expected:
            assert wrong[exchanged].double().mean() > 0.5


def test_the_bound_of_found_flips_holds_for_all_cuts_together():
    """The truth is the share of flips found in one far larger test."""
    _, _, copies, _ = simulate("weak", 50_000, 500, num_copies=4)
    before = torch.cat([trust.before_flips(-copy.vote, copy.planted) for copy in copies])
    failures = 0
    for seed in range(40):
        _, vote, copies, _ = simulate("weak", 1000, seed)
        for cut in trust.cuts(vote, copies, 0.3):
            if cut.tpr.low > float((before <= cut.num_called / 1000).double().mean()):
                failures += 1
                break
    assert failures <= 2  # at most a twentieth of them is to be expected


def test_no_more_labels_are_called_than_are_wrong_by_the_estimate(few_resamples):
    wrong, decision, actions = decide("good", 2000, 0)
    vote = decision.vote
    share = trust.share_wrong(trust.label_scores(vote))
    num_called = int(decision.called.sum())
    assert 0 < num_called <= share.value * 2000
    assert vote[decision.called].max() < vote[~decision.called].min()
    assert vote[decision.called].max() < 0
    assert actions.count("drop") == num_called
    assert decision.precision.low <= decision.precision.value <= decision.precision.high <= 1
    assert decision.tpr.low <= decision.tpr.value <= decision.tpr.high


def test_a_bad_tail_is_not_called():
    """Of 100 low votes the first fifty are those of flips, the rest are like all labels."""
    n = 2000
    vote = torch.linspace(-1, 19, n, dtype=torch.float64)
    copies = []
    for flips in trust.draw_planted(make_pairs(n), 0.1, 2, 0):
        rank = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = flips & (torch.arange(n) % 2 == 0)
        copies.append(Copy(flips, torch.where(found, rank * 0.02, rank)))
    best = trust.largest(trust.cuts(vote, copies, 0.5), 1.0)
    assert best.num_called == 50  # of the steps of 50
    assert max(
        cut.num_called for cut in trust.cuts(vote, copies, 0.5) if cut.tpr.low * n > cut.num_called
    ) > 50


def test_equal_votes_are_called_together_or_not_at_all():
    vote = torch.tensor([-3.0] * 10 + [-2.0] * 30 + [1.0] * 60)
    assert [trust.whole_ties(vote.sort().values, n) for n in (0, 5, 10, 15, 40, 99, 100)] == [
        0, 0, 10, 10, 40, 40, 100]


def test_a_higher_bar_calls_fewer_labels(few_resamples):
    counts = []
    for bar in (0.0, 0.5, 0.9):
        _, decision, _ = decide("good", 2000, 0, drop_precision=bar)
        counts.append(int(decision.called.sum()))
    assert counts[0] >= counts[1] > counts[2] == 0


def test_an_unknown_action_is_an_error(few_resamples):
    with pytest.raises(ValueError, match="give one of keep, drop, exchange"):
        decide("good", 400, 0, "flip")


# --------------------------------------------------------------------------------------------------
# Reviews


def reviewed(num_wrong, num_right, action="exchange"):
    """The decision after a review of the first called labels, its actions, the decisions"""
    _, decision, _ = decide("good", 2000, 0, action)
    order = decision.vote.argsort()
    decisions = [""] * 2000
    for i in order[:num_wrong].tolist():
        decisions[i] = "wrong"
    for i in order[num_wrong:num_wrong + num_right].tolist():
        decisions[i] = "right"
    share = trust.share_wrong(trust.label_scores(decision.vote))
    decision = trust.review(decision, decisions, share, action)
    return decision, trust.actions(decision, decisions, action), decisions


def test_a_good_review_exchanges_down_to_the_last_label_read(few_resamples):
    decision, actions, decisions = reviewed(27, 3)
    order = decision.vote.argsort()
    assert decision.reviewed == 30 and decision.precision == trust.wilson(27, 30)
    assert [actions[i] for i in order[:27]] == ["exchange"] * 27
    assert [actions[i] for i in order[27:30]] == ["keep"] * 3
    rest = order[30:int(decision.called.sum())]
    assert len(rest) > 30 and {actions[i] for i in rest} == {"drop"}
    assert int(decision.exchanged.sum()) == 30


def test_between_reviewed_labels_the_others_are_exchanged_too(few_resamples):
    _, decision, _ = decide("good", 2000, 0, "exchange")
    order = decision.vote.argsort()
    decisions = [""] * 2000
    for i in order[:60:2].tolist():
        decisions[i] = "wrong"
    decisions[order[1]] = "unsure"
    decision = trust.review(decision, decisions, Estimate(0.1, 0.1, 0.1), "exchange")
    actions = trust.actions(decision, decisions, "exchange")
    assert {actions[i] for i in order[:59]} == {"exchange"}
    assert actions[order[59]] == "drop"


@pytest.mark.parametrize("num_wrong, num_right, action, expected", [
    (12, 8, "exchange", "drop"), (2, 28, "exchange", "keep"), (2, 28, "drop", "keep"),
    (30, 0, "drop", "drop"), (30, 0, "keep", "keep"), (5, 5, "drop", "drop"),
])
def test_what_a_review_leaves_to_the_others(num_wrong, num_right, action, expected, few_resamples):
    decision, actions, decisions = reviewed(num_wrong, num_right, action)
    others = {
        a for a, decided, called in zip(actions, decisions, decision.called.tolist())
        if called and not decided
    }
    assert others == {expected}
    assert {a for a, d in zip(actions, decisions) if d == "wrong"} == {action}
    assert {a for a, d in zip(actions, decisions) if d == "right"} <= {"keep"}


def test_where_no_label_is_contradicted_the_reason_says_so():
    _, _, copies, length = simulate("good", 400, 0)
    test = trust.self_test(copies, {"length": length}, torch.arange(400), 0)
    vote = torch.ones(400)
    decision = trust.decide(vote, copies, test, trust.share_wrong(trust.label_scores(vote)), "drop")
    assert test.finds_flips and not decision.called.any()
    assert decision.reason.startswith("the surest votes contradict too few labels")


def test_a_person_decides_on_labels_that_are_not_called():
    _, decision, _ = decide("noise", 400, 0)
    assert trust.actions(decision, ["wrong", "right", "unsure"] + [""] * 397, "drop")[:4] == [
        "drop", "keep", "keep", "keep"]


# --------------------------------------------------------------------------------------------------
# Groups


def test_fisher_is_that_of_scipy():
    for doubted, size, all_doubted, total in [(3, 20, 50, 100), (20, 20, 50, 100), (9, 60, 10, 80)]:
        table = [[doubted, size - doubted],
                 [all_doubted - doubted, total - size - all_doubted + doubted]]
        expected = stats.fisher_exact(table, alternative="greater").pvalue
        assert trust.fisher(doubted, size, all_doubted, total) == pytest.approx(expected)


def test_holm_by_hand():
    assert trust.holm([0.04, 0.011, 0.9, 0.016]) == [False, True, False, True]
    assert trust.holm([0.02, 0.02, 0.02]) == [False, False, False]  # 0.05 / 3 is less
    assert trust.holm([]) == []


def test_the_careless_annotator_stands_out():
    generator = torch.Generator().manual_seed(0)
    annotator = ["ABCDE"[i % 5] for i in range(1000)]
    doubt = torch.tensor([0.4 if a == "E" else 0.1 for a in annotator])
    vote = torch.where(torch.rand(1000, generator=generator) < doubt, -1.0, 1.0)
    rare = ["x"] * 10 + ["y"] * 990
    rows = trust.doubt_by_group(vote, {"annotator": annotator, "rare": rare, "one": ["z"] * 1000})
    assert [(row["column"], row["value"], row["pairs"]) for row in rows] == [
        *[("annotator", a, 200) for a in "ABCDE"], ("rare", "y", 990)]
    assert [row["value"] for row in rows if row["stands_out"]] == ["E"]
    assert rows[4]["low"] < rows[4]["doubted"] < rows[4]["high"]


def test_no_group_stands_out_by_chance():
    found = 0
    for seed in range(100):
        vote = normal(seed, 400) + 1
        columns = {name: [f"{i * k % 5}" for i in range(400)] for name, k in (("a", 1), ("b", 7))}
        found += any(row["stands_out"] for row in trust.doubt_by_group(vote, columns))
    assert found <= 9


def test_nineteen_decisions_replace_nothing(few_resamples):
    before, _, _ = reviewed(0, 0)
    after, _, _ = reviewed(9, 10)
    assert after.reviewed == 19
    assert after.precision == before.precision and after.action == before.action == "drop"
    assert not after.exchanged.any() and after.reason == before.reason
