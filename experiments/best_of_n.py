"""Best-of-n: expected gold reward without bias, and its KL."""
import math

import numpy as np


def best_of_n(proxy, gold, n):
    """Expected gold reward of the response that the proxy ranks first among n drawn from N.
    Unbiased; arXiv 2112.09332, app. I.

        sum over the N in ascending order of the proxy of  C(worse, n - 1) / C(N, n) gold,
        worse: the number of responses before it

    proxy, gold: (N,) of responses to one prompt; 1 <= n <= N -> float
    It is the mean over all C(N, n) subsets; responses of equal proxy are equally likely.
    """
    N = len(proxy)
    if not 1 <= n <= N:
        raise ValueError(f"best_of_n: n = {n} of {N} answers; draw at least n")
    weight = np.array([math.comb(worse, n - 1) / math.comb(N, n) for worse in range(N)])
    _, inverse, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    weight_of_value = np.add.reduceat(weight, counts.cumsum() - counts) / counts
    return float((weight_of_value[inverse] * np.asarray(gold, float)).sum())


def best_of_n_kl(n):
    """KL of the best of n to one plain sample, in nats: arXiv 2009.01325, app. G.3; an upper bound,
    arXiv 2401.01879"""
    return math.log(n) - (n - 1) / n
