"""What several test files need: tiny models, random rows, runs of a few seconds."""
import contextlib
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import train
from data import Row
from model import LanguageModel, RewardModel, Shape, init_weights
from runtime import distributed, files

ROOT = Path(__file__).parents[1]
TINY = Shape(vocab=24, layers=3, heads=4, kv_heads=4, width=32, hidden=40, context=64)


class FakeRun(SimpleNamespace, distributed.Ranks):
    """What a function needs of a Run, on one process"""
    shards = False

    def shard(self, model):
        return model

    def whole(self, value):
        return value

    def gathered(self, model):
        return contextlib.nullcontext()


def tiny(kind=LanguageModel, seed=0, **changes):
    """A tiny model in eval mode.  Its norm weights differ from 1, so that an omitted one shows.

    changes: fields of Shape
    """
    shape = replace(TINY, **changes)
    generator = torch.Generator().manual_seed(seed)
    model = init_weights(kind(shape), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model.eval()


def tiny_reward(seed=0, **changes):
    return tiny(RewardModel, seed, **changes)


def random_rows(n, k, seed, vocab=24):
    """n rows of ragged length with k responses each"""
    rng = random.Random(seed)

    def tokens(low, high):
        length = rng.randint(low, high)
        return np.array([rng.randrange(vocab) for _ in range(length)])

    rows = []
    for _ in range(n):
        prompt = tokens(1, 9)
        rows.append(Row(prompt, tuple(tokens(1, 7) for _ in range(k))))
    return rows


# ----------------------------------------------------------------------------------------------
# Small runs of the whole program

SMALL = [
    "--threads=1",
    "--log.figures=false",  # drawing takes longer than all the rest
    "--world.pairs=60",
    "--world.valid=40",
    "--world.ood=12",
    "--world.demonstrations=60",
    "--model.layers=2",
    "--model.width=32",
    "--model.heads=2",
    "--model.kv_heads=1",
    "--model.vocab=400",
    "--model.dropout=0.05",
    "--train.workers=1",
    "--sft.epochs=1",
    "--ensemble.members=2",
    "--ensemble.epochs=1",
    "--reward.epochs=1",
    "--ppo.methods=flip",
    "--ppo.iterations=2",
    "--ppo.critic_warmup_iters=0",
    "--ppo.rollout_batch_size=8",
    "--ppo.max_new_tokens=12",
    "--evaluate.prompts=8",
    "--evaluate.bootstrap=20",
    "--evaluate.groups=4",
]
HH_SMALL = [word for word in SMALL if "world" not in word]
HH_SMALL += ["--data.valid_share=0.3", "--model.vocab=300", "--model.context=96"]


def go(out, *more, small=SMALL):
    """Run train.py with small settings -> exit code"""
    return train.main([*small, f"--out_dir={out}", *more])


def tensors(out, name):
    """-> weights of the model that a run saved as NAME.pt"""
    return files.load_tensors(f"{out}/{name}.pt")["model"]


def same(a, b):
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def write_pairs(path, n=30, **change):
    """Write n pairs as a JSON Lines file.  change: fields of every pair -> path"""
    lines = []
    for i in range(n):
        pair = {
            "prompt": f"\n\nHuman: question {i}?\n\nAssistant:",
            "chosen": f" yes {i}",
            "rejected": f" no {i}",
        }
        lines.append(json.dumps(pair | change) + "\n")
    path.write_text("".join(lines))
    return path


def one_line(capsys, *parts):
    """Check that stderr is one line, an error that holds all the parts -> the line"""
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert str(part) in err
    return err


def dialogue(num_turns):
    """A prompt of num_turns human turns, answered but for the last"""
    text = ""
    for i in range(num_turns):
        text += f"\n\nHuman: Question {i}?\n\nAssistant:"
        if i < num_turns - 1:
            text += f" Answer {i}."
    return text
