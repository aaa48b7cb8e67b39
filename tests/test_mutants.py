"""Every fault of tests/mutant_list.py is found in the code; the verdicts of tests/mutants.py."""
import mutants
import pytest
from mutant_list import FAULTS, WITHOUT_DECORATOR
from mutants import Fault, NotFound, check, draw_sample, locate, plant

SOURCE = '''
import functools


@functools.cache
def area(width, height=1):
    """The area of a rectangle."""
    total = 0  # a comment
    for row in range(height):
        if width > 0 and row >= 0:
            total += width
        else:
            total -= width
    return total


class Box:
    def area(self):
        def side(size):
            return 2 * size

        return side("a") + side('b')
'''


def planted(place, code, fault, source=SOURCE):
    return plant(source, place.split("."), Fault(place, code, fault, ""))


# --------------------------------------------------------------------------------------------------
# The table


def test_every_fault_is_found_and_names_its_tests():
    problems = check([Fault(*row) for row in FAULTS])
    assert not problems, "\n".join(problems)


def test_no_fault_is_listed_twice():
    rows = [row[:3] for row in FAULTS]
    assert len(set(rows)) == len(rows)


# --------------------------------------------------------------------------------------------------
# Planting


@pytest.mark.parametrize("place, code, fault, expected", [
    ("area", "total += width", "total += width + 1", "            total += width + 1\n"),
    ("area", "width > 0 and row >= 0", "width > 0", "        if width > 0:\n"),
    ("area", "total -= width", "pass", "        else:\n            pass\n"),
    ("area", "total = 0\nfor row in range(height):\n"
             "    if width > 0 and row >= 0:\n        total += width\n"
             "    else:\n        total -= width",
     "total = width", "    total = width\n    return total\n"),
    ("area", "if width > 0 and row >= 0: ...", "if False: ...",
     "        if False:\n            total += width\n        else:\n"),
    ("area", "functools.cache", WITHOUT_DECORATOR, "@lambda function: function\ndef area"),
    ("Box.area", "side('a')", "side('c')", "return side('c') + side('b')"),
    ("Box.area.side", "2 * size", "size", "            return size\n"),
])
def test_a_fault_replaces_its_code_alone(place, code, fault, expected):
    changed = planted(place, code, fault)
    assert expected in changed
    assert planted(place, code, code) == mutants.ast.unparse(mutants.ast.parse(SOURCE)) + "\n"


def test_formatting_does_not_matter():
    formatted = SOURCE.replace(
        "if width > 0 and row >= 0:", "if (width > 0  # not empty\n                and row >= 0):"
    ).replace("side(\"a\") + side('b')", "(\n            side('a')\n            + side(\"b\"))")
    for place, code, fault in (
        ("area", "width>0 and row>=0", "False"),
        ("Box.area", "side('a')+side('b')", "0"),
    ):
        assert planted(place, code, fault, formatted) == planted(place, code, fault)


@pytest.mark.parametrize("place, code, message", [
    ("volume", "width", "volume is defined 0 times"),
    ("side", "2 * size", "side is defined 0 times"),
    ("area", "total += height", "the code occurs 0 times"),
    ("Box.area", "side", "the code occurs 2 times"),
])
def test_code_that_is_not_there_once_is_an_error(place, code, message):
    with pytest.raises(NotFound, match=message):
        planted(place, code, "0")


def test_modules_are_found_in_folders_too(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "module.py").write_text("")
    path, names = locate(tmp_path, "folder.module.Class.method")
    assert path == tmp_path / "folder" / "module.py" and names == ["Class", "method"]
    with pytest.raises(NotFound, match="no module"):
        locate(tmp_path, "other.function")


def test_the_check_names_what_is_wrong(tmp_path):
    (tmp_path / "shapes.py").write_text(SOURCE)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_shapes.py").write_text("")
    faults = [
        Fault("shapes.area", "total = 0", "total = 1", "test_shapes"),
        Fault("shapes.area", "total = 1", "total = 2", "test_shapes"),
        Fault("shapes.area", "total = 0", "total=0", "test_shapes"),
        Fault("shapes.area", "total = 0", "total = 1", "test_volumes"),
        Fault("volumes.area", "total = 0", "total = 1", "test_shapes"),
    ]
    problems = check(faults, tmp_path)
    ends = ("occurs 0 times", "changes nothing", "no tests/test_volumes.py", "of volumes.area")
    assert len(problems) == len(ends)
    for problem, end in zip(problems, ends):
        assert problem.endswith(end)


# --------------------------------------------------------------------------------------------------
# Running


def test_a_sample_depends_on_its_seed_and_is_spread_over_the_modules():
    faults = [Fault(*row) for row in FAULTS]
    sample = draw_sample(faults, 12, "today")
    assert sample == draw_sample(faults, 12, "today")
    assert sample != draw_sample(faults, 12, "tomorrow")
    assert len({mutants.module_of(fault.place) for fault in sample}) == 12
    assert len(set(draw_sample(faults, 10 ** 6, "today"))) == len(faults)


TESTS = '''
from shapes import Box, area


def test_area():
    assert area(2, 3) == 6


def test_box():
    assert Box().area() == "aaaa"
'''


def test_verdicts(tmp_path, capsys):
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "shapes.py").write_text(SOURCE)
    (root / "tests" / "test_shapes.py").write_text(TESTS)
    (root / "tests" / "test_area.py").write_text(TESTS.partition("def test_box")[0])
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    faults = [
        Fault("shapes.area", "total += width", "total += 1", "test_shapes"),
        Fault("shapes.area", "total -= width", "pass", "test_area"),
        Fault("shapes.Box.area.side", "2 * size", "3 * size", "test_shapes"),
        Fault("shapes.area", "functools.cache", "functools.no_cache", "test_shapes"),
        Fault("shapes.area", "total = 2", "total = 1", "test_shapes"),
    ]

    assert mutants.run_faults(faults, 1, root) == 1
    lines = capsys.readouterr().out.splitlines()
    expected = [
        ("caught", "(tests/test_shapes.py::test_area)"),
        ("SURVIVED", "pass"),
        ("FAILS ANYWAY", "(tests/test_shapes.py::test_box)"),
        ("NO RESULT", "of pytest tests/test_shapes.py)"),
        ("not found", "(the code occurs 0 times)"),
    ]
    for line, (verdict, ending) in zip(lines, expected, strict=True):
        assert line.startswith(verdict) and line.endswith(ending)
    assert (root / "shapes.py").read_text() == SOURCE
