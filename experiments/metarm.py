"""Rounds of MetaRM against plain steps and PPO alone (the paper's Fig. 15, 16, Tables 2 and 3).

An arm is a way to train the reward model before each round of PPO, see meta.arms in config.py:
"meta" and "meta-adam" by MetaRM, "plain" by ordinary steps on the same pairs, "ocrm" on the pairs
weighted by the policy, "none" not at all.  "plain PPO" is the policy of the first reward model
alone.
"""
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

import train
from config import ConfigError
from evaluate import evaluate_policies, gold_diffs
from experiments.registry import experiment
from experiments.shared import change, need_truth, plain_labels
from experiments.shift_shared import gold_accuracy, label_accuracies, reward_spread
from experiments.statistics import Comparison, against, couples, within_rows
from metarm import make_meta_step, meta_rounds, sample_responses, split_ood_prompts
from runtime import figures

ROUND_PANELS = {  # y label -> column
    "gold reward": "gold reward",
    "wins − losses against plain PPO": "win - lose against plain PPO",
    "gold reward, out of distribution": "gold reward, ood",
    "reward model: accuracy by gold": "reward model: gold accuracy",
}
POLICY_COLUMNS = (
    "gold reward", "gold reward, ood",
    "win - lose against plain PPO", "win - lose against plain PPO, ood",
)
NOISE_PANELS = {
    "accuracy by gold": "gold accuracy",
    "answers of the policy ranked right": "ranked right",
    "wins − losses against SFT": "win - lose",
}
SGD_LR = 0.05  # peak learning rate with momentum 0.9
LOOK_AHEAD_COLUMNS = {  # column -> average over the last steps of training
    "cosine of ∇J and ∇L": "cosine",
    "norm of ∇L": "pair_norm",
    "kept in bf16": "bf16_kept",
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


def round_comparisons(rows):
    """The couples of round_couples, in and out of distribution; their reward models as well, unless
    they share one"""
    compared = round_couples(rows)
    found = []
    for column in POLICY_COLUMNS:
        found += [Comparison(*couple, column) for couple in compared]
    for couple in compared:
        if not share_reward_model(*couple, rows):
            found.append(Comparison(*couple, "reward model: gold accuracy"))
    return found


def round_couples(rows):
    """Every round with plain PPO, and those of MetaRM and ocrm with the same number of rounds of
    plain steps and of no retraining -> [(row, reference)]"""
    compared = []
    for row in rows:
        if row == "plain PPO":
            continue
        arm, _, number = row.rpartition(" ")
        references = ["plain PPO"]
        if arm not in ("plain", "none"):
            references += [f"plain {number}", f"none {number}"]
        compared += [(row, reference) for reference in references if reference in rows]
    return compared


def share_reward_model(row, reference, rows):
    """Whether a comparison of reward models would be of one with itself, or is made already.

    "none" keeps the reward model of plain PPO.  In round 1 the policy is SFT, so that all weights
    of ocrm are 1 and its reward model is that of "plain 1".
    """
    if row.startswith("none") or reference.startswith("none"):
        return True
    return row == "ocrm 1" and "plain 1" in rows


@experiment(
    "rounds", figure="Tables 2 and 3, Fig. 15", base="metarm", plot=plot_rounds,
    comparisons=round_comparisons,
)
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
            for where in scores:
                row[f"win - lose against plain PPO{where}"] = 0.0  # each answer ties with itself
        else:
            label = f"{rounds[policy].arm} {rounds[policy].number}"
            reward_name = rounds[policy].reward
        accuracy = gold_accuracy(run, reward_name, run.valid.rows, gold)
        rows[label] = row | {"reward model: gold accuracy": accuracy}
    return rows


def plot_rounds_from_sft(summary, path):
    figures.by_round(summary, path, "Rounds whose PPO starts from SFT", ROUND_PANELS)


@experiment(
    "rounds_from_sft", base="metarm", plot=plot_rounds_from_sft, comparisons=round_comparisons,
)
def compare_rounds_from_sft(config, slot=0):
    """The same rounds, with PPO started from SFT in every round (arXiv 2505.18126)."""
    return compare_rounds(change(config, {"meta.policy_start": "sft"}), slot)


def plot_rounds_ood(summary, path):
    title = "Rounds on prompts out of distribution (Fig. 15)"
    figures.by_round(summary, path, title, ROUND_PANELS)


@experiment(
    "rounds_ood", figure="Fig. 15", base="metarm", plot=plot_rounds_ood,
    comparisons=round_comparisons,
)
def compare_rounds_ood(config, slot=0):
    """Rounds with samples and rollouts on prompts of held-out domains, which have no labels."""
    settings = {"meta.domain": "ood", "out_dir": f"{config.out_dir}_ood"}
    return compare_rounds(change(config, settings), slot)


# --------------------------------------------------------------------------------------------------
# The protocol of Table 3: one hundred prompts, and the best round picked on them

FEW_PROMPTS = 100
NUM_DRAWS = 2000


def picked_round(scores, sft, plain, tie, seed):
    """What an arm seems to gain where its best round is picked on the prompts that judge it.

    scores: (rounds, P) of an arm's policies on P prompts; sft, plain: (P,) of the two policies that
    they are compared with; all by the same judge.  -> columns, means over draws of 100 prompts
    """
    rng = np.random.default_rng(seed)
    against_sft = outcome(scores, sft, tie)
    against_plain = outcome(scores, plain, tie)
    on_picked = []
    elsewhere = []
    picked = []
    for _ in range(NUM_DRAWS):
        order = rng.permutation(scores.shape[1])
        few, others = order[:FEW_PROMPTS], order[FEW_PROMPTS:]
        best = against_sft[:, few].mean(1).argmax()
        picked.append(best + 1)
        on_picked.append(against_plain[best, few])
        elsewhere.append(against_plain[best, others].mean())
    on_picked = np.array(on_picked)  # (draws, 100)
    return {
        "round picked": float(np.mean(picked)),
        "win": float((on_picked > 0).mean()),
        "tie": float((on_picked == 0).mean()),
        "lose": float((on_picked < 0).mean()),
        "win - lose, where picked": float(on_picked.mean()),
        "win - lose, other prompts": float(np.mean(elsewhere)),
        "by picking": float(on_picked.mean() - np.mean(elsewhere)),
        "win - lose, mean of the rounds": float(against_plain.mean()),
    }


def outcome(ours, theirs, tie):
    """1 where our score wins, -1 where it loses, 0 where they are closer than `tie` or equal"""
    lead = ours - theirs
    return np.where(np.abs(lead) < tie, 0, np.sign(lead))


@experiment(
    "picking", figure="Table 3", base="metarm",
    comparisons=within_rows({"win - lose, where picked": "win - lose, other prompts"}),
)
def compare_picking(config, slot=0):
    """The best of four rounds, picked on the 100 prompts that judge it: what picking gains."""
    need_truth(config)
    if config.evaluate.prompts < 2 * FEW_PROMPTS:
        raise ConfigError(f"evaluate.prompts = {config.evaluate.prompts}: this experiment needs "
                          f"{2 * FEW_PROMPTS} or more, to judge a picked round on others")
    run = train.ensure_stages(config, "sft", "reward", "meta", "ppo", slot=slot)
    plain = f"policy_{config.meta.method}"
    rounds = meta_rounds(config)
    policies = ["sft", plain, *(r.policy for r in rounds)]
    path = "answers_picking.jsonl"
    evaluate_policies(run, policies, run.valid.pairs, save=path)
    lines = run.load_jsonl(path)
    if len(lines) < 2 * FEW_PROMPTS:
        raise ConfigError(f"world.valid = {config.world.valid}: has {len(lines)} different "
                          f"prompts; this experiment needs {2 * FEW_PROMPTS} or more")
    scores = {name: np.array([line[name]["score"] for line in lines]) for name in policies}
    rows = {}
    for arm in config.meta.arms:
        of_arm = np.stack([scores[r.policy] for r in rounds if r.arm == arm])
        rows[arm] = picked_round(
            of_arm, scores["sft"], scores[plain], config.evaluate.tie, config.seed
        )
    return rows


# --------------------------------------------------------------------------------------------------
# Spread of rewards: Fig. 16


def plot_overlay(summary, path, title):
    columns = ("curve: value", "curve: density")
    labels = (
        "difference of reward, in mean differences on validation pairs (last point: all above 2.9)",
        "density of pairs of answers",
    )
    figures.overlay(summary, path, title, columns, labels)


def plot_spread(summary, path):
    plot_overlay(summary, path, "Fig. 16: reward differences among new answers of the policy")


@experiment(
    "spread", figure="Fig. 16", base="metarm", plot=plot_spread,
    comparisons=couples(
        {"meta, round 2": "plain, round 2", "plain, round 2": "before"},
        "J", "mean difference", "below 0.2", "ranked right",
    ),
)
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


@experiment(
    "one_round", base="metarm", plot=plot_one_round,
    comparisons=against("plain", "held out", "J", "mean difference", "below 0.2",
                        without=["before"]),
)
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


@experiment(
    "noise", base="metarm", plot=plot_noise,
    comparisons=within_rows({
        "meta: gold accuracy": "plain: gold accuracy",
        "meta: ranked right": "plain: ranked right",
        "meta: win - lose": "plain: win - lose",
    }),
)
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
# The look-ahead: its size, its form, its order, and the optimizer around it


class LookAhead(NamedTuple):
    """One way to train the reward model of a round in compare_look_aheads."""
    label: str
    eta: float = 0.0          # 0: plain steps
    adam: bool = False        # the look-ahead by Adam's preconditioner
    second_order: bool = False
    optimizer: str = "adamw"

    @property
    def name(self):
        form = "adam" if self.adam else "second" if self.second_order else "first"
        return f"look_ahead_{self.optimizer}_{form}_{self.eta:g}"


def look_aheads(cfg):
    """Those that are compared, around meta.eta and meta.adam_eta.  cfg: the [meta] section"""
    variants = [LookAhead("plain steps")]
    for factor in (0.01, 0.1, 1, 10):
        eta = cfg.eta * factor
        variants.append(LookAhead(f"eta {eta:g}", eta))
    variants.append(LookAhead(f"eta {cfg.eta:g}, second order", cfg.eta, second_order=True))
    for factor in (0.01, 0.1, 1, 10):
        eta = cfg.adam_eta * factor
        variants.append(LookAhead(f"by Adam, eta {eta:g}", eta, adam=True))
    variants.append(LookAhead("plain steps, SGD", optimizer="sgd"))
    for factor in (0.1, 1):
        eta = cfg.eta * factor
        variants.append(LookAhead(f"eta {eta:g}, SGD", eta, optimizer="sgd"))
    return variants


def train_look_ahead(run, variant, samples):
    """Train a reward model from meta.start on labelled pairs and samples of a policy, once.

    Writes look_ahead_….pt; returns the record of its training.
    """
    settings = {
        "meta.adam_eta" if variant.adam else "meta.eta": variant.eta,
        "meta.second_order": variant.second_order,
        "train.optimizer": variant.optimizer,
    }
    if variant.optimizer == "sgd":
        settings["meta.lr"] = SGD_LR
    run = run.with_settings(settings)
    cfg = run.cfg.meta
    depends = [f"meta.{key}" for key in asdict(cfg) if key not in ("rounds", "arms")]
    first = f"reward_{cfg.method}"
    inputs = ["sft", first, f"policy_{cfg.method}"]
    if run.needs(variant.name, [*depends, *train.TRAINING_SETTINGS], inputs=inputs):
        labels = plain_labels(run)
        meta_step = None
        if variant.eta:
            key = f"{run.cfg.seed} look-ahead"
            meta_step = make_meta_step(run, samples, cfg, key, variant.adam)
        start = None if cfg.start == "sft" else first
        training = train.RewardVariant("look-ahead", start, meta_step=meta_step)
        train.fit_reward_model(run, variant.name, cfg, labels, training)
    return run.read_record(variant.name)


def plot_look_aheads(summary, path):
    columns = ["gold accuracy", "ranked right", "below 0.2"]
    figures.bars(summary, path, "The look-ahead: its size, form and order", columns)


def look_ahead_comparisons(rows):
    """Each against plain steps by its own optimizer, the second order also against the first"""
    references = {}
    for row in rows:
        if not row.startswith("plain steps"):
            references[row] = "plain steps, SGD" if row.endswith("SGD") else "plain steps"
    columns = ("gold accuracy", "ranked right", "J", "below 0.2")
    found = couples(references, *columns)(rows)
    for row in rows:
        if row.endswith(", second order"):
            first = row.removesuffix(", second order")
            found += couples({row: first}, *columns)(rows)
    return found


@experiment(
    "look_ahead", base="metarm", plot=plot_look_aheads, comparisons=look_ahead_comparisons,
)
def compare_look_aheads(config, slot=0):
    """MetaRM's look-ahead over four decades, by Adam, in second order, under SGD; its cost."""
    need_truth(config)
    config = change(config, {"meta.rounds": 0})
    run = train.ensure_stages(config, "sft", "reward", "ppo", slot=slot)
    policy = f"policy_{config.meta.method}"
    samples, _ = sample_responses(run, policy, run.train.pairs, seed=config.seed)
    variants = look_aheads(config.meta)
    records = {v.label: train_look_ahead(run, v, samples) for v in variants}
    models = {v.label: v.name for v in variants}
    spread = reward_spread(run, models, policy, run.valid.pairs)
    gold = gold_diffs(run, "valid")
    rows = {}
    for label, name in models.items():
        record = records[label]
        row = {"gold accuracy": gold_accuracy(run, name, run.valid.rows, gold)}
        for column, value in spread[label].items():
            if "curve" not in column:
                row[column] = value
        for column, key in LOOK_AHEAD_COLUMNS.items():
            if key in record["metrics"]:
                row[column] = record["metrics"][key]
        row["time, of plain steps"] = record["seconds"] / records["plain steps"]["seconds"]
        rows[label] = row
    return rows
