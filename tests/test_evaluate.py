import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import evaluate
import train
from data import END, Row
from evaluate import bootstrap, calibration, compare, group_accuracy, noise_detection, report, reward_scores, standard_error, table
from helpers import SMALL, go, tiny
from model import LanguageModel
from run import load_model, open_run, save_model

LN3 = math.log(3)  # sigmoid(LN3) is 3/4


# ---------------------------------------------------------------------------------------------------------------------
# Intervals

def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        low, high = bootstrap(rng.normal(3.0, 1.0, 60), 200, seed=i)
        hits += low < 3.0 < high
    assert 176 <= hits <= 199  # 190 expected, four standard deviations; a little less, as of every percentile interval


def test_the_bootstrap_is_as_wide_as_the_normal_interval():
    values = np.random.default_rng(1).normal(0.0, 2.0, 400)
    low, high = bootstrap(values, 2000, seed=0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    narrow = bootstrap(values, 2000, seed=0, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_bootstrap_depends_on_its_seed_alone():
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap(values, 100, 3) == bootstrap(values, 100, 3) != bootstrap(values, 100, 4)


def test_equal_values_have_no_interval():
    assert bootstrap([True] * 30, 50, 0) == (1.0, 1.0)


def test_standard_error_by_hand():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3 ** 0.5)
    assert math.isnan(standard_error([1.0]))


# ---------------------------------------------------------------------------------------------------------------------
# Reward models

def test_calibration_by_hand():
    # sure to 3/4 and right in three of four: calibrated; sure to 0.95 and right in one of two: 0.45 too sure
    gaps = [LN3, LN3, LN3, -LN3, math.log(19), -math.log(19)]
    result = calibration(gaps, bins=5)  # bins of confidence 0.1 wide, from 0.5 on
    assert [row[2] for row in result["bins"]] == [4, 2]
    np.testing.assert_allclose(np.array(result["bins"])[:, :2], [[0.75, 0.75], [0.95, 0.5]])
    assert result["ece"] == pytest.approx((4 * 0.0 + 2 * 0.45) / 6)


def test_calibration_of_the_surest_and_the_most_wrong():
    assert calibration([1e6] * 3)["ece"] == pytest.approx(0) and calibration([-1e6] * 3)["ece"] == pytest.approx(1)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=50), st.integers(1, 20))
def test_calibration_counts_every_pair_once(gaps, bins):
    result = calibration(gaps, bins)
    assert sum(row[2] for row in result["bins"]) == len(gaps)
    assert 0 <= result["ece"] <= 1 and all(0.5 <= row[0] <= 1 for row in result["bins"])


def test_labels_drawn_from_the_model_are_calibrated():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0, 2, 20_000)
    gaps = np.where(rng.random(20_000) < 1 / (1 + np.exp(-gaps)), gaps, -gaps)
    assert calibration(gaps)["ece"] < 0.01 < 0.05 < calibration(3 * gaps)["ece"]


def test_reward_scores_by_hand():
    gaps, lengths, gold = [LN3, -LN3, LN3, LN3], [(5, 3), (5, 3), (4, 4), (2, 7)], [1.0, -2.0, -1.0, 0.5]
    r = reward_scores(gaps, lengths, 100, 0, gold)
    assert set(r) == {"pairs", "accuracy", "chance", "longer_wins", "accuracy_interval", "nll", "ece", "bins",
                      "gold_accuracy", "gold_accuracy_interval", "gold_longer_wins"}
    assert (r["pairs"], r["accuracy"], r["chance"]) == (4, 0.75, 0.5)
    assert r["longer_wins"] == (1 + 1 + 0.5 + 0) / 4            # equal lengths say nothing
    assert r["nll"] == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    assert r["ece"] == pytest.approx(0)
    assert r["gold_accuracy"] == (1 + 1 + 0 + 1) / 4            # the second label is wrong, and the model says so
    assert r["gold_longer_wins"] == (1 + 0 + 0.5 + 0) / 4
    assert r["accuracy_interval"] == bootstrap(np.array(gaps) > 0, 100, 0)


def test_reward_scores_without_truth_have_no_gold():
    assert not any("gold" in name for name in reward_scores([1.0, -1.0], [(1, 2), (2, 1)], 10, 0))


def test_a_tie_of_rewards_is_never_right():
    """A model that gives everything the same reward has learned nothing, by the labels or by gold."""
    r = reward_scores([0.0] * 4, [(1, 2)] * 4, 10, 0, gold=[1.0, -1.0, 2.0, -2.0])
    assert r["accuracy"] == 0 and r["gold_accuracy"] == 0
    assert group_accuracy([0.0, 0.0], [0, 0], gold=[1.0, -1.0]) == {"label": [0.0], "gold": [0.0]}


def test_group_accuracy_by_hand():
    result = group_accuracy([1.0, -1.0, 2.0, 3.0, -1.0], [0, 0, 1, 1, 1], [1.0, -1.0, -1.0, 1.0, -1.0])
    assert result == {"label": [0.5, pytest.approx(2 / 3)], "gold": [1.0, pytest.approx(2 / 3)]}
    assert set(group_accuracy([1.0], [0])) == {"label"}


# ---------------------------------------------------------------------------------------------------------------------
# Noise

ERRORS = ["flip"] * 2 + ["bias"] * 2 + [""] * 16


def gaps_of(flip, bias, right, noise=0.0):
    """(3, 20) gaps of three members around a level for each kind of pair"""
    level = torch.tensor([flip] * 2 + [bias] * 2 + [right] * 16)
    return level + noise * torch.randn(3, 20, generator=torch.Generator().manual_seed(0))


def test_errors_of_low_strength_are_found():
    found = noise_detection(gaps_of(-2.0, -1.0, 1.0, 0.1), ERRORS, 0.2)
    assert set(found) == {"all", "flip", "bias"}
    assert [found[name]["count"] for name in ("all", "flip", "bias")] == [4, 2, 2]
    for name in found:
        assert found[name]["auroc_mean"] == found[name]["ap_mean"] == found[name]["auroc_single"] == 1
    assert found["all"]["precision_mean"] == found["all"]["recall_mean"] == 1   # four of twenty are called, and four are wrong
    assert found["flip"]["precision_mean"] == 2 / 4 and found["flip"]["recall_mean"] == 1  # round(0.2 * 18) are called


def test_a_kind_of_error_is_set_against_the_right_labels_alone():
    found = noise_detection(gaps_of(-1.0, -2.0, 1.0), ERRORS, 0.2)
    assert found["flip"]["auroc_mean"] == 1  # although "bias" pairs are lower still


def test_errors_of_high_strength_are_missed():
    found = noise_detection(gaps_of(2.0, 2.0, 1.0), ERRORS, 0.2)["all"]
    assert found["auroc_mean"] == found["recall_mean"] == found["precision_mean"] == 0


def test_errors_that_the_members_dispute_are_found_by_the_std():
    gaps = gaps_of(1.0, 1.0, 1.0)
    gaps[:, :4] += torch.tensor([-3.0, 0.0, 3.0])[:, None]
    found = noise_detection(gaps, ERRORS, 0.2)["all"]
    assert found["auroc_std"] == found["recall_std"] == 1 and found["auroc_mean"] == 0.5


def test_the_vote_beats_the_average_member():
    found = noise_detection(gaps_of(-1.0, -1.0, 1.0, 1.5), ERRORS, 0.2)["all"]
    assert found["auroc_single"] < found["auroc_mean"]


def test_without_errors_only_all_is_reported():
    assert list(noise_detection(torch.randn(3, 20), [""] * 20, 0.2)) == ["all"]


# ---------------------------------------------------------------------------------------------------------------------
# Policies

def judge(prompt, response):
    return float(len(response))


def test_compare_counts_wins_ties_and_losses():
    result = compare(judge, "abcde", ["xxx", "x", "xx", "xxxx", "x"], ["x", "xxx", "x", "x", "x"], tie=2, seed=0)
    assert result == {"win": 1 / 5 + 1 / 5, "tie": 2 / 5, "lose": 1 / 5}  # a gap of just 2 is no tie


@given(st.lists(st.tuples(st.text("x", max_size=6), st.text("x", max_size=6)), min_size=1, max_size=20), st.integers(0, 99))
def test_compare_of_a_fair_judge_depends_on_no_order(answers, seed):
    ours, theirs = zip(*answers)
    result = compare(judge, ours, ours, theirs, 1.5, seed)
    assert result == compare(judge, ours, ours, theirs, 1.5, seed + 1)
    assert sum(result.values()) == pytest.approx(1)
    turned = compare(judge, ours, theirs, ours, 1.5, seed)
    assert (turned["win"], turned["tie"], turned["lose"]) == (result["lose"], result["tie"], result["win"])


@pytest.mark.parametrize("tie", [0.0, 0.25])
def test_equal_answers_are_a_tie(tie):
    assert compare(judge, "ab", ["x", "yy"], ["x", "yy"], tie, 0)["tie"] == 1


def test_a_judge_who_likes_the_first_favours_nobody():
    shown = []
    def partial(prompt, response):
        shown.append(response)
        return 1.0 if len(shown) % 2 else 0.0  # whichever comes first
    n = 2000
    result = compare(partial, range(n), ["ours"] * n, ["theirs"] * n, 0.5, seed=0)
    assert result["win"] == pytest.approx(0.5, abs=0.05) and result["tie"] == 0
    assert shown.count("ours") == shown.count("theirs") == n


def test_a_table_is_aligned_and_leaves_unknown_numbers_empty():
    lines = table(["name", "a", "bb"], [["x", 0.12345, 12], ["longer", None, -1.0]]).splitlines()
    assert lines == ["name        a      bb", "---------------------", "x       0.123      12", "longer         -1.000"]


def test_the_report_shows_what_there_is():
    scores = reward_scores([1.0, -1.0], [(1, 2), (2, 1)], 10, 0)
    results = {"reward": {"flip": {"valid": scores}}, "noise": noise_detection(gaps_of(-2.0, -1.0, 1.0), ERRORS, 0.2), "judge": "gold reward",
               "policy": {"sft": {"judge": 1.5, "kl": 0.0, "length": 9.0},
                          "policy_flip": {"judge": 2.5, "kl": 3.25, "length": 8.0, "win": 0.5, "tie": 0.25, "lose": 0.25}}}
    text = report(results)
    for shown in ("flip on valid", "bias (2)", "policy_flip", "3.250", "judged by gold reward"):
        assert shown in text
    assert "policy" not in report({"reward": results["reward"]})


def test_the_kl_of_a_policy_is_the_sum_over_its_tokens(tmp_path):
    """By hand from the two distributions; an end that nobody chose does not count, nor one that could not be chosen."""
    assert go(tmp_path, "--stage=sft") == 0
    run = open_run(train.parse([*SMALL, f"--out_dir={tmp_path}", "--ppo.max_new=4", "--ppo.min_new=2"])[0])
    save_model(run, "policy_other", tiny(LanguageModel, 3, vocab=400, layers=2, heads=2, kv_heads=1, width=32, hidden=88, context=256))
    end = run.encoding._special_tokens[END]
    rows = [Row(np.array([5, 6, 7]), (np.array(r),)) for r in ([8, 9, end], [8, 9, 10, 11, end])]  # the second is cut by the limit of 4
    assert evaluate.kl_to_sft(run, "sft", rows) == [0.0, 0.0]
    expected = []
    for row in rows:
        answer, total = row.responses[0].tolist()[:4], 0.0
        for t in range(len(answer)):
            read = torch.tensor([[*row.prompt.tolist(), *answer[:t]]])
            p, q = (load_model(run, LanguageModel, n)(read)[0, -1].detach().double() for n in ("policy_other", "sft"))
            if t < 2:
                p, q = (torch.cat((x[:end], x[end + 1:])) for x in (p, q))
            total += float((p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum())
        expected.append(total)
    assert evaluate.kl_to_sft(run, "policy_other", rows) == pytest.approx(expected, rel=1e-4)
