"""python -m tools.compare: the table of a results file, and one line for what it cannot compare."""
import json

import pytest
from helpers import one_line

from tools import compare


def write_results(path, experiment="swapped", seeds=(3, 4)):
    runs = {}
    for seed in seeds:
        runs[seed] = {"1": {"gold, end": 0.25}, "1 swapped": {"gold, end": 0.25 + seed / 8}}
    path.write_text(json.dumps({"experiment": experiment, "runs": runs}))
    return str(path)


def test_the_differences_of_a_file_are_printed(tmp_path, capsys):
    path = write_results(tmp_path / "swapped.json")
    assert compare.main([path]) == 0
    where, _, _, line = capsys.readouterr().out.rstrip().splitlines()
    assert where == path
    assert line.split()[:8] == ["1", "swapped", "1", "gold,", "end", "2", "+0.438", "-0.357"]


@pytest.mark.parametrize("settings, said", [
    (dict(experiment="groups"), "'groups' compares no rows"),
    (dict(experiment="none such"), "'none such' compares no rows"),
    (dict(seeds=[3]), "has one seed, and a comparison needs two; add more with --seeds"),
])
def test_what_cannot_be_compared_is_one_line(settings, said, tmp_path, capsys):
    assert compare.main([write_results(tmp_path / "a.json", **settings)]) == 2
    one_line(capsys, said)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"experiment": "swapped", "runs": [1]}'])
def test_another_file_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert compare.main([str(path)]) == 2
    one_line(capsys, "is no file of results")


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert compare.main([str(tmp_path / "none.json")]) == 2
    one_line(capsys, "none.json")
    assert compare.main([]) == 2 and compare.main(["--help"]) == 0
