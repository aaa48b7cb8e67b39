"""Judges: what they need by hand and by simulation, their columns by hand, a small world."""
from types import SimpleNamespace

import numpy as np
import pytest

import common
from experiments import judges


@pytest.mark.parametrize("gain, accuracy", [(0.4, 0.8), (0.4, 1.0), (0.2, 0.9)])
def test_the_prompts_that_a_judge_needs_order_two_policies_as_surely(gain, accuracy):
    """Each prompt is a win with probability (1 + gain) / 2 and judged right with `accuracy`."""
    n = int(judges.prompts_needed(gain, accuracy))
    rng = np.random.default_rng(0)
    is_win = rng.random((20000, n)) < (1 + gain) / 2
    is_right = rng.random((20000, n)) < accuracy
    net = np.where(is_win == is_right, 1, -1).sum(1)
    share = (net > 0).mean() + (net == 0).mean() / 2
    assert share == pytest.approx(0.95, abs=0.02)  # at 14 prompts the law is not normal yet


def test_the_accuracy_needed_is_the_inverse():
    accuracy = judges.accuracy_needed(0.4, 100)
    assert judges.prompts_needed(0.4, accuracy) in (100, 101)  # rounded up
    assert judges.prompts_needed(0.4, accuracy + 1e-6) == 100
    assert judges.accuracy_needed(0.1, 100) > 1
    assert "accuracy needed with 100" not in judges.needs(0.1)
    assert judges.needs(0.4)["accuracy needed with 100"] == accuracy


DIFFERENT = np.zeros(4, bool)  # no answer is the same as SFT's


def test_the_columns_of_a_judge_by_hand():
    """Gold: a win, a loss, a win, a tie; the judge: a win, a win, a tie, a loss"""
    gold = {"sft": np.array([0.0, 1.0, 0.0, 2.0]), "ours": np.array([1.0, 0.0, 1.0, 2.0])}
    scores = {"sft": np.array([0.0, 0.0, 5.0, 1.0]), "ours": np.array([3.0, 1.0, 5.0, 0.0])}
    row = judges.judge_columns(scores, gold, "ours", DIFFERENT, seed=0)
    assert (row["win"], row["lose"], row["win - lose"]) == (0.5, 0.25, 0.25)
    assert row["overstated"] == 0.25 - 0.25
    assert row["agrees with gold"] == pytest.approx(1 / 3)
    assert row["orders right on 100"] == pytest.approx(1.0)  # all four prompts in every draw


def test_the_same_answer_is_a_tie_however_its_scores_are_rounded():
    scores = {"sft": np.zeros(4), "ours": np.array([1e-7, 1e-7, 0.0, -1.0])}
    is_same = np.array([True, True, False, False])
    row = judges.judge_columns(scores, scores, "ours", is_same, seed=0)
    assert (row["win"], row["lose"], row["orders right on 100"]) == (0, 0.25, 1)


def test_the_order_by_gold_is_that_of_its_wins_and_losses():
    """Gold prefers the policy in three of four answers, though its mean is lower: by one of −9."""
    gold = {"sft": np.zeros(4), "ours": np.array([1.0, 1.0, 1.0, -9.0])}
    row = judges.judge_columns(gold, gold, "ours", DIFFERENT, seed=0)
    assert row["orders right on 100"] == 1 and row["overstated"] == 0


def test_where_gold_is_always_tied_no_agreement_is_claimed():
    gold = {"sft": np.zeros(4), "ours": np.zeros(4)}
    scores = {"sft": np.zeros(4), "ours": np.ones(4)}
    row = judges.judge_columns(scores, gold, "ours", DIFFERENT, seed=0)
    assert "agrees with gold" not in row and "orders right on 100" not in row
    assert row["overstated"] == 1


def test_an_empty_answer_keeps_its_place(monkeypatch):
    lines = [{"prompt": "a", "sft": {"response": "", "score": 0.0}},
             {"prompt": "b", "sft": {"response": "yes", "score": 1.0}}]
    cfg = SimpleNamespace(model=SimpleNamespace(context=8, train_layers=-1))
    run = SimpleNamespace(cfg=cfg, tokenizer=None, valid=SimpleNamespace(pairs=[]),
                          load_jsonl=lambda path: lines)
    monkeypatch.setattr(judges, "evaluate_policies", lambda *_, **__: None)
    monkeypatch.setattr(common, "encode_row", lambda tokenizer, prompt, responses, _: responses[0])
    rows, gold, is_same = judges.answers_of(run, ["sft"], "x.jsonl")
    assert rows == {"sft": ["", "yes"]}
    assert gold["sft"].tolist() == [0, 1] and is_same["sft"].all()


def check_rows(rows):
    judged = {name: row for name, row in rows.items() if "win" in row}
    assert len(judged) == 2 * 6 and len(rows) == len(judged) + len(judges.GAINS)
    for name, row in judged.items():
        if name.endswith("by gold"):
            assert row["overstated"] == 0 and row["agrees with gold"] == 1
    names = list(judged)
    assert "PPO on flip, by ensemble" in names and "PPO on baseline, by one member" in names
    references = {c.row: c.reference for c in judges.judge_comparisons(rows)}
    assert len(references) == 2 * 5
    assert references["PPO on flip, by ensemble"] == "PPO on flip, by gold"


def test_judges_on_a_small_world(small, out, capsys):
    small.check_twice(out, "judges", check_rows, capsys, "--ppo.methods=baseline,flip",
                      "--reward.methods=baseline,flip")
