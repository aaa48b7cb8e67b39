"""Worker processes: they are told to stop by their parent, and end when it dies."""
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

from runtime import signals
from runtime.signals import Stopped


def start_worker(event):
    """First call in a worker process.  event: multiprocessing.Event that its parent sets to stop"""
    signals.handle_in_worker(event)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A worker must not write files beside the next run, also where its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker process"
    connection.wait([parent.sentinel])
    os._exit(1)


def parallel_map(
    work: Callable, jobs: Iterable[tuple], num_workers: int, on_result: Callable | None = None,
) -> list:
    """work(*job) for every job, in num_workers new processes -> results, in the order of jobs.

    on_result(i, result) is called as soon as job i has ended, unless it was stopped.  work must be
    a function of a module, to be found by name in the new processes.  It returns False if it was
    stopped; then Stopped is raised here.  Raises OSError if a process is killed.
    """
    context = multiprocessing.get_context("spawn")
    with signals.blocked():  # the first Event starts a process, which SIGHUP would kill
        event = signals.parent_event or context.Event()  # a worker's workers share its event
    pool = ProcessPoolExecutor(num_workers, context, start_worker, (event,))
    signals.worker_events.append(event)
    try:
        with signals.finishing_steps(), pool:
            with signals.blocked():  # a new process is no target before start_worker
                futures = [pool.submit(work, *job) for job in jobs]
            if signals.should_stop():
                event.set()  # the signal came before the event was listed
            results = results_of(futures, on_result)
    finally:
        signals.worker_events.remove(event)
    if any(result is False for result in results):
        raise Stopped
    return results


def results_of(futures, on_result):
    try:
        for future in as_completed(futures):
            if on_result is not None and future.result() is not False:
                on_result(futures.index(future), future.result())
        return [future.result() for future in futures]
    except BrokenProcessPool:
        kill_workers()
        if signals.should_stop():  # a signal to all processes ended one that had not begun yet
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
