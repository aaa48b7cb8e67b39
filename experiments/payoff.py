"""Where cleaning labels stops paying (open question 2): by the size of the model, by dropout and
weight decay, and by the number of pairs, with 10 and 30 % of the labels flipped."""
import itertools
from typing import NamedTuple

import numpy as np

import train
from evaluate import gold_diffs
from experiments.registry import experiment
from experiments.shared import change, final_diffs, need_truth
from experiments.statistics import within_rows
from labels.votes import load_votes
from runtime import figures
from strength import strength

FLIP_SHARES = (0.1, 0.3)
WIDTHS = (64, 128, 256)
PAIRS = (1250, 5000)
REGULARIZED = {  # label -> settings, at the middle width and the fewest pairs
    "dropout 0.1": {"model.dropout": 0.1},
    "weight decay 0": {"train.weight_decay": 0.0},
    "weight decay 0.3": {"train.weight_decay": 0.3},
}
TREATED = ("flip", "soft")


class Cell(NamedTuple):
    """One setting of the grid."""
    flip: float
    label: str       # without the share of flips
    settings: dict

    @property
    def row(self):
        return f"{self.flip:.0%} flipped, {self.label}"

    @property
    def folder(self):
        return self.row.replace("%", "").replace(",", "").replace(" ", "_")


def cells():
    grid = []
    for flip in FLIP_SHARES:
        for width in WIDTHS:
            for pairs in PAIRS:
                settings = {"model.width": width, "world.pairs": pairs}
                grid.append(Cell(flip, f"width {width}, {pairs} pairs", settings))
        base = {"model.width": WIDTHS[1], "world.pairs": PAIRS[0]}
        for label, settings in REGULARIZED.items():
            grid.append(Cell(flip, label, base | settings))
    return grid


def measure_cell(config, cell, slot):
    """-> accuracy by gold of the plain reward model and of each treatment, and their differences"""
    settings = {
        "world.flip": cell.flip,
        "world.bias": 0.0,
        "out_dir": f"{config.out_dir}_{cell.folder}",
        **cell.settings,
    }
    run = train.ensure_stages(change(config, settings), "sft", "ensemble", "strength", slot=slot)
    mean, _ = strength(load_votes(run, ["train"])["train"])
    q = float((mean < 0).double().mean())  # the share that the vote contradicts, not the true one
    gold = gold_diffs(run, "valid")
    run = run.with_settings({"strength.q": q})
    row = {"share contradicted": q}
    for method in ("baseline", *TREATED):
        labels = train.treat_pairs(run, method, mean)
        diffs = final_diffs(run, f"treated_{method}", labels, run.valid.rows)
        row[method] = float((diffs * gold > 0).mean())
    for method in TREATED:
        row[f"{method} - baseline"] = row[method] - row["baseline"]
    return row


def plot_payoff(summary, path):
    """Gain of each treatment over the plain reward model, by width and number of pairs"""
    panels = {}
    for flip, method in itertools.product(FLIP_SHARES, TREATED):
        grid = np.full((len(WIDTHS), len(PAIRS)), np.nan)
        for i, width in enumerate(WIDTHS):
            for j, pairs in enumerate(PAIRS):
                row = summary[Cell(flip, f"width {width}, {pairs} pairs", {}).row]
                grid[i, j] = row[f"{method} - baseline"]["mean"]
        panels[f"{flip:.0%} flipped: {method}"] = grid
    figures.heat_maps(
        panels, path, "Accuracy by gold: treated minus plain", "pairs", PAIRS, "width", WIDTHS
    )


@experiment(
    "payoff", plot=plot_payoff, comparisons=within_rows(dict.fromkeys(TREATED, "baseline")),
)
def compare_payoffs(config, slot=0):
    """Treatments by width, number of pairs, dropout and weight decay: where cleaning pays."""
    need_truth(config)
    return {cell.row: measure_cell(config, cell, slot) for cell in cells()}
