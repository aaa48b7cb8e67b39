"""Fig. 1, 2 and 3 on a small world."""
import json

import numpy as np
import pytest
from helpers import one_line

import world
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


CHECKS = {"histograms": check_histograms, "groups": check_groups, "agreement": check_agreement}


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


def test_a_file_is_refused_before_anything_is_trained(small, tmp_path, capsys):
    path = small.write_lines(tmp_path / "mine.jsonl", small.debates())
    assert small.run(tmp_path / "out", "agreement", f"--data.train={path}") == 2
    one_line(capsys, "needs a known truth")
    assert not list(tmp_path.rglob("*.pt"))
