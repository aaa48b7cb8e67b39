"""Functions that several experiments share.

An experiment is a function of a configuration (with its seed and folder) that returns
{row: {column: number or list}}.  What it trains stays in the run's folder under a name of its own
and is trained once, so experiments share what they have in common.  "gold" is the true quality of
the built-in world, "labels" are the labels of the data, noise included; validation labels are never
treated.  On files the truth is not known: columns that need it are missing.
"""
import numpy as np
import torch

import train
import world
from common import policy_prompts, training_prompts, world_demonstrations
from config import ConfigError, assign
from data import Pair
from strength import treat

PAPER_METHODS = (  # Fig. 8
    "baseline", "margin", "flip", "soft_margin", "soft_target_margin", "flip_margin",
)
METHODS = (*PAPER_METHODS, "smooth", "soft", "drop", "flip_soft")


# -----------------------------------------------------------------------------------------------
# Configurations

def change(config, settings):
    """config with several settings changed.  settings: {"section.key": value}"""
    for key, value in settings.items():
        config = assign(config, key, value)
    return config


def knows_truth(config):
    return config.data.train == ("world",)


def need_truth(config):
    """Raise ConfigError, before anything is trained, if the data are files."""
    if not knows_truth(config):
        raise ConfigError(
            f"data.train = {','.join(config.data.train)!r}: this experiment needs a known truth, "
            "which files do not have; leave it as world"
        )


# -----------------------------------------------------------------------------------------------
# Test prompts

DRAWS = 50  # for each prompt that is wanted


def unseen_prompts(run, domains, key, others=()):
    """evaluate.prompts prompts of some domains that SFT and PPO do not train on word for word.

    Short prompts, without introduction or earlier turn, are nearly all trained on, so those that
    are left are longer than the ones that PPO draws; nearly all of their questions are known.
    key: of the random numbers; others: texts of more prompts to leave out
    -> [(text, token ids)], as from policy_prompts
    Raises ConfigError if DRAWS * evaluate.prompts draws contain too few.
    """
    count = run.cfg.evaluate.prompts
    seen = {demo["prompt"] for demo in world_demonstrations(run.cfg)}
    seen.update(pair.prompt for pair in training_prompts(run))
    seen.update(others)
    drawn = world.demonstrations(DRAWS * count, key, domains=domains)
    new = [text for text in dict.fromkeys(demo["prompt"] for demo in drawn) if text not in seen]
    if len(new) < count:
        raise ConfigError(
            f"evaluate.prompts = {count}: only {len(new)} prompts of {', '.join(domains)} were "
            "found that training does not have; lower it, world.pairs or world.demonstrations"
        )
    return policy_prompts(run, [Pair(text, "", "") for text in new[:count]])


# -----------------------------------------------------------------------------------------------
# Reward models on pairs

def restrict(labels, keep):
    """The same treatment, with all other pairs left out of training.

    labels: swap (N,), p (N,), margin (N,); keep: (N,) bool -> swap, p (nan outside keep), margin
    """
    swap, p, margin = labels
    return swap, torch.where(keep, p, torch.nan), margin


def plain_labels(run):
    """Every training pair as it is labelled -> swap, p, margin"""
    return treat(torch.zeros(len(run.train.rows)), "baseline")


def pair_diffs(rewards):
    """r(chosen) - r(rejected) over training.  (E, N, 2) tensor -> (E, N) array"""
    return (rewards[..., 0] - rewards[..., 1]).numpy()


def final_diffs(run, name, labels, rows, cfg=None, **variant):
    """Train a reward model on some labels -> its reward differences of the rows at the end, (n,)

    labels, cfg: as in train.train_reward_variant; variant: fields of train.RewardVariant
    """
    variant = train.RewardVariant(evals_per_epoch=0, **variant)
    return pair_diffs(train.train_reward_variant(run, name, labels, rows, variant, cfg))[-1]


def mean_correlation(diffs):
    """Of two members' reward differences, mean over all couples.  (M >= 2, N) tensor -> float"""
    correlation = np.corrcoef(diffs.numpy())
    return float(correlation[np.triu_indices(len(diffs), 1)].mean())


def over_training(diffs, gold):
    """Accuracies of a reward model at its best evaluation and at the last one, and their curves.

    diffs: (E, N) reward differences on validation pairs, one row an evaluation
    gold: (N,) gold differences, or None -> columns of a row; "intersection": label and gold agree
    """
    curves = {"labels": (diffs > 0).mean(1)}
    if gold is not None:
        curves["gold"] = (diffs * gold > 0).mean(1)
        curves["intersection"] = (diffs[:, gold > 0] > 0).mean(1)
    row = {}
    for name, curve in curves.items():
        row[f"{name}, best epoch"] = float(curve.max())
        row[f"{name}, end"] = float(curve[-1])
    curves["loss"] = np.logaddexp(0, -diffs).mean(1)  # -log sigmoid(difference)
    row["loss, end"] = float(curves["loss"][-1])
    for name, curve in curves.items():
        row[f"curve: {name}"] = curve.tolist()
    return row
