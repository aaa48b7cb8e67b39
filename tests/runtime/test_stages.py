"""Which work is up to date: records, reasons in words, records of older code, order of writing."""
import json
import math
import os

import pytest
from helpers import go, one_line
from small_runs import (
    change_times,
    forget,
    opened,
    reasons,
)

import config
import train
from runtime import files, stages
from runtime.run import DEFAULTS, Run
from runtime.stages import stale_reason

# ----------------------------------------------------------------------------------------------
# Names and records


@pytest.mark.parametrize("name, stage", [
    ("tokenizer", "sft"), ("audit", "sft"), ("states", "sft"), ("sft", "sft"),
    ("member_07", "ensemble"), ("strength", "strength"), ("reward_soft_margin", "reward"),
    ("meta_2", "meta"), ("plain_1", "meta"), ("policy_flip", "ppo"), ("policy_meta_1", "ppo"),
    ("evaluate", "evaluate"), ("of_an_experiment", ""),
])
def test_the_stage_that_makes_each_piece_of_work(name, stage):
    assert stages.stage_of(name) == stage
    assert not stage or stage in stages.STAGES


def test_settings_are_compared_as_json_has_them():
    cfg = config.load(None, [("ppo.methods", "flip"), ("seed", "3")])
    assert stages.setting_value(cfg, "ppo.methods") == ["flip"]
    assert stages.setting_value(cfg, "seed") == 3
    assert stages.setting_value(cfg, "ppo.kl_coef") == 0.05
    assert DEFAULTS["ppo.methods"] == ["baseline", "flip"] and DEFAULTS["seed"] == 0


def test_a_record_is_read_as_written(tmp_path):
    depends = {"seed": 3, "ppo.domains": [], "input sft": "0123"}
    stages.write_record(tmp_path, "reward_flip", depends, {"seed": 3}, 1.234, {"loss": 0.5},
                        {"outputs": {"reward_flip.pt": {"bytes": 4, "sha256": "0"}}})
    record = stages.read_record(tmp_path, "reward_flip")
    assert record["unit"] == "reward_flip" and record["depends"] == depends
    assert record["fingerprint"] == files.digest(depends)
    assert record["seconds"] == 1.23 and record["metrics"] == {"loss": 0.5}
    assert record["config"] == {"seed": 3} and record["versions"] == files.versions()
    assert record["outputs"] == {"reward_flip.pt": {"bytes": 4, "sha256": "0"}}
    assert stages.record_names(tmp_path) == ["reward_flip"]
    stages.remove_record(tmp_path, "reward_flip")
    assert stages.read_record(tmp_path, "reward_flip") is None
    stages.remove_record(tmp_path, "reward_flip")  # it may be gone already


@pytest.mark.parametrize("content", [
    "", "{", "[]", "3", "null", '"text"', '{"depends": {}}', '{"fingerprint": "0"}', "\xff",
])
def test_a_damaged_record_counts_as_none(tmp_path, content):
    path = tmp_path / "stages" / "sft.json"
    path.parent.mkdir()
    path.write_text(content, encoding="latin-1")
    assert stages.read_record(tmp_path, "sft") is None


def test_a_record_with_any_other_byte_counts_as_none(tmp_path):
    facts = {"outputs": {}, "tokenizer": "0"}
    stages.write_record(tmp_path, "sft", {"seed": 3}, {"seed": 3}, 1.2, {"loss": math.nan}, facts)
    path = tmp_path / "stages" / "sft.json"
    content = path.read_bytes()
    assert stages.read_record(tmp_path, "sft")["metrics"] == {"loss": None}
    for position, byte in enumerate(content):
        if bytes([byte]).isspace():
            continue
        flipped = bytearray(content)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        assert stages.read_record(tmp_path, "sft") is None, position
    path.write_bytes(content)
    path.rename(tmp_path / "stages" / "member_00.json")
    assert stages.read_record(tmp_path, "member_00") is None


# ----------------------------------------------------------------------------------------------
# Reasons


def record_of(**depends):
    return {"fingerprint": "0", "depends": depends}


@pytest.mark.parametrize("record, depends, reason", [
    (None, {"seed": 0}, "new"),
    (record_of(seed=0), {"seed": 0}, ""),
    (record_of(seed=0), {"seed": 1}, "again: seed was 0, is 1"),
    (record_of(mode="a"), {"mode": "b"}, "again: mode was 'a', is 'b'"),
    (record_of(names=["a"]), {"names": []}, "again: names was ['a'], is []"),
    (record_of(**{"input sft": "1"}), {"input sft": "2"}, "again: sft is no longer the same"),
    (record_of(), {"input sft": "2"}, "again: sft is no longer the same"),
    (record_of(**{"contents of a.jsonl": "1"}), {"contents of a.jsonl": "2"},
     "again: contents of a.jsonl was '1', is '2'"),
])
def test_the_reason_is_given_in_words(record, depends, reason):
    assert stale_reason(record, depends, {}) == reason


def test_a_setting_that_did_not_exist_counts_as_its_default():
    defaults = {"ppo.top_p": 1.0}
    assert stale_reason(record_of(seed=0), {"seed": 0, "ppo.top_p": 1.0}, defaults) == ""
    reason = stale_reason(record_of(seed=0), {"seed": 0, "ppo.top_p": 0.9}, defaults)
    assert reason == "again: ppo.top_p was 1.0, is 0.9"


def test_a_setting_that_no_longer_matters_counts_as_its_default():
    """The record names a setting of another mode; now the work does not depend on it."""
    defaults = {"contrast.weight": 1.0}
    assert stale_reason(record_of(**{"contrast.weight": 1.0}), {}, defaults) == ""
    reason = stale_reason(record_of(**{"contrast.weight": 0.5}), {}, defaults)
    assert reason == "again: contrast.weight was 0.5, is 1.0"


def test_the_first_difference_is_the_reason():
    reason = stale_reason(record_of(a=0, b=0), {"a": 0, "b": 1, "c": 2}, {})
    assert reason == "again: b was 0, is 1"


# ----------------------------------------------------------------------------------------------
# A run


def test_finished_work_is_up_to_date_and_each_setting_concerns_what_depends_on_it(finished):
    assert not any(reasons(finished).values())
    supervised = {"sft", "member_00", "member_01", "reward_baseline", "reward_flip"}
    changes = {
        "--seed=1": {"tokenizer"},
        "--sft.lr=1e-3": {"sft"},
        "--ensemble.lr=1e-4": {"member_00", "member_01"},
        "--strength.method=drop": {"strength", "clean"},
        "--reward.lr=1e-4": {"reward_baseline", "reward_flip"},
        "--strength.q=0.3": {"strength", "clean", "reward_flip", "evaluate"},
        "--ppo.kl_coef=0.1": {"policy_flip"},
        "--evaluate.tie=0.5": {"evaluate"},
        "--train.grad_clip=0.5": {*supervised, "policy_flip"},
        "--train.optimizer=adafactor": supervised,
        "--train.accumulate=2": supervised,
    }
    for word, expected in changes.items():
        key = word[2:].partition("=")[0]
        direct = {name for name, why in reasons(finished, word).items() if f": {key} was" in why}
        assert direct == expected, word
    for word in ("--ppo.sample_every=3", "--train.workers=2", "--model.embeds_dir=elsewhere",
                 "--train.gradient_checkpointing=true", "--strength.show=5"):
        assert not any(reasons(finished, word).values()), word


def test_work_follows_its_inputs(finished):
    found = reasons(finished, "--strength.q=0.3")
    assert found["policy_flip"] == "again: reward_flip is no longer the same"
    assert found["evaluate"] and not found["sft"] and not found["reward_baseline"]
    found = reasons(finished, "--sft.lr=1e-3")
    assert found["member_00"] == "again: sft is no longer the same"
    assert all(found[name] for name in found if name not in ("tokenizer", "audit"))


OUTPUTS = {
    "encoding.json": "tokenizer", "audit.json": "audit", "sft.pt": "sft",
    "member_00.pt": "member_00", "gaps.pt": "strength", "strength.jsonl": "strength",
    "cleaned.jsonl": "clean", "issues.csv": "clean", "trust.json": "clean",
    "report.html": "clean", "reward_flip.pt": "reward_flip", "policy_flip.pt": "policy_flip",
    "rollouts_flip.jsonl": "policy_flip", "watch_flip.jsonl": "policy_flip",
    "samples_flip.md": "policy_flip", "answers.jsonl": "evaluate", "results.json": "evaluate",
    "figures/vote.png": "strength",
}


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.mark.parametrize("damage, reason", [
    (None, "is gone"),
    (lambda content: b"", "has 0 bytes, not "),
    (lambda content: content[:-1], " bytes, not "),
    (flip_a_bit, "is not as it was written"),
], ids=["deleted", "emptied", "truncated", "a bit flipped"])
def test_every_damaged_output_is_made_again(copied, damage, reason):
    for path in sorted(copied.rglob("*.png")):
        OUTPUTS.setdefault(str(path.relative_to(copied)), "evaluate")
    OUTPUTS.update({path: "policy_flip" for path in OUTPUTS if path.endswith("ppo_flip.png")})
    for path, name in OUTPUTS.items():
        content = (copied / path).read_bytes()
        (copied / path).unlink()
        if damage:
            (copied / path).write_bytes(damage(content))
        found = {name: why for name, why in reasons(copied).items() if why}
        assert list(found) == [name] and f"again: {path} " in found[name]
        assert reason in found[name]
        (copied / path).write_bytes(content)
    assert not any(reasons(copied).values())


def test_a_damaged_record_is_a_reason(copied):
    path = copied / "stages" / "sft.json"
    path.write_bytes(flip_a_bit(path.read_bytes()))
    found = {name: why for name, why in reasons(copied).items() if why}
    assert found == {"sft": "again: its record is damaged"}


def test_a_damaged_input_is_not_used(copied, capsys):
    """Where it changes after the stages were checked, as by another program"""
    run = opened(copied)
    for name, load in (
        ("sft.pt", run.load_tensors), ("audit.json", run.load_json),
        ("rollouts_flip.jsonl", run.load_jsonl), ("encoding.json", lambda _: run.tokenizer),
    ):
        path = copied / name
        path.write_bytes(flip_a_bit(path.read_bytes()))
        with pytest.raises(OSError, match=f"{name}: is not as it was written; run the training"):
            load(name)


def test_what_a_person_edited_is_kept(copied, capsys):
    edited = (copied / "cleaned.jsonl").read_text().replace("chosen", "Chosen", 1)
    (copied / "cleaned.jsonl").write_text(edited)
    before = (copied / "strength.jsonl").read_bytes()
    assert go(copied, "--stage=strength") == 0
    out = capsys.readouterr().out
    assert "clean: again: cleaned.jsonl is not as it was written" in out
    assert f"it is kept as {copied}/cleaned.edited.jsonl" in out
    assert (copied / "cleaned.edited.jsonl").read_text() == edited
    assert "Chosen" not in (copied / "cleaned.jsonl").read_text()
    assert (copied / "strength.jsonl").read_bytes() == before
    assert not list(copied.glob("strength.edited*"))
    assert not any(reasons(copied).values())


def test_what_nobody_edited_is_replaced(copied, capsys):
    assert go(copied, "--stage=strength", "--strength.q=0.3") == 0
    forget(copied, "strength", "clean")  # as if it was killed before the record was written
    assert go(copied, "--stage=strength", "--strength.q=0.3") == 0
    assert "kept as" not in capsys.readouterr().out and not list(copied.glob("*.edited*"))


def snapshot(folder):
    """Every file with its content and time"""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            out[path] = path.read_bytes(), path.stat().st_mtime_ns
    return out


def test_asking_writes_nothing(copied, tmp_path):
    forget(copied, "sft", "policy_flip")
    before = snapshot(tmp_path)
    assert reasons(copied, "--reward.lr=1e-4")["sft"] == "new"
    run = opened(copied)
    assert run.needs("sft", ["sft.lr"])  # also where work is about to begin
    assert snapshot(tmp_path) == before
    assert set(reasons(tmp_path / "nothing").values()) == {"new"}
    assert not (tmp_path / "nothing").exists()


# ----------------------------------------------------------------------------------------------
# Records of older code

OLD_NAMES = {new: old for old, new in config.RENAMED.items()}
NEW_SETTINGS = ("ppo.top_p", "ppo.repetition_penalty", "evaluate.repetition_penalty",
                "data.template", "ppo.domains")


def make_old(folder):
    """Rewrite every record as older code wrote it: under old names of settings, without those that
    did not exist, with other fingerprints."""
    paths = sorted((folder / "stages").glob("*.json"))
    fingerprints = {}
    for path in paths:
        fingerprints[path.stem] = f"old {path.stem}"
    for path in paths:
        record = json.loads(path.read_text())
        del record["outputs"], record["checksum"]
        depends = {}
        for key, value in record["depends"].items():
            if key.startswith("input "):
                value = fingerprints[key.removeprefix("input ")]
            if key not in NEW_SETTINGS:
                depends[OLD_NAMES.get(key, key)] = value
        record["depends"] = depends
        record["fingerprint"] = fingerprints[path.stem]
        path.write_text(json.dumps(record))


def test_records_under_old_names_are_up_to_date(copied, capsys):
    make_old(copied)
    old = json.loads((copied / "stages" / "policy_flip.json").read_text())["depends"]
    assert {"ppo.kl", "ppo.max_new", "ppo.episodes", "ppo.stop_kl", "train.clip"} <= old.keys()
    assert "ppo.kl_coef" not in old and "ppo.top_p" not in old
    assert not any(reasons(copied).values())
    times = change_times(copied, "*")
    assert go(copied) == 0
    assert change_times(copied, "*") == times
    assert "evaluate: up to date" in capsys.readouterr().out


def test_a_record_of_the_code_before_the_new_names(tmp_path):
    """What policy_flip.json of commit e442778 holds, with the reward of the worst member"""
    run = opened(tmp_path, "--ppo.reward=worst")
    depends = {
        "ppo.iterations": 2, "ppo.episodes": 8, "ppo.epochs": 2, "ppo.minibatches": 4,
        "ppo.max_new": 12, "ppo.temperature": 1.0, "ppo.lr": 0.0003, "ppo.critic_lr": 0.001,
        "ppo.kl": 0.05, "ppo.kl_kind": "k1", "ppo.reward_clip": 2.0, "ppo.gamma": 1.0,
        "ppo.lam": 0.95, "ppo.clip": 0.2, "ppo.value_clip": 0.2, "ppo.reward": "worst",
        "ppo.std_weight": 1.0, "ppo.domains": [], "ppo.normalise": True,
        "ppo.critic_pretrain": 0, "ppo.ptx": 0.0, "ppo.warmup": 0.0, "ppo.kl_target": 0.0,
        "ppo.whiten": False, "ppo.no_end_penalty": 0.0, "ppo.stop_kl": 0.0,
        "ppo.reset_reference": 0, "ppo.min_new": 0, "train.clip": 1.0, "format": 1,
        "input sft": "4f4c70375f11f566", "input reward_flip": "707db27e741f0d3b",
        "input member_00": "4c6ec2705c5c82c6", "input member_01": "4c6ec2705c5c82c6",
    }
    write_old_record(tmp_path, "policy_flip", "9c6a8b9771aae493", depends)
    for key, value in depends.items():
        if key.startswith("input "):
            write_old_record(tmp_path, key.removeprefix("input "), value, {})
    for name in ("policy_flip.pt", "rollouts_flip.jsonl"):
        (tmp_path / name).write_text("")
    assert not run.needs("policy_flip", *policy_needs(run))
    assert run.known["policy_flip"].fingerprint == "9c6a8b9771aae493"
    for changes, reason in (
        ({"ppo.kl_coef": 0.1}, "again: ppo.kl_coef was 0.05, is 0.1"),
        ({"ppo.adaptive_kl_target": 2.0}, "again: ppo.adaptive_kl_target was 0.0, is 2.0"),
        ({"ppo.target_kl": 2.0}, "again: ppo.target_kl was 0.0, is 2.0"),
        ({"ppo.top_p": 0.9}, "again: ppo.top_p was 1.0, is 0.9"),
    ):
        other = run.with_settings(changes)
        assert other.needs("policy_flip", *policy_needs(other))
        assert other.known["policy_flip"].reason == reason


def write_old_record(folder, name, fingerprint, depends):
    (folder / "stages").mkdir(exist_ok=True)
    record = {"unit": name, "fingerprint": fingerprint, "depends": depends}
    (folder / "stages" / f"{name}.json").write_text(json.dumps(record))


def policy_needs(run):
    """Arguments of needs() for the policy of flip"""
    inputs = ["sft", "reward_flip", *train.reward_judges(run.cfg)]
    return train.ppo_settings(run.cfg), inputs, train.policy_outputs("policy_flip")


# ----------------------------------------------------------------------------------------------
# The order of writing


def test_the_record_goes_before_the_first_output_and_comes_after_the_last(copied, monkeypatch):
    """Killed at any moment, no record describes files of other work."""
    record_of_name = {
        "sft.pt": "sft", "member_00.pt": "member_00", "gaps.pt": "strength",
        "strength.jsonl": "strength", "cleaned.jsonl": "clean", "reward_flip.pt": "reward_flip",
        "rollouts_flip.jsonl": "policy_flip", "policy_flip.pt": "policy_flip",
        "results.json": "evaluate", "audit.json": "audit", "encoding.json": "tokenizer",
    }
    order = []
    save = files.save

    def recorded(path, write, *more):
        name = os.path.basename(path)
        order.append(os.path.relpath(path, copied))
        if name in record_of_name and os.path.dirname(path) == str(copied):
            record = stages.record_path(copied, record_of_name[name])
            assert not os.path.exists(record), name
        save(path, write, *more)

    monkeypatch.setattr(files, "save", recorded)
    assert go(copied, "--seed=1") == 0
    assert set(record_of_name) <= set(order)
    for name, work in record_of_name.items():
        assert order.index(name) < order.index(f"stages/{work}.json")


def test_work_that_fails_leaves_no_record_of_the_old(copied, monkeypatch):
    """The second of two outputs of the vote cannot be written."""
    save_jsonl = Run.save_jsonl

    def full(run, name, records):
        if name == "strength.jsonl":
            raise OSError("disk full")
        save_jsonl(run, name, records)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_jsonl", full)
        assert go(copied, "--strength.q=0.3", "--stage=strength") == 2
    found = reasons(copied)
    assert found["strength"] == "new" and not found["reward_flip"]


def test_a_stop_before_the_first_output_keeps_the_record(copied, monkeypatch):
    """Old outputs are still whole, and their record says of which settings."""
    def fail(*arguments):
        raise OSError("no memory")

    monkeypatch.setattr(train, "sft_loss", fail)
    assert go(copied, "--sft.lr=1e-4", "--stage=sft") == 2
    assert not any(reasons(copied).values())


# ----------------------------------------------------------------------------------------------
# One stage alone


@pytest.mark.parametrize("stage, word, parts", [
    ("reward", "--sft.lr=1e-4", ("needs sft, which is again: sft.lr was 0.002, is 0.0001",
                                 "run --stage=sft first, or leave --stage out")),
    ("ppo", "--reward.lr=1e-4", ("needs reward_flip, which is again: reward.lr was",
                                 "run --stage=reward first")),
    ("evaluate", "--ppo.lr=1e-4", ("needs policy_flip, which is again: ppo.lr was",
                                   "run --stage=ppo first")),
    ("strength", "--ensemble.lr=1e-4", ("needs member_00", "run --stage=ensemble first")),
])
def test_an_input_of_another_stage_that_is_out_of_date_is_one_line(
    copied, stage, word, parts, capsys, monkeypatch
):
    """Before any work, so that nothing is lost"""
    monkeypatch.setattr(Run, "read_inputs", lambda run: pytest.fail("work has begun"))
    before = snapshot(copied)
    assert go(copied, word, f"--stage={stage}") == 2
    one_line(capsys, f"--stage={stage}:", *parts)
    assert snapshot(copied) == before


def test_a_missing_input_is_one_line_that_names_its_stage(tmp_path, capsys):
    assert go(tmp_path, "--stage=evaluate") == 2
    one_line(capsys, "--stage=evaluate: needs sft, which is missing; run --stage=sft first")


def test_a_stage_alone_makes_what_is_out_of_date_in_it_alone(copied, capsys):
    times = change_times(copied)
    assert go(copied, "--reward.lr=1e-3", "--stage=reward") == 0
    changed = {name for name, time in change_times(copied).items() if times[name] != time}
    assert changed == {"reward_baseline.pt", "reward_flip.pt"}
    out = capsys.readouterr().out
    assert "reward_flip: again: reward.lr was 0.002, is 0.001" in out
    assert "ppo" not in out
