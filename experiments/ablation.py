"""Every part of the full recipe taken away alone, and added alone to the baseline.

The full recipe: members vote on the labels; the weakest tenth is flipped; margins; SimCSE; MetaRM
on answers of the SFT model; PPO-max.  The baseline: a plain reward model, and PPO without
normalised rewards, a critic that learns first, and demonstrations.
"""
import functools
import hashlib
from typing import NamedTuple

import numpy as np

import train
from common import load_model, member_names, reward_diffs
from evaluate import calibration, evaluate_policies, gold_diffs, lengths_of, longer_wins
from experiments.registry import experiment
from experiments.shared import change, need_truth
from experiments.shift_shared import gold_accuracy
from experiments.statistics import Comparison
from labels.votes import load_votes
from metarm import make_meta_step, sample_responses, split_ood_prompts
from model import RewardModel
from runtime import figures
from strength import strength

PARTS = ("vote", "flip", "margin", "simcse", "metarm", "ppo-max")
ADDED = ("flip", "margin", "simcse", "metarm", "ppo-max")  # the vote alone changes nothing
PPO_MAX = {"ppo.normalize": True, "ppo.critic_warmup_iters": 5, "ppo.ptx_coef": 0.1}
PLAIN_PPO = {"ppo.normalize": False, "ppo.critic_warmup_iters": 0, "ppo.ptx_coef": 0.0}
SIMCSE = {"contrast.term": "simcse", "contrast.dropout": 0.05}
FULL = "full recipe"
BASELINE = "baseline"
LONGER = "longer answer wins"
DROPPED = "full recipe, dropped for flipped"


class Recipe(NamedTuple):
    label: str         # its row in the table
    parts: frozenset   # of PARTS, and "drop"

    @property
    def reward(self):
        """Name of its reward model, which recipes of the same parts but for PPO share"""
        parts = sorted(self.parts - {"ppo-max"})
        if not self.parts & {"flip", "drop", "margin"}:
            parts = [part for part in parts if part != "vote"]  # nothing reads it
        return "_".join(["ablation", *parts])

    @property
    def policy(self):
        return self.reward + ("_max" if "ppo-max" in self.parts else "")


def recipes():
    full = frozenset(PARTS)
    listed = [Recipe(FULL, full)]
    listed += [Recipe(f"without {part}", full - {part}) for part in PARTS]
    listed.append(Recipe(DROPPED, full - {"flip"} | {"drop"}))
    listed.append(Recipe(BASELINE, frozenset()))
    for part in ADDED:
        voted = {"vote"} if part in ("flip", "margin") else set()
        listed.append(Recipe(f"with {part} alone", frozenset({part} | voted)))
    return listed


def ablation_comparisons(rows):
    """Without a part, or with dropped labels, against the full recipe; with one part alone, and the
    full recipe, against the baseline"""
    found = []
    for column in COMPARED:
        for row in rows:
            is_added = row == FULL or row.startswith("with ")
            has_same_model = "ppo-max" in row and not column.startswith("PPO")
            if row not in (BASELINE, LONGER) and not has_same_model:
                found.append(Comparison(row, BASELINE if is_added else FULL, column))
    return found


def labels_of(run, recipe, members):
    """The treatment of every training pair.  members: (M, N) reward differences of training pairs

    -> (swap, p, margin); without "vote" one member stands in for the mean of all
    """
    mean = members[0] if "vote" not in recipe.parts else strength(members)[0]
    swap, p, margin = train.treat_pairs(run, "baseline", mean)
    if "margin" in recipe.parts:
        margin = train.treat_pairs(run, "margin", mean)[2]
    if "flip" in recipe.parts:
        swap = train.treat_pairs(run, "flip", mean)[0]
        margin = margin.where(~swap, -margin)
    if "drop" in recipe.parts:
        p = train.treat_pairs(run, "drop", mean)[1]
    return swap, p, margin


def train_recipe(run, recipe, labels, samples):
    """Train the recipe's reward model, once.  samples: function -> Rows of answers of SFT"""
    if "simcse" in recipe.parts:
        run = run.with_settings(SIMCSE)
    cfg = run.cfg
    settings = [*train.section_settings(cfg, "reward", without=["methods"]),
                *train.section_settings(cfg, "contrast"), *train.TRAINING_SETTINGS]
    if "metarm" in recipe.parts:
        settings += train.section_settings(cfg, "meta", without=["rounds", "arms"])
        settings += ["ppo.max_new_tokens", "ppo.min_new_tokens"]
    joined = b"".join(column.numpy().tobytes() for column in labels)
    extra = {"treatment": hashlib.sha256(joined).hexdigest()[:16], **train.start_facts(run)}
    if not run.needs(recipe.reward, settings, ["sft", *member_names(cfg)], extra=extra):
        return
    meta_step = None
    if "metarm" in recipe.parts:
        meta_step = make_meta_step(run, samples(), cfg.meta, f"{cfg.seed} ablation")
    variant = train.RewardVariant("ablation", contrast=cfg.contrast, meta_step=meta_step)
    train.fit_reward_model(run, recipe.reward, cfg.reward, labels, variant)


def reward_columns(run, name):
    """Accuracy by gold in and out of distribution, and calibration by the labels"""
    model = load_model(run, RewardModel, name)
    diffs = reward_diffs(run, model, run.valid.rows).numpy()
    ood = []
    for domain, encoded in run.ood.items():
        ood.append(gold_accuracy(run, model, encoded.rows, gold_diffs(run, domain)))
    return {
        "gold accuracy": float((diffs * gold_diffs(run, "valid") > 0).mean()),
        "gold accuracy, ood": float(np.mean(ood)),
        "nll": float(np.logaddexp(0, -diffs).mean()),  # -log sigmoid(difference)
        "ece": calibration(diffs)["ece"],
    }


def length_columns(run):
    """Columns of the rule that the longer answer wins: accuracies by gold"""
    inside = longer_wins(lengths_of(run.valid.pairs), gold_diffs(run, "valid"))
    ood = []
    for domain, encoded in run.ood.items():
        ood.append(longer_wins(lengths_of(encoded.pairs), gold_diffs(run, domain)).mean())
    return {"gold accuracy": float(inside.mean()), "gold accuracy, ood": float(np.mean(ood))}


COMPARED = ("gold accuracy", "gold accuracy, ood", "nll", "ece", "PPO: gold reward",
            "PPO: gold reward, ood", "PPO: KL")


def plot_ablation(summary, path):
    columns = ["gold accuracy", "gold accuracy, ood"]
    figures.bars(summary, path, "The full recipe, without a part, and parts alone", columns)


@experiment(
    "ablation", base="metarm", plot=plot_ablation, comparisons=ablation_comparisons,
)
def compare_recipes(config, slot=0):
    """The full recipe without each part, and each part alone: reward models and policies."""
    need_truth(config)
    config = change(config, {"ensemble.members": max(4, config.ensemble.members)})
    run = train.ensure_stages(config, "sft", "ensemble", "strength", slot=slot)
    members = load_votes(run, ["train"])["train"]

    @functools.cache
    def samples():
        return sample_responses(run, "sft", run.train.pairs, seed=config.seed)[0]

    policies = {}
    for recipe in recipes():
        train_recipe(run, recipe, labels_of(run, recipe, members), samples)
        settings = PPO_MAX if "ppo-max" in recipe.parts else PLAIN_PPO
        train.train_policy_once(run.with_settings(settings), recipe.policy, recipe.reward)
        policies[recipe.label] = f"policy_{recipe.policy}"
    names = ["sft", *dict.fromkeys(policies.values())]
    inside = evaluate_policies(run, names, run.valid.pairs)
    outside = evaluate_policies(run, names, split_ood_prompts(run)[1])
    rows = {}
    for recipe in recipes():
        policy = policies[recipe.label]
        rows[recipe.label] = reward_columns(run, recipe.reward) | {
            "PPO: gold reward": inside[policy]["judge"],
            "PPO: win - lose": inside[policy]["win"] - inside[policy]["lose"],
            "PPO: gold reward, ood": outside[policy]["judge"],
            "PPO: KL": inside[policy]["kl"],
        }
    rows[LONGER] = length_columns(run)
    return rows
