"""What the tests of several processes train, in float64

    torchrun --nproc_per_node=2 tests/rank_cases.py FOLDER    with two ranks -> two_ranks.pt

Without dropout every result is that of one process, to rounding: weights after the last step, and
gradients of the first.
"""
import contextlib
import sys
from dataclasses import replace
from unittest import mock

import torch
from helpers import SMALL, tiny
from small_runs import load_config

import metarm
import train
from config import assign
from runtime import distributed, files, sharding
from strength import treat
from train import RewardVariant

CASE = [word for word in SMALL if "dropout" not in word]
CASE += [
    "--world.pairs=41",  # the last of five batches is one pair, which two ranks cannot share
    "--world.valid=20", "--world.ood=12", "--world.demonstrations=41", "--world.temperature=0",
    "--model.layers=1", "--model.width=16", "--model.vocab=300", "--train.accumulate=2",
    "--sft.batch=10", "--sft.epochs=2", "--reward.batch=10", "--reward.epochs=2",
    "--reward.methods=baseline", "--ppo.methods=baseline",
    "--ppo.iterations=3", "--ppo.rollout_batch_size=9", "--ppo.answers_per_prompt=3",
    "--ppo.num_minibatches=2", "--ppo.max_new_tokens=6", "--ppo.ptx_coef=0.5",
    "--ppo.whiten=true", "--ppo.adaptive_kl_target=1", "--ppo.sample_every=0",
    "--meta.rounds=1", "--meta.batch=10", "--meta.prompts=12", "--meta.k=3", "--meta.epochs=2",
    "--contrast.prototypes=5", "--contrast.queue=8",
]


held = {}  # numbers that this rank holds of weights and gradients in each case


@contextlib.contextmanager
def first_gradients(kept, name):
    """Within it the gradients of the first step are added to `kept`, before they are clipped."""
    clip = torch.nn.utils.clip_grad_norm_

    def record(parameters, *arguments):
        parameters = list(parameters)
        if name not in kept:
            kept[name] = {str(i): whole(p.grad) for i, p in enumerate(parameters)}
            held[name] = sum(numbers_held(p) + numbers_held(p.grad) for p in parameters)
        return clip(parameters, *arguments)

    with mock.patch("torch.nn.utils.clip_grad_norm_", record):
        yield


def numbers_held(x):
    """Of a tensor, or of this rank's shard of it"""
    return (x.to_local() if hasattr(x, "to_local") else x).numel()


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def contrasted(run, weights, gradients):
    """Reward models with SimCSE, of the whole batch or of the rank, and with SwAV"""
    labels = treat(torch.zeros(len(run.train.rows)), "baseline")
    for name, changes in {
        "simcse": {"term": "simcse"},
        "simcse_rank": {"term": "simcse", "negatives": "rank"},
        "swav": {"term": "swav", "items": "difference"},
    }.items():
        contrast = replace(run.cfg.contrast, dropout=0.0, **changes)
        with first_gradients(gradients, name):
            train.train_reward_variant(
                run, f"reward_{name}", labels, run.valid.rows, RewardVariant(contrast=contrast)
            )
        weights[name] = files.load_tensors(run.path(f"reward_{name}.pt"))["model"]


def run_cases(folder, shard="none"):
    """-> weights and gradients of every case, {case: {name: tensor}} each"""
    config = load_config(*CASE, f"--train.shard={shard}", small=())
    config = assign(config, "out_dir", f"{folder}/{shard}_{distributed.world_size()}")
    round_ = metarm.meta_rounds(config)[0]
    weights = {}
    gradients = {}
    with first_gradients(gradients, "sft"):
        train.ensure_stages(config, "sft")
    with first_gradients(gradients, "reward_baseline"):
        run = train.ensure_stages(config, "reward")
    with first_gradients(gradients, "meta_1"):
        train.train_round_reward(run, round_)
    with first_gradients(gradients, "policy_baseline"):
        train.train_policy(run, "baseline")
    for name in ("sft", "reward_baseline", "meta_1", "policy_baseline"):
        weights[name] = files.load_tensors(run.path(f"{name}.pt"))["model"]
    if shard == "none":
        contrasted(run, weights, gradients)
        exact = run.with_settings({"meta.second_order": True})
        with first_gradients(gradients, "second_order"):
            train.train_round_reward(exact, round_)
        weights["second_order"] = files.load_tensors(run.path("meta_1.pt"))["model"]
    return weights, gradients


def held_after_a_pass():
    """-> numbers that this rank holds of a spread model that was gathered and has made a pass; all
    """
    model = tiny()
    total = sum(p.numel() for p in model.parameters())
    sharding.shard(model, torch.device("cpu"))
    with sharding.gathered(model):
        pass
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))
    return sum(numbers_held(p) for p in model.parameters()), total


@contextlib.contextmanager
def in_float64():
    """Within it models and everything that is computed are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(before)


def main(folder):
    distributed.join()
    results = {}
    with in_float64():
        for shard in ("none", "full"):
            results[shard] = run_cases(folder, shard)
            results[f"held, {shard}"] = dict(held)
        results["held after a pass"] = held_after_a_pass()
    if distributed.rank() == 0:
        torch.save(results, f"{folder}/two_ranks.pt")
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1])
