"""Every objective of the project as a pure function: the mathematics of the paper, and nothing else.

Shapes: B rows, T tokens, V vocabulary.  Every function returns one value per example (or token), never an average:
the caller knows what it averages over.  Source, unless another is named: Secrets of RLHF Part II, arXiv 2401.06080.
"""
import torch
import torch.nn.functional as F


def language_model(logits, target):
    """Negative log-likelihood of the next token, in nats; 0 where target is -1 (padding).

    logits: (B, T, V), target: (B, T) int64 -> (B, T)
    """
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none")
    return loss.view(target.shape)


def bradley_terry(chosen, rejected, margin=0.0, p=1.0):
    """Negative log-likelihood that `chosen` beats `rejected`.  arXiv 2401.06080, eq. 2, 5, 6

        d = chosen - rejected - margin
        loss = -(p log sigmoid(d) + (1 - p) log sigmoid(-d))

    chosen, rejected: (B,) rewards
    margin: (B,) or float, the gap asked for; 0 is plain Bradley-Terry
    p: (B,) or float in [0, 1], trust in the label; 1 believes it, 0 reverses it
    returns (B,), not averaged

    Departs from the paper in one place: it prints the margin outside the sigmoid, where it would have no gradient.
    logsigmoid, not log(sigmoid + 1e-5) as in the authors' baseline: that one goes flat just where the model is most wrong.
    """
    d = chosen - rejected - margin
    return -(p * F.logsigmoid(d) + (1 - p) * F.logsigmoid(-d))


def policy_loss(logprob, old_logprob, advantage, clip):
    """PPO's clipped surrogate, to minimise.  arXiv 1707.06347, eq. 7

        ratio = pi(a|s) / pi_old(a|s)
        loss = -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)

    all (B, T) -> (B, T); clip: float > 0
    """
    ratio = (logprob - old_logprob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def value_loss(value, old_value, returns, clip):
    """Squared error of the critic, pessimistic about moves larger than `clip`.  Part I, arXiv 2307.04964, sec. 3.2

        loss = 1/2 max((V - R)^2, (V_clip - R)^2),  V_clip = old_value + clip(V - old_value, -clip, clip)

    all (B, T) -> (B, T); clip: float > 0, in units of the reward
    """
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2)


def kl_penalty(logprob, ref_logprob, kind):
    """One-sample estimates of KL(pi || ref) at a token drawn from pi.  http://joschu.net/blog/kl-approx.html

        with d = log pi - log ref:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d

    k1 is unbiased but can be negative; k2 is never negative but biased; k3 is neither negative nor biased.
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


def masked_mean(x, mask):
    """Average over the entries where mask is set, whatever stands in the others (even NaN).  (B, T), (B, T) -> scalar"""
    mask = mask.bool()
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
