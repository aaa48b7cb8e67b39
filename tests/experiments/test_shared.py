"""Functions that experiments share, by hand."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import world
from common import training_prompts, world_demonstrations
from config import Config, ConfigError, assign
from experiments import shared


def test_accuracy_over_training_by_hand():
    diffs = np.array([  # three epochs, four pairs
        [1.0, -1.0, -1.0, 1.0],
        [1.0, 2.0, -1.0, 1.0],
        [1.0, -1.0, 1.0, -1.0],
    ])
    gold = np.array([1.0, 0.5, -2.0, -1.0])  # the last two labels are wrong
    row = shared.over_training(diffs, gold)
    assert row["curve: labels"] == [0.5, 0.75, 0.5]
    assert row["curve: gold"] == [0.5, 0.75, 0.5]
    assert row["curve: intersection"] == [0.5, 1.0, 0.5]  # of the first two
    assert row["labels, best epoch"] == 0.75 and row["labels, end"] == 0.5
    assert row["intersection, best epoch"] == 1.0 and row["intersection, end"] == 0.5
    loss = [np.mean([math.log(1 + math.exp(-d)) for d in epoch]) for epoch in diffs]
    assert row["curve: loss"] == pytest.approx(loss)
    assert row["loss, end"] == pytest.approx(loss[-1])
    known = {name for name in row if "gold" not in name and "intersection" not in name}
    assert set(shared.over_training(diffs, None)) == known


def test_restrict_leaves_the_other_pairs_without_p():
    swap = torch.tensor([True, False, True])
    p = torch.tensor([1.0, 0.8, math.nan])
    margin = torch.tensor([0.1, 0.2, 0.3])
    out = shared.restrict((swap, p, margin), torch.tensor([False, True, True]))
    assert out[0] is swap and out[2] is margin
    # what was left out already stays so
    np.testing.assert_array_equal(out[1], np.float32([math.nan, 0.8, math.nan]))
    assert p[0] == 1.0


def test_pair_diffs_are_chosen_less_rejected():
    rewards = torch.tensor([[[3.0, 1.0], [0.0, 2.0]]])
    assert shared.pair_diffs(rewards).tolist() == [[2.0, -2.0]]


def test_change_sets_several_settings_and_leaves_the_configuration():
    config = Config()
    changed = shared.change(config, {"seed": 5, "world.flip": 0.25, "ppo.methods": ""})
    assert (changed.seed, changed.world.flip, changed.ppo.methods) == (5, 0.25, ())
    assert config == Config()
    with pytest.raises(ConfigError, match="no.such"):
        shared.change(config, {"no.such": 1})


def test_files_have_no_known_truth():
    assert shared.knows_truth(Config())
    shared.need_truth(Config())
    config = shared.change(Config(), {"data.train": "a.jsonl,b.jsonl"})
    assert not shared.knows_truth(config)
    with pytest.raises(ConfigError, match="data.train = 'a.jsonl,b.jsonl': .* known truth"):
        shared.need_truth(config)


def test_the_treatments_of_fig_8_are_a_part_of_all():
    assert shared.METHODS[:6] == shared.PAPER_METHODS
    assert set(shared.METHODS) - set(shared.PAPER_METHODS) == {
        "smooth", "soft", "drop", "flip_soft",
    }


# --------------------------------------------------------------------------------------------------
# Prompts of a test


def run_of_translation(monkeypatch, **settings):
    """A run of few demonstrations, whose prompts are not tokenized"""
    monkeypatch.setattr(shared, "policy_prompts",
                        lambda run, pairs: [(pair.prompt, None) for pair in pairs])
    cfg = Config()
    small = {"ppo.domains": ("translation",), "world.pairs": 500, "world.demonstrations": 600}
    for name, value in (small | settings).items():
        cfg = assign(cfg, name, value)
    return SimpleNamespace(cfg=cfg)


def test_prompts_of_a_test_are_in_no_training(monkeypatch):
    run = run_of_translation(monkeypatch, **{"evaluate.prompts": 200})
    prompts = shared.unseen_prompts(run, ("translation",), "key")
    texts = {text for text, _ in prompts}
    assert len(prompts) == len(texts) == 200
    assert not texts & {demo["prompt"] for demo in world_demonstrations(run.cfg)}
    assert not texts & {pair.prompt for pair in training_prompts(run)}
    drawn = world.demonstrations(200, "key", domains=("translation",))
    assert texts & {demo["prompt"] for demo in drawn}  # the key's own draws, less those seen
    less = shared.unseen_prompts(run, ("translation",), "key", others=sorted(texts))
    assert not texts & {text for text, _ in less}


def test_too_few_prompts_that_training_does_not_have_are_an_error(monkeypatch):
    run = run_of_translation(monkeypatch, **{"evaluate.prompts": 10})
    seen = [demo["prompt"] for demo in world.demonstrations(500, "key", domains=("translation",))]
    with pytest.raises(ConfigError, match="only 0 prompts of translation .* lower it"):
        shared.unseen_prompts(run, ("translation",), "key", seen)
