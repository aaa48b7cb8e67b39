"""Reward models trained on subsets of the pairs by strength: Fig. 4, 5, 6, 21 and 22."""
import numpy as np

import train
from evaluate import gold_diffs, label_errors
from experiments.registry import experiment
from experiments.shared import over_training, pair_diffs, restrict
from experiments.statistics import against, couples, within_rows
from labels.votes import load_votes
from runtime import figures
from strength import groups, strength
from train import RewardVariant

PAPER_TENTHS = {  # validation accuracy of Llama-2-7B on HH-RLHF, read off the paper's Fig. 4 and 5
    "1": 0.327,
    "2": 0.347,
    "3": 0.446,
    "4": 0.561,
    "5": 0.653,
    "6": 0.680,
    "7": 0.684,
    "8": 0.683,
    "9": 0.674,
    "10": 0.659,
    "1 swapped": 0.666,
    "2 swapped": 0.648,
}
ACCURACY_CURVES = {"accuracy by the labels": "curve: labels", "accuracy by gold": "curve: gold"}


def ensure_vote(config, slot):
    """-> Run, mean strength of the training pairs (N,)"""
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    mean, _ = strength(load_votes(run)["train"])
    return run, mean


def train_subset(run, name, labels, keep, evals_per_epoch=1):
    """Train NAME.pt on the pairs of keep alone.  -> diffs on validation pairs, (E, N)

    labels: swap, p, margin; keep: (N,) bool; evals_per_epoch: 0 evaluates once, at the end
    """
    variant = RewardVariant(evals_per_epoch=evals_per_epoch)
    rewards = train.train_reward_variant(
        run, name, restrict(labels, keep), run.valid.rows, variant
    )
    return pair_diffs(rewards)


def without(row, *words):
    """The columns whose names hold none of the words."""
    return {name: value for name, value in row.items() if not any(word in name for word in words)}


# -----------------------------------------------------------------------------------------------
# Tenths

def train_tenths(config, slot, tenths, swap_too=False):
    """A reward model on each tenth alone; swap_too: and one on the tenth with swapped labels."""
    run, mean = ensure_vote(config, slot)
    group = groups(mean, 10)
    gold = gold_diffs(run, "valid")
    errors = label_errors(run)
    rows = {}
    for t in tenths:
        keep = group == t
        for swapped in (False, True) if swap_too else (False,):
            label = f"{t + 1} swapped" if swapped else str(t + 1)
            diffs = train_tenth(run, mean, keep, label, swapped)
            row = without(over_training(diffs, gold), "best", "intersection")
            row["the paper: labels"] = PAPER_TENTHS[label]
            if errors is not None:
                wrong = np.array(errors)[keep.numpy()] != ""
                row["wrong labels"] = float((wrong != swapped).mean())
            rows[label] = row
    return rows


def train_tenth(run, mean, keep, label, swapped):
    """Train tenth_LABEL.pt on the pairs of keep alone.  -> diffs on validation pairs, (E, N)"""
    swap, p, margin = train.treat_pairs(run, "baseline", mean)
    evals_per_epoch = 1 if label.split()[0] in ("1", "2", "10") else 0  # others draw no curve
    name = f"tenth_{label}".replace(" ", "_")
    return train_subset(run, name, (swap | swapped, p, margin), keep, evals_per_epoch)


def plot_deciles(summary, path):
    accuracy = {
        "by the labels": "labels, end",
        "by gold": "gold, end",
        "the paper, by the labels": "the paper: labels",
    }
    figures.by_row(
        summary, path, "Fig. 4: trained on one tenth alone",
        "tenth of the training pairs, weakest first",
        {"validation accuracy": accuracy, "validation loss": {"by the labels": "loss, end"}}, 0.5,
    )


@experiment(
    "deciles", figure="Fig. 4", plot=plot_deciles,
    comparisons=couples({"10": "8", "9": "8", "2": "1", "1": "5"}, "labels, end", "gold, end"),
)
def deciles(config, slot=0):
    """Reward models trained on one tenth of the pairs alone, by strength, weakest first."""
    return train_tenths(config, slot, range(10))


def plot_swapped(summary, path):
    title = "Fig. 5: the two weakest tenths alone, as they are and swapped"
    figures.by_epoch(summary, path, title, ACCURACY_CURVES)


@experiment(
    "swapped", figure="Fig. 5", plot=plot_swapped,
    comparisons=couples({"1 swapped": "1", "2 swapped": "2"}, "labels, end", "gold, end"),
)
def swapped(config, slot=0):
    """The two weakest tenths alone, with their labels as they are and swapped."""
    return train_tenths(config, slot, range(2), swap_too=True)


def plot_strongest(summary, path):
    panels = ACCURACY_CURVES | {"validation loss": "curve: loss"}
    figures.by_epoch(summary, path, "Fig. 6: the strongest tenth alone", panels)


@experiment(
    "strongest", figure="Fig. 6", plot=plot_strongest,
    comparisons=against("baseline", "labels, end", "gold, end", "loss, end"),
)
def strongest(config, slot=0):
    """The strongest tenth alone: plain, with the margin, with smoothed labels, with both."""
    run, mean = ensure_vote(config, slot)
    keep = groups(mean, 10) == 9
    gold = gold_diffs(run, "valid")
    rows = {}
    for method in ("baseline", "margin", "smooth", "smooth_margin"):
        name = "tenth_10" if method == "baseline" else f"tenth_10_{method}"
        diffs = train_subset(run, name, train.treat_pairs(run, method, mean), keep)
        rows[method] = over_training(diffs, gold)
    return rows


# -----------------------------------------------------------------------------------------------
# Growing subsets

def plot_subsets(summary, path):
    panels = {}
    for kind in ("labels", "gold"):
        panels[f"accuracy by {kind}"] = {
            "from the weakest up": f"weakest: {kind}, end",
            "from the strongest down": f"strongest: {kind}, end",
        }
    figures.by_row(
        summary, path, "Fig. 21, 22: growing subsets", "share of the training pairs", panels, 0.5
    )


@experiment(
    "subsets", figure="Fig. 21, 22", plot=plot_subsets,
    comparisons=within_rows({"strongest: gold, end": "weakest: gold, end"}),
)
def subsets(config, slot=0):
    """Subsets that grow from the weakest pairs up, and from the strongest down."""
    run, mean = ensure_vote(config, slot)
    labels = train.treat_pairs(run, "baseline", mean)
    group = groups(mean, 10)
    gold = gold_diffs(run, "valid")
    rows = {}
    for tenths in (3, 6, 9):
        row = rows[f"{tenths * 10} %"] = {}
        for end, keep in (("weakest", group < tenths), ("strongest", group >= 10 - tenths)):
            diffs = train_subset(run, f"{end}_{tenths}", labels, keep, evals_per_epoch=0)
            columns = without(over_training(diffs, gold), "best", "intersection")
            row |= {f"{end}: {name}": value for name, value in columns.items()}
    return rows
