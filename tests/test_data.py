"""data.py: splits, rows, batches, folds.

Reading files is tested in tests/formats/, the audit in tests/runtime/test_audit.py.
"""
import functools
import random

import numpy as np
import pytest
import torch
from helpers import dialogue, random_rows, write_pairs
from hypothesis import given
from hypothesis import strategies as st

import config as configuration
import data
import world
from data import (
    RESERVED_NAMES,
    DataError,
    Pair,
    Row,
    assign_folds,
    batches,
    check_apart,
    collate,
    encode_pairs,
    encode_prompt,
    encode_row,
    first_turn,
    length_groups,
    load_ood,
    load_pairs,
    pair_key,
    response_tokens,
    split_by_topic,
    topic,
)
from tokenizer import EOS, Tokenizer, train_tokenizer

TEXTS = [
    "\n\nHuman: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "\n\nHuman: How can I sleep better?\n\nAssistant: Go to bed at the same hour every night.",
] * 3
any_text = st.text(st.characters(exclude_categories=["Cs"]))  # everything that UTF-8 can hold


@functools.cache
def trained():
    return train_tokenizer(TEXTS, 300)


def with_template(template, eos, *others):
    """The trained tokenizer with more special tokens and a template"""
    special = {EOS: 299}
    for i, name in enumerate((eos, *others)):
        special[name] = 300 + i
    bos = "<|begin_of_text|>" if "<|begin_of_text|>" in others else ""
    return Tokenizer(trained().pattern, trained().ranks, special, eos, bos, template)


@functools.cache
def chatml():
    return with_template("chatml", "<|im_end|>", "<|im_start|>")


@functools.cache
def llama3():
    return with_template(
        "llama3", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"
    )


def num_tokens(text):
    return len(trained().encode_text(text))


def text_of(tokens):
    return trained().decode(tokens.tolist())


# ----------------------------------------------------------------------------------------------
# Splits


def dialogues(n):
    """Pairs of which four each share their first turn, some with different later turns"""
    pairs = []
    for i in range(n):
        prompt = f"\n\nHuman: Question {i // 4}?\n\nAssistant:"
        if i % 2:
            prompt += " Go on.\n\nHuman: More.\n\nAssistant:"
        pairs.append(Pair(prompt, f" yes {i}", f" no {i}", source=f"f:{i}"))
    return pairs


def source_of(pair):
    return pair.source


def test_a_split_keeps_a_first_turn_on_one_side():
    train, valid = split_by_topic(dialogues(2000), 0.2, 0)
    train_turns = {first_turn(p.prompt) for p in train}
    valid_turns = {first_turn(p.prompt) for p in valid}
    assert not train_turns & valid_turns
    assert len(train) + len(valid) == 2000
    assert len(valid) / 2000 == pytest.approx(0.2, abs=0.05)


def test_a_split_does_not_depend_on_order_or_other_pairs():
    pairs = dialogues(400)
    shuffled = random.Random(0).sample(pairs, 400)
    sides = split_by_topic(pairs, 0.3, 0)
    for side, other in zip(sides, split_by_topic(shuffled, 0.3, 0)):
        assert sorted(side, key=source_of) == sorted(other, key=source_of)
    _, few_valid = split_by_topic(pairs[:40], 0.3, 0)
    assert set(few_valid) == set(sides[1]) & set(pairs[:40])
    assert sides != split_by_topic(pairs, 0.3, 1)


def test_sides_folds_and_batches_of_a_seed_never_change():
    """Or an old run would be resumed on other data.  The values are those of revision e442778."""
    _, valid = split_by_topic(dialogues(40), 0.3, 0)
    assert sorted({first_turn(p.prompt) for p in valid}) == [
        "Question 0?", "Question 1?", "Question 8?",
    ]
    fold = assign_folds(dialogues(40), 3, 0)
    assert fold[::4].tolist() == [0, 2, 2, 1, 0, 1, 0, 2, 1, 0]
    parts = batches([5, 3, 9, 1, 4, 4, 8, 2, 7, 6], 4, "a")
    assert [part.tolist() for part in parts] == [[3, 7, 1, 5], [4, 0, 9, 8], [6, 2]]


def test_a_pair_in_both_sets_is_refused_in_either_orientation():
    train = [Pair("p", "a", "b", source="train:1"), Pair("q", "a", "b", source="train:2")]
    for chosen, rejected in (("a", "b"), ("b", "a")):
        valid = [Pair("r", "a", "b"), Pair("q", chosen, rejected, source="valid:7")]
        with pytest.raises(DataError, match=r"valid:7: .* at train:2 \(1 such pairs\)") as error:
            check_apart(train, valid)
        assert "\n" not in str(error.value)


def test_shared_topics_are_counted():
    train = [Pair("p", "a", "b"), Pair("q", "a", "b")]
    valid = [Pair("p", "a", "c"), Pair("r", "a", "b")]
    assert check_apart(train, valid) == 1


def test_a_pair_without_prompt_is_a_topic_of_its_own_whatever_its_label():
    a = Pair("", " a", " b")
    b = Pair("", " a", " c")
    assert topic(a) == topic(Pair("", " b", " a")) != topic(b)
    later_turn = "\n\nHuman: Hi\n\nAssistant: So?\n\nHuman: x\n\nAssistant:"
    assert topic(Pair(later_turn, " a", " b")) == "Hi"
    for instructions in ("\n\nSystem: Be brief.", "\n\nSystem: S\n\nAssistant: Hello."):
        assert topic(Pair(instructions + later_turn, " a", " b")) == "Hi"
    assert topic(Pair("\n\nSystem: S\n\nAssistant:", " a", " b")) == "System: S"
    assert len(set(assign_folds([a, b], 2, 0))) == 2


def test_the_key_of_a_pair_ignores_its_label():
    assert pair_key(Pair("p", "a", "b")) == pair_key(Pair("p", "b", "a"))
    assert pair_key(Pair("p", "a", "b")) != pair_key(Pair("q", "a", "b"))
    assert pair_key(Pair("p", "a", "b")) != pair_key(Pair("p", "a", "c"))


# ----------------------------------------------------------------------------------------------
# Loading


NO_VALIDATION = ("data.valid_share=0", "reward.methods=", "ppo.methods=")


def settings(*words):
    return configuration.load(overrides=[word.split("=", 1) for word in words])


def test_pairs_of_the_world_are_the_worlds_own():
    config = settings("world.pairs=20", "world.valid=10")
    sets = load_pairs(config)
    rows, valid_rows, truths = data.world_pairs(config)
    assert len(sets["train"]) == len(rows) == len(truths) == 20
    assert len(sets["valid"]) == 10
    for i, (pair, row) in enumerate(zip(sets["train"], rows)):
        assert pair == Pair(**row, source=f"world:{i + 1}", index=i)
    prompts = {pair.prompt for pair in sets["train"]}
    assert prompts.isdisjoint(pair.prompt for pair in sets["valid"])


def test_held_out_domains_of_the_world_are_sets_of_their_own():
    sets = load_ood(settings("world.ood=12", "world.flip=0.2"), [])
    assert list(sets) == list(world.HELD_OUT_DOMAINS)
    noise = world.Noise(temperature=0.15, flip=0.2, bias=0.02, shared=0.0)
    for domain, pairs in sets.items():
        rows, _ = world.pairs(4, "0 ood", noise, (domain,), contrast=0.25)
        expected = []
        for i, row in enumerate(rows):
            expected.append(Pair(**row, source=f"{domain}:{i + 1}", index=i))
        assert pairs == expected


def test_a_file_is_split_by_topic_or_read_beside_another(tmp_path, capsys):
    path = write_pairs(tmp_path / "a.jsonl", 40)
    other = write_pairs(tmp_path / "b.jsonl", 5, chosen=" new")
    sets = load_pairs(settings(f"data.train={path}", "data.valid_share=0.3"))
    assert sorted(pair.index for pair in sets["train"] + sets["valid"]) == list(range(40))
    assert 0 < len(sets["valid"]) < 30
    assert capsys.readouterr().out == ""
    sets = load_pairs(settings(f"data.train={path}", f"data.valid={other}", "data.limit=7"))
    assert len(sets["train"]) == 7 and len(sets["valid"]) == 5
    assert "share 5 first human turns" in capsys.readouterr().out


def test_several_files_are_read_one_after_the_other(tmp_path):
    one = write_pairs(tmp_path / "a.jsonl", 3)
    two = write_pairs(tmp_path / "b.jsonl", 2, chosen=" new")
    sets = load_pairs(settings(f"data.train={one},{two}", *NO_VALIDATION))
    sources = [pair.source for pair in sets["train"]]
    assert sources == [f"{one}:1", f"{one}:2", f"{one}:3", f"{two}:1", f"{two}:2"]
    assert sets["valid"] == []


def test_a_file_of_one_topic_cannot_be_split(tmp_path):
    path = write_pairs(tmp_path / "a.jsonl", 5, prompt="\n\nHuman: Hi\n\nAssistant:")
    match = f"^{path}: too few different first turns to hold 30% of them out; give data.valid$"
    with pytest.raises(DataError, match=match):  # no share can help
        load_pairs(settings(f"data.train={path}", "data.valid_share=0.3"))


@pytest.mark.parametrize("share, remedy", [("0.001", "raise"), ("0.9", "lower")])
def test_a_split_that_fails_names_the_change_that_helps(tmp_path, share, remedy):
    path = write_pairs(tmp_path / "a.jsonl", 2)
    with pytest.raises(DataError, match=f"give data.valid or {remedy} data.valid_share"):
        load_pairs(settings(f"data.train={path}", f"data.valid_share={share}"))


def test_files_out_of_distribution_are_named_and_kept_apart(tmp_path):
    (tmp_path / "b").mkdir()
    train = write_pairs(tmp_path / "train.jsonl", 3)
    one = write_pairs(tmp_path / "ood.jsonl", 2, chosen=" new")
    two = write_pairs(tmp_path / "b" / "ood.jsonl", 2, chosen=" newer")
    sets = load_ood(settings(f"data.train={train}", f"data.ood={one},{two}"), [])
    names = list(sets)
    assert names[0] == "ood" and names[1].endswith("b_ood_jsonl")  # two of one name: by its path
    pairs = load_pairs(settings(f"data.train={train}", *NO_VALIDATION))["train"]
    with pytest.raises(DataError, match="also in training.*leave the file out of data.ood"):
        load_ood(settings(f"data.train={train}", f"data.ood={train}"), pairs)


@pytest.mark.parametrize("name", [
    "train", "valid", "demonstrations", "facts", "translation", "", "x" * 200,
])
def test_a_file_out_of_distribution_never_has_the_name_of_another_set(tmp_path, name):
    """A set called valid was taken for the validation pairs, after all training."""
    path = write_pairs(tmp_path / f"{name}.jsonl", 2, chosen=" new")
    (tmp_path / "b").mkdir()
    other = write_pairs(tmp_path / "b" / f"{name}.jsonl", 3, chosen=" newer")
    sets = load_ood(settings("data.train=none.jsonl", f"data.ood={path},{other},{other}"), [])
    assert [len(pairs) for pairs in sets.values()] == [2, 3, 3]
    assert not {"", *RESERVED_NAMES} & set(sets) and max(map(len, sets)) < 70


# ----------------------------------------------------------------------------------------------
# Rows


@given(any_text, st.lists(any_text, min_size=1, max_size=3))
def test_a_row_gives_the_texts_back_with_one_eos_a_response(prompt, responses):
    texts = [response + EOS for response in responses]  # the words of EOS end nothing
    row = encode_row(trained(), prompt, texts, 10_000)
    assert text_of(row.prompt) == (prompt or EOS)
    for tokens, text in zip(row.responses, texts):
        assert tokens[-1] == trained().eos_id
        assert trained().eos_id not in tokens[:-1]
        assert text_of(tokens[:-1]) == text


def test_the_length_of_a_row_counts_the_prompt_once():
    row = encode_row(trained(), "Which?", (" this", " that"), 1000)
    assert len(row) == len(row.prompt) + len(row.responses[0]) + len(row.responses[1])


def test_an_overlong_prompt_loses_its_oldest_turns():
    whole = dialogue(6)
    response = " The answer."
    for first in range(6):
        rest = whole[whole.index(f"\n\nHuman: Question {first}?"):]
        need = num_tokens(rest) + num_tokens(response) + 1
        for context in (need, need + 1):  # what fits exactly is kept
            row = encode_row(trained(), whole, (response, " No."), context)
            assert text_of(row.prompt) == rest
            assert text_of(row.responses[0]) == response + EOS


def test_an_overlong_turn_loses_its_beginning_and_the_response_nothing():
    last_turn = dialogue(1) + " word" * 50
    prompt = "\n\nHuman: Hi\n\nAssistant:" + last_turn
    response = " The answer is long."
    answer = trained().encode_text(response)
    for room in (1, 5, 20):
        row = encode_row(trained(), prompt, (response,), room + len(answer) + 1)
        assert len(row) == room + len(answer) + 1
        assert row.prompt.tolist() == trained().encode_text(last_turn)[-room:]
        assert row.responses[0].tolist() == answer + [trained().eos_id]


def test_each_response_needs_room_beside_the_prompt_alone():
    """Siblings do not take each other's room: positions restart after the prompt."""
    answers = (" one two three", " four five six")
    longest = max(map(num_tokens, answers)) + 1
    row = encode_row(trained(), "ab", answers, longest + 2)
    assert text_of(row.prompt) == "ab"


def test_a_response_longer_than_the_context_is_refused():
    response = " long" * 20
    n = num_tokens(response) + 1
    assert len(encode_row(trained(), "abc", (response,), n + 1).prompt) == 1
    message = f"a response of {n} tokens is longer than the context of {n}; raise model.context"
    with pytest.raises(DataError, match=message):
        encode_row(trained(), "abc", (response,), n)


def test_tokens_are_unsigned_where_the_vocabulary_allows_it():
    row = encode_row(trained(), "ab", ("c",), 100)
    assert row.prompt.dtype == row.responses[0].dtype == np.uint16


def test_rows_in_chatml():
    ours = chatml()
    prompt = "\n\nHuman: Hi\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:"
    row = encode_row(ours, prompt, (" a", "b "), 1000)
    assert row.prompt.tolist() == ours.encode_dialogue(prompt)
    responses = [ours.decode(response.tolist()) for response in row.responses]
    assert responses == ["a<|im_end|>", "b<|im_end|>"]  # no space beside a marker
    last_turn = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert ours.decode(encode_prompt(ours, prompt, 30)) == last_turn  # the oldest turn is cut


def test_every_prompt_begins_with_bos():
    ours = llama3()
    assert ours.decode(encode_prompt(ours, "Hi", 100)) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    for room in range(1, 9):
        tokens = encode_prompt(ours, "\n\nHuman: Hi\n\nAssistant:", room)
        assert tokens[0] == ours.bos_id
        assert len(tokens) == room
        assert ours.bos_id not in tokens[1:]


# ----------------------------------------------------------------------------------------------
# Pairs that cannot be used


def test_pairs_that_cannot_be_used_are_dropped_with_a_reason():
    pairs = [
        Pair("p", " a", " b", source="f:1"),
        Pair("p", " a", " a", source="f:2"),
        Pair("", "\n\nHuman: x\n\nAssistant: a", "\n\nHuman: y\n\nAssistant: b", source="f:3"),
        Pair("p", " a" * 90, " b", source="f:4"),
        Pair("", " a", " b", source="f:5"),
        Pair("", "\n\nSystem: x\n\nHuman: y", "\n\nHuman: y", source="f:6"),
    ]
    kept, rows, dropped = encode_pairs(trained(), pairs, 50)
    assert kept == [pairs[0], pairs[4]]
    assert len(rows) == 2
    assert [text_of(r) for r in rows[0].responses] == [" a" + EOS, " b" + EOS]  # chosen first
    reasons = dict(dropped)
    assert list(reasons) == ["f:2", "f:3", "f:4", "f:6"]
    assert "identical, so there is nothing to prefer" in reasons["f:2"]
    assert "no common prompt" in reasons["f:3"] and reasons["f:6"] == reasons["f:3"]
    assert "longer than the context of 50" in reasons["f:4"]


def test_pairs_that_are_equal_as_tokens_are_dropped():
    """A template strips responses, and a vocabulary may lack bytes: different texts, one row."""
    pairs = [
        Pair("p", " yes", "yes ", source="f:1"),
        Pair("p", " yes", " no", source="f:2"),
    ]
    kept, rows, dropped = encode_pairs(chatml(), pairs, 50)
    assert kept == pairs[1:] and len(rows) == 1
    assert dropped == [("f:1", "chosen and rejected are identical as tokens; remove the pair")]

    ranks = {}
    for token, rank in trained().ranks.items():
        if token != b"\x04":
            ranks[token] = rank + 1
    without_a_byte = Tokenizer(trained().pattern, ranks, {EOS: 0})
    pairs[0] = Pair("p", " yes\x04", " yes", source="f:1")
    without_a_byte = Tokenizer.from_json(without_a_byte.to_json())
    kept, rows, dropped = encode_pairs(without_a_byte, pairs, 50)
    assert kept == pairs[1:] and len(rows) == 1
    assert dropped == [("f:1", "chosen and rejected are identical as tokens; remove the pair")]
    kept, _, dropped = encode_pairs(trained(), pairs, 50)  # this vocabulary has all bytes
    assert kept == pairs and dropped == []


# ----------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("k", [1, 2, 4])
def test_collate_is_its_definition(k):
    rows = random_rows(7, k, 0)
    T = max(len(row.prompt) + sum(map(len, row.responses)) for row in rows)
    expected = {"tokens": [], "branch": [], "position": [], "last": []}
    for row in rows:
        prompt_len = len(row.prompt)
        tokens = list(row.prompt)
        branch = [0] * prompt_len
        position = list(range(prompt_len))
        last = []
        for j, response in enumerate(row.responses, 1):
            tokens += list(response)
            branch += [j] * len(response)
            position += range(prompt_len, prompt_len + len(response))  # restarts after the prompt
            last.append(len(tokens) - 1)
        padding = T - len(tokens)
        expected["tokens"].append(tokens + [-1] * padding)
        expected["branch"].append(branch + [-1] * padding)
        expected["position"].append(position + [0] * padding)
        expected["last"].append(last)
    batch = collate(rows)
    assert batch.tokens.tolist() == expected["tokens"]
    assert batch.position.tolist() == expected["position"]
    assert batch.last.tolist() == expected["last"]
    if k == 1:
        assert batch.branch is None
    else:
        assert batch.branch.tolist() == expected["branch"]
    assert batch.inputs_embeds is None
    for part in batch:
        assert part is None or part.dtype == torch.int64


def test_collate_pads_unsigned_tokens_with_minus_one():
    row = encode_row(trained(), "ab", ("c",), 100)
    longer = encode_row(trained(), "a longer prompt", ("c",), 100)
    batch = collate([row, longer])
    assert row.prompt.dtype == np.uint16
    assert batch.tokens[0, -1] == -1
    assert batch.tokens[0, len(row) - 1] == trained().eos_id


def test_a_batch_moves_as_a_whole():
    batch = collate(random_rows(3, 2, 0)).to("meta")
    assert batch.inputs_embeds is None
    assert {part.device.type for part in batch if part is not None} == {"meta"}


def test_a_response_token_is_predicted_at_the_index_before_it():
    rows = random_rows(8, 1, 1)
    batch = collate(rows)
    out_pos, target = response_tokens(rows)
    R = max(len(row.responses[0]) for row in rows)
    assert out_pos.shape == target.shape == (8, R)
    for b, row in enumerate(rows):
        response = row.responses[0].tolist()
        n = len(response)
        assert target[b].tolist() == response + [-1] * (R - n)
        assert out_pos[b, 0] == len(row.prompt) - 1  # the prompt's last token
        assert batch.tokens[b, out_pos[b, :n] + 1].tolist() == response


def test_response_tokens_of_several_branches_follow_one_another():
    row = Row(np.array([5, 6, 7]), (np.array([1, 2]), np.array([3])))
    short = Row(np.array([5]), (np.array([4]),))
    out_pos, target = response_tokens([row, short])
    assert out_pos.tolist() == [[2, 3, 2], [0, 0, 0]]  # first tokens at the end of the prompt
    assert target.tolist() == [[1, 2, 3], [4, -1, -1]]
    batch = collate([short, row])
    assert batch.last.tolist() == [[1, 0], [4, 5]]


@pytest.mark.parametrize("shuffle", [True, False])
@given(st.lists(st.integers(1, 300), min_size=1, max_size=300), st.integers(1, 17))
def test_batches_hold_every_row_once(shuffle, lengths, size):
    parts = batches(lengths, size, 0, shuffle)
    indices = []
    for part in parts:
        assert 1 <= len(part) <= size
        indices += part.tolist()
    assert sorted(indices) == list(range(len(lengths)))


def test_batches_depend_on_the_seed_alone():
    lengths = [random.Random(i).randint(5, 200) for i in range(1000)]

    def order(seed):
        return [part.tolist() for part in batches(lengths, 16, seed)]

    assert order("a") == order("a") != order("b")
    # other rows in a batch, not only another order of the same batches
    assert sorted(map(sorted, order("a"))) != sorted(map(sorted, order("b")))


@pytest.mark.parametrize("shuffle, allowed", [(True, 0.1), (False, 0.01)])
def test_batches_hold_rows_of_similar_length(shuffle, allowed):
    lengths = np.random.default_rng(0).integers(10, 400, 4000)
    padded = 0
    for part in batches(lengths, 16, 0, shuffle):
        padded += lengths[part].max() * len(part)
    assert padded / lengths.sum() - 1 < allowed


def test_batches_are_not_sorted_by_length():
    """Or every epoch would end on its longest rows."""
    lengths = np.random.default_rng(0).integers(10, 400, 512)
    means = [lengths[part].mean() for part in batches(lengths, 16, 0)]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.5


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 200))
def test_length_groups_hold_every_row_once_and_cost_no_more_than_one_group(lengths, pass_cost):
    groups = length_groups(lengths, pass_cost)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert all(len(group) for group in groups)
    cost = sum(len(group) * max(lengths[i] for i in group) + pass_cost for group in groups)
    assert cost <= len(lengths) * max(lengths) + pass_cost


def test_rows_are_parted_where_padding_costs_more_than_a_pass():
    lengths = [10, 40, 11, 41]  # one pass has 60 tokens more than two passes
    assert [sorted(g.tolist()) for g in length_groups(lengths, 57)] == [[0, 2], [1, 3]]
    assert [sorted(g.tolist()) for g in length_groups(lengths, 61)] == [[0, 1, 2, 3]]


# ----------------------------------------------------------------------------------------------
# Folds

topics = st.lists(st.integers(0, 12), min_size=1, max_size=60)  # the topic of each pair


def pairs_of_topics(names):
    pairs = []
    for i, name in enumerate(names):
        prompt = f"\n\nHuman: {name}?\n\nAssistant:"
        pairs.append(Pair(prompt, f" yes {i}", f" no {i}", source=f"f:{i + 1}"))
    return pairs


@given(topics, st.integers(2, 5), st.integers(0, 3))
def test_folds_split_no_topic_and_are_as_even_as_topics_allow(names, k, seed):
    pairs = pairs_of_topics(names)
    num_topics = len(set(names))
    if num_topics < k:
        message = (
            f"^f:1: {num_topics} different first human turns cannot make {k} folds; "
            rf"lower ensemble.folds \(0: no folds\)$"
        )
        with pytest.raises(DataError, match=message):
            assign_folds(pairs, k, seed)
        return
    fold = assign_folds(pairs, k, seed)
    assert len(set(zip(names, fold.tolist()))) == num_topics
    sizes = np.bincount(fold, minlength=k)
    assert sizes.min() > 0
    # moving a topic could not make them more even
    assert sizes.max() - sizes.min() <= max(map(names.count, names))


@given(topics, st.integers(1, 5))
def test_topics_of_one_pair_make_even_folds(names, k):
    n = len(names) + k
    sizes = np.bincount(assign_folds(pairs_of_topics(range(n)), k, 0), minlength=k)
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_small_topics_fill_what_large_ones_leave(seed):
    names = [0] * 6 + [1] * 3 + [2, 3, 4] + [5, 6] * 3
    fold = assign_folds(pairs_of_topics(names), 3, seed)
    assert np.bincount(fold).tolist() == [6, 6, 6]


def test_folds_depend_on_the_seed_not_on_the_order_or_the_labels():
    pairs = dialogues(200)
    fold = assign_folds(pairs, 4, 0)
    assert (fold == assign_folds(pairs, 4, 0)).all()
    assert (fold != assign_folds(pairs, 4, 1)).any()
    order = np.random.default_rng(0).permutation(200)
    assert (assign_folds([pairs[i] for i in order], 4, 0) == fold[order]).all()
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]
    assert (assign_folds(swapped, 4, 0) == fold).all()
