"""How the time of the work grows: with length, width, members and pairs.

Each panel has the measured times, and the line through the first point along which they would lie
if they grew in proportion.  The kinds of work take turns, and each point is a median over rounds.
"""
import time

import numpy as np
import torch
from tqdm import tqdm

from common import make_optimizer
from data import Row, collate
from model import RewardModel, Shape, init_weights
from runtime import figures
from train import pair_loss

ROWS = 8              # pairs of a step
VOCAB = 1000
LENGTHS = (128, 256, 512, 1024)  # tokens of prompt and both answers
WIDTHS = (64, 128, 256, 512)
MEMBERS = (1, 2, 4, 8)
PAIRS = (125, 250, 500, 1000)
MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # ticks of the picture


def random_row(rng, length):
    """A prompt of a half and two answers of a quarter of `length` random tokens"""
    quarter = length // 4
    parts = [rng.integers(0, VOCAB, size) for size in (length - 2 * quarter, quarter, quarter)]
    return Row(parts[0], (parts[1], parts[2]))


def make_model(width, length=128, layers=4):
    shape = Shape(VOCAB, layers, width=width, hidden=8 * -(-width // 3), context=length)
    return init_weights(RewardModel(shape), torch.Generator().manual_seed(0))


def make_step(width, length):
    """-> function that makes one training step of a reward model of 4 layers"""
    model = make_model(width, length).train()
    optimizer = make_optimizer(model, "adamw", 1e-5, 0.1)
    rng = np.random.default_rng(0)
    rows = [random_row(rng, length) for _ in range(ROWS)]

    def step():
        loss, _ = pair_loss(model, rows, torch.zeros(ROWS), torch.ones(ROWS))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def make_vote(num_members, num_pairs):
    """-> function in which so many members score so many pairs"""
    models = [make_model(64, layers=2).eval() for _ in range(num_members)]
    rng = np.random.default_rng(0)
    rows = [random_row(rng, 64) for _ in range(num_pairs)]

    @torch.no_grad()
    def vote():
        for model in models:
            for start in range(0, num_pairs, 32):
                batch = collate(rows[start:start + 32])
                model(batch.tokens, batch.branch, batch.position, batch.last)

    return vote


def panels():
    """-> {label of the axis: {x: function}}"""
    return {
        "tokens a row, width 128": {n: make_step(128, n) for n in LENGTHS},
        "width, 128 tokens a row": {n: make_step(n, 128) for n in WIDTHS},
        "members M, 250 pairs": {n: make_vote(n, 250) for n in MEMBERS},
        "pairs N, two members": {n: make_vote(2, n) for n in PAIRS},
    }


def measure(works, rounds):
    """-> {label: {x: median seconds}}"""
    seconds = {label: {x: [] for x in work} for label, work in works.items()}
    for i in tqdm(range(rounds + 1), "rounds", leave=False):
        for label, work in works.items():
            for x, function in work.items():
                start = time.perf_counter()
                function()
                if i:  # the first round warms up
                    seconds[label][x].append(time.perf_counter() - start)
    medians = {}
    for label, times_at in seconds.items():
        medians[label] = {x: float(np.median(times)) for x, times in times_at.items()}
    return medians


def exponent(times):
    """Of the power law between the last two points: 1 is proportional growth"""
    (x0, t0), (x1, t1) = list(times.items())[-2:]
    return float(np.log(t1 / t0) / np.log(x1 / x0))


def plot(seconds, path):
    figure, axes = figures.subplots(1, len(seconds), 3.4 * len(seconds), 3.2)
    for ax, (label, times) in zip(axes, seconds.items()):
        x = np.array(list(times))
        t = 1000 * np.array(list(times.values()))
        ax.loglog(x, t, "o-", color=figures.COLOURS[0], label="measured")
        ax.loglog(x, t[0] * x / x[0], "--", color="#999999", label="in proportion")
        low, high = ax.get_ylim()
        ticks = [n for n in MILLISECONDS if low <= n <= high]
        ax.set_xticks(x, [str(n) for n in x])
        ax.set_yticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
        ax.set_xlabel(label)
    axes[0].set_ylabel("ms a step of 8 pairs")
    axes[2].set_ylabel("ms a vote")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figures.save(figure, path)


def compare_growth(path, rounds=7):
    """Print the times and write the picture."""
    seconds = measure(panels(), rounds)
    for label, times in seconds.items():
        text = ", ".join(f"{x}: {1000 * t:.1f} ms" for x, t in times.items())
        print(f"{label:26} {text}; at last with the power {exponent(times):.2f}")
    figures.draw(plot, seconds, path)
    print(f"{path} shows them")
