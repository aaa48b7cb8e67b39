"""Views of the answers: what linear heads see of them.

A view gives every answer a vector of features.  Three kinds, none of which uses a label:

    states    hidden states of a pretrained model: one layer, of the answer's last token or averaged
              over its tokens; computed once for every different answer to a prompt
    surface   length, lines, a question mark at the end, words of refusal, other frequent words
    ratings   which answer it is, where answers recur in several pairs

Only a pair's difference (chosen - rejected) enters a head.
A answers, N pairs, V views of states, C width, D features.
"""
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Row, collate
from model import branch_mask
from pretrained import frozen, hub

LAST = (0.2, 0.3, 0.4, 0.5)  # depths whose state of the last token is a view, and ...
MEAN = (0.3, 0.4, 0.5, 0.6)  # ... whose mean over the answer's tokens is; docs/log.md has the trial
MAX_BRANCHES = 4             # answers computed in one row, after their prompt
BATCH_TOKENS = 4096
MAX_STATE = 6e4              # float16 ends at 65,504
REFUSALS = ("sorry", "cannot", "can't", "won't", "unable", "as an ai", "i don't")
MAX_WORDS = 1000             # most frequent words that are features
MIN_ANSWERS = 5              # a rarer word is none
MIN_RECURRING = 10           # answers; with fewer there is no view of ratings


# --------------------------------------------------------------------------------------------------
# Hidden states of a pretrained model


class StateView(NamedTuple):
    layer: int    # output of that many blocks
    pooling: str  # "last" or "mean"


def state_views(num_layers: int) -> list[StateView]:
    """The views of states of a model with that many blocks"""
    views = []
    for pooling, depths in (("last", LAST), ("mean", MEAN)):
        layers = dict.fromkeys(max(1, round(depth * num_layers)) for depth in depths)
        views += [StateView(layer, pooling) for layer in layers]
    return views


def different_answers(rows: list[Row]) -> tuple[list[Row], Tensor]:
    """Every answer to a prompt once, by its tokens.

    -> rows of a prompt with one to MAX_BRANCHES of its answers, and the digests (A, 16) uint8 of
    all answers in their order: states found by them serve a pair with the opposite label as well
    """
    prompts = {}
    answers_of: dict[bytes, dict[bytes, np.ndarray]] = {}  # prompt -> digest -> tokens
    for row in rows:
        prompt = row.prompt.tobytes()
        prompts[prompt] = row.prompt
        own = answers_of.setdefault(prompt, {})
        for digest, response in zip(answer_digests(row), row.responses):
            own[digest] = response
    out = []
    digests = []
    for prompt, own in answers_of.items():
        digests += own
        answers = list(own.values())
        for start in range(0, len(answers), MAX_BRANCHES):
            out.append(Row(prompts[prompt], tuple(answers[start:start + MAX_BRANCHES])))
    return out, torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)


def answer_digests(row):
    """Names of a row's responses after its prompt -> [bytes]"""
    return frozen.row_digests(row)[1:]


def find_answers(digests: Tensor, rows: list[Row]) -> Tensor:
    """Where the answers of the rows are among all -> (N, 2) int64, chosen first"""
    number = {digest.tobytes(): i for i, digest in enumerate(digests.numpy())}
    where = [[number[digest] for digest in answer_digests(row)] for row in rows]
    return torch.tensor(where, dtype=torch.int64).reshape(-1, 2)


@torch.no_grad()
def compute_states(run, rows: list[Row]) -> Tensor:
    """States of all answers of the rows -> (A, V, C) float16, on the CPU

    Only the blocks up to the highest view are computed.  Stopped work is resumed.
    """
    views = state_views(run.cfg.model.layers)
    trunk = load_trunk(run, max(view.layer for view in views))
    counts = [len(row.responses) for row in rows]
    first = np.cumsum([0, *counts])
    state = run.resume("views", {}) or {"step": 0, "states": None}
    states = state["states"]
    if states is None:
        states = torch.zeros(int(first[-1]), len(views), trunk.shape.width, dtype=torch.float16)
    schedule = batches_of_rows(rows)
    with run.bar(len(rows), "states of the answers") as bar:
        bar.update(sum(len(index) for index in schedule[:state["step"]]))
        for step in range(state["step"], len(schedule)):
            index = schedule[step]
            pooled = states_of_batch(run, trunk, [rows[i] for i in index], views)  # (B, k, V, C)
            for i, of_row in zip(index, pooled):
                states[first[i]:first[i] + counts[i]] = of_row.clamp(-MAX_STATE, MAX_STATE)
            bar.update(len(index))
            if run.should_save():
                run.save_checkpoint("views", {}, step=step + 1, states=states)
    return states


def load_trunk(run, num_layers):
    """The lowest blocks of model.init, in the precision in which states are computed"""
    m = run.cfg.model
    return frozen.load_trunk(
        hub.directory(m.init), num_layers, m.context, run.device, states_dtype(run)
    )


def states_dtype(run):
    """bf16 where the processor multiplies it faster than float32; the heads hardly see it."""
    is_native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    if run.device.type == "cpu" and run.cfg.dtype == "auto" and is_native():
        return torch.bfloat16
    return run.dtype


def batches_of_rows(rows):
    """Index arrays of rows with equally many answers and similar lengths; the longest come first,
    so that memory is short at once or never."""
    out = []
    for k in sorted({len(row.responses) for row in rows}):
        of_k = [i for i, row in enumerate(rows) if len(row.responses) == k]
        of_k.sort(key=lambda i: len(rows[i]), reverse=True)
        while of_k:
            size = max(1, BATCH_TOKENS // len(rows[of_k[0]]))
            out.append(np.array(of_k[:size]))
            of_k = of_k[size:]
    return out


def states_of_batch(run, trunk, rows, views):
    """-> (B, k, V, C) float32 on the CPU"""
    batch = collate(rows).to(run.device)
    k = batch.last.shape[1]
    branch = batch.branch
    mask = None
    if branch is not None:
        mask = branch_mask(branch)
    else:  # one answer a row: it is what follows the prompt
        prompt_len = torch.tensor([len(row.prompt) for row in rows], device=run.device)
        branch = (batch.position >= prompt_len[:, None]).long()
    sides = [(branch == j + 1).float() for j in range(k)]  # (B, T) each
    last_of = {}
    mean_of = {}
    dtype = states_dtype(run)
    with torch.autocast(run.device.type, dtype, enabled=dtype != torch.float32):
        rope = trunk.rope(batch.position)
        x = trunk.embed(batch.tokens)
        for layer, block in enumerate(trunk.layers.values(), 1):
            x = block(x, rope, mask)
            if any(view.layer == layer for view in views):
                last_of[layer] = x[torch.arange(len(rows), device=x.device)[:, None], batch.last]
                means = []
                for side in sides:
                    means.append((x.float() * side[..., None]).sum(1) / side.sum(1, keepdim=True))
                mean_of[layer] = torch.stack(means, 1)
    pooled = [(last_of if v.pooling == "last" else mean_of)[v.layer].float() for v in views]
    return torch.stack(pooled, 2).cpu()


def state_differences(states: Tensor, where: Tensor) -> Tensor:
    """One view of states -> differences (N, C), each dimension in units of its standard deviation

    states: (A, C) of all answers; where: (N, 2)
    """
    states = states.float()
    scale = states.std(0).clamp(min=1e-6)
    return (states[where[:, 0]] - states[where[:, 1]]) / scale


# --------------------------------------------------------------------------------------------------
# What the texts show without any model


def surface_differences(pairs: list, bar=iter) -> Tensor:
    """Length, form and frequent words of chosen minus those of rejected -> (N, D) float32

    bar: wraps the pairs, to show progress
    """
    counts = [[word_counts(text) for text in (p.chosen, p.rejected)] for p in bar(pairs)]
    frequency: Counter = Counter()
    for chosen, rejected in counts:
        frequency.update(chosen.keys() | rejected.keys())
    known = [word for word, n in frequency.items() if n >= MIN_ANSWERS]
    known.sort(key=lambda word: (-frequency[word], word))  # whatever the order of the answers
    column = {word: j for j, word in enumerate(known[:MAX_WORDS])}
    words = np.zeros((len(pairs), len(column)), np.float32)
    for i, (chosen, rejected) in enumerate(counts):
        for side, sign in ((chosen, 1), (rejected, -1)):
            for word, count in side.items():
                if word in column:
                    words[i, column[word]] += sign * np.log1p(count)
    forms = np.zeros((len(pairs), len(form("")) + 1), np.float32)
    for i, pair in enumerate(pairs):
        forms[i] = np.subtract(form_of_long(pair.chosen), form_of_long(pair.rejected))
    # two numbers are worth as much as all words together: length decides many labels
    forms = unit_columns(forms) * (len(column) / 4 + 1) ** 0.5
    return torch.from_numpy(np.concatenate((unit_columns(words), forms), 1)).float()


def word_counts(text):
    return Counter(re.findall(r"[a-z']+|[?!.,]|[^\W\d_a-z]", text.lower()))


def form(text):
    """What a text looks like -> numbers"""
    stripped = text.strip()
    lower = stripped.lower()
    return (
        np.log1p(len(stripped)),
        stripped.endswith("?"),
        stripped.count("\n") ** 0.5,
        any(word in lower for word in REFUSALS),
    )


def form_of_long(text):
    return (*form(text), len(text))


def unit_columns(x):
    """Columns of root mean square 1; a column of zeros, up to rounding, becomes exactly zero."""
    scale = np.sqrt(np.square(x).mean(0))
    return np.where(scale > 1e-5, x / scale.clip(1e-5), 0)


def rating_differences(pairs: list) -> Tensor | None:
    """1 where the answer is the chosen one, -1 where it is the rejected one -> (N, D) float32

    A head on these is a Bradley-Terry model of the answers themselves: their ratings.  None where
    fewer than MIN_RECURRING answers occur in several pairs.
    """
    count = Counter()
    for pair in pairs:
        count.update([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)])
    recurring = [answer for answer, n in count.items() if n > 1]
    if len(recurring) < MIN_RECURRING:
        return None
    column = {answer: j for j, answer in enumerate(recurring)}
    out = torch.zeros(len(pairs), len(column))
    for i, pair in enumerate(pairs):
        for text, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            j = column.get((pair.prompt, text))
            if j is not None:
                out[i, j] += sign
    return out
