"""The pictures of a run, from results.json's numbers; one function a picture."""
import os

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

KINDS = {"": ("right", "#b8c4d0"), "flip": ("flipped at random", "#d1495b"), "bias": ("longer was taken", "#edae49"),
         "ambiguity": ("annotator in doubt", "#66a182")}
COLOURS = ("#30638e", "#d1495b", "#66a182", "#edae49", "#8d6a9f", "#7a7a7a", "#56c3d6", "#b5651d", "#000000", "#e39ec1")


def save(figure, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".part"
    try:
        figure.savefig(part, dpi=130, bbox_inches="tight", format="png")
        os.replace(part, path)
    finally:
        plt.close(figure)
        if os.path.exists(part):
            os.remove(part)


def axes(title, xlabel="", ylabel="", columns=1):
    rows = 1 if columns < 4 else 2  # four panels make a square
    figure, ax = plt.subplots(rows, -(-columns // rows), figsize=(5.6 * -(-columns // rows), 3.6 * rows), squeeze=False)
    for a in ax.flat:
        a.spines[["top", "right"]].set_visible(False)
        a.set_xlabel(xlabel)
        a.set_ylabel(ylabel)
    figure.suptitle(title, fontsize=11)
    return figure, ax.flatten()


def draw_strength(ax, mean, errors):
    """Mean strength of the training pairs; where the truth is known, wrong labels coloured by their cause."""
    mean, errors = np.asarray(mean), np.asarray(errors if errors is not None else [""] * len(mean))
    low, high = np.quantile(mean, [0.001, 0.999])
    kinds = [k for k in KINDS if (errors == k).any()]
    labels = [KINDS[k][0] if len(kinds) > 1 else None for k in kinds]
    ax.hist([mean[errors == k].clip(low, high) for k in kinds], bins=60, stacked=True, color=[KINDS[k][1] for k in kinds], label=labels)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("mean reward difference over the ensemble, chosen − rejected")
    ax.set_ylabel("training pairs")
    if len(kinds) > 1:
        ax.legend(title="the label is", frameon=False)


def draw_ppo(ax, curves, kind, label):
    """Proxy reward or judge's score against the KL from the SFT model; a dot an iteration, a line through their running mean."""
    for colour, (name, c) in zip(COLOURS, curves.items()):
        x = np.sqrt(np.maximum(c["kl"], 0))
        width = max(1, len(x) // 12)
        smooth = lambda v: np.convolve(v, np.ones(width) / width, "valid")
        ax.plot(x, c[kind], ".", color=colour, alpha=0.25, markersize=4)
        ax.plot(smooth(x), smooth(c[kind]), color=colour, label=name)
    ax.set_xlabel("√KL to the SFT model, nats an answer")
    ax.set_ylabel(label)
    ax.legend(title="reward model", frameon=False)


def strength_histogram(mean, errors, path):
    figure, (ax,) = axes(f"Preference strength: {(np.asarray(mean) < 0).mean():.0%} of the labels are doubted by the vote")
    draw_strength(ax, mean, errors)
    save(figure, path)


def summary(mean, errors, curves, path, judge):
    """A run in one picture: which labels the vote doubts, and what PPO makes of reward models with and without treatment."""
    figure, (left, right) = axes("", columns=2)
    draw_strength(left, mean, errors)
    left.set_title("the vote of the ensemble on every label", fontsize=10)
    draw_ppo(right, curves, "judge", f"score by {judge}")
    right.set_title("the policies that PPO makes of the reward models", fontsize=10)
    save(figure, path)


def group_accuracy(groups, path):
    """Accuracy of each reward model on validation pairs in groups of ascending strength."""
    by = [k for k in ("label", "gold") if k in next(iter(groups.values()))]
    figure, ax = axes("Accuracy by preference strength", "strength group of the validation pairs, weakest first", "accuracy", len(by))
    for a, kind in zip(ax, by):
        for colour, (name, g) in zip(COLOURS, groups.items()):
            a.plot(range(1, len(g[kind]) + 1), g[kind], "o-", color=colour, label=name, markersize=4)
        a.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        a.set_title({"label": "by the data's labels", "gold": "by the true quality"}[kind], fontsize=10)
        a.set_ylim(0, 1.03)
    ax[0].legend(frameon=False)
    save(figure, path)


def ppo_curves(curves, path, judge):
    kinds = [k for k in ("reward", "judge") if k in next(iter(curves.values()))]
    figure, ax = axes("PPO", columns=len(kinds))
    for a, kind in zip(ax, kinds):
        draw_ppo(a, curves, kind, {"reward": "reward of the model trained against", "judge": f"score by {judge}"}[kind])
    save(figure, path)


WATCHED = {"reward": "reward", "reward_normalised": "normalised reward", "kl": "KL to the reference, nats an answer", "perplexity_sft": "perplexity under SFT",
           "length": "length, tokens", "clip_fraction": "share of ratios clipped", "explained_variance": "critic: explained variance", "ended": "share of answers ended"}


def ppo_watch(histories, path):
    """What to watch while PPO runs.  {policy: [metrics], one an iteration}; a panel a measure, a line a policy"""
    figure, panels = plt.subplots(2, 4, figsize=(15, 6.2))
    for ax, (name, label) in zip(panels.flat, WATCHED.items()):
        for colour, (policy, history) in zip(COLOURS, histories.items()):
            values = [np.nan if h[name] is None else h[name] for h in history]
            ax.plot(range(1, len(values) + 1), values, color=colour, label=policy, linewidth=1.2)
        ax.set_title(label, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("iteration")
    panels.flat[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def reliability(results, path):
    """Confidence of sigmoid(gap) against the share of labels it gets right."""
    figure, (ax,) = axes("Reliability on validation labels", "confidence", "share right")
    for colour, (name, sets) in zip(COLOURS, results.items()):
        mean, right, count = (np.array(x) for x in zip(*sets["valid"]["bins"]))
        ax.plot(mean, right, "-", color=colour, label=name, linewidth=1)
        ax.scatter(mean, right, s=8 + 160 * count / count.sum(), color=colour)  # the area shows how many pairs stand behind a dot
    ax.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8, linestyle=":")
    ax.legend(frameon=False)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Experiments over seeds.  summary: {row: {column: {"mean": number or list, "se": the same or None}}}

def draw_band(ax, x, value, colour, label):
    """A line with a band of one standard error around it."""
    mean = np.array(value["mean"])
    ax.plot(x, mean, ".-", color=colour, label=label or None, linewidth=1.2, markersize=4)
    if value["se"] is not None:
        ax.fill_between(x, mean - np.array(value["se"]), mean + np.array(value["se"]), color=colour, alpha=0.13, linewidth=0)


def finish_panels(figure, panels, ylabels, path, chance=None):
    for ax, ylabel in zip(panels, ylabels):
        ax.set_ylabel(ylabel)
        if chance is not None and "accuracy" in ylabel:
            ax.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
    if panels[0].get_legend_handles_labels()[1]:
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save(figure, path)


def by_row(summary, path, title, xlabel, panels, chance=None):
    """The rows along the x axis.  panels: {y label: {legend: column}}; a column that no row has is left out"""
    rows = list(summary)
    panels = {y: {name: c for name, c in lines.items() if c in summary[rows[0]]} for y, lines in panels.items()}
    panels = {y: lines for y, lines in panels.items() if lines}
    figure, ax = axes(title, xlabel, columns=len(panels))
    for a, lines in zip(ax, panels.values()):
        for colour, (name, column) in zip(COLOURS, lines.items()):
            values = [summary[row][column] for row in rows]
            se = [v["se"] for v in values]
            draw_band(a, range(1, len(rows) + 1), {"mean": [v["mean"] for v in values], "se": None if None in se else se}, colour, name)
        if not rows[0].isdigit():
            a.set_xticks(range(1, len(rows) + 1), rows)
    finish_panels(figure, ax, panels, path, chance)


def by_epoch(summary, path, title, panels, xlabel="epoch"):
    """A line a row over the course of training.  panels: {y label: column that holds the curve}"""
    panels = {y: c for y, c in panels.items() if any(c in row for row in summary.values())}
    figure, ax = axes(title, xlabel, columns=len(panels))
    for a, column in zip(ax, panels.values()):
        for colour, (name, row) in zip(COLOURS, summary.items()):
            if column in row:
                draw_band(a, range(1, len(row[column]["mean"]) + 1), row[column], colour, name)
        a.xaxis.get_major_locator().set_params(integer=True)
    finish_panels(figure, ax, panels, path, chance=None)


def curves_xy(summary, path, title, x, y, ylabel):
    """A panel a row, curve y over curve x."""
    figure, ax = axes(title, columns=len(summary))
    for a, (name, row) in zip(ax, summary.items()):
        draw_band(a, row[x]["mean"], row[y], COLOURS[0], "")
        a.set_xlabel(name)
    finish_panels(figure, ax, [ylabel] * len(summary), path)


def overlay(summary, path, title, x, y, xlabel, ylabel, diagonal=()):
    """All rows in one panel, curve y over curve x.  diagonal: from where to where y = x is drawn"""
    figure, ax = axes(title, xlabel)
    ax[0].plot(diagonal, diagonal, color="grey", linewidth=0.8, linestyle=":")
    for colour, (name, row) in zip(COLOURS, summary.items()):
        draw_band(ax[0], row[x]["mean"], row[y], colour, name)
    finish_panels(figure, ax, [ylabel], path)


def by_round(summary, path, title, panels):
    """Rows named "ARM NUMBER": a line an arm over the rounds; other rows as dotted lines.  panels: {y label: column}"""
    arms = {}
    for name in summary:
        arm, _, number = name.rpartition(" ")
        arms.setdefault(arm if number.isdigit() else name, []).append(name)
    figure, ax = axes(title, "round", columns=len(panels))
    for a, column in zip(ax, panels.values()):
        for colour, (arm, names) in zip(COLOURS, arms.items()):
            values = [summary[n][column] for n in names if column in summary[n]]
            if len(names) == 1 and values and not names[0][-1:].isdigit():
                a.axhline(values[0]["mean"], color=colour, linestyle=":", linewidth=1, label=arm)
            elif values:
                se = [v["se"] for v in values]
                draw_band(a, range(1, len(values) + 1), {"mean": [v["mean"] for v in values], "se": None if None in se else se}, colour, arm)
        a.set_xticks(range(1, max(map(len, arms.values())) + 1))
    finish_panels(figure, ax, panels, path)


def scatter(summary, path, title):
    """A panel a row, of points in turns chosen and rejected."""
    figure, ax = axes(title, columns=len(summary))
    for a, (name, row) in zip(ax, summary.items()):
        for i, (label, colour) in enumerate((("chosen", COLOURS[0]), ("rejected", COLOURS[1]))):
            a.plot(row["points: x"]["mean"][i::2], row["points: y"]["mean"][i::2], ".", color=colour, alpha=0.4, markersize=3, label=label)
        a.set_title(f"{name}: silhouette {row['silhouette']['mean']:.2f}", fontsize=10)
        a.set_xticks([])
        a.set_yticks([])
    for a in ax[len(summary):]:
        a.set_visible(False)
    finish_panels(figure, ax, [""] * len(summary), path)


def against(summary, path, title, x, xlabel, panels):
    """A line a row, y over x, both curves.  panels: {y label: column of y}"""
    figure, ax = axes(title, xlabel, columns=len(panels))
    for a, column in zip(ax, panels.values()):
        for colour, (name, row) in zip(COLOURS, summary.items()):
            draw_band(a, row[x]["mean"], row[column], colour, name)
    finish_panels(figure, ax, panels, path)


def bars(summary, path, title, columns, chance=0.5):
    """A group of bars a row, a bar a column, with standard errors, and a line where chance is, if it is one number."""
    rows = [r for r in summary if any(c in summary[r] for c in columns)]
    figure, ax = plt.subplots(figsize=(7.5, 0.6 + 0.42 * len(rows)))
    ax.spines[["top", "right"]].set_visible(False)
    height = 0.8 / len(columns)
    for i, (column, colour) in enumerate(zip(columns, COLOURS)):
        here = [(y, summary[r][column]) for y, r in enumerate(rows) if column in summary[r]]
        ax.barh([y + (i - (len(columns) - 1) / 2) * height for y, _ in here], [v["mean"] for _, v in here], height,
                xerr=[v["se"] or 0 for _, v in here], color=colour, label=column, error_kw={"linewidth": 0.8})
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    if chance is not None:
        ax.axvline(chance, color="grey", linewidth=0.8, linestyle=":")
    ax.invert_yaxis()
    ax.set_title(title, fontsize=11)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)
