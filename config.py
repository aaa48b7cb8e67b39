"""Configuration is data: frozen dataclasses, a TOML file over their defaults, the command line over both.

    python train.py --config=configs/tiny.toml --reward.lr=1e-3 --seed=1

Every setting states its default, its meaning and its range in one line below; `python train.py --help` prints them.
"""
import difflib
import math
import tomllib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message is one line with key, value and remedy."""


def setting(default, help, low=None, high=None, choices=None):
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


METHODS = ("baseline", "flip", "smooth", "soft", "margin", "soft_margin", "smooth_margin", "soft_target_margin", "flip_margin", "drop")


@dataclass(frozen=True)
class Data:
    train: tuple[str, ...] = setting(("world",), "preference files (JSONL, .gz; comma-separated; also https://…#sha256=…), or world")
    valid: tuple[str, ...] = setting((), "validation files; empty: split off by first human turn")
    ood: tuple[str, ...] = setting((), "files to evaluate out of distribution; the world brings its own")
    valid_share: float = setting(0.1, "share of first human turns held out where data.valid is empty; 0: no validation", 0.0, 0.9)
    template: str = setting("hh", "how a turn is marked: hh: by its words, Human and Assistant; else by the special tokens of such models",
                            choices=("hh", "chatml", "llama3"))
    limit: int = setting(0, "use only so many training pairs, the first ones; 0: all", 0)


@dataclass(frozen=True)
class World:
    pairs: int = setting(5000, "training pairs", 10, 10 ** 7)
    valid: int = setting(3000, "validation pairs", 10, 10 ** 7)
    ood: int = setting(600, "pairs from the held-out domains", 10, 10 ** 7)
    demonstrations: int = setting(8000, "answers of mixed quality for SFT", 10, 10 ** 7)
    p_right: float = setting(0.5, "share of right answers among them", 0.0, 1.0)
    items: int = setting(4, "facts of each kind, goals, and requests that the world knows", 2, 6)
    temperature: float = setting(0.15, "of the annotators, in units of gold reward; 0: never in doubt", 0.0, 100.0)
    flip: float = setting(0.09, "share of labels flipped at random", 0.0, 1.0)
    bias: float = setting(0.02, "share of labels given to the longer answer", 0.0, 1.0)
    shared: float = setting(0.0, "a liking for the longer answer that all annotators share, in units of gold reward", 0.0, 100.0)


@dataclass(frozen=True)
class Model:
    init: str = setting("scratch", "scratch, or a pretrained model of the Llama family: a folder, or OWNER/NAME on the Hugging Face hub; vocab to hidden and tied are then its own")
    vocab: int = setting(1024, "tokens in the trained vocabulary", 258, 2 ** 20)
    layers: int = setting(2, "transformer blocks", 1, 200)
    heads: int = setting(4, "query heads", 1, 256)
    kv_heads: int = setting(4, "key and value heads; fewer than heads: grouped-query attention", 1, 256)
    width: int = setting(128, "of the residual stream", 8, 16384)
    hidden: int = setting(0, "of the SwiGLU; 0: 8/3 of the width, rounded up to 8", 0, 65536)
    context: int = setting(256, "longest prompt + response, in tokens", 8, 131072)
    dropout: float = setting(0.0, "on embeddings and on what each block adds; with train_layers, on what enters these layers", 0.0, 0.9)
    tied: bool = setting(True, "one matrix for input and output embedding")
    train_layers: int = setting(-1, "of a pretrained model, train only so many of the uppermost blocks and what follows; those below are frozen, shared by all "
                                    "models, and run once for each text; 0: the norm and the head of reward models alone; -1: all, and the embedding", -1, 200)
    states: str = setting("out/states", "folder for what the frozen blocks make of the data, for any number of runs; empty: not kept, computed at every step")


@dataclass(frozen=True)
class Train:
    """What all supervised stages share."""
    warmup: float = setting(0.1, "share of the steps with rising learning rate", 0.0, 1.0)
    weight_decay: float = setting(0.1, "AdamW, on matrices only", 0.0, 10.0)
    clip: float = setting(1.0, "largest norm of the gradient; also PPO's", 1e-6, 1e6)
    workers: int = setting(0, "reward models trained at once, in processes of their own; 0: one a core on CPU, 1 on CUDA", 0, 1024)
    accumulate: int = setting(1, "split every batch into so many pieces, for short memory", 1, 4096)
    checkpointing: bool = setting(False, "keep only what enters each block and compute the block again on the way back (arXiv 1604.06174): short memory, a third more time")
    optimiser: str = setting("adamw", "adamw: 8 bytes for each trained parameter, beside 4 of its own and 4 of its gradient; adafactor (arXiv 1804.04235): next to none, "
                                      "and lr counts in units of a matrix's own root mean square; also PPO's", choices=("adamw", "adafactor"))
    checkpoint_minutes: float = setting(5.0, "save a resumable state this often", 0.0, 1e6)


@dataclass(frozen=True)
class Sft:
    epochs: int = setting(2, "passes over the demonstrations (world) or chosen answers (files)", 0, 1000)
    batch: int = setting(16, "answers a step", 1, 65536)
    lr: float = setting(2e-3, "peak learning rate", 0.0, 1.0)


@dataclass(frozen=True)
class Ensemble:
    members: int = setting(4, "reward models that vote; they differ by the order of the data alone (the paper: 10)", 2, 1000)
    epochs: int = setting(2, "passes over the pairs, each member", 1, 1000)
    batch: int = setting(16, "pairs a step", 1, 65536)
    lr: float = setting(1e-3, "peak learning rate", 0.0, 1.0)
    folds: int = setting(0, "K: member m leaves out fold m mod K, so that every pair is new to M / K of them; 0: all train on all (the paper)", 0, 1000)
    vote: str = setting("unseen", "with folds, who votes on a pair: the members it is new to, or all", choices=("unseen", "all"))


@dataclass(frozen=True)
class Strength:
    method: str = setting("flip", "the treatment that strength.jsonl and cleaned.jsonl show", choices=METHODS)
    q: float = setting(0.1, "flip, flip_margin, drop: share of the pairs of lowest mean strength", 0.0, 1.0)
    alpha: float = setting(0.2, "smooth, soft_margin, smooth_margin: mistrust in a label", 0.0, 1.0)
    k: float = setting(1.5, "soft, soft_target_margin: the label's probability is sigmoid(k mean)", 0.0, 1000.0)
    margin_scale: float = setting(1.0, "margins are so many times the mean strength", 0.0, 1000.0)
    margin_cap: float = setting(0.0, "and cut to this size, in units of reward; 0: not cut", 0.0, 1000.0)
    show: int = setting(0, "print so many of the most suspect pairs", 0, 10 ** 6)


@dataclass(frozen=True)
class Reward:
    methods: tuple[str, ...] = setting(("baseline", "flip"), "a reward model for each of these treatments", choices=METHODS)
    epochs: int = setting(12, "passes over the pairs", 1, 1000)
    batch: int = setting(32, "pairs a step", 1, 65536)
    lr: float = setting(2e-3, "peak learning rate", 0.0, 1.0)


@dataclass(frozen=True)
class Contrast:
    """A contrastive term in the reward stage; the paper's four are simcse on pairs (weight 1) and on differences, swav on pairs
    (50 prototypes, weight 0.1) and on differences (20 prototypes, weight 0.5)."""
    term: str = setting("none", "added to the ranking loss of every reward model", choices=("none", "simcse", "swav"))
    items: str = setting("pairs", "what is contrasted: the answers, or the differences of the two answers of a pair", choices=("pairs", "difference"))
    weight: float = setting(1.0, "of the term, the paper's beta", 0.0, 1000.0)
    dropout: float = setting(0.05, "of the reward models with a term: two masks are what makes two views", 0.0, 0.9)
    temperature: float = setting(0.0, "of the softmax; 0: 0.05 for simcse, 0.1 for swav", 0.0, 100.0)
    prototypes: int = setting(50, "swav: K", 2, 65536)
    epsilon: float = setting(0.05, "swav: smoothness of the codes", 1e-4, 100.0)
    iterations: int = setting(3, "swav: of Sinkhorn-Knopp", 1, 1000)
    queue: int = setting(0, "swav: so many past items share in the codes; needed where a batch has fewer items than prototypes", 0, 10 ** 6)
    frozen: float = setting(0.0, "swav: share of the training during which prototypes stay as they were drawn", 0.0, 1.0)


@dataclass(frozen=True)
class Meta:
    """Rounds of: sample from the latest policy, MetaRM on the labelled pairs and these samples, PPO with the new reward model."""
    rounds: int = setting(0, "how many; 0: none", 0, 1000)
    arms: tuple[str, ...] = setting(("meta",), "meta: MetaRM; plain: the same steps without the samples; none: PPO goes on with the old reward model",
                                    choices=("meta", "plain", "none"))
    method: str = setting("baseline", "the treatment whose reward model is trained further", choices=METHODS)
    domain: str = setting("train", "whose prompts are answered: those of training, or half of those out of distribution", choices=("train", "ood"))
    prompts: int = setting(500, "prompts to sample answers to, a round", 1, 10 ** 7)
    k: int = setting(5, "answers to each", 2, 64)
    temperature: float = setting(1.2, "of these samples, a little above the policy's", 0.01, 10.0)
    epochs: int = setting(1, "passes over the labelled pairs, a round", 1, 1000)
    batch: int = setting(16, "pairs a step, and prompts with k samples a step", 1, 65536)
    lr: float = setting(2e-4, "peak learning rate, alpha", 0.0, 1.0)
    eta: float = setting(1.0, "step of the look-ahead, in units of theta per unit of gradient; 0: a plain step", 0.0, 1e6)
    second_order: bool = setting(False, "the exact gradient, through the look-ahead as well")


@dataclass(frozen=True)
class Ppo:
    methods: tuple[str, ...] = setting(("baseline", "flip"), "a policy for the reward model of each of these", choices=METHODS)
    iterations: int = setting(60, "rollouts", 1, 10 ** 6)
    episodes: int = setting(64, "answers sampled an iteration", 1, 65536)
    epochs: int = setting(2, "passes over a rollout", 1, 100)
    minibatches: int = setting(4, "updates a pass", 1, 65536)
    max_new: int = setting(48, "longest answer, in tokens", 1, 8192)
    temperature: float = setting(1.0, "of the policy, when it samples and when it is scored", 0.01, 10.0)
    lr: float = setting(3e-4, "of the policy", 0.0, 1.0)
    critic_lr: float = setting(1e-3, "of the critic; the paper: three times the policy's", 0.0, 1.0)
    kl: float = setting(0.05, "weight of the token KL penalty against the SFT model", 0.0, 100.0)
    kl_kind: str = setting("k1", "estimator of that KL", choices=("k1", "k2", "k3"))
    reward_clip: float = setting(2.0, "clip of the normalised reward, in standard deviations (the paper's MetaRM runs: 0.8)", 0.01, 1000.0)
    gamma: float = setting(1.0, "discount", 0.0, 1.0)
    lam: float = setting(0.95, "GAE's lambda", 0.0, 1.0)
    clip: float = setting(0.2, "of the probability ratio", 0.001, 10.0)
    value_clip: float = setting(0.2, "of the critic's move", 0.001, 1000.0)
    reward: str = setting("model", "what scores an answer: the method's reward model; of the ensemble the mean, worst, or mean minus std (arXiv 2310.02743); "
                          "the world's program", choices=("model", "mean", "worst", "mean_minus_std", "verifier"))
    std_weight: float = setting(1.0, "mean_minus_std: so many standard deviations of the members", 0.0, 1000.0)
    domains: tuple[str, ...] = setting((), "held-out domains of the world that the policy is asked from, and SFT is shown, too; empty: the training prompts",
                                       choices=("arithmetic", "translation", "programs"))
    normalise: bool = setting(True, "rewards by their running mean and std, then clipped (Part I); false: as they are, not clipped")
    critic_pretrain: int = setting(0, "the first so many iterations move the critic alone (Part I)", 0, 10 ** 6)
    ptx: float = setting(0.0, "weight of the language-modelling loss on SFT data beside the policy's (InstructGPT's gamma; Part I)", 0.0, 1000.0)
    warmup: float = setting(0.0, "share of the iterations with rising learning rates, counted from the policy's first move (InstructGPT)", 0.0, 1.0)
    kl_target: float = setting(0.0, "nats an answer that ppo.kl is steered to (Ziegler et al. 2019, arXiv 1909.08593); 0: ppo.kl stays", 0.0, 1e6)
    whiten: bool = setting(False, "advantages to mean 0, std 1 over a rollout's response tokens (Ziegler et al.'s code; not in Part I)")
    no_end_penalty: float = setting(0.0, "taken off the normalised reward of an answer that did not end by itself (Ziegler et al.: a fixed low reward)", 0.0, 1000.0)
    stop_kl: float = setting(0.0, "largest KL to the policy that sampled, nats a token: past it an update moves the critic alone (Spinning Up); 0: none", 0.0, 1000.0)
    reset_reference: int = setting(0, "every so many iterations the policy becomes its own reference (ProRL, arXiv 2505.24864); 0: never", 0, 10 ** 6)
    min_new: int = setting(0, "shortest answer, in tokens: end-of-text has no probability before (Hugging Face's min_new_tokens)", 0, 8192)
    show: int = setting(10, "every so many iterations, write three samples with their rewards to samples_METHOD.md and log.jsonl; 0: never", 0, 10 ** 6)


@dataclass(frozen=True)
class Evaluate:
    groups: int = setting(10, "strength groups in tables and figures", 2, 1000)
    bootstrap: int = setting(1000, "resamples for an interval", 10, 10 ** 6)
    prompts: int = setting(256, "prompts on which policies are compared", 2, 10 ** 6)
    temperature: float = setting(0.8, "of the policies compared (the paper: 0.8)", 0.0, 10.0)
    top_p: float = setting(0.9, "of the policies compared (the paper: 0.9)", 0.001, 1.0)
    tie: float = setting(0.25, "gold rewards closer than this are a tie", 0.0, 100.0)


@dataclass(frozen=True)
class Config:
    seed: int = setting(0, "of everything random", 0, 2 ** 31)
    out_dir: str = setting("out/run", "folder for everything that is written")
    device: str = setting("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("auto", "auto: bf16 on CUDA that has it, fp16 on older CUDA, float32 on CPU",
                         choices=("auto", "float32", "bf16", "fp16"))
    compile: str = setting("auto", "torch.compile; auto: on CUDA only", choices=("auto", "on", "off"))
    threads: int = setting(0, "CPU threads; 0: as torch likes", 0, 1024)
    data: Data = Data()
    world: World = World()
    model: Model = Model()
    train: Train = Train()
    sft: Sft = Sft()
    ensemble: Ensemble = Ensemble()
    strength: Strength = Strength()
    reward: Reward = Reward()
    contrast: Contrast = Contrast()
    meta: Meta = Meta()
    ppo: Ppo = Ppo()
    evaluate: Evaluate = Evaluate()


def keys(config=Config()):
    """Every setting's dotted name -> its dataclass field, in order."""
    out = {}
    for f in fields(config):
        value = getattr(config, f.name)
        out |= {f"{f.name}.{g.name}": g for g in fields(value)} if is_dataclass(value) else {f.name: f}
    return out


def checked(key, value, f):
    """A value of the setting's type and in its range, or ConfigError.  Strings from the command line are converted."""
    many = f.type == tuple[str, ...]
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(f.type, "a list of texts")
    try:
        if many:
            value = value.split(",") if isinstance(value, str) else value
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                raise ValueError
            value = tuple(v.strip() for v in value if v.strip())
        elif f.type is bool:
            value = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
            if not isinstance(value, bool):
                raise ValueError
        elif f.type is str:
            if not isinstance(value, str):
                raise ValueError
        elif isinstance(value, bool) or f.type is int and isinstance(value, float):
            raise ValueError
        else:
            value = f.type(value)
            if not math.isfinite(value):
                raise ValueError
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise ConfigError(f"{key} = {value!r}: must be {wanted}") from None
    low, high, choices = (f.metadata[m] for m in ("low", "high", "choices"))
    if low is not None and value < low or high is not None and value > high:
        allowed = f"from {low} to {high}" if high is not None else f"{low} or more"
        raise ConfigError(f"{key} = {value!r}: must be {allowed}")
    if choices is not None:
        for v in value if many else (value,):
            if v not in choices:
                near = difflib.get_close_matches(v, choices, 1)
                raise ConfigError(f"{key} = {v!r}: must be one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else ""))
    return value


def assign(config, key, value):
    """config with one dotted setting changed"""
    known = keys(config)
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, cutoff=0) or [""]
        raise ConfigError(f"{key if key.isprintable() else repr(key)} = {value!r}: no such setting; the nearest is {near[0]} ({known[near[0]].metadata['help']})")
    value = checked(key, value, known[key])
    section, _, name = key.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def load(path=None, overrides=()):
    """Defaults, then the TOML file, then overrides (a list of (key, text)) -> Config"""
    config = Config()
    if path is not None:
        try:
            with open(path, "rb") as file:
                table = tomllib.load(file)
        except FileNotFoundError:
            raise ConfigError(f"--config = {path!r}: no such file; configs/tiny.toml is one to begin with") from None
        except (OSError, ValueError) as error:  # not TOML, not UTF-8, a number too long
            raise ConfigError(f"--config = {path!r}: {error}") from None
        for key, value in table.items():
            section = isinstance(value, dict) and (value or is_dataclass(getattr(config, key, None)))
            for name, inner in (value.items() if section else [("", value)]):
                config = assign(config, f"{key}.{name}" if name else key, inner)
    for key, value in overrides:
        config = assign(config, key, value)
    return consistent(config)


def consistent(config):
    """What no single setting can be checked for."""
    m, p = config.model, config.ppo
    if not config.out_dir:
        raise ConfigError("out_dir = '': name a folder")
    if m.init == "scratch" and config.data.template != "hh":
        raise ConfigError(f"data.template = {config.data.template!r}: needs a model.init whose tokenizer has these markers; a vocabulary from scratch has none")
    if m.init == "scratch" and m.train_layers >= 0:
        raise ConfigError(f"model.train_layers = {m.train_layers}: needs a pretrained model.init; layers from scratch have learned nothing that is worth freezing")
    if m.train_layers == 0 and (config.sft.epochs or p.methods or config.meta.rounds):
        raise ConfigError("model.train_layers = 0: trains the heads of reward models alone; set sft.epochs=0, ppo.methods= and meta.rounds=0, or train a layer or more")
    if m.init == "scratch" and (m.width % m.heads or (m.width // m.heads) % 2):
        raise ConfigError(f"model.width = {m.width}: must be an even multiple of model.heads = {m.heads}")
    if m.heads % m.kv_heads:
        raise ConfigError(f"model.kv_heads = {m.kv_heads}: must divide model.heads = {m.heads}")
    if p.max_new + 2 > m.context:
        raise ConfigError(f"ppo.max_new = {p.max_new}: must be at most model.context - 2 = {m.context - 2}")
    if p.minibatches > p.episodes:
        raise ConfigError(f"ppo.minibatches = {p.minibatches}: must be at most ppo.episodes = {p.episodes}")
    if p.min_new >= p.max_new:
        raise ConfigError(f"ppo.min_new = {p.min_new}: must be less than ppo.max_new = {p.max_new}")
    if p.critic_pretrain >= p.iterations:
        raise ConfigError(f"ppo.critic_pretrain = {p.critic_pretrain}: must be less than ppo.iterations = {p.iterations}, of which it takes the first")
    if p.domains and config.data.train != ("world",):
        raise ConfigError(f"ppo.domains = {','.join(p.domains)!r}: the world's; needs data.train = world")
    if p.reward == "verifier" and not p.domains:
        raise ConfigError("ppo.reward = 'verifier': needs ppo.domains, of the world's arithmetic, translation, programs: a program judges nothing else")
    if p.kl_target and not p.kl:
        raise ConfigError(f"ppo.kl_target = {p.kl_target}: needs ppo.kl > 0 to begin with; it is multiplied")
    if missing := [method for method in p.methods if method not in config.reward.methods]:
        raise ConfigError(f"ppo.methods = {missing[0]!r}: must be one of reward.methods = {', '.join(config.reward.methods)}")
    t, items = config.contrast, 2 * -(-config.reward.batch // config.train.accumulate)
    if t.term != "none" and t.dropout == 0:
        raise ConfigError("contrast.dropout = 0.0: both views would be the same; raise it (the paper: 0.05), or set contrast.term=none")
    if t.term == "swav" and items + t.queue < t.prototypes:
        raise ConfigError(f"contrast.queue = {t.queue}: a step has {items} items for contrast.prototypes = {t.prototypes}, too few to use them all; "
                          f"set it to {t.prototypes - items} or more, or raise reward.batch")
    if config.meta.second_order and config.train.checkpointing:
        raise ConfigError("train.checkpointing = true: cannot be gone through twice, as meta.second_order asks; set one of them to false")
    if config.meta.rounds and config.meta.method not in config.reward.methods:
        raise ConfigError(f"meta.method = {config.meta.method!r}: must be one of reward.methods = {', '.join(config.reward.methods)}")
    if not config.data.train:
        raise ConfigError("data.train = '': name a preference file, or world")
    if config.ensemble.folds == 1 or config.ensemble.folds and config.ensemble.members % config.ensemble.folds:
        raise ConfigError(f"ensemble.folds = {config.ensemble.folds}: must be 0, or 2 or more and divide ensemble.members = {config.ensemble.members}")
    if config.data.train != ("world",) and not config.data.valid and not config.data.valid_share and config.reward.methods:
        raise ConfigError("data.valid_share = 0.0: reward models need validation pairs; raise it, give data.valid, or set reward.methods= and ppo.methods=")
    if "world" in config.data.train + config.data.valid and (config.data.train != ("world",) or config.data.valid):
        raise ConfigError("data.train = 'world': stands alone; the world brings its own validation pairs")
    return config


def from_dict(table):
    """What as_dict made, perhaps at a time when there were fewer settings -> Config"""
    config = Config()
    for key, value in table.items():
        for name, inner in value.items() if isinstance(value, dict) else [("", value)]:
            config = assign(config, f"{key}.{name}" if name else key, inner)
    return consistent(config)


def as_dict(config):
    return asdict(config)


def help_text():
    lines = ["python train.py --config=FILE [--stage=NAME] [--section.key=value …]\n"]
    section = None
    for key, f in keys().items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines.append("")
        default = ",".join(f.default) if isinstance(f.default, tuple) else str(f.default)
        choices = f" [{' '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        lines.append(f"  --{key}={default:<12} {f.metadata['help']}{choices}")
    return "\n".join(lines)
