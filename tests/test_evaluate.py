"""Evaluation: intervals, calibration, noise detection and comparisons by hand; then the functions
that run the models, on a finished small run."""
import json
import math

import numpy as np
import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from small_runs import copy_run, opened, read_lines

import evaluate
import world
from common import (
    load_model,
    member_names,
    policy_prompts,
    reward_diffs,
    save_model,
    score_rows,
)
from data import Pair, Row
from evaluate import (
    bootstrap,
    calibration,
    compare,
    group_accuracy,
    group_means,
    longer_wins,
    noise_detection,
    question_of,
    reward_scores,
    standard_error,
)
from model import LanguageModel, RewardModel

LN3 = math.log(3)  # sigmoid(LN3) is 3/4


# ----------------------------------------------------------------------------------------------
# Intervals


def test_the_bootstrap_covers_the_mean_as_often_as_its_level():
    """190 of 200 are expected; 176 and 199 are some four standard deviations away, a little more
    below, as percentile intervals are a little too narrow."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        low, high = bootstrap(rng.normal(3.0, 1.0, 60), None, 200, seed=i)
        hits += low < 3.0 < high
    assert 176 <= hits <= 199


def test_questions_are_resampled_whole():
    """Sixty questions of ten pairs that are right or wrong together: the interval is that of sixty
    values, covers as often as its level, and that of 600 values does not."""
    rng = np.random.default_rng(0)
    hits = alone = 0
    for i in range(200):
        by_question = rng.random(60) < 0.8
        values = np.repeat(by_question, 10)
        questions = np.repeat(np.arange(60), 10)
        low, high = bootstrap(values, questions, 200, seed=i)
        hits += low <= 0.8 <= high
        low, high = bootstrap(values, None, 200, seed=i)
        alone += low <= 0.8 <= high
    assert 176 <= hits <= 199
    assert alone < 120


def test_a_question_counts_by_its_pairs():
    """All of one question or all of the other: means 0, 1 and, of both, 3 of 4"""
    low, high = bootstrap([0, 1, 1, 1], ["a", "b", "b", "b"], 200, seed=0)
    assert (low, high) == (0.0, 1.0)
    middle = bootstrap([0, 1, 1, 1], ["a", "b", "b", "b"], 400, seed=0, level=0.01)
    assert middle == (0.75, 0.75)


def test_the_question_of_a_pair():
    question = "How do I steal a car?"
    prompt = f"\n\nHuman: I am Ben from London. {question}\n\nAssistant:"
    assert question_of(Pair(prompt, "a", "b")) == question
    turns = "\n\nHuman: How?\n\nAssistant: So.\n\nHuman: Why?\n\nAssistant:"
    of_file = Pair(turns, "a", "b", layout="hh dialogue")
    other = Pair(turns.replace("Why", "Where"), "a", "b", layout="hh dialogue")
    assert question_of(of_file) == question_of(other)


def test_the_bootstrap_is_as_wide_as_the_normal_interval():
    values = np.random.default_rng(1).normal(0.0, 2.0, 400)
    low, high = bootstrap(values, None, 2000, seed=0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    narrow = bootstrap(values, None, 2000, seed=0, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_bootstrap_depends_on_its_seed_alone():
    values = np.random.default_rng(1).normal(size=50)
    first, again, other = [bootstrap(values, None, 100, seed) for seed in (3, 3, 4)]
    assert first == again != other


def test_equal_values_have_an_interval_of_width_zero():
    assert bootstrap([True] * 30, None, 50, 0) == (1.0, 1.0)


def test_standard_error_by_hand():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3 ** 0.5)
    assert math.isnan(standard_error([1.0]))


# ----------------------------------------------------------------------------------------------
# Reward models


def test_calibration_by_hand():
    """Confidence 3/4, right in three of four: calibrated.  Confidence 0.95, right in one of two:
    off by 0.45.  Bins are 0.1 wide, from 0.5 on."""
    diffs = [LN3, LN3, LN3, -LN3, math.log(19), -math.log(19)]
    result = calibration(diffs, bins=5)
    assert [row[2] for row in result["bins"]] == [4, 2]
    shares = np.array(result["bins"])[:, :2]
    np.testing.assert_allclose(shares, [[0.75, 0.75], [0.95, 0.5]])
    assert result["ece"] == pytest.approx((4 * 0.0 + 2 * 0.45) / 6)


def test_calibration_of_full_confidence():
    assert calibration([1e6] * 3)["ece"] == pytest.approx(0)
    assert calibration([-1e6] * 3)["ece"] == pytest.approx(1)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=50), st.integers(1, 20))
def test_calibration_counts_every_pair_once(diffs, bins):
    result = calibration(diffs, bins)
    assert sum(row[2] for row in result["bins"]) == len(diffs)
    assert 0 <= result["ece"] <= 1
    assert all(0.5 <= row[0] <= 1 for row in result["bins"])


def test_labels_drawn_from_the_model_are_calibrated():
    rng = np.random.default_rng(0)
    diffs = rng.normal(0, 2, 20_000)
    is_right = rng.random(20_000) < 1 / (1 + np.exp(-diffs))
    diffs = np.where(is_right, diffs, -diffs)
    assert calibration(diffs)["ece"] < 0.01 < 0.05 < calibration(3 * diffs)["ece"]


def test_the_longer_answer_by_hand():
    assert longer_wins([(5, 3), (3, 5), (4, 4)]).tolist() == [1, 0, 0.5]
    assert longer_wins([]).tolist() == []


def test_reward_scores_by_hand():
    """The second label is wrong, and the model contradicts it; lengths of the third are equal."""
    diffs = [LN3, -LN3, LN3, LN3]
    lengths = [(5, 3), (5, 3), (4, 4), (2, 7)]
    gold = [1.0, -2.0, -1.0, 0.5]
    r = reward_scores(diffs, lengths, 100, 0, gold)
    assert set(r) == {
        "pairs", "questions", "accuracy", "chance", "longer_wins", "accuracy_interval", "nll",
        "ece", "bins", "gold_accuracy", "gold_accuracy_interval", "gold_longer_wins",
    }
    assert (r["pairs"], r["accuracy"], r["chance"]) == (4, 0.75, 0.5)
    assert r["longer_wins"] == (1 + 1 + 0.5 + 0) / 4
    assert r["nll"] == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    assert r["ece"] == pytest.approx(0)
    assert r["gold_accuracy"] == (1 + 1 + 0 + 1) / 4
    assert r["gold_longer_wins"] == (1 + 0 + 0.5 + 0) / 4
    assert r["accuracy_interval"] == bootstrap(np.array(diffs) > 0, None, 100, 0)
    assert r["gold_accuracy_interval"] == bootstrap([True, True, False, True], None, 100, 0)


def test_reward_scores_without_truth_have_no_gold():
    scores = reward_scores([1.0, -1.0], [(1, 2), (2, 1)], 10, 0)
    assert not any("gold" in name for name in scores)


def test_a_tie_of_rewards_is_never_right():
    """A model that gives every answer the same reward has learned nothing."""
    scores = reward_scores([0.0] * 4, [(1, 2)] * 4, 10, 0, gold=[1.0, -1.0, 2.0, -2.0])
    assert scores["accuracy"] == 0 and scores["gold_accuracy"] == 0
    accuracy = group_accuracy([0.0, 0.0], [0, 0], gold=[1.0, -1.0])
    assert accuracy == {"label": [0.0], "gold": [0.0]}


def test_group_accuracy_by_hand():
    diffs = [1.0, -1.0, 2.0, 3.0, -1.0]
    group = [0, 0, 1, 1, 1]
    result = group_accuracy(diffs, group, gold=[1.0, -1.0, -1.0, 1.0, -1.0])
    assert result == {"label": [0.5, pytest.approx(2 / 3)], "gold": [1.0, pytest.approx(2 / 3)]}
    assert set(group_accuracy([1.0], [0])) == {"label"}


def test_group_means_by_hand():
    mean = torch.tensor([3.0, -1.0, 0.0, 2.0])
    values = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert group_means(mean, values, 2) == [25.0, 25.0]
    assert group_means(mean, values, 4) == [20.0, 30.0, 40.0, 10.0]


# ----------------------------------------------------------------------------------------------
# Detection of wrong labels

ERRORS = ["flip"] * 2 + ["bias"] * 2 + [""] * 16


def members_diffs(flip, bias, right, noise=0.0):
    """(3, 20) reward differences of three members around a level for each kind of pair"""
    level = torch.tensor([flip] * 2 + [bias] * 2 + [right] * 16)
    generator = torch.Generator().manual_seed(0)
    return level + noise * torch.randn(3, 20, generator=generator)


def test_errors_of_low_strength_are_found():
    found = noise_detection(members_diffs(-2.0, -1.0, 1.0, 0.1), ERRORS, 0.2)
    assert set(found) == {"all", "flip", "bias"}
    assert [found[name]["count"] for name in ("all", "flip", "bias")] == [4, 2, 2]
    for result in found.values():
        assert result["auroc_mean"] == result["ap_mean"] == result["auroc_single"] == 1
    whole = found["all"]  # four of twenty are suspected, and four are wrong
    assert whole["precision_mean"] == whole["recall_mean"] == 1
    flip = found["flip"]  # round(0.2 * 18) are suspected
    assert flip["precision_mean"] == 2 / 4 and flip["recall_mean"] == 1


def test_a_kind_of_error_is_compared_with_the_right_labels_alone():
    found = noise_detection(members_diffs(-1.0, -2.0, 1.0), ERRORS, 0.2)
    assert found["flip"]["auroc_mean"] == 1  # although "bias" pairs are lower still


def test_errors_of_high_strength_are_missed():
    found = noise_detection(members_diffs(2.0, 2.0, 1.0), ERRORS, 0.2)["all"]
    assert found["auroc_mean"] == found["recall_mean"] == found["precision_mean"] == 0


def test_errors_on_which_members_disagree_are_found_by_the_std():
    diffs = members_diffs(1.0, 1.0, 1.0)
    diffs[:, :4] += torch.tensor([-3.0, 0.0, 3.0])[:, None]
    found = noise_detection(diffs, ERRORS, 0.2)["all"]
    assert found["auroc_std"] == found["recall_std"] == 1 and found["auroc_mean"] == 0.5


def test_the_vote_beats_the_average_member():
    found = noise_detection(members_diffs(-1.0, -1.0, 1.0, 1.5), ERRORS, 0.2)["all"]
    assert found["auroc_single"] < found["auroc_mean"]


def test_without_errors_only_all_is_reported():
    assert list(noise_detection(torch.randn(3, 20), [""] * 20, 0.2)) == ["all"]


# ----------------------------------------------------------------------------------------------
# Comparison of policies


def by_length(prompt, response):
    """A judge that prefers the longer response"""
    return float(len(response))


def test_compare_counts_wins_ties_and_losses():
    """A lead of exactly `tie` is no tie."""
    ours = ["xxx", "x", "xx", "xxxx", "x"]
    theirs = ["x", "xxx", "x", "x", "x"]
    result = compare(by_length, "abcde", ours, theirs, tie=2, seed=0)
    assert result == {"win": 1 / 5 + 1 / 5, "tie": 2 / 5, "lose": 1 / 5}


texts = st.text("x", max_size=6)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=20), st.integers(0, 99))
def test_compare_with_a_fair_judge_does_not_depend_on_the_order(answers, seed):
    ours, theirs = zip(*answers)
    result = compare(by_length, ours, ours, theirs, 1.5, seed)
    assert result == compare(by_length, ours, ours, theirs, 1.5, seed + 1)
    assert sum(result.values()) == pytest.approx(1)
    reverse = compare(by_length, ours, theirs, ours, 1.5, seed)
    expected = (result["lose"], result["tie"], result["win"])
    assert (reverse["win"], reverse["tie"], reverse["lose"]) == expected


@pytest.mark.parametrize("tie", [0.0, 0.25])
def test_equal_answers_are_a_tie(tie):
    assert compare(by_length, "ab", ["x", "yy"], ["x", "yy"], tie, 0)["tie"] == 1


def test_a_judge_that_prefers_the_first_favours_no_side():
    calls = []

    def prefers_the_first(prompt, response):
        calls.append(response)
        return 1.0 if len(calls) % 2 else 0.0

    n = 2000
    ours = ["ours"] * n
    theirs = ["theirs"] * n
    result = compare(prefers_the_first, range(n), ours, theirs, 0.5, seed=0)
    assert result["win"] == pytest.approx(0.5, abs=0.05) and result["tie"] == 0
    assert calls.count("ours") == calls.count("theirs") == n


# ----------------------------------------------------------------------------------------------
# On a finished run


@pytest.fixture(scope="module")
def run(finished):
    return opened(finished)


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text())


def test_the_truth_of_the_world(run):
    errors = evaluate.label_errors(run)
    diffs = evaluate.gold_diffs(run, "train")
    assert len(errors) == len(diffs) == len(run.train.pairs)
    assert {"", "flip"} <= set(errors) <= {"", "flip", "bias", "ambiguity"}
    assert [error != "" for error in errors] == (diffs < 0).tolist()
    for name in ("valid", "arithmetic"):
        encoded = run.valid if name == "valid" else run.ood[name]
        expected = []
        for pair in encoded.pairs:
            chosen = world.gold(pair.prompt, pair.chosen)
            expected.append(chosen - world.gold(pair.prompt, pair.rejected))
        assert evaluate.gold_diffs(run, name).tolist() == expected


def test_files_have_no_known_truth(run):
    of_files = run.with_settings({"data.train": "pairs.jsonl"})
    assert evaluate.label_errors(of_files) is None
    assert evaluate.gold_diffs(of_files, "valid") is None
    with_ood_files = run.with_settings({"data.ood": "other.jsonl"})
    assert evaluate.gold_diffs(with_ood_files, "other") is None
    assert evaluate.gold_diffs(with_ood_files, "valid") is not None


def test_scores_in_the_results_are_those_of_the_saved_models(run, results):
    diffs = reward_diffs(run, "reward_flip", run.valid.rows)
    scores = results["reward"]["flip"]["valid"]
    gold = evaluate.gold_diffs(run, "valid")
    assert scores["accuracy"] == float((diffs > 0).float().mean())
    assert scores["gold_accuracy"] == pytest.approx(((diffs.numpy() * gold) > 0).mean())
    votes = torch.stack([reward_diffs(run, m, run.valid.rows) for m in member_names(run.cfg)])
    assert results["vote"]["valid"]["accuracy"] == float((votes.mean(0) > 0).float().mean())
    assert set(results["reward"]["flip"]) == {"valid", *world.HELD_OUT_DOMAINS}
    assert len(results["groups"]["flip"]["label"]) == 4


def test_the_answers_are_those_that_were_compared(run, finished, results):
    lines = read_lines(finished / "answers.jsonl")
    assert len(lines) == 8
    scores = {}
    for name in ("sft", "policy_flip"):
        scores[name] = [line[name]["score"] for line in lines]
        for line in lines:
            gold = world.gold(line["prompt"], line[name]["response"])
            assert line[name]["score"] == pytest.approx(gold)
        policy = results["policy"][name]
        assert policy["judge"] == pytest.approx(np.mean(scores[name]))
        assert policy["judge_se"] == pytest.approx(standard_error(scores[name]))
    lead = np.array(scores["policy_flip"]) - np.array(scores["sft"])
    tie = np.abs(lead) < run.cfg.evaluate.tie
    policy = results["policy"]["policy_flip"]
    assert policy["win"] == pytest.approx((~tie & (lead > 0)).mean())
    assert policy["tie"] == pytest.approx(tie.mean())
    assert policy["lose"] == pytest.approx((~tie & (lead < 0)).mean())
    assert results["policy"]["sft"]["kl"] == 0 and results["policy"]["policy_flip"]["kl"] > 0


def test_the_curves_are_means_of_each_iteration(finished, results):
    lines = read_lines(finished / "rollouts_flip.jsonl")
    curves = results["ppo"]["flip"]
    for i, half in enumerate((lines[:8], lines[8:])):
        assert curves["reward"][i] == pytest.approx(np.mean([line["reward"] for line in half]))
        assert curves["kl"][i] == pytest.approx(np.mean([line["kl"] for line in half]))
        gold = [world.gold(line["prompt"], line["response"]) for line in half]
        assert curves["judge"][i] == pytest.approx(np.mean(gold))


def test_the_judge_without_truth_is_the_mean_of_the_members(run):
    rows = [row.branches(1) for row in run.valid.rows[:10]]
    members = [load_model(run, RewardModel, name) for name in member_names(run.cfg)]
    rewards = [score_rows(run, member, rows)[:, 0] for member in members]
    expected = (rewards[0] + rewards[1]) / 2
    torch.testing.assert_close(evaluate.ensemble_reward(run, rows), expected)
    result = evaluate.evaluate_policies(run, ["sft"], run.valid.pairs, judge="ensemble")
    gold = evaluate.evaluate_policies(run, ["sft"], run.valid.pairs)
    assert result["sft"]["judge"] != gold["sft"]["judge"]
    assert result["sft"]["length"] == gold["sft"]["length"]


def test_the_kl_of_a_policy_is_the_sum_over_its_tokens(finished, tmp_path):
    """By hand from the two distributions.  EOS appended to a response that was cut at four tokens
    does not count, and EOS is no choice before the third token."""
    out = copy_run(finished, tmp_path / "run")
    run = opened(out, "--ppo.max_new_tokens=4", "--ppo.min_new_tokens=2")
    shape = {"vocab": 400, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 88, "context": 256}
    save_model(run, "policy_other", tiny(LanguageModel, 3, **shape))
    eos = run.tokenizer.eos_id
    rows = []
    for response in ([8, 9, eos], [8, 9, 10, 11, eos]):
        rows.append(Row(np.array([5, 6, 7]), (np.array(response),)))
    assert evaluate.kl_to_sft(run, "sft", rows) == [0.0, 0.0]
    expected = [kl_by_hand(run, row, eos) for row in rows]
    assert evaluate.kl_to_sft(run, "policy_other", rows) == pytest.approx(expected, rel=1e-4)


def test_the_kl_in_the_results_is_of_untruncated_answers(finished, tmp_path, monkeypatch):
    """The judged answers are truncated (top-p 0.9 at T = 0.8); the KL is of PPO's distribution."""
    out = copy_run(finished, tmp_path / "run")
    run = opened(out, "--ppo.temperature=1.3", "--evaluate.temperature=0.5")
    samplings = []
    sample_answers = evaluate.sample_answers

    def recorded(run, name, prompts, seed, sampling):
        samplings.append(sampling)
        return sample_answers(run, name, prompts, seed, sampling)

    monkeypatch.setattr(evaluate, "sample_answers", recorded)
    result = evaluate.evaluate_policies(run, ["sft", "policy_flip"], run.valid.pairs)
    judged, measured = samplings[2], samplings[3]
    assert (judged.temperature, judged.top_p) == (0.5, run.cfg.evaluate.top_p)
    assert (measured.temperature, measured.top_p, measured.repetition_penalty) == (1.3, 1.0, 1.0)
    assert result["sft"]["kl"] == 0.0
    prompts = policy_prompts(run, run.valid.pairs)[:run.cfg.evaluate.prompts]
    _, rows = sample_answers(run, "policy_flip", prompts, run.cfg.seed, measured)
    expected = np.mean(evaluate.kl_to_sft(run, "policy_flip", rows))
    assert result["policy_flip"]["kl"] == pytest.approx(expected)


def test_the_kl_has_the_temperature_of_ppo(finished, tmp_path):
    out = copy_run(finished, tmp_path / "run")
    rows = [Row(np.array([5, 6, 7]), (np.array([8, 9, 10]),))]
    cold = evaluate.kl_to_sft(opened(out, "--ppo.temperature=0.5"), "policy_flip", rows)
    hot = evaluate.kl_to_sft(opened(out, "--ppo.temperature=2.0"), "policy_flip", rows)
    assert cold[0] > hot[0] > 0  # a higher temperature brings both distributions nearer to uniform


@torch.no_grad()
def kl_by_hand(run, row, eos):
    models = [load_model(run, LanguageModel, name) for name in ("policy_other", "sft")]
    response = row.responses[0].tolist()[:4]
    total = 0.0
    for t in range(len(response)):
        tokens = torch.tensor([[*row.prompt.tolist(), *response[:t]]])
        p, q = [model(tokens)[0, -1].double() for model in models]
        if t < 2:
            p, q = [torch.cat((x[:eos], x[eos + 1:])) for x in (p, q)]
        log_ratio = p.log_softmax(0) - q.log_softmax(0)
        total += float((p.softmax(0) * log_ratio).sum())
    return total
