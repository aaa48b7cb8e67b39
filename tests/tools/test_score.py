"""python -m tools.score, the command; tests/test_sample.py tests the scores."""
import json

import pytest
from helpers import one_line

import sample
from tools import score

PAIR = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Well.", "rejected": " Go away."}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_it_writes_what_sample_writes(finished, tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", PAIR)
    assert score.main([f"--run={finished}", "--reward=member_00", str(path)]) == 0
    first = capsys.readouterr().out
    assert "mine.scored.jsonl: 1 lines, scored by member_00" in first
    out = tmp_path / "mine.scored.jsonl"
    by_tool = out.read_bytes()
    out.unlink()
    assert sample.main([f"--run={finished}", "--reward=member_00", f"--score={path}"]) == 0
    assert out.read_bytes() == by_tool
    assert capsys.readouterr().out == first


def test_the_default_reward_model_is_that_of_the_last_policy(finished, tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", PAIR)
    assert score.main([str(path), f"--run={finished}"]) == 0
    assert "scored by reward_flip" in capsys.readouterr().out


@pytest.mark.parametrize("argv, parts", [
    (["a.jsonl"], ("--run=FOLDER is missing",)),
    (["RUN"], ("0 files are given", "give one")),
    (["RUN", "a.jsonl", "b.jsonl"], ("2 files are given", "give one")),
    (["RUN", "--policy=sft", "a.jsonl"], ("'--policy=sft'", "--reward=NAME or --init=DIR")),
    (["RUN", "--reward=sft", "a.jsonl"], ("--reward=sft", "member_00, member_01")),
    (["RUN", "/nowhere.jsonl"], ("/nowhere.jsonl", "no such file")),
    (["--run=/nowhere", "a.jsonl"], ("/nowhere", "is not the folder of a run")),
])
def test_bad_arguments_are_one_line(finished, argv, parts, capsys):
    assert score.main([word.replace("RUN", f"--run={finished}") for word in argv]) == 2
    one_line(capsys, *parts)


def test_without_arguments_the_usage_is_printed(capsys):
    assert score.main([]) == 0
    assert "python -m tools.score --run=DIR" in capsys.readouterr().out
