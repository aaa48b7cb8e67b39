"""Fig. 4, 5, 6, 21 and 22 on a small world."""
import numpy as np
import pytest
from helpers import SMALL

import train
import world
from experiments import subsets
from runtime.run import Run


def wrong_labels():
    """Their share in the small world of seed 3."""
    noise = world.Noise(0.15, 0.09, 0.02)
    _, truths = world.pairs(60, 3, noise, items=4)
    return np.mean([truth.error != "" for truth in truths])


def check_curves_end_in_their_numbers(rows):
    for row in rows.values():
        for name in ("labels", "gold", "loss"):
            if f"curve: {name}" in row:
                assert row[f"{name}, end"] == row[f"curve: {name}"][-1]


def check_deciles(rows):
    assert list(rows) == [str(t) for t in range(1, 11)]
    wrong = np.mean([row["wrong labels"] for row in rows.values()])
    assert wrong == pytest.approx(wrong_labels())
    assert rows["4"]["the paper: labels"] == 0.561
    check_curves_end_in_their_numbers(rows)


def check_swapped(rows):
    assert list(rows) == ["1", "1 swapped", "2", "2 swapped"]
    for t in "12":
        both = rows[t]["wrong labels"] + rows[f"{t} swapped"]["wrong labels"]
        assert both == pytest.approx(1)
    check_curves_end_in_their_numbers(rows)


def check_strongest(rows):
    assert list(rows) == ["baseline", "margin", "smooth", "smooth_margin"]
    assert len({row["loss, end"] for row in rows.values()}) == 4
    check_curves_end_in_their_numbers(rows)


def check_subsets(rows):
    assert list(rows) == ["30 %", "60 %", "90 %"]
    for row in rows.values():
        assert {"weakest: labels, end", "strongest: gold, end"} <= row.keys()


CHECKS = {
    "deciles": check_deciles,
    "swapped": check_swapped,
    "strongest": check_strongest,
    "subsets": check_subsets,
}


@pytest.mark.parametrize("name", CHECKS)
def test_an_experiment_on_a_small_world(small, out, name, capsys):
    small.check_twice(out, name, CHECKS[name], capsys, "--ppo.methods=")


def test_experiments_share_what_they_have_in_common(tmp_path, monkeypatch):
    """The tenths of Fig. 5 and 6 are those of Fig. 4."""
    trained = []
    record_finished = Run.record_finished

    def spy(run, name, metrics):
        trained.append(name)
        record_finished(run, name, metrics)

    monkeypatch.setattr(Run, "record_finished", spy)
    config, _ = train.parse_args([*SMALL, "--ppo.methods=", f"--out_dir={tmp_path}"])
    fourth = subsets.deciles(config)
    fifth = subsets.swapped(config)
    sixth = subsets.strongest(config)
    prefixes = ("sft", "member", "tenth")
    models = [name for name in trained if name.startswith(prefixes)]
    # SFT and two members, ten tenths, two of them swapped, one in three more ways
    assert len(models) == len(set(models)) == 3 + 10 + 2 + 3
    assert {"tenth_1", "tenth_2_swapped", "tenth_10_smooth_margin"} <= set(models)
    assert fourth["2"] == fifth["2"]
    assert fourth["10"]["loss, end"] == sixth["baseline"]["loss, end"]


def test_columns_are_left_out_by_a_word():
    row = {"labels, best epoch": 1, "labels, end": 2, "curve: intersection": 3}
    assert subsets.without(row, "best", "intersection") == {"labels, end": 2}
