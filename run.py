"""A run: its configuration, device, data and models, as the stages share them."""
import functools
import os
import re
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

import config as configuration
import data
import files
import pretrained
import states
import world
from config import ConfigError
from data import DataError
from model import LanguageModel, RewardModel, Shape, sample


@dataclass
class Run:
    config: configuration.Config
    device: torch.device
    dtype: torch.dtype
    compile: bool
    slot: int = 0              # which line of the terminal the progress bar takes

    def path(self, name):
        return os.path.join(self.config.out_dir, name)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def log(self, **record):
        files.append_line(self.path("log.jsonl"), {k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()})

    def bar(self, total, name, start=0):
        return tqdm(total=total, initial=start, desc=name, disable=None, dynamic_ncols=True, position=self.slot, leave=False, smoothing=0.1)

    @functools.cached_property
    def encoding(self):
        try:
            with open(self.path("encoding.json")) as file:
                return data.encoding_from_json(file.read())
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(f"{self.path('encoding.json')}: not a readable tokenizer ({error}); delete it and run the same command again") from None

    def frozen(self, layers):
        """So many of the lowest layers of model.init, or None for none: one copy for all models that stand on as many"""
        m = self.config.model
        return frozen_layers(pretrained.directory(m.init), layers, m.context, self.device, self.dtype) if layers else None

    @functools.cached_property
    def below(self):
        """The frozen layers of this run's configuration, or None"""
        m = self.config.model
        return self.frozen(m.layers - m.train_layers if m.train_layers >= 0 else 0)

    @functools.cached_property
    def pairs(self):
        return load_pairs(self.config)

    @functools.cached_property
    def ood_pairs(self):
        return load_ood(self.config, self.pairs["train"])

    @functools.cached_property
    def train(self):
        return encoded(self, "train", self.pairs["train"])

    @functools.cached_property
    def valid(self):
        return encoded(self, "valid", self.pairs["valid"])

    @functools.cached_property
    def ood(self):
        return {name: encoded(self, name, pairs) for name, pairs in self.ood_pairs.items()}


def open_run(config, slot=0):
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': this torch sees no CUDA device; use device=cpu or install a CUDA build of torch")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if name == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"  # CUDA only: not run by CI
    if dtype == "fp16" and name == "cpu":
        raise ConfigError("dtype = 'fp16': on CPU use float32 or bf16")
    torch.set_float32_matmul_precision("high")
    if config.threads:
        torch.set_num_threads(config.threads)
    compile = config.compile == "on" or config.compile == "auto" and name == "cuda"
    return Run(config, torch.device(name), {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype], compile, slot)


def load_pairs(config):
    """-> {"train": [Pair], "valid": [Pair]}; the world's truth is not read here"""
    if config.data.train == ("world",):
        train, valid, _ = world_pairs(config)
        train, valid = ([data.Pair(**row, source=f"world:{i + 1}", index=i) for i, row in enumerate(rows)] for rows in (train, valid))
    elif config.data.valid or not config.data.valid_share:
        train, valid = ([p for path in paths for p in data.read_pairs(path)] for paths in (config.data.train, config.data.valid))
    else:
        train, valid = data.split([p for path in config.data.train for p in data.read_pairs(path)], config.data.valid_share, config.seed)
        if not valid or not train:
            raise DataError(f"{config.data.train[0]}: too few different first turns to hold {config.data.valid_share:.0%} of them out; give data.valid or raise data.valid_share")
    shared = data.check_apart(train, valid)
    if shared and config.data.train != ("world",):  # the world's greetings are few, its prompts differ
        print(f"data: note that {shared} first human turns stand in training and validation alike")
    return {"train": train[:config.data.limit or None], "valid": valid}


def world_pairs(config):
    """-> training and validation pairs as dictionaries, and the truths of the training pairs"""
    w = config.world
    noise = world.Noise(w.temperature, w.flip, w.bias, w.shared)
    train, train_truth = world.pairs(w.pairs, config.seed, noise, items=w.items)
    seen = frozenset(row["prompt"] for row in train)
    valid, _ = world.pairs(w.valid, f"{config.seed} valid", noise, items=w.items, exclude=seen)
    return train, valid, train_truth


def load_ood(config, train):
    if config.data.train == ("world",) and not config.data.ood:
        w = config.world
        noise = world.Noise(w.temperature, w.flip, w.bias, w.shared)
        out = {}
        for domain in world.HELD_OUT_DOMAINS:
            rows, _ = world.pairs(w.ood // len(world.HELD_OUT_DOMAINS), f"{config.seed} ood", noise, (domain,), contrast=0.25)  # manners carry over, answers cannot
            out[domain] = [data.Pair(**row, source=f"{domain}:{i + 1}", index=i) for i, row in enumerate(rows)]
        return out
    out = {}
    for path in config.data.ood:
        name = data.short_name(path)
        out[re.sub(r"\W", "_", path) if name in out else name] = pairs = data.read_pairs(path)
        data.check_apart(train, pairs)
    return out


def encoded(run, name, pairs):
    """-> kept pairs, their Rows; what was dropped is counted on the screen and listed in dropped_NAME.jsonl"""
    kept, rows, dropped = data.encode_pairs(run.encoding, pairs, run.config.model.context)
    if not kept and dropped:
        raise DataError(f"{dropped[0][0]}: {dropped[0][1]}; no pair of {name} is left")
    if dropped and run.slot == 0:
        files.save_jsonl(run.path(f"dropped_{name}.jsonl"), ({"source": s, "reason": r} for s, r in dropped))
        print(f"data: {name}: {len(kept):,} pairs kept, {len(dropped)} dropped, all listed in {run.path(f'dropped_{name}.jsonl')}")
        first = {}
        for source, reason in dropped:
            first.setdefault(re.sub(r"\d+", "n", reason), []).append((source, reason))
        for alike in first.values():
            print(f"  {len(alike)} like {alike[0][0]}: {alike[0][1]}")
    return kept, states.kept(run, name, rows, files.should_stop)


# ---------------------------------------------------------------------------------------------------------------------
# Models

@functools.cache
def frozen_layers(folder, layers, context, device, dtype):
    """A pretrained model's embedding and lowest blocks, once a process.  The blocks' matrices are in the precision of the run, which autocast
    would cast them to at every step anyway; what is trained has its master weights in float32."""
    below = pretrained.load(folder, LanguageModel, device, context=context).model
    below.shape, below.layers, below.norm = replace(below.shape, layers=layers), below.layers[:layers], torch.nn.Identity()
    for module in below.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)
    return below.requires_grad_(False).eval()


def build(run, kind, shape):
    """A model whose weights are still to be set, on the run's device, and on the layers that all models of this process share"""
    return kind(shape, run.frozen(shape.frozen)).to(run.device)


def load_model(run, kind, name):
    """kind: LanguageModel or RewardModel, from NAME.pt, ready to be used, not trained"""
    state = files.load_tensors(run.path(f"{name}.pt"), run.device)
    if state.get("init", "") and state["init"] != pretrained.digest(run.config.model.init):
        raise ConfigError(f"{run.path(f'{name}.pt')}: was trained on the frozen layers of another model than is in {run.config.model.init} now; put that one back, or train again")
    model = build(run, kind, Shape(**state["shape"]))
    model.load_state_dict(state["model"])
    return model.eval()


def save_model(run, name, model):
    stands_on = {"init": pretrained.digest(run.config.model.init)} if model.shape.frozen else {}
    files.save_tensors(run.path(f"{name}.pt"), {"shape": asdict(model.shape), "model": model.state_dict(), **stands_on})


def optimiser_of(model, name, lr, weight_decay, besides=()):
    """Decay on matrices only, as usual: not on the gains of the norms, nor on parameters beside the model's.  name: train.optimiser"""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [*(p for p in model.parameters() if p.dim() <= 1), *besides]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def rewards_of(run, model, rows, name="", features=False):
    """Rewards of all branches of all rows, or the states they are read from.  -> (N, k), or (N, k, C), float32 on the CPU"""
    out = torch.zeros(len(rows), len(rows[0].responses), *([model.shape.width] if features else []))
    lengths = [len(r) for r in rows]
    parts = data.batches(lengths, 128, 0, shuffle=False)
    with run.bar(len(parts), name) as bar, run.autocast():
        for index in parts:
            batch = data.collate([rows[i] for i in index]).to(run.device)
            rewards, h = model(*batch[:3], read=batch.last, features=True, states=batch.states)
            out[torch.from_numpy(index)] = (h if features else rewards).float().cpu()
            bar.update()
    return out


def gaps_of(run, model, rows):
    """r(chosen) - r(rejected) by a reward model, or by the one saved as NAME.pt.  -> (N,)"""
    if not rows:
        return torch.zeros(0)
    name = f"{model} scores" if isinstance(model, str) else "scores"
    chosen, rejected = rewards_of(run, load_model(run, RewardModel, model) if isinstance(model, str) else model, rows, name).unbind(1)
    return chosen - rejected


def sft_rows(run):
    """What the SFT model learns to say: the world's demonstrations, or the chosen answers of files -> [Row] of one response"""
    w = run.config.world
    if run.config.data.train != ("world",):
        return [r.branches(0) for r in run.train[1]]
    shown = world.demonstrations(w.demonstrations, run.config.seed, w.p_right, items=w.items)
    for domain in run.config.ppo.domains:  # as many of each as there are of a training domain
        shown += world.demonstrations(w.demonstrations // len(world.TRAIN_DOMAINS), f"{run.config.seed} {domain}", w.p_right, (domain,))
    rows = [data.encode(run.encoding, d["prompt"], (d["response"],), run.config.model.context) for d in shown]
    return states.kept(run, "demonstrations", rows, files.should_stop)


def policy_prompts(run, pairs, max_new=None):
    """Different prompts with room for an answer of max_new tokens, ppo.max_new unless given -> [(text, token ids)]"""
    room = run.config.model.context - (max_new or run.config.ppo.max_new) - 1
    texts = dict.fromkeys(p.prompt for p in pairs)
    return [(text, data.encode_prompt(run.encoding, text, room)) for text in texts]


@torch.no_grad()
def answers(run, name, prompts, seed, temperature, top_p=1.0, copies=1):
    """Answers of the policy NAME.pt, copies to each (text, token ids) -> texts, prompt by prompt; Rows of as many responses, with their end

    seed: a number, or a generator that has been used before
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    model, s, end = load_model(run, LanguageModel, name), run.config.ppo, data.end_id(run.encoding)
    texts, rows, step = [], [], max(1, 128 // copies)
    with run.bar(len(prompts), f"answers of {name}") as bar, run.autocast():
        for start in range(0, len(prompts), step):
            part = prompts[start:start + step]
            drawn = sample(model, [tokens for _, tokens in part], s.max_new, end, generator, temperature, top_p=top_p, min_new=s.min_new, copies=copies)
            replies = [[t for t in reply if t not in (-1, end)] for reply in drawn.tokens.tolist()]
            texts += [run.encoding.decode(reply) for reply in replies]
            rows += [data.Row(np.array(tokens), tuple(np.array([*reply, end]) for reply in replies[i * copies:(i + 1) * copies])) for i, (_, tokens) in enumerate(part)]
            bar.update(len(part))
    return texts, rows
