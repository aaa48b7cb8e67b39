"""Tiny models for PPO, one rollout and one update of them."""
import contextlib
import copy
from types import SimpleNamespace

import torch
from helpers import FakeRun, random_rows, tiny, tiny_reward

import config
import ppo
from common import set_lr
from ppo import Learners, Models, Moments

EOS = 23
PLAIN = config.Ppo(max_new_tokens=7, lr=1e-2, critic_lr=1e-2)


def stub_run(cfg, eos_id=EOS, grad_clip=1.0):
    """What rollout and update read of a Run.  cfg: [ppo]"""
    return FakeRun(
        cfg=config.Config(ppo=cfg, train=config.Train(grad_clip=grad_clip)),
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        tokenizer=SimpleNamespace(eos_id=eos_id, end_ids=[eos_id]),
    )


def response_length(rows):
    """A reward function: the number of tokens, EOS included"""
    return torch.tensor([float(len(row.responses[0])) for row in rows])


def make_models(reward_fn=response_length, **shape):
    policy = tiny(tied=False, seed=1, **shape)
    critic = tiny_reward(seed=2, **shape)
    return Models(policy, critic, reference=copy.deepcopy(policy), reward_fn=reward_fn)


def adamw(parameters):
    return torch.optim.AdamW(parameters, weight_decay=0.0)


def sgd(parameters):
    """Plain steps.  AdamW divides by the size of a gradient, which turns the rounding of one near 0
    into a whole step; here an error of the gradient remains as small as it is."""
    return torch.optim.SGD(parameters, lr=0.0)


def make_learners(models, optimizer=adamw, scaler=None):
    return Learners(
        models.policy,
        models.critic,
        optimizer(models.policy.parameters()),
        optimizer(models.critic.parameters()),
        scaler or torch.amp.GradScaler("cpu", enabled=False),
    )


def make_prompts(n=40):
    return [row.prompt.tolist() for row in random_rows(n, 1, 0)]


def roll(models, cfg=PLAIN, prompts=None, moments=None, seed=0, eos_id=EOS):
    """-> Rollout, metrics, responses, scores"""
    return ppo.make_rollout(
        stub_run(cfg, eos_id), models, prompts or make_prompts(), moments or Moments(),
        torch.Generator().manual_seed(seed), cfg,
    )


def update(learners, rollout, cfg=PLAIN, grad_clip=1.0, eos_id=EOS, **more):
    """-> metrics of an update at the learning rates of cfg"""
    set_lr(learners.policy_optimizer, cfg.lr)
    set_lr(learners.critic_optimizer, cfg.critic_lr)
    run = stub_run(cfg, eos_id, grad_clip)
    generator = torch.Generator().manual_seed(0)
    return ppo.update_policy(run, learners, rollout, cfg, generator, **more)


def pad_columns(rollout, extra, fill):
    """The rollout with more columns of padding; fill: what its numbers are there"""
    def pad(x, value):
        return torch.nn.functional.pad(x, (0, extra), value=value)

    mask = pad(rollout.mask, False)
    numbers = {}
    for name in ("logprob", "value", "advantage", "returns"):
        numbers[name] = pad(getattr(rollout, name), 0.0).masked_fill(~mask, fill)
    return rollout._replace(mask=mask, **numbers)
