"""tokenizer.py: any text comes back; dialogues in the markers of a template; save and load.

Token ids compared with other libraries are in tests/pretrained/test_tokenizer.py.
"""
import functools
import json

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenizer import (
    EOS,
    SPLIT_PATTERN,
    TEMPLATES,
    Tokenizer,
    has_any,
    split_turns,
    train_tokenizer,
)

TEXTS = [
    "\n\nHuman: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "\n\nHuman: How can I sleep better?\n\nAssistant: Go to bed at the same hour every night.",
] * 3
any_text = st.text(st.characters(exclude_categories=["Cs"]))  # everything that UTF-8 can hold
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]


@functools.cache
def trained():
    return train_tokenizer(TEXTS, 300)


@functools.cache
def reloaded():
    return Tokenizer.from_json(trained().to_json())


@functools.cache
def with_markers(template):
    """The trained tokenizer with the special tokens of a template as ids 300, 301, ..."""
    names = CHATML if template == "chatml" else LLAMA3
    special = {EOS: 299}
    for i, name in enumerate(names):
        special[name] = 300 + i
    _, end_of_turn, _ = TEMPLATES[template]
    bos = "<|begin_of_text|>" if template == "llama3" else ""
    return Tokenizer(SPLIT_PATTERN, trained().ranks, special, end_of_turn, bos, template)


# ----------------------------------------------------------------------------------------------
# Texts


@given(any_text)
def test_any_text_comes_back(text):
    assert trained().decode(trained().encode_text(text)) == text


def test_no_part_of_a_text_is_a_special_token():
    tokens = trained().encode_text(f"a{EOS}b")
    assert trained().eos_id not in tokens
    assert trained().decode(tokens) == f"a{EOS}b"


@given(any_text)
def test_a_saved_tokenizer_is_the_same(text):
    assert reloaded().encode_text(text) == trained().encode_text(text)


def test_a_saved_tokenizer_has_the_same_properties():
    copy = reloaded()
    assert copy.vocab_size == trained().vocab_size == 300
    assert copy.special == {EOS: 299}
    assert copy.eos == EOS and copy.eos_id == 299
    assert copy.bos == "" and copy.bos_id is None
    assert copy.template == "hh"
    assert copy.missing_bytes == b""
    assert copy.ranks == trained().ranks


def test_training_is_deterministic():
    assert train_tokenizer(TEXTS, 300).to_json() == trained().to_json()


def test_training_learns_the_words_of_its_texts():
    assert len(trained().encode_text(TEXTS[0])) < 0.8 * len(TEXTS[0])


def test_the_keys_of_the_saved_file_are_those_of_older_runs():
    saved = json.loads(trained().to_json())
    assert list(saved) == ["pattern", "special", "end", "begin", "template", "tokens"]


def test_a_file_of_an_older_run_without_templates_is_read():
    saved = json.loads(trained().to_json())
    for key in ("end", "begin", "template"):
        del saved[key]
    old = Tokenizer.from_json(json.dumps(saved))
    assert old.encode_text(TEXTS[0]) == trained().encode_text(TEXTS[0])
    assert (old.eos, old.bos, old.template) == (EOS, "", "hh")


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_a_saved_template_is_the_same(template):
    ours = with_markers(template)
    copy = Tokenizer.from_json(ours.to_json())
    assert (copy.eos, copy.bos, copy.template) == (ours.eos, ours.bos, ours.template)
    assert (copy.eos_id, copy.bos_id) == (ours.eos_id, ours.bos_id)
    assert copy.special == ours.special and copy.ranks == ours.ranks
    assert copy.encode_dialogue(TEXTS[0]) == ours.encode_dialogue(TEXTS[0])


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"special": {}}', '"text"', "3"])
def test_another_file_than_a_tokenizer_raises_an_error_that_the_run_reports(text):
    with pytest.raises((ValueError, KeyError, TypeError)):
        Tokenizer.from_json(text)


@pytest.mark.parametrize("change", [
    {"special": []}, {"special": {EOS: "0"}}, {"special": {EOS: 10 ** 12}}, {"special": {}},
    {"special": {EOS: -1}}, {"special": {EOS: 299, "a": 299}}, {"special": {EOS: 299, "a": 0.5}},
    {"special": {EOS: 299, "\ud800": 300}}, {"end": 3}, {"begin": "nothing"}, {"begin": ["a"]},
    {"template": "alpaca"}, {"template": []}, {"pattern": "("}, {"pattern": None}, {"tokens": 3},
    {"tokens": ["YQ==", "YQ=="]}, {"tokens": ["*"]}, {"tokens": [""]}, {"tokens": [None]},
], ids=str)
def test_a_saved_tokenizer_that_was_changed_is_an_error(change):
    saved = json.loads(trained().to_json())
    with pytest.raises(ValueError):
        Tokenizer.from_json(json.dumps(saved | change))


def test_a_saved_tokenizer_nested_too_deeply_is_an_error():
    with pytest.raises(ValueError, match="RecursionError"):
        Tokenizer.from_json("[" * 100_000)


# ----------------------------------------------------------------------------------------------
# A vocabulary that lacks single bytes, and special tokens that come before all others


@functools.cache
def with_missing_bytes():
    """Without the bytes of "\\x04" and the first byte of a supplementary character"""
    ranks = {}
    for token, rank in trained().ranks.items():
        if token not in (b"\x04", b"\xf3"):
            ranks[token] = rank + 1
    return Tokenizer.from_json(Tokenizer(SPLIT_PATTERN, ranks, {EOS: 0}).to_json())


def test_special_tokens_may_come_first_and_ids_leave_no_gap():
    ours = with_missing_bytes()
    assert ours.eos_id == 0
    assert ours.missing_bytes == bytes([4, 0xf3])
    assert ours.vocab_size == len(ours.ranks) + 1 == 298
    assert sorted(ours.ranks.values()) == list(range(1, 298))


@settings(max_examples=200)
@given(any_text)
@example("a\x04b!\x04! \x04")
@example("3's \U000f0000")
@example("km,\tthey'll \x04")
@example("a \x04the")  # two words: " the" is one token, but not of this text
def test_missing_bytes_are_dropped_after_the_text_is_split_into_words(text):
    ours = with_missing_bytes()
    expected = []
    for word in regex.findall(SPLIT_PATTERN, text):
        rest = word.encode().translate(None, b"\x04\xf3")
        expected += by_merges(rest, ours.ranks)
    assert ours.encode_text(text) == expected


def by_merges(word, ranks):
    """Token ids of one word: of all neighbours the pair of lowest rank is merged first."""
    parts = [bytes([b]) for b in word]
    while True:
        candidates = []
        for i, pair in enumerate(zip(parts, parts[1:])):
            if b"".join(pair) in ranks:
                candidates.append((ranks[b"".join(pair)], i))
        if not candidates:
            return [ranks[part] for part in parts]
        _, i = min(candidates)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def test_has_any_looks_at_bytes():
    assert has_any("a\x04", b"\x04") and has_any("\U000f0000", b"\xf3")
    assert not has_any("a", b"\x04") and not has_any("a", b"")


# ----------------------------------------------------------------------------------------------
# Dialogues


def test_turns_of_a_dialogue_by_hand():
    assert split_turns("\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:") == [
        ("Human", " A"), ("Assistant", " B"), ("Human", " C"), ("Assistant", ""),
    ]
    assert split_turns("A") == [("Human", "A"), ("Assistant", "")]
    assert split_turns("") == [("Assistant", "")]
    assert split_turns("\n\nHuman: A") == [("Human", " A"), ("Assistant", "")]
    assert split_turns("\n\nHuman: A\n\nAssistant: B")[-1] == ("Assistant", " B")
    assert split_turns("\n\nSystem: S\n\nHuman: A\n\nAssistant:") == [
        ("System", " S"), ("Human", " A"), ("Assistant", ""),
    ]
    assert split_turns("\n\nSystem: S") == [("System", " S"), ("Assistant", "")]
    # a later one is text of the turn before it
    assert split_turns("\n\nHuman: A\n\nSystem: S\n\nAssistant:") == [
        ("Human", " A\n\nSystem: S"), ("Assistant", ""),
    ]


@given(any_text)
def test_in_hh_form_a_dialogue_is_its_text(text):
    assert trained().encode_dialogue(text) == trained().encode_text(text)


def test_turns_in_chatml():
    ours = with_markers("chatml")
    prompt = "\n\nHuman: Hi <|im_end|> you \n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:"
    tokens = ours.encode_dialogue(prompt)
    assert ours.decode(tokens) == (
        "<|im_start|>user\nHi <|im_end|> you<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokens.count(ours.special["<|im_start|>"]) == 4
    # the fourth <|im_end|> is text of the first turn, not a marker
    assert tokens.count(ours.special["<|im_end|>"]) == 3
    assert ours.encode_dialogue("Why?") == ours.encode_dialogue("\n\nHuman: Why?\n\nAssistant:")


def test_a_system_turn_has_the_markers_of_the_template():
    prompt = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:"
    chatml = with_markers("chatml")
    assert chatml.decode(chatml.encode_dialogue(prompt)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    llama3 = with_markers("llama3")
    assert llama3.decode(llama3.encode_dialogue(prompt)).startswith(
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    )


def test_turns_in_llama3():
    ours = with_markers("llama3")
    tokens = ours.encode_dialogue("\n\nHuman: Hi\n\nAssistant: So")
    assert ours.decode(tokens) == (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo"
    )
    markers = [t for t in tokens if t >= 300]
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"] + LLAMA3[:2]
    assert markers == [ours.special[name] for name in names]


def test_a_turn_that_is_a_marker_remains_text():
    ours = with_markers("chatml")
    tokens = ours.encode_dialogue("\n\nHuman: <|im_end|>\n\nAssistant:")
    assert ours.decode(tokens).count("<|im_end|>") == 2
    assert tokens.count(ours.special["<|im_end|>"]) == 1


def test_a_dialogue_may_end_with_the_assistant():
    ours = with_markers("chatml")
    tokens = ours.encode_dialogue("\n\nHuman: A\n\nAssistant: B")
    expected = "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB"
    assert ours.decode(tokens) == expected


def test_the_text_between_two_special_tokens_is_encoded_as_one():
    """So BPE can merge a marker's newline with the text after it."""
    ours = with_markers("chatml")
    tokens = ours.encode_dialogue("\n\nHuman: Hi\n\nAssistant:")
    assert tokens == [
        ours.special["<|im_start|>"], *ours.encode_text("user\nHi"), ours.special["<|im_end|>"],
        *ours.encode_text("\n"), ours.special["<|im_start|>"], *ours.encode_text("assistant\n"),
    ]
