"""Judges of policies: the true quality, the ensemble, single reward models, and length.

All judge the same answers to the same prompts.  A judge's net gain is wins − losses of a policy
against SFT; a proxy overstates it where it is larger than by gold.
"""
import math

import numpy as np
import torch
from scipy.stats import norm

import train
from common import encode_answers, load_model, member_names, score_rows
from evaluate import ensemble_reward, evaluate_policies
from experiments.registry import experiment
from experiments.shared import change, need_truth
from experiments.statistics import couples
from model import RewardModel
from runtime import figures

NUM_PROMPTS = 100  # of the paper's judges
NUM_DRAWS = 2000
GAINS = (0.05, 0.1, 0.2, 0.4)  # wins − losses by the truth
ACCURACIES = (1.0, 0.9, 0.8, 0.7)
SURE = 0.95  # chance that the two policies are ordered right


def prompts_needed(gain, accuracy):
    """How many prompts order two policies right with the chance SURE.

    A judge that is right with probability a on each prompt, independently, sees the net gain
    m = (2a - 1) gain with the standard error sqrt((1 - m^2) / n), so its sign is right with
    probability Phi(m sqrt(n) / sqrt(1 - m^2)).
    gain: wins − losses by the truth, without ties; accuracy: a > .5
    """
    m = (2 * accuracy - 1) * gain
    return float(math.ceil(norm.ppf(SURE) ** 2 * (1 - m ** 2) / m ** 2))


def accuracy_needed(gain, num_prompts):
    """Accuracy with which so many prompts are enough; above 1: not even a perfect judge's are"""
    z = norm.ppf(SURE)
    m = z / (num_prompts + z ** 2) ** 0.5  # the net gain that is seen as surely
    return float((1 + m / gain) / 2)


def needs(gain):
    """Columns of one true gain"""
    row = {f"prompts, judge right on {a:.0%}": prompts_needed(gain, a) for a in ACCURACIES}
    needed = accuracy_needed(gain, NUM_PROMPTS)
    if needed <= 1:
        row[f"accuracy needed with {NUM_PROMPTS}"] = needed
    return row


def verdicts_of(scores, policy, is_same):
    """A judge's verdict on the policy against SFT, prompt by prompt -> (P,): 1 win, 0 tie, -1 loss

    scores: {"sft" and the policy: (P,)}; is_same: (P,), whether the two answers are the same text:
    a tie, though its two scores may differ by a rounding
    """
    return np.where(is_same, 0, np.sign(scores[policy] - scores["sft"])).astype(int)


def share_ordered(verdicts, order, seed):
    """Share of draws of NUM_PROMPTS prompts on which wins − losses have the sign `order`"""
    rng = np.random.default_rng(seed)
    count = 0
    for _ in range(NUM_DRAWS):
        few = rng.permutation(len(verdicts))[:NUM_PROMPTS]
        count += np.sign(verdicts[few].sum()) == order
    return float(count / NUM_DRAWS)


def judge_columns(scores, gold, policy, is_same, seed):
    """One judge of one policy against SFT.

    scores, gold: {"sft" and the policy: (P,)}; is_same: (P,), as in verdicts_of
    """
    verdicts = verdicts_of(scores, policy, is_same)
    gold_verdicts = verdicts_of(gold, policy, is_same)
    row = {
        "win": float((verdicts > 0).mean()),
        "lose": float((verdicts < 0).mean()),
        "win - lose": float(verdicts.mean()),
        "overstated": float(verdicts.mean() - gold_verdicts.mean()),
    }
    order = np.sign(gold_verdicts.sum())
    if order != 0:
        row["orders right on 100"] = share_ordered(verdicts, order, seed)
    decided = gold_verdicts != 0
    if decided.any():
        row["agrees with gold"] = float((verdicts == gold_verdicts)[decided].mean())
    return row


def answers_of(run, policies, path):
    """Answers of all policies to the validation prompts

    -> {policy: Rows}, {policy: gold (P,)}, {policy: (P,), whether the text is SFT's}
    """
    evaluate_policies(run, policies, run.valid.pairs, save=path)
    lines = run.load_jsonl(path)
    rows = {}
    gold = {}
    is_same = {}
    for policy in policies:
        answers = [(line["prompt"], line[policy]["response"]) for line in lines]
        rows[policy] = encode_answers(run, answers)
        gold[policy] = np.array([line[policy]["score"] for line in lines])
        texts = [(line[policy]["response"], line["sft"]["response"]) for line in lines]
        is_same[policy] = np.array([ours == theirs for ours, theirs in texts])
    return rows, gold, is_same


def scores_by_judge(run, rows, gold):
    """-> {judge: {policy: (P,)}}; the reward models are those that PPO was trained against"""
    judges = {"gold": gold}
    judges["ensemble"] = {name: ensemble_reward(run, part).numpy() for name, part in rows.items()}
    models = {"one member": member_names(run.cfg)[0]}
    for method in run.cfg.reward.methods:
        models[f"reward model on {method}"] = f"reward_{method}"
    for judge, name in models.items():
        model = load_model(run, RewardModel, name)
        judges[judge] = {p: score_rows(run, model, part)[:, 0].numpy() for p, part in rows.items()}
    judges["longer answer wins"] = {
        name: np.array([len(row.responses[0]) for row in part], float)
        for name, part in rows.items()
    }
    return judges


def judge_comparisons(rows):
    """Every judge's net gain against gold's, policy by policy"""
    references = {}
    for row in rows:
        policy, _, judge = row.partition(", by ")
        if judge not in ("", "gold"):
            references[row] = f"{policy}, by gold"
    return couples(references, "win - lose")(rows)


def plot_judges(summary, path):
    columns = ["win - lose", "agrees with gold", "orders right on 100"]
    rows = {name: row for name, row in summary.items() if "win" in row}
    figures.bars(rows, path, "The same answers by different judges", columns, None)


@experiment("judges", base="tiny", plot=plot_judges, comparisons=judge_comparisons)
def compare_judges(config, slot=0):
    """Wins, ties and losses of the same answers by gold, ensemble, one reward model and length."""
    need_truth(config)
    config = change(config, {"evaluate.prompts": max(600, config.evaluate.prompts)})
    run = train.ensure_stages(config, "sft", "ensemble", "strength", "reward", "ppo", slot=slot)
    policies = ["sft", *(f"policy_{method}" for method in config.ppo.methods)]
    with torch.no_grad():
        rows, gold, is_same = answers_of(run, policies, "answers_judged.jsonl")
        judges = scores_by_judge(run, rows, gold)
    table = {}
    for policy in policies[1:]:
        for judge, scores in judges.items():
            label = f"{policy.replace('policy_', 'PPO on ')}, by {judge}"
            table[label] = judge_columns(scores, gold, policy, is_same[policy], config.seed)
    for gain in GAINS:
        table[f"a true gain of {gain:g}"] = needs(gain)
    return table
