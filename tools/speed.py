"""The table of `python -m tools.bench`: time of each kind of work beside its matrix products alone.

The kinds of work take turns with one another and with their own products (tools/floors.py), so that
other load on the machine affects all of them alike.  Printed are medians over rounds of times, of
the ratio within a round and of its quartiles; training steps of a reward model are also given as
multiples of the plain one.

16 pairs of the built-in world a step; MetaRM's samples are 16 prompts with 5 answers each.
Sampling and PPO have prompts of 8 to 64 tokens, four answers to each, that end after a third of 32
tokens in the median.
"""
import math
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import config
import losses
import ppo
import world
from common import make_optimizer, pick_dtype
from contrast import ContrastiveHead
from data import Pair, Row, collate, encode_row, response_tokens
from generate import Sampling, generate
from metarm import meta_gradient
from model import LanguageModel, RewardModel, Shape, init_weights
from runtime.run import Run
from tokenizer import train_tokenizer
from tools.floors import record_products
from train import pair_loss

BATCH = 16
TERMS = {  # the paper's settings, sec. 4
    "simcse": config.Contrast(term="simcse"),
    "simcse on differences": config.Contrast(term="simcse", items="difference"),
    "swav, K = 50, a queue of 256": config.Contrast(term="swav", weight=0.1, queue=256),
    "swav on differences, K = 20": config.Contrast(
        term="swav", items="difference", weight=0.5, prototypes=20),
}


def world_pairs(count, seed=0):
    rows, _ = world.pairs(count, seed, world.Noise())
    return [Pair(**row) for row in rows]


def texts_of(pairs):
    for pair in pairs:
        yield from (pair.prompt, pair.chosen, pair.rejected)


def synchronize(device):
    if device.type == "cuda":  # CUDA only: not run by CI
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------
# Steps of each kind


class StepData(NamedTuple):
    """What the steps of all kinds have in common."""
    rows: list            # encoded pairs
    samples: list         # rows with k responses each, for MetaRM
    shape: Shape
    device: torch.device
    dtype: torch.dtype    # of autocast, as in training
    eos_id: int


def make_data(device, num_pairs=2000, k=5, layers=2, width=128):
    pairs = world_pairs(num_pairs)
    tokenizer = train_tokenizer(texts_of(pairs), 1024)
    rows = []
    for pair in pairs:
        rows.append(encode_row(tokenizer, pair.prompt, (pair.chosen, pair.rejected), 256))
    samples = []
    for i, row in enumerate(rows):
        answers = tuple(rows[(i + j) % len(rows)].responses[0] for j in range(k))
        samples.append(Row(row.prompt, answers))
    shape = Shape(
        tokenizer.vocab_size, layers, heads=4, kv_heads=4, width=width,
        hidden=8 * math.ceil(width / 3), context=256)
    dtype = pick_dtype(config.Config(), device)
    return StepData(rows, samples, shape, device, dtype, tokenizer.eos_id)


def make_step(data, settings=None, second_order=None, seed=0):
    """-> function that makes one training step of a new model.

    settings: the [contrast] section, if the step has a contrastive term
    second_order: False or True for a step of MetaRM
    """
    generator = torch.Generator().manual_seed(seed)
    model = init_weights(RewardModel(replace(data.shape, dropout=0.05)), generator)
    model = model.to(data.device).train()
    head = None
    extra_params = []
    if settings is not None:
        head = ContrastiveHead(settings, data.shape.width, generator).to(data.device)
        extra_params = list(head.parameters())
    optimizer = make_optimizer(model, "adamw", 1e-4, 0.1, extra_params)
    pair_rng = np.random.default_rng(seed)    # every kind of step sees the same pairs
    sample_rng = np.random.default_rng(seed)
    autocast = torch.autocast(data.device.type, data.dtype, data.dtype != torch.float32)
    margin = torch.zeros(BATCH)
    p = torch.ones(BATCH)

    def ranking_loss():
        rows = [data.rows[i] for i in pair_rng.integers(0, len(data.rows), BATCH)]
        with autocast:
            loss, _ = pair_loss(model, rows, margin, p, head)
        return loss / BATCH

    def difference_loss():
        rows = [data.samples[i] for i in sample_rng.integers(0, len(data.samples), BATCH)]
        batch = collate(rows).to(data.device)
        with autocast:
            rewards = model(batch.tokens, batch.branch, batch.position, batch.last)
        return losses.difference(rewards).mean()

    def step():
        optimizer.zero_grad(set_to_none=True)
        if second_order is None:
            ranking_loss().backward()
        else:
            parameters = list(model.parameters())
            gradients = meta_gradient(
                parameters, difference_loss, ranking_loss, 0.1, second_order)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
        optimizer.step()

    return step


def make_sft_step(data, seed=0):
    """-> function that makes one training step of a new language model"""
    model = init_weights(LanguageModel(data.shape), torch.Generator().manual_seed(seed))
    model = model.to(data.device).train()
    optimizer = make_optimizer(model, "adamw", 1e-4, 0.1)
    rng = np.random.default_rng(seed)

    def step():
        rows = [data.rows[i].branches(0) for i in rng.integers(0, len(data.rows), BATCH)]
        batch = collate(rows).to(data.device)
        out_pos, target = (x.to(data.device) for x in response_tokens(rows))
        logits = model(batch.tokens, out_pos=out_pos)
        loss = losses.masked_mean(losses.language_model(logits, target), target >= 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


# --------------------------------------------------------------------------------------------------
# Sampling and PPO

LIMIT = 32  # tokens of an answer


def make_policy(data, seed=0):
    """A random policy whose answers end after a third of LIMIT in the median, as those of trained
    policies do: the head gets a bias towards EOS."""
    shape = replace(data.shape, tied=False)
    policy = init_weights(LanguageModel(shape), torch.Generator().manual_seed(seed))
    eos_prob = 1 - 0.5 ** (3 / LIMIT)  # at each token
    head = torch.nn.Linear(shape.width, shape.vocab)
    head.weight = policy.lm_head.weight
    with torch.no_grad():
        head.bias.zero_()
        head.bias[data.eos_id] = math.log(shape.vocab * eos_prob / (1 - eos_prob))
    policy.lm_head = head
    return policy.to(data.device).eval()


def make_prompts(data, count, answers=4, seed=0):
    """count prompts of 8 to 64 random tokens, each `answers` times"""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(count // answers or 1):
        length = rng.integers(8, 65)
        prompts += [rng.integers(0, data.eos_id, length).tolist()] * min(answers, count)
    return prompts


def make_sampler(data, count):
    """-> function that samples `count` answers"""
    policy = make_policy(data)
    prompts = make_prompts(data, count)
    sampling = Sampling(LIMIT, data.eos_id)

    def sample():
        generate(policy, prompts, sampling, torch.Generator().manual_seed(0))

    return sample


def load_ppo(run, build):
    """Models and Learners of PPO with new models in the place of saved ones.

    build: function of LanguageModel or RewardModel -> model
    """
    def load_model(run, kind, name):
        return build(kind)

    with mock.patch.object(ppo, "load_model", load_model):
        models = ppo.load_models(run, "reward_baseline", "sft")
    return models, ppo.make_learners(run, models)


def make_ppo(data, count=64):
    """-> functions that make a rollout of `count` answers, and that update on it"""
    settings = config.Ppo(rollout_batch_size=count, max_new_tokens=LIMIT, lr=1e-6, critic_lr=1e-6)
    run = Run(config.Config(device="cpu", ppo=settings), data.device, data.dtype)
    run.__dict__["tokenizer"] = SimpleNamespace(eos_id=data.eos_id, end_ids=[data.eos_id])

    def build(kind):
        if kind is LanguageModel:
            return make_policy(data)
        return init_weights(kind(data.shape), torch.Generator().manual_seed(1)).eval()

    models, learners = load_ppo(run, build)
    prompts = make_prompts(data, count)

    def roll():
        generator = torch.Generator().manual_seed(0)
        return ppo.make_rollout(run, models, prompts, ppo.Moments(), generator, settings)[0]

    rollout = roll()

    def update():
        generator = torch.Generator().manual_seed(0)
        ppo.update_policy(run, learners, rollout, settings, generator)

    return roll, update


# --------------------------------------------------------------------------------------------------
# The table


def make_works(data):
    """-> {name: function that does the work once}, the plain reward-model step first"""
    works = {f"reward model, {BATCH} pairs": make_step(data)}
    for name, settings in TERMS.items():
        works[f"... {name}"] = make_step(data, settings)
    works["... MetaRM, first order"] = make_step(data, second_order=False)
    works["... MetaRM, second order"] = make_step(data, second_order=True)
    works[f"SFT, {BATCH} answers"] = make_sft_step(data)
    for count in (1, 16, 64, 256):
        works[f"sampling, answers: {count}"] = make_sampler(data, count)
    roll, update = make_ppo(data)
    works["PPO, rollout of 64 answers"] = roll
    works["PPO, update"] = update
    return works


def time_works(works, device, rounds, warmup=1):
    """-> seconds (rounds, works, 2): of the work and of its matrix products, in turns"""
    pairs = [(work, record_products(work)) for work in works.values()]
    seconds = np.zeros((warmup + rounds, len(works), 2))
    for i in tqdm(range(warmup + rounds), "rounds", leave=False):
        for j, pair in enumerate(pairs):
            for k, work in enumerate(pair):
                synchronize(device)
                start = time.perf_counter()
                work()
                synchronize(device)
                seconds[i, j, k] = time.perf_counter() - start
    return seconds[warmup:]


def compare_works(data, rounds=15):
    """Print a line for each kind of work."""
    works = make_works(data)
    seconds = time_works(works, data.device, rounds)
    milliseconds = 1000 * np.median(seconds, axis=0)
    quarters = [0.25, 0.5, 0.75]
    low, ratio, high = np.quantile(seconds[:, :, 0] / seconds[:, :, 1], quarters, axis=0)
    plain = np.median(seconds[:, :, 0] / seconds[:, :1, 0], axis=0)
    where = f"{describe(data.device)}, {str(data.dtype).removeprefix('torch.')}"
    print(f"{data.shape.layers} layers of width {data.shape.width}, {where}")
    print(f"{'work':36}{'ms':>9}{'products':>10}{'ratio':>7}  quartiles    of a plain step")
    for i, name in enumerate(works):
        text = f"{name:36}{milliseconds[i, 0]:9.1f}{milliseconds[i, 1]:10.1f}{ratio[i]:7.2f}  "
        text += f"{low[i]:.2f}-{high[i]:.2f}"
        if i <= len(TERMS) + 2:
            text = f"{text:75}{plain[i]:8.2f}"
        print(text)
    print("(products: the same matrix products alone, in turns with the work)")


def describe(device):
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
