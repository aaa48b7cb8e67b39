"""Pictures: complete files, rows and columns that are missing, and a machine without matplotlib."""
import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import figures

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer pixels: the tests look at files and at what is drawn, not at the picture."""
    monkeypatch.setattr(figures, "DPI", 30)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved, as matplotlib objects."""
    figures_drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: figures_drawn.append(figure))
    return figures_drawn


def number(mean, se=None):
    return {"mean": mean, "se": se}


CURVES = {"a": {"x": number([1.0, 2.0]), "y": number([3.0, 4.0], [0.1, 0.2]), "n": number(1.0)},
          "b": {"x": number([1.0, 2.0]), "y": number([5.0, 4.0]), "n": number(2.0, 0.5)}}


def xy_of(line):
    return list(line.get_xdata()), list(line.get_ydata())


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# --------------------------------------------------------------------------------------------------
# draw and save

def test_without_matplotlib_one_line_a_process_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    figures.report_missing.cache_clear()
    for _ in range(2):
        assert not figures.draw(figures.by_epoch, CURVES, tmp_path / "a.png", "t", {"y": "y"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "matplotlib is not installed; pip install matplotlib" in out
    assert not list(tmp_path.iterdir())


def test_draw_calls_the_function(tmp_path):
    path = str(tmp_path / "folder" / "a.png")
    assert figures.draw(figures.by_epoch, CURVES, path, "t", {"y": "y"})
    with open(path, "rb") as file:
        assert file.read(4) == PNG


def test_a_broken_write_names_the_file_and_leaves_no_part_of_it(monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    path = str(tmp_path / "a.png")
    with pytest.raises(OSError, match=f"{path}: cannot be written"):
        figures.by_epoch(CURVES, path, "t", {"y": "y"})
    assert not list(tmp_path.iterdir())


def test_the_temporary_name_is_of_this_process(monkeypatch, tmp_path):
    names = []
    replace = os.replace

    def spy(part, path):
        names.append(part)
        replace(part, path)

    monkeypatch.setattr(os, "replace", spy)
    figures.by_epoch(CURVES, str(tmp_path / "a.png"), "t", {"y": "y"})
    assert str(os.getpid()) in os.path.basename(names[0])


# --------------------------------------------------------------------------------------------------
# Pictures of a run

MEAN = np.linspace(-1, 2, 40)
ERRORS = ["flip" if mean < -0.5 else "" for mean in MEAN]
PPO = {"flip": {"kl": [0.0, -0.1, 4.0], "reward": [1.0, 2.0, 3.0], "judge": [1.0, 0.5, 0.0]}}
HISTORY = [dict.fromkeys(figures.HISTORY, 1.0), dict.fromkeys(figures.HISTORY)]  # None: not known
BINS = {"flip": {"valid": {"bins": [[0.6, 0.5, 3], [0.9, 0.8, 7]]}}}


@pytest.mark.parametrize("function, arguments", [
    (figures.strength_histogram, (MEAN, ERRORS)),
    (figures.strength_histogram, (MEAN, None)),
    (figures.group_accuracy, ({"flip": {"label": [0.5, 0.9], "gold": [0.6, 0.9]}},)),
    (figures.group_accuracy, ({"flip": {"label": [0.5, 0.9]}},)),
    (figures.ppo_history, ({"flip": HISTORY},)),
    (figures.reliability, (BINS,)),
])
def test_a_picture_of_a_run_is_a_png(function, arguments, tmp_path):
    path = tmp_path / "a.png"
    function(*arguments, str(path))
    assert path.read_bytes().startswith(PNG)


def test_the_histogram_counts_every_pair_once_by_cause(drawn, tmp_path):
    figures.strength_histogram(MEAN, ERRORS, str(tmp_path / "a.png"))
    ax = drawn[0].axes[0]
    top = sum(patch.get_height() for patch in ax.patches)
    assert top == len(MEAN)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["right", "flipped at random"]
    assert f"{(MEAN < 0).mean():.0%} of the labels" in drawn[0].get_suptitle()


def test_ppo_is_drawn_over_the_root_of_its_kl(drawn, tmp_path):
    figures.ppo_curves(PPO, str(tmp_path / "a.png"), "gold reward")
    figures.ppo_curves({"flip": {k: v for k, v in PPO["flip"].items() if k != "judge"}},
                       str(tmp_path / "b.png"), "gold reward")
    with_judge, without = drawn
    assert [ax.get_ylabel() for ax in with_judge.axes] == [
        "reward of the model trained against", "score by gold reward"]
    assert len(without.axes) == 1
    dots, line = with_judge.axes[0].lines
    assert dots.get_xdata().tolist() == [0.0, 0.0, 2.0]  # a KL estimate may be negative
    assert line.get_ydata().tolist() == [1.0, 2.0, 3.0]


def test_the_summary_has_the_vote_and_the_policies(drawn, tmp_path):
    figures.summary(MEAN, ERRORS, PPO, str(tmp_path / "a.png"), "gold reward")
    assert len(drawn[0].axes) == 2


@pytest.mark.parametrize("errors, change, names", [
    (ERRORS, {}, {"strength", "groups", "reliability", "ppo", "summary"}),
    (None, {}, {"strength", "groups", "reliability", "ppo"}),  # without a truth
    (ERRORS, {"ppo": {}}, {"strength", "groups", "reliability"}),
    (ERRORS, {"reward": {}, "ppo": {}}, {"strength"}),
])
def test_a_run_has_the_pictures_that_it_has_numbers_for(errors, change, names, drawn):
    paths = []

    def draw(name, function, *arguments, **options):
        paths.append(name)
        function(*arguments, path=name, **options)

    run = SimpleNamespace(draw=draw)
    results = {"judge": "gold reward", "ppo": PPO, "reward": BINS}
    results["groups"] = {"flip": {"label": [0.5, 0.9]}}
    figures.draw_results(run, results | change, MEAN, errors, {})
    assert set(paths) == names and len(paths) == len(names)


# --------------------------------------------------------------------------------------------------
# Panels of experiments

def test_a_curve_of_rows_has_a_band_only_where_every_row_has_an_error():
    assert figures.as_curve([number(1.0, 0.1), number(2.0, 0.2)]) == number([1.0, 2.0], [0.1, 0.2])
    assert figures.as_curve([number(1.0, 0.1), number(2.0)]) == number([1.0, 2.0])


def test_by_row_leaves_out_what_no_row_has(drawn, tmp_path):
    panels = {"accuracy": {"by n": "n", "by m": "m"}, "loss": {"": "loss"}}
    figures.by_row(CURVES, str(tmp_path / "a.png"), "title", "row", panels, 0.5)
    ax, = drawn[0].axes
    assert ax.get_ylabel() == "accuracy" and legend_of(drawn[0]) == ["by n"]
    curve, chance = ax.lines
    assert xy_of(curve) == ([1, 2], [1.0, 2.0])
    assert xy_of(chance)[1] == [0.5, 0.5]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["a", "b"]


def test_by_epoch_draws_a_line_for_every_row_that_has_the_curve(drawn, tmp_path):
    summary = CURVES | {"c": {"n": number(1.0)}}
    figures.by_epoch(summary, str(tmp_path / "a.png"), "title", {"y": "y", "z": "z"})
    ax, = drawn[0].axes
    assert legend_of(drawn[0]) == ["a", "b"]
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 2], [1, 2]]
    assert len(ax.collections) == 1  # the band of a; b is of one seed


def test_curves_xy_and_overlay_draw_y_over_x(drawn, tmp_path):
    figures.curves_xy(CURVES, str(tmp_path / "a.png"), "title", ("x", "y"), "density")
    assert [ax.get_xlabel() for ax in drawn[0].axes] == ["a", "b"]
    labels = ("x axis", "y axis")
    figures.overlay(CURVES, str(tmp_path / "b.png"), "title", ("x", "y"), labels, (0.5, 1))
    ax, = drawn[1].axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == labels
    diagonal, a, b = ax.lines
    assert xy_of(diagonal) == ([0.5, 1], [0.5, 1])
    assert xy_of(a) == ([1.0, 2.0], [3.0, 4.0])
    assert xy_of(b) == ([1.0, 2.0], [5.0, 4.0])


def test_rows_belong_to_arms_by_their_number():
    names = ["plain PPO", "meta 1", "meta 2", "none 1"]
    assert figures.rows_by_arm(dict.fromkeys(names)) == {
        "plain PPO": ["plain PPO"], "meta": ["meta 1", "meta 2"], "none": ["none 1"]}


def test_by_round_draws_arms_as_lines_and_the_rest_dotted(drawn, tmp_path):
    summary = {"plain PPO": {"n": number(0.0)}, "meta 1": {"n": number(1.0), "m": number(0.0)},
               "meta 2": {"n": number(2.0), "m": number(1.0)}, "none 1": {"n": number(3.0)}}
    figures.by_round(summary, str(tmp_path / "a.png"), "title", {"n": "n", "m": "m"})
    n, m = drawn[0].axes
    assert [line.get_linestyle() for line in n.lines] == [":", "-", "-"]
    assert xy_of(n.lines[1]) == ([1, 2], [1.0, 2.0])
    assert xy_of(n.lines[2]) == ([1], [3.0])
    assert len(m.lines) == 1  # the other arms do not have m
    assert n.get_xticks().tolist() == [1, 2]


def test_scatter_takes_points_in_turns(drawn, tmp_path):
    points = {"points: x": number([0, 1, 2, 3]), "points: y": number([4, 5, 6, 7]),
              "silhouette": number(0.125)}
    summary = {name: points for name in "abcde"}
    figures.scatter(summary, str(tmp_path / "a.png"), "title")
    axes = drawn[0].axes
    assert [ax.get_visible() for ax in axes] == [True] * 5 + [False]
    chosen, rejected = axes[0].lines
    assert xy_of(chosen) == ([0, 2], [4, 6])
    assert xy_of(rejected) == ([1, 3], [5, 7])
    assert axes[0].get_title() == "a: silhouette 0.12"


def test_against_draws_every_panel_over_the_same_x(drawn, tmp_path):
    figures.against(CURVES, str(tmp_path / "a.png"), "title", "x", "x axis", {"y": "y", "x": "x"})
    y, x = drawn[0].axes
    assert y.get_xlabel() == "x axis"
    assert xy_of(y.lines[1]) == ([1.0, 2.0], [5.0, 4.0])
    assert xy_of(x.lines[0]) == ([1.0, 2.0], [1.0, 2.0])


def test_bars_leave_out_rows_and_columns_that_are_missing(drawn, tmp_path):
    summary = CURVES | {"c": {}, "d": {"m": number(3.0)}}
    figures.bars(summary, str(tmp_path / "a.png"), "title", ["n", "m"])
    ax, = drawn[0].axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b", "d"]
    assert [bar.get_width() for bar in ax.patches] == [1.0, 2.0, 3.0]
    chance = ax.lines[-1]
    assert xy_of(chance)[0] == [0.5, 0.5]
    figures.bars(summary, str(tmp_path / "b.png"), "title", ["n", "m"], None)
    assert len(drawn[1].axes[0].lines) == len(ax.lines) - 1


def test_more_rows_than_colours_are_all_drawn(drawn, tmp_path):
    rows = {f"row {i}": CURVES["a"] for i in range(len(figures.COLOURS) + 2)}
    figures.overlay(rows, tmp_path / "x.png", "", ("x", "y"), ("x", "y"))
    assert legend_of(drawn[0]) == list(rows)


def test_learning_curves_name_the_rows_of_every_group_in_one_colour(drawn, tmp_path):
    summary = {"a: first": CURVES["a"], "b: second": CURVES["b"], "b: first": CURVES["b"]}
    figures.learning_curves(summary, tmp_path / "x.png", "", {"x": "x"}, "y", "y")
    figure, = drawn
    assert legend_of(figure) == ["first", "second"]
    colours = {}
    for ax in figure.axes:
        for line in ax.get_lines():
            if not line.get_label().startswith("_"):
                colours.setdefault(line.get_label(), set()).add(line.get_color())
    assert all(len(found) == 1 for found in colours.values()) and len(colours) == 2
