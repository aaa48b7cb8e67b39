"""Settings of a run: frozen dataclasses as defaults, a TOML file over them, the command line last.

    python train.py --config=configs/tiny.toml --reward.lr=1e-3 --seed=1

Every setting states its default, meaning and range below; `python train.py --help` prints them.
"""
import difflib
import math
import sys
import tomllib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace

from runtime.inputs import value_text, why_no_file, why_unusable
from strength import TREATMENTS

METHODS = tuple(TREATMENTS)


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range.  One line: key, value, remedy."""


def setting(default, help, low=None, high=None, choices=None):
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Data:
    train: tuple[str, ...] = setting(
        ("world",),
        "preference files, comma-separated (JSONL, JSON, CSV, also .gz, .xz, .zst; Parquet; "
        "https://…#sha256=…; OWNER/NAME:SPLIT of the Hugging Face hub), or world")
    valid: tuple[str, ...] = setting(
        (), "validation files; empty: pairs split off from data.train by first human turn")
    ood: tuple[str, ...] = setting(
        (), "files for evaluation out of distribution; empty with world: its held-out domains")
    valid_share: float = setting(
        0.1, "share of first human turns held out if data.valid is empty; 0: no validation set",
        0.0, 0.9)
    template: str = setting(
        "hh", "chat template; hh: the words Human and Assistant; others: special tokens of a model",
        choices=("hh", "chatml", "llama3"))
    limit: int = setting(0, "number of training pairs used, from the first on; 0: all", 0)
    weights: tuple[float, ...] = setting(
        (),
        "weight of a pair in the loss (no rate of sampling), a number for each file of data.train, "
        "comma-separated; their ratios count; empty: 1 each")
    format: str = setting(
        "", "layout of all preference files, by its name in docs/formats.md; empty: recognised")
    labels: str = setting(
        "better", "label of PKU-SafeRLHF that decides which answer is chosen",
        choices=("better", "safer"))
    min_score_diff: float = setting(
        0.0,
        "minimum difference between the scores or ranks of the answers of a pair (point-wise "
        "scores, Nectar, WebGPT); equal ones make no pair", 0.0, 1e6)
    decisions: str = setting(
        "", "decisions.jsonl saved from the review page; a decision of a person beats the vote")


@dataclass(frozen=True)
class World:
    pairs: int = setting(5000, "number of training pairs", 10, 10 ** 7)
    valid: int = setting(3000, "number of validation pairs", 10, 10 ** 7)
    ood: int = setting(600, "number of pairs from the held-out domains", 10, 10 ** 7)
    demonstrations: int = setting(
        8000, "number of SFT demonstrations, of mixed quality", 10, 10 ** 7)
    p_right: float = setting(0.5, "share of correct demonstrations", 0.0, 1.0)
    items: int = setting(
        4, "number of facts of each kind, of goals and of requests in the world", 2, 6)
    temperature: float = setting(
        0.15, "annotator temperature, in units of gold reward; 0: no ambiguity", 0.0, 100.0)
    flip: float = setting(0.09, "share of labels flipped at random", 0.0, 1.0)
    bias: float = setting(0.02, "share of labels that prefer the longer answer", 0.0, 1.0)
    shared: float = setting(
        0.0, "length bias common to all annotators, in units of gold reward", 0.0, 100.0)


@dataclass(frozen=True)
class Model:
    init: str = setting(
        "scratch",
        "initialisation: scratch, or a pretrained model of the Llama family (a folder, or "
        "OWNER/NAME on the Hugging Face hub), which then sets vocab to hidden and tied")
    vocab: int = setting(1024, "vocabulary size of the trained tokenizer", 258, 2 ** 20)
    layers: int = setting(2, "number of transformer blocks", 1, 200)
    heads: int = setting(4, "number of query heads", 1, 256)
    kv_heads: int = setting(
        4, "number of key and value heads; fewer than model.heads: grouped-query attention", 1, 256)
    width: int = setting(128, "width of the residual stream", 8, 16384)
    hidden: int = setting(
        0, "hidden width of SwiGLU; 0: 8/3 of model.width, rounded up to a multiple of 8", 0, 65536)
    context: int = setting(256, "maximum length of prompt + response, in tokens", 8, 131072)
    dropout: float = setting(
        0.0,
        "dropout on embeddings and block outputs; with model.train_layers, on the input of the "
        "trained blocks",
        0.0, 0.9)
    tied: bool = setting(True, "weight sharing between input and output embedding")
    train_layers: int = setting(
        -1,
        "number of trained blocks of a pretrained model, counted from the top; lower blocks are "
        "frozen, shared by all models and computed once a text; 0: only the norm and reward head; "
        "-1: all blocks and the embedding",
        -1, 200)
    lora_rank: int = setting(
        0,
        "rank of LoRA adapters (arXiv 2106.09685) on all linear layers of the trained blocks of a "
        "pretrained model; all other weights but the reward head are frozen and shared by all "
        "models; 0: none, the weights themselves are trained",
        0, 4096)
    lora_alpha: float = setting(
        16.0, "scale of LoRA adapters: their output is multiplied by lora_alpha / lora_rank",
        1e-3, 1e6)
    embeds_dir: str = setting(
        "out/states",
        "folder for the outputs of the frozen blocks, shared between runs; empty: recompute them "
        "when needed")


@dataclass(frozen=True)
class Train:
    """Settings that all supervised stages share."""
    warmup: float = setting(0.1, "share of steps with linear learning-rate warmup", 0.0, 1.0)
    weight_decay: float = setting(0.1, "weight decay of matrices; other weights: none", 0.0, 10.0)
    grad_clip: float = setting(1.0, "maximum gradient norm, in PPO too", 1e-6, 1e6)
    workers: int = setting(
        0,
        "number of reward models trained in parallel, each in its own process; 0: one a core on "
        "CPU, 1 on CUDA",
        0, 1024)
    accumulate: int = setting(1, "number of micro-batches a batch is split into", 1, 4096)
    gradient_checkpointing: bool = setting(
        False,
        "gradient checkpointing (arXiv 1604.06174): recompute each block in the backward pass, for "
        "less memory at a third more time")
    optimizer: str = setting(
        "adamw",
        "optimiser, in PPO too; adamw: 8 bytes of state a parameter; adafactor (arXiv 1804.04235): "
        "almost none, learning rates relative to the RMS of each matrix; sgd: momentum 0.9, steps "
        "that grow with the gradient",
        choices=("adamw", "adafactor", "sgd"))
    shard: str = setting(
        "none",
        "what the processes of torchrun share of a model in SFT and of reward models; none: each "
        "has all; full: weights, gradients and optimiser states are spread over them (FSDP2)",
        choices=("none", "full"))
    checkpoint_minutes: float = setting(
        0.5,
        "minutes between two checkpoints, more where saving takes over 2 % of the time; 0: after "
        "every step", 0.0, 1e6)


@dataclass(frozen=True)
class Sft:
    epochs: int = setting(
        2, "number of epochs over the demonstrations (world) or answers (files)", 0, 1000)
    answers: str = setting(
        "chosen", "answers of files that SFT is trained on; both: it sees no label",
        choices=("chosen", "both"))
    batch: int = setting(16, "number of answers a step", 1, 65536)
    lr: float = setting(2e-3, "peak learning rate", 0.0, 1.0)


@dataclass(frozen=True)
class Ensemble:
    members: int = setting(
        4, "number M of voting reward models, each with its own order of the data (the paper: 10)",
        2, 1000)
    epochs: int = setting(2, "number of epochs of each member", 1, 1000)
    batch: int = setting(16, "number of pairs a step", 1, 65536)
    lr: float = setting(1e-3, "peak learning rate", 0.0, 1.0)
    folds: int = setting(
        0,
        "number K of folds; member m is trained without fold m mod K, so that each pair is held "
        "out from M / K members; 0: all members train on all pairs (the paper)",
        0, 1000)
    vote: str = setting(
        "unseen", "voters on a pair if ensemble.folds > 0: members not trained on it, or all",
        choices=("unseen", "all"))
    fold_by: str = setting(
        "prompt", "what shares one fold: all pairs of a first human turn, or pairs of equal texts",
        choices=("prompt", "pair"))
    voters: str = setting(
        "trained",
        "trained: M reward models; states: linear heads on states of model.init, which is not "
        "trained, on the words and on ratings of recurring answers",
        choices=("trained", "states"))


@dataclass(frozen=True)
class Strength:
    method: str = setting(
        "flip", "treatment written to strength.jsonl and cleaned.jsonl", choices=METHODS)
    q: float = setting(
        0.1,
        "share of treated pairs, those of lowest strength (flip, flip_margin, flip_soft, drop)",
        0.0, 1.0)
    alpha: float = setting(
        0.2, "label smoothing: p = 1 - alpha (smooth, soft_margin, smooth_margin)", 0.0, 1.0)
    k: float = setting(
        1.5, "slope of soft labels: p = sigmoid(k mean) (soft, soft_target_margin)", 0.0, 1000.0)
    margin_scale: float = setting(
        1.0, "scale of margins: margin = margin_scale × mean strength", 0.0, 1000.0)
    margin_cap: float = setting(
        0.0, "maximum absolute margin, in units of reward; 0: no maximum", 0.0, 1000.0)
    show: int = setting(0, "number of most suspect pairs to print", 0, 10 ** 6)
    votes: str = setting(
        "",
        "file of given votes on the pairs, in place of trained voters: mean and std, or lists of "
        "scores (docs/audit.md)")


@dataclass(frozen=True)
class Clean:
    """What becomes of doubted labels in cleaned.jsonl; a self-test decides whether anything does.
    """
    tests: int = setting(
        0,
        "number of self-tests: copies of the labels with planted flips that the voters, trained "
        "anew, must find; 0: cleaned.jsonl follows strength.method", 0, 100)
    flips: float = setting(
        0.05, "share of the labels that a self-test flips; at least 20 are", 0.001, 0.25)
    action: str = setting(
        "drop", "strongest change of a label; exchange: where the precision allows it, else drop",
        choices=("keep", "drop", "exchange"))
    drop_precision: float = setting(
        0.0,
        "lower 95 % bound of the precision above which labels are dropped; 0: the estimated share "
        "of wrong labels", 0.0, 1.0)


@dataclass(frozen=True)
class Reward:
    methods: tuple[str, ...] = setting(
        ("baseline", "flip"), "treatments to train a reward model for", choices=METHODS)
    init: str = setting(
        "",
        "reward model that members and reward models start from, head and all: a folder or "
        "OWNER/NAME of the hub with one label; empty: the SFT model with a new head")
    centering: float = setting(
        0.0,
        "coefficient of the squared sum of both rewards in the loss of every reward model, which "
        "centres them (arXiv 2312.09244: 0.01); 0: none",
        0.0, 1000.0)
    epochs: int = setting(12, "number of epochs; 0, with reward.init: as it is", 0, 1000)
    batch: int = setting(32, "number of pairs a step", 1, 65536)
    lr: float = setting(2e-3, "peak learning rate", 0.0, 1.0)
    evals_per_epoch: int = setting(
        0,
        "number of evaluations an epoch, on training pairs that are held out from reward models "
        "for them; 0: none, and nothing is held out",
        0, 10 ** 4)
    heldout_share: float = setting(
        0.1, "share of first human turns held out from training for these evaluations", 0.001, 0.9)
    keep: str = setting(
        "last",
        "weights kept: of the last step, or of the evaluation with the highest accuracy, of equal "
        "ones with the lowest loss",
        choices=("last", "best"))
    patience: int = setting(
        0,
        "early stopping: number of evaluations since the best one after which training ends; "
        "0: none",
        0, 10 ** 6)


@dataclass(frozen=True)
class Contrast:
    """Contrastive term of the reward stage.

    The paper's four: simcse on pairs (weight 1) and on differences, swav on pairs (50 prototypes,
    weight 0.1) and on differences (20 prototypes, weight 0.5).
    """
    term: str = setting(
        "none", "contrastive loss added to the ranking loss of every reward model",
        choices=("none", "simcse", "swav"))
    items: str = setting(
        "pairs", "features contrasted: of each answer, or the difference between the two of a pair",
        choices=("pairs", "difference"))
    weight: float = setting(1.0, "weight of the contrastive loss, the paper's beta", 0.0, 1000.0)
    dropout: float = setting(
        0.05, "dropout of reward models with a contrastive loss; two masks give the two views",
        0.0, 0.9)
    temperature: float = setting(
        0.0, "softmax temperature; 0: 0.05 for simcse, 0.1 for swav", 0.0, 100.0)
    negatives: str = setting(
        "all", "with several processes, negatives of simcse: of the whole batch, as with one "
        "process, or those of the same rank", choices=("all", "rank"))
    prototypes: int = setting(50, "number K of prototypes (swav)", 2, 65536)
    epsilon: float = setting(0.05, "entropy regularisation of the codes (swav)", 1e-4, 100.0)
    iterations: int = setting(3, "number of Sinkhorn-Knopp iterations (swav)", 1, 1000)
    queue: int = setting(
        0,
        "number of past features added to compute the codes (swav); needed if a batch has fewer "
        "than contrast.prototypes",
        0, 10 ** 6)
    frozen: float = setting(
        0.0, "share of training steps with frozen prototypes, from the start on (swav)", 0.0, 1.0)


@dataclass(frozen=True)
class Meta:
    """Rounds of: samples of the latest policy, MetaRM on pairs and samples, PPO on its rewards."""
    rounds: int = setting(0, "number of rounds; 0: no MetaRM", 0, 1000)
    arms: tuple[str, ...] = setting(
        ("meta",),
        "arms to run; meta: MetaRM; meta-adam: its look-ahead divided by Adam's running root mean "
        "square; plain: the same steps without samples; ocrm: plain steps on pairs weighted by the "
        "policy's over SFT's likelihood (arXiv 2507.15507); none: PPO with the first reward model",
        choices=("meta", "meta-adam", "plain", "ocrm", "none"))
    start: str = setting(
        "sft",
        "model that the reward model of a round is trained from: sft, or last, the reward model of "
        "the round before",
        choices=("sft", "last"))
    policy_start: str = setting(
        "last",
        "policy that PPO of a round starts from: last, that of the round before, or sft "
        "(arXiv 2505.18126)",
        choices=("last", "sft"))
    method: str = setting(
        "baseline", "treatment of the reward model that is trained further", choices=METHODS)
    domain: str = setting(
        "train", "prompts sampled from: training prompts, or half of those out of distribution",
        choices=("train", "ood"))
    prompts: int = setting(0, "number of prompts a round; 0: all, as in the paper", 0, 10 ** 7)
    k: int = setting(5, "number of answers sampled for each prompt", 2, 64)
    temperature: float = setting(
        0.9, "sampling temperature (the paper: slightly above PPO's 0.8)", 0.01, 10.0)
    top_p: float = setting(0.9, "nucleus sampling: probability mass kept; 1: all", 0.001, 1.0)
    repetition_penalty: float = setting(
        1.1, "repetition penalty of sampling (arXiv 1909.05858); 1: none", 0.01, 100.0)
    epochs: int = setting(1, "number of epochs over the labelled pairs, a round", 1, 1000)
    batch: int = setting(16, "number of pairs, and of prompts with k samples, a step", 1, 65536)
    lr: float = setting(
        1e-3, "peak learning rate, alpha; with start = last a fifth of it", 0.0, 1.0)
    eta: float = setting(
        1.0, "step size of the inner step, in units of theta per unit of gradient; 0: a plain step",
        0.0, 1e6)
    adam_eta: float = setting(
        1e-3, "step size of the inner step of arm meta-adam, in units of theta (the paper: lr)",
        0.0, 1e3)
    weight_clip: float = setting(
        10.0, "largest weight of a pair in arm ocrm, and 1 / smallest, before they are normalised",
        1.0, 1e6)
    second_order: bool = setting(
        False, "exact meta-gradient in arm meta, differentiated through the inner step")


@dataclass(frozen=True)
class Ppo:
    methods: tuple[str, ...] = setting(
        ("baseline", "flip"), "treatments to train a policy for, on their reward models",
        choices=METHODS)
    iterations: int = setting(60, "number of rollouts", 1, 10 ** 6)
    rollout_batch_size: int = setting(64, "number of answers a rollout", 1, 65536)
    answers_per_prompt: int = setting(
        1, "number of answers to each prompt of a rollout, which is then computed once for several",
        1, 65536)
    num_ppo_epochs: int = setting(2, "number of epochs over a rollout", 1, 100)
    num_minibatches: int = setting(4, "number of minibatches an epoch", 1, 65536)
    max_new_tokens: int = setting(48, "maximum answer length, in tokens", 1, 8192)
    temperature: float = setting(
        1.0, "temperature of the policy, for sampling and for log-probabilities", 0.01, 10.0)
    top_p: float = setting(
        1.0, "nucleus sampling of the rollouts: probability mass kept; 1: all", 0.001, 1.0)
    repetition_penalty: float = setting(
        1.0, "repetition penalty of the rollouts (arXiv 1909.05858); 1: none", 0.01, 100.0)
    lr: float = setting(3e-4, "learning rate of the policy", 0.0, 1.0)
    critic_lr: float = setting(
        1e-3, "learning rate of the critic (the paper: three times the policy's)", 0.0, 1.0)
    kl_coef: float = setting(
        0.05, "coefficient of the per-token KL penalty to the reference, the SFT model", 0.0, 100.0)
    kl_estimator: str = setting(
        "k1", "estimator of that KL (http://joschu.net/blog/kl-approx.html)",
        choices=("k1", "k2", "k3"))
    reward_clip: float = setting(
        2.0, "maximum absolute normalised reward, in standard deviations (the paper's MetaRM: 0.8)",
        0.01, 1000.0)
    advantage: str = setting(
        "gae",
        "advantages; gae: generalised advantage estimation with a critic; group: reward less the "
        "mean of the answers to the same prompt, over their std, without a critic (GRPO, arXiv "
        "2402.03300)",
        choices=("gae", "group"))
    gamma: float = setting(1.0, "discount factor", 0.0, 1.0)
    gae_lambda: float = setting(0.95, "lambda of generalised advantage estimation", 0.0, 1.0)
    cliprange: float = setting(0.2, "clip range of the probability ratio", 0.001, 10.0)
    cliprange_value: float = setting(
        0.2, "clip range of the value around the old value", 0.001, 1000.0)
    reward: str = setting(
        "model",
        "reward of an answer; model: the method's reward model; mean, worst, mean_minus_std: of "
        "the ensemble (arXiv 2310.02743); verifier: the world's program; both: model, and three "
        "standard deviations of its rewards where the program accepts",
        choices=("model", "mean", "worst", "mean_minus_std", "verifier", "both"))
    std_weight: float = setting(
        1.0, "number of standard deviations subtracted (mean_minus_std)", 0.0, 1000.0)
    domains: tuple[str, ...] = setting(
        (),
        "held-out domains of the world used for PPO prompts and added to SFT; empty: training "
        "prompts",
        choices=("arithmetic", "translation", "programs"))
    normalize: bool = setting(
        True,
        "normalisation of rewards by running mean and std, then clipping (Part I)")
    critic_warmup_iters: int = setting(
        0, "number of initial iterations that train only the critic (Part I)", 0, 10 ** 6)
    ptx_coef: float = setting(
        0.0, "coefficient of the language-modelling loss on SFT data (InstructGPT's gamma; Part I)",
        0.0, 1000.0)
    warmup: float = setting(
        0.0,
        "share of iterations with learning-rate warmup, from the first policy update on "
        "(InstructGPT)",
        0.0, 1.0)
    adaptive_kl_target: float = setting(
        0.0,
        "target of the adaptive KL controller of ppo.kl_coef, in nats an answer (Ziegler et al. "
        "2019, arXiv 1909.08593); 0: constant kl_coef",
        0.0, 1e6)
    whiten: bool = setting(
        False,
        "advantage whitening over the response tokens of a rollout (Ziegler et al.'s code; not in "
        "Part I)")
    missing_eos_penalty: float = setting(
        0.0,
        "penalty on the normalised reward of an answer without eos (Ziegler et al.: a fixed low "
        "reward)",
        0.0, 1000.0)
    target_kl: float = setting(
        0.0,
        "early stopping: approximate KL to the rollout policy, in nats a token, above which the "
        "rest of the update trains only the critic (Spinning Up); 0: none",
        0.0, 1000.0)
    reset_reference: int = setting(
        0,
        "number of iterations between two resets of the reference to the current policy (ProRL, "
        "arXiv 2505.24864); 0: no reset",
        0, 10 ** 6)
    min_new_tokens: int = setting(
        0,
        "minimum answer length, in tokens; eos has probability 0 before (Hugging Face's "
        "min_new_tokens)",
        0, 8192)
    sample_every: int = setting(
        10,
        "number of iterations between two sets of three samples, written with their rewards to "
        "samples_METHOD.md and log.jsonl; 0: none",
        0, 10 ** 6)


@dataclass(frozen=True)
class Evaluate:
    groups: int = setting(10, "number of strength groups in tables and figures", 2, 1000)
    bootstrap: int = setting(1000, "number of bootstrap resamples an interval", 10, 10 ** 6)
    prompts: int = setting(256, "number of prompts that compare policies", 2, 10 ** 6)
    temperature: float = setting(
        0.8, "sampling temperature of the compared policies (the paper: 0.8); 0: greedy", 0.0, 10.0)
    top_p: float = setting(
        0.9, "nucleus sampling of the compared policies (the paper: 0.9): probability mass kept",
        0.001, 1.0)
    repetition_penalty: float = setting(
        1.0, "repetition penalty of the compared policies (arXiv 1909.05858); 1: none", 0.01, 100.0)
    tie: float = setting(
        0.25, "difference of judge scores below which two answers tie", 0.0, 100.0)


@dataclass(frozen=True)
class Log:
    tracker: str = setting(
        "none",
        "tracker that gets the numbers of log.jsonl as well, a run for each model that is trained; "
        "needs the library of its name",
        choices=("none", "tensorboard", "wandb"))
    project: str = setting("nanoreward", "name of the project in wandb")
    figures: bool = setting(True, "draw the pictures of a run, which takes some seconds")


@dataclass(frozen=True)
class Config:
    seed: int = setting(0, "seed of all random numbers", 0, 2 ** 31)
    out_dir: str = setting("out/run", "folder for all outputs")
    device: str = setting(
        "auto", "device; auto: cuda if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = setting(
        "auto",
        "precision of autocast; auto: bf16 on CUDA that has it, fp16 on older CUDA, float32 on CPU",
        choices=("auto", "float32", "bf16", "fp16"))
    compile: str = setting(
        "auto", "use of torch.compile; auto: on CUDA only", choices=("auto", "on", "off"))
    threads: int = setting(0, "number of CPU threads; 0: torch's default", 0, 1024)
    data: Data = Data()
    world: World = World()
    model: Model = Model()
    train: Train = Train()
    sft: Sft = Sft()
    ensemble: Ensemble = Ensemble()
    strength: Strength = Strength()
    clean: Clean = Clean()
    reward: Reward = Reward()
    contrast: Contrast = Contrast()
    meta: Meta = Meta()
    ppo: Ppo = Ppo()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()


# --------------------------------------------------------------------------------------------------
# Old names

RENAMED = {  # old name -> new name; both are understood everywhere
    "model.states": "model.embeds_dir",
    "train.clip": "train.grad_clip",
    "train.checkpointing": "train.gradient_checkpointing",
    "train.optimiser": "train.optimizer",
    "ppo.episodes": "ppo.rollout_batch_size",
    "ppo.epochs": "ppo.num_ppo_epochs",
    "ppo.minibatches": "ppo.num_minibatches",
    "ppo.max_new": "ppo.max_new_tokens",
    "ppo.kl": "ppo.kl_coef",
    "ppo.kl_kind": "ppo.kl_estimator",
    "ppo.lam": "ppo.gae_lambda",
    "ppo.clip": "ppo.cliprange",
    "ppo.value_clip": "ppo.cliprange_value",
    "ppo.normalise": "ppo.normalize",
    "ppo.critic_pretrain": "ppo.critic_warmup_iters",
    "ppo.ptx": "ppo.ptx_coef",
    "ppo.kl_target": "ppo.adaptive_kl_target",
    "ppo.no_end_penalty": "ppo.missing_eos_penalty",
    "ppo.stop_kl": "ppo.target_kl",
    "ppo.min_new": "ppo.min_new_tokens",
    "ppo.show": "ppo.sample_every",
}

ALIKE = {  # easily confused: the old ppo.kl_target is not the new ppo.target_kl
    "ppo.adaptive_kl_target": "ppo.target_kl",
    "ppo.target_kl": "ppo.adaptive_kl_target",
}

announced = set()  # old names that this process has printed


def renamed(key):
    """Dotted name of a setting, old or new -> its new name"""
    return RENAMED.get(key, key)


MAX_NAME = 100     # characters of a name that a similar one is looked for
MANY_CHANGES = 12  # more renamed settings at once are counted, not listed


def announce(given):
    """Print one line with the new names of the old ones among the given keys, once a process."""
    changes = []
    for key in given:
        if key not in RENAMED or key in announced:
            continue
        announced.add(key)
        other = ALIKE.get(RENAMED[key])
        changes.append(f"{key} is now {RENAMED[key]}" + (f" (not {other})" if other else ""))
    if len(changes) > MANY_CHANGES:  # the record of an old run has all settings
        print(f"note: {len(changes)} settings have new names, such as {changes[0]}; "
              "`python train.py --help` lists them", file=sys.stderr)
    elif changes:
        print("note: " + ", ".join(changes), file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# From keys and values to a Config

def keys(config=Config()):
    """Dotted name of every setting -> its dataclass field, in order."""
    out = {}
    for section in fields(config):
        value = getattr(config, section.name)
        if not is_dataclass(value):
            out[section.name] = section
            continue
        for inner in fields(value):
            out[f"{section.name}.{inner.name}"] = inner
    return out


def check_type(value, kind):
    """Convert a value, perhaps a string from the command line, to a setting's type.

    Raises ValueError, TypeError or OverflowError if it is no such value.
    """
    if kind in (tuple[str, ...], tuple[float, ...]):
        if isinstance(value, str):
            value = value.split(",") if value else []
        if not isinstance(value, (list, tuple)):
            raise ValueError
        if kind == tuple[float, ...]:
            return tuple(check_type(v, float) for v in value)
        if not all(isinstance(v, str) for v in value):
            raise ValueError
        return tuple(v.strip() for v in value if v.strip())
    if kind is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower())
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise ValueError
        return value
    if isinstance(value, bool) or kind is int and isinstance(value, float):
        raise ValueError
    value = kind(value)
    if not math.isfinite(value):
        raise ValueError
    return value


def texts_in(value):
    """The texts of a setting's value, none in a number"""
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, str)]


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
              tuple[float, ...]: "a list of numbers", tuple[str, ...]: "a list of texts"}


def checked(key, value, f):
    """Convert a value to the setting's type and check its range and choices.  Raises ConfigError

    f: dataclass field of the setting
    """
    other = ALIKE.get(key)
    hint = f" ({other} is another setting)" if other else ""
    try:
        value = check_type(value, f.type)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{key} = {value_text(value)}: must be {TYPE_NAMES[f.type]}"
                          f"{hint}") from None
    low, high = f.metadata["low"], f.metadata["high"]
    if low is not None and value < low or high is not None and value > high:
        allowed = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{key} = {value_text(value)}: must be {allowed}{hint}")
    choices = f.metadata["choices"]
    for text in texts_in(value):
        reason = "" if choices else why_unusable(text)  # without choices it is a path
        if reason:
            raise ConfigError(f"{key} = {value_text(text)}: {reason}")
        if choices and text not in choices:
            near = difflib.get_close_matches(text[:MAX_NAME], choices, 1)
            remedy = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key} = {value_text(text)}: must be one of "
                              f"{', '.join(choices)}{remedy}")
    return value


def assign(config, key, value):
    """Copy of config with one setting changed; key: its dotted name, new or old"""
    announce([key])
    new, known = renamed(key), keys(config)
    if new not in known:
        candidates = [*known, *RENAMED]
        near = renamed(difflib.get_close_matches(key[:MAX_NAME], candidates, 1, cutoff=0)[0])
        name = key if key.isprintable() and len(key) <= MAX_NAME else value_text(key)
        raise ConfigError(f"{name} = {value_text(value)}: no such setting; the nearest is {near} "
                          f"({known[near].metadata['help']})")
    value = checked(new, value, known[new])
    section, _, name = new.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def assign_all(config, settings):
    """Assign a list of (key, value) of one source; the last one wins.

    Raises ConfigError if it gives one setting by its old name and by its new one.
    """
    announce(key for key, _ in settings)
    names = {}
    for key, value in settings:
        new = renamed(key)
        other = names.setdefault(new, key)
        if other != key:
            raise ConfigError(f"{key} = {value_text(value)}: is the same setting as {other}, "
                              f"given as well; keep {new} alone")
        config = assign(config, key, value)
    return config


def flatten(table):
    """Nested dictionaries of a TOML file or of as_dict -> [(key, value)]"""
    sections, out = vars(Config()), []
    for key, value in table.items():
        is_section = is_dataclass(sections.get(key))
        if isinstance(value, dict) and (value or is_section):
            out += [(f"{key}.{name}" if name else key, inner) for name, inner in value.items()]
        else:
            out.append((key, value))
    return out


def read_toml(path):
    """A file of settings -> dictionary.  Raises ConfigError"""
    where = f"--config = {value_text(path)}"
    reason = why_no_file(path, max_bytes=2 ** 20)
    if reason:
        raise ConfigError(f"{where}: {reason}; begin with configs/tiny.toml")
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply; a section has settings only") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}); check its "
                          f"permissions") from None
    except ValueError as error:  # not TOML, not UTF-8, a number too long
        raise ConfigError(f"{where}: {error}; correct the file, or begin with "
                          f"configs/tiny.toml") from None


def load(path=None, overrides=(), say=lambda line: None):
    """Defaults, then the TOML file, then overrides (a list of (key, text)) -> Config

    A table [pretrained] of the file has settings that hold where model.init is given, over its
    others; say(line) is called with its `note` where neither model.init nor strength.votes is.
    """
    config = Config()
    overrides = list(overrides)
    if path is not None:
        table = read_toml(path)
        pretrained = table.pop("pretrained", {})
        if not isinstance(pretrained, dict):
            raise ConfigError(f"--config = {value_text(path)}: pretrained: must be a table")
        note = pretrained.pop("note", "")
        config = assign_all(config, flatten(table))
        chosen = assign_all(config, overrides)
        if chosen.model.init != "scratch":
            config = assign_all(config, flatten(pretrained))
        elif note and not chosen.strength.votes:
            say(f"note: {note}")
    return consistent(assign_all(config, overrides))


def from_dict(table):
    """Config from the dictionary of as_dict, also from one with old names or fewer settings."""
    return consistent(assign_all(Config(), flatten(table)))


def as_dict(config):
    return asdict(config)


# --------------------------------------------------------------------------------------------------
# Checks of several settings at once

def consistent(config):
    """The config itself; ConfigError if its settings contradict each other."""
    if not config.out_dir:
        raise ConfigError("out_dir = '': name a folder")
    if config.strength.votes:  # nothing is trained that could leave a fold out
        config = replace(config, ensemble=replace(config.ensemble, folds=0))
    check_model(config)
    check_ppo(config)
    check_voters(config)
    check_strength(config)
    check_evaluate(config)
    check_contrast(config)
    check_shard(config)
    check_reward(config)
    check_meta(config)
    check_data(config)
    return config


def check_model(config):
    m = config.model
    scratch = m.init == "scratch"
    if scratch and config.data.template != "hh":
        raise ConfigError(f"data.template = {config.data.template!r}: needs a model.init whose "
                          f"tokenizer has its special tokens; a vocabulary from scratch has none")
    if scratch and m.train_layers >= 0:
        raise ConfigError(f"model.train_layers = {m.train_layers}: needs a pretrained model.init; "
                          f"untrained layers are not worth freezing")
    if m.train_layers == 0 and (config.sft.epochs or config.ppo.methods or config.meta.rounds):
        raise ConfigError("model.train_layers = 0: trains only the norm and head of reward models; "
                          "set sft.epochs=0, ppo.methods= and meta.rounds=0, or train more layers")
    if scratch and m.lora_rank:
        raise ConfigError(f"model.lora_rank = {m.lora_rank}: needs a pretrained model.init; "
                          "adapters cannot make up for untrained weights")
    if m.lora_rank and m.train_layers == 0:
        raise ConfigError(f"model.lora_rank = {m.lora_rank}: model.train_layers = 0 leaves no "
                          "block to adapt; raise it, or set model.lora_rank=0")
    if scratch and (m.width % m.heads or (m.width // m.heads) % 2):
        raise ConfigError(f"model.width = {m.width}: must be an even multiple of "
                          f"model.heads = {m.heads}")
    if m.heads % m.kv_heads:
        raise ConfigError(f"model.kv_heads = {m.kv_heads}: must divide model.heads = {m.heads}")


def check_ppo(config):
    p, context = config.ppo, config.model.context
    if p.max_new_tokens + 2 > context:
        raise ConfigError(f"ppo.max_new_tokens = {p.max_new_tokens}: must be at most "
                          f"model.context - 2 = {context - 2}")
    if p.num_minibatches > p.rollout_batch_size:
        raise ConfigError(f"ppo.num_minibatches = {p.num_minibatches}: must be at most "
                          f"ppo.rollout_batch_size = {p.rollout_batch_size}")
    if p.rollout_batch_size % p.answers_per_prompt:
        raise ConfigError(f"ppo.rollout_batch_size = {p.rollout_batch_size}: must be a multiple of "
                          f"ppo.answers_per_prompt = {p.answers_per_prompt}")
    if p.min_new_tokens >= p.max_new_tokens:
        raise ConfigError(f"ppo.min_new_tokens = {p.min_new_tokens}: must be less than "
                          f"ppo.max_new_tokens = {p.max_new_tokens}")
    if p.critic_warmup_iters >= p.iterations:
        raise ConfigError(f"ppo.critic_warmup_iters = {p.critic_warmup_iters}: must be less than "
                          f"ppo.iterations = {p.iterations}, which include them")
    if p.domains and config.data.train != ("world",):
        raise ConfigError(f"ppo.domains = {','.join(p.domains)!r}: belong to the world; needs "
                          f"data.train = world")
    if p.advantage == "group" and (p.answers_per_prompt < 2 or p.critic_warmup_iters):
        raise ConfigError("ppo.advantage = 'group': needs ppo.answers_per_prompt of 2 or more, "
                          "which are compared, and ppo.critic_warmup_iters = 0: it has no critic")
    if p.reward in ("verifier", "both") and not p.domains:
        raise ConfigError(f"ppo.reward = {p.reward!r}: needs ppo.domains, of arithmetic, "
                          "translation, programs: no program judges other answers")
    if p.adaptive_kl_target and not p.kl_coef:
        raise ConfigError(f"ppo.adaptive_kl_target = {p.adaptive_kl_target}: needs "
                          f"ppo.kl_coef > 0, which is adapted (ppo.target_kl is another setting)")
    for method in p.methods:
        if method not in config.reward.methods:
            raise ConfigError(f"ppo.methods = {method!r}: must be one of reward.methods = "
                              f"{', '.join(config.reward.methods)}")


def check_voters(config):
    """Of an ensemble whose voters are no reward models"""
    e, given = config.ensemble, config.strength.votes
    if e.voters == "states" and config.model.init == "scratch":
        raise ConfigError("ensemble.voters = 'states': needs a pretrained model.init; its states "
                          "are what the voters see")
    if e.voters == "states" and e.folds < 2:
        raise ConfigError(f"ensemble.folds = {e.folds}: ensemble.voters = states needs 2 or more, "
                          "because a head knows the labels that it was trained on")
    needs_members = bool(config.ppo.methods or config.meta.rounds)
    if (e.voters == "states" or given) and needs_members and config.data.train != ("world",):
        raise ConfigError("ppo.methods: policies are judged by the reward models of the ensemble, "
                          "which ensemble.voters = states and strength.votes do without; set "
                          "ppo.methods= and meta.rounds=0, or train the voters")


def check_strength(config):
    drops = "drop" in (config.strength.method, *config.reward.methods)
    if drops and config.strength.q == 1.0:
        raise ConfigError("strength.q = 1.0: drops every pair; lower it, or leave out method drop")


def check_evaluate(config):
    temperature = config.evaluate.temperature
    if 0.0 < temperature < 0.01:
        raise ConfigError(f"evaluate.temperature = {temperature}: must be 0 (greedy) or at least "
                          "0.01")


def check_shard(config):
    """What does not work on shards"""
    if config.train.shard == "none":
        return
    refused = {
        "meta.second_order = true": config.meta.second_order,
        "contrast.term = swav": config.contrast.term == "swav",
        "train.optimizer = adafactor": config.train.optimizer == "adafactor",
        "reward.keep = best": config.reward.keep == "best",
        "dtype = fp16": config.dtype == "fp16",
    }
    for what, is_set in refused.items():
        if is_set:
            raise ConfigError(f"train.shard = 'full': does not work with {what}; change one of "
                              "them")


def check_contrast(config):
    c = config.contrast
    items = 2 * math.ceil(config.reward.batch / config.train.accumulate)
    if c.term != "none" and c.dropout == 0:
        raise ConfigError("contrast.dropout = 0.0: both views would be equal; raise it (the paper: "
                          "0.05), or set contrast.term=none")
    if c.term == "swav" and items + c.queue < c.prototypes:
        raise ConfigError(f"contrast.queue = {c.queue}: a step has {items} features, fewer than "
                          f"contrast.prototypes = {c.prototypes}; set it to "
                          f"{c.prototypes - items} or more, or raise reward.batch")


def check_reward(config):
    r = config.reward
    if r.init and config.model.train_layers >= 0:
        raise ConfigError(f"reward.init = {r.init!r}: does not work with model.train_layers, whose "
                          "frozen blocks all models share; set model.train_layers=-1")
    if r.init and config.model.lora_rank:
        raise ConfigError(f"reward.init = {r.init!r}: does not work with model.lora_rank, whose "
                          "base all models share; set model.lora_rank=0")
    if r.methods and not r.epochs and not r.init:
        raise ConfigError("reward.epochs = 0: leaves reward models untrained; raise it, or give a "
                          "trained one as reward.init")
    if r.evals_per_epoch and not r.epochs:
        raise ConfigError(f"reward.evals_per_epoch = {r.evals_per_epoch}: needs reward.epochs of 1 "
                          "or more; nothing is evaluated without training")
    if (r.keep == "best" or r.patience) and not r.evals_per_epoch:
        raise ConfigError("reward.evals_per_epoch = 0: reward.keep = best and reward.patience need "
                          "evaluations; set it to 1 or more")


def check_meta(config):
    m = config.meta
    if m.second_order and config.train.gradient_checkpointing:
        raise ConfigError("train.gradient_checkpointing = true: does not support the second "
                          "derivatives of meta.second_order; set one of them to false")
    if m.rounds and "meta-adam" in m.arms and config.train.optimizer != "adamw":
        raise ConfigError("meta.arms = 'meta-adam': needs train.optimizer = adamw, whose mean "
                          "squares it divides by; use arm meta with the others")
    if m.rounds and m.method not in config.reward.methods:
        raise ConfigError(f"meta.method = {m.method!r}: must be one of reward.methods = "
                          f"{', '.join(config.reward.methods)}")


def check_data(config):
    d, folds, members = config.data, config.ensemble.folds, config.ensemble.members
    if not d.train:
        raise ConfigError("data.train = '': name a preference file, or world")
    if folds == 1 or folds and members % folds and config.ensemble.voters == "trained":
        raise ConfigError(f"ensemble.folds = {folds}: must be 0, or 2 or more and divide "
                          f"ensemble.members = {members}")
    is_world = d.train == ("world",)
    if not is_world and not d.valid and not d.valid_share and config.reward.methods:
        raise ConfigError("data.valid_share = 0.0: reward models need validation pairs; raise it, "
                          "give data.valid, or set reward.methods= and ppo.methods=")
    if "world" in d.train + d.valid and (not is_world or d.valid):
        raise ConfigError("data.train = 'world': cannot be combined with files; the world brings "
                          "its own validation pairs")
    check_weights(config)


def check_weights(config):
    d = config.data
    key = f"data.weights = {','.join(f'{w:g}' for w in d.weights)!r}"
    if not d.weights:
        return
    if d.train == ("world",):
        raise ConfigError(f"{key}: is for files; leave it out with data.train = world")
    if len(d.weights) != len(d.train):
        raise ConfigError(f"{key}: must be {len(d.train)} of them, one for each file of "
                          "data.train, in their order")
    if min(d.weights) < 0 or not 0 < max(d.weights) <= 1e6:
        raise ConfigError(f"{key}: must be from 0 to 1e6, and not all 0")
    if config.ensemble.voters == "states" and not config.strength.votes:
        raise ConfigError(f"{key}: linear heads weigh all pairs alike; leave it out, or set "
                          "ensemble.voters=trained")


def help_text(config=Config()):
    """Every setting with its value in a Config, the default unless given, and its meaning"""
    lines = ["python train.py --config=FILE [--stage=NAME] [--section.key=value …]\n"]
    values = dict(flatten(as_dict(config)))
    last = None
    for key, f in keys().items():
        section = key.rpartition(".")[0]
        if section != last:
            lines.append("")
        last = section
        value = values[key]
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        choices = f" [{' '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        option = f"--{key}={text}"
        lines.append(f"  {option:<36} {f.metadata['help']}{choices}")
    return "\n".join(lines)
