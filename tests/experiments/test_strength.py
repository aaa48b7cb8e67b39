"""Fig. 1, 2 and 3 on a small world."""
import json
import types

import numpy as np
import pytest
import torch
from helpers import one_line

import train
import world
from data import Pair
from experiments import strength


def wrong_labels():
    """Their share in the small world of seed 3."""
    noise = world.Noise(0.15, 0.09, 0.02)
    _, truths = world.pairs(60, 3, noise, items=4)
    return np.mean([truth.error != "" for truth in truths])


def check_histograms(rows):
    for row in rows.values():
        assert row["quantile 5%"] < row["quantile 50%"] < row["quantile 95%"]
        width = np.diff(row["curve: value"]).mean()
        assert sum(row["curve: density"]) * width == pytest.approx(1)
    assert rows["std"]["below zero"] == 0


def check_groups(rows):
    assert len(rows) == 20
    assert (np.diff([row["mean"] for row in rows.values()]) >= 0).all()
    wrong = np.mean([row["wrong labels"] for row in rows.values()])
    assert wrong == pytest.approx(wrong_labels())


def check_agreement(rows):
    assert len(rows) == 20
    assert (np.diff([row["strength"] for row in rows.values()]) >= 0).all()
    for row in rows.values():
        assert row["agreement with the truth"] in (0.0, 0.5, 1.0)  # of two pairs each


def check_members(rows):
    assert list(rows) == ["vote", "one member", "all pairs", "weakest tenth", "strongest tenth"]
    assert 0 < rows["vote"]["below zero by one std"] <= rows["vote"]["below zero"] < 1
    assert -1 < rows["one member"]["correlation with another, held out"] < 1
    assert 0 < rows["all pairs"]["chosen is the longer"] < 1


CHECKS = {
    "histograms": check_histograms, "groups": check_groups, "agreement": check_agreement,
    "members": check_members,
}


@pytest.mark.parametrize("name", CHECKS)
def test_an_experiment_on_a_small_world(small, out, name, capsys):
    words = ["--ppo.methods=", "--seeds=3,4" if name == "groups" else "--seeds=3"]
    assert small.run(out, name, *words) == 0
    first, *others = small.read_runs(out, name)
    CHECKS[name](first)
    assert len(others) == (name == "groups")
    path = out / "results" / f"{name}.json"
    before = path.read_bytes()
    assert json.loads(before)["settings"]["world"]["pairs"] == 60
    assert f"{name}, seeds 3" in capsys.readouterr().out
    small.forbid_training()
    assert small.run(out, name, *words) == 0
    assert path.read_bytes() == before


def test_a_distribution_by_hand():
    values = np.float32([-1.0, 0.0, 0.0, 0.0, 1.0])
    row = strength.distribution(values)
    assert row["below zero"] == pytest.approx(0.2) and row["quantile 50%"] == 0.0
    assert abs(row["mode"]) < 2 / 60  # a bin is 1/30 wide
    assert len(row["curve: value"]) == len(row["curve: density"]) == 60


def test_what_members_and_tenths_say_by_hand(monkeypatch):
    """Ten training pairs, whose weakest and strongest are their own tenths."""
    pairs = [Pair("", "why?", "no") for _ in range(9)] + [Pair("", "yes", "no!")]
    part = types.SimpleNamespace(pairs=pairs)
    votes = {
        "train": torch.tensor([[-3.0, -1, *range(1, 9)], [-3, 0, *range(1, 8), 9]]),
        "valid": torch.tensor([[-1.0, 2, 3, 4], [1, 2, -5, 4]]),
    }
    monkeypatch.setattr(train, "ensure_stages", lambda *_, **__: types.SimpleNamespace(train=part))
    monkeypatch.setattr(strength, "load_votes", lambda run: votes)
    rows = strength.describe_members(None)
    assert rows["vote"] == {
        "held out, labels": 0.5, "below zero": pytest.approx(0.2),
        "below zero by one std": pytest.approx(0.1),  # -.5 is within .71
    }
    assert rows["one member"]["held out, labels"] == 0.75
    correlation = np.corrcoef(votes["valid"].numpy())[0, 1]
    assert rows["one member"]["correlation with another, held out"] == pytest.approx(correlation)
    answers = ["chosen ends with a question mark", "chosen is the longer"]
    assert list(rows["weakest tenth"].values()) == [1, 1]
    assert rows["strongest tenth"] == dict.fromkeys(answers, 0) | {answers[1]: 0.5}
    assert rows["all pairs"] == {answers[0]: 0.9, answers[1]: 0.95}


def test_a_file_is_refused_before_anything_is_trained(small, tmp_path, capsys):
    path = small.write_lines(tmp_path / "mine.jsonl", small.debates())
    assert small.run(tmp_path / "out", "agreement", f"--data.train={path}") == 2
    one_line(capsys, "needs a known truth")
    assert not list(tmp_path.rglob("*.pt"))
