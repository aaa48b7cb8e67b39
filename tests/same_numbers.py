"""Check that a change of the code has changed no trained number.

    python tests/same_numbers.py REV [--only=NAME,NAME] [--keep=DIR]

Runs a set of small configurations by `python train.py` at the git revision REV, in a temporary
worktree, and in the present working tree, in a copy of it, so that it may be edited meanwhile.
Both run on this machine, on one thread each, two configurations side by side. Then compares all
that the two runs wrote: tensors bit for bit, numbers and texts one by one.

Prints one line for each configuration: the seconds that the present tree took, how many files,
numbers and texts were compared, and `equal` or the first differences. Exit code 1 if anything
differs or a run fails, 2 if the command is wrong.

    --only=NAME,NAME   these configurations alone; a wrong name lists all names
    --keep=DIR         where the results at REV are kept, by default out/same_numbers/REVHASH;
                       a second call runs only the present tree. Results of the present tree
                       that differ are put into DIR/present/NAME, to be looked at

What was renamed on purpose goes into RENAMED, RENAMED_FILES and NOT_COMPARED below. Settings on
the command lines keep the names that they had at e442778: the present tree must know the old ones.
The script imports nothing of the project and makes its input files itself.
"""
import fnmatch
import gzip
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
INPUTS = "same_numbers_inputs"  # in the root of either tree: messages and `source` hold this path
TIMEOUT = 600                   # seconds, for one run
SHOWN = 4                       # differences printed for one configuration

# -------------------------------------------------------------------------------------------------
# What may differ

# (old, new): a key of a dictionary, or a text that is such a name, in any file; a key may stand
# here several times. The old name is still accepted where the new tree writes it.
RENAMED = [
    ("clip_fraction", "clipfrac"),
    ("kl_old", "approx_kl"),
    ("sampled_scored_gap", "logprob_mismatch_max"),
    ("sampled_scored_mean", "logprob_mismatch_mean"),
    ("ended", "eos_rate"),
    ("kl_weight", "kl_coef"),
]

# (pattern, replacement) for re.sub on the whole name of a file in out_dir, from old to new
RENAMED_FILES = [
]

# FILE/KEY/KEY...: this part of the file is not compared; * as in the shell
NOT_COMPARED = [
    "results.json/config",
    "results.json/versions",
    "results.json/policy/*/kl",      # since then measured on untruncated answers
    "results.json/policy_ood/*/kl",
    "*audit*/findings",              # and these rows of the audit are new
    "*audit*/answers that differ in blanks alone",
    "*audit*/pairs with an empty *",
    "*.pt/shape/qk*",                # and these fields of a shape
    "*.pt/shape/lora_*",
]

FILES = (
    "*.pt",
    "strength.jsonl",
    "cleaned.jsonl",
    "rollouts_*.jsonl",
    "samples_*.jsonl",
    "answers*.jsonl",
    "watch_*.jsonl",
    "audit.json",
    "encoding.json",
    "results.json",
    "export/*/*.json",
    "export/*/*.safetensors",
)

ORDER = (  # of the stages, by the beginnings of their files' names; anything else comes last
    "encoding",
    "audit",
    "sft",
    "member",
    "gaps",
    "strength",
    "cleaned",
    "reward",
    "samples",
    "meta",
    "watch",
    "rollouts",
    "policy",
    "answers",
    "results",
)

# -------------------------------------------------------------------------------------------------
# The configurations. {inputs} is INPUTS, {out} the out_dir of the run

COMMON = """
    --threads=1 --train.workers=1 --device=cpu
    --evaluate.bootstrap=20 --evaluate.groups=4 --evaluate.prompts=8
    --ensemble.members=2 --ensemble.epochs=1 --ensemble.batch=16
    --sft.epochs=1 --reward.epochs=2 --reward.batch=16
    --ppo.iterations=2 --ppo.critic_pretrain=0 --ppo.episodes=8 --ppo.minibatches=2
    --ppo.max_new=12 --ppo.lr=1e-3 --ppo.methods=flip
"""

SCRATCH = COMMON + """
    --model.layers=2 --model.width=32 --model.heads=2 --model.kv_heads=2 --model.vocab=400
"""

WORLD = SCRATCH + """
    --world.pairs=96 --world.valid=48 --world.ood=24 --world.demonstrations=96
"""

# PPO whose policy has learned to end some of its answers, and moves
PPO = WORLD + """
    --world.demonstrations=240 --sft.epochs=6 --sft.lr=4e-3 --reward.epochs=1
    --ppo.iterations=5 --ppo.episodes=12 --ppo.max_new=20 --ppo.lr=2e-3
"""

FILES_IN = """
    --data.train={inputs}/pairs.jsonl,{inputs}/dialogues.jsonl.gz --model.context=96
"""

PRETRAINED = COMMON + FILES_IN + """
    --model.init={inputs}/chatml --data.valid_share=0.3 --data.limit=64 --reward.lr=5e-3
"""

LLAMA3 = COMMON + FILES_IN + """
    --model.init={inputs}/llama3 --data.template=llama3 --data.valid_share=0.3 --data.limit=64
"""

TEN = (
    "baseline,flip,smooth,soft,margin,soft_margin,smooth_margin,soft_target_margin,flip_margin,drop"
)

CONFIGURATIONS = {
    "tiny": """
        --config=configs/tiny.toml --threads=1 --train.workers=1 --device=cpu
        --world.pairs=160 --world.demonstrations=320 --world.valid=100 --world.ood=45
        --ensemble.members=2 --ensemble.epochs=1 --reward.epochs=1
        --ppo.iterations=2 --ppo.critic_pretrain=1 --ppo.episodes=8 --ppo.max_new=24
        --evaluate.prompts=12 --evaluate.bootstrap=100 --contrast.term=simcse
        --meta.rounds=1 --meta.prompts=20
    """,
    "simcse_pairs": WORLD + """
        --ppo.methods= --contrast.term=simcse --contrast.items=pairs
    """,
    "simcse_difference": WORLD + """
        --ppo.methods= --contrast.term=simcse --contrast.items=difference
        --contrast.weight=0.5 --contrast.temperature=0.2 --contrast.dropout=0.1 --train.accumulate=2
    """,
    "swav_pairs": WORLD + """
        --ppo.methods= --contrast.term=swav --contrast.items=pairs --contrast.weight=0.5
        --contrast.prototypes=8 --contrast.queue=40 --contrast.frozen=0.5
    """,
    "swav_difference": WORLD + """
        --ppo.methods= --contrast.term=swav --contrast.items=difference --contrast.weight=0.5
        --contrast.prototypes=6 --contrast.epsilon=0.1 --contrast.iterations=5
        --train.accumulate=2
    """,
    "folds_unseen": WORLD + """
        --ensemble.members=4 --ensemble.folds=2 --ensemble.vote=unseen --reward.methods=flip
        --ppo.methods=
    """,
    "folds_all": WORLD + """
        --ensemble.members=4 --ensemble.folds=4 --ensemble.vote=all --strength.method=drop
        --strength.q=0.2 --reward.methods=drop --ppo.methods= --strength.show=3
    """,
    "treatments": WORLD + f"""
        --ensemble.members=3 --ensemble.epochs=3 --reward.methods={TEN} --reward.epochs=1
        --strength.method=flip_margin --strength.q=0.15 --strength.alpha=0.3 --strength.k=2.5
        --strength.margin_scale=0.7 --strength.margin_cap=0.2 --ppo.methods=
    """,
    "margin_uncapped": WORLD + """
        --ensemble.epochs=3 --strength.method=soft_target_margin --strength.margin_scale=2
        --reward.methods=margin,soft_target_margin --ppo.methods=margin
    """,
    "meta_first": WORLD + """
        --meta.rounds=2 --meta.arms=meta,plain,none --meta.domain=train --meta.prompts=24
        --meta.k=3 --meta.batch=8 --meta.lr=1e-3
    """,
    "meta_second": WORLD + """
        --meta.rounds=2 --meta.arms=meta,plain,none --meta.domain=ood --meta.second_order=true
        --meta.prompts=10 --meta.k=4 --meta.batch=12 --meta.eta=0.5 --meta.lr=1e-3
        --meta.method=flip --meta.epochs=2 --meta.temperature=1.0 --world.ood=48
    """,
    "ppo_plain": PPO + """
        --ppo.reward=mean --ppo.kl_kind=k2 --ppo.normalise=false --ppo.temperature=0.8
        --ppo.gamma=0.98 --ppo.lam=0.9 --ppo.value_clip=0.05 --ppo.clip=0.05 --ppo.kl=0.2
    """,
    "ppo_steered": PPO + """
        --ppo.reward=worst --ppo.ptx=0.5 --ppo.kl_target=0.28 --ppo.reset_reference=3
        --ppo.critic_pretrain=1 --ppo.whiten=true --ppo.warmup=0.6 --ppo.methods=baseline,flip
        --ppo.iterations=6
    """,
    "ppo_guarded": PPO + """
        --ppo.reward=mean_minus_std --ppo.std_weight=2 --ppo.kl_kind=k3 --ppo.no_end_penalty=0.7
        --ppo.stop_kl=0.003 --ppo.min_new=3 --ppo.reward_clip=0.8 --ppo.epochs=3
        --ppo.minibatches=3 --ppo.kl=0.5
    """,
    "ppo_verifier": PPO + """
        --ppo.reward=verifier --ppo.domains=translation,arithmetic --world.p_right=1
        --ppo.whiten=true --ppo.reward_clip=10 --reward.methods=baseline --ppo.methods=baseline
        --ppo.iterations=4 --ppo.episodes=16 --ppo.max_new=32 --model.vocab=500 --model.width=64
        --world.items=2 --world.demonstrations=400 --sft.epochs=8 --sft.lr=8e-3
    """,
    "training": WORLD + """
        --model.dropout=0.1 --train.optimiser=adafactor --train.accumulate=3
        --train.checkpointing=true --train.warmup=0.3 --train.weight_decay=0.01 --train.clip=0.5
        --sft.lr=1e-2 --ensemble.lr=1e-2 --reward.lr=1e-2 --ppo.lr=1e-2
        --meta.rounds=1 --meta.prompts=16 --meta.k=3 --meta.batch=8 --meta.lr=1e-3
    """,
    "head_only": PRETRAINED + """
        --model.train_layers=0 --sft.epochs=0 --ppo.methods= --model.states={out}/states
        --data.ood={inputs}/other.jsonl
    """,
    "one_layer": PRETRAINED + """
        --model.train_layers=1 --model.states={out}/states --data.template=hh --sft.epochs=1
        --data.ood={inputs}/other.jsonl --ppo.ptx=0.3 --model.dropout=0.05
        --meta.rounds=1 --meta.prompts=8 --meta.k=3 --meta.batch=8 --meta.lr=1e-3
    """,
    "one_layer_chatml": PRETRAINED + """
        --model.train_layers=1 --model.states= --data.template=chatml --sft.epochs=0
        --data.ood={inputs}/other.jsonl --meta.domain=ood
        --meta.rounds=1 --meta.prompts=8 --meta.k=3 --meta.batch=8 --meta.lr=1e-3
    """,
    "all_layers": LLAMA3 + """
        --model.train_layers=-1 --sft.lr=1e-3 --data.ood={inputs}/other.jsonl
    """,
    "two_layers_bf16": LLAMA3 + """
        --model.train_layers=2 --model.states={out}/states --dtype=bf16 --contrast.term=simcse
        --contrast.dropout=0.05 --ppo.methods=baseline
    """,
    "files_split": SCRATCH + FILES_IN + """
        --data.valid_share=0.25 --data.limit=50 --data.ood={inputs}/other.jsonl --seed=7
        --meta.rounds=1 --meta.arms=meta,none --meta.domain=ood --meta.prompts=8 --meta.k=3
        --meta.batch=8 --evaluate.temperature=0
    """,
    "files_valid": SCRATCH + """
        --data.train={inputs}/dialogues.jsonl.gz --data.valid={inputs}/pairs.jsonl
        --data.ood={inputs}/other.jsonl,{inputs}/more.jsonl.gz --model.context=64 --ppo.methods=
    """,
    "labels_alone": """
        --config=configs/clean.toml --threads=1 --train.workers=1 --device=cpu
        --data.train={inputs}/pairs.jsonl --model.vocab=400 --model.layers=2 --model.width=32
        --model.context=96 --evaluate.bootstrap=20 --evaluate.groups=4 --ensemble.epochs=1
        --sft.epochs=1
    """,
    "gqa": WORLD + """
        --model.layers=3 --model.heads=4 --model.kv_heads=2 --model.tied=false --model.vocab=300
        --model.hidden=48 --model.context=136 --model.width=48 --evaluate.temperature=0.5
        --evaluate.top_p=0.7 --evaluate.tie=0.5 --seed=3
    """,
    "world": WORLD + """
        --world.p_right=0.8 --world.items=3 --world.temperature=0.4 --world.flip=0.2
        --world.bias=0.1 --world.shared=2 --data.limit=80 --ppo.methods= --seed=11
        --train.weight_decay=0.5
    """,
    "bf16": WORLD + """
        --dtype=bf16 --meta.rounds=1 --meta.prompts=16 --meta.k=3 --meta.batch=8
    """,
}

EXPORTED = ("tiny", "one_layer", "all_layers")  # whose models are written as Hugging Face folders


def arguments(name, out):
    """The words that follow `train.py` -> [str]"""
    words = CONFIGURATIONS[name].split()
    return [word.format(inputs=INPUTS, out=out) for word in words] + [f"--out_dir={out}"]


# -------------------------------------------------------------------------------------------------
# Input files: preference pairs

QUESTIONS = ("How do I {} a {}?", "Can you tell me how to {} my {}?", "Is it best to {} a {}?")
OTHER_QUESTIONS = ("Please compute {} and {}.", "Translate {} into {}!", "Is {} more than {}?")
VERBS = ("paint", "repair", "sell", "clean", "carry", "fold", "open", "polish")
THINGS = ("boat", "chair", "violin", "window", "garden", "kettle", "lamp", "bicycle", "naïve café")
GOOD = ("Certainly, begin with the edges.", "First measure it, then go on slowly.", "It's easy:")
BAD = ("No idea.", "Why would I care?", "Just break it!")
MORE = ("Take your time.", "Ask a friend.", "That is all  I know.", "It costs 25 euros.")


def prompt_of(rng, number, questions):
    """One or two turns in HH's form; the number makes most first turns different"""
    turns = []
    for _ in range(1 + (rng.random() < 0.3)):
        question = rng.choice(questions).format(rng.choice(VERBS), rng.choice(THINGS))
        turns.append(f"\n\nHuman: {question}")
        turns.append(f"\n\nAssistant: {rng.choice(GOOD)}")
    turns[-1] = "\n\nAssistant:"
    if rng.random() < 0.8:
        turns[0] += f" ({number})"
    return "".join(turns)


def preferences(seed, n, questions=QUESTIONS):
    """-> [{"prompt", "chosen", "rejected"}], about a tenth of them with a wrong label"""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        prompt = prompt_of(rng, f"{seed} {number}", questions)
        good = f" {rng.choice(GOOD)} {rng.choice(MORE)} {number}"
        bad = f" {rng.choice(BAD)} {rng.choice(MORE)}"
        if rng.random() < 0.1:
            good, bad = bad, good
        rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return rows


def as_dialogues(rows):
    """The same in HH-RLHF's layout"""
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


def special_cases(rows):
    """Rows with what is rare: margins, no prompt, long texts, control characters, both alike"""
    for i in range(0, len(rows), 5):
        rows[i]["margin"] = i / 8
    rows[3]["prompt"] = ""
    rows[4]["prompt"] = "\n\nHuman: " + "Well then, " * 60 + "what now?\n\nAssistant:"
    rows[6]["chosen"] += " a\x02b"
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[8] = dict(rows[9])
    rows[11] = rows[10] | {"chosen": rows[10]["rejected"], "rejected": rows[10]["chosen"]}
    rows[12]["chosen"] += " and on" * 200
    rows[13]["rejected"] = rows[13]["chosen"] + "\x03"
    return rows


def write_rows(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


# -------------------------------------------------------------------------------------------------
# Input files: pretrained models of three layers, in Hugging Face's layout

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [*PRINTABLE, *(b for b in range(256) if b not in PRINTABLE)]
SYMBOL = dict(zip(BYTES, map(chr, [*PRINTABLE, *range(256, 324)])))  # GPT-2's names of the bytes


def merged(word, pair):
    """word: tuple of symbols -> the same with every such pair of neighbours joined"""
    out = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def learned_merges(texts, n):
    """The merges of a byte-level BPE, most frequent pair first -> [(symbol, symbol)]"""
    words = Counter()
    for text in texts:
        for word in re.findall(r" ?[^\W\d_]+|\d| ?[^\w\s]+|\s+", text):
            words[tuple(SYMBOL[b] for b in word.encode())] += 1
    merges, made = [], set()
    while len(merges) < n:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                if "".join(pair) not in made:
                    pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        made.add("".join(best))
        words = Counter({merged(word, best): count for word, count in words.items()})
    return merges


def tokenizer_json(merges, special, split, lacking=(), begin=None):
    """special: names of the special tokens, which take the lowest ids; lacking: bytes left out"""
    words = list(special)
    words += [SYMBOL[b] for b in range(256) if b not in lacking]
    words += ["".join(pair) for pair in merges]
    vocab = {word: i for i, word in enumerate(words)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": vocab[name], "content": name, **flags, "special": True} for name in special]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": split is None,
    }
    first = {"type": "Digits", "individual_digits": True}
    if split is not None:
        pattern = {"Regex": split}
        first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    post = None
    if begin is not None:
        mark = {"SpecialToken": {"id": begin, "type_id": 0}}
        one = {"Sequence": {"id": "A", "type_id": 0}}
        two = {"Sequence": {"id": "B", "type_id": 1}}
        post = {
            "type": "TemplateProcessing",
            "single": [mark, one],
            "pair": [mark, one, mark, two],
            "special_tokens": {begin: {"id": begin, "ids": [vocab[begin]], "tokens": [begin]}},
        }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [list(pair) for pair in merges] if begin else [" ".join(p) for p in merges],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, byte_level]},
        "post_processor": post,
        "decoder": byte_level,
        "model": model,
    }


def llama_config(vocab, **changes):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    return config | changes


def llama_weights(c, seed):
    """Random weights of the sizes in config.json -> {name: tensor}"""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns ** 0.5

    def gain():
        return 0.5 + torch.rand(width, generator=generator)

    width, hidden, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    head = c.get("head_dim", width // heads)
    asking, keys = heads * head, c["num_key_value_heads"] * head
    out = {"model.embed_tokens.weight": matrix(c["vocab_size"], width)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        out[layer + "input_layernorm.weight"] = gain()
        out[layer + "self_attn.q_proj.weight"] = matrix(asking, width)
        out[layer + "self_attn.k_proj.weight"] = matrix(keys, width)
        out[layer + "self_attn.v_proj.weight"] = matrix(keys, width)
        out[layer + "self_attn.o_proj.weight"] = matrix(width, asking)
        out[layer + "post_attention_layernorm.weight"] = gain()
        out[layer + "mlp.gate_proj.weight"] = matrix(hidden, width)
        out[layer + "mlp.up_proj.weight"] = matrix(hidden, width)
        out[layer + "mlp.down_proj.weight"] = matrix(width, hidden)
    out["model.norm.weight"] = gain()
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = matrix(c["vocab_size"], width)
    return out


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_chatml(folder, texts):
    """Like SmolLM2: ChatML's markers, digits apart, some bytes without a token, tied"""
    folder.mkdir()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizer_json(learned_merges(texts, 90), special, None, lacking=range(1, 5))
    config = llama_config(len(tokenizer["model"]["vocab"]), rope_theta=1000.0)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    write_json(folder / "config.json", config)
    save_file(llama_weights(config, 1), folder / "model.safetensors", {"format": "pt"})


def write_llama3(folder, texts):
    """Like Llama 3: a token before every text, scaled rotary positions, untied, bf16, two files"""
    folder.mkdir()
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = tokenizer_json(learned_merges(texts, 120), special, LLAMA3_SPLIT, begin=special[0])
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = llama_config(
        len(tokenizer["model"]["vocab"]) + 5,
        head_dim=12,
        num_key_value_heads=1,
        rope_theta=500.0,
        rope_scaling=scaling,
        tie_word_embeddings=False,
        eos_token_id=3,
    )
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "<|eot_id|>"}})
    write_json(folder / "config.json", config)
    weights = llama_weights(config, 2)
    names = list(weights)
    where = {}
    for i, part in enumerate((names[:10], names[10:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        where |= dict.fromkeys(part, file)
        half = {name: weights[name].bfloat16() for name in part}
        save_file(half, folder / file, {"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def write_inputs(folder):
    """Everything that {inputs} may name, always the same"""
    folder.mkdir()
    pairs = special_cases(preferences(1, 60))
    dialogues = preferences(2, 40)
    apart = {side: f"\n\nHuman: Hi, {side}\n\nAssistant: Hello." for side in ("chosen", "rejected")}
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "dialogues.jsonl.gz", [apart, *as_dialogues(dialogues)])
    write_rows(folder / "other.jsonl", preferences(3, 20, OTHER_QUESTIONS))
    write_rows(folder / "more.jsonl.gz", as_dialogues(preferences(4, 12, OTHER_QUESTIONS)))
    texts = [row[key] for row in pairs + dialogues for key in ("prompt", "chosen", "rejected")]
    write_chatml(folder / "chatml", texts)
    write_llama3(folder / "llama3", texts)


def digest_of(folder):
    seen = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        seen.update(f"{path.relative_to(folder)}\n".encode())
        seen.update(path.read_bytes())
    return seen.hexdigest()


# -------------------------------------------------------------------------------------------------
# The two trees, and a run in one of them

class RunFailed(Exception):
    """The text says where, and how the run's output ends."""


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def copy_present(to):
    """The working tree as it is now, without what git ignores"""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        source = ROOT / name
        if source.is_file():  # not one that is deleted and not yet committed so
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)


def environment():
    """That of this process, on one thread, without a GPU, without a path to other modules"""
    out = dict(os.environ)
    out.pop("PYTHONPATH", None)
    changes = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    return out | changes


def run(tree, name, out):
    """Run one configuration in a tree -> seconds. Raises RunFailed"""
    started = time.time()
    call_train(tree, arguments(name, out))
    if name in EXPORTED:
        call_train(tree, [*arguments(name, out), "--stage=export"])
    return time.time() - started


def call_train(tree, words):
    command = [sys.executable, "train.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(command, cwd=tree, env=environment(), timeout=TIMEOUT, **pipes)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"took more than {TIMEOUT} s") from None
    if done.returncode:
        lines = done.stdout.decode(errors="replace").strip().split("\n")
        ending = "\n".join(lines[-6:])
        raise RunFailed(f"exit code {done.returncode}\n{ending}")


def written(folder):
    """The files in a run's folder that are compared -> sorted names, with / in those of folders"""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if any(fnmatch.fnmatch(name, p) for p in FILES))


def machine():
    """What the numbers of a run depend on beside the code"""
    name = platform.processor()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        found = re.search(r"model name\s*: (.*)", cpus.read_text())
        name = found.group(1) if found else name
    capability = torch.backends.cpu.get_cpu_capability()
    return [platform.python_version(), torch.__version__, capability, name]


# -------------------------------------------------------------------------------------------------
# The comparison

class Found:
    """What a comparison has counted and found.

    differences: [(place, what)]; largest: absolute difference of two numbers
    """

    def __init__(self):
        self.files = self.numbers = self.texts = 0
        self.differences = []
        self.largest = 0.0

    def add(self, place, what, by=0.0):
        self.differences.append((place, what))
        self.largest = max(self.largest, by)


def short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_number(value):
    return isinstance(value, (int, float))


def compare(old, new, place, found):
    """Add to `found` what differs in two values of any kind. place: FILE/KEY/KEY..."""
    if any(fnmatch.fnmatch(place, pattern) for pattern in NOT_COMPARED):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        compare_dicts(old, new, place, found)
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        compare_lists(old, new, place, found)
    elif isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        compare_tensors(old, new, place, found)
    elif is_number(old) and is_number(new):
        compare_numbers(old, new, place, found)
    else:
        compare_others(old, new, place, found)


def partner(key, new):
    """The key under which `new` holds what the old dictionary holds under `key`, or None"""
    names = [key, *(after for before, after in RENAMED if before == key)]
    return next((name for name in names if name in new), None)


def compare_dicts(old, new, place, found):
    taken = set()
    for key, value in old.items():
        name = partner(key, new)
        if name is None:
            found.add(f"{place}/{key}", f"{short(value)} -> missing")
        else:
            taken.add(name)
            compare(value, new[name], f"{place}/{key}", found)
    for key in new.keys() - taken:
        compare_added(new[key], f"{place}/{key}", found)


def compare_added(value, place, found):
    if not any(fnmatch.fnmatch(place, pattern) for pattern in NOT_COMPARED):
        found.add(place, f"missing -> {short(value)}")


def compare_lists(old, new, place, found):
    if len(old) != len(new):
        found.add(place, f"{len(old)} entries -> {len(new)} entries")
    for i, (a, b) in enumerate(zip(old, new)):
        compare(a, b, f"{place}/{i}", found)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def compare_tensors(old, new, place, found):
    found.numbers += old.numel()
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (old, new)]
        found.add(place, f"{kinds[0]} -> {kinds[1]}")
        return
    if torch.equal(bits(old), bits(new)):
        return
    size = old.element_size()
    other = (bits(old) != bits(new)).view(-1, size).any(1).nonzero()[:, 0]
    a, b = (t.reshape(-1)[other].double() for t in (old, new))
    by = (a - b).abs().nan_to_num(nan=float("inf")).max().item()
    first = f"{a[0].item():.9g} -> {b[0].item():.9g} at {other[0].item()}"
    what = f"{len(other):,} of {old.numel():,} differ, first {first}, by up to {by:.3g}"
    found.add(place, what, by)


def compare_numbers(old, new, place, found):
    found.numbers += 1
    both_nan = old != old and new != new
    if old != new and not both_nan:
        found.add(place, f"{old!r} -> {new!r}", abs(old - new))


def compare_others(old, new, place, found):
    found.texts += 1
    if old != new and (old, new) not in RENAMED:
        found.add(place, f"{short(old)} -> {short(new)}")


def loaded(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line]
    return json.loads(text)


def new_name(name):
    for pattern, replacement in RENAMED_FILES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def compare_folders(old, new):
    """-> Found"""
    found = Found()
    names = {name: new_name(name) for name in written(old)}
    for name, there in names.items():
        if (new / there).exists():
            found.files += 1
            compare(loaded(old / name), loaded(new / there), name, found)
        else:
            found.add(name, "the file is missing")
    for name in written(new):
        if name not in names.values():
            found.add(name, "the file is new")
    return found


# -------------------------------------------------------------------------------------------------
# All together

class Check:
    """work: a temporary folder; keep: where the results at the revision are kept"""

    def __init__(self, revision, work, keep):
        self.revision, self.work, self.keep = revision, work, keep
        self.old, self.new = work / "old", work / "new"
        write_inputs(work / "inputs")
        self.about = [revision, digest_of(work / "inputs"), machine()]

    def kept(self, name):
        key = [*self.about, name, CONFIGURATIONS[name].split(), name in EXPORTED, FILES]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        return self.keep / f"{name}-{digest}"

    def prepare(self, names):
        """Make the trees; that of the revision only if a result of it is not kept"""
        self.new.mkdir()
        copy_present(self.new)
        (self.new / INPUTS).symlink_to(self.work / "inputs")
        if not all(self.kept(name).exists() for name in names):
            git("worktree", "add", "--detach", "--quiet", str(self.old), self.revision)
            (self.old / INPUTS).symlink_to(self.work / "inputs")

    def clean_up(self):
        if self.old.exists():
            git("worktree", "remove", "--force", str(self.old))

    def at_revision(self, name):
        """-> folder with the revision's results, made now if it is not there"""
        folder = self.kept(name)
        if not folder.exists():
            out = self.work / "old_runs" / name
            run(self.old, name, out)
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            self.copy(out, part)
            part.rename(folder)
        return folder

    def copy(self, out, to):
        to.mkdir(parents=True)
        for file in written(out):
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(out / file, to / file)

    def line(self, name):
        """Run and compare one configuration -> text, whether all is equal"""
        head = f"{name:<18}"
        try:
            old = self.at_revision(name)
        except RunFailed as error:
            return f"{head} FAILED at {self.revision[:12]}: {error}", False
        new = self.work / "new_runs" / name
        try:
            seconds = run(self.new, name, new)
        except RunFailed as error:
            return f"{head} FAILED in the present tree: {error}", False
        found = compare_folders(old, new)
        head += f"{seconds:6.1f} s{found.files:5} files{found.numbers:11,} numbers"
        head += f"{found.texts:7,} texts  "
        present = self.keep / "present" / name
        shutil.rmtree(present, ignore_errors=True)
        if found.differences:
            self.copy(new, present)
            return head + told(found), False
        return head + "equal", True


def rank(file):
    """Where in the run a file is made"""
    matching = (i for i, start in enumerate(ORDER) if file.startswith(start))
    return next(matching, len(ORDER))


def told(found):
    """The first differences as text, in the order of the stages; no file twice before all others"""
    seen = Counter()
    ranked = []
    for place, what in found.differences:
        file = place.split("/")[0]
        ranked.append((seen[file], rank(file), len(ranked), f"{place}: {what}"))
        seen[file] += 1
    count = len(found.differences)
    lines = [f"{count:,} DIFFERENCES, the largest of two numbers {found.largest:.3g}"]
    lines += [f"    {text}" for *_, text in sorted(ranked)[:SHOWN]]
    files = ", ".join(sorted(seen, key=rank))
    if count > SHOWN:
        lines.append(f"    and {count - SHOWN:,} more, in {files}")
    return "\n".join(lines)


def parse(argv):
    """-> revision, names of configurations, folder or None"""
    names, keep, revisions = list(CONFIGURATIONS), None, []
    for word in argv:
        if word.startswith("--only="):
            names = [name for name in word.removeprefix("--only=").split(",") if name]
        elif word.startswith("--keep="):
            keep = Path(word.removeprefix("--keep=")).resolve()
        elif word.startswith("-"):
            raise SystemExit(f"error: {word}: no such option\n\n{__doc__}")
        else:
            revisions.append(word)
    if len(revisions) != 1:
        raise SystemExit(f"error: give one revision\n\n{__doc__}")
    for name in names:
        if name not in CONFIGURATIONS:
            known = ", ".join(CONFIGURATIONS)
            raise SystemExit(f"error: --only={name}: no such configuration; there are {known}")
    return revisions[0], names, keep


def stop(*_):
    raise KeyboardInterrupt


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    revision, names, keep = parse(argv)
    revision = git("rev-parse", "--verify", revision + "^{commit}").strip()
    keep = keep or ROOT / "out" / "same_numbers" / revision
    signal.signal(signal.SIGTERM, stop)
    started, equal = time.time(), 0
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as work:
        check = Check(revision, Path(work).resolve(), keep)
        pool = ThreadPoolExecutor(2)
        try:
            check.prepare(names)
            for text, same in pool.map(check.line, names):
                equal += same
                print(text, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
            check.clean_up()
    seconds = time.time() - started
    print(f"{equal} of {len(names)} configurations equal to {revision[:12]}, {seconds:.0f} s")
    if equal < len(names):
        print(f"the results that differ are in {keep}/present")
    return int(equal < len(names))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            sys.exit(2)
        raise
