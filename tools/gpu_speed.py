"""The sections of tools/bench.py that measure time: machine, reward, sampling, ppo.

Shares of the matrix rate count the products of a step alone, forward and twice that backward:

    3 * [ 2 * tokens * weights of the blocks' matrices + 4 * H * D * pairs a layer ]

where tokens are those of the rows without padding, pairs are the (query, key) pairs that the
branch mask allows, and the last block computes queries, output and MLP for two tokens a row.
Embedding, norms, recomputation inside attention kernels and the optimizer count as nothing.
"""
import contextlib
import gc
import time
import traceback
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import config
import model as model_file
import ppo
from common import pick_dtype
from data import Row
from generate import Sampling, generate
from model import LanguageModel, RewardModel, Shape
from runtime import inputs
from runtime.run import Meter, Run
from tools.speed import load_ppo, synchronize
from train import TrainingData, fit, make_schedule, pair_loss

SHAPES = {
    "SmolLM2-135M": Shape(
        49152, layers=30, heads=9, kv_heads=3, width=576, hidden=1536, context=2048,
        rope_theta=100_000.0),
    "Llama-3.2-1B": Shape(
        128256, layers=16, heads=32, kv_heads=8, width=2048, hidden=8192, context=2048,
        rope_theta=500_000.0),
}
TINY = Shape(vocab=300, layers=2, heads=3, kv_heads=1, width=24, hidden=40, context=1024)
SHORT = (130, 60, 90)   # tokens of a prompt on average; fewest and most of an answer
LONG = (252, 110, 150)  # rows of 512 tokens
MARK = 0.45             # share of the bf16 rate that the longer rows should reach
BACKENDS = {
    "default": None,
    "cuDNN": [SDPBackend.CUDNN_ATTENTION],
    "memory-efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "plain": [SDPBackend.MATH],
    "all with cuDNN": [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH],
}


class Bench(NamedTuple):
    """What every section is given."""
    device: torch.device
    tiny: bool       # sizes of a test
    explore: bool
    rates: dict      # "bf16", "fp16", "TF32", "float32": FLOP/s; "copy": bytes/s; once measured
    failures: list   # names of checks that are not ok


def say(text):
    print(text, flush=True)


def attempt(bench, name, work, *arguments):
    """Call work(*arguments); an exception is noted and printed as one line."""
    try:
        work(*arguments)
    except Exception as error:
        bench.failures.append(name)
        say(f"{name} FAILED: {describe_error(error)}")


def describe_error(error):
    """The exception and the last line of the traceback, in one line"""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno} in {frame.name}"
    text = " ".join(str(error).split())[:300]
    return inputs.one_line(f"{type(error).__name__}: {text} ({place})")


def attention_by(backends):
    """A context in which attention uses these kernels; None: those of a run, without cuDNN

    Where one cannot serve, the bench says so in a line: torch's warnings about it are left out.
    """
    if not backends:
        return contextlib.nullcontext()
    warnings.filterwarnings("ignore", ".*(kernel not used because|runtime disabled)")
    warnings.filterwarnings("ignore", ".*(Flash Attention does not support|both fused kernels)")
    return sdpa_kernel(backends)


def free_memory(device):
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_text(device):
    if device.type != "cuda":
        return ""
    return f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"


def seconds_of(work, device):
    """-> seconds of one call, until the device has finished it"""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------
# Machine


def machine(bench):
    device = bench.device
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        say(f"{card.name}, {card.total_memory / 1e9:.0f} GB, compute capability "
            f"{card.major}.{card.minor}, {card.multi_processor_count} multiprocessors")
        say(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN "
            f"{torch.backends.cudnn.version()}")
    else:
        say(f"{device}, torch {torch.__version__}")
    size = matrix_size(bench)
    for name in ("bf16", "fp16", "TF32", "float32"):
        say(f"matrix product {size}^3, {name}: {rate(bench, name) / 1e12:.1f} TFLOP/s")
    say(f"memory copy, bytes read and written: {rate(bench, 'copy') / 1e9:.0f} GB/s")


def matrix_size(bench):
    return 32 if bench.tiny else 8192


def rate(bench, name):
    """A rate of the machine, measured once.  -> FLOP/s, or bytes/s of "copy" """
    if name not in bench.rates:
        measure = copy_rate if name == "copy" else matrix_rate
        bench.rates[name] = measure(bench, name)
        free_memory(bench.device)
    return bench.rates[name]


def matrix_rate(bench, name):
    """Median rate of a product of random square matrices over some tenths of a second.  FLOP/s"""
    n = matrix_size(bench)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
    a = torch.randn(n, n, device=bench.device).to(dtype)
    b = torch.randn(n, n, device=bench.device).to(dtype)

    def work():
        for _ in range(10):
            a @ b

    work()
    seconds = np.median([seconds_of(work, bench.device) for _ in range(5)])
    torch.set_float32_matmul_precision("high")
    return 10 * 2 * n ** 3 / seconds


def copy_rate(bench, name):
    """Bytes read plus bytes written a second, of a copy within the memory"""
    num_bytes = 1 << 16 if bench.tiny else 1 << 31
    source = torch.empty(num_bytes, dtype=torch.uint8, device=bench.device).fill_(1)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = [seconds_of(lambda: target.copy_(source), bench.device) for _ in range(9)]
    return 2 * num_bytes / np.median(seconds)


# --------------------------------------------------------------------------------------------------
# Random models and rows


def random_model(kind, shape, device, seed=0):
    """A model with random weights, made on the device: the generator of init_weights is the CPU's,
    which takes long for a billion weights."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = kind(shape)
    std = (2 * shape.width) ** -0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std)
    return model


def random_rows(n, lengths, vocab, seed=0):
    """n pairs of random tokens.  lengths: as SHORT; a prompt varies by a third of its mean"""
    rng = np.random.default_rng(seed)
    prompt_len, low, high = lengths
    rows = []
    for _ in range(n):
        sizes = [rng.integers(2 * prompt_len // 3, 4 * prompt_len // 3 + 1)]
        sizes += list(rng.integers(low, high + 1, 2))
        prompt, chosen, rejected = (rng.integers(0, vocab, size) for size in sizes)
        rows.append(Row(prompt, (chosen, rejected)))
    return rows


def block_weights(shape):
    """Weights of one block's matrices -> those of keys and values, the others"""
    inner = shape.heads * shape.head_width
    kv = 2 * shape.width * shape.kv_heads * shape.head_width
    others = 2 * shape.width * inner + 3 * shape.width * shape.hidden
    return kv, others


def allowed_pairs(row):
    """-> (query, key) pairs that the branch mask allows in all, and those of the last tokens"""
    P = len(row.prompt)
    pairs = P * (P + 1) // 2
    last = 0
    for response in row.responses:
        n = len(response)
        pairs += n * P + n * (n + 1) // 2
        last += P + n
    return pairs, last


def step_flops(shape, rows):
    """FLOPs of the products of one training step on these rows; the docstring has the formula"""
    kv, others = block_weights(shape)
    inner = shape.heads * shape.head_width
    total = 0
    for row in rows:
        tokens = len(row)
        out = len(row.responses)
        pairs, last = allowed_pairs(row)
        total += (shape.layers - 1) * (2 * tokens * (kv + others) + 4 * inner * pairs)
        total += 2 * tokens * kv + 2 * out * others + 4 * inner * last
    return 3 * total


# --------------------------------------------------------------------------------------------------
# Reward: training.  fit() is that of train.py, on a Run that keeps no files.


class TimedRun(Run):
    """A Run without files, whose training steps are timed."""

    def __init__(self, bench, dtype="bf16", compile="off", ppo_settings=None):
        ppo_settings = ppo_settings or config.Ppo()
        cfg = config.Config(
            device=bench.device.type, dtype=dtype, compile=compile, ppo=ppo_settings)
        super().__init__(cfg, bench.device, pick_dtype(cfg, bench.device))
        self.seconds = []          # of each step
        self.profiled_step = None  # step that is run under the profiler

    def steps(self, name, start, total):
        self.meter = Meter(total)
        self.progress = tqdm(disable=True)
        for step in range(start, total):
            profiler: Any = contextlib.nullcontext()
            if step == self.profiled_step:
                profiler = torch.profiler.profile(activities=profiled_activities(self.device))
            with profiler as profile:
                synchronize(self.device)
                start_time = time.perf_counter()
                yield step
                synchronize(self.device)
                self.seconds.append(time.perf_counter() - start_time)
            if profile is not None:
                print_kernels(profile, self.seconds[-1])

    def resume(self, name, parts):
        return None

    def should_save(self):
        return False

    def log(self, **record):
        pass

    def save_tensors(self, name, tensors):
        pass

    def record_finished(self, name, metrics):
        pass


def profiled_activities(device):
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return activities


def print_kernels(profile, seconds, top=15):
    """The kernels that take most of the GPU's time in one step"""
    kernels = []
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.append((event.self_device_time_total / 1000, event.count, event.key))
    busy = sum(ms for ms, _, _ in kernels)
    launches = sum(count for _, count, _ in kernels)
    say(f"  profile of one step: {1000 * seconds:.1f} ms under the profiler, kernels {busy:.1f} ms "
        f"in {launches} launches")
    for ms, count, key in sorted(kernels, reverse=True)[:top]:
        say(f"    {ms:8.2f} ms {100 * ms / busy:5.1f} % {count:5} x {key[:100]}")


class Training(NamedTuple):
    """What was measured of some steps."""
    first: float      # seconds of the first step, compilation included
    new: float        # median seconds of the other steps of the first epoch: new batch lengths
    known: float      # median seconds of a step of the later epochs
    tokens: float     # of a step, without padding
    flops: float      # of a step
    pairs: int        # of a step


def train_steps(run, model, rows, batch, epochs):
    """Train as train.py does.  -> Training

    All rows are sorted by length together, so that every epoch has the same batches.
    """
    cfg = config.Reward(epochs=epochs, batch=batch, lr=1e-5)
    margin = torch.zeros(len(rows))
    p = torch.ones(len(rows))

    def loss_fn(model, index):
        return pair_loss(model, [rows[i] for i in index], margin[index], p[index])

    data = TrainingData([len(row) for row in rows], [1] * len(rows), "bench")
    fit(run, "reward_baseline", model, loss_fn, cfg, data)
    steps_per_epoch = len(make_schedule(data, cfg)) // epochs
    tokens = sum(map(len, rows)) / steps_per_epoch
    flops = step_flops(model.shape, rows) / steps_per_epoch
    seconds = run.seconds
    return Training(
        first=seconds[0],
        new=float(np.median(seconds[1:steps_per_epoch])),
        known=float(np.median(seconds[steps_per_epoch:])),
        tokens=tokens, flops=flops, pairs=batch,
    )


def print_training(bench, name, result):
    """-> share of the bf16 rate"""
    share = result.flops / result.known / rate(bench, "bf16")
    say(f"{name}: {1000 * result.known:.1f} ms a step, {result.tokens / result.known:,.0f} "
        f"tokens/s, {result.pairs / result.known:,.0f} pairs/s, {100 * share:.1f} % of the bf16 "
        f"rate; new lengths {1000 * result.new:.1f} ms, first step {result.first:.1f} s"
        f"{peak_text(bench.device)}")
    return share


def reward(bench):
    say("step: pair_loss, backward, clipping, AdamW and checks of train.fit; bf16 autocast of "
        "float32 weights; 16 pairs a step")
    rate(bench, "bf16")
    for compile in ("off", "on"):
        for name, shape in SHAPES.items():
            attempt(bench, name, reward_of_shape, bench, name, shape, compile)
            torch.compiler.reset()
            free_memory(bench.device)
    if bench.explore:
        attempt(bench, "attention alone", attention_alone, bench)
        for name, shape in SHAPES.items():
            explore_attention(bench, name, replace(shape, layers=6))


def reward_of_shape(bench, name, shape, compile):
    """A line for each length of rows; with --explore also the kernels of a step and larger batches
    """
    time_training(bench, name, shape, compile, SHORT)
    share = time_training(bench, name, shape, compile, LONG)
    if compile == "off":
        return
    verdict = "reached" if share >= MARK else "NOT reached"
    say(f"  mark of {100 * MARK:.0f} % on the longer rows: {verdict}")
    if bench.explore:
        time_training(bench, name, shape, compile, LONG, profiled_step=3 if bench.tiny else 20)
        for batch in (32, 64):
            attempt(bench, f"{name}, batch {batch}", time_training, bench, name, shape, compile,
                    LONG, batch)


def eager_if_tiny(bench):
    """In a test compiled functions run as they are: the compiler takes half a minute."""
    return torch.compiler.set_stance("force_eager" if bench.tiny else "default")


def time_training(bench, name, shape, compile, lengths, batch=16, profiled_step=None):
    """Print a line.  -> share of the bf16 rate"""
    epochs = 4
    num_batches = 6
    if bench.tiny:
        shape = TINY
        batch = epochs = num_batches = 2
    free_memory(bench.device)
    model = random_model(RewardModel, shape, bench.device)
    rows = random_rows(num_batches * batch, lengths, shape.vocab)
    run = TimedRun(bench, compile=compile)
    run.profiled_step = profiled_step
    with eager_if_tiny(bench):
        result = train_steps(run, model, rows, batch, epochs)
    mean = sum(map(len, rows)) / len(rows)
    words = "compiled" if compile == "on" else "not compiled"
    return print_training(bench, f"{name}, {batch} rows of {mean:.0f} tokens, {words}", result)


def explore_attention(bench, name, shape):
    """Training with other masks, kernels and heads; of few layers, since each is compiled anew"""
    no_mask = mock.patch.object(model_file, "branch_mask", causal_instead(model_file.branch_mask))
    variants = {
        "as it is": (shape, contextlib.nullcontext()),
        "without the branch mask (is_causal)": (shape, no_mask),
        "attention by all with cuDNN": (shape, attention_by(BACKENDS["all with cuDNN"])),
        "a key head for each query head": (
            replace(shape, kv_heads=shape.heads), contextlib.nullcontext()),
    }
    for words, (variant, context) in variants.items():
        label = f"{name} of {shape.layers} layers, {words}"
        with context:
            attempt(bench, label, time_training, bench, label, variant, "on", LONG)
        torch.compiler.reset()


def causal_instead(branch_mask):
    """branch_mask, but None for a block with all queries: plain causal attention"""

    def mask(branch, out_pos=None):
        return None if out_pos is None else branch_mask(branch, out_pos)

    return mask


def attention_alone(bench):
    for T in (24,) if bench.tiny else (512, 509):  # 509: rows that no kernel's tiles divide
        attention_of_length(bench, T)


def attention_of_length(bench, T, B=16):
    """Forward and backward of one attention in SmolLM2's shape, under each kernel"""
    shape = TINY if bench.tiny else SHAPES["SmolLM2-135M"]
    H, kv_heads, D = shape.heads, shape.kv_heads, shape.head_width
    q = torch.randn(B, H, T, D, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    k, v = torch.randn(2, B, kv_heads, T, D, device=bench.device, dtype=torch.bfloat16)
    k.requires_grad_()
    v.requires_grad_()
    branch = torch.zeros(B, T, dtype=torch.int64, device=bench.device)
    branch[:, T // 2:] = 1
    branch[:, 3 * T // 4:] = 2
    mask = model_file.branch_mask(branch)
    float_mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)

    def attend(mask, repeat):
        keys, values = k, v
        if repeat:
            keys = k.repeat_interleave(H // kv_heads, 1)
            values = v.repeat_interleave(H // kv_heads, 1)
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=not repeat)
        y.backward(y.detach())

    say(f"attention alone, forward and backward, ({B}, {H} of {kv_heads}, {T}, {D})")
    kinds = {"bool mask": mask, "bf16 mask": float_mask, "is_causal": None}
    for kind, chosen in kinds.items():
        for repeat in (False, True):
            for backend, backends in BACKENDS.items():
                label = f"  {kind}, {'repeated keys' if repeat else 'enable_gqa'}, {backend}"
                time_attention(bench, label, lambda: attend(chosen, repeat), backends)


def time_attention(bench, label, work, backends):
    """Print the first and the later calls; a kernel that does not take the arguments is named."""
    try:
        with attention_by(backends):
            first = seconds_of(work, bench.device)
            later = [seconds_of(work, bench.device) for _ in range(3 if bench.tiny else 20)]
    except RuntimeError as error:
        say(f"{label}: not possible ({str(error).splitlines()[0][:60]})")
        return
    say(f"{label}: {1000 * np.median(later):.2f} ms, first {1000 * first:.1f} ms")


# --------------------------------------------------------------------------------------------------
# Sampling


def sampling(bench):
    shape = TINY if bench.tiny else SHAPES["SmolLM2-135M"]
    policy = random_model(LanguageModel, shape, bench.device).eval()
    new_tokens = 4 if bench.tiny else 64
    say("bf16 autocast, SmolLM2-135M, prompts of 64 tokens, 64 new ones; floor: bf16 weights and "
        "the keys and values read once a step, at the rate of the copy")
    all_rows = (1, 3) if bench.tiny else (64, 1, 16, 256)
    for rows in all_rows:
        time_sampling(bench, policy, rows, new_tokens)


def time_sampling(bench, policy, rows, new_tokens, prompt_len=64):
    shape = policy.shape
    settings = Sampling(new_tokens, eos_id=0, min_new_tokens=new_tokens)
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, shape.vocab, (rows, prompt_len)).tolist()

    def work():
        run = TimedRun(bench)
        with run.autocast():
            generate(policy, prompts, settings, torch.Generator().manual_seed(0))

    first = seconds_of(work, bench.device)
    known = [seconds_of(work, bench.device)]
    while len(known) < 3 and sum(known) < 2.0:  # a call of some seconds is not repeated
        known.append(seconds_of(work, bench.device))
    seconds = float(np.median(known))
    floor = sampling_bytes(shape, rows, prompt_len + new_tokens / 2) / rate(bench, "copy")
    say(f"{rows} rows: {rows * new_tokens / seconds:,.0f} tokens/s, "
        f"{1000 * seconds / new_tokens:.2f} ms a step, floor {1000 * floor:.3f} ms, first call "
        f"{first:.2f} s")


def sampling_bytes(shape, rows, length):
    """Bytes that a step must read: bf16 weights of blocks and output, keys and values of rows"""
    weights = shape.layers * sum(block_weights(shape)) + shape.vocab * shape.width
    cache = rows * length * 2 * shape.layers * shape.kv_heads * shape.head_width
    return 2 * (weights + cache)


# --------------------------------------------------------------------------------------------------
# PPO


def ppo_iteration(bench):
    """Iterations of the loop, with random models in the place of saved ones.

    The first iteration meets every shape for the first time, as a real one does where answers end
    and prompts differ.
    """
    shape = TINY if bench.tiny else SHAPES["SmolLM2-135M"]
    answers, new_tokens, prompt_len = (4, 5, 6) if bench.tiny else (64, 64, 64)
    settings = config.Ppo(
        rollout_batch_size=answers, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        lr=1e-6, critic_lr=3e-6)
    run = TimedRun(bench, ppo_settings=settings)
    say(f"{answers} answers of {new_tokens} tokens, prompts of {prompt_len}; {shape.layers} layers "
        f"of width {shape.width}; bf16, not compiled; {settings.num_ppo_epochs} epochs of "
        f"{settings.num_minibatches} minibatches")
    free_memory(bench.device)
    models, learners = make_ppo(run, shape)
    run_iterations(run, models, learners, prompt_len, 2 if bench.tiny else 4)


def run_iterations(run, models, learners, prompt_len, count):
    """Print a line for each iteration, and what holds at the first step."""
    cfg = run.cfg.ppo
    rng = np.random.default_rng(0)
    vocab = models.policy.shape.vocab
    prompts = rng.integers(1, vocab, (cfg.rollout_batch_size, prompt_len)).tolist()
    moments = ppo.Moments()
    for iteration in range(count):
        parts, metrics = one_iteration(run, models, learners, prompts, moments, iteration)
        total = sum(parts.values())
        text = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
        tokens = cfg.rollout_batch_size * cfg.max_new_tokens
        say(f"iteration {iteration + 1}: {total:.2f} s ({text}), {tokens / total:,.0f} "
            f"tokens/s{peak_text(run.device)}")
        if iteration == 0:
            say(f"  first step: ratio - 1 = {metrics['first_ratio'] - 1:.2g}, sampling and scoring "
                f"differ by {metrics['logprob_mismatch_mean']:.2g} nats a token")


def make_ppo(run, shape):
    """Models and Learners as ppo.train_policy_loop makes them"""
    run.tokenizer = SimpleNamespace(eos_id=0, end_ids=[0])
    return load_ppo(run, lambda kind: random_model(kind, shape, run.device).eval())


def one_iteration(run, models, learners, prompts, moments, iteration):
    """-> seconds of sampling, scoring and update; metrics"""
    seconds_sampling = []

    def timed_generate(*arguments, **options):
        synchronize(run.device)
        start = time.perf_counter()
        generation = generate(*arguments, **options)
        synchronize(run.device)
        seconds_sampling.append(time.perf_counter() - start)
        return generation

    cfg = run.cfg.ppo
    generator = torch.Generator().manual_seed(iteration)
    synchronize(run.device)
    start = time.perf_counter()
    with mock.patch.object(ppo, "generate", timed_generate):
        rollout, metrics, _, _ = ppo.make_rollout(run, models, prompts, moments, generator, cfg)
    synchronize(run.device)
    middle = time.perf_counter()
    metrics |= ppo.update_policy(run, learners, rollout, cfg, generator)
    ppo.check_update(run, "policy_baseline", iteration, learners, metrics)
    synchronize(run.device)
    end = time.perf_counter()
    scoring = middle - start - seconds_sampling[0]
    parts = {"sampling": seconds_sampling[0], "scoring": scoring, "update": end - middle}
    return parts, metrics
