"""Which ranks of a run under torchrun are alive, and which of them tells why the run ends.

When a rank dies, the others see a lost connection, or only that torchrun asks them to stop.  So
each rank gives a sign of life every second, from a thread of its own, in torchrun's key-value
store; a rank that ends by itself says so there.
"""
import atexit
import threading
import time
from typing import Any

BEAT_SECONDS = 1    # between two signs of life
SILENT_SECONDS = 4  # without one a rank is dead

store: Any = None   # None: a single process
rank = 0
num_ranks = 1


def start(own_store, own_rank, size):
    global store, rank, num_ranks
    store = own_store
    rank = own_rank
    num_ranks = size
    store.set(key_of(rank), "0")
    stopped = threading.Event()
    thread = threading.Thread(target=beat, args=[stopped], daemon=True)
    thread.start()
    atexit.register(stop, thread, stopped)


def key_of(rank_):
    return f"beat {rank_}"


def beat(stopped):
    count = 0
    while not stopped.wait(BEAT_SECONDS):
        count += 1
        try:
            store.set(key_of(rank), str(count))
        except RuntimeError:  # the store has gone, with the process that held it
            return


def stop(thread, stopped):
    """Python that ends while the thread is in the store's C++ code aborts the process."""
    stopped.set()
    thread.join(timeout=5)


def note_end() -> bool:
    """Tell the others that this rank has not died but ended.  -> whether they can be told"""
    if store is None:
        return False
    try:
        store.set(f"ended {rank}", "")
    except RuntimeError:
        return False
    return True


def failure_text(text: str) -> str:
    """The line to print about an error: with the rank; "" where another rank has printed one"""
    if not note_end():
        return text
    try:
        if store.add("failures", 1) > 1:
            return ""
    except RuntimeError:
        return text
    return f"rank {rank}: {text}" if rank else text


def dead_ranks() -> list[int]:
    """The ranks that have neither ended nor give a sign of life; takes SILENT_SECONDS"""
    if store is None:
        return []
    ranks = range(num_ranks)
    try:
        before = [store.get(key_of(r)) for r in ranks]
        time.sleep(SILENT_SECONDS)
        silent = [r for r in ranks if store.get(key_of(r)) == before[r]]
        return [r for r in silent if not store.check([f"ended {r}"])]
    except RuntimeError:
        return []
