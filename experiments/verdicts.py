"""Domains with a verdict (open question 5): translation and programs, which a program judges.

    SFT                 a fifth of its demonstrations are right
    supervised          SFT on right answers alone: what labels of a specialist would give
    PPO, reward model   trained on pairs of the domain, with the annotators' errors
    PPO, verifier       the program's verdict is the reward
    PPO, both           the verdict beside the reward model
    group baseline      REINFORCE on the verdict with the mean of eight answers as baseline (GRPO)
    rejection sampling  sixteen answers of SFT to each prompt; SFT on those that are accepted
    expert iteration    four answers to each prompt in each of four rounds; SFT of the first
                        model on all accepted so far

Success is measured on prompts that no method has trained on word for word; nearly all of their
questions occur in training, after another introduction or earlier turn.  Points of a curve before
its last one are of the answers that a method draws itself, to its own prompts.
Programs need many epochs: on right answers success is .06 after two and .44 after thirty
(docs/log.md).
"""
import copy
import math
from typing import NamedTuple

import numpy as np

import train
import world
from common import (
    encode_answers,
    encode_set,
    load_model,
    make_sampling,
    policy_prompts,
    sample_answers,
    training_prompts,
)
from data import pairs_of_world, world_noise
from experiments.registry import experiment
from experiments.shared import change, need_truth, plain_labels, unseen_prompts
from experiments.statistics import Comparison
from model import LanguageModel
from runtime import figures, files

DOMAINS = ("translation", "programs")
ANSWERS_PER_PROMPT = 8  # of the group baseline
REJECTION_ANSWERS = 16
EXPERT_ANSWERS = 4
EXPERT_ROUNDS = 4
FIT_STEPS = 5000        # of SFT on right or accepted answers, whatever their number
MAX_EPOCHS = 40         # and not more passes over them
ROLLOUT = 256           # answers of an iteration of PPO and of the group baseline
CURVE_POINTS = 10       # of PPO and of the group baseline


class Learned(NamedTuple):
    """What a method has learned, and from how much."""
    policy: str     # POLICY.pt
    samples: int    # answers drawn while it trained
    tokens: int     # response tokens trained on, each pass counted
    curve: tuple = ()  # on the way: (samples, tokens, share of its own answers that is accepted)


# --------------------------------------------------------------------------------------------------
# Answers and verdicts


def accepts(prompt, text):
    return world.right(prompt, text) == 1


def success(run, policy, prompts):
    """Share of accepted answers, one to each prompt, drawn as PPO draws them"""
    sampling = make_sampling(run, run.cfg.ppo)
    texts, _ = sample_answers(run, policy, prompts, run.cfg.seed, sampling)
    return float(np.mean([accepts(prompt, text) for (prompt, _), text in zip(prompts, texts)]))


def accepted_rows(run, policy, prompts, num_samples, seed):
    """Sample answers to each prompt -> Rows of the accepted ones, different ones once, and the
    share of answers that is accepted"""
    sampling = make_sampling(run, run.cfg.ppo)
    texts, rows = sample_answers(run, policy, prompts, seed, sampling, num_samples)
    accepted = {}
    num_accepted = 0
    for i, (prompt, _) in enumerate(prompts):
        for branch, text in enumerate(texts[i * num_samples:(i + 1) * num_samples]):
            if accepts(prompt, text):
                accepted[prompt, text] = rows[i].branches(branch)
                num_accepted += 1
    return list(accepted.values()), num_accepted / len(texts)


def train_language_model(run, name, rows):
    """SFT of the SFT model on some rows, once, about FIT_STEPS steps -> tokens trained on"""
    epochs = min(math.ceil(FIT_STEPS * run.cfg.sft.batch / len(rows)), MAX_EPOCHS)
    run = run.with_settings({"sft.epochs": epochs})
    settings = ["sft.epochs", "sft.batch", "sft.lr", *train.TRAINING_SETTINGS]
    tokens = [[row.prompt.tolist(), row.responses[0].tolist()] for row in rows]
    if run.needs(name, settings, ["sft"], extra={"rows": files.digest(tokens)}):
        train.fit_language_model(run, name, load_model(run, LanguageModel, "sft"), rows)
    return sum(len(row.responses[0]) for row in rows) * run.cfg.sft.epochs


# --------------------------------------------------------------------------------------------------
# Methods


def right_demonstrations(run, count):
    """-> [{"prompt", "response"}], all of them right"""
    return world.demonstrations(count, f"{run.cfg.seed} right", 1.0, run.cfg.ppo.domains)


def supervised(run, demos):
    rows = encode_answers(run, [(demo["prompt"], demo["response"]) for demo in demos])
    tokens = train_language_model(run, "sft_right", rows)
    return Learned("sft_right", 0, tokens)


def rejection_sampling(run, prompts):
    rows, share = accepted_rows(run, "sft", prompts, REJECTION_ANSWERS, run.cfg.seed)
    tokens = 0
    name = "sft"
    if rows:
        name = "sft_rejection"
        tokens = train_language_model(run, name, rows)
    return Learned(name, REJECTION_ANSWERS * len(prompts), tokens, ((0, 0, share),))


def expert_iteration(run, prompts):
    rows = {}
    tokens = 0
    policy = "sft"
    curve = []
    for number in range(1, EXPERT_ROUNDS + 1):
        seed = run.cfg.seed + 1000 * number
        accepted, share = accepted_rows(run, policy, prompts, EXPERT_ANSWERS, seed)
        curve.append(((number - 1) * EXPERT_ANSWERS * len(prompts), tokens, share))
        for row in accepted:
            rows[row.prompt.tobytes(), row.responses[0].tobytes()] = row
        if not rows:
            continue
        name = f"sft_expert_{number}"
        tokens += train_language_model(run, name, list(rows.values()))
        policy = name
    return Learned(policy, EXPERT_ROUNDS * EXPERT_ANSWERS * len(prompts), tokens, tuple(curve))


def domain_pairs(run):
    """Pairs of the domain, with the annotators' errors -> [Pair]"""
    cfg = run.cfg
    rows, _ = world.pairs(
        cfg.world.pairs, f"{cfg.seed} domain", world_noise(cfg), cfg.ppo.domains
    )
    return pairs_of_world(rows, "domain")


def domain_reward_model(run, pairs):
    """A reward model on pairs of the domain -> run that has these pairs"""
    run = copy.copy(run)
    run.__dict__["train"] = encode_set(run, "domain", pairs)
    labels = plain_labels(run)
    train.train_reward_variant(run, "reward_domain", labels, run.train.rows[:1])
    return run


def by_ppo(run, name, **settings):
    """PPO under other [ppo] settings, on the reward model of the domain -> Learned"""
    settings = {f"ppo.{key}": value for key, value in settings.items()}
    run = run.with_settings(settings)
    lines = train.train_policy_once(run, name, "reward_domain")
    tokens = [0, *np.cumsum([trained_tokens(run, line) for line in lines]).tolist()]
    curve = []
    for part in np.array_split(np.arange(len(lines)), min(CURVE_POINTS, len(lines))):
        answers = [lines[i] for i in part]
        share = np.mean([accepts(line["prompt"], line["response"]) for line in answers])
        middle = int(part[len(part) // 2])  # the share is a mean over the part
        curve.append((middle, tokens[middle], float(share)))
    return Learned(f"policy_{name}", len(lines), tokens[-1], tuple(curve))


def trained_tokens(run, line):
    """How many tokens of an answer the policy is trained on, each pass counted, EOS too

    0 in the iterations in which the critic trains alone.  The answer's text is tokenized anew,
    which a policy may have done otherwise.  line: of rollouts_NAME.jsonl
    """
    cfg = run.cfg.ppo
    if line["iteration"] < cfg.critic_warmup_iters:
        return 0
    length = len(run.tokenizer.encode_text(line["response"])) + 1
    return min(length, cfg.max_new_tokens) * cfg.num_ppo_epochs  # an answer cut short has no EOS


def learn(run, prompts, demos, pairs):
    """Train by every method -> {row: Learned}

    prompts: [(text, token ids)], which answers are drawn to; demos: as many right answers;
    pairs: [Pair] of the domain
    """
    learned = {
        "SFT": Learned("sft", 0, 0),
        "supervised": supervised(run, demos),
        "rejection sampling": rejection_sampling(run, prompts),
        "expert iteration": expert_iteration(run, prompts),
    }
    run = domain_reward_model(run, pairs)
    learned["PPO, reward model"] = by_ppo(run, "verdict_model", reward="model")
    learned["PPO, verifier"] = by_ppo(run, "verdict_verifier", reward="verifier")
    learned["PPO, both"] = by_ppo(run, "verdict_both", reward="both")
    learned["group baseline"] = by_ppo(
        run, "verdict_group", reward="verifier", advantage="group", critic_warmup_iters=0,
        answers_per_prompt=ANSWERS_PER_PROMPT, normalize=False, whiten=False,
    )
    return learned


# --------------------------------------------------------------------------------------------------
# The experiment


def verdict_comparisons(rows):
    """Every method against SFT, and against PPO on the verifier, within its domain"""
    found = []
    for row in rows:
        domain, _, method = row.partition(": ")
        for reference in ("SFT", "PPO, verifier"):
            if method not in ("SFT", reference) and f"{domain}: {reference}" in rows:
                found.append(Comparison(row, f"{domain}: {reference}", "success"))
    return found


def plot_verdicts(summary, path):
    costs = {"curve: samples": "answers drawn", "curve: tokens": "response tokens trained on"}
    figures.learning_curves(
        summary, path, "Domains with a verdict", costs, "curve: success", "share accepted"
    )


@experiment("verdicts", plot=plot_verdicts, comparisons=verdict_comparisons)
def compare_verdicts(config, slot=0):
    """Translation and programs by a reward model, by the verifier, by both, and by specialists."""
    need_truth(config)
    rows = {}
    for domain in DOMAINS:
        settings = {
            "out_dir": f"{config.out_dir}_verdict_{domain}",
            "ppo.domains": (domain,),
            "world.p_right": 0.2,
            "reward.methods": (),
            "ppo.methods": (),
            "ppo.whiten": True,
            "ppo.target_kl": 0.0,     # every answer is trained on in every epoch
            "ppo.rollout_batch_size": ROLLOUT,
            "ppo.reward_clip": 10.0,  # a rare success is many standard deviations from the mean
        }
        run = train.ensure_stages(change(config, settings), "sft", slot=slot)
        prompts = policy_prompts(run, training_prompts(run))
        demos = right_demonstrations(run, len(prompts))
        pairs = domain_pairs(run)
        others = [demo["prompt"] for demo in demos] + [pair.prompt for pair in pairs]
        test_prompts = unseen_prompts(run, (domain,), f"{config.seed} verified", others)
        for name, learned in learn(run, prompts, demos, pairs).items():
            end = (learned.samples, learned.tokens, success(run, learned.policy, test_prompts))
            samples, tokens, shares = zip(*learned.curve, end)
            rows[f"{domain}: {name}"] = {
                "success": shares[-1],
                "samples": float(samples[-1]),
                "tokens trained": float(tokens[-1]),
                "curve: samples": list(map(float, samples)),
                "curve: tokens": list(map(float, tokens)),
                "curve: success": list(shares),
            }
    return rows
