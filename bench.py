"""python bench.py: what a training step of each kind costs, as a ratio to the plain reward-model step of the same run.

The steps take turns, so that whatever else the machine does falls on all of them alike; printed is the median over rounds of
the ratio within a round, with its quartiles.  Pairs of the built-in world, 2 layers, width 128, 16 pairs a step; MetaRM's
samples are 16 prompts with 5 answers.
"""
import dataclasses
import sys
import time

import numpy as np
import torch

import config as configuration
import data
import losses
import world
from contrast import Contrast
from loop import pair_loss
from metarm import meta_gradient
from model import RewardModel, Shape, init_weights
from run import optimiser_of

VARIANTS = {  # the paper's settings (sec. 4)
    "simcse": configuration.Contrast(term="simcse"),
    "simcse on differences": configuration.Contrast(term="simcse", items="difference"),
    "swav, K = 50, a queue of 256": configuration.Contrast(term="swav", weight=0.1, queue=256),
    "swav on differences, K = 20": configuration.Contrast(term="swav", items="difference", weight=0.5, prototypes=20),
}


def steps(device, pairs=16, k=5, seed=0):
    """-> {name: function that makes one training step}"""
    rows, _ = world.pairs(2000, seed, world.Noise())
    encoding = data.train_tokenizer((text for row in rows for text in row.values()), 1024)
    encoded = [data.encode(encoding, row["prompt"], (row["chosen"], row["rejected"]), 256) for row in rows]
    samples = [data.Row(row.prompt, tuple(encoded[(i + j) % len(encoded)].responses[0] for j in range(k))) for i, row in enumerate(encoded)]
    shape = Shape(encoding.n_vocab, layers=2, heads=4, kv_heads=4, width=128, hidden=344, context=256)
    draws = iter(range(10 ** 9))
    pick = lambda source: [source[i] for i in np.random.default_rng(next(draws)).integers(0, len(source), pairs)]
    ones, zeros = torch.ones(pairs), torch.zeros(pairs)

    def stepper(dropout=0.05, settings=None, second_order=None):
        model = init_weights(RewardModel(dataclasses.replace(shape, dropout=dropout)), torch.Generator().manual_seed(seed)).to(device).train()
        beside = None if settings is None else Contrast(settings, shape.width, torch.Generator().manual_seed(seed)).to(device)
        optimiser = optimiser_of(model, "adamw", 1e-4, 0.1, [] if beside is None else beside.parameters())
        pair = lambda: pair_loss(model, pick(encoded), zeros, ones, beside)[0] / pairs

        def difference():
            batch = data.collate(pick(samples)).to(device)
            return losses.difference(model(*batch[:3], read=batch.last)).mean()

        def step():
            optimiser.zero_grad(set_to_none=True)
            if second_order is None:
                pair().backward()
            else:
                for p, g in zip(model.parameters(), meta_gradient(model.parameters(), difference, pair, 0.1, second_order)):
                    p.grad = g
            optimiser.step()

        return step

    return {"plain": stepper(), **{name: stepper(settings=s) for name, s in VARIANTS.items()},
            "MetaRM, first order": stepper(second_order=False), "MetaRM, second order": stepper(second_order=True)}


def main(rounds=15):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work, seconds = steps(device), []
    for _ in range(rounds + 2):
        now = []
        for step in work.values():
            begun = time.perf_counter()
            step()
            if device.type == "cuda":  # CUDA only: not run by CI
                torch.cuda.synchronize()
            now.append(time.perf_counter() - begun)
        seconds.append(now)
    seconds = np.array(seconds[2:])  # the first two warm up
    low, ratio, high = np.quantile(seconds / seconds[:, :1], [0.25, 0.5, 0.75], axis=0)
    print(f"{'step, 16 pairs':32}{'ms':>8}{'ratio':>8}  quartiles   ({device}, {torch.get_num_threads()} threads, torch {torch.__version__})")
    for i, name in enumerate(work):
        print(f"{name:32}{1000 * np.median(seconds[:, i]):8.1f}{ratio[i]:8.2f}  {low[i]:.2f}-{high[i]:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(__doc__)
    else:
        main()
