"""python -m tools.bench growth: every panel is measured at every size, printed and drawn."""
import numpy as np
import pytest
from helpers import one_line

from tools import bench, growth


@pytest.fixture
def small(monkeypatch):
    for name in ("LENGTHS", "WIDTHS"):
        monkeypatch.setattr(growth, name, (16, 32))
    for name in ("MEMBERS", "PAIRS"):
        monkeypatch.setattr(growth, name, (1, 2))


def test_every_panel_is_printed_and_drawn(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(growth, "ROWS", 2)
    path = tmp_path / "growth.png"
    growth.compare_growth(str(path), rounds=1)
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["tokens", "width,", "members", "pairs"]
    assert all(line.count(" ms") == 2 for line in lines)
    assert last == f"{path} shows them"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rows_have_the_length_they_are_asked_for():
    row = growth.random_row(np.random.default_rng(0), 130)
    assert len(row) == 130 and len(row.responses) == 2


def test_the_exponent_is_that_of_a_power_law():
    assert growth.exponent({1: 7.0, 2: 3.0, 8: 48.0}) == pytest.approx(2)


def test_wrong_words_are_one_line(capsys):
    assert bench.main(["growth", "--out=picture.jpg"]) == 2
    one_line(capsys, "must be --out=FILE.png")
