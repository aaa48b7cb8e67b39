"""A small part of the kills, the damage and the write errors, by fixed seeds.

The whole of each is one command: `python tests/faults/kills.py --cases=N`, and so on.
"""
from faults import damage, kills, writes
from faults.runs import FEW


def test_runs_that_are_stopped_at_any_moment_end_equal(capsys):
    words = [*FEW, "--train.checkpoint_minutes=0"]
    assert kills.main(num_cases=1, seed="ci", words=words, most=1) == 0, capsys.readouterr().out


def test_damage_to_any_file_is_noticed(capsys):
    assert damage.main(num_cases=8, seed="ci", words=FEW) == 0, capsys.readouterr().out


def test_a_write_that_fails_is_one_line_and_the_run_goes_on(capsys):
    assert writes.main(num_cases=4, seed="ci") == 0, capsys.readouterr().out
