"""Preference strength against human votes (open question 7)."""
import os

import numpy as np

import train
from config import ConfigError
from data import DataError
from evaluate import lengths_of, longer_wins
from experiments.registry import experiment
from experiments.shared import change, knows_truth
from experiments.statistics import couples
from formats.records import read_records
from labels.votes import load_votes
from runtime import figures, files
from strength import auroc, strength

PARTS = {"train": "trained on", "valid": "held-out debates"}


class HumanVotes:
    """Pairs of a file and, apart from them, the human votes on them."""

    def __init__(self, path):
        """Raises DataError, naming file and line, if a line has no votes."""
        self.pairs = []  # [{"prompt", "chosen", "rejected"}]
        self.votes = {}  # (prompt, chosen, rejected) -> votes for chosen, rejected, equal
        for number, record in read_records(path):
            try:
                pair = {key: record[key] for key in ("prompt", "chosen", "rejected")}
                votes = tuple(record[f"votes_{side}"] for side in ("chosen", "rejected", "equal"))
                sum(votes)
            except (KeyError, TypeError):
                raise DataError(
                    f"{path}:{number}: a line needs prompt, chosen, rejected "
                    "and votes_chosen, votes_rejected, votes_equal"
                ) from None
            self.pairs.append(pair)
            self.votes[tuple(pair.values())] = votes

    def of(self, pairs):
        """-> (N, 3) votes for chosen, rejected and equal"""
        rows = []
        for pair in pairs:
            texts = (pair.record[key] for key in ("prompt", "chosen", "rejected"))
            rows.append(self.votes[tuple(texts)])
        return np.array(rows)


def plot_votes(summary, path):
    columns = [
        "rank correlation with votes",
        "AUROC, majority against the label",
        "AUROC, 3-2",
    ]
    figures.bars(summary, path, "Strength and human votes", columns)


@experiment(
    "votes", plot=plot_votes,
    comparisons=couples(
        {f"{part}: {signal}": f"{part}: length"
         for part in PARTS.values() for signal in ("strength", "one model")},
        "accuracy", "rank correlation with votes", "AUROC, majority against the label",
        "AUROC, 3-2",
    ),
)
def votes(config, slot=0):
    """Human votes against strength, one member and length, on a file with votes: --data.train=FILE.

    Its lines also have votes_chosen, votes_rejected and votes_equal.  A quarter of the debates (the
    first line of the prompt) is held out.  Members train on the published labels of the others; the
    votes are used here only, after the ensemble has voted.
    """
    if knows_truth(config):
        raise ConfigError(
            "votes: name a file with human votes, --data.train=FILE "
            "(lines with votes_chosen, votes_rejected, votes_equal)"
        )
    if config.ensemble.voters != "trained":
        raise ConfigError(
            f"votes: ensemble.voters = {config.ensemble.voters}: this experiment scores pairs that "
            "the members have trained on; give --ensemble.voters=trained --ensemble.folds=0"
        )
    import_spearmanr()
    human = HumanVotes(config.data.train[0])
    run = train.ensure_stages(
        split_by_debate(config, human.pairs), "sft", "ensemble", "strength", slot=slot
    )
    diffs = load_votes(run)
    rows = {}
    for name, part in (("train", run.train), ("valid", run.valid)):
        mean = strength(diffs[name])[0].numpy()
        lengths = np.array(lengths_of(part.pairs), float)
        signals = {
            "strength": mean,
            "one model": diffs[name][0].numpy(),
            "length": lengths[:, 0] - lengths[:, 1],
        }
        for signal, values in signals.items():
            row = vote_scores(values, human.of(part.pairs), config.seed)
            if signal == "length":
                row["accuracy"] = float(longer_wins(lengths).mean())  # equal lengths: half right
            rows[f"{PARTS[name]}: {signal}"] = row
    return rows


def split_by_debate(config, pairs):
    """Write a quarter of the debates as validation pairs.  -> config that names the two files

    The folder is one of its own: other experiments have other data.  Every member trains on all
    pairs of the other debates, whatever folds the configuration has, and no self-test is made:
    nothing here reads it.
    """
    def debate(pair):
        return pair["prompt"].split("\n")[0]

    def by_digest(name):
        return files.digest(f"{config.seed} {name}")

    debates = sorted({debate(pair) for pair in pairs}, key=by_digest)
    held_out = set(debates[:max(1, len(debates) // 4)])
    out_dir = f"{config.out_dir}_votes"
    settings = {"out_dir": out_dir, "ensemble.folds": 0, "clean.tests": 0}
    for name in ("train", "valid"):
        part = [pair for pair in pairs if (debate(pair) in held_out) == (name == "valid")]
        settings[f"data.{name}"] = os.path.join(out_dir, f"{name}.jsonl")
        files.save_jsonl(settings[f"data.{name}"], part)
    return change(config, settings)


def vote_scores(values, votes, seed):
    """A signal against human votes.  values: (N,); votes: (N, 3) -> columns of a row"""
    chosen, rejected, equal = votes.T
    agreement = (chosen + equal / 2) / np.maximum(votes.sum(1), 1)
    against_label = rejected > chosen
    close = (chosen == 3) & (rejected == 2)
    rho, low, high = rank_correlation(values, agreement, seed=seed)
    return {
        "pairs": float(len(values)),
        "accuracy": float((values > 0).mean()),
        "rank correlation with votes": rho,
        "low": low,
        "high": high,
        "AUROC, majority against the label": auroc(-values, against_label),
        "share, majority against the label": float(against_label.mean()),
        "AUROC, 3-2": auroc(-values, close),
        "share, 3-2": float(close.mean()),
    }


def import_spearmanr():
    """Raises ConfigError, with the remedy, where scipy is not installed."""
    try:
        from scipy.stats import spearmanr
    except ImportError:
        raise ConfigError("votes: needs scipy for rank correlations; pip install scipy") from None
    return spearmanr


def rank_correlation(a, b, resamples=1000, seed=0):
    """Spearman's, with its 95 % bootstrap interval.  (N,), (N,) -> rho, low, high"""
    spearmanr = import_spearmanr()
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(resamples):
        index = rng.integers(0, len(a), len(a))
        resampled.append(spearmanr(a[index], b[index]).statistic)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(spearmanr(a, b).statistic), float(low), float(high)
