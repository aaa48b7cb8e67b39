"""What preference strength looks like: Fig. 1, 2 and 3; how alike the members of the
ensemble are, and which answers the labels of low strength prefer."""
import numpy as np
import torch

import train
from evaluate import gold_diffs, label_errors, lengths_of, longer_wins
from experiments.registry import experiment
from experiments.shared import mean_correlation, need_truth
from experiments.statistics import couples
from labels.votes import load_votes
from runtime import figures
from strength import groups, strength

NUM_GROUPS = 20


def plot_histograms(summary, path):
    figures.curves_xy(
        summary, path, "Fig. 1: preference strength",
        ("curve: value", "curve: density"), "density of training pairs",
    )


@experiment("histograms", figure="Fig. 1", plot=plot_histograms)
def histograms(config, slot=0):
    """Distribution of mean and std of the vote over the training pairs."""
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    mean, std = strength(load_votes(run)["train"])
    return {"mean": distribution(mean.numpy()), "std": distribution(std.numpy())}


def distribution(values):
    """Quantiles, mode, and a histogram from the 0.1 % to the 99.9 % quantile.  (N,) -> columns"""
    low, high = np.quantile(values, [0.001, 0.999])
    density, edges = np.histogram(values, bins=np.linspace(low, high, 61), density=True)
    peak = density.argmax()
    return {
        "below zero": float(torch.from_numpy(values < 0).float().mean()),
        "mode": float(edges[peak:peak + 2].mean()),
        "quantile 5%": float(np.quantile(values, 0.05)),
        "quantile 50%": float(np.quantile(values, 0.5)),
        "quantile 95%": float(np.quantile(values, 0.95)),
        "curve: value": ((edges[1:] + edges[:-1]) / 2).tolist(),
        "curve: density": density.tolist(),
    }


def plot_groups(summary, path):
    panels = {
        "mean strength": {"": "mean"},
        "std": {"": "std"},
        "share of wrong labels": {"": "wrong labels"},
    }
    title = "Fig. 2: the vote in twenty groups of training pairs"
    figures.by_row(summary, path, title, "group, weakest first", panels)


@experiment("groups", figure="Fig. 2", plot=plot_groups)
def by_groups(config, slot=0):
    """Mean and std of the vote in twenty groups of training pairs of ascending strength."""
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    mean, std = strength(load_votes(run)["train"])
    group = groups(mean, NUM_GROUPS)
    errors = label_errors(run)
    rows = {}
    for g in range(NUM_GROUPS):
        in_group = group == g
        row = {"mean": float(mean[in_group].mean()), "std": float(std[in_group].mean())}
        if errors is not None:
            wrong = np.array(errors) != ""
            row["wrong labels"] = float(wrong[in_group.numpy()].mean())
        rows[str(g + 1)] = row
    return rows


def plot_agreement(summary, path):
    figures.by_row(
        summary, path, "Fig. 3: are the labels of validation pairs right?",
        "strength group, weakest first",
        {"agreement with the truth": {"": "agreement with the truth"}},
    )


@experiment("agreement", figure="Fig. 3", plot=plot_agreement)
def agreement(config, slot=0):
    """Agreement of validation labels with the truth (the paper: GPT-4), by strength group."""
    need_truth(config)
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    mean, _ = strength(load_votes(run)["valid"])
    group = groups(mean, NUM_GROUPS)
    gold = gold_diffs(run, "valid")
    rows = {}
    for g in range(NUM_GROUPS):
        in_group = group == g
        rows[str(g + 1)] = {
            "strength": float(mean[in_group].mean()),
            "agreement with the truth": float((gold[in_group.numpy()] > 0).mean()),
        }
    return rows


TENTHS = {"weakest tenth": 0, "strongest tenth": 9}


def plot_members(summary, path):
    columns = ["chosen ends with a question mark", "chosen is the longer"]
    title = "Which answers the labels of low and of high strength prefer"
    figures.bars(summary, path, title, columns, chance=None)


@experiment(
    "members", plot=plot_members,
    comparisons=couples(
        {"weakest tenth": "strongest tenth", "vote": "one member"},
        "chosen ends with a question mark", "chosen is the longer", "held out, labels",
    ),
)
def describe_members(config, slot=0):
    """How alike the members are, and which answers the weakest and strongest labels prefer."""
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    votes = load_votes(run)
    mean, std = strength(votes["train"])
    held_out = votes["valid"]
    rows = {
        "vote": {
            "held out, labels": float((held_out.mean(0) > 0).float().mean()),
            "below zero": float((mean < 0).float().mean()),
            "below zero by one std": float((mean < -std).float().mean()),
        },
        "one member": {
            "held out, labels": float((held_out > 0).float().mean()),
            "correlation with another, held out": mean_correlation(held_out),
        },
        "all pairs": preferred(run.train.pairs),
    }
    tenth = groups(mean, 10).tolist()
    for name, number in TENTHS.items():
        rows[name] = preferred([
            pair for pair, group in zip(run.train.pairs, tenth) if group == number
        ])
    return rows


def preferred(pairs):
    """What annotators chose in some pairs -> columns; of equal lengths half are the longer"""
    questions = [pair.chosen.rstrip().endswith("?") for pair in pairs]
    return {
        "chosen ends with a question mark": float(np.mean(questions)),
        "chosen is the longer": float(longer_wins(lengths_of(pairs)).mean()),
    }
