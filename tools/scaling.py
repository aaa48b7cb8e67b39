"""python -m tools.scaling

Prints what several GPUs have to hold and to send, computed from the shapes of three models: memory
of each rank by stage, with and without train.shard=full; bytes that each rank sends in a step; and
the efficiency that follows from a bandwidth.  Nothing is run: models are built without memory.

docs/scaling.md holds these tables and says what they leave out.
"""
import sys
from typing import NamedTuple

import torch

from model import LanguageModel, Shape
from runtime.inputs import escape_output
from runtime.report import table

SHAPES = {
    "SmolLM2-135M": Shape(49152, 30, 9, 3, 576, 1536, 2048, 0.0, True),
    "Llama-3.2-1B": Shape(128256, 16, 32, 8, 2048, 8192, 2048, 0.0, True),
    "Llama-2-7B": Shape(32000, 32, 32, 32, 4096, 11008, 2048, 0.0, False),
}
RANKS = (1, 2, 8)
WEIGHT = 4        # bytes: float32 weights, which autocast converts for each product
TRAINED = 16      # weight, gradient, and two moments of Adam
BUCKET = 2 ** 26  # bytes of gradients that distributed.add_up sums at once
TOKENS = {16: 6400, 128: 51200}  # pairs a step: tokens of HH-RLHF, a prompt and two answers
RATE = 4e14           # FLOP/s, two fifths of an H100's bf16 peak
BANDWIDTHS = {"NVLink": 3e11, "PCIe": 2.5e10, "10 Gb/s Ethernet": 1.2e9}  # bytes/s of each GPU


class Sizes(NamedTuple):
    """Numbers of weights"""
    all: int
    block: int
    rest: int   # embedding, output head, final norm


def sizes_of(shape):
    """-> Sizes, of the model itself, built on the device "meta" """
    with torch.device("meta"):
        model = LanguageModel(shape)
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers["0"].parameters())
    return Sizes(total, block, total - block * shape.layers)


def training_bytes(sizes, ranks, shard):
    """Of a rank in SFT and in training a reward model: weights, gradients, moments; no activations
    """
    if not shard or ranks == 1:
        return TRAINED * sizes.all + (BUCKET if ranks > 1 else 0)
    return TRAINED * sizes.all / ranks + gathered_bytes(sizes)


def gathered_bytes(sizes):
    """The largest group and the next one, whole, with the gradient of one of them"""
    groups = sorted((sizes.block, sizes.block, sizes.rest))
    return WEIGHT * (2 * groups[-1] + groups[-2])


def ppo_bytes(sizes, ranks, shard):
    """Of a rank in PPO: policy and critic are trained, reference and reward model are not

    With shards the whole policy is there for sampling, which is more than two groups.
    """
    weights = 2 * TRAINED + 2 * WEIGHT
    if not shard or ranks == 1:
        return weights * sizes.all + (BUCKET if ranks > 1 else 0)
    return weights * sizes.all / ranks + max(WEIGHT * sizes.all, gathered_bytes(sizes))


def sent_bytes(sizes, ranks, shard):
    """That each rank sends in a step: a sum of all gradients, which is a reduce-scatter and an
    all-gather; with shards two all-gathers of the weights and a reduce-scatter of the gradients"""
    passes = 3 if shard else 2
    return passes * WEIGHT * sizes.all * (ranks - 1) / ranks


def efficiency(tokens, ranks, bandwidth, shard):
    """Share of the time that is arithmetic, where nothing is sent meanwhile

    A weight costs 6 FLOP a token and is sent two or three times, so the model's size cancels out.
    """
    one_weight = Sizes(1, 0, 1)
    arithmetic = 6 * tokens / ranks / RATE
    return arithmetic / (arithmetic + sent_bytes(one_weight, ranks, shard) / bandwidth)


def memory_table():
    lines = []
    for name, shape in SHAPES.items():
        sizes = sizes_of(shape)
        for stage, count in (("reward model", training_bytes), ("PPO", ppo_bytes)):
            row = [name, f"{sizes.all / 1e9:.2f}", stage]
            row.append(gigabytes(count(sizes, 1, False)))
            for ranks in RANKS[1:]:
                row.append(gigabytes(count(sizes, ranks, True)))
            lines.append(row)
    header = ["model", "10^9 weights", "stage", "a rank, GB", "full, 2 ranks", "full, 8 ranks"]
    return table(header, lines)


def sent_table():
    lines = []
    for name, shape in SHAPES.items():
        sizes = sizes_of(shape)
        row = [name]
        for ranks in RANKS[1:]:
            row += [gigabytes(sent_bytes(sizes, ranks, shard)) for shard in (False, True)]
        lines.append(row)
    header = ["sent by a rank in a step, GB", "2 ranks", "2, full", "8 ranks", "8, full"]
    return table(header, lines)


def efficiency_table():
    lines = []
    for pairs, tokens in TOKENS.items():
        for ranks in RANKS[1:]:
            for shard in (False, True):
                row = [str(pairs), str(ranks), "full" if shard else "none"]
                for bandwidth in BANDWIDTHS.values():
                    row.append(f"{efficiency(tokens, ranks, bandwidth, shard):.2f}")
                lines.append(row)
    return table(["pairs a step", "ranks", "shard", *BANDWIDTHS], lines)


def gigabytes(number):
    return f"{number / 1e9:.1f}"


def main(argv):
    escape_output()
    if argv:
        print(__doc__)
        return 0
    for text in (memory_table(), sent_table(), efficiency_table()):
        print(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
