"""A number that is not finite ends the work at its step; the last good state stays on disk."""
import functools

import pytest
import torch
from helpers import go, one_line, tiny_reward
from small_runs import forget, opened

import ppo
import train
from common import score_rows
from config import ConfigError
from runtime import files
from runtime.run import Run

EVERY_STEP = "--train.checkpoint_minutes=0"  # a checkpoint


def spoil(monkeypatch, module, name, at_call, change):
    """From call number at_call on, what module.name returns is changed."""
    function = getattr(module, name)
    calls = []

    @functools.wraps(function)
    def spoiled(*arguments, **options):
        calls.append(1)
        result = function(*arguments, **options)
        return change(result) if len(calls) >= at_call else result

    monkeypatch.setattr(module, name, spoiled)


def times_nan(result):
    loss, sums = result
    return loss * torch.nan, sums


ROUND = ["--meta.rounds=1", "--meta.prompts=8", "--meta.batch=4", "--meta.epochs=3"]


@pytest.mark.parametrize("name, stage, loss, words", [
    ("sft", "sft", "sft_loss", ["--sft.batch=8"]),
    ("member_00", "ensemble", "pair_loss", ["--ensemble.epochs=2"]),
    ("reward_flip", "reward", "pair_loss", ["--reward.epochs=2", "--reward.methods=flip"]),
    ("meta_1", "meta", "pair_loss", ROUND),
])
def test_a_loss_that_is_not_finite_stops_at_its_step(
        copied, monkeypatch, capsys, name, stage, loss, words):
    if name != "meta_1":
        forget(copied, name)
        (copied / f"{name}.pt").unlink()
    spoil(monkeypatch, train, loss, 3, times_nan)
    assert go(copied, f"--stage={stage}", EVERY_STEP, *words) == 2
    one_line(capsys, f"{name}: the loss is nan at step 3; lower {stage}.lr")
    state = files.load_state(copied / f"{name}.ckpt")
    assert state["step"] == 2
    assert all(weight.isfinite().all() for weight in state["model"].values())
    assert not (copied / f"{name}.pt").exists()


def spoil_gae(result):
    advantages, returns = result
    return advantages + torch.inf, returns


@pytest.mark.parametrize("module, function, change, what", [
    (ppo, "gae", spoil_gae, "an advantage is inf"),
    (ppo, "normalize_scores", lambda scores: scores * torch.nan, "an advantage is nan"),
    (ppo, "policy_loss", lambda loss: loss * torch.nan, "the loss of the policy is nan"),
    (ppo, "value_loss", lambda loss: loss * torch.inf, "the loss of the critic is nan"),
])
def test_ppo_stops_at_the_iteration_of_what_is_not_finite(
        copied, monkeypatch, capsys, module, function, change, what):
    forget(copied, "policy_flip")
    (copied / "policy_flip.pt").unlink()
    per_iteration = 8 if function.endswith("_loss") else 1  # 2 epochs of 4 minibatches
    spoil(monkeypatch, module, function, 1 + per_iteration, change)
    assert go(copied, "--stage=ppo", EVERY_STEP) == 2
    one_line(capsys, f"policy_flip: {what} at step 2; lower ppo.lr and ppo.critic_lr")
    state = files.load_state(copied / "policy_flip.ckpt")
    assert state["step"] == 1
    assert all(weight.isfinite().all() for weight in state["policy"].values())
    assert not (copied / "policy_flip.pt").exists()


def test_weights_that_overflow_in_an_update_of_ppo_are_named(copied, monkeypatch, capsys):
    forget(copied, "policy_flip")
    monkeypatch.setattr(ppo, "lr_factor", lambda iteration, cfg: 1e38)
    assert go(copied, "--stage=ppo") == 2
    err = capsys.readouterr().err
    assert "policy_flip: " in err and " at step 1; lower ppo.lr" in err and err.count("\n") == 1


def test_a_reward_that_is_not_finite_is_refused_wherever_it_is_computed(finished):
    run = opened(finished)
    model = tiny_reward(vocab=run.tokenizer.vocab_size, context=256)
    with torch.no_grad():
        model.score.weight[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="judge: a reward is not finite; train the reward model"):
        score_rows(run, model, run.valid.rows, "judge")


def test_a_member_that_is_not_finite_has_no_vote(copied, capsys, monkeypatch):
    """It cannot be trained so; here its file is written by hand."""
    state = files.load_tensors(copied / "member_01.pt")
    state["model"]["score.weight"][0, 0] = torch.nan
    files.save_tensors(copied / "member_01.pt", state)
    monkeypatch.setattr(Run, "damage", lambda run, record, outputs: "")
    monkeypatch.setattr(Run, "check_unchanged", lambda run, name: None)
    before = (copied / "strength.jsonl").read_bytes()
    forget(copied, "strength")
    assert go(copied, "--stage=strength") == 2
    one_line(capsys, "member_01.pt: score.weight holds numbers that are not finite; delete the")
    assert (copied / "strength.jsonl").read_bytes() == before


def test_a_treatment_that_drops_every_pair_is_one_line_before_training(tmp_path, capsys):
    assert go(tmp_path, "--reward.methods=drop", "--ppo.methods=", "--strength.q=1") == 2
    one_line(capsys, "strength.q = 1.0: drops every pair; lower it")
    assert not (tmp_path / "sft.pt").exists()


def test_a_treatment_that_drops_every_pair_of_a_small_set_is_one_line(tmp_path, capsys):
    words = ["--reward.methods=drop", "--ppo.methods=", "--strength.q=0.99", "--world.pairs=20"]
    assert go(tmp_path, *words) == 2
    one_line(capsys, "reward_drop: no pair is left to train on", "lower strength.q")


def test_a_vote_that_says_nothing_is_said(copied, monkeypatch, capsys):
    forget(copied, "strength")

    def constant(run, name, rows):
        return torch.full((len(rows),), 2.0)

    monkeypatch.setattr("labels.votes.reward_diffs", constant)
    assert go(copied, "--stage=strength") == 0
    assert "every label has the same strength" in capsys.readouterr().out


def test_without_wrong_labels_detection_is_left_out_and_said(tmp_path, capsys):
    words = ["--world.flip=0", "--world.bias=0", "--world.temperature=0", "--ppo.methods="]
    assert go(tmp_path, *words) == 0
    assert "AUROC is empty where all labels are right, or all wrong" in capsys.readouterr().out
