"""Labels of a user's file: voters that were not trained on the pair, the cleaned file, its audit,
and a warning where the vote is worth nothing."""
import hashlib
import json
import random
import warnings

import numpy as np
import pytest
import torch
from helpers import HH_SMALL, ROOT, go, one_line, same, tensors
from small_runs import opened, read_lines

import train
from common import reward_diffs
from data import Pair, assign_folds
from formats.pairs import read_pairs
from losses import bradley_terry
from runtime import files
from runtime.audit import audit
from runtime.vote_files import print_suspects, shorten_answers
from strength import VERDICTS, verdicts
from tokenizer import Tokenizer

VOTE = [word for word in HH_SMALL if "ppo" not in word and "valid_share" not in word]
VOTE += ["--data.valid_share=0", "--reward.methods=", "--ppo.methods="]
FOLDS = [  # without SFT, only the members read labels
    *VOTE, "--ensemble.members=4", "--ensemble.folds=2", "--sft.epochs=0",
]
CLEAN = [
    f"--config={ROOT}/configs/clean.toml", *VOTE, "--ensemble.members=4", "--ensemble.folds=2",
    "--ensemble.epochs=6", "--ensemble.lr=1e-2", "--strength.show=4", "--model.dropout=0",
    "--evaluate.bootstrap=200",
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def turned(record):
    """The pair with the opposite label"""
    return record | {"chosen": record["rejected"], "rejected": record["chosen"]}


def labelled(n, wrong=()):
    """n pairs: the kind answer is better than the rude one, which is as long.

    wrong: numbers of the pairs whose label says the opposite
    """
    rng = random.Random(0)
    records = []
    for i in range(n):
        record = {
            "prompt": f"\n\nHuman: question {i}?\n\nAssistant:",
            "chosen": f" kind {rng.randrange(9)}",
            "rejected": f" rude {rng.randrange(9)}",
        }
        records.append(turned(record) if i in wrong else record)
    return records


def vote_on(path, out):
    """The stages up to the vote on a file"""
    for stage in ("sft", "ensemble", "strength"):
        assert go(out, f"--data.train={path}", f"--stage={stage}", small=FOLDS) == 0


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A folder with mine.jsonl, 50 pairs, and the vote on it in out/"""
    folder = tmp_path_factory.mktemp("folds")
    vote_on(write(folder / "mine.jsonl", labelled(50)), folder / "out")
    return folder


# ----------------------------------------------------------------------------------------------
# Folds


def test_a_pair_is_scored_by_the_members_that_leave_its_fold_out(folded):
    run = opened(folded / "out", f"--data.train={folded}/mine.jsonl", small=FOLDS)
    names = [f"member_{m:02d}" for m in range(4)]
    by_member = torch.stack([reward_diffs(run, name, run.train.rows) for name in names])
    fold = assign_folds(run.train.pairs, 2, 0)
    diffs = files.load_tensors(folded / "out" / "gaps.pt")["train"]
    assert diffs.shape == (2, 50) and 0 < fold.sum() < 50
    for i, f in enumerate(fold):
        torch.testing.assert_close(diffs[:, i], by_member[[f, 2 + f], i])
    mean = [line["mean"] for line in read_lines(folded / "out" / "strength.jsonl")]
    np.testing.assert_allclose(mean, diffs.mean(0), rtol=1e-5)


def test_a_member_does_not_know_the_labels_of_the_fold_it_leaves_out(folded, tmp_path):
    """With opposite labels in fold 0, members 0 and 2, which leave it out, have the same bits, and
    their vote on it is the opposite."""
    records = read_lines(folded / "mine.jsonl")
    fold = assign_folds(read_pairs(folded / "mine.jsonl"), 2, 0)
    opposite = [turned(r) if f == 0 else r for r, f in zip(records, fold)]
    out = tmp_path / "out"
    vote_on(write(tmp_path / "mine.jsonl", opposite), out)
    names = ["sft", *(f"member_{m:02d}" for m in range(4))]
    equal = {name: same(tensors(folded / "out", name), tensors(out, name)) for name in names}
    assert equal == {
        "sft": True, "member_00": True, "member_01": False, "member_02": True, "member_03": False,
    }
    before = files.load_tensors(folded / "out" / "gaps.pt")["train"]
    after = files.load_tensors(out / "gaps.pt")["train"]
    torch.testing.assert_close(after[:, fold == 0], -before[:, fold == 0])
    assert not torch.allclose(after[:, fold == 1], before[:, fold == 1], atol=1e-3)


def same_prompt(records):
    return [record | {"prompt": "\n\nHuman: the same\n\nAssistant:"} for record in records]


def test_with_fewer_prompts_than_folds_the_folds_are_made_by_pair(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", same_prompt(labelled(12)))
    out = tmp_path / "out"
    vote_on(path, out)
    assert "fewer first human turns than ensemble.folds = 2; folds are made by pair" in (
        capsys.readouterr().out)
    pairs = read_pairs(path)
    fold = assign_folds(pairs, 2, 0, "pair")
    of_texts = {}
    for pair, f in zip(pairs, fold):
        assert of_texts.setdefault((pair.chosen, pair.rejected), f) == f
    diffs = files.load_tensors(out / "gaps.pt")
    assert diffs["train"].shape == (2, 12) and 0 < fold.sum() < 12


def test_more_folds_than_pairs_are_refused_before_training(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", labelled(12)[:1] * 3)
    assert go(tmp_path / "out", f"--data.train={path}", small=FOLDS) == 2
    one_line(capsys, f"{path}:1: 1 different pairs cannot make 2 folds; lower ensemble.folds")
    assert not list(tmp_path.rglob("*.pt"))


# ----------------------------------------------------------------------------------------------
# The cleaned file


def cleaned(folder, method, *more):
    """-> lines of strength.jsonl and of cleaned.jsonl under a treatment"""
    words = [f"--data.train={folder}/mine.jsonl", f"--strength.method={method}", *more]
    out = folder / "out"
    assert go(out, *words, "--stage=strength", small=FOLDS) == 0
    return read_lines(out / "strength.jsonl"), read_lines(out / "cleaned.jsonl")


def lowest(lines, share):
    """Numbers of the pairs of lowest mean strength"""
    order = sorted(range(len(lines)), key=lambda i: lines[i]["mean"])
    return set(order[:round(share * len(lines))])


@pytest.mark.parametrize("method", ["flip_margin", "margin", "drop", "flip", "baseline"])
def test_the_cleaned_file_is_the_file_as_treated(folded, method):
    records = read_lines(folded / "mine.jsonl")
    lines, out = cleaned(folded, method, "--strength.q=0.2")
    low = lowest(lines, 0.2)
    assert len(low) == 10
    expected = []
    for i, (record, line) in enumerate(zip(records, lines, strict=True)):
        if method == "drop" and i in low:
            continue
        swap = method.startswith("flip") and i in low
        treated = dict(turned(record) if swap else record)
        if "margin" in method:
            treated["margin"] = -line["mean"] if swap else line["mean"]
        treated["nanoreward_source"] = line["source"]
        treated["nanoreward_changed"] = "exchanged" if swap else "kept"
        expected.append(treated)
    assert out == expected  # these keys, in this order of lines
    if "margin" in method:
        assert [line["margin"] for line in lines] == [line["margin"] for line in out]
    assert sum(line["p"] is None for line in lines) == 50 - len(out)


def test_the_cleaned_file_is_read_again(folded):
    cleaned(folded, "flip_margin")
    path = folded / "out" / "cleaned.jsonl"
    pairs = [(pair.prompt, pair.margin) for pair in read_pairs(path)]
    assert pairs == [(line["prompt"], line["margin"]) for line in read_lines(path)]


def byte_tokenizer():
    """A transformers tokenizer with a token for each byte, and <end>"""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>"
    )


def test_trl_trains_on_the_cleaned_file_as_it_is(folded, tmp_path, monkeypatch):
    """Prompt and answer are joined without a seam, margins arrive, and TRL's loss is ours."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("trl", "transformers", "datasets", "tokenizers"):
        pytest.importorskip(name)
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    cleaned(folded, "flip_margin")
    path = folded / "out" / "cleaned.jsonl"
    records = read_lines(path)
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert dataset.to_list() == records
    tokenizer = byte_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )
    args = RewardConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, use_cpu=True,
        bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )
    trainer = RewardTrainer(
        LlamaForSequenceClassification(shape), args=args, train_dataset=dataset,
        processing_class=tokenizer,
    )

    def tokens(text):
        letters = text.replace("\n", "Ċ").replace(" ", "Ġ")
        return tokenizer.convert_tokens_to_ids([*letters, "<end>"])

    for side in ("chosen", "rejected"):
        expected = [tokens(record["prompt"] + record[side]) for record in records]
        assert trainer.train_dataset[f"{side}_ids"][:] == expected
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        theirs, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    margin = torch.tensor([record["margin"] for record in records[:8]])
    ours = bradley_terry(*outputs.logits.squeeze(-1).chunk(2), margin=margin)
    torch.testing.assert_close(theirs, ours.mean())
    trainer.train()
    assert trainer.state.global_step == 2


# ----------------------------------------------------------------------------------------------
# configs/clean.toml on a small file

WRONG = (7, 20, 33, 46)


def run_clean(folder, records, *more):
    """-> results.json"""
    path = write(folder / "mine.jsonl", records)
    assert go(folder / "out", f"--data.train={path}", *more, small=CLEAN) == 0
    return json.loads((folder / "out" / "results.json").read_text())


def test_a_file_is_cleaned_and_the_wrong_labels_are_named(tmp_path, capsys):
    words = ["--strength.q=0.0667", "--clean.tests=0", "--strength.method=flip_margin"]
    results = run_clean(tmp_path, labelled(60, wrong=WRONG), *words)
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    models = {path.name for path in out.glob("*.pt")}
    assert models == {"sft.pt", "gaps.pt", *(f"member_0{m}.pt" for m in range(4))}
    assert results["reward"] == results["policy"] == {}
    assert list(results["vote"]) == ["folds held out"]

    vote = results["vote"]["folds held out"]
    lines = read_lines(out / "strength.jsonl")
    assert vote["pairs"] == 60 and vote["longer_wins"] == 0.5
    accuracy = np.mean([line["mean"] > 0 for line in lines])
    assert vote["accuracy"] == pytest.approx(accuracy) and vote["accuracy"] > 0.85
    assert "vote on folds held out" in printed and "warning" not in printed

    mean = torch.tensor([line["mean"] for line in lines])
    std = torch.tensor([line["std"] for line in lines])
    counts = verdicts(mean, std).bincount(minlength=3).tolist()
    summary = ", ".join(f"{n} are {name}" for n, name in zip(counts, VERDICTS))
    assert f"strength: of 60 labels {summary}" in printed
    source = f" {tmp_path}/mine.jsonl:"
    suspects = [line.split(":")[1] for line in printed.splitlines() if source in line]
    assert len(suspects) == 4
    assert {int(n) - 1 for n in suspects} == set(WRONG) == lowest(lines, 0.0667)
    kinds = [line["chosen"].split()[0] for line in read_lines(out / "cleaned.jsonl")]
    assert kinds == ["kind"] * 60  # all four corrected

    table = json.loads((out / "audit.json").read_text())
    assert results["audit"] == table
    assert list(table["sets"]) == ["train"] and table["shared"] == {}
    counted = table["sets"]["train"]
    assert counted["pairs"] == counted["different first human turns"] == 60
    assert printed.count("longer answer chosen") == 1
    words.append(f"--data.train={tmp_path}/mine.jsonl")
    assert go(out, *words, small=CLEAN) == 0
    printed = capsys.readouterr().out
    assert "longer answer chosen" in printed  # the audit is printed each time
    assert "strength: up to date" in printed and "clean: no self-test" in printed


def test_too_few_pairs_that_are_kept_are_an_error_before_the_training(tmp_path, capsys):
    records = labelled(45)
    for record in records[:10]:
        record["rejected"] = record["chosen"]  # such a pair is dropped
    path = write(tmp_path / "mine.jsonl", records)
    assert go(tmp_path / "out", f"--data.train={path}", small=CLEAN) == 2
    assert "35 pairs are too few to test the voters on 1 copies" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.pt"))


def test_decisions_that_are_not_there_are_an_error_for_a_finished_run_too(tmp_path, capsys):
    run_clean(tmp_path, labelled(20), "--clean.tests=0")
    words = [f"--data.train={tmp_path / 'mine.jsonl'}", "--clean.tests=0"]
    words.append(f"--data.decisions={tmp_path / 'decisoins.jsonl'}")
    assert go(tmp_path / "out", *words, small=CLEAN) == 2
    assert "decisoins.jsonl: no such file; name the decisions" in capsys.readouterr().err


def test_other_answers_to_learn_from_are_another_language_model(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", labelled(20))
    words = [f"--data.train={path}", "--stage=sft", "--clean.tests=0"]
    assert go(tmp_path / "out", *words, "--sft.answers=chosen", small=CLEAN) == 0
    of_chosen = (tmp_path / "out" / "sft.pt").read_bytes()
    capsys.readouterr()
    assert go(tmp_path / "out", *words, small=CLEAN) == 0
    assert "sft: again: sft.answers was 'chosen', is 'both'" in capsys.readouterr().out
    assert (tmp_path / "out" / "sft.pt").read_bytes() != of_chosen


def labelled_well(n, wrong=()):
    """As `labelled`, but with lengths that say nothing, and many different answers"""
    records = labelled(n, wrong)
    for i, record in enumerate(records):
        extra = " so" * (i % 3)
        side = "chosen" if i % 2 else "rejected"
        records[i] = record | {side: record[side] + extra}
    return records


def test_the_self_test_lets_the_wrong_labels_be_dropped(tmp_path, capsys):
    wrong = tuple(range(3, 200, 8))
    results = run_clean(tmp_path, labelled_well(200, wrong), "--clean.tests=5")
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    # a copy's flips are all that its members differ by from those of the given labels
    assert not same(tensors(out, "planted_4_03"), tensors(out, "member_03"))
    found = json.loads((out / "trust.json").read_text())
    assert results["trust"] == found
    assert found["self_test"]["finds_flips"] and found["self_test"]["auroc"]["vote"]["low"] > 0.8
    assert found["self_test"]["flips"] == 100
    share = found["share_wrong"]
    assert share["low"] <= len(wrong) / 200 <= share["high"]
    cleaned_out = read_lines(out / "cleaned.jsonl")
    kept = {int(line["nanoreward_source"].rpartition(":")[2]) - 1 for line in cleaned_out}
    dropped = set(range(200)) - kept
    assert dropped and len(dropped & set(wrong)) > len(dropped) / 2
    assert found["actions"] == {"keep": len(kept), "drop": len(dropped), "exchange": 0}
    issues = (out / "issues.csv").read_text()
    assert issues.count(",drop,") == len(dropped)
    before_suspects = printed.index("clean: self-test: 100 labels were flipped on copies")
    assert before_suspects < printed.index("\n   1. ")
    assert "suspected wrong" not in printed  # a count of its own, by the std of the voters
    page = (out / "report.html").read_text()
    assert "How far to trust the suspects" in page and "mine.jsonl:4" in page
    assert "different first human turns" in page  # the audit


def test_decisions_of_a_person_beat_the_vote_and_train_nothing(tmp_path, capsys):
    records = labelled_well(80, wrong=(3, 23))
    run_clean(tmp_path, records)
    out = tmp_path / "out"
    trained = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    from labels.outputs import pair_digest
    pairs = read_pairs(tmp_path / "mine.jsonl")
    decisions = [(pairs[i].source, pair_digest(pairs[i]), word)
                 for i, word in ((3, "right"), (10, "wrong"), (11, "unsure"))]
    decisions.append(("mine.jsonl:999", "0" * 16, "wrong"))
    path = write(tmp_path / "decisions.jsonl", [
        dict(zip(("source", "key", "decision"), decision)) for decision in decisions])
    capsys.readouterr()
    run_clean(tmp_path, records, f"--data.decisions={path}")
    assert "1 of 4 decisions" in capsys.readouterr().out
    kept = {int(line["nanoreward_source"].rpartition(":")[2]) - 1
            for line in read_lines(out / "cleaned.jsonl")}
    assert 3 in kept and 10 not in kept
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")} == trained
    run_clean(tmp_path, records, "--clean.action=keep")
    note = f"clean: note: your decisions in {path} are not used; add --data.decisions={path}"
    assert note in capsys.readouterr().out
    run_clean(tmp_path, records, f"--data.decisions={path}", "--clean.action=exchange")
    assert "are not used" not in capsys.readouterr().out
    changed = {int(line["nanoreward_source"].rpartition(":")[2]) - 1: line
               for line in read_lines(out / "cleaned.jsonl")}
    assert changed[10]["nanoreward_changed"] == "exchanged"
    assert changed[10]["chosen"] == records[10]["rejected"]


def test_the_margins_of_the_file_enter_the_loss_if_asked(tmp_path, capsys):
    records = [record | {"margin": i % 3 - 1} for i, record in enumerate(labelled(40))]
    path = write(tmp_path / "mine.jsonl", records)
    words = [f"--data.train={path}", "--data.valid_share=0.3", "--reward.methods=given"]
    assert go(tmp_path / "out", *words, small=FOLDS) == 0
    run = opened(tmp_path / "out", *words, small=FOLDS)
    swap, p, margin = train.treated_labels(run, "given")
    assert margin.tolist() == [pair.margin for pair in run.train.pairs]
    assert not swap.any() and (p == 1).all() and set(margin.tolist()) == {-1.0, 0.0, 1.0}
    without = write(tmp_path / "without.jsonl", labelled(40))
    words[0] = f"--data.train={without}"
    assert go(tmp_path / "other", *words, small=FOLDS) == 2
    one_line(capsys, "reward.methods = 'given': no pair of the data has a number margin")


def test_a_missing_file_of_decisions_is_refused_before_training(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", labelled(60))
    words = [f"--data.train={path}", f"--data.decisions={tmp_path}/none.jsonl"]
    assert go(tmp_path / "out", *words, small=CLEAN) == 2
    one_line(capsys, "none.jsonl: no such file")
    assert not list(tmp_path.rglob("*.pt"))


def test_given_votes_take_the_place_of_trained_voters(tmp_path, capsys):
    records = labelled_well(100, wrong=(3, 23, 43, 63, 83))
    path = write(tmp_path / "mine.jsonl", records)
    kind = [1.0 if record["chosen"].startswith(" kind") else -1.0 for record in records]
    rng = random.Random(0)
    votes = write(tmp_path / "votes.jsonl", [
        {"votes": [sign + rng.gauss(0, 0.3), sign + rng.gauss(0, 0.3)]} for sign in kind])
    words = [f"--data.train={path}", f"--strength.votes={votes}"]
    assert go(tmp_path / "out", *words, small=CLEAN) == 0
    assert {file.name for file in (tmp_path / "out").glob("*.pt")} == {"gaps.pt"}
    lines = read_lines(tmp_path / "out" / "strength.jsonl")
    assert [line["mean"] < 0 for line in lines] == [sign < 0 for sign in kind]
    found = json.loads((tmp_path / "out" / "trust.json").read_text())
    assert found["self_test"]["auroc"]["vote"]["value"] > 0.9


def coin(i):
    return hashlib.sha256(str(i).encode()).digest()[0] % 2


def test_a_vote_on_random_labels_is_a_warning(tmp_path, capsys):
    records = [turned(r) if coin(i) else r for i, r in enumerate(labelled(60))]
    results = run_clean(tmp_path, records, "--ensemble.epochs=2")
    printed = capsys.readouterr().out
    assert results["vote"]["folds held out"]["accuracy_interval"][0] <= 0.5
    assert "warning: on folds held out, the vote agrees with" in printed
    assert "low strength then says more about the voters than about the labels" in printed


# ----------------------------------------------------------------------------------------------
# Without validation, and the audit with it


def test_without_validation_and_folds_there_is_a_vote_that_nothing_checks(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", labelled(30))
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of the mean of nothing
        assert go(out, f"--data.train={path}", small=VOTE) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["vote"] == results["reward"] == {}
    assert len(read_lines(out / "strength.jsonl")) == 30
    assert files.load_tensors(out / "gaps.pt")["valid"].shape == (2, 0)
    assert "warning" not in capsys.readouterr().out


def test_the_audit_counts_training_and_validation_apart(tmp_path):
    mine = write(tmp_path / "mine.jsonl", labelled(30))
    others = [record | {"chosen": " other"} for record in labelled(40)[20:]]
    theirs = write(tmp_path / "theirs.jsonl", others)
    out = tmp_path / "out"
    words = [f"--data.train={mine}", f"--data.valid={theirs}", "--stage=sft"]
    assert go(out, *words, small=VOTE) == 0
    table = json.loads((out / "audit.json").read_text())
    tokenizer = Tokenizer.from_json((out / "encoding.json").read_text())
    for name, path in (("train", mine), ("valid", theirs)):
        assert table["sets"][name] == audit(read_pairs(path), tokenizer, (96,))
    assert table["shared"] == {"train and valid": {"first human turns": 10, "pairs": 0}}


# ----------------------------------------------------------------------------------------------
# Suspects on a few lines


@pytest.mark.parametrize("chosen, rejected, lines", [
    (" yes\n", " no", ("yes", "no")),
    ("one two three four X end", "one two three four Y end",
     ("… four X end", "… four Y end")),
    ("one two three four five six", "one two three four",
     ("… four five six", "… four")),
    ("X " + "word " * 20, "Y " + "word " * 20,
     ("X word word word word …", "Y word word word word …")),
    ("x" * 40 + "A", "x" * 40 + "B", ("… xxxxxxxxA", "… xxxxxxxxB")),
    ("A" + "字" * 40, "B", ("A" + "字" * 21 + " …", "B")),
    (" a\n b", " a b", (r" a\n b", " a b")),
    ("a", "a", ("a", "a")),
    ("", "a", ("", "a")),
])
def test_answers_are_shortened_around_their_first_difference(chosen, rejected, lines):
    assert shorten_answers(chosen, rejected, 24, before=8) == lines
    assert all(len(line) <= 24 for line in lines)


def test_suspects_show_where_their_answers_differ(capsys):
    same = "the beginning is the same in both of them " * 5
    pair = Pair("\n\nHuman: Why?\n\nAssistant:", f" {same}good", f" {same}bad", source="a:1")
    print_suspects([pair, pair], torch.tensor([0.5, -0.5]), torch.tensor([1.0, 2.0]), 1)
    assert capsys.readouterr().out.splitlines() == [
        "   1. a:1: mean -0.50, std 2.00, prompt: Why?",
        "        chosen:   … beginning is the same in both of them good",
        "        rejected: … beginning is the same in both of them bad",
    ]
