"""MetaRM: train a reward model on labelled pairs so that it also tells apart what the current policy says.

    1. theta' = theta + eta grad J(theta)    ascent: spread the rewards of the policy's own answers, which have no labels
    2. g = grad L(theta')                    what the labelled pairs ask of a model that has done so
    3. theta <- theta - alpha g              from theta, not from theta'

J is `losses.difference` on k sampled responses per prompt, L the reward model's loss; their prompts need not match.
Step 3 is the optimiser's:

    gradients = meta_gradient(model.parameters(), lambda: difference(...).mean(), lambda: bradley_terry(...).mean(), eta)
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad = gradient
    optimiser.step()

Rounds repeat: sample from the latest policy, MetaRM on the pairs and these samples, PPO with the new reward model.  They take up
where the last round ended: the reward model at the last one, the policy at the last one, with the SFT model as its reference.

Source: arXiv 2401.06080, the part on MetaRM, and arXiv 2405.00438.
"""
import contextlib
import functools
import inspect
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import states
from losses import bradley_terry, difference
from ppo import asked
from run import answers, policy_prompts, rewards_of


def meta_gradient(parameters, difference_loss, pair_loss, eta, second_order=False, notes=None):
    """The gradient of L at theta + eta grad J(theta), to be applied at theta.

        first order (the paper)    g = grad L(theta')
        second order               g + eta H g, H the Hessian of J at theta: the derivative through step 1 as well

    parameters: any iterable of trained parameters; difference_loss, pair_loss: without arguments -> scalar J, L, or a generator
    of scalars that add up to it, each of which is gone through backward before the next is asked for (short memory)
    notes: a dictionary that takes the norms of grad J and g, and the cosine between them
    returns a list of gradients, one per parameter; zeros where a closure does not use it

    Parameters hold their old values bit for bit afterwards, also when a closure raises, and no .grad is touched.  Each
    closure is called once, J first; each draws its own dropout masks, and H is of the J that the step was taken with.
    Buffers that a forward pass moves (running means) are not put back; the models here have none.

    A loss that is scaled for float16 gives gradients with the same scale; divide eta by the scale of J.

    Second order differentiates a backward pass.  The fused kernels of scaled_dot_product_attention cannot do that, so J runs
    on the plain one; nor can torch.compile, so give J the model as it was before.  The graph of J stays in memory meanwhile.
    """
    parameters = list(parameters)  # a generator can be gone through only once
    if len({id(p) for p in parameters}) < len(parameters) or not all(p.requires_grad for p in parameters):
        raise ValueError("meta_gradient: parameters are frozen or listed twice; give those that require a gradient, each once")
    theta = [p.detach().clone() for p in parameters]  # restored by copy: p + g - g is not p
    try:
        with sdpa_kernel(SDPBackend.MATH) if second_order else contextlib.nullcontext():
            ascent = gradient(difference_loss(), parameters, create_graph=second_order)
        # Through .data autograd does not notice.  It need not: J's graph is used again only when theta stands there again.
        for p, step in zip(parameters, ascent):
            p.data.add_(eta * step.detach())
        torch.clear_autocast_cache()  # within one autocast, L would otherwise meet theta again, cast when J was computed
        g = [v.clone() for v in gradient(pair_loss(), parameters)]  # autograd may hand out one tensor twice; clipping is in place
    finally:
        for p, old in zip(parameters, theta):
            p.data.copy_(old)
        torch.clear_autocast_cache()
    if second_order:  # H is symmetric: g H = H g is one backward pass through grad J
        through = [(step, v) for step, v in zip(ascent, g) if step.requires_grad]  # not where J is linear or blind
        if through:
            steps, vectors = zip(*through)
            g = [a + eta * h for a, h in zip(g, gradient(steps, parameters, vectors))]
    if notes is not None:
        ascent = [a.detach().double() for a in ascent]
        dot, of_j, of_l = (sum((a * b).sum() for a, b in zip(x, y)) for x, y in ((ascent, g), (ascent, ascent), (g, g)))
        notes |= {"cosine": dot / (of_j * of_l).sqrt().clamp(min=1e-300), "difference_norm": of_j.sqrt(), "pair_norm": of_l.sqrt()}
    return g


def gradient(outputs, parameters, vectors=None, create_graph=False):
    if not inspect.isgenerator(outputs):
        return torch.autograd.grad(outputs, parameters, vectors, create_graph=create_graph, materialize_grads=True)
    total = [torch.zeros_like(p) for p in parameters]
    for piece in outputs:
        total = [a + b for a, b in zip(total, gradient(piece, parameters, create_graph=create_graph))]
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Rounds

class Round(NamedTuple):
    arm: str           # meta, plain or none
    number: int        # from 1
    start: str         # the reward model that this round's begins as
    reward: str        # this round's reward model; the old one in arm none
    latest: str        # the policy that samples, and that PPO begins at
    policy: str        # this round's policy


def rounds(config):
    """All rounds of all arms, in order -> [Round]; their names are those of the files"""
    out = []
    for arm in config.meta.arms:
        reward, policy = f"reward_{config.meta.method}", "sft"
        for number in range(1, config.meta.rounds + 1):
            start, latest = reward, policy
            reward, policy = start if arm == "none" else f"{arm}_{number}", f"policy_{arm}_{number}"
            out.append(Round(arm, number, start, reward, latest, policy))
    return out


def ood_halves(run):
    """The pairs out of distribution, one for each prompt -> those to sample and to practise on, those to be judged on"""
    one = {p.prompt: p for pairs, _ in run.ood.values() for p in pairs}
    return list(one.values())[::2], list(one.values())[1::2]


def practice(run):
    """The pairs whose prompts the policies of the rounds are asked; no label of them is read."""
    return ood_halves(run)[0] if run.config.meta.domain == "ood" else asked(run, run.config.ppo)


def sample_responses(run, policy, pairs, seed):
    """meta.k answers of the policy POLICY.pt to each of meta.prompts prompts of the pairs, or of as many as there are

    -> Rows with k branches, [{"prompt", "responses"}]
    """
    s, generator, prompts = run.config.meta, torch.Generator().manual_seed(seed), policy_prompts(run, pairs)
    prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=generator)[:s.prompts].tolist()]
    texts, rows = answers(run, policy, prompts, generator, s.temperature, copies=s.k)
    lines = [{"prompt": prompt, "responses": texts[i * s.k:(i + 1) * s.k]} for i, (prompt, _) in enumerate(prompts)]
    return states.compute(run, rows, "cpu"), lines


def look_ahead(run, samples, s, order):
    """MetaRM's step for loop.fit, with s.batch of the samples each time, of similar length; s: the [meta] section"""
    @functools.lru_cache(1)
    def batches(epoch):
        return data.batches([len(row) for row in samples], s.batch, f"{order} samples {epoch}")

    def step(model, number, pair_loss, scaler):
        epoch, i = divmod(number, len(batches(0)))
        index, notes = batches(epoch)[i], {"J": 0.0}
        plain = getattr(model, "_orig_mod", model) if s.second_order else model  # compiled code cannot be differentiated twice

        def difference_loss():
            for piece in np.array_split(index, min(run.config.train.accumulate, len(index))):
                batch = data.collate([samples[i] for i in piece]).to(run.device)
                with run.autocast():
                    rewards = plain(*batch[:3], read=batch.last, states=batch.states)  # (b, k)
                J = difference(rewards).sum() / len(index)
                notes["J"] += J.detach()
                yield scaler.scale(J)

        gradients = meta_gradient(model.parameters(), difference_loss, pair_loss, s.eta / scaler.get_scale(), s.second_order, notes)
        return gradients, notes

    return step


def validation(run, unit):
    """watch of loop.fit: accuracy and loss on up to 500 validation pairs, as lines of the log"""
    rows = run.valid[1][:500]

    def watch(model):
        rewards = rewards_of(run, model, rows)
        run.log(stage=unit, valid_accuracy=float((rewards[:, 0] > rewards[:, 1]).float().mean()), valid_loss=float(bradley_terry(*rewards.unbind(1)).mean()))
        return rewards

    return watch if rows else None
