"""One run in a folder: who holds the lock is named, and what a killed process left is removed."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config import ConfigError
from runtime import files, lock, signals

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from runtime import lock
lock.claim(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path"""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


@pytest.fixture(autouse=True)
def release():
    yield
    lock.release_all()


def test_a_folder_in_use_is_one_line_that_names_the_process(tmp_path, other):
    with pytest.raises(ConfigError) as caught:
        lock.claim(tmp_path)
    assert f"out_dir = {tmp_path}: is in use by process {other.pid} on " in str(caught.value)
    assert "another --out_dir" in str(caught.value) and "\n" not in str(caught.value)


def test_a_killed_process_holds_nothing(tmp_path, other):
    other.kill()
    other.wait()
    lock.claim(tmp_path)
    assert f"process {os.getpid()} on " in lock.holder(tmp_path)


def test_who_waits_says_so_and_goes_on(tmp_path, other, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.05)
    looks = []

    def stop_if_asked():
        looks.append(1)
        if len(looks) == 2:
            other.communicate()

    monkeypatch.setattr(signals, "stop_if_asked", stop_if_asked)
    lock.claim(tmp_path, wait=True)
    assert len(looks) >= 2
    assert capsys.readouterr().out.count(f"waits for process {other.pid}") == 1


def test_who_waits_can_be_stopped(tmp_path, other, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(signals, "stop_signal", 2)
    with pytest.raises(signals.Stopped):
        lock.claim(tmp_path, wait=True)


def test_a_folder_is_claimed_once_until_it_is_released(tmp_path):
    folder = tmp_path / "new" / "run"
    lock.claim(folder)
    lock.claim(os.path.relpath(folder))
    lock.release_all()
    assert os.listdir(folder) == ["run.lock"]
    lock.claim(folder)


def test_without_a_readable_note_the_holder_is_another_process(tmp_path):
    assert lock.holder(tmp_path) == "another process"
    (tmp_path / "run.lock.holder").write_bytes(b"\xff")
    assert lock.holder(tmp_path) == "another process"


def test_leftovers_of_killed_processes_are_removed_and_no_file_of_the_users(tmp_path):
    for name in ("a.pt", "figures/a.png", "stages/sft.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("whole")
        Path(files.part_path(path)).write_text("half")
    (tmp_path / "mine.part").write_text("mine")
    (tmp_path / "mine.17.part").write_text("mine")
    lock.claim(tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a.pt", "figures/a.png", "stages/sft.json", "mine.part", "mine.17.part",
                     "run.lock", "run.lock.holder"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/out: cannot be written.*--out_dir"):
        lock.claim(tmp_path / "file" / "out")


def test_a_note_that_cannot_be_removed_is_no_error(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError("a full disk")

    lock.claim(tmp_path)
    monkeypatch.setattr(os, "remove", refuse)
    lock.release_all()
    assert not lock.held


@pytest.mark.parametrize("name", ["results.json", "sft.pt", "strength.jsonl", "samples_flip.md"])
def test_files_of_somebody_s_own_are_not_written_over(tmp_path, name):
    path = tmp_path / name
    path.write_text("mine")
    with pytest.raises(ConfigError, match=f"has a file {name} that no run has written"):
        lock.claim(tmp_path)
    assert path.read_text() == "mine" and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["run.lock", "stages"])
def test_a_folder_with_a_run_may_have_them(tmp_path, name):
    (tmp_path / "results.json").write_text("of an older run")
    (tmp_path / name).mkdir() if name == "stages" else (tmp_path / name).touch()
    lock.claim(tmp_path)
    lock.release_all()


def test_other_files_in_a_new_folder_are_left_alone(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("mine")
    lock.claim(tmp_path)
    lock.release_all()
    assert (tmp_path / "pairs.jsonl").read_text() == "mine"
