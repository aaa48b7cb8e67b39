"""What tests of experiments share: one experiment on a small world, and what it has written."""
import json
import math
import types

import pytest
from helpers import ROOT, SMALL

import experiments.__main__ as cli
from runtime.run import Run


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Experiments begin from a configuration of configs/."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all experiments of a file, which share what they train."""
    return tmp_path_factory.mktemp("experiments")


def change_small(*words):
    """SMALL without the settings that these words change, and then these."""
    keys = {word.partition("=")[0] for word in words}
    return [*(word for word in SMALL if word.partition("=")[0] not in keys), *words]


def run(out, name, *words):
    """python -m experiments NAME on a small world, seed 3 -> exit code"""
    return cli.main([name, *change_small("--seeds=3", *words), f"--out_dir={out}"])


def is_finite(value):
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return len(value) > 0 and all(map(is_finite, value))
    return isinstance(value, float) and math.isfinite(value)


def read_runs(out, name):
    """-> the rows of every seed, after a look at all that every experiment leaves"""
    results = json.loads((out / "results" / f"{name}.json").read_text())
    runs = list(results["runs"].values())
    assert results["experiment"] == name
    assert runs[0] and is_finite(runs[0])
    assert results["summary"] == json.loads(json.dumps(cli.summarize(runs)))
    assert (out / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return runs


def check_twice(out, name, check, capsys, *words):
    """Run an experiment and check its rows; the second time, without pictures, it trains nothing.
    """
    assert run(out, name, *words) == 0
    rows, = read_runs(out, name)
    check(rows)
    assert f"{name}, seeds 3" in capsys.readouterr().out
    before = (out / "results" / f"{name}.json").read_bytes()
    with pytest.MonkeyPatch.context() as monkeypatch:
        forbid_training(monkeypatch)
        monkeypatch.setattr("runtime.figures.draw", lambda *arguments, **options: False)
        assert run(out, name, *words) == 0
    assert (out / "results" / f"{name}.json").read_bytes() == before


def forbid_training(monkeypatch):
    """Make everything that is trained again a failure."""
    monkeypatch.setattr(Run, "record_finished", lambda *_: pytest.fail("trained again"))


def debates():
    """60 preference pairs of files, on twelve debates"""
    pairs = []
    for i in range(60):
        prompt = f"Debate {i // 5}\nround {i % 5}\n\nHuman: {i}?\n\nAssistant:"
        pairs.append({"prompt": prompt, "chosen": " yes" * (1 + i % 3), "rejected": " no no"})
    return pairs


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def small(monkeypatch):
    """The functions above"""
    return types.SimpleNamespace(
        run=run, read_runs=read_runs, check_twice=check_twice, debates=debates,
        write_lines=write_lines, forbid_training=lambda: forbid_training(monkeypatch),
    )
