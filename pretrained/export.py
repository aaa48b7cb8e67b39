"""A policy or reward model of ours -> a Hugging Face folder that transformers loads."""
import json
import os
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common import load_model, score_rows
from config import ConfigError
from model import LanguageModel, RewardModel
from pretrained import lora
from pretrained.tokenizer import chat_template, to_json
from pretrained.weights import FAMILIES, HEADS, LLAMA3_SCALING
from runtime import files

EMBEDDING = "model.embed_tokens.weight"


def save(folder, model, tokenizer, facts=None):
    """Write model and Tokenizer as a Hugging Face folder, under a temporary name until complete.

    facts: further entries of config.json

    A reward model gets one more token, <|pad|>, whose embedding is zero:
    LlamaForSequenceClassification reads the reward at the last token that is not pad_token_id.
    This has to be the EOS of the answer, which therefore cannot be the padding as it is in a
    policy.

    Raises OSError, which names folder and remedy, if the folder cannot be written.
    """
    tensors = all_tensors(model)
    special = dict(tokenizer.special)
    pad = tokenizer.eos
    if isinstance(model, RewardModel):
        pad = add_padding(special, tensors, tokenizer.eos)
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    vocab_size = len(tensors[EMBEDDING])
    table = config_table(model, vocab_size, special, tokenizer, pad) | (facts or {})

    part = files.part_path(folder)
    try:
        os.makedirs(part, exist_ok=True)
        files.save_json(os.path.join(part, "config.json"), table)
        text = json.dumps(to_json(tokenizer, special), ensure_ascii=False)
        files.save_text(os.path.join(part, "tokenizer.json"), text)
        files.save_json(
            os.path.join(part, "tokenizer_config.json"),
            tokenizer_table(tokenizer, pad, model),
        )
        save_file(tensors, os.path.join(part, "model.safetensors"), {"format": "pt"})
        move_files(part, folder)
    except SafetensorError as error:
        raise files.cannot_write(folder, error) from None
    except OSError as error:
        if "cannot be written" in str(error):
            raise
        raise files.cannot_write(folder, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def move_files(part, folder):
    """Replace the files of an older export, and leave others in its folder alone.

    config.json goes first and comes last: a folder without it is no model.
    """
    os.makedirs(folder, exist_ok=True)
    config = os.path.join(folder, "config.json")
    if os.path.exists(config):
        os.remove(config)
    names = sorted(set(os.listdir(part)) - {"config.json"})
    for name in [*names, "config.json"]:
        os.replace(os.path.join(part, name), os.path.join(folder, name))


def all_tensors(model):
    """state_dict of the whole model, its frozen trunk included, without a tied output matrix; where
    there are adapters they are merged into the matrices"""
    tensors = {}
    if model.shape.frozen:
        trunk, = model.trunk
        for name, tensor in trunk.state_dict().items():
            tensors[f"model.{name}"] = tensor
    tensors |= lora.merged_tensors(model) if model.shape.lora_rank else model.state_dict()
    if model.shape.tied:
        tensors.pop("lm_head.weight", None)
    return tensors


def add_padding(special, tensors, eos):
    """Name of a special token for padding that is not EOS; added with its embedding if missing"""
    pad = "<|pad|>"
    if pad in special and pad != eos:
        return pad
    while pad in special:
        pad = f"<{pad}>"
    embedding = tensors[EMBEDDING]
    special[pad] = len(embedding)
    zeros = embedding.new_zeros(1, embedding.shape[1])
    tensors[EMBEDDING] = torch.cat((embedding, zeros))
    return pad


def architecture_of(model):
    """-> model_type, architecture.  Raises ConfigError if Hugging Face has none with these flags"""
    for model_type, family in FAMILIES.items():
        flags = {"qkv_bias": False, "qk_norm": False} | family.changes
        if all(getattr(model.shape, flag) == value for flag, value in flags.items()):
            return model_type, family.prefix + HEADS[type(model)]
    raise ConfigError("export: no architecture of Hugging Face has both biases and norms on "
                      "queries and keys")


def config_table(model, vocab_size, special, tokenizer, pad):
    """-> the dictionary of a config.json"""
    shape = model.shape
    model_type, architecture = architecture_of(model)
    table = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "use_cache": True,
        "eos_token_id": tokenizer.end_ids if tokenizer.more_eos else tokenizer.eos_id,
        "pad_token_id": special[pad],
        "bos_token_id": tokenizer.bos_id,
    }
    if shape.rope_scaling:
        scaling = dict(zip(LLAMA3_SCALING, shape.rope_scaling))
        scaling["original_max_position_embeddings"] = int(shape.rope_scaling[-1])
        table["rope_scaling"] = {"rope_type": "llama3"} | scaling
    if isinstance(model, RewardModel):
        table["num_labels"] = 1
        table["problem_type"] = "regression"  # a pipeline gives the reward, not its sigmoid
        table["id2label"] = {"0": "reward"}
        table["label2id"] = {"reward": 0}
    return table


def tokenizer_table(tokenizer, pad, model):
    """-> the dictionary of a tokenizer_config.json

    A text that is too long for a reward model loses its beginning: its end is what is judged.
    """
    table = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos,
        "pad_token": pad,
    }
    if tokenizer.bos:
        table["bos_token"] = tokenizer.bos
    table["model_max_length"] = model.shape.context
    table["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(model, RewardModel):
        table["truncation_side"] = "left"
    table["clean_up_tokenization_spaces"] = False
    table["chat_template"] = chat_template(tokenizer)
    return table


def export_models(run):
    """Export every language and reward model of a run that is up to date.

    run.known says which are; raises ConfigError if there is none
    """
    known = {name: work for name, work in run.known.items() if is_exported(name)}
    if all(work.reason for work in known.values()):
        raise ConfigError(
            f"--stage=export: {run.cfg.out_dir} has no model of this configuration; run the same "
            f"command without --stage first"
        )
    ready = [name for name, work in known.items() if not work.reason]
    for name in ready:
        load_model(run, kind_of(name), name)  # may raise, before anything is written
    for name, work in known.items():
        if name not in ready:
            why = "not made yet" if work.reason == "new" else work.reason
            print(f"export: {name} is left out ({why})")
            continue
        kind = kind_of(name)
        folder = run.path(f"export/{name}")
        model = load_model(run, kind, name)
        facts = reward_facts(run, model) if kind is RewardModel else {}
        if run.rank == 0:
            save(folder, model, run.tokenizer, facts)
        print(f"export: {folder}, {architecture_of(model)[1]}")


def reward_facts(run, model):
    """Mean and std of the rewards of all validation answers: a reward has no scale of its own"""
    if not run.valid.rows:
        return {}
    rewards = score_rows(run, model, run.valid.rows)
    return {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}


def kind_of(name):
    is_policy = name == "sft" or name.startswith("policy_")
    return LanguageModel if is_policy else RewardModel


def is_exported(name):
    prefixes = ("member_", "reward_", "meta_", "meta-adam_", "plain_", "ocrm_", "policy_")
    return name == "sft" or name.startswith(prefixes)
