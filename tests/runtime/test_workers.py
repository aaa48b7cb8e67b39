"""Worker processes: order of results, stopping, killed processes.  Their functions are builtins,
which the new processes find by name; processes cost seconds, so there are few."""
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import signals, workers

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_flags(monkeypatch):
    monkeypatch.setattr(signals, "stop_signal", 0)
    monkeypatch.setattr(signals, "parent_event", None)


def test_results_come_in_the_order_of_the_jobs():
    jobs = [(2, n) for n in range(8)]
    assert workers.parallel_map(pow, jobs, 2) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert signals.worker_events == []


def test_a_job_that_was_stopped_raises_stopped():
    with pytest.raises(signals.Stopped):
        workers.parallel_map(operator.is_not, [(1, 2), (None, None)], 1)
    assert signals.worker_events == []


def test_an_error_of_a_job_is_raised_here():
    with pytest.raises(FileNotFoundError):
        workers.parallel_map(os.stat, [("/no/such/file",)], 1)


def test_a_killed_process_is_one_line_with_a_remedy():
    with pytest.raises(OSError, match="ended from outside.*--train.workers=1") as caught:
        workers.parallel_map(os._exit, [(9,)], 2)
    assert "\n" not in str(caught.value) and multiprocessing.active_children() == []


def test_a_process_killed_while_stopping_is_a_stop():
    signals.stop_signal = signal.SIGTERM
    with pytest.raises(signals.Stopped):
        workers.parallel_map(os._exit, [(9,)], 1)


def test_workers_of_workers_share_one_event():
    outer = multiprocessing.get_context("spawn").Event()
    outer.set()
    signals.parent_event = outer
    with pytest.raises(signals.Stopped):  # should_stop() is True there: "not" it is False
        workers.parallel_map(should_go_on, [()], 1)
    assert signals.parent_event is outer and signals.worker_events == []


def should_go_on():
    return not signals.should_stop()


def test_a_worker_ends_with_its_parent(tmp_path):
    """The parent is killed while both of its workers sleep for an hour."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from runtime import workers\n"
        "def work(folder, i):\n"
        "    import os\n"
        "    (Path(folder) / f'{os.getpid()}.pid').touch()\n"
        "    time.sleep(3600)\n"
        "if __name__ == '__main__':\n"
        "    workers.parallel_map(work, [(sys.argv[1], 0), (sys.argv[1], 1)], 2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script, str(tmp_path)], env=environment)
    pids = wait_for(lambda: [int(path.stem) for path in tmp_path.glob("*.pid")], 2)
    parent.kill()
    parent.wait()
    deadline = time.time() + 10
    while any(map(is_alive, pids)) and time.time() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def wait_for(find, count):
    """Call find() until it returns that many -> what it returned"""
    deadline = time.time() + 60
    while len(found := find()) < count and time.time() < deadline:
        time.sleep(0.02)
    return found


def is_alive(pid):
    """A zombie that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
