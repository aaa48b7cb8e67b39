"""Other signals for doubtful labels, to set the vote against; each needs what its docstring says and no more.

A pair's gap d = r(chosen) - r(rejected) makes it a two-class example whose label has probability sigmoid(d) and margin d.
Every function returns suspicion: the higher, the more likely is the label wrong (the last two: is the pair in doubt).
M members, S passes, E moments of training, N pairs.
"""
import torch
import torch.nn.functional as F


def small_loss(trace):
    """Mean loss over training: clean labels are learned first, wrong ones late or never.  arXiv 1706.05394, 1804.06872

    trace: (E, N) gaps of one model at E moments of its training -> (N,)
    """
    return F.softplus(-trace).mean(0)


def area_under_margin(trace):
    """Mean margin over training, negated.  arXiv 2001.10528; for two classes the margin of a label is its gap.  (E, N) -> (N,)"""
    return -trace.mean(0)


def confident_learning(gaps, turned):
    """Labels that a model which has not seen them contradicts with confidence.  arXiv 1911.00068, sec. 3 (cleanlab)

        1. label y of a pair: which side, in the order shown, was chosen; p_j: the model's probability of class j
        2. threshold t_j: mean of p_j over the pairs labelled j; without such a pair, nothing reaches it
        3. a pair belongs to the class of largest p_j among those with p_j >= t_j, if there is one
        4. it is an issue if that class is not its label, and likelier than its label, as cleanlab adds

    With two classes all this comes to: the other class is the likelier one, and reaches its threshold.

    gaps: (N,) out of sample; turned: (N,) bool, whether the sides were put in the other order (a draw of chance; in one
    fixed order there would be only one class) -> issue (N,) bool, suspicion (N,): 1 - p of the label
    """
    p, turned = torch.as_tensor(gaps).double().sigmoid(), torch.as_tensor(turned)  # p of the label
    threshold = torch.where(turned, p[~turned].mean(), p[turned].mean()).nan_to_num(torch.inf)  # of the other class
    return (p < 0.5) & (1 - p >= threshold - 1e-6), 1 - p  # 1e-6, like cleanlab: a mean of equal numbers may come out above them


def vote_entropy(gaps):
    """Entropy of the members' votes, in nats; ln 2 if half of them contradict the label.  (M, N) -> (N,)"""
    share = (gaps > 0).double().mean(0)
    return -(torch.special.xlogy(share, share) + torch.special.xlogy(1 - share, 1 - share))


def dropout_uncertainty(gaps):
    """Std of one model's gap over passes with different dropout masks.  arXiv 1506.02142.  (S, N) -> (N,)"""
    return gaps.std(0, correction=0)
