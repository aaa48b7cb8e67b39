"""Pictures of a run and of experiments over seeds.  matplotlib is imported inside functions only.

Pictures of a run take the numbers of results.json.  Panels of experiments take a summary over
seeds, {row: {column: {"mean": number or list, "se": the same or None}}}, se: standard error.
Every picture is one PNG file; `draw` prints one line instead where matplotlib is not installed.
"""
import functools
import importlib.util
from itertools import cycle

import numpy as np

from runtime import files

ERROR_KINDS = {  # cause of a wrong label -> legend, colour
    "": ("right", "#b8c4d0"),
    "flip": ("flipped at random", "#d1495b"),
    "bias": ("longer was taken", "#edae49"),
    "ambiguity": ("annotator in doubt", "#66a182"),
}
COLOURS = ("#30638e", "#d1495b", "#66a182", "#edae49", "#8d6a9f",
           "#7a7a7a", "#56c3d6", "#b5651d", "#000000", "#e39ec1")
DPI = 130
ROOT_KL = "√KL to the SFT model, nats an answer"


def draw(function, *arguments, **options):
    """Call function(...) -> True, or False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        report_missing()
        return False
    function(*arguments, **options)
    return True


@functools.cache
def report_missing():
    """One line a process."""
    print("figures: left out, because matplotlib is not installed; pip install matplotlib")


def save(figure, path):
    """Write the PNG file whole or not at all; raises OSError, as files.save does."""
    def write(file):
        figure.savefig(file, dpi=DPI, bbox_inches="tight", format="png")

    files.save(path, write)


def subplots(rows, columns, width, height):
    """-> figure, axes (rows × columns,) without upper and right frame"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def make_panels(title, xlabel="", ylabel="", columns=1):
    """One row of panels, or two rows from four panels on.  -> figure, axes"""
    rows = 1 if columns < 4 else 2
    columns = -(-columns // rows)
    figure, axes = subplots(rows, columns, 5.6 * columns, 3.6 * rows)
    for ax in axes:
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
    figure.suptitle(title, fontsize=11)
    return figure, axes


# -----------------------------------------------------------------------------------------------
# Pictures of a run

def draw_strength(ax, mean, errors):
    """Histogram of mean strength, wrong labels coloured by cause.

    mean: (N,); errors: [N] causes, "" for a right label, or None where they are not known
    """
    mean = np.asarray(mean)
    errors = np.asarray([""] * len(mean) if errors is None else errors)
    low, high = np.quantile(mean, [0.001, 0.999])
    kinds = [kind for kind in ERROR_KINDS if (errors == kind).any()]
    labels, colours = zip(*(ERROR_KINDS[kind] for kind in kinds))
    ax.hist(
        [mean[errors == kind].clip(low, high) for kind in kinds],
        bins=60, stacked=True, color=colours, label=labels if len(kinds) > 1 else None,
    )
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("mean reward difference over the ensemble, chosen − rejected")
    ax.set_ylabel("training pairs")
    if len(kinds) > 1:
        ax.legend(title="the label is", frameon=False)


def draw_ppo(ax, curves, kind, label):
    """Proxy reward or judge's score against √KL: a dot an iteration, a line of their running mean.

    curves: {method: {"kl": [...], kind: [...]}}, one number an iteration
    """
    for colour, (name, curve) in zip(cycle(COLOURS), curves.items()):
        x = np.sqrt(np.maximum(curve["kl"], 0))
        width = max(1, len(x) // 12)
        window = np.ones(width) / width
        ax.plot(x, curve[kind], ".", color=colour, alpha=0.25, markersize=4)
        x_mean = np.convolve(x, window, "valid")
        y_mean = np.convolve(curve[kind], window, "valid")
        ax.plot(x_mean, y_mean, color=colour, label=name)
    ax.set_xlabel(ROOT_KL)
    ax.set_ylabel(label)
    ax.legend(title="reward model", frameon=False)


def draw_results(run, results, mean, errors, histories):
    """The pictures of a finished run.  results: the dictionary of results.json

    mean: (N,) strength of the training pairs; errors: why each label is wrong, or None
    histories: {policy: [metrics of an iteration]}
    """
    curves = results.get("ppo")
    judge = results["judge"]
    run.draw("strength", strength_histogram, mean, errors)
    if results["reward"]:
        run.draw("groups", group_accuracy, results["groups"])
        run.draw("reliability", reliability, results["reward"])
    if curves:
        run.draw("ppo", ppo_curves, curves, judge=judge)
    if curves and errors is not None:
        run.draw("summary", summary, mean, errors, curves, judge=judge)
    if histories:
        run.draw("ppo_watch", ppo_history, histories)


def strength_histogram(mean, errors, path):
    """Mean strength of the training pairs.  mean: (N,); errors: [N] causes, or None"""
    doubted = (np.asarray(mean) < 0).mean()
    title = f"Preference strength: {doubted:.0%} of the labels are doubted by the vote"
    figure, (ax,) = make_panels(title)
    draw_strength(ax, mean, errors)
    save(figure, path)


def summary(mean, errors, curves, path, judge):
    """A run in one picture: doubted labels, and PPO on treated and untreated labels."""
    figure, (left, right) = make_panels("", columns=2)
    draw_strength(left, mean, errors)
    left.set_title("the vote of the ensemble on every label", fontsize=10)
    draw_ppo(right, curves, "judge", f"score by {judge}")
    right.set_title("the policies that PPO makes of the reward models", fontsize=10)
    save(figure, path)


def group_accuracy(groups, path):
    """Accuracy of each reward model by strength group.

    groups: {method: {"label": [...], "gold": [...]}}, a number a group; "gold" where it is known
    """
    titles = {"label": "by the data's labels", "gold": "by the true quality"}
    kinds = [kind for kind in titles if kind in next(iter(groups.values()))]
    xlabel = "strength group of the validation pairs, weakest first"
    figure, axes = make_panels("Accuracy by preference strength", xlabel, "accuracy", len(kinds))
    for ax, kind in zip(axes, kinds):
        for colour, (name, group) in zip(cycle(COLOURS), groups.items()):
            x = range(1, len(group[kind]) + 1)
            ax.plot(x, group[kind], "o-", color=colour, label=name, markersize=4)
        ax.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        ax.set_title(titles[kind], fontsize=10)
        ax.set_ylim(0, 1.03)
    axes[0].legend(frameon=False)
    save(figure, path)


def ppo_curves(curves, path, judge):
    """Reward and, where it is known, the judge's score against √KL.  curves: as in draw_ppo"""
    labels = {"reward": "reward of the model trained against", "judge": f"score by {judge}"}
    kinds = [kind for kind in labels if kind in next(iter(curves.values()))]
    figure, axes = make_panels("PPO", columns=len(kinds))
    for ax, kind in zip(axes, kinds):
        draw_ppo(ax, curves, kind, labels[kind])
    save(figure, path)


HISTORY = {  # metric of an iteration of PPO -> title of its panel
    "reward": "reward",
    "reward_normalised": "normalised reward",
    "kl": "KL to the reference, nats an answer",
    "perplexity_sft": "perplexity under SFT",
    "length": "length, tokens",
    "clipfrac": "share of ratios clipped",
    "explained_variance": "critic: explained variance",
    "eos_rate": "share of answers ended",
}


def ppo_history(histories, path):
    """Metrics of PPO over iterations, a panel a metric, a line a policy.

    histories: {policy: [{metric: number or None}]}, one dictionary an iteration
    """
    figure, axes = subplots(2, 4, 15, 6.2)
    for ax, (metric, title) in zip(axes, HISTORY.items()):
        for colour, (policy, history) in zip(cycle(COLOURS), histories.items()):
            values = [np.nan if line[metric] is None else line[metric] for line in history]
            ax.plot(range(1, len(values) + 1), values, color=colour, label=policy, linewidth=1.2)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("iteration")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def reliability(results, path):
    """Confidence of sigmoid(reward difference) against the share of labels that it gets right.

    results: {method: {"valid": {"bins": [[mean confidence, share right, count]]}}}
    """
    figure, (ax,) = make_panels("Reliability on validation labels", "confidence", "share right")
    for colour, (name, sets) in zip(cycle(COLOURS), results.items()):
        confidence, right, count = np.array(sets["valid"]["bins"]).T
        ax.plot(confidence, right, "-", color=colour, label=name, linewidth=1)
        ax.scatter(confidence, right, s=8 + 160 * count / count.sum(), color=colour)  # area: pairs
    ax.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8, linestyle=":")
    ax.legend(frameon=False)
    save(figure, path)


# -----------------------------------------------------------------------------------------------
# Panels of experiments

def draw_band(ax, x, value, colour, label=None):
    """A line with a band of one standard error.  value: {"mean": [n], "se": [n] or None}"""
    mean = np.array(value["mean"])
    ax.plot(x, mean, ".-", color=colour, label=label, linewidth=1.2, markersize=4)
    if value["se"] is not None:
        se = np.array(value["se"])
        ax.fill_between(x, mean - se, mean + se, color=colour, alpha=0.13, linewidth=0)


def as_curve(values):
    """[{"mean": number, "se": number or None}] -> {"mean": [...], "se": [...] or None}"""
    se = [value["se"] for value in values]
    return {"mean": [value["mean"] for value in values], "se": None if None in se else se}


def finish_panels(figure, axes, ylabels, path, chance=None):
    """Labels of the y axes, the line of chance, one legend of all panels beside them, the file."""
    for ax, ylabel in zip(axes, ylabels):
        ax.set_ylabel(ylabel)
        if chance is not None and "accuracy" in ylabel:
            ax.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
    legend = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            legend.setdefault(label, handle)
    if legend:
        figure.legend(
            legend.values(), legend.keys(), frameon=False, fontsize=9, loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
    figure.tight_layout()
    save(figure, path)


def by_row(summary, path, title, xlabel, panels, chance=None):
    """The rows along the x axis; a legend has one colour in all panels, up to ten legends.

    panels: {y label: {legend: column}}; columns may be missing
    """
    rows = list(summary)
    present = {}
    for ylabel, lines in panels.items():
        lines = {legend: column for legend, column in lines.items() if column in summary[rows[0]]}
        if lines:
            present[ylabel] = lines
    legends = dict.fromkeys(legend for lines in present.values() for legend in lines)
    colours = dict(zip(legends, cycle(COLOURS)))
    figure, axes = make_panels(title, xlabel, columns=len(present))
    x = range(1, len(rows) + 1)
    for ax, lines in zip(axes, present.values()):
        for legend, column in lines.items():
            curve = as_curve([summary[row][column] for row in rows])
            draw_band(ax, x, curve, colours[legend], legend or None)
        if not rows[0].isdigit():
            ax.set_xticks(x, rows)
    finish_panels(figure, axes, present, path, chance)


def by_epoch(summary, path, title, panels, xlabel="epoch"):
    """A line a row over the course of training.  panels: {y label: column that holds the curve}"""
    present = {}
    for ylabel, column in panels.items():
        if any(column in row for row in summary.values()):
            present[ylabel] = column
    figure, axes = make_panels(title, xlabel, columns=len(present))
    for ax, column in zip(axes, present.values()):
        for colour, (name, row) in zip(cycle(COLOURS), summary.items()):
            if column in row:
                draw_band(ax, range(1, len(row[column]["mean"]) + 1), row[column], colour, name)
        ax.xaxis.get_major_locator().set_params(integer=True)
    finish_panels(figure, axes, present, path)


def curves_xy(summary, path, title, columns, ylabel):
    """A panel a row.  columns: (x, y), the two columns that hold the curve"""
    x, y = columns
    figure, axes = make_panels(title, columns=len(summary))
    for ax, (name, row) in zip(axes, summary.items()):
        draw_band(ax, row[x]["mean"], row[y], COLOURS[0])
        ax.set_xlabel(name)
    finish_panels(figure, axes, [ylabel] * len(summary), path)


def overlay(summary, path, title, columns, labels, diagonal=()):
    """All rows in one panel.

    columns: (x, y), the two columns that hold the curves; labels: (x, y) of the axes
    diagonal: (low, high), where a dotted line y = x is drawn
    """
    x, y = columns
    xlabel, ylabel = labels
    figure, axes = make_panels(title, xlabel)
    axes[0].plot(diagonal, diagonal, color="grey", linewidth=0.8, linestyle=":")
    for colour, (name, row) in zip(cycle(COLOURS), summary.items()):
        draw_band(axes[0], row[x]["mean"], row[y], colour, name)
    finish_panels(figure, axes, [ylabel], path)


def rows_by_arm(summary):
    """Group rows named "ARM NUMBER"; every other row is an arm.  -> {arm: [row names]}"""
    arms = {}
    for name in summary:
        arm, _, number = name.rpartition(" ")
        arms.setdefault(arm if number.isdigit() else name, []).append(name)
    return arms


def by_round(summary, path, title, panels):
    """A line an arm over the rounds, dotted for a row without a number.

    panels: {y label: column}
    """
    arms = rows_by_arm(summary)
    num_rounds = max(map(len, arms.values()))
    figure, axes = make_panels(title, "round", columns=len(panels))
    for ax, column in zip(axes, panels.values()):
        for colour, (arm, names) in zip(cycle(COLOURS), arms.items()):
            values = [summary[name][column] for name in names if column in summary[name]]
            if values and names == [arm]:
                ax.axhline(values[0]["mean"], color=colour, linestyle=":", linewidth=1, label=arm)
            elif values:
                draw_band(ax, range(1, len(values) + 1), as_curve(values), colour, arm)
        ax.set_xticks(range(1, num_rounds + 1))
    finish_panels(figure, axes, panels, path)


def forest(comparisons, path, title):
    """Differences seed by seed with their 95 % intervals, a panel a column.

    comparisons: those of experiments/statistics.py; filled where Holm's p is below .05
    """
    columns = list(dict.fromkeys(c["column"] for c in comparisons))
    rows = list(dict.fromkeys(label_of(c) for c in comparisons))
    width = 0.075 * max(map(len, rows))  # of the labels, in inches
    figure, axes = subplots(1, len(columns), width + 2.3 * len(columns), 0.9 + 0.24 * len(rows))
    for ax, column in zip(axes, columns):
        for c in comparisons:
            if c["column"] != column:
                continue
            y = rows.index(label_of(c))
            colour = COLOURS[0] if c["holm"] < 0.05 else "#999999"
            ax.plot([c["low"], c["high"]], [y, y], color=colour, linewidth=1.2)
            ax.plot([c["difference"]], [y], "o", color=colour, markersize=4,
                    fillstyle="full" if c["holm"] < 0.05 else "none")
        ax.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(range(len(rows)), rows if ax is axes[0] else [], fontsize=8)
        ax.set_title(column, fontsize=9)
        ax.tick_params(axis="x", labelsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    save(figure, path)


def label_of(comparison):
    if comparison["reference_column"]:
        return f"{comparison['row']}, against {comparison['reference_column']}"
    return f"{comparison['row']} − {comparison['reference']}"


def scatter(summary, path, title):
    """A panel a row, of points that are in turns chosen and rejected."""
    figure, axes = make_panels(title, columns=len(summary))
    for ax, (name, row) in zip(axes, summary.items()):
        x = row["points: x"]["mean"]
        y = row["points: y"]["mean"]
        for i, legend in enumerate(("chosen", "rejected")):
            ax.plot(
                x[i::2], y[i::2], ".", color=COLOURS[i], alpha=0.4, markersize=3, label=legend
            )
        ax.set_title(f"{name}: silhouette {row['silhouette']['mean']:.2f}", fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    for ax in axes[len(summary):]:
        ax.set_visible(False)
    finish_panels(figure, axes, [""] * len(summary), path)


def heat_maps(panels, path, title, xlabel, xs, ylabel, ys):
    """A map a panel, zero in white, numbers in the cells.  panels: {title: (len(ys), len(xs))}"""
    figure, axes = subplots(1, len(panels), 3.6 * len(panels), 3.2)
    limit = max(np.nanmax(np.abs(grid)) for grid in panels.values()) or 1.0
    for ax, (name, grid) in zip(axes, panels.items()):
        ax.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for i, j in np.ndindex(grid.shape):
            is_dark = abs(grid[i, j]) > 0.6 * limit
            ax.text(j, i, f"{grid[i, j]:+.3f}", ha="center", va="center", fontsize=9,
                    color="white" if is_dark else "black")
        ax.set_xticks(range(len(xs)), [f"{x:,}" for x in xs])
        ax.set_yticks(range(len(ys)), ys)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    save(figure, path)


def against(summary, path, title, x, xlabel, panels):
    """A line a row over column x, both curves.  panels: {y label: column of y}"""
    figure, axes = make_panels(title, xlabel, columns=len(panels))
    for ax, column in zip(axes, panels.values()):
        for colour, (name, row) in zip(cycle(COLOURS), summary.items()):
            draw_band(ax, row[x]["mean"], row[column], colour, name)
    finish_panels(figure, axes, panels, path)


def learning_curves(summary, path, title, costs, y, ylabel):
    """A panel a group of rows and a cost; the last point of a curve has a larger dot.

    rows are named "GROUP: ROW"; costs: {column of x: x label}; y: column that holds the curve
    """
    groups = {}
    for name, row in summary.items():
        group, _, label = name.partition(": ")
        groups.setdefault(group, {})[label] = row
    labels = dict.fromkeys(label for rows in groups.values() for label in rows)
    colours = dict(zip(labels, cycle(COLOURS)))  # a label has one colour in all panels
    figure, axes = make_panels(title, columns=len(groups) * len(costs))
    places = [(group, column) for group in groups for column in costs]
    for ax, (group, column) in zip(axes, places):
        for label, row in groups[group].items():
            x = row[column]["mean"]
            draw_band(ax, x, row[y], colours[label], label)
            ax.plot(x[-1:], row[y]["mean"][-1:], "o", color=colours[label], markersize=6)
        ax.set_xlabel(f"{group}: {costs[column]}")
    finish_panels(figure, axes, [ylabel] * len(axes), path)


def bars(summary, path, title, columns, chance=0.5):
    """A group of bars a row, a bar a column, with standard errors; a dotted line at chance."""
    rows = [name for name, row in summary.items() if any(column in row for column in columns)]
    figure, (ax,) = subplots(1, 1, 7.5, 0.6 + 0.42 * len(rows))
    height = 0.8 / len(columns)
    for i, (column, colour) in enumerate(zip(columns, cycle(COLOURS))):
        offset = (i - (len(columns) - 1) / 2) * height
        present = [y for y, row in enumerate(rows) if column in summary[row]]
        values = [summary[rows[y]][column] for y in present]
        ax.barh(
            [y + offset for y in present], [value["mean"] for value in values], height,
            xerr=[value["se"] or 0 for value in values],
            color=colour, label=column, error_kw={"linewidth": 0.8},
        )
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    if chance is not None:
        ax.axvline(chance, color="grey", linewidth=0.8, linestyle=":")
    ax.invert_yaxis()
    ax.set_title(title, fontsize=11)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)
