"""What the trained models are worth: accuracy, calibration, noise detection, win rates.

First pure functions from numbers to a dictionary of numbers, then functions that run the models.
Accuracy is always d > 0, without a margin, on labels that no treatment has changed.  This file
reads the built-in world's truth; nothing that trains does, but PPO with ppo.reward = "verifier".

A better reward model can have the worse nll: trained on cleaned labels it is confident (larger
reward differences), and a tenth of the validation labels, which are never cleaned, contradict it.
N pairs.
"""
import random

import numpy as np
import torch

import world
from common import (
    embed_rows,
    load_model,
    make_sampling,
    member_names,
    policy_prompts,
    reward_diffs,
    sample_answers,
    score_rows,
)
from data import collate, response_tokens, topic, world_pairs
from losses import bradley_terry
from model import LanguageModel, RewardModel
from strength import auroc, average_precision, groups, precision_recall, strength

# ----------------------------------------------------------------------------------------------
# Pure functions


def bootstrap(values, cluster, resamples, seed, level=0.95):
    """Percentile interval of the mean by resampling whole clusters.

    values: (N,); cluster: (N,) of any values.  Pairs on one question are right or wrong together,
    so their question is drawn, and not the pair; None: each value is its own.  -> low, high
    """
    means = bootstrap_means(values, cluster, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_means(values, cluster, resamples, seed):
    """Means of the samples that bootstrap draws -> [float]"""
    values = np.asarray(values, float)
    if cluster is None:
        cluster = range(len(values))
    number = {name: i for i, name in enumerate(dict.fromkeys(cluster))}
    index = [number[name] for name in cluster]
    size = np.bincount(index)
    total = np.bincount(index, values)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(size), len(size))
        means.append(total[drawn].sum() / size[drawn].sum())
    return means


def standard_error(values):
    """Standard error of the mean over independent runs (seeds); nan for a single value"""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float("nan")
    return float(values.std(ddof=1) / len(values) ** 0.5)


def calibration(diffs, bins=10):
    """Reliability of p = sigmoid(reward difference), each pair in both orders.

    -> {"ece", "bins": [[mean p, share right, count]]}
    ECE is the mean of |share right - mean p| over equal-width bins of confidence max(p, 1 - p),
    weighted by their sizes.
    """
    diffs = np.asarray(diffs, float)
    p = 1 / (1 + np.exp(-diffs.clip(-500, 500)))
    confidence = np.maximum(p, 1 - p)
    right = p > 0.5
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    ece = 0.0
    for b in range(bins):
        in_bin = bin_of == b
        count = int(in_bin.sum())
        if count:
            mean = float(confidence[in_bin].mean())
            share = float(right[in_bin].mean())
            rows.append([mean, share, count])
            ece += abs(share - mean) * count
    return {"ece": ece / len(p), "bins": rows}


def longer_wins(lengths, gold=None):
    """Whether "the longer answer wins" is right, the baseline every reward model should beat.

    lengths: (N, 2) of chosen and rejected; gold: (N,) gold differences, none 0, or None: by labels
    -> (N,) 1, 0, or 0.5 where the lengths are equal
    """
    chosen, rejected = np.asarray(lengths).reshape(-1, 2).T
    right = np.where(chosen == rejected, 0.5, chosen > rejected)
    if gold is None:
        return right
    return np.where(np.asarray(gold) > 0, right, 1 - right)


def lengths_of(pairs):
    return [(len(p.chosen), len(p.rejected)) for p in pairs]


def question_of(pair):
    """What pairs have in common that are right or wrong together: the world's question, or the
    first human turn of a file's prompt"""
    return topic(pair) if pair.layout else world.question_of(pair.prompt)


def reward_scores(diffs, lengths, resamples, seed, gold=None, questions=None):
    """Accuracy and calibration of a reward model on held-out pairs.

    diffs: (N,) r(chosen) - r(rejected); lengths: (N, 2) characters of chosen and rejected
    gold: (N,) gold differences, where the truth is known
    questions: (N,) of question_of, which the intervals resample
    -> accuracy with its interval, chance and "the longer answer wins" beside it; nll; ece
    """
    diffs = np.asarray(diffs, float)
    zeros = torch.zeros(len(diffs), dtype=torch.float64)
    out = {
        "pairs": len(diffs),
        "questions": len(diffs if questions is None else set(questions)),
        "accuracy": float((diffs > 0).mean()),
        "chance": 0.5,
        "longer_wins": float(longer_wins(lengths).mean()),
        "accuracy_interval": bootstrap(diffs > 0, questions, resamples, seed),
        "nll": float(bradley_terry(torch.from_numpy(diffs), zeros).mean()),
        **calibration(diffs),
    }
    if gold is not None:
        gold = np.asarray(gold)
        right = diffs * gold > 0
        out["gold_accuracy"] = float(right.mean())
        out["gold_accuracy_interval"] = bootstrap(right, questions, resamples, seed)
        out["gold_longer_wins"] = float(longer_wins(lengths, gold).mean())
    return out


def group_accuracy(diffs, group, gold=None):
    """Accuracy in each strength group, by label and by gold -> {"label": [...], "gold": [...]}"""
    diffs = np.asarray(diffs)
    group = np.asarray(group)
    right = {"label": diffs > 0}
    if gold is not None:
        right["gold"] = diffs * np.asarray(gold) > 0
    out = {}
    for kind, is_right in right.items():
        out[kind] = [float(is_right[group == g].mean()) for g in range(int(group.max()) + 1)]
    return out


def group_means(mean, values, n):
    """Mean of the values in each of n groups of ascending strength -> [float]"""
    group = groups(mean, n)
    return [float(values[group == g].mean()) for g in range(int(group.max()) + 1)]


def noise_detection(diffs, errors, q):
    """How well the vote detects wrong labels.

    diffs: (M, N) of the members on the training pairs; errors: why each label is wrong, "" if right
    -> for each kind of error and for all: AUROC, average precision, and precision and recall among
    the q most suspect pairs, by low mean, by high std, and by the low difference of one member
    (averaged over members).  Each kind is compared with the right labels, not with other kinds.
    """
    errors = np.asarray(errors)
    mean, std = strength(diffs)
    signals = {"mean": [-mean], "std": [std], "single": list(-diffs)}
    out = {}
    for kind in ["all", *sorted(set(errors) - {""})]:
        is_error = errors != "" if kind == "all" else errors == kind
        used = torch.from_numpy(is_error | (errors == ""))
        positive = torch.from_numpy(is_error)[used]
        out[kind] = {"count": int(positive.sum())}
        for signal, scores in signals.items():
            out[kind] |= detection_scores(signal, [score[used] for score in scores], positive, q)
    return out


def detection_scores(signal, scores, positive, q):
    """Means over the scores of one signal -> {"auroc_SIGNAL", "ap_", "precision_", "recall_"}"""
    found = []
    for score in scores:
        precision, recall = precision_recall(score, positive, q)
        found.append((
            auroc(score, positive), average_precision(score, positive), precision, recall
        ))
    names = [f"{measure}_{signal}" for measure in ("auroc", "ap", "precision", "recall")]
    return dict(zip(names, np.mean(found, axis=0).tolist()))


def compare(judge, prompts, ours, theirs, tie, seed):
    """Win, tie and lose rates of our response against theirs to the same prompt.

    judge(prompt, response) -> float; scores closer than `tie` are a tie.  The judge gets the two in
    random order, so that one that prefers the first could not favour a side.
    """
    rng = random.Random(seed)
    counts = {"win": 0, "tie": 0, "lose": 0}
    for prompt, our, their in zip(prompts, ours, theirs):
        theirs_first = rng.random() < 0.5
        order = (their, our) if theirs_first else (our, their)
        first, second = [judge(prompt, response) for response in order]
        lead = second - first if theirs_first else first - second
        if abs(lead) < tie or lead == 0:
            counts["tie"] += 1
        elif lead > 0:
            counts["win"] += 1
        else:
            counts["lose"] += 1
    return {name: n / len(prompts) for name, n in counts.items()}


# ----------------------------------------------------------------------------------------------
# The hidden truth


def knows_train_truth(config):
    return config.data.train == ("world",)


def label_errors(run):
    """Why each training label is wrong, "" if it is right; None if the truth is not known"""
    if not knows_train_truth(run.cfg):
        return None
    truths = world_pairs(run.cfg)[2]
    return [truths[pair.index].error for pair in run.train.pairs]


def gold_diffs(run, name):
    """gold(chosen) - gold(rejected) of train, valid or a held-out domain -> (N,), or None"""
    in_domain = {"train": run.train, "valid": run.valid}
    if not knows_train_truth(run.cfg) or name not in in_domain and run.cfg.data.ood:
        return None
    encoded = in_domain[name] if name in in_domain else run.ood[name]
    diffs = []
    for pair in encoded.pairs:
        chosen = world.gold(pair.prompt, pair.chosen)
        diffs.append(chosen - world.gold(pair.prompt, pair.rejected))
    return np.array(diffs)


# ----------------------------------------------------------------------------------------------
# Running the models


def evaluate_vote(run, diffs):
    """The vote on held-out labels.  diffs: {"valid": (M, N), "unseen": (M / K, N) with folds}"""
    cfg = run.cfg
    out = {}
    sets = {"valid": ("valid", run.valid), "folds held out": ("unseen", run.train)}
    for where, (key, encoded) in sets.items():
        if key in diffs and encoded.pairs:
            gold = gold_diffs(run, "valid" if key == "valid" else "train")
            mean = strength(diffs[key])[0]
            lengths = lengths_of(encoded.pairs)
            questions = [question_of(pair) for pair in encoded.pairs]
            out[where] = reward_scores(
                mean, lengths, cfg.evaluate.bootstrap, cfg.seed, gold, questions
            )
    return out


def evaluate_strength(run, diffs, errors):
    """Strength of the training pairs in groups, and how many labels of each group are right"""
    n = run.cfg.evaluate.groups
    mean, std = strength(diffs["train"])
    out = {
        "doubted": float((mean < 0).float().mean()),
        "group_mean": group_means(mean, mean, n),
        "group_std": group_means(mean, std, n),
    }
    if errors is not None:
        is_right = torch.tensor([float(not error) for error in errors])
        out["group_right"] = group_means(mean, is_right, n)
    return out


def evaluate_rewards(run, diffs, names):
    """Reward models on every held-out set, and by strength group of the validation pairs.

    names: of reward models -> {method: {set: scores}}, {method: group accuracy}
    """
    cfg = run.cfg
    group = None  # given votes need not cover the validation pairs
    if "valid" in diffs:
        group = groups(diffs["valid"].mean(0), cfg.evaluate.groups)
    sets = {"valid": run.valid, **run.ood}
    scores = {}
    by_group = {}
    for name in names:
        method = name.removeprefix("reward_")
        scores[method] = {}
        for where, encoded in sets.items():
            if encoded.pairs:
                d = reward_diffs(run, name, encoded.rows).numpy()
                gold = gold_diffs(run, where)
                questions = [question_of(pair) for pair in encoded.pairs]
                scores[method][where] = reward_scores(
                    d, lengths_of(encoded.pairs), cfg.evaluate.bootstrap, cfg.seed, gold, questions
                )
                if where == "valid" and group is not None:
                    by_group[method] = group_accuracy(d, group, gold)
    return scores, by_group


def ensemble_reward(run, rows):
    """Mean reward of the members, the judge where the truth is not known.  -> (N,)"""
    rewards = []
    for name in member_names(run.cfg):
        model = load_model(run, RewardModel, name)
        rewards.append(score_rows(run, model, rows, "judge")[:, 0])
    return torch.stack(rewards).mean(0)


@torch.no_grad()
def kl_to_sft(run, name, rows):
    """KL of the policy NAME.pt to the SFT model at ppo.temperature: exact at every sampled token,
    summed over the response.  -> [nats]

    rows: responses sampled from that same distribution, without truncation; on responses of another
    distribution the sum would estimate no KL.  The EOS appended to a cut response does not count.
    """
    policy = load_model(run, LanguageModel, name)
    reference = load_model(run, LanguageModel, "sft")
    cfg = run.cfg.ppo
    out = []
    for start in range(0, len(rows), 64):
        part = rows[start:start + 64]
        batch = collate(part).to(run.device)
        out_pos, target = response_tokens(part)
        out_pos = out_pos.to(run.device)
        target = target.to(run.device)
        logps = []
        for model in (policy, reference):
            with run.autocast():
                logits = model(batch.tokens, out_pos=out_pos, inputs_embeds=batch.inputs_embeds)
            logits = logits.float() / cfg.temperature
            logits[:, :cfg.min_new_tokens, run.tokenizer.end_ids] = -torch.inf
            logps.append(logits.log_softmax(-1))
        logp, ref_logp = logps
        log_ratio = torch.where(logp > -torch.inf, logp - ref_logp, 0.0)
        t = torch.arange(target.shape[1], device=target.device)
        sampled = (target >= 0) & (t < cfg.max_new_tokens)
        out += ((logp.exp() * log_ratio).sum(-1) * sampled).sum(1).tolist()
    return out


def mean_kl(run, name, prompts):
    """Mean KL to SFT, in nats a response, over responses sampled as PPO samples, untruncated"""
    sampling = make_sampling(run, run.cfg.ppo)._replace(top_p=1.0, repetition_penalty=1.0)
    _, rows = sample_answers(run, name, prompts, run.cfg.seed, sampling)
    return float(np.mean(kl_to_sft(run, name, embed_rows(run, rows))))


def evaluate_policies(run, names, pairs, against=None, save=None, judge=None):
    """Policies respond to the same prompts -> {name: judge's score, win/tie/lose, KL, length}

    names: the first is sft, with which the others are compared
    against: {name: another policy that it is compared with as well}; save: file for the answers
    judge: "gold", or "ensemble", the members' mean reward; None: gold where the truth is known
    """
    cfg = run.cfg.evaluate
    if judge is None:
        judge = "gold" if knows_train_truth(run.cfg) else "ensemble"
    prompts = policy_prompts(run, pairs)[:cfg.prompts]
    texts = [text for text, _ in prompts]
    sampling = make_sampling(run, cfg)
    answers = {}
    scores = {}
    out = {}
    for name in names:
        answers[name], rows = sample_answers(run, name, prompts, run.cfg.seed, sampling)
        rows = embed_rows(run, rows)
        if judge == "gold":
            scores[name] = [world.gold(p, answer) for p, answer in zip(texts, answers[name])]
        else:
            scores[name] = ensemble_reward(run, rows).tolist()
        out[name] = {
            "judge": float(np.mean(scores[name])),
            "judge_se": standard_error(scores[name]),
            "kl": mean_kl(run, name, prompts),
            "length": float(np.mean([len(row.responses[0]) for row in rows])),
        }

    def win_rates(name, rival):
        score_of = {}
        for n in (rival, name):
            score_of |= dict(zip(zip(texts, answers[n]), scores[n]))

        def score(prompt, response):
            return score_of[prompt, response]

        return compare(score, texts, answers[name], answers[rival], cfg.tie, run.cfg.seed)

    for name in names[1:]:
        out[name] |= win_rates(name, "sft")
    for name, rival in (against or {}).items():
        out[name][f"against {rival}"] = win_rates(name, rival)
    if save:
        save_answers(run, save, texts, answers, scores)
    return out


def save_answers(run, path, texts, answers, scores):
    lines = []
    for i, prompt in enumerate(texts):
        line = {"prompt": prompt}
        for name in answers:
            line[name] = {"response": answers[name][i], "score": scores[name][i]}
        lines.append(line)
    run.save_jsonl(path, lines)


def ppo_curves(run, names):
    """Means of each PPO iteration: proxy reward, KL and, where it is known, gold reward"""
    out = {}
    for name in names:
        method = name.removeprefix("policy_")
        lines = run.load_jsonl(f"rollouts_{method}.jsonl")
        values = {
            "reward": [line["reward"] for line in lines],
            "kl": [line["kl"] for line in lines],
        }
        if knows_train_truth(run.cfg):
            values["judge"] = [world.gold(line["prompt"], line["response"]) for line in lines]
        out[method] = {}
        for key, column in values.items():
            per_iteration = np.reshape(column, (run.cfg.ppo.iterations, -1))
            out[method][key] = [float(np.mean(v)) for v in per_iteration]
    return out
