"""python tests/faults/fuzz.py [--cases=N] [--seed=S] [--target=NAME] [--case=I]

Gives damaged inputs to the commands and counts how they end:

    accepted    exit code 0
    one line    exit code 2, one line "error: …" on stderr, no new file
    MESSAGE     exit code 2 with another stderr
    LEFTOVER    exit code 2 with a file half written
    TRACEBACK   an exception
    HANG        longer than ten seconds
    MEMORY      more than ten times the input above what a valid input of the target takes

Prints a table; exits with 1 if one of the last five has occurred.  The number of a case and the
seed give the same case again: --target=NAME --seed=S --case=I prints what it does.
"""
import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from faults import mutations  # noqa: E402
from helpers import HH_SMALL, SMALL, go, tiny, write_pairs  # noqa: E402
from local_server import Page, local_server  # noqa: E402

import config  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from pretrained import export, hub, weights  # noqa: E402
from pretrained import tokenizer as pretrained_tokenizer  # noqa: E402
from runtime import cli  # noqa: E402
from tokenizer import train_tokenizer  # noqa: E402
from tools import audit, score  # noqa: E402

GOOD = ("accepted", "one line")
BAD = ("MESSAGE", "LEFTOVER", "TRACEBACK", "HANG", "MEMORY")
SECONDS = 10
SLACK = 64 * 2 ** 20  # bytes by which two runs of the same command may differ
MAX_GROWTH = 4 * 2 ** 30  # address space of a case: it must not fill the machine


class Case(NamedTuple):
    """One call of a command."""
    call: object          # () -> exit code
    input_size: int       # bytes
    about: str            # the damaged input, for the report


class TooLong(BaseException):
    """The time limit of a case"""


# --------------------------------------------------------------------------------------------------
# One case


def run_case(case, folder, allowed_memory):
    """-> outcome, stderr or the traceback"""
    before = list_files(folder)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    memory = measure_memory(reset=True)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (measure_memory("VmSize:") + MAX_GROWTH, limits[1]))
    signal.signal(signal.SIGALRM, stop_case)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = case.call()
            out.flush()
    except TooLong:
        return "HANG", traceback.format_exc()
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "TRACEBACK", traceback.format_exc()
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    err.flush()
    text = err.buffer.getvalue().decode()
    if measure_memory() - memory > allowed_memory + 10 * case.input_size:
        return "MEMORY", text
    if code == 0:
        return "accepted", text
    lines = [line for line in text.split("\n")[:-1] if not line.startswith("note: ")]
    is_one_line = len(lines) == 1 and lines[0].startswith("error: ") and "hunter2" not in text
    if code != 2 or not is_one_line or len(lines[0].splitlines()) != 1:
        return "MESSAGE", f"exit code {code}\n{text}"
    left = list_files(folder) - before
    return ("LEFTOVER", f"{left}\n{text}") if left else ("one line", text)


def stop_case(number, frame):
    raise TooLong


def list_files(folder):
    paths = folder.rglob("*")
    return {path for path in paths if "cache" not in path.parts and not path.is_dir()}


def measure_memory(key="VmHWM:", reset=False):
    """Bytes of memory that this process has held at most since the last reset (Linux)"""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])


# --------------------------------------------------------------------------------------------------
# Targets: each is made once in a folder and yields cases


class Target:
    def __init__(self, folder, patch, finished):
        """finished: function that trains a small run once -> its folder"""
        self.folder = folder
        self.patch = patch
        self.finished = finished
        self.prepare()

    def prepare(self):
        """Write the valid inputs."""

    def case(self, rng, damage=True):
        """-> Case.  damage: whether its input is damaged; else it must be accepted"""
        raise NotImplementedError

    def clean(self):
        """Remove what the case has written."""

    def close(self):
        """End what prepare has begun."""


class Data(Target):
    """A preference file, audited or trained on."""

    def prepare(self):
        self.valid = write_pairs(self.folder / "valid.jsonl", 8, margin=0.5, note=[1]).read_bytes()

    def case(self, rng, damage=True):
        path = self.folder / "pairs.jsonl"
        path.write_bytes(self.valid)
        if damage:
            mutations.mutate_file(rng, path)
        if rng.random() < 0.2:
            words = [f"--data.train={path}", "--stage=sft", f"--out_dir={self.folder}/out"]
            return Case(lambda: train.main([*HH_SMALL, *words]), size_of(path), describe(path))
        return Case(lambda: audit.main([str(path)]), size_of(path), describe(path))

    def clean(self):
        mutations.remove(self.folder / "pairs.jsonl")
        shutil.rmtree(self.folder / "out", ignore_errors=True)


class Settings(Target):
    """Settings on the command line."""

    def case(self, rng, damage=True):
        words = list(SMALL)
        for _ in range(rng.randint(1, 3) if damage else 0):
            i = rng.randrange(len(words) + 1)
            word = f"--{rng.choice([*config.keys(), *config.RENAMED, 'config', 'stage'])}=0"
            key, _, value = rng.choice([word, *words]).partition("=")
            key = mutations.mutate_text(rng, key) if rng.random() < 0.2 else key
            words.insert(i, f"{key}={mutations.mutate_text(rng, value)}")
        return Case(lambda: cli.run_cli(lambda: train.parse_args(words)), 10_000, repr(words))


class Toml(Target):
    """A file of settings."""

    def case(self, rng, damage=True):
        path = self.folder / "settings.toml"
        path.write_bytes((ROOT / "configs/tiny.toml").read_bytes())
        if damage:
            mutations.mutate_file(rng, path)
        call = lambda: cli.run_cli(lambda: train.parse_args([f"--config={path}"]))  # noqa: E731
        return Case(call, size_of(path), describe(path))

    def clean(self):
        mutations.remove(self.folder / "settings.toml")


class RunFiles(Target):
    """Records, models and the vocabulary of a finished run, read by score, sample and export."""
    patterns = ("stages/*.json", "*.pt", "encoding.json")

    def prepare(self):
        self.run = self.folder / "run"
        shutil.copytree(self.finished(), self.run)
        self.answers = self.folder / "answers.jsonl"
        self.answers.write_text('{"prompt": "a", "response": "b"}\n')
        self.saved = {}
        for pattern in self.patterns:
            self.saved |= {path: path.read_bytes() for path in sorted(self.run.glob(pattern))}

    def case(self, rng, damage=True):
        path = rng.choice(list(self.saved))
        command = rng.choice([self.score, self.score, self.converse, self.export])
        if damage:
            others = [other for other in self.saved if other.suffix == path.suffix]
            if rng.random() < 0.2:
                path.write_bytes(self.saved[rng.choice(others)])  # of the wrong kind
            else:
                mutations.mutate_file(rng, path)
        return Case(command, size_of(path), f"{command.__name__} {describe(path)}")

    def score(self):
        return score.main([f"--run={self.run}", str(self.answers)])

    def converse(self):
        lines = io.TextIOWrapper(io.BytesIO(b"Hello\n"))
        self.patch.setattr(sys, "stdin", lines)
        return sample.main([f"--run={self.run}"])

    def export(self):
        return train.main([*SMALL, f"--out_dir={self.run}", "--stage=export"])

    def clean(self):
        for path, content in self.saved.items():
            if not path.is_file() or path.is_symlink() or path.read_bytes() != content:
                mutations.remove(path)
                path.write_bytes(content)
        mutations.remove(self.folder / "answers.scored.jsonl")
        shutil.rmtree(self.run / "export", ignore_errors=True)


class Tokenizers(RunFiles):
    """encoding.json of a finished run"""
    patterns = ("encoding.json",)

    def case(self, rng, damage=True):
        path = self.run / "encoding.json"
        if damage:
            mutations.mutate_file(rng, path)
        return Case(self.score, size_of(path), describe(path))


class Scores(RunFiles):
    """A file of answers to score"""
    patterns = ()

    def case(self, rng, damage=True):
        path = self.folder / "answers.jsonl"
        records = [
            {"prompt": "a", "response": "b", "id": 3, "note": {"x": [1.5, None, "é"]}},
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1},
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        if damage:
            mutations.mutate_file(rng, path)
        return Case(self.score, size_of(path), describe(path))

    def clean(self):
        super().clean()
        mutations.remove(self.folder / "answers.jsonl")


class Models(Target):
    """The folder of a pretrained model"""

    def prepare(self):
        texts = [f"Question {i}? Answer {i * i}." for i in range(50)]
        tokenizer = train_tokenizer(texts, 300)
        export.save(self.folder / "sound", tiny(vocab=tokenizer.vocab_size), tokenizer)

    def case(self, rng, damage=True):
        model = self.folder / "model"
        shutil.copytree(self.folder / "sound", model)
        path = rng.choice(sorted(model.iterdir()))
        if damage:
            mutations.mutate_file(rng, path)
        words = [f"--model.init={model}", "--model.context=32", "--ppo.max_new_tokens=8"]
        size = size_of(path)
        return Case(lambda: cli.run_cli(lambda: self.load(words)), size, describe(path))

    def load(self, words):
        hub.directory.cache_clear()
        settings, _ = train.parse_args(words)
        folder = hub.directory(settings.model.init)
        hub.digest(folder)
        weights.load(folder, context=32)
        tokenizer = pretrained_tokenizer.load(folder, settings.model.vocab)
        tokenizer.decode(tokenizer.encode_text("Question 3? é"))

    def clean(self):
        shutil.rmtree(self.folder / "model", ignore_errors=True)


class Addresses(Target):
    """An address, and what its server answers"""

    def prepare(self):
        self.content = write_pairs(self.folder / "valid.jsonl", 4).read_bytes()
        self.stack = contextlib.ExitStack()
        self.server = self.stack.enter_context(local_server(self.patch, self.folder / "cache"))

    def case(self, rng, damage=True):
        url = f"{self.server.url}/pairs.jsonl"
        page = Page(self.content)
        if damage:
            page = self.damaged_page(rng)
        if damage and rng.random() < 0.3:
            url = mutations.mutate_text(rng, url + "#sha256=" + "0" * 64)
            if self.server.url not in url and "://" in url:
                url = url.replace("http://", "ftp://")  # no other server is tried
        self.server.pages = {"/pairs.jsonl": page}
        about = f"{url!r}: {page.status} {page.headers} {page.content[:100]!r}"
        return Case(lambda: audit.main([url]), len(page.content), about)

    def damaged_page(self, rng):
        content = self.content
        if rng.random() < 0.7:
            content = mutations.mutate_bytes(rng, content)
        lengths = [None, "-1", "x", "9" * 30, "5", str(len(content))]
        headers = {"Content-Length": rng.choice(lengths)}
        status = rng.choice([200, 200, 200, 302, 404, 500])
        if rng.random() < 0.2:
            places = ["ftp://h/x", "http://[", "é", "//", "/x", "https://u:hunter2@h:x/"]
            headers["Location"] = rng.choice(places)
        if rng.random() < 0.2:
            headers["Content-Encoding"] = "gzip"
        return Page(content, headers, status)

    def close(self):
        self.stack.close()

    def clean(self):
        shutil.rmtree(self.folder / "cache", ignore_errors=True)


TARGETS = {
    "data": Data, "settings": Settings, "toml": Toml, "run": RunFiles, "models": Models,
    "scores": Scores, "addresses": Addresses, "tokenizers": Tokenizers,
}


def size_of(path):
    return path.stat().st_size if path.is_file() else 0


def describe(path):
    """The damaged input in a line"""
    if not path.is_file():
        return f"{path.name}: no file, or another kind of it"
    return f"{path.name}: {path.read_bytes()[:2000]!r}"


# --------------------------------------------------------------------------------------------------
# All cases


def run_target(name, target, seed, numbers, show=print):
    """Run the cases of these numbers -> Counter of outcomes.  show: prints bad ones"""
    base = measure_base(target)
    outcomes = Counter()
    for number in numbers:
        case = target.case(random.Random(f"{seed} {name} {number}"))
        outcome, text = run_case(case, target.folder, base + SLACK)
        target.clean()
        outcomes[outcome] += 1
        if outcome in BAD or len(numbers) == 1:
            show(f"{outcome}: --target={name} --seed={seed} --case={number}\n{case.about}\n{text}")
    return outcomes


def measure_base(target):
    """Memory that valid inputs take once all modules are loaded"""
    growth = []
    for number in range(6):
        case = target.case(random.Random(number), damage=False)
        memory = measure_memory(reset=True)
        outcome, text = run_case(case, target.folder, 2 ** 60)
        growth.append(measure_memory() - memory)
        target.clean()
        assert outcome == "accepted", text
    return max(growth[2:])


def train_once(folder):
    """-> function that trains a small run at its first call -> its folder"""
    def finished():
        if not folder.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                assert go(folder) == 0
        return folder
    return finished


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Damaged inputs; see the file's first lines.")
    parser.add_argument("--cases", type=int, default=100, help="number of cases of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=list(TARGETS), help="one target alone")
    parser.add_argument("--case", type=int, help="number of one case alone")
    return parser.parse_args(argv)


def main(argv):
    options = parse_args(argv)
    torch.set_num_threads(1)
    names = [options.target] if options.target else list(TARGETS)
    numbers = range(options.cases) if options.case is None else [options.case]
    table = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        os.chdir(folder)  # a relative path of a case must not reach the repository
        finished = train_once(Path(folder) / "finished")
        for name in names:
            (Path(folder) / name).mkdir()
            target = TARGETS[name](Path(folder) / name, patch, finished)
            table[name] = run_target(name, target, options.seed, numbers)
            target.close()
        os.chdir(ROOT)
    print(f"{'target':12}" + "".join(f"{outcome:>11}" for outcome in (*GOOD, *BAD)))
    for name, outcomes in table.items():
        print(f"{name:12}" + "".join(f"{outcomes[outcome]:11}" for outcome in (*GOOD, *BAD)))
    return int(any(outcomes[outcome] for outcomes in table.values() for outcome in BAD))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
