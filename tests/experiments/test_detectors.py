"""Signals for doubtful labels against their definitions and cleanlab, and on a small world."""
import math

import numpy as np
import pytest
import torch
from helpers import one_line
from hypothesis import given
from hypothesis import strategies as st

from experiments import detectors
from experiments.detectors import (
    area_under_margin,
    confident_learning,
    dropout_uncertainty,
    small_loss,
    vote_entropy,
)

LN3 = math.log(3)  # sigmoid(LN3) is 3/4


# --------------------------------------------------------------------------------------------------
# Traces of one training

def test_traces_by_hand():
    trace = torch.tensor([[0.0, LN3, -LN3], [LN3, LN3, -LN3]])  # two evaluations, three pairs
    loss = [(math.log(2) + math.log(4 / 3)) / 2, math.log(4 / 3), math.log(4)]
    np.testing.assert_allclose(small_loss(trace), loss, rtol=1e-6)
    np.testing.assert_allclose(area_under_margin(trace), [-LN3 / 2, -LN3, LN3], rtol=1e-6)


def test_what_is_learned_later_is_more_suspect():
    learned = torch.tensor([0, 2, 4, 6, 8])  # when; the last one never
    trace = 2.0 * (torch.arange(8)[:, None] >= learned) - 1.0
    for signal in (small_loss, area_under_margin):
        assert (signal(trace).diff() > 0).all()


def test_the_two_traces_are_bound_by_the_swapped_label():
    """softplus(-d) - softplus(d) = -d: loss of a label less loss of its opposite, -margin."""
    trace = 3 * torch.randn(7, 50)
    torch.testing.assert_close(small_loss(trace) - small_loss(-trace), area_under_margin(trace))


# --------------------------------------------------------------------------------------------------
# Spread of votes and of passes

@pytest.mark.parametrize("against, of", [(0, 4), (1, 4), (2, 4), (4, 4), (3, 10), (0, 1)])
def test_the_entropy_of_votes_by_hand(against, of):
    # how sure a vote is does not count
    diffs = torch.tensor([-0.1] * against + [5.0] * (of - against))[:, None]
    shares = [share for share in (against / of, 1 - against / of) if share]
    entropy = -sum(share * math.log(share) for share in shares)
    assert vote_entropy(diffs).item() == pytest.approx(entropy)


def test_the_entropy_of_votes_does_not_know_the_label():
    diffs = torch.randn(5, 40)
    torch.testing.assert_close(vote_entropy(diffs), vote_entropy(-diffs))
    assert 0 <= vote_entropy(diffs).min() and vote_entropy(diffs).max() <= math.log(2)


def test_dropout_uncertainty_is_the_std_over_passes():
    passes = torch.tensor([[1.0, 2.0, 0.0], [1.0, -2.0, 3.0]])
    assert dropout_uncertainty(passes).tolist() == [0.0, 2.0, 1.5]
    passes = torch.randn(10, 30)
    scaled = dropout_uncertainty(7 - 3 * passes)
    torch.testing.assert_close(scaled, 3 * dropout_uncertainty(passes))


# --------------------------------------------------------------------------------------------------
# Confident learning

def slow(diffs, turned):
    """The docstring, pair by pair."""
    n = len(diffs)
    right = [1 / (1 + math.exp(-d)) for d in diffs]
    p = [(1 - right[i], right[i]) if turned[i] else (right[i], 1 - right[i]) for i in range(n)]
    threshold = []
    for j in (0, 1):
        own = [p[i][j] for i in range(n) if turned[i] == j]
        threshold.append(sum(own) / len(own) if own else math.inf)
    issue = []
    for i in range(n):
        confident = [j for j in (0, 1) if p[i][j] >= threshold[j] - 1e-6]
        best = max(confident, key=lambda j: p[i][j], default=turned[i])
        issue.append(best != turned[i] and p[i][best] > 0.5)
    return issue, [1 - r for r in right]


# whole numbers, so that thresholds and halves are hit
labelled = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30)


@given(labelled)
def test_confident_learning_is_its_docstring(pairs):
    diffs, turned = zip(*pairs)
    issue, suspicion = confident_learning(torch.tensor(diffs), torch.tensor(turned))
    slow_issue, slow_suspicion = slow(diffs, turned)
    assert issue.tolist() == slow_issue
    np.testing.assert_allclose(suspicion, slow_suspicion, atol=1e-12)


@given(labelled)
def test_which_side_is_called_the_first_does_not_matter(pairs):
    diffs, turned = (torch.tensor(x) for x in zip(*pairs))
    both = zip(confident_learning(diffs, turned), confident_learning(diffs, ~turned))
    assert all(torch.equal(a, b) for a, b in both)


def test_an_issue_is_contradicted_as_surely_as_others_are_affirmed():
    diffs = torch.tensor([4.0, 4.0, 3.0, 3.0, -0.5, -3.0])
    turned = torch.tensor([False, True, False, True, False, True])
    issue, _ = confident_learning(diffs, turned)
    assert issue.tolist() == [False] * 5 + [True]  # -0.5 is below zero, but says little
    assert not confident_learning(diffs.abs(), turned)[0].any()


def test_a_model_that_knows_nothing_finds_no_issue():
    assert not confident_learning(torch.zeros(8), torch.tensor([True, False] * 4))[0].any()


# also of models that are often wrong
LEVELS = [(3, 3), (1, 1), (0, 0), (-1, -1), (2, -1), (0, 3)]


@pytest.mark.parametrize("level, of_turned", LEVELS)
def test_confident_learning_is_cleanlabs(level, of_turned):
    filter = pytest.importorskip("cleanlab.filter")
    rank = pytest.importorskip("cleanlab.rank")
    rng = np.random.default_rng(0)
    turned = rng.random(400) < 0.4
    diffs = rng.normal(np.where(turned, of_turned, level), 2.0)
    right = 1 / (1 + np.exp(-diffs))
    first = np.where(turned, 1 - right, right)
    classes = np.stack((first, 1 - first), 1)
    issue, suspicion = confident_learning(diffs, turned)
    given_labels = turned.astype(int)
    theirs = filter.find_label_issues(
        given_labels, classes, filter_by="confident_learning", n_jobs=1
    )
    assert theirs.any() and issue.tolist() == theirs.tolist()
    quality = rank.get_label_quality_scores(given_labels, classes, method="self_confidence")
    np.testing.assert_allclose(1 - suspicion, quality, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Evidence, and the signals made of it

def make_evidence(num_members=4, n=6, num_folds=2):
    generator = torch.Generator().manual_seed(0)

    def draw(rows):
        return torch.randn(rows, n, generator=generator)

    return detectors.Evidence(
        votes=draw(num_members),
        folded=draw(num_members),
        held_out=draw(num_members // num_folds),
        num_folds=num_folds,
        trace=draw(4),
        long_trace=draw(6),
        long_cost=3.0,
        passes=draw(10),
        turned=torch.arange(n) % 2 == 0,
        lengths=torch.arange(float(n)) - 3,
    )


def test_every_signal_has_the_name_and_the_cost_of_the_committed_results():
    evidence = make_evidence()
    signals = [detectors.mean_vote(evidence, 0.34)]
    signals += [signal_of(evidence) for signal_of in detectors.SIGNALS]
    assert {signal.name: signal.cost for signal in signals} == {
        "mean of 4 members": 4,
        "mean of 2": 2,
        "one member": 1,
        "std of 4 members": 4,
        "entropy of 4 votes": 4,
        "mean of 2 that have not seen the pair, 2 folds": 2,
        "mean of all 4, each blind to one of 2 folds": 2,
        "confident learning, 2 folds": 1,
        "mean loss over training": 1,
        "area under the margin": 1,
        "mean loss over long training": 3,
        "area under the margin, long training": 3,
        "dropout: std of 10 passes": 1,
        "dropout: mean of 10 passes": 1,
        "longer answer wins": 0,
        "chance": 0,
    }
    for signal in signals:
        assert signal.suspicion.shape == signal.doubt.shape == (6,)


def test_a_signed_signal_suspects_the_negative_and_doubts_the_small():
    signal = detectors.longer_wins(make_evidence())
    assert signal.suspicion.tolist() == [3, 2, 1, 0, -1, -2]
    assert signal.doubt.tolist() == [-3, -2, -1, 0, -1, -2]


def test_the_vote_calls_the_q_lowest_wrong():
    evidence = make_evidence()
    signal = detectors.mean_vote(evidence, q=0.34)  # round(0.34 * 6) = 2
    lowest = evidence.votes.mean(0).argsort()[:2]
    assert signal.issue.sum() == 2 and signal.issue[lowest].all()


def test_kinds_of_errors_are_compared_with_right_labels_alone():
    errors = np.array(["flip", "", "bias", "", "flip", ""])
    counted, positive = detectors.of_kind(errors, "flip")
    assert counted.tolist() == [True, True, False, True, True, True]
    assert positive.tolist() == [True, False, False, False, True, False]
    suspicion = torch.tensor([3.0, 2.0, 9.0, 1.0, 4.0, 0.0])
    issue = torch.tensor([True, True, True, False, False, False])
    signal = detectors.Signal("a", 2, suspicion, suspicion, issue)
    row = detectors.detection_scores(signal, errors, torch.tensor([0, 0, 1, 0, 0, 0]).bool())
    assert row["runs"] == 2.0 and row["flips: AUROC"] == row["flips: AP"] == 1.0
    assert row["bias: AUROC"] == row["ambiguous: AUROC"] == 1.0
    assert row["called"] == 0.5 and row["precision"] == pytest.approx(2 / 3)
    nothing = signal._replace(issue=torch.zeros(6, dtype=torch.bool))
    row = detectors.detection_scores(nothing, errors, torch.tensor([0, 0, 1, 0, 0, 0]).bool())
    assert row["called"] == row["precision"] == 0.0


# --------------------------------------------------------------------------------------------------
# On a small world

def check_detectors(rows):
    assert rows["chance"]["flips: AUROC"] == rows["chance"]["ambiguous: AUROC"] == 0.5
    of_members = [row["runs"] for name, row in rows.items() if "members" in name]
    assert of_members == [2.0] * 2
    assert rows["longer answer wins"]["runs"] == 0
    assert rows["confident learning, 2 folds"]["runs"] == 1
    for row in rows.values():
        assert all(0 <= value <= 1 for name, value in row.items() if name != "runs")
    assert rows["mean of 2 members"]["called"] == 0.1


def check_shared_bias(rows):
    assert list(rows) == ["liking 0.0", "liking 1.5"]
    assert "shared: share" not in rows["liking 0.0"]
    assert rows["liking 1.5"]["shared: share"] > 0
    for row in rows.values():
        shares = row["flip: share"] + row.get("shared: share", 0)
        assert shares <= row["wrong labels"]


CHECKS = {"detectors": check_detectors, "shared_bias": check_shared_bias}
WORDS = {"detectors": ["--world.bias=0.1"], "shared_bias": ["--seeds=3,4"]}


@pytest.mark.parametrize("name", CHECKS)
def test_an_experiment_on_a_small_world(small, out, name, capsys):
    words = ["--ppo.methods=", *WORDS[name]]
    assert small.run(out, name, *words) == 0
    first, *others = small.read_runs(out, name)
    CHECKS[name](first)
    assert len(others) == (name == "shared_bias")
    assert f"{name}, seeds 3" in capsys.readouterr().out
    before = (out / "results" / f"{name}.json").read_bytes()
    small.forbid_training()
    assert small.run(out, name, *words) == 0
    assert (out / "results" / f"{name}.json").read_bytes() == before


@pytest.mark.parametrize("name", CHECKS)
def test_a_file_is_refused_before_anything_is_trained(small, name, tmp_path, capsys):
    path = small.write_lines(tmp_path / "mine.jsonl", small.debates())
    assert small.run(tmp_path / "out", name, f"--data.train={path}") == 2
    one_line(capsys, "needs a known truth")
    assert not list(tmp_path.rglob("*.pt"))
