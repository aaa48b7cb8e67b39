"""The headline numbers over seeds: noise found by strength, gain of flipping, gain of PPO."""
import math

import train
from common import reward_diffs
from experiments.registry import experiment
from experiments.shared import change, need_truth
from experiments.statistics import couples

CLEAN = {  # a world whose annotators make no errors
    "world.flip": 0.0,
    "world.bias": 0.0,
    "world.temperature": 0.0,
    "reward.methods": "baseline",
    "ppo.methods": "",
}


def extend_with_mean_gap(summary):
    """Add the share of the mean gap that flipping closes.

    Where the gap of one seed is small, its share is mostly noise: the ratio of the means over seeds
    complements the mean of the ratios.
    """
    baseline = summary["gold accuracy, baseline"]["value"]["mean"]
    flip = summary["gold accuracy, flip"]["value"]["mean"]
    clean = summary["gold accuracy, clean labels"]["value"]["mean"]
    share = {"mean": (flip - baseline) / (clean - baseline), "se": None}
    summary["share of the gap closed by flip, of mean gaps"] = {"value": share}


COMPARED = {
    "AUROC of the mean, random flips": "AUROC of one member, random flips",
    "gold accuracy, flip": "gold accuracy, baseline",
    "PPO on flip: win - lose against SFT": "PPO on baseline: win - lose against SFT",
    "PPO on flip: gold reward": "PPO on baseline: gold reward",
    "PPO on baseline: gold reward": "SFT: gold reward",
}


@experiment(
    "headline", base="tiny", extend_summary=extend_with_mean_gap,
    comparisons=couples(COMPARED, "value"),
)
def headline(config, slot=0):
    """What strength finds, what flipping gains and what PPO gains, at the given settings.

    Share of the gap that flipping closes: (flip - baseline) / (clean - baseline) in accuracy by
    gold, where "clean" is a reward model trained on the same pairs with the labels of annotators
    who make no errors.
    """
    need_truth(config)
    run = train.ensure_stages(config, slot=slot)
    results = run.load_json("results.json")
    values = label_values(config, results)
    values |= accuracy_values(results, train_on_clean_labels(config, slot))
    values |= policy_values(config, results["policy"])
    return {name: {"value": value} for name, value in values.items()}


def train_on_clean_labels(config, slot):
    """-> accuracy by gold of the plain reward model in the same world without label noise"""
    clean = change(config, {"out_dir": f"{config.out_dir}_clean", **CLEAN})
    run = train.ensure_stages(clean, "sft", "reward", slot=slot)
    correct = reward_diffs(run, "reward_baseline", run.valid.rows) > 0
    return float(correct.float().mean())


def label_values(config, results):
    """Share of wrong labels, and how well the vote finds them."""
    noise = results["noise"]
    return {
        "wrong labels": noise["all"]["count"] / config.world.pairs,
        "AUROC of the mean, random flips": noise["flip"]["auroc_mean"],
        "AUROC of one member, random flips": noise["flip"]["auroc_single"],
        "AUROC of the mean, all wrong labels": noise["all"]["auroc_mean"],
    }


def accuracy_values(results, clean):
    """Accuracy by gold on validation pairs, and the share of the gap that flipping closes."""
    baseline = results["reward"]["baseline"]["valid"]
    flip = results["reward"]["flip"]["valid"]["gold_accuracy"]
    gap = clean - baseline["gold_accuracy"]
    closed = (flip - baseline["gold_accuracy"]) / gap if gap else math.nan
    return {
        "gold accuracy, longer wins": baseline["gold_longer_wins"],
        "gold accuracy, baseline": baseline["gold_accuracy"],
        "gold accuracy, flip": flip,
        "gold accuracy, clean labels": clean,
        "share of the gap closed by flip": closed,
    }


def policy_values(config, policies):
    values = {}
    for method in config.ppo.methods:
        policy = policies[f"policy_{method}"]
        values[f"PPO on {method}: win - lose against SFT"] = policy["win"] - policy["lose"]
        values[f"PPO on {method}: gold reward"] = policy["judge"]
        values[f"PPO on {method}: KL"] = policy["kl"]
    values["SFT: gold reward"] = policies["sft"]["judge"]
    return values
