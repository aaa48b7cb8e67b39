"""pretrained/export.py: what is written is read again, by this code and by transformers."""
import json
import math
import os
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from helpers import SMALL, go, one_line, same, tensors, tiny, tiny_reward
from safetensors.torch import load_file, save_file

import sample
import world
from common import load_model, score_rows
from config import ConfigError
from data import collate, encode_prompt, encode_row
from model import LanguageModel, RewardModel
from pretrained import export, weights
from pretrained.tokenizer import QWEN
from pretrained.tokenizer import load as load_tokenizer
from runtime.files import load_tensors
from runtime.run import open_run
from tokenizer import EOS, Tokenizer, train_tokenizer
from tools import score
from train import check_stages, parse_args

LLAMA3_SCALING = (8.0, 1.0, 4.0, 32.0)
SHAPES = [
    {},
    {"tied": True},
    {"head": 6},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING, "norm_eps": 1e-4},
    {"qkv_bias": True},
    {"qk_norm": True, "head": 24},
]
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", [LanguageModel, RewardModel])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_what_is_written_is_read_again(tmp_path, write_model, own, kind, changes):
    model, folder = write_model(tmp_path / "out", kind, **changes)
    loaded = weights.load(folder, kind)
    state = loaded.state_dict()
    vocab = model.shape.vocab
    if kind is RewardModel:  # it has one more embedding, of the padding
        vocab += 1
        embedding = state["model.embed_tokens.weight"]
        assert (embedding[-1] == 0).all()
        state["model.embed_tokens.weight"] = embedding[:-1]
    assert loaded.shape == replace(model.shape, dropout=0.0, vocab=vocab)
    assert same(model.state_dict(), state)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    if changes.get("tied") and kind is LanguageModel:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert file_names(tmp_path) == ["out"]
    check_tables(folder, kind)
    export.save(folder, model, own)  # over itself
    assert file_names(folder) == FILES


def check_tables(folder, kind):
    """What pipelines read: a reward is no probability, and the end of a long text is judged."""
    config = json.loads((folder / "config.json").read_text())
    names = json.loads((folder / "tokenizer_config.json").read_text())
    assert names["model_input_names"] == ["input_ids", "attention_mask"]
    is_reward = kind is RewardModel
    assert names.get("truncation_side") == ("left" if is_reward else None)
    assert config.get("problem_type") == ("regression" if is_reward else None)
    assert config.get("num_labels") == (1 if is_reward else None)


@pytest.mark.parametrize("eos, pad, vocab", [
    (EOS, "<|pad|>", 401),
    ("<|pad|>", "<<|pad|>>", 402),
])
def test_a_token_for_padding_that_exists_is_used(tmp_path, own, eos, pad, vocab):
    special = {EOS: 399, "<|pad|>": 400}
    tokenizer = Tokenizer(own.pattern, own.ranks, special, eos)
    export.save(tmp_path / "out", tiny_reward(vocab=401), tokenizer)
    config = json.loads((tmp_path / "out/config.json").read_text())
    names = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert config["vocab_size"] == vocab
    assert config["pad_token_id"] == vocab - 1
    assert config["eos_token_id"] != config["pad_token_id"]
    assert (names["pad_token"], names["eos_token"]) == (pad, eos)


def test_a_model_that_no_architecture_has_is_refused(tmp_path, own):
    model = tiny(vocab=400, tied=False, qkv_bias=True, qk_norm=True)
    with pytest.raises(ConfigError, match="no architecture of Hugging Face has both biases"):
        export.save(tmp_path / "out", model, own)
    assert file_names(tmp_path) == []


def test_a_failed_export_leaves_the_old_one(tmp_path, write_model, own, monkeypatch):
    _, folder = write_model(tmp_path / "out")
    before = (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="cannot be written .No space left"):
        export.save(folder, tiny(seed=1, vocab=400, tied=False), own)
    assert (folder / "model.safetensors").read_bytes() == before
    assert file_names(tmp_path) == ["out"]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@torch.no_grad()
def test_transformers_reads_what_is_written(tmp_path, write_model, changes):
    transformers = pytest.importorskip("transformers")
    policy, _ = write_model(tmp_path / "policy", **changes)
    write_model(tmp_path / "reward", RewardModel, **changes)
    ids = torch.randint(400, (3, 50))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    prefix = "Qwen2" if "qkv_bias" in changes else "Qwen3" if "qk_norm" in changes else "Llama"
    assert type(theirs).__name__ == f"{prefix}ForCausalLM"
    torch.testing.assert_close(policy(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert type(theirs).__name__ == f"{prefix}ForSequenceClassification"


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_transformers_reads_the_same_rewards(tmp_path, write_model, own, changes):
    transformers = pytest.importorskip("transformers")
    reward_model, folder = write_model(tmp_path / "reward", RewardModel, **changes)
    if "qkv_bias" in changes:  # transformers splits as Qwen2, whatever tokenizer.json says
        own = Tokenizer(QWEN, own.ranks, own.special)
        export.save(folder, reward_model, own)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pairs = [
        ("\n\nHuman: How long?\n\nAssistant:", " It's 12 km long."),
        ("\n\nHuman: A?\n\nAssistant: B\n\nHuman: Really, C 123?\n\nAssistant:", " no"),
    ]
    rows = [encode_row(own, prompt, (answer,), 200) for prompt, answer in pairs]
    texts = [prompt + answer + tokenizer.eos_token for prompt, answer in pairs]
    assert tokenizer.truncation_side == "left"
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    judge = transformers.pipeline("text-classification", model=theirs, tokenizer=tokenizer)
    batch = collate(rows)
    rewards = reward_model(batch.tokens, batch.branch, batch.position, batch.last)[:, 0]
    assert (rewards[0] - rewards[1]).abs() > 1e-3
    for text, reward in zip(texts, rewards):
        assert judge(text)[0]["score"] == pytest.approx(float(reward), abs=1e-4)  # no sigmoid
    for side in ("right", "left"):
        tokenizer.padding_side = side
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        if side == "right":
            ids = inputs.input_ids[0, :len(rows[0])].tolist()
            assert ids == [*rows[0].prompt, *rows[0].responses[0]]
        output = theirs(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        torch.testing.assert_close(output.logits[:, 0], rewards, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", ["hh", "chatml", "llama3"])
def test_transformers_applies_the_exported_chat_template(tmp_path, with_markers, template):
    """Longer dialogues, without transformers: test_tokenizer.py"""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    tokenizer = with_markers(template)
    export.save(tmp_path / "out", tiny(vocab=tokenizer.vocab_size), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [
        {"role": "user", "content": "How long?"}, {"role": "assistant", "content": "It's 12."}
    ]
    prompt = "\n\nHuman: How long?\n\nAssistant:"
    asked = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert asked == encode_prompt(tokenizer, prompt, 1000)
    row = encode_row(tokenizer, prompt, (" It's 12.",), 1000)
    answered = theirs.apply_chat_template(messages, return_dict=False)
    assert answered == [*row.prompt, *row.responses[0]]


# --------------------------------------------------------------------------------------------------
# Whole runs

FROM_FOLDER = [word for word in SMALL if "--model" not in word]
FROM_FOLDER += ["--model.context=192", "--sft.epochs=0"]
HELLO = "\n\nHuman: How long?\n\nAssistant:"


@pytest.fixture
def base(tmp_path):
    """-> folder of a model whose tokenizer knows the world, model, tokenizer"""
    demos = world.demonstrations(200, 0, 0.5)
    tokenizer = train_tokenizer((demo["prompt"] + demo["response"] for demo in demos), 400)
    model = tiny(vocab=tokenizer.vocab_size, context=256, tied=True, kv_heads=2)
    export.save(tmp_path / "base", model, tokenizer)
    return tmp_path / "base", model, tokenizer


def test_a_run_from_a_folder_and_its_export(base, tmp_path, capsys):
    folder, model, tokenizer = base
    out = tmp_path / "run"
    init = f"--model.init={folder}"
    assert go(out, init, small=FROM_FOLDER) == 0
    assert same(tensors(out, "sft"), model.state_dict())
    assert load_tensors(out / "sft.pt")["shape"] == asdict(replace(model.shape, context=192))
    sizes = json.loads((out / "stages/sft.json").read_text())["config"]["model"]
    expected = {"layers": 3, "width": 32, "vocab": 400, "hidden": 40, "context": 192}
    assert expected.items() <= sizes.items()
    assert not same(tensors(out, "policy_flip"), tensors(out, "sft"))
    assert json.loads((out / "results.json").read_text())
    assert not (out / "export").exists()

    assert go(out, init, "--stage=export", small=FROM_FOLDER) == 0
    names = file_names(out / "export")
    members = ["member_00", "member_01"]
    assert names == [*members, "policy_flip", "reward_baseline", "reward_flip", "sft"]
    exported = json.loads((out / "export/reward_flip/config.json").read_text())
    run = open_run(parse_args([*FROM_FOLDER, init, f"--out_dir={out}"])[0])
    rewards = score_rows(run, load_model(run, RewardModel, "reward_flip"), run.valid.rows)
    assert exported["reward_mean"] == pytest.approx(float(rewards.mean()))
    assert exported["reward_std"] == pytest.approx(float(rewards.std()))
    assert "reward_mean" not in json.loads((out / "export/sft/config.json").read_text())
    policy = weights.load(out / "export/policy_flip")
    assert same(policy.state_dict(), tensors(out, "policy_flip"))
    reward_model = weights.load(out / "export/reward_flip", RewardModel)
    score = tensors(out, "reward_flip")["score.weight"]
    assert torch.equal(reward_model.score.weight, score)
    loaded = load_tokenizer(out / "export/reward_flip", 401)
    assert (loaded.ranks, loaded.eos) == (tokenizer.ranks, tokenizer.eos)
    capsys.readouterr()
    assert go(out, init, "--stage=sft", small=FROM_FOLDER) == 0
    assert "sft: up to date" in capsys.readouterr().out

    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, folder / "model.safetensors")
    assert go(out, init, "--stage=sft", small=FROM_FOLDER) == 0
    assert "contents of model.init" in capsys.readouterr().out
    assert not same(tensors(out, "sft"), model.state_dict())
    assert go(out, init, "--stage=export", small=FROM_FOLDER) == 0
    assert "policy_flip is left out (again" in capsys.readouterr().out

    shutil.rmtree(folder)  # a finished run answers without it
    run, policy_name, reward_name = sample.open_finished_run(str(out))
    policy = load_model(run, LanguageModel, policy_name)
    reward_model = load_model(run, RewardModel, reward_name)
    text, reward, _ = sample.answer_prompt(run, policy, reward_model, HELLO, 0)
    assert text
    assert math.isfinite(reward)


def test_export_needs_something_to_export(tmp_path, capsys):
    assert go(tmp_path / "run", "--stage=export") == 2
    one_line(capsys, "--stage=export", "has no model")


def test_nothing_is_exported_if_one_model_cannot_be_read(copied, capsys):
    out = copied
    shutil.copy(out / "reward_flip.pt", out / "policy_flip.pt")
    path = out / "stages" / "policy_flip.json"
    record = json.loads(path.read_text())
    del record["outputs"], record["checksum"]  # which older versions did not write
    path.write_text(json.dumps(record))
    assert go(out, "--stage=export") == 2
    one_line(capsys, "policy_flip.pt: holds no LanguageModel")
    assert not (out / "export").exists()


def test_a_run_from_scratch_does_not_depend_on_pretrained_models(tmp_path):
    run = open_run(parse_args([f"--out_dir={tmp_path}"])[0])
    check_stages(run)
    assert {"tokenizer", "audit", "sft", "strength", "evaluate"} <= run.known.keys()
    assert "states" not in run.known
    for known in run.known.values():
        assert "contents of model.init" not in known.depends


def test_mistakes_are_one_line_and_exit_code_2(base, tmp_path, capsys):
    folder, _, _ = base
    init = f"--model.init={folder}"
    assert go(tmp_path / "run", "--data.template=chatml") == 2
    one_line(capsys, "data.template", "model.init")
    words = [init, "--data.template=llama3", "--stage=sft"]
    assert go(tmp_path / "run", *words, small=FROM_FOLDER) == 2
    one_line(capsys, "data.template", "<|start_header_id|>")
    assert go(tmp_path / "run", "--model.init=/no/such", small=FROM_FOLDER) == 2
    one_line(capsys, "no such folder", "OWNER/NAME")
    (folder / "model.safetensors").write_bytes(b"")
    assert go(tmp_path / "run", init, "--stage=sft", small=FROM_FOLDER) == 2
    one_line(capsys, "model.safetensors", "fetch it again")


@pytest.mark.parametrize("template", ["hh", "chatml", "llama3"])
def test_an_exported_reward_model_is_scored_in_the_form_it_was_trained_on(
    template, tmp_path, with_markers, own, capsys
):
    tokenizer = own if template == "hh" else with_markers(template)
    model = tiny(RewardModel, vocab=tokenizer.vocab_size, context=64)
    folder = str(tmp_path / "hf")
    export.save(folder, model, tokenizer)
    run, _ = score.open_folder({"model": folder})
    assert run.tokenizer.template == template
    assert (f"the markers of {template}" in capsys.readouterr().out) == (template != "hh")
    run, _ = score.open_folder({"model": folder, "template": "hh"})
    assert run.tokenizer.template == "hh"


def test_a_run_in_chatml_ends_its_answers_with_that_marker(tmp_path, with_markers):
    chatml = with_markers("chatml")
    model = tiny(vocab=chatml.vocab_size, context=256)
    without_template = Tokenizer(chatml.pattern, chatml.ranks, chatml.special)
    export.save(tmp_path / "base", model, without_template)
    words = [
        *FROM_FOLDER, f"--model.init={tmp_path}/base", "--data.template=chatml",
        "--world.demonstrations=10",
    ]
    assert go(tmp_path / "run", "--stage=sft", small=words) == 0
    run = open_run(parse_args([*words, f"--out_dir={tmp_path}/run"])[0])
    assert run.tokenizer.template == "chatml"
    assert run.tokenizer.eos_id == chatml.special["<|im_end|>"]
    assert run.train.rows[0].prompt[0] == chatml.special["<|im_start|>"]


def test_a_second_export_keeps_other_files_of_its_folder(tmp_path):
    tokenizer = train_tokenizer(["a b c"] * 4, 260)
    for seed in (0, 1):
        model = tiny(seed=seed, vocab=tokenizer.vocab_size, kv_heads=2, context=96)
        export.save(tmp_path / "sft", model, tokenizer)
        (tmp_path / "sft" / "NOTES.md").write_text("mine")
    assert (tmp_path / "sft" / "NOTES.md").read_text() == "mine"
    assert os.listdir(tmp_path) == ["sft"]
    loaded = weights.load(str(tmp_path / "sft"))
    assert same(loaded.state_dict(), model.state_dict())
