"""Experiments on policies: over-optimisation by PPO and by best-of-n, PPO on cleaned labels, a program as judge.

In the manner of labels.py: each is a function of a configuration that returns {row: {column: number or list}}, and what it
trains stays in the run's folder under a name of its own.  All need the built-in world, where the gold reward is known.
"""
import os
from dataclasses import asdict, replace

import numpy as np
import torch

import data
import files
import plan
import ppo
import train
import world
from config import assign
from evaluate import best_of_n, best_of_n_kl
from labels import need_truth
from model import RewardModel
from run import answers, load_model, open_run, policy_prompts, rewards_of

METHODS = ("baseline", "flip")
ANSWERS = 64  # drawn for each prompt, from which best-of-n is estimated


def prepared(config, slot, changes=()):
    """SFT, and the ensemble and reward models of METHODS, if need be -> Run.  changes: more settings, as (key, value)"""
    need_truth(config)
    for key, value in (("reward.methods", METHODS), ("ppo.methods", ()), *changes):
        config = assign(config, key, value)
    train.execute(config, "sft", "ensemble", "strength", "reward", slot=slot)
    return open_run(config, slot)


def trained(run, name, reward_name, s):
    """PPO under settings of its own, once: policy_NAME.pt.  -> the answers sampled, as of ppo.train_policy"""
    unit, inputs = f"policy_{name}", [reward_name]
    if s.reward in ppo.OF_MEMBERS:
        inputs += [f"member_{m:02d}" for m in range(run.config.ensemble.members)]
    depends = {f"ppo.{k}": v for k, v in asdict(s).items() if k not in ("methods", "show")} | {"train.clip": run.config.train.clip, "format": files.FORMAT}
    depends |= {f"input {u}": files.read_record(run.config.out_dir, u)["fingerprint"] for u in inputs}
    if files.why_again(files.read_record(run.config.out_dir, unit), depends, all(map(os.path.exists, plan.outputs(run, unit)))):
        train.fit_policy(run, unit, reward_name, depends, s=s)
    return [line for _, line in data.read_jsonl(run.path(f"rollouts_{name}.jsonl"))]


def with_and_without_kl(run):
    """-> [(method, words, name, settings)] of the four policies that the experiments share"""
    s = run.config.ppo
    return [(m, f"PPO on {m}{words}", f"over_{m}{name}", replace(s, kl=kl, kl_target=target)) for m in METHODS
            for words, name, kl, target in (("", "", s.kl, s.kl_target), (", no KL penalty", "_free", 0.0, 0.0))]


def smooth(values):
    """Running mean over a twelfth of the iterations: the mean of one rollout is noise."""
    width = max(1, len(values) // 12)
    return np.convolve(values, np.ones(width) / width, "valid")


def curve(kl, gold, proxy):
    """Three curves -> the columns of a row: they themselves, where gold is best, and what is lost after that"""
    best = int(np.argmax(gold))
    return {"gold, best": float(gold[best]), "KL there": float(kl[best]), "gold, end": float(gold[-1]), "KL, end": float(kl[-1]),
            "lost after the best": float(gold[best] - gold[-1]), "proxy, end": float(proxy[-1]),
            "curve: root KL": np.sqrt(np.maximum(kl, 0)).tolist(), "curve: gold": list(map(float, gold)), "curve: proxy": list(map(float, proxy))}


def overoptimisation(config, slot=0):
    """Gold and proxy reward against KL, of best-of-n and of PPO with and without its penalty, on noisy and on cleaned labels.

    The proxy counts in standard deviations of its rewards of SFT's answers, from their mean.  Prompts are PPO's, answers are drawn as
    in its rollouts, so that the KL is to one distribution.  After arXiv 2210.10760.
    """
    run = prepared(config, slot)
    s, rows, scale = run.config.ppo, {}, {}
    prompts = policy_prompts(run, ppo.asked(run, s))
    picked = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(run.config.seed))[:run.config.evaluate.prompts // 2].tolist()
    many = [prompts[i] for i in picked for _ in range(ANSWERS)]
    texts, drawn = answers(run, "sft", many, run.config.seed, s.temperature)
    gold = np.array([world.gold(p, a) for (p, _), a in zip(many, texts)]).reshape(-1, ANSWERS)
    ns = [2 ** i for i in range(ANSWERS.bit_length())]
    for method in METHODS:
        proxy = rewards_of(run, load_model(run, RewardModel, f"reward_{method}"), drawn, "best of n").numpy().reshape(gold.shape).astype(float)
        scale[method] = proxy.mean(), max(proxy.std(), 1e-8)
        proxy = (proxy - scale[method][0]) / scale[method][1]
        best = lambda what: np.array([np.mean([best_of_n(p, g, n) for p, g in zip(proxy, what)]) for n in ns])
        rows[f"best of n on {method}"] = curve(np.array([best_of_n_kl(n) for n in ns]), best(gold), best(proxy))
    for method, words, name, settings in with_and_without_kl(run):
        lines = trained(run, name, f"reward_{method}", settings)
        by = lambda value: smooth(np.array([value(line) for line in lines]).reshape(s.iterations, -1).mean(1))
        mean, std = scale[method]
        rows[words] = curve(by(lambda l: l["kl"]), by(lambda l: world.gold(l["prompt"], l["response"])), by(lambda l: (l["reward"] - mean) / std))
    return rows


def denoised(config, slot=0):
    """PPO on cleaned against PPO on noisy labels: the gold reward of answers to held-out prompts, term by term."""
    run = prepared(config, slot)
    e, rows = run.config.evaluate, {}
    prompts = policy_prompts(run, run.valid[0])[:e.prompts]

    def judged(name):
        texts, drawn = answers(run, name, prompts, run.config.seed, e.temperature, e.top_p)
        terms = [world.terms(p, a) for (p, _), a in zip(prompts, texts)]
        return {"gold reward": float(np.mean([sum(t.values()) for t in terms])), **{t: float(np.mean([x[t] for x in terms])) for t in terms[0]},
                "right answers": float(np.mean([t["right"] > 0 for t in terms])), "length": float(np.mean([len(r.responses[0]) for r in drawn]))}
    rows["SFT"] = judged("sft")
    for method, words, name, settings in with_and_without_kl(run):
        lines = trained(run, name, f"reward_{method}", settings)
        rows[words] = judged(f"policy_{name}") | {"KL": float(np.mean([line["kl"] for line in lines[-5 * settings.episodes:]]))}
    for words in ("", ", no KL penalty"):
        flip, baseline = (rows[f"PPO on {m}{words}"] for m in ("flip", "baseline"))
        rows[f"flip - baseline{words}"] = {column: flip[column] - baseline[column] for column in flip}
    return rows


def verifier(config, slot=0):
    """A program as judge, in place of a reward model: success at translation of SFT, a fifth of whose demonstrations are right, and of PPO.

    The reward is 1 where the program says so.  --ppo.domains=programs or arithmetic is too much for a model as small as tiny.toml's.
    """
    need_truth(config)
    for key, value in (("out_dir", f"{config.out_dir}_verifier"), ("ppo.domains", config.ppo.domains or ("translation",)), ("ppo.reward", "verifier"),
                       ("world.p_right", 0.2), ("reward.methods", "baseline"), ("ppo.methods", ()),
                       ("reward.epochs", 1),  # the reward model only lends the critic its weights
                       ("ppo.whiten", True), ("ppo.reward_clip", 10.0)):  # a rare success is many standard deviations
        config = assign(config, key, value)
    train.execute(config, "sft", "reward", slot=slot)
    run = open_run(config, slot)
    trained(run, "verifier", "reward_baseline", config.ppo)
    new = world.demonstrations(config.evaluate.prompts, f"{config.seed} verified", domains=config.ppo.domains)
    prompts = policy_prompts(run, [data.Pair(d["prompt"], "", "") for d in new])
    rows = {}
    for words, name in (("SFT", "sft"), ("PPO", "policy_verifier")):
        texts, drawn = answers(run, name, prompts, run.config.seed, config.ppo.temperature)
        rows[words] = {"success": float(np.mean([world.right(p, a) == 1 for (p, _), a in zip(prompts, texts)])),
                       "length": float(np.mean([len(r.responses[0]) for r in drawn]))}
    return rows
