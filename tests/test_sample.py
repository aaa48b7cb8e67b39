"""sample.py: prompts are answered, files are scored, bad input is refused in one line."""
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, go, one_line
from small_runs import copy_run, opened

import config
import data
import sample
from common import load_model, score_rows
from generate import Sampling, generate
from model import LanguageModel, RewardModel
from runtime.cli import run_cli

PROMPT = "\n\nHuman: How are you?\n\nAssistant:"


@pytest.fixture(scope="module")
def finished(finished, tmp_path_factory):
    """A run that is not where it was trained"""
    return copy_run(finished, tmp_path_factory.mktemp("moved"))


@pytest.fixture
def run(finished):
    return opened(finished)


def answer_lines(finished, monkeypatch, text, *more):
    """Run sample.py with this standard input -> exit code"""
    content = text if isinstance(text, bytes) else text.encode()
    stdin = SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    return sample.main([f"--run={finished}", *more])


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("line, prompt", [
    ("How are you?", PROMPT),
    ("  How are you? ", PROMPT),
    ("\\n\\nHuman: How are you?\\n\\nAssistant:", PROMPT),
    (PROMPT, PROMPT),
    ("a\\nb", "\n\nHuman: a\\nb\n\nAssistant:"),  # stays two characters where HH's form is absent
])
def test_a_line_becomes_a_prompt(line, prompt):
    assert sample.wrap_prompt(line) == prompt


def test_every_line_is_answered_and_the_answer_scored(finished, run, monkeypatch, capsys):
    policy = load_model(run, LanguageModel, "policy_flip")
    reward_model = load_model(run, RewardModel, "reward_flip")
    lines = "How are you?\n\n  Who is it? \r\n\\n\\nHuman: What?\\n\\nAssistant:\n"
    assert answer_lines(finished, monkeypatch, lines) == 0
    printed = capsys.readouterr().out
    assert printed.count("[reward_flip ") == 3

    eos_id = run.tokenizer.eos_id
    sampling = Sampling(12, eos_id, temperature=0.8, top_p=0.9)
    for i, question in enumerate(("How are you?", "Who is it?", "What?")):
        prompt = f"\n\nHuman: {question}\n\nAssistant:"
        text, reward, ended = sample.answer_prompt(run, policy, reward_model, prompt, i)
        tokens = run.tokenizer.encode_text(prompt)
        generator = torch.Generator().manual_seed(i)
        generation = generate(policy, [tokens], sampling, generator)
        answer = [t for t in generation.tokens[0].tolist() if t not in (-1, eos_id)]
        assert run.tokenizer.decode(answer) == text
        assert ended == bool(generation.ended)
        # the reward is computed at EOS, also for an answer that was cut
        row = data.Row(np.array(tokens), (np.array([*answer, eos_id]),))
        assert score_rows(run, reward_model, [row]).item() == pytest.approx(reward, abs=1e-5)
        cut = "" if ended else " …"
        assert f"{text.strip()}{cut}\n[reward_flip {reward:+.3f}]\n" in printed


def test_the_same_input_gives_the_same_output_and_models_can_be_named(
        finished, monkeypatch, capsys):
    outs = []
    for more in ([], [], ["--policy=sft"], ["--reward=reward_baseline"], ["--reward=member_01"]):
        assert answer_lines(finished, monkeypatch, "How are you?\n", *more) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    assert len(set(outs)) == 4
    assert "[reward_baseline " in outs[3]
    assert "[member_01 " in outs[4]


@pytest.mark.parametrize("policies, methods, expected", [
    (["sft"], ["flip"], "sft"),
    (["policy_soft", "policy_flip", "sft"], ["flip", "soft"], "policy_soft"),
    (["policy_flip", "policy_meta_1"], ["soft"], "policy_meta_1"),
])
def test_the_default_policy_is_that_of_the_last_method(policies, methods, expected):
    assert sample.default_policy(policies, methods) == expected


@pytest.mark.parametrize("policy, expected", [
    ("policy_flip", "reward_flip"), ("policy_meta_1", "meta_1"), ("sft", "reward_soft"),
])
def test_the_default_reward_model_is_the_policys_own_or_the_newest(policy, expected):
    models = ["meta_1", "member_00", "reward_flip", "reward_soft"]
    assert sample.default_reward(models, policy, models) == expected


def test_a_deleted_reward_model_is_no_reason_to_take_another(finished, tmp_path, capsys):
    out = copy_run(finished, tmp_path / "run")
    (out / "reward_flip.pt").unlink()
    assert sample.main([f"--run={out}", "--score=x.jsonl"]) == 2
    one_line(capsys, "reward_flip.pt: no such file", "run the training command again")


def test_a_run_whose_policies_are_deleted_still_scores(finished, tmp_path):
    out = copy_run(finished, tmp_path / "run")
    for path in (*out.glob("policy_*.pt"), out / "sft.pt"):
        path.unlink()
    _, _, name = sample.open_finished_run(str(out), reward="reward_flip", scoring=True)
    assert name == "reward_flip"


def test_a_base_that_has_moved_is_asked_for(finished, tmp_path):
    with pytest.raises(config.ConfigError, match="no such folder.*name its folder with --init=DIR"):
        sample.check_base("out/run", str(tmp_path / "gone"))


def test_models_trained_on_planted_flips_are_never_taken(finished, tmp_path):
    out = copy_run(finished, tmp_path / "run")
    for file in ("member_00.pt", "stages/member_00.json"):
        planted = out / file.replace("member_00", "planted_0_00")
        planted.write_bytes((out / file).read_bytes())  # the newest of all
    _, _, reward = sample.open_finished_run(str(out), scoring=True)
    assert not reward.startswith("planted")


def test_input_that_is_not_text_is_one_line(finished, monkeypatch, capsys):
    assert answer_lines(finished, monkeypatch, b"hello\n\xff\xfe\n") == 2
    one_line(capsys, "line 2 of the input", "UTF-8")


def test_an_overlong_prompt_is_cut_not_refused(finished, monkeypatch, capsys):
    assert answer_lines(finished, monkeypatch, "why? " * 2000 + "\n") == 0
    assert capsys.readouterr().out.count("[reward_flip ") == 1


def test_input_can_be_piped(finished):
    done = subprocess.run(
        [sys.executable, "sample.py", f"--run={finished}"], cwd=ROOT, input="How are you?\n",
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.count("[reward_flip ") == 1
    assert done.stderr == ""


# --------------------------------------------------------------------------------------------------
# Scores


def test_a_file_is_scored_in_new_columns(finished, run, tmp_path, capsys):
    pair = {"prompt": PROMPT, "chosen": " Well.", "rejected": " Go away.", "note": [1]}
    dialogue = {"chosen": PROMPT + " Well.", "rejected": PROMPT + " Go away."}
    single = {"prompt": PROMPT, "response": " Well.", "id": "é"}
    path = write(tmp_path / "mine.jsonl", pair, dialogue, single)
    before = path.read_bytes()
    command = [f"--run={finished}", "--reward=reward_baseline", f"--score={path}"]
    assert sample.main(command) == 0
    assert "mine.scored.jsonl: 3 lines, scored by reward_baseline" in capsys.readouterr().out
    assert path.read_bytes() == before

    lines = (tmp_path / "mine.scored.jsonl").read_text().splitlines()
    scored = [json.loads(line) for line in lines]
    model = load_model(run, RewardModel, "reward_baseline")
    row = data.encode_row(run.tokenizer, PROMPT, (" Well.", " Go away."), 256)
    good, bad = score_rows(run, model, [row])[0].tolist()
    assert abs(good - bad) > 1e-4
    both = {
        "reward_chosen": pytest.approx(good, abs=1e-5),
        "reward_rejected": pytest.approx(bad, abs=1e-5),
    }
    alone = {"reward": pytest.approx(good, abs=1e-5)}
    assert scored == [pair | both, dialogue | both, single | alone]


def test_every_layout_of_one_pair_a_line_is_scored(finished, run, tmp_path):
    """A bare prompt and its answers are read as in training."""
    turn = "\n\nHuman: Hi\n\nAssistant:"
    user = {"role": "user", "content": "Hi"}
    records = [
        {"prompt": turn, "chosen": " Well.", "rejected": " Go away."},
        {"prompt": "Hi", "chosen": "Well.", "rejected": "Go away."},
        {"prompt": [user], "chosen": [{"role": "assistant", "content": "Well."}],
         "rejected": [{"role": "assistant", "content": "Go away."}]},
        {"prompt": "Hi", "response_1": "Go away.", "response_2": "Well.", "preference_strength": 1},
        {"prompt": "Hi", "response": "Well.", "score": 3},
        {"messages": [user, {"role": "assistant", "content": "Well."}]},
    ]
    path = write(tmp_path / "mine.jsonl", *records)
    array = tmp_path / "array.json"
    array.write_text(json.dumps(records, indent=1))
    for file in (path, array):
        assert sample.main([f"--run={finished}", f"--score={file}"]) == 0
    text = (tmp_path / "mine.scored.jsonl").read_text()
    assert text == (tmp_path / "array.json.scored.jsonl").read_text()
    scored = [json.loads(line) for line in text.splitlines()]
    first = scored[0]["reward_chosen"], scored[0]["reward_rejected"]
    for line, record in zip(scored[:4], records):
        assert (line["reward_chosen"], line["reward_rejected"]) == pytest.approx(first, abs=1e-5)
        assert list(line)[:-2] == list(record)
    for line in scored[4:]:
        assert line["reward"] == pytest.approx(first[0], abs=1e-5)


def test_a_compressed_file_is_scored_and_nothing_is_overwritten(finished, tmp_path, capsys):
    path = tmp_path / "mine.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    command = [f"--run={finished}", f"--score={path}"]
    assert sample.main(command) == 0
    capsys.readouterr()
    before = (tmp_path / "mine.scored.jsonl").read_bytes()
    assert sample.main(command) == 2
    one_line(capsys, "mine.scored.jsonl", "move it away")
    assert (tmp_path / "mine.scored.jsonl").read_bytes() == before


@pytest.mark.parametrize("line, parts", [
    ('{"prompt": "a"}', ("'chosen' is missing", "prompt and response")),
    ('{"response": "a"}', ("'prompt' is missing",)),
    ("[1]", ("must be an object", "a list")),
    ('{"prompt": 1, "response": "a"}', ("'prompt' must be a string",)),
    ('{"messages": [{"role": "user", "content": "a"}]}', ("must be the assistant's",)),
    ('{"messages": []}', ("must be the assistant's",)),
    ('{"messages": "a"}', ("'messages' must be a list of messages",)),
    ('{"prompt": "a", "response": null}', ("'response' must be a string",)),
    ("{", ("broken JSON",)),
    ('{"prompt": "a", "response": "b", "reward": 1}', ("'reward' already",)),
    ('{"prompt": "a", "chosen": ["b"], "rejected": ["c", "d"]}', ("makes 2 pairs", "remove it")),
    (json.dumps({"prompt": "a", "response": "b " * 900}),
     ("longer than the context", "; shorten the response or remove the line")),
])
def test_a_bad_line_is_named_and_nothing_is_written(finished, tmp_path, capsys, line, parts):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    assert sample.main([f"--run={finished}", f"--score={path}"]) == 2
    one_line(capsys, f"{path}:2", *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("change, part", [
    ({"note": "\ud800"}, "half of a surrogate pair"),
    ({"note": {"\udfff": 1}}, "half of a surrogate pair"),
    ({"note": [float("nan")]}, "the number nan cannot be written"),
    ({"note": json.loads("[" * 300 + "]" * 300)}, "nested more than 100 levels"),
])
def test_a_column_that_cannot_be_written_back_is_refused_before_scoring(
        finished, tmp_path, capsys, change, part):
    record = {"prompt": "a", "response": "b"}
    path = write(tmp_path / "bad.jsonl", record, record | change)
    assert sample.main([f"--run={finished}", f"--score={path}"]) == 2
    one_line(capsys, f"{path}:2", part)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_an_address_has_no_place_for_scores(finished, capsys):
    assert sample.main([f"--run={finished}", "--score=https://u:hunter2@host/a.jsonl"]) == 2
    line = one_line(capsys, "https://***@host/a.jsonl", "by hand")
    assert "hunter2" not in line


# --------------------------------------------------------------------------------------------------
# Arguments, runs that are not complete, records of other versions


@pytest.mark.parametrize("argv, parts", [
    (["--policy=sft"], ("--run=FOLDER",)),
    (["run=x"], ("'run=x'", "--run=FOLDER")),
    (["--runs=x"], ("'--runs=x'",)),
    (["--run="], ("'--run='",)),
    (["--run=/nowhere"], ("/nowhere", "is not the folder of a run")),
    (["RUN", "--policy=policy_smooth"], ("policy_smooth", "sft, policy_flip")),
    (["RUN", "--reward=sft"], ("--reward=sft", "member_00")),
    (["RUN", "--score=/nowhere.jsonl"], ("/nowhere.jsonl", "no such file")),
])
def test_bad_arguments_are_one_line(finished, argv, parts, capsys):
    assert sample.main([word.replace("RUN", f"--run={finished}") for word in argv]) == 2
    one_line(capsys, *parts)


def test_a_run_without_a_reward_model_is_one_line(finished, tmp_path, capsys):
    copy = copy_run(finished, tmp_path / "run")
    for path in (*copy.glob("reward_*"), *copy.glob("member_*")):
        path.unlink()
    assert sample.main([f"--run={copy}"]) == 2
    one_line(capsys, "no reward model", "training command")


def as_older_version(folder):
    """Rewrite the records as versions did that noted nothing of the outputs."""
    for path in (folder / "stages").glob("*.json"):
        record = json.loads(path.read_text())
        del record["outputs"], record["checksum"]
        path.write_text(json.dumps(record))


@pytest.mark.parametrize("config_of_record, part", [
    (None, "it has no configuration"),
    ([], "it has no configuration"),
    ({"seed": "x"}, "seed = 'x': must be a whole number"),
    ({"ppo": {"methods": 3}}, "ppo.methods = 3: must be a list of texts"),
])
def test_a_record_without_its_configuration_is_named(
        finished, tmp_path, capsys, config_of_record, part):
    copy = copy_run(finished, tmp_path / "run")
    path = copy / "stages" / "policy_flip.json"
    as_older_version(copy)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": config_of_record}))
    assert sample.main([f"--run={copy}", "--policy=policy_flip"]) == 2
    one_line(capsys, f"{path}: {part}", "delete it and run the training command again")


@pytest.mark.parametrize("name, other, kind", [
    ("reward_flip", "sft", "RewardModel"),
    ("policy_flip", "reward_flip", "LanguageModel"),
    ("reward_flip", "gaps", "RewardModel"),
])
def test_a_model_replaced_by_another_file_is_named(
        finished, tmp_path, monkeypatch, capsys, name, other, kind):
    copy = copy_run(finished, tmp_path / "run")
    as_older_version(copy)
    shutil.copy(copy / f"{other}.pt", copy / f"{name}.pt")
    assert answer_lines(copy, monkeypatch, "Hello\n") == 2
    one_line(capsys, f"{name}.pt: holds no {kind}", "delete it and run the training command again")


@pytest.mark.parametrize("name", ["encoding.json", "reward_flip.pt"])
def test_a_pipe_in_place_of_a_file_of_the_run_is_not_waited_for(finished, tmp_path, capsys, name):
    copy = copy_run(finished, tmp_path / "run")
    (copy / name).unlink()
    os.mkfifo(copy / name)
    os.mkfifo(copy / "stages" / "policy_soft.json")
    path = write(tmp_path / "mine.jsonl", {"prompt": "a", "response": "b"})
    assert sample.main([f"--run={copy}", f"--score={path}"]) == 2
    one_line(capsys, f"{name}: is a pipe or a device", "run the training command again")


@pytest.mark.parametrize("name", ["a\udcff", "a\nb", "a\0b", "x" * 5000])
def test_a_folder_of_any_name_that_is_no_run_is_one_line(tmp_path, name, capsys):
    assert sample.main([f"--run={tmp_path}/{name}"]) == 2
    one_line(capsys, "is not the folder of a run")


def test_a_run_in_a_folder_that_no_record_can_name_is_one_line(finished, tmp_path, capsys):
    copy = copy_run(finished, tmp_path / "a\udcff")
    assert sample.main([f"--run={copy}"]) == 2
    one_line(capsys, "out_dir = ", "is not valid UTF-8; rename")


# --------------------------------------------------------------------------------------------------
# The frame of the command


@pytest.mark.parametrize("error, part", [
    (PermissionError(13, "Permission denied", "a.jsonl"), "a.jsonl: Permission denied; check"),
    (OSError("a.pt: holds nothing; delete it"), "error: a.pt: holds nothing; delete it\n"),
    (data.DataError("a\nb: broken"), "a\\nb: broken"),
    (MemoryError(), "the memory is full; close other programs"),
    (torch.OutOfMemoryError("CUDA"), "the memory is full"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the memory is full"),
])
def test_an_error_of_the_user_is_one_line(error, part, capsys):
    def work():
        raise error

    assert run_cli(work, trains=False) == 2
    one_line(capsys, part)


def test_another_error_keeps_its_traceback():
    def work():
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        run_cli(work, trains=False)


def test_a_terminal_without_the_characters_of_the_data_is_no_error(tmp_path):
    path = write(tmp_path / "naïve 北京.jsonl", {"prompt": "é", "chosen": "…", "rejected": "b"})
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.audit", str(path)], cwd=ROOT, capture_output=True,
        env=environment, timeout=120)
    assert done.returncode == 0 and done.stderr == b""
    assert b"na\\xefve \\u5317\\u4eac.jsonl" in done.stdout


def test_a_record_without_some_settings_is_read_with_their_defaults():
    table = json.loads(json.dumps(config.as_dict(config.Config(seed=4))))
    del table["ppo"]["min_new_tokens"], table["world"]
    assert config.from_dict(table) == config.Config(seed=4)
    with pytest.raises(config.ConfigError, match="no such setting"):
        config.from_dict(table | {"ppo": {"minimal_new": 3}})


def test_a_record_under_the_old_names_of_settings_opens(finished, tmp_path, monkeypatch, capsys):
    """Old records name ppo.kl_coef "kl", and so on; the answers are the same."""
    assert answer_lines(finished, monkeypatch, "How are you?\n") == 0
    expected = capsys.readouterr().out
    copy = copy_run(finished, tmp_path / "run")
    record_path = copy / "stages" / "policy_flip.json"
    record = json.loads(record_path.read_text())
    sections = record["config"]
    for old, new in config.RENAMED.items():
        section, old_field = old.split(".")
        new_section, new_field = new.split(".")
        if old in config.RENAMED.values():
            continue  # the name of another setting today
        sections[section][old_field] = sections[new_section].pop(new_field)
    del record["outputs"], record["checksum"]  # which old records do not have
    record_path.write_text(json.dumps(record))
    assert answer_lines(copy, monkeypatch, "How are you?\n") == 0
    assert capsys.readouterr().out == expected


def test_scoring_uses_the_settings_of_the_reward_model(finished):
    _, policy, reward = sample.open_finished_run(str(finished), reward="member_00", scoring=True)
    assert (policy, reward) == ("policy_flip", "member_00")
    run, _, _ = sample.open_finished_run(str(finished))
    assert run.cfg.out_dir == str(finished)
    assert run.cfg.ppo.methods == ("flip",)


def test_a_model_is_not_given_another_tokenizer(finished, tmp_path, monkeypatch, capsys):
    """An interrupted change of settings leaves one that was made after the model."""
    out = copy_run(finished, tmp_path / "run")
    assert go(out, "--seed=5", "--stage=sft") == 0
    capsys.readouterr()
    assert answer_lines(out, monkeypatch, "Hi\n", "--policy=policy_flip") == 2
    assert "policy_flip was trained with another tokenizer" in capsys.readouterr().err
    assert answer_lines(out, monkeypatch, "Hi\n", "--policy=sft", "--reward=reward_flip") == 2
    assert "reward_flip was trained with another tokenizer" in capsys.readouterr().err
