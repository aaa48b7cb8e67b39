"""Two commands at once in one folder, as real processes."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from faults.runs import FEW, contents
from helpers import SMALL, go

from experiments.__main__ import main
from runtime import lock

ROOT = Path(__file__).parents[2]
SLOW = ["--sft.epochs=1000", "--sft.lr=1e-5"]


def start(*command):
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lock(folder):
    deadline = time.time() + 60
    while not (folder / "run.lock.holder").exists() and time.time() < deadline:
        time.sleep(0.02)


def test_the_second_command_is_one_line_and_changes_nothing(tmp_path):
    out = tmp_path / "run"
    first = start("train.py", *FEW, *SLOW, f"--out_dir={out}")
    wait_for_lock(out)
    second = start("train.py", *FEW, "--strength.q=0.3", f"--out_dir={out}")
    _, err = second.communicate()
    assert second.returncode == 2
    assert err.startswith(f"error: out_dir = {out}: is in use by process {first.pid} on ")
    assert err.count("\n") == 1
    first.terminate()
    assert first.wait() == 143


def test_commands_that_read_need_no_lock(tmp_path):
    out = tmp_path / "run"
    assert go(out, small=FEW) == 0
    lock.claim(out)
    pairs = tmp_path / "pairs.jsonl"
    shutil.copy(out / "cleaned.jsonl", pairs)
    process = start("-m", "tools.score", f"--run={out}", str(pairs))
    _, err = process.communicate()
    lock.release_all()
    assert process.returncode == 0, err


def test_two_experiments_on_one_seed_take_turns(tmp_path):
    words = ["histograms", "--seeds=3", "--train.workers=1"]
    words += [word for word in SMALL if "workers" not in word]
    alone = tmp_path / "alone"
    twice = tmp_path / "twice"
    assert main([*words, f"--out_dir={alone}"]) == 0
    both = [start("-m", "experiments", *words, f"--out_dir={twice}") for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("waits for process" in out for out, _ in outputs) == 1
    assert os.listdir(alone) == os.listdir(twice)
    models = {name for name in contents(alone) if name.endswith(".pt")}
    assert models and {name: contents(twice)[name] for name in models} == {
        name: contents(alone)[name] for name in models}
