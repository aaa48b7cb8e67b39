"""Experiments on preference strength and on the treatment of labels: the paper's Figures 1-8 and 19-28, and what it leaves open.

Each experiment is a function of a configuration (with its seed and folder) that returns {row: {column: number or list}};
reproduce.py runs it over seeds, averages, prints and draws.  Everything trained stays in the run's folder under a name of
its own and is trained once, so experiments share what they have in common.  On files without a known truth the columns
that need it are missing.  "gold" is the true quality, "labels" are the data's labels, noise and all; validation labels are
never touched.
"""
import hashlib
import os

import numpy as np
import torch

import data
import detect
import files
import loop
import plan
import train
from config import ConfigError, assign
from evaluate import calibration, errors_of, gold_gaps
from model import RewardModel
from run import load_model, open_run, rewards_of
from strength import NEEDS, auroc, average_precision, groups, strength, treat

PAPER = ("baseline", "margin", "flip", "soft_margin", "soft_target_margin", "flip_margin")  # Fig. 8
OTHERS = ("smooth", "soft", "drop")
TENTHS = {  # validation accuracy of Llama-2-7B on HH-RLHF, trained on one tenth alone: read off the paper's Fig. 4 and 5
    "1": 0.327, "2": 0.347, "3": 0.446, "4": 0.561, "5": 0.653, "6": 0.680, "7": 0.684, "8": 0.683, "9": 0.674, "10": 0.659, "1 swapped": 0.666, "2 swapped": 0.648}
AMBIGUOUS = 0.51  # true difference of quality up to which a pair of the world counts as ambiguous: courtesy at most


def need_truth(config):
    """Before anything is trained"""
    if config.data.train != ("world",):
        raise ConfigError(f"data.train = {','.join(config.data.train)!r}: this experiment needs a known truth, which files do not have; leave it as world")


def voted(config, slot):
    """SFT, ensemble and strength, if need be -> Run, gaps of the members on training pairs (M, N), and on validation pairs"""
    train.execute(config, "sft", "ensemble", "strength", slot=slot)
    run = open_run(config, slot)
    gaps = files.load_tensors(run.path("gaps.pt"))
    return run, gaps["train"], gaps["valid"]


def reward_model(run, name, treatment, rows, s=None, watches=1, changes={}, order="reward", contrast=None):
    """A reward model of any treatment (swap, p, margin), trained once.  -> its rewards of `rows` over training, (E, n, 2)

    rows: pairs to watch; s: its settings, [reward] unless given; watches: looks an epoch; changes: to the model's shape;
    order: of the data, another for models that are to differ; contrast: a [contrast] section
    """
    s, config = s or run.config.reward, run.config
    depends = {"treatment": hashlib.sha256(b"".join(t.numpy().tobytes() for t in treatment)).hexdigest()[:16], "watched": len(rows),
               "watches": watches, "epochs": s.epochs, "batch": s.batch, "lr": s.lr, "order": order, **changes, "training": str(config.train),
               **({} if contrast is None else {"contrast": str(contrast)}),
               "input sft": files.digest(plan.dependencies(config)["sft"]), "format": files.FORMAT}
    watched = run.path(f"{name}_watched.pt")
    if files.why_again(files.read_record(config.out_dir, name), depends, os.path.exists(watched)):
        loop.fit_reward_model(run, name, s, *treatment, f"{config.seed} {order}", changes, contrast, depends=depends, watches=watches,
                               watch=lambda model: rewards_of(run, model, rows))
    return files.load_tensors(watched)


def only(treatment, kept):
    """The same treatment of the kept pairs alone; the others have no p."""
    swap, p, margin = treatment
    return swap, torch.where(kept, p, torch.nan), margin


def gap(watched):
    return (watched[..., 0] - watched[..., 1]).numpy()


def over_training(gaps, gold):
    """gaps: (E, N) on validation pairs over training; gold: (N,) or None -> accuracies at the best epoch and at the end, curves"""
    curves = {"labels": (gaps > 0).mean(1)}
    if gold is not None:
        curves |= {"gold": (gaps * gold > 0).mean(1), "intersection": (gaps[:, gold > 0] > 0).mean(1)}  # where label and gold agree
    loss = np.logaddexp(0, -gaps).mean(1)
    out = {}
    for name, curve in curves.items():
        out |= {f"{name}, best epoch": float(curve.max()), f"{name}, end": float(curve[-1])}
    return out | {"loss, end": float(loss[-1])} | {f"curve: {name}": c.tolist() for name, c in {**curves, "loss": loss}.items()}


def settings(config, method):
    return {name: getattr(config.strength, name) for name in NEEDS[method]}


# ---------------------------------------------------------------------------------------------------------------------
# What strength looks like: Fig. 1, 2, 3

def histograms(config, slot=0):
    """Fig. 1: distribution of the mean and of the std of the vote over the training pairs."""
    run, gaps, _ = voted(config, slot)
    rows = {}
    for name, values in zip(("mean", "std"), strength(gaps)):
        density, edges = np.histogram(values, bins=np.linspace(*np.quantile(values, [0.001, 0.999]), 61), density=True)
        peak = density.argmax()
        rows[name] = {"below zero": float((values < 0).float().mean()), "mode": float(edges[peak:peak + 2].mean()),
                      **{f"quantile {q:.0%}": float(np.quantile(values, q)) for q in (0.05, 0.5, 0.95)},
                      "curve: value": ((edges[1:] + edges[:-1]) / 2).tolist(), "curve: density": density.tolist()}
    return rows


def by_groups(config, slot=0):
    """Fig. 2: mean and std of twenty groups of training pairs of ascending strength."""
    run, gaps, _ = voted(config, slot)
    mean, std = strength(gaps)
    group, errors = groups(mean, 20), errors_of(run)
    rows = {}
    for g in range(20):
        here = group == g
        rows[str(g + 1)] = {"mean": float(mean[here].mean()), "std": float(std[here].mean())}
        if errors is not None:
            rows[str(g + 1)]["wrong labels"] = float(np.mean([bool(errors[i]) for i in here.nonzero()[:, 0].tolist()]))
    return rows


def agreement(config, slot=0):
    """Fig. 3: agreement of the labels of validation pairs with an outside judge (the truth), in groups of ascending strength."""
    need_truth(config)
    run, _, gaps = voted(config, slot)
    gold = gold_gaps(run, "valid")
    mean, _ = strength(gaps)
    group = groups(mean, 20)
    return {str(g + 1): {"strength": float(mean[group == g].mean()), "agreement with the truth": float((gold[(group == g).numpy()] > 0).mean())}
            for g in range(20)}


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the data: Fig. 4, 5, 6, 21, 22

def parts(config, slot, tenths, turned=False):
    run, gaps, _ = voted(config, slot)
    mean, _ = strength(gaps)
    group, gold, errors = groups(mean, 10), gold_gaps(run, "valid"), errors_of(run)
    rows = {}
    for t in tenths:
        for swapped in (False, True) if turned else (False,):
            kept = group == t
            swap, p, margin = treat(mean, "baseline")
            label = str(t + 1) + " swapped" * swapped
            watched = reward_model(run, f"tenth_{label}".replace(" ", "_"), only((swap | swapped, p, margin), kept), run.valid[1],
                                   watches=int(t in (0, 1, 9)))  # the course of the others is not drawn
            scores = over_training(gap(watched), gold)
            row = {k: v for k, v in scores.items() if "best" not in k and "intersection" not in k} | {"the paper: labels": TENTHS[label]}
            if errors is not None:
                row["wrong labels"] = float(np.mean([bool(errors[i]) != swapped for i in kept.nonzero()[:, 0].tolist()]))
            rows[label] = row
    return rows


def deciles(config, slot=0):
    """Fig. 4: reward models trained on one tenth of the pairs alone, by strength, weakest first."""
    return parts(config, slot, range(10))


def swapped(config, slot=0):
    """Fig. 5: the two weakest tenths alone, with their labels as they are and swapped."""
    return parts(config, slot, range(2), turned=True)


def strongest(config, slot=0):
    """Fig. 6: the strongest tenth alone, plain, with the margin, with smoothed labels, with both."""
    run, gaps, _ = voted(config, slot)
    mean, _ = strength(gaps)
    kept, gold = groups(mean, 10) == 9, gold_gaps(run, "valid")
    rows = {}
    for method in ("baseline", "margin", "smooth", "smooth_margin"):
        treatment = only(treat(mean, method, **settings(config, method)), kept)
        watched = reward_model(run, "tenth_10" if method == "baseline" else f"tenth_10_{method}", treatment, run.valid[1])
        rows[method] = over_training(gap(watched), gold)
    return rows


def subsets(config, slot=0):
    """Fig. 21, 22: subsets that grow from the weakest pairs up, and from the strongest down."""
    run, gaps, _ = voted(config, slot)
    mean, _ = strength(gaps)
    gold, group = gold_gaps(run, "valid"), groups(mean, 10)
    rows = {}
    for share in (3, 6, 9):
        rows[f"{share * 10} %"] = row = {}
        for end, kept in (("weakest", group < share), ("strongest", group >= 10 - share)):
            watched = reward_model(run, f"{end}_{share}", only(treat(mean, "baseline"), kept), run.valid[1], watches=0)
            row |= {f"{end}: {k}": v for k, v in over_training(gap(watched), gold).items() if "best" not in k and "intersection" not in k}
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# All data: Fig. 8, 19, 20, 27, 28

def treated(run, gaps, method):
    """A reward model on all pairs under a treatment -> its gaps on validation pairs over training, (epochs, N)"""
    treatment = treat(strength(gaps)[0], method, **settings(run.config, method))
    return gap(reward_model(run, f"treated_{method}", treatment, run.valid[1]))


def treatments(config, slot=0):
    """Fig. 8: every treatment on all data, over more than one epoch; by the labels, by gold, and where the two agree."""
    run, gaps, _ = voted(config, slot)
    gold = gold_gaps(run, "valid")
    rows = {method: over_training(treated(run, gaps, method), gold) for method in PAPER + OTHERS}
    length = np.array([len(p.chosen) - len(p.rejected) for p in run.valid[0]], float)[None]
    return rows | {"longer answer wins": {k: v for k, v in over_training(length, gold).items() if k.endswith("end") and "loss" not in k}}


def reliability(config, slot=0):
    """How sure the models of each treatment are, and how often they are right: ten equal parts of the validation pairs."""
    run, gaps, _ = voted(config, slot)
    rows = {}
    for method in PAPER + OTHERS:
        g = treated(run, gaps, method)[-1]
        confidence = 1 / (1 + np.exp(-np.abs(g)))
        order = [part for part in np.array_split(confidence.argsort(kind="stable"), 10) if len(part)]
        rows[method] = {"accuracy": float((g > 0).mean()), "confidence": float(confidence.mean()), "nll": float(np.logaddexp(0, -g).mean()), "ece": calibration(g)["ece"],
                        "curve: confidence": [float(confidence[part].mean()) for part in order], "curve: share right": [float((g[part] > 0).mean()) for part in order]}
    return rows


def bins(config, slot=0):
    """Fig. 27, 28: the treatments compared within ten groups of validation pairs of ascending strength."""
    run, gaps, valid = voted(config, slot)
    gold, group = gold_gaps(run, "valid"), groups(strength(valid)[0], 10).numpy()
    rows = {str(g + 1): {} for g in range(10)}
    for method in PAPER + OTHERS:
        end = treated(run, gaps, method)[-1]
        for g in range(10):
            here = group == g
            rows[str(g + 1)][f"{method}: labels"] = float((end[here] > 0).mean())
            if gold is not None:
                rows[str(g + 1)][f"{method}: gold"] = float((end[here] * gold[here] > 0).mean())
    return rows


def inflation(config, slot=0):
    """Fig. 19, 20: mean reward of chosen and rejected answers over training, and their gap, of the plain model."""
    run, gaps, _ = voted(config, slot)
    seen, new = run.train[1][:500], run.valid[1][:500]
    watched = reward_model(run, "inflation", treat(strength(gaps)[0], "baseline"), seen + new, watches=8)
    rows = {}
    for name, part in (("training pairs", watched[:, :len(seen)]), ("validation pairs", watched[:, len(seen):])):
        chosen, rejected = (part.mean(1) - part[0].mean()).unbind(1)  # rewards have no zero: counted from the first look
        epoch = len(chosen) // config.reward.epochs
        rows[name] = {"gap after one epoch": float((chosen - rejected)[epoch - 1]), "gap at the end": float((chosen - rejected)[-1]),
                      "chosen at the end": float(chosen[-1]), "rejected at the end": float(rejected[-1]),
                      "curve: chosen": chosen.tolist(), "curve: rejected": rejected.tolist(), "curve: gap": (chosen - rejected).tolist()}
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Detectors of label noise, beside the vote (open question 1), and what none of them can see (6)

def detectors(config, slot=0):
    """AUROC and average precision of each signal for random flips, biased annotators and ambiguous pairs; cost in runs.

    A run is the training of one member.  Ambiguous pairs (true difference up to AMBIGUOUS) are set against all others, by
    a signal's doubt: how near to zero it is, for a signal that has a sign.  Wrong labels are set against right ones.
    """
    need_truth(config)
    run, gaps, _ = voted(config, slot)
    errors, gold = errors_of(run), gold_gaps(run, "train")
    pairs, rows = run.train
    n, m, e = len(rows), config.ensemble, config.ensemble.epochs
    mean, std = strength(gaps)
    plain = treat(mean, "baseline")

    k = 5 if m.members % 5 == 0 else m.members
    fold = torch.from_numpy(data.folds(pairs, k, config.seed))
    folded = torch.stack([torch.from_numpy(gap(reward_model(run, f"fold_{i:02d}", only(plain, fold != i % k), rows, m, watches=0,
                                                            order=f"reward {i // k}" if i >= k else "reward")))[-1] for i in range(m.members)])
    held_out = train.unseen(folded, fold, k)
    trace = torch.from_numpy(gap(reward_model(run, "traced", plain, rows, m, watches=4)))
    long_trace = torch.from_numpy(gap(reward_model(run, "traced_long", plain, rows)))
    reward_model(run, "dropout", plain, rows[:1], m, watches=0, changes={"dropout": 0.1})
    model = load_model(run, RewardModel, "dropout").train()
    torch.manual_seed(config.seed)
    passes = torch.stack([rewards_of(run, model, rows) for _ in range(10)])
    passes = passes[..., 0] - passes[..., 1]
    turned = torch.rand(n, generator=torch.Generator().manual_seed(config.seed)) < 0.5
    longer = torch.tensor([float(len(p.chosen) - len(p.rejected)) for p in pairs])

    signed = lambda g: (-g, -g.abs())
    long = config.reward.epochs / e
    signals = {  # name: (cost in runs, (suspicion, doubt))
        f"mean of {m.members} members": (m.members, signed(mean)),
        f"mean of {m.members // 2}": (m.members // 2, signed(gaps[:m.members // 2].mean(0))),
        "one member": (1, signed(gaps[0])),
        f"std of {m.members} members": (m.members, (std, std)),
        f"entropy of {m.members} votes": (m.members, (detect.vote_entropy(gaps),) * 2),
        f"mean of {m.members // k} that have not seen the pair, {k} folds": (m.members * (k - 1) / k, signed(held_out.mean(0))),
        f"mean of all {m.members}, each blind to one of {k} folds": (m.members * (k - 1) / k, signed(folded.mean(0))),
        f"confident learning, {k} folds": (k - 1, (detect.confident_learning(held_out[0], turned)[1], -held_out[0].abs())),
        "mean loss over training": (1, (detect.small_loss(trace),) * 2),
        "area under the margin": (1, (detect.area_under_margin(trace), -trace.mean(0).abs())),
        "mean loss over long training": (long, (detect.small_loss(long_trace),) * 2),
        "area under the margin, long training": (long, (detect.area_under_margin(long_trace), -long_trace.mean(0).abs())),
        "dropout: std of 10 passes": (1, (detect.dropout_uncertainty(passes),) * 2),
        "dropout: mean of 10 passes": (1, signed(passes.mean(0))),
        "longer answer wins": (0, signed(longer)),
        "chance": (0, (torch.zeros(n), torch.zeros(n))),
    }
    errors = np.array(errors)
    ambiguous = torch.from_numpy(np.abs(gold) < AMBIGUOUS)
    out = {}
    for name, (cost, (suspicion, doubt)) in signals.items():
        out[name] = row = {"runs": float(cost)}
        for kind, title in (("flip", "flips"), ("bias", "bias")):
            use = torch.from_numpy((errors == kind) | (errors == ""))
            positive = torch.from_numpy(errors == kind)[use]
            row |= {f"{title}: AUROC": auroc(suspicion[use], positive), f"{title}: AP": average_precision(suspicion[use], positive)}
        row |= {"ambiguous: AUROC": auroc(doubt, ambiguous), "ambiguous: AP": average_precision(doubt, ambiguous)}
    issue = detect.confident_learning(held_out[0], turned)[0].numpy()
    out[f"confident learning, {k} folds"] |= {"called": float(issue.mean()), "precision": float((errors[issue] != "").mean()) if issue.any() else 0.0}
    lowest = mean.argsort()[:round(config.strength.q * n)].numpy()
    out[f"mean of {m.members} members"] |= {"called": len(lowest) / n, "precision": float((errors[lowest] != "").mean())}
    return out


def shared_bias(config, slot=0):
    """Annotators who all like the longer answer a little: errors that every member agrees with, so that no vote can find them."""
    need_truth(config)
    rows = {}
    for liking in (0.0, 1.5):
        here = config
        for key, value in (("world.shared", liking), ("world.bias", 0.0), ("out_dir", f"{config.out_dir}_shared_{liking}")):
            here = assign(here, key, value)
        run, gaps, valid = voted(here, slot)
        errors, gold, mean = np.array(errors_of(run)), gold_gaps(run, "valid"), strength(gaps)[0]
        row = rows[f"liking {liking}"] = {"wrong labels": float((errors != "").mean())}
        for kind in ("flip", "shared"):
            use = torch.from_numpy((errors == kind) | (errors == ""))
            if (errors == kind).any():
                row |= {f"{kind}: share": float((errors == kind).mean()), f"{kind}: AUROC of the mean": auroc(-mean[use], torch.from_numpy(errors == kind)[use]),
                        f"{kind}: AUROC of the std": auroc(strength(gaps)[1][use], torch.from_numpy(errors == kind)[use]),
                        f"{kind}: mean strength": float(mean[torch.from_numpy(errors == kind)].mean())}
        row |= {"right: mean strength": float(mean[torch.from_numpy(errors == "")].mean()),
                "vote on validation: labels": float((strength(valid)[0] > 0).float().mean()),
                "vote on validation: gold": float((strength(valid)[0].numpy() * gold > 0).mean())}
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Is strength what people mean by strength?  (open question 7)

def rank_correlation(a, b, resamples=1000, seed=0):
    """Spearman's, with its 95 % bootstrap interval.  (N,), (N,) -> rho, low, high"""
    def rank(x):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[inverse]
    rho = lambda a, b: float(np.corrcoef(rank(a), rank(b))[0, 1])
    rng = np.random.default_rng(seed)
    drawn = [rho(a[i], b[i]) for i in (rng.integers(0, len(a), len(a)) for _ in range(resamples))]
    return rho(a, b), *(float(q) for q in np.quantile(drawn, [0.025, 0.975]))


def votes(config, slot=0):
    """Human votes against strength: data.train names a file whose lines also have votes_chosen, votes_rejected, votes_equal.

    A quarter of the debates (the first line of the prompt) is held out.  Members train on the published labels of the
    others; the votes are read only here, after the vote of the models.
    """
    if config.data.train == ("world",):
        raise ConfigError("votes: name a file with human votes, --data.train=FILE (lines with votes_chosen, votes_rejected, votes_equal)")
    pairs, share = [], {}
    for number, line in data.read_jsonl(config.data.train[0]):
        try:
            c, r, e = (line[f"votes_{side}"] for side in ("chosen", "rejected", "equal"))
            pairs.append({key: line[key] for key in ("prompt", "chosen", "rejected")})
            share[line["prompt"], line["chosen"], line["rejected"]] = (c + e / 2) / max(c + r + e, 1), r > c, (c, r) == (3, 2)
        except (KeyError, TypeError):
            raise data.DataError(f"{config.data.train[0]}:{number}: a line needs prompt, chosen, rejected and votes_chosen, votes_rejected, votes_equal") from None
    debate = lambda pair: pair["prompt"].split("\n")[0]
    debates = sorted({debate(p) for p in pairs}, key=lambda d: files.digest(f"{config.seed} {d}"))
    held_out = set(debates[:max(1, len(debates) // 4)])
    here = assign(config, "out_dir", f"{config.out_dir}_votes")  # other data than the other experiments have
    for name in ("train", "valid"):
        path = os.path.join(here.out_dir, f"{name}.jsonl")
        files.save_jsonl(path, (p for p in pairs if (debate(p) in held_out) == (name == "valid")))
        here = assign(here, f"data.{name}", path)
    run, gaps, valid = voted(here, slot)
    rows = {}
    for name, part, g in (("trained on", run.train[0], gaps), ("held-out debates", run.valid[0], valid)):
        mean = strength(g)[0].numpy()
        length = np.array([float(len(p.chosen) - len(p.rejected)) for p in part])
        agreed, against, close = (np.array(x) for x in zip(*(share[p.prompt, p.chosen, p.rejected] for p in part)))
        for signal, values in (("strength", mean), ("length", length)):
            rho, low, high = rank_correlation(values, agreed, seed=config.seed)
            rows[f"{name}: {signal}"] = {"pairs": float(len(part)), "accuracy": float((values > 0).mean()), "rank correlation with votes": rho,
                                         "low": low, "high": high, "AUROC, majority against the label": auroc(-values, against), "share ": float(against.mean()),
                                         "AUROC, 3-2": auroc(-values, close), "share": float(close.mean())}
    return rows
