"""Rounds of MetaRM: the columns by hand, each experiment on a small world."""
import json

import numpy as np
import pytest
from helpers import SMALL, one_line

import train
from config import Config, ConfigError
from experiments import metarm

ROUND_WORDS = [word for word in SMALL if "ppo.methods" not in word]
SETTINGS = [
    "--ppo.methods=baseline", "--ppo.critic_warmup_iters=1", "--meta.rounds=2",
    "--meta.prompts=16", "--meta.k=4", "--meta.arms=meta,plain,none",
]


# --------------------------------------------------------------------------------------------------
# Columns

def test_policy_columns_by_hand():
    scores = {"judge": 1.5, "kl": 2.0, "length": 9.0, "win": 0.5, "tie": 0.3, "lose": 0.2}
    alone = {
        "win, ood": 0.5, "tie, ood": 0.3, "lose, ood": 0.2, "gold reward, ood": 1.5, "KL, ood": 2.0,
    }
    assert metarm.policy_columns(scores, "policy_flip", ", ood") == alone
    scores["against policy_flip"] = {"win": 0.75, "tie": 0.0, "lose": 0.25}
    assert metarm.policy_columns(scores, "policy_flip", ", ood") == alone | {
        "win against plain PPO, ood": 0.75,
        "tie against plain PPO, ood": 0.0,
        "lose against plain PPO, ood": 0.25,
        "win - lose against plain PPO, ood": 0.5,
    }
    scores["against policy_baseline"] = scores.pop("against policy_flip")
    assert metarm.policy_columns(scores, "policy_flip", ", ood") == alone


def test_comparisons_of_rounds():
    """Those of reward models only where they are two: "none" has plain PPO's, and the weights of
    ocrm are all 1 in round 1."""
    rows = ["plain PPO"]
    for arm in ("meta", "plain", "none", "ocrm"):
        rows += [f"{arm} 1", f"{arm} 2"]
    compared = {}
    for row, reference, column, _ in metarm.round_comparisons(rows):
        compared.setdefault(column, set()).add((row, reference))
    assert compared.pop("reward model: gold accuracy") == {
        ("meta 1", "plain PPO"), ("meta 1", "plain 1"), ("meta 2", "plain PPO"),
        ("meta 2", "plain 2"), ("plain 1", "plain PPO"), ("plain 2", "plain PPO"),
        ("ocrm 2", "plain PPO"), ("ocrm 2", "plain 2"),
    }
    assert not metarm.share_reward_model("ocrm 1", "plain PPO", ["plain PPO", "ocrm 1"])
    assert list(compared) == list(metarm.POLICY_COLUMNS)
    assert all(len(couples) == 8 + 2 * 2 + 2 * 2 for couples in compared.values())


def test_the_files_of_look_aheads_have_names_of_their_own():
    variants = metarm.look_aheads(Config().meta)
    labels = [v.label for v in variants]
    assert labels[:2] == ["plain steps", "eta 0.01"] and "by Adam, eta 0.001" in labels
    assert len(set(labels)) == len({v.name for v in variants}) == len(variants) == 13
    etas = [v.eta for v in variants if v.label.startswith("eta") and v.optimizer == "adamw"]
    assert etas == [0.01, 0.1, 1, 10, 1]  # four decades, and the second order


# --------------------------------------------------------------------------------------------------
# The protocol of Table 3

def test_a_picked_round_by_hand():
    """One draw takes all prompts: the second round beats SFT by more, and plain PPO by 1/4."""
    sft = np.zeros(100)
    plain = np.full(100, 1.0)
    first = np.full(100, -1.0)
    second = np.where(np.arange(100) < 50, 2.0, np.where(np.arange(100) < 75, 1.1, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metarm, "NUM_DRAWS", 1)
        others = np.stack([first, second])
        doubled = [np.concatenate([x, x], -1) for x in (others, sft, plain)]
        row = metarm.picked_round(*doubled, tie=0.25, seed=0)
    assert row["round picked"] == 2
    assert row["win"] + row["tie"] + row["lose"] == pytest.approx(1)
    assert row["win - lose, where picked"] == pytest.approx(row["win"] - row["lose"])
    both = row["win - lose, where picked"] + row["win - lose, other prompts"]
    assert both == pytest.approx(2 * 0.25)  # of all 200 prompts half win, a quarter loses
    assert row["win - lose, mean of the rounds"] == pytest.approx((0.25 - 1) / 2)


def test_picking_gains_where_no_round_is_better():
    """Four rounds that differ from plain PPO by chance alone"""
    rng = np.random.default_rng(0)
    gains = []
    for seed in range(20):
        plain, sft, *rounds = rng.normal(size=(6, 1000))
        row = metarm.picked_round(np.stack(rounds), sft, plain, 0.0, seed)
        assert row["win - lose, other prompts"] == pytest.approx(0, abs=0.15)
        gains.append(row["by picking"])
    assert min(gains) > 0.0


def test_outcomes_by_hand():
    ours = np.array([1.0, 1.0, 0.9, 0.2])
    theirs = np.array([0.0, 1.0, 0.8, 0.9])
    assert metarm.outcome(ours, theirs, 0.25).tolist() == [1, 0, 0, -1]
    assert metarm.outcome(ours, theirs, 0.0).tolist() == [1, 0, 1, -1]


def test_picking_needs_more_prompts_than_it_draws(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "ensure_stages", lambda *_, **__: pytest.fail("trained"))
    assert small.run(tmp_path, "picking", *SETTINGS, "--evaluate.prompts=16") == 2
    one_line(capsys, "evaluate.prompts = 16: this experiment needs 200 or more")


def test_rounds_from_sft_are_rounds_whose_ppo_starts_there(small, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(metarm, "compare_rounds", lambda config, slot: seen.append(config) or {})
    config, _ = train.parse_args([*ROUND_WORDS, f"--out_dir={tmp_path}"])
    metarm.compare_rounds_from_sft(config)
    assert seen[0].meta.policy_start == "sft" and config.meta.policy_start == "last"


def test_the_best_of_two_rounds_is_picked_on_a_small_world(small, out, capsys, monkeypatch):
    monkeypatch.setattr(metarm, "FEW_PROMPTS", 4)
    monkeypatch.setattr(metarm, "NUM_DRAWS", 20)
    assert small.run(out, "picking", *SETTINGS) == 0
    rows, = json.loads((out / "results/picking.json").read_text())["runs"].values()
    check_picking(rows)


@pytest.mark.parametrize("words", [
    ["--meta.rounds=1"], ["--meta.rounds=2", "--meta.arms=plain,none"],
])
def test_the_spread_needs_two_rounds_of_metarm(words, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "ensure_stages", lambda *_, **__: pytest.fail("trained"))
    settings = [word for word in SMALL if "ppo.methods" not in word]
    config, _ = train.parse_args([*settings, f"--out_dir={tmp_path}", *words])
    with pytest.raises(ConfigError, match="two rounds or more, and meta among meta.arms"):
        metarm.compare_spread(config)


# --------------------------------------------------------------------------------------------------
# Every experiment on a small world

def check_rounds(rows):
    names = ["plain PPO"]
    for arm in ("meta", "plain", "none"):
        names += [f"{arm} 1", f"{arm} 2"]
    assert list(rows) == names
    for name, row in rows.items():
        for where in ("", ", ood"):
            assert row[f"win{where}"] + row[f"tie{where}"] + row[f"lose{where}"] == pytest.approx(1)
            if name == "plain PPO":
                assert row[f"win - lose against plain PPO{where}"] == 0
                continue
            outcomes = ("win", "tie", "lose")
            win, tie, lose = (row[f"{key} against plain PPO{where}"] for key in outcomes)
            assert win + tie + lose == pytest.approx(1)
            assert row[f"win - lose against plain PPO{where}"] == pytest.approx(win - lose)
    old = rows["plain PPO"]["reward model: gold accuracy"]
    assert rows["none 2"]["reward model: gold accuracy"] == old


def check_spread(rows):
    assert list(rows) == ["before", "meta, round 2", "plain, round 2"]
    for row in rows.values():
        assert 3 / 8 <= row["J"] <= 3 / 4  # J of k = 4
        assert sum(row["curve: density"]) / 10 == pytest.approx(1)  # bins of a tenth
    assert len({row["J"] for row in rows.values()}) == 3


def check_one_round(rows):
    assert list(rows) == ["before", "plain", "meta"]
    for column in ("J", "mean difference"):
        assert len({row[column] for row in rows.values()}) == 3
    for row in rows.values():
        assert {"held out", "arithmetic", "ranked right"} <= set(row)


def check_noise(rows):
    assert list(rows) == ["0%", "30%"]
    for row in rows.values():
        for arm in ("meta", "plain", "plain PPO"):
            assert 0 <= row[f"{arm}: gold accuracy"] <= 1


EVERY_LOOK_AHEAD = metarm.look_aheads


def some_look_aheads(cfg):
    """One of each form, order and optimizer, and two sizes"""
    labels = ("plain steps", "eta 0.01", "eta 1", "eta 1, second order", "by Adam, eta 0.001",
              "plain steps, SGD", "eta 1, SGD")
    return [variant for variant in EVERY_LOOK_AHEAD(cfg) if variant.label in labels]


def check_look_ahead(rows):
    assert list(rows) == [v.label for v in some_look_aheads(Config().meta)]
    assert rows["plain steps"]["time, of plain steps"] == 1
    assert len({row["J"] for row in rows.values()}) == len(rows) == 7
    for label, row in rows.items():
        assert ("kept in bf16" in row) == ("plain" not in label)
    assert rows["eta 0.01"]["kept in bf16"] < rows["eta 1"]["kept in bf16"] <= 1


def check_picking(rows):
    assert list(rows) == ["meta", "plain", "none"]
    for row in rows.values():
        gain = row["win - lose, where picked"] - row["win - lose, other prompts"]
        assert row["by picking"] == pytest.approx(gain)
        assert 1 <= row["round picked"] <= 2


CHECKS = {
    "rounds": check_rounds,
    "rounds_ood": check_rounds,
    "spread": check_spread,
    "one_round": check_one_round,
    "noise": check_noise,
    "look_ahead": check_look_ahead,
}


def test_noise_is_measured_at_four_shares_of_flipped_labels():
    assert metarm.FLIP_SHARES == (0.0, 0.1, 0.2, 0.3)


@pytest.mark.parametrize("name", CHECKS)
def test_an_experiment_on_a_small_world(small, out, name, capsys, monkeypatch):
    monkeypatch.setattr(metarm, "FLIP_SHARES", (0.0, 0.3))
    monkeypatch.setattr(metarm, "look_aheads", some_look_aheads)
    small.check_twice(out, name, CHECKS[name], capsys, *SETTINGS)


# --------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("words", [[], ["--meta.method=flip", "--reward.methods=baseline,flip"]])
def test_one_round_runs_on_files_too(small, words, tmp_path):
    pairs = small.debates()
    others = [pair | {"prompt": f"Other {i}"} for i, pair in enumerate(pairs)]
    train_file = small.write_lines(tmp_path / "mine.jsonl", pairs)
    ood_file = small.write_lines(tmp_path / "more.jsonl", others)
    settings = [
        f"--data.train={train_file}", f"--data.ood={ood_file}", "--data.valid_share=0.3",
        "--meta.prompts=8", "--meta.k=3", "--ppo.max_new_tokens=6", "--ppo.methods=",
    ]
    assert small.run(tmp_path / "out", "one_round", *settings, *words) == 0
    rows, = small.read_runs(tmp_path / "out", "one_round")
    for row in rows.values():
        assert {"held out", "more", "J", "below 0.2", "mean difference"} <= set(row)
        assert "ranked right" not in row and "best of k" not in row


@pytest.mark.parametrize(
    "name", ["rounds", "rounds_ood", "picking", "spread", "noise", "look_ahead"]
)
def test_what_needs_the_truth_refuses_a_file_before_it_trains(small, name, tmp_path, capsys):
    path = small.write_lines(tmp_path / "mine.jsonl", small.debates())
    assert small.run(tmp_path / "out", name, f"--data.train={path}", *SETTINGS) == 2
    one_line(capsys, "needs a known truth")
    assert not list(tmp_path.rglob("*.pt"))
