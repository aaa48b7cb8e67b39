"""What a user's file is given: voters that have not seen the pair, a cleaned file, an audit, and a warning where the vote is worth nothing."""
import hashlib
import json
import random
import warnings

import numpy as np
import pytest
import torch

import config as configuration
import data
import files
from helpers import HH_SMALL, ROOT, go, one_line, same, tensors
from losses import bradley_terry
from run import gaps_of, open_run
from strength import VERDICTS, verdicts

VOTE = [s for s in HH_SMALL if "ppo" not in s and "valid_share" not in s] + ["--data.valid_share=0", "--reward.methods=", "--ppo.methods="]
FOLDS = [*VOTE, "--ensemble.members=4", "--ensemble.folds=2", "--sft.epochs=0"]  # without SFT, nothing but the members reads a label
CLEAN = [f"--config={ROOT}/configs/clean.toml", *VOTE, "--ensemble.members=4", "--ensemble.folds=2", "--ensemble.epochs=6", "--ensemble.lr=1e-2",
         "--strength.show=4", "--model.dropout=0", "--evaluate.bootstrap=200"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def turned(record):
    return record | {"chosen": record["rejected"], "rejected": record["chosen"]}


def labelled(n, wrong=()):
    """Pairs of which the kind answer is better than the rude one, of the same length; at `wrong` the label says the opposite."""
    rng = random.Random(0)
    records = [{"prompt": f"\n\nHuman: question {i}?\n\nAssistant:", "chosen": f" kind {rng.randrange(9)}", "rejected": f" rude {rng.randrange(9)}"}
               for i in range(n)]
    return [turned(r) if i in wrong else r for i, r in enumerate(records)]


def member_gaps(out, names, settings):
    """Gaps by the saved members, on all pairs -> pairs, (members, N)"""
    run = open_run(configuration.load(None, [s[2:].split("=", 1) for s in settings] + [("out_dir", str(out))]))
    pairs, rows = run.train
    return pairs, torch.stack([gaps_of(run, m, rows) for m in names])


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    path = write(folder / "mine.jsonl", labelled(50))
    assert go(folder / "out", f"--data.train={path}", small=FOLDS) == 0
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Folds

def test_a_pair_is_scored_by_the_members_that_leave_its_fold_out(folded):
    settings = [*FOLDS, f"--data.train={folded}/mine.jsonl"]
    pairs, by_member = member_gaps(folded / "out", [f"member_{m:02d}" for m in range(4)], settings)
    fold = data.folds(pairs, 2, 0)
    gaps = files.load_tensors(folded / "out" / "gaps.pt")["train"]
    assert gaps.shape == (2, 50) and 0 < fold.sum() < 50
    for i, f in enumerate(fold):
        torch.testing.assert_close(gaps[:, i], by_member[[f, 2 + f], i])  # members 0 and 2 leave out fold 0
    mean = [l["mean"] for l in read(folded / "out" / "strength.jsonl")]
    np.testing.assert_allclose(mean, gaps.mean(0), rtol=1e-5)


def test_a_member_does_not_know_the_labels_of_the_fold_it_leaves_out(folded, tmp_path):
    """With these labels turned round it is the same, bit for bit, and its vote on them the opposite."""
    records = read(folded / "mine.jsonl")
    fold = data.folds(data.read_pairs(folded / "mine.jsonl"), 2, 0)
    path = write(tmp_path / "mine.jsonl", [turned(r) if f == 0 else r for r, f in zip(records, fold)])
    assert go(tmp_path / "out", f"--data.train={path}", small=FOLDS) == 0
    unchanged = {m: same(tensors(folded / "out", m), tensors(tmp_path / "out", m)) for m in ("sft", "member_00", "member_01", "member_02", "member_03")}
    assert unchanged == {"sft": True, "member_00": True, "member_01": False, "member_02": True, "member_03": False}
    before, after = (files.load_tensors(out / "out" / "gaps.pt")["train"] for out in (folded, tmp_path))
    torch.testing.assert_close(after[:, fold == 0], -before[:, fold == 0])
    assert not torch.allclose(after[:, fold == 1], before[:, fold == 1], atol=1e-3)


def test_more_folds_than_topics_are_refused(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", [r | {"prompt": "\n\nHuman: the same\n\nAssistant:"} for r in labelled(12)])
    assert go(tmp_path / "out", f"--data.train={path}", small=FOLDS) == 2
    one_line(capsys, f"{path}:1: 1 different first human turns cannot make 2 folds; lower ensemble.folds")
    assert not list(tmp_path.rglob("*.pt"))  # before training, not after


# ---------------------------------------------------------------------------------------------------------------------
# The cleaned file

def cleaned(folder, method, *more):
    assert go(folder / "out", f"--data.train={folder}/mine.jsonl", f"--strength.method={method}", *more, small=FOLDS) == 0
    return read(folder / "out" / "strength.jsonl"), read(folder / "out" / "cleaned.jsonl")


def lowest(lines, share):
    return set(sorted(range(len(lines)), key=lambda i: lines[i]["mean"])[:round(share * len(lines))])


@pytest.mark.parametrize("method", ["flip_margin", "margin", "drop", "flip", "baseline"])
def test_a_cleaned_file_is_the_file_as_treated(folded, method):
    records = read(folded / "mine.jsonl")
    lines, out = cleaned(folded, method, "--strength.q=0.2")
    low, wanted = lowest(lines, 0.2), []
    assert len(low) == 10
    for i, (record, line) in enumerate(zip(records, lines)):
        if method == "drop" and i in low:
            continue
        swap = method.startswith("flip") and i in low
        margin = (-1 if swap else 1) * line["mean"] if "margin" in method else 0.0
        wanted.append((turned(record) if swap else record) | {"margin": margin})
    assert out == wanted  # these keys, in this order of lines
    assert [l["margin"] for l in lines if l["p"] is not None] == [o["margin"] for o in out]
    assert sum(l["p"] is None for l in lines) == 50 - len(out)


def test_a_cleaned_file_is_read_again(folded):
    cleaned(folded, "flip_margin")
    pairs = data.read_pairs(folded / "out" / "cleaned.jsonl")
    assert [(p.prompt, p.margin) for p in pairs] == [(r["prompt"], r["margin"]) for r in read(folded / "out" / "cleaned.jsonl")]


def test_trl_trains_on_a_cleaned_file_as_it_is(folded, tmp_path, monkeypatch):
    """Prompt and answer join without a seam, the margins arrive, and its loss is ours."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("trl", "transformers", "datasets", "tokenizers"):
        pytest.importorskip(name)
    from datasets import load_dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    cleaned(folded, "flip_margin")
    records = read(folded / "out" / "cleaned.jsonl")
    dataset = load_dataset("json", data_files=str(folded / "out" / "cleaned.jsonl"), split="train", cache_dir=str(tmp_path))
    assert dataset.to_list() == records
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    shape = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
                        pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to="none",
                        save_strategy="no", disable_tqdm=True)
    trainer = RewardTrainer(LlamaForSequenceClassification(shape), args=args, train_dataset=dataset, processing_class=tokenizer)
    tokens = lambda text: tokenizer.convert_tokens_to_ids([*text.replace("\n", "Ċ").replace(" ", "Ġ"), "<end>"])  # a byte, a token
    for side in ("chosen", "rejected"):
        assert trainer.train_dataset[f"{side}_ids"][:] == [tokens(r["prompt"] + r[side]) for r in records]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        theirs, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    ours = bradley_terry(*outputs.logits.squeeze(-1).chunk(2), margin=torch.tensor([r["margin"] for r in records[:8]]))
    torch.testing.assert_close(theirs, ours.mean())
    trainer.train()
    assert trainer.state.global_step == 2


# ---------------------------------------------------------------------------------------------------------------------
# configs/clean.toml on a small file

WRONG = (7, 20, 33, 46)


def run_clean(folder, records, *more):
    path = write(folder / "mine.jsonl", records)
    assert go(folder / "out", f"--data.train={path}", *more, small=CLEAN) == 0
    return json.loads((folder / "out" / "results.json").read_text())


def test_a_file_is_cleaned_and_the_wrong_labels_are_named(tmp_path, capsys):
    results = run_clean(tmp_path, labelled(60, wrong=WRONG), "--strength.q=0.0667")
    said = capsys.readouterr().out
    out = tmp_path / "out"
    assert {p.name for p in out.glob("*.pt")} == {"sft.pt", "gaps.pt", *(f"member_0{m}.pt" for m in range(4))}  # no reward model, no policy
    assert results["reward"] == results["policy"] == {} and list(results["vote"]) == ["folds held out"]

    vote = results["vote"]["folds held out"]
    lines = read(out / "strength.jsonl")
    assert vote["pairs"] == 60 and vote["longer_wins"] == 0.5
    assert vote["accuracy"] == pytest.approx(np.mean([l["mean"] > 0 for l in lines])) and vote["accuracy"] > 0.85
    assert "vote on folds held out" in said and "warning" not in said

    mean, std = (torch.tensor([l[k] for l in lines]) for k in ("mean", "std"))
    counts = verdicts(mean, std).bincount(minlength=3).tolist()
    assert "strength: of 60 labels " + ", ".join(f"{n} are {name}" for n, name in zip(counts, VERDICTS)) in said
    shown = [line.split(":")[1] for line in said.splitlines() if f" {tmp_path}/mine.jsonl:" in line]
    assert len(shown) == 4 and {int(n) - 1 for n in shown} == set(WRONG) == lowest(lines, 0.0667)
    assert [l["chosen"].split()[0] for l in read(out / "cleaned.jsonl")] == ["kind"] * 60  # all four put right

    audit = json.loads((out / "audit.json").read_text())
    assert results["audit"] == audit and list(audit["sets"]) == ["train"] and audit["shared"] == {}
    assert audit["sets"]["train"]["pairs"] == audit["sets"]["train"]["different first human turns"] == 60
    assert said.count("longer answer chosen") == 1
    assert go(out, f"--data.train={tmp_path}/mine.jsonl", "--strength.q=0.0667", small=CLEAN) == 0
    again = capsys.readouterr().out
    assert "longer answer chosen" in again and "strength: up to date" in again  # the audit is said each time


def test_a_vote_on_random_labels_is_warned_of(tmp_path, capsys):
    coin = lambda i: hashlib.sha256(str(i).encode()).digest()[0] % 2
    results = run_clean(tmp_path, [turned(r) if coin(i) else r for i, r in enumerate(labelled(60))], "--ensemble.epochs=2")
    said = capsys.readouterr().out
    assert results["vote"]["folds held out"]["accuracy_interval"][0] <= 0.5
    assert "warning: on folds held out, the vote agrees with" in said and "its doubts say more about the voters than about the labels" in said


# ---------------------------------------------------------------------------------------------------------------------
# Without validation, and the audit with it

def test_without_validation_and_folds_there_is_a_vote_but_nothing_to_check_it_by(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", labelled(30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of the mean of nothing
        assert go(tmp_path / "out", f"--data.train={path}", small=VOTE) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["vote"] == results["reward"] == {} and len(read(tmp_path / "out" / "strength.jsonl")) == 30
    assert files.load_tensors(tmp_path / "out" / "gaps.pt")["valid"].shape == (2, 0)
    assert "warning" not in capsys.readouterr().out


def test_the_audit_tells_training_and_validation_apart(tmp_path):
    mine, theirs = write(tmp_path / "mine.jsonl", labelled(30)), write(tmp_path / "theirs.jsonl", [r | {"chosen": " other"} for r in labelled(40)[20:]])
    assert go(tmp_path / "out", f"--data.train={mine}", f"--data.valid={theirs}", "--stage=sft", small=VOTE) == 0
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    encoding = data.encoding_from_json((tmp_path / "out" / "encoding.json").read_text())
    assert audit["sets"] == {name: data.audit(data.read_pairs(path), encoding, (96,)) for name, path in (("train", mine), ("valid", theirs))}
    assert audit["shared"] == {"train and valid": {"first human turns": 10, "pairs": 0}}
