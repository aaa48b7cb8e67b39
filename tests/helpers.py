"""What several test files need: tiny models, random rows, runs of a few seconds."""
import json
import random
from pathlib import Path

import numpy as np
import torch

import files
import train
from data import Row
from model import LanguageModel, RewardModel, Shape, init_weights


def tiny(kind=LanguageModel, seed=0, **changes):
    """A tiny model in eval mode; its norm weights are no ones, so that a forgotten one shows."""
    shape = Shape(**dict(vocab=24, layers=3, heads=4, kv_heads=4, width=32, hidden=40, context=64) | changes)
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
    """n rows of ragged length with k responses each."""
    rng = random.Random(seed)
    tokens = lambda low, high: np.array([rng.randrange(vocab) for _ in range(rng.randint(low, high))])
    return [Row(tokens(1, 9), tuple(tokens(1, 7) for _ in range(k))) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Small runs of the whole program

ROOT = Path(__file__).parents[1]
SMALL = ["--world.pairs=60", "--world.valid=40", "--world.ood=12", "--world.demonstrations=60", "--model.layers=2", "--model.width=32",
         "--model.heads=2", "--model.kv_heads=1", "--model.vocab=400", "--ensemble.members=2", "--ensemble.epochs=1", "--train.workers=1",
         "--sft.epochs=1", "--reward.epochs=1", "--ppo.iterations=2", "--ppo.critic_pretrain=0", "--ppo.episodes=8", "--ppo.max_new=12", "--evaluate.prompts=8",
         "--evaluate.bootstrap=20", "--evaluate.groups=4", "--threads=1", "--ppo.methods=flip", "--model.dropout=0.05"]
HH_SMALL = [s for s in SMALL if "world" not in s] + ["--data.valid_share=0.3", "--model.vocab=300", "--model.context=96"]


def go(out, *more, small=SMALL):
    return train.main([*small, f"--out_dir={out}", *more])


def tensors(out, name):
    return files.load_tensors(f"{out}/{name}.pt")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write_pairs(path, n=30, **change):
    lines = [{"prompt": f"\n\nHuman: question {i}?\n\nAssistant:", "chosen": f" yes {i}", "rejected": f" no {i}"} | change for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def one_line(capsys, *parts):
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert str(part) in err
    return err
