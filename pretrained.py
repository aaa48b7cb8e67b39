"""Pretrained models: a Hugging Face directory of a Llama-family model becomes ours, and ours become such directories.

    config.json         -> model.Shape             shape_of
    model.safetensors   -> a model, memory-mapped   load; also in several files, with model.safetensors.index.json
    tokenizer.json      -> tiktoken.Encoding        tokenizer.py
    a model, an encoding -> all three               save

Parameter names are the same on both sides.  What would give other numbers than Hugging Face's own code is refused in one line
that names it: biases, other activations, other scalings of the rotary positions.
"""
import functools
import glob
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import config as configuration
import files
import tokenizer
from config import ConfigError
from model import LanguageModel, RewardModel, Shape
from tokenizer import read_json, shown

ARCHITECTURE = {LanguageModel: "LlamaForCausalLM", RewardModel: "LlamaForSequenceClassification"}
NEEDED = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
ASSUMED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None, "quantization_config": None,
           "rope_interleaved": False, "partial_rotary_factor": 1.0}  # of config.json: what the code in model.py does


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
    if config.model.train_layers >= shape.layers:
        raise ConfigError(f"model.train_layers = {config.model.train_layers}: must be less than the {shape.layers} layers of {config.model.init}; -1 trains them all")
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
    table = "model.embed_tokens.weight"
    if again and (again[1:] != have[table][1:] or not torch.equal(read(again[0], "lm_head.weight"), read(have[table][0], table))):
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
# Export

def save(folder, model, encoding):
    """Write a policy or a reward model as a Hugging Face directory, under another name first and then renamed.

    A reward model has one more token, <|pad|>, with an embedding of zeros: LlamaForSequenceClassification reads the reward at the last
    token that is not pad_token_id, which has to be the end of the answer and so cannot be the padding itself, as it is for a policy.
    """
    shape, tensors, special = model.shape, model.state_dict(), dict(encoding._special_tokens)
    if shape.frozen:
        tensors = {f"model.{name}": t for name, t in model.model.below[0].state_dict().items()} | tensors
    end, begin, pad = encoding.end, encoding.begin, encoding.end
    if isinstance(model, RewardModel):
        pad = "<|pad|>"
        if pad not in special or pad == end:
            while pad in special:
                pad = f"<{pad}>"
            special[pad], table = shape.vocab, tensors["model.embed_tokens.weight"]
            tensors["model.embed_tokens.weight"] = torch.cat((table, table.new_zeros(1, shape.width)))
    elif shape.tied:
        tensors.pop("lm_head.weight", None)
    config = {
        "architectures": [ARCHITECTURE[type(model)]], "model_type": "llama", "dtype": "float32", "torch_dtype": "float32",
        "vocab_size": len(tensors["model.embed_tokens.weight"]), "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width, "hidden_size": shape.width, "intermediate_size": shape.hidden,
        "max_position_embeddings": shape.context, "rms_norm_eps": shape.norm_eps, "tie_word_embeddings": shape.tied, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rope_theta": shape.rope_theta, "rope_scaling": None, "use_cache": True,
        "eos_token_id": special[end], "pad_token_id": special[pad], "bos_token_id": special[begin] if begin else None}
    if shape.rope_scaling:
        factor, low, high, context = shape.rope_scaling
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                                  "original_max_position_embeddings": int(context)}
    if isinstance(model, RewardModel):
        config |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    part = f"{folder}.{os.getpid()}.part"
    try:
        os.makedirs(part, exist_ok=True)
        files.save_json(os.path.join(part, "config.json"), config)
        files.save_text(os.path.join(part, "tokenizer.json"), json.dumps(tokenizer.to_json(encoding, special), ensure_ascii=False))
        files.save_json(os.path.join(part, "tokenizer_config.json"), {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": pad, **({"bos_token": begin} if begin else {}),
            "model_max_length": shape.context, "clean_up_tokenization_spaces": False, "chat_template": tokenizer.chat_template(encoding)})
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
