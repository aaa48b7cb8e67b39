"""python tests/mutants.py [--sample=12] [--seed=TEXT] [--only=TEXT] [--jobs=2] [--list] [--check]

Mutation testing: plants the faults of tests/mutant_list.py one at a time in a copy of the
repository and checks that the tests notice each.  Prints a line a fault and "N of M caught"; exit
code 1 if one is not caught.

    caught          a test fails that passes without the fault
    SURVIVED        every test passes
    FAILS ANYWAY    the test that fails does so without the fault, too
    NO RESULT       pytest did not run the tests to an end: no such file, an error on import, time
    not found       the code is not in its function, or more than once: correct mutant_list.py

A fault belongs to a function and to a piece of its syntax tree, so line breaks, quotes and comments
do not matter.

--sample=N  N faults only, spread over the files, drawn by --seed (the date unless given)
--only=TEXT faults whose line in --list contains TEXT
--check     only checks that all code is found; takes a second
"""
import argparse
import ast
import datetime
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from mutant_list import FAULTS

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".whl", "out", "results", "docs", "__pycache__", ".*_cache", ".hypothesis"
)
MAX_SECONDS = 1800  # for the tests of one fault
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Fault(NamedTuple):
    """A row of mutant_list.py, which explains the fields."""
    place: str
    code: str
    fault: str
    tests: str

    @property
    def test_files(self):
        return [f"tests/{name}.py" for name in self.tests.split()]

    def __str__(self):
        change = f"{self.code}  ->  {self.fault}"
        return f"{self.place}: {' '.join(change.split())}"


class NotFound(Exception):
    """The code of a fault is not in its place, or not once."""


# --------------------------------------------------------------------------------------------------
# Finding the code


def locate(root, place):
    """module.function -> path of the module, names of the definitions within one another"""
    parts = place.split(".")
    for i in range(1, len(parts)):
        path = root.joinpath(*parts[:i]).with_suffix(".py")
        if path.exists():
            return path, parts[i:]
    raise NotFound(f"no module of {place}")


def definitions(scope):
    """Functions and classes directly in a scope, also those inside if, with and for"""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, DEFINITIONS):
            yield node
        else:
            yield from definitions(node)


def find_definition(tree, names):
    scope = tree
    for name in names:
        found = [node for node in definitions(scope) if node.name == name]
        if len(found) != 1:
            raise NotFound(f"{name} is defined {len(found)} times")
        scope = found[0]
    return scope


def parse_pieces(code, fault):
    """Code and what replaces it -> two lists of nodes: of one expression each, or of statements"""
    old = ast.parse(code).body
    new = ast.parse(fault).body
    if all(len(body) == 1 and isinstance(body[0], ast.Expr) for body in (old, new)):
        return [old[0].value], [new[0].value]
    return old, new


def is_head(piece):
    """Whether a piece is the head of an if statement alone, `if TEST: ...`"""
    return isinstance(piece, ast.If) and ast.unparse(piece.body) == "..."


def equal(node, piece):
    if type(node) is not type(piece):
        return False
    if is_head(piece):
        return equal(node.test, piece.test)
    return ast.dump(node) == ast.dump(piece)


def occurrences(scope, pieces):
    """Where the pieces follow one another in a scope -> [(node, name of its field, index there)]"""
    found = []
    for node in ast.walk(scope):
        for name, value in ast.iter_fields(node):
            items = value if isinstance(value, list) else [value]
            for i in range(len(items) - len(pieces) + 1):
                if all(map(equal, items[i:i + len(pieces)], pieces)):
                    found.append((node, name, i))
    return found


def find(tree, names, pieces):
    """-> node, name of its field, index there.  Raises NotFound"""
    found = occurrences(find_definition(tree, names), pieces)
    if len(found) != 1:
        raise NotFound(f"the code occurs {len(found)} times")
    return found[0]


def plant(source, names, fault):
    """Source of a module -> the same with the fault.  Raises NotFound"""
    tree = ast.parse(source)
    old, new = parse_pieces(fault.code, fault.fault)
    node, name, i = find(tree, names, old)
    value = getattr(node, name)
    if not isinstance(value, list):
        setattr(node, name, new[0])
    elif is_head(new[0]):
        value[i].test = new[0].test
    else:
        value[i:i + len(old)] = new
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def check(faults, root=ROOT):
    """-> one line for every fault that cannot be planted"""
    trees = {}
    problems = []
    for fault in faults:
        try:
            path, names = locate(root, fault.place)
            if path not in trees:
                trees[path] = ast.parse(path.read_text())
            old, new = parse_pieces(fault.code, fault.fault)
            find(trees[path], names, old)
        except NotFound as error:
            problems.append(f"{fault}: {error}")
            continue
        missing = [name for name in fault.test_files if not (root / name).exists()]
        if missing:
            problems.append(f"{fault}: no {', '.join(missing)}")
        if len(old) == len(new) and all(map(equal, old, new)):
            problems.append(f"{fault}: changes nothing")
    return problems


# --------------------------------------------------------------------------------------------------
# Running the tests


def run_tests(folder, names):
    """Run test files or single tests until one fails.  -> exit code of pytest, name of that test"""
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider",
        f"--basetemp={folder}.tmp", *names,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=MAX_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None, ""
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            name = line.split(" ", 1)[1].split(" - ")[0]
            return done.returncode, name.partition("[")[0].strip()  # all cases of a test are one
    return done.returncode, ""


class Bench:
    """Copies of the repository, one for each job, and the tests that fail without a fault."""

    def __init__(self, root, temporary, jobs):
        self.folders = queue.Queue()
        self.passes = {}  # name of a test -> whether it passes without a fault
        for i in range(jobs):
            folder = Path(temporary) / f"copy_{i}"
            shutil.copytree(root, folder, ignore=NOT_COPIED)
            self.folders.put(folder)

    def verdict(self, fault):
        """Plant one fault, run its tests, restore the file.  -> verdict, detail"""
        folder = self.folders.get()
        try:
            path, names = locate(folder, fault.place)
            source = path.read_text()
            try:
                path.write_text(plant(source, names, fault))
                code, test = run_tests(folder, fault.test_files)
            finally:
                path.write_text(source)
            if code == 0:
                return "SURVIVED", ""
            if code != 1 or "::" not in test:
                return "NO RESULT", f"exit code {code} of pytest {test}".strip()
            if not self.passes_without(folder, test):
                return "FAILS ANYWAY", test
            return "caught", test
        except NotFound as error:
            return "not found", str(error)
        finally:
            self.folders.put(folder)

    def passes_without(self, folder, test):
        if test not in self.passes:
            self.passes[test] = run_tests(folder, [test])[0] == 0
        return self.passes[test]


def module_of(place):
    folder, module, *_ = place.split(".")
    return f"{folder}.{module}" if (ROOT / folder).is_dir() else folder


def draw_sample(faults, n, seed):
    """n faults at random, one of every module in turn"""
    rng = random.Random(seed)
    by_module = {}
    for fault in rng.sample(faults, len(faults)):
        by_module.setdefault(module_of(fault.place), []).append(fault)
    drawn = []
    while by_module and len(drawn) < n:
        for module in list(by_module):
            drawn.append(by_module[module].pop())
            if not by_module[module]:
                del by_module[module]
    return drawn[:n]


def run_faults(faults, jobs, root=ROOT):
    """Print a line a fault.  -> number of those that are caught"""
    caught = 0
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs) as pool:
        bench = Bench(root, temporary, jobs)
        futures = {pool.submit(bench.verdict, fault): fault for fault in faults}
        for future in as_completed(futures):
            verdict, detail = future.result()
            caught += verdict == "caught"
            ending = f"  ({detail})" if detail else ""
            print(f"{verdict:14}{futures[future]}{ending}", flush=True)
    return caught


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", default=str(datetime.date.today()))
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", action="store_true")
    return parser.parse_args(argv)


def main(argv):
    args = parse_args(argv)
    faults = [fault for fault in (Fault(*row) for row in FAULTS) if args.only in str(fault)]
    if args.list:
        for fault in faults:
            print(f"{fault}  [{fault.tests}]")
        return 0
    if args.check:
        problems = check(faults)
        print("\n".join([*problems, f"{len(faults) - len(problems)} of {len(faults)} found"]))
        return 1 if problems else 0
    if args.sample:
        print(f"{args.sample} of {len(faults)} faults, --seed={args.seed}")
        faults = draw_sample(faults, args.sample, args.seed)
    caught = run_faults(faults, args.jobs)
    print(f"{caught} of {len(faults)} caught")
    return 0 if caught == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
