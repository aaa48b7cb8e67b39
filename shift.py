"""Experiments on shifted data: contrastive terms and MetaRM (the paper's Fig. 11-16, Tables 2 and 3, and what it leaves open).

Functions of a configuration, as in labels.py.  "gold" is the true quality, "shift" whatever a reward model has not been trained
on: other domains, requests it has not met, answers of a policy that has moved.
"""
import os
from dataclasses import replace

import numpy as np
import torch

import data
import evaluate
import files
import loop
import metarm
import train
import world
from config import ConfigError, Contrast, assign
from evaluate import evaluate_policies, gold_gaps, lengths_of, longer_wins
from labels import OTHERS, PAPER, gap, need_truth, over_training, reward_model, treated, voted
from losses import difference
from model import RewardModel
from policies import trained
from run import gaps_of, load_model, open_run, rewards_of
from strength import treat

TERMS = {  # arXiv 2401.06080, sec. 4; batch 16 has 32 items, fewer than 50 prototypes: hence a queue
    "baseline": Contrast(),
    "simcse": Contrast(term="simcse"),
    "simcse-diff": Contrast(term="simcse", items="difference"),
    "swav": Contrast(term="swav", weight=0.1, queue=256),
    "swav-diff": Contrast(term="swav", items="difference", weight=0.5, prototypes=20),
}


def begun(config, slot, *stages, truth=True):
    if truth:
        need_truth(config)
    train.execute(config, "sft", *stages, slot=slot)
    return open_run(config, slot)


def gold_accuracy(run, model, rows, gold):
    return float((gaps_of(run, model, rows).numpy() * gold > 0).mean())


def contrasted(run, name):
    """A reward model with a term of TERMS, all with the same dropout, as term_NAME.pt -> its gaps on validation pairs over training"""
    plain = treat(torch.zeros(len(run.train[1])), "baseline")
    changes = {"dropout": TERMS[name].dropout}  # the baseline too, so that the term is all that differs
    return gap(reward_model(run, f"term_{name}", plain, run.valid[1], changes=changes, contrast=TERMS[name]))


def sampled(run, policy, pairs, prompts, temperature=1.0):
    """Answers of a policy -> Rows with meta.k branches, their gold reward (n, k), or None if it is not known"""
    here = replace(run, config=assign(assign(run.config, "meta.prompts", prompts), "meta.temperature", temperature))
    rows, lines = metarm.sample_responses(here, policy, pairs, seed=run.config.seed)
    known = run.config.data.train == ("world",)
    return rows, torch.tensor([[world.gold(line["prompt"], r) for r in line["responses"]] for line in lines]) if known else None


def ranked(rewards, gold):
    """Share of pairs among the k answers to a prompt, of different gold reward, that the rewards order right.  (n, k), (n, k) -> float"""
    i, j = torch.triu_indices(rewards.shape[1], rewards.shape[1], offset=1)
    r, g = rewards[:, i] - rewards[:, j], gold[:, i] - gold[:, j]
    told = g.abs() > 1e-6
    return float((r * g > 0)[told].float().mean())


def best_of_n(rewards, gold):
    """Gold reward of the answer with the highest reward, and of an average one.  (n, k), (n, k) -> float, float"""
    return float(np.mean([evaluate.best_of_n(r, g, len(r)) for r, g in zip(rewards.numpy(), gold.numpy())])), float(gold.mean())


# ---------------------------------------------------------------------------------------------------------------------
# Contrastive terms: Fig. 11-13

def probe(x, y, train_share=0.5, steps=300, decay=1e-3):
    """A logistic regression on standardised features, full-batch -> accuracy on the held-out half.  x: (N, C), y: (N,) bool"""
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
    n = round(train_share * len(x))
    x = (x - x[:n].mean(0)) / x[:n].std(0).clamp(min=1e-8)
    w, b = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=steps)

    def loss():
        optimiser.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x[:n] @ w + b, y[:n]) + decay * (w ** 2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    return float((((x[n:] @ w + b) > 0) == (y[n:] > 0.5)).double().mean())


def silhouette(x, y):
    """Mean over points of (b - a) / max(a, b): a, b mean Euclidean distance to the own and to the other class.  Rousseeuw 1987

    x: (N, C), y: (N,) bool -> float in [-1, 1]; 0: the classes overlap entirely
    """
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).bool()
    d = torch.cdist(x, x)
    own, other = (y[:, None] == y), (y[:, None] != y)
    a = (d * own).sum(1) / (own.sum(1) - 1).clamp(min=1)  # a point is no neighbour of its own
    b = (d * other).sum(1) / other.sum(1)
    return float(((b - a) / torch.maximum(a, b)).mean())


def representations(config, slot=0):
    """Fig. 11: final states of chosen and rejected answers under each term: projection, and how far they overlap."""
    run, rows = begun(config, slot, truth=False), {}
    for name in TERMS:
        contrasted(run, name)
        h = rewards_of(run, load_model(run, RewardModel, f"term_{name}"), run.valid[1][:1000], features=True)  # (N, 2, C)
        x, y = h.flatten(0, 1), torch.tensor([True, False]).repeat(len(h))
        centred = x - x.mean(0)
        plane = centred @ torch.linalg.svd(centred[:1000], full_matrices=False).Vh[:2].T  # the two principal components
        variance = centred.var(0).sum()
        differences = torch.nn.functional.normalize(h[:, 0] - h[:, 1], dim=-1)
        rows[name] = {"probe: chosen or rejected": probe(x, y), "silhouette": silhouette(x, y),
                      "variance in the plane": float(plane.var(0).sum() / variance),
                      "cosine of two differences": float((differences.sum(0).square().sum() - len(h)) / (len(h) * (len(h) - 1))),
                      "points: x": plane[:600, 0].tolist(), "points: y": plane[:600, 1].tolist()}  # chosen and rejected in turns
    return rows


def contrast(config, slot=0):
    """Fig. 12, 13: accuracy of each term in and out of distribution; best-of-n and PPO without a KL term driven by it."""
    run, rows = begun(config, slot), {}
    gold = gold_gaps(run, "valid")
    answers, quality = sampled(run, "sft", run.valid[0], 300)
    for name in TERMS:
        row = {k: v for k, v in over_training(contrasted(run, name), gold).items() if k in ("labels, end", "gold, end", "loss, end")}
        model = load_model(run, RewardModel, f"term_{name}")
        for domain, (pairs, encoded) in run.ood.items():
            row[f"gold, {domain}"] = gold_accuracy(run, model, encoded, gold_gaps(run, domain))
        row[f"best of {config.meta.k}"], row["one answer"] = best_of_n(rewards_of(run, model, answers), quality)
        trained(run, name, f"term_{name}", replace(run.config.ppo, kl=0.0))
        judged = evaluate_policies(run, True, ["sft", f"policy_{name}"], run.valid[0])[f"policy_{name}"]
        row |= {"PPO: gold reward": judged["judge"], "PPO: win - lose": judged["win"] - judged["lose"], "PPO: KL": judged["kl"], "PPO: length": judged["length"]}
        rows[name] = row
    return rows


def kinds_of_shift(run, n=600):
    """-> {kind of shift: (Rows of pairs, gold differences)}, none of them in training"""
    items = run.config.world.items
    def of(rows):
        gold = np.array([world.gold(r["prompt"], r["chosen"]) - world.gold(r["prompt"], r["rejected"]) for r in rows])
        return [data.encode(run.encoding, r["prompt"], (r["chosen"], r["rejected"]), run.config.model.context) for r in rows], gold
    drawn = lambda name, **more: world.pairs(n, f"{run.config.seed} {name}", world.Noise(0, 0, 0), **{"items": items} | more)[0]
    unknown = lambda prompt: any(f"{x}" in prompt for table in (world.ADVICE, world.HARMFUL) for x in list(table)[items:])
    out = {"none": of(drawn("shift")), "unknown requests": of([r for r in drawn("unknown", items=6) if unknown(r["prompt"])]),
           "manners alone": of(drawn("manners", contrast=0.0))}
    out |= {domain: of(drawn("ood", domains=(domain,))) for domain in world.HELD_OUT_DOMAINS}
    return out


def shifts(config, slot=0):
    """Open question 3: accuracy by gold of each term under kinds of shift, down to the answers of a policy that has moved."""
    run, rows = begun(config, slot), {}
    kinds = kinds_of_shift(run)
    for name in TERMS:
        contrasted(run, name)
    trained(run, "baseline", "term_baseline", replace(run.config.ppo, kl=0.0))
    moved = {"answers of SFT": sampled(run, "sft", run.valid[0], 300), "answers after PPO": sampled(run, "policy_baseline", run.valid[0], 300)}
    for name in TERMS:
        model = load_model(run, RewardModel, f"term_{name}")
        rows[name] = {kind: gold_accuracy(run, model, encoded, gold) for kind, (encoded, gold) in kinds.items()}
        rows[name] |= {kind: ranked(rewards_of(run, model, answers), gold) for kind, (answers, gold) in moved.items()}
    lengths = lambda rows: torch.tensor([[float(len(r)) for r in row.responses] for row in rows])
    rows["longer answer wins"] = {kind: float((lengths(encoded).diff(dim=1)[:, 0].numpy() * gold < 0).mean()) for kind, (encoded, gold) in kinds.items()}
    rows["longer answer wins"] |= {kind: ranked(lengths(answers), gold) for kind, (answers, gold) in moved.items()}
    return rows


def accuracies(run, name):
    """Share of pairs that the reward model NAME.pt orders like their labels: held-out ones, and each set out of distribution"""
    sets = {"held out": run.valid, **run.ood}
    return {where: float((gaps_of(run, name, rows) > 0).float().mean()) for where, (_, rows) in sets.items()}


def transfer(config, slot=0):
    """Fig. 8 and 13 by the labels: every treatment and every term, in and out of distribution, beside length.  Also on files."""
    run, gaps, valid = voted(config, slot)
    rows = {"vote of the members": {"held out": float((valid.mean(0) > 0).float().mean())}}
    members = [f"member_{m:02d}" for m in range(config.ensemble.members)]
    for where, (_, pairs) in run.ood.items():
        rows["vote of the members"][where] = float((torch.stack([gaps_of(run, m, pairs) for m in members]).mean(0) > 0).float().mean())
    for method in PAPER + OTHERS:
        treated(run, gaps, method)
        rows[method] = accuracies(run, f"treated_{method}")
    for name in TERMS:
        contrasted(run, name)
        rows["baseline, dropout" if name == "baseline" else name] = accuracies(run, f"term_{name}")
    rows["longer answer wins"] = {where: float(longer_wins(lengths_of(pairs)).mean()) for where, (pairs, _) in {"held out": run.valid, **run.ood}.items()}
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# MetaRM: Fig. 15, 16, Tables 2 and 3

def rounds(config, slot=0):
    """Tables 2, 3 and Fig. 15: win, tie, lose of every round of every arm against SFT and against plain PPO."""
    run, rows = begun(config, slot, "reward", "meta", "ppo"), {}
    all_rounds, plain = metarm.rounds(config), f"policy_{config.meta.method}"
    names, against = ["sft", plain, *(r.policy for r in all_rounds)], {r.policy: plain for r in all_rounds}
    judged = {"": evaluate_policies(run, True, names, run.valid[0], against), ", ood": evaluate_policies(run, True, names, metarm.ood_halves(run)[1], against)}
    gold = gold_gaps(run, "valid")
    for name in names[1:]:
        r = next((r for r in all_rounds if r.policy == name), None)
        rows[f"{r.arm} {r.number}" if r else "plain PPO"] = row = {}
        for where, policies in judged.items():
            p = policies[name]
            row |= {f"win{where}": p["win"], f"tie{where}": p["tie"], f"lose{where}": p["lose"], f"gold reward{where}": p["judge"], f"KL{where}": p["kl"]}
            if r:
                w = p[f"against {plain}"]
                row |= {f"{k} against plain PPO{where}": w[k] for k in w} | {f"win - lose against plain PPO{where}": w["win"] - w["lose"]}
        row["reward model: gold accuracy"] = gold_accuracy(run, r.reward if r else f"reward_{config.meta.method}", run.valid[1], gold)
    return rows


def rounds_ood(config, slot=0):
    """Fig. 15, where the policy is asked, and MetaRM sampled, out of distribution: prompts of domains without any label."""
    for key, value in (("meta.domain", "ood"), ("meta.rounds", min(2, config.meta.rounds)), ("out_dir", f"{config.out_dir}_ood")):
        config = assign(config, key, value)
    return rounds(config, slot)


def told_apart(run, models, policy, pairs, prompts=300):
    """How reward models tell new answers of a policy apart -> {model: numbers}

    Differences of reward are divided by the model's mean difference on validation pairs, so that its scale says nothing.
    """
    answers, gold = sampled(run, policy, pairs, prompts)
    i, j = torch.triu_indices(run.config.meta.k, run.config.meta.k, offset=1)
    out = {}
    for label, name in models.items():
        model = load_model(run, RewardModel, name)
        rewards = rewards_of(run, model, answers)
        unit = rewards_of(run, model, run.valid[1]).diff(dim=1).abs().mean()
        d = ((rewards[:, i] - rewards[:, j]).abs() / unit).flatten()
        density, edges = np.histogram(d.clamp(max=2.99), bins=np.linspace(0, 3, 31), density=True)
        out[label] = {"J": float(difference(rewards).mean()), "below 0.2": float((d < 0.2).float().mean()), "mean difference": float(d.mean()),
                      **({} if gold is None else {"ranked right": ranked(rewards, gold), "best of k": best_of_n(rewards, gold)[0]}),
                      "curve: value": ((edges[1:] + edges[:-1]) / 2).tolist(), "curve: density": density.tolist()}
    return out


def spread(config, slot=0):
    """Fig. 16: reward differences among new answers of a policy that has moved, by the plain reward model and by MetaRM."""
    if config.meta.rounds < 2 or "meta" not in config.meta.arms:
        raise ConfigError(f"meta.rounds = {config.meta.rounds}: this experiment needs two rounds or more, and meta among meta.arms")
    run = begun(config, slot, "reward", "meta", "ppo")
    models = {"before": f"reward_{config.meta.method}"} | {f"{r.arm}, round {r.number}": r.reward for r in metarm.rounds(config) if r.number == 2 and r.arm != "none"}
    latest = next(r.latest for r in metarm.rounds(config) if r.arm == "meta" and r.number == 2)
    return told_apart(run, models, latest, run.valid[0])


def one_round(config, slot=0):
    """MetaRM and plain steps on answers of the SFT model, without PPO: accuracy in and out of distribution.  Also on files."""
    method = config.meta.method
    for key, value in (("meta.rounds", 1), ("meta.arms", "meta,plain"), ("ppo.methods", ""), ("reward.methods", method)):
        config = assign(config, key, value)
    run = begun(config, slot, *(() if method == "baseline" else ("ensemble", "strength")), "reward", "meta", truth=False)
    models = {"before": f"reward_{config.meta.method}", "plain": "plain_1", "meta": "meta_1"}
    apart = told_apart(run, models, "sft", run.valid[0], config.meta.prompts)
    return {label: accuracies(run, name) | apart[label] for label, name in models.items()}


def noise(config, slot=0):
    """Open question 4: one round of MetaRM and of plain steps, with 0, 10, 20 and 30 % of the labels flipped."""
    rows = {}
    for flip in (0.0, 0.1, 0.2, 0.3):
        here = config
        for key, value in (("world.flip", flip), ("world.bias", 0.0), ("meta.rounds", 1), ("meta.arms", "meta,plain"), ("out_dir", f"{config.out_dir}_flip_{flip}")):
            here = assign(here, key, value)
        run, row = begun(here, slot, "reward", "meta", "ppo"), {}
        names = {"plain PPO": f"policy_{config.meta.method}", "meta": "policy_meta_1", "plain": "policy_plain_1"}
        judged = evaluate_policies(run, True, ["sft", *names.values()], run.valid[0])
        models = {"plain PPO": f"reward_{config.meta.method}", "meta": "meta_1", "plain": "plain_1"}
        apart, gold = told_apart(run, models, "policy_plain_1", run.valid[0]), gold_gaps(run, "valid")
        for label, name in models.items():
            row |= {f"{label}: gold accuracy": gold_accuracy(run, name, run.valid[1], gold), f"{label}: ranked right": apart[label]["ranked right"],
                    f"{label}: win - lose": judged[names[label]]["win"] - judged[names[label]]["lose"]}
        rows[f"{flip:.0%}"] = row
    return rows


def orders(config, slot=0):
    """First order against exact second order, and what the step of the look-ahead does: results, and cost of a step."""
    run, rows = begun(assign(config, "meta.rounds", 0), slot, "reward", "ppo"), {}
    gold = gold_gaps(run, "valid")
    answers, lines = metarm.sample_responses(run, f"policy_{config.meta.method}", run.train[0], seed=run.config.seed)
    labels = treat(torch.zeros(len(run.train[1])), "baseline")
    models = {"plain steps": (0.0, None)} | {f"eta {eta:g}, {'second' if second else 'first'} order": (eta, second)
                                             for eta in (config.meta.eta / 10, config.meta.eta) for second in (False, True)}
    names = {}
    for label, (eta, second) in models.items():
        s = replace(config.meta, eta=eta, second_order=bool(second))
        names[label] = name = f"order_{eta:g}_{second}"
        depends = {"meta": str(replace(s, rounds=0, arms=())), "input policy": files.read_record(run.config.out_dir, f"policy_{config.meta.method}")["fingerprint"], "format": files.FORMAT}
        if files.why_again(files.read_record(run.config.out_dir, name), depends, os.path.exists(run.path(f"{name}.pt"))):
            look = None if second is None else metarm.look_ahead(run, answers, s, f"{config.seed} orders")
            loop.fit_reward_model(run, name, s, *labels, f"{config.seed} orders", start=f"reward_{config.meta.method}", depends=depends, look_ahead=look)
    apart = told_apart(run, names, f"policy_{config.meta.method}", run.valid[0])
    seconds = {name: files.read_record(run.config.out_dir, name)["seconds"] for name in names.values()}
    for label, name in names.items():
        rows[label] = {"gold accuracy": gold_accuracy(run, name, run.valid[1], gold), **{k: v for k, v in apart[label].items() if "curve" not in k},
                       "time, of plain steps": seconds[name] / seconds[names["plain steps"]]}
    return rows
