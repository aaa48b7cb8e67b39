"""Label errors planted in a person's file: who finds them, and what the cleaned file is worth.

    python -m experiments planted --data.train=FILE [--model.init=DIR] --seeds=0,1,2,3,4

A share of the labels is flipped, the run of configs/clean.toml does not know which, and its vote,
self-test and cleaned file are compared with the truth.  The labels of FILE itself count as right,
though some of a real file are not: so no AUROC can reach 1.
"""
import copy
import json
import os
from dataclasses import replace

import numpy as np
import torch

import data
import train
from config import ConfigError
from data import EncodedPairs
from experiments.registry import experiment
from experiments.shared import change
from labels import cleaning, heads, trust, views
from labels.votes import load_votes, member_folds, votes_on_copies
from runtime import figures, files
from strength import auroc, average_precision, strength

SHARES = (0.05, 0.1, 0.2)  # of the labels that are flipped
DRAW_KEY = "planted"


def plot_planted(summary, path):
    found = {name: row for name, row in summary.items() if "AUROC" in row}
    figures.bars(found, path, "Planted label errors", ["AUROC", "AP"])


@experiment("planted", base="clean", plot=plot_planted)
def planted(config, slot=0):
    """Label errors planted in a file: who finds them, and how many are left after cleaning."""
    if config.data.train == ("world",) or len(config.data.train) != 1:
        raise ConfigError("data.train: this experiment plants errors in one file; name it")
    rows = {}
    for share in SHARES:
        if config.ensemble.voters == "states":
            run, flipped = plant_in_memory(config, slot, share)
        else:
            run, flipped = plant_in_file(config, slot, share)
        rows |= measure_run(run, flipped, f"{share:.0%} flipped")
    return rows


def draw(pairs, share, seed):
    """-> (N,) bool: labels to flip"""
    rng = np.random.default_rng([seed, *DRAW_KEY.encode()])
    flipped = np.zeros(len(pairs), bool)
    flipped[rng.permutation(len(pairs))[:round(share * len(pairs))]] = True
    return torch.from_numpy(flipped)


def exchanged(pair):
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen)


def plant_in_memory(config, slot, share):
    """States do not depend on labels, so all seeds and shares use those of the file as it is.

    -> a run whose training pairs have flipped labels, which are flipped
    """
    folder = os.path.join(os.path.dirname(config.out_dir), "states")
    own = change(config, {"seed": 0, "out_dir": folder, "data.valid_share": 0.0})
    run = copy.copy(train.ensure_stages(own, "sft", "ensemble", slot=slot))
    flipped = draw(run.train.pairs, share, config.seed)
    pairs = []
    rows = []
    for is_flipped, pair, row in zip(flipped.tolist(), run.train.pairs, run.train.rows):
        pairs.append(exchanged(pair) if is_flipped else pair)
        rows.append(row.branches(1, 0) if is_flipped else row)
    run.__dict__["train"] = EncodedPairs(pairs, rows)  # the run reads nothing else of them
    run.cfg = replace(config, out_dir=folder)
    return run, flipped


def plant_in_file(config, slot, share):
    """Voters that are trained: the whole run on a file with flipped labels."""
    folder = f"{config.out_dir}/{share:.0%}".replace("%", "_percent")
    path = f"{folder}/pairs.jsonl"
    source = train.open_run(change(config, {"out_dir": folder, "data.valid_share": 0.0}), slot)
    pairs = source.pairs["train"]
    flipped = draw(pairs, share, config.seed)
    records = []
    for is_flipped, pair in zip(flipped.tolist(), pairs):
        pair = exchanged(pair) if is_flipped else pair
        record = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        records.append(record | {"flipped": is_flipped})
    content = "".join(json.dumps(record) + "\n" for record in records)
    if not os.path.exists(path) or open(path).read() != content:
        files.save_text(path, content)
    own = change(source.cfg, {"data.train": path, "data.format": "explicit prompt"})
    run = train.ensure_stages(own, "sft", "ensemble", "strength", slot=slot)
    return run, torch.tensor([pair.record["flipped"] for pair in run.train.pairs])


def measure_run(run, flipped, name):
    """-> rows of the vote, of what it is compared with, and of the cleaned file"""
    if run.cfg.ensemble.voters == "states":
        from labels import voters
        diffs = voters.first_vote(run, member_folds(run))._asdict()
    else:
        diffs = load_votes(run, ["train"])
    mean, _ = strength(diffs["train"])
    labels = train.treat_pairs(run, run.cfg.strength.method, mean)
    copies = votes_on_copies(run, diffs)
    found = cleaning.assess(run, diffs, copies, labels)
    rows = {}
    for detector, score in detectors(run, mean).items():
        rows[f"{name}: {detector}"] = {
            "AUROC": auroc(score, flipped),
            "AP": average_precision(score, flipped),
        }
    rows[f"{name}: vote"] |= {
        "AUROC, self-test": found.test.auroc["vote"].value,
        "finds flips": float(found.test.finds_flips),
        "share wrong, estimate": found.share.value,
        "share wrong, low": found.share.low,
        "share wrong, high": found.share.high,
        "precision, bound": found.decision.precision.value,
    }
    for action in ("drop", "exchange"):
        rows[f"{name}: cleaned by {action}"] = after_action(run, found, copies, flipped, action)
    return rows


def detectors(run, mean):
    """-> {name: suspicion (N,) of each label}"""
    pairs = run.train.pairs
    e = run.cfg.ensemble
    fold = torch.from_numpy(data.choose_folds(pairs, e.folds, run.cfg.seed, e.fold_by)[0])
    out = {"vote": -mean, "length": -trust.length_vote(pairs)}
    out["words and length"] = -head_vote(views.surface_differences(pairs), fold)
    ratings = views.rating_differences(pairs)
    if ratings is not None:
        out["ratings"] = -head_vote(ratings, fold)
    if e.voters == "states":
        saved = run.load_tensors("views.pt")
        where = views.find_answers(saved["digests"], run.train.rows)
        joined = []
        for v in range(saved["states"].shape[1]):
            diff = views.state_differences(saved["states"][:, v], where)
            joined.append(diff / diff.norm(dim=1).mean())
        out["one head on all states"] = -head_vote(torch.cat(joined, 1), fold)
    return out


def head_vote(diff, fold):
    """Out-of-fold votes of one linear head, whose probability of the label is cleanlab's
    self-confidence.  (N, D) -> (N,)"""
    return heads.out_of_fold(heads.principal_axes(diff), torch.ones(len(diff)), fold)[0]


def after_action(run, found, copies, flipped, action):
    """Shares of flipped labels before and after, where the strongest action is this one"""
    settings = run.cfg.clean
    pairs = run.train.pairs
    decision = trust.decide(
        found.mean, copies, found.test, found.share, action, settings.drop_precision,
        trust.share_from_repeats(pairs), trust.groups_of_pairs(pairs))
    done = np.array(trust.actions(decision, [""] * len(flipped), action))
    wrong = flipped.numpy()
    swapped = done == "exchange"
    wrong_after = np.where(swapped, ~wrong, wrong)[done != "drop"]
    row = {
        "wrong before": float(wrong.mean()),
        "wrong after": float(wrong_after.mean()),
        "dropped": float((done == "drop").mean()),
        "exchanged": float(swapped.mean()),
    }
    if swapped.any():
        row["of the exchanged, right before"] = float((~wrong[swapped]).mean())
    if decision.called.any():
        row["precision"] = float(wrong[decision.called.numpy()].mean())
    return row
