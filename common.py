"""What the stages share: device, precision, optimizer, saved models, scoring and sampling.

`run` is the Run of runtime/run.py: the configuration, the data and the files of one output folder.
"""
import copy
import hashlib
import json
from dataclasses import asdict, replace

import numpy as np
import torch

import world
from config import ConfigError
from data import (
    DataError,
    EncodedPairs,
    Pair,
    Row,
    batches,
    collate,
    encode_pairs,
    encode_prompt,
    encode_row,
)
from generate import Sampling, draw_noise, generate
from model import LanguageModel, RewardModel, Shape, init_weights

MAX_LAYERS = 1000
MAX_GRAPHS = 64  # of a block's code, all models and stages of a process together
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCORE_BATCH = {"cpu": 32, "cuda": 128}  # rows a pass; the activations of 32 fit into the cache


def seed_from(text):
    """A 64-bit seed that depends on the text alone."""
    return int(hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16], 16)


# ----------------------------------------------------------------------------------------------
# Device and precision


def pick_device(config):
    """-> torch.device; raises ConfigError where CUDA is asked for and missing"""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("device = 'cuda': this torch sees no CUDA device; use device=cpu or "
                          "install a CUDA build of torch")
    if config.device == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    return torch.device(config.device)


def pick_dtype(config, device):
    """-> dtype of autocast; float32 means no autocast"""
    if config.dtype == "fp16" and device.type == "cpu":
        raise ConfigError("dtype = 'fp16': on CPU use float32 or bf16")
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16  # not run by CI


# ----------------------------------------------------------------------------------------------
# Optimizer


def make_optimizer(model, name, lr, weight_decay, extra_params=()):
    """Weight decay on matrices only, not on norms and extra parameters.  name: train.optimizer"""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    param_groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [*others, *extra_params], "weight_decay": 0.0},
    ]
    if name == "adafactor":
        return torch.optim.Adafactor(param_groups, lr=lr)
    if name == "sgd":
        return torch.optim.SGD(param_groups, lr=lr, momentum=0.9)
    return torch.optim.AdamW(param_groups, lr=lr, betas=(0.9, 0.95), fused=True)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# ----------------------------------------------------------------------------------------------
# Models


def build_model(run, kind, shape):
    """An uninitialised model on the run's device; frozen weights are shared by all models."""
    if shape.lora_rank:
        from pretrained import frozen, lora
        model = lora.build(kind, shape, run.device, frozen.base_of(run, shape.frozen))
    else:
        model = kind(shape).to(run.device)
    if shape.frozen:
        from pretrained import frozen
        frozen.attach(model, frozen.trunk_of(run, shape.frozen))
    return model


def compile_blocks(model):
    """The same model with the same parameters, whose blocks are compiled one by one.

    All blocks have the same code, so the compiler works once for all of them: in seconds, where the
    whole of a deep model takes minutes.  The copy keeps the mode, training or not, that it was made
    in.
    """
    torch._dynamo.config.recompile_limit = MAX_GRAPHS  # of 8; beyond it code runs uncompiled
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)
    compiled.model = copy.copy(model.model)
    compiled.model._modules = dict(model.model._modules)
    compiled.model.layers = torch.nn.ModuleDict()
    for name, block in model.model.layers.items():
        compiled.model.layers.add_module(name, torch.compile(block, dynamic=True))
    compiled.uncompiled = (model,)  # in a tuple, or it would be a part of the copy
    return compiled


def load_model(run, kind, name):
    """Load NAME.pt.  kind: LanguageModel or RewardModel -> model in eval mode

    Raises ConfigError where the frozen weights under the model are not those it was trained on,
    OSError where the file holds something else.
    """
    path = run.path(f"{name}.pt")
    state = run.load_tensors(f"{name}.pt", run.device)
    check_saved_model(state, kind, path)
    check_finite(state, path)
    if state.get("init", ""):
        from pretrained import hub
        if state["init"] != hub.digest(run.cfg.model.init):
            raise ConfigError(f"{path}: was trained on the frozen layers of another model than "
                              f"{run.cfg.model.init} holds now; restore that model, or train again")
    model = build_model(run, kind, Shape(**state["shape"]))
    model.load_state_dict(state["model"])
    return model.eval()


def check_saved_model(state, kind, path):
    """Raise OSError unless a saved state is that of a model of this kind."""
    try:
        shape = Shape(**dict(state)["shape"])
        if shape.layers > MAX_LAYERS:  # before so many are built
            raise ValueError
        tensors = state_on_meta(kind, shape)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        is_model = shapes == {name: tensor.shape for name, tensor in state["model"].items()}
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError):
        is_model = False
    if not is_model:
        raise OSError(f"{path}: holds no {kind.__name__}; delete it and run the training command "
                      "again")


def state_on_meta(kind, shape):
    """Names and shapes of what a model saves -> {name: tensor}, which take no memory"""
    if shape.lora_rank:
        from pretrained import lora
        return lora.build(kind, shape).state_dict()
    with torch.device("meta"):
        return kind(shape).state_dict()


def check_finite(state, path):
    """A policy of NaN would answer every prompt by nothing, and be judged like any other."""
    for name, tensor in state["model"].items():
        if not tensor.isfinite().all():
            raise OSError(f"{path}: {name} holds numbers that are not finite; delete the file and "
                          "run the training command again")


def save_model(run, name, model):
    state = {"shape": asdict(model.shape), "model": model.state_dict()}
    if model.shape.frozen or model.shape.lora_rank:
        from pretrained import hub
        state["init"] = hub.digest(run.cfg.model.init)
    run.save_tensors(f"{name}.pt", state)


def reward_model_from_sft(run, name="sft", head_seed=None, **shape_changes):
    """The SFT model with a new reward head; all members and treatments of a run share this head.

    name: of another language model; head_seed: of another head
    With reward.init it is that reward model instead.
    """
    if run.cfg.reward.init and name == "sft":
        from pretrained import rewards
        return rewards.load(run, **shape_changes)
    language_model = load_model(run, LanguageModel, name)
    model = build_model(run, RewardModel, replace(language_model.shape, **shape_changes))
    seed = run.cfg.seed if head_seed is None else head_seed
    init_weights(model, torch.Generator().manual_seed(seed))
    model.model.load_state_dict(language_model.model.state_dict())
    return model


def member_names(config):
    """The reward models that vote; none where votes are given or come from frozen states"""
    if config.ensemble.voters != "trained" or config.strength.votes:
        return []
    return [f"member_{m:02d}" for m in range(config.ensemble.members)]


# ----------------------------------------------------------------------------------------------
# Rows


def encode_set(run, name, pairs):
    """Tokenise pairs -> EncodedPairs.  Dropped pairs are counted and listed in dropped_NAME.jsonl.

    Raises DataError if no pair is left.
    """
    kept, rows, dropped = encode_pairs(run.tokenizer, pairs, run.cfg.model.context)
    if not kept and dropped:
        source, reason = dropped[0]
        raise DataError(f"{source}: {reason}; no pair of {name} is left")
    if dropped and run.slot == 0 and run.rank == 0:
        from runtime.audit import report_dropped
        report_dropped(run, name, len(kept), dropped)
    return EncodedPairs(kept, embed_rows(run, rows, name))


def embed_rows(run, rows, name=None):
    """Rows with what the frozen blocks compute of them, or as they are where nothing is frozen.

    name: the set of rows, to keep the result in model.embeds_dir; None: in memory only
    """
    if run.cfg.model.train_layers < 0:
        return rows
    from pretrained import frozen
    if name is None:
        return frozen.embed_rows(run, rows)
    return frozen.load_or_compute(run, name, rows)


def sft_rows(run):
    """What SFT trains on: the world's demonstrations, or the responses of files -> [Row]"""
    cfg = run.cfg
    if cfg.data.train != ("world",):
        rows = [row.branches(0) for row in run.train.rows]
        if cfg.sft.answers == "both":
            rows += [row.branches(1) for row in run.train.rows]
        return rows
    demos = [(demo["prompt"], demo["response"]) for demo in world_demonstrations(cfg)]
    return encode_answers(run, demos, "demonstrations")


def encode_answers(run, answers, name=None):
    """One response to each prompt, [(prompt, response)] -> [Row]; name: as in embed_rows"""
    context = run.cfg.model.context
    rows = []
    for prompt, response in answers:
        rows.append(encode_row(run.tokenizer, prompt, (response,), context))
    return embed_rows(run, rows, name)


def world_demonstrations(cfg):
    """The demonstrations that SFT trains on in the built-in world -> [{"prompt", "response"}]"""
    w = cfg.world
    demos = world.demonstrations(w.demonstrations, cfg.seed, w.p_right, items=w.items)
    for domain in cfg.ppo.domains:  # as many of each as there are of a training domain
        n = w.demonstrations // len(world.TRAIN_DOMAINS)
        demos += world.demonstrations(n, f"{cfg.seed} {domain}", w.p_right, (domain,))
    return demos


def file_weights(run):
    """Weight of each training pair in the loss by data.weights, of mean 1 -> (N,); None: all 1

    Raises ConfigError where the files that are left weigh nothing.
    """
    if not run.cfg.data.weights:
        return None
    weight = torch.tensor([pair.weight for pair in run.train.pairs], dtype=torch.float64)
    if not weight.any():
        raise ConfigError("data.weights: every training pair that is left has weight 0; raise that "
                          "of its file, or data.limit")
    if weight.min() == weight.max():
        return None
    return (weight / weight.mean()).float()


# ----------------------------------------------------------------------------------------------
# Scoring


@torch.no_grad()
def score_rows(run, model, rows, name="", features=False, index_batches=None):
    """Rewards of all branches of all rows, or the hidden states they are computed from.

    index_batches: the rows of each pass, as indices; None: SCORE_BATCH rows of similar length
    -> (N, k), or (N, k, C) with features; float32 on the CPU.  What a row with fewer than k
    branches has in the place of the others means nothing.
    Raises ConfigError where one is not finite.
    """
    k = max(len(row.responses) for row in rows)
    out = torch.zeros(len(rows), k, *([model.shape.width] if features else []))
    if index_batches is None:
        size = SCORE_BATCH[run.device.type]
        index_batches = batches([len(row) for row in rows], size, 0, shuffle=False)
    own, copies = run.share(index_batches, model)
    with run.bar(len(own), name) as bar, run.autocast():
        for index in own:
            batch = collate([rows[i] for i in index]).to(run.device)
            rewards, h = model(
                batch.tokens, batch.branch, batch.position, batch.last,
                features=True, inputs_embeds=batch.inputs_embeds,
            )
            scores = (h if features else rewards).float().cpu()
            out[torch.from_numpy(index), :scores.shape[1]] = scores
            bar.update()
            run.stop_if_asked()
    if copies == 1:
        run.add_up([out])  # of each row one rank has the rewards, the others have 0
    if not out.isfinite().all():
        raise ConfigError(f"{name or 'a reward model'}: a reward is not finite; train the reward "
                          "model again with a lower lr")
    return out


def reward_diffs(run, model, rows):
    """r(chosen) - r(rejected).  model: a reward model, or the name of a saved one -> (N,)"""
    if not rows:
        return torch.zeros(0)
    name = "scores"
    if isinstance(model, str):
        name = f"{model} scores"
        model = load_model(run, RewardModel, model)
    chosen, rejected = score_rows(run, model, rows, name).unbind(1)
    return chosen - rejected


# ----------------------------------------------------------------------------------------------
# Sampling


def training_prompts(run):
    """Pairs whose prompts PPO samples from: the training pairs, or new ones of ppo.domains"""
    cfg = run.cfg
    if not cfg.ppo.domains:
        return run.train.pairs
    demos = world.demonstrations(cfg.world.pairs, f"{cfg.seed} asked", domains=cfg.ppo.domains)
    return [Pair(demo["prompt"], "", "") for demo in demos]


def policy_prompts(run, pairs):
    """Distinct prompts with room for a response of ppo.max_new_tokens -> [(text, token ids)]"""
    room = run.cfg.model.context - run.cfg.ppo.max_new_tokens - 1
    texts = dict.fromkeys(pair.prompt for pair in pairs)
    return [(text, encode_prompt(run.tokenizer, text, room)) for text in texts]


def make_sampling(run, section):
    """section: [ppo], [meta] or [evaluate], each with its temperature and truncation -> Sampling"""
    ppo = run.cfg.ppo
    return Sampling(ppo.max_new_tokens, run.tokenizer.eos_id, section.temperature, section.top_p,
                    section.repetition_penalty, ppo.min_new_tokens,
                    tuple(run.tokenizer.end_ids[1:]))


@torch.no_grad()
def sample_answers(run, name, prompts, seed, sampling, num_samples=1):
    """Sample num_samples responses of the policy NAME.pt to each prompt.

    prompts: [(text, token ids)]; seed: a number, or a torch.Generator that goes on
    -> texts, prompt by prompt; Rows with num_samples responses each, EOS appended to every response
    """
    generator = seed
    if not isinstance(seed, torch.Generator):
        generator = torch.Generator().manual_seed(seed)
    noise = draw_noise(len(prompts), num_samples, sampling, generator)
    policy = load_model(run, LanguageModel, name)
    texts = {}  # by the prompt's place
    rows = {}
    lengths = [len(ids) for _, ids in prompts]
    step = max(1, 128 // num_samples)
    with run.bar(len(prompts), f"answers of {name}") as bar, run.autocast():
        for index in batches(lengths, step, 0, shuffle=False):
            prompt_ids = [prompts[i][1] for i in index]
            own, _ = run.share(range(len(index)))  # of this of several processes
            generation = generate(
                policy, prompt_ids, sampling, None, num_samples, own, noise[index]
            )
            tokens = generation.tokens.unflatten(0, (len(own), num_samples))
            tokens = run.merge(tokens, own, len(index)).flatten(0, 1)
            responses = strip_eos(tokens, sampling)
            for place, (i, ids) in enumerate(zip(index, prompt_ids)):
                answers = responses[place * num_samples:(place + 1) * num_samples]
                texts[i] = [run.tokenizer.decode(answer) for answer in answers]
                closed = tuple(np.array([*answer, sampling.eos_id]) for answer in answers)
                rows[i] = Row(np.array(ids), closed)
            bar.update(len(index))
            run.stop_if_asked()
    in_order = range(len(prompts))
    return [text for i in in_order for text in texts[i]], [rows[i] for i in in_order]


def strip_eos(tokens, sampling):
    """(B, N) generated tokens -> lists of token ids without padding and the token that ends"""
    dropped = {-1, *sampling.end_ids}
    return [[t for t in row if t not in dropped] for row in tokens.tolist()]
