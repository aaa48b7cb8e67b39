"""python tests/faults/kills.py [--cases=N] [--seed=S] [--run=NAME]

Stops real runs by signals, up to three times each, at a random moment of a random stage, runs the
same command again, and compares the files with those of a run that was not stopped, bit for bit.

A case fails where the files differ, a process of the run is alive five seconds after its parent,
the exit code is not that of the signal, or a traceback is printed.  Prints a table of stage and
signal; exits with 1 if a case has failed.  The seed and the number of a case give the same moments.
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.runs import (  # noqa: E402
    STAGES,
    contents,
    difference,
    parse_args,
    words_of_run,
    work_in_progress,
)

KINDS = ("SIGKILL", "SIGKILL", "SIGINT", "SIGTERM", "SIGHUP", "twice")
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "twice": 130}
SECONDS = 5     # in which all processes of a run end after their parent


def names_of(records):
    return ["imports", *records, "end"]


def start(folder, words):
    """The folder is given by its name alone, because records hold it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words, f"--out_dir={folder.name}"],
        cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )


def finish(folder, words):
    """Run the command to its end -> seconds, problem"""
    begun = time.time()
    process = start(folder, words)
    _, err = process.communicate()
    problem = "" if process.returncode == 0 else f"exit code {process.returncode}: {err[-300:]}"
    return time.time() - begun, problem


def stop_once(folder, words, records, stage, delay, kind):
    """Start the command and stop it so many seconds after a stage has begun -> stage, problem

    Where that stage is done, it is the next one; "end" if the run ended before.
    records: the stages of the run with the records that end them
    """
    process = start(folder, words)
    order = names_of(records)
    while process.poll() is None:
        if order.index(work_in_progress(folder, records)) >= order.index(stage):
            break
        time.sleep(0.01)
    try:
        out, err = process.communicate(timeout=delay)
        return "end", "" if process.returncode == 0 else f"exit code {process.returncode}: {err}"
    except subprocess.TimeoutExpired:
        stage = work_in_progress(folder, records)
    send(process, kind)
    out, err = process.communicate()
    return stage, what_went_wrong(process, kind, err)


def send(process, kind):
    """SIGKILL to the parent alone, as the system does where memory is short; the others to all."""
    if kind == "SIGKILL":
        process.kill()
        return
    number = signal.SIGINT if kind == "twice" else getattr(signal, kind)
    os.killpg(process.pid, number)
    if kind == "twice":
        time.sleep(0.4)
        if process.poll() is None:
            os.killpg(process.pid, number)


def what_went_wrong(process, kind, err):
    left = wait_for_end(process.pid)
    if left:
        return f"{left} processes outlive their parent"
    if kind == "SIGKILL":
        return "" if process.returncode in (-signal.SIGKILL, 0) else f"exit {process.returncode}"
    if "Traceback" in err:
        return err[-600:]
    # a signal before the first line of the program is not handled: Python has not come to it
    allowed = (CODES[kind], 0, -getattr(signal, "SIGINT" if kind == "twice" else kind))
    return "" if process.returncode in allowed else f"exit code {process.returncode}: {err[-300:]}"


def wait_for_end(group):
    """-> number of processes of the group that are alive after some seconds"""
    deadline = time.time() + SECONDS
    while (count := count_alive(group)) and time.time() < deadline:
        time.sleep(0.05)
    return count


def count_alive(group):
    """Processes of a group that are no zombies"""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        count += process_group == str(group) and state != "Z"
    return count


def run_case(folder, words, records, rng, seconds, table, most):
    """Stop a run up to `most` times, and finish it -> problem

    seconds: of a whole run, of which a stage takes about its share
    table: Counter of (stage, kind), extended here
    """
    order = names_of(records)
    stages = sorted(rng.choices(order[:-1], k=rng.randint(1, most)), key=order.index)
    for stage in stages:
        kind = rng.choice(KINDS)
        delay = rng.uniform(0, seconds / len(order))
        stage, problem = stop_once(folder, words, records, stage, delay, kind)
        if stage != "end":
            table[stage, kind] += 1
        if problem:
            return f"{kind} in {stage}: {problem}"
    return finish(folder, words)[1]


def print_table(table, records):
    kinds = sorted({kind for _, kind in table})
    print("stage".ljust(10) + "".join(kind.rjust(9) for kind in kinds))
    for stage in names_of(records):
        if any((stage, kind) in table for kind in kinds):
            print(stage.ljust(10) + "".join(f"{table[stage, kind]:9}" for kind in kinds))


def main(num_cases, seed, words, records=STAGES["everything"], most=3):
    table = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole" / "run"
        whole.parent.mkdir()
        seconds, problem = finish(whole, words)
        assert not problem, problem
        expected = contents(whole)
        for number in range(num_cases):
            folder = Path(root) / str(number) / "run"
            folder.parent.mkdir()
            rng = random.Random(f"{seed} {number}")
            problem = run_case(folder, words, records, rng, seconds, table, most)
            problem = problem or difference(folder, expected)
            if problem:
                failed += 1
                print(f"case {number}: {problem}", flush=True)
    print_table(table, records)
    print(f"{num_cases - failed} of {num_cases} runs equal to one that was not stopped, "
          f"{table.total()} stops")
    return failed


if __name__ == "__main__":
    given = parse_args(sys.argv[1:], cases=20)
    with tempfile.TemporaryDirectory() as base:
        settings = words_of_run(given.run, Path(base))
        settings = [word for word in settings if "workers" not in word and "threads" not in word]
        settings += ["--train.workers=2", f"--threads={given.threads}"]
        sys.exit(1 if main(given.cases, given.seed, settings, STAGES[given.run]) else 0)
