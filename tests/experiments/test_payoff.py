"""Where cleaning pays: the grid, and two of its cells on a small world."""
import itertools

import pytest
import torch

from experiments import payoff

SETTINGS = ["--reward.epochs=2", "--ensemble.members=2", "--ppo.methods="]


def test_the_grid_has_every_width_and_number_of_pairs_once():
    cells = payoff.cells()
    assert len({cell.row for cell in cells}) == len({cell.folder for cell in cells}) == 18
    for flip in payoff.FLIP_SHARES:
        sizes = [tuple(cell.settings.values()) for cell in cells
                 if cell.flip == flip and "width" in cell.label]
        assert sizes == list(itertools.product(payoff.WIDTHS, payoff.PAIRS))
    assert cells[0].settings == {"model.width": 64, "world.pairs": 1250}
    regularized = {cell.label: cell.settings for cell in cells if "width" not in cell.label}
    assert regularized["dropout 0.1"] == {
        "model.width": 128, "world.pairs": 1250, "model.dropout": 0.1,
    }


def check_payoff(rows):
    assert list(rows) == [
        "30% flipped, width 16, 30 pairs", "30% flipped, width 32, 30 pairs",
        "30% flipped, dropout 0.1", "30% flipped, weight decay 0",
        "30% flipped, weight decay 0.3",
    ]
    for row in rows.values():
        for method in payoff.TREATED:
            gain = row[method] - row["baseline"]
            assert row[f"{method} - baseline"] == pytest.approx(gain)
        assert 0 <= row["share contradicted"] <= 1
    assert len({row["share contradicted"] for row in rows.values()}) > 1


def test_the_payoff_on_a_small_world(small, out, capsys, monkeypatch):
    monkeypatch.setattr(payoff, "FLIP_SHARES", (0.3,))
    monkeypatch.setattr(payoff, "WIDTHS", (16, 32))
    monkeypatch.setattr(payoff, "PAIRS", (30,))
    monkeypatch.setattr(payoff, "cells", small_cells)
    small.check_twice(out, "payoff", check_payoff, capsys, *SETTINGS)
    watched = list(out.rglob("treated_*_watched.pt"))
    assert watched and all(len(torch.load(path)) == 1 for path in watched)  # scored once


def small_cells():
    grid = []
    for width in payoff.WIDTHS:
        settings = {"model.width": width, "world.pairs": 30}
        grid.append(payoff.Cell(0.3, f"width {width}, 30 pairs", settings))
    for label, settings in payoff.REGULARIZED.items():
        grid.append(payoff.Cell(0.3, label, {"world.pairs": 30} | settings))
    return grid
