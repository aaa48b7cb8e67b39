"""A small part of fuzz.py with a fixed seed, and what it calls a bad outcome."""
import random
import sys
import time
from pathlib import Path

import pytest
from faults import fuzz, mutations, targets

CASES = 15  # of each target; `python tests/faults/fuzz.py --cases=1000` takes minutes


@pytest.mark.parametrize("name", targets.TARGETS)
def test_damaged_inputs_are_accepted_or_one_line(name, tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    target = targets.TARGETS[name](tmp_path, monkeypatch, lambda: finished)
    bad = []
    outcomes = fuzz.run_target(name, target, 0, range(CASES), bad.append)
    target.close()
    assert not bad, "\n".join(bad)
    assert outcomes.total() == CASES and outcomes["one line"] > 0


def fail(text, code=2):
    print(text, file=sys.stderr)
    return code


def write(path):
    Path(path).touch()
    return fail("error: a.jsonl: is empty; fill it")


def no_end():
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("call, outcome", [
    (lambda: 0, "accepted"),
    (lambda: fail("error: a.jsonl: is empty; fill it"), "one line"),
    (lambda: fail("note: a is now b\nerror: a.jsonl: is empty; fill it"), "one line"),
    (lambda: fail("error: a\nb.jsonl: is empty; fill it"), "MESSAGE"),
    (lambda: fail("error: https://user:hunter2@host: is empty; fill it"), "MESSAGE"),
    (lambda: fail("warning: a.jsonl is empty"), "MESSAGE"),
    (lambda: fail("error: a.jsonl: is empty; fill it", 1), "MESSAGE"),
    (lambda: write("left"), "LEFTOVER"),
    (lambda: {}["a"], "TRACEBACK"),
    (lambda: print("\ud800") or 0, "TRACEBACK"),
    (no_end, "HANG"),
    (lambda: len(bytearray(2 ** 28)) * 0, "MEMORY"),
    (lambda: bytearray(2 ** 45), "TRACEBACK"),
])
def test_the_outcome_of_a_case(tmp_path, monkeypatch, call, outcome):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "SECONDS", 1 if outcome == "HANG" else 60)  # also on a busy machine
    case = targets.Case(call, input_size=10, about="")
    assert fuzz.run_case(case, tmp_path, allowed_memory=2 ** 26)[0] == outcome


def test_the_same_numbers_give_the_same_case(tmp_path):
    path = tmp_path / "a.json"
    found = []
    for _ in range(2):
        rng = random.Random("0 data 3")
        path.write_text('{"a": [1, {"b": "c"}], "d": null}')
        mutations.mutate_file(rng, path)
        found.append((targets.describe(path), mutations.mutate_text(rng, "abc")))
        mutations.remove(path)
    assert found[0] == found[1]


def test_the_command_prints_a_table_and_fails_for_a_bad_outcome(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fuzz.main(["--target=toml", "--cases=2"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "target" and line.split()[0] == "toml"
    assert sum(map(int, line.split()[1:])) == 2

    class Broken(targets.Toml):
        def case(self, rng, damage=True):
            call = (lambda: {}["a"]) if damage else (lambda: 0)
            return targets.Case(call, 0, "an input")

    monkeypatch.setitem(targets.TARGETS, "toml", Broken)
    assert fuzz.main(["--target=toml", "--cases=2", "--seed=3"]) == 1
    out = capsys.readouterr().out
    assert "TRACEBACK: --target=toml --seed=3 --case=1\nan input\n" in out and "KeyError" in out
