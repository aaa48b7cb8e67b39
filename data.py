"""From preference pairs to batches: JSONL, HH-RLHF or the built-in world; the tokenizer; rows and batches."""
import base64
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import sys
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import regex
import tiktoken
import torch

import files

END = "<|endoftext|>"
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"  # where words end


class DataError(ValueError):
    """Something is wrong with the user's data; the message is one line that names the place and the remedy."""


@dataclass(frozen=True)
class Pair:
    """A preference: `chosen` was preferred to `rejected`.  Nothing of the truth is in here."""
    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None   # the data's own, if it has one
    source: str = ""              # "file:line", for messages
    index: int = 0                # which pair of the file or world it was


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_pairs(path):
    """Preference pairs from a JSONL file, plain or .gz -> [Pair].  Both forms may stand in one file:

        {"prompt": …, "chosen": …, "rejected": …}   TRL's explicit prompt; an optional number "margin" is kept
        {"chosen": …, "rejected": …}                HH-RLHF: whole dialogues; the prompt is all up to the last
                                                    "\\n\\nAssistant:" that both share
    """
    pairs = []
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        check_texts(record, where, ("chosen", "rejected"), "; a pair needs chosen and rejected (and prompt, unless both are whole dialogues)")
        margin = record.get("margin")
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float)) or margin != margin or abs(margin) == float("inf")):
            raise DataError(f"{where}: 'margin' must be a finite number, not {margin if isinstance(margin, float) else kind(margin)}")
        prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
        if prompt is None:
            prompt, chosen, rejected = split_dialogues(chosen, rejected)
        pairs.append(Pair(prompt, chosen, rejected, margin, where, len(pairs)))
    return pairs


def check_texts(record, where, needed, remedy=""):
    """A line must be an object that has the needed keys; they and its prompt, if it has one, must be texts.  Raises DataError"""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a line must be an object with {' and '.join(needed)}, not {kind(record)}")
    for key in needed:
        if key not in record:
            raise DataError(f"{where}: key {key!r} is missing{remedy}")
    for key in ("prompt", *needed):
        if key in record and not isinstance(record[key], str):
            raise DataError(f"{where}: {key!r} must be a string, not {kind(record[key])}")
        if key in record and any("\ud800" <= c <= "\udfff" for c in record[key]):
            raise DataError(f"{where}: {key!r} holds half of a surrogate pair, which is no text; mend or remove the line")


def short_name(path):
    """What a file is called in tables: its name up to the first dot; of an address its folder too, as the name is often just test."""
    folder, _, name = path.partition("#")[0].rpartition("/")
    name = name.split(".")[0]
    return f"{folder.rpartition('/')[2]}-{name}" if "://" in path else name


def read_jsonl(path):
    """-> (line number, parsed line) of a .jsonl or .jsonl.gz file or https:// address, blank lines left out"""
    if "://" in str(path):
        path = files.fetch(path)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; give a preference file in JSONL (plain or .gz), or 'world'")
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder; name the files in it, separated by commas")
    empty = True
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                empty = False
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start + 1}); convert the file to UTF-8") from None
                except (ValueError, RecursionError) as error:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else "not readable"
                    raise DataError(f"{path}:{number}: broken JSON ({reason}); every line must be one JSON object") from None
                yield number, record
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if empty:
        raise DataError(f"{path}: the file is empty; give a file with one preference pair a line")


def kind(value):
    """What JSON calls a value, for messages."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "a string")


def split_dialogues(chosen, rejected):
    """Two whole dialogues -> shared prompt, two responses.  An empty prompt means that they share no assistant's turn."""
    marker = "\n\nAssistant:"
    shared = os.path.commonprefix((chosen, rejected))
    cut = shared.rfind(marker)
    cut = 0 if cut < 0 else cut + len(marker)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def first_turn(prompt):
    """The first human turn: what pairs are grouped by, so that one question never stands on both sides of a split."""
    opening = prompt.split("\n\nAssistant:", 1)[0]
    return " ".join(opening.removeprefix("\n\nHuman:").split())


def topic(pair):
    """What a pair is grouped by when pairs are held out: its first human turn, or the pair itself where there is no prompt"""
    return first_turn(pair.prompt) or "\n".join(sorted((pair.chosen, pair.rejected)))


def folds(pairs, k, seed):
    """Which of k folds each pair belongs to; pairs of one topic share a fold, and folds are as even as that allows.  -> (N,)

    Raises DataError if there are fewer topics than folds.
    """
    of_topic = {}
    for i, pair in enumerate(pairs):
        of_topic.setdefault(topic(pair), []).append(i)
    if len(of_topic) < k:
        raise DataError(f"{pairs[0].source}: {len(of_topic)} different first human turns cannot make {k} folds; lower ensemble.folds")
    digest = lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest()
    fold, sizes = np.zeros(len(pairs), np.int64), [0] * k
    for text in sorted(of_topic, key=lambda t: (-len(of_topic[t]), digest(t))):  # largest first, into the emptiest
        smallest = sizes.index(min(sizes))
        fold[of_topic[text]] = smallest
        sizes[smallest] += len(of_topic[text])
    return fold


def split(pairs, share, seed):
    """-> training pairs, validation pairs.  A first human turn's side depends on its text and the seed alone."""
    sides = ([], [])
    for pair in pairs:
        digest = hashlib.sha256(f"{seed} {topic(pair)}".encode()).digest()
        sides[int.from_bytes(digest[:8]) / 2 ** 64 < share].append(pair)
    return sides


def check_apart(train, valid):
    """Refuse a validation set that shares pairs, either way round, with training; -> number of shared prompts"""
    seen = {either_way(p): p.source for p in train}
    shared = [p for p in valid if either_way(p) in seen]
    if shared:
        raise DataError(f"{shared[0].source}: this validation pair is also in training, at {seen[either_way(shared[0])]} "
                        f"({len(shared)} such pairs); remove them from one file, or leave data.valid empty to split by prompt")
    return len({topic(p) for p in train} & {topic(p) for p in valid})


def either_way(pair):
    """The same for two pairs that differ by their label at most."""
    return pair.prompt, *sorted((pair.chosen, pair.rejected))


def audit(pairs, encoding=None, contexts=()):
    """What to know of preference pairs before training on them -> {measure: number}; tokens only with an encoding"""
    ways = {}
    for p in pairs:
        ways.setdefault(either_way(p), []).append(p.chosen)
    median = lambda values: float(np.median(values)) if len(values) else 0.0
    length = lambda p: (len(p.chosen) > len(p.rejected)) + 0.5 * (len(p.chosen) == len(p.rejected))
    out = {"pairs": len(pairs), "different first human turns": len({topic(p) for p in pairs}),
           **{f"characters of {side} (median)": median([len(getattr(p, side)) for p in pairs]) for side in ("prompt", "chosen", "rejected")},
           "longer answer chosen": sum(map(length, pairs)) / max(len(pairs), 1),
           "identical on both sides": sum(p.chosen == p.rejected for p in pairs),
           "the same pair again": sum(len(c) - 1 for c in ways.values()),
           "the same pair with the opposite label": sum(min(c.count(a) for a in set(c)) for k, c in ways.items() if len(set(c)) > 1)}
    if encoding is not None:
        count = lambda text: len(ordinary(encoding, text))
        total = np.array([count(p.prompt) + max(count(p.chosen), count(p.rejected)) + 1 for p in pairs])
        out["tokens of prompt and longer answer (median)"] = median(total)
        out |= {f"share over {c} tokens (their oldest turns are cut)": float((total > c).mean()) if len(total) else 0.0 for c in contexts}
    return out


def shared(sets):
    """What any two of {name: pairs} have in common -> {"a and b": {"first human turns": count, "pairs": count}}"""
    out = {}
    for (a, left), (b, right) in itertools.combinations(sets.items(), 2):
        common = lambda of: len({of(p) for p in left} & {of(p) for p in right})
        out[f"{a} and {b}"] = {"first human turns": common(topic), "pairs": common(either_way)}
    return out


def audit_table(sets, both={}):
    """{name: audit(pairs)}, shared({name: pairs}) -> text, a column a set, a line for any two"""
    names, width = list(sets), max(map(len, next(iter(sets.values()))))
    show = lambda v: f"{v:.3f}" if isinstance(v, float) and v < 1 else f"{v:,.0f}"
    cells = [["data", *names], *([m, *(show(sets[n][m]) for n in names)] for m in next(iter(sets.values())))]
    columns = [max(len(row[i + 1]) for row in cells) for i in range(len(names))]
    lines = [row[0].ljust(width) + "".join("  " + c.rjust(w) for c, w in zip(row[1:], columns)) for row in cells]
    lines[1:1] = ["-" * len(lines[0])]
    return "\n".join(lines + [f"shared by {names}: " + ", ".join(f"{n:,} {what}" for what, n in common.items()) for names, common in both.items()])


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

# A turn is marks with its role, text, end; between two turns stands the last text.  "hh" is the text as it is.
TEMPLATES = {"chatml": ("<|im_start|>{}\n", "<|im_end|>", "\n"), "llama3": ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "")}


def make_encoding(pattern, ranks, special, end=END, begin="", template="hh"):
    """-> tiktoken.Encoding with what a run needs to know: the names of the special tokens that end an answer and begin every prompt,
    the form of a dialogue, and the bytes that no token holds"""
    encoding = tiktoken.Encoding("nanoreward", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    encoding.end, encoding.begin, encoding.template = end, begin, template
    encoding.lacking = bytes(b for b in range(256) if bytes([b]) not in ranks)
    return encoding


def end_id(encoding):
    return encoding._special_tokens[encoding.end]


def train_tokenizer(texts, vocab):
    """A byte-level BPE of `vocab` tokens, the last of them end-of-text, trained on the given texts -> tiktoken.Encoding"""
    import rustbpe
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(texts), vocab_size=vocab - 1, pattern=SPLIT)
    ranks = {bytes(token): rank for token, rank in trained.get_mergeable_ranks()}
    return make_encoding(SPLIT, ranks, {END: len(ranks)})


def encoding_to_json(encoding):
    ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    return json.dumps({"pattern": encoding._pat_str, "special": encoding._special_tokens, "end": encoding.end, "begin": encoding.begin,
                       "template": encoding.template, "tokens": [base64.b64encode(token).decode() for token in ranks]})


def encoding_from_json(text):
    saved = json.loads(text)
    taken = set(saved["special"].values())
    ranks = dict(zip(map(base64.b64decode, saved["tokens"]), (i for i in itertools.count() if i not in taken)))  # ids leave no gap
    return make_encoding(saved["pattern"], ranks, saved["special"], saved.get("end", END), saved.get("begin", ""), saved.get("template", "hh"))


def ordinary(encoding, text):
    """Token ids of plain text: no part of it is a special token.

    A pretrained vocabulary may lack bytes (SmolLM2: some control characters).  They are left out, as Hugging Face's tokenizers do, but
    only after the text has been split where they stand; tiktoken would fail on them.
    """
    if not encoding.lacking or len(text.encode().translate(None, encoding.lacking)) == len(text.encode()):
        return encoding.encode_ordinary(text)
    pieces = (piece.encode().translate(None, encoding.lacking) for piece in regex.findall(encoding._pat_str, text))
    return [token for piece in pieces if piece for token in encoding._encode_single_piece(piece)]


def dialogue(encoding, prompt):
    """Token ids of a prompt in HH's form, its turns in the markers of encoding.template.

    Only the markers become special tokens, never what a turn says.  Departure: the system turn that some models' own templates put
    first is left out.
    """
    if encoding.template == "hh":
        return ordinary(encoding, prompt)
    start, end, between = TEMPLATES[encoding.template]
    opening, *rest = re.split(r"\n\n(Human|Assistant):", prompt)
    turns = [("Human", opening)] * bool(opening.strip()) + list(zip(rest[::2], rest[1::2]))
    if not turns or turns[-1][0] == "Human":
        turns.append(("Assistant", ""))  # whose turn it is; a last turn of the assistant is gone on with
    tokens, text = [], ""
    for i, (role, said) in enumerate(turns):
        marks = [between] * (i > 0) + re.split(r"(<\|\w+\|>)", start.format({"Human": "user", "Assistant": "assistant"}[role]))
        for piece, is_mark in [*((m, True) for m in marks), (said.strip(), False), (end if i < len(turns) - 1 else "", True)]:
            if is_mark and piece in encoding._special_tokens:
                tokens, text = [*tokens, *ordinary(encoding, text), encoding._special_tokens[piece]], ""
            else:
                text += piece  # what stands between two special tokens is one text
    return tokens + ordinary(encoding, text)


class Row(NamedTuple):
    """A tokenised prompt and its responses; every response ends with end-of-text."""
    prompt: np.ndarray
    responses: tuple
    states: tuple = ()   # of the prompt, then of each response: what the frozen layers make of them, if it is known (states.py)

    def __len__(self):
        return len(self.prompt) + sum(map(len, self.responses))

    def branches(self, *order):
        """The same prompt with these of its responses, in this order"""
        return Row(self.prompt, tuple(self.responses[i] for i in order), self.states and (self.states[0], *(self.states[i + 1] for i in order)))


def encode(encoding, prompt, responses, context):
    """-> Row.  An over-long dialogue loses its oldest turns, then the beginning of its last turn; never a part of a response.

    Raises DataError if a response alone leaves no room for the prompt.
    """
    dtype = np.uint16 if encoding.n_vocab < 2 ** 16 else np.int32
    said = responses if encoding.template == "hh" else [r.strip() for r in responses]
    answers = tuple(np.array(ordinary(encoding, r) + [end_id(encoding)], dtype) for r in said)
    room = context - max(map(len, answers))
    if room < 1:
        raise DataError(f"a response of {max(map(len, answers))} tokens is longer than the context of {context}; "
                        f"raise model.context or shorten the response")
    return Row(np.array(encode_prompt(encoding, prompt, room), dtype), answers)


def encode_prompt(encoding, prompt, room):
    """-> at most `room` token ids: without the oldest turns, and then the beginning of the last one, if it is longer"""
    begin = [encoding._special_tokens[encoding.begin]] if encoding.begin else []
    tokens, room = dialogue(encoding, prompt), room - len(begin)
    while len(tokens) > room and (turn := prompt.find("\n\nHuman:", 1)) > 0:
        prompt = prompt[turn:]
        tokens = dialogue(encoding, prompt)
    return begin + tokens[max(0, len(tokens) - room):] or [end_id(encoding)]  # no prompt at all: end-of-text stands for "begin"


def encode_pairs(encoding, pairs, context):
    """-> kept pairs, their Rows (chosen first), and why the others were dropped, as a list of (source, reason)"""
    kept, rows, dropped = [], [], []
    for pair in pairs:
        if pair.chosen == pair.rejected:
            dropped.append((pair.source, "chosen and rejected are identical, so there is nothing to prefer; remove the pair"))
            continue
        if not pair.prompt and pair.chosen[:8] == "\n\nHuman:":
            dropped.append((pair.source, "the two dialogues share no assistant's turn, so there is no common prompt"))
            continue
        try:
            row = encode(encoding, pair.prompt, (pair.chosen, pair.rejected), context)
        except DataError as error:
            dropped.append((pair.source, str(error)))
            continue
        if np.array_equal(*row.responses):
            dropped.append((pair.source, "chosen and rejected are identical as tokens"))
            continue
        kept.append(pair)
        rows.append(row)
    return kept, rows, dropped


# ---------------------------------------------------------------------------------------------------------------------
# Batches

class Batch(NamedTuple):
    """B rows of T tokens, padded on the right; the meaning of each field stands in model.py."""
    tokens: torch.Tensor     # (B, T), -1 in the padding
    branch: torch.Tensor     # (B, T), or None if every row has one branch
    position: torch.Tensor   # (B, T)
    last: torch.Tensor       # (B, k) index of each branch's last token
    states: torch.Tensor = None  # (B, T, C), or (B, k, C), if the rows have them

    def to(self, device):
        return Batch(*(part if part is None else part.to(device, non_blocking=True) for part in self))


def collate(rows):
    """[Row] with k responses each -> Batch"""
    B, T, k = len(rows), max(map(len, rows)), len(rows[0].responses)
    tokens, branch = np.full((B, T), -1), np.full((B, T), -1)
    position, last = np.zeros((B, T), np.int64), np.zeros((B, k), np.int64)
    for b, row in enumerate(rows):
        start = len(row.prompt)
        tokens[b, :start], branch[b, :start], position[b, :start] = row.prompt, 0, np.arange(start)
        for j, response in enumerate(row.responses):
            stop = start + len(response)
            tokens[b, start:stop], branch[b, start:stop] = response, j + 1
            position[b, start:stop] = np.arange(len(row.prompt), len(row.prompt) + len(response))
            last[b, j], start = stop - 1, stop
    tokens, branch, position, last = map(torch.from_numpy, (tokens, branch, position, last))
    states = torch.nn.utils.rnn.pad_sequence([torch.cat(row.states) for row in rows], batch_first=True) if rows[0].states else None
    return Batch(tokens, branch if k > 1 else None, position, last, states)


def response_tokens(rows):
    """Where a language model is read to predict the responses of one-branch rows, and what it should say there.

    -> read (B, R) int64: the index before each response token; target (B, R) int64, -1 in the padding
    """
    B, R = len(rows), max(len(row.responses[0]) for row in rows)
    read, target = np.zeros((B, R), np.int64), np.full((B, R), -1)
    for b, row in enumerate(rows):
        n = len(row.responses[0])
        read[b, :n], target[b, :n] = np.arange(len(row.prompt) - 1, len(row.prompt) - 1 + n), row.responses[0]
    return torch.from_numpy(read), torch.from_numpy(target)


def batches(lengths, size, seed, shuffle=True):
    """One epoch as a list of index arrays: batches of `size` rows of similar length, in random order.

    Rows are shuffled, cut into chunks of 32 batches, sorted by length within a chunk: padding nearly vanishes, and batches
    still differ from epoch to epoch.  Without shuffle: all sorted by length, for scoring.
    """
    lengths, rng = np.asarray(lengths), random.Random(seed)
    order = list(range(len(lengths)))
    if not shuffle:
        order.sort(key=lambda i: lengths[i])
        return [np.array(order[i:i + size]) for i in range(0, len(order), size)]
    rng.shuffle(order)
    out = []
    for start in range(0, len(order), 32 * size):
        chunk = sorted(order[start:start + 32 * size], key=lambda i: lengths[i])
        out += [np.array(chunk[i:i + size]) for i in range(0, len(chunk), size)]
    rng.shuffle(out)
    return out


# ---------------------------------------------------------------------------------------------------------------------

def main(paths):
    """Audit preference files: each alone, and what any two of them share."""
    short = [os.path.basename(path) for path in paths]
    try:
        sets = {name: read_pairs(path) for name, path in zip(short if len(set(short)) == len(paths) else paths, paths)}
        texts = (text for pairs in sets.values() for p in pairs for text in (p.prompt, p.chosen, p.rejected))
        encoding = train_tokenizer(texts, 4096)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(audit_table({name: audit(pairs, encoding, (256, 512, 1024, 2048)) for name, pairs in sets.items()}, shared(sets)))
    print("(tokens by a vocabulary of 4,096 trained on these files)")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("python data.py FILE.jsonl [FILE.jsonl.gz ...]: print an audit of preference files")
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
