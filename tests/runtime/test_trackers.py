"""Trackers get the numbers of log.jsonl once, at their steps, and change nothing of a run.

tensorboard is compared by its own reader; wandb by a module that notes the calls, and by the real
one, offline, where it is installed (none of the requirements needs it).
"""
import json
import os
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from helpers import SMALL, go, one_line, same, tensors
from small_runs import forget, load_config, log_of, opened, read_lines, stop_after

import train
from config import ConfigError
from runtime import trackers
from runtime.run import run_in_worker, status_of_data
from runtime.stages import read_record

SFT = ["--stage=sft", "--train.checkpoint_minutes=1000"]
STEPS = 4  # of the SFT of SMALL


def stopped_and_resumed(out, *words):
    """SFT that is stopped after two steps, resumed, and resumed a second time from its second step,
    as after a kill at the end: log.jsonl has the last steps twice."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert go(out, *SFT, *words) == 130
    shutil.copy(out / "sft.ckpt", out / "kept")
    assert go(out, *SFT, *words) == 0
    shutil.move(out / "kept", out / "sft.ckpt")
    forget(out, "sft")
    assert go(out, *SFT, *words) == 0
    return out


def points_of(lines):
    """Lines of log.jsonl -> {name: {step: the last number}}"""
    points = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("stage", "step", "steps") and isinstance(value, (int, float)):
                points.setdefault(name, {})[line["step"]] = value
    return points


def read_tensorboard(folder):
    """-> {name: {step: value}}; a point that is there twice is an error"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    points = {}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        points[name] = {event.step: event.value for event in scalars}
        assert len(points[name]) == len(scalars), name
    return points


def same_points(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name


# --------------------------------------------------------------------------------------------------
# tensorboard

@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """SFT, stopped and resumed, and a member of the ensemble, made as worker processes make it"""
    pytest.importorskip("tensorboard")
    words = "--log.tracker=tensorboard"
    out = stopped_and_resumed(tmp_path_factory.mktemp("watched"), words)
    train_member(out, words)
    return out


def train_member(out, *words):
    cfg = load_config(*words, f"--out_dir={out}")
    assert run_in_worker(cfg, train.train_member, 0, 1, 1, status_of_data(cfg))


def test_tensorboard_reads_what_log_jsonl_holds_once(watched):
    assert sorted(os.listdir(watched / "tensorboard")) == ["member_00", "sft"]
    for name in ("sft", "member_00"):
        lines = log_of(opened(watched), name)
        same_points(read_tensorboard(watched / "tensorboard" / name), points_of(lines))
    steps = [line["step"] for line in log_of(opened(watched), "sft")]
    assert steps == [1, 2, 3, 4, 3, 4]
    assert "accuracy" in points_of(lines)


def test_a_tracker_changes_neither_numbers_nor_what_work_depends_on(watched, tmp_path):
    assert go(tmp_path, "--stage=sft") == 0
    train_member(tmp_path)
    for name in ("sft", "member_00"):
        assert same(tensors(watched, name), tensors(tmp_path, name))
        with_tracker, without = read_record(watched, name), read_record(tmp_path, name)
        for key in ("depends", "fingerprint", "outputs"):
            assert with_tracker[key] == without[key]


def test_points_can_be_read_before_the_end(tmp_path, monkeypatch):
    """A process that is killed loses none.  The flushes are counted, since the thread that writes
    the file may be quick enough without one."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    flush = mock.Mock(wraps=SummaryWriter.flush)
    monkeypatch.setattr(SummaryWriter, "flush", lambda self: flush(self))
    run = opened(tmp_path, "--log.tracker=tensorboard")
    for step in run.steps("sft", 4, 6):
        run.log(stage="sft", step=step + 1, steps=6, loss=0.5 * step)
        points = read_tensorboard(tmp_path / "tensorboard/sft")
        assert points["loss"][step + 1] == 0.5 * step
        assert flush.call_count == step - 3
    assert points == {"loss": {5: 2.0, 6: 2.5}}


# --------------------------------------------------------------------------------------------------
# wandb

class FakeWandb:
    """Notes what is logged; like wandb it goes on with a run of the same id, takes no step that is
    less than the last one, and has no run that is not finished."""
    Error = ValueError
    Settings = dict

    def __init__(self):
        self.runs = {}      # id -> {step: numbers}
        self.started = []   # arguments of init
        self.is_open = False

    def init(self, **arguments):
        assert not self.is_open and arguments["resume"] == "allow"
        self.is_open = True
        self.started.append(arguments)
        rows = self.runs.setdefault(arguments["id"], {})

        def log(numbers, step):
            assert self.is_open and step >= max(rows, default=0)
            rows.setdefault(step, {}).update(numbers)

        starting_step = max(rows) + 1 if rows else 0
        return SimpleNamespace(log=log, finish=self.finish, starting_step=starting_step)

    def finish(self):
        self.is_open = False


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


WORDS = ["--log.tracker=wandb", "--log.project=mine"]


def test_wandb_goes_on_with_a_run_and_gets_every_number_once(tmp_path, wandb):
    out = stopped_and_resumed(tmp_path / "run", *WORDS)
    assert not wandb.is_open and len(wandb.started) == 3
    rows, = wandb.runs.values()  # one id
    assert list(rows) == [1, 2, 3, 4]
    lines = log_of(opened(out), "sft")[:STEPS]
    same_points(points_of({"step": step} | row for step, row in rows.items()), points_of(lines))
    for arguments in wandb.started:
        assert (arguments["project"], arguments["name"]) == ("mine", "sft")
        assert (arguments["group"], arguments["dir"]) == ("run", str(out))
        assert arguments["config"]["sft"]["epochs"] == 1
    assert go(out, *SFT, *WORDS, "--sft.lr=1e-3") == 0
    assert len(wandb.runs) == 2  # other numbers, another run
    assert go(out, *SFT, *WORDS, "--sft.lr=1e-3") == 0
    assert len(wandb.started) == 4  # up to date


def test_numbers_alone_are_tracked_in_the_step_in_which_they_are_logged(tmp_path, wandb):
    """A line of MetaRM's validation has no step of its own."""
    run = opened(tmp_path, *WORDS)
    for step in run.steps("meta_1", 4, 6):
        run.log(stage="meta_1", valid_loss=0.5 * step, J=float("inf"), samples=["a"])
    rows, = wandb.runs.values()
    assert rows == {5: {"valid_loss": 2.0}, 6: {"valid_loss": 2.5}}
    run.log(stage="meta_1", valid_loss=1.0)  # of no loop
    assert len(rows) == 2 and len(read_lines(tmp_path / "log.jsonl")) == 3


def test_wandb_does_not_get_a_password(tmp_path, wandb):
    run = opened(tmp_path, *WORDS, "--data.train=https://me:secret@host/a.jsonl")
    list(run.steps("sft", 0, 1))
    assert wandb.started[0]["config"]["data"]["train"] == ["https://***@host/a.jsonl"]


def test_what_wandb_refuses_is_one_line(tmp_path, wandb, monkeypatch, capsys):
    def refuse(**arguments):
        raise wandb.Error("no API key\nconfigured")

    monkeypatch.setattr(wandb, "init", refuse)
    assert go(tmp_path, *SFT, *WORDS) == 2
    one_line(capsys, "log.tracker = 'wandb': no API key configured", "WANDB_MODE=offline")


def test_the_real_wandb_keeps_every_number(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    assert go(tmp_path, *SFT, *WORDS) == 0
    file, = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for line in log_of(opened(tmp_path), "sft"):
        for name in ("loss", "grad_norm", "tokens_per_s"):
            assert json.dumps(line[name]).encode() in content, line


# --------------------------------------------------------------------------------------------------
# Neither

@pytest.mark.parametrize("tracker", trackers.MODULES)
def test_a_library_that_is_missing_is_one_line_before_anything_is_made(
    tmp_path, monkeypatch, capsys, tracker
):
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    out = tmp_path / "out"
    assert go(out, f"--log.tracker={tracker}") == 2
    one_line(capsys, f"log.tracker = '{tracker}': ", f"; pip install {tracker}")
    assert not (out / "encoding.json").exists()
    with pytest.raises(ConfigError, match=f"; pip install {tracker}"):  # as an experiment trains
        list(opened(out, f"--log.tracker={tracker}").steps("sft", 0, 1))
    assert go(out, "--log.tracker=none", "--stage=sft", "--sft.epochs=0", small=SMALL) == 0
