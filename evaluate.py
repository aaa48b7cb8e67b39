"""What the trained models are worth: accuracy, calibration, strength groups, noise detection, win rates.

First pure functions from numbers to a dictionary of numbers, then the stage that runs the models.  Accuracy is always
d > 0, without any margin, on labels that no treatment has touched.  This is the only file that reads the built-in world's
truth.  N pairs.
"""
import json
import math
import random
from dataclasses import asdict

import numpy as np
import torch

import data
import figures
import files
import metarm
import states
import world
from losses import bradley_terry
from metarm import rounds
from model import LanguageModel, RewardModel
from run import answers, gaps_of, load_model, policy_prompts, rewards_of, world_pairs
from strength import auroc, average_precision, groups, precision_recall, strength


def bootstrap(values, resamples, seed, level=0.95):
    """Percentile interval of the mean by resampling.  (N,) -> low, high"""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    return tuple(float(q) for q in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))


def standard_error(values):
    """Of the mean over independent runs (seeds)."""
    values = np.asarray(values, float)
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def calibration(gaps, bins=10):
    """Reliability of p = sigmoid(gap), each pair taken in both orders -> {"ece", "bins": [[mean p, share right, count]]}

    ECE is the average of |share right - mean p| over equal-width bins of confidence max(p, 1 - p), weighted by their size.
    """
    p = 1 / (1 + np.exp(-np.asarray(gaps, float).clip(-500, 500)))
    confidence, right = np.maximum(p, 1 - p), p > 0.5
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = [[float(confidence[which == b].mean()), float(right[which == b].mean()), int((which == b).sum())]
            for b in range(bins) if (which == b).any()]
    return {"ece": sum(abs(share - mean) * n for mean, share, n in rows) / len(p), "bins": rows}


def longer_wins(lengths):
    """What "the longer answer wins" is right in.  lengths: (N, 2) characters of chosen and rejected -> (N,) 1, 0, or 0.5 if they are equal"""
    chosen, rejected = np.reshape(lengths, (-1, 2)).T
    return np.where(chosen == rejected, 0.5, chosen > rejected)


def lengths_of(pairs):
    return [(len(p.chosen), len(p.rejected)) for p in pairs]


def reward_scores(gaps, lengths, resamples, seed, gold=None):
    """A reward model on held-out pairs.

    gaps: (N,) r(chosen) - r(rejected); lengths: (N, 2) characters of chosen and rejected; gold: (N,) gold differences,
    where the truth is known -> accuracy with its interval, beside chance and "the longer answer wins"; nll; ece
    """
    gaps, longer = np.asarray(gaps, float), longer_wins(lengths)
    out = {"pairs": len(gaps), "accuracy": float((gaps > 0).mean()), "chance": 0.5, "longer_wins": float(longer.mean()),
           "accuracy_interval": bootstrap(gaps > 0, resamples, seed),
           "nll": float(bradley_terry(torch.from_numpy(gaps), torch.zeros(len(gaps), dtype=torch.float64)).mean()),
           **calibration(gaps)}
    if gold is not None:
        gold = np.asarray(gold)
        right = gaps * gold > 0
        out |= {"gold_accuracy": float(right.mean()), "gold_accuracy_interval": bootstrap(right, resamples, seed),
                "gold_longer_wins": float(np.where(gold > 0, longer, 1 - longer).mean())}
    return out


def group_accuracy(gaps, group, gold=None):
    """Accuracy in each strength group, by label and by gold -> {"label": [...], "gold": [...]}"""
    gaps, group = np.asarray(gaps), np.asarray(group)
    present = range(int(group.max()) + 1)
    out = {"label": [float((gaps[group == g] > 0).mean()) for g in present]}
    if gold is not None:
        right = gaps * np.asarray(gold) > 0
        out["gold"] = [float(right[group == g].mean()) for g in present]
    return out


def noise_detection(gaps, errors, q):
    """How well the vote finds wrong labels.

    gaps: (M, N) of the members on the training pairs; errors: why each label is wrong, "" if it is right
    -> per kind of error, and for all: AUROC, average precision, and precision and recall in the q most suspect pairs, by
    low mean, by high std, and by the low gap of one member alone (averaged over members).  Each kind is set against the
    rightly labelled pairs, not against the other kinds.
    """
    errors = np.asarray(errors)
    mean, std = gaps.mean(0), gaps.std(0, correction=0)
    out = {}
    for name in ["all", *sorted(set(errors) - {""})]:
        positive = errors != "" if name == "all" else errors == name
        use = torch.from_numpy(positive | (errors == ""))
        positive = torch.from_numpy(positive)[use]
        out[name] = {"count": int(positive.sum())}
        for signal, scores in (("mean", [-mean]), ("std", [std]), ("single", list(-gaps))):
            found = [(auroc(s[use], positive), average_precision(s[use], positive), *precision_recall(s[use], positive, q)) for s in scores]
            out[name] |= zip((f"auroc_{signal}", f"ap_{signal}", f"precision_{signal}", f"recall_{signal}"), np.mean(found, axis=0).tolist())
    return out


def compare(judge, prompts, ours, theirs, tie, seed):
    """Win, tie and lose of one answer against another to the same prompt.

    judge(prompt, response) -> float; answers closer than `tie` are declared a tie.  The judge is shown the two in random
    order, so that one with a liking for the first could not favour a side.
    """
    rng = random.Random(seed)
    counts = {"win": 0, "tie": 0, "lose": 0}
    for prompt, our, their in zip(prompts, ours, theirs):
        turned = rng.random() < 0.5
        first, second = (judge(prompt, r) for r in ((their, our) if turned else (our, their)))
        difference = second - first if turned else first - second
        counts["tie" if abs(difference) < tie or difference == 0 else "win" if difference > 0 else "lose"] += 1
    return {name: n / len(prompts) for name, n in counts.items()}


def best_of_n(proxy, gold, n):
    """Expected gold reward of the answer that the proxy likes best among n drawn from N, without bias.  arXiv 2112.09332, app. I

        sum over the N in ascending order of the proxy of  C(worse, n - 1) / C(N, n) gold,  worse: how many stand before it

    proxy, gold: (N,) of answers to one prompt; 1 <= n <= N -> float.  It is the mean over all C(N, n) subsets; of answers that the
    proxy likes alike, each is as likely to be taken.
    """
    if not 1 <= n <= len(proxy):
        raise ValueError(f"best_of_n: n = {n} of {len(proxy)} answers; draw at least n")
    weight = np.array([math.comb(worse, n - 1) / math.comb(len(proxy), n) for worse in range(len(proxy))])
    _, inverse, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    alike = np.add.reduceat(weight, counts.cumsum() - counts) / counts
    return float((alike[inverse] * np.asarray(gold, float)).sum())


def best_of_n_kl(n):
    """KL of the best of n answers to one drawn plainly, in nats.  arXiv 2009.01325, app. G.3; an upper bound, 2401.01879"""
    return math.log(n) - (n - 1) / n


def table(head, rows):
    """Plain text with aligned columns; numbers to three digits."""
    cells = [head] + [["" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def report(results):
    """The final table, from results.json's dictionary -> text"""
    out = []
    if noise := results.get("noise"):
        out += [table(["wrong labels found", "by mean", "by std", "by one model", "precision", "recall", "of std", "of one model"],
                      [[f"{name} ({n['count']})", n["auroc_mean"], n["auroc_std"], n["auroc_single"], n["precision_mean"], n["recall_mean"],
                        f"{n['precision_std']:.3f}/{n['recall_std']:.3f}", f"{n['precision_single']:.3f}/{n['recall_single']:.3f}"]
                       for name, n in noise.items()]),
                "(AUROC of mean strength, std and one member; then precision and recall among the share q that each suspects most)\n"]
    rows = []
    for name, sets in {"vote": results.get("vote", {}), **results["reward"]}.items():
        for where, r in sets.items():
            low, high = r["accuracy_interval"]
            rows.append([f"{name} on {where}", r["pairs"], r["accuracy"], f"{low:.3f}-{high:.3f}", r["longer_wins"],
                         r.get("gold_accuracy"), r["nll"], r["ece"]])
    if rows:
        out += [table(["reward model", "pairs", "accuracy", "95 %", "longer", "gold acc.", "nll", "ece"], rows),
                "(accuracy by the data's labels; chance is 0.5; longer: the longer answer wins; gold acc.: by the true quality)\n"]
    for where, r in results.get("vote", {}).items():
        if r["accuracy_interval"][0] <= max(r["chance"], r["longer_wins"]):
            out.append(f"warning: on {where}, the vote agrees with {r['accuracy']:.1%} of the labels, not surely more than length alone "
                       f"({r['longer_wins']:.1%}) or chance:\nits doubts say more about the voters than about the labels. More pairs, a longer "
                       f"ensemble.epochs or a larger model may help.\n")
    if results.get("policy"):
        out += [table([f"policy, judged by {results['judge']}", "score", "win", "tie", "lose", "win - lose", "kl", "length"],
                      [[name, p["judge"], p.get("win"), p.get("tie"), p.get("lose"),
                        None if "win" not in p else p["win"] - p["lose"], p["kl"], p["length"]]
                       for name, p in results["policy"].items()]),
                "(against the SFT model's answer to the same prompt; kl in nats an answer, length in tokens)"]
    compared = [[f"{name}{where}", w["win"], w["tie"], w["lose"], w["win"] - w["lose"]] for key, where in (("policy", ""), ("policy_ood", ", out of distribution"))
              for name, p in results.get(key, {}).items() for against, w in p.items() if against.startswith("against ")]
    if compared:
        out += ["\n" + table(["rounds, against plain PPO", "win", "tie", "lose", "win - lose"], compared)]
    return "\n".join(out)


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def evaluate(run):
    """The last stage: results.json and figures/ from everything that the others have left."""
    c = run.config
    e, q = c.evaluate, c.strength.q
    errors = errors_of(run)
    gaps = files.load_tensors(run.path("gaps.pt"))
    mean, std = strength(gaps["train"])
    sets = {name: part for name, part in {"valid": run.valid, **run.ood}.items() if part[0]}
    results = {"config": asdict(c), "seed": c.seed, "versions": files.versions(), "vote": {}, "reward": {}, "groups": {}, "policy": {}}
    with open(run.path("audit.json")) as file:
        results["audit"] = json.load(file)
    if run.valid[0]:
        results["vote"]["valid"] = reward_scores(strength(gaps["valid"])[0], lengths_of(run.valid[0]), e.bootstrap, c.seed, gold_gaps(run, "valid"))
    if c.ensemble.folds:
        results["vote"]["folds held out"] = reward_scores(strength(gaps["unseen"])[0], lengths_of(run.train[0]), e.bootstrap, c.seed, gold_gaps(run, "train"))
    results["strength"] = {"doubted": float((mean < 0).float().mean()), "group_mean": group_means(mean, mean, e.groups),
                           "group_std": group_means(mean, std, e.groups)}
    if errors is not None:
        results["noise"] = noise_detection(gaps["train"], errors, q)
        results["strength"]["group_right"] = group_means(mean, torch.tensor([float(not error) for error in errors]), e.groups)
    group = groups(gaps["valid"].mean(0), e.groups)
    for unit in reward_models(c):
        method = unit.removeprefix("reward_")
        results["reward"][method] = {}
        for name, (pairs, rows) in sets.items():
            g = gaps_of(run, unit, rows).numpy()
            known = gold_gaps(run, name)
            results["reward"][method][name] = reward_scores(g, lengths_of(pairs), e.bootstrap, c.seed, known)
            if name == "valid":
                results["groups"][method] = group_accuracy(g, group, known)
    curves, results["judge"] = {}, "gold reward" if errors is not None else "the ensemble (a proxy)"
    if names := policies(c):
        plain = f"policy_{c.meta.method}"
        against = {r.policy: plain for r in rounds(c) if plain in names}
        results["policy"] = evaluate_policies(run, errors is not None, ["sft", *names], run.valid[0], against, run.path("answers.jsonl"))
        if c.meta.rounds and len(elsewhere := metarm.ood_halves(run)[1]) > 0:
            known = errors is not None and not c.data.ood
            results["policy_ood"] = evaluate_policies(run, known, ["sft", *names], elsewhere, against, run.path("answers_ood.jsonl"))
        curves = ppo_curves(run, errors is not None)
        results["ppo"] = curves
    files.save_json(run.path("results.json"), results)
    figures.strength_histogram(mean.numpy(), errors, run.path("figures/strength.png"))
    if results["reward"]:
        figures.group_accuracy(results["groups"], run.path("figures/groups.png"))
        figures.reliability(results["reward"], run.path("figures/reliability.png"))
    if curves:
        figures.ppo_curves(curves, run.path("figures/ppo.png"), results["judge"])
        if errors is not None:
            figures.summary(mean.numpy(), errors, curves, run.path("figures/summary.png"), results["judge"])


def errors_of(run):
    """Why each training label is wrong, "" if it is right; None if nobody knows.  With gold_gaps, all that is read of the truth"""
    if run.config.data.train != ("world",):
        return None
    truths = world_pairs(run.config)[2]
    return [truths[p.index].error for p in run.train[0]]


def gold_gaps(run, name):
    """gold(chosen) - gold(rejected) of train, valid or a held-out domain of the world.  -> (N,), or None if it is not known"""
    c = run.config
    if c.data.train != ("world",) or name not in ("train", "valid") and c.data.ood:
        return None
    pairs = {"train": run.train, "valid": run.valid}.get(name) or run.ood[name]
    return np.array([world.gold(p.prompt, p.chosen) - world.gold(p.prompt, p.rejected) for p in pairs[0]])


def reward_models(config):
    """The files of all reward models of a run, those of rounds included"""
    return [*(f"reward_{m}" for m in config.reward.methods), *(r.reward for r in rounds(config) if r.reward != r.start)]


def policies(config):
    return [*(f"policy_{m}" for m in config.ppo.methods), *(r.policy for r in rounds(config))]


def group_means(mean, values, n):
    group = groups(mean, n)
    return [float(values[group == g].mean()) for g in range(int(group.max()) + 1)]


def ensemble_reward(run, rows):
    """The members' mean reward of each response: the judge where there is no truth.  -> (N,)"""
    members = [f"member_{m:02d}" for m in range(run.config.ensemble.members)]
    return torch.stack([rewards_of(run, load_model(run, RewardModel, m), rows, "judge")[:, 0] for m in members]).mean(0)


@torch.no_grad()
def kl_to_sft(run, name, rows):
    """KL of the policy NAME.pt to the SFT model, exact at every token that it chose and summed over the answer.  -> [nats]

    rows: of `answers`; an answer cut by the length limit has an end there that nobody chose, which does not count.
    """
    model, reference = (load_model(run, LanguageModel, n) for n in (name, "sft"))
    s, end, out = run.config.ppo, data.end_id(run.encoding), []
    for start in range(0, len(rows), 64):
        part = rows[start:start + 64]
        batch, (read, target) = data.collate(part).to(run.device), (x.to(run.device) for x in data.response_tokens(part))
        with run.autocast():
            logits = [m(batch.tokens, read=read, states=batch.states).float() for m in (model, reference)]
        for scores in logits:  # before min_new, neither of the two can end
            scores[:, :s.min_new, end] = -torch.inf
        logp, ref = (scores.log_softmax(-1) for scores in logits)
        difference = torch.where(logp > -torch.inf, logp - ref, 0.0)
        chosen = (target >= 0) & (torch.arange(target.shape[1], device=target.device) < s.max_new)
        out += ((logp.exp() * difference).sum(-1) * chosen).sum(1).tolist()
    return out


def evaluate_policies(run, known, names, pairs, against=None, save=None):
    """Policies answer the same prompts -> name: judge's score, win/tie/lose against SFT, KL, length

    names: the first is sft; against: {name: a policy that it is compared with as well}; save: the answers go there
    """
    c, e = run.config, run.config.evaluate
    prompts = policy_prompts(run, pairs)[:e.prompts]
    out, said, scores = {}, {}, {}
    for name in names:
        said[name], rows = answers(run, name, prompts, c.seed, e.temperature, e.top_p)
        rows = states.compute(run, rows)
        scores[name] = [world.gold(p, a) for (p, _), a in zip(prompts, said[name])] if known else ensemble_reward(run, rows).tolist()
        out[name] = {"judge": float(np.mean(scores[name])), "judge_se": standard_error(scores[name]), "kl": float(np.mean(kl_to_sft(run, name, rows))),
                     "length": float(np.mean([len(r.responses[0]) for r in rows]))}

    def beaten(name, other):
        score = {(p, a): s for n in (other, name) for (p, _), a, s in zip(prompts, said[n], scores[n])}
        return compare(lambda p, a: score[p, a], [p for p, _ in prompts], said[name], said[other], e.tie, c.seed)

    for name in names[1:]:
        out[name] |= beaten(name, "sft")
    for name, other in (against or {}).items():
        out[name][f"against {other}"] = beaten(name, other)
    if save:
        files.save_jsonl(save, ({"prompt": p, **{n: {"response": said[n][i], "score": scores[n][i]} for n in names}} for i, (p, _) in enumerate(prompts)))
    return out


def ppo_curves(run, known):
    """Per iteration of PPO: proxy reward, KL and, where it is known, the gold reward of the answers sampled."""
    out = {}
    for method in [name.removeprefix("policy_") for name in policies(run.config)]:
        lines = [line for _, line in data.read_jsonl(run.path(f"rollouts_{method}.jsonl"))]
        by = lambda value: [float(np.mean(v)) for v in np.array([value(line) for line in lines]).reshape(run.config.ppo.iterations, -1)]
        out[method] = {"reward": by(lambda l: l["reward"]), "kl": by(lambda l: l["kl"])}
        if known:
            out[method]["judge"] = by(lambda l: world.gold(l["prompt"], l["response"]))
    return out
