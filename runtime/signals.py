"""Stopping by Ctrl-C (SIGINT), SIGTERM or SIGHUP.

The first signal ends a command by raising Stopped, at once, with two exceptions.  Inside
`finishing_steps()`, as in training loops, it only sets a flag: the loop finishes its step, saves a
checkpoint and raises Stopped itself.  Inside `saving()` no signal raises anything, so that a file
is written to its end.  The second signal raises KeyboardInterrupt, also in a training loop.

This file imports nothing heavy: a command calls `exit_at_once()` before its imports.
"""
import contextlib
import os
import signal
import sys
import time
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
SAME_SIGNAL = 0.25  # seconds; `timeout` of GNU coreutils sends a signal twice, milliseconds apart


class Stopped(BaseException):
    """The run was asked to stop; the same command goes on from its last saved state.

    Like KeyboardInterrupt it is no Exception, so that no `except Exception` takes it for an error.
    """


stop_signal = 0      # number of the signal that stops this process; 0: none yet
stop_time = 0.0      # when it came
worker_events = []   # events that tell the worker processes of this process to stop
parent_event = None  # in a worker process: the event that its parent sets
has_ended = False    # the command is over: a signal changes nothing any more
is_quiet = False     # a process beside another that says the same
loops = 0            # number of finishing_steps() that are open
saves = 0            # number of saving() that are open


def should_stop() -> bool:
    return bool(stop_signal) or parent_event is not None and parent_event.is_set()


def stop_if_asked():
    """Raise Stopped if a stop was requested; a training loop that is open stops by itself."""
    if should_stop() and not loops:
        raise Stopped


@contextlib.contextmanager
def finishing_steps():
    """Within it the first signal does not raise: the code asks should_stop() after every step."""
    global loops
    loops += 1
    try:
        yield
    finally:
        loops -= 1


@contextlib.contextmanager
def saving():
    """Within it no signal raises, so that a file is written completely."""
    global saves
    saves += 1
    try:
        yield
    finally:
        saves -= 1


# --------------------------------------------------------------------------------------------------
# Handlers


def exit_at_once():
    """Until `handled()` a signal ends this process with one line.  Called before the imports."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, exit_now)


def exit_now(number, frame):
    os.write(2, b"stopped before anything was begun\n")
    os._exit(128 + number)


@contextlib.contextmanager
def handled():
    """Handle the signals as this file's docstring says; nohup's ignored signals stay ignored."""
    global stop_signal, loops, saves, has_ended
    stop_signal = loops = saves = 0
    has_ended = False
    before = {}
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, request_stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is exit_now:
                handler = signal.SIG_IGN  # nothing is left but the end of Python
            signal.signal(number, handler or signal.SIG_DFL)
        has_ended = False


def request_stop(number: int = signal.SIGINT, frame: Any = None):
    """Signal handler of a command."""
    if has_ended:
        return
    is_first = note_signal(number)
    if is_first:
        for event in worker_events:
            event.set()
        if (loops or saves) and not is_quiet:
            say("\nstopping after this step (once more: at once)")
    elif time.monotonic() - stop_time <= SAME_SIGNAL:
        return
    if saves or is_first and loops:
        return
    raise Stopped if is_first else KeyboardInterrupt


def note_signal(number: int, frame: Any = None) -> bool:
    """Signal handler of a worker process for SIGTERM.  -> whether it is the first signal"""
    global stop_signal, stop_time
    if stop_signal:
        return False
    stop_signal = number
    stop_time = time.monotonic()
    return True


def say(text: str):
    """Print a line on stderr.  The terminal may be gone: then nothing more is printed on it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())


@contextlib.contextmanager
def blocked():
    """Signals wait until the end.  Processes started within it begin with the signals blocked."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows: not run by CI
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def handle_in_worker(event):
    """A worker process stops when its parent sets the event, or at SIGTERM, after its step."""
    global parent_event
    parent_event = event
    for number in SIGNALS:
        signal.signal(number, note_signal if number == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
