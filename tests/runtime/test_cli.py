"""The frame of a command: exit codes, one-line errors, real signals to real processes."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from config import ConfigError
from data import DataError
from runtime import lock, signals
from runtime.cli import run_cli

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, time
from pathlib import Path
from runtime import signals, workers

def train(path):
    while not signals.should_stop():
        Path(path + ".begun").touch()
        time.sleep(0.02)
    Path(path + ".saved").touch()
    return False

def main():
    workers.parallel_map(train, [(f"{sys.argv[1]}/{i}",) for i in range(2)], 2)

if __name__ == "__main__":
    from runtime.cli import run_cli
    sys.exit(run_cli(main))
"""


def start(tmp_path):
    """The script in a process group of its own, once both its jobs have begun"""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.time() + 60
    while len(list(tmp_path.glob("*.begun"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number, code, send", [
    (signal.SIGINT, 130, os.killpg),   # as a terminal sends it, to all processes of the command
    (signal.SIGTERM, 143, os.killpg),  # as timeout and batch systems do
    (signal.SIGTERM, 143, os.kill),    # to the parent alone
    (signal.SIGHUP, 129, os.killpg),   # as a terminal that is closed
], ids=["SIGINT", "SIGTERM", "SIGTERM to the parent", "SIGHUP"])
def test_a_signal_saves_in_all_workers_and_exits_with_its_code(tmp_path, number, code, send):
    process = start(tmp_path)
    send(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.endswith("stopped; the same command resumes from here\n") and "Traceback" not in err
    assert err.count("stopping after this step") == 1
    assert len(list(tmp_path.glob("*.saved"))) == 2


CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize("number, code", CODES)
def test_the_first_signal_lets_the_step_end(number, code, capsys):
    steps = []

    def work():
        with signals.finishing_steps():
            for step in range(10):
                if step == 3:
                    signal.raise_signal(number)
                steps.append(step)
                if signals.should_stop():
                    raise signals.Stopped

    assert run_cli(work) == code
    assert steps == [0, 1, 2, 3]
    err = capsys.readouterr().err
    assert err.endswith("stopped; the same command resumes from here\n")


@pytest.mark.parametrize("number, code", CODES)
def test_a_signal_outside_of_a_loop_stops_at_once(number, code, capsys):
    def work():
        signal.raise_signal(number)
        raise AssertionError("not reached")

    assert run_cli(work) == code
    assert capsys.readouterr().err == "stopped; the same command resumes from here\n"


@pytest.mark.parametrize("number, code", CODES)
def test_the_second_signal_stops_a_loop_at_once(number, code, capsys):
    def work():
        with signals.finishing_steps():
            signal.raise_signal(number)
            signals.stop_time -= 1  # a second later
            signal.raise_signal(number)
            raise AssertionError("not reached")

    assert run_cli(work) == code
    assert "at once; the same command resumes from the last checkpoint" in capsys.readouterr().err


def test_a_signal_as_the_last_file_is_written_is_in_the_exit_code():
    def work():
        with signals.saving():
            signal.raise_signal(signal.SIGTERM)

    assert run_cli(work) == 143


def test_the_lock_is_released(tmp_path):
    assert run_cli(lambda: lock.claim(tmp_path)) == 0
    assert not lock.held


@pytest.mark.parametrize("error, words", [
    (ConfigError("seed = 'x': must be a whole number"), "seed = 'x': must be a whole number"),
    (DataError("a.jsonl:3: broken JSON"), "a.jsonl:3: broken JSON"),
    (OSError("a.pt: cannot be written"), "a.pt: cannot be written"),
    (torch.OutOfMemoryError("CUDA"), "train.accumulate"),
    (MemoryError(), "train.accumulate"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 99 bytes"), "train.accumulate"),
])
def test_an_error_of_the_user_is_one_line(error, words, capsys):
    def work():
        raise error

    assert run_cli(work) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [IndexError, RuntimeError])
def test_a_mistake_of_the_program_keeps_its_traceback(error):
    def work():
        raise error

    with pytest.raises(error):
        run_cli(work)


def test_a_reader_that_closes_the_output_of_a_training_is_said(capsys):
    def work():
        raise BrokenPipeError

    with contextlib.redirect_stdout(open(os.devnull, "w")):  # run_cli redirects its descriptor
        assert run_cli(work) == 141
    assert "the reader of the output has closed it" in capsys.readouterr().err


def test_closed_streams_lose_what_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_cli(print) == 0


def test_a_signal_after_the_work_changes_nothing(monkeypatch, capsys):
    def release_all():
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(lock, "release_all", release_all)
    assert run_cli(print) == 0
    assert capsys.readouterr().err == ""


def test_success_is_zero():
    assert run_cli(list) == 0
