"""The whole program on a world of a few pairs: stages, skipping, resuming, errors."""
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import config
import files
import loop
import plan
import world
from helpers import HH_SMALL, ROOT, SMALL, go, one_line, same, tensors, write_pairs
from model import RewardModel
from run import load_model, open_run, rewards_of
from strength import treat


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert go(out) == 0
    return out


def test_a_run_leaves_what_it_promises(finished):
    results = json.loads((finished / "results.json").read_text())
    assert {"noise", "reward", "policy", "groups", "config", "seed", "versions"} <= results.keys()
    assert results["config"]["world"]["pairs"] == 60 and results["seed"] == 0
    lines = [json.loads(line) for line in (finished / "strength.jsonl").read_text().splitlines()]
    rows, _ = world.pairs(60, 0, world.Noise(0.15, 0.09, 0.02), items=4)
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in rows] == [(l["prompt"], l["chosen"], l["rejected"]) for l in lines]
    assert {"mean", "std", "group", "swap", "p", "margin"} <= lines[0].keys()
    assert sum(l["swap"] for l in lines) == 6  # a tenth of 60
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {l["stage"] for l in log} == {"sft", "member_00", "member_01", "reward_baseline", "reward_flip", "policy_flip"}
    for figure in ("strength", "groups", "reliability", "ppo"):
        assert (finished / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("*.part")) and not list(finished.rglob("*.ckpt"))


def test_twice_the_same_command_gives_the_same_bits(finished, tmp_path):
    assert go(tmp_path) == 0
    for name in ("sft", "member_00", "member_01", "reward_baseline", "reward_flip", "policy_flip"):
        assert same(tensors(finished, name), tensors(tmp_path, name)), name
    for name in ("strength.jsonl", "rollouts_flip.jsonl", "answers.jsonl"):
        assert (finished / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_members_differ_by_order_alone(finished):
    """Same start, same pairs: were the orders equal too, the members would be the same bits."""
    assert not same(tensors(finished, "member_00"), tensors(finished, "member_01"))


def test_members_trained_in_processes_of_their_own_are_the_same(finished, tmp_path):
    assert go(tmp_path, "--train.workers=2", "--stage=sft") == 0
    assert go(tmp_path, "--train.workers=2", "--stage=ensemble", "--threads=2") == 0  # two processes of one thread each
    assert same(tensors(finished, "member_01"), tensors(tmp_path, "member_01"))


def test_accumulation_changes_nothing_and_bf16_little(tmp_path):
    for name, extra in (("plain", []), ("pieces", ["--train.accumulate=4"]), ("bf16", ["--dtype=bf16"])):
        assert go(tmp_path / name, "--stage=sft", "--model.dropout=0", "--sft.lr=1e-4", *extra) == 0
    plain, pieces, bf16 = (tensors(tmp_path / name, "sft") for name in ("plain", "pieces", "bf16"))
    assert all(torch.allclose(plain[k], pieces[k], atol=1e-5) for k in plain)
    assert all(torch.allclose(plain[k], bf16[k], atol=2e-3) for k in plain)
    assert bf16["lm_head.weight"].dtype == torch.float32  # master weights stay in full precision


def test_up_to_date_is_skipped_and_a_change_reruns_what_depends_on_it(finished, capsys):
    times = {p.name: p.stat().st_mtime_ns for p in finished.glob("*.pt")}
    assert go(finished) == 0
    assert {p.name: p.stat().st_mtime_ns for p in finished.glob("*.pt")} == times
    capsys.readouterr()
    assert go(finished, "--strength.q=0.2") == 0
    said = capsys.readouterr().out
    assert "reward_flip: again: strength.q was 0.1, is 0.2" in said and "policy_flip: again: reward_flip is no longer the same" in said
    changed = {name for name, t in times.items() if (finished / name).stat().st_mtime_ns != t}
    assert changed == {"gaps.pt", "reward_flip.pt", "policy_flip.pt"}
    assert go(finished) == 0  # back, for the tests that compare


@pytest.mark.parametrize("unit", ["sft", "reward_flip", "policy_flip"])
def test_stopped_and_resumed_equals_not_stopped(unit, finished, tmp_path, monkeypatch, capsys):
    before = {"sft": "tokenizer", "reward_flip": "reward_baseline", "policy_flip": "reward_flip"}[unit]
    monkeypatch.setattr(files, "should_stop", lambda: (tmp_path / "stages" / f"{before}.json").exists())  # after the unit's first step
    assert go(tmp_path) == 130
    assert (tmp_path / f"{unit}.ckpt").exists()
    monkeypatch.setattr(files, "should_stop", lambda: False)
    assert go(tmp_path) == 0
    assert f"{unit}: goes on from" in capsys.readouterr().out
    assert same(tensors(finished, unit), tensors(tmp_path, unit))
    assert (finished / "rollouts_flip.jsonl").read_bytes() == (tmp_path / "rollouts_flip.jsonl").read_bytes()


def test_no_stage_but_evaluation_reads_the_truth(tmp_path, monkeypatch):
    """A truth that cannot be read does not hinder training, and gives the same models; evaluation needs it."""
    class Secret:
        def __getattr__(self, name):
            raise AssertionError("the truth was read")

    real = world.pairs
    monkeypatch.setattr(world, "pairs", lambda n, *a, **k: (real(n, *a, **k)[0], [Secret()] * n))
    for stage in plan.STAGES[:-1]:
        assert go(tmp_path, f"--stage={stage}") == 0
    with pytest.raises(AssertionError, match="the truth was read"):
        go(tmp_path, "--stage=evaluate")


def test_a_stage_without_its_input_says_which_to_run(tmp_path, capsys):
    assert go(tmp_path, "--stage=reward") == 2
    assert "run --stage=sft first" in capsys.readouterr().err


def test_user_files_train_and_dropped_pairs_are_named(tmp_path, capsys):
    path = write_pairs(tmp_path / "mine.jsonl")
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "\n\nHuman: same?\n\nAssistant:", "chosen": " a", "rejected": " a"}) + "\n")
    assert go(tmp_path / "out", f"--data.train={path}", small=HH_SMALL) == 0
    said = capsys.readouterr().out
    assert f"{path}:31: chosen and rejected are identical" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "noise" not in results and results["judge"] == "the ensemble (a proxy)"
    assert "gold_accuracy" not in results["reward"]["flip"]["valid"]


BAD = {"broken": ('{"prompt": "a", "chosen', "broken JSON"), "key": ('{"prompt": "a", "chosen": "b"}', "'rejected' is missing"),
       "null": ('{"prompt": "a", "chosen": "b", "rejected": null}', "not null"), "number": ('{"prompt": "a", "chosen": 3, "rejected": "b"}', "not a number")}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(name, tmp_path, capsys):
    path = write_pairs(tmp_path / "mine.jsonl")
    path.write_text(path.read_text() + BAD[name][0] + "\n")
    assert go(tmp_path / "out", f"--data.train={path}", small=HH_SMALL) == 2
    one_line(capsys, f"{path}:31", BAD[name][1])
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_files_that_give_no_pair_are_named(tmp_path, capsys):
    assert go(tmp_path / "out", "--data.train=nowhere.jsonl", small=HH_SMALL) == 2
    one_line(capsys, "nowhere.jsonl: no such file")
    (tmp_path / "empty.jsonl").write_text("")
    assert go(tmp_path / "out", f"--data.train={tmp_path}/empty.jsonl", small=HH_SMALL) == 2
    one_line(capsys, "empty.jsonl: the file is empty")
    good, same_sides = write_pairs(tmp_path / "good.jsonl"), write_pairs(tmp_path / "same.jsonl", chosen=" x", rejected=" x")
    assert go(tmp_path / "out", f"--data.train={same_sides}", f"--data.valid={good}", small=HH_SMALL) == 2
    one_line(capsys, f"{same_sides}:1", "identical")
    long = write_pairs(tmp_path / "long.jsonl", chosen=" word" * 200)
    assert go(tmp_path / "out", f"--data.train={long}", f"--data.valid={good}", small=HH_SMALL) == 2
    one_line(capsys, f"{long}:1", "raise model.context")
    assert go(tmp_path / "out", f"--data.train={good}", f"--data.valid={good}", small=HH_SMALL) == 2
    one_line(capsys, "also in training")
    assert go(tmp_path / "out", f"--data.train={good}", "--data.ood=nowhere.jsonl", small=HH_SMALL) == 2
    one_line(capsys, "nowhere.jsonl: no such file")  # before training, not after
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert go(tmp_path / "file" / "out") == 2
    one_line(capsys, "cannot be written", "--out_dir")


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert go(tmp_path) == 2
    one_line(capsys, "sft.pt: cannot be written (No space left on device)")
    assert not list(tmp_path.glob("sft.pt*"))


def test_a_broken_or_hostile_checkpoint(finished, tmp_path, capsys):
    import pickle
    (tmp_path / "broken.pt").write_bytes((finished / "sft.pt").read_bytes()[:5000])
    with pytest.raises(OSError, match="broken.pt: not a readable checkpoint"):
        files.load_tensors(tmp_path / "broken.pt")
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(OSError, match="hostile.pt: not a readable checkpoint"):
        files.load_tensors(tmp_path / "hostile.pt")


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    """In a process of its own, by a real signal, in the midst of an ensemble trained in parallel."""
    import signal
    import time
    command = [sys.executable, "train.py", *SMALL, f"--out_dir={tmp_path}", "--threads=2", "--train.workers=2", "--ensemble.epochs=400", "--stage="]
    run = lambda stage: [*command[:-1], f"--stage={stage}"]
    assert subprocess.run(run("sft"), cwd=ROOT, capture_output=True).returncode == 0
    process = subprocess.Popen(run("ensemble"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "log.jsonl", time.time() + 60
    while '"member_01"' not in log.read_text() and time.time() < deadline:  # both are at work
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from here" in err and "Traceback" not in err
    assert (tmp_path / "member_00.ckpt").exists() and (tmp_path / "member_01.ckpt").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_every_configuration_loads(path):
    assert config.load(path).out_dir == f"out/{path.stem}"


# ---------------------------------------------------------------------------------------------------------------------
# Watching a model while it is trained

@pytest.fixture
def plain(finished, tmp_path):
    """An open run with a language model, and fit(name, **more): a plain reward model of two epochs of four steps"""
    for name in ("sft.pt", "encoding.json"):
        shutil.copy(finished / name, tmp_path)
    run = open_run(config.load(None, [s[2:].split("=", 1) for s in SMALL] + [("out_dir", str(tmp_path)), ("reward.epochs", "2"), ("reward.batch", "16")]))
    treatment = treat(torch.zeros(60), "baseline")
    return run, lambda name, **more: loop.fit_reward_model(run, name, run.config.reward, *treatment, "an order", depends={"name": "any"}, **more)


@pytest.mark.parametrize("watches, looks", [(0, 1), (1, 2), (3, 6), (4, 8)])
def test_a_watched_model_is_looked_at_as_often_as_asked_and_last_at_the_end(plain, watches, looks):
    run, fit = plain
    fit("watched", watch=lambda model: rewards_of(run, model, run.valid[1]), watches=watches)
    watched = files.load_tensors(run.path("watched_watched.pt"))
    assert watched.shape == (looks, len(run.valid[1]), 2)
    assert torch.equal(watched[-1], rewards_of(run, load_model(run, RewardModel, "watched"), run.valid[1]))
    assert len({look.numpy().tobytes() for look in watched}) == looks


@pytest.mark.parametrize("watches, steps", [(0, [8]), (2, [2, 4, 6, 8]), (3, [1, 3, 4, 5, 7, 8])])
def test_looks_are_spread_evenly_and_change_nothing(plain, watches, steps):
    """Not even where dropout goes on."""
    run, fit = plain
    looked = []
    def watch(model):
        with open(run.path("log.jsonl")) as file:
            looked.append(sum(json.loads(line)["stage"] == "watched" for line in file))  # as many lines as steps, in a run as short as this
        return torch.rand(1)
    fit("alone")
    fit("watched", watch=watch, watches=watches)
    assert looked == steps
    assert same(tensors(run.config.out_dir, "alone"), tensors(run.config.out_dir, "watched"))
    assert not os.path.exists(run.path("alone_watched.pt"))


def test_a_watched_model_stopped_and_resumed_is_as_if_not_stopped(plain, monkeypatch):
    run, fit = plain
    watch = lambda model: rewards_of(run, model, run.valid[1])
    fit("whole", watch=watch, watches=4)
    for left in (3, 4):  # stopped after three steps, and after four more
        steps = iter(range(100))
        monkeypatch.setattr(files, "should_stop", lambda: next(steps) >= left - 1)  # it is asked once a step
        with pytest.raises(files.Stopped):
            fit("parts", watch=watch, watches=4)
    assert len(files.load_tensors(run.path("parts.ckpt"))["watched"]) == 7
    monkeypatch.setattr(files, "should_stop", lambda: False)
    fit("parts", watch=watch, watches=4)
    whole, parts = (files.load_tensors(run.path(f"{name}_watched.pt")) for name in ("whole", "parts"))
    assert len(whole) == 8 and torch.equal(whole, parts)
