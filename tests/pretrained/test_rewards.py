"""reward.init: a reward model of a Hugging Face folder keeps its head, and what does not fit is one
line before anything is trained."""
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import HH_SMALL, go, one_line, same, tensors, tiny, write_pairs
from safetensors.torch import load_file, save_file

from common import score_rows
from config import Config, ConfigError, assign
from model import RewardModel
from pretrained import export, rewards, weights
from runtime.run import open_run
from tokenizer import EOS, Tokenizer
from train import parse_args


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_model, own):
    """A language model, and a reward model with its tokenizer and another width"""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "policy", context=1024)
    model = tiny(
        RewardModel, vocab=400, tied=False, kv_heads=2, width=48, hidden=64, heads=4, context=256
    )
    export.save(folder / "reward", model, own)
    return folder


def test_a_head_of_two_labels_is_no_reward(folders, tmp_path):
    shutil.copytree(folders / "reward", tmp_path / "two")
    path = tmp_path / "two/model.safetensors"
    tensors_of = load_file(path)
    tensors_of["score.weight"] = tensors_of["score.weight"].repeat(2, 1)
    save_file(tensors_of, path, {"format": "pt"})
    with pytest.raises(ConfigError, match="2 labels, and a reward is one number"):
        weights.load(str(tmp_path / "two"), RewardModel, torch.device("cpu"))


def test_a_slash_at_the_end_of_the_folder_changes_nothing(folders):
    facts = []
    for end in ("", "/"):
        cfg = assign(Config(), "reward.init", f"{folders / 'reward'}{end}")
        facts.append(rewards.facts(SimpleNamespace(cfg=cfg)))
    assert facts[0] == facts[1]


def words(folders, tmp_path, *more):
    sizes = ("model.layers", "model.width", "model.heads", "model.kv_heads", "model.vocab")
    small = [word for word in HH_SMALL if not word.removeprefix("--").startswith(sizes)]
    return [
        *small, f"--data.train={write_pairs(tmp_path / 'pairs.jsonl')}", "--sft.epochs=0",
        f"--model.init={folders / 'policy'}", f"--reward.init={folders / 'reward'}",
        "--reward.methods=baseline", "--ppo.methods=", *more,
    ]


def test_a_reward_model_votes_and_is_kept_as_it_is(folders, tmp_path):
    settings = words(folders, tmp_path, "--reward.epochs=0", "--ppo.methods=baseline",
                     "--model.dropout=0")
    assert go(tmp_path / "out", *settings, small=[]) == 0
    whole = weights.load(folders / "reward", RewardModel).state_dict()
    assert same(tensors(tmp_path / "out", "reward_baseline"), whole)
    member = tensors(tmp_path / "out", "member_00")
    assert member["score.weight"].shape == (1, 48)
    assert not torch.equal(member["score.weight"], whole["score.weight"])  # trained further
    run = open_run(parse_args([*settings, f"--out_dir={tmp_path / 'out'}"])[0])
    rewards = score_rows(run, weights.load(folders / "reward", RewardModel), run.valid.rows)
    assert rewards.std() > 1e-3
    assert (tmp_path / "out/policy_baseline.pt").exists()  # PPO is driven by it


def test_another_reward_model_makes_what_started_from_it_again(folders, tmp_path, capsys, own):
    settings = words(folders, tmp_path, "--stage=ensemble")
    assert go(tmp_path / "out", *words(folders, tmp_path, "--stage=sft"), small=[]) == 0
    assert go(tmp_path / "out", *settings, small=[]) == 0
    before = tensors(tmp_path / "out", "member_00")
    other = tiny(RewardModel, seed=5, vocab=400, tied=False, kv_heads=2, context=256)
    export.save(tmp_path / "other", other, own)
    settings = [word for word in settings if "reward.init" not in word]
    assert go(tmp_path / "out", *settings, f"--reward.init={tmp_path / 'other'}", small=[]) == 0
    assert "member_00" in capsys.readouterr().out
    assert not same(before, tensors(tmp_path / "out", "member_00"))


def test_another_tokenizer_is_refused_before_training(folders, tmp_path, own, capsys):
    ranks = dict(own.ranks)
    last, before = sorted(ranks, key=ranks.get)[-1:-3:-1]
    ranks[last], ranks[before] = ranks[before], ranks[last]
    special = {EOS: 399}
    model = tiny(RewardModel, vocab=400, tied=False, kv_heads=2, context=256)
    export.save(tmp_path / "other", model, Tokenizer(own.pattern + "|x", own.ranks, special))
    settings = [w for w in words(folders, tmp_path) if "reward.init" not in w]
    settings.append(f"--reward.init={tmp_path / 'other'}")
    assert go(tmp_path / "out", *settings, small=[]) == 2
    err = capsys.readouterr().err
    assert "error: " in err and "tokenizer" in err
    assert not (tmp_path / "out/sft.pt").exists()


@pytest.mark.parametrize("more, parts", [
    (["--model.train_layers=1"], ("reward.init", "model.train_layers")),
    (["--model.context=512"], ("model.context = 512", "256")),
    (["--reward.init=/no/such/folder"], ("reward.init = '/no/such/folder': no such folder",)),
])
def test_what_does_not_fit_is_one_line(folders, tmp_path, more, parts, capsys):
    settings = words(folders, tmp_path)
    for word in more:
        key = word.partition("=")[0]
        settings = [w for w in settings if not w.startswith(key + "=")] + [word]
    assert go(tmp_path / "out", *settings, small=[]) == 2
    one_line(capsys, *parts)


def test_no_epochs_need_a_trained_model(tmp_path, capsys):
    assert go(tmp_path / "out", "--reward.epochs=0") == 2
    one_line(capsys, "reward.epochs = 0", "reward.init")
