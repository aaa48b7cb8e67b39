"""The sections of tools/bench.py that check: correctness, shapes, stages, memory.

The reference of every comparison is the CPU in float32.  A number that passes through n roundings
of relative size u, each of random sign, is off by about sqrt(n) u of its scale; the largest of some
thousand such errors is about four times that, and the norm of many is taken at twice.  So

    tolerance = 4 sqrt(n) u scale of an output,  2 sqrt(n) u of a gradient, relative to its norm

where u is the unit roundoff of the precision (bf16 2^-8, fp16 and TF32 2^-11, float32 2^-24), scale
the root mean square of the reference, and n the number of tensors that a pass rounds: ten a block
forward and twice as many again backward in half precision; in float32, where sums are rounded term
by term, ten a block times the terms of a sum, which is at most the hidden width.
"""
import contextlib
import io
import tempfile
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch._functorch.config

import ppo
import train
from common import compile_blocks, make_optimizer
from config import Ppo
from data import Row, collate, response_tokens
from generate import Sampling, generate
from losses import bradley_terry, difference
from metarm import meta_gradient
from model import LanguageModel, RewardModel, Shape, init_weights
from ppo import Learners, Models, Moments, token_logprob
from runtime import signals
from runtime.cli import run_cli
from tools.gpu_speed import (
    BACKENDS,
    TINY,
    TimedRun,
    attempt,
    attention_by,
    eager_if_tiny,
    random_model,
    random_rows,
    say,
    seconds_of,
)
from tools.speed import make_data
from train import pair_loss

CPU = torch.device("cpu")
ROUNDOFF = {"float32": 2.0 ** -24, "TF32": 2.0 ** -11, "fp16": 2.0 ** -11, "bf16": 2.0 ** -8}
DTYPES = {
    "float32": torch.float32, "TF32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


TINY_RUN = Shape(vocab=1024, layers=2, width=128, hidden=344, context=512)  # configs/tiny.toml


def root_mean_square(x):
    return float(x.double().square().mean().sqrt())


def tolerance(precision, shape, backward=False):
    """That of this file's docstring, for a scale of 1"""
    n = 10 * shape.layers * (3 if backward else 1)
    if precision == "float32":
        n *= shape.hidden
    return (2 if backward else 4) * n ** 0.5 * ROUNDOFF[precision]


def check(bench, name, amount, allowed):
    """Print a number beside what is allowed, and note it if it is larger or NaN."""
    is_ok = amount <= allowed
    if not is_ok:
        bench.failures.append(name)
    say(f"{name}: {amount:.2g}, allowed {allowed:.2g}: {'ok' if is_ok else 'NOT ok'}")


def check_fact(bench, name, is_ok):
    """Print whether a fact holds, and note it if it does not."""
    if not is_ok:
        bench.failures.append(name)
    say(f"{name}: {'ok' if is_ok else 'NOT ok'}")


def largest_difference(a, b):
    return float((a.cpu().double() - b.cpu().double()).abs().max())


def relative_distance(gradients, reference):
    """Norm of the difference of two lists of tensors, in units of the norm of the second"""
    apart = 0.0
    norm = 0.0
    for a, b in zip(gradients, reference, strict=True):
        apart += float((a.cpu().double() - b.cpu().double()).square().sum())
        norm += float(b.cpu().double().square().sum())
    return (apart / norm) ** 0.5


# --------------------------------------------------------------------------------------------------
# Correctness


class Small(NamedTuple):
    """A small model's data: pairs of the built-in world."""
    shape: object
    rows: list      # 16 pairs; 4 in a test
    answers: list   # their chosen answers alone, for the language model
    samples: list   # 4 prompts with 5 answers each


def make_small(bench):
    data = make_data(CPU, num_pairs=20 if bench.tiny else 400)
    # Grouped queries as in real models; with tied embeddings random weights repeat a prompt's last
    # token, whatever the attention is.
    shape = replace(data.shape, kv_heads=2, tied=False)
    if bench.tiny:
        shape = replace(shape, width=32, hidden=48)
    rows = data.rows[:4 if bench.tiny else 16]
    return Small(shape, rows, [row.branches(0) for row in rows], data.samples[:4])


def small_model(kind, small, device):
    """The same weights on every device"""
    return init_weights(kind(small.shape), torch.Generator().manual_seed(0)).to(device).eval()


def autocast(device, precision):
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def set_precision(precision):
    """TF32 is on under its own name alone."""
    torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")


def correctness(bench):
    small = make_small(bench)
    all_checks = (
        check_outputs, check_scaler, check_greedy, check_first_step, check_meta, check_compiled)
    for work in all_checks:
        set_precision("float32")
        attempt(bench, work.__name__, work, bench, small)


def outputs_of(small, device, precision, compile=False):
    """-> {"rewards", "losses", "log-probabilities": tensor, "gradients": list}"""
    set_precision(precision)
    model = small_model(RewardModel, small, device)
    policy = small_model(LanguageModel, small, device)
    run_model = compile_blocks(model) if compile else model
    batch = collate(small.rows).to(device)
    with autocast(device, precision):  # with features, as pair_loss does: one graph to compile
        rewards, _ = run_model(
            batch.tokens, batch.branch, batch.position, batch.last, features=True,
            inputs_embeds=None)
    rewards = rewards.detach()
    with torch.no_grad(), autocast(device, precision):
        answers = collate(small.answers).to(device)
        out_pos, target = (x.to(device) for x in response_tokens(small.answers))
        logits = policy(answers.tokens, out_pos=out_pos)
    is_token = target >= 0
    step = is_token.nonzero()[:, 1]
    logprob = token_logprob(logits[is_token], target[is_token], step, Sampling(1, 0))
    margin = torch.zeros(len(small.rows))
    p = torch.ones(len(small.rows))
    with autocast(device, precision):
        loss, _ = pair_loss(run_model, small.rows, margin, p)
    scale = 2.0 ** 10 if precision == "fp16" else 1.0  # as the scaler does, against underflow
    gradients = torch.autograd.grad(scale * loss / len(small.rows), list(model.parameters()))
    return {
        "rewards": rewards,
        "losses": bradley_terry(*rewards.unbind(1)),
        "log-probabilities": logprob,
        "gradients": [g / scale for g in gradients],
    }


def compare_outputs(bench, small, label, outputs, reference, precision):
    """Print a line for each output.

    The scale of a loss is that of the rewards it is made of; that of a log-probability is the
    spread of the logits, which shows in the spread of the log-probabilities.
    """
    scale = root_mean_square(reference["rewards"])
    for name in ("rewards", "losses", "log-probabilities"):
        if name == "log-probabilities":
            scale = root_mean_square(reference[name] - reference[name].mean())
        amount = largest_difference(outputs[name], reference[name])
        check(bench, f"{name}, {label}", amount, scale * tolerance(precision, small.shape))
    distance = relative_distance(outputs["gradients"], reference["gradients"])
    check(bench, f"gradients, {label} (relative)", distance,
          tolerance(precision, small.shape, backward=True))


def check_outputs(bench, small):
    reference = outputs_of(small, CPU, "float32")
    for precision in ROUNDOFF:
        outputs = outputs_of(small, bench.device, precision)
        compare_outputs(bench, small, precision, outputs, reference, precision)


def check_compiled(bench, small):
    """The compiled model in every precision; last, because the compiler takes longest.

    Before torch 2.13 the cache of compiled graphs ignores the dtype of autocast
    (github.com/pytorch/pytorch/pull/181564): a graph of bf16 would serve fp16, so it is off here.
    """
    reference = outputs_of(small, CPU, "float32")
    no_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with eager_if_tiny(bench), no_cache:
        for precision in ("bf16", "fp16", "float32"):
            outputs = outputs_of(small, bench.device, precision, compile=True)
            label = f"{precision} compiled"
            compare_outputs(bench, small, label, outputs, reference, precision)


def check_scaler(bench, small):
    """A step of fp16 training whose gradients overflow, and one whose gradients do not"""
    device = bench.device
    model = small_model(RewardModel, small, device)
    optimizer = make_optimizer(model, "adamw", 1e-3, 0.1)
    before = [p.detach().clone() for p in model.parameters()]

    def step(scaler):
        margin = torch.zeros(len(small.rows))
        with autocast(device, "fp16"):
            loss, _ = pair_loss(model, small.rows, margin, 1 + margin)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss / len(small.rows)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return float(norm)

    huge = torch.amp.GradScaler(device.type, init_scale=2.0 ** 60)
    norm = step(huge)
    has_moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before)]
    check_fact(bench, "fp16, overflow: the gradient norm is not finite", not np.isfinite(norm))
    check_fact(bench, "fp16, overflow: no weight has changed", not any(has_moved))
    check_fact(bench, "fp16, overflow: the scale is halved", huge.get_scale() == 2.0 ** 59)
    norm = step(torch.amp.GradScaler(device.type, init_scale=2.0 ** 10))
    has_moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before)]
    check_fact(bench, "fp16, next step: the gradient norm is finite", bool(np.isfinite(norm)))
    check_fact(bench, "fp16, next step: every weight has changed", all(has_moved))


def check_greedy(bench, small, new_tokens=24):
    """Greedy sampling gives the tokens of the CPU."""
    prompts = [row.prompt.tolist() for row in small.rows]
    settings = Sampling(new_tokens, eos_id=0, temperature=0)
    tokens = []
    for device in (CPU, bench.device):
        policy = small_model(LanguageModel, small, device)
        generation = generate(policy, prompts, settings, torch.Generator().manual_seed(0))
        tokens.append(generation.tokens.cpu())
    same = int((tokens[0] == tokens[1]).all(1).sum())
    name = f"greedy sampling, float32: {same} of {len(prompts)} rows have the CPU's tokens"
    check_fact(bench, name, same == len(prompts))


def check_first_step(bench, small):
    """PPO's first step, whose ratio of new to old probabilities is 1"""
    for precision, allowed in (("float32", 1e-4), ("TF32", 0.1), ("bf16", 0.1), ("fp16", 0.1)):
        metrics = first_step(bench, small, precision)
        check(bench, f"PPO's first ratio - 1, {precision}", abs(metrics["first_ratio"] - 1),
              allowed)
        kind = "max" if precision == "float32" else "mean"
        check(bench, f"PPO, sampling and scoring, {kind}, {precision}",
              metrics[f"logprob_mismatch_{kind}"], allowed)


def first_step(bench, small, precision):
    """-> metrics of a rollout and its update"""
    device = bench.device
    settings = Ppo(max_new_tokens=16, num_ppo_epochs=1)
    run = TimedRun(bench, dtype="float32", ppo_settings=settings)
    run.dtype = DTYPES[precision]
    run.tokenizer = Tokens(eos_id=0)
    set_precision(precision)
    policy = small_model(LanguageModel, small, device)
    critic = small_model(RewardModel, small, device)
    reference = small_model(LanguageModel, small, device)

    def length(rows):
        return torch.tensor([float(len(row.responses[0])) for row in rows], device=device)

    models = Models(policy, critic, reference, length)
    learners = Learners(
        policy, critic, make_optimizer(policy, "adamw", 1e-3, 0.0),
        make_optimizer(critic, "adamw", 1e-3, 0.0), run.make_scaler())
    prompts = [row.prompt.tolist() for row in small.rows]
    generator = torch.Generator().manual_seed(0)
    rollout, metrics, _, _ = ppo.make_rollout(
        run, models, prompts, Moments(), generator, settings)
    return metrics | ppo.update_policy(run, learners, rollout, settings, generator)


class Tokens(NamedTuple):
    """What PPO reads of a tokenizer."""
    eos_id: int
    end_ids: tuple = (0,)


def check_meta(bench, small):
    """MetaRM's gradient of both orders, in float32"""
    for second_order in (False, True):
        found = []
        for device in (CPU, bench.device):
            found.append(meta_gradient_of(small, device, second_order))
        order = "second" if second_order else "first"
        passes = 3 if second_order else 2  # backward passes that follow one another
        check(bench, f"MetaRM, {order} order, float32 (relative)", relative_distance(*found[::-1]),
              passes * tolerance("float32", small.shape, backward=True))


def meta_gradient_of(small, device, second_order, eta=0.1):
    model = small_model(RewardModel, small, device)
    margin = torch.zeros(len(small.rows))

    def difference_loss():
        batch = collate(small.samples).to(device)
        rewards = model(batch.tokens, batch.branch, batch.position, batch.last)
        return difference(rewards).mean()

    def ranking_loss():
        return pair_loss(model, small.rows, margin, 1 + margin)[0] / len(small.rows)

    return meta_gradient(
        model.parameters(), difference_loss, ranking_loss, eta, second_order=second_order)


# --------------------------------------------------------------------------------------------------
# Shapes: what the first step of a new batch length costs


def shapes(bench):
    """Every kernel has lengths of its own, because what is prepared for a length stays."""
    say("bf16, 2 layers of width 128, 16 pairs; ms of a step of a new length, of the same again, "
        "and median over the lengths")
    length = 101
    for name, backends in BACKENDS.items():
        for heads in ("4 of 4", "4 of 2"):
            lengths = range(length, length + (4 if bench.tiny else 20), 4)
            length += 21
            label = f"attention {name}, heads {heads}"
            try:
                with attention_by(backends):
                    time_shapes(bench, label, heads, lengths)
            except RuntimeError as error:
                say(f"{label}: not possible ({str(error).splitlines()[0][:80]})")
    time_products(bench)


def time_shapes(bench, label, heads, lengths):
    shape = replace(TINY, width=16) if bench.tiny else TINY_RUN
    shape = replace(shape, heads=4, kv_heads=int(heads[-1]))
    n = 2 if bench.tiny else 16
    model = random_model(RewardModel, shape, bench.device).train()
    optimizer = make_optimizer(model, "adamw", 1e-4, 0.1)

    def step(rows):
        margin = torch.zeros(len(rows))
        with autocast(bench.device, "bf16"):
            loss, _ = pair_loss(model, rows, margin, 1 + margin)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    warm_up = rows_of_length(n, lengths[0] - 1, shape.vocab)
    for _ in range(3):
        step(warm_up)
    first = []
    again = []
    for length in lengths:
        rows = rows_of_length(n, length, shape.vocab)
        first.append(1000 * seconds_of(lambda: step(rows), bench.device))
        again.append(1000 * seconds_of(lambda: step(rows), bench.device))
    say(f"{label}: new {np.median(first):.1f} ms, again {np.median(again):.1f} ms")


def rows_of_length(n, length, vocab):
    """n pairs of exactly this many tokens"""
    rows = random_rows(n, (length - 40, 20, 20), vocab)
    out = []
    for row in rows:
        prompt = np.resize(row.prompt, length - 40)
        out.append(Row(prompt, row.responses))
    return out


def time_products(bench):
    """Matrix products alone: new numbers of rows, and the same again"""
    weight = torch.randn(128, 344, device=bench.device, dtype=torch.bfloat16)
    first = []
    again = []
    rows = 1 if bench.tiny else 16
    for length in range(900, 920, 4):
        x = torch.randn(rows * length, 128, device=bench.device, dtype=torch.bfloat16)
        first.append(1000 * seconds_of(lambda: x @ weight, bench.device))
        again.append(1000 * seconds_of(lambda: x @ weight, bench.device))
    say(f"one matrix product: new {np.median(first):.2f} ms, again {np.median(again):.2f} ms")


# --------------------------------------------------------------------------------------------------
# Stages

STAGES = [
    "--config=configs/tiny.toml", "--compile=off", "--world.pairs=400", "--world.valid=200",
    "--world.ood=40", "--world.demonstrations=400", "--sft.epochs=1", "--ensemble.members=2",
    "--ensemble.epochs=1", "--reward.epochs=2", "--ppo.methods=baseline", "--ppo.iterations=3",
    "--ppo.critic_warmup_iters=0", "--meta.rounds=1", "--meta.prompts=32", "--evaluate.prompts=32",
    "--evaluate.bootstrap=50",
]
STAGES_TINY = [
    "--threads=1", "--train.workers=1", "--world.pairs=40", "--world.valid=20", "--world.ood=10",
    "--world.demonstrations=40", "--model.width=16", "--model.heads=2", "--model.kv_heads=1",
    "--model.vocab=300", "--reward.epochs=1", "--ppo.iterations=1", "--ppo.rollout_batch_size=4",
    "--ppo.max_new_tokens=6", "--meta.prompts=4", "--evaluate.prompts=4",
]


def stages(bench):
    """train.py from the first stage to export, and with frozen layers or adapters on the export.

    Its own lines have the seconds.
    """
    words = [*STAGES, f"--device={bench.device.type}"]
    words += [*STAGES_TINY, "--dtype=float32"] if bench.tiny else ["--dtype=bf16"]
    with tempfile.TemporaryDirectory() as folder:
        words.append(f"--out_dir={folder}/run")
        run_training(bench, "all stages", words)
        run_training(bench, "export", [*words, "--stage=export"])
        words = [word for word in words if not word.startswith(("--model.", "--out_dir"))]
        words += [f"--model.init={folder}/run/export/sft", "--reward.methods=baseline"]
        for kind in ("train_layers=1", "lora_rank=4"):
            more = [f"--model.{kind}", f"--out_dir={folder}/{kind}"]
            for stage in ("sft", "reward"):
                run_training(bench, f"{stage}, {kind}", [*words, *more, f"--stage={stage}"])


def run_training(bench, name, words):
    start = time.perf_counter()
    code = train.main(words)
    if signals.stop_signal:
        raise signals.Stopped
    check_fact(bench, f"{name}: exit code {code}", code == 0)
    say(f"{name}: {time.perf_counter() - start:.1f} s")


# --------------------------------------------------------------------------------------------------
# Memory


def memory(bench):
    """A step where nearly all memory is taken ends with one line, and the next step works."""
    shape = TINY if bench.tiny else replace(TINY_RUN, width=512, hidden=1376)
    model = random_model(RewardModel, shape, bench.device)
    rows = random_rows(4 if bench.tiny else 64, (130, 60, 90), shape.vocab)
    margin = torch.zeros(len(rows))

    def step():
        pair_loss(model, rows, margin, 1 + margin)[0].backward()

    is_filled = []

    def step_in_full_memory():
        filler = fill_memory(bench.device)
        is_filled.append(True)
        step()
        del filler

    step()  # loads the kernels
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = run_cli(step_in_full_memory)
    lines = printed.getvalue().splitlines()
    for line in lines:
        say(f"  printed: {line[:200]}")
    if bench.device.type == "cuda":
        check_fact(bench, "full memory: it is the step that failed", bool(is_filled))
    check_fact(bench, f"full memory: exit code {code}", code == 2)
    check_fact(bench, f"full memory: {len(lines)} line printed", len(lines) == 1)
    step()
    say("the next step, with memory free again, works")


def fill_memory(device, left=1 << 26):
    """Take all memory of the GPU but 64 MB; on the CPU, ask for more than there is."""
    if device.type != "cuda":
        return torch.empty(1 << 60, dtype=torch.uint8)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(free - left, dtype=torch.uint8, device=device)
