"""Rivals of the vote: EM by hand and by simulation, then all of them on a small world."""
import numpy as np
import pytest
import torch

from experiments import rivals

SETTINGS = ["--reward.epochs=2", "--ensemble.members=3", "--ppo.methods="]


# --------------------------------------------------------------------------------------------------
# EM

def test_the_posterior_by_hand():
    """Two pairs of d = ln 3 with labels in opposite directions: sigmoid .75 and .25.  With e = .5 a
    label says nothing, and w = sigmoid(d), whose mean is .5: a fixed point."""
    d = torch.tensor([np.log(3.0), -np.log(3.0)])
    w, share = rivals.posterior(d)
    assert share == pytest.approx(0.5, abs=1e-3)
    torch.testing.assert_close(w, torch.tensor([0.75, 0.25]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_em_finds_the_share_of_flips_where_the_model_is_calibrated(share):
    rng = np.random.default_rng(0)
    d = rng.normal(0, 4, 20000)
    label = np.where(rng.random(20000) < 1 / (1 + np.exp(-d)), 1, -1)  # as the model says
    flipped = rng.random(20000) < share
    w, estimate = rivals.posterior(torch.from_numpy(d * label * np.where(flipped, -1, 1)))
    assert estimate == pytest.approx(share, abs=0.02)
    assert w[~flipped].mean() > w[flipped].mean() + 0.2


def test_labels_that_are_sure_keep_their_weight():
    w, share = rivals.posterior(torch.full((10,), 30.0))
    assert share < 1e-3 and (w > 0.999).all()


# --------------------------------------------------------------------------------------------------
# On a small world

def check_rivals(rows):
    shares = {name.partition(": ")[0] for name in rows}
    assert shares == {"40%"}
    names = [name.removeprefix("40%: ") for name in rows]
    assert set(names) == {
        *rivals.METHODS, "vote, flip", "vote, drop", "vote, flip_soft", "vote, soft",
    }
    for name, row in rows.items():
        if "flips: AUROC" in row:
            assert 0 < row["share wrong, estimated"] < 0.8
        assert ("gold, end" in row) == (not name.endswith(": vote"))
    assert rows["40%: EM"]["share wrong"] > 0.35
    ends = [rows[f"40%: {name}"]["flips: AUROC"] for name in rivals.METHODS]
    assert len(set(ends)) == len(ends)  # every method has its own model


def test_rivals_on_a_small_world(small, out, capsys, monkeypatch):
    monkeypatch.setattr(rivals, "FLIP_SHARES", (0.4,))
    small.check_twice(out, "rivals", check_rivals, capsys, *SETTINGS)
    watched = list(out.rglob("rival_*_watched.pt"))
    assert watched and all(len(torch.load(path)) == 1 for path in watched)  # scored once


def test_rivals_are_compared_with_plain_training_and_with_the_vote():
    rows = ["10%: one model", "10%: vote", "10%: vote, flip", "10%: EM", "40%: vote", "40%: EM"]
    found = {(c.row, c.reference, c.column) for c in rivals.rival_comparisons(rows)}
    assert {couple for couple in found if couple[0].endswith(": EM")} == {
        ("10%: EM", "10%: one model", "gold, end"), ("10%: EM", "10%: vote, flip", "gold, end"),
        ("10%: EM", "10%: vote", "flips: AUROC"), ("40%: EM", "40%: vote", "flips: AUROC"),
    }
    assert {couple[1:] for couple in found if couple[0] == "10%: one model"} == {
        ("10%: vote", "flips: AUROC"),
    }
    assert ("10%: vote, flip", "10%: one model", "gold, end") in found
    assert ("10%: vote, flip", "10%: vote, flip", "gold, end") not in found


def check_diversity(rows):
    assert list(rows) == list(rivals.SOURCES)
    correlations = [row["correlation of two members"] for row in rows.values()]
    assert correlations[0] > correlations[2]  # other SFT models agree less


def test_diversity_on_a_small_world(small, out, capsys):
    small.check_twice(out, "diversity", check_diversity, capsys, *SETTINGS)
