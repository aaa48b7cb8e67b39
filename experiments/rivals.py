"""Rivals of the vote: other ways to find wrong labels and to train in spite of them.

    vote           mean reward difference of M members: the labels that it contradicts are flipped
                   or dropped, or every label is softened by it (the paper)
    one model      its reward difference; training as usual
    redescending   a loss whose gradient vanishes on contradicted labels (arXiv 2505.17859)
    EM             the posterior that a label is right, with an estimated noise rate, as a soft
                   label; three rounds of one model (arXiv 2509.24159)
    two models     each leaves out what the other contradicts; two rounds (arXiv 2505.10597, which
                   selects within every batch)

Each method estimates the share of wrong labels from the data alone.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import losses
import train
from evaluate import gold_diffs, label_errors
from experiments.detectors import AMBIGUOUS
from experiments.registry import experiment
from experiments.shared import (
    change,
    final_diffs,
    mean_correlation,
    need_truth,
    plain_labels,
)
from experiments.statistics import Comparison, against
from labels.votes import load_votes
from runtime import figures
from strength import auroc, average_precision, strength, treat

FLIP_SHARES = (0.1, 0.2, 0.4)
PANELS = {  # y label of the figure -> column
    "AUROC, flipped labels": "flips: AUROC",
    "estimated share of wrong labels": "share wrong, estimated",
    "accuracy by gold": "gold, end",
}
GAMMA = 0.5      # of the redescending loss
EM_ROUNDS = 3
PEER_ROUNDS = 2


class Judgement(NamedTuple):
    """What a method makes of the training labels."""
    diffs: torch.Tensor  # (N,) low: the label is likely wrong
    share: float         # of wrong labels, as the method estimates it
    cost: float          # in trainings of a member
    trained: dict        # {row: (N',) reward differences on validation pairs}


def redescending_loss(chosen, rejected, margin, p):
    """losses.redescending in the place of bradley_terry; margin and p are not used"""
    return losses.redescending(chosen, rejected, GAMMA)


def contradicted(diffs):
    """Share of labels that the reward differences contradict: the estimate of all methods but EM"""
    return float((torch.as_tensor(diffs) < 0).double().mean())


# --------------------------------------------------------------------------------------------------
# The methods


def by_vote(run):
    """The paper's; the estimated share of labels, and not a given one, is flipped or dropped."""
    members = load_votes(run, ["train"])["train"]
    mean, _ = strength(members)
    share = contradicted(mean)
    trained = {}
    for method in ("flip", "drop", "flip_soft", "soft"):
        labels = treat(mean, method, q=share)
        name = f"rival_vote_{method}"
        trained[f"vote, {method}"] = final_diffs(run, name, labels, run.valid.rows, run.cfg.reward)
    return Judgement(mean, share, float(len(members)), trained)


def by_one_model(run):
    """A member, and a reward model trained as usual"""
    diffs = load_votes(run, ["train"])["train"][0]
    labels = plain_labels(run)
    trained = {
        "one model": final_diffs(run, "rival_plain", labels, run.valid.rows, run.cfg.reward),
    }
    return Judgement(diffs, contradicted(diffs), 1.0, trained)


def by_redescending_loss(run):
    labels = plain_labels(run)
    diffs = final_diffs(
        run, "rival_redescending_0", labels, run.train.rows, run.cfg.ensemble,
        loss_of=redescending_loss,
    )
    trained = {"redescending": final_diffs(
        run, "rival_redescending", labels, run.valid.rows, run.cfg.reward,
        loss_of=redescending_loss,
    )}
    return Judgement(torch.from_numpy(diffs), contradicted(diffs), 1.0, trained)


def posterior(diffs, iterations=200):
    """Probability that each label is right, and the share of wrong ones, by EM.

        w = (1 - e) sigmoid(d) / ((1 - e) sigmoid(d) + e sigmoid(-d)),   e = mean(1 - w)

    The model says with which probability each label would be drawn; e is how often labels are
    turned over.  diffs: (N,) -> w (N,), e
    """
    diffs = torch.as_tensor(diffs).double()
    log_right = F.logsigmoid(diffs)
    log_wrong = F.logsigmoid(-diffs)
    e = torch.tensor(0.1, dtype=torch.float64)
    for _ in range(iterations):
        w = torch.sigmoid(torch.log1p(-e) + log_right - torch.log(e) - log_wrong)
        e = (1 - w).mean().clamp(1e-6, 0.5)
    return w.float(), float(e)


def by_em(run):
    swap, p, margin = plain_labels(run)
    for number in range(EM_ROUNDS):
        diffs = final_diffs(
            run, f"rival_em_{number}", (swap, p, margin), run.train.rows, run.cfg.ensemble
        )
        p, share = posterior(diffs)
    trained = {"EM": final_diffs(
        run, "rival_em", (swap, p, margin), run.valid.rows, run.cfg.reward
    )}
    return Judgement(torch.from_numpy(diffs), share, float(EM_ROUNDS), trained)


def by_two_models(run):
    """Models a and b start from different orders; each then learns from what the other believes."""
    labels = plain_labels(run)
    kept = {"a": labels, "b": labels}
    for number in range(PEER_ROUNDS + 1):
        diffs = {}
        for name, order in (("a", "reward"), ("b", "reward 1")):
            diffs[name] = final_diffs(
                run, f"rival_peer_{name}{number}", kept[name], run.train.rows, run.cfg.ensemble,
                seed_key=order,
            )
        for name, peer in (("a", "b"), ("b", "a")):
            swap, p, margin = labels
            believed = torch.from_numpy(diffs[peer] > 0)
            kept[name] = (swap, p.where(believed, torch.nan), margin)
    mean = torch.from_numpy(diffs["a"] + diffs["b"]) / 2
    trained = {"two models": final_diffs(
        run, "rival_peers", kept["a"], run.valid.rows, run.cfg.reward
    )}
    return Judgement(mean, contradicted(mean), 2.0 * (PEER_ROUNDS + 1), trained)


METHODS = {
    "one model": by_one_model,
    "vote": by_vote,
    "redescending": by_redescending_loss,
    "EM": by_em,
    "two models": by_two_models,
}


# --------------------------------------------------------------------------------------------------
# The experiment


def rival_comparisons(rows):
    """Trained models against plain training and against the flipped vote, detectors against the
    vote, at each share"""
    found = []
    for row in rows:
        share, _, name = row.partition(": ")
        for reference in ("one model", "vote, flip"):
            is_other = name not in ("one model", reference)
            if is_other and f"{share}: {reference}" in rows:
                found.append(Comparison(row, f"{share}: {reference}", "gold, end"))
        if name in METHODS and name != "vote":
            found.append(Comparison(row, f"{share}: vote", "flips: AUROC"))
    return found


def plot_rivals(summary, path):
    """A line a method over the share of flips: what it finds, its estimate, its reward model"""
    by_share = {}
    for row, columns in summary.items():
        share, _, method = row.partition(": ")
        for column, value in columns.items():
            by_share.setdefault(share, {})[f"{method}: {column}"] = value
    methods = dict.fromkeys(row.partition(": ")[2] for row in summary)
    panels = {}
    for ylabel, column in PANELS.items():
        panels[ylabel] = {method: f"{method}: {column}" for method in methods}
    panels["estimated share of wrong labels"]["the true share"] = "vote: share wrong"
    figures.by_row(by_share, path, "Rivals of the vote", "share of labels flipped", panels, 0.5)


@experiment("rivals", plot=plot_rivals, comparisons=rival_comparisons)
def compare_rivals(config, slot=0):
    """The vote and its rivals with 10, 20 and 40 % of the labels flipped: detection, accuracy."""
    need_truth(config)
    rows = {}
    for flip in FLIP_SHARES:
        settings = {
            "world.flip": flip,
            "world.bias": 0.0,
            "out_dir": f"{config.out_dir}_flip_{flip}",
        }
        run = train.ensure_stages(
            change(config, settings), "sft", "ensemble", "strength", slot=slot
        )
        for name, row in measure(run).items():
            rows[f"{flip:.0%}: {name}"] = row
    return rows


def measure(run):
    """-> {method or treatment: columns}"""
    errors = np.array(label_errors(run))
    flipped = torch.from_numpy(errors == "flip")
    gold = gold_diffs(run, "valid")
    rows = {}
    for name, judge in METHODS.items():
        found = judge(run)
        rows.setdefault(name, {}).update({
            "flips: AUROC": auroc(-found.diffs, flipped),
            "flips: AP": average_precision(-found.diffs, flipped),
            "share wrong, estimated": found.share,
            "share wrong": float((errors != "").mean()),
            "runs": found.cost,
        })
        for row, diffs in found.trained.items():
            rows.setdefault(row, {})["gold, end"] = float((diffs * gold > 0).mean())
    return rows


# --------------------------------------------------------------------------------------------------
# What members differ by (arXiv 2312.09244)


SOURCES = {  # what differs between the members beside the order of the data
    "order": (),
    "order and head": ("head",),
    "order, head and SFT": ("head", "sft"),
}


def train_members(run, sources):
    """cfg.ensemble.members reward models -> (M, N) reward differences of the training pairs"""
    diffs = []
    for m in range(run.cfg.ensemble.members):
        language_model = "sft"
        if "sft" in sources and m:
            language_model = f"sft_{m}"
            train_other_sft(run, language_model, m)
        head_seed = 1000 * m + run.cfg.seed if "head" in sources and m else None
        name = "_".join(["diverse", *sources, str(m)])
        diffs.append(final_diffs(
            run, name, plain_labels(run), run.train.rows, run.cfg.ensemble,
            seed_key=f"reward {m}", language_model=language_model, head_seed=head_seed,
        ))
    return torch.from_numpy(np.stack(diffs))


def train_other_sft(run, name, number):
    """An SFT model on the same demonstrations, from other weights and in another order"""
    settings = ["sft.epochs", "sft.batch", "sft.lr", *train.TRAINING_SETTINGS]
    if not run.needs(name, settings, ["sft"]):
        return
    model = train.init_sft_model(run.with_settings({"seed": 1000 * number + run.cfg.seed}))
    train.fit_language_model(run, name, model, train.sft_rows(run))


def diversity_columns(diffs, flipped, ambiguous):
    """diffs: (M, N); flipped, ambiguous: (N,) bool -> what mean and std of the votes say"""
    mean, std = strength(diffs)
    return {
        "correlation of two members": mean_correlation(diffs),
        "flips: AUROC of the mean": auroc(-mean, flipped),
        "flips: AUROC of the std": auroc(std, flipped),
        "ambiguous: AUROC of -|mean|": auroc(-mean.abs(), ambiguous),
        "ambiguous: AUROC of the std": auroc(std, ambiguous),
    }


def plot_diversity(summary, path):
    columns = ["flips: AUROC of the mean", "flips: AUROC of the std",
               "ambiguous: AUROC of the std"]
    figures.bars(summary, path, "Members that differ by more than the order of the data", columns)


@experiment(
    "diversity",
    plot=plot_diversity,
    comparisons=against("order", "flips: AUROC of the mean", "flips: AUROC of the std",
                        "ambiguous: AUROC of the std"),
)
def compare_diversity(config, slot=0):
    """Members whose heads, or whose SFT models, differ by seed, and what their std says."""
    need_truth(config)
    run = train.ensure_stages(config, "sft", slot=slot)
    flipped = torch.from_numpy(np.array(label_errors(run)) == "flip")
    ambiguous = torch.from_numpy(np.abs(gold_diffs(run, "train")) < AMBIGUOUS)
    rows = {}
    for label, sources in SOURCES.items():
        rows[label] = diversity_columns(train_members(run, sources), flipped, ambiguous)
    return rows
