"""python -m tools.audit: the table of some files, their layouts, errors of one line."""
import json
import subprocess
import sys

import pytest
from helpers import HH_SMALL, ROOT, go

from formats.pairs import read_pairs
from runtime.audit import audit as statistics
from tokenizer import Tokenizer
from tools import audit

PAIR = {"prompt": "Which?", "chosen": " this", "rejected": " that"}
DIALOGUE = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
    "rejected": "\n\nHuman: Hi\n\nAssistant: No",
}


def write(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_table_has_a_column_for_every_file(tmp_path, capsys):
    one = write(tmp_path / "a.jsonl", PAIR, PAIR | {"prompt": "Who?"})
    assert audit.main([one]) == 0
    head, _, pairs, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["data", "a.jsonl"]
    assert pairs.split() == ["pairs", "2"]


def test_files_of_the_same_name_are_told_apart_by_their_paths(tmp_path, capsys):
    one = write(tmp_path / "a.jsonl", PAIR, PAIR | {"prompt": "Who?"})
    two = write(tmp_path / "b" / "a.jsonl", PAIR | {"rejected": " it"})
    assert audit.main([one, two]) == 0
    printed = capsys.readouterr().out
    head, _, pairs, *_ = printed.splitlines()
    assert head.split() == ["data", one, two]
    assert pairs.split() == ["pairs", "2", "1"]
    assert f"shared by {one} and {two}: 1 first human turns, 0 pairs" in printed


def test_the_layouts_of_every_file_are_counted(tmp_path, capsys):
    mixed = write(tmp_path / "mixed.jsonl", PAIR, DIALOGUE, PAIR | {"prompt": "Who?"})
    other = DIALOGUE | {"rejected": "\n\nHuman: Hi\n\nAssistant: Go"}
    plain = write(tmp_path / "plain.jsonl", other)
    assert audit.main([mixed, plain]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layout of mixed.jsonl: explicit prompt (2), HH dialogues (1)" in lines
    assert "layout of plain.jsonl: HH dialogues (1)" in lines


def test_what_was_done_to_read_a_file_is_said_below_the_table(tmp_path, capsys):
    path = tmp_path / "a.json"
    ties = [{"prompt": "p", "response": text, "score": 1} for text in "ab"]
    path.write_text(json.dumps([PAIR, {"chosen": "a b", "rejected": "a c"}, *ties]))
    assert audit.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-5:-1] == [
        "layout of a.json: explicit prompt (1), implicit prompt (1)",
        f'data: note: {path}: prompts without "\\n\\nHuman:" are read as human turns (2)',
        f"data: note: {path}: prompts are what both texts begin with, up to a word's end (1)",
        f"data: note: {path}: ties of two answers make no pair (1)",
    ]


def test_settings_say_how_files_are_read(tmp_path, capsys):
    record = {"prompt": "p", "response_0": "a", "response_1": "bb"}
    record |= {"better_response_id": 0, "safer_response_id": 1}
    path = write(tmp_path / "a.jsonl", record)
    for words, layout, longer in (([], "better", "0"), (["--data.labels=safer"], "safer", "1")):
        assert audit.main([path, *words]) == 0
        out = capsys.readouterr().out
        assert f"layout of a.jsonl: PKU-SafeRLHF {layout} (1)" in out
        line, = (line for line in out.splitlines() if line.startswith("longer answer"))
        assert line.split()[-1][0] == longer
    assert audit.main([path, "--data.format=x"]) == 2
    assert "error: data.format = 'x': no such layout; name one of" in capsys.readouterr().err
    assert audit.main(["--data.labels=safer"]) == 2
    assert "no file is given" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b'{"chosen": "a"}\n'])
def test_a_file_that_cannot_be_audited_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    good = write(tmp_path / "good.jsonl", PAIR)
    assert audit.main([good, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {path}")
    assert err.count("\n") == 1


def test_an_address_that_cannot_be_downloaded_is_one_line(capsys):
    assert audit.main(["http://example.org/a.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: http://example.org/a.jsonl: only https://")
    assert err.count("\n") == 1


def test_it_runs_as_a_module(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR)
    command = [sys.executable, "-m", "tools.audit", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "layout of a.jsonl: explicit prompt (1)" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_without_files_the_usage_is_printed(argv, capsys):
    assert audit.main(argv) == 0
    assert "python -m tools.audit FILE" in capsys.readouterr().out


def numbered_pairs(numbers, chosen):
    records = []
    for i in numbers:
        prompt = f"\n\nHuman: question {i}?\n\nAssistant:"
        records.append({"prompt": prompt, "chosen": chosen, "rejected": f" rude {i % 7}"})
    return records


def test_the_audit_of_a_run_has_training_and_validation_apart(tmp_path):
    mine = write(tmp_path / "mine.jsonl", *numbered_pairs(range(30), " kind"))
    theirs = write(tmp_path / "theirs.jsonl", *numbered_pairs(range(20, 40), " other"))
    files = [f"--data.train={mine}", f"--data.valid={theirs}"]
    out = tmp_path / "out"
    assert go(out, *files, "--stage=sft", small=HH_SMALL) == 0
    saved = json.loads((out / "audit.json").read_text())
    tokenizer = Tokenizer.from_json((out / "encoding.json").read_text())
    assert saved["sets"] == {
        "train": statistics(read_pairs(mine), tokenizer, (96,)),
        "valid": statistics(read_pairs(theirs), tokenizer, (96,)),
    }
    assert saved["shared"] == {"train and valid": {"first human turns": 10, "pairs": 0}}
    assert [line.split(";")[0] for line in saved["findings"]] == [
        "train: the longer answer is chosen in 0.0% of 30 pairs (95 %: 0.0% to 11.4%)",
        "valid: the longer answer is chosen in 0.0% of 20 pairs (95 %: 0.0% to 16.1%)",
    ]


def opposite(record):
    return record | {"chosen": record["rejected"], "rejected": record["chosen"]}


def test_findings_are_below_the_table_and_in_the_audit_of_a_run(tmp_path, capsys):
    records = numbered_pairs(range(30), " kinder")
    mine = write(tmp_path / "mine.jsonl", *records, opposite(records[4]))
    other = write(tmp_path / "other.jsonl", *numbered_pairs(range(30, 32), " kinder"))
    assert audit.main([mine, other]) == 0
    found = f"the same pair with opposite labels: {mine}:5 against {mine}:31"
    assert f"mine.jsonl: {found}\nlayout of" in capsys.readouterr().out
    out = tmp_path / "out"
    files = [f"--data.train={mine}", f"--data.valid={other}", "--stage=sft"]
    assert go(out, *files, small=HH_SMALL) == 0
    assert json.loads((out / "audit.json").read_text())["findings"] == [f"train: {found}"]
    assert f"train: {found}\n" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The suspects of a run


def strength_record(i, mean, **more):
    record = {"prompt": f"\n\nHuman: question {i}?\n\nAssistant:", "chosen": f" yes {i}"}
    record |= {"rejected": " no", "mean": mean, "std": 0.25, "group": 0, "method": "flip"}
    return record | {"swap": False, "p": 1.0, "margin": 0.0, "source": f"my.jsonl:{i}"} | more


def test_the_suspects_of_a_run_are_shown_again(tmp_path, capsys):
    records = [strength_record(i, 1.0 - 0.5 * i) for i in range(1, 6)]
    records.append(opposite(records[1]) | {"mean": 9.0, "source": "my.jsonl:6"})
    path = write(tmp_path / "run" / "strength.jsonl", *records)
    other = write(tmp_path / "copy.jsonl", *records)
    for name, shown in ((str(tmp_path / "run"), path), (path, path), (other, other)):
        assert audit.main([name, "--show=2"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"{shown}: the 2 of 6 pairs of lowest mean strength",
            "   1. my.jsonl:5: mean -1.50, std 0.25, prompt: question 5?",
            "        chosen:   yes 5",
            "        rejected: no",
            "   2. my.jsonl:4: mean -1.00, std 0.25, prompt: question 4?",
            "        chosen:   yes 4",
            "        rejected: no",
            "pairs with opposite labels: 1",
            "  my.jsonl:2 (mean +0.00) against my.jsonl:6 (mean +9.00)",
        ]
    assert audit.main([str(tmp_path / "run")]) == 2
    assert "run: is the folder of a run; add --show=40" in capsys.readouterr().err
    assert audit.main([path, "--show=40"]) == 0
    assert f"{path}: the 6 of 6 pairs" in capsys.readouterr().out


def test_a_run_shows_what_it_has_printed(tmp_path, capsys):
    mine = write(tmp_path / "mine.jsonl", *numbered_pairs(range(30), " kind"))
    out = str(tmp_path / "out")
    assert go(out, f"--data.train={mine}", "--strength.show=7", small=HH_SMALL) == 0
    printed = capsys.readouterr().out
    assert audit.main([out, "--show=7"]) == 0
    trust, _, suspects = capsys.readouterr().out.partition(f"{out}/strength.jsonl: the 7 of ")
    suspects = suspects.partition("\n")[2]
    assert suspects.count("rejected:") == 7 and suspects in printed
    assert trust.startswith("clean: ") and trust in printed  # before any suspect


def test_how_far_to_trust_is_that_of_the_vote_that_is_shown(tmp_path, capsys):
    mine = write(tmp_path / "mine.jsonl", *numbered_pairs(range(30), " kind"))
    out = tmp_path / "out"
    words = [str(out), f"--data.train={mine}"]
    assert go(*words, small=HH_SMALL) == 0
    record = out / "stages" / "clean.json"
    of_first_vote = record.read_bytes()
    assert go(*words, "--stage=strength", "--strength.q=0.4", small=HH_SMALL) == 0
    record.write_bytes(of_first_vote)
    capsys.readouterr()
    assert audit.main([str(out), "--show=1"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("clean: trust.json is not of this vote; run train.py")
    record.unlink()
    assert audit.main([str(out), "--show=1"]) == 0
    assert "clean:" not in capsys.readouterr().out


@pytest.mark.parametrize("value", ["x", "", "-1", "0", "1.5", "\u0663", "9" * 5000])
def test_a_number_to_show_that_is_none_is_one_line(tmp_path, capsys, value):
    path = write(tmp_path / "strength.jsonl", strength_record(1, 0.5))
    assert audit.main([path, f"--show={value}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: --show=") and err.count("\n") == 1
    assert "must be a number of pairs" in err and len(err) < 200


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", PAIR)
    (tmp_path / "empty").mkdir()
    remedy = f"python train.py --config=configs/clean.toml --data.train={data} makes one"
    cases = [
        ([data], f"{data}: is no strength.jsonl of a run"), ([data], remedy),
        ([str(tmp_path / "none")], "no such run"),
        ([str(tmp_path / "empty")], "empty/strength.jsonl: no such file; run train.py"),
        ([], "--show: 0 runs are named"), ([data, data], "--show: 2 runs are named"),
    ]
    for paths, message in cases:
        assert audit.main([*paths, "--show=3"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
    assert audit.main([data, "--show"]) == 2


@pytest.mark.parametrize("line", [
    "", "{", "[1]", "7", "{}", "[" * 100_000, json.dumps(strength_record(2, None)),
    json.dumps(strength_record(2, "x")), json.dumps(strength_record(2, float("nan"))),
    json.dumps(strength_record(2, True)), json.dumps(strength_record(2, 0.5, source=3)),
    json.dumps(strength_record(2, 0.5, chosen=None)),
])
def test_a_damaged_vote_is_one_line(tmp_path, capsys, line):
    path = tmp_path / "strength.jsonl"
    path.write_text(json.dumps(strength_record(1, 0.5)) + f"\n{line}\n")
    assert audit.main([str(path), "--show=3"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}:2: is not as train.py wrote it")
    assert err.count("\n") == 1
    path.write_text("")
    assert audit.main([str(path), "--show=3"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: is not as train.py wrote it")
