"""A run: settings, device, data read once, outputs and records, checkpoints, progress, workers."""
import gzip
import json
import math
import os

import pytest
import torch
from helpers import one_line, write_pairs
from small_runs import (
    copy_run,
    depends_on,
    load_config,
    log_of,
    opened,
    read_lines,
)

import config
import train
from config import ConfigError
from data import DataError
from runtime import downloads, files, signals, stages, workers
from runtime import run as run_module
from runtime.audit import audit_table, report_dropped
from runtime.cli import run_cli
from runtime.run import LINE_OPTIONS, Meter, Run, open_run, run_in_worker, run_of_worker
from runtime.signals import Stopped


@pytest.fixture
def run(tmp_path):
    """A run in an empty folder"""
    return opened(tmp_path)


# ----------------------------------------------------------------------------------------------
# Settings and device


def test_a_run_is_opened_on_the_device_with_its_threads(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run = opened(tmp_path, "--threads=3", "--device=cpu", "--dtype=bf16")
    assert threads == [3]
    assert run.device == torch.device("cpu") and run.dtype == torch.bfloat16
    assert opened(tmp_path, "--device=cpu").dtype == torch.float32
    assert open_run(config.Config()).slot == 0 and threads == [3, 1]


@pytest.mark.parametrize("word, expected", [
    ("--compile=auto", False), ("--compile=on", True), ("--compile=off", False),
])
def test_compilation_is_for_gpus_unless_set(tmp_path, word, expected):
    assert opened(tmp_path, word, "--device=cpu").compile == expected


def test_with_settings_is_a_copy_that_shares_data_and_records(run):
    run.tokenizer = "shared"
    other = run.with_settings({"ppo.kl_coef": 0.5, "seed": 3})
    assert (other.cfg.ppo.kl_coef, other.cfg.seed) == (0.5, 3)
    assert (run.cfg.ppo.kl_coef, run.cfg.seed) == (0.05, 0)
    assert other.tokenizer == "shared" and other.known is run.known
    other.needs("sft", [])
    assert "sft" in run.known and other.in_work == "sft" and run.in_work is None
    with pytest.raises(ConfigError, match="ppo.kl_coef"):
        run.with_settings({"ppo.kl_coef": -1.0})


def test_autocast_is_on_below_float32_alone(tmp_path):
    x = torch.ones(2, 2)
    for word, dtype in (("--dtype=float32", torch.float32), ("--dtype=bf16", torch.bfloat16)):
        with opened(tmp_path, word).autocast():
            assert (x @ x).dtype == dtype


def test_the_scaler_is_on_in_float16_alone(tmp_path):
    cfg = load_config(f"--out_dir={tmp_path}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scaler = Run(cfg, torch.device("cpu"), dtype).make_scaler()
        assert scaler.is_enabled() == (dtype == torch.float16)


# ----------------------------------------------------------------------------------------------
# Data


def test_data_are_read_once(run, monkeypatch):
    calls = []

    def load_pairs(cfg):
        calls.append(cfg)
        return {"train": [1], "valid": []}

    monkeypatch.setattr(run_module, "load_pairs", load_pairs)
    monkeypatch.setattr(run_module, "load_ood", lambda cfg, pairs: {"other": pairs})
    assert run.read_inputs() == ({"train": [1], "valid": []}, {"other": [1]})
    assert run.pairs["train"] == [1] and run.ood_pairs["other"] == [1] and len(calls) == 1


def test_every_set_is_encoded_by_its_name(finished):
    run = opened(finished)
    assert len(run.train.pairs) == len(run.train.rows) == 60
    assert len(run.valid.rows) == 40
    assert {name: len(encoded.rows) for name, encoded in run.ood.items()} == {
        "arithmetic": 4, "translation": 4, "programs": 4,
    }
    assert run.train is run.train


def test_a_broken_tokenizer_is_one_line_with_a_remedy(tmp_path):
    for content in ("", "{}", '{"pattern": 3}', "[]"):
        (tmp_path / "encoding.json").write_text(content)
        with pytest.raises(OSError, match="encoding.json: not a readable tokenizer .*delete it"):
            opened(tmp_path).tokenizer


def test_work_depends_on_the_contents_of_files(run, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("1")
    first = run.contents_of([str(path), "missing.jsonl", "world"])
    assert list(first) == [f"contents of {path}"]
    path.write_text("2")
    assert run.contents_of([str(path)]) != first


def test_work_depends_on_what_is_behind_an_address(tmp_path, monkeypatch):
    """Two contents of one address, downloaded into two caches"""
    url = "https://example.org/pairs.jsonl.gz"
    found = []
    for text in ("a", "b"):
        record = {"prompt": "p", "chosen": text, "rejected": "c"}
        path = tmp_path / text
        path.write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))
        monkeypatch.setattr(downloads, "fetch", lambda address, path=path: str(path))
        found.append(depends_on(tmp_path / "run", f"--data.train={url}", "--ppo.methods="))
    assert list(found[0]["tokenizer"])[-1] == f"contents of {url}"
    for name in ("tokenizer", "sft", "reward_flip"):
        assert found[0][name] != found[1][name]


def test_work_depends_on_how_files_are_read_where_it_is_not_the_default(tmp_path):
    path = write_pairs(tmp_path / "a.jsonl")
    words = [f"--data.train={path}", "--ppo.methods="]
    plain = depends_on(tmp_path / "run", *words)
    same = depends_on(tmp_path / "run", *words, "--data.labels=better", "--data.format=")
    assert plain == same
    new = {"data.format", "data.labels", "data.min_score_diff"}
    assert not new & set(plain["tokenizer"])  # older records do not have them
    for word in ("--data.labels=safer", "--data.format=explicit prompt", "--data.min_score_diff=1"):
        changed = depends_on(tmp_path / "run", *words, word)
        key, value = word.removeprefix("--").split("=")
        assert str(changed["tokenizer"][key]).startswith(value)
        assert changed["sft"] != plain["sft"]


# ----------------------------------------------------------------------------------------------
# Work: needs, outputs, record


def do_work(run, name="sft", settings=("sft.lr",), inputs=(), **more):
    """Make NAME.pt if it is needed -> whether it was"""
    if not run.needs(name, settings, inputs, **more):
        return False
    run.save_tensors(f"{name}.pt", {"model": {}})
    run.record_finished(name, {"loss": 0.25, "pairs": 3})
    return True


def test_work_is_done_once(run, capsys):
    assert do_work(run)
    assert capsys.readouterr().out == "sft: 0.0 s, loss 0.250\n"
    assert not do_work(run)
    record = run.read_record("sft")
    assert record["depends"] == {"sft.lr": 2e-3, "format": files.FORMAT}
    assert record["config"]["sft"]["lr"] == 2e-3 and record["metrics"]["pairs"] == 3
    assert not do_work(opened(run.cfg.out_dir))


def test_work_without_outputs_is_up_to_date_by_its_record(run):
    assert run.needs("states", ["seed"], outputs=[])
    run.record_finished("states", {})
    assert not run.needs("states", ["seed"], outputs=[])


def test_a_list_of_dropped_pairs_is_no_output_of_the_work(run):
    """Reading data in the midst of work must not remove a record whose outputs are intact."""
    assert do_work(run)
    run = run.with_settings({"sft.lr": 0.5})
    assert run.needs("sft", ["sft.lr"])
    report_dropped(run, "train", 1, [("file:1", "identical")])
    assert run.read_record("sft") is not None
    assert run.load_jsonl("dropped_train.jsonl") == [{"source": "file:1", "reason": "identical"}]


def test_a_setting_that_was_no_dependency_counts_as_it_was(run):
    """Not as its default: the record keeps the whole configuration."""
    other = run.with_settings({"ensemble.folds": 4, "ensemble.vote": "all"})
    assert do_work(other, "reward_flip", ["reward.lr"])
    assert not other.needs("reward_flip", ["reward.lr", "ensemble.vote"])
    unseen = run.with_settings({"ensemble.folds": 4, "ensemble.vote": "unseen"})
    assert unseen.needs("reward_flip", ["reward.lr", "ensemble.vote"])


def test_work_is_done_again_with_a_reason(run, capsys):
    do_work(run)
    capsys.readouterr()
    assert do_work(run.with_settings({"sft.lr": 1e-3}))
    assert capsys.readouterr().out.startswith("sft: again: sft.lr was 0.002, is 0.001\nsft: ")
    assert do_work(run.with_settings({"sft.lr": 1e-3}), extra={"contents of a": "1"})
    os.remove(run.path("sft.pt"))
    assert do_work(run.with_settings({"sft.lr": 1e-3}), extra={"contents of a": "1"})


def test_work_is_done_again_where_its_input_has_changed(run):
    """The fingerprint of the input is part of what work depends on."""
    do_work(run)
    assert do_work(run, "member_00", [], ["sft"])
    assert not do_work(run, "member_00", [], ["sft"])
    do_work(run.with_settings({"sft.lr": 1e-3}))
    assert do_work(run, "member_00", [], ["sft"])
    fresh = opened(run.cfg.out_dir)
    assert fresh.fingerprint("sft") == stages.read_record(run.cfg.out_dir, "sft")["fingerprint"]
    assert fresh.fingerprint("reward_flip") == "missing"
    assert not do_work(fresh, "member_00", [], ["sft"])


def test_the_fingerprint_of_stale_work_is_that_of_its_result_to_be(run):
    do_work(run)
    old = run.fingerprint("sft")
    changed = run.with_settings({"sft.lr": 1e-3})
    assert changed.needs("sft", ["sft.lr"])
    new = changed.fingerprint("sft")
    assert new == files.digest({"sft.lr": 1e-3, "format": files.FORMAT}) != old
    changed.save_tensors("sft.pt", {})
    changed.record_finished("sft", {})
    assert changed.fingerprint("sft") == new == run.read_record("sft")["fingerprint"]


def test_a_dry_run_only_notes_what_is_needed(run):
    run.dry_run = True
    assert not do_work(run)
    assert run.known["sft"].reason == "new" and run.in_work is None
    assert os.listdir(run.cfg.out_dir) == []


def test_work_of_other_stages_is_left_out(run):
    run.selected = ("reward",)
    assert not do_work(run)
    assert run.known["sft"].reason == "new"
    with pytest.raises(ConfigError, match="needs sft, which is missing; run --stage=sft first"):
        do_work(run, "reward_flip", [], ["sft"])
    run.selected = ()
    assert do_work(run) and do_work(run, "reward_flip", [], ["sft"])


def test_a_reason_is_printed_as_it_is(run):
    """Also where a setting's name contains "new", which alone means: missing."""
    do_work(run, settings=["ppo.max_new_tokens"])
    other = run.with_settings({"ppo.max_new_tokens": 5})
    other.selected = ("reward",)
    assert not do_work(other, settings=["ppo.max_new_tokens"])
    reason = "needs sft, which is again: ppo.max_new_tokens was 12, is 5; run --stage=sft first"
    with pytest.raises(ConfigError, match=reason):
        do_work(other, "reward_flip", [], ["sft"])


@pytest.mark.parametrize("save, name, value", [
    ("save_text", "a.txt", "a"), ("save_json", "a.json", {"a": 1}),
    ("save_jsonl", "a.jsonl", [{"a": 1}]), ("save_tensors", "a.pt", {"a": torch.ones(1)}),
])
def test_the_record_is_removed_before_the_first_output(run, save, name, value):
    do_work(run)
    assert run.read_record("sft") is not None
    getattr(run, save)("other", value)  # not of the work: the record stays
    assert run.read_record("sft") is not None
    again = run.with_settings({"sft.lr": 1e-3})
    assert again.needs("sft", ["sft.lr"])
    assert run.read_record("sft") is not None
    getattr(again, save)(name, value)
    assert os.path.exists(run.path(name)) and run.read_record("sft") is None


def test_outputs_are_read_as_written(run):
    run.save_json("a.json", {"a": [1, None]})
    run.save_jsonl("a.jsonl", ({"a": i} for i in range(2)))
    run.save_tensors("a.pt", {"a": torch.arange(3)})
    run.save_text("a.txt", "ä")
    assert run.load_json("a.json") == {"a": [1, None]}
    assert run.load_jsonl("a.jsonl") == [{"a": 0}, {"a": 1}]
    assert torch.equal(run.load_tensors("a.pt")["a"], torch.arange(3))
    with open(run.path("a.txt"), encoding="utf-8") as file:
        assert file.read() == "ä"


def test_a_record_of_old_names_has_the_present_ones(run):
    depends = {"ppo.kl": 0.1, "train.clip": 1.0, "seed": 3, "input sft": "0"}
    stages.write_record(run.cfg.out_dir, "policy_flip", depends, {}, 1.0, {}, {})
    assert run.read_record("policy_flip")["depends"] == {
        "ppo.kl_coef": 0.1, "train.grad_clip": 1.0, "seed": 3, "input sft": "0",
    }
    assert run.read_record("nothing") is None


def test_what_is_skipped_is_printed_a_line_a_stage(finished, capsys):
    run = opened(finished, "--ppo.kl_coef=0.5")
    train.check_stages(run)
    run.report_skipped()
    printed = capsys.readouterr().out
    assert "sft: up to date (tokenizer, audit, sft)\n" in printed
    assert "reward: up to date (reward_baseline, reward_flip)\n" in printed
    assert "strength: up to date (strength, clean)\n" in printed
    assert "longer answer chosen" in printed and "clean: no self-test" in printed
    assert "ppo:" not in printed and "meta:" not in printed
    run.selected = ("ppo", "meta")
    run.report_skipped()
    assert capsys.readouterr().out == "meta: nothing to do, meta.rounds is 0\n"


def test_findings_of_a_skipped_audit_are_printed_if_its_file_has_them(
    finished, capsys, monkeypatch
):
    run = opened(finished)
    train.check_stages(run)
    result = run.load_json("audit.json")
    old = {"sets": result["sets"], "shared": result["shared"]}
    for content, end in ((old, ""), (old | {"findings": ["train: a mark"]}, "\ntrain: a mark")):
        monkeypatch.setattr(run, "load_json", lambda name: content | {"text": []})
        run.report_skipped()
        table = audit_table(old["sets"], old["shared"])
        assert f"{table}{end}\n" in capsys.readouterr().out
    without = opened(finished, "--ppo.methods=")
    train.check_stages(without)
    without.selected = ("ppo",)
    without.report_skipped()
    assert capsys.readouterr().out == "ppo: nothing to do, ppo.methods is empty\n"


# ----------------------------------------------------------------------------------------------
# Checkpoints


def make_parts():
    model = torch.nn.Linear(2, 1)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def test_a_checkpoint_gives_parts_and_state_back(run, capsys):
    assert run.needs("sft", ["sft.lr"])
    parts = make_parts()
    run.save_checkpoint("sft", parts, step=3, last={"loss": 0.5}, watched=[torch.ones(2)])
    resumed = make_parts()
    state = run.resume("sft", resumed)
    assert torch.equal(parts["model"].weight, resumed["model"].weight)
    assert state["step"] == 3 and state["last"] == {"loss": 0.5}
    assert torch.equal(state["watched"][0], torch.ones(2))
    assert set(state) == {"step", "last", "watched"}
    assert capsys.readouterr().out == "sft: resumes at step 3\n"


def test_a_checkpoint_keeps_the_record_of_finished_work(run):
    """Until an output is written, the old outputs are whole."""
    do_work(run)
    again = run.with_settings({"sft.lr": 1e-3})
    again.needs("sft", ["sft.lr"])
    again.save_checkpoint("sft", make_parts(), step=1)
    assert run.read_record("sft") is not None


def test_a_checkpoint_of_other_settings_is_not_read(run, capsys):
    parts = make_parts()
    assert run.resume("sft", parts) == {}  # there is none
    run.needs("sft", ["sft.lr"])
    run.save_checkpoint("sft", parts, step=3)
    other = run.with_settings({"sft.lr": 1e-3})
    other.needs("sft", ["sft.lr"])
    resumed = make_parts()
    before = resumed["model"].weight.clone()
    assert other.resume("sft", resumed) == {}
    assert torch.equal(resumed["model"].weight, before)
    run.needs("sft", ["sft.lr"])
    assert run.resume("sft", resumed)["step"] == 3


def test_finished_work_leaves_no_checkpoint(run):
    run.needs("sft", [])
    run.save_checkpoint("sft", make_parts(), step=3)
    assert os.path.exists(run.path("sft.ckpt"))
    run.record_finished("sft", {})
    assert not os.path.exists(run.path("sft.ckpt"))


def test_a_requested_stop_saves_and_raises(run, monkeypatch):
    run.needs("sft", [])
    assert not run.should_save()
    monkeypatch.setattr(signals, "stop_signal", 2)
    assert run.should_save()
    with pytest.raises(Stopped):
        run.save_checkpoint("sft", make_parts(), step=3)
    assert run.resume("sft", make_parts())["step"] == 3


def test_checkpoints_are_saved_at_intervals(run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(run_module.time, "time", lambda: now[0])
    run.needs("sft", [])
    run.resume("sft", {})
    now[0] += 29
    assert not run.should_save()  # train.checkpoint_minutes = 0.5
    now[0] += 2
    assert run.should_save()
    run.save_checkpoint("sft", {}, step=1)
    assert not run.should_save()
    now[0] += 1
    assert run.with_settings({"train.checkpoint_minutes": 0.0}).should_save()


def test_saving_takes_two_percent_of_the_time_at_most(run, monkeypatch):
    now = [1000.0]

    def save_state(path, state):
        now[0] += 3

    monkeypatch.setattr(run_module.time, "time", lambda: now[0])
    monkeypatch.setattr(files, "save_state", save_state)
    run.needs("sft", [])
    run.save_checkpoint("sft", {}, step=1)
    now[0] += 149
    assert not run.should_save()
    now[0] += 2
    assert run.should_save()
    now[0] -= 150
    assert run.with_settings({"train.checkpoint_minutes": 0.0}).should_save()


def test_a_damaged_checkpoint_is_begun_anew_with_one_line(run, capsys):
    run.needs("sft", [])
    run.save_checkpoint("sft", make_parts(), step=3)
    path = run.path("sft.ckpt")
    with open(path, "r+b") as file:
        file.truncate(1000)
    assert run.resume("sft", make_parts()) == {}
    assert capsys.readouterr().out == (
        f"sft: {path} is damaged or of an older version; begins anew\n")


# ----------------------------------------------------------------------------------------------
# Progress


def test_a_meter_averages_what_came_since_the_last_line(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_module.time, "time", lambda: now[0])
    meter = Meter(total=300)
    assert [step for step in range(300) if meter.is_due(step)] == list(range(2, 300, 3))
    meter.add(4, 10, {})
    meter.add(0, 0, {"loss": torch.tensor(6.0), "accuracy": 3})
    meter.add(0, 0, {"loss": torch.tensor(2.0)})
    now[0] = 5.0
    assert meter.flush() == ({"loss": 2.0, "accuracy": 0.75}, 2.0)
    meter.add(1, 3, {"loss": 5.0})
    now[0] = 6.0
    assert meter.flush() == ({"loss": 5.0}, 3.0)


@pytest.mark.parametrize("total, due", [
    (1, [0]), (7, list(range(7))), (250, [*range(1, 250, 2)]), (301, [*range(2, 301, 3), 300]),
])
def test_a_line_is_due_every_hundredth_and_at_the_end(total, due):
    meter = Meter(total)
    assert [step for step in range(total) if meter.is_due(step)] == due


def test_steps_are_logged(run):
    seen = []
    for step in run.steps("sft", 2, 4):
        seen.append(step)
        run.add(count=2, tokens=10)
        run.add(loss=torch.tensor(3.0), accuracy=torch.tensor(1))
        averages = run.log_step("sft", step, lr=1 / 3, grad_norm=torch.tensor(2.0))
        assert averages == {"loss": 1.5, "accuracy": 0.5}
    assert seen == [2, 3]
    lines = log_of(run, "sft")
    assert [line["step"] for line in lines] == [3, 4] and lines[0]["steps"] == 4
    assert lines[0]["lr"] == 0.333333 and lines[0]["grad_norm"] == 2.0
    assert lines[0]["loss"] == 1.5 and lines[0]["tokens_per_s"] > 0


def test_progress_is_lines_where_there_is_no_terminal(run, monkeypatch, capsys):
    for _ in run.steps("sft", 0, 3):
        pass
    assert not capsys.readouterr().err  # three steps take no minute
    options = LINE_OPTIONS | {"mininterval": 0, "delay": 0, "miniters": 1}
    monkeypatch.setattr("runtime.run.LINE_OPTIONS", options)
    for _ in run.steps("sft", 1, 3):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sft: 1 of 3, ? left" and lines[-1].startswith("sft: 3 of 3, 00:00 left")


@pytest.mark.parametrize("loss, gradient, weight, what", [
    (math.nan, 1.0, 1.0, "the loss is nan"),
    (1.0, math.inf, 1.0, "the gradient is inf"),
    (1.0, 1.0, math.nan, "a weight is nan"),
])
def test_a_number_that_is_not_finite_stops_the_run_at_its_step(
        run, capsys, loss, gradient, weight, what):
    def work():
        for step in run.steps("reward_flip", 0, 300):
            is_bad = step == 1  # no log line is due
            run.add(count=1, loss=torch.tensor(loss if is_bad else 1.0))
            norm = torch.tensor(gradient if is_bad else 1.0)
            parameter = torch.full((3,), weight if is_bad else 1.0)
            run.check_step("reward_flip", step, norm, [torch.ones(2), parameter])

    assert run_cli(work) == 2
    one_line(capsys, f"reward_flip: {what} at step 2; lower reward.lr\n")


def test_in_float16_the_scaler_leaves_out_steps_whose_gradient_overflows(run):
    half = run.with_settings({})
    half.dtype = torch.float16
    for step in half.steps("sft", 0, 1):
        half.add(count=1, loss=torch.tensor(1.0))
        half.check_step("sft", step, torch.tensor(math.inf), [torch.ones(2)])


@pytest.mark.parametrize("name, dtype, remedy", [
    ("policy_flip", torch.float32, "lower ppo.lr and ppo.critic_lr"),
    ("member_01", torch.bfloat16, "lower ensemble.lr, or use --dtype=float32"),
    ("denoised_3", torch.float32, "lower its lr"),
])
def test_the_remedy_is_one_that_can_help(run, name, dtype, remedy):
    other = run.with_settings({})
    other.dtype = dtype
    with pytest.raises(ConfigError, match=f"{name}: a reward is -inf at step 7; {remedy}$"):
        other.check_finite(name, 7, the_KL=0.5, a_reward=-math.inf)


def test_log_lines_are_rounded_and_one_each(run, tmp_path):
    run.log(stage="a", value=1 / 3, count=2)
    run.log(stage="b", value=math.inf)
    assert read_lines(tmp_path / "log.jsonl") == [
        {"stage": "a", "value": 0.333333, "count": 2}, {"stage": "b", "value": None},
    ]


# ----------------------------------------------------------------------------------------------
# Parallel work


def make_item(run, item):
    """A stage: NAME_0, NAME_1, ..."""
    do_work(run, f"reward_{item}", ["reward.lr"])


def interrupted_item(run, item):
    run.needs(f"reward_{item}", [])
    raise Stopped


@pytest.fixture
def jobs(monkeypatch):
    """The jobs of workers, which are done in this process"""
    jobs = []
    threads = torch.get_num_threads()

    def parallel_map(work, arguments, num_workers):
        jobs.append((num_workers, arguments))
        return [work(*job) for job in arguments]

    monkeypatch.setattr(workers, "parallel_map", parallel_map)
    yield jobs
    torch.set_num_threads(threads)


def test_stale_items_alone_are_given_to_workers(run, jobs):
    run = run.with_settings({"train.workers": 2})
    make_item(run, 1)
    run.parallel(make_item, range(4))
    (num_workers, arguments), = jobs
    assert num_workers == 2
    assert [(item, slot) for _, _, item, slot, *_ in arguments] == [(0, 1), (2, 2), (3, 1)]
    assert all(threads == 1 for *_, threads, _ in arguments)
    assert not any(known.reason for known in run.known.values())  # the new records are read
    run.parallel(make_item, range(4))
    assert len(jobs) == 1


def test_one_worker_is_this_process(run, jobs):
    run.parallel(make_item, range(3))  # train.workers = 1
    several = run.with_settings({"train.workers": 8, "reward.lr": 1e-4})
    several.parallel(make_item, [2])
    assert jobs == [] and several.read_record("reward_2")["depends"]["reward.lr"] == 1e-4


def test_the_threads_of_an_item_do_not_depend_on_what_is_left_to_do(run, jobs):
    """Else the last member of an interrupted run would be rounded otherwise."""
    used = {}

    def note_threads(run, item):
        if not run.dry_run:
            used.setdefault(item, []).append(torch.get_num_threads())
        make_item(run, item)

    torch.set_num_threads(6)
    run = run.with_settings({"train.workers": 3})
    run.parallel(note_threads, range(3))
    for left in ([2], [0, 1]):
        for item in left:
            os.remove(os.path.join(run.cfg.out_dir, "stages", f"reward_{item}.json"))
        torch.set_num_threads(6)
        run.parallel(note_threads, range(3))
    assert used == {0: [2, 2], 1: [2, 2], 2: [2, 2]}


def test_nothing_is_begun_in_a_dry_run(run, jobs):
    run.dry_run = True
    run.parallel(make_item, range(3))
    assert jobs == [] and [known.reason for known in run.known.values()] == ["new"] * 3
    assert run.dry_run and os.listdir(run.cfg.out_dir) == []


def test_items_of_other_stages_are_left_out(run, jobs):
    run.selected = ("sft",)
    run.parallel(make_item, range(3))
    assert jobs == [] and os.listdir(run.cfg.out_dir) == []


def test_the_reason_is_printed_before_workers_begin(run, jobs, capsys):
    run = run.with_settings({"train.workers": 2})
    run.parallel(make_item, range(2))
    capsys.readouterr()
    run.with_settings({"reward.lr": 1e-4}).parallel(make_item, range(2))
    lines = capsys.readouterr().out.splitlines()
    expected = [f"reward_{i}: again: reward.lr was 0.002, is 0.0001" for i in range(2)]
    assert lines[:2] == expected and len(lines) == 4


def test_a_worker_reports_that_it_was_stopped(run, jobs):
    cfg = run.cfg
    assert run_in_worker(cfg, interrupted_item, 0, 1, 1, {}) is False
    assert run_in_worker(cfg, make_item, 0, 1, 1, {}) is True


def test_a_worker_opens_a_run_once_and_a_process_looks_at_its_data_each_time(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}\n")
    cfg = load_config(f"--data.train={path}", f"--out_dir={tmp_path}")
    assert run_of_worker(cfg, 1) is run_of_worker(cfg, 1)
    before = open_run(cfg).data_status
    path.write_text("{}\n" * 2)
    assert open_run(cfg).data_status != before


def test_data_that_change_during_a_run_end_it(tmp_path):
    """They were read at one time and are hashed, or read by a worker, at another."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"chosen": "a", "rejected": "b"}\n')
    run = opened(tmp_path / "run", f"--data.train={path}", "--data.valid_share=0.5")
    make_item(run, 0)
    path.write_text('{"chosen": "b", "rejected": "a"}\n' * 2)
    with pytest.raises(DataError, match="pairs.jsonl: has changed since this run began"):
        make_item(run, 1)
    assert run.read_record("reward_1") is None
    with pytest.raises(DataError, match="has changed"):
        run_in_worker(run.cfg, make_item, 2, 1, 1, run.data_status)


def test_every_piece_of_work_in_a_finished_run_has_a_record(finished, tmp_path):
    out = copy_run(finished, tmp_path / "run")
    run = opened(out)
    train.check_stages(run)
    names = {path.stem for path in (out / "stages").glob("*.json")}
    assert names == set(run.known)
    for name in names:
        assert run.fingerprint(name) == run.read_record(name)["fingerprint"]
