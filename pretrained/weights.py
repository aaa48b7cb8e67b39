"""Hugging Face folders of Llama and its relatives: config.json -> Shape, safetensors -> a model.

Parameter names are the same on both sides.  Whatever would give other numbers than Hugging Face's
own code raises a one-line ConfigError: other biases or activations, sliding windows, layers without
positions, other scalings of the rotary positions.
"""
import os
from dataclasses import replace
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from config import ConfigError, assign
from model import LanguageModel, RewardModel, Shape
from pretrained.hub import check_file, directory, read_json, short_repr


class Family(NamedTuple):
    """A kind of config.json: its model_type is a key of FAMILIES."""
    prefix: str         # of the names of its architectures
    defaults: dict      # values that a config.json leaves out, where they are not Llama's
    changes: dict = {}  # fields of Shape


FAMILIES = {
    "llama": Family("Llama", {}),
    "mistral": Family("Mistral", {
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    }),
    "qwen2": Family(
        "Qwen2", {"num_key_value_heads": 32, "max_position_embeddings": 32768}, {"qkv_bias": True}
    ),
    "qwen3": Family("Qwen3", {
        "head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    }, {"qk_norm": True}),
    "smollm3": Family("SmolLM3", {
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "rope_theta": 2e6, "no_rope_layers": "every fourth",
    }),
}
HEADS = {LanguageModel: "ForCausalLM", RewardModel: "ForSequenceClassification"}
ASSUMED = {  # values of config.json that model.py implements
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}
LLAMA3_SCALING = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
)
DTYPES = ("F32", "F16", "BF16")
MODEL_KEYS = ("vocab", "layers", "heads", "kv_heads", "width", "hidden", "tied")


# --------------------------------------------------------------------------------------------------
# config.json

def shape_of(folder, kind=LanguageModel):
    """config.json -> Shape, whose context is the longest that the model supports.

    kind: LanguageModel or RewardModel
    Raises ConfigError, which names the key that cannot be loaded.
    """
    path = os.path.join(folder, "config.json")
    table = read_json(path)
    family = check_architecture(table, path, kind)
    table = family.defaults | table
    rope = rope_settings(table, path)
    check_assumed(table, rope, path)
    check_layers(table, path)
    width = number(table, "hidden_size", path)
    heads = number(table, "num_attention_heads", path)
    if "head_dim" not in table and width % heads:
        raise ConfigError(
            f"{path}: hidden_size = {width}: must be a multiple of num_attention_heads = {heads}, "
            "or head_dim must be given"
        )
    head = number(table, "head_dim", path, width // heads)
    kv_heads = number(table, "num_key_value_heads", path, heads)
    outer_theta = number(table, "rope_theta", path, 10_000.0, 1.0, 1e12)  # transformers 4
    shape = Shape(
        vocab=number(table, "vocab_size", path),
        layers=number(table, "num_hidden_layers", path, high=200),
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        hidden=number(table, "intermediate_size", path),
        context=number(table, "max_position_embeddings", path, 2048, high=2 ** 24),
        tied=true_or_false(table, "tie_word_embeddings", path),
        rope_theta=float(number(rope, "rope_theta", path, outer_theta, 1.0, 1e12)),
        norm_eps=float(number(table, "rms_norm_eps", path, 1e-6, 0.0, 1.0)),
        head=0 if head * heads == width else head,
        **family.changes,
    )
    if head % 2 or heads % kv_heads:
        raise ConfigError(
            f"{path}: head_dim = {head} must be even, and num_key_value_heads = {kv_heads} must "
            f"divide num_attention_heads = {heads}"
        )
    return replace(shape, rope_scaling=rope_scaling(rope, path))


def check_architecture(table, path, kind):
    """-> Family.  Raises ConfigError unless the model is of one, with the head of this kind."""
    model_type = table.get("model_type")
    found = table.get("architectures")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or found != [family.prefix + HEADS[kind]]:
        raise ConfigError(
            f"{path}: a {short_repr(model_type)} model, {short_repr(found)}; only "
            f"{HEADS[kind]} of model_type {', '.join(FAMILIES)} can be loaded"
        )
    return family


def check_layers(table, path):
    """Raise ConfigError where a layer differs from the others: a window, or no positions."""
    window = table.get("sliding_window")
    if window is not None and table.get("use_sliding_window", True):
        raise ConfigError(
            f"{path}: sliding_window = {short_repr(window)}: only null can be loaded, or "
            "use_sliding_window = false"
        )
    for key, usual in (("layer_types", "full_attention"), ("no_rope_layers", 1)):
        layers = table.get(key)
        if layers is None:
            continue
        if not isinstance(layers, list) or any(layer != usual for layer in layers):
            raise ConfigError(
                f"{path}: {key} = {short_repr(layers)}: only {usual!r} in every layer can be loaded"
            )


def rope_settings(table, path):
    """Settings of the rotary positions, under their name since transformers 5 or the older one."""
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
    is_flat = isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values())
    if not is_flat:
        raise ConfigError(
            f"{path}: rope_scaling or rope_parameters = {short_repr(rope)}: must be one object or "
            "null"
        )
    return rope


def check_assumed(table, rope, path):
    """Raise ConfigError where the model needs an operation that model.py does not have."""
    for key, value in ASSUMED.items():
        for place in (table, rope):
            if place.get(key, value) != value:
                found = short_repr(place[key])
                raise ConfigError(f"{path}: {key} = {found}: only {value!r} can be loaded")


def number(table, key, path, default=None, low=1, high=2 ** 20):
    """A number from low to high, an integer unless `low` is a float; null means the default."""
    value = table.get(key)
    if value is None:
        value = default
    types = (int, float) if isinstance(low, float) else int
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ConfigError(
            f"{path}: {key} = {short_repr(value)}: must be a number from {low} to {high}"
        )
    return value


def true_or_false(table, key, path):
    """A value that may be absent or null, which mean false"""
    value = table.get(key) or False
    if value is not True and value is not False:
        raise ConfigError(f"{path}: {key} = {short_repr(value)}: must be true or false")
    return value


def rope_scaling(rope, path):
    """-> Llama 3's four numbers, or () for positions that are not scaled"""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ConfigError(
            f"{path}: rope_type = {short_repr(rope_type)}: only default and llama3 can be loaded"
        )
    if rope_type == "default":
        return ()
    scaling = tuple(float(number(rope, key, path, None, 1e-3, 1e9)) for key in LLAMA3_SCALING)
    _, low, high, _ = scaling
    if low >= high:
        raise ConfigError(
            f"{path}: low_freq_factor = {low}: must be less than high_freq_factor = {high}"
        )
    return scaling


def num_frozen(settings):
    """settings: those of [model] -> number of frozen blocks"""
    if settings.train_layers < 0:
        return 0
    return settings.layers - settings.train_layers


def sized(config):
    """The configuration with the sizes of model.init; model.context and model.dropout stay.

    Raises ConfigError where model.context or model.train_layers does not fit the model.
    """
    settings = config.model
    if settings.init == "scratch":
        return config
    shape = shape_of(directory(settings.init))
    if settings.context > shape.context:
        raise ConfigError(
            f"model.context = {settings.context}: must be at most {shape.context}, the longest "
            f"that {settings.init} supports"
        )
    for key in MODEL_KEYS:
        config = assign(config, f"model.{key}", getattr(shape, key))
    if settings.train_layers >= shape.layers:
        raise ConfigError(
            f"model.train_layers = {settings.train_layers}: must be less than the {shape.layers} "
            f"layers of {settings.init}; -1 trains them all"
        )
    return config


# --------------------------------------------------------------------------------------------------
# model.safetensors

def stored(folder):
    """-> {name of a tensor: (file, its shape, its dtype)}, read from the headers alone

    Raises ConfigError, which names the file and the remedy.
    """
    out = {}
    for path in weight_files(folder):
        check_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in out:
                        first = out[name][0]
                        raise ConfigError(
                            f"{path}: {short_repr(name)} is also in {first}; fetch both again"
                        )
                    header = file.get_slice(name)
                    out[name] = path, tuple(header.get_shape()), header.get_dtype()
        except PermissionError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); check its permissions"
            ) from None
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{path}: not a complete safetensors file ({short_repr(str(error))}); fetch it "
                "again"
            ) from None
    return out


def weight_files(folder):
    """Paths of the weights: model.safetensors, or the files that its index lists"""
    path = os.path.join(folder, "model.safetensors")
    if os.path.lexists(path):
        return [path]
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.lexists(index):
        raise ConfigError(
            f"{folder}: has neither model.safetensors nor model.safetensors.index.json; pickled "
            "weights (.bin, .pth) are not read"
        )
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and len(weight_map) > 0
    if not is_map or not all(map(is_file_name, weight_map.values())):
        raise ConfigError(
            f"{index}: 'weight_map' must give each tensor the name of a file in the same folder; "
            "fetch it again"
        )
    return [os.path.join(folder, name) for name in sorted(set(weight_map.values()))]


def is_file_name(name):
    return isinstance(name, str) and os.path.basename(name) == name


def read(path, name):
    """One tensor, memory-mapped from the file.

    The file is opened anew for each tensor: the mapping of a tensor that was copied is released, so
    memory never holds much more than the model itself.
    """
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@torch.no_grad()
def load(folder, kind=LanguageModel, device="cpu", **changes):
    """-> a LanguageModel or RewardModel (`kind`) in float32, in eval mode

    changes: fields of its Shape that replace those of config.json (context, dropout)
    Raises ConfigError, which names the file or tensor that does not fit.
    """
    shape = replace(shape_of(folder, kind), **changes)
    with torch.device("meta"):
        model = kind(shape)
    sources = match_tensors(folder, model)
    model = model.to_empty(device=device)
    if shape.tied and kind is LanguageModel:
        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty has separated them
    for name, path in sources.items():
        parameter = model.get_parameter(name)
        parameter.copy_(read(path, name))
        if not parameter.isfinite().all():
            raise ConfigError(f"{path}: {name} holds numbers that are not finite; fetch it again")
    return model.eval()


def match_tensors(folder, model):
    """Check names, shapes and dtypes of the stored tensors.  -> {name of a parameter: its file}"""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    headers = {}
    for name, header in stored(folder).items():
        if not name.endswith("rotary_emb.inv_freq"):  # in old files; it follows from config.json
            headers[name] = header
    tied_head = None
    if model.shape.tied:
        shapes.pop("lm_head.weight", None)
        tied_head = headers.pop("lm_head.weight", None)
    for name in {**shapes, **headers}:
        if name not in headers or name not in shapes:
            verb = "lack" if name not in headers else "have an unknown"
            raise ConfigError(
                f"{folder}: the weights {verb} {short_repr(name)}, by the sizes in config.json; "
                "fetch both again"
            )
        path, size, dtype = headers[name]
        if name == "score.weight" and len(size) == 2 and size[0] != 1:
            raise ConfigError(f"{path}: its head has {size[0]} labels, and a reward is one number; "
                              "give a model with one label")
        if size != shapes[name] or dtype not in DTYPES:
            raise ConfigError(
                f"{path}: {name} is {dtype} of shape {list(size)}; must be F32, F16 or BF16 of "
                f"shape {list(shapes[name])}, by config.json; fetch both again"
            )
    if tied_head is not None:
        check_tied_head(tied_head, headers["model.embed_tokens.weight"])
    return {name: path for name, (path, _, _) in headers.items()}


def check_tied_head(head, table):
    """Raise ConfigError unless the stored output matrix equals the embedding.  Both: headers"""
    is_same_type = head[1:] == table[1:]
    if is_same_type and torch.equal(
        read(head[0], "lm_head.weight"), read(table[0], "model.embed_tokens.weight")
    ):
        return
    raise ConfigError(
        f"{head[0]}: lm_head.weight differs from model.embed_tokens.weight, and config.json says "
        "tie_word_embeddings; fetch both again"
    )
