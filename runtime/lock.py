"""One run in a folder: a lock on out_dir, kept until the command ends.

Worker processes rely on the lock of their parent; commands that only read take none.
"""
import contextlib
import os
import socket
import sys
import time

from filelock import FileLock, Timeout
from tqdm import tqdm

from config import ConfigError
from runtime import distributed, files, signals

WAIT_SECONDS = 0.5  # between two looks for a stop signal

held = {}  # folder -> FileLock of this process


def claim(folder: str, wait: bool = False):
    """Lock the folder for this process, once; it is created, and leftovers are removed.

    wait: until another process is done, instead of raising ConfigError, which names that process
    Raises OSError if the folder cannot be written, ConfigError if there are files that a run would
    write over and none has written.
    """
    folder = os.path.abspath(folder)
    if folder in held or distributed.rank() > 0:
        return
    lock = FileLock(os.path.join(folder, "run.lock"))
    try:
        os.makedirs(folder, exist_ok=True)
        check_files(folder)
        acquire(lock, folder, wait)
    except OSError as error:
        raise files.cannot_write(folder, error) from None
    held[folder] = lock
    files.remove_leftovers(folder)
    files.save_text(holder_path(folder), this_process() + "\n")


def check_files(folder):
    """Raise ConfigError if a folder without a run has files of somebody's own under a run's names.

    A run has a lock, or records where an older version made it.
    """
    names = os.listdir(folder)
    if "run.lock" in names or "stages" in names:
        return
    for name in sorted(names):
        if files.OWN_FILES.fullmatch(name):
            raise ConfigError(f"out_dir = {folder}: has a file {name} that no run has written and "
                              "this one would write over; move it away, or name another folder")


def acquire(lock, folder, wait):
    has_told = False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=WAIT_SECONDS if wait else 0)
        except Timeout:
            if not wait:
                raise ConfigError(
                    f"out_dir = {folder}: is in use by {holder(folder)}; wait until it ends, or "
                    f"give another --out_dir"
                ) from None
            signals.stop_if_asked()
            if not has_told:
                tqdm.write(f"{folder}: waits for {holder(folder)}")
                has_told = True


def release_all():
    for folder, lock in held.items():
        with contextlib.suppress(OSError):  # the note is read only while the lock is held
            os.remove(holder_path(folder))
        lock.release()
    held.clear()


def holder_path(folder):
    return os.path.join(folder, "run.lock.holder")


def holder(folder):
    """Who holds the lock, in words"""
    try:
        with open(holder_path(folder), encoding="utf-8") as file:
            return file.read().strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def this_process():
    folder, file = os.path.split(os.path.abspath(sys.argv[0]))
    name = os.path.basename(folder) if file == "__main__.py" else file  # python -m experiments
    program = ascii(name)  # its arguments may hold a password
    began = time.strftime("%Y-%m-%d %H:%M")
    return f"process {os.getpid()} on {socket.gethostname()} ({program}, since {began})"
