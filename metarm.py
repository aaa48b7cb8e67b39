"""MetaRM: train a reward model on labelled pairs so that it separates the current policy's answers.

    1. theta' = theta + eta grad J(theta)    ascent: spread the rewards of the policy's own answers
    2. g = grad L(theta')                    gradient of the labelled pairs at the spread model
    3. theta <- theta - alpha g              the step is applied to theta, not to theta'

J is `losses.difference` on k sampled responses per prompt, which have no labels; L is the reward
model's loss.  Their prompts need not match.  Step 3 is the optimizer's:

    gradients = meta_gradient(model.parameters(), difference_loss, pair_loss, eta)
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad = gradient
    optimizer.step()

Rounds repeat: sample from the latest policy, MetaRM on the pairs and these samples, PPO with the
new reward model.  A round starts where the last one ended: the reward model from the last reward
model, the policy from the last policy, with the SFT model as its reference.

Source: arXiv 2401.06080, sec. 3.2, and arXiv 2405.00438.
"""
import contextlib
import functools
import inspect
from typing import Any, Callable, Iterable, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (
    embed_rows,
    make_sampling,
    policy_prompts,
    sample_answers,
    score_rows,
    training_prompts,
)
from data import batches, collate
from losses import bradley_terry, difference


def meta_gradient(
    parameters: Iterable[Tensor], difference_loss: Callable, pair_loss: Callable, eta: float,
    second_order: bool = False, stats: dict | None = None,
) -> list[Tensor]:
    """The gradient of L at theta + eta grad J(theta), to be applied at theta.

        first order (the paper)    g = grad L(theta')
        second order               g + eta H g, H the Hessian of J at theta: the derivative through
                                   step 1 as well

    To first order in eta, L(theta + eta grad J) = L + eta grad J . grad L.  Descending it lowers
    the inner product of the two gradients; the first-order step keeps one of the two terms of that
    product's gradient, eta (Hessian of L) grad J.  (Eq. 17 reads the product as an agreement that
    is rewarded; the sign of a descent says otherwise.)

    parameters: any iterable of trained parameters
    difference_loss, pair_loss: functions without arguments -> scalar J, L, or a generator of
        scalars that add up to it; each is back-propagated before the next is computed
    stats: a dictionary that receives the norms of grad J and g, and their cosine
    returns a list of gradients, one per parameter; zeros where a loss does not depend on it
    Raises ValueError for frozen parameters and for parameters listed twice.

    Parameters hold their old values bit for bit afterwards, also when a closure raises, and no
    .grad is changed.  Each closure is called once, J first; each draws its own dropout masks, and H
    belongs to the J of step 1.  Buffers that a forward pass changes (running means) are not
    restored; the models here have none.

    A loss that is scaled for float16 gives gradients of the same scale; divide eta by J's scale.

    Second order differentiates a backward pass.  The fused kernels of scaled_dot_product_attention
    do not support that, so J uses the plain kernel; torch.compile does not either, so J must call
    the uncompiled model.  The graph of J stays in memory meanwhile.
    """
    parameters = list(parameters)  # a generator can be read only once
    distinct = {id(p) for p in parameters}
    if len(distinct) < len(parameters) or not all(p.requires_grad for p in parameters):
        raise ValueError("meta_gradient: parameters are frozen or listed twice; give those that "
                         "require a gradient, each once")
    theta = [p.detach().clone() for p in parameters]  # restored by copy: p + g - g differs from p
    try:
        with sdpa_kernel(SDPBackend.MATH) if second_order else contextlib.nullcontext():
            ascent = gradient(difference_loss(), parameters, create_graph=second_order)
        # Autograd does not notice a change through .data, and need not: J's graph is used again
        # only after theta is restored.
        for p, direction in zip(parameters, ascent):
            p.data.add_(eta * direction.detach())
        torch.clear_autocast_cache()  # else L reads the half-precision copy of theta that J made
        g = gradient(pair_loss(), parameters)
        g = [v.clone() for v in g]  # autograd may return one tensor twice; clipping is in place
    finally:
        for p, old in zip(parameters, theta):
            p.data.copy_(old)
        torch.clear_autocast_cache()
    if second_order:
        g = add_hessian_product(parameters, ascent, g, eta)
    if stats is not None:
        stats.update(gradient_stats(ascent, g))
    return g


def gradient(losses, parameters, vectors=None, create_graph=False):
    """Gradient of one loss, or the sum over a generator of losses.  -> list of tensors"""
    if not inspect.isgenerator(losses):
        return torch.autograd.grad(
            losses, parameters, vectors, create_graph=create_graph, materialize_grads=True
        )
    total = [torch.zeros_like(p) for p in parameters]
    for loss in losses:
        part = gradient(loss, parameters, create_graph=create_graph)
        total = [a + b for a, b in zip(total, part)]
    return total


def add_hessian_product(parameters, ascent, g, eta):
    """g + eta H g.  H is symmetric, so H g is one backward pass through grad J."""
    outputs = []
    vectors = []
    for direction, v in zip(ascent, g):
        if direction.requires_grad:  # not where J is linear in a parameter or independent of it
            outputs.append(direction)
            vectors.append(v)
    if not outputs:
        return g
    product = gradient(outputs, parameters, vectors)
    return [a + eta * h for a, h in zip(g, product)]


def gradient_stats(ascent, g):
    """Cosine of grad J and g, and their norms, in float64 -> dictionary of scalars"""
    ascent = [a.detach().double() for a in ascent]
    dot = sum((a * b).sum() for a, b in zip(ascent, g))
    j_square = sum((a * a).sum() for a in ascent)
    l_square = sum((b * b).sum() for b in g)
    return {
        "cosine": dot / (j_square * l_square).sqrt().clamp(min=1e-300),
        "difference_norm": j_square.sqrt(),
        "pair_norm": l_square.sqrt(),
    }


def make_meta_step(run, samples, cfg, seed_key):
    """MetaRM's step for the training loop, with cfg.batch prompts of similar length a step.

    samples: Rows with k sampled responses; cfg: the [meta] section
    -> function of (model, step, pair_loss, scaler) that returns gradients and stats
    """
    accumulate = run.cfg.train.accumulate

    @functools.lru_cache(1)
    def epoch_batches(epoch):
        return batches([len(row) for row in samples], cfg.batch, f"{seed_key} samples {epoch}")

    def meta_step(model, step, pair_loss, scaler):
        epoch, i = divmod(step, len(epoch_batches(0)))
        index = epoch_batches(epoch)[i]
        stats: dict[str, Any] = {"J": 0.0}
        # compiled code cannot be differentiated twice
        j_model = getattr(model, "uncompiled", (model,))[0] if cfg.second_order else model

        def difference_loss():
            for micro_batch in np.array_split(index, min(accumulate, len(index))):
                batch = collate([samples[i] for i in micro_batch]).to(run.device)
                with run.autocast():
                    rewards = j_model(
                        batch.tokens, batch.branch, batch.position, batch.last,
                        inputs_embeds=batch.inputs_embeds,
                    )  # (b, k)
                J = difference(rewards).sum() / len(index)
                stats["J"] += J.detach()
                yield scaler.scale(J)

        eta = cfg.eta / scaler.get_scale()
        gradients = meta_gradient(
            model.parameters(), difference_loss, pair_loss, eta, cfg.second_order, stats
        )
        return gradients, stats

    return meta_step


# ----------------------------------------------------------------------------------------------
# Rounds


class Round(NamedTuple):
    arm: str           # meta, plain or none
    number: int        # from 1
    start: str         # reward model that this round's training starts from
    reward: str        # this round's reward model; the old one in arm none
    latest: str        # policy that is sampled, and that PPO starts from
    policy: str        # this round's policy


def meta_rounds(config):
    """All rounds of all arms, in order -> [Round]; the names are those of the files"""
    rounds = []
    for arm in config.meta.arms:
        reward = f"reward_{config.meta.method}"
        policy = "sft"
        for number in range(1, config.meta.rounds + 1):
            start = reward
            latest = policy
            reward = start if arm == "none" else f"{arm}_{number}"
            policy = f"policy_{arm}_{number}"
            rounds.append(Round(arm, number, start, reward, latest, policy))
    return rounds


def split_ood_prompts(run):
    """Pairs out of distribution, one for each prompt -> those to sample from, those to judge on"""
    by_prompt = {}
    for encoded in run.ood.values():
        for pair in encoded.pairs:
            by_prompt[pair.prompt] = pair
    pairs = list(by_prompt.values())
    return pairs[::2], pairs[1::2]


def round_prompts(run):
    """Pairs whose prompts the policies of the rounds are sampled on; their labels are not read."""
    if run.cfg.meta.domain == "ood":
        return split_ood_prompts(run)[0]
    return training_prompts(run)


def sample_responses(run, policy, pairs, seed):
    """meta.k responses of the policy POLICY.pt to each of meta.prompts prompts of the pairs.

    -> Rows with k branches, [{"prompt", "responses"}]; fewer where there are fewer prompts
    """
    cfg = run.cfg.meta
    generator = torch.Generator().manual_seed(seed)
    prompts = policy_prompts(run, pairs)
    chosen = torch.randperm(len(prompts), generator=generator)[:cfg.prompts]
    prompts = [prompts[i] for i in chosen.tolist()]
    sampling = make_sampling(run, cfg)
    texts, rows = sample_answers(run, policy, prompts, generator, sampling, num_samples=cfg.k)
    lines = []
    for i, (prompt, _) in enumerate(prompts):
        lines.append({"prompt": prompt, "responses": texts[i * cfg.k:(i + 1) * cfg.k]})
    return embed_rows(run, rows), lines


def make_validation_fn(run, name):
    """eval_fn of the training loop: logs accuracy and loss on up to 500 validation pairs.

    -> function of a model that returns rewards (N, 2), or None without validation pairs
    """
    rows = run.valid.rows[:500]

    def validate(model):
        rewards = score_rows(run, model, rows)
        chosen, rejected = rewards.unbind(1)
        run.log(
            stage=name,
            valid_accuracy=float((chosen > rejected).float().mean()),
            valid_loss=float(bradley_terry(chosen, rejected).mean()),
        )
        return rewards

    return validate if rows else None
