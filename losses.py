"""Every objective of the project as a pure function: no model, optimizer or file.

Shapes: B rows, T tokens, V vocabulary; N items to contrast, C width, K prototypes; m prompts with
k responses each.  Every loss is one value per example (or token), never an average: the caller
chooses what to average over.
Source, unless another is named: Secrets of RLHF Part II, arXiv 2401.06080.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def language_model(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of the next token, in nats; 0 where target is -1 (padding).

    logits: (B, T, V), target: (B, T) int64 -> (B, T)
    """
    flat_logits = logits.float().flatten(0, 1)  # (B * T, V)
    loss = F.cross_entropy(flat_logits, target.flatten(), ignore_index=-1, reduction="none")
    return loss.view(target.shape)


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, p: Tensor | float = 1.0
) -> Tensor:
    """Negative log-likelihood that `chosen` beats `rejected`.
    arXiv 2401.06080: eq. 2 the loss, eq. 5 label smoothing (p), eq. 6 the margin.

        d = chosen - rejected - margin
        loss = -(p log sigmoid(d) + (1 - p) log sigmoid(-d))

    chosen, rejected: (B,) rewards
    margin: (B,) or a number, in units of reward; 0 is plain Bradley-Terry
    p: (B,) or a number in [0, 1], probability that the label is right; 1 trusts it, 0 reverses it
    returns (B,), not averaged; raises ValueError where shapes do not match

    Departure from the paper: it prints the margin outside the sigmoid, where it has no gradient.
    logsigmoid, not log(sigmoid + 1e-5) as in the authors' released trainer: the gradient of the
    latter vanishes on the pairs that the model ranks most wrongly.
    """
    check_pair_shapes(chosen, rejected, margin=margin, p=p)
    d = chosen - rejected - margin
    return -(p * F.logsigmoid(d) + (1 - p) * F.logsigmoid(-d))


def reward_centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Keeps the mean of both rewards near zero, which Bradley-Terry leaves free.
    arXiv 2312.09244, app. D.

        loss = (chosen + rejected)^2

    (B,), (B,) -> (B,)
    """
    return (chosen + rejected) ** 2


def redescending(chosen: Tensor, rejected: Tensor, gamma: float = 0.5) -> Tensor:
    """A loss whose gradient vanishes on labels that the model contradicts strongly.
    Generalised cross-entropy, arXiv 1805.07836, eq. 6, on a pair; the property is that of arXiv
    2505.17859.

        loss = (1 - sigmoid(d)^gamma) / gamma,   d = chosen - rejected

    gamma in (0, 1]: towards 0 Bradley-Terry, 1 the chance of a wrong order.  (B,), (B,) -> (B,)
    """
    check_pair_shapes(chosen, rejected)
    return -torch.expm1(gamma * F.logsigmoid(chosen - rejected)) / gamma


def check_pair_shapes(chosen, rejected, **per_pair):
    """Raise ValueError on shapes that do not match: (B, 1) with (B,) would broadcast to (B, B)."""
    if chosen.dim() != 1 or chosen.shape != rejected.shape:
        raise ValueError(f"bradley_terry: chosen is {tuple(chosen.shape)}, rejected is "
                         f"{tuple(rejected.shape)}; give two of one shape (B,)")
    for name, value in per_pair.items():
        if torch.is_tensor(value) and value.dim() > 0 and value.shape != chosen.shape:
            raise ValueError(f"bradley_terry: {name} is {tuple(value.shape)}; "
                             f"give a number or {tuple(chosen.shape)}")


def simcse(view_s: Tensor, view_t: Tensor, temperature: float = 0.05) -> Tensor:
    """Contrast between items: each item is matched to its own second view among those of the batch.
    arXiv 2104.08821, eq. 4; arXiv 2401.06080, sec. 3.1.

        loss_i = -log( exp(cos(s_i, t_i) / temperature) / sum_j exp(cos(s_i, t_j) / temperature) )

    view_s, view_t: (N, C) representations of the same N items under two dropout masks -> (N,)

    The paper does not give the temperature; 0.05 is SimCSE's own.
    Without dropout both views are equal and the term only pushes different items apart.
    A single item has no negatives: its loss and its gradient are 0.
    """
    if view_s.dim() != 2 or view_s.shape != view_t.shape or len(view_s) < 1:
        raise ValueError(f"simcse: views {tuple(view_s.shape)} and {tuple(view_t.shape)}; "
                         f"give two of one shape (N, C), N >= 1")
    s = unit_rows(view_s)
    t = unit_rows(view_t)
    with torch.autocast(autocast_device(s), enabled=False):  # bf16 rounds a logit by up to 0.1
        logits = s @ t.T / temperature  # (N, C), (C, N) -> (N, N)
    target = torch.arange(len(s), device=s.device)
    return F.cross_entropy(logits, target, reduction="none")


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes: a soft assignment of N items to K prototypes that uses all prototypes equally.
    arXiv 2006.09882, eq. 3-5.

        Q = exp(scores / epsilon);  repeat:  each prototype's total to N / K,  then each item's to 1

    scores: (N, K) -> (N, K), no gradient
    Rows sum to 1; columns approach N / K as the iterations grow.

    Computed in the log domain: exp(scores / 0.05) overflows from a score of 4.5 on, or leaves a
    prototype with a total of 0.  Constants that the next normalisation cancels (the grand total,
    1 / K, 1 / N) are left out.
    """
    if scores.dim() != 2 or 0 in scores.shape:
        raise ValueError(f"sinkhorn: scores are {tuple(scores.shape)}; "
                         f"give (N, K), N >= 1 items by K >= 1 prototypes")
    if iterations < 1:
        raise ValueError(f"sinkhorn: {iterations} iterations do not normalise the codes; "
                         f"use 1 or more, 3 is SwAV's")
    log_q = at_least_float32(scores) / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(0)  # over the items
        log_q = log_q.log_softmax(1)  # over the prototypes
    return log_q.exp()


def swav(
    scores_s: Tensor, scores_t: Tensor, temperature: float = 0.1, epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """Contrast between clusters: each view predicts the code of the other view.
    arXiv 2006.09882, eq. 1, 2; arXiv 2401.06080, sec. 3.1.

        loss = l(t, q_s) + l(s, q_t)
        l(t, q_s) = -sum_k q_s^k log softmax_k(scores_t / temperature)

    scores_s, scores_t: (N, K) normalised features @ normalised prototypes.T, of the same N items
    returns (N,)

    A sum over the two views, as in the paper (SwAV's code takes the mean): collapsed scores give
    exactly 2 ln K.  Compute the scores outside autocast: division by epsilon multiplies the
    rounding of bf16 by 20.  When N is small against K, equal use determines the codes (N = 1:
    uniform); then append the scores of past features to both and keep the first N losses.
    """
    if scores_s.shape != scores_t.shape:
        raise ValueError(f"swav: scores {tuple(scores_s.shape)} and {tuple(scores_t.shape)}; "
                         f"give two of one shape (N, K)")
    q_s = sinkhorn(scores_s, epsilon, iterations)
    q_t = sinkhorn(scores_t, epsilon, iterations)
    log_p_s = (at_least_float32(scores_s) / temperature).log_softmax(1)
    log_p_t = (at_least_float32(scores_t) / temperature).log_softmax(1)
    # swapped: a view that predicts its own code would only become more confident
    return -(q_s * log_p_t + q_t * log_p_s).sum(1)


def difference(rewards: Tensor) -> Tensor:
    """MetaRM's difference loss J: how widely the rewards of k responses to one prompt are spread.
    arXiv 2405.00438; arXiv 2401.06080, sec. 3.2.

        J = (2 / k^2) sum over i < j of sigmoid(|r_i - r_j|)

    rewards: (m, k) -> (m,), from (k - 1) / 2k where all are equal to (k - 1) / k; k = 5: 0.4 to 0.8

    |.| has no slope at 0: the gradient does not separate equal rewards.
    """
    if rewards.dim() != 2 or len(rewards) < 1 or rewards.shape[1] < 2:
        raise ValueError(f"difference: rewards are {tuple(rewards.shape)}; "
                         f"give (m, k), m >= 1 prompts with k >= 2 responses each")
    k = rewards.shape[1]
    i, j = torch.triu_indices(k, k, offset=1, device=rewards.device)
    rewards = at_least_float32(rewards)
    distances = (rewards[:, i] - rewards[:, j]).abs()  # (m, k (k - 1) / 2)
    return 2 / k ** 2 * distances.sigmoid().sum(1)


def importance_weights(policy_logprob: Tensor, sft_logprob: Tensor, clip: float) -> Tensor:
    """Weights of labelled pairs by how likely the policy is to give their two responses.
    arXiv 2507.15507.

        ratio = pi(chosen) pi(rejected) / (pi_SFT(chosen) pi_SFT(rejected))
        weight = clip(ratio, 1 / clip, clip), divided by its mean over the pairs

    policy_logprob, sft_logprob: (N, 2) log-likelihoods of whole responses, in nats
    clip: float >= 1 -> (N,), of mean 1
    """
    log_ratio = (policy_logprob - sft_logprob).sum(1)
    weight = log_ratio.clamp(-math.log(clip), math.log(clip)).exp()
    return weight / weight.mean()


def policy_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate, to minimise.  arXiv 1707.06347, eq. 7.

        ratio = pi(a|s) / pi_old(a|s)
        loss = -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)

    all (B, T) -> (B, T); clip: float > 0
    """
    ratio = (logprob - old_logprob).exp()
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped_ratio * advantage)


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Clipped squared error of the critic: the larger of the plain and the clipped error.
    Part I, arXiv 2307.04964, sec. 3.2.

        loss = 1/2 max((V - R)^2, (V_clip - R)^2)
        V_clip = old_value + clip(V - old_value, -clip, clip)

    all (B, T) -> (B, T); clip: float > 0, in units of the reward

    The gradient vanishes only where V has already moved by more than `clip` towards R within one
    update, and the next rollout sets old_value anew.  So a critic that starts far outside the clip
    range still recovers: it moves by about `clip` an iteration.
    """
    clipped_value = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (clipped_value - returns) ** 2)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kind: str) -> Tensor:
    """One-sample estimates of KL(pi || ref) at a token drawn from pi.
    http://joschu.net/blog/kl-approx.html

        with d = log pi - log ref:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d

    k1 is unbiased but can be negative; k2 is never negative but biased; k3 is unbiased and never
    negative.
    logprob, ref_logprob: (B, T) -> (B, T), in nats
    """
    d = logprob - ref_logprob
    if kind == "k1":
        return d
    if kind == "k2":
        return d ** 2 / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kl_penalty: kind must be k1, k2 or k3, not {kind!r}")


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where mask is set; other entries are ignored, even NaN.

    (B, T), (B, T) -> scalar
    """
    mask = mask.bool()
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32, for sums and small differences; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a row of zeros stays zero and has no gradient.  (N, C) -> (N, C)"""
    x = at_least_float32(x)
    length = x.norm(dim=1, keepdim=True)
    # dividing by max(length, 1e-12) instead would give a row of zeros a gradient of 1e12
    return x / length.masked_fill(length == 0, torch.inf)


def autocast_device(x: Tensor) -> str:
    """Device type that torch.autocast accepts; the meta device has no autocast of its own."""
    return "cpu" if x.is_meta else x.device.type
