"""The ablation: its recipes, their labels by hand, and all of it on a small world."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import one_line

import train
from config import Config, assign
from data import Pair
from experiments import ablation
from experiments.ablation import BASELINE, DROPPED, FULL, Recipe, recipes

SETTINGS = [
    "--ppo.methods=baseline", "--ensemble.members=4", "--meta.prompts=8", "--meta.k=2",
]
RUN = SimpleNamespace(cfg=assign(Config(), "strength.q", 0.25))
MEMBERS = torch.tensor([[1.0, -3.0, 2.0, 0.5], [3.0, 1.0, -4.0, 0.5]])  # means 2, -1, -1, .5


def labels_with(*parts, run=RUN):
    return [column.tolist() for column in ablation.labels_of(
        run, Recipe("", frozenset(parts)), MEMBERS
    )]


def test_the_labels_of_a_recipe_by_hand():
    """A quarter of four pairs is one: the lowest mean is the second's, by the order of the file."""
    flags = [False, True, False, False]
    assert labels_with() == [[False] * 4, [1.0] * 4, [0.0] * 4]
    assert labels_with("vote", "flip") == [flags, [1.0] * 4, [0.0] * 4]
    assert labels_with("vote", "margin") == [[False] * 4, [1.0] * 4, [2.0, -1.0, -1.0, 0.5]]
    assert labels_with("vote", "flip", "margin") == [flags, [1.0] * 4, [2.0, 1.0, -1.0, 0.5]]
    swap, _, margin = labels_with("flip", "margin")  # of the first member alone
    assert (swap, margin) == (flags, [1.0, 3.0, 2.0, 0.5])
    _, p, margin = labels_with("vote", "drop", "margin")
    assert str(p) == "[1.0, nan, 1.0, 1.0]" and margin == [2.0, -1.0, -1.0, 0.5]


def test_margins_follow_the_settings_of_strength():
    cfg = assign(assign(RUN.cfg, "strength.margin_scale", 2.0), "strength.margin_cap", 1.5)
    _, _, margin = labels_with("vote", "margin", run=SimpleNamespace(cfg=cfg))
    assert margin == [1.5, -1.5, -1.5, 1.0]


class RecordingRun:
    """A run that has everything, and notes what its records must hold."""

    def __init__(self):
        self.cfg = RUN.cfg
        self.facts = {}

    def with_settings(self, settings):
        return self

    def needs(self, name, settings, inputs, extra):
        self.facts[name] = set(settings) | set(extra)
        return False


def test_a_record_holds_all_that_a_reward_model_is_made_from(monkeypatch):
    monkeypatch.setattr(train, "start_facts", lambda run: {"weights of reward.init": "x"})
    run = RecordingRun()
    for parts in ({"metarm"}, {"simcse"}):
        recipe = Recipe("", frozenset(parts))
        labels = ablation.labels_of(run, recipe, MEMBERS)
        ablation.train_recipe(run, recipe, labels, samples=None)
    facts = {"weights of reward.init", "treatment", "contrast.term", "reward.lr"}
    assert facts < run.facts["ablation_simcse"] < run.facts["ablation_metarm"]
    more = run.facts["ablation_metarm"] - run.facts["ablation_simcse"]
    assert {"ppo.max_new_tokens", "ppo.min_new_tokens", "meta.eta", "meta.top_p"} < more


def test_every_part_is_taken_away_once_and_added_once():
    listed = recipes()
    full = listed[0]
    assert full.label == FULL and len({r.label for r in listed}) == len(listed) == 14
    for part in ablation.PARTS:
        without, = [r for r in listed if r.label == f"without {part}"]
        assert full.parts - without.parts == {part}
        if part != "vote":
            alone, = [r for r in listed if r.label == f"with {part} alone"]
            assert alone.parts - {"vote"} == {part}


def test_recipes_that_differ_in_ppo_alone_share_a_reward_model():
    by_label = {r.label: r for r in recipes()}
    assert by_label["without ppo-max"].reward == by_label[FULL].reward
    assert by_label["with ppo-max alone"].reward == by_label[BASELINE].reward == "ablation"
    assert len({r.reward for r in by_label.values()}) == 12
    assert len({r.policy for r in by_label.values()}) == 14


def test_each_is_compared_with_what_it_was_made_of():
    rows = [*(r.label for r in recipes()), ablation.LONGER]
    found = ablation.ablation_comparisons(rows)
    references = {c.row: c.reference for c in found}
    assert references[FULL] == references["with flip alone"] == BASELINE
    assert references["without flip"] == references[DROPPED] == FULL
    assert not {BASELINE, ablation.LONGER} & set(references) and len(references) == 13
    of_ppo_max = {c.column for c in found if "ppo-max" in c.row}  # the reward model is the same
    assert of_ppo_max == {"PPO: gold reward", "PPO: gold reward, ood", "PPO: KL"}


def test_the_longer_answer_is_judged_by_gold_and_every_domain_counts_the_same(monkeypatch):
    """In domain the second label is wrong; of the domains one has a pair of equal length."""
    pairs = {
        "valid": [Pair("", "long", "s"), Pair("", "long", "s")],
        "near": [Pair("", "a", "b")],
        "far": [Pair("", "s", "long"), Pair("", "s", "long"), Pair("", "s", "long")],
    }
    gold = {"valid": [1.0, -1.0], "near": [1.0], "far": [-1.0, -1.0, -1.0]}
    monkeypatch.setattr(ablation, "gold_diffs", lambda run, name: np.array(gold[name]))
    encoded = {name: SimpleNamespace(pairs=some) for name, some in pairs.items()}
    run = SimpleNamespace(valid=encoded.pop("valid"), ood=encoded)
    assert ablation.length_columns(run) == {
        "gold accuracy": (1 + 0) / 2, "gold accuracy, ood": (0.5 + 1) / 2,
    }


EVERY_RECIPE = recipes()
SHOWN = (FULL, "without simcse", "without ppo-max", DROPPED, BASELINE, "with metarm alone",
         "with ppo-max alone")


def some_recipes():
    return [recipe for recipe in EVERY_RECIPE if recipe.label in SHOWN]


def check_rows(rows):
    assert set(rows.pop(ablation.LONGER)) == {"gold accuracy", "gold accuracy, ood"}
    assert list(rows) == [r.label for r in some_recipes()]
    for row in rows.values():
        assert set(ablation.COMPARED) < set(row)
        assert 0 <= row["gold accuracy"] <= 1 and 0 <= row["ece"] <= 1 and row["nll"] > 0
    reward_columns = ("gold accuracy", "gold accuracy, ood", "nll", "ece")

    def rewards_of(label):
        return [rows[label][column] for column in reward_columns]

    assert rewards_of("without ppo-max") == rewards_of(FULL)
    assert rewards_of("with ppo-max alone") == rewards_of(BASELINE)
    assert len({row["nll"] for row in rows.values()}) == 5
    assert len({row["PPO: KL"] for row in rows.values()}) == 7


def test_the_ablation_on_a_small_world(small, out, capsys, monkeypatch):
    short = ablation.PPO_MAX | {"ppo.critic_warmup_iters": 1}
    monkeypatch.setattr(ablation, "PPO_MAX", short)
    monkeypatch.setattr(ablation, "recipes", some_recipes)
    small.check_twice(out, "ablation", check_rows, capsys, *SETTINGS)


def test_the_ablation_needs_the_truth(small, tmp_path, capsys):
    path = small.write_lines(tmp_path / "mine.jsonl", small.debates())
    words = ["--ppo.methods=", f"--data.train={path}"]
    assert small.run(tmp_path / "out", "ablation", *words) == 2
    one_line(capsys, "this experiment needs a known truth")


@pytest.mark.parametrize("label, settings", [
    (FULL, ablation.PPO_MAX), ("without ppo-max", ablation.PLAIN_PPO),
])
def test_ppo_max_and_plain_ppo_differ_in_the_same_settings(label, settings):
    assert ablation.PPO_MAX.keys() == ablation.PLAIN_PPO.keys() == settings.keys()
    assert ("ppo-max" in {r.label: r for r in recipes()}[label].parts) == settings["ppo.normalize"]
