"""pretrained/weights.py: config.json and safetensors are read, or refused in one line."""
import json
import math
import os
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from helpers import same, tiny
from safetensors.torch import load_file, save_file

import config
from config import ConfigError
from generate import Sampling, generate
from model import LanguageModel, RewardModel, Shape
from pretrained import weights

LLAMA3_SCALING = (8.0, 1.0, 4.0, 32.0)
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LAYOUTS = {  # changes of transformers' LlamaConfig, or of the family's that it names
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "grouped": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    "eps": {"rms_norm_eps": 1e-3},
    "head_dim": {"head_dim": 24, "num_key_value_heads": 2},
    "llama3": {
        "max_position_embeddings": 256,
        "rope_parameters": SCALED | {"rope_theta": 500.0},
    },
    "mistral": {"family": "Mistral", "sliding_window": None, "num_key_value_heads": 2},
    "qwen2": {"family": "Qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"family": "Qwen3", "num_key_value_heads": 2, "head_dim": 24},
    "smollm3": {
        "family": "SmolLM3", "num_key_value_heads": 2, "no_rope_layers": [1, 1, 1],
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
}


# --------------------------------------------------------------------------------------------------
# What is read

def test_shards_half_precision_and_old_files_are_read(tmp_path, write_model):
    model, folder = write_model(tmp_path / "out")
    path = folder / "model.safetensors"
    state = {name: t.bfloat16() for name, t in load_file(path).items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as in old files
    path.unlink()
    weight_map = {}
    for shard in range(3):
        file = f"model-0000{shard + 1}-of-00003.safetensors"
        names = sorted(state)[shard::3]
        weight_map |= dict.fromkeys(names, file)
        save_file({name: state[name] for name in names}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = weights.load(folder)
    expected = {name: t.bfloat16().float() for name, t in model.state_dict().items()}
    assert same(expected, loaded.state_dict())
    assert not loaded.training


def test_a_tied_model_may_store_its_output_matrix_if_it_is_the_same(tmp_path, write_model):
    model, folder = write_model(tmp_path / "out", tied=True)
    path = folder / "model.safetensors"
    state = load_file(path)
    assert "lm_head.weight" not in state
    embedding = state["model.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": embedding.clone()}, path)
    loaded = weights.load(folder)
    assert same(model.state_dict(), loaded.state_dict())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight  # no copy
    save_file(state | {"lm_head.weight": embedding + 1}, path)
    with pytest.raises(ConfigError, match="lm_head.weight differs"):
        weights.load(folder)


def test_one_tensor_in_two_shards_is_refused(tmp_path, write_model):
    _, folder = write_model(tmp_path / "out")
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    for file in ("a.safetensors", "b.safetensors"):
        save_file(state, folder / file)
    weight_map = dict.fromkeys(state, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="b.safetensors: .* is also in .*a.safetensors; fetch"):
        weights.load(folder)


def test_both_spellings_of_rope_mean_the_same(tmp_path, write_model, edit):
    _, folder = write_model(tmp_path / "out", rope_theta=5e5, rope_scaling=LLAMA3_SCALING)
    path = folder / "config.json"
    older = weights.shape_of(folder)
    assert older.rope_theta == 5e5
    assert older.rope_scaling == LLAMA3_SCALING
    scaling = json.loads(path.read_text())["rope_scaling"]
    newer = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 5e5}}
    newer["rope_parameters"] |= scaling
    edit(path, newer)
    assert weights.shape_of(folder) == older
    edit(path, {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}})
    assert weights.shape_of(folder) == replace(older, rope_theta=123.0, rope_scaling=())
    edit(path, {"rope_parameters": ...})
    assert weights.shape_of(folder).rope_theta == 10_000


def test_rope_scaling_by_its_three_cases():
    shape = Shape(24, width=128, heads=2, rope_theta=500.0, rope_scaling=LLAMA3_SCALING)
    factor, low, high, context = LLAMA3_SCALING
    cos, _ = LanguageModel(shape).model.rope(torch.tensor([[1]]))
    cases = set()
    for i in range(32):
        frequency = 500.0 ** -(i / 32)
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            case, expected = "fast", frequency
        elif wavelength > context / low:
            case, expected = "slow", frequency / factor
        else:
            smooth = (context / wavelength - low) / (high - low)
            case = "between"
            expected = (1 - smooth) * frequency / factor + smooth * frequency
        cases.add(case)
        assert cos[0, 0, i].item() == pytest.approx(math.cos(expected), abs=1e-6)
    assert cases == {"fast", "slow", "between"}


def test_a_shape_of_an_older_checkpoint_can_be_read():
    old = asdict(tiny().shape)
    del old["head"], old["rope_scaling"], old["qkv_bias"], old["qk_norm"]
    assert Shape(**old) == tiny().shape
    assert Shape(**old).head_width == 8


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_and_greedy_answers_are_those_of_transformers(tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    changes = dict(LAYOUTS[layout])
    family = changes.pop("family", "Llama")
    their_config = getattr(transformers, f"{family}Config")(**sizes | changes)
    theirs = getattr(transformers, f"{family}ForCausalLM")(their_config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.copy_(0.5 + torch.rand(parameter.shape))
    in_shards = layout == "grouped"
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if in_shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == in_shards
    ours = weights.load(tmp_path)
    ids = torch.randint(100, (3, 120))
    logits = theirs(ids).logits
    assert logits.std() > 0.5
    torch.testing.assert_close(ours(ids), logits, atol=1e-4, rtol=0)
    prompts = [ids[i, :n].tolist() for i, n in enumerate((5, 17, 1))]
    greedy = Sampling(max_new_tokens=40, eos_id=7, temperature=0)
    generation = generate(ours, prompts, greedy, torch.Generator().manual_seed(0))
    for prompt, answer in zip(prompts, generation.tokens.tolist()):
        one = torch.tensor([prompt])
        expected = theirs.generate(
            one, attention_mask=torch.ones_like(one), max_new_tokens=40, do_sample=False,
            eos_token_id=7, pad_token_id=0,
        )
        assert [token for token in answer if token >= 0] == expected[0, len(prompt):].tolist()
    if layout == "llama3":
        unscaled = weights.load(tmp_path, rope_scaling=())(ids)
        assert not torch.allclose(unscaled, logits, atol=0.01)


# --------------------------------------------------------------------------------------------------
# What a configuration takes over

def cfg_of(folder, **model_settings):
    settings = {"init": str(folder), "context": 96} | model_settings
    cfg = config.Config()
    return replace(cfg, model=replace(cfg.model, **settings))


def test_a_configuration_gets_the_sizes_of_the_model(tmp_path, write_model):
    _, folder = write_model(tmp_path / "base", context=256, tied=True)
    model = weights.sized(cfg_of(folder, dropout=0.1)).model
    assert (model.layers, model.width, model.vocab, model.hidden) == (3, 32, 400, 40)
    assert (model.heads, model.kv_heads, model.tied) == (4, 2, True)
    assert (model.context, model.dropout) == (96, 0.1)  # the run's own
    assert weights.sized(config.Config()) == config.Config()


def test_settings_that_do_not_fit_the_model_are_refused(tmp_path, write_model):
    _, folder = write_model(tmp_path / "base", context=64)
    with pytest.raises(ConfigError, match="^model.context = 96: must be at most 64"):
        weights.sized(cfg_of(folder))
    with pytest.raises(ConfigError, match="^model.train_layers = 3: must be less than the 3 lay"):
        weights.sized(cfg_of(folder, context=64, train_layers=3))


# --------------------------------------------------------------------------------------------------
# Refused, in one line

BROKEN_CONFIGS = {  # changes of config.json, parts of the message
    "another model": (
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "gemma"
    ),
    "a family of another head": (
        {"model_type": "qwen2", "architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"
    ),
    "mistral with its usual window": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "sliding_window", "4096"
    ),
    "qwen with a window": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 512,
         "use_sliding_window": True}, "sliding_window", "use_sliding_window = false"
    ),
    "a layer with a window": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"
    ),
    "smollm3 with layers without positions": (
        {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"],
         "no_rope_layers": [1, 1, 0]}, "no_rope_layers"
    ),
    "smollm3 as it is by default": (
        {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}, "no_rope_layers"
    ),
    "a reward model": (
        {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"
    ),
    "no architecture": ({"architectures": ...}, "None"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "sliding window": ({"sliding_window": 4096}, "sliding_window"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "partly rotary": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    "linear, in the oldest spelling": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"
    ),
    "scaling without a factor": ({"rope_scaling": SCALED | {"factor": None}}, "factor"),
    "scaling upside down": (
        {"rope_scaling": SCALED | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "low_freq_factor",
    ),
    "scaling by kind of layer": (
        {"rope_parameters": {"full_attention": SCALED}}, "rope_parameters"
    ),
    "scaling as a text": ({"rope_scaling": "llama3"}, "rope_scaling"),
    "huge": ({"num_hidden_layers": 10 ** 12}, "num_hidden_layers"),
    "no width": ({"hidden_size": ...}, "hidden_size"),
    "a text for a number": ({"vocab_size": "many\nlines"}, "vocab_size"),
    "true for a number": ({"num_attention_heads": True}, "num_attention_heads"),
    "odd heads": ({"head_dim": 7}, "head_dim"),
    "uneven groups": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "no head_dim and a rest": (
        {"head_dim": ..., "num_attention_heads": 5, "num_key_value_heads": 1}, "head_dim"
    ),
    "tied or not": ({"tie_word_embeddings": "no"}, "tie_word_embeddings", "true or false"),
    "too short": ({"max_position_embeddings": 64}, "model.context", "64"),
}


def change_weights(change):
    def apply(folder):
        path = folder / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)
    return apply


def write_file(name, content):
    def apply(folder):
        (folder / name).write_bytes(content)
    return apply


def cut(name, n):
    def apply(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:n])
    return apply


def remove(name):
    def apply(folder):
        (folder / name).unlink()
    return apply


def replace_by(name, make):
    """make(path): a function that puts something else there"""
    def apply(folder):
        (folder / name).unlink()
        make(folder / name)
    return apply


def link_to_itself(path):
    path.symlink_to(path.name)


def write_index(table):
    def apply(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    return apply


def a_tensor_too_few(state):
    del state["model.layers.1.mlp.up_proj.weight"]


def a_tensor_too_many(state):
    state["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def a_hostile_name(state):
    state["x\ny" * 500] = torch.ones(1)


def another_shape(state):
    state["model.norm.weight"] = torch.ones(31)


def transposed(state):
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].T.contiguous()


def whole_numbers(state):
    state["model.norm.weight"] = torch.ones(32, dtype=torch.int64)


def not_a_number(state):
    state["model.norm.weight"].fill_(math.nan)


WEIGHTS = "model.safetensors"
BROKEN_FILES = {  # function of the folder, parts of the message
    "cut config": (cut("config.json", 40), "config.json", "JSON"),
    "config of zeros": (write_file("config.json", bytes(100)), "config.json"),
    "a list": (write_file("config.json", b"[1]"), "config.json", "object"),
    "deep config": (write_file("config.json", b"[" * 100_000), "config.json"),
    "no config": (remove("config.json"), "config.json", "no such file"),
    "no weights": (remove(WEIGHTS), "neither model.safetensors"),
    "empty weights": (cut(WEIGHTS, 0), WEIGHTS, "fetch it again"),
    "weights cut in the header": (cut(WEIGHTS, 100), WEIGHTS, "fetch it again"),
    "weights cut in the data": (cut(WEIGHTS, 20_000), WEIGHTS, "fetch it again"),
    "a header of all memory": (
        write_file(WEIGHTS, b"\xff" * 8 + b"{}"), WEIGHTS, "fetch it again"
    ),
    "a pickle": (
        write_file(WEIGHTS, b"\x80\x04\x95" + b"c" * 200), WEIGHTS, "fetch it again"
    ),
    "a config without a name": (replace_by("config.json", link_to_itself), "symbolic links"),
    "a pipe for a config": (replace_by("config.json", os.mkfifo), "config.json: is a pipe"),
    "a folder for a config": (replace_by("config.json", os.mkdir), "config.json: is a folder"),
    "a pipe for weights": (replace_by(WEIGHTS, os.mkfifo), f"{WEIGHTS}: is a pipe"),
    "a folder for weights": (replace_by(WEIGHTS, os.mkdir), f"{WEIGHTS}: is a folder"),
    "weights that link to themselves": (replace_by(WEIGHTS, link_to_itself), "symbolic links"),
    "an index to the folder itself": (write_index({"weight_map": {"a": ".."}}), "is a folder"),
    "an index of a name with NUL": (write_index({"weight_map": {"a": "\0"}}), "null byte"),
    "an index of no text": (write_index({"weight_map": {"a": "\ud800"}}), "surrogates"),
    "a tensor too few": (change_weights(a_tensor_too_few), "lack", "layers.1.mlp.up_proj"),
    "a tensor too many": (change_weights(a_tensor_too_many), "unknown", "q_proj.bias"),
    "a hostile name": (change_weights(a_hostile_name), "unknown"),
    "another shape": (change_weights(another_shape), "model.norm.weight", "[31]", "[32]"),
    "transposed": (change_weights(transposed), "up_proj"),
    "whole numbers": (change_weights(whole_numbers), "model.norm.weight", "I64"),
    "not a number": (change_weights(not_a_number), "model.norm.weight", "finite"),
    "an index to elsewhere": (
        write_index({"weight_map": {"a": "../part.safetensors"}}), "weight_map"
    ),
    "an index of nothing": (write_index({"weight_map": {}}), "weight_map"),
    "an index without a map": (write_index({}), "weight_map"),
    "an index of numbers": (write_index({"weight_map": {"a": 1}}), "weight_map"),
    "a part that is not there": (
        write_index({"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors"
    ),
}


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory, write_model):
    return write_model(tmp_path_factory.mktemp("base") / "sound", context=256)[1]


def read_all(folder):
    """What a run reads of a folder, the tokenizer aside"""
    weights.sized(cfg_of(folder))
    weights.load(folder, LanguageModel, context=96)


def check_refused(folder, parts):
    with pytest.raises(ConfigError) as error:
        read_all(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", BROKEN_CONFIGS)
def test_a_config_that_cannot_be_loaded_is_refused(sound_folder, tmp_path, edit, name):
    folder = tmp_path / "base"
    shutil.copytree(sound_folder, folder)
    change, *parts = BROKEN_CONFIGS[name]
    edit(folder / "config.json", change)
    check_refused(folder, parts)


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_refused(sound_folder, tmp_path, name):
    folder = tmp_path / "base"
    shutil.copytree(sound_folder, folder)
    change, *parts = BROKEN_FILES[name]
    change(folder)
    check_refused(folder, parts)


def test_the_folder_that_was_broken_above_is_sound(sound_folder):
    read_all(sound_folder)
    assert weights.shape_of(sound_folder) == tiny(vocab=400, tied=False, kv_heads=2,
                                                  context=256).shape


def test_a_reward_model_is_loaded_only_as_one(tmp_path, write_model):
    _, folder = write_model(tmp_path / "out", RewardModel)
    weights.load(folder, RewardModel)
    with pytest.raises(ConfigError, match="only ForCausalLM of model_type llama, mistral"):
        weights.load(folder)
