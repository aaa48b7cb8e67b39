"""python tests/faults/writes.py [--cases=N] [--seed=S]

Lets every write of a small run fail, one at a time: the disk is full, a permission is missing, the
disk has an error, or a part of the bytes is written and then the disk is full.  The command must
end with one line and exit code 2, and the same command must then give the files of a run without
faults.  --cases takes so many of the writes at random.  Exits with 1 if a case has failed.
"""
import builtins
import contextlib
import errno
import io
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.runs import FEW, contents, difference, parse_args  # noqa: E402

import train  # noqa: E402

KINDS = (errno.ENOSPC, errno.EACCES, errno.EIO, "short")
CALLS = ("replace", "fsync", "makedirs", "remove", "rename")  # of module os


class FaultyDisk:
    """Counts what is done to files of a folder, and lets call number `fail_at` fail."""

    def __init__(self, folder, fail_at=None, kind=None):
        self.folder = str(folder)
        self.fail_at = fail_at
        self.kind = kind
        self.count = 0
        self.failed = ""   # what has failed
        self.real = {"open": builtins.open}
        self.real |= {name: getattr(os, name) for name in CALLS}

    def __enter__(self):
        builtins.open = self.open
        for name in CALLS:
            setattr(os, name, self.wrap(name))
        return self

    def __exit__(self, *error):
        builtins.open = self.real["open"]
        for name in CALLS:
            setattr(os, name, self.real[name])

    def step(self, what):
        """-> whether this call has to fail; a short write is the caller's"""
        self.count += 1
        if self.count - 1 != self.fail_at:
            return False
        self.failed = what
        if self.kind == "short":
            return True
        raise OSError(self.kind, os.strerror(self.kind), what)

    def wrap(self, name):
        def call(path, *arguments, **options):
            if isinstance(path, int) or str(path).startswith(self.folder):
                if self.step(f"{name} {path}"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.real[name](path, *arguments, **options)

        return call

    def open(self, path, mode="r", *arguments, **options):
        file = self.real["open"](path, mode, *arguments, **options)
        is_ours = str(path).startswith(self.folder) and set(mode) & set("wax+")
        if not is_ours:
            return file
        if self.step(f"open {path}"):
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return FaultyFile(self, file, path)


class FaultyFile:
    """A file whose writes are counted"""

    def __init__(self, disk, file, path):
        self.disk = disk
        self.file = file
        self.path = path

    def write(self, content):
        if self.disk.step(f"write {self.path}"):
            self.file.write(content[:len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def run(folder, fail_at=None, kind=None):
    """Run the command -> FaultyDisk, exit code, stderr"""
    err = io.StringIO()
    disk = FaultyDisk(folder, fail_at, kind)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), disk:
        code = train.main([*FEW, f"--out_dir={folder}"])
    return disk, code, err.getvalue()


def run_case(folder, fail_at, kind, expected):
    """-> what has failed, problem"""
    shutil.rmtree(folder, ignore_errors=True)
    disk = None
    try:
        disk, code, err = run(folder, fail_at, kind)
    except Exception as error:
        return f"call {fail_at}", f"{type(error).__name__}: {error}"
    is_one_line = err.startswith("error: ") and err.count("\n") == 1
    is_note = "run.lock.holder" in disk.failed  # which may stay: the run is whole
    if not (code == 2 and is_one_line or code == 0 and is_note):
        return disk.failed, f"exit code {code}: {err}"
    parts = [path for path in folder.rglob("*.part")] if disk.failed[:6] != "remove" else []
    if parts:
        return disk.failed, f"left {parts[0].name}"
    _, code, err = run(folder)
    return disk.failed, err if code else difference(folder, expected)


def main(num_cases, seed):
    table = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        disk, code, err = run(folder)
        assert code == 0, err
        expected = contents(folder)
        rng = random.Random(seed)
        calls = range(disk.count)
        if num_cases:
            calls = sorted(rng.sample(calls, num_cases))
        for fail_at in calls:
            kind = rng.choice(KINDS)
            what, problem = run_case(folder, fail_at, kind, expected)
            name = kind if kind == "short" else errno.errorcode[kind]
            table[what.partition(" ")[0], name] += 1
            if problem:
                failed += 1
                print(f"call {fail_at}, {name}, {what}: {problem}", flush=True)
    for (what, kind), count in sorted(table.items()):
        print(f"{what:9} {kind:7} {count:4}")
    print(f"{table.total() - failed} of {table.total()} faults ended in one line and a whole run")
    return failed


if __name__ == "__main__":
    given = parse_args(sys.argv[1:])
    sys.exit(1 if main(given.cases, given.seed) else 0)
