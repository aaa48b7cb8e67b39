"""The paper's own votes: Fig. 1, 2 and 3 from the scores of its ten 7B models.

    python -m experiments published --seeds=0 --data.train=train.json.gz --data.valid=valid.json.gz

The files are those of fnlp/hh-rlhf-strength-cleaned: HH-RLHF with ten scores of both answers, and
GPT-4's label on the validation pairs.  Nothing is trained.  With --model.init=DIR the voters of
configs/clean.toml vote on the same training pairs, and their votes are compared with the paper's.
"""
import numpy as np
import torch
from scipy.stats import spearmanr

import train
from config import ConfigError
from data import DataError, load_pairs
from experiments.registry import experiment
from experiments.shared import change
from formats.values import to_number
from labels.given import votes_of
from labels.votes import load_votes
from runtime import figures
from strength import groups, strength

NUM_GROUPS = 20
GROUP_SIZE = 500  # validation pairs in each group of the paper's Fig. 3
# Read off the paper's figures, to about .003
PAPER_BELOW_ZERO = 0.25
PAPER_GROUP_MEANS = (
    -1.22, -0.58, -0.34, -0.17, -0.04, 0.07, 0.18, 0.28, 0.38, 0.49,
    0.60, 0.72, 0.85, 0.99, 1.15, 1.34, 1.57, 1.87, 2.32, 3.43,
)
PAPER_AGREEMENT = {"lowest": 0.164, "nearest zero": 0.544, "highest": 0.956}


def votes_of_pairs(pairs):
    """The scores of a file's own records -> (M, N) reward differences.  Raises DataError"""
    votes = [votes_of(pair.record, pair.source) for pair in pairs]
    counts = {len(own) for own in votes}
    if len(counts) != 1:
        raise DataError(f"{pairs[0].source}: records have {min(counts)} to {max(counts)} votes; "
                        "every record needs the same voters")
    return torch.tensor(votes).T


def judge_labels(pairs):
    """GPT-4's label of each pair -> (N,) 1 chosen, 0 rejected, -1 none"""
    labels = []
    for pair in pairs:
        by_name = {key.replace("_", " "): value for key, value in pair.record.items()}
        labels.append(to_number(by_name.get("GPT4 label", -1)))
    return np.array([-1 if label is None else label for label in labels])


def group_rows(mean, std):
    """Fig. 2: mean and std in twenty groups of ascending strength, beside the paper's means"""
    group = groups(mean, NUM_GROUPS)
    rows = {}
    for g in range(NUM_GROUPS):
        rows[str(g + 1)] = {
            "mean": float(mean[group == g].mean()),
            "the paper: mean": PAPER_GROUP_MEANS[g],
            "std": float(std[group == g].mean()),
        }
    return rows


def agreement_rows(mean, labels):
    """Fig. 3: GPT-4's agreement with the label in three groups of validation pairs by strength.

    mean: (N,) tensor; labels: (N,) of judge_labels, pairs without one are left out
    """
    has_label = labels >= 0
    labels = labels[has_label]
    mean = mean.numpy()[has_label]
    if len(mean) < 3:
        return {}
    size = min(GROUP_SIZE, len(mean) // 3)
    order = mean.argsort(kind="stable")
    nearest = np.abs(mean).argsort(kind="stable")[:size]
    chosen = {"lowest": order[:size], "nearest zero": nearest, "highest": order[-size:]}
    rows = {}
    for name, index in chosen.items():
        rows[f"{name} {size}"] = {
            "strength": float(mean[index].mean()),
            "agreement": float(labels[index].mean()),
            "the paper: agreement": PAPER_AGREEMENT[name],
        }
    return rows


def own_votes(config, slot):
    """Mean of the voters of configs/clean.toml on the training pairs -> (N,), Run"""
    run = train.ensure_stages(config, "ensemble", "strength", slot=slot)
    return strength(load_votes(run, ["train"])["train"])[0], run


def plot_published(summary, path):
    rows = {name: row for name, row in summary.items() if name.isdigit()}
    panels = {
        "mean strength": {"ten 7B models": "mean", "read off the paper": "the paper: mean"},
        "std": {"ten 7B models": "std"},
    }
    title = "Fig. 2: the published votes in twenty groups"
    figures.by_row(rows, path, title, "group, weakest first", panels)


@experiment("published", figure="Fig. 1, 2, 3", base="clean", plot=plot_published)
def published(config, slot=0):
    """The published votes of ten 7B models beside the numbers read off the paper."""
    if config.data.train == ("world",):
        raise ConfigError("data.train: name the file of published votes; docs/results/strength.md "
                          "says where to get it")
    if not config.data.valid:
        config = change(config, {"data.valid_share": 0.0})
    pairs = load_pairs(config)
    mean, std = strength(votes_of_pairs(pairs["train"]))
    rows = {"training pairs": {
        "pairs": float(len(mean)),
        "below zero": float((mean < 0).float().mean()),
        "the paper: below zero": PAPER_BELOW_ZERO,
        "median": float(mean.median()),
        "median std": float(std.median()),
    }}
    rows |= group_rows(mean, std)
    if pairs["valid"]:
        valid_mean, _ = strength(votes_of_pairs(pairs["valid"]))
        rows |= agreement_rows(valid_mean, judge_labels(pairs["valid"]))
    if config.model.init != "scratch":
        ours, run = own_votes(config, slot)
        theirs, _ = strength(votes_of_pairs(run.train.pairs))
        correlation = float(spearmanr(ours.numpy(), theirs.numpy()).statistic)
        rows["training pairs"]["rank correlation with our vote"] = correlation
    return rows
