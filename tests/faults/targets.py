"""What tests/faults/fuzz.py damages: a class for each kind of input of the user's."""
import contextlib
import csv
import gzip
import io
import json
import lzma
import shutil
import sys
from typing import NamedTuple

from faults import mutations
from helpers import HH_SMALL, ROOT, SMALL, tiny, write_pairs
from layout_examples import EXAMPLES
from local_server import Page, local_server

import config
import sample
import train
from pretrained import export, hub, weights
from pretrained import tokenizer as pretrained_tokenizer
from runtime import cli
from tokenizer import train_tokenizer
from tools import audit, score


class Case(NamedTuple):
    """One call of a command."""
    call: object          # () -> exit code
    input_size: int       # bytes
    about: str            # the damaged input, for the report


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
    """A preference file of some container or of mixed layouts, audited or trained on."""

    def prepare(self):
        valid = write_pairs(self.folder / "valid.jsonl", 8, margin=0.5, note=[1]).read_bytes()
        self.valid = pack(valid)
        records = [example.record for example in EXAMPLES.values()]
        records += [{"prompt": "p", "response": str(i), "score": i} for i in range(3)]
        lines = [json.dumps(record) + "\n" for record in records]
        self.valid["layouts.jsonl"] = "".join(lines).encode()

    def case(self, rng, damage=True):
        name = rng.choice(["pairs.jsonl", "layouts.jsonl", *self.valid])
        path = self.folder / name
        path.write_bytes(self.valid[name])
        if damage:
            mutations.mutate_file(rng, path)
        if rng.random() < 0.2:
            words = [f"--data.train={path}", "--stage=sft", f"--out_dir={self.folder}/out"]
            return Case(lambda: train.main([*HH_SMALL, *words]), size_of(path), describe(path))
        return Case(lambda: audit.main([str(path)]), size_of(path), describe(path))

    def clean(self):
        for name in self.valid:
            mutations.remove(self.folder / name)
        shutil.rmtree(self.folder / "out", ignore_errors=True)


def pack(lines):
    """JSON lines -> {name: content of the same records in a container}"""
    records = [json.loads(line) for line in lines.splitlines()]
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(records[0])
    for record in records:
        writer.writerow(record.values())
    packed = {
        "pairs.jsonl": lines,
        "pairs.json": json.dumps(records, indent=1).encode(),
        "pairs.csv": rows.getvalue().encode(),
        "pairs.jsonl.gz": gzip.compress(lines),
        "pairs.jsonl.xz": lzma.compress(lines),
    }
    with contextlib.suppress(ImportError):
        import zstandard
        packed["pairs.jsonl.zst"] = zstandard.compress(lines)
    with contextlib.suppress(ImportError):
        packed |= pack_tables(records)
    return packed


def pack_tables(records):
    import pyarrow
    from pyarrow import feather, parquet
    table = pyarrow.Table.from_pylist(records)
    files = {"pairs.parquet": io.BytesIO(), "pairs.arrow": io.BytesIO()}
    parquet.write_table(table, files["pairs.parquet"])
    feather.write_feather(table, files["pairs.arrow"])
    return {name: file.getvalue() for name, file in files.items()}


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

        def call():
            return cli.run_cli(lambda: train.parse_args([f"--config={path}"]))

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
