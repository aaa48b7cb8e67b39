"""python -m tools.speed: cost of a training step of each kind, as a ratio to the plain reward step.
python -m tools.speed peers [FILE.jsonl.gz]: training beside TRL, sampling beside transformers.

The kinds of step alternate, so that other load on the machine affects all of them alike.  Printed
are the median over rounds of the ratio within a round, and its quartiles.  Model: 2 layers, width
128; 16 pairs of the built-in world a step; MetaRM's samples are 16 prompts with 5 answers each.

Peers get the same weights, layout, pairs, batch size and threads: 4 layers, width 256, pairs of
FILE or of the built-in world.  They need requirements-bench.txt.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import sys
import tempfile
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

import config
import losses
import world
from common import make_optimizer, pick_device, pick_dtype
from config import ConfigError
from contrast import ContrastiveHead
from data import Pair, Row, batches, collate, encode_pairs, encode_row
from formats.pairs import read_pairs
from generate import Sampling, generate
from metarm import meta_gradient
from model import LanguageModel, RewardModel, Shape, init_weights
from pretrained import export
from runtime.cli import run_cli
from tokenizer import train_tokenizer
from train import pair_loss

BATCH = 16
TERMS = {  # the paper's settings, sec. 4
    "simcse": config.Contrast(term="simcse"),
    "simcse on differences": config.Contrast(term="simcse", items="difference"),
    "swav, K = 50, a queue of 256": config.Contrast(term="swav", weight=0.1, queue=256),
    "swav on differences, K = 20": config.Contrast(
        term="swav", items="difference", weight=0.5, prototypes=20),
}


def world_pairs(count, seed=0):
    rows, _ = world.pairs(count, seed, world.Noise())
    return [Pair(**row) for row in rows]


def texts_of(pairs):
    for pair in pairs:
        yield from (pair.prompt, pair.chosen, pair.rejected)


def synchronize(device):
    if device.type == "cuda":  # CUDA only: not run by CI
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------
# Steps of each kind


class StepData(NamedTuple):
    """What the steps of all kinds have in common."""
    rows: list            # encoded pairs
    samples: list         # rows with k responses each, for MetaRM
    shape: Shape
    device: torch.device
    dtype: torch.dtype    # of autocast, as in training


def make_data(device, num_pairs=2000, k=5):
    pairs = world_pairs(num_pairs)
    tokenizer = train_tokenizer(texts_of(pairs), 1024)
    rows = []
    for pair in pairs:
        rows.append(encode_row(tokenizer, pair.prompt, (pair.chosen, pair.rejected), 256))
    samples = []
    for i, row in enumerate(rows):
        answers = tuple(rows[(i + j) % len(rows)].responses[0] for j in range(k))
        samples.append(Row(row.prompt, answers))
    shape = Shape(
        tokenizer.vocab_size, layers=2, heads=4, kv_heads=4, width=128, hidden=344, context=256)
    return StepData(rows, samples, shape, device, pick_dtype(config.Config(), device))


def make_step(data, settings=None, second_order=None, seed=0):
    """-> function that makes one training step of a new model.

    settings: the [contrast] section, if the step has a contrastive term
    second_order: False or True for a step of MetaRM
    """
    generator = torch.Generator().manual_seed(seed)
    model = init_weights(RewardModel(replace(data.shape, dropout=0.05)), generator)
    model = model.to(data.device).train()
    head = None
    extra_params = []
    if settings is not None:
        head = ContrastiveHead(settings, data.shape.width, generator).to(data.device)
        extra_params = list(head.parameters())
    optimizer = make_optimizer(model, "adamw", 1e-4, 0.1, extra_params)
    pair_rng = np.random.default_rng(seed)    # every kind of step sees the same pairs
    sample_rng = np.random.default_rng(seed)
    autocast = torch.autocast(data.device.type, data.dtype, data.dtype != torch.float32)
    margin = torch.zeros(BATCH)
    p = torch.ones(BATCH)

    def ranking_loss():
        rows = [data.rows[i] for i in pair_rng.integers(0, len(data.rows), BATCH)]
        with autocast:
            loss, _ = pair_loss(model, rows, margin, p, head)
        return loss / BATCH

    def difference_loss():
        rows = [data.samples[i] for i in sample_rng.integers(0, len(data.samples), BATCH)]
        batch = collate(rows).to(data.device)
        with autocast:
            rewards = model(batch.tokens, batch.branch, batch.position, batch.last)
        return losses.difference(rewards).mean()

    def step():
        optimizer.zero_grad(set_to_none=True)
        if second_order is None:
            ranking_loss().backward()
        else:
            parameters = list(model.parameters())
            gradients = meta_gradient(
                parameters, difference_loss, ranking_loss, 0.1, second_order)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
        optimizer.step()

    return step


def make_steps(data):
    """-> {name: function that makes one training step}, the plain one first"""
    steps = {"plain": make_step(data)}
    for name, settings in TERMS.items():
        steps[name] = make_step(data, settings)
    steps["MetaRM, first order"] = make_step(data, second_order=False)
    steps["MetaRM, second order"] = make_step(data, second_order=True)
    return steps


def time_steps(steps, device, rounds, warmup=2):
    """-> seconds (rounds, kinds of step)"""
    seconds = np.zeros((warmup + rounds, len(steps)))
    for i in range(warmup + rounds):
        for j, step in enumerate(steps.values()):
            start = time.perf_counter()
            step()
            synchronize(device)
            seconds[i, j] = time.perf_counter() - start
    return seconds[warmup:]


def compare_steps(data, rounds=15):
    """Print a line for each kind of step."""
    steps = make_steps(data)
    seconds = time_steps(steps, data.device, rounds)
    low, ratio, high = np.quantile(seconds / seconds[:, :1], [0.25, 0.5, 0.75], axis=0)
    milliseconds = 1000 * np.median(seconds, axis=0)
    where = f"{describe(data.device)}, {str(data.dtype).removeprefix('torch.')}"
    print(f"{f'step, {BATCH} pairs':32}{'ms':>8}{'ratio':>8}  quartiles   ({where})")
    for i, name in enumerate(steps):
        quartiles = f"{low[i]:.2f}-{high[i]:.2f}"
        print(f"{name:32}{milliseconds[i]:8.1f}{ratio[i]:8.2f}  {quartiles}")


def describe(device):
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


# --------------------------------------------------------------------------------------------------
# Peers


def peer_model(kind, tokenizer, device):
    shape = Shape(
        tokenizer.vocab_size, layers=4, heads=4, kv_heads=4, width=256, hidden=688, context=512)
    return init_weights(kind(shape), torch.Generator().manual_seed(0)).to(device)


def compare_training(pairs, tokenizer, folder, device, num_steps=12):
    """-> {name: function of the round's number that trains a reward model; its pairs a second}"""
    from transformers import AutoTokenizer
    kept, rows, _ = encode_pairs(tokenizer, pairs, 512)
    model = peer_model(RewardModel, tokenizer, device)
    export.save(folder, model, tokenizer)
    peer_tokenizer = AutoTokenizer.from_pretrained(folder)

    def choose(number):
        return np.random.default_rng(number).permutation(len(rows))[:BATCH * num_steps]

    def ours(number):
        return pairs_per_second(model, [rows[i] for i in choose(number)], number, device)

    def theirs(number):
        chosen = [kept[i] for i in choose(number)]
        return trl_pairs_per_second(folder, peer_tokenizer, chosen, num_steps, device)

    return {"nanoreward": ours, "TRL RewardTrainer": theirs}


def pairs_per_second(model, rows, seed, device):
    optimizer = make_optimizer(model.train(), "adamw", 1e-5, 0.1)
    start = time.perf_counter()
    for index in batches([len(row) for row in rows], BATCH, seed):
        margin = torch.zeros(len(index))
        loss, _ = pair_loss(model, [rows[i] for i in index], margin, torch.ones(len(index)))
        optimizer.zero_grad(set_to_none=True)
        (loss / len(index)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    synchronize(device)
    return len(rows) / (time.perf_counter() - start)


def trl_pairs_per_second(folder, tokenizer, pairs, num_steps, device):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, PrinterCallback
    from trl import RewardConfig, RewardTrainer
    records = []
    for pair in pairs:
        records.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
    args = RewardConfig(
        output_dir=f"{folder}.trl", max_steps=num_steps, per_device_train_batch_size=BATCH,
        max_length=512, learning_rate=1e-5, bf16=False, fp16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=device.type == "cpu")
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder), args=args,
        train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    synchronize(device)
    return BATCH * num_steps / (time.perf_counter() - start)


def compare_sampling(tokenizer, folder, device, rows=64, prompt_len=32, new_tokens=64):
    """-> {name: function of the round's number that samples from a policy; its tokens a second}"""
    from transformers import AutoModelForCausalLM
    model = peer_model(LanguageModel, tokenizer, device).eval()
    export.save(folder, model, tokenizer)
    peer = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    sampling = Sampling(new_tokens, tokenizer.eos_id, min_new_tokens=new_tokens)

    def prompts(number):
        rng = np.random.default_rng(number)
        ids = rng.integers(0, tokenizer.vocab_size - 1, (rows, prompt_len))
        return torch.from_numpy(ids)

    def speed_since(start):
        synchronize(device)
        return rows * new_tokens / (time.perf_counter() - start)

    def ours(number):
        prompt_ids = prompts(number).tolist()
        generator = torch.Generator().manual_seed(number)
        start = time.perf_counter()
        generate(model, prompt_ids, sampling, generator)
        return speed_since(start)

    def theirs(number):
        prompt_ids = prompts(number).to(device)
        mask = torch.ones_like(prompt_ids)
        start = time.perf_counter()
        with torch.no_grad():
            peer.generate(
                prompt_ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0,
                max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)
        return speed_since(start)

    return {"nanoreward": ours, "transformers generate": theirs}


def compare_peers(device, path=None, rounds=5):
    """Print a line for training and a line for sampling.  Raises ConfigError, DataError."""
    silence_peers()
    pairs = read_pairs(path) if path else world_pairs(2000)
    tokenizer = train_tokenizer(texts_of(pairs), 4096)
    with tempfile.TemporaryDirectory() as folder:
        training = compare_training(pairs, tokenizer, f"{folder}/reward", device)
        print_speeds("pairs/s", training, rounds, device)
        sampling = compare_sampling(tokenizer, f"{folder}/policy", device)
        print_speeds("tokens/s", sampling, rounds, device)


def silence_peers():
    try:
        import datasets
        import transformers
        import trl  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed; pip install -r requirements-bench.txt") from None
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def print_speeds(unit, work, rounds, device):
    """work: {name: function of the round's number -> speed}, ours first"""
    speeds = np.zeros((rounds + 1, len(work)))
    for number in range(rounds + 1):
        for j, measure in enumerate(work.values()):
            speeds[number, j] = measure(number)
    speeds = speeds[1:]  # the first round warms up
    low, ratio, high = np.quantile(speeds[:, 0] / speeds[:, 1], [0.25, 0.5, 0.75])
    medians = np.median(speeds, axis=0)
    texts = [f"{name} {median:,.1f} {unit}" for name, median in zip(work, medians)]
    print(f"{', '.join(texts)}: ratio {ratio:.1f} ({low:.1f}-{high:.1f}), {describe(device)}")


def main(argv):
    if argv and argv[0] != "peers" or len(argv) > 2:
        print(__doc__)
        return 0

    def work():
        device = pick_device(config.Config())
        if argv:
            compare_peers(device, *argv[1:])
        else:
            compare_steps(make_data(device))

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
