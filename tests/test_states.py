"""Frozen layers: their states computed once and kept, one copy for all models; checkpointing; optimisers."""
import glob
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import data
import files
import model as models
import plan
import pretrained
import sample as talk
import states
import train
from config import ConfigError
from data import Row, collate
from helpers import HH_SMALL, go, one_line, random_rows, same, tensors, tiny, write_pairs
from model import LanguageModel, RewardModel, Transformer, sample
from run import load_model, open_run, optimiser_of, rewards_of


def pretrained_folder(path, **changes):
    texts = [f"\n\nHuman: question {i}?\n\nAssistant: yes {i} no" for i in range(40)]
    encoding = data.train_tokenizer(texts, 300)
    pretrained.save(path, tiny(vocab=encoding.n_vocab, kv_heads=2, context=96, **changes), encoding)
    return str(path)


@pytest.fixture
def begun(tmp_path):
    """settings(*more) -> of a small run on a pretrained model of three layers, whose states go to a folder of the test's own"""
    folder, pairs = pretrained_folder(tmp_path / "hf"), write_pairs(tmp_path / "pairs.jsonl")
    small = [s for s in HH_SMALL if not s.startswith(("--model.layers", "--model.width", "--model.heads", "--model.kv_heads", "--model.vocab"))]
    return lambda *more: [*small, f"--data.train={pairs}", f"--model.init={folder}", f"--model.states={tmp_path}/states", "--model.train_layers=1", *more]


def run_of(settings, out="out/none"):
    return open_run(train.parse([*settings, f"--out_dir={out}"])[0])


def standing_on(whole, frozen, dtype=torch.float32):
    """The same function as `whole`, on a frozen copy of its lowest blocks"""
    below = tiny(type(whole), **{k: v for k, v in vars(whole.shape).items() if k in ("vocab", "kv_heads", "context", "tied", "dropout")}).model
    below.load_state_dict(whole.model.state_dict())
    below.layers, below.norm = below.layers[:frozen], torch.nn.Identity()
    model = type(whole)(replace(whole.shape, frozen=frozen), below.requires_grad_(False).eval())
    model.load_state_dict({name: whole.state_dict()[name] for name in model.state_dict()})
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_states_stand_for_what_lies_below(frozen, k):
    whole, batch = tiny(RewardModel, kv_heads=2), collate(random_rows(5, k, 1))
    model = standing_on(whole, frozen)
    expected = whole(*batch[:3], read=batch.last)
    torch.testing.assert_close(model(*batch[:3], read=batch.last), expected)
    known = model.model.states_below(*batch[:3], batch.last)
    assert known.shape == ((5, k, 32) if frozen == 3 else (*batch.tokens.shape, 32))
    torch.testing.assert_close(model(torch.zeros_like(batch.tokens), *batch[1:3], read=batch.last, states=known), expected)  # tokens are not looked at


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [1, 2])
def test_a_policy_on_frozen_layers_says_the_same(frozen, tied):
    whole = tiny(tied=tied, kv_heads=2)
    model, prompts = standing_on(whole, frozen), [[1, 2, 3], [4], [5, 6]]
    a, b = (sample(m, prompts, 9, 23, torch.Generator().manual_seed(0)) for m in (whole, model))
    assert torch.equal(a.tokens, b.tokens)
    torch.testing.assert_close(a.logprob, b.logprob)
    names = {name.split(".")[2] for name in model.state_dict() if "layers" in name}
    assert names == {str(i) for i in range(frozen, 3)} and not any("embed" in name for name in model.state_dict())
    assert ("lm_head.weight" in model.state_dict()) == (not tied)


def test_two_models_share_the_frozen_layers_and_neither_trains_them():
    whole = tiny(RewardModel)
    one = standing_on(whole, 2)
    two = RewardModel(one.shape, one.model.below[0])
    before = {name: t.clone() for name, t in one.model.below[0].state_dict().items()}
    assert {id(p) for p in one.parameters()}.isdisjoint(map(id, two.parameters())) and one.model.below[0] is two.model.below[0]
    batch = collate(random_rows(4, 2, 0))
    optimiser = optimiser_of(one, "adamw", 0.1, 0.1)
    one.train()(*batch[:3], read=batch.last).sum().backward()
    optimiser.step()
    assert same(before, one.model.below[0].state_dict()) and all(p.grad is None for p in one.model.below[0].parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in one.parameters())


def test_dropout_falls_on_what_enters_the_trained_layers_and_nowhere_below():
    model, batch = standing_on(tiny(RewardModel, dropout=0.5), 3), collate(random_rows(6, 2, 0))
    known = model.model.states_below(*batch[:3], batch.last)
    model.train()
    torch.testing.assert_close(model.model.states_below(*batch[:3], batch.last), known)  # frozen blocks know no dropout
    a, b = (model(*batch[:3], read=batch.last, states=known) for _ in range(2))
    assert (a != b).all()                                                                  # the two views of a contrastive term


@pytest.mark.parametrize("kind", [LanguageModel, RewardModel])
def test_checkpointing_changes_no_gradient(kind):
    batch, gradients = collate(random_rows(4, 2, 3)), []
    for checkpointing in (False, True):
        model = tiny(kind, dropout=0.3).train()
        model.model.checkpointing = checkpointing
        torch.manual_seed(5)
        model(*batch[:3], read=batch.last).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_checkpointing_keeps_less_for_the_way_back():
    batch, kept = collate(random_rows(4, 2, 3)), []
    for checkpointing in (False, True):
        model, sizes = tiny(RewardModel, layers=6).train(), {}
        model.model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.__setitem__(t.data_ptr(), t.numel()) or t, lambda t: t):
            model(*batch[:3], read=batch.last).sum()
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]


# ---------------------------------------------------------------------------------------------------------------------
# Rows and the folder

def test_branches_take_their_states_along():
    row = Row(np.arange(3), (np.arange(2), np.arange(4)), tuple(torch.full((n, 2), float(n)) for n in (3, 2, 4)))
    turned = row.branches(1, 0)
    assert [len(r) for r in turned.responses] == [4, 2] and [len(s) for s in turned.states] == [3, 4, 2]
    assert [len(s) for s in row.branches(1).states] == [3, 4] and Row(row.prompt, row.responses).branches(0).states == ()
    assert collate([turned]).states.shape == (1, 9, 2) and collate([turned, row]).states[0, 3, 0] == 4


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_states_are_computed_once_kept_and_found_again_in_any_order(begun, monkeypatch, layers):
    run = run_of([*begun(), f"--model.train_layers={layers}", "--sft.epochs=0", "--ppo.methods="])
    rows = random_rows(40, 2, 1, vocab=200)
    first = states.kept(run, "train", rows)
    files_now = sorted(os.listdir(states.folder_of(run)))
    monkeypatch.setattr(states, "compute", None)  # a second time would fail
    again = states.kept(run, "other", [r.branches(1, 0) for r in rows[::-1]] + [r.branches(0) for r in rows])
    assert sorted(os.listdir(states.folder_of(run))) == files_now
    for row, turned, alone in zip(first, again[39::-1], again[40:]):
        assert all(map(torch.equal, row.states, turned.branches(1, 0).states)) and torch.equal(row.states[1], alone.states[1])
        assert [len(s) for s in row.states] == ([len(row.prompt), *map(len, row.responses)] if layers else [0, 1, 1])
    with pytest.raises(TypeError):
        states.kept(run, "new", random_rows(1, 2, 99, vocab=200))


@pytest.mark.parametrize("layers", [0, 2])
def test_states_are_those_of_the_model_itself(begun, layers):
    run = run_of([*begun(), f"--model.train_layers={layers}", "--sft.epochs=0", "--ppo.methods="])
    whole = pretrained.load(run.config.model.init, LanguageModel, context=96)
    for row in states.kept(run, "train", random_rows(20, 2, 1, vocab=200)):
        for response, known in zip(row.responses, row.states[1:]):
            x, text = [], np.concatenate((row.prompt, response))
            block = whole.model.layers[2 if layers == 0 else 0]
            hook = block.register_forward_hook(lambda _, inputs, output: x.append(output))
            whole(torch.from_numpy(text)[None])
            hook.remove()
            torch.testing.assert_close(known, x[0][0, -len(known):], atol=1e-5, rtol=1e-5)


def test_states_of_other_layers_precision_or_weights_are_others(begun, tmp_path):
    folders = [states.folder_of(run_of(begun(*more))) for more in ([], ["--model.train_layers=2"], ["--dtype=bf16"], [f"--model.init={pretrained_folder(tmp_path / 'two', seed=1)}"])]
    assert len(set(folders)) == 4
    assert states.folder_of(run_of(begun("--seed=9", "--reward.lr=1e-4"))) == folders[0]


def test_a_response_is_known_by_its_prompt_too():
    a, b = (Row(np.array(prompt), (np.array([7, 8]), np.array([9]))) for prompt in ([1, 2], [1, 3]))
    assert set(states.digests(a)).isdisjoint(states.digests(b)) and states.digests(a)[1:] == states.digests(a.branches(1, 0))[:0:-1]
    joined = Row(np.array([1, 2, 7]), (np.array([8]), np.array([9])))
    assert set(states.digests(a)).isdisjoint(states.digests(joined))  # where the prompt ends makes a difference


def test_ctrl_c_between_two_files_loses_none_of_them(begun, monkeypatch):
    run, rows = run_of(begun()), random_rows(20, 2, 1, vocab=200)
    monkeypatch.setattr(states, "CHUNK", 1)
    monkeypatch.setattr(states, "BATCH", 8)
    asked = iter([False, True])
    with pytest.raises(files.Stopped):
        states.kept(run, "train", rows, lambda: next(asked))
    names = [n for n in os.listdir(states.folder_of(run)) if n.endswith(".safetensors")]
    assert len(names) == 1
    states.kept(run, "train", rows)
    left = [n for n in os.listdir(states.folder_of(run)) if n.endswith(".safetensors")]
    assert names[0] in left and len(left) == 3  # 8, 8 and 4 rows


def test_what_is_known_is_not_written_again(begun):
    run, rows = run_of(begun()), random_rows(6, 2, 1, vocab=200)
    alone = states.kept(run, "train", [r.branches(0) for r in rows])
    both = states.kept(run, "train", rows)
    assert all(torch.equal(a.states[1], b.states[1]) for a, b in zip(alone, both))
    size = sum(len(s) for s in states.read(states.folder_of(run)).values())
    assert size == sum(map(len, rows)) == sum(safe_open(p, framework="pt").get_slice("states").get_shape()[0] for p in glob.glob(f"{states.folder_of(run)}/*.safetensors"))


def wants(settings, seed):
    """In a process of its own"""
    torch.set_num_threads(1)
    rows = states.kept(run_of(settings), "train", random_rows(40, 2, seed, vocab=200))
    return [s.sum().item() for row in rows for s in row.states]


def test_of_two_processes_one_computes_and_the_other_waits(begun):
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        one, two = pool.map(wants, [begun()] * 2, [1] * 2)
    assert one == two
    folder = states.folder_of(run_of(begun()))
    assert len(glob.glob(f"{folder}/*.safetensors")) == 1 and torch.get_num_threads() == 1


def test_a_folder_that_cannot_be_made_is_one_line_with_its_setting(begun, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert go(tmp_path / "x", f"--model.states={tmp_path}/file", small=begun()) == 2
    one_line(capsys, "cannot be written", "--model.states")


def test_a_broken_file_and_a_full_disk_give_one_line(begun, monkeypatch):
    run, rows = run_of(begun()), random_rows(6, 2, 1, vocab=200)
    states.kept(run, "train", rows)
    path = next(os.path.join(states.folder_of(run), n) for n in os.listdir(states.folder_of(run)) if n.endswith(".safetensors"))
    whole = open(path, "rb").read()
    for broken in (whole[:len(whole) // 2], b"", b"x" * 100):
        with open(path, "wb") as file:
            file.write(broken)
        with pytest.raises(OSError, match="not a readable file of states.*delete it"):
            states.kept(run, "train", rows)
    os.remove(path)
    monkeypatch.setattr(states.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="are free; free some space.*--model.states="):
        states.kept(run, "train", rows)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

def test_a_run_with_kept_states_is_the_run_without(begun, tmp_path):
    """All stages, rounds of MetaRM included; what is trained is small, and the frozen layers stand in no file of the run."""
    more = ["--meta.rounds=1", "--meta.prompts=6", "--meta.k=2", "--reward.methods=baseline,flip", "--contrast.term=simcse"]
    assert go(tmp_path / "a", *more, small=begun()) == 0
    assert go(tmp_path / "b", *more, "--model.states=", small=begun()) == 0
    for name in ("sft", "member_00", "reward_flip", "meta_1", "policy_flip", "policy_meta_1"):
        a, b = (tensors(tmp_path / x, name) for x in "ab")
        assert a.keys() == b.keys() and not any("embed" in n or "layers.0" in n or "layers.1" in n for n in a) and any("layers.2" in n for n in a)
        for n in a:
            torch.testing.assert_close(a[n], b[n], atol=2e-3, rtol=0)


@pytest.mark.parametrize("layers", [0, 1])
def test_nothing_below_is_computed_again_in_training_or_scoring(begun, tmp_path, monkeypatch, layers):
    settings = begun(f"--model.train_layers={layers}", *(["--sft.epochs=0", "--ppo.methods="] if layers == 0 else []))
    assert go(tmp_path / "a", "--stage=sft", small=settings) == 0
    monkeypatch.setattr(Transformer, "states_below", None)
    for stage in ("ensemble", "strength", "reward"):
        assert go(tmp_path / "a", f"--stage={stage}", small=settings) == 0


def test_a_rollout_goes_through_the_frozen_layers_once_to_sample_and_once_to_score(begun, tmp_path, monkeypatch):
    settings = begun("--ppo.iterations=1", "--ppo.critic_pretrain=0", "--ppo.max_new=4", "--train.checkpointing=true")
    for stage in ("sft", "ensemble", "strength", "reward"):
        assert go(tmp_path / "a", f"--stage={stage}", small=settings) == 0
    seen, blocks, again = [], Transformer.blocks, []
    monkeypatch.setattr(models, "checkpoint", lambda block, *rest, **more: again.append(block) or block(*rest))
    monkeypatch.setattr(Transformer, "blocks", lambda self, tokens, *rest: seen.append((self.shape.layers, tuple(tokens.shape))) or blocks(self, tokens, *rest))
    assert go(tmp_path / "a", "--stage=ppo", small=settings) == 0
    below = [shape for layers, shape in seen if layers == 2]
    assert 2 <= len(below) <= 1 + 4 and sum(shape[1] > 1 for shape in below) == 2 and all(shape[0] <= 8 for shape in below)  # the prompts, then a token each; the answers
    assert len(again) == 2 * 2 * 4  # of policy and critic, in every minibatch of every epoch


def test_heads_alone(begun, tmp_path, capsys):
    settings = begun("--model.train_layers=0", "--sft.epochs=0", "--ppo.methods=", "--contrast.term=simcse", "--model.dropout=0")
    assert go(tmp_path / "a", small=settings) == 0
    assert set(tensors(tmp_path / "a", "reward_flip")) == {"model.norm.weight", "score.weight"}
    capsys.readouterr()
    for wrong in ("--sft.epochs=1", "--ppo.methods=flip", "--meta.rounds=1"):
        assert go(tmp_path / "b", wrong, small=settings) == 2
        one_line(capsys, "trains the heads of reward models alone")


def test_mistakes_with_frozen_layers_are_one_line(begun, tmp_path, capsys):
    for words, part in ((["--model.train_layers=3"], "must be less than the 3 layers"), (["--model.init=scratch", "--model.train_layers=1"], "needs a pretrained model.init"),
                        (["--train.optimiser=sgd"], "must be one of adamw, adafactor"),
                        (["--meta.second_order=true", "--train.checkpointing=true"], "cannot be gone through twice")):
        assert go(tmp_path / "x", small=begun(*words)) == 2
        one_line(capsys, part)


def test_export_holds_the_frozen_layers_too(begun, tmp_path):
    settings = begun("--ppo.iterations=1")
    assert go(tmp_path / "a", small=settings) == 0 and go(tmp_path / "a", "--stage=export", small=settings) == 0
    run = run_of(settings, tmp_path / "a")
    batch = collate(rows := [Row(*r[:2]) for r in run.valid[1]])
    for unit, kind in (("policy_flip", LanguageModel), ("reward_flip", RewardModel)):
        ours, theirs = load_model(run, kind, unit), pretrained.load(str(tmp_path / "a/export" / unit), kind, context=96)
        torch.testing.assert_close(ours(*batch[:3], read=batch.last), theirs(*batch[:3], read=batch.last)[..., :ours.shape.vocab])
    assert rows and all(load_model(run, *what).model.below[0] is run.below for what in ((LanguageModel, "sft"), (LanguageModel, "policy_flip"), (RewardModel, "reward_flip")))


def test_answers_and_scores_of_a_run_on_frozen_layers(begun, tmp_path, capsys, monkeypatch):
    """Each model stands on the layers that it was trained on, whatever the run was told later; other weights below are refused."""
    settings = begun("--ppo.iterations=1")
    assert go(tmp_path / "a", small=settings) == 0
    for stage in ("sft", "ensemble", "strength", "reward"):
        assert go(tmp_path / "a", "--model.train_layers=2", f"--stage={stage}", small=settings) == 0
    run, _, _ = talk.open_finished(str(tmp_path / "a"))
    models = [load_model(run, LanguageModel, "policy_flip"), load_model(run, RewardModel, "reward_flip")]
    assert [m.shape.frozen for m in models] == [2, 1] and [len(m.model.below[0].layers) for m in models] == [2, 1]
    row = Row(*run.valid[1][0][:2])
    expected = rewards_of(open_run(train.parse([*settings, "--model.train_layers=2", f"--out_dir={tmp_path}/a"])[0]), models[1], [row])
    torch.testing.assert_close(rewards_of(run, models[1], [row]), expected)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, buffer=[b"Hello?"]))
    capsys.readouterr()
    assert talk.main([f"--run={tmp_path}/a"]) == 0 and "[reward_flip" in capsys.readouterr().out
    folder, moved = tmp_path / "hf", tmp_path / "moved"
    folder.rename(moved)
    pretrained.directory.cache_clear()
    assert talk.main([f"--run={tmp_path}/a"]) == 2
    one_line(capsys, "no such folder")
    assert talk.main([f"--run={tmp_path}/a", f"--init={moved}"]) == 0
    pretrained_folder(folder, seed=1)
    capsys.readouterr()
    assert talk.main([f"--run={tmp_path}/a"]) == 2
    one_line(capsys, "frozen layers of another model")


@pytest.mark.parametrize("changes", [["--train.checkpointing=true"], ["--train.optimiser=adafactor"], ["--dtype=bf16"]], ids=str)
def test_every_stage_runs_where_memory_is_short(begun, tmp_path, changes):
    assert go(tmp_path / "a", *changes, small=begun("--ppo.iterations=1")) == 0
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors(tmp_path / "a", "reward_flip").values())  # master weights
    if "bf16" in changes[0]:
        run = run_of([*begun("--ppo.iterations=1"), *changes], tmp_path / "a")
        assert run.below.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16 and run.valid[1][0].states[0].dtype == torch.bfloat16


def test_checkpointing_and_where_states_are_kept_are_no_reason_to_train_again(begun):
    depends = [plan.dependencies(train.parse(begun(*more))[0]) for more in ([], ["--train.checkpointing=true", "--model.states=elsewhere"], ["--train.optimiser=adafactor"])]
    assert depends[0]["reward_flip"] == depends[1]["reward_flip"] and depends[0]["policy_flip"] == depends[1]["policy_flip"]
    assert depends[0]["reward_flip"] != depends[2]["reward_flip"] and depends[0]["policy_flip"] != depends[2]["policy_flip"]


def test_an_optimiser_without_moments():
    model, batch = tiny(RewardModel), collate(random_rows(8, 2, 0))
    optimiser = optimiser_of(model, "adafactor", 0.01, 0.0)
    losses = []
    for _ in range(30):
        rewards = model(*batch[:3], read=batch.last)
        loss = torch.nn.functional.softplus(rewards[:, 1] - rewards[:, 0]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    weights = sum(p.numel() for p in model.parameters())
    numbers = sum(t.numel() for state in optimiser.state.values() for t in state.values() if torch.is_tensor(t))
    assert losses[-1] < 0.5 * losses[0] and numbers < 0.2 * weights
