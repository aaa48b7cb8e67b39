"""Measurements that contrastive.py and metarm.py share: rewards of sampled answers, and accuracies.

Answers of a policy come as rows of k branches with their rewards and gold rewards, both (n, k).
"""
import numpy as np
import torch

import metarm
import world
from common import load_model, reward_diffs, score_rows
from experiments.best_of_n import best_of_n
from losses import difference
from model import RewardModel

NEAR_ZERO = 0.2  # reward differences below it, in mean differences, count as not distinguished


# --------------------------------------------------------------------------------------------------
# Sampled answers


def sample_gold_answers(run, policy, pairs, num_prompts, temperature=1.0):
    """Sample meta.k answers of a policy to each prompt, and score them by the true quality.

    policy: name of POLICY.pt; pairs: their prompts are used, at most num_prompts of them
    returns rows of k branches, and the gold reward (n, k), or None if it is not known
    """
    sampling = {
        "meta.prompts": num_prompts,
        "meta.temperature": temperature,
        "meta.top_p": 1.0,
        "meta.repetition_penalty": 1.0,
    }
    run_here = run.with_settings(sampling)
    rows, lines = metarm.sample_responses(run_here, policy, pairs, seed=run.cfg.seed)
    if run.cfg.data.train != ("world",):
        return rows, None
    gold = []
    for line in lines:
        gold.append([world.gold(line["prompt"], response) for response in line["responses"]])
    return rows, torch.tensor(gold)


def distinct_pairs(values, gold):
    """All pairs of answers to the same prompt whose gold rewards differ.

    values, gold: (n, k) of k answers to each prompt -> values of both (P, 2), gold differences (P,)
    """
    k = values.shape[1]
    i, j = torch.triu_indices(k, k, offset=1)
    couples = torch.stack([values[:, i], values[:, j]], -1)  # (n, k (k - 1) / 2, 2)
    gold_diff = gold[:, i] - gold[:, j]
    distinct = gold_diff.abs() > 1e-6
    return couples[distinct], gold_diff[distinct]


def ranking_accuracy(rewards, gold):
    """Share of pairs of answers that the rewards order as the gold rewards do.

    rewards, gold: (n, k) of k answers to each prompt -> float; pairs of equal gold do not count
    """
    couples, gold_diff = distinct_pairs(rewards, gold)
    correct = (couples[:, 0] - couples[:, 1]) * gold_diff > 0
    return float(correct.float().mean())


def best_of_k(rewards, gold):
    """Mean gold reward of the answer with the highest reward, and of all answers.

    rewards, gold: (n, k) of k answers to each prompt -> float, float
    """
    best = []
    for prompt_rewards, prompt_gold in zip(rewards.numpy(), gold.numpy()):
        best.append(best_of_n(prompt_rewards, prompt_gold, len(prompt_rewards)))
    return float(np.mean(best)), float(gold.mean())


def reward_spread(run, models, policy, pairs, num_prompts=300):
    """Differences of reward among new answers of a policy -> {label: columns of a row}

    models: {label: name of a reward model}.  Differences are divided by the model's mean absolute
    difference on validation pairs, so that the scale of its rewards cancels.
    """
    answers, gold = sample_gold_answers(run, policy, pairs, num_prompts)
    rows = {}
    for label, name in models.items():
        model = load_model(run, RewardModel, name)
        rewards = score_rows(run, model, answers)
        valid_rewards = score_rows(run, model, run.valid.rows)
        mean_difference = valid_rewards.diff(dim=1).abs().mean()
        rows[label] = spread_columns(rewards, mean_difference, gold)
    return rows


def spread_columns(rewards, scale, gold=None):
    """Columns of one reward model in reward_spread.  rewards, gold: (n, k); scale: number"""
    k = rewards.shape[1]
    i, j = torch.triu_indices(k, k, offset=1)
    distance = ((rewards[:, i] - rewards[:, j]).abs() / scale).flatten()
    columns = {
        "J": float(difference(rewards).mean()),
        "below 0.2": float((distance < NEAR_ZERO).float().mean()),
        "mean difference": float(distance.mean()),
    }
    if gold is not None:
        columns["ranked right"] = ranking_accuracy(rewards, gold)
        columns["best of k"], _ = best_of_k(rewards, gold)
    edges = np.linspace(0, 3, 31)
    density, _ = np.histogram(distance.clamp(max=2.99), bins=edges, density=True)
    columns["curve: value"] = ((edges[1:] + edges[:-1]) / 2).tolist()
    columns["curve: density"] = density.tolist()
    return columns


# --------------------------------------------------------------------------------------------------
# Pairs


def gold_accuracy(run, model, rows, gold):
    """Share of pairs that a reward model orders by their true quality.

    model: a RewardModel or the name of one; gold: (N,) differences of gold reward, numpy
    """
    return float((reward_diffs(run, model, rows).numpy() * gold > 0).mean())


def held_out_sets(run):
    """Validation pairs and every set out of distribution -> {name: EncodedPairs}"""
    return {"held out": run.valid, **run.ood}


def label_accuracies(run, name):
    """Accuracy of the reward model NAME.pt by the labels of every held-out set -> {set: float}"""
    accuracies = {}
    for where, encoded in held_out_sets(run).items():
        correct = reward_diffs(run, name, encoded.rows) > 0
        accuracies[where] = float(correct.float().mean())
    return accuracies
