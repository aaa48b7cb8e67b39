"""python tests/faults/fuzz.py [--cases=N] [--seed=S] [--target=NAME] [--case=I]

Gives damaged inputs to the commands and counts how they end:

    accepted    exit code 0
    one line    exit code 2, one line "error: …" on stderr, no new file
    MESSAGE     exit code 2 with another stderr
    LEFTOVER    exit code 2 with a file half written
    TRACEBACK   an exception
    HANG        longer than ten seconds
    MEMORY      more than ten times the input above what a valid input of the target takes

Prints a table; exits with 1 if one of the last five has occurred.  The number of a case and the
seed give the same case again: --target=NAME --seed=S --case=I prints what it does.
"""
import argparse
import contextlib
import faulthandler
import io
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from faults.targets import TARGETS  # noqa: E402
from helpers import go  # noqa: E402

GOOD = ("accepted", "one line")
BAD = ("MESSAGE", "LEFTOVER", "TRACEBACK", "HANG", "MEMORY")
SECONDS = 10
SLACK = 64 * 2 ** 20  # bytes by which two runs of the same command may differ
MAX_GROWTH = 4 * 2 ** 30  # address space of a case: it must not fill the machine


class TooLong(BaseException):
    """The time limit of a case"""


# --------------------------------------------------------------------------------------------------
# One case


def run_case(case, folder, allowed_memory):
    """-> outcome, stderr or the traceback"""
    before = list_files(folder)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    memory = measure_memory(reset=True)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (measure_memory("VmSize:") + MAX_GROWTH, limits[1]))
    signal.signal(signal.SIGALRM, stop_case)
    signal.alarm(SECONDS)
    # a loop outside Python does not see the signal: then the process ends
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = case.call()
            out.flush()
    except TooLong:
        return "HANG", traceback.format_exc()
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "TRACEBACK", traceback.format_exc()
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limits)
    err.flush()
    text = err.buffer.getvalue().decode()
    if measure_memory() - memory > allowed_memory + 10 * case.input_size:
        return "MEMORY", text
    if code == 0:
        return "accepted", text
    lines = [line for line in text.split("\n")[:-1] if not line.startswith("note: ")]
    is_one_line = len(lines) == 1 and lines[0].startswith("error: ") and "hunter2" not in text
    if code != 2 or not is_one_line or len(lines[0].splitlines()) != 1:
        return "MESSAGE", f"exit code {code}\n{text}"
    left = list_files(folder) - before
    return ("LEFTOVER", f"{left}\n{text}") if left else ("one line", text)


def stop_case(number, frame):
    raise TooLong


def list_files(folder):
    """Files of a folder, but for downloads and the lock of a run, which may stay"""
    found = set()
    for path in folder.rglob("*"):
        may_stay = "cache" in path.parts or path.name == "run.lock"
        if not may_stay and not path.is_dir():
            found.add(path)
    return found


def measure_memory(key="VmHWM:", reset=False):
    """Bytes of memory that this process has held at most since the last reset (Linux)"""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])


# --------------------------------------------------------------------------------------------------
# All cases


def run_target(name, target, seed, numbers, show=print):
    """Run the cases of these numbers -> Counter of outcomes.  show: prints bad ones"""
    base = measure_base(target)
    outcomes = Counter()
    for number in numbers:
        case = target.case(random.Random(f"{seed} {name} {number}"))
        outcome, text = run_case(case, target.folder, base + SLACK)
        target.clean()
        outcomes[outcome] += 1
        if outcome in BAD or len(numbers) == 1:
            show(f"{outcome}: --target={name} --seed={seed} --case={number}\n{case.about}\n{text}")
    return outcomes


def measure_base(target):
    """Memory that valid inputs take once all modules are loaded"""
    growth = []
    for number in range(6):
        case = target.case(random.Random(number), damage=False)
        memory = measure_memory(reset=True)
        outcome, text = run_case(case, target.folder, 2 ** 60)
        growth.append(measure_memory() - memory)
        target.clean()
        assert outcome == "accepted", text
    return max(growth[2:])


def train_once(folder):
    """-> function that trains a small run at its first call -> its folder"""
    def finished():
        if not folder.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                assert go(folder) == 0
        return folder
    return finished


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Damaged inputs; see the file's first lines.")
    parser.add_argument("--cases", type=int, default=100, help="number of cases of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=list(TARGETS), help="one target alone")
    parser.add_argument("--case", type=int, help="number of one case alone")
    return parser.parse_args(argv)


def main(argv):
    options = parse_args(argv)
    torch.set_num_threads(1)
    names = [options.target] if options.target else list(TARGETS)
    numbers = range(options.cases) if options.case is None else [options.case]
    table = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        os.chdir(folder)  # a relative path of a case must not reach the repository
        finished = train_once(Path(folder) / "finished")
        for name in names:
            (Path(folder) / name).mkdir()
            target = TARGETS[name](Path(folder) / name, patch, finished)
            table[name] = run_target(name, target, options.seed, numbers)
            target.close()
        os.chdir(ROOT)
    print(f"{'target':12}" + "".join(f"{outcome:>11}" for outcome in (*GOOD, *BAD)))
    for name, outcomes in table.items():
        print(f"{name:12}" + "".join(f"{outcomes[outcome]:11}" for outcome in (*GOOD, *BAD)))
    return int(any(outcomes[outcome] for outcomes in table.values() for outcome in BAD))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
