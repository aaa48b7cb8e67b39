"""Pretrained models: a Hugging Face directory of a Llama-family model becomes ours, and ours become such directories.

    config.json         -> model.Shape             shape_of
    model.safetensors   -> a model, memory-mapped   load; also in several files, with model.safetensors.index.json
    tokenizer.json      -> tiktoken.Encoding        tokenizer
    a model, an encoding -> all three               save

Parameter names are the same on both sides.  What would give other numbers than Hugging Face's own code is refused in one line
that names it: biases, other activations, other scalings of the rotary positions, tokenizers that are no byte-level BPE.
"""
import functools
import glob
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import config as configuration
import data
import files
from config import ConfigError
from model import LanguageModel, RewardModel, Shape

ARCHITECTURE = {LanguageModel: "LlamaForCausalLM", RewardModel: "LlamaForSequenceClassification"}
NEEDED = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
ASSUMED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None, "quantization_config": None,
           "rope_interleaved": False, "partial_rotary_factor": 1.0}  # of config.json: what the code in model.py does


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


@functools.cache
def directory(init):
    """model.init, a folder or the name of a repository on the hub -> folder"""
    if os.path.isdir(init):
        return init
    if os.path.exists(init) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", init):
        raise ConfigError(f"model.init = {shown(init)}: no such folder; give scratch, a folder with config.json, model.safetensors and tokenizer.json, "
                          "or OWNER/NAME on the Hugging Face hub")
    remedy = f"where there is a network, `hf download {init} --local-dir DIR` fetches it; then give --model.init=DIR"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"model.init = {init!r}: no such folder, and huggingface_hub is not installed to fetch it from the hub; {remedy}") from None
    try:
        return snapshot_download(init, allow_patterns=NEEDED)
    except Exception as error:  # no network, no such name, a licence to be accepted: many types, one remedy
        raise ConfigError(f"model.init = {init!r}: cannot be fetched from the hub ({type(error).__name__}); {remedy}") from None


def digest(init):
    """Of the folder's small files whole, and of the weights their size, header and 64 samples: gigabytes are not read."""
    folder, seen = directory(init), hashlib.sha256()
    for path in sorted(p for pattern in NEEDED for p in glob.glob(os.path.join(glob.escape(folder), pattern))):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            seen.update(f"{os.path.basename(path)} {size}".encode())
            for i in range(64 if path.endswith(".safetensors") else 1):
                file.seek(size * i // 64)
                seen.update(file.read(4096 if path.endswith(".safetensors") else -1))
    return seen.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# The model

def shape_of(folder, kind=LanguageModel):
    """config.json -> Shape, its context the longest that the model was made for.  Raises ConfigError, naming what it cannot be"""
    path = os.path.join(folder, "config.json")
    c = read_json(path)
    if c.get("model_type") != "llama" or c.get("architectures") != [ARCHITECTURE[kind]]:
        raise ConfigError(f"{path}: a {shown(c.get('model_type'))} model, {shown(c.get('architectures'))}; only model_type llama, {ARCHITECTURE[kind]}, can be loaded")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # the newer spelling, since transformers 5, and the older one
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{path}: rope_scaling or rope_parameters = {shown(rope)}: must be one object or null")
    for key, value in ASSUMED.items():
        for place in (c, rope):
            if place.get(key, value) != value:
                raise ConfigError(f"{path}: {key} = {shown(place[key])}: only {value!r} can be loaded")

    def number(key, default=None, low=1, high=2 ** 20, place=c):
        value = place.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(low, float) else int) or not low <= value <= high:
            raise ConfigError(f"{path}: {key} = {shown(value)}: must be a number from {low} to {high}")
        return value

    width, heads = number("hidden_size"), number("num_attention_heads")
    if "head_dim" not in c and width % heads:
        raise ConfigError(f"{path}: hidden_size = {width}: must be a multiple of num_attention_heads = {heads}, or head_dim be given")
    head = number("head_dim", width // heads)
    shape = Shape(number("vocab_size"), number("num_hidden_layers", high=200), heads, number("num_key_value_heads", heads), width,
                  number("intermediate_size"), number("max_position_embeddings", 2048, high=2 ** 24), 0.0, c.get("tie_word_embeddings", False) is True,
                  float(number("rope_theta", number("rope_theta", 10000.0, 1.0, 1e12), 1.0, 1e12, rope)), float(number("rms_norm_eps", 1e-6, 0.0, 1.0)),
                  0 if head * heads == width else head)
    if head % 2 or heads % shape.kv_heads:
        raise ConfigError(f"{path}: head_dim = {head} must be even, num_key_value_heads = {shape.kv_heads} divide num_attention_heads = {heads}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ConfigError(f"{path}: rope_type = {shown(rope_type)}: only default and llama3 can be loaded")
    if rope_type == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = tuple(float(number(key, None, 1e-3, 1e9, rope)) for key in keys)
        if scaling[1] >= scaling[2]:
            raise ConfigError(f"{path}: low_freq_factor = {scaling[1]}: must be less than high_freq_factor = {scaling[2]}")
        shape = replace(shape, rope_scaling=scaling)
    return shape


def sized(config):
    """The configuration with the sizes of the model it begins from; model.context and model.dropout stay the run's own."""
    if config.model.init == "scratch":
        return config
    shape = shape_of(directory(config.model.init))
    if config.model.context > shape.context:
        raise ConfigError(f"model.context = {config.model.context}: must be at most {shape.context}, the longest that {config.model.init} was made for")
    for key in ("vocab", "layers", "heads", "kv_heads", "width", "hidden", "tied"):
        config = configuration.assign(config, f"model.{key}", getattr(shape, key))
    return config


def stored(folder):
    """-> {name of a tensor: (file, its shape, its dtype)}, from the headers alone"""
    whole, index = (os.path.join(folder, name) for name in ("model.safetensors", "model.safetensors.index.json"))
    paths = [whole]
    if not os.path.exists(whole):
        if not os.path.exists(index):
            raise ConfigError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json; pickled weights (.bin, .pth) are not read")
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(n, str) and os.path.basename(n) == n for n in names.values()):
            raise ConfigError(f"{index}: 'weight_map' must give each tensor the name of a file in the same folder; fetch it again")
        paths = [os.path.join(folder, name) for name in sorted(set(names.values()))]
    out = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in out:
                        raise ConfigError(f"{path}: {shown(name)} stands also in {out[name][0]}; fetch both again")
                    part = file.get_slice(name)
                    out[name] = path, tuple(part.get_shape()), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: not a whole safetensors file ({shown(str(error))}); fetch it again") from None
    return out


def read(path, name):
    """One tensor, mapped from the file.  The file is opened for each anew: what has been copied does not stay mapped, so that memory
    never holds much more than the model itself."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@torch.no_grad()
def load(folder, kind=LanguageModel, device="cpu", **changes):
    """-> a model of this kind in float32, in eval mode.  changes: to its Shape (context, dropout)"""
    shape = replace(shape_of(folder, kind), **changes)
    with torch.device("meta"):
        model = kind(shape)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if not (shape.tied and name == "lm_head.weight")}
    have = {name: rest for name, rest in stored(folder).items() if not name.endswith("rotary_emb.inv_freq")}  # old files keep what follows from config.json
    again = have.pop("lm_head.weight", None) if shape.tied else None
    for name in {**wanted, **have}:
        if name not in have or name not in wanted:
            raise ConfigError(f"{folder}: the weights {'lack' if name not in have else 'have an unknown'} {shown(name)}, by the sizes in config.json")
        path, size, dtype = have[name]
        if size != wanted[name] or dtype not in ("F32", "F16", "BF16"):
            raise ConfigError(f"{path}: {name} is {dtype} of shape {list(size)}; must be F32, F16 or BF16 of shape {list(wanted[name])}, by config.json")
    if again and (again[1:] != have["model.embed_tokens.weight"][1:] or not torch.equal(read(again[0], "lm_head.weight"), read(have["model.embed_tokens.weight"][0], "model.embed_tokens.weight"))):
        raise ConfigError(f"{again[0]}: lm_head.weight differs from model.embed_tokens.weight, and config.json says tie_word_embeddings")
    model = model.to_empty(device=device)
    if shape.tied and kind is LanguageModel:
        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty has parted them
    for name, (path, _, _) in have.items():
        parameter = model.get_parameter(name)
        parameter.copy_(read(path, name))
        if not parameter.isfinite().all():
            raise ConfigError(f"{path}: {name} holds numbers that are not finite; fetch it again")
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT2 after every digit was parted from the rest (SmolLM2): a space does not go with a digit, and blanks before one are a whole
DIGIT = r"\p{N}" + "\U00011de0-\U00011de9\U00016ff4-\U00016ff6"  # the latter are new in Unicode 17, which only that first parting knows
DIGITS = rf"'s|'t|'re|'ve|'m|'ll|'d|[{DIGIT}]| ?\p{{L}}+| ?[^\s\p{{L}}{DIGIT}]+|\s+(?![^\s{DIGIT}])|\s+"
SPLITS = (GPT2, LLAMA3, LLAMA3.replace("{1,3}", ""), DIGITS, data.SPLIT)  # they cover any text, which another might not; the third is Qwen's

printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
SYMBOL = dict(zip([*printable, *(b for b in range(256) if b not in printable)], map(chr, [*printable, *range(256, 324)])))  # GPT-2's names of bytes
BYTE = {symbol: byte for byte, symbol in SYMBOL.items()}


def last_merge(token, ranks):
    """The two parts that become the token when its bytes are merged, lowest rank first; None if they do not get so far"""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == math.inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def tokenizer(folder, vocab, template="hh"):
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


# ---------------------------------------------------------------------------------------------------------------------
# Export

def save(folder, model, encoding):
    """Write a policy or a reward model as a Hugging Face directory, under another name first and then renamed.

    A reward model has one more token, <|pad|>, with an embedding of zeros: LlamaForSequenceClassification reads the reward at the last
    token that is not pad_token_id, which has to be the end of the answer and so cannot be the padding itself, as it is for a policy.
    """
    shape, tensors, special = model.shape, dict(model.state_dict()), dict(encoding._special_tokens)
    end, begin, pad = encoding.end, encoding.begin, encoding.end
    if isinstance(model, RewardModel):
        pad = "<|pad|>"
        if pad not in special or pad == end:
            while pad in special:
                pad = f"<{pad}>"
            special[pad], table = shape.vocab, tensors["model.embed_tokens.weight"]
            tensors["model.embed_tokens.weight"] = torch.cat((table, table.new_zeros(1, shape.width)))
    elif shape.tied:
        del tensors["lm_head.weight"]
    config = {
        "architectures": [ARCHITECTURE[type(model)]], "model_type": "llama", "dtype": "float32", "torch_dtype": "float32",
        "vocab_size": len(tensors["model.embed_tokens.weight"]), "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width, "hidden_size": shape.width, "intermediate_size": shape.hidden,
        "max_position_embeddings": shape.context, "rms_norm_eps": shape.norm_eps, "tie_word_embeddings": shape.tied, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rope_theta": shape.rope_theta, "rope_scaling": None, "use_cache": True,
        "eos_token_id": special[end], "pad_token_id": special[pad], "bos_token_id": special[begin] if begin else None}
    if shape.rope_scaling:
        factor, low, high, context = shape.rope_scaling
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": int(context)}
    if isinstance(model, RewardModel):
        config |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    part = f"{folder}.{os.getpid()}.part"
    try:
        os.makedirs(part, exist_ok=True)
        files.save_json(os.path.join(part, "config.json"), config)
        files.save_text(os.path.join(part, "tokenizer.json"), json.dumps(tokenizer_json(encoding, special), ensure_ascii=False))
        files.save_json(os.path.join(part, "tokenizer_config.json"), {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": pad, **({"bos_token": begin} if begin else {}),
            "model_max_length": shape.context, "clean_up_tokenization_spaces": False, "chat_template": chat_template(encoding)})
        save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, os.path.join(part, "model.safetensors"), {"format": "pt"})
        if os.path.isdir(folder):
            shutil.rmtree(folder)
        os.replace(part, folder)
    except SafetensorError as error:
        raise files.cannot_write(folder, error) from None
    except OSError as error:
        raise error if "cannot be written" in str(error) else files.cannot_write(folder, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def tokenizer_json(encoding, special):
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
