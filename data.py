"""From preference pairs to batches: pairs, splits, rows `[prompt | chosen | rejected]`, batches.

formats/ reads preference files; world.py makes pairs whose truth is known.
"""
import hashlib
import random
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

import world

HUMAN_MARKER = "\n\nHuman:"
ASSISTANT_MARKER = "\n\nAssistant:"
SYSTEM_MARKER = "\n\nSystem:"  # of a dialogue's first turn, if it has instructions
RESERVED_NAMES = ("train", "valid", "demonstrations", *world.TRAIN_DOMAINS,
                  *world.HELD_OUT_DOMAINS)  # of sets that are no files


class DataError(ValueError):
    """The user's data are wrong; the message is one line that names the place and the remedy."""


@dataclass(frozen=True)
class Pair:
    """A preference: `chosen` was preferred to `rejected`.  The hidden truth is not part of it."""
    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None   # the data's own margin, if it has one
    source: str = ""              # "file:line", for messages
    index: int = 0                # number of the pair in its file or in the world
    # the user's whole record and the name of its layout in formats/; "" in the built-in world
    record: dict | None = field(default=None, compare=False, repr=False)
    layout: str = field(default="", compare=False)
    weight: float = field(default=1.0, compare=False)  # in the loss: its file's, of data.weights


# ----------------------------------------------------------------------------------------------
# Splits: pairs with the same first human turn stay together


def first_turn(prompt):
    """The first human turn, so that one question is never on both sides of a split."""
    if prompt.startswith(SYSTEM_MARKER):  # many questions may share the instructions
        prompt = prompt[max(0, prompt.find(HUMAN_MARKER)):]
    opening = prompt.split(ASSISTANT_MARKER, 1)[0]
    return " ".join(opening.removeprefix(HUMAN_MARKER).split())


def topic(pair):
    """Key by which pairs are held out: the first human turn, or the pair itself without a prompt"""
    return first_turn(pair.prompt) or "\n".join(sorted((pair.chosen, pair.rejected)))


def pair_key(pair):
    """Key that ignores which answer was chosen."""
    return pair.prompt, *sorted((pair.chosen, pair.rejected))


def pair_text(pair):
    return "\n".join(pair_key(pair))


def sha256(text):
    return hashlib.sha256(text.encode()).digest()


def split_by_topic(pairs, share, seed):
    """-> training pairs, validation pairs; the side depends on the topic and the seed alone."""
    sides = ([], [])
    for pair in pairs:
        sides[is_held_out(pair, share, seed)].append(pair)
    return sides


def is_held_out(pair, share, seed):
    """Whether a pair is on the second side of a split, which has about this share of the topics"""
    return int.from_bytes(sha256(f"{seed} {topic(pair)}")[:8]) / 2 ** 64 < share


def assign_folds(pairs, k, seed, fold_by="prompt"):
    """Fold 0..k-1 of each pair; sizes are as even as possible.

    fold_by: what shares a fold; "prompt": pairs of one topic, "pair": pairs of the same texts
    -> (N,) int64; raises DataError if there are fewer of these than folds
    """
    key_of = topic if fold_by == "prompt" else pair_text
    members = {}
    for i, pair in enumerate(pairs):
        members.setdefault(key_of(pair), []).append(i)
    if len(members) < k:
        what = "first human turns" if fold_by == "prompt" else "pairs"
        raise DataError(f"{pairs[0].source}: {len(members)} different {what} cannot make {k} "
                        f"folds; lower ensemble.folds (0: no folds)")

    def largest_first(text):
        return -len(members[text]), sha256(f"{seed} {text}")

    fold = np.zeros(len(pairs), np.int64)
    sizes = [0] * k
    for text in sorted(members, key=largest_first):
        smallest = sizes.index(min(sizes))
        fold[members[text]] = smallest
        sizes[smallest] += len(members[text])
    return fold


def choose_folds(pairs, k, seed, fold_by):
    """Folds by prompt or pair, or by pair where there are fewer prompts than folds.

    -> (N,) int64, and the way they were made
    """
    if fold_by == "prompt" and len({topic(pair) for pair in pairs}) < k:
        fold_by = "pair"
    return assign_folds(pairs, k, seed, fold_by), fold_by


def check_apart(train, valid, remedy="leave data.valid empty to split by prompt"):
    """Raise DataError if a validation pair is also in training.  -> number of shared topics

    remedy: what helps instead of a change of the files
    """
    seen = {pair_key(p): p.source for p in train}
    shared = [p for p in valid if pair_key(p) in seen]
    if shared:
        first = shared[0]
        raise DataError(f"{first.source}: this validation pair is also in training, at "
                        f"{seen[pair_key(first)]} ({len(shared)} such pairs); remove them from one "
                        f"file, or {remedy}")
    return len({topic(p) for p in train} & {topic(p) for p in valid})


# ----------------------------------------------------------------------------------------------
# Loading


def load_pairs(config):
    """-> {"train": [Pair], "valid": [Pair]}; the truth of the built-in world is not read here"""
    d = config.data
    if d.train == ("world",):
        train_rows, valid_rows, _ = world_pairs(config)
        train = pairs_of_world(train_rows, "world")
        valid = pairs_of_world(valid_rows, "world")
    elif d.valid or not d.valid_share:
        train = read_files(d.train, d, d.weights)
        valid = read_files(d.valid, d)
    else:
        pairs = read_files(d.train, d, d.weights)
        train, valid = split_by_topic(pairs, d.valid_share, config.seed)
        if not valid or not train:
            num_topics = len({topic(pair) for pair in train + valid})
            change = "lower" if valid else "raise"
            remedy = f" or {change} data.valid_share" if num_topics > 1 else ""
            raise DataError(f"{d.train[0]}: too few different first turns to hold "
                            f"{d.valid_share:.0%} of them out; give data.valid{remedy}")
    shared = check_apart(train, valid)
    if shared and d.train != ("world",):  # the world's greetings are few, its prompts differ
        print(f"data: note: training and validation share {shared} first human turns")
    return {"train": train[:d.limit or None], "valid": valid}


def load_ood(config, train):
    """Sets out of distribution -> {name: [Pair]}: the world's held-out domains, or data.ood"""
    sets = {}
    if config.data.train == ("world",) and not config.data.ood:
        n = config.world.ood // len(world.HELD_OUT_DOMAINS)
        for domain in world.HELD_OUT_DOMAINS:
            rows, _ = world.pairs(
                n, f"{config.seed} ood", world_noise(config), (domain,),
                contrast=0.25,  # manners carry over to other domains, answers do not
            )
            sets[domain] = pairs_of_world(rows, domain)
        return sets
    from formats.pairs import read_pairs
    from formats.sources import unique_name
    for path in config.data.ood:
        name = unique_name(path, {*sets, *RESERVED_NAMES})
        sets[name] = read_pairs(path, config.data)
        check_apart(train, sets[name], "leave the file out of data.ood")
    return sets


def read_files(paths, settings, weights=()):
    """settings: the section [data]; weights: of each file, or () -> [Pair] of all files"""
    from formats.pairs import read_pairs
    pairs = []
    for i, path in enumerate(paths):
        of_file = read_pairs(path, settings)
        if weights:
            of_file = [replace(pair, weight=weights[i]) for pair in of_file]
        pairs += of_file
    return pairs


def world_noise(config):
    w = config.world
    return world.Noise(w.temperature, w.flip, w.bias, w.shared)


def world_pairs(config):
    """-> training and validation pairs as dictionaries, and the truths of the training pairs"""
    w = config.world
    noise = world_noise(config)
    train, train_truth = world.pairs(w.pairs, config.seed, noise, items=w.items)
    seen = frozenset(row["prompt"] for row in train)
    valid, _ = world.pairs(w.valid, f"{config.seed} valid", noise, items=w.items, exclude=seen)
    return train, valid, train_truth


def pairs_of_world(rows, name):
    return [Pair(**row, source=f"{name}:{i + 1}", index=i) for i, row in enumerate(rows)]


# ----------------------------------------------------------------------------------------------
# Rows


class Row(NamedTuple):
    """A tokenised prompt and its responses; every response ends with EOS."""
    prompt: np.ndarray
    responses: tuple
    inputs_embeds: tuple = ()   # of the prompt, then of each response, if they were computed before

    def __len__(self):
        """Number of tokens; the prompt counts once."""
        return len(self.prompt) + sum(map(len, self.responses))

    def branches(self, *order):
        """The same prompt with these of its responses, in this order"""
        responses = tuple(self.responses[i] for i in order)
        embeds = ()
        if self.inputs_embeds:
            embeds = (self.inputs_embeds[0], *(self.inputs_embeds[i + 1] for i in order))
        return Row(self.prompt, responses, embeds)


class EncodedPairs(NamedTuple):
    """Pairs and their rows, chosen first."""
    pairs: list
    rows: list


def encode_row(tokenizer, prompt, responses, context):
    """-> Row.  A dialogue that is too long loses its oldest turns, then the beginning of its last
    turn; never a part of a response.

    Raises DataError if a response alone leaves no room for the prompt.
    """
    dtype = np.uint16 if tokenizer.vocab_size < 2 ** 16 else np.int32
    encoded = []
    for response in responses:
        text = response if tokenizer.template == "hh" else response.strip()
        encoded.append(np.array(tokenizer.encode_text(text) + [tokenizer.eos_id], dtype))
    longest = max(map(len, encoded))
    room = context - longest
    if room < 1:
        raise DataError(f"a response of {longest} tokens is longer than the context of {context}; "
                        f"raise model.context or shorten the response")
    return Row(np.array(encode_prompt(tokenizer, prompt, room), dtype), tuple(encoded))


def encode_prompt(tokenizer, prompt, max_len):
    """-> at most max_len token ids: oldest turns are cut, then the beginning of the last turn"""
    bos = [tokenizer.bos_id] if tokenizer.bos else []
    room = max_len - len(bos)
    tokens = tokenizer.encode_dialogue(prompt)
    while len(tokens) > room:
        next_turn = prompt.find(HUMAN_MARKER, 1)
        if next_turn <= 0:
            break
        prompt = prompt[next_turn:]
        tokens = tokenizer.encode_dialogue(prompt)
    tokens = bos + tokens[max(0, len(tokens) - room):]
    return tokens or [tokenizer.eos_id]  # an empty prompt: EOS marks the beginning


def encode_pairs(tokenizer, pairs, context):
    """-> kept pairs, their Rows (chosen first), and the dropped ones as [(source, reason)]"""
    kept = []
    rows = []
    dropped = []
    for pair in pairs:
        try:
            row = encode_pair(tokenizer, pair, context)
        except DataError as error:
            dropped.append((pair.source, str(error)))
        else:
            kept.append(pair)
            rows.append(row)
    return kept, rows, dropped


def encode_pair(tokenizer, pair, context):
    """-> Row; raises DataError with the reason why the pair cannot be used"""
    if pair.chosen == pair.rejected:
        raise DataError("chosen and rejected are identical, so there is nothing to prefer; remove "
                        "the pair")
    if not pair.prompt and pair.chosen.startswith((HUMAN_MARKER, SYSTEM_MARKER)):
        raise DataError("the two dialogues share no assistant's turn, so there is no common "
                        "prompt; correct or remove the pair")
    row = encode_row(tokenizer, pair.prompt, (pair.chosen, pair.rejected), context)
    if np.array_equal(*row.responses):
        raise DataError("chosen and rejected are identical as tokens; remove the pair")
    return row


def treated_rows(rows, index, swap):
    """The rows of these indices; where swap is set for one, its responses change places

    rows: N Row of two responses; index: (n,), swap: (N,) -> n Row
    """
    out = []
    for i in index.tolist():
        out.append(rows[i].branches(1, 0) if swap[i] else rows[i])
    return out


# ----------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """B rows of T tokens, padded on the right; model.py says what each field means."""
    tokens: torch.Tensor     # (B, T), -1 in the padding
    branch: torch.Tensor | None  # (B, T), or None if every row has one branch
    position: torch.Tensor   # (B, T)
    last: torch.Tensor       # (B, k) index of each branch's last token
    inputs_embeds: torch.Tensor | None = None  # (B, T, C) or (B, k, C), if the rows have them

    def to(self, device):
        moved = []
        for part in self:
            moved.append(part if part is None else part.to(device, non_blocking=True))
        return Batch._make(moved)


def collate(rows):
    """[Row] with k responses at most -> Batch; `last` is 0 where a row has fewer"""
    B = len(rows)
    T = max(map(len, rows))
    k = max(len(row.responses) for row in rows)
    tokens = np.full((B, T), -1)
    branch = np.full((B, T), -1)
    position = np.zeros((B, T), np.int64)
    last = np.zeros((B, k), np.int64)
    for b, row in enumerate(rows):
        prompt_len = len(row.prompt)
        tokens[b, :prompt_len] = row.prompt
        branch[b, :prompt_len] = 0
        position[b, :prompt_len] = np.arange(prompt_len)
        start = prompt_len
        for j, response in enumerate(row.responses):
            stop = start + len(response)
            tokens[b, start:stop] = response
            branch[b, start:stop] = j + 1
            position[b, start:stop] = np.arange(prompt_len, prompt_len + len(response))
            last[b, j] = stop - 1
            start = stop
    embeds = None
    if rows[0].inputs_embeds:
        per_row = [torch.cat(row.inputs_embeds) for row in rows]
        embeds = torch.nn.utils.rnn.pad_sequence(per_row, batch_first=True)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(branch) if k > 1 else None,
        torch.from_numpy(position),
        torch.from_numpy(last),
        embeds,
    )


def response_tokens(rows):
    """Where a language model predicts the responses of rows, and their tokens.

    -> out_pos (B, R) int64: where each response token is predicted, before it or at the end of the
    prompt; target (B, R) int64; both branch after branch, target -1 in the padding
    """
    B = len(rows)
    R = max(len(row) - len(row.prompt) for row in rows)
    out_pos = np.zeros((B, R), np.int64)
    target = np.full((B, R), -1)
    for b, row in enumerate(rows):
        prompt_len = len(row.prompt)
        start = 0
        for response in row.responses:
            stop = start + len(response)
            out_pos[b, start:stop] = prompt_len + np.arange(start, stop) - 1
            out_pos[b, start] = prompt_len - 1
            target[b, start:stop] = response
            start = stop
    return torch.from_numpy(out_pos), torch.from_numpy(target)


def length_groups(lengths, pass_cost):
    """Rows of similar length in up to eight groups, each padded to its longest row.

    pass_cost: what one more group costs, in tokens -> [index array], those with the lowest cost
    """
    lengths = np.asarray(lengths)
    order = lengths.argsort(kind="stable")

    def cost(groups):
        return sum(len(group) * lengths[group[-1]] + pass_cost for group in groups)

    choices = [np.array_split(order, n) for n in (1, 2, 4, 8) if n <= len(order)]
    return min(choices, key=cost)


def batches(lengths, size, seed, shuffle=True):
    """One epoch as a list of index arrays: batches of `size` rows of similar length.

    Rows are shuffled, cut into chunks of 32 batches and sorted by length within a chunk: padding
    nearly vanishes, and batches still differ from epoch to epoch.  The order of the batches is
    random.  Without shuffle all rows are sorted by length, for scoring.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))

    def length_of(i):
        return lengths[i]

    if not shuffle:
        return chunk(sorted(order, key=length_of), size)
    rng.shuffle(order)
    out = []
    for part in chunk(order, 32 * size):
        out += chunk(sorted(part, key=length_of), size)
    rng.shuffle(out)
    return out


def chunk(items, size):
    return [np.array(items[i:i + size]) for i in range(0, len(items), size)]
