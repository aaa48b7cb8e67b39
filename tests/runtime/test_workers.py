"""Worker processes: order of results, stopping, killed processes.  Their functions are builtins,
which the new processes find by name; processes cost seconds, so there are few."""
import multiprocessing
import operator
import os
import signal

import pytest

from runtime import workers


@pytest.fixture(autouse=True)
def fresh_flags(monkeypatch):
    monkeypatch.setattr(workers, "stop_signal", 0)
    monkeypatch.setattr(workers, "stop_event", None)


def test_the_first_signal_asks_to_stop_and_the_second_interrupts(capsys):
    assert not workers.should_stop()
    workers.request_stop(signal.SIGTERM, None)
    assert workers.should_stop() and workers.stop_signal == signal.SIGTERM
    assert "stopping after this step" in capsys.readouterr().err
    workers.request_stop(signal.SIGTERM, None)  # the same one, sent twice
    assert workers.stop_signal == signal.SIGTERM and capsys.readouterr().err == ""
    workers.stop_time -= 1
    with pytest.raises(KeyboardInterrupt):
        workers.request_stop(signal.SIGINT, None)


def test_a_request_reaches_the_workers_through_the_event():
    event = multiprocessing.get_context("spawn").Event()
    workers.stop_event = event
    assert not workers.should_stop()
    workers.request_stop()
    assert event.is_set()


def test_a_worker_leaves_ctrl_c_to_its_parent_and_saves_at_sigterm():
    event = multiprocessing.get_context("spawn").Event()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        workers.start_worker(event)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert not workers.should_stop()
        event.set()
        assert workers.should_stop()
        event.clear()
        signal.raise_signal(signal.SIGTERM)
        assert workers.should_stop() and not event.is_set()
        workers.stop_time -= 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)


def test_results_come_in_the_order_of_the_jobs():
    jobs = [(2, n) for n in range(8)]
    assert workers.parallel_map(pow, jobs, 2) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert workers.stop_event is None


def test_a_job_that_was_stopped_raises_stopped():
    with pytest.raises(workers.Stopped):
        workers.parallel_map(operator.is_not, [(1, 2), (None, None)], 1)
    assert workers.stop_event is None


def test_an_error_of_a_job_is_raised_here():
    with pytest.raises(FileNotFoundError):
        workers.parallel_map(os.stat, [("/no/such/file",)], 1)


def test_a_killed_process_is_one_line_with_a_remedy():
    with pytest.raises(OSError, match="ended from outside.*--train.workers=1") as caught:
        workers.parallel_map(os._exit, [(9,)], 2)
    assert "\n" not in str(caught.value) and multiprocessing.active_children() == []


def test_a_process_killed_while_stopping_is_a_stop():
    workers.stop_signal = signal.SIGTERM
    with pytest.raises(workers.Stopped):
        workers.parallel_map(os._exit, [(9,)], 1)


def test_workers_of_workers_share_one_event():
    outer = multiprocessing.get_context("spawn").Event()
    outer.set()
    workers.stop_event = outer
    with pytest.raises(workers.Stopped):  # should_stop() is True there: "not" it is False
        workers.parallel_map(should_go_on, [()], 1)
    assert workers.stop_event is outer


def should_go_on():
    return not workers.should_stop()
