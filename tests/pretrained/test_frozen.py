"""pretrained/frozen.py: the trunk computes what the whole model does, once, and stays as it is."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from helpers import ROOT, go, one_line, random_rows, same, tensors, tiny, write_pairs
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from small_runs import PRETRAINED

import model as models
import sample
from common import load_model, make_optimizer, score_rows
from config import ConfigError
from data import Row, collate
from generate import Sampling, generate
from model import LanguageModel, RewardModel, Transformer
from pretrained import export, frozen, hub, weights
from runtime import signals
from runtime.run import open_run
from runtime.signals import Stopped
from tokenizer import train_tokenizer
from train import check_stages, parse_args

SETTINGS = PRETRAINED
HEADS_ALONE = ("--model.train_layers=0", "--sft.epochs=0", "--ppo.methods=")


def write_base(folder, seed=0):
    """Write a pretrained model of three layers.  -> its folder"""
    texts = [f"\n\nHuman: question {i}?\n\nAssistant: yes {i} no" for i in range(40)]
    tokenizer = train_tokenizer(texts, 300)
    model = tiny(seed=seed, vocab=tokenizer.vocab_size, kv_heads=2, context=96)
    export.save(folder, model, tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a pretrained model in hf/ and preference data in pairs.jsonl"""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder / "hf")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture
def settings(base, tmp_path):
    """settings(*more) -> command line of a small run on the pretrained model, with a store of the
    test's own"""
    def command_line(*more):
        return settings_of(base, tmp_path, *more)

    return command_line


def settings_of(base, folder, *more):
    return [
        *SETTINGS, f"--data.train={base}/pairs.jsonl", f"--model.init={base}/hf",
        f"--model.embeds_dir={folder}/embeds", "--model.train_layers=1", *more,
    ]


def run_of(words, out="out/none"):
    return open_run(parse_args([*words, f"--out_dir={out}"])[0])


def on_trunk(whole, num_frozen):
    """The same function as `whole`, with its lowest blocks in a frozen trunk"""
    trunk = tiny(type(whole), **vars(whole.shape)).model
    trunk.load_state_dict(whole.model.state_dict())
    for i in range(num_frozen, whole.shape.layers):
        del trunk.layers[str(i)]
    trunk.norm = torch.nn.Identity()
    model = type(whole)(replace(whole.shape, frozen=num_frozen))
    state = whole.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return frozen.attach(model, trunk.requires_grad_(False).eval()).eval()


def rewards_of(model, batch, **more):
    return model(batch.tokens, batch.branch, batch.position, batch.last, **more)


def trunk_output(model, batch):
    """What a store would hold for the batch: (B, T, C), or (B, k, C) where no block is left"""
    trunk, = model.trunk
    out_pos = batch.last if model.shape.frozen == model.shape.layers else None
    return trunk(batch.tokens, batch.branch, batch.position, out_pos)


# --------------------------------------------------------------------------------------------------
# The trunk in a model

@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("num_frozen", [1, 2, 3])
def test_rewards_are_equal_stored_computed_and_without_freezing(num_frozen, k):
    whole = tiny(RewardModel, kv_heads=2)
    batch = collate(random_rows(5, k, 1))
    model = on_trunk(whole, num_frozen)
    expected = rewards_of(whole, batch)
    computed = rewards_of(model, batch)
    torch.testing.assert_close(computed, expected)
    embeds = trunk_output(model, batch)
    assert embeds.shape == ((5, k, 32) if num_frozen == 3 else (*batch.tokens.shape, 32))
    without_tokens = batch._replace(tokens=torch.zeros_like(batch.tokens))
    stored = rewards_of(model, without_tokens, inputs_embeds=embeds)
    assert torch.equal(stored, computed)


def test_where_all_blocks_are_frozen_the_last_one_runs_its_mlp_at_out_pos_alone():
    model = on_trunk(tiny(RewardModel), 3)
    shapes = []
    mlp = model.trunk[0].layers["2"].mlp
    mlp.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    rewards_of(model, collate(random_rows(5, 2, 1)))
    assert shapes == [(5, 2, 32)]


@pytest.mark.parametrize("num_frozen", [1, 2])
def test_values_are_equal_stored_computed_and_without_freezing(num_frozen):
    """A critic is read at every response token."""
    whole = tiny(RewardModel)
    model = on_trunk(whole, num_frozen)
    batch = collate(random_rows(5, 1, 1))
    T = batch.tokens.shape[1]
    batch = batch._replace(last=torch.arange(T).expand(5, T))
    expected = rewards_of(whole, batch)
    torch.testing.assert_close(rewards_of(model, batch), expected)
    embeds = trunk_output(model, batch)
    torch.testing.assert_close(rewards_of(model, batch, inputs_embeds=embeds), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_frozen", [1, 2])
def test_a_policy_on_a_trunk_samples_the_same(num_frozen, tied):
    whole = tiny(tied=tied, kv_heads=2)
    model = on_trunk(whole, num_frozen)
    prompts = [[1, 2, 3], [4], [5, 6]]
    sampling = Sampling(max_new_tokens=9, eos_id=23)
    generations = []
    for each in (whole, model):
        generator = torch.Generator().manual_seed(0)
        generations.append(generate(each, prompts, sampling, generator, num_samples=2))
    expected, generation = generations
    assert torch.equal(generation.tokens, expected.tokens)
    torch.testing.assert_close(generation.logprob, expected.logprob)
    tokens = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(model(tokens), whole(tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_layers_keep_their_numbers_and_the_trunk_is_not_saved(tied):
    model = on_trunk(tiny(tied=tied), 2)
    names = list(model.state_dict())
    assert {name.split(".")[2] for name in names if "layers" in name} == {"2"}
    assert not any("embed" in name for name in names)
    assert ("lm_head.weight" in names) == (not tied)
    assert [name for name, _ in model.named_parameters()] == names


def test_two_models_share_the_trunk_and_neither_trains_it():
    one = on_trunk(tiny(RewardModel), 2)
    trunk, = one.trunk
    two = frozen.attach(RewardModel(one.shape), trunk)
    assert two.trunk[0] is trunk
    own = {id(parameter) for parameter in one.parameters()}
    assert own.isdisjoint(id(parameter) for parameter in two.parameters())
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    optimizer = make_optimizer(one, "adamw", 0.1, 0.1)
    rewards_of(one.train(), collate(random_rows(4, 2, 0))).sum().backward()
    optimizer.step()
    assert same(before, trunk.state_dict())
    assert all(parameter.grad is None for parameter in trunk.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in one.parameters())


def test_dropout_applies_to_the_input_of_the_trained_blocks_and_not_below():
    model = on_trunk(tiny(RewardModel, dropout=0.5), 3)
    batch = collate(random_rows(6, 2, 0))
    embeds = trunk_output(model, batch)
    model.train()
    torch.testing.assert_close(trunk_output(model, batch), embeds)
    one = rewards_of(model, batch, inputs_embeds=embeds)
    two = rewards_of(model, batch, inputs_embeds=embeds)
    assert (one != two).all()  # the two views of a contrastive term


def test_a_model_without_frozen_blocks_has_no_trunk(settings):
    run = run_of(settings("--model.train_layers=-1"))
    rows = random_rows(3, 2, 0)
    assert frozen.trunk_of(run) is None
    assert frozen.embed_rows(run, rows) is rows
    assert frozen.load_or_compute(run, "train", rows) is rows
    model = tiny()
    assert frozen.attach(model, None) is model


def test_the_trunk_is_loaded_once_a_process_in_the_precision_of_the_run(settings):
    run = run_of(settings())
    trunk = frozen.trunk_of(run)
    assert frozen.trunk_of(run_of(settings("--seed=5"))) is trunk
    assert frozen.trunk_of(run, 1) is not trunk
    assert [len(frozen.trunk_of(run, n).layers) for n in (1, 2)] == [1, 2]
    assert frozen.trunk_of(run, 0) is None
    half = frozen.trunk_of(run_of(settings("--dtype=bf16")))
    assert half.layers["0"].mlp.up_proj.weight.dtype == torch.bfloat16
    assert half.layers["0"].input_layernorm.weight.dtype == torch.float32
    assert half.embed_tokens.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in half.parameters())


# --------------------------------------------------------------------------------------------------
# The store

@pytest.mark.parametrize("train_layers", [0, 1, 2])
def test_embeddings_are_computed_once_and_found_in_any_order(settings, monkeypatch, train_layers):
    run = run_of(settings(*HEADS_ALONE, f"--model.train_layers={train_layers}"))
    rows = random_rows(40, 2, 1, vocab=200)
    first = frozen.load_or_compute(run, "train", rows)
    names = store_files(run)
    monkeypatch.setattr(frozen, "embed_rows", None)  # a second computation would fail
    swapped = [row.branches(1, 0) for row in reversed(rows)]
    chosen = [row.branches(0) for row in rows]
    found = frozen.load_or_compute(run, "other", swapped + chosen)
    assert store_files(run) == names
    for row, other, alone in zip(first, found[39::-1], found[40:]):
        assert all(map(torch.equal, row.inputs_embeds, other.branches(1, 0).inputs_embeds))
        assert torch.equal(row.inputs_embeds[1], alone.inputs_embeds[1])
        lengths = [len(row.prompt), *map(len, row.responses)] if train_layers else [0, 1, 1]
        assert [len(vectors) for vectors in row.inputs_embeds] == lengths
    with pytest.raises(TypeError):
        frozen.load_or_compute(run, "new", random_rows(1, 2, 99, vocab=200))


def store_files(run):
    return sorted(Path(frozen.store_folder(run)).glob("*.safetensors"))


@pytest.mark.parametrize("train_layers", [0, 2])
def test_embeddings_are_those_of_the_whole_model(settings, train_layers):
    run = run_of(settings(*HEADS_ALONE, f"--model.train_layers={train_layers}"))
    whole = weights.load(run.cfg.model.init, LanguageModel, context=96)
    block = whole.model.layers["2" if train_layers == 0 else "0"]
    outputs = []
    block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for row in frozen.load_or_compute(run, "train", random_rows(20, 2, 1, vocab=200)):
        for response, vectors in zip(row.responses, row.inputs_embeds[1:]):
            tokens = np.concatenate((row.prompt, response))
            whole(torch.from_numpy(tokens)[None])
            expected = outputs.pop()[0, -len(vectors):]
            torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


def test_the_store_depends_on_weights_layers_and_precision_alone(settings, tmp_path):
    folder = frozen.store_folder(run_of(settings()))
    other = write_base(tmp_path / "other", seed=1)
    changes = ["--model.train_layers=2", "--dtype=bf16", f"--model.init={other}"]
    folders = {frozen.store_folder(run_of(settings(change))) for change in changes}
    assert len(folders | {folder}) == 4
    assert frozen.store_folder(run_of(settings("--seed=9", "--reward.lr=1e-4"))) == folder
    assert frozen.store_folder(run_of(settings("--model.context=90"))) == folder


def test_the_key_of_the_store_is_that_of_older_stores(settings, monkeypatch):
    monkeypatch.setattr(hub, "digest", lambda init: "0123456789abcdef")
    run = run_of(settings("--model.embeds_dir=somewhere"))
    assert frozen.store_folder(run) == "somewhere/9d92741631f961a3"
    row = Row(np.array([1, 2], np.uint16), (np.array([3], np.uint16),))
    digests = [digest.hex() for digest in frozen.row_digests(row)]
    assert digests == ["2cc5e4d47c5f3c5fbe635a5a5b7bb392", "17a0d0730a8ef6c57f6d106165169e4d"]
    parts = {bytes(16): torch.zeros(2, 3), bytes(range(16)): torch.ones(1, 3)}
    written = {}

    def keep(path, write, setting):
        written["name"] = os.path.basename(path)

    monkeypatch.setattr(frozen.files, "save", keep)
    frozen.write_file("folder", parts)
    assert written["name"] == "f7ce7f26642ac380.safetensors"


def test_a_response_is_known_by_its_prompt_too():
    responses = (np.array([7, 8]), np.array([9]))
    row = Row(np.array([1, 2]), responses)
    digests = frozen.row_digests(row)
    assert set(digests).isdisjoint(frozen.row_digests(Row(np.array([1, 3]), responses)))
    swapped = frozen.row_digests(row.branches(1, 0))
    assert digests == [swapped[0], swapped[2], swapped[1]]
    joined = Row(np.array([1, 2, 7]), (np.array([8]), np.array([9])))
    assert set(digests).isdisjoint(frozen.row_digests(joined))  # the prompt ends elsewhere


def test_ctrl_c_between_two_files_loses_none_of_them(settings, monkeypatch):
    run = run_of(settings())
    rows = random_rows(20, 2, 1, vocab=200)
    monkeypatch.setattr(frozen, "FILE_NUMBERS", 1)
    monkeypatch.setattr(frozen, "BATCH_SIZE", 8)
    answers = iter([False, True])
    monkeypatch.setattr(signals, "should_stop", lambda: next(answers))
    with pytest.raises(Stopped):
        frozen.load_or_compute(run, "train", rows)
    names = store_files(run)
    assert len(names) == 1
    monkeypatch.setattr(signals, "should_stop", lambda: False)
    frozen.load_or_compute(run, "train", rows)
    assert names[0] in store_files(run)
    assert len(store_files(run)) == 3  # of 8, 8 and 4 rows


def test_what_is_stored_is_not_written_again(settings):
    run = run_of(settings())
    rows = random_rows(6, 2, 1, vocab=200)
    alone = frozen.load_or_compute(run, "train", [row.branches(0) for row in rows])
    both = frozen.load_or_compute(run, "train", rows)
    for one, two in zip(alone, both):
        assert torch.equal(one.inputs_embeds[1], two.inputs_embeds[1])
    num_vectors = 0
    for path in store_files(run):
        with safe_open(path, framework="pt") as file:
            num_vectors += file.get_slice("states").get_shape()[0]
    stored = frozen.read_store(frozen.store_folder(run)).values()
    assert num_vectors == sum(map(len, rows)) == sum(map(len, stored))


def test_rows_computed_in_memory_never_enter_the_store(settings):
    run = run_of(settings())
    rows = frozen.embed_rows(run, random_rows(6, 2, 1, vocab=200))
    assert all(row.inputs_embeds for row in rows)
    assert not os.path.exists(frozen.store_folder(run))
    stored = frozen.load_or_compute(run, "train", [Row(r.prompt, r.responses) for r in rows])
    for row, other in zip(rows, stored):
        for one, two in zip(row.inputs_embeds, other.inputs_embeds):
            torch.testing.assert_close(one, two)


WANT_ROWS = """
import random
import sys

import numpy as np

import config
from data import Row
from pretrained import frozen, weights
from runtime.run import open_run

settings = [word[2:].split("=", 1) for word in sys.argv[1:]]
run = open_run(weights.sized(config.load(None, settings)))
rng = random.Random(0)
rows = []
for _ in range(40):
    prompt, *responses = np.array([rng.choices(range(200), k=5) for _ in range(3)])
    rows.append(Row(prompt, tuple(responses)))
print("ready", flush=True)
sys.stdin.readline()
for row in frozen.load_or_compute(run, "train", rows):
    print([vectors.sum().item() for vectors in row.inputs_embeds])
"""


def test_of_two_processes_one_computes_and_the_other_waits(settings):
    processes = []
    for _ in range(2):
        processes.append(subprocess.Popen(
            [sys.executable, "-c", WANT_ROWS, *settings()], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ))
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    one, two = [process.communicate()[0] for process in processes]
    assert one == two
    assert len(one.splitlines()) == 40
    assert len(store_files(run_of(settings()))) == 1


def test_what_another_process_stored_meanwhile_is_not_computed_again(settings, monkeypatch):
    run = run_of(settings())
    rows = random_rows(6, 2, 1, vocab=200)
    acquire = frozen.acquire

    def wait(lock, run):
        """Fill the store, as another process does that holds the lock"""
        monkeypatch.setattr(frozen, "acquire", acquire)
        frozen.load_or_compute(run, "train", rows)
        monkeypatch.setattr(frozen, "embed_rows", None)  # a second computation would fail

    monkeypatch.setattr(frozen, "acquire", wait)
    assert all(row.inputs_embeds for row in frozen.load_or_compute(run, "train", rows))


def test_who_waits_can_be_stopped(settings, monkeypatch):
    run = run_of(settings())
    folder = frozen.store_folder(run)
    os.makedirs(folder)
    monkeypatch.setattr(frozen, "LOCK_SECONDS", 0.01)
    answers = iter([False, True])
    monkeypatch.setattr(signals, "should_stop", lambda: next(answers))
    with filelock.FileLock(os.path.join(folder, "lock")), pytest.raises(Stopped):
        frozen.load_or_compute(run, "train", random_rows(2, 2, 1, vocab=200))
    assert store_files(run) == []


def test_a_worker_computes_with_all_threads_and_gets_its_share_back(settings, monkeypatch):
    run = run_of(settings())
    run.slot = 1
    run.cfg = replace(run.cfg, threads=2)
    threads = []
    monkeypatch.setattr(frozen, "add_to_store", lambda *_: threads.append(torch.get_num_threads()))
    monkeypatch.setattr(frozen, "with_embeds", lambda *_: None)
    left = Path(frozen.store_folder(run)) / "x.safetensors.nanoreward-1.part"
    left.parent.mkdir(parents=True)
    left.write_text("")  # of a process that was killed while it saved
    frozen.load_or_compute(run, "train", random_rows(2, 2, 1, vocab=200))
    assert (threads, torch.get_num_threads()) == ([2], 1)
    assert not left.exists()


def test_a_damaged_file_and_a_full_disk_give_one_line(settings, monkeypatch):
    run = run_of(settings())
    rows = random_rows(6, 2, 1, vocab=200)
    frozen.load_or_compute(run, "train", rows)
    path, = store_files(run)
    content = path.read_bytes()
    other_tensors = {"states": torch.ones(3), "digests": torch.ones(1, 8), "stops": torch.tensor(3)}
    for damaged in (content[:len(content) // 2], b"", b"x" * 100, to_safetensors(other_tensors)):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="not a readable file of embeddings.*delete it"):
            frozen.load_or_compute(run, "train", rows)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is a pipe"):
        frozen.load_or_compute(run, "train", rows)
    path.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="are free; free some space.*--model.embeds_dir="):
        frozen.load_or_compute(run, "train", rows)


# --------------------------------------------------------------------------------------------------
# Whole runs

ROUNDS = (
    "--meta.rounds=1", "--meta.prompts=6", "--meta.k=2", "--contrast.term=simcse",
    "--ppo.iterations=1",
)
MODELS = ("sft", "member_00", "reward_flip", "meta_1", "policy_flip", "policy_meta_1")


def forbid_trunk(*_):
    raise AssertionError("the trunk runs inside a model")


def run_stages(out, words):
    """All stages.  In training and scoring reward models the trunk must not run."""
    assert go(out, "--stage=sft", small=words) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "run_trunk", forbid_trunk)
        for stage in ("ensemble", "strength", "reward"):
            assert go(out, f"--stage={stage}", small=words) == 0
    assert go(out, small=words) == 0


@pytest.fixture(scope="module")
def trained(base):
    """-> folder of a run of all stages, a round of MetaRM among them; its command line"""
    words = settings_of(base, base, *ROUNDS)
    run_stages(base / "run", words)
    return base / "run", words


@pytest.fixture
def copied(trained, tmp_path):
    """A copy that a test may change"""
    folder, words = trained
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run", words


def test_a_run_with_stored_embeddings_is_the_run_without(trained, tmp_path):
    """What is trained is small, and the frozen layers are in no file of the run."""
    folder, words = trained
    assert go(tmp_path / "b", "--model.embeds_dir=", small=words) == 0
    for name in MODELS:
        stored = tensors(folder, name)
        computed = tensors(tmp_path / "b", name)
        assert stored.keys() == computed.keys()
        frozen_names = ("embed", "layers.0", "layers.1")
        assert not any(part in key for key in stored for part in frozen_names)
        assert any("layers.2" in key for key in stored)
        for key in stored:
            torch.testing.assert_close(stored[key], computed[key], atol=2e-3, rtol=0)


def test_rollouts_and_samples_are_not_in_the_store(trained):
    folder, words = trained
    run = run_of(words, folder)
    rows = [*run.train.rows, *run.valid.rows]
    known = set()
    for row in rows:
        known |= set(frozen.row_digests(row))
    assert set(frozen.read_store(frozen.store_folder(run))) == known


def test_a_rollout_passes_the_trunk_once_to_sample_and_once_to_score(copied, monkeypatch):
    folder, words = copied
    trunk_calls = []
    blocks = Transformer.blocks

    def count_trunk(self, tokens, *rest, **more):
        if self.shape.layers == 2:
            trunk_calls.append(tuple(tokens.shape))
        return blocks(self, tokens, *rest, **more)

    recomputed = []

    def count_checkpoint(block, *inputs, use_reentrant):
        recomputed.append(block)
        return block(*inputs)

    monkeypatch.setattr(Transformer, "blocks", count_trunk)
    monkeypatch.setattr(models, "checkpoint", count_checkpoint)
    changes = (
        "--meta.rounds=0", "--ppo.max_new_tokens=4", "--train.gradient_checkpointing=true"
    )
    assert go(folder, "--stage=ppo", *changes, small=words) == 0
    assert 2 <= len(trunk_calls) <= 1 + 4
    assert sum(T > 1 for _, T in trunk_calls) == 2  # the prompts, then a token each; the answers
    assert all(B <= 8 for B, _ in trunk_calls)
    assert len(recomputed) == 2 * 2 * 4  # policy and critic, in 4 minibatches of 2 epochs


def test_heads_alone(settings, tmp_path, capsys):
    words = settings(*HEADS_ALONE, "--contrast.term=simcse", "--model.dropout=0")
    run_stages(tmp_path / "a", words)
    names = set(tensors(tmp_path / "a", "reward_flip"))
    assert names == {"model.norm.weight", "score.weight"}
    capsys.readouterr()
    for wrong in ("--sft.epochs=1", "--ppo.methods=flip", "--meta.rounds=1"):
        assert go(tmp_path / "b", wrong, small=words) == 2
        one_line(capsys, "model.train_layers = 0")


def test_wrong_settings_are_one_line(settings, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    second_order = ["--meta.second_order=true", "--train.gradient_checkpointing=true"]
    cases = [
        (["--train.optimizer=lion"], "must be one of adamw, adafactor"),
        (second_order, "train.gradient_checkpointing"),
        (["--model.train_layers=3"], "must be less than the 3 layers"),
        (["--model.init=scratch"], "needs a pretrained model.init"),
        ([f"--model.embeds_dir={tmp_path}/file"], "--model.embeds_dir"),
    ]
    for words, part in cases:
        assert go(tmp_path / "x", *words, small=settings()) == 2
        one_line(capsys, part)


def test_exported_models_hold_the_frozen_layers(trained):
    folder, words = trained
    assert go(folder, "--stage=export", small=words) == 0
    run = run_of(words, folder)
    rows = [Row(row.prompt, row.responses) for row in run.valid.rows]
    batch = collate(rows)
    assert rows
    names = ("policy_flip", "reward_flip", "member_00")
    for name, kind in zip(names, (LanguageModel, RewardModel, RewardModel)):
        ours = load_model(run, kind, name)
        theirs = weights.load(str(folder / "export" / name), kind, context=96)
        expected = rewards_of(theirs, batch)[..., :ours.shape.vocab]  # without the padding's logit
        torch.testing.assert_close(rewards_of(ours, batch), expected)
        assert ours.trunk[0] is frozen.trunk_of(run)
        if kind is RewardModel:
            table = json.loads((folder / "export" / name / "config.json").read_text())
            mean = float(score_rows(run, ours, rows).mean())
            assert table["reward_mean"] == pytest.approx(mean, abs=1e-5)


def test_each_model_uses_the_trunk_it_was_trained_on(copied, settings):
    """Whatever model.train_layers was set to later"""
    folder, words = copied
    words = [*words, "--contrast.term=none"]
    for stage in ("sft", "ensemble", "strength", "reward"):
        assert go(folder, "--model.train_layers=2", f"--stage={stage}", small=words) == 0
    run, _, _ = sample.open_finished_run(str(folder), "policy_flip", "reward_flip")
    policy = load_model(run, LanguageModel, "policy_flip")
    reward_model = load_model(run, RewardModel, "reward_flip")
    assert [policy.shape.frozen, reward_model.shape.frozen] == [2, 1]
    assert [len(policy.trunk[0].layers), len(reward_model.trunk[0].layers)] == [2, 1]
    row = run.valid.rows[0]
    bare = Row(row.prompt, row.responses)
    expected = score_rows(run_of([*words, "--model.train_layers=2"], folder), reward_model, [bare])
    torch.testing.assert_close(score_rows(run, reward_model, [bare]), expected)


def test_a_model_refuses_other_frozen_weights(base, copied, tmp_path, capsys, monkeypatch):
    folder, _ = copied
    stdin = SimpleNamespace(isatty=lambda: False, buffer=[b"Hello?"])
    monkeypatch.setattr("sys.stdin", stdin)
    names = [f"--run={folder}", "--policy=policy_flip", "--reward=reward_flip"]
    assert sample.main(names) == 0
    assert "[reward_flip" in capsys.readouterr().out
    moved = tmp_path / "moved"
    (base / "hf").rename(moved)
    try:
        hub.directory.cache_clear()
        assert sample.main(names) == 2
        one_line(capsys, "no such folder")
        assert sample.main([*names, f"--init={moved}"]) == 0
        write_base(base / "hf", seed=1)
        capsys.readouterr()
        assert sample.main(names) == 2
        one_line(capsys, "frozen layers of another model")
    finally:
        shutil.rmtree(base / "hf", ignore_errors=True)
        moved.rename(base / "hf")


def test_every_stage_runs_where_memory_is_short(settings, tmp_path):
    words = settings(
        *ROUNDS, "--train.gradient_checkpointing=true", "--train.optimizer=adafactor",
        "--dtype=bf16",
    )
    assert go(tmp_path / "a", small=words) == 0
    for tensor in tensors(tmp_path / "a", "reward_flip").values():
        assert tensor.dtype == torch.float32  # master weights
        assert tensor.isfinite().all()
    run = run_of(words, tmp_path / "a")
    assert run.valid.rows[0].inputs_embeds[0].dtype == torch.bfloat16


def test_checkpointing_and_the_place_of_the_store_retrain_nothing(trained, tmp_path):
    folder, words = trained
    changes = ["--train.gradient_checkpointing=true", f"--model.embeds_dir={tmp_path}"]
    assert stale_models(folder, [*words, *changes]) == []
    stale = stale_models(folder, [*words, "--train.optimizer=adafactor"])
    assert {"sft", "member_00", "reward_flip", "policy_flip"} <= set(stale)


def stale_models(folder, words):
    """Names of the models that a run with these settings would train again"""
    run = run_of(words, folder)
    check_stages(run)
    names = []
    for path in folder.glob("*.pt"):
        if path.stem in run.known and run.known[path.stem].reason:
            names.append(path.stem)
    return names


# --------------------------------------------------------------------------------------------------
# What else saves memory: gradient checkpointing, an optimizer without moments

def test_branches_keep_their_embeddings():
    vectors = tuple(torch.full((n, 2), float(n)) for n in (3, 2, 4))
    row = Row(np.arange(3), (np.arange(2), np.arange(4)), vectors)
    swapped = row.branches(1, 0)
    assert [len(response) for response in swapped.responses] == [4, 2]
    assert [len(part) for part in swapped.inputs_embeds] == [3, 4, 2]
    assert [len(part) for part in row.branches(1).inputs_embeds] == [3, 4]
    assert Row(row.prompt, row.responses).branches(0).inputs_embeds == ()
    assert collate([swapped]).inputs_embeds.shape == (1, 9, 2)
    assert collate([swapped, row]).inputs_embeds[0, 3, 0] == 4


@pytest.mark.parametrize("kind", [LanguageModel, RewardModel])
def test_gradient_checkpointing_changes_no_gradient(kind):
    batch = collate(random_rows(4, 2, 3))
    gradients = []
    for checkpointing in (False, True):
        model = tiny(kind, dropout=0.3).train()
        model.model.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        rewards_of(model, batch).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_gradient_checkpointing_saves_fewer_numbers_for_the_backward_pass():
    batch = collate(random_rows(4, 2, 3))
    num_saved = []
    for checkpointing in (False, True):
        model = tiny(RewardModel, layers=6).train()
        model.model.gradient_checkpointing = checkpointing
        sizes = {}

        def save(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            rewards_of(model, batch).sum()
        num_saved.append(sum(sizes.values()))
    assert num_saved[1] < 0.5 * num_saved[0]


def test_adafactor_learns_without_moments():
    model = tiny(RewardModel)
    batch = collate(random_rows(8, 2, 0))
    optimizer = make_optimizer(model, "adafactor", 0.01, 0.0)
    losses = []
    for _ in range(30):
        chosen, rejected = rewards_of(model, batch).unbind(1)
        loss = torch.nn.functional.softplus(rejected - chosen).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    num_state = 0
    for state in optimizer.state.values():
        num_state += sum(value.numel() for value in state.values() if torch.is_tensor(value))
    assert losses[-1] < 0.5 * losses[0]
    assert num_state < 0.2 * num_weights
