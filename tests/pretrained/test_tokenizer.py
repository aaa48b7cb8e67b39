"""pretrained/tokenizer.py: token ids equal those of tokenizer.json; other tokenizers are refused.

Tests that need the libraries tokenizers or transformers skip without them; the others run on files
made here.
"""
import gzip
import json
import shutil
import unicodedata

import pytest
import regex
import torch
from helpers import ROOT
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from config import ConfigError
from data import encode_prompt, encode_row
from formats import dialogue
from formats.dialogue import read_turns
from generate import Sampling, generate
from pretrained import tokenizer, weights
from pretrained.tokenizer import BYTE, GPT2, LLAMA3, QWEN, SYMBOL, TEKKEN
from tokenizer import EOS, Tokenizer

REAL_TEXTS = sorted((ROOT.parent / "shared/data/hh").glob("*.jsonl.gz"))
LETTERS = (
    "  \n\t\r'sdmtrelvSTLLaZé1289!?.-_\u00a0\u3000\u0301ſK½Ⅷ٣中"
    "\x00\x04\x13\u0085\U000f0000😀\u200d\U00011de3"
)
ANY_CHARACTER = st.one_of(st.sampled_from(LETTERS), st.characters(exclude_categories=["Cs"]))
ANY_TEXT = st.text(ANY_CHARACTER, max_size=30)
CHATML = ["<|im_start|>", "<|im_end|>"]
BOS = "<|begin_of_text|>"
SPLIT = {"llama3": LLAMA3, "smollm3": LLAMA3, "qwen": QWEN, "tekken": TEKKEN}
LAST = {  # special tokens behind all others, and tokens that ordinary text may contain
    "gpt2": ([EOS], []),
    "llama3": ([BOS, EOS], []),
    "qwen": ([EOS, *CHATML], ["<tool_call>", "</tool_call>"]),
    "smollm3": ([EOS, *CHATML], ["<think>", "</think>"]),
}


def has_no_marker(text):
    """Hypothesis takes constants of these files, too; only the library finds markers in a text."""
    return "<|" not in text


def saved_and_read(ours):
    """The tokenizer as a run reads it from encoding.json"""
    return Tokenizer.from_json(ours.to_json())


# --------------------------------------------------------------------------------------------------
# Compared with the library tokenizers

@pytest.fixture(params=["gpt2", "smollm2", "llama3", "qwen", "tekken"])
def layout(request):
    return request.param


@pytest.fixture
def theirs(tmp_path, layout, texts):
    """A tokenizer of the library tokenizers in the layout of a known model, saved in tmp_path"""
    return make_theirs(tmp_path, layout, texts)


@pytest.fixture
def ours(tmp_path, theirs):
    return saved_and_read(tokenizer.load(tmp_path, theirs.get_vocab_size() + 3))


def make_theirs(folder, layout, texts):
    tk = pytest.importorskip("tokenizers")
    pre = tk.pre_tokenizers
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=layout not in SPLIT)
    made = tk.Tokenizer(tk.models.BPE(ignore_merges=layout in ("llama3", "smollm3")))
    made.pre_tokenizer = byte_level
    if layout == "smollm2":
        made.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), byte_level])
    elif layout in SPLIT:
        split = pre.Split(tk.Regex(SPLIT[layout]), "isolated")
        made.pre_tokenizer = pre.Sequence([split, byte_level])
    made.decoder = tk.decoders.ByteLevel()
    if layout == "qwen":
        made.normalizer = tk.normalizers.NFC()
    alphabet = pre.ByteLevel.alphabet()
    first = []
    if layout == "smollm2":  # it lacks some bytes
        first = [EOS, *CHATML]
        alphabet = [c for c in alphabet if BYTE[c] not in (4, 6, 0xf1, 0xf3, 0xf4)]
    elif layout == "tekken":
        first = ["<unk>", BOS, EOS, "[INST]", "[/INST]"]
    trainer = tk.trainers.BpeTrainer(
        vocab_size=700, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    special, in_text = LAST.get(layout, ([], []))
    made.add_special_tokens(special)
    made.add_tokens([tk.AddedToken(name, normalized=False) for name in in_text])
    if BOS in [*first, *special]:
        made.post_processor = tk.processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B",
            special_tokens=[(BOS, made.token_to_id(BOS))],
        )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return made


def test_token_ids_are_those_of_the_tokenizers_library(layout, theirs, ours, texts):
    assert bool(ours.missing_bytes) == (layout == "smollm2")
    assert ours.eos == EOS
    assert ours.bos == (BOS if layout in ("llama3", "tekken") else "")
    assert ours.vocab_size == theirs.get_vocab_size() + 3

    def check(text):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode_text(text) == expected, ascii(text)

    @settings(max_examples=1500)
    @given(text=ANY_TEXT)
    @example(text="a\x04b!\x04! \x04")
    @example(text="x  1 22  333   !")
    @example(text="a<tool_call>e\u0301 </tool_call>\u0338 <tool_cal")
    @example(text="e\u0301 \u1e9b\u0323 \u212b \u0344 \uac00\u11a8 \ufb01")
    @example(text="\U00011de3\U00011de4 \U00016ff5")
    @example(text="don'T HTTPServer aǅb ÄÖe\u0301X 中A a//\n /\r\n")
    def on_random_text(text):
        assume(has_no_marker(text))
        check(text)

    on_random_text()
    for text in texts:
        check(text)
    text = "".join(texts[:3])
    assert len(ours.encode_text(text)) < len(text) / 2  # it does merge
    is_same = unicodedata.normalize("NFC", text) if layout == "qwen" else text
    assert ours.decode(ours.encode_text(text)) == is_same
    marked = "a <|endoftext|> b"
    ids = theirs.encode(marked, add_special_tokens=False).ids
    assert ours.encoding.encode(marked, allowed_special="all") == ids
    assert ours.encode_text(marked) != ids


def test_an_exported_tokenizer_is_the_one_it_came_from(tmp_path, theirs, ours, texts):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_json(ours)))
    exported = type(theirs).from_file(str(tmp_path / "tokenizer.json"))

    def check(text):
        assert exported.encode(text).ids == theirs.encode(text).ids, ascii(text)

    @settings(max_examples=500)
    @given(text=ANY_TEXT)
    def on_random_text(text):
        check(text)

    on_random_text()
    for text in texts:
        check(text)
    ids = theirs.encode(texts[-2]).ids
    assert exported.decode(ids) == theirs.decode(ids)
    back = tokenizer.load(tmp_path, ours.vocab_size)
    assert (back.ranks, back.special, back.bos) == (ours.ranks, ours.special, ours.bos)


def test_our_own_tokenizer_is_read_by_the_tokenizers_library(tmp_path, own, texts):
    tk = pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_json(own)))
    theirs = tk.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    @settings(max_examples=1000)
    @given(text=ANY_TEXT)
    def on_random_text(text):
        assume(has_no_marker(text))
        assert theirs.encode(text).ids == own.encode_text(text), ascii(text)

    on_random_text()
    assert theirs.decode(theirs.encode(texts[-3]).ids) == texts[-3]


# --------------------------------------------------------------------------------------------------
# Compared with transformers, which reads some tokenizers by a class of its own

PUBLISHED = {  # layout of tokenizer.json, family and tokenizer_class of models as published
    "SmolLM2": ("smollm2", "Llama", "PreTrainedTokenizerFast"),
    "Llama 3": ("llama3", "Llama", "PreTrainedTokenizerFast"),
    "Qwen2.5": ("qwen", "Qwen2", "Qwen2Tokenizer"),
    "Qwen3": ("qwen", "Qwen3", "Qwen2Tokenizer"),
    "Mistral Nemo": ("tekken", "Mistral", "PreTrainedTokenizerFast"),
    "SmolLM3": ("smollm3", "SmolLM3", "PreTrainedTokenizerFast"),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory, texts):
    """-> a folder with a tokenizer and a random model, and the tokenizer as transformers reads it
    """
    transformers = pytest.importorskip("transformers")
    layout, family, tokenizer_class = PUBLISHED[request.param]
    folder = tmp_path_factory.mktemp("published")
    vocab = make_theirs(folder, layout, texts).get_vocab_size()
    torch.manual_seed(1)
    cfg = getattr(transformers, f"{family}Config")(
        vocab_size=vocab, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        sliding_window=None, no_rope_layers=[1, 1], bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )
    getattr(transformers, f"{family}ForCausalLM")(cfg).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": EOS, "tokenizer_class": tokenizer_class})
    )
    return folder, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def real_texts():
    """The beginnings of a thousand dialogues"""
    found = []
    for path in REAL_TEXTS:
        with gzip.open(path, "rt") as file:
            for line, _ in zip(file, range(1000 // len(REAL_TEXTS))):
                found.append(json.loads(line)["chosen"][:400])
    return found


def test_token_ids_are_those_of_transformers(published, texts, real_texts):
    folder, theirs = published
    ours = saved_and_read(tokenizer.load(folder, len(theirs)))
    bos = [ours.bos_id] if ours.bos else []

    def check(text, ids):
        assert bos + ours.encode_text(text) == ids, ascii(text)

    @settings(max_examples=300)
    @given(text=ANY_TEXT)
    @example(text="e\u0301 \u212b  1 22\u0661 A1b2//\n HTTPServer's <think> <tool_call>")
    def on_random_text(text):
        assume(has_no_marker(text))
        check(text, theirs(text)["input_ids"])

    on_random_text()
    every_text = [*texts, *real_texts]
    for text, ids in zip(every_text, theirs(every_text)["input_ids"], strict=True):
        check(text, ids)
    if REAL_TEXTS:
        assert len(real_texts) == 1000


@torch.no_grad()
def test_greedy_text_is_that_of_transformers(published, texts):
    folder, theirs = published
    import transformers
    their_model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = tokenizer.load(folder, len(theirs))
    prompts = texts[-5:-1]
    greedy = Sampling(max_new_tokens=30, eos_id=ours.eos_id, temperature=0)
    ids = [encode_prompt(ours, prompt, 1000) for prompt in prompts]
    answers = generate(weights.load(folder), ids, greedy, torch.Generator()).tokens.tolist()
    for prompt, answer in zip(prompts, answers):
        inputs = theirs(prompt, return_tensors="pt", return_token_type_ids=False)
        output = their_model.generate(
            **inputs, max_new_tokens=30, do_sample=False, eos_token_id=ours.eos_id,
            pad_token_id=ours.eos_id,
        )
        text = theirs.decode(output[0, inputs.input_ids.shape[1]:])
        assert ours.decode([token for token in answer if token >= 0]) == text
    assert len(set(text)) > 3


# --------------------------------------------------------------------------------------------------
# Without any library

@pytest.fixture(scope="module")
def own_again(tmp_path_factory, write_model, own):
    """The tokenizer `own`, written and read again"""
    _, folder = write_model(tmp_path_factory.mktemp("own") / "out")
    return tokenizer.load(folder, own.vocab_size)


def test_our_own_tokenizer_comes_back_the_same(own, own_again):
    @settings(max_examples=300)
    @given(text=ANY_TEXT)
    def on_random_text(text):
        ids = own.encoding.encode_ordinary(text)
        assert own_again.encode_text(text) == own.encode_text(text) == ids

    on_random_text()
    assert own_again.to_json() == own.to_json()


def test_ids_without_a_token_can_be_sampled_and_shown(tmp_path, write_model, own):
    _, folder = write_model(tmp_path / "out")
    ours = tokenizer.load(folder, 405)
    assert ours.vocab_size == 405
    assert ours.decode([404]) == "<|unused_404|>"
    assert ours.eos_id == own.eos_id


@pytest.mark.parametrize("pattern", tokenizer.SPLITS)
def test_prompt_and_answer_are_split_as_their_whole_text(pattern):
    """An answer begins with a blank, or behind a marker and a line end; else the audit says so."""
    @settings(max_examples=300)
    @given(text=ANY_TEXT)
    @example(text="\n x")
    @example(text="  x")
    def on_random_text(text):
        stripped = text.strip()
        for prompt, answer in (("Assistant:", " " + text), ("user\n", stripped)):
            whole = regex.findall(pattern, prompt + answer)
            assert whole == regex.findall(pattern, prompt) + regex.findall(pattern, answer)

    on_random_text()


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3_SPLIT = {
    "type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False
}
PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL | {"use_regex": True},
    "smollm2": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
    "llama3": {
        "type": "Sequence", "pretokenizers": [LLAMA3_SPLIT, BYTE_LEVEL | {"use_regex": False}]
    },
}


def split_words(layout, text):
    """Split a text as the pre-tokenizer of a layout does."""
    if layout == "llama3":
        return regex.findall(LLAMA3, text)
    parts = regex.split(r"(\p{N})", text) if layout == "smollm2" else [text]
    words = []
    for part in parts:
        words += regex.findall(GPT2, part)
    return words


def merge_by_the_list(table, words):
    """Token ids by a tokenizer.json: of all neighbours in the list of merges the pair that is
    first in it is merged first; unknown bytes vanish."""
    order = {tuple(merge.split(" ")): i for i, merge in enumerate(table["model"]["merges"])}
    ids = table["model"]["vocab"]
    out = []
    for word in words:
        symbols = [SYMBOL[byte] for byte in word.encode()]
        parts = [symbol for symbol in symbols if symbol in ids]
        while True:
            pairs = list(zip(parts, parts[1:]))
            found = [(order[pair], i) for i, pair in enumerate(pairs) if pair in order]
            if not found:
                break
            _, i = min(found)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        out += [ids[part] for part in parts]
    return out


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_token_ids_are_those_of_the_merges_in_the_file(tmp_path, write_model, texts, name):
    """Ids after three special tokens, two bytes unknown, spaces and digits split in three ways."""
    _, folder = write_model(tmp_path / "out")
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    special = [EOS, *CHATML]
    left_out = (EOS, SYMBOL[4], SYMBOL[0xf3])
    words = [word for word in table["model"]["vocab"] if word not in left_out]
    table["added_tokens"] = [
        {"id": i, "content": marker, "special": True} for i, marker in enumerate(special)
    ]
    table["model"]["vocab"] = {word: i for i, word in enumerate(special + words)}
    table["model"]["ignore_merges"] = False
    table["pre_tokenizer"] = PRE_TOKENIZERS[name]
    path.write_text(json.dumps(table))
    ours = saved_and_read(tokenizer.load(folder, 400))
    assert ours.missing_bytes == bytes([4, 0xf3])
    assert ours.eos_id == 0
    assert ours.vocab_size == 400

    def check(text):
        expected = merge_by_the_list(table, split_words(name, text))
        assert ours.encode_text(text) == expected, ascii(text)

    @settings(max_examples=400)
    @given(text=ANY_TEXT.filter(is_old_unicode))
    @example(text="a\x04b!\x04! \x04")
    @example(text="x  1 22  333   !")
    @example(text="3's \U000f0000")
    @example(text="km,\tthey'll \x04")  # a token that only some splits let through
    def on_random_text(text):
        check(text)

    on_random_text()
    for text in texts:
        check(text)
        assert ours.decode(ours.encode_text(text)) == text


def is_old_unicode(text):
    return "\U00011de3" not in text  # a digit to some tables of Unicode only


# --------------------------------------------------------------------------------------------------
# Turns in the markers of a template

def test_turns_in_chatml(with_markers):
    chatml = with_markers("chatml")
    prompt = "\n\nHuman: Hi <|im_end|> you \n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:"
    last_turn = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    text = (
        "<|im_start|>user\nHi <|im_end|> you<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n" + last_turn
    )
    marked = chatml.encoding.encode(text, allowed_special="all")
    ids = encode_prompt(chatml, prompt, 1000)
    assert chatml.decode(ids) == text
    assert ids.count(401) == 3 and marked.count(401) == 4  # the text of a turn is no marker
    row = encode_row(chatml, prompt, (" a", "b "), 1000)
    responses = [chatml.decode(response.tolist()) for response in row.responses]
    assert responses == ["a<|im_end|>", "b<|im_end|>"]
    bare = encode_prompt(chatml, "Why?", 1000)
    assert bare == encode_prompt(chatml, "\n\nHuman: Why?\n\nAssistant:", 1000)
    assert chatml.decode(encode_prompt(chatml, prompt, 30)) == last_turn  # oldest turn removed


def test_a_dialogue_in_chatml_may_end_with_the_assistant(with_markers):
    chatml = with_markers("chatml")
    ids = chatml.encode_dialogue("\n\nHuman: A\n\nAssistant: B")
    assert chatml.decode(ids) == "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB"
    ids = chatml.encode_dialogue("\n\nHuman: <|im_end|>\n\nAssistant:")
    assert chatml.decode(ids).count("<|im_end|>") == 2
    assert ids.count(401) == 1


def test_every_prompt_begins_with_bos(with_markers):
    llama3 = with_markers("llama3")
    expected = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert llama3.decode(encode_prompt(llama3, "Hi", 100)) == expected
    for max_len in range(1, 9):
        ids = encode_prompt(llama3, "\n\nHuman: Hi\n\nAssistant:", max_len)
        assert ids[0] == llama3.bos_id
        assert len(ids) == max_len
        assert llama3.bos_id not in ids[1:]


@pytest.mark.parametrize("template", ["hh", "chatml", "llama3"])
def test_the_chat_template_writes_what_is_trained_on(with_markers, template):
    jinja2 = pytest.importorskip("jinja2")
    ours = with_markers(template)
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    written = jinja.from_string(tokenizer.chat_template(ours))

    def encode(messages, ask):
        text = written.render(
            messages=messages, add_generation_prompt=ask, bos_token=ours.bos, eos_token=ours.eos
        )
        return ours.encoding.encode(text, allowed_special="all")

    contents = ("How long?", "It's 12.", "Really?", "Yes.")
    messages = []
    for role, content in zip(["user", "assistant"] * 2, contents):
        messages.append({"role": role, "content": content})
    prompt = "\n\nHuman: How long?\n\nAssistant: It's 12.\n\nHuman: Really?\n\nAssistant:"
    assert encode(messages[:3], True) == encode_prompt(ours, prompt, 1000)
    row = encode_row(ours, prompt, (" Yes.",), 1000)
    assert encode(messages, False) == [*row.prompt, *row.responses[0]]
    messages.insert(0, {"role": "system", "content": "Be brief."})
    row = encode_row(ours, "\n\nSystem: Be brief." + prompt, (" Yes.",), 1000)
    assert encode(messages, False) == [*row.prompt, *row.responses[0]]


ANY_MESSAGES = st.lists(st.fixed_dictionaries({
    "role": st.sampled_from(["system", "user", "assistant", "tool"]),
    "content": st.text(st.sampled_from(LETTERS), max_size=8),
}), min_size=1, max_size=6)


@pytest.fixture(params=["hh", "chatml", "llama3"])
def chat(request, with_markers):
    """-> a tokenizer, and its chat template as a function of the messages -> text"""
    jinja2 = pytest.importorskip("jinja2")
    ours = with_markers(request.param)
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    written = jinja.from_string(tokenizer.chat_template(ours))

    def refuse(message):
        raise ValueError(message)

    def render(messages, ask=False, tools=None):
        return written.render(
            messages=messages, add_generation_prompt=ask, tools=tools, bos_token=ours.bos,
            eos_token=ours.eos, raise_exception=refuse,
        )

    return ours, render


def test_messages_become_the_tokens_that_are_trained_on_and_scored(chat):
    """Read as a file's are, prompt and answer apart"""
    ours, write = chat

    def encode(messages, ask):
        return ours.encoding.encode(write(messages, ask), allowed_special="all")

    @settings(max_examples=300)
    @given(messages=ANY_MESSAGES)
    @example(messages=[
        {"role": role, "content": " a \n"}
        for role in ("tool", "tool", "system", "user", "system", "assistant", "tool", "assistant")
    ])
    def on_random_messages(messages):
        turns = read_turns(messages, "messages", "here")
        prompt = dialogue.render(turns) + "\n\nAssistant:"
        assert encode(messages, True) == encode_prompt(ours, prompt, 10_000)
        if messages[-1]["role"] == "assistant":
            prompt = dialogue.render(turns[:-1]) + "\n\nAssistant:"
            row = encode_row(ours, prompt, (dialogue.answer_text(turns[-1:]),), 10_000)
            assert encode(messages, False) == [*row.prompt, *row.responses[0]]

    on_random_messages()


def test_the_chat_template_takes_parts_and_names_what_it_cannot_say(chat):
    _, write = chat
    whole = {"role": "user", "content": "How long is it?"}
    parts = [{"type": "text", "text": "How long "}, {"type": "text", "text": "is it?"}]
    assert write([{"role": "user", "content": parts}], True) == write([whole], True)
    picture = [{"type": "image", "url": "x"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "measure"}]}
    refused = [
        ({"role": "critic", "content": "no"}, "of role critic cannot be written; the roles are us"),
        ({"role": "user", "content": picture}, "a part of type image cannot be written, only text"),
        ({"role": "assistant", "content": None}, "a message of role assistant has no content"),
        ({"role": "assistant"}, "a message of role assistant has no content"),
        (call, "tool_calls cannot be written"),
    ]
    for message, reason in refused:
        with pytest.raises(ValueError, match=reason):
            write([whole, message])
    with pytest.raises(ValueError, match="tools cannot be written"):
        write([whole], tools=[{"name": "measure"}])
    assert write([whole], tools=[]) == write([whole])


def test_a_template_sets_eos_and_needs_its_markers(tmp_path, with_markers):
    chatml = with_markers("chatml")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_json(chatml)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    assert tokenizer.load(tmp_path, 402).eos == EOS
    ours = tokenizer.load(tmp_path, 402, "chatml")
    assert (ours.eos, ours.template) == ("<|im_end|>", "chatml")
    with pytest.raises(ConfigError) as error:
        tokenizer.load(tmp_path, 402, "llama3")
    message = str(error.value)
    assert message.startswith("data.template = 'llama3'")
    assert "<|start_header_id|>" in message and "data.template=hh" in message


# --------------------------------------------------------------------------------------------------
# Refused, in one line

def model_change(**changes):
    def apply(table):
        table["model"].update(changes)
    return apply


def vocab_change(**words):
    def apply(table):
        table["model"]["vocab"].update(words)
    return apply


def new_merge(merge):
    def apply(table):
        table["model"]["merges"].append(merge)
    return apply


def new_special(**token):
    def apply(table):
        table["added_tokens"].append(token)
    return apply


def split_step(i, **changes):
    def apply(table):
        table["pre_tokenizer"]["pretokenizers"][i].update(changes)
    return apply


def repeated_merge(table):
    merges = table["model"]["merges"]
    merges.append(merges[0])


def exchanged_merges(table):
    merges = table["model"]["merges"]
    merges[3], merges[9] = merges[9], merges[3]


def exchanged_ids(table):
    vocab = table["model"]["vocab"]
    left, right = [word for word in vocab if len(word) > 1][5:7]
    vocab[left], vocab[right] = vocab[right], vocab[left]


def a_merge_too_few(table):
    table["model"]["merges"].pop(30)


def used_unknown_token(table):
    table["model"]["unk_token"] = EOS
    del table["model"]["vocab"]["ÿ"]


def special_eats_blanks(table):
    table["added_tokens"][0]["lstrip"] = True


EOS_AFTER_TEXT = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": EOS}}],
}
UNKNOWN_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
}
NO_STEPS = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}
FOREIGN = {  # change of tokenizer.json, parts of the message
    "unigram": (model_change(type="Unigram"), "Unigram"),
    "no model": ({"model": None}, "tokenizer.json"),
    "byte fallback": (model_change(byte_fallback=True), "byte_fallback", "Llama 2"),
    "normalizer": ({"normalizer": {"type": "NFKC"}}, "normalizer", "NFKC"),
    "metaspace": ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "pre_tokenizer"),
    "another split": (split_step(0, pattern={"Regex": "(a+)+b"}), "(a+)+b"),
    "removed, not isolated": (split_step(0, behavior="Removed"), "Removed"),
    "inverted": (split_step(0, invert=True), "pre_tokenizer", "True"),
    "split twice": (split_step(1, use_regex=True), "pre_tokenizer"),
    "prefix space": (split_step(1, add_prefix_space=True), "add_prefix_space"),
    "nothing in sequence": (NO_STEPS, "pre_tokenizer"),
    "after the text": ({"post_processor": EOS_AFTER_TEXT}, "post_processor"),
    "an unknown token before it": ({"post_processor": UNKNOWN_BOS}, "post_processor", "<s>"),
    "bert": ({"post_processor": {"type": "BertProcessing"}}, "post_processor"),
    "dropout": (model_change(dropout=0.1), "dropout"),
    "subword prefix": (model_change(continuing_subword_prefix="##"), "##"),
    "a word that is no bytes": (vocab_change(**{"▁the": 398}), "bytes"),
    "an id twice": (vocab_change(ĠqqĠ=17), "same id"),
    "an id too high": (vocab_change(ĠqqĠ=10 ** 9), "vocab_size"),
    "an id below zero": (vocab_change(ĠqqĠ=-1), "vocab_size"),
    "half a character": (new_special(id=3, content="\ud800", special=True), "not valid text"),
    "a token without end": (vocab_change(**{"a" * 100_000: 398}), "1,024"),
    "no tokens": (model_change(vocab={}, merges=[]), "no tokens of text"),
    "vocab as a list": (model_change(vocab=[["a", 0]]), "vocab"),
    "merges out of order": (exchanged_merges, "order of the ids"),
    "ids out of order": (exchanged_ids, "order of the ids"),
    "a merge too few": (a_merge_too_few, "order of the ids"),
    "a merge of three": (new_merge("a b c"), "merge"),
    "a merge into nothing": (new_merge("Ċ !"), "merge"),
    "a merge twice": (repeated_merge, "merge"),
    "a merge of numbers": (new_merge([1, 2]), "merge"),
    "an unknown token that is used": (used_unknown_token, "unk_token"),
    "an added token in the place of another": (
        new_special(id=3, content="<think>", special=False), "same id"
    ),
    "an added token of normalised text": (
        new_special(id=398, content="é", special=False, normalized=True), "normalised text"
    ),
    "an added token that eats blanks": (special_eats_blanks, "lstrip"),
    "an added token without an id": (new_special(content="x", special=True), "no id"),
}


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory, write_model):
    return write_model(tmp_path_factory.mktemp("base") / "sound")[1]


@pytest.fixture
def folder(sound_folder, tmp_path):
    shutil.copytree(sound_folder, tmp_path / "base")
    return tmp_path / "base"


def check_refused(folder, parts, vocab=400):
    with pytest.raises(ConfigError) as error:
        tokenizer.load(folder, vocab)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    assert str(folder) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", FOREIGN)
def test_a_tokenizer_that_cannot_be_read_exactly_is_refused(folder, edit, name):
    change, *parts = FOREIGN[name]
    edit(folder / "tokenizer.json", change)
    check_refused(folder, parts)


def test_a_missing_or_cut_tokenizer_is_refused(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:3000])
    check_refused(folder, ["tokenizer.json", "JSON"])
    path.unlink()
    check_refused(folder, ["tokenizer.json", "no such file"])


def test_a_vocabulary_much_larger_than_the_tokenizer_is_refused(folder):
    check_refused(folder, ["400 tokens are too few for vocab_size = 100,000"], vocab=100_000)


def test_a_special_token_may_have_the_name_of_one_that_is_not_used(folder, edit):
    edit(folder / "tokenizer.json", new_special(id=401, content="<|unused_400|>", special=True))
    loaded = tokenizer.load(folder, 402)
    assert loaded.vocab_size == 402 and loaded.special["<|unused_400|>"] == 401
    assert 400 in loaded.special.values()


def test_eos_comes_from_one_of_two_files_and_must_be_a_special_token(folder, edit):
    edit(folder / "tokenizer_config.json", {"eos_token": {"content": EOS}})
    assert tokenizer.load(folder, 400).eos == EOS
    edit(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    check_refused(folder, ["</s>", "eos_token"])
    edit(folder / "tokenizer_config.json", {"eos_token": None})
    edit(folder / "config.json", {"eos_token_id": 399})
    assert tokenizer.load(folder, 400).eos == EOS
    edit(folder / "config.json", {"eos_token_id": [399, 5]})
    check_refused(folder, ["eos_token_id = [399, 5]", "must be ids of special tokens"])
    edit(folder / "config.json", {"eos_token_id": [10 ** 6]})
    edit(folder / "tokenizer.json", no_special_tokens)
    check_refused(folder, ["end of a text"])


def test_the_first_of_several_ends_is_written_and_all_end_an_answer(folder, edit):
    edit(folder / "tokenizer.json", new_special(id=400, content="<|im_end|>", special=True))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [400, 399]}))
    ours = saved_and_read(tokenizer.load(folder, 401))
    assert (ours.eos, ours.more_eos, ours.end_ids) == ("<|im_end|>", (EOS,), [400, 399])
    row = encode_row(ours, "\n\nHuman: A\n\nAssistant:", (" B",), 64)
    assert row.responses[0][-1] == 400


def no_special_tokens(table):
    table["added_tokens"].clear()
    del table["model"]["vocab"][EOS]
