"""Paired differences over seeds, with 95 % intervals by t, and Holm's correction for their number.

Two rows of an experiment are measured on the same seeds: the same data, SFT model and prompts.
Their difference is therefore taken seed by seed, which cancels what the seeds have in common.
"""
from typing import NamedTuple

import numpy as np
from scipy import stats

from runtime.report import table

LEVEL = 0.95
SAME = 1e-12  # differences closer than this differ by rounding alone


class Comparison(NamedTuple):
    """One entry of an experiment's list: row minus reference, by one column.

    reference_column: the reference's column, where it is another
    """
    row: str
    reference: str
    column: str
    reference_column: str = ""


# Each of these returns a function: rows of a seed, {row: {column: number}} -> [Comparison], of rows
# that exist


def against(reference, *columns, without=()):
    """Every other row against one, by each column; without: rows that are left out"""

    def comparisons(rows):
        others = [row for row in rows if row not in (reference, *without)]
        if reference not in rows:
            return []
        return [Comparison(row, reference, column) for column in columns for row in others]

    return comparisons


def couples(rows, *columns):
    """Some rows, each against its own reference.  rows: {row: reference}"""

    def comparisons(present):
        found = []
        for column in columns:
            for row, reference in rows.items():
                if row in present and reference in present:
                    found.append(Comparison(row, reference, column))
        return found

    return comparisons


def within_rows(columns):
    """Two columns of each row against each other.  columns: {column: its reference}"""

    def comparisons(rows):
        return [Comparison(row, row, ours, theirs)
                for ours, theirs in columns.items() for row in rows]

    return comparisons


def paired_difference(ours, theirs):
    """Mean difference of two measurements on the same seeds -> dictionary

    ours, theirs: sequences of n >= 2 numbers, seed by seed
    "low", "high": 95 % interval by t with n - 1 degrees of freedom; "p": two-sided, not corrected
    Where all differences are equal, as shares of few pairs can be, t would be infinite: p is that
    of their signs alone, 2^(1 - n).
    """
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    n = len(differences)
    mean = float(differences.mean())
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * differences.std(ddof=1) / n ** 0.5)
    if np.ptp(differences) > SAME:
        p = float(stats.ttest_1samp(differences, 0).pvalue)
    else:
        p = 2.0 ** (1 - n) if abs(mean) > SAME else 1.0
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
    """-> [a Comparison as a dictionary, with those of paired_difference and "holm"]

    runs: [{row: {column: number}}], one a seed; comparisons: function of the first seed's rows ->
    [Comparison]
    A comparison that fewer than two seeds have is left out.
    """
    results = []
    for comparison in comparisons(runs[0]):
        row, reference, column, reference_column = comparison
        reference_column = reference_column or column
        ours = []
        theirs = []
        for run in runs:
            if column in run.get(row, {}) and reference_column in run.get(reference, {}):
                ours.append(run[row][column])
                theirs.append(run[reference][reference_column])
        if len(ours) >= 2:
            results.append(comparison._asdict() | paired_difference(ours, theirs))
    for result, adjusted in zip(results, holm([result["p"] for result in results])):
        result["holm"] = adjusted
    return results


def comparison_table(comparisons):
    """Differences seed by seed, their 95 % intervals, and p before and after Holm's correction"""
    head = ["row", "against", "column", "seeds", "difference", "95 % interval", "p", "Holm"]
    lines = []
    for c in comparisons:
        reference = c["reference"]
        if c["reference_column"]:
            reference = c["reference_column"]
        lines.append([
            c["row"], reference, c["column"], c["seeds"], f"{c['difference']:+.3f}",
            f"{c['low']:+.3f} to {c['high']:+.3f}", f"{c['p']:.3f}", f"{c['holm']:.3f}",
        ])
    return table(head, lines)
