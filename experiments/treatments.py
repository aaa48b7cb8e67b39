"""Reward models trained on all pairs under each treatment: Fig. 8, 19, 20, 27 and 28."""
import numpy as np

import train
from evaluate import calibration, gold_diffs, lengths_of, longer_wins
from experiments.registry import experiment
from experiments.shared import METHODS, over_training, pair_diffs, plain_labels
from experiments.statistics import against, within_rows
from labels.votes import load_votes
from runtime import figures
from strength import groups, strength
from train import RewardVariant

NUM_GROUPS = 10


def ensure_vote(config, slot):
    """-> Run, mean strength of training pairs (N,), of validation pairs (N',)"""
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    votes = load_votes(run)
    return run, strength(votes["train"])[0], strength(votes["valid"])[0]


def train_treated(run, mean, method):
    """Train treated_METHOD.pt on all pairs.  -> diffs on validation pairs, (epochs, N)"""
    labels = train.treat_pairs(run, method, mean)
    return pair_diffs(train.train_reward_variant(run, f"treated_{method}", labels, run.valid.rows))


# -----------------------------------------------------------------------------------------------
# Fig. 8

def plot_treatments(summary, path):
    panels = {
        "accuracy by the labels": "curve: labels",
        "accuracy by gold": "curve: gold",
        "where label and gold agree": "curve: intersection",
        "validation loss": "curve: loss",
    }
    figures.by_epoch(summary, path, "Fig. 8: all data, every treatment", panels)


@experiment(
    "treatments", figure="Fig. 8", plot=plot_treatments,
    comparisons=against(
        "baseline", "labels, end", "gold, end",
        without=["longer answer wins", "vote of the members"],
    ),
)
def treatments(config, slot=0):
    """Every treatment on all pairs over the epochs: by the labels, by gold, where the two agree."""
    run, mean, _ = ensure_vote(config, slot)
    gold = gold_diffs(run, "valid")
    rows = {}
    for method in METHODS:
        rows[method] = over_training(train_treated(run, mean, method), gold)
    rows["longer answer wins"] = length_accuracy(run.valid.pairs, gold)
    return rows


def length_accuracy(pairs, gold):
    """Columns of the rule that the longer answer wins.  gold: (N,) gold differences, or None"""
    lengths = lengths_of(pairs)
    by_labels = longer_wins(lengths)
    row = {"labels, end": float(by_labels.mean())}
    if gold is not None:
        row["gold, end"] = float(longer_wins(lengths, gold).mean())
        row["intersection, end"] = float(by_labels[gold > 0].mean())
    return row


def plot_reliability(summary, path):
    figures.overlay(
        summary, path,
        "How sure each treatment is, and how often it is right (validation labels)",
        ("curve: confidence", "curve: share right"), ("confidence", "share right"), (0.5, 1),
    )


@experiment(
    "reliability", plot=plot_reliability, comparisons=against("baseline", "nll", "ece"),
)
def reliability(config, slot=0):
    """Confidence and accuracy of the models of each treatment, in tenths of validation pairs."""
    run, mean, _ = ensure_vote(config, slot)
    return {method: confidence(train_treated(run, mean, method)[-1]) for method in METHODS}


def confidence(diffs):
    """Confidence sigmoid(|d|) against the share of labels ranked right.  diffs: (N,) -> columns"""
    sureness = 1 / (1 + np.exp(-np.abs(diffs)))
    by_sureness = sureness.argsort(kind="stable")
    tenths = [index for index in np.array_split(by_sureness, 10) if len(index)]
    return {
        "accuracy": float((diffs > 0).mean()),
        "confidence": float(sureness.mean()),
        "nll": float(np.logaddexp(0, -diffs).mean()),
        "ece": calibration(diffs)["ece"],
        "curve: confidence": [float(sureness[index].mean()) for index in tenths],
        "curve: share right": [float((diffs[index] > 0).mean()) for index in tenths],
    }


# -----------------------------------------------------------------------------------------------
# Fig. 27, 28

def plot_bins(summary, path):
    panels = {}
    for ylabel, kind in (("accuracy by the labels", "labels"), ("accuracy by gold", "gold")):
        panels[ylabel] = {method: f"{method}: {kind}" for method in METHODS}
    title = "Fig. 27, 28: where treatments differ"
    figures.by_row(
        summary, path, title, "strength group of validation pairs, weakest first", panels
    )


@experiment("bins", figure="Fig. 27, 28", plot=plot_bins)
def bins(config, slot=0):
    """The treatments compared within ten groups of validation pairs of ascending strength."""
    run, mean, valid_mean = ensure_vote(config, slot)
    gold = gold_diffs(run, "valid")
    group = groups(valid_mean, NUM_GROUPS).numpy()
    rows = {str(g + 1): {} for g in range(NUM_GROUPS)}
    for method in METHODS:
        diffs = train_treated(run, mean, method)[-1]
        for g in range(NUM_GROUPS):
            in_group = group == g
            row = rows[str(g + 1)]
            row[f"{method}: labels"] = float((diffs[in_group] > 0).mean())
            if gold is not None:
                row[f"{method}: gold"] = float((diffs[in_group] * gold[in_group] > 0).mean())
    return rows


# -----------------------------------------------------------------------------------------------
# Fig. 19, 20

def plot_inflation(summary, path):
    panels = {
        "mean reward of the chosen": "curve: chosen",
        "mean reward of the rejected": "curve: rejected",
        "gap": "curve: gap",
    }
    title = "Fig. 19, 20: rewards over training (plain model)"
    figures.by_epoch(summary, path, title, panels, "eighths of an epoch")


@experiment(
    "inflation", figure="Fig. 19, 20", plot=plot_inflation,
    comparisons=within_rows({"gap at the end": "gap after one epoch"}),
)
def inflation(config, slot=0):
    """Mean reward of chosen and rejected answers over training, and their gap, untreated labels."""
    run = train.ensure_stages(config, "sft", slot=slot)
    train_rows = run.train.rows[:500]
    valid_rows = run.valid.rows[:500]
    rewards = train.train_reward_variant(
        run, "inflation", plain_labels(run), train_rows + valid_rows,
        RewardVariant(evals_per_epoch=8),
    )
    epochs = config.reward.epochs
    return {
        "training pairs": mean_rewards(rewards[:, :len(train_rows)], epochs),
        "validation pairs": mean_rewards(rewards[:, len(train_rows):], epochs),
    }


def mean_rewards(rewards, epochs):
    """Mean rewards over training, relative to the first evaluation: rewards have no zero.

    rewards: (E, n, 2) of chosen and rejected -> columns
    """
    chosen, rejected = (rewards.mean(1) - rewards[0].mean()).unbind(1)
    gap = chosen - rejected
    return {
        "gap after one epoch": float(gap[len(gap) // epochs - 1]),
        "gap at the end": float(gap[-1]),
        "chosen at the end": float(chosen[-1]),
        "rejected at the end": float(rejected[-1]),
        "curve: chosen": chosen.tolist(),
        "curve: rejected": rejected.tolist(),
        "curve: gap": gap.tolist(),
    }
