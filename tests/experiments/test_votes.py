"""Strength against human votes: rank correlation, the split by debates, a small file."""
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from helpers import one_line
from hypothesis import given
from hypothesis import strategies as st

import train
from config import ConfigError, assign
from evaluate import lengths_of, longer_wins
from experiments import votes
from formats.pairs import read_pairs
from formats.records import read_records

pytest.importorskip("scipy.stats")


def ranks(x):
    """Places from 1 on; equal values share their mean place."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def spearman(a, b):
    a = np.array(ranks(a)) - np.mean(ranks(a))
    b = np.array(ranks(b)) - np.mean(ranks(b))
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


def has_two_values(pairs):
    return all(len(set(x)) > 1 for x in zip(*pairs))


few = st.integers(0, 4)  # ties are common


@pytest.mark.filterwarnings("ignore")  # of three values, a resample may be one value only
@given(st.lists(st.tuples(few, few), min_size=3, max_size=30).filter(has_two_values))
def test_rank_correlation_is_its_definition(values):
    a, b = np.array(values, float).T
    rho, _, _ = votes.rank_correlation(a, b, resamples=1)
    assert rho == pytest.approx(spearman(a, b))
    turned, _, _ = votes.rank_correlation(np.exp(a), -b ** 3, resamples=1)
    assert turned == pytest.approx(-rho)  # only the order counts


def test_rank_correlation_is_scipys():
    from scipy import stats

    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    b = rng.integers(0, 6, 200)
    assert votes.rank_correlation(a, b, 1)[0] == pytest.approx(stats.spearmanr(a, b).statistic)


def test_the_interval_of_a_rank_correlation_covers_it_and_depends_on_its_seed():
    rng = np.random.default_rng(0)
    a = rng.normal(size=400)
    b = a + rng.normal(size=400)
    rho, low, high = votes.rank_correlation(a, b, 500)
    assert low < rho < high
    z = 1.96 * 1.06 ** 0.5 / math.sqrt(400 - 3)  # Fisher's, for ranks
    assert low == pytest.approx(math.tanh(math.atanh(rho) - z), abs=0.02)
    assert high == pytest.approx(math.tanh(math.atanh(rho) + z), abs=0.02)
    assert votes.rank_correlation(a, b, 500) == (rho, low, high)
    assert votes.rank_correlation(a, b, 500, seed=1) != (rho, low, high)


# --------------------------------------------------------------------------------------------------
# A file with votes

def vote_lines(pairs):
    """The chosen answer has i % 6 of five votes: sometimes the label is not the majority's."""
    lines = []
    for i, pair in enumerate(pairs):
        equal = int(i % 6 == 1)
        votes_of = {"votes_chosen": i % 6, "votes_rejected": 5 - i % 6 - equal}
        lines.append(pair | votes_of | {"votes_equal": equal})
    return lines


class Agreeing:
    """A run whose members together say what the votes say, and whose first says the opposite."""

    def __init__(self, lines):
        self.share = {}
        for line in lines:
            share = (line["votes_chosen"] + line["votes_equal"] / 2) / 5
            self.share[line["prompt"], line["chosen"]] = share
        self.pairs = {}

    def share_of(self, pairs):
        return np.array([self.share[pair.prompt, pair.chosen] for pair in pairs])

    def ensure_stages(self, config, *stages, slot):
        assert stages == ("sft", "ensemble", "strength")
        assert config.ensemble.folds == 0  # "trained on" is what it says
        assert config.clean.tests == 0  # members of a self-test would be trained for nothing
        paths = {"train": config.data.train[0], "valid": config.data.valid[0]}
        self.pairs = {name: read_pairs(path) for name, path in paths.items()}
        for _, record in read_records(paths["train"]):
            assert "votes" not in str(record.keys())  # members do not see them
        parts = {name: types.SimpleNamespace(pairs=pairs) for name, pairs in self.pairs.items()}
        return types.SimpleNamespace(**parts)

    def load_votes(self, run):
        out = {}
        for name, pairs in self.pairs.items():
            agreement = torch.from_numpy(self.share_of(pairs)) - 0.5
            out[name] = torch.stack((-agreement, 3 * agreement))
        return out


def test_human_votes_are_compared_with_strength(small, tmp_path, monkeypatch):
    """The first answers of every debate are equally long, which counts a half for length."""
    lines = vote_lines(small.debates())
    for line in lines[::5]:
        line["rejected"] = line["chosen"].replace("yes", "not")
    agreeing = Agreeing(lines)
    monkeypatch.setattr(train, "ensure_stages", agreeing.ensure_stages)
    monkeypatch.setattr(votes, "load_votes", agreeing.load_votes)
    path = small.write_lines(tmp_path / "votes.jsonl", lines)
    words = [f"--data.train={path}", f"--out_dir={tmp_path}/out"]
    words += ["--ensemble.folds=2", "--clean.tests=1"]
    config, _ = train.parse_args(words)
    rows = votes.votes(config)
    debates = {}
    for name, pairs in agreeing.pairs.items():
        debates[name] = {pair.prompt.split("\n")[0] for pair in pairs}
    assert len(debates["train"]) == 9 and len(debates["valid"]) == 3  # a quarter of the debates
    assert not debates["train"] & debates["valid"]
    assert list(rows) == [
        "trained on: strength", "trained on: one model", "trained on: length",
        "held-out debates: strength", "held-out debates: one model", "held-out debates: length",
    ]
    assert rows["trained on: strength"]["pairs"] == 45
    assert rows["held-out debates: strength"]["pairs"] == 15
    check_rows(rows, "trained on", agreeing.pairs["train"], agreeing)
    check_rows(rows, "held-out debates", agreeing.pairs["valid"], agreeing)


def test_members_have_trained_on_the_pairs_that_are_called_so(tmp_path):
    config, _ = train.parse_args([f"--data.train={tmp_path}/votes.jsonl"])
    config = assign(config, "ensemble.voters", "states")
    with pytest.raises(ConfigError, match="give --ensemble.voters=trained --ensemble.folds=0$"):
        votes.votes(config)


def test_votes_are_found_by_the_texts_of_the_file(tmp_path):
    """A bare prompt becomes a human turn in the pair, not in the file."""
    line = {"prompt": "Which?", "chosen": "this", "rejected": "that"}
    line |= {"votes_chosen": 3, "votes_rejected": 2, "votes_equal": 0}
    (tmp_path / "votes.jsonl").write_text(json.dumps(line))
    human = votes.HumanVotes(tmp_path / "votes.jsonl")
    assert human.of(read_pairs(tmp_path / "votes.jsonl")).tolist() == [[3, 2, 0]]


def check_rows(rows, name, pairs, agreeing):
    row = rows[f"{name}: strength"]
    share = agreeing.share_of(pairs)
    close = share == 0.6
    assert row["rank correlation with votes"] == pytest.approx(1)
    assert row["AUROC, majority against the label"] == 1
    assert row["accuracy"] == pytest.approx((share > 0.5).mean())
    # 3 to 2 at most, so no ties
    assert row["share, majority against the label"] == pytest.approx((share < 0.5).mean())
    assert row["share, 3-2"] == pytest.approx(close.mean())
    # all pairs of three to two votes have the same strength
    assert row["AUROC, 3-2"] == pytest.approx((share[~close] > 0.6).mean())
    assert rows[f"{name}: one model"]["rank correlation with votes"] == pytest.approx(-1)
    length = rows[f"{name}: length"]
    assert any(len(pair.chosen) == len(pair.rejected) for pair in pairs)
    assert length["accuracy"] == pytest.approx(longer_wins(lengths_of(pairs)).mean())
    assert length["low"] <= length["rank correlation with votes"] <= length["high"] < 1


def test_votes_on_a_small_file(small, tmp_path, capsys):
    lines = vote_lines(small.debates())
    path = small.write_lines(tmp_path / "votes.jsonl", lines)
    out = tmp_path / "out"
    words = [f"--data.train={path}", "--model.vocab=300", "--ppo.methods="]
    assert small.run(out, "votes", *words) == 0
    rows, = small.read_runs(out, "votes")
    assert [row["pairs"] for row in rows.values()] == [45, 45, 45, 15, 15, 15]
    assert "votes, seeds 3" in capsys.readouterr().out
    for bad in ({"votes_equal": None}, {"votes_chosen": "3"}):
        small.write_lines(path, [*lines, lines[0] | bad])
        assert small.run(out, "votes", *words) == 2
        missing = "a line needs prompt, chosen, rejected and votes_chosen"
        one_line(capsys, f"{path}:61: {missing}")
    assert small.run(out, "votes") == 2
    one_line(capsys, "name a file with human votes")


def test_without_scipy_one_line_says_so_before_anything_is_trained(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setattr(train, "ensure_stages", lambda *_, **__: pytest.fail("trained"))
    path = small.write_lines(tmp_path / "votes.jsonl", vote_lines(small.debates()))
    config, _ = train.parse_args([f"--data.train={path}", f"--out_dir={tmp_path}/out"])
    with pytest.raises(ConfigError, match="pip install scipy") as error:
        votes.votes(config)
    assert "\n" not in str(error.value)


def test_the_committed_votes_have_the_columns_of_today():
    from helpers import ROOT

    results = json.loads((ROOT / "results" / "votes.json").read_text())
    human_votes = np.array([[5, 0, 0], [3, 2, 0], [1, 4, 0], [2, 2, 1]] * 5)
    columns = set(votes.vote_scores(np.arange(20.0), human_votes, 0))
    for row in results["summary"].values():
        assert set(row) == columns
