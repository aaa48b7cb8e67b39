"""Warnings of PPO's known failures, samples as text, histories under old and new names."""
import json
import math
from types import SimpleNamespace

import pytest

import config
from runtime import figures
from runtime.monitor import (
    OLD_METRICS,
    after_iteration,
    collapse_warnings,
    load_histories,
    rename_metrics,
    samples_text,
    save_results,
    warned_before,
)

HEALTHY = {"kl": 2.0, "length": 20.0, "eos_rate": 0.9, "perplexity_sft": 3.0,
           "first_ratio": 1.00001, "value_loss": 0.2}
OLD_NAMES = {new: old for old, new in OLD_METRICS.items()}


def history(n=20, **change):
    """n healthy iterations, then ten in which something differs"""
    return [HEALTHY] * n + [HEALTHY | change] * 10


# --------------------------------------------------------------------------------------------------
# Warnings

@pytest.mark.parametrize("change, name, cause", [
    (dict(kl=-0.5), "kl", "another distribution"),
    (dict(length=47.5, eos_rate=0.3), "length", "missing_eos_penalty"),
    (dict(eos_rate=0.0), "length", "ppo.max_new_tokens = 48"),
    (dict(perplexity_sft=1.1), "perplexity", "ppo.kl_coef"),
    (dict(first_ratio=1.5), "ratio", "1.5, not 1"),
    (dict(first_ratio=0.5), "ratio", "dropout"),
    (dict(first_ratio=math.nan), "ratio", "nan"),
    (dict(value_loss=9.0), "value_loss", "critic_lr"),
    (dict(value_loss=math.nan), "value_loss", "nan"),
])
def test_a_known_failure_is_named_with_its_cause_in_one_line(change, name, cause):
    found = collapse_warnings(history(**change), config.Ppo())
    assert list(found) == [name] and cause in found[name] and "\n" not in found[name]


def test_a_warning_names_settings_that_exist():
    failures = dict(kl=-0.5, eos_rate=0.0, perplexity_sft=1.1, first_ratio=2.0, value_loss=9.0)
    found = collapse_warnings(history(**failures), config.Ppo())
    assert list(found) == ["kl", "length", "perplexity", "ratio", "value_loss"]
    words = " ".join(found.values()).replace(",", " ").replace(")", " ").replace("(", " ").split()
    named = {word for word in words if word.startswith("ppo.")}
    assert named and named <= set(config.keys())


@pytest.mark.parametrize("change", [
    dict(),
    dict(kl=-0.05),
    dict(kl=40.0),
    dict(length=40.0),
    dict(eos_rate=0.2),
    dict(perplexity_sft=1.5),
    dict(perplexity_sft=30.0),
    dict(first_ratio=1.05),
    dict(value_loss=1.0),
    dict(value_loss=0.0),
])
def test_usual_values_give_no_warning(change):
    assert collapse_warnings(history(**change), config.Ppo()) == {}


@pytest.mark.parametrize("change", [
    dict(kl=-5.0),
    dict(length=48.0),
    dict(eos_rate=0.0),
    dict(perplexity_sft=1.0),
    dict(value_loss=90.0),
])
def test_one_bad_iteration_gives_no_warning(change):
    assert collapse_warnings(history()[:-1] + [HEALTHY | change], config.Ppo()) == {}
    assert collapse_warnings([HEALTHY | change], config.Ppo()) == {}


def test_a_negative_kl_must_last_ten_iterations():
    interrupted = history(kl=-5.0)[:-1] + [HEALTHY | dict(kl=0.1)]
    assert collapse_warnings(interrupted, config.Ppo()) == {}


def test_histories_of_older_runs_give_the_same_warnings():
    lines = history(eos_rate=0.0)
    old_lines = [{OLD_NAMES.get(name, name): v for name, v in line.items()} for line in lines]
    assert "ended" in old_lines[0]
    assert collapse_warnings(old_lines, config.Ppo()) == collapse_warnings(lines, config.Ppo())


def test_metrics_get_their_new_names():
    old = {"clip_fraction": 1, "kl_old": 2, "sampled_scored_gap": 3, "sampled_scored_mean": 4,
           "ended": 5, "kl_weight": 6, "kl": 7}
    new = {"clipfrac": 1, "approx_kl": 2, "logprob_mismatch_max": 3, "logprob_mismatch_mean": 4,
           "eos_rate": 5, "kl_coef": 6, "kl": 7}
    assert rename_metrics(old) == rename_metrics(new) == new


# --------------------------------------------------------------------------------------------------
# Samples

def test_samples_are_shown_with_their_rewards():
    cfg = config.Ppo(rollout_batch_size=8, sample_every=2)
    lines = []
    for i in range(40):  # five iterations
        prompt = f"\n\nHuman: question {i}?\n\nAssistant:"
        lines.append({"iteration": i // 8, "prompt": prompt, "response": f" line one\nanswer {i}",
                      "reward": i / 7, "kl": i / 3})
    text = samples_text(lines, cfg)
    for i, line in enumerate(lines):
        is_shown = i // 8 in (0, 2, 4) and i % 8 < 3
        head = f"Iteration {line['iteration']}: reward {line['reward']:.3f}, KL {line['kl']:.2f}"
        assert (head in text) == is_shown
        if is_shown:
            block = text.split(head)[1].split("Iteration")[0].strip("\n").split("\n")
            assert all(part.startswith("    ") for part in block)
            shown = "\n".join(part[4:] for part in block)
            assert shown == line["prompt"].strip() + " >>>" + line["response"]


def test_fewer_than_three_answers_an_iteration_are_all_shown():
    cfg = config.Ppo(rollout_batch_size=1, sample_every=1)
    lines = [{"iteration": i, "prompt": "", "response": "", "reward": 0, "kl": 0} for i in range(4)]
    assert samples_text(lines, cfg).count("Iteration") == 4


# --------------------------------------------------------------------------------------------------
# A run's log, samples and history

class FakeRun:
    """The part of runtime.run.Run that monitoring needs"""
    def __init__(self, folder, **ppo):
        self.cfg = config.Config(out_dir=str(folder), ppo=config.Ppo(**ppo))
        self.folder = folder
        self.logged = []
        self.drawn = []

    def path(self, name):
        return str(self.folder / name)

    def draw(self, name, function, *arguments):
        self.drawn.append((name, function, *arguments))

    def load_jsonl(self, name):
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def log(self, **record):
        self.logged.append(record)

    def save_text(self, name, text):
        (self.folder / name).write_text(text)

    def save_jsonl(self, name, records):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (self.folder / name).write_text(text)


def run_iterations(run, n, **change):
    """So many iterations that after_iteration sees -> the last state"""
    state = SimpleNamespace(step=0, history=[], lines=[])
    warned = set()
    for step in range(n):
        state.step = step + 1
        state.history.append(HEALTHY | change)
        state.lines += [{"iteration": step, "prompt": "p", "response": f" {step} {b}",
                         "reward": 0.0, "kl": 0.0} for b in range(run.cfg.ppo.rollout_batch_size)]
        after_iteration(run, "policy_flip", state, warned, 10.0)
    return state


def test_three_samples_are_logged_every_so_many_iterations(tmp_path):
    run = FakeRun(tmp_path, rollout_batch_size=4, sample_every=2)
    state = run_iterations(run, 5)
    assert [len(line.get("samples", ())) for line in run.logged] == [3, 0, 3, 0, 3]
    assert run.logged[2]["samples"] == state.lines[8:11]
    assert (tmp_path / "samples_flip.md").read_text() == samples_text(state.lines, run.cfg.ppo)
    last = run.logged[-1]
    assert (last["stage"], last["step"], last["steps"]) == ("policy_flip", 5, 60)
    assert HEALTHY.items() <= last.items() and last["tokens_per_s"] == 10.0


def test_samples_can_be_turned_off(tmp_path):
    run = FakeRun(tmp_path, sample_every=0)
    run_iterations(run, 2)
    assert not any("samples" in line for line in run.logged) and not list(tmp_path.iterdir())


def test_a_warning_is_printed_once_even_if_the_run_is_resumed(tmp_path, capsys):
    run = FakeRun(tmp_path, max_new_tokens=2)
    state = run_iterations(run, 7, length=2.0)
    text = "warning: policy_flip, iteration 5: answers run into ppo.max_new_tokens = 2"
    assert capsys.readouterr().out.count(text) == 1
    assert warned_before(state.history[:4], run.cfg.ppo) == set()
    warned = warned_before(state.history, run.cfg.ppo)
    assert warned == {"length"}
    state.step = 8
    state.history.append(state.history[-1])
    after_iteration(run, "policy_flip", state, warned, 10.0)
    assert "warning" not in capsys.readouterr().out


def test_a_policy_leaves_its_samples_its_history_and_a_picture(tmp_path):
    run = FakeRun(tmp_path)
    line = {"iteration": 0, "prompt": "p", "response": "r", "reward": 1.0, "kl": 0.0}
    state = SimpleNamespace(history=[HEALTHY, HEALTHY | {"value_loss": None}], lines=[line])
    save_results(run, "baseline", state)
    assert "p >>>r" in (tmp_path / "samples_baseline.md").read_text()
    assert run.drawn == [("ppo_baseline", figures.ppo_history, {"baseline": state.history})]
    older = {"kl": 1.0, "ended": 0.5, "clip_fraction": 0.1}
    (tmp_path / "watch_flip.jsonl").write_text(json.dumps(older) + "\n")
    assert load_histories(run, ["flip", "drop", "baseline"]) == {
        "flip": [{"kl": 1.0, "eos_rate": 0.5, "clipfrac": 0.1}], "baseline": state.history,
    }


def test_without_samples_none_are_written(tmp_path):
    state = SimpleNamespace(history=[HEALTHY], lines=[])
    save_results(FakeRun(tmp_path, sample_every=0), "flip", state)
    assert not (tmp_path / "samples_flip.md").exists()


def test_the_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    more = dict(reward=0.5, reward_normalised=0.1, clipfrac=0.1, explained_variance=0.3,
                approx_kl=0.01, kl_coef=0.05)
    figures.ppo_history({"flip": [HEALTHY | more] * 3}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
