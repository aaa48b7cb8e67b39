"""When a signal raises, when it waits, and that processes of a command begin with it blocked."""
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import signals
from runtime.signals import Stopped

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_flags(monkeypatch):
    for name in ("stop_signal", "loops", "saves"):
        monkeypatch.setattr(signals, name, 0)
    monkeypatch.setattr(signals, "parent_event", None)
    monkeypatch.setattr(signals, "worker_events", [])


def later(monkeypatch):
    """A second passes: the next signal is not the same one, sent twice."""
    monkeypatch.setattr(signals, "stop_time", signals.stop_time - 1)


def test_the_first_signal_raises_and_the_second_interrupts(monkeypatch):
    assert not signals.should_stop()
    with pytest.raises(Stopped):
        signals.request_stop(signal.SIGTERM)
    assert signals.should_stop() and signals.stop_signal == signal.SIGTERM
    signals.request_stop(signal.SIGTERM)  # the same one, sent twice
    later(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        signals.request_stop(signal.SIGINT)
    assert signals.stop_signal == signal.SIGTERM


def test_a_training_loop_finishes_its_step(monkeypatch, capsys):
    with signals.finishing_steps():
        signals.request_stop(signal.SIGINT)
        assert signals.should_stop()
        signals.stop_if_asked()  # the loop stops by itself
        assert "stopping after this step" in capsys.readouterr().err
        later(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            signals.request_stop(signal.SIGINT)
    with pytest.raises(Stopped):
        signals.stop_if_asked()


def test_no_signal_raises_while_a_file_is_written(monkeypatch):
    with signals.finishing_steps(), signals.saving():
        for _ in range(3):
            signals.request_stop(signal.SIGINT)
            later(monkeypatch)
    with signals.saving():
        signals.request_stop(signal.SIGINT)
    with pytest.raises(Stopped):
        signals.stop_if_asked()


def test_a_stop_is_no_error_that_code_may_handle():
    with pytest.raises(Stopped):
        try:
            raise Stopped
        except Exception:
            pass


def test_workers_are_told_through_their_event():
    event = multiprocessing.get_context("spawn").Event()
    signals.worker_events.append(event)
    with pytest.raises(Stopped):
        signals.request_stop()
    assert event.is_set()


def test_a_worker_leaves_ctrl_c_to_its_parent_and_saves_at_sigterm():
    event = multiprocessing.get_context("spawn").Event()
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        signal.raise_signal(signal.SIGINT)  # while the worker was imported
        signals.handle_in_worker(event)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
        signal.raise_signal(signal.SIGHUP)
        assert not signals.should_stop()
        event.set()
        assert signals.should_stop()
        event.clear()
        signal.raise_signal(signal.SIGTERM)
        assert signals.should_stop() and not event.is_set()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
        for number, handler in zip(signals.SIGNALS, before):
            signal.signal(number, handler)


def test_handlers_and_flag_last_as_long_as_the_command():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.handled():
        assert {signal.getsignal(number) for number in signals.SIGNALS} == {signals.request_stop}
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    with signals.handled():
        assert not signals.should_stop()


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            signal.raise_signal(signal.SIGHUP)
        signals.exit_at_once()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        for number in (signal.SIGINT, signal.SIGTERM):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


def test_blocked_signals_come_at_the_end():
    with signals.handled():
        with pytest.raises(Stopped):
            with signals.blocked():
                signal.raise_signal(signal.SIGINT)
                assert not signals.should_stop()
        assert signals.stop_signal == signal.SIGINT


def test_a_line_for_a_terminal_that_is_gone_is_no_error():
    """Nor are later ones, such as those of a progress bar."""
    code = "from runtime import signals; signals.say('a'); print('b', flush=True)"
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    assert process.returncode == 0


@pytest.mark.parametrize("module", [["train.py"], ["-m", "experiments"]])
@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129),
])
def test_a_signal_during_the_imports_is_one_line(module, number, code, tmp_path):
    """Importing the substitute of numpy raises the signal, as if it came at that moment."""
    fake = tmp_path / "numpy.py"
    fake.write_text(f"import signal; signal.raise_signal({int(number)}); raise SystemExit(1)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, *module, "--seed=0"], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )
    assert process.returncode == code
    assert process.stderr == "stopped before anything was begun\n"
