"""python -m tools.speed: every kind of step trains, the table is complete, peers are optional."""
import importlib.util

import numpy as np
import pytest
import torch
from helpers import one_line, tiny_reward

from data import encode_row
from tools import speed

KINDS = [
    "plain",
    "simcse",
    "simcse on differences",
    "swav, K = 50, a queue of 256",
    "swav on differences, K = 20",
    "MetaRM, first order",
    "MetaRM, second order",
]


@pytest.fixture(scope="module")
def data():
    data = speed.make_data(torch.device("cpu"), num_pairs=40)
    small = speed.replace(data.shape, width=16, hidden=24, heads=2, kv_heads=1)
    return data._replace(shape=small)


def test_the_table_has_a_line_for_each_kind_of_step(data, capsys):
    speed.compare_steps(data, rounds=2)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("step, 16 pairs") and "ratio" in head and "cpu" in head
    assert [line[:32].rstrip() for line in lines] == KINDS
    milliseconds, ratio = lines[0][32:].split()[:2]
    assert float(milliseconds) > 0
    assert ratio == "1.00"


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_changes_the_model_and_stays_finite(data, kind, monkeypatch):
    models = []
    build = speed.init_weights

    def remember(model, generator):
        models.append(build(model, generator))
        return models[-1]

    monkeypatch.setattr(speed, "init_weights", remember)
    step = speed.make_steps(data)[kind]
    model = models[KINDS.index(kind)]
    before = [p.detach().clone() for p in model.parameters()]
    step()
    for old, new in zip(before, model.parameters()):
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)


def test_all_kinds_of_step_train_on_the_same_pairs(data, monkeypatch):
    """A ratio within a round compares equal work."""
    seen = []
    pair_loss = speed.pair_loss

    def remember(model, rows, *more):
        seen.append([id(row) for row in rows])
        return pair_loss(model, rows, *more)

    monkeypatch.setattr(speed, "pair_loss", remember)
    steps = speed.make_steps(data)
    for step in steps.values():
        step()
    assert len(seen) == len(steps) and all(ids == seen[0] for ids in seen)
    steps["plain"]()
    assert seen[-1] != seen[0]


def test_seconds_have_a_row_for_each_round_after_the_warm_up():
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = speed.time_steps(steps, torch.device("cpu"), rounds=3, warmup=2)
    assert seconds.shape == (3, 2) and (seconds >= 0).all()
    assert calls == ["a", "b"] * 5


def test_our_side_of_the_peers_trains():
    pairs = speed.world_pairs(20)
    tokenizer = speed.train_tokenizer(speed.texts_of(pairs), 300)
    rows = [encode_row(tokenizer, p.prompt, (p.chosen, p.rejected), 256) for p in pairs]
    model = tiny_reward(vocab=300, context=256)
    before = model.score.weight.detach().clone()
    assert speed.pairs_per_second(model, rows, 0, torch.device("cpu")) > 0
    assert not torch.equal(before, model.score.weight)


def test_ratios_of_speeds_leave_out_the_first_round(capsys):
    work = {"ours": lambda number: 4.0 * (number > 0) + 1, "theirs": lambda number: 2.5}
    speed.print_speeds("pairs/s", work, 3, torch.device("cpu"))
    printed = capsys.readouterr().out
    assert printed.startswith("ours 5.0 pairs/s, theirs 2.5 pairs/s: ratio 2.0 (2.0-2.0), cpu")


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_without_the_peers_one_line_says_what_to_install(capsys):
    assert speed.main(["peers"]) == 2
    one_line(capsys, "is not installed", "requirements-bench.txt")


def test_peers_run_on_the_same_weights(tmp_path, monkeypatch):
    for name in ("trl", "transformers", "datasets"):
        pytest.importorskip(name)
    monkeypatch.setattr(speed, "BATCH", 2)
    cpu = torch.device("cpu")
    pairs = speed.world_pairs(40)
    tokenizer = speed.train_tokenizer(speed.texts_of(pairs), 300)
    training = speed.compare_training(pairs, tokenizer, str(tmp_path / "reward"), cpu, num_steps=2)
    sampling = speed.compare_sampling(tokenizer, str(tmp_path / "policy"), cpu, 2, 4, 3)
    for work in (training, sampling):
        speeds = [measure(0) for measure in work.values()]
        assert len(speeds) == 2 and np.isfinite(speeds).all() and min(speeds) > 0


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["peer"], ["peers", "a", "b"]])
def test_other_arguments_print_the_usage(argv, capsys):
    assert speed.main(argv) == 0
    assert "python -m tools.speed peers [FILE.jsonl.gz]" in capsys.readouterr().out
