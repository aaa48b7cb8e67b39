"""tokenizer.json of a pretrained model -> tiktoken.Encoding, equal to Hugging Face's tokenizer on any text, and back.

Only byte-level BPE can be equal (GPT-2, SmolLM2, Llama 3); anything else is refused in one line that names it.
"""
import json
import math
import os
import re

import data
from config import ConfigError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT2 after every digit was parted from the rest (SmolLM2): a space does not go with a digit, and blanks before one are a whole
DIGIT = r"\p{N}" + "\U00011de0-\U00011de9\U00016ff4-\U00016ff6"  # the latter are new in Unicode 17, which only that first parting knows
DIGITS = rf"'s|'t|'re|'ve|'m|'ll|'d|[{DIGIT}]| ?\p{{L}}+| ?[^\s\p{{L}}{DIGIT}]+|\s+(?![^\s{DIGIT}])|\s+"
SPLITS = (GPT2, LLAMA3, LLAMA3.replace("{1,3}", ""), DIGITS, data.SPLIT)  # they cover any text, which another might not; the third is Qwen's

printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
SYMBOL = dict(zip([*printable, *(b for b in range(256) if b not in printable)], map(chr, [*printable, *range(256, 324)])))  # GPT-2's names of bytes
BYTE = {symbol: byte for byte, symbol in SYMBOL.items()}


def shown(value, longest=100):
    """Of what may be anything: one short line"""
    return text if len(text := ascii(value)) <= longest else text[:longest] + "..."


def read_json(path):
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a model's folder has config.json, model.safetensors and tokenizer.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({type(error).__name__}); fetch it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold an object, not {data.kind(value)}; fetch it again")
    return value


def last_merge(token, ranks):
    """The two parts that become the token when its bytes are merged, lowest rank first; None if they do not get so far"""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == math.inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def load(folder, vocab, template="hh"):
    """tokenizer.json -> tiktoken.Encoding, equal on any text; vocab: how many tokens the model knows

    tiktoken merges any two neighbours that make a token, lowest id first; Hugging Face's BPE those in a list of merges, first in the list
    first.  Both are the same if every token's last merge, found tiktoken's way, is in the list, and the list is in the order of ids: by
    induction over the steps, as neighbours that make a token have always been made from that token's own bytes alone.
    """
    path = os.path.join(folder, "tokenizer.json")
    t = read_json(path)

    def refuse(why):
        raise ConfigError(f"{path}: {why}; only a byte-level BPE as in GPT-2, Llama 3 or SmolLM2 can be read exactly")

    model, ranks, special = t.get("model"), {}, {}
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        refuse(f"a tokenizer of type {shown(model.get('type') if isinstance(model, dict) else model)}")
    if model.get("byte_fallback"):
        refuse("SentencePiece's BPE with byte_fallback (as in Llama 2 and TinyLlama) falls back to bytes by characters, not by merges")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(f"model.{key} = {shown(model[key])}")
    if t.get("normalizer") is not None:
        refuse(f"a normalizer, {shown(t['normalizer'])}, changes the text first")
    pattern = split_pattern(t.get("pre_tokenizer"), refuse)
    words, merges, added = model.get("vocab"), model.get("merges"), t.get("added_tokens", [])
    is_id = lambda i: isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab
    if not isinstance(words, dict) or not isinstance(merges, list) or not isinstance(added, list):
        refuse("model.vocab, model.merges or added_tokens is missing or of another kind")
    for a in added:
        if not isinstance(a, dict) or not isinstance(a.get("content"), str) or not a["content"] or not is_id(a.get("id")):
            refuse(f"added token {shown(a)} has no content or no id below vocab_size = {vocab} of config.json")
        if any("\ud800" <= c <= "\udfff" for c in a["content"]):
            refuse(f"added token {shown(a['content'])} is no text")
        if not a.get("special") or a.get("lstrip") or a.get("rstrip") or a.get("single_word"):
            refuse(f"added token {shown(a['content'])} is not special, or has lstrip, rstrip or single_word, and cuts ordinary text")
        special[a["content"]] = a["id"]
    for word, i in words.items():
        if not is_id(i) or special.get(word, i) != i:
            refuse(f"token {shown(word)} has id {shown(i)}, of vocab_size = {vocab} of config.json")
        if word not in special:
            if not 0 < len(word) <= 1024 or not all(c in BYTE for c in word):
                refuse(f"token {shown(word)} is not written in bytes, or in more than 1,024")
            ranks[bytes(BYTE[c] for c in word)] = i
    if len({*ranks.values(), *special.values()}) != len(ranks) + len(special):
        refuse("two tokens have the same id")
    if model.get("unk_token") is not None and sum(len(token) == 1 for token in ranks) < 256:
        refuse(f"unk_token = {shown(model['unk_token'])} stands for bytes without a token")  # without it they are left out: data.ordinary
    try:
        order = {tuple(bytes(BYTE[c] for c in part) for part in (m.split(" ") if isinstance(m, str) else m)): i for i, m in enumerate(merges)}
        if any(len(pair) != 2 or not {*pair, b"".join(pair)} <= ranks.keys() for pair in order) or len(order) != len(merges):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        refuse("a merge is not one of two tokens into a third, or stands there twice")
    before = -1
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.get):
        pair = last_merge(token, ranks)
        if pair is None and model.get("ignore_merges"):
            continue  # it is only ever found whole, by both
        if order.get(pair, -1) <= before:
            refuse(f"the merges are not in the order of the ids: see token {shown(token)}, id {ranks[token]}")
        before = order[pair]
    used = {*ranks.values(), *special.values()}
    if vocab - len(used) > 4096:
        refuse(f"{len(used):,} tokens are too few for vocab_size = {vocab:,} of config.json")
    special |= {f"<|unused_{i}|>": i for i in range(vocab) if i not in used}  # a model may say what no text is read as
    begin, end = begin_of(t.get("post_processor"), special, refuse), end_of(folder, special)
    if template != "hh":
        end = data.TEMPLATES[template][1]
        if missing := [m for m in re.findall(r"<\|\w+\|>", "".join(data.TEMPLATES[template])) if m not in special]:
            raise ConfigError(f"data.template = {template!r}: {path} has no special token {missing[0]}; use data.template=hh")
    return data.make_encoding(pattern, ranks, special, end, begin, template)


def split_pattern(pre, refuse):
    """Where a text is cut before anything is merged -> one regular expression"""
    parts = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else [pre]
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        refuse(f"pre_tokenizer = {shown(pre, 400)}")
    *first, last = parts or [{}]
    kinds, uses = tuple(p.get("type") for p in parts), last.get("use_regex", True)
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
        if not first and uses:
            return GPT2
        if kinds[:-1] == ("Digits",) and first[0].get("individual_digits") and uses:
            return DIGITS
        regex = first[0].get("pattern") if kinds[:-1] == ("Split",) and not uses and first[0].get("behavior") == "Isolated" and not first[0].get("invert") else None
        if isinstance(regex, dict) and regex.get("Regex") in SPLITS:
            return regex["Regex"]
    refuse(f"pre_tokenizer = {shown(pre, 400)}")


def begin_of(post, special, refuse):
    """The special token that the tokenizer puts before every text, or \"\""""
    parts = post.get("processors") if isinstance(post, dict) and post.get("type") == "Sequence" else [post]
    for part in parts if isinstance(parts, list) else [parts]:
        if part is None or isinstance(part, dict) and part.get("type") == "ByteLevel":
            continue
        try:
            *before, text = part["single"] if part["type"] == "TemplateProcessing" else [None]
            if "Sequence" in text and len(before) < 2:
                begin = before[0]["SpecialToken"]["id"] if before else ""
                if not begin or begin in special:
                    return begin
        except (TypeError, KeyError, ValueError, AttributeError):
            pass
        refuse(f"post_processor = {shown(part)}")
    return ""


def end_of(folder, special):
    """The special token that ends an answer, by tokenizer_config.json or config.json"""
    path = os.path.join(folder, "tokenizer_config.json")
    name = read_json(path).get("eos_token") if os.path.exists(path) else None
    name = name.get("content") if isinstance(name, dict) else name
    if name is None:
        ids = read_json(os.path.join(folder, "config.json")).get("eos_token_id")
        ids = ids[0] if isinstance(ids, list) and ids else ids
        name = next((n for n, i in special.items() if i == ids and ids is not None), data.END)
    if not isinstance(name, str) or name not in special:
        raise ConfigError(f"{folder}: the end of a text, {shown(name)}, is no special token of tokenizer.json; set eos_token in tokenizer_config.json")
    return name


def to_json(encoding, special):
    """special: its special tokens, perhaps one more -> what the tokenizers library reads"""
    ranks, word = encoding._mergeable_ranks, lambda token: "".join(SYMBOL[b] for b in token)
    pairs = (last_merge(token, ranks) for token in sorted((t for t in ranks if len(t) > 1), key=ranks.get))
    post = None
    if encoding.begin:
        first, one, two = ({"SpecialToken": {"id": encoding.begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}})
        post = {"type": "TemplateProcessing", "single": [first, one], "pair": [first, one, {"SpecialToken": {"id": encoding.begin, "type_id": 1}}, two],
                "special_tokens": {encoding.begin: {"id": encoding.begin, "ids": [special[encoding.begin]], "tokens": [encoding.begin]}}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": post, "decoder": byte_level,
        "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                         for name, i in sorted(special.items(), key=lambda item: item[1])],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False}, byte_level]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,  # a token that is a whole word needs no merges: tiktoken's way
                  "vocab": {word(token): i for token, i in ranks.items()} | special,
                  "merges": [" ".join(map(word, pair)) for pair in pairs if pair]}}


def chat_template(encoding):
    """Jinja that writes [{"role", "content"}, ...] as data.dialogue does, up to the end of the last answer, where a reward is read"""
    if encoding.template == "hh":
        user, assistant, ask, end, between, said = "\n\nHuman: ", "\n\nAssistant: ", "\n\nAssistant:", "", "", "message['content']"
    else:
        start, end, between = data.TEMPLATES[encoding.template]
        user, ask, said = start.format("user"), start.format("assistant"), "message['content'] | trim"
        assistant = ask
    q = lambda text: "'" + text.replace("\n", "\\n") + "'"
    return ("{{ bos_token }}" if encoding.begin else "") + (
        "{% for message in messages %}{{ " + q(between) + " if not loop.first else '' }}{{ " + q(assistant) + " if message['role'] == 'assistant' else " + q(user) + " }}"
        "{{ " + said + " }}{{ " + q(end) + " if not loop.last or message['role'] != 'assistant' else eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + q(between) + " }}{{ " + q(ask) + " }}{% endif %}")
