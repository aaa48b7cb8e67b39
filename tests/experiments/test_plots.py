"""Every committed picture is drawn again from the committed numbers beside it."""
import json

import pytest
from helpers import ROOT

from experiments.seeds import load_experiments
from experiments.statistics import compare_rows
from runtime import figures

# results/former/ holds those of procedures that are not run any more
PICTURES = sorted(path for path in (ROOT / "results").rglob("*.png") if "former" not in path.parts)
FORESTS = [path for path in PICTURES if path.stem.endswith("_differences")]
PICTURES = [path for path in PICTURES if path not in FORESTS]
WITHOUT = {"headline.json", "headline_labels.json", "picking.json"}  # tables alone


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_committed_result_is_drawn(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 30)
    results = json.loads(picture.with_suffix(".json").read_text())
    path = tmp_path / "a.png"
    load_experiments()[results["experiment"]].plot(results["summary"], str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_differences_are_drawn_filled_where_they_survive(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 30)
    entry = load_experiments()["headline"]
    runs = list(json.loads((ROOT / "results/headline.json").read_text())["runs"].values())
    path = tmp_path / "a.png"
    figures.forest(compare_rows(runs, entry.comparisons), str(path), "headline")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("picture", FORESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_differences_are_those_of_the_committed_numbers(picture):
    path = picture.with_name(picture.name.replace("_differences.png", ".json"))
    results = json.loads(path.read_text())
    entry = load_experiments()[results["experiment"]]
    found = compare_rows(list(results["runs"].values()), entry.comparisons)
    assert results["comparisons"] == found


def test_every_other_committed_result_has_its_picture():
    for path in (ROOT / "results").rglob("*.json"):
        if "former" in path.parts:
            continue
        is_drawn = path.with_suffix(".png") in PICTURES
        assert is_drawn == (str(path.relative_to(ROOT / "results")) not in WITHOUT), path


def test_columns_differ_by_more_than_blanks():
    for path in (ROOT / "results").rglob("*.json"):
        for row in json.loads(path.read_text())["summary"].values():
            assert all(column == column.strip() for column in row), path
