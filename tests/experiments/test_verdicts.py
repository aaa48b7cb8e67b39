"""Domains with a verdict: accepted answers, and every method on a small world."""
from types import SimpleNamespace

import numpy as np
import pytest

import train
import world
from experiments import verdicts

SETTINGS = ["--ppo.methods=", "--reward.methods=", "--world.pairs=40", "--world.demonstrations=60",
            "--ppo.iterations=3", "--ppo.critic_warmup_iters=1"]


def check_verdicts(rows):
    methods = ["SFT", "supervised", "rejection sampling", "expert iteration", "PPO, reward model",
               "PPO, verifier", "PPO, both", "group baseline"]
    assert list(rows) == [f"translation: {method}" for method in methods]
    for row in rows.values():
        assert 0 <= row["success"] <= 1
    assert rows["translation: SFT"]["samples"] == rows["translation: supervised"]["samples"] == 0
    assert rows["translation: supervised"]["tokens trained"] > 0
    for method in methods[4:]:
        assert rows[f"translation: {method}"]["samples"] == 3 * 8
    ratio = verdicts.REJECTION_ANSWERS / (verdicts.EXPERT_ANSWERS * verdicts.EXPERT_ROUNDS)
    rejection = rows["translation: rejection sampling"]["samples"]
    assert rejection == ratio * rows["translation: expert iteration"]["samples"] > 0
    for method in methods[2:]:
        row = rows[f"translation: {method}"]
        points = 1 if method == "rejection sampling" else 2 if method == "expert iteration" else 10
        for cost, total in (("samples", "samples"), ("tokens", "tokens trained")):
            curve = row[f"curve: {cost}"]
            assert len(curve) == points + 1
            assert curve == sorted(curve) and curve[-1] == row[total]
            if not method.startswith(("PPO", "group")):
                assert curve[0] == 0
        assert row["curve: success"][-1] == row["success"]
        assert 0 < row["curve: success"][0] < 1


def test_verdicts_on_a_small_world(small, out, capsys, monkeypatch):
    monkeypatch.setattr(verdicts, "DOMAINS", ("translation",))
    monkeypatch.setattr(verdicts, "EXPERT_ROUNDS", 2)
    monkeypatch.setattr(verdicts, "REJECTION_ANSWERS", 8)
    monkeypatch.setattr(verdicts, "ROLLOUT", 8)
    monkeypatch.setattr(verdicts, "FIT_STEPS", 4)
    monkeypatch.setattr(verdicts, "accepts", half)
    small.check_twice(out, "verdicts", check_verdicts, capsys, *SETTINGS)


class FakeRun:
    """A run that has an SFT model and needs everything else"""

    def __init__(self, epochs=2):
        self.cfg = SimpleNamespace(sft=SimpleNamespace(batch=4, epochs=epochs))

    def with_settings(self, settings):
        return FakeRun(settings["sft.epochs"])

    def needs(self, *_, **__):
        return True


def test_few_answers_are_fitted_as_long_as_many_up_to_a_number_of_passes(monkeypatch):
    fitted = []
    monkeypatch.setattr(verdicts, "load_model", lambda *_: None)
    monkeypatch.setattr(train, "fit_language_model",
                        lambda run, name, model, rows: fitted.append(run.cfg.sft.epochs))
    monkeypatch.setattr(verdicts, "FIT_STEPS", 12)
    monkeypatch.setattr(verdicts, "MAX_EPOCHS", 5)
    row = SimpleNamespace(prompt=np.array([7]), responses=[np.array([1, 2, 3])])
    for number in (1, 4, 12, 48, 52):
        tokens = verdicts.train_language_model(FakeRun(), f"fit_{number}", [row] * number)
        assert tokens == fitted[-1] * number * 3
    assert fitted == [5, 5, 4, 1, 1]


class Recorder(FakeRun):
    """A run that has everything, and notes what its records must hold."""

    def __init__(self, epochs=2):
        super().__init__(epochs)
        self.facts = []

    def with_settings(self, settings):
        return self

    def needs(self, name, settings, inputs, extra):
        self.facts.append((inputs, extra))
        return False


def test_a_record_knows_what_the_accepted_answers_are():
    first = SimpleNamespace(prompt=np.array([7]), responses=[np.array([1, 2, 3])])
    other = SimpleNamespace(prompt=np.array([7]), responses=[np.array([1, 2, 4])])
    run = Recorder()
    for row in (first, other, first):
        verdicts.train_language_model(run, "sft_rejection", [row, row])
    one, two, three = run.facts
    assert one == three != two and one[0] == ["sft"]


def test_tokens_are_counted_where_the_policy_is_trained_on_them():
    ppo = SimpleNamespace(critic_warmup_iters=2, num_ppo_epochs=3, max_new_tokens=4)
    tokenizer = SimpleNamespace(encode_text=list)
    run = SimpleNamespace(cfg=SimpleNamespace(ppo=ppo), tokenizer=tokenizer)

    def count(iteration, response):
        return verdicts.trained_tokens(run, {"iteration": iteration, "response": response})

    assert count(1, "ab") == 0  # the critic alone
    assert count(2, "ab") == 3 * 3  # with EOS
    assert count(2, "abcd") == 3 * 4  # cut short, without EOS


def half(prompt, text):
    """A verdict that an untrained model can earn"""
    return len(text) % 2 == 0


@pytest.mark.parametrize("domain", verdicts.DOMAINS)
def test_right_answers_of_a_domain_are_accepted(domain):
    for demo in world.demonstrations(50, 0, 1.0, (domain,)):
        assert verdicts.accepts(demo["prompt"], demo["response"])
    for demo in world.demonstrations(50, 0, 0.0, (domain,)):
        assert not verdicts.accepts(demo["prompt"], demo["response"])


def test_methods_are_compared_within_their_domain():
    rows = ["a: SFT", "a: PPO, verifier", "a: supervised", "b: SFT", "b: supervised"]
    found = {(c.row, c.reference) for c in verdicts.verdict_comparisons(rows)}
    assert found == {
        ("a: PPO, verifier", "a: SFT"), ("a: supervised", "a: SFT"),
        ("a: supervised", "a: PPO, verifier"), ("b: supervised", "b: SFT"),
    }
