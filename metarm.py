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
new reward model and the SFT model as the reference.  The reward model of a round is trained anew
from the SFT model (meta.start), and the policy goes on from the last one (meta.policy_start).

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
    load_model,
    make_sampling,
    policy_prompts,
    sample_answers,
    score_rows,
    training_prompts,
)
from data import batches, collate, response_tokens
from losses import bradley_terry, difference, importance_weights, language_model
from model import LanguageModel


def meta_gradient(
    parameters: Iterable[Tensor], difference_loss: Callable, pair_loss: Callable, eta: float,
    second_order: bool = False, stats: dict | None = None, precondition: Callable | None = None,
    add_up: Callable | None = None,
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
    stats: a dictionary that receives the norms of grad J and g, their cosine, and the share of
        the look-ahead that bf16 would keep
    precondition: function of the list grad J -> the directions that step 1 takes in its place
    add_up: function that replaces the tensors of a list by their sums over processes, each of which
        has a share of J and L
    returns a list of gradients, one per parameter; zeros where a loss does not depend on it
    Raises ValueError for frozen parameters, for parameters listed twice, and for second order with
    a precondition, whose derivative would be needed.

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
    if second_order and precondition is not None:
        raise ValueError("meta_gradient: second order is derived for a plain look-ahead; leave out "
                         "precondition")
    theta = [p.detach().clone() for p in parameters]  # restored by copy: p + g - g differs from p
    try:
        with sdpa_kernel(SDPBackend.MATH) if second_order else contextlib.nullcontext():
            ascent = gradient(difference_loss(), parameters, create_graph=second_order)
        # Autograd does not notice a change through .data, and need not: J's graph is used again
        # only after theta is restored.
        grad_j = sum_of_processes([direction.detach() for direction in ascent], add_up)
        directions = grad_j if precondition is None else precondition(grad_j)
        for p, direction in zip(parameters, directions):
            weights_of(p).add_(weights_of(eta * direction))
        torch.clear_autocast_cache()  # else L reads the half-precision copy of theta that J made
        g = gradient(pair_loss(), parameters)
        g = [v.clone() for v in g]  # autograd may return one tensor twice; clipping is in place
        g = sum_of_processes(g, add_up)
    finally:
        for p, old in zip(parameters, theta):
            weights_of(p).copy_(weights_of(old))
        torch.clear_autocast_cache()
    if second_order:
        product = hessian_product(parameters, ascent, g)
        product = sum_of_processes(product, add_up)
        g = [a + eta * h for a, h in zip(g, product)]
    if stats is not None:
        stats.update(gradient_stats(grad_j, g))
        stats["bf16_kept"] = share_kept_in_bf16(theta, directions, eta)
    return g


def weights_of(x):
    """The numbers of a tensor, to be changed without a trace for autograd; of shards, this one's"""
    return (x.to_local() if hasattr(x, "to_local") else x).data


def gradient(losses, parameters, vectors=None, create_graph=False):
    """Gradient of one loss, or the sum over a generator of losses.  -> list of tensors"""
    if hasattr(parameters[0], "full_tensor"):  # shards of several processes
        from runtime import sharding
        return sharding.gradients(losses, parameters)
    if not inspect.isgenerator(losses):
        return torch.autograd.grad(
            losses, parameters, vectors, create_graph=create_graph, materialize_grads=True
        )
    total = [torch.zeros_like(p) for p in parameters]
    for loss in losses:
        part = gradient(loss, parameters, create_graph=create_graph)
        total = [a + b for a, b in zip(total, part)]
    return total


def sum_of_processes(gradients, add_up):
    """-> sums over processes of the gradients; the gradients themselves on one process"""
    if add_up is None:
        return gradients
    sums = [gradient.clone() for gradient in gradients]
    add_up(sums)
    return sums


def hessian_product(parameters, ascent, g):
    """H g.  H is symmetric, so H g is one backward pass through grad J."""
    outputs = []
    vectors = []
    for direction, v in zip(ascent, g):
        if direction.requires_grad:  # not where J is linear in a parameter or independent of it
            outputs.append(direction)
            vectors.append(v)
    if not outputs:
        return [torch.zeros_like(v) for v in g]
    return gradient(outputs, parameters, vectors)


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


def share_kept_in_bf16(theta, directions, eta):
    """Share of weights that the look-ahead would change if they were kept in bf16 -> scalar

    bf16 has 8 bits: a movement below 1/512 to 1/256 of a weight is rounded away.
    """
    changed = 0
    for old, direction in zip(theta, directions):
        before = old.bfloat16()
        after = (before.float() + eta * direction).bfloat16()
        changed = changed + (after != before).sum()
    return changed / sum(old.numel() for old in theta)


def adam_directions(optimizer, parameters, gradients):
    """Gradients divided by Adam's running root mean square of the gradients of L, as in its steps.

    Before the first step there is none, and a gradient's own magnitude stands in for it.
    Raises ValueError for another optimizer.
    """
    directions = []
    for parameter, gradient in zip(parameters, gradients):
        state = optimizer.state.get(parameter, {})
        if state and "exp_avg_sq" not in state:
            raise ValueError("adam_directions: the optimizer keeps no mean square; use AdamW")
        mean_square = gradient ** 2
        if state:
            beta2 = optimizer.param_groups[0]["betas"][1]
            mean_square = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
        directions.append(gradient / (mean_square.sqrt() + optimizer.param_groups[0]["eps"]))
    return directions


def make_meta_step(run, samples, cfg, seed_key, adam=False):
    """MetaRM's step for the training loop, with cfg.batch prompts of similar length a step.

    samples: Rows with k sampled responses; cfg: the [meta] section
    adam: the look-ahead goes by cfg.adam_eta along adam_directions, not by cfg.eta along grad J
    -> function of (model, optimizer, step, pair_loss, scaler) that returns gradients and stats
    """
    accumulate = run.cfg.train.accumulate

    @functools.lru_cache(1)
    def epoch_batches(epoch):
        return batches([len(row) for row in samples], cfg.batch, f"{seed_key} samples {epoch}")

    def meta_step(model, optimizer, step, pair_loss, scaler):
        epoch, i = divmod(step, len(epoch_batches(0)))
        index = epoch_batches(epoch)[i]
        stats: dict[str, Any] = {"J": 0.0}
        # compiled code cannot be differentiated twice
        j_model = getattr(model, "uncompiled", (model,))[0] if cfg.second_order else model

        def difference_loss():
            for micro_batch in np.array_split(index, min(accumulate, len(index))):
                own, copies = run.share(micro_batch)  # of this rank
                batch = collate([samples[i] for i in own]).to(run.device)
                with run.autocast():
                    rewards = j_model(
                        batch.tokens, batch.branch, batch.position, batch.last,
                        inputs_embeds=batch.inputs_embeds,
                    )  # (b, k)
                J = difference(rewards).sum() / (len(index) * copies)
                stats["J"] += J.detach()
                yield scaler.scale(J)

        parameters = list(model.parameters())
        scale = scaler.get_scale()
        add_up = run.add_up if run.world_size > 1 else None

        def precondition(gradients):
            return adam_directions(optimizer, parameters, [g / scale for g in gradients])

        if adam:
            gradients = meta_gradient(parameters, difference_loss, pair_loss, cfg.adam_eta,
                                      stats=stats, precondition=precondition, add_up=add_up)
        else:
            gradients = meta_gradient(parameters, difference_loss, pair_loss, cfg.eta / scale,
                                      cfg.second_order, stats, add_up=add_up)
        run.add_up([stats["J"]])
        return gradients, run.whole(stats)

    return meta_step


# ----------------------------------------------------------------------------------------------
# Rounds


class Round(NamedTuple):
    arm: str           # of meta.arms
    number: int        # from 1
    start: str         # model that this round's reward model is trained from
    reward: str        # this round's reward model; the first one in arm none
    latest: str        # policy that is sampled
    policy_start: str  # policy that PPO starts from
    policy: str        # this round's policy


SAMPLING_ARMS = ("meta", "meta-adam")


def meta_rounds(config):
    """All rounds of all arms, in order -> [Round]; the names are those of the files

    Rounds whose PPO starts from SFT have names of their own, so both can be in one folder.
    """
    meta = config.meta
    first_reward = f"reward_{meta.method}"
    suffix = "_from_sft" if meta.policy_start == "sft" else ""
    rounds = []
    for arm in meta.arms:
        last_reward = first_reward
        latest = "sft"
        for number in range(1, meta.rounds + 1):
            name = f"{arm}_{number}{suffix}"
            start = "sft" if meta.start == "sft" else last_reward
            reward = first_reward if arm == "none" else name
            policy_start = "sft" if meta.policy_start == "sft" else latest
            policy = f"policy_{name}"
            rounds.append(Round(arm, number, start, reward, latest, policy_start, policy))
            last_reward = reward
            latest = policy
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
    """meta.k responses of the policy POLICY.pt to each of meta.prompts prompts of the pairs; 0: all

    -> Rows with k branches, [{"prompt", "responses"}]; fewer where there are fewer prompts
    """
    cfg = run.cfg.meta
    generator = torch.Generator().manual_seed(seed)
    prompts = policy_prompts(run, pairs)
    chosen = torch.randperm(len(prompts), generator=generator)[:cfg.prompts or len(prompts)]
    prompts = [prompts[i] for i in chosen.tolist()]
    sampling = make_sampling(run, cfg)
    texts, rows = sample_answers(run, policy, prompts, generator, sampling, num_samples=cfg.k)
    lines = []
    for i, (prompt, _) in enumerate(prompts):
        lines.append({"prompt": prompt, "responses": texts[i * cfg.k:(i + 1) * cfg.k]})
    return embed_rows(run, rows), lines


@torch.no_grad()
def response_likelihoods(run, policy, rows):
    """Log-likelihood of every response under the policy POLICY.pt, EOS included -> (N, k), nats"""
    model = load_model(run, LanguageModel, policy)
    k = len(rows[0].responses)
    out = torch.zeros(len(rows), k)
    index_batches = batches([len(row) for row in rows], 32, 0, shuffle=False)
    own, copies = run.share(index_batches)
    with run.bar(len(own), f"likelihoods by {policy}") as bar, run.autocast():
        for index in own:
            for branch in range(k):
                part = [rows[i].branches(branch) for i in index]
                batch = collate(part).to(run.device)
                out_pos, target = (x.to(run.device) for x in response_tokens(part))
                logits = model(
                    batch.tokens, out_pos=out_pos, inputs_embeds=batch.inputs_embeds
                )
                out[index, branch] = -language_model(logits, target).sum(1).cpu()
            bar.update()
            run.stop_if_asked()
    if copies == 1:
        run.add_up([out])
    return out


def policy_weights(run, policy):
    """Weights of the training pairs in arm ocrm: importance_weights under POLICY.pt -> (N,)"""
    rows = run.train.rows
    sft_logprob = response_likelihoods(run, "sft", rows)
    policy_logprob = response_likelihoods(run, policy, rows)
    return importance_weights(policy_logprob, sft_logprob, run.cfg.meta.weight_clip)


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
