"""python -m tools.score, the command; tests/test_sample.py tests the scores."""
import json

import pytest
from helpers import one_line, tiny_reward

import sample
from common import load_model
from model import RewardModel
from pretrained import export
from tokenizer import train_tokenizer
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


def test_an_exported_reward_model_gives_the_scores_of_its_run(finished, tmp_path, capsys):
    run, _, reward = sample.open_finished_run(str(finished), reward="reward_flip", scoring=True)
    export.save(tmp_path / "hf", load_model(run, RewardModel, reward), run.tokenizer)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm."}]
    answer = {"prompt": PAIR["prompt"], "response": " Hm."}
    scores = []
    for words in ([f"--run={finished}", "--reward=reward_flip"], [f"--model={tmp_path / 'hf'}"]):
        path = write(tmp_path / "mine.jsonl", PAIR, answer, {"messages": messages})
        assert score.main([*words, str(path)]) == 0
        out = tmp_path / "mine.scored.jsonl"
        scores.append([json.loads(line) for line in out.read_text().splitlines()])
        out.unlink()
    by_run, by_folder = scores
    for mine, theirs in zip(by_run, by_folder, strict=True):
        assert mine.keys() == theirs.keys()
        for column in mine:
            if column.startswith("reward"):
                assert theirs[column] == pytest.approx(mine[column], abs=1e-5)
    assert by_folder[1]["reward"] == pytest.approx(by_folder[2]["reward"], abs=1e-5)
    said = capsys.readouterr().out
    assert "3 lines, scored by " in said and "note:" not in said


def test_an_answer_that_transformers_reads_otherwise_is_noted(tmp_path, capsys):
    tokenizer = train_tokenizer([PAIR["prompt"] + "Well."] * 20, 300)
    export.save(tmp_path / "hf", tiny_reward(vocab=tokenizer.vocab_size), tokenizer)
    path = write(tmp_path / "mine.jsonl", PAIR, {"prompt": PAIR["prompt"], "response": "Well."})
    assert score.main([f"--model={tmp_path / 'hf'}", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"note: {path}: 1 of 3 answers have other tokens where prompt and answer are" in said


@pytest.mark.parametrize("words, said", [
    (["--model=/no/such/folder"], "model = '/no/such/folder': no such folder"),
    (["--run=a", "--model=b"], "--run and --model are both given"),
    (["--model=a", "--reward=b"], "--reward is of --run=FOLDER; leave it out"),
    (["--model=a", "--init=b"], "--init is of --run=FOLDER; leave it out"),
    (["--run=a", "--template=hh"], "--template is of --model=FOLDER; leave it out"),
    (["--model=b", "--template=new"], "--template=new: must be one of hh, chatml, llama3"),
])
def test_what_no_folder_can_score_is_one_line(words, said, tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", PAIR)
    assert score.main([*words, str(path)]) == 2
    one_line(capsys, said)


@pytest.mark.parametrize("argv, parts", [
    (["a.jsonl"], ("--run=FOLDER is missing",)),
    (["RUN"], ("0 files are given", "give one")),
    (["RUN", "a.jsonl", "b.jsonl"], ("2 files are given", "give one")),
    (["RUN", "--policy=sft", "a.jsonl"], ("'--policy=sft'", "--reward=NAME", "or --template=NAME")),
    (["RUN", "--reward=sft", "a.jsonl"], ("--reward=sft", "member_00, member_01")),
    (["RUN", "/nowhere.jsonl"], ("/nowhere.jsonl", "no such file")),
    (["--run=/nowhere", "a.jsonl"], ("/nowhere", "is not the folder of a run")),
])
def test_bad_arguments_are_one_line(finished, argv, parts, capsys):
    assert score.main([word.replace("RUN", f"--run={finished}") for word in argv]) == 2
    one_line(capsys, *parts)


def test_a_folder_that_takes_no_file_is_told_before_the_work(
    finished, tmp_path, capsys, monkeypatch
):
    path = write(tmp_path / f"{'x' * 245}.jsonl", PAIR)
    monkeypatch.setattr(sample, "score_rows", None)
    assert score.main([f"--run={finished}", str(path)]) == 2
    one_line(capsys, ".scored.jsonl: cannot be written (File name too long)", "put a copy of")


def test_without_arguments_the_usage_is_printed(capsys):
    assert score.main([]) == 0
    assert "python -m tools.score --run=DIR" in capsys.readouterr().out
