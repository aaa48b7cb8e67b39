"""Experiments on policies: over-optimisation, PPO on cleaned labels, a program as judge.

All need the built-in world, where the gold reward is known.  Policies are trained once, as
policy_over_METHOD.pt and, without a KL penalty, policy_over_METHOD_free.pt.
"""
from typing import NamedTuple

import numpy as np
import torch

import train
import world
from common import (
    embed_rows,
    load_model,
    make_sampling,
    policy_prompts,
    sample_answers,
    score_rows,
    training_prompts,
)
from experiments.best_of_n import best_of_n, best_of_n_kl
from experiments.registry import experiment
from experiments.shared import change, need_truth, unseen_prompts
from experiments.statistics import couples
from model import RewardModel
from runtime import figures

REWARD_METHODS = ("baseline", "flip")
NUM_ANSWERS = 64  # sampled for each prompt; best-of-n is estimated from them
FLIP_AGAINST_BASELINE = {
    "PPO on flip": "PPO on baseline",
    "PPO on flip, no KL penalty": "PPO on baseline, no KL penalty",
    "best of n on flip": "best of n on baseline",
}
NO_KL_PENALTY = {"ppo.kl_coef": 0.0, "ppo.adaptive_kl_target": 0.0}


def ensure_reward_models(config, slot):
    """Train SFT, the ensemble and the reward models of REWARD_METHODS, where missing -> Run"""
    need_truth(config)
    config = change(config, {"reward.methods": REWARD_METHODS, "ppo.methods": ()})
    return train.ensure_stages(config, "sft", "ensemble", "strength", "reward", slot=slot)


class PolicyVariant(NamedTuple):
    """One of the four policies that the experiments share."""
    method: str     # treatment of the reward model
    row: str        # its row in the tables
    name: str       # policy_NAME.pt, rollouts_NAME.jsonl
    settings: dict  # changes of the configuration


def policy_variants():
    """PPO on the reward model of each of REWARD_METHODS, with and without a KL penalty."""
    variants = []
    for method in REWARD_METHODS:
        row = f"PPO on {method}"
        variants.append(PolicyVariant(method, row, f"over_{method}", {}))
        variants.append(
            PolicyVariant(method, f"{row}, no KL penalty", f"over_{method}_free", NO_KL_PENALTY)
        )
    return variants


def train_variant(run, variant):
    """Train the policy of a variant, once -> the lines of its rollouts"""
    run = run.with_settings(variant.settings)
    return train.train_policy_once(run, variant.name, f"reward_{variant.method}")


# --------------------------------------------------------------------------------------------------
# Over-optimisation


def smooth(values):
    """Running mean over a twelfth of the iterations: the mean of one rollout is noisy."""
    width = max(1, len(values) // 12)
    return np.convolve(values, np.ones(width) / width, "valid")


def curve_columns(kl, gold, proxy):
    """Columns of a row: the curves, the point of highest gold reward, and the loss after it.

    kl, gold, proxy: arrays of equal length, by growing optimisation
    """
    best = int(np.argmax(gold))
    return {
        "gold, best": float(gold[best]),
        "KL there": float(kl[best]),
        "gold, end": float(gold[-1]),
        "KL, end": float(kl[-1]),
        "lost after the best": float(gold[best] - gold[-1]),
        "proxy, end": float(proxy[-1]),
        "curve: root KL": np.sqrt(np.maximum(kl, 0)).tolist(),
        "curve: gold": [float(value) for value in gold],
        "curve: proxy": [float(value) for value in proxy],
    }


class SftAnswers(NamedTuple):
    """NUM_ANSWERS answers of the SFT model to each of n prompts."""
    rows: list         # n NUM_ANSWERS rows, prompt by prompt
    gold: np.ndarray   # (n, NUM_ANSWERS) gold rewards


def sample_sft_answers(run):
    """Sample answers as PPO's rollouts do, to PPO's prompts -> SftAnswers"""
    prompts = policy_prompts(run, training_prompts(run))
    generator = torch.Generator().manual_seed(run.cfg.seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    repeated = []
    for i in order[:run.cfg.evaluate.prompts // 2]:
        repeated += [prompts[i]] * NUM_ANSWERS
    sampling = make_sampling(run, run.cfg.ppo)
    texts, rows = sample_answers(run, "sft", repeated, run.cfg.seed, sampling)
    gold = [world.gold(prompt, answer) for (prompt, _), answer in zip(repeated, texts)]
    return SftAnswers(embed_rows(run, rows), np.array(gold).reshape(-1, NUM_ANSWERS))


def expected_best(proxy, target, n):
    """Mean over prompts of the target of the best of n answers by the proxy.  (P, N), (P, N)"""
    best = [best_of_n(p, t, n) for p, t in zip(proxy, target)]
    return np.mean(best)


def best_of_n_columns(proxy, gold):
    """Columns for n = 1, 2, 4, ..., NUM_ANSWERS.  proxy, gold: (P, NUM_ANSWERS)"""
    ns = [2 ** i for i in range(NUM_ANSWERS.bit_length())]
    kl = np.array([best_of_n_kl(n) for n in ns])
    best_gold = np.array([expected_best(proxy, gold, n) for n in ns])
    best_proxy = np.array([expected_best(proxy, proxy, n) for n in ns])
    return curve_columns(kl, best_gold, best_proxy)


def rollout_columns(lines, iterations, mean, std):
    """Columns of a policy over its training.

    lines: of its rollouts; mean, std: of the proxy on answers of SFT, which the proxy is scaled by
    """
    kl = [line["kl"] for line in lines]
    gold = [world.gold(line["prompt"], line["response"]) for line in lines]
    proxy = [(line["reward"] - mean) / std for line in lines]
    curves = []
    for values in (kl, gold, proxy):
        per_iteration = np.array(values).reshape(iterations, -1).mean(1)
        curves.append(smooth(per_iteration))
    return curve_columns(*curves)


def plot_overoptimization(summary, path):
    panels = {"gold reward": "curve: gold", "proxy, in std of SFT's answers": "curve: proxy"}
    title = "Over-optimisation: gold and proxy reward against KL"
    figures.against(summary, path, title, "curve: root KL", figures.ROOT_KL, panels)


@experiment(
    "overoptimisation", plot=plot_overoptimization,
    comparisons=couples(FLIP_AGAINST_BASELINE, "gold, end", "lost after the best"),
)
def compare_optimization(config, slot=0):
    """Gold and proxy reward against KL: best-of-n and PPO, with and without a KL penalty.

    On noisy and on cleaned labels.  The proxy is scaled to mean 0 and std 1 on answers of SFT.
    Best-of-n has the prompts and the sampling of PPO's rollouts, so that the KL is to one
    distribution.  After arXiv 2210.10760.
    """
    run = ensure_reward_models(config, slot)
    answers = sample_sft_answers(run)
    rows = {}
    scale = {}
    for method in REWARD_METHODS:
        model = load_model(run, RewardModel, f"reward_{method}")
        rewards = score_rows(run, model, answers.rows, "best of n")
        proxy = rewards.numpy().reshape(answers.gold.shape).astype(float)
        mean, std = proxy.mean(), max(proxy.std(), 1e-8)
        scale[method] = (mean, std)
        rows[f"best of n on {method}"] = best_of_n_columns((proxy - mean) / std, answers.gold)
    for variant in policy_variants():
        lines = train_variant(run, variant)
        mean, std = scale[variant.method]
        rows[variant.row] = rollout_columns(lines, run.cfg.ppo.iterations, mean, std)
    return rows


# --------------------------------------------------------------------------------------------------
# Cleaned labels


def judge_policy(run, name, prompts):
    """Mean gold reward of a policy's answers, term by term -> columns of a row"""
    sampling = make_sampling(run, run.cfg.evaluate)
    texts, rows = sample_answers(run, name, prompts, run.cfg.seed, sampling)
    terms = [world.terms(prompt, answer) for (prompt, _), answer in zip(prompts, texts)]
    columns = {"gold reward": float(np.mean([sum(t.values()) for t in terms]))}
    for term in terms[0]:
        columns[term] = float(np.mean([t[term] for t in terms]))
    columns["right answers"] = float(np.mean([t["right"] > 0 for t in terms]))
    columns["length"] = mean_length(rows)
    return columns


def mean_length(rows):
    """Mean number of tokens of the first response of each row."""
    return float(np.mean([len(row.responses[0]) for row in rows]))


def plot_denoised(summary, path):
    columns = ["gold reward", "right answers"]
    figures.bars(summary, path, "PPO on noisy and on cleaned labels", columns, chance=None)


@experiment(
    "denoised", plot=plot_denoised,
    comparisons=couples(FLIP_AGAINST_BASELINE, "gold reward", "right answers", "KL"),
)
def compare_denoised(config, slot=0):
    """PPO on cleaned against PPO on noisy labels: gold reward on held-out prompts, term by term."""
    run = ensure_reward_models(config, slot)
    prompts = policy_prompts(run, run.valid.pairs)[:run.cfg.evaluate.prompts]
    rows = {"SFT": judge_policy(run, "sft", prompts)}
    last_answers = 5 * run.cfg.ppo.rollout_batch_size
    for variant in policy_variants():
        lines = train_variant(run, variant)
        row = judge_policy(run, f"policy_{variant.name}", prompts)
        row["KL"] = float(np.mean([line["kl"] for line in lines[-last_answers:]]))
        rows[variant.row] = row
    for suffix in ("", ", no KL penalty"):
        flip = rows[f"PPO on flip{suffix}"]
        baseline = rows[f"PPO on baseline{suffix}"]
        difference = {column: flip[column] - baseline[column] for column in flip}
        rows[f"flip - baseline{suffix}"] = difference
    return rows


# --------------------------------------------------------------------------------------------------
# A program as judge


def plot_verifier(summary, path):
    figures.bars(summary, path, "A program as judge", ["success"], chance=None)


@experiment(
    "verifier", plot=plot_verifier, comparisons=couples({"PPO": "SFT"}, "success"),
)
def compare_verifier(config, slot=0):
    """A program as judge instead of a reward model: success at translation of SFT and of PPO.

    A fifth of the demonstrations are right.  The reward is 1 where the program accepts an answer.
    --ppo.domains=programs or arithmetic is too hard for a model as small as labels.toml's.
    """
    need_truth(config)
    domains = config.ppo.domains or ("translation",)
    settings = {
        "out_dir": f"{config.out_dir}_verifier",
        "ppo.domains": domains,
        "ppo.reward": "verifier",
        "world.p_right": 0.2,
        "reward.methods": "baseline",
        "ppo.methods": (),
        "reward.epochs": 1,       # the reward model is used as initial weights of the critic only
        "ppo.whiten": True,
        "ppo.reward_clip": 10.0,  # a rare success is many standard deviations from the mean
    }
    run = train.ensure_stages(change(config, settings), "sft", "reward", slot=slot)
    train.train_policy_once(run, "verifier", "reward_baseline")
    seed = run.cfg.seed
    prompts = unseen_prompts(run, domains, f"{seed} verified")
    sampling = make_sampling(run, run.cfg.ppo)
    rows = {}
    for label, name in (("SFT", "sft"), ("PPO", "policy_verifier")):
        texts, answers = sample_answers(run, name, prompts, seed, sampling)
        success = [world.right(prompt, text) == 1 for (prompt, _), text in zip(prompts, texts)]
        rows[label] = {"success": float(np.mean(success)), "length": mean_length(answers)}
    return rows
