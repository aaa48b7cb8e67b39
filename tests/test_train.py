"""The whole program on a world of a few pairs and on small files: the training loop, stages,
skipping, resuming, folds, treated labels, errors."""
import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    HH_SMALL,
    ROOT,
    SMALL,
    go,
    one_line,
    random_rows,
    same,
    tensors,
    tiny_reward,
    write_pairs,
)
from small_runs import (
    change_times,
    clone,
    copy_run,
    depends_on,
    forget,
    log_of,
    opened,
    read_lines,
    relative_distance,
    stop_after,
)

import config
import losses
import train
import world
from common import load_model, reward_model_from_sft, score_rows, seed_from, sft_rows
from data import assign_folds, batches, collate
from labels.votes import check_votes, load_votes, unseen_diffs
from model import LanguageModel, RewardModel
from runtime import files, stages
from runtime.run import Run
from runtime.signals import Stopped
from strength import strength, treat
from train import RewardVariant, TrainingData

STAGES_OF_TRAINING = stages.STAGES[:-1]


# ----------------------------------------------------------------------------------------------
# Losses


class Views:
    """In the place of a contrastive head: a loss of 0 an item, and what it was given"""
    settings = SimpleNamespace(weight=1.0)

    def __call__(self, h):
        self.h = h
        return 0.0 * h.sum((1, 2))


@pytest.mark.parametrize("n", [1, 8])
def test_accuracy_counts_a_pair_once_with_two_views_as_with_one(n):
    """Without dropout both views rank the pairs alike."""
    model = tiny_reward()
    rows = random_rows(n, 2, seed=4)
    zeros = torch.zeros(n)
    ones = torch.ones(n)
    plain, plain_sums = train.pair_loss(model, rows, zeros, ones)
    views = Views()
    loss, sums = train.pair_loss(model, rows, zeros, ones, views)
    assert len(views.h) == 2 * n
    with torch.no_grad():
        each = [train.pair_loss(model, [row], zeros[:1], ones[:1])[0] for row in rows]
    right = sum(float(value) < np.log(2) for value in each)
    assert float(plain_sums["accuracy"]) == float(sums["accuracy"]) == right
    torch.testing.assert_close(loss, plain)


def test_with_dropout_accuracy_is_the_mean_of_both_views():
    model = tiny_reward(dropout=0.5).train()
    rows = random_rows(12, 2, seed=4)
    torch.manual_seed(0)
    _, sums = train.pair_loss(model, rows, torch.zeros(12), torch.ones(12), Views())
    torch.manual_seed(0)
    _, views = train.pair_loss(model, rows * 2, torch.zeros(24), torch.ones(24))
    assert float(sums["accuracy"]) == float(views["accuracy"]) / 2


@pytest.mark.parametrize("aux_loss", [None, Views()])
def test_the_loss_of_weighted_pairs_is_their_weighted_sum(aux_loss):
    model = tiny_reward()
    rows = random_rows(6, 2, seed=4)
    weight = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    loss, sums = train.pair_loss(model, rows, torch.zeros(6), torch.ones(6), aux_loss, weight)
    total = 0.0
    for row, w in zip(rows, weight):
        total += w * train.pair_loss(model, [row], torch.zeros(1), torch.ones(1))[0]
    torch.testing.assert_close(loss, total)
    assert sums["accuracy"] == train.pair_loss(model, rows, torch.zeros(6), torch.ones(6))[1][
        "accuracy"]  # counts every pair once


def test_centering_is_added_pair_by_pair_to_a_plain_and_to_a_weighted_loss():
    model = tiny_reward()
    rows = random_rows(6, 2, seed=4)
    batch = collate(rows)
    rewards = model(batch.tokens, batch.branch, batch.position, batch.last)
    squares = rewards.sum(1) ** 2
    zeros = torch.zeros(6)
    ones = torch.ones(6)
    weight = torch.arange(6.0)
    for w in (None, weight):
        plain, _ = train.pair_loss(model, rows, zeros, ones, weight=w)
        centred, _ = train.pair_loss(model, rows, zeros, ones, weight=w, centering=0.3)
        expected = plain + 0.3 * (squares * (ones if w is None else w)).sum()
        torch.testing.assert_close(centred, expected)


def test_centred_rewards_have_a_mean_near_zero(finished, tmp_path):
    means = {}
    for centering in (0.0, 0.5):
        out = copy_run(finished, tmp_path / str(centering))
        run = opened(out, "--reward.epochs=6", f"--reward.centering={centering}")
        train.train_reward(run, "baseline")
        rewards = score_rows(run, load_model(run, RewardModel, "reward_baseline"), run.train.rows)
        means[centering] = abs(float(rewards.mean()))
    assert means[0.5] < means[0.0]
    depends = depends_on(finished, "--reward.centering=0.5")
    assert depends["reward_flip"]["reward.centering"] == 0.5
    assert "reward.centering" not in depends_on(finished)["reward_flip"]


def test_the_sft_loss_is_a_sum_over_response_tokens(finished):
    run = opened(finished)
    model = load_model(run, LanguageModel, "sft")
    rows = sft_rows(run)[:3]
    total = 0.0
    for row in rows:
        tokens = [*row.prompt.tolist(), *row.responses[0].tolist()]
        with torch.no_grad():
            logp = model(torch.tensor([tokens]))[0].log_softmax(-1)
        for t in range(len(row.prompt), len(tokens)):
            total -= float(logp[t - 1, tokens[t]])
    loss, sums = train.sft_loss(model, rows)
    assert loss.item() == pytest.approx(total, rel=1e-5) and sums == {}


# ----------------------------------------------------------------------------------------------
# The training loop against its equations


def adamw_step(parameters, gradients, state, lr, weight_decay, t):
    """One step of AdamW by its equations, arXiv 1711.05101, with betas 0.9 and 0.95, eps 1e-8

    state: [(first moment, second moment)], one a parameter; t: number of the step from 1
    """
    for p, g, (m, v) in zip(parameters, gradients, state, strict=True):
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.95).add_(0.05 * g ** 2)
        update = (m / (1 - 0.9 ** t)) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-8)
        decay = weight_decay if p.dim() > 1 else 0.0
        p.sub_(lr * (update + decay * p))


def train_by_hand(model, loss_of, schedule, rates, clip, weight_decay):
    """The loop of train.fit in float64 and without micro-batches -> norm of each step's gradient

    loss_of(index) -> mean loss of a batch; rates: learning rate of each step
    """
    parameters = list(model.parameters())
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    norms = []
    for t, (index, lr) in enumerate(zip(schedule, rates, strict=True), 1):
        gradients = torch.autograd.grad(loss_of(index), parameters)
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        norms.append(norm)
        gradients = [g * min(1.0, clip / norm) for g in gradients]
        with torch.no_grad():
            adamw_step(parameters, gradients, state, lr, weight_decay, t)
    return norms


LOOP = {  # every part of the loop is at work: half of the steps are clipped, a quarter warm up
    "model.dropout": 0.0, "reward.epochs": 2, "reward.batch": 16, "reward.lr": 1e-2,
    "train.warmup": 0.25, "train.weight_decay": 2.0,
}
RATES = [0.5e-2, 1e-2, 1e-2, 5e-2 / 6, 4e-2 / 6, 3e-2 / 6, 2e-2 / 6, 1e-2 / 6]


def fit_pairs(run, name, **more):
    """A plain reward model on the training pairs, by train.fit_reward_model"""
    labels = treat(torch.zeros(len(run.train.rows)), "baseline")
    assert run.needs(name, [], extra={"changes": str(more)})
    variant = RewardVariant(seed_key="an order", **more)
    train.fit_reward_model(run, name, run.cfg.reward, labels, variant)


@pytest.fixture(scope="module")
def loop_run(finished, tmp_path_factory):
    """An open run under the settings of LOOP, with the language model of the finished run"""
    out = copy_run(finished, tmp_path_factory.mktemp("loop") / "run")
    return opened(out).with_settings(LOOP)


def pair_mean(model, rows):
    """Mean Bradley-Terry loss of a batch, each row by itself, in float64"""
    losses_of_rows = []
    for row in rows:
        values = []
        for i in (0, 1):
            tokens = torch.from_numpy(np.concatenate((row.prompt, row.responses[i])).astype(int))
            h = model.model(tokens[None])
            values.append(model.score(h)[0, -1, 0])
        losses_of_rows.append(losses.bradley_terry(values[0][None], values[1][None]))
    return torch.cat(losses_of_rows).mean()


@pytest.fixture(scope="module")
def by_hand(loop_run):
    """The eight steps of LOOP by hand -> start, end, norms of the gradients, clip"""
    run = loop_run
    model = reward_model_from_sft(run, dropout=0.0).double()
    start = clone(model)
    rows = run.train.rows
    schedule = []
    for epoch in range(2):
        seed_key = f"{run.cfg.seed} an order epoch {epoch}"
        schedule += batches([len(row) for row in rows], 16, seed_key)
    assert len(schedule) == len(RATES)

    def loss_of(index):
        return pair_mean(model, [rows[i] for i in index])

    clip = 0.5
    norms = train_by_hand(model, loss_of, schedule, RATES, clip, weight_decay=2.0)
    assert 2 <= sum(norm > clip for norm in norms) <= 6
    return start, clone(model), norms, clip


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loop_is_its_equations(loop_run, by_hand, accumulate):
    """Warm-up and decay of the learning rate, clipping, AdamW with its betas and weight decay, and
    the mean over a batch that comes in micro-batches of 6, 5 and 5.

    Movements are compared, and the logged gradient norms.  AdamW magnifies the rounding of small
    gradients, so float32 leaves 1e-6 to 3e-5 of the movement, depending on the start.  Of the parts
    named, the second beta matters least: 0.999 in its place makes 1e-2.
    """
    start, expected, norms, clip = by_hand
    run = loop_run.with_settings({"train.accumulate": accumulate, "train.grad_clip": clip})
    name = f"loop_{accumulate}"
    fit_pairs(run, name, shape_changes={"dropout": 0.0})
    state = tensors(run.cfg.out_dir, name)
    assert relative_distance(expected, state, start) < 2e-3
    log = log_of(run, name)
    assert [line["lr"] for line in log] == pytest.approx(RATES, abs=1e-6)
    assert [line["grad_norm"] for line in log] == pytest.approx(norms, rel=1e-3)



def test_accumulation_weighs_tokens_of_sft_alike(finished, tmp_path):
    """Micro-batches differ in their numbers of tokens; the mean is over those of the batch."""
    norms = []
    for accumulate in (1, 4):
        run = opened(copy_run(finished, tmp_path / str(accumulate)))
        run = run.with_settings({
            "model.dropout": 0.0, "train.accumulate": accumulate, "sft.lr": 1e-4,
        })
        os.remove(run.path("log.jsonl"))
        train.train_sft(run)
        norms.append([line["grad_norm"] for line in log_of(run, "sft")])
    assert len(norms[0]) == 4
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_accumulation_changes_sft_by_rounding_and_bf16_little(tmp_path):
    """Movements of four steps.  bf16 rounds to 2^-9, a hundredth over several products, and AdamW
    magnifies the error of small gradients; a step of another batch would be 1 away."""
    ends = {}
    for name, words in (
        ("none", ["--sft.lr=0"]), ("plain", []), ("pieces", ["--train.accumulate=4"]),
        ("bf16", ["--dtype=bf16"]),
    ):
        words = ["--model.dropout=0", "--sft.lr=1e-4", *words, "--stage=sft"]
        assert go(tmp_path / name, *words) == 0
        ends[name] = tensors(tmp_path / name, "sft")
    plain = ends["plain"]
    assert relative_distance(plain, ends["pieces"], ends["none"]) < 1e-3
    assert 0 < relative_distance(plain, ends["bf16"], ends["none"]) < 0.2
    assert all(torch.allclose(plain[key], ends["pieces"][key], atol=1e-5) for key in plain)
    assert all(torch.allclose(plain[key], ends["bf16"][key], atol=2e-3) for key in plain)
    assert ends["bf16"]["lm_head.weight"].dtype == torch.float32  # master weights


def test_the_learning_rate_rises_and_falls():
    rates = [train.get_lr(step, 10, 2.0, 0.2) for step in range(10)]
    expected = [1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]
    assert rates == pytest.approx(expected)
    assert [train.get_lr(step, 4, 1.0, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert train.get_lr(0, 1, 1.0, 0.1) == 1.0  # a single step


def test_gradient_checkpointing_changes_memory_not_the_model(loop_run):
    models = []

    def eval_fn(model):
        models.append(model)
        return torch.zeros(1)

    ends = []
    for is_on in (True, False):
        run = loop_run.with_settings(
            {"train.gradient_checkpointing": is_on, "reward.epochs": 1}
        )
        name = f"checkpointing_{is_on}"
        fit_pairs(run, name, eval_fn=eval_fn)
        ends.append(tensors(run.cfg.out_dir, name))
    assert [model.model.gradient_checkpointing for model in models] == [True, False]
    assert same(*ends)


def test_dropout_depends_on_the_step_alone(finished, tmp_path):
    """Random numbers drawn before a run change nothing."""
    run = opened(copy_run(finished, tmp_path / "run"))
    ends = []
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        fit_pairs(run, name)
        ends.append(tensors(run.cfg.out_dir, name))
    assert same(*ends)


def test_a_loss_that_is_not_finite_is_one_line(loop_run):
    run = loop_run.with_settings({"reward.lr": 1.0})

    def loss_fn(model, index):
        return torch.tensor(float("nan"), requires_grad=True) + model.score.weight.sum(), {}

    assert run.needs("nan", [])
    data = TrainingData(lengths=[1] * 8, counts=[1] * 8, seed_key="nan")
    model = reward_model_from_sft(run)
    message = "nan: the loss is nan at step 1; lower its lr$"
    with pytest.raises(config.ConfigError, match=message):
        train.fit(run, "nan", model, loss_fn, run.cfg.reward, data)
    assert not os.path.exists(run.path("nan.pt"))


# ----------------------------------------------------------------------------------------------
# Evaluation of a model while it is trained


@pytest.fixture
def eval_run(copied):
    """An open run whose reward models take two epochs of four steps, with dropout"""
    (copied / "log.jsonl").unlink()
    return opened(copied, "--reward.epochs=2", "--reward.batch=16")


def valid_rewards(run):
    return lambda model: score_rows(run, model, run.valid.rows)


@pytest.mark.parametrize("evals_per_epoch, num_evals", [(0, 1), (1, 2), (3, 6), (4, 8)])
def test_outputs_of_evaluations_are_saved_the_last_at_the_end(
    eval_run, evals_per_epoch, num_evals
):
    run = eval_run
    fit_pairs(run, "watched", eval_fn=valid_rewards(run), evals_per_epoch=evals_per_epoch)
    outputs = run.load_tensors("watched_watched.pt")
    assert outputs.shape == (num_evals, len(run.valid.rows), 2)
    final = score_rows(run, load_model(run, RewardModel, "watched"), run.valid.rows)
    assert torch.equal(outputs[-1], final)
    assert len({output.numpy().tobytes() for output in outputs}) == num_evals


@pytest.mark.parametrize("evals_per_epoch, steps", [
    (0, [8]), (2, [2, 4, 6, 8]), (3, [1, 3, 4, 5, 7, 8]),
])
def test_evaluations_are_spread_evenly_and_change_nothing(eval_run, evals_per_epoch, steps):
    """Dropout goes on after them, with the same masks."""
    run = eval_run
    seen = []

    def eval_fn(model):
        assert not model.training
        seen.append(len(log_of(run, "watched")))  # in so short a run every step is logged
        return torch.rand(1)

    fit_pairs(run, "alone")
    fit_pairs(run, "watched", eval_fn=eval_fn, evals_per_epoch=evals_per_epoch)
    assert seen == steps
    assert same(tensors(run.cfg.out_dir, "alone"), tensors(run.cfg.out_dir, "watched"))
    assert not os.path.exists(run.path("alone_watched.pt"))


def test_an_evaluated_model_stopped_and_resumed_equals_not_stopped(eval_run, monkeypatch):
    """Stopped after three steps, and after four more"""
    run = eval_run
    more = {"eval_fn": valid_rewards(run), "evals_per_epoch": 4}
    fit_pairs(run, "whole", **more)
    for steps in (3, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(Stopped):
                fit_pairs(run, "parts", **more)
    assert len(files.load_state(run.path("parts.ckpt"))["watched"]) == 7
    fit_pairs(run, "parts", **more)
    whole = run.load_tensors("whole_watched.pt")
    assert len(whole) == 8 and torch.equal(whole, run.load_tensors("parts_watched.pt"))
    assert same(tensors(run.cfg.out_dir, "whole"), tensors(run.cfg.out_dir, "parts"))


def test_outputs_of_a_checkpoint_are_brought_to_the_cpu(eval_run, monkeypatch):
    """A checkpoint is loaded to the run's device, and score_rows returns rewards on the CPU."""
    run = eval_run
    on_a_gpu = SimpleNamespace(cpu=lambda: torch.full((len(run.valid.rows), 2), 7.0))
    state = {"step": 0, "last": {}, "watched": [on_a_gpu]}
    monkeypatch.setattr(run, "resume", lambda name, parts: state)
    fit_pairs(run, "watched", eval_fn=valid_rewards(run), evals_per_epoch=0)
    outputs = run.load_tensors("watched_watched.pt")
    assert len(outputs) == 2 and (outputs[0] == 7).all() and not (outputs[1] == 7).any()


# ----------------------------------------------------------------------------------------------
# Members and treatments


def labels_of(run, function, item, monkeypatch):
    """-> the (swap, p, margin) that a stage trains on"""
    given = []

    def recorded(run, name, cfg, labels, variant):
        given.append(labels)

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit_reward_model", recorded)
        function(run, item)
    return given[0]


def test_a_member_leaves_out_the_pairs_of_its_fold(tmp_path, finished, monkeypatch):
    words = ["--ensemble.members=4", "--ensemble.folds=2"]
    run = opened(copy_run(finished, tmp_path / "run"), *words)
    fold = assign_folds(run.train.pairs, 2, run.cfg.seed)
    assert 0 < fold.sum() < 60
    for m in range(4):
        swap, p, margin = labels_of(run, train.train_member, m, monkeypatch)
        assert p.isnan().tolist() == (fold == m % 2).tolist()
        assert (p[~p.isnan()] == 1).all() and not swap.any() and not margin.any()


def test_a_vote_of_unseen_members_takes_those_that_leave_the_fold_out():
    diffs = torch.arange(4.0)[:, None] + torch.tensor([0.0, 10.0, 20.0])  # member + 10 x pair
    fold = torch.tensor([0, 1, 1])
    assert unseen_diffs(diffs, fold, 2).tolist() == [[0, 11, 21], [2, 13, 23]]


def test_every_reward_model_is_trained_on_its_treatment(copied, monkeypatch):
    run = opened(copied, "--reward.methods=baseline,flip,drop,margin", "--reward.epochs=3")
    mean, _ = strength(load_votes(run)["train"])
    for method in run.cfg.reward.methods:
        labels = labels_of(run, train.train_reward, method, monkeypatch)
        expected = train.treat_pairs(run, method, mean)
        torch.testing.assert_close(labels, expected, equal_nan=True)
    assert train.treat_pairs(run, "flip", mean)[0].sum() == 6
    assert train.treat_pairs(run, "drop", mean)[1].isnan().sum() == 6


def test_swapped_and_dropped_pairs_reach_the_loss(copied, monkeypatch):
    """Of three pairs the first is swapped, the second dropped."""
    run = opened(copied)
    run.train.rows[3:] = []
    rows = list(run.train.rows)
    swap = torch.tensor([True, False, False])
    p = torch.tensor([0.9, torch.nan, 0.8])
    margin = torch.tensor([0.1, 0.2, 0.3])
    seen = []

    def recorded(model, rows, margin, p, aux_loss, weight, loss_of, centering):
        assert centering == 0.0
        assert weight.tolist() == (10 * margin).tolist()  # each pair has its own
        seen.append((rows, margin.tolist(), p.tolist(), aux_loss))
        return model.score.weight.sum(), {}

    monkeypatch.setattr(train, "pair_loss", recorded)
    assert run.needs("three", [])
    cfg = config.Reward(epochs=1, batch=8)
    variant = RewardVariant(weight=10 * margin)
    train.fit_reward_model(run, "three", cfg, (swap, p, margin), variant)
    (batch, margins, chances, aux_loss), = seen
    assert aux_loss is None
    by_margin = dict(zip(margins, zip(batch, chances)))
    assert sorted(margins) == pytest.approx([0.1, 0.3])
    swapped, first_p = by_margin[min(margins)]
    plain, last_p = by_margin[max(margins)]
    assert (first_p, last_p) == pytest.approx((0.9, 0.8))
    for row, expected in ((swapped, rows[0].branches(1, 0)), (plain, rows[2])):
        assert all(map(np.array_equal, row.responses, expected.responses))


# ----------------------------------------------------------------------------------------------
# For experiments


def test_a_variant_is_trained_once_and_again_if_anything_changes(copied, monkeypatch):
    run = opened(copied)
    rows = run.valid.rows[:5]
    labels = treat(torch.zeros(60), "baseline")
    first = train.train_reward_variant(run, "variant", labels, rows)
    model = load_model(run, RewardModel, "variant")
    assert first.shape == (1, 5, 2) and torch.equal(first[-1], score_rows(run, model, rows))
    calls = []

    def forbidden(*arguments):
        calls.append(arguments)

    monkeypatch.setattr(train, "fit_reward_model", forbidden)
    assert torch.equal(train.train_reward_variant(run, "variant", labels, rows), first)
    assert calls == []
    swap, p, margin = labels
    changes = [
        ((~swap, p, margin), rows, RewardVariant()),
        (labels, rows[:4], RewardVariant()),
        (labels, rows, RewardVariant(evals_per_epoch=2)),
        (labels, rows, RewardVariant(seed_key="other")),
        (labels, rows, RewardVariant(shape_changes={"dropout": 0.3})),
        (labels, rows, RewardVariant(), run.cfg.ensemble),
        (labels, rows, RewardVariant(contrast=config.Contrast(term="simcse"))),
    ]
    for arguments in changes:
        train.train_reward_variant(run, "variant", *arguments)
    assert len(calls) == len(changes)


def test_a_policy_under_other_settings_is_trained_once(copied, monkeypatch):
    run = opened(copied).with_settings({"ppo.kl_coef": 0.0})
    lines = train.train_policy_once(run, "free", "reward_flip")
    assert len(lines) == 16
    assert {line["iteration"] for line in lines} == {0, 1}
    assert lines == read_lines(copied / "rollouts_free.jsonl")
    depends = run.read_record("policy_free")["depends"]
    assert depends["ppo.kl_coef"] == 0.0 and "input reward_flip" in depends
    monkeypatch.setattr(train, "run_ppo", lambda *_: pytest.fail("trained again"))
    assert train.train_policy_once(run, "free", "reward_flip") == lines


# ----------------------------------------------------------------------------------------------
# A whole run

MODELS = ("sft", "member_00", "member_01", "reward_baseline", "reward_flip", "policy_flip")


def test_a_run_leaves_its_files(finished):
    results = json.loads((finished / "results.json").read_text())
    assert {"noise", "reward", "policy", "groups", "config", "seed", "versions"} <= results.keys()
    assert results["config"]["world"]["pairs"] == 60 and results["seed"] == 0
    lines = read_lines(finished / "strength.jsonl")
    rows, _ = world.pairs(60, 0, world.Noise(0.15, 0.09, 0.02), items=4)
    keys = ("prompt", "chosen", "rejected")
    assert [[row[key] for key in keys] for row in rows] == [
        [line[key] for key in keys] for line in lines
    ]
    assert {"mean", "std", "group", "swap", "p", "margin"} <= lines[0].keys()
    assert sum(line["swap"] for line in lines) == 6  # a tenth of 60
    log = read_lines(finished / "log.jsonl")
    assert {line["stage"] for line in log} == set(MODELS)
    for figure in ("vote", "strength", "groups", "reliability", "ppo", "ppo_watch"):
        path = finished / "figures" / f"{figure}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("*.part")) and not list(finished.rglob("*.ckpt"))


def test_without_figures_those_of_former_numbers_are_removed(copied, capsys):
    figures = {path.name for path in (copied / "figures").iterdir()}
    assert go(copied, "--evaluate.prompts=7") == 0
    assert f"\nresults.json is in {copied}/" in capsys.readouterr().out
    left = {path.name for path in (copied / "figures").iterdir()}
    assert left == {"vote.png", "ppo_flip.png"} < figures  # what is up to date stays


@pytest.fixture(scope="module")
def second_run(tmp_path_factory):
    """The same run stage by stage, where no stage but the evaluation can read the truth"""
    class Secret:
        def __getattr__(self, name):
            raise AssertionError("the truth was read")

    out = tmp_path_factory.mktemp("second")
    real = world.pairs

    def pairs(n, *arguments, **more):
        return real(n, *arguments, **more)[0], [Secret()] * n

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "pairs", pairs)
        for stage in STAGES_OF_TRAINING:
            assert go(out, f"--stage={stage}") == 0
        with pytest.raises(AssertionError, match="the truth was read"):
            go(out, "--stage=evaluate")
    assert go(out) == 0
    return out


def test_no_stage_but_evaluation_reads_the_truth(finished, second_run):
    """A truth that cannot be read prevents no training, and the models are the same."""
    for name in MODELS:
        assert same(tensors(finished, name), tensors(second_run, name)), name


def test_a_second_run_has_the_same_bits(finished, second_run):
    for name in ("strength.jsonl", "cleaned.jsonl", "rollouts_flip.jsonl", "answers.jsonl"):
        assert (finished / name).read_bytes() == (second_run / name).read_bytes(), name


def test_members_differ_by_the_order_of_the_data_alone(finished):
    """Same start, same pairs: with equal orders the members would be equal."""
    assert not same(tensors(finished, "member_00"), tensors(finished, "member_01"))


def test_members_trained_in_processes_of_their_own_are_the_same(finished, copied):
    """Two processes of one thread each"""
    forget(copied, "member_00", "member_01")
    for m in (0, 1):
        (copied / f"member_0{m}.pt").unlink()
    assert go(copied, "--train.workers=2", "--stage=ensemble", "--threads=2") == 0
    for name in ("member_00", "member_01"):
        assert same(tensors(finished, name), tensors(copied, name))


def test_finished_work_is_skipped_and_a_change_repeats_what_depends_on_it(copied, capsys):
    times = change_times(copied)
    assert go(copied) == 0
    assert change_times(copied) == times
    capsys.readouterr()
    assert go(copied, "--strength.q=0.2") == 0
    out = capsys.readouterr().out
    assert "reward_flip: again: strength.q was 0.1, is 0.2" in out
    assert "policy_flip: again: reward_flip is no longer the same" in out
    changed = {name for name, time in change_times(copied).items() if times[name] != time}
    assert changed == {"gaps.pt", "reward_flip.pt", "policy_flip.pt"}


def test_a_missing_output_is_made_again(copied, finished, capsys):
    (copied / "reward_flip.pt").unlink()
    assert go(copied, "--stage=reward") == 0
    assert "reward_flip: again: reward_flip.pt is gone" in capsys.readouterr().out
    assert same(tensors(copied, "reward_flip"), tensors(finished, "reward_flip"))


@pytest.mark.parametrize("name, stage", [
    ("sft", "sft"), ("reward_flip", "reward"), ("policy_flip", "ppo"),
])
def test_stopped_and_resumed_equals_not_stopped(
    name, stage, finished, copied, monkeypatch, capsys
):
    forget(copied, name)
    (copied / f"{name}.pt").unlink()
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert go(copied, f"--stage={stage}") == 130
    assert (copied / f"{name}.ckpt").exists() and not (copied / f"{name}.pt").exists()
    assert go(copied) == 0
    assert f"{name}: resumes at step 1" in capsys.readouterr().out
    assert not (copied / f"{name}.ckpt").exists()
    assert same(tensors(finished, name), tensors(copied, name))
    for rollouts in ("rollouts_flip.jsonl", "watch_flip.jsonl"):
        assert (finished / rollouts).read_bytes() == (copied / rollouts).read_bytes()


def test_a_checkpoint_of_other_settings_is_not_resumed(copied, monkeypatch, capsys):
    forget(copied, "reward_flip")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert go(copied, "--stage=reward") == 130
    capsys.readouterr()
    assert go(copied, "--stage=reward", "--reward.lr=1e-3") == 0
    assert "resumes" not in capsys.readouterr().out


def test_a_stage_without_its_input_names_the_stage_to_run(tmp_path, capsys):
    assert go(tmp_path, "--stage=reward") == 2
    assert "run --stage=sft first" in capsys.readouterr().err


def test_old_names_on_the_command_line_mean_the_same_settings(copied, monkeypatch, capsys):
    """One line names the new ones; what is up to date stays so."""
    monkeypatch.setattr(config, "announced", set())
    old = [
        "--ppo.episodes=8", "--ppo.max_new=12", "--ppo.critic_pretrain=0", "--ppo.kl=0.05",
        "--train.clip=1.0",
    ]
    new = {"ppo.rollout_batch_size", "ppo.max_new_tokens", "ppo.critic_warmup_iters"}
    small = [word for word in SMALL if word[2:].partition("=")[0] not in new]
    times = change_times(copied, "*")
    assert go(copied, *old, small=small) == 0
    out, err = capsys.readouterr()
    assert "policy_flip" not in out.replace("ppo: up to date", "").split("policy,")[0]
    assert "ppo: up to date" in out and "evaluate: up to date" in out
    assert err.startswith("note: ppo.episodes is now ppo.rollout_batch_size, ")
    assert "train.clip is now train.grad_clip" in err and err.count("\n") == 1
    assert change_times(copied, "*") == times


def test_an_export_writes_a_folder_for_every_model_and_trains_nothing(copied, capsys):
    times = change_times(copied, "*")
    forget(copied, "reward_baseline")
    assert go(copied, "--stage=export") == 0
    folders = {path.name for path in (copied / "export").iterdir()}
    assert folders == {"sft", "member_00", "member_01", "reward_flip", "policy_flip"}
    for folder in (copied / "export").iterdir():
        assert (folder / "model.safetensors").exists() and (folder / "config.json").exists()
    out = capsys.readouterr().out
    assert "export: reward_baseline is left out (not made yet)" in out
    after = change_times(copied, "*")
    assert after.pop("export") and after.keys() == times.keys()
    assert {name for name in times if times[name] != after[name]} <= {"stages"}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_after_the_step_and_the_same_command_resumes(
    number, code, finished, copied, monkeypatch, capsys
):
    forget(copied, "reward_flip")
    with monkeypatch.context() as patch:
        log_step = Run.log_step

        def interrupted(*arguments, **more):
            signal.raise_signal(number)
            return log_step(*arguments, **more)

        patch.setattr(Run, "log_step", interrupted)
        assert go(copied, "--stage=reward") == code
    out, err = capsys.readouterr()
    assert "stopping after this step" in err and "the same command resumes from here" in err
    assert (copied / "reward_flip.ckpt").exists()
    assert go(copied, "--stage=reward") == 0
    assert "reward_flip: resumes at step 1" in capsys.readouterr().out
    assert same(tensors(finished, "reward_flip"), tensors(copied, "reward_flip"))


def test_ctrl_c_reaches_members_that_are_trained_in_parallel(copied):
    """A process of its own, and a real signal while both of its workers are at work"""
    (copied / "log.jsonl").unlink()
    forget(copied, "member_00", "member_01")
    command = [
        sys.executable, "train.py", *SMALL, f"--out_dir={copied}", "--stage=ensemble",
        "--ensemble.epochs=400", "--threads=2", "--train.workers=2",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = copied / "log.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline:
        text = log.read_text() if log.exists() else ""
        if '"member_00"' in text and '"member_01"' in text:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command resumes from here" in err and "Traceback" not in err
    assert (copied / "member_00.ckpt").exists() and (copied / "member_01.ckpt").exists()


# ----------------------------------------------------------------------------------------------
# Files of the user's


def test_files_train_and_dropped_pairs_are_named(tmp_path, capsys):
    path = write_pairs(tmp_path / "mine.jsonl")
    same_answers = {
        "prompt": "\n\nHuman: same?\n\nAssistant:", "chosen": " a", "rejected": " a",
    }
    with path.open("a") as file:
        file.write(json.dumps(same_answers) + "\n")
    assert go(tmp_path / "out", f"--data.train={path}", small=HH_SMALL) == 0
    assert f"{path}:31: chosen and rejected are identical" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "noise" not in results and results["judge"] == "the ensemble (a proxy)"
    assert "gold_accuracy" not in results["reward"]["flip"]["valid"]


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a", "chosen', "broken JSON"),
    ('{"prompt": "a", "chosen": "b"}', "'rejected' is missing"),
    ('{"prompt": "a", "chosen": "b", "rejected": null}', "not null"),
    ('{"prompt": "a", "chosen": 3, "rejected": "b"}', "not a number"),
])
def test_a_bad_line_is_named(line, message, tmp_path, capsys):
    path = write_pairs(tmp_path / "mine.jsonl")
    path.write_text(path.read_text() + line + "\n")
    assert go(tmp_path / "out", f"--data.train={path}", small=HH_SMALL) == 2
    one_line(capsys, f"{path}:31", message)
    assert not list((tmp_path / "out").rglob("*.pt"))


@pytest.mark.parametrize("words, parts", [
    (["--data.train=nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
    (["--data.train=DIR/empty.jsonl"], ["empty.jsonl: the file is empty"]),
    (["--data.train=DIR/same.jsonl", "--data.valid=DIR/good.jsonl"],
     ["DIR/same.jsonl:1", "identical"]),
    (["--data.train=DIR/long.jsonl", "--data.valid=DIR/good.jsonl"],
     ["DIR/long.jsonl:1", "raise model.context"]),
    (["--data.train=DIR/good.jsonl", "--data.valid=DIR/good.jsonl"], ["also in training"]),
    (["--data.train=DIR/good.jsonl", "--data.ood=nowhere.jsonl"],
     ["nowhere.jsonl: no such file"]),
])
def test_files_that_give_no_pair_are_named_before_training(words, parts, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    write_pairs(tmp_path / "good.jsonl")
    write_pairs(tmp_path / "same.jsonl", chosen=" x", rejected=" x")
    write_pairs(tmp_path / "long.jsonl", chosen=" word" * 200)
    words = [word.replace("DIR", str(tmp_path)) for word in words]
    assert go(tmp_path / "out", *words, small=HH_SMALL) == 2
    one_line(capsys, *(part.replace("DIR", str(tmp_path)) for part in parts))
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert go(tmp_path / "file" / "out") == 2
    one_line(capsys, "cannot be written", "--out_dir")


def test_a_full_disk_leaves_no_incomplete_file(tmp_path, monkeypatch, capsys):
    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert go(tmp_path) == 2
    one_line(capsys, "sft.pt: cannot be written (No space left on device)")
    assert not list(tmp_path.glob("sft.pt*"))


def test_a_broken_model_is_one_line(copied, capsys):
    content = (copied / "sft.pt").read_bytes()
    (copied / "sft.pt").write_bytes(content[:5000])
    forget(copied, "reward_flip")
    assert go(copied, "--stage=reward") == 2
    one_line(capsys, "needs sft, which is again: sft.pt has 5,000 bytes, not ", "--stage=sft first")
    with pytest.raises(OSError, match="sft.pt: not a readable checkpoint"):
        files.load_tensors(copied / "sft.pt")


def test_votes_of_other_members_are_refused(copied, capsys):
    """Members trained again, and a reward model trained before they have voted."""
    assert go(copied, "--stage=ensemble", "--ensemble.lr=2e-3") == 0
    capsys.readouterr()
    before = tensors(copied, "reward_flip")
    assert go(copied, "--stage=reward", "--ensemble.lr=2e-3") == 2
    one_line(capsys, "gaps.pt: is not the vote of member_00 as it is now", "--stage=strength")
    assert same(before, tensors(copied, "reward_flip"))
    assert go(copied, "--stage=strength", "--ensemble.lr=2e-3") == 0
    assert go(copied, "--stage=reward", "--ensemble.lr=2e-3") == 0
    assert not same(before, tensors(copied, "reward_flip"))


def test_a_vote_by_other_members_of_the_ensemble_is_refused(copied, capsys):
    """With folds, gaps.pt holds the vote of one ensemble.vote alone."""
    run = opened(copied).with_settings({"ensemble.folds": 2, "ensemble.vote": "all"})
    with pytest.raises(config.ConfigError, match="was made under another ensemble.vote; run"):
        check_votes(run)


def test_a_missing_vote_is_an_error_before_anything_is_trained(copied, capsys):
    stages.remove_record(copied, "strength")
    forget(copied, "reward_baseline")
    os.remove(copied / "reward_baseline.pt")
    assert go(copied, "--stage=reward", "--reward.methods=baseline,flip", "--reward.lr=1e-3") == 2
    one_line(capsys, "gaps.pt: the members have not voted yet; run --stage=strength first")
    assert not (copied / "reward_baseline.pt").exists()


ROUNDS = ["--meta.rounds=2", "--ppo.methods=", "--ppo.iterations=1", "--meta.prompts=8"]


def test_stages_that_take_turns_can_be_run_one_by_one(copied, capsys):
    """Each round needs the policy of the last: meta and ppo alternate."""
    assert go(copied, *ROUNDS, "--stage=meta") == 2
    one_line(capsys, "needs policy_meta_1, which is missing; run --stage=ppo first")
    assert (copied / "meta_1.pt").exists()
    assert go(copied, *ROUNDS, "--stage=ppo") == 2
    one_line(capsys, "needs meta_2, which is missing; run --stage=meta first")
    assert go(copied, *ROUNDS, "--stage=meta") == 0
    assert go(copied, *ROUNDS, "--stage=ppo") == 0
    assert (copied / "policy_meta_2.pt").exists()


def test_training_warns_of_a_collapsed_contrastive_term(copied, capsys):
    """At a temperature of 100 all prototypes are equally likely: the loss is 2 ln K."""
    words = [
        "--contrast.term=swav", "--contrast.prototypes=8", "--contrast.temperature=100",
        "--reward.methods=baseline", "--ppo.methods=", "--reward.epochs=2",
    ]
    assert go(copied, *words, "--stage=reward") == 0
    out = capsys.readouterr()
    assert (out.out + out.err).count("reward_baseline: warning: swav's loss is stuck at 4.1") == 1


def test_a_treatment_depends_on_which_members_vote():
    folded = config.load(None, [("ensemble.folds", "2")])
    assert "ensemble.vote" in train.strength_settings("flip", folded)
    assert "ensemble.vote" not in train.strength_settings("baseline", folded)
    assert "ensemble.vote" not in train.strength_settings("flip", config.Config())


def test_votes_of_other_pairs_are_refused(copied, monkeypatch):
    """Written by an older version, whose records say nothing of outputs"""
    run = opened(copied)
    diffs = load_votes(run)
    assert diffs["train"].shape == (2, 60)
    run.save_tensors("gaps.pt", {"train": diffs["train"][:, 1:], "valid": diffs["valid"]})
    monkeypatch.setattr(run, "check_unchanged", lambda name: None)
    with pytest.raises(OSError, match="gaps.pt: has 59 pairs of train, the data 60; delete it"):
        load_votes(run)
    diffs["valid"][1, 3] = torch.nan
    run.save_tensors("gaps.pt", diffs)
    with pytest.raises(OSError, match="gaps.pt: holds numbers that are not finite; delete it"):
        load_votes(run)


def test_help_is_printed_without_arguments(capsys):
    for argv in ([], ["--help"], ["--seed=1", "-h"]):
        assert train.main(argv) == 0
        assert "--ppo.kl_coef" in capsys.readouterr().out


def test_help_has_the_values_of_the_other_words(capsys):
    assert train.main(["--config=configs/tiny.toml", "--help", "--ppo.kl_coef=0.25"]) == 0
    text = capsys.readouterr().out
    assert "--ppo.kl_coef=0.25 " in text and "--out_dir=out/tiny " in text
    assert train.main(["--no.such=1", "-h"]) == 2
    one_line(capsys, "no.such")


def test_random_seeds_are_those_of_texts():
    """A seed never changes: it decides every trained number."""
    assert seed_from("0 reward 0") == seed_from("0 reward 0") != seed_from("0 reward 1")


def test_data_in_the_folder_of_the_run_are_refused(tmp_path, capsys):
    """The run would write over them, or treat its own cleaned.jsonl again each time."""
    path = tmp_path / "run" / "cleaned.jsonl"
    (path.parent / "stages").mkdir(parents=True)  # as a run leaves it
    path.write_text('{"prompt": "", "chosen": " a", "rejected": " b"}\n' * 20)
    before = path.read_bytes()
    assert go(path.parent, f"--data.train={path}", "--data.valid_share=0.5") == 2
    one_line(capsys, f"{path}: is a file that the run writes", "copy it to another folder")
    assert path.read_bytes() == before


def test_a_temperature_that_overflows_is_refused(tmp_path, capsys):
    assert go(tmp_path, "--evaluate.temperature=1e-39") == 2
    one_line(capsys, "evaluate.temperature = 1e-39: must be 0 (greedy) or at least 0.01")
