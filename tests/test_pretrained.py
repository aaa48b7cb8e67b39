"""Directories of pretrained models: read, tokenised, trained from, written; refused where they cannot be.

What needs transformers or tokenizers skips without them; the rest runs everywhere, on directories made here.
"""
import functools
import glob
import gzip
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import regex
import torch
from hypothesis import example, given, settings, strategies as st
from safetensors.torch import load_file, save_file

import config as configuration
import data
import files
import plan
import pretrained
import sample as talk
import tokenizer
import train
from config import ConfigError
from data import collate
from helpers import ROOT, SMALL, go, one_line, same, tensors, tiny, tiny_reward
from model import LanguageModel, RewardModel, Shape, sample
from run import load_model
from tokenizer import GPT2, LLAMA3

REAL = sorted(glob.glob(str(ROOT.parent / "shared/data/hh/*.jsonl.gz")))
TEXTS = [f"\n\nHuman: How long is the river number {i}, really?\n\nAssistant: It's {i * i} km long,\tthey'll say.\n" for i in range(60)] + [
    "  indented   code:\r\n\r\n    x = 12345;  y += 6.78", "Überraschung: naïve café, 北京 2024年, привет мир, e\u0301, 😀👍🏽", "WE'LL THEY'RE don'T", "\u00a0\u3000\u2003 blanks"]
LAYOUTS = {"tied": dict(tie_word_embeddings=True), "untied": {}, "grouped": dict(num_key_value_heads=2), "one key head": dict(num_key_value_heads=1),
           "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 100000.0}), "eps": dict(rms_norm_eps=1e-3), "head_dim": dict(head_dim=24, num_key_value_heads=2),
           "llama3": dict(max_position_embeddings=256, rope_parameters={
               "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32})}
LLAMA3_SCALING = (8.0, 1.0, 4.0, 32.0)


@functools.cache
def encoding():
    return data.train_tokenizer(TEXTS, 400)


def model_and_folder(folder, kind=LanguageModel, **changes):
    model = tiny(kind, **{"vocab": encoding().n_vocab, "tied": False, "kv_heads": 2} | changes)
    pretrained.save(folder, model, encoding())
    return model, Path(folder)


def edit(path, change):
    """change: a function of the JSON, or a dictionary that is put over it (None: taken out)"""
    value = json.loads(path.read_text())
    if isinstance(change, dict):
        value = {k: v for k, v in (value | change).items() if v is not ...}
    else:
        change(value)
    path.write_text(json.dumps(value))


def close(a, b, tolerance):
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("kind", [LanguageModel, RewardModel])
@pytest.mark.parametrize("changes", [dict(), dict(tied=True), dict(head=6), dict(rope_theta=5e5, rope_scaling=LLAMA3_SCALING, norm_eps=1e-4)], ids=str)
def test_what_is_written_is_read_again(tmp_path, kind, changes):
    model, folder = model_and_folder(tmp_path / "out", kind, **changes)
    again = pretrained.load(folder, kind)
    grown = kind is RewardModel  # by the padding's embedding
    assert again.shape == replace(model.shape, dropout=0.0, vocab=model.shape.vocab + grown)
    ours, theirs = model.state_dict(), again.state_dict()
    if grown:
        table = theirs["model.embed_tokens.weight"]
        assert (table[-1] == 0).all()
        theirs["model.embed_tokens.weight"] = table[:-1]
    assert same(ours, theirs) and all(t.dtype == torch.float32 for t in theirs.values())
    assert not changes.get("tied") or grown or again.lm_head.weight is again.model.embed_tokens.weight
    assert not list(tmp_path.glob("*.part"))
    pretrained.save(folder, model, encoding())  # over itself
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_a_token_for_padding_that_is_there_is_taken(tmp_path):
    e = data.make_encoding(encoding()._pat_str, encoding()._mergeable_ranks, {data.END: 399, "<|pad|>": 400})
    for end, pad, rows in ((data.END, "<|pad|>", 401), ("<|pad|>", "<<|pad|>>", 402)):
        e.end = end
        pretrained.save(tmp_path / "out", tiny_reward(vocab=401), e)
        c, t = (json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
        assert (c["vocab_size"], c["pad_token_id"], t["pad_token"], t["eos_token"]) == (rows, rows - 1, pad, end) and c["eos_token_id"] != c["pad_token_id"]


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    model, folder = model_and_folder(tmp_path / "out")
    before = (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="cannot be written .No space left"):
        pretrained.save(folder, tiny(seed=1, vocab=400, tied=False), encoding())
    assert (folder / "model.safetensors").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_shards_half_precision_and_old_files_are_read(tmp_path):
    model, folder = model_and_folder(tmp_path / "out")
    state = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as in old files
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    where = {n: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: state[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    again = pretrained.load(folder)
    assert same({n: t.bfloat16().float() for n, t in model.state_dict().items()}, again.state_dict())


def test_a_tied_model_may_keep_its_output_matrix_if_it_is_the_same(tmp_path):
    model, folder = model_and_folder(tmp_path / "out", tied=True)
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert same(model.state_dict(), pretrained.load(folder).state_dict())
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="lm_head.weight differs"):
        pretrained.load(folder)


def test_both_spellings_of_rope_mean_the_same(tmp_path):
    _, folder = model_and_folder(tmp_path / "out", rope_theta=5e5, rope_scaling=LLAMA3_SCALING)
    older = pretrained.shape_of(folder)
    assert older.rope_theta == 5e5 and older.rope_scaling == LLAMA3_SCALING
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    edit(folder / "config.json", {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": scaling | {"rope_theta": 5e5}})
    assert pretrained.shape_of(folder) == older
    edit(folder / "config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}})
    assert pretrained.shape_of(folder) == replace(older, rope_theta=123.0, rope_scaling=())
    edit(folder / "config.json", {"rope_parameters": ...})
    assert pretrained.shape_of(folder).rope_theta == 10_000


def test_rope_scaling_by_its_three_cases():
    shape = Shape(24, width=128, heads=2, rope_theta=500.0, rope_scaling=LLAMA3_SCALING)
    factor, low, high, context = LLAMA3_SCALING
    cos, _ = LanguageModel(shape).model.rope(torch.tensor([[1]]))
    cases = set()
    for i in range(32):
        f = 500.0 ** -(i / 32)
        length = 2 * math.pi / f
        if length < context / high:
            expected, case = f, "fast"
        elif length > context / low:
            expected, case = f / factor, "slow"
        else:
            smooth = (context / length - low) / (high - low)
            expected, case = (1 - smooth) * f / factor + smooth * f, "between"
        cases.add(case)
        assert cos[0, 0, i].item() == pytest.approx(math.cos(expected), abs=1e-6)
    assert cases == {"fast", "slow", "between"}


def test_a_shape_of_an_older_checkpoint_can_be_read():
    old = {k: v for k, v in asdict(tiny().shape).items() if k not in ("head", "rope_scaling")}
    assert Shape(**old) == tiny().shape and Shape(**old).head_width == 8


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_and_greedy_answers_are_those_of_transformers(tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = dict(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128, initializer_range=0.2)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | LAYOUTS[layout])).eval()
    for p in theirs.parameters():
        if p.dim() == 1:
            p.copy_(0.5 + torch.rand(p.shape))
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if layout == "grouped" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "grouped")
    ours = pretrained.load(tmp_path)
    ids = torch.randint(100, (3, 120))
    logits = theirs(ids).logits
    assert logits.std() > 0.5
    close(ours(ids), logits, 1e-4)
    prompts = [ids[i, :n].tolist() for i, n in enumerate((5, 17, 1))]
    drawn = sample(ours, prompts, 40, 7, torch.Generator().manual_seed(0), temperature=0)
    for prompt, answer in zip(prompts, drawn.tokens.tolist()):
        one = torch.tensor([prompt])
        out = theirs.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=40, do_sample=False, eos_token_id=7, pad_token_id=0)[0, len(prompt):].tolist()
        assert [t for t in answer if t >= 0] == out
    if layout == "llama3":
        assert not torch.allclose(pretrained.load(tmp_path, rope_scaling=())(ids), logits, atol=0.01)


@pytest.mark.parametrize("changes", [dict(), dict(tied=True), dict(head=6), dict(rope_theta=5e5, rope_scaling=LLAMA3_SCALING)], ids=str)
@torch.no_grad()
def test_transformers_reads_what_is_written(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    policy, _ = model_and_folder(tmp_path / "policy", **changes)
    reward, _ = model_and_folder(tmp_path / "reward", RewardModel, **changes)
    ids = torch.randint(400, (3, 50))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert type(theirs) is transformers.LlamaForCausalLM
    close(policy(ids), theirs(ids).logits, 1e-4)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert type(theirs) is transformers.LlamaForSequenceClassification
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "reward")
    texts = [("\n\nHuman: How long?\n\nAssistant:", " It's 12 km long."), ("\n\nHuman: A?\n\nAssistant: B\n\nHuman: Really, C 123?\n\nAssistant:", " no")]
    batch = collate(rows := [data.encode(encoding(), prompt, (answer,), 200) for prompt, answer in texts])
    scores = reward(*batch[:3], read=batch.last)[:, 0]
    assert (scores[0] - scores[1]).abs() > 1e-3
    given = tokenizer([p + a + tokenizer.eos_token for p, a in texts], return_tensors="pt", padding=True)
    assert given.input_ids[0, :len(rows[0])].tolist() == [*rows[0].prompt, *rows[0].responses[0]]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        given = tokenizer([p + a + tokenizer.eos_token for p, a in texts], return_tensors="pt", padding=True)
        close(theirs(input_ids=given.input_ids, attention_mask=given.attention_mask).logits[:, 0], scores, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

LETTERS = "  \n\t\r'sdmtrelvSTLLaZé1289!?.-_\u00a0\u3000\u0301ſK½Ⅷ٣中\x00\x04\x13\u0085\U000f0000😀\u200d\U00011de3"
ANY = st.text(st.one_of(st.sampled_from(LETTERS), st.characters(exclude_categories=["Cs"])), max_size=30)


def made(folder, name, **change):
    """A tokenizer.json by the tokenizers library, in the layout of a known model -> its own view, the folder"""
    tk = pytest.importorskip("tokenizers")
    p, kinds = tk.pre_tokenizers, {"gpt2": [], "smollm2": [tk.pre_tokenizers.Digits(individual_digits=True)], "llama3": [tk.pre_tokenizers.Split(tk.Regex(LLAMA3), "isolated")]}
    theirs = tk.Tokenizer(tk.models.BPE(ignore_merges=name == "llama3"))
    level = p.ByteLevel(add_prefix_space=False, use_regex=name != "llama3")
    theirs.pre_tokenizer = p.Sequence([*kinds[name], level]) if kinds[name] else level
    theirs.decoder = tk.decoders.ByteLevel()
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if name == "smollm2" else []  # before all others, so that ids are shifted
    alphabet = [c for c in p.ByteLevel.alphabet() if name != "smollm2" or tokenizer.BYTE[c] not in (4, 6, 0xf1, 0xf3, 0xf4)]
    theirs.train_from_iterator(TEXTS, tk.trainers.BpeTrainer(vocab_size=700, special_tokens=first, initial_alphabet=alphabet, show_progress=False))
    theirs.add_special_tokens({"gpt2": ["<|endoftext|>"], "llama3": ["<|begin_of_text|>", "<|endoftext|>"], "smollm2": []}[name])
    if name == "llama3":
        begin = ("<|begin_of_text|>", theirs.token_to_id("<|begin_of_text|>"))
        theirs.post_processor = tk.processors.TemplateProcessing(single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin])
    theirs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return theirs, folder


def pair_of_tokenizers(folder, name):
    theirs, folder = made(folder, name)
    return theirs, data.encoding_from_json(data.encoding_to_json(tokenizer.load(folder, theirs.get_vocab_size() + 3)))


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "llama3"])
def test_token_ids_are_those_of_the_tokenizers_library(tmp_path, name):
    theirs, ours = pair_of_tokenizers(tmp_path, name)
    assert bool(ours.lacking) == (name == "smollm2") and ours.end == "<|endoftext|>" and ours.begin == ("<|begin_of_text|>" if name == "llama3" else "")
    assert ours.n_vocab == theirs.get_vocab_size() + 3
    check = lambda text: data.ordinary(ours, text) == theirs.encode(text, add_special_tokens=False).ids

    @settings(max_examples=1500)
    @given(text=ANY)
    @example(text="a\x04b!\x04! \x04")
    @example(text="x  1 22  333   !")
    @example(text="\U00011de3\U00011de4 \U00016ff5")
    def on_random_text(text):
        assert check(text), ascii(text)
    on_random_text()
    assert all(map(check, TEXTS))
    text = "".join(TEXTS[:3])
    assert len(data.ordinary(ours, text)) < len(text) / 2  # it does merge
    assert ours.decode(data.ordinary(ours, text)) == text
    marked = "a <|endoftext|> b"
    assert ours.encode(marked, allowed_special="all") == theirs.encode(marked, add_special_tokens=False).ids != data.ordinary(ours, marked)


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "llama3"])
def test_an_exported_tokenizer_is_the_one_it_came_from(tmp_path, name):
    theirs, ours = pair_of_tokenizers(tmp_path, name)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_json(ours, ours._special_tokens)))
    again = type(theirs).from_file(str(tmp_path / "tokenizer.json"))
    check = lambda text: again.encode(text).ids == theirs.encode(text).ids

    @settings(max_examples=500)
    @given(text=ANY)
    def on_random_text(text):
        assert check(text), ascii(text)
    on_random_text()
    assert all(map(check, TEXTS)) and again.decode(again.encode(TEXTS[-2]).ids) == theirs.decode(theirs.encode(TEXTS[-2]).ids)
    back = tokenizer.load(tmp_path, ours.n_vocab)
    assert (back._mergeable_ranks, back._special_tokens, back.begin) == (ours._mergeable_ranks, ours._special_tokens, ours.begin)


@settings(max_examples=300)
@given(text=ANY)
def test_our_own_tokenizer_comes_back_the_same(text):
    again = own_again()
    assert data.ordinary(again, text) == data.ordinary(encoding(), text) == encoding().encode_ordinary(text)


@functools.cache
def own_again(folder=None):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        _, path = model_and_folder(f"{folder}/out")
        return tokenizer.load(path, encoding().n_vocab)


def test_our_own_tokenizer_is_read_by_the_tokenizers_library(tmp_path):
    tk = pytest.importorskip("tokenizers")
    _, folder = model_and_folder(tmp_path / "out")
    theirs = tk.Tokenizer.from_file(str(folder / "tokenizer.json"))

    @settings(max_examples=1000)
    @given(text=ANY)
    def on_random_text(text):
        assert theirs.encode(text).ids == encoding().encode_ordinary(text), ascii(text)
    on_random_text()
    assert theirs.decode(theirs.encode(TEXTS[-3]).ids) == TEXTS[-3]


@pytest.mark.skipif(not REAL, reason="the files of HH-RLHF are not there")
def test_a_thousand_real_texts_have_the_same_ids(tmp_path):
    theirs, ours = pair_of_tokenizers(tmp_path, "smollm2")
    texts = []
    for path in REAL:
        with gzip.open(path, "rt") as file:
            texts += [json.loads(line)["chosen"] for line, _ in zip(file, range(1000 // len(REAL)))]
    assert len(texts) >= 900
    assert all(data.ordinary(ours, text) == theirs.encode(text).ids for text in texts)


def test_ids_that_no_token_has_can_be_said_and_shown(tmp_path):
    _, folder = model_and_folder(tmp_path / "out")
    ours = tokenizer.load(folder, 405)
    assert ours.n_vocab == 405 and ours.decode([404]) == "<|unused_404|>" and data.end_id(ours) == data.end_id(encoding())


LAYOUT = {  # pre-tokenizer, and how it cuts
    "gpt2": ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, lambda text: regex.findall(GPT2, text)),
    "smollm2": ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]},
                lambda text: [piece for part in regex.split(r"(\p{N})", text) if part for piece in regex.findall(GPT2, part)]),
    "llama3": ({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
                                                      {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}, lambda text: regex.findall(LLAMA3, text))}


def by_the_book(t, pieces):
    """Token ids by a tokenizer.json: of all neighbours in the list of merges, the pair that stands first in it is merged first; unknown bytes vanish."""
    order, ids = {tuple(m.split(" ")): i for i, m in enumerate(t["model"]["merges"])}, t["model"]["vocab"]
    for piece in pieces:
        parts = [s for s in (tokenizer.SYMBOL[b] for b in piece.encode()) if s in ids]
        while here := [(order[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in order]:
            _, i = min(here)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        yield from (ids[part] for part in parts)


@pytest.mark.parametrize("layout", LAYOUT)
def test_token_ids_are_those_of_the_merges_in_the_file(tmp_path, layout):
    """Without any library: ids after three special tokens, two bytes unknown, spaces and digits cut in each of three ways."""
    _, folder = model_and_folder(tmp_path / "out")
    t = json.loads((folder / "tokenizer.json").read_text())
    names = [data.END, "<|im_start|>", "<|im_end|>"]
    words = [w for w in t["model"]["vocab"] if w != data.END and w not in (tokenizer.SYMBOL[4], tokenizer.SYMBOL[0xf3])]
    t["added_tokens"] = [{"id": i, "content": name, "special": True} for i, name in enumerate(names)]
    t["model"] |= {"vocab": {word: i for i, word in enumerate(names + words)}, "ignore_merges": False}
    t["pre_tokenizer"] = LAYOUT[layout][0]
    (folder / "tokenizer.json").write_text(json.dumps(t))
    ours = data.encoding_from_json(data.encoding_to_json(tokenizer.load(folder, 400)))
    assert ours.lacking == bytes([4, 0xf3]) and data.end_id(ours) == 0 and ours.n_vocab == 400

    @settings(max_examples=400)
    @given(text=ANY.filter(lambda text: "\U00011de3" not in text))  # a digit to some tables of Unicode only
    @example(text="a\x04b!\x04! \x04")
    @example(text="x  1 22  333   !")
    @example(text="3's \U000f0000")
    @example(text="km,\tthey'll \x04")  # a token that only some cuts let through
    def on_random_text(text):
        assert data.ordinary(ours, text) == list(by_the_book(t, LAYOUT[layout][1](text))), ascii(text)
    on_random_text()
    for text in TEXTS:
        assert data.ordinary(ours, text) == list(by_the_book(t, LAYOUT[layout][1](text)))
        assert ours.decode(data.ordinary(ours, text)) == text


# ---------------------------------------------------------------------------------------------------------------------
# Turns

def marked(template):
    """A trained tokenizer that has the markers of a template"""
    names = {"chatml": ["<|im_start|>", "<|im_end|>"], "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]}[template]
    special = {data.END: 399, **{n: 400 + i for i, n in enumerate(names)}}
    begin = "<|begin_of_text|>" if template == "llama3" else ""
    return data.make_encoding(LLAMA3 if begin else encoding()._pat_str, encoding()._mergeable_ranks, special, data.TEMPLATES[template][1], begin, template)


def test_turns_in_chatml():
    e = marked("chatml")
    prompt = "\n\nHuman: Hi <|im_end|> you \n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:"
    text = "<|im_start|>user\nHi <|im_END|> you<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    expected = e.encode(text.replace("END", "end"), allowed_special="all")
    got = data.encode_prompt(e, prompt, 1000)
    assert e.decode(got) == text.replace("END", "end")
    assert got.count(401) == 3 and expected.count(401) == 4  # what a person says is no marker
    row = data.encode(e, prompt, (" a", "b "), 1000)
    assert [e.decode(r.tolist()) for r in row.responses] == ["a<|im_end|>", "b<|im_end|>"]
    assert data.encode_prompt(e, "Why?", 1000) == data.encode_prompt(e, "\n\nHuman: Why?\n\nAssistant:", 1000)
    assert e.decode(data.encode_prompt(e, prompt, 30)) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"  # the oldest turn is gone
    assert e.decode(data.dialogue(e, "\n\nHuman: A\n\nAssistant: B")) == "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB"
    assert e.decode(data.dialogue(e, "\n\nHuman: <|im_end|>\n\nAssistant:")).count("<|im_end|>") == 2 and data.dialogue(e, "\n\nHuman: <|im_end|>\n\nAssistant:").count(401) == 1


def test_every_prompt_begins_with_the_token_that_begins_a_text():
    e = marked("llama3")
    begin = e._special_tokens["<|begin_of_text|>"]
    assert e.decode(data.encode_prompt(e, "Hi", 100)) == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    for room in range(1, 9):
        tokens = data.encode_prompt(e, "\n\nHuman: Hi\n\nAssistant:", room)
        assert tokens[0] == begin and len(tokens) == room and begin not in tokens[1:]


@pytest.mark.parametrize("template", ["hh", "chatml", "llama3"])
def test_the_exported_chat_template_writes_what_is_trained_on(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    e = encoding() if template == "hh" else marked(template)
    pretrained.save(tmp_path / "out", tiny(vocab=e.n_vocab), e)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": r, "content": c} for r, c in (("user", "How long?"), ("assistant", "It's 12."), ("user", "Really?"), ("assistant", "Yes."))]
    prompt = "\n\nHuman: How long?\n\nAssistant: It's 12.\n\nHuman: Really?\n\nAssistant:"
    ask = lambda m, **more: theirs.apply_chat_template(m, return_dict=False, **more)
    assert ask(messages[:3], add_generation_prompt=True) == data.encode_prompt(e, prompt, 1000)
    row = data.encode(e, prompt, (" Yes.",), 1000)
    assert ask(messages) == [*row.prompt, *row.responses[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Runs

FROM = [s for s in SMALL if "model" not in s] + ["--model.context=192", "--sft.epochs=0"]


def world_folder(folder, vocab=400):
    import world
    e = data.train_tokenizer((d["prompt"] + d["response"] for d in world.demonstrations(200, 0, 0.5)), vocab)
    model = tiny(vocab=e.n_vocab, context=256, tied=True, kv_heads=2)
    pretrained.save(folder, model, e)
    return model, e


def test_a_run_from_a_folder_and_its_export(tmp_path, capsys):
    model, e = world_folder(tmp_path / "base")
    out, init = tmp_path / "run", f"--model.init={tmp_path / 'base'}"
    assert go(out, init, small=FROM) == 0
    assert same(tensors(out, "sft"), model.state_dict())
    assert files.load_tensors(out / "sft.pt")["shape"] == asdict(replace(model.shape, context=192))
    saved = json.loads((out / "stages/sft.json").read_text())["config"]["model"]
    assert (saved["layers"], saved["width"], saved["vocab"], saved["hidden"], saved["context"]) == (3, 32, 400, 40, 192)
    assert not same(tensors(out, "policy_flip"), tensors(out, "sft")) and json.loads((out / "results.json").read_text())
    assert not (out / "export").exists()
    assert go(out, init, "--stage=export", small=FROM) == 0
    assert sorted(p.name for p in (out / "export").iterdir()) == ["policy_flip", "reward_baseline", "reward_flip", "sft"]
    assert same(pretrained.load(out / "export/policy_flip").state_dict(), tensors(out, "policy_flip"))
    assert torch.equal(pretrained.load(out / "export/reward_flip", RewardModel).score.weight, tensors(out, "reward_flip")["score.weight"])
    again = tokenizer.load(out / "export/reward_flip", 401)
    assert again._mergeable_ranks == e._mergeable_ranks and again.end == e.end
    capsys.readouterr()
    assert go(out, init, small=FROM) == 0 and "sft: up to date" in capsys.readouterr().out
    weights = load_file(tmp_path / "base/model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "base/model.safetensors")
    assert go(out, init, "--stage=sft", small=FROM) == 0
    assert "contents of model.init" in capsys.readouterr().out
    assert not same(tensors(out, "sft"), model.state_dict())
    assert go(out, init, "--stage=export", small=FROM) == 0
    assert "policy_flip is left out (again" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "base")  # who only asks a finished run needs it no more
    run, policy, reward = talk.open_finished(str(out))
    text, value, _ = talk.answer(run, *(load_model(run, kind, name) for kind, name in ((LanguageModel, policy), (RewardModel, reward))), talk.in_form("How long?"), 0)
    assert text and math.isfinite(value)


def test_export_needs_something_to_export(tmp_path, capsys):
    assert go(tmp_path / "run", "--stage=export") == 2
    one_line(capsys, "--stage=export", "has no model")


def test_what_a_run_from_scratch_depends_on_has_not_changed():
    depends = plan.dependencies(configuration.Config())
    assert {"contents of model.init", "data.template"} & {k for d in depends.values() for k in d} == set()
    assert [u for u in depends if not u.startswith(("member", "reward", "policy"))] == ["tokenizer", "audit", "sft", "strength", "evaluate"]


def test_sampled_bytes_of_the_weights_stand_for_the_whole(tmp_path):
    world_folder(tmp_path / "base")
    before = pretrained.digest(str(tmp_path / "base"))
    assert pretrained.digest(str(tmp_path / "base")) == before
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        path = tmp_path / "base" / name
        old = path.read_bytes()
        path.write_bytes(old[:-2] + bytes([old[-2] ^ 1]) + old[-1:])
        assert (pretrained.digest(str(tmp_path / "base")) != before) == (name != "model.safetensors" or len(old) < 64 * 4096)
        path.write_bytes(old)


def test_a_hub_name_without_the_hub_says_how(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    assert go(tmp_path / "run", "--model.init=Some-One/Model-1B", small=FROM) == 2
    one_line(capsys, "hf download Some-One/Model-1B", "huggingface_hub is not installed")
    for name in ("nowhere", "../up/there", "a/b/c", "/no/such"):
        assert go(tmp_path / "run", f"--model.init={name}", small=FROM) == 2
        one_line(capsys, "no such folder", "OWNER/NAME")


def test_a_hub_name_is_fetched_once(tmp_path, capsys, monkeypatch):
    world_folder(tmp_path / "base")
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            asked.append(name)
            return str(tmp_path / "base")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", Hub)
    assert go(tmp_path / "run", "--model.init=Some-One/Model-3B", "--stage=sft", small=FROM) == 0
    assert same(tensors(tmp_path / "run", "sft"), pretrained.load(tmp_path / "base").state_dict()) and asked == ["Some-One/Model-3B"]


def test_a_hub_that_does_not_answer_says_how(tmp_path, capsys, monkeypatch):
    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            assert name == "Some-One/Model-2B" and "*.safetensors" in allow_patterns
            raise ConnectionError("no network\nat all")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", Hub)
    assert go(tmp_path / "run", "--model.init=Some-One/Model-2B", small=FROM) == 2
    one_line(capsys, "cannot be fetched", "ConnectionError", "hf download")


# ---------------------------------------------------------------------------------------------------------------------
# Refused, in one line

def config(**change):
    return lambda folder: edit(folder / "config.json", change)


def tokens(change):
    return lambda folder: edit(folder / "tokenizer.json", change)


def weights(change):
    def apply(folder):
        state = load_file(folder / "model.safetensors")
        save_file(change(state) or state, folder / "model.safetensors")
    return apply


def cut(name, n):
    def apply(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:n] if n >= 0 else b"")
    return apply


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def index(content):
    def apply(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return apply


def moved(t):
    """Two merges exchanged, so that their order is no longer that of the ids"""
    m = t["model"]["merges"]
    m[3], m[9] = m[9], m[3]


def swapped_ids(t):
    v = t["model"]["vocab"]
    a, b = [w for w in v if len(w) > 1][5:7]
    v[a], v[b] = v[b], v[a]


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 32}
BROKEN = {
    "another model": (config(model_type="mistral", architectures=["MistralForCausalLM"]), "mistral"),
    "a reward model": (config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    "no architecture": (config(architectures=...), "None"),
    "gelu": (config(hidden_act="gelu"), "hidden_act", "gelu"),
    "attention bias": (config(attention_bias=True), "attention_bias"),
    "mlp bias": (config(mlp_bias=True), "mlp_bias"),
    "sliding window": (config(sliding_window=4096), "sliding_window"),
    "quantised": (config(quantization_config={"bits": 4}), "quantization_config"),
    "partly rotary": (config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    "yarn": (config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    "linear, in the oldest spelling": (config(rope_scaling={"type": "linear", "factor": 4.0}), "linear"),
    "scaling without a factor": (config(rope_scaling={k: v for k, v in SCALED.items() if k != "factor"}), "factor"),
    "scaling upside down": (config(rope_scaling=SCALED), "low_freq_factor"),
    "scaling by kind of layer": (config(rope_parameters={"full_attention": SCALED}), "rope_parameters"),
    "scaling as a text": (config(rope_scaling="llama3"), "rope_scaling"),
    "huge": (config(num_hidden_layers=10 ** 12), "num_hidden_layers"),
    "none": (config(hidden_size=...), "hidden_size"),
    "a text for a number": (config(vocab_size="many\nlines"), "vocab_size"),
    "true for a number": (config(num_attention_heads=True), "num_attention_heads"),
    "odd heads": (config(head_dim=7), "head_dim"),
    "uneven groups": (config(num_key_value_heads=3), "num_key_value_heads"),
    "no head_dim and a rest": (config(head_dim=..., num_attention_heads=5, num_key_value_heads=1), "head_dim"),
    "too short": (config(max_position_embeddings=64), "model.context", "64"),
    "cut config": (cut("config.json", 40), "config.json", "JSON"),
    "config of zeros": (written("config.json", bytes(100)), "config.json"),
    "a list": (written("config.json", b"[1]"), "config.json", "object"),
    "deep config": (written("config.json", b"[" * 100_000), "config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json", "no such file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors"),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors", "fetch it again"),
    "weights cut in the header": (cut("model.safetensors", 100), "model.safetensors", "fetch it again"),
    "weights cut in the data": (cut("model.safetensors", 20_000), "model.safetensors", "fetch it again"),
    "a header of all memory": (written("model.safetensors", b"\xff" * 8 + b"{}"), "model.safetensors", "fetch it again"),
    "a pickle": (written("model.safetensors", b"\x80\x04\x95" + b"c" * 200), "model.safetensors", "fetch it again"),
    "a tensor too few": (weights(lambda s: {n: t for n, t in s.items() if "layers.1.mlp.up" not in n}), "lack", "layers.1.mlp.up_proj"),
    "a tensor too many": (weights(lambda s: s | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), "unknown", "q_proj.bias"),
    "a hostile name": (weights(lambda s: s | {"x\ny" * 500: torch.ones(1)}), "unknown"),
    "another shape": (weights(lambda s: s | {"model.norm.weight": torch.ones(31)}), "model.norm.weight", "[31]", "[32]"),
    "transposed": (weights(lambda s: s | {"model.layers.0.mlp.up_proj.weight": s["model.layers.0.mlp.up_proj.weight"].T.contiguous()}), "up_proj"),
    "whole numbers": (weights(lambda s: s | {"model.norm.weight": torch.ones(32, dtype=torch.int64)}), "model.norm.weight", "I64"),
    "not a number": (weights(lambda s: s["model.norm.weight"].fill_(math.nan).new_empty(0) is None), "model.norm.weight", "finite"),
    "an index to elsewhere": (index({"weight_map": {"a": "../part.safetensors"}}), "weight_map"),
    "an index of nothing": (index({"weight_map": {}}), "weight_map"),
    "an index without a map": (index({}), "weight_map"),
    "an index of numbers": (index({"weight_map": {"a": 1}}), "weight_map"),
    "a part that is not there": (index({"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json", "no such file"),
    "cut tokenizer": (cut("tokenizer.json", 3000), "tokenizer.json", "JSON"),
    "unigram": (tokens(lambda t: t["model"].update(type="Unigram")), "Unigram"),
    "no model": (tokens({"model": None}), "tokenizer.json"),
    "byte fallback": (tokens(lambda t: t["model"].update(byte_fallback=True)), "byte_fallback", "Llama 2"),
    "normalizer": (tokens({"normalizer": {"type": "NFC"}}), "normalizer", "NFC"),
    "metaspace": (tokens({"pre_tokenizer": {"type": "Metaspace"}}), "Metaspace"),
    "no pre-tokenizer": (tokens({"pre_tokenizer": None}), "pre_tokenizer"),
    "another split": (tokens(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a+)+b")), "(a+)+b"),
    "removed, not isolated": (tokens(lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")), "Removed"),
    "prefix space": (tokens(lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)), "add_prefix_space"),
    "nothing in sequence": (tokens({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}), "pre_tokenizer"),
    "after the text": (tokens({"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": data.END}}]}}), "post_processor"),
    "bert": (tokens({"post_processor": {"type": "BertProcessing"}}), "post_processor"),
    "dropout": (tokens(lambda t: t["model"].update(dropout=0.1)), "dropout"),
    "subword prefix": (tokens(lambda t: t["model"].update(continuing_subword_prefix="##")), "##"),
    "a word that is no bytes": (tokens(lambda t: t["model"]["vocab"].update({"▁the": 398})), "bytes"),
    "an id twice": (tokens(lambda t: t["model"]["vocab"].update({"ĠqqĠ": 17})), "same id"),
    "an id too high": (tokens(lambda t: t["model"]["vocab"].update({"ĠqqĠ": 10 ** 9})), "vocab_size"),
    "an id below zero": (tokens(lambda t: t["model"]["vocab"].update({"ĠqqĠ": -1})), "vocab_size"),
    "half a character": (tokens(lambda t: t["added_tokens"].append({"id": 3, "content": "\ud800", "special": True})), "no text"),
    "a token without end": (tokens(lambda t: t["model"]["vocab"].update({"a" * 100_000: 398})), "1,024"),
    "a vocabulary too large": (lambda folder: (config(vocab_size=100_000)(folder), weights(lambda s: s | {n: torch.zeros(100_000, 32) for n in s if "embed" in n or "lm_head" in n})(folder)), "too few"),
    "vocab as a list": (tokens(lambda t: t["model"].update(vocab=[["a", 0]])), "vocab"),
    "merges out of order": (tokens(moved), "order of the ids"),
    "ids out of order": (tokens(swapped_ids), "order of the ids"),
    "a merge too few": (tokens(lambda t: t["model"]["merges"].pop(30)), "order of the ids"),
    "a merge of three": (tokens(lambda t: t["model"]["merges"].append("a b c")), "merge"),
    "a merge into nothing": (tokens(lambda t: t["model"]["merges"].append("Ċ !")), "merge"),
    "a merge twice": (tokens(lambda t: t["model"]["merges"].append(t["model"]["merges"][0])), "merge"),
    "a merge of numbers": (tokens(lambda t: t["model"]["merges"].append([1, 2])), "merge"),
    "an unknown token that is used": (tokens(lambda t: (t["model"].update(unk_token=data.END), t["model"]["vocab"].pop("ÿ"))), "unk_token"),
    "an added token of plain text": (tokens(lambda t: t["added_tokens"].append({"id": 3, "content": "the", "special": False})), "the", "not special"),
    "an added token that eats blanks": (tokens(lambda t: t["added_tokens"][0].update(lstrip=True)), "lstrip"),
    "an added token without an id": (tokens(lambda t: t["added_tokens"].append({"content": "x", "special": True})), "no id"),
    "an end that is no token": (lambda folder: edit(folder / "tokenizer_config.json", {"eos_token": "</s>"}), "</s>", "eos_token"),
    "no end at all": (lambda folder: (edit(folder / "tokenizer_config.json", {"eos_token": None}), edit(folder / "config.json", {"eos_token_id": [10 ** 6]}),
                                      edit(folder / "tokenizer.json", lambda t: (t["added_tokens"].clear(), t["model"]["vocab"].pop(data.END)))), "end of a text"),
}


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory):
    return model_and_folder(tmp_path_factory.mktemp("base") / "sound", context=256)[1]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_foreign_folder_is_refused_in_one_line(sound_folder, tmp_path, capsys, name):
    folder = tmp_path / "base"
    shutil.copytree(sound_folder, folder)
    change, *parts = BROKEN[name]
    change(folder)
    assert go(tmp_path / "run", f"--model.init={folder}", "--stage=sft", "--world.demonstrations=10", small=FROM) == 2
    assert len(one_line(capsys, *parts)) < 700


def test_the_folder_that_was_broken_above_is_sound(sound_folder, tmp_path):
    assert go(tmp_path / "run", f"--model.init={sound_folder}", "--stage=sft", "--world.demonstrations=10", small=FROM) == 0


def test_template_settings_that_cannot_work(sound_folder, tmp_path, capsys):
    assert go(tmp_path / "run", "--data.template=chatml") == 2
    one_line(capsys, "data.template", "model.init")
    assert go(tmp_path / "run", f"--model.init={sound_folder}", "--data.template=llama3", "--stage=sft", small=FROM) == 2
    one_line(capsys, "data.template", "<|start_header_id|>")


def test_a_run_in_chatml_ends_its_answers_with_that_marker(tmp_path):
    base = tmp_path / "base"
    e = marked("chatml")
    pretrained.save(base, tiny(vocab=e.n_vocab, context=256), data.make_encoding(e._pat_str, e._mergeable_ranks, e._special_tokens))
    assert go(tmp_path / "run", f"--model.init={base}", "--data.template=chatml", "--stage=sft", "--world.demonstrations=10", small=FROM) == 0
    run = train.open_run(train.parse([*FROM, f"--model.init={base}", "--data.template=chatml", f"--out_dir={tmp_path / 'run'}"])[0])
    assert run.encoding.template == "chatml" and data.end_id(run.encoding) == e._special_tokens["<|im_end|>"]
    assert run.train[1][0].prompt[0] == e._special_tokens["<|im_start|>"]
