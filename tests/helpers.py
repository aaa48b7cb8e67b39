"""What several test files need: tiny models and random rows."""
import random

import numpy as np
import torch

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
