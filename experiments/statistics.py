"""Paired differences over seeds, with 95 % intervals by t, and Holm's correction for their number.

Two rows of an experiment are measured on the same seeds: the same data, SFT model and prompts.
Their difference is therefore taken seed by seed, which cancels what the seeds have in common.
"""
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Comparison(NamedTuple):
    """One entry of an experiment's list: row minus reference, by one column."""
    row: str
    reference: str
    column: str


def against(reference, *columns):
    """Every other row against one -> function of the rows that lists the Comparisons"""

    def comparisons(rows):
        others = [row for row in rows if row != reference]
        return [Comparison(row, reference, column) for column in columns for row in others]

    return comparisons


def paired_difference(ours, theirs):
    """Mean difference of two measurements on the same seeds -> dictionary

    ours, theirs: sequences of n >= 2 numbers, seed by seed
    "low", "high": 95 % interval by t with n - 1 degrees of freedom; "p": two-sided, not corrected
    """
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    n = len(differences)
    mean = float(differences.mean())
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * differences.std(ddof=1) / n ** 0.5)
    if half > 0:
        p = float(stats.ttest_1samp(differences, 0).pvalue)
    else:
        p = 0.0 if mean else 1.0  # the same difference on every seed
    return {"seeds": n, "difference": mean, "low": mean - half, "high": mean + half, "p": p}


def holm(p_values):
    """Holm's adjusted p-values: below .05 are those that survive among so many comparisons.

    Scandinavian Journal of Statistics 6 (1979), 65-70.  -> list of floats, in the given order
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted.tolist()


def compare_rows(runs, comparisons):
    """-> [{"row", "reference", "column", "seeds", "difference", "low", "high", "p", "holm"}]

    runs: [{row: {column: number}}], one a seed; comparisons: function of the rows -> [Comparison]
    A comparison that fewer than two seeds have is left out.
    """
    results = []
    for comparison in comparisons(list(runs[0])):
        row, reference, column = comparison
        values = []
        for run in runs:
            if column in run.get(row, {}) and column in run.get(reference, {}):
                values.append((run[row][column], run[reference][column]))
        if len(values) >= 2:
            results.append(comparison._asdict() | paired_difference(*zip(*values)))
    for result, adjusted in zip(results, holm([result["p"] for result in results])):
        result["holm"] = adjusted
    return results
