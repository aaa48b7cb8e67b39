"""Evaluation of reward models on held-out training pairs: the split, the best weights, the end."""
import os

import numpy as np
import pytest
import torch
from helpers import go, one_line, same, tensors
from small_runs import (
    clone,
    copy_run,
    depends_on,
    log_of,
    opened,
    reasons,
    stop_after,
)

import train
from common import load_model, score_rows
from config import ConfigError
from data import Pair, split_by_topic, topic
from model import RewardModel
from runtime import early_stopping
from runtime.early_stopping import EarlyStopping, held_out, hold_out
from runtime.signals import Stopped
from strength import treat
from train import RewardVariant

WORDS = [
    "--reward.epochs=3", "--reward.batch=8", "--reward.lr=1e-2", "--reward.evals_per_epoch=2",
    "--reward.heldout_share=0.3",
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run that has an SFT model alone, on 60 pairs of the world"""
    out = tmp_path_factory.mktemp("begun")
    assert go(out, "--stage=sft") == 0
    os.remove(out / "log.jsonl")
    return out


@pytest.fixture
def run(begun, tmp_path):
    return opened(copy_run(begun, tmp_path / "run"), *WORDS)


# --------------------------------------------------------------------------------------------------
# The split


def test_no_first_human_turn_is_on_both_sides(run):
    is_out = held_out(run)
    assert is_out.shape == (60,) and 6 <= is_out.sum() <= 30
    topics = {True: set(), False: set()}
    for pair, side in zip(run.train.pairs, is_out.tolist()):
        topics[side].add(topic(pair))
    assert not topics[True] & topics[False]


def test_the_share_is_of_first_human_turns_and_not_that_of_the_validation_split(begun):
    run = opened(begun, *WORDS, "--reward.heldout_share=0.2")
    pairs = [Pair(f"\n\nHuman: {i}?\n\nAssistant:", " a", " b", index=i) for i in range(2000)]
    run.train.pairs[:] = pairs
    is_out = held_out(run)
    assert abs(float(is_out.float().mean()) - 0.2) < 0.03
    _, valid = split_by_topic(pairs, 0.2, run.cfg.seed)
    both = sum(bool(is_out[pair.index]) for pair in valid)
    assert both / len(valid) < 0.3  # of one seed it would be all


@pytest.mark.parametrize("share, pairs, message", [
    (0.001, 60, "holds out 0 of the 60 training pairs; raise it, or set reward.evals_per_epoch=0"),
    (0.9, 1, "holds out 1 of the 1 training pairs; lower it"),
])
def test_none_or_all_held_out_is_one_line(begun, share, pairs, message):
    run = opened(begun, *WORDS, f"--reward.heldout_share={share}")
    del run.train.pairs[pairs:]
    with pytest.raises(ConfigError, match=f"^reward.heldout_share = {share}: {message}"):
        held_out(run)


def test_it_is_checked_before_anything_is_trained(tmp_path, capsys):
    assert go(tmp_path, "--reward.evals_per_epoch=1", "--reward.heldout_share=0.001") == 2
    one_line(capsys, "reward.heldout_share = 0.001: holds out 0 of the 60")
    assert not (tmp_path / "sft.pt").exists()


# --------------------------------------------------------------------------------------------------
# What is evaluated


def some_labels(n):
    """Treated labels of every kind: swapped, soft, with a margin, dropped -> swap, p, margin"""
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(n, generator=generator)
    p[torch.rand(n, generator=generator) < 0.3] = torch.nan
    return torch.rand(n, generator=generator) < 0.4, p, torch.randn(n, generator=generator)


def test_held_out_pairs_are_evaluated_as_treated_and_left_out_of_training(run):
    swap, p, margin = some_labels(60)
    is_out = held_out(run)
    labels, variant = hold_out(run, "name", (swap, p, margin), RewardVariant(seed_key="mine"))
    assert (variant.seed_key, variant.evals_per_epoch) == ("mine", 2)
    assert labels[1].isnan().tolist() == (p.isnan() | is_out).tolist()
    torch.testing.assert_close(labels[1][~is_out], p[~is_out], equal_nan=True)
    assert torch.equal(labels[0], swap) and torch.equal(labels[2], margin)

    index = [i for i in range(60) if is_out[i] and not p[i].isnan()]
    assert 0 < len(index) < is_out.sum()
    stopping = variant.stopping
    assert stopping.p.tolist() == p[index].tolist()
    assert stopping.margin.tolist() == margin[index].tolist()
    assert len(stopping.rows) == len(index) and 0 < swap[index].sum() < len(index)
    for row, i in zip(stopping.rows, index):
        responses = run.train.rows[i].responses
        expected = responses[::-1] if swap[i] else responses
        assert all(map(np.array_equal, row.responses, expected))


def make_stopping(run, name="stopping", weight=None, monkeypatch=None):
    """An EarlyStopping on three pairs, whose rewards are given by the tests"""
    if weight is not None:
        monkeypatch.setattr(early_stopping, "file_weights", lambda run: weight)
    labels = treat(torch.zeros(60), "baseline")
    return EarlyStopping(run, name, labels, torch.arange(60) < 3)


def test_loss_and_accuracy_are_weighted_means_over_the_pairs(run, monkeypatch, capsys):
    weight = torch.tensor([0.5, 2.0, 0.0] + 57 * [1.0])
    stopping = make_stopping(run, "weighted", weight, monkeypatch)
    stopping.p = torch.tensor([1.0, 0.75, 1.0])
    stopping.margin = torch.tensor([0.0, 1.0, 0.0])
    model = torch.nn.Linear(1, 1)
    stopping.update(7, model, torch.tensor([[1.0, 2.0], [3.0, 0.0], [9.0, 0.0]]))
    first = np.log1p(np.exp(1.0))
    second = 0.75 * np.log1p(np.exp(-2.0)) + 0.25 * np.log1p(np.exp(2.0))
    line, = log_of(run, "weighted")
    assert line["step"] == 7
    assert line["heldout_loss"] == pytest.approx((0.5 * first + 2 * second) / 2.5, abs=1e-6)
    assert line["heldout_accuracy"] == pytest.approx(2 / 2.5, abs=1e-6)
    printed = capsys.readouterr().out
    assert printed.startswith("weighted: step 7, heldout loss 0.764, heldout accuracy 0.800")
    stopping.p[1] = 0.25  # now the treatment says that the other answer is better
    stopping.update(8, model, torch.tensor([[2.0, 1.0], [3.0, 0.0], [9.0, 0.0]]))
    assert log_of(run, "weighted")[1]["heldout_accuracy"] == pytest.approx(0.5 / 2.5, abs=1e-6)

    weight[:3] = 0
    with pytest.raises(ConfigError, match="^weighted: no held-out pair has a label and a weight"):
        make_stopping(run, "weighted", weight, monkeypatch)


def follow(stopping, losses, num_wrong=None):
    """Evaluations of these losses and numbers of wrong pairs, of three; by default none is wrong

    The weight of a model is the number of the step from 1.
    -> the model, and after each evaluation whether it is over
    """
    model = torch.nn.Linear(1, 1)
    over = []
    for step, (loss, wrong) in enumerate(zip(losses, num_wrong or [0] * len(losses)), 1):
        torch.nn.init.constant_(model.weight, step)
        right = (3 * loss - 0.7 * wrong) / (3 - wrong)  # loss of a right pair; of a wrong one 0.7
        diffs = [-np.log(np.expm1(x)) for x in [0.7] * wrong + [right] * (3 - wrong)]
        stopping.update(step, model, torch.tensor([[diff, 0.0] for diff in diffs]))
        assert stopping.last["heldout_loss"] == pytest.approx(loss, abs=1e-6)
        assert stopping.last["heldout_accuracy"] == pytest.approx(1 - wrong / 3, abs=1e-6)
        over.append(stopping.is_over)
    return model, over


@pytest.mark.parametrize("patience, expected", [
    (0, [False] * 7), (1, [0, 0, 1, 0, 1, 1, 0]), (2, [0, 0, 0, 0, 0, 1, 0]), (3, [False] * 7),
])
def test_patience_counts_evaluations_since_the_best(run, patience, expected):
    run = run.with_settings({"reward.patience": patience})
    _, over = follow(make_stopping(run), [0.6, 0.5, 0.55, 0.4, 0.4, 0.45, 0.3])
    assert over == expected  # an equal loss is no better one


@pytest.mark.parametrize("keep, step, loss", [("last", 5, 0.3), ("best", 3, 0.45)])
def test_the_weights_kept_are_of_the_last_step_or_of_the_highest_accuracy(run, keep, step, loss):
    """Of equal accuracy the lower loss is better, of equal loss the earlier step."""
    stopping = make_stopping(run.with_settings({"reward.keep": keep}))
    model, _ = follow(stopping, [0.3, 0.5, 0.45, 0.45, 0.3], [1, 0, 0, 0, 1])
    metrics = stopping.finish(model)
    assert metrics["kept_step"] == step and model.weight.item() == step
    assert metrics["heldout_loss"] == pytest.approx(loss, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Whole trainings


@pytest.fixture(scope="module")
def trained(begun, tmp_path_factory):
    """A reward model trained to its end, and what it was at each evaluation

    -> folder, [state dict], [line of log.jsonl], number of the best evaluation
    """
    out = copy_run(begun, tmp_path_factory.mktemp("trained") / "run")
    states = []
    update = EarlyStopping.update

    def recorded(stopping, step, model, rewards):
        states.append(clone(model))
        update(stopping, step, model, rewards)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyStopping, "update", recorded)
        run = opened(out, *WORDS)
        train.train_reward(run, "baseline")
    lines = [line for line in log_of(run, "reward_baseline") if "heldout_loss" in line]
    assert len(lines) == len(states) == 6
    best = max(range(6), key=lambda i: (lines[i]["heldout_accuracy"], -lines[i]["heldout_loss"]))
    assert best < 4, "later evaluations have to be worse"
    return out, states, lines, best


def test_evaluations_change_nothing_but_the_pairs_trained_on(trained):
    out, states, _, _ = trained
    run = opened(out, *WORDS)
    assert same(tensors(out, "reward_baseline"), states[-1])
    swap, p, margin = treat(torch.zeros(60), "baseline")
    p[held_out(run)] = torch.nan
    assert run.needs("by_hand", [])
    train.fit_reward_model(run, "by_hand", run.cfg.reward, (swap, p, margin), RewardVariant())
    assert same(tensors(out, "by_hand"), states[-1])


def test_the_logged_loss_is_that_of_the_saved_model(trained):
    out, _, lines, _ = trained
    run = opened(out, *WORDS)
    rows = [row for row, is_out in zip(run.train.rows, held_out(run)) if is_out]
    rewards = score_rows(run, load_model(run, RewardModel, "reward_baseline"), rows).numpy()
    loss = np.logaddexp(0, rewards[:, 1] - rewards[:, 0]).mean()
    assert lines[-1]["heldout_loss"] == pytest.approx(loss, abs=2e-6)
    metrics = run.read_record("reward_baseline")["metrics"]
    assert metrics["kept_step"] == 3 * len(train.batches([1] * (60 - len(rows)), 8, 0))
    assert metrics["heldout_loss"] == pytest.approx(loss, abs=2e-6)


def test_the_best_weights_are_kept_and_training_ends_early(trained, tmp_path, capsys):
    out, states, whole, best = trained
    run = opened(copy_run(out, tmp_path / "run"), *WORDS, "--reward.keep=best",
                 "--reward.patience=2")
    os.remove(run.path("log.jsonl"))
    train.train_reward(run, "baseline")
    assert same(tensors(run.cfg.out_dir, "reward_baseline"), states[best])
    lines = [line for line in log_of(run, "reward_baseline") if "heldout_loss" in line]
    assert lines == whole[:best + 3]
    metrics = run.read_record("reward_baseline")["metrics"]
    assert metrics["kept_step"] == lines[best]["step"]
    text = f"keeps the weights of step {lines[best]['step']}, after {lines[-1]['step']} steps"
    assert f"reward_baseline: {text}" in capsys.readouterr().out


@pytest.mark.parametrize("after_best", [1, "end"])
def test_stopped_after_the_best_and_resumed_equals_not_stopped(
    after_best, trained, tmp_path, monkeypatch
):
    """Stopped one step after the best evaluation, or in the step that ends the training early"""
    out, states, lines, best = trained
    steps = [line["step"] for line in lines]
    words = [*WORDS, "--reward.keep=best", "--reward.patience=2"]
    run = opened(copy_run(out, tmp_path / "run"), *words)
    os.remove(run.path("log.jsonl"))
    stop = steps[best + 2] if after_best == "end" else steps[best] + after_best
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Stopped):
            train.train_reward(run, "baseline")
    run = opened(run.cfg.out_dir, *words)
    train.train_reward(run, "baseline")
    assert same(tensors(run.cfg.out_dir, "reward_baseline"), states[best])
    assert max(line["step"] for line in log_of(run, "reward_baseline")) == steps[best + 2]
    assert not os.path.exists(run.path("reward_baseline.ckpt"))
    assert len(run.load_tensors("reward_baseline_watched.pt")) == best + 3


# --------------------------------------------------------------------------------------------------
# Records


def test_the_settings_count_only_where_something_is_evaluated(trained):
    out, _, _, _ = trained
    without = depends_on(out)
    assert not set(early_stopping.SETTINGS) & set(without["reward_flip"])
    assert depends_on(out, "--reward.heldout_share=0.5") == without
    depends = depends_on(out, *WORDS)
    assert set(early_stopping.SETTINGS) <= set(depends["reward_flip"])
    assert depends["member_00"] == without["member_00"]
    assert reasons(out, *WORDS)["reward_baseline"] == ""
    for word, was in (("reward.keep=best", "'last'"), ("reward.patience=3", "0"),
                      ("reward.evals_per_epoch=0", "2"), ("reward.heldout_share=0.4", "0.3")):
        key = word.partition("=")[0]
        assert f"{key} was {was}" in reasons(out, *WORDS, f"--{word}")["reward_baseline"]
