"""python tests/faults/damage.py [--cases=N] [--seed=S] [--run=NAME]

Damages every file of a finished run in five ways, one at a time, and repeats the same command: it
must make the file again, with the reason, or say in one line what is wrong.  --cases takes so many
of them at random.  Prints a table; exits with 1 if a damage was unnoticed.
"""
import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.runs import VOLATILE, contents, difference, parse_args, words_of_run  # noqa: E402

import train  # noqa: E402

WAYS = ("truncated", "emptied", "a bit flipped", "deleted", "replaced")


def damage(path, way, rng):
    """-> False where the file has no sibling that could replace it"""
    content = path.read_bytes()
    if way == "truncated":
        path.write_bytes(content[:rng.randrange(1, len(content))])
    elif way == "emptied":
        path.write_bytes(b"")
    elif way == "a bit flipped":
        position = rng.randrange(len(content))
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
    elif way == "deleted":
        path.unlink()
    else:
        others = [other for other in path.parent.glob(f"*{path.suffix}")
                  if other != path and other.read_bytes() != content]
        if not others:
            return False
        shutil.copy(rng.choice(others), path)
    return True


def repeat(folder, words):
    """Run the command -> exit code, stdout, stderr"""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main([*words, f"--out_dir={folder}"])
    return code, out.getvalue(), err.getvalue()


def outcome(folder, words, expected, name):
    """What the command makes of the damage -> "made again", "one line" or a problem"""
    try:
        code, out, err = repeat(folder, words)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if code == 2 and err.startswith("error: ") and err.count("\n") == 1:
        return "one line"
    if code != 0:
        return f"exit code {code}: {err}"
    kept = {path.name for path in folder.glob("*.edited*")}
    for path in kept:
        (folder / path).unlink()
    changed = difference(folder, expected)
    if changed:
        return changed
    is_record = name.startswith("stages/")
    if "again: " not in out and not is_record:  # work without a record is new
        return "no reason is printed"
    return "made again"


def kind_of(name):
    """The row of the table"""
    return "records" if name.startswith("stages/") else f"*{Path(name).suffix}"


def main(num_cases, seed, words):
    table = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        folder = Path(root) / "run"  # records hold the name: all copies have the same
        code, _, err = repeat(folder, words)
        assert code == 0, err
        folder.rename(whole)
        expected = contents(whole)
        cases = [(name, way) for name in expected for way in WAYS if name not in VOLATILE]
        rng = random.Random(seed)
        if num_cases:
            cases = rng.sample(cases, num_cases)
        for name, way in cases:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            if not damage(folder / name, way, rng):
                continue
            found = outcome(folder, words, expected, name)
            is_good = found in ("made again", "one line")
            table[kind_of(name), way, found if is_good else "UNNOTICED"] += 1
            if not is_good:
                failed += 1
                print(f"{name} {way}: {found}", flush=True)
    for (kind, way, found), count in sorted(table.items()):
        print(f"{kind:10} {way:14} {found:11} {count:4}")
    print(f"{table.total() - failed} of {table.total()} damages noticed")
    return failed


if __name__ == "__main__":
    given = parse_args(sys.argv[1:])
    with tempfile.TemporaryDirectory() as base:
        settings = [*words_of_run(given.run, Path(base)), f"--threads={given.threads}"]
        sys.exit(1 if main(given.cases, given.seed, settings) else 0)
