"""sample.py: prompts answered, files scored, bad input refused in one line."""
import gzip
import io
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import data
import sample
from helpers import ROOT, SMALL, go, one_line
from model import LanguageModel, RewardModel, sample as draw
from run import load_model, open_run, rewards_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was moved after it was made"""
    out = tmp_path_factory.mktemp("run")
    for stage in ("sft", "ensemble", "strength", "reward", "ppo"):
        assert go(out / "first", f"--stage={stage}") == 0
    (out / "first").rename(out / "moved")
    return out / "moved"


@pytest.fixture
def run(finished):
    return open_run(config.load(None, [s[2:].split("=", 1) for s in SMALL] + [("out_dir", str(finished))]))


def ask(finished, monkeypatch, text, *more):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text if isinstance(text, bytes) else text.encode()), isatty=lambda: False))
    return sample.main([f"--run={finished}", *more])



def test_every_line_is_answered_and_the_answer_scored(finished, run, monkeypatch, capsys):
    policy, reward_model = load_model(run, LanguageModel, "policy_flip"), load_model(run, RewardModel, "reward_flip")
    assert ask(finished, monkeypatch, "How are you?\n\n  Who is it? \r\n\\n\\nHuman: What?\\n\\nAssistant:\n") == 0
    out = capsys.readouterr().out
    prompts = ["\n\nHuman: How are you?\n\nAssistant:", "\n\nHuman: Who is it?\n\nAssistant:", "\n\nHuman: What?\n\nAssistant:"]
    for i, prompt in enumerate(prompts):
        text, reward, _ = sample.answer(run, policy, reward_model, prompt, i)
        tokens, end = run.encoding.encode_ordinary(prompt), run.encoding._special_tokens[data.END]
        drawn = draw(policy, [tokens], 12, end, torch.Generator().manual_seed(i), 0.8, top_p=0.9)
        reply = [t for t in drawn.tokens[0].tolist() if t not in (-1, end)]
        assert run.encoding.decode(reply) == text
        row = data.Row(np.array(tokens), (np.array([*reply, end]),))  # a reward is read at the end, also of an answer that was cut
        assert rewards_of(run, reward_model, [row]).item() == pytest.approx(reward, abs=1e-5)
    assert out.count("[reward_flip ") == 3


def test_the_same_input_gives_the_same_output_and_models_can_be_named(finished, monkeypatch, capsys):
    outs = []
    for more in ([], [], ["--policy=sft"], ["--reward=reward_baseline"], ["--reward=member_01"]):
        assert ask(finished, monkeypatch, "How are you?\n", *more) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] and len(set(outs)) == 4
    assert "[reward_baseline " in outs[3] and "[member_01 " in outs[4]


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_file_is_scored_with_a_column_more(finished, run, tmp_path, capsys):
    prompt = "\n\nHuman: How are you?\n\nAssistant:"
    path = write(tmp_path / "mine.jsonl", {"prompt": prompt, "chosen": " Well.", "rejected": " Go away.", "note": [1]},
                 {"chosen": prompt + " Well.", "rejected": prompt + " Go away."}, {"prompt": prompt, "response": " Well.", "id": "é"})
    before = path.read_bytes()
    assert sample.main([f"--run={finished}", "--reward=reward_baseline", f"--score={path}"]) == 0
    assert "mine.scored.jsonl: 3 lines, scored by reward_baseline" in capsys.readouterr().out
    assert path.read_bytes() == before
    pair, dialogue, single = (json.loads(line) for line in (tmp_path / "mine.scored.jsonl").read_text().splitlines())
    model = load_model(run, RewardModel, "reward_baseline")
    good, bad = rewards_of(run, model, [data.encode(run.encoding, prompt, (" Well.", " Go away."), 256)])[0].tolist()
    assert (pair["note"], single["id"]) == ([1], "é")
    for line in (pair, dialogue):
        assert (line["reward_chosen"], line["reward_rejected"]) == (pytest.approx(good, abs=1e-5), pytest.approx(bad, abs=1e-5))
    assert single["reward"] == pytest.approx(good, abs=1e-5) and abs(good - bad) > 1e-4


def test_a_zipped_file_is_scored_and_nothing_is_written_over(finished, tmp_path, capsys):
    path = tmp_path / "mine.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    command = [f"--run={finished}", f"--score={path}"]
    assert sample.main(command) == 0
    capsys.readouterr()
    once = (tmp_path / "mine.scored.jsonl").read_bytes()
    assert sample.main(command) == 2
    one_line(capsys, "mine.scored.jsonl", "move it away")
    assert (tmp_path / "mine.scored.jsonl").read_bytes() == once


@pytest.mark.parametrize("line, parts", [
    ('{"prompt": "a"}', ("'chosen' is missing", "prompt and response")), ('{"response": "a"}', ("'prompt' is missing",)), ("[1]", ("must be an object", "a list")),
    ('{"prompt": 1, "response": "a"}', ("'prompt' must be a string",)), ('{"prompt": "a", "response": null}', ("'response' must be a string",)), ("{", ("broken JSON",)),
    ('{"prompt": "a", "response": "b", "reward": 1}', ("'reward' already",)), (json.dumps({"prompt": "a", "response": "b " * 900}), ("longer than the context",)),
])
def test_a_bad_line_is_named_and_nothing_is_written(finished, tmp_path, capsys, line, parts):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    assert sample.main([f"--run={finished}", f"--score={path}"]) == 2
    one_line(capsys, f"{path}:2", *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("argv, parts", [
    (["--policy=sft"], ("--run=FOLDER",)), (["run=x"], ("'run=x'", "--run=FOLDER")), (["--runs=x"], ("'--runs=x'",)), (["--run="], ("'--run='",)),
    (["--run=/nowhere"], ("/nowhere", "no run's folder")), (["RUN", "--policy=policy_smooth"], ("policy_smooth", "sft, policy_flip")),
    (["RUN", "--reward=sft"], ("--reward=sft", "member_00")), (["RUN", "--score=/nowhere.jsonl"], ("/nowhere.jsonl", "no such file")),
])
def test_bad_arguments_are_one_line(finished, argv, parts, capsys):
    assert sample.main([word.replace("RUN", f"--run={finished}") for word in argv]) == 2
    one_line(capsys, *parts)


def test_input_that_is_no_text_is_one_line(finished, monkeypatch, capsys):
    assert ask(finished, monkeypatch, b"hello\n\xff\xfe\n") == 2
    one_line(capsys, "line 2 of the input", "UTF-8")


def test_a_run_without_a_reward_model_says_so(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    for path in (*(tmp_path / "run").glob("reward_*"), *(tmp_path / "run").glob("member_*")):
        path.unlink()
    assert sample.main([f"--run={tmp_path / 'run'}"]) == 2
    one_line(capsys, "no reward model", "training command")


def test_it_can_be_piped(finished):
    done = subprocess.run([sys.executable, "sample.py", f"--run={finished}"], cwd=ROOT, input="How are you?\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("[reward_flip ") == 1 and done.stderr == ""


def test_an_overlong_prompt_is_cut_not_refused(finished, monkeypatch, capsys):
    assert ask(finished, monkeypatch, "why? " * 2000 + "\n") == 0
    assert capsys.readouterr().out.count("[reward_flip ") == 1


def test_a_record_of_fewer_settings_still_opens():
    table = json.loads(json.dumps(config.as_dict(config.Config(seed=4))))
    del table["ppo"]["min_new"], table["world"]
    assert config.from_dict(table) == config.Config(seed=4)
    with pytest.raises(config.ConfigError, match="no such setting"):
        config.from_dict(table | {"ppo": {"minimal_new": 3}})
