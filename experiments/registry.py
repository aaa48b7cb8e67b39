"""The table of experiments: a decorator enters a function under its name."""
from typing import Callable, NamedTuple


class Experiment(NamedTuple):
    """One entry of the table.

    measure(config, slot)  runs one seed -> {row: {column: number or list of numbers}}
    figure                 the paper's figure or table, "" for a question that the paper leaves open
    base                   configs/BASE.toml holds the settings it starts from
    plot(summary, path)    draws the summary over seeds, or None if there is no figure
    extend_summary(summary)  adds rows that are computed from means over seeds, or None
    comparisons(rows)      rows of a seed -> [Comparison] of experiments/statistics.py, or None
    """

    name: str
    measure: Callable
    figure: str
    base: str
    plot: Callable | None
    extend_summary: Callable | None
    comparisons: Callable | None = None


BASES = ("labels", "tiny", "shift", "metarm", "clean")
EXPERIMENTS = {}  # name -> Experiment; filled when the modules of this folder are imported


def experiment(name, figure="", base="labels", plot=None, extend_summary=None, comparisons=None):
    """Decorator that registers measure(config, slot=0) as the experiment NAME; see Experiment.

    Raises ValueError if NAME is taken or base is none of BASES.
    """
    if name in EXPERIMENTS:
        raise ValueError(f"experiment {name!r} is registered twice")
    if base not in BASES:
        raise ValueError(f"experiment {name!r}: base must be one of {BASES}, not {base!r}")

    def register(measure):
        EXPERIMENTS[name] = Experiment(
            name, measure, figure, base, plot, extend_summary, comparisons
        )
        return measure

    return register
