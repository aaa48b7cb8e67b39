import functools
import gzip
import hashlib
import http.client
import io
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import config as configuration
import data
import files
import plan
import run
from data import DataError, Pair, collate, encode, encode_pairs, read_pairs
from helpers import random_rows

TEXTS = ["\n\nHuman: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
         "\n\nHuman: How can I sleep better?\n\nAssistant: You could go to bed at the same hour every night."] * 3
PAIR = {"prompt": "Which?", "chosen": " this", "rejected": " that"}
text = st.text(st.characters(exclude_categories=["Cs"]))  # everything that UTF-8 can hold


@functools.cache
def encoding():
    return data.train_tokenizer(TEXTS, 300)


def end():
    return encoding()._special_tokens[data.END]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

@pytest.mark.parametrize("compress", [False, True])
def test_both_forms_are_read_plain_and_compressed(tmp_path, compress):
    whole = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
    content = ("\ufeff" + lines(PAIR) + "\n" + lines(whole, PAIR | {"margin": 2})).encode()  # a BOM and a blank line are no error
    path = write(tmp_path / ("a.jsonl.gz" if compress else "a.jsonl"), gzip.compress(content) if compress else content)
    assert read_pairs(path) == [
        Pair("Which?", " this", " that", None, f"{path}:1", 0),
        Pair("\n\nHuman: Hi\n\nAssistant:", " Hello", " What?", None, f"{path}:3", 1),
        Pair("Which?", " this", " that", 2, f"{path}:4", 2)]


GOOD = lines(PAIR).encode()
BAD_LINES = {  # what stands on line 2 -> what the message says of it
    "broken JSON": (b'{"prompt": "a", \n', "broken JSON"),
    "no JSON at all": (b"chosen,rejected\n", "broken JSON"),
    "deep nesting": (b"[" * 100_000 + b"\n", "broken JSON"),
    "list": (b'["a", "b"]\n', "object .* not a list"),
    "text": (b'"a"\n', "object .* not a string"),
    "number line": (b"3\n", "object .* not a number"),
    "missing chosen": (b'{"prompt": "a", "rejected": "b"}\n', "'chosen' is missing"),
    "missing rejected": (b'{"prompt": "a", "chosen": "b"}\n', "'rejected' is missing"),
    "null": (b'{"prompt": "a", "chosen": null, "rejected": "b"}\n', "'chosen' must be a string, not null"),
    "null prompt": (b'{"prompt": null, "chosen": "a", "rejected": "b"}\n', "'prompt' must be a string, not null"),
    "number": (b'{"prompt": "a", "chosen": "b", "rejected": 3.5}\n', "'rejected' must be a string, not a number"),
    "conversation": (b'{"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}\n', "'prompt' must be a string, not a list"),
    "latin-1": ('{"prompt": "\u00e9", "chosen": "b", "rejected": "c"}\n'.encode("latin-1"), "not UTF-8"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}\n', "surrogate"),
    "NaN margin": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}\n', "'margin' must be a finite number"),
    "infinite margin": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}\n', "'margin' must be a finite number"),
    "true margin": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": true}\n', "'margin' must be a finite number, not a boolean"),
    "text margin": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}\n', "'margin' must be a finite number, not a string"),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("compress", [False, True])
def test_a_bad_line_is_named(tmp_path, name, compress):
    line, message = BAD_LINES[name]
    content = GOOD + line + GOOD
    path = write(tmp_path / ("a.jsonl.gz" if compress else "a.jsonl"), gzip.compress(content) if compress else content)
    with pytest.raises(DataError, match=message) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def truncated(content):
    return content[:len(content) // 2]


def damaged(content):
    return content[:20] + bytes(byte ^ 255 for byte in content[20:40]) + content[40:]


LONG = gzip.compress("".join(lines(PAIR | {"prompt": str(random.Random(i).random())}) for i in range(200)).encode())
BAD_FILES = {
    "no such file": ("a.jsonl", None, "no such file"),
    "empty": ("a.jsonl", b"", "empty"),
    "blank lines": ("a.jsonl", b"\n \n", "empty"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "empty"),
    "truncated gzip": ("a.jsonl.gz", truncated(LONG), "gzip"),
    "damaged gzip": ("a.jsonl.gz", damaged(LONG), "gzip"),
    "gzip in name only": ("a.jsonl.gz", GOOD, "gzip"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name):
    file, content, message = BAD_FILES[name]
    path = str(tmp_path / file) if content is None else write(tmp_path / file, content)
    with pytest.raises(DataError, match=message) as error:
        read_pairs(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="is a folder; name the files"):
        read_pairs(str(tmp_path))


@pytest.mark.parametrize("chosen, rejected, prompt", [
    ("\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Hi\n\nAssistant: b", "\n\nHuman: Hi\n\nAssistant:"),
    # whole turns before the last are shared
    ("\n\nHuman: Hi\n\nAssistant: a\n\nHuman: and?\n\nAssistant: b", "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: and?\n\nAssistant: c",
     "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: and?\n\nAssistant:"),
    # they part before the last turn, and then speak of different things
    ("\n\nHuman: Hi\n\nAssistant: a\n\nHuman: x\n\nAssistant: b", "\n\nHuman: Hi\n\nAssistant: c\n\nHuman: y\n\nAssistant: d",
     "\n\nHuman: Hi\n\nAssistant:"),
    # the responses begin alike, or one is all of the other's beginning
    ("\n\nHuman: Hi\n\nAssistant: Well", "\n\nHuman: Hi\n\nAssistant: Well, no", "\n\nHuman: Hi\n\nAssistant:"),
    ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: no", "\n\nHuman: Hi\n\nAssistant:"),
    ("\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Ho\n\nAssistant: b", ""),
])
def test_dialogues_are_split_at_the_last_shared_assistant_turn(chosen, rejected, prompt):
    for a, b in ((chosen, rejected), (rejected, chosen)):
        assert data.split_dialogues(a, b) == (prompt, a[len(prompt):], b[len(prompt):])


def dialogues(n):
    """Pairs of which four each share their first turn, some with different later turns."""
    return [Pair(f"\n\nHuman: Question {i // 4}?\n\nAssistant:" + (" Go on.\n\nHuman: More.\n\nAssistant:" if i % 2 else ""),
                 f" yes {i}", f" no {i}", source=f"f:{i}") for i in range(n)]


def test_split_keeps_a_first_turn_on_one_side():
    train, valid = data.split(dialogues(2000), 0.2, 0)
    turns = [{data.first_turn(p.prompt) for p in side} for side in (train, valid)]
    assert not turns[0] & turns[1] and len(train) + len(valid) == 2000
    assert len(valid) / 2000 == pytest.approx(0.2, abs=0.05)


def test_split_is_independent_of_order_and_other_pairs():
    pairs = dialogues(400)
    shuffled = random.Random(0).sample(pairs, 400)
    key = lambda p: p.source
    for side, other in zip(data.split(pairs, 0.3, 0), data.split(shuffled, 0.3, 0)):
        assert sorted(side, key=key) == sorted(other, key=key)
    assert set(data.split(pairs[:40], 0.3, 0)[1]) == set(data.split(pairs, 0.3, 0)[1]) & set(pairs[:40])
    assert data.split(pairs, 0.3, 0) != data.split(pairs, 0.3, 1)


def test_check_apart_refuses_a_shared_pair_in_either_orientation():
    train = [Pair("p", "a", "b", source="train:1"), Pair("q", "a", "b", source="train:2")]
    for chosen, rejected in (("a", "b"), ("b", "a")):
        with pytest.raises(DataError, match=r"valid:7: .* at train:2 \(1 such pairs\)") as error:
            data.check_apart(train, [Pair("r", "a", "b"), Pair("q", chosen, rejected, source="valid:7")])
        assert "\n" not in str(error.value)


def test_check_apart_counts_shared_prompts():
    assert data.check_apart([Pair("p", "a", "b"), Pair("q", "a", "b")], [Pair("p", "a", "c"), Pair("r", "a", "b")]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

@given(text)
def test_the_tokenizer_gives_any_text_back(s):
    assert encoding().decode(encoding().encode_ordinary(s)) == s


@given(text)
def test_a_saved_tokenizer_is_the_same(s):
    copy = reloaded()
    assert copy.encode_ordinary(s) == encoding().encode_ordinary(s)
    assert copy.n_vocab == encoding().n_vocab == 300 and copy._special_tokens == {data.END: 299}


@functools.cache
def reloaded():
    return data.encoding_from_json(data.encoding_to_json(encoding()))


def test_training_a_tokenizer_is_deterministic():
    assert data.encoding_to_json(data.train_tokenizer(TEXTS, 300)) == data.encoding_to_json(encoding())


def test_a_tokenizer_learns_the_words_of_its_texts():
    assert len(encoding().encode_ordinary(TEXTS[0])) < 0.8 * len(TEXTS[0])


def dialogue(turns):
    return "".join(f"\n\nHuman: Question {i}?\n\nAssistant:" + (f" Answer {i}." if i < turns - 1 else "") for i in range(turns))


@given(text, st.lists(text, min_size=1, max_size=3))
def test_encode_gives_the_texts_back_and_one_end_of_text(prompt, responses):
    row = encode(encoding(), prompt, [r + data.END for r in responses], 10_000)  # the words "end of text" end nothing
    assert encoding().decode(row.prompt.tolist()) == (prompt or data.END)
    for tokens, response in zip(row.responses, responses):
        assert tokens[-1] == end() and end() not in tokens[:-1]
        assert encoding().decode(tokens[:-1].tolist()) == response + data.END


def test_a_row_is_as_long_as_its_tokens():
    row = encode(encoding(), "Which?", (" this", " that"), 1000)
    assert len(row) == len(row.prompt) + len(row.responses[0]) + len(row.responses[1])


def test_an_overlong_prompt_loses_its_oldest_turns():
    whole, response = dialogue(6), " The answer."
    need = lambda prompt: len(encoding().encode_ordinary(prompt)) + len(encoding().encode_ordinary(response)) + 1
    for first in range(6):
        rest = whole[whole.index(f"\n\nHuman: Question {first}?"):]
        for context in (need(rest), need(rest) + 1):  # what fits exactly is kept
            row = encode(encoding(), whole, (response, " No."), context)
            assert encoding().decode(row.prompt.tolist()) == rest
            assert encoding().decode(row.responses[0].tolist()) == response + data.END


def test_an_overlong_turn_loses_its_beginning_and_the_response_nothing():
    prompt, response = "\n\nHuman: Hi\n\nAssistant:" + dialogue(1) + " word" * 50, " The answer is long."
    answer = encoding().encode_ordinary(response)
    for room in (1, 5, 20):
        row = encode(encoding(), prompt, (response,), room + len(answer) + 1)
        assert len(row) == room + len(answer) + 1
        assert row.prompt.tolist() == encoding().encode_ordinary(dialogue(1) + " word" * 50)[-room:]
        assert row.responses[0].tolist() == answer + [end()]


def test_each_response_needs_room_beside_the_prompt_alone():
    """Siblings do not take each other's room: positions restart after the prompt."""
    answers = (" one two three", " four five six")
    longest = max(len(encoding().encode_ordinary(a)) for a in answers) + 1
    row = encode(encoding(), "ab", answers, longest + 2)
    assert encoding().decode(row.prompt.tolist()) == "ab"


def test_a_response_longer_than_the_context_is_refused():
    n = len(encoding().encode_ordinary(" long" * 20)) + 1
    assert len(encode(encoding(), "abc", (" long" * 20,), n + 1).prompt) == 1
    with pytest.raises(DataError, match=f"a response of {n} tokens is longer than the context of {n}"):
        encode(encoding(), "abc", (" long" * 20,), n)


def test_encode_pairs_drops_with_a_reason_what_teaches_nothing():
    pairs = [Pair("p", " a", " b", source="f:1"), Pair("p", " a", " a", source="f:2"),
             Pair("", "\n\nHuman: x\n\nAssistant: a", "\n\nHuman: y\n\nAssistant: b", source="f:3"),
             Pair("p", " a" * 90, " b", source="f:4"), Pair("", " a", " b", source="f:5")]
    kept, rows, dropped = encode_pairs(encoding(), pairs, 50)
    assert kept == [pairs[0], pairs[4]] and len(rows) == 2
    assert [encoding().decode(r.tolist()) for r in rows[0].responses] == [" a" + data.END, " b" + data.END]  # chosen first
    reasons = dict(dropped)
    assert list(reasons) == ["f:2", "f:3", "f:4"]
    assert "identical" in reasons["f:2"] and "no common prompt" in reasons["f:3"] and "longer than the context of 50" in reasons["f:4"]


# ---------------------------------------------------------------------------------------------------------------------
# Batches

@pytest.mark.parametrize("k", [1, 2, 4])
def test_collate_is_its_definition(k):
    rows = random_rows(7, k, 0)
    T = max(len(row.prompt) + sum(map(len, row.responses)) for row in rows)
    tokens, branch, position, last = [], [], [], []
    for row in rows:
        t, b, p, l = list(row.prompt), [0] * len(row.prompt), list(range(len(row.prompt))), []
        for j, response in enumerate(row.responses, 1):
            t, b = t + list(response), b + [j] * len(response)
            p += range(len(row.prompt), len(row.prompt) + len(response))  # positions restart after the prompt
            l.append(len(t) - 1)
        pad = T - len(t)
        tokens.append(t + [-1] * pad), branch.append(b + [-1] * pad), position.append(p + [0] * pad), last.append(l)
    batch = collate(rows)
    assert batch.tokens.tolist() == tokens and batch.position.tolist() == position and batch.last.tolist() == last
    assert batch.branch is None if k == 1 else batch.branch.tolist() == branch
    assert all(part is None or part.dtype == torch.int64 for part in batch)


def test_collate_takes_the_unsigned_tokens_of_encode():
    row = encode(encoding(), "ab", ("c",), 100)
    batch = collate([row, encode(encoding(), "a longer prompt", ("c",), 100)])
    assert row.prompt.dtype == np.uint16 and batch.tokens[0, -1] == -1 and batch.tokens[0, len(row) - 1] == end()


def test_response_tokens_are_read_one_before_they_stand():
    rows = random_rows(8, 1, 1)
    batch, (read, target) = collate(rows), data.response_tokens(rows)
    assert read.shape == target.shape == (8, max(len(row.responses[0]) for row in rows))
    for b, row in enumerate(rows):
        n = len(row.responses[0])
        assert target[b].tolist() == row.responses[0].tolist() + [-1] * (read.shape[1] - n)
        assert read[b, 0] == len(row.prompt) - 1  # the prompt's last token
        assert batch.tokens[b, read[b, :n] + 1].tolist() == row.responses[0].tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@given(st.lists(st.integers(1, 300), min_size=1, max_size=300), st.integers(1, 17))
def test_batches_hold_every_row_once(shuffle, lengths, size):
    parts = data.batches(lengths, size, 0, shuffle)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(lengths)))
    assert all(1 <= len(part) <= size for part in parts)


def test_batches_depend_on_the_seed_alone():
    lengths = [random.Random(i).randint(5, 200) for i in range(1000)]
    order = lambda seed: [part.tolist() for part in data.batches(lengths, 16, seed)]
    assert order("a") == order("a") and order("a") != order("b")
    assert sorted(map(sorted, order("a"))) != sorted(map(sorted, order("b")))  # other neighbours, not only another order


@pytest.mark.parametrize("shuffle, allowed", [(True, 0.1), (False, 0.01)])
def test_batches_hold_rows_of_like_length(shuffle, allowed):
    lengths = np.random.default_rng(0).integers(10, 400, 4000)
    padded = sum(lengths[part].max() * len(part) for part in data.batches(lengths, 16, 0, shuffle))
    assert padded / lengths.sum() - 1 < allowed


def test_batches_are_not_sorted_by_length():
    """Or every epoch would end on its longest rows."""
    lengths = np.random.default_rng(0).integers(10, 400, 512)
    means = [lengths[part].mean() for part in data.batches(lengths, 16, 0)]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Folds

topics = st.lists(st.integers(0, 12), min_size=1, max_size=60)  # the topic of each pair


def on(topic, i):
    return Pair(f"\n\nHuman: {topic}?\n\nAssistant:", f" yes {i}", f" no {i}", source=f"f:{i + 1}")


@given(topics, st.integers(2, 5), st.integers(0, 3))
def test_folds_split_no_topic_and_are_as_even_as_topics_allow(names, k, seed):
    if len(set(names)) < k:
        with pytest.raises(DataError, match=f"^f:1: {len(set(names))} different first human turns cannot make {k} folds; lower ensemble.folds$"):
            data.folds([on(t, i) for i, t in enumerate(names)], k, seed)
        return
    fold = data.folds([on(t, i) for i, t in enumerate(names)], k, seed)
    assert len({(t, f) for t, f in zip(names, fold)}) == len(set(names))
    sizes = np.bincount(fold, minlength=k)
    assert sizes.min() > 0 and sizes.max() - sizes.min() <= max(map(names.count, names))  # no topic could be moved to even them out


@given(topics, st.integers(1, 5))
def test_topics_of_one_pair_make_even_folds(names, k):
    n = len(names) + k
    sizes = np.bincount(data.folds([on(i, i) for i in range(n)], k, 0), minlength=k)
    assert sizes.sum() == n and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_small_topics_fill_what_large_ones_leave(seed):
    names = [0] * 6 + [1] * 3 + [2, 3, 4] + [5, 6] * 3
    assert np.bincount(data.folds([on(t, i) for i, t in enumerate(names)], 3, seed)).tolist() == [6, 6, 6]


def test_folds_depend_on_the_seed_not_on_the_order_or_the_labels():
    pairs = dialogues(200)
    fold = data.folds(pairs, 4, 0)
    assert (fold == data.folds(pairs, 4, 0)).all() and (fold != data.folds(pairs, 4, 1)).any()
    order = np.random.default_rng(0).permutation(200)
    assert (data.folds([pairs[i] for i in order], 4, 0) == fold[order]).all()
    assert (data.folds([Pair(p.prompt, p.rejected, p.chosen) for p in pairs], 4, 0) == fold).all()


def test_a_pair_without_prompt_is_a_topic_of_its_own_whatever_its_label():
    a, b = Pair("", " a", " b"), Pair("", " a", " c")
    assert data.topic(a) == data.topic(Pair("", " b", " a")) != data.topic(b)
    assert data.topic(Pair("\n\nHuman: Hi\n\nAssistant: So?\n\nHuman: x\n\nAssistant:", " a", " b")) == "Hi"
    assert len(set(data.folds([a, b], 2, 0))) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Audit

AUDITED = [Pair("\n\nHuman: Hi\n\nAssistant:", " abc", " d"),       # the longer answer, chosen three times, rejected once
           Pair("\n\nHuman: Hi\n\nAssistant:", " abc", " d"),
           Pair("\n\nHuman: Hi\n\nAssistant:", " d", " abc"),
           Pair("\n\nHuman: Hi\n\nAssistant:", " abc", " d"),
           Pair("\n\nHuman: Ho\n\nAssistant:", " same", " same"),
           Pair("", " x", " y")]


def test_an_audit_by_hand():
    assert data.audit(AUDITED) == {
        "pairs": 6, "different first human turns": 3, "characters of prompt (median)": 23.0, "characters of chosen (median)": 4.0,
        "characters of rejected (median)": 2.0, "longer answer chosen": (3 + 0 + 0.5 + 0.5) / 6, "identical on both sides": 1,
        "the same pair again": 3, "the same pair with the opposite label": 1}  # three against one: one has to be wrong


def test_what_contradicts_itself_is_counted_once_a_contradiction():
    count = lambda *chosen: data.audit([Pair("p", c, {"a": "b", "b": "a"}[c]) for c in chosen])["the same pair with the opposite label"]
    assert [count("a", "a"), count("a", "b"), count("a", "b", "b"), count("a", "b", "b", "a")] == [0, 1, 1, 2]


def test_an_audit_of_nothing_is_all_zero():
    assert set(data.audit([], encoding(), (64,)).values()) == {0}


def test_the_audit_counts_as_cut_just_what_encode_cuts():
    pairs = [Pair(dialogue(turns), " The answer.", " No.") for turns in range(1, 7)]
    whole = [len(encoding().encode_ordinary(p.prompt)) for p in pairs]
    for context in range(whole[0] + 5, whole[-1] + 30):
        cut = [len(encode(encoding(), p.prompt, (p.chosen, p.rejected), context).prompt) < n for p, n in zip(pairs, whole)]
        share = data.audit(pairs, encoding(), (context,))[f"share over {context} tokens (their oldest turns are cut)"]
        assert share == pytest.approx(np.mean(cut))


def test_the_audit_counts_tokens_as_rows_have_them():
    row = encode(encoding(), "Which?", (" this one",), 1000)
    assert data.audit([Pair("Which?", " this one", " a")], encoding())["tokens of prompt and longer answer (median)"] == len(row)


def test_shared_counts_topics_and_pairs_in_either_orientation():
    a = [Pair("p", "a", "b"), Pair("q", "a", "b"), Pair("q", "a", "c")]
    b = [Pair("p", "b", "a"), Pair("q", "x", "y"), Pair("r", "a", "b")]
    assert data.shared({"A": a, "B": b, "C": []}) == {"A and B": {"first human turns": 2, "pairs": 1},
                                                      "A and C": {"first human turns": 0, "pairs": 0}, "B and C": {"first human turns": 0, "pairs": 0}}
    assert data.shared({"A": a}) == {}


def test_the_audit_table_by_hand():
    sets = {"train": {"pairs": 12345, "share": 0.25}, "valid": {"pairs": 7, "share": 0.0}}
    table = data.audit_table(sets, {"train and valid": {"pairs": 1000, "turns": 2}})
    assert table.splitlines() == ["data    train  valid", "--------------------", "pairs  12,345      7", "share   0.250  0.000",
                                  "shared by train and valid: 1,000 pairs, 2 turns"]


def test_files_are_audited_from_the_command_line(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    one, two = write(tmp_path / "a.jsonl", lines(PAIR, PAIR | {"prompt": "Who?"})), write(tmp_path / "b" / "a.jsonl", lines(PAIR | {"rejected": " it"}))
    assert data.main([one]) == 0
    head, _, pairs, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["data", "a.jsonl"] and pairs.split() == ["pairs", "2"]
    assert data.main([one, two]) == 0  # of the same name: each has its column
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["data", one, two] and said.splitlines()[2].split() == ["pairs", "2", "1"]
    assert f"shared by {one} and {two}: 1 first human turns, 0 pairs" in said


@pytest.mark.parametrize("content", [None, b"", b'{"chosen": "a"}\n'])
def test_a_file_that_cannot_be_audited_gives_one_line(tmp_path, capsys, content):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    good = write(tmp_path / "good.jsonl", lines(PAIR))
    assert data.main([good, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}") and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Files from the network: a stand-in answers

class Answer(io.BytesIO):
    headers = {}


def network(monkeypatch, tmp_path, content, headers=None, error=None):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        if error:
            raise error
        answer = Answer(content)
        answer.headers = headers or {"Content-Length": str(len(content))}
        return answer
    monkeypatch.setattr(files.urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


URL = "https://example.org/some/helpful/test.jsonl.gz"


def test_an_address_is_fetched_once_and_checked_every_time(tmp_path, monkeypatch, capsys):
    content = gzip.compress(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode())
    checksum = hashlib.sha256(content).hexdigest()
    asked = network(monkeypatch, tmp_path, content)
    assert [p.chosen for p in data.read_pairs(URL)] == ["a"] and f"add #sha256={checksum}" in capsys.readouterr().out
    assert [p.source for p in data.read_pairs(f"{URL}#sha256={checksum}")] == [f"{URL}#sha256={checksum}:1"]
    assert asked == [URL]
    cached = next((tmp_path / "cache/nanoreward").iterdir())
    cached.write_bytes(content[:-1])
    with pytest.raises(OSError, match=f"not {checksum}.*delete .*{cached.name}"):
        data.read_pairs(f"{URL}#sha256={checksum}")


@pytest.mark.parametrize("error, headers, words", [
    (OSError("no route to host"), None, "no route to host"), (http.client.IncompleteRead(b""), None, "IncompleteRead"),
    (None, {"Content-Length": "7"}, "of 7 bytes")], ids=["offline", "broken off", "short"])
def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, error, headers, words):
    network(monkeypatch, tmp_path, b"abc", headers, error)
    with pytest.raises(OSError, match=f"cannot be fetched.*{words}.*by hand") as caught:
        data.read_pairs(URL)
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


def test_a_file_that_is_another_is_not_kept(tmp_path, monkeypatch):
    network(monkeypatch, tmp_path, b"another file")
    with pytest.raises(OSError, match="its sha256 is .*, not 0123"):
        data.read_pairs(URL + "#sha256=0123")
    assert not (tmp_path / "cache").exists()
    for address in ("http://example.org/x.jsonl", "ftp://x/y", "file:///etc/passwd"):
        with pytest.raises(OSError, match="only https://"):
            data.read_pairs(address)


def test_sets_from_the_network_are_named_by_folder_and_file(tmp_path, monkeypatch):
    network(monkeypatch, tmp_path, gzip.compress(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode()))
    config = configuration.load(overrides=[("data.train", "x.jsonl"), ("data.ood", URL + "#sha256=")])
    assert list(run.load_ood(config, [])) == ["helpful-test"]
    assert [data.short_name(p) for p in ("a/b.c/mine.jsonl.gz", "mine.jsonl", "https://h.org/v1.0/base/train.jsonl.gz#sha256=1.2/3")] == ["mine", "mine", "base-train"]


def test_what_stands_behind_an_address_is_part_of_what_a_run_depends_on(tmp_path, monkeypatch):
    config, seen = configuration.load(overrides=[("data.train", URL)]), []
    for text in ("a", "b"):
        network(monkeypatch, tmp_path / text, gzip.compress(json.dumps({"prompt": "p", "chosen": text, "rejected": "c"}).encode()))
        seen.append(plan.dependencies(config)["reward_flip"])
    assert seen[0] != seen[1]
