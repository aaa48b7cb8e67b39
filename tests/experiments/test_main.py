"""python -m experiments: arguments, table, one-line errors, the list."""
import io
import sys

import pytest
from helpers import one_line

import experiments.__main__ as cli
from experiments import seeds

RUNS = [
    {"a": {"x": 1.0, "curve": [0.0, 2.0]}, "b": {"x": 5.0}},
    {"a": {"x": 2.0, "curve": [0.0, 4.0]}, "b": {"x": 5.0}},
    {"a": {"x": 6.0, "curve": [3.0, 6.0]}, "b": {"x": 5.0}},
]


# --------------------------------------------------------------------------------------------------
# Arguments

def test_the_default_is_two_seeds_and_full_is_five_with_ten_members():
    entry, numbers, config, add = cli.parse_args(["groups"])
    assert (entry.name, numbers, add) == ("groups", [3, 4], False)
    assert config.ensemble.members == 4 and config.world.pairs == 5000  # of configs/labels.toml
    assert config.out_dir == "out/reproduce"
    _, numbers, config, _ = cli.parse_args(["groups", "--full"])
    assert numbers == [3, 4, 5, 6, 7] and config.ensemble.members == 10
    words = ["groups", "--full", "--seeds=8", "--ensemble.members=3", "--add"]
    _, numbers, config, add = cli.parse_args(words)
    assert add
    assert numbers == [8] and config.ensemble.members == 3
    _, numbers, config, _ = cli.parse_args(["rounds", "--full"])
    assert len(numbers) == 5 and config.ensemble.members == 2  # of configs/metarm.toml


@pytest.mark.parametrize("words, folder", [
    (["groups"], "out/reproduce/labels"),
    (["rounds"], "out/reproduce/metarm"),
    (["contrast"], "out/reproduce/shift"),
    (["groups", "--data.train=mine.jsonl"], "out/reproduce/mine"),
    (["transfer", "--data.train=folder/mine.jsonl", "--out_dir=out/hh"], "out/hh/mine"),
])
def test_experiments_of_one_base_on_the_same_data_share_a_folder(words, folder):
    entry, _, config, _ = cli.parse_args(words)
    assert seeds.data_folder(entry, config) == folder


@pytest.mark.parametrize("words, said", [
    ([], "name an experiment: "),
    (["nothing"], "name an experiment: "),
    (["groups", "--seeds=3,x"], "--seeds='3,x'"),
    (["groups", "--seeds=3,²"], "--seeds='3,²'"),  # a digit that is no number
    (["groups", "--seeds=" + "9" * 5000], "must be whole numbers"),
    (["groups", "--seeds=\n3"], r"--seeds='\n3'"),
    (["groups", "--stage=sft"], "an experiment has no stages"),
    (["groups", "--seeds=3", "--no.such=1"], "no.such"),
])
def test_a_mistake_is_one_line(words, said, capsys):
    assert cli.run_cli(lambda: cli.run_experiment(words)) == 2
    err = one_line(capsys, said)
    if "name an experiment" in said:
        assert all(name in err for name in cli.load_experiments())


def test_the_list_is_printed_on_a_terminal_that_lacks_characters(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["--help"]) == 0


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_name_every_experiment_is_listed_with_its_figure(words, capsys):
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {}
    for line in lines:
        if line.startswith("    "):
            name, _, text = line.strip().partition(" ")
            listed[name] = text.strip()
    assert listed.keys() == cli.load_experiments().keys()
    deciles = "Fig. 4: Reward models trained on one tenth of the pairs alone"
    assert listed["deciles"].startswith(deciles)
    assert listed["votes"].startswith("Human votes against strength")


def test_the_table_of_a_summary_leaves_curves_to_the_figure():
    table = cli.summary_table("name", seeds.summarize(RUNS))
    assert table.splitlines() == [
        "name              x",
        "-------------------",
        "a     3.000 ± 1.528",
        "b     5.000 ± 0.000",
    ]
    summary = {"a": {"x": {"mean": 1.0, "se": None}}, "b": {"y": {"mean": 2.0, "se": 0.5}}}
    head, _, a, b = [line.split() for line in cli.summary_table("name", summary).splitlines()]
    assert (head, a, b) == (["name", "x", "y"], ["a", "1.000"], ["b", "2.000", "±", "0.500"])
