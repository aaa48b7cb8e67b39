"""Damage to valid inputs, by seeded random numbers: bytes, JSON, texts, kinds of file."""
import copy
import gzip
import json
import os

TEXTS = [
    "", " ", "\0", "a\nb", "a\r", "\ud800", "a\udcff", "\u2028", "\x1b[2J", "\ufeff", "é" * 300,
    "a" * 5000, "..", "../x", "/dev/zero", ",", "=", "%s", "{x}", "null", "[]", "nan", "inf", "-1",
    "1e400", "9" * 5000, "0x10", "https://user:hunter2@host/x", "http://host/x", "world", "True",
]
VALUES = [
    *TEXTS, None, True, False, 0, -1, 3, 2 ** 31, 2 ** 63, 10 ** 400, -10 ** 12, 0.5, 1e308,
    float("nan"), float("inf"), [], {}, [[]], {"a": {}}, ["a"], {"": None}, {"\ud800": "\udfff"},
]
CONTENTS = [
    b"", b"\n", b"\0", b"\xff\xfe" + "{}".encode("utf-16-le"), b"\x89PNG\r\n\x1a\n" + bytes(64),
    gzip.compress(b"{}"), gzip.compress(b""), b"\x1f\x8b", b"<!DOCTYPE html><html></html>", b"[]",
    b"{}", b"null", b'"text"', b"[" * 100_000, b'{"a":' * 50_000, b"PK\x03\x04" + bytes(64),
    gzip.compress(b'{"chosen": "' + b"a" * 2 ** 27, 1),  # a line that no memory should hold
    b"\x80\x04\x95" + b"c" * 64, b"\xff" * 8 + b"{}", b"seed = 1\n", b"a,b\n1,2\n",
]
INSERTED = [
    b"\0", b"\n", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\\ud800", b'"', b"{", b"]", b",",
    b"9" * 5000, b"NaN", b"-Infinity", b"1e999", b"[" * 2000, b"\xef\xbb\xbf", b"\\", b"a" * 5000,
]
DEEP = "\ue000"  # stands for a deeply nested value until the text is written


def mutate_bytes(rng, content):
    """One to three small changes, or another content altogether"""
    if rng.random() < 0.15:
        return rng.choice(CONTENTS)
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        stop = min(len(content), start + rng.choice([1, 4, 100]))
        kind = rng.choice(["flip", "insert", "cut", "remove", "repeat"])
        if kind == "flip" and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif kind == "insert":
            content[start:start] = rng.choice(INSERTED)
        elif kind == "cut":
            del content[start:]
        elif kind == "remove":
            del content[start:stop]
        elif kind == "repeat":
            content[start:start] = content[start:stop]
    return bytes(content)


def places(value):
    """Yields (container, key) of every value inside a JSON value."""
    items = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutate_json(rng, value):
    """A JSON value with one to three places changed -> its text as bytes"""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = list(places(value))
        if not found:
            break
        container, key = rng.choice(found)
        kind = rng.choice(["value", "value", "value", "remove", "exchange", "add", "deep"])
        if kind == "value":
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "remove":
            del container[key]
        elif kind == "exchange":
            other, other_key = rng.choice(found)
            container[key] = copy.deepcopy(other[other_key])
        elif kind == "add" and isinstance(container, dict):
            container[rng.choice(TEXTS)] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "deep":
            container[key] = DEEP
    text = json.dumps(value)
    depth = rng.choice([50, 400, 900, 100_000])
    text = text.replace(json.dumps(DEEP), "[" * depth + "]" * depth)
    if rng.random() < 0.1 and text.startswith('{"'):
        text = text[:text.index(":")] + ": 1, " + text[1:]  # the first key twice
    return text.encode()


def mutate_text(rng, text):
    """A text of the command line or of an address, changed"""
    kind = rng.choice(["replace", "insert", "remove", "append"])
    if kind == "replace":
        return rng.choice(TEXTS)
    at = rng.randrange(len(text) + 1)
    if kind == "insert":
        return text[:at] + rng.choice(TEXTS) + text[at:]
    if kind == "remove":
        return text[:at] + text[at + 1:]
    return text + rng.choice(TEXTS)


KINDS = ("nothing", "folder", "loop", "pipe", "device")  # instead of a file


def mutate_file(rng, path):
    """Damage a file: its JSON if it has any, its bytes, or what kind of file it is."""
    content = path.read_bytes()
    if rng.random() < 0.12:
        return replace_file(path, rng.choice(KINDS))
    if path.suffix == ".json" and rng.random() < 0.7:
        content = mutate_json(rng, json.loads(content))
    elif path.suffix == ".jsonl" and rng.random() < 0.7:
        lines = content.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = mutate_json(rng, json.loads(lines[i]))
        content = b"\n".join(lines) + b"\n"
    else:
        content = mutate_bytes(rng, content)
    path.write_bytes(content)


def replace_file(path, kind):
    """Put something else than a file in its place."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")


def remove(path):
    """Remove whatever a case has put there."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif path.is_symlink() or path.exists():
        path.unlink()
