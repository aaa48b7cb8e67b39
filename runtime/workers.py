"""Worker processes, and stopping by Ctrl-C or SIGTERM.

The first signal sets a flag that training loops read between two steps: they save a checkpoint and
raise Stopped.  The second signal stops at once.  Worker processes get the first one from their
parent, through an event, and save checkpoints of their own.
"""
import multiprocessing
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


class Stopped(Exception):
    """The run was asked to stop; its state is saved, and the same command resumes it."""


stop_signal = 0    # number of the signal that stops this process; 0: none yet
stop_time = 0.0    # when it came
stop_event = None  # multiprocessing.Event, shared with the worker processes while there are any
SAME_SIGNAL = 0.25  # seconds; `timeout` of GNU coreutils sends a signal twice, milliseconds apart


def request_stop(number=signal.SIGINT, frame=None):
    """Signal handler: stop after the present step; at the second signal raise KeyboardInterrupt."""
    if note_signal(number):
        if stop_event is not None:
            stop_event.set()
        print("\nstopping after this step (once more: at once)", file=sys.stderr)


def note_signal(number):
    """Whether the signal is the first one; KeyboardInterrupt if it is the second one."""
    global stop_signal, stop_time
    now = time.monotonic()
    if not stop_signal:
        stop_signal = number
        stop_time = now
        return True
    if now - stop_time > SAME_SIGNAL:
        raise KeyboardInterrupt
    return False


def should_stop():
    return bool(stop_signal) or stop_event is not None and stop_event.is_set()


def stop_worker(number, frame):
    """Signal handler of a worker process for SIGTERM: like request_stop, without a message."""
    note_signal(number)


def start_worker(event):
    """First call in a worker process.  Its parent alone handles Ctrl-C, and sets the event."""
    global stop_event
    stop_event = event
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop_worker)


def parallel_map(work, jobs, num_workers):
    """work(*job) for every job, in num_workers new processes -> results, in the order of jobs.

    work must be a function of a module, to be found by name in the new processes.  It returns False
    if it was stopped; then Stopped is raised here.  Raises OSError if a process is killed.
    """
    global stop_event
    context = multiprocessing.get_context("spawn")
    outer_event = stop_event  # set if this process is a worker itself
    stop_event = outer_event or context.Event()
    try:
        with ProcessPoolExecutor(num_workers, context, start_worker, (stop_event,)) as pool:
            futures = [pool.submit(work, *job) for job in jobs]
            results = results_of(futures)
    finally:
        stop_event = outer_event
    if any(result is False for result in results):
        raise Stopped
    return results


def results_of(futures):
    try:
        return [future.result() for future in futures]
    except BrokenProcessPool:
        kill_workers()
        if should_stop():  # a signal to all processes ended one that had not begun yet
            raise Stopped from None
        raise OSError("a process was ended from outside, perhaps for lack of memory; try "
                      "--train.workers=1") from None
    except KeyboardInterrupt:
        kill_workers()
        raise


def kill_workers():
    """The pool would wait until their jobs are done: workers do not end at the first SIGTERM."""
    for process in multiprocessing.active_children():
        process.kill()
