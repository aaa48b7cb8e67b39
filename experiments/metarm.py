"""Rounds of MetaRM against plain steps and PPO alone (the paper's Fig. 15, 16, Tables 2 and 3).

An arm is a way to continue training the reward model before each round of PPO: "meta" by MetaRM,
"plain" by ordinary steps on the same pairs, "none" not at all.  "plain PPO" is the policy of the
first reward model alone.
"""
from dataclasses import asdict
from typing import NamedTuple

import torch

import train
from config import ConfigError
from evaluate import evaluate_policies, gold_diffs
from experiments.registry import experiment
from experiments.shared import change, need_truth
from experiments.shift_shared import gold_accuracy, label_accuracies, reward_spread
from metarm import make_meta_step, meta_rounds, sample_responses, split_ood_prompts
from runtime import figures
from strength import treat

ROUND_PANELS = {  # y label -> column
    "gold reward": "gold reward",
    "wins − losses against plain PPO": "win - lose against plain PPO",
    "gold reward, out of distribution": "gold reward, ood",
    "reward model: accuracy by gold": "reward model: gold accuracy",
}
NOISE_PANELS = {
    "accuracy by gold": "gold accuracy",
    "answers of the policy ranked right": "ranked right",
    "wins − losses against SFT": "win - lose",
}
NOISE_ARMS = ("plain PPO", "plain", "meta")
FLIP_SHARES = (0.0, 0.1, 0.2, 0.3)


# --------------------------------------------------------------------------------------------------
# Rounds: Tables 2 and 3, Fig. 15


def policy_columns(scores, plain, where):
    """Columns of one policy on one set of prompts.

    scores: the policy's entry in evaluate_policies; plain: name of the policy of plain PPO
    where: suffix of the columns, "" or ", ood"
    """
    columns = {
        f"win{where}": scores["win"],
        f"tie{where}": scores["tie"],
        f"lose{where}": scores["lose"],
        f"gold reward{where}": scores["judge"],
        f"KL{where}": scores["kl"],
    }
    against = scores.get(f"against {plain}")
    if against is not None:
        for outcome, share in against.items():
            columns[f"{outcome} against plain PPO{where}"] = share
        difference = against["win"] - against["lose"]
        columns[f"win - lose against plain PPO{where}"] = difference
    return columns


def plot_rounds(summary, path):
    title = "Rounds of MetaRM, of plain steps, and of PPO alone (Tables 2 and 3, Fig. 15)"
    figures.by_round(summary, path, title, ROUND_PANELS)


@experiment("rounds", figure="Tables 2 and 3, Fig. 15", base="shift", plot=plot_rounds)
def compare_rounds(config, slot=0):
    """Win, tie and lose of every round of every arm, against SFT and against plain PPO."""
    need_truth(config)
    run = train.ensure_stages(config, "sft", "reward", "meta", "ppo", slot=slot)
    plain = f"policy_{config.meta.method}"
    rounds = {r.policy: r for r in meta_rounds(config)}
    policies = [plain, *rounds]
    against = dict.fromkeys(rounds, plain)
    scores = {}
    for where, pairs in (("", run.valid.pairs), (", ood", split_ood_prompts(run)[1])):
        scores[where] = evaluate_policies(run, ["sft", *policies], pairs, against)
    gold = gold_diffs(run, "valid")
    rows = {}
    for policy in policies:
        row = {}
        for where, scores_where in scores.items():
            row |= policy_columns(scores_where[policy], plain, where)
        if policy == plain:
            label = "plain PPO"
            reward_name = f"reward_{config.meta.method}"
        else:
            label = f"{rounds[policy].arm} {rounds[policy].number}"
            reward_name = rounds[policy].reward
        accuracy = gold_accuracy(run, reward_name, run.valid.rows, gold)
        rows[label] = row | {"reward model: gold accuracy": accuracy}
    return rows


def plot_rounds_ood(summary, path):
    title = "Rounds on prompts out of distribution (Fig. 15)"
    figures.by_round(summary, path, title, ROUND_PANELS)


@experiment("rounds_ood", figure="Fig. 15", base="shift", plot=plot_rounds_ood)
def compare_rounds_ood(config, slot=0):
    """Rounds with samples and rollouts on prompts of held-out domains, which have no labels."""
    settings = {
        "meta.domain": "ood",
        "meta.rounds": min(2, config.meta.rounds),
        "out_dir": f"{config.out_dir}_ood",
    }
    return compare_rounds(change(config, settings), slot)


# --------------------------------------------------------------------------------------------------
# Spread of rewards: Fig. 16


def plot_overlay(summary, path, title):
    columns = ("curve: value", "curve: density")
    labels = (
        "difference of reward, in mean differences on validation pairs",
        "density of pairs of answers",
    )
    figures.overlay(summary, path, title, columns, labels)


def plot_spread(summary, path):
    plot_overlay(summary, path, "Fig. 16: reward differences among new answers of the policy")


@experiment("spread", figure="Fig. 16", base="shift", plot=plot_spread)
def compare_spread(config, slot=0):
    """Reward differences among answers of a later policy, before and after MetaRM."""
    if config.meta.rounds < 2 or "meta" not in config.meta.arms:
        raise ConfigError(
            f"meta.rounds = {config.meta.rounds}: this experiment needs two rounds or more, "
            "and meta among meta.arms"
        )
    need_truth(config)
    run = train.ensure_stages(config, "sft", "reward", "meta", "ppo", slot=slot)
    second_rounds = {r.arm: r for r in meta_rounds(config) if r.number == 2}
    models = {"before": f"reward_{config.meta.method}"}
    for arm, second_round in second_rounds.items():
        if arm != "none":
            models[f"{arm}, round 2"] = second_round.reward
    return reward_spread(run, models, second_rounds["meta"].latest, run.valid.pairs)


def plot_one_round(summary, path):
    plot_overlay(summary, path, "Reward differences among answers of the SFT model")


@experiment("one_round", base="shift", plot=plot_one_round)
def compare_one_round(config, slot=0):
    """MetaRM and plain steps on answers of SFT, without PPO: accuracy, spread.  Also on files."""
    method = config.meta.method
    settings = {
        "meta.rounds": 1,
        "meta.arms": "meta,plain",
        "ppo.methods": "",
        "reward.methods": method,
    }
    config = change(config, settings)
    vote = () if method == "baseline" else ("ensemble", "strength")
    run = train.ensure_stages(config, "sft", *vote, "reward", "meta", slot=slot)
    models = {"before": f"reward_{method}", "plain": "plain_1", "meta": "meta_1"}
    spread = reward_spread(run, models, "sft", run.valid.pairs, config.meta.prompts)
    return {label: label_accuracies(run, name) | spread[label] for label, name in models.items()}


# --------------------------------------------------------------------------------------------------
# Label noise (open question 4)


def noise_columns(run, method):
    """Columns of a run with one round of the arms meta and plain.

    method: treatment of the reward model that the round starts from
    """
    models = {"plain PPO": f"reward_{method}", "meta": "meta_1", "plain": "plain_1"}
    policies = {
        "plain PPO": f"policy_{method}",
        "meta": "policy_meta_1",
        "plain": "policy_plain_1",
    }
    scores = evaluate_policies(run, ["sft", *policies.values()], run.valid.pairs)
    spread = reward_spread(run, models, "policy_plain_1", run.valid.pairs)
    gold = gold_diffs(run, "valid")
    row = {}
    for arm, model in models.items():
        outcomes = scores[policies[arm]]
        row[f"{arm}: gold accuracy"] = gold_accuracy(run, model, run.valid.rows, gold)
        row[f"{arm}: ranked right"] = spread[arm]["ranked right"]
        row[f"{arm}: win - lose"] = outcomes["win"] - outcomes["lose"]
    return row


def plot_noise(summary, path):
    panels = {}
    for ylabel, column in NOISE_PANELS.items():
        panels[ylabel] = {arm: f"{arm}: {column}" for arm in NOISE_ARMS}
    figures.by_row(summary, path, "MetaRM against label noise", "labels flipped", panels)


@experiment("noise", base="shift", plot=plot_noise)
def compare_noise(config, slot=0):
    """Open question 4: a round of MetaRM and of plain steps, with 0 to 30 % of labels flipped."""
    need_truth(config)
    rows = {}
    for flip in FLIP_SHARES:
        settings = {
            "world.flip": flip,
            "world.bias": 0.0,
            "meta.rounds": 1,
            "meta.arms": "meta,plain",
            "out_dir": f"{config.out_dir}_flip_{flip}",
        }
        noisy = change(config, settings)
        run = train.ensure_stages(noisy, "sft", "reward", "meta", "ppo", slot=slot)
        rows[f"{flip:.0%}"] = noise_columns(run, config.meta.method)
    return rows


# --------------------------------------------------------------------------------------------------
# First and second order


class MetaSteps(NamedTuple):
    """One way to train the reward model further in compare_orders."""
    label: str
    eta: float
    second_order: bool | None  # None: plain steps

    @property
    def name(self):
        return f"order_{self.eta:g}_{self.second_order}"


def meta_step_variants(eta):
    """Plain steps, then a tenth of eta and eta, each in first and in second order."""
    variants = [MetaSteps("plain steps", 0.0, None)]
    for size in (eta / 10, eta):
        for second_order in (False, True):
            order_word = "second" if second_order else "first"
            label = f"eta {size:g}, {order_word} order"
            variants.append(MetaSteps(label, size, second_order))
    return variants


def train_meta_steps(run, variant, samples):
    """Train reward_METHOD.pt further on labelled pairs and samples of a policy, once.

    Writes order_ETA_SECOND.pt; returns the seconds that its training took.
    """
    settings = {"meta.eta": variant.eta, "meta.second_order": bool(variant.second_order)}
    run = run.with_settings(settings)
    cfg = run.cfg.meta
    depends = [f"meta.{key}" for key in asdict(cfg) if key not in ("rounds", "arms")]
    start = f"reward_{cfg.method}"
    if run.needs(variant.name, depends, inputs=[start, f"policy_{cfg.method}"]):
        labels = treat(torch.zeros(len(run.train.rows)), "baseline")
        meta_step = None
        if variant.second_order is not None:
            meta_step = make_meta_step(run, samples, cfg, f"{run.cfg.seed} orders")
        training = train.RewardVariant(seed_key="orders", start=start, meta_step=meta_step)
        train.fit_reward_model(run, variant.name, cfg, labels, training)
    return run.read_record(variant.name)["seconds"]


def plot_orders(summary, path):
    columns = ["gold accuracy", "ranked right", "below 0.2"]
    figures.bars(summary, path, "MetaRM's step, first order and exact", columns)


@experiment("orders", base="shift", plot=plot_orders)
def compare_orders(config, slot=0):
    """MetaRM's gradient in first and in exact second order, with two sizes of step; its cost."""
    need_truth(config)
    config = change(config, {"meta.rounds": 0})
    run = train.ensure_stages(config, "sft", "reward", "ppo", slot=slot)
    policy = f"policy_{config.meta.method}"
    samples, _ = sample_responses(run, policy, run.train.pairs, seed=config.seed)
    variants = meta_step_variants(config.meta.eta)
    seconds = {}
    for variant in variants:
        seconds[variant.label] = train_meta_steps(run, variant, samples)
    models = {variant.label: variant.name for variant in variants}
    spread = reward_spread(run, models, policy, run.valid.pairs)
    gold = gold_diffs(run, "valid")
    rows = {}
    for label, name in models.items():
        row = {"gold accuracy": gold_accuracy(run, name, run.valid.rows, gold)}
        for column, value in spread[label].items():
            if "curve" not in column:
                row[column] = value
        row["time, of plain steps"] = seconds[label] / seconds["plain steps"]
        rows[label] = row
    return rows
