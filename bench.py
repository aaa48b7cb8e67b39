"""python bench.py: what a training step of each kind costs, as a ratio to the plain reward-model step of the same run.
python bench.py peers [FILE.jsonl.gz]: reward-model training beside TRL, sampling beside transformers (requirements-bench.txt).

The steps take turns, so that whatever else the machine does falls on all of them alike; printed is the median over rounds of
the ratio within a round, with its quartiles.  Pairs of the built-in world, 2 layers, width 128, 16 pairs a step; MetaRM's
samples are 16 prompts with 5 answers.  Peers get the same weights, layout, pairs, batch size and threads; pairs are those of FILE, or the world's.
"""
import dataclasses
import sys
import tempfile
import time

import numpy as np
import torch

import config as configuration
import data
import losses
import pretrained
import world
from contrast import Contrast
from loop import pair_loss
from metarm import meta_gradient
from model import LanguageModel, RewardModel, Shape, init_weights, sample
from run import optimiser_of

VARIANTS = {  # the paper's settings (sec. 4)
    "simcse": configuration.Contrast(term="simcse"),
    "simcse on differences": configuration.Contrast(term="simcse", items="difference"),
    "swav, K = 50, a queue of 256": configuration.Contrast(term="swav", weight=0.1, queue=256),
    "swav on differences, K = 20": configuration.Contrast(term="swav", items="difference", weight=0.5, prototypes=20),
}


def steps(device, pairs=16, k=5, seed=0):
    """-> {name: function that makes one training step}"""
    rows, _ = world.pairs(2000, seed, world.Noise())
    encoding = data.train_tokenizer((text for row in rows for text in row.values()), 1024)
    encoded = [data.encode(encoding, row["prompt"], (row["chosen"], row["rejected"]), 256) for row in rows]
    samples = [data.Row(row.prompt, tuple(encoded[(i + j) % len(encoded)].responses[0] for j in range(k))) for i, row in enumerate(encoded)]
    shape = Shape(encoding.n_vocab, layers=2, heads=4, kv_heads=4, width=128, hidden=344, context=256)
    draws = iter(range(10 ** 9))
    pick = lambda source: [source[i] for i in np.random.default_rng(next(draws)).integers(0, len(source), pairs)]
    ones, zeros = torch.ones(pairs), torch.zeros(pairs)

    def stepper(dropout=0.05, settings=None, second_order=None):
        model = init_weights(RewardModel(dataclasses.replace(shape, dropout=dropout)), torch.Generator().manual_seed(seed)).to(device).train()
        beside = None if settings is None else Contrast(settings, shape.width, torch.Generator().manual_seed(seed)).to(device)
        optimiser = optimiser_of(model, "adamw", 1e-4, 0.1, [] if beside is None else beside.parameters())
        pair = lambda: pair_loss(model, pick(encoded), zeros, ones, beside)[0] / pairs

        def difference():
            batch = data.collate(pick(samples)).to(device)
            return losses.difference(model(*batch[:3], read=batch.last)).mean()

        def step():
            optimiser.zero_grad(set_to_none=True)
            if second_order is None:
                pair().backward()
            else:
                for p, g in zip(model.parameters(), meta_gradient(model.parameters(), difference, pair, 0.1, second_order)):
                    p.grad = g
            optimiser.step()

        return step

    return {"plain": stepper(), **{name: stepper(settings=s) for name, s in VARIANTS.items()},
            "MetaRM, first order": stepper(second_order=False), "MetaRM, second order": stepper(second_order=True)}


def main(rounds=15):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work, seconds = steps(device), []
    for _ in range(rounds + 2):
        now = []
        for step in work.values():
            begun = time.perf_counter()
            step()
            if device.type == "cuda":  # CUDA only: not run by CI
                torch.cuda.synchronize()
            now.append(time.perf_counter() - begun)
        seconds.append(now)
    seconds = np.array(seconds[2:])  # the first two warm up
    low, ratio, high = np.quantile(seconds / seconds[:, :1], [0.25, 0.5, 0.75], axis=0)
    print(f"{'step, 16 pairs':32}{'ms':>8}{'ratio':>8}  quartiles   ({device}, {torch.get_num_threads()} threads, torch {torch.__version__})")
    for i, name in enumerate(work):
        print(f"{name:32}{1000 * np.median(seconds[:, i]):8.1f}{ratio[i]:8.2f}  {low[i]:.2f}-{high[i]:.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# Peers

def training(pairs, encoding, folder, size=16, steps=12):
    """-> {name: function of a round that trains a reward model of 4 layers, width 256, and returns pairs a second}"""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer
    pairs, rows, _ = data.encode_pairs(encoding, pairs, 512)
    model = init_weights(RewardModel(Shape(encoding.n_vocab, layers=4, heads=4, kv_heads=4, width=256, hidden=688, context=512)), torch.Generator().manual_seed(0))
    pretrained.save(folder, model, encoding)

    def ours(number):
        chosen = np.random.default_rng(number).permutation(len(rows))[:size * steps]
        part = [rows[i] for i in chosen]
        optimiser = optimiser_of(model.train(), "adamw", 1e-5, 0.1)
        begun = time.perf_counter()
        for index in data.batches([len(r) for r in part], size, number):
            loss, _ = pair_loss(model, [part[i] for i in index], torch.zeros(len(index)), torch.ones(len(index)))
            optimiser.zero_grad(set_to_none=True)
            (loss / len(index)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        return size * steps / (time.perf_counter() - begun)

    def theirs(number):
        chosen = np.random.default_rng(number).permutation(len(rows))[:size * steps]
        dataset = Dataset.from_list([{"prompt": pairs[i].prompt, "chosen": pairs[i].chosen, "rejected": pairs[i].rejected} for i in chosen])
        args = RewardConfig(output_dir=f"{folder}.trl", max_steps=steps, per_device_train_batch_size=size, max_length=512, learning_rate=1e-5, bf16=False, fp16=False,
                            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True)
        trainer = RewardTrainer(AutoModelForSequenceClassification.from_pretrained(folder), args=args, train_dataset=dataset, processing_class=AutoTokenizer.from_pretrained(folder))
        begun = time.perf_counter()
        trainer.train()
        return size * steps / (time.perf_counter() - begun)

    return {"nanoreward": ours, "TRL RewardTrainer": theirs}


def sampling(encoding, folder, rows=64, prompt=32, new=64):
    """-> {name: function of a round that samples from a policy of 4 layers, width 256, and returns tokens a second}"""
    from transformers import AutoModelForCausalLM
    model = init_weights(LanguageModel(Shape(encoding.n_vocab, layers=4, heads=4, kv_heads=4, width=256, hidden=688, context=512)), torch.Generator().manual_seed(0)).eval()
    pretrained.save(folder, model, encoding)
    peer = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = lambda number: torch.from_numpy(np.random.default_rng(number).integers(0, encoding.n_vocab - 1, (rows, prompt)))

    def ours(number):
        tokens, begun = prompts(number).tolist(), time.perf_counter()
        sample(model, tokens, new, data.end_id(encoding), torch.Generator().manual_seed(number), min_new=new)
        return rows * new / (time.perf_counter() - begun)

    def theirs(number):
        tokens, begun = prompts(number), time.perf_counter()
        with torch.no_grad():
            peer.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
        return rows * new / (time.perf_counter() - begun)

    return {"nanoreward": ours, "transformers generate": theirs}


def peers(path=None, rounds=5):
    import datasets
    import transformers
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    pairs = data.read_pairs(path) if path else [data.Pair(**row) for row in world.pairs(2000, 0, world.Noise())[0]]
    encoding = data.train_tokenizer((text for p in pairs for text in (p.prompt, p.chosen, p.rejected)), 4096)
    with tempfile.TemporaryDirectory() as folder:
        for unit, work in (("pairs/s", training(pairs, encoding, f"{folder}/reward")), ("tokens/s", sampling(encoding, f"{folder}/policy"))):
            speed = np.array([[run(number) for run in work.values()] for number in range(rounds + 1)])[1:]  # the first warms up
            low, ratio, high = np.quantile(speed[:, 0] / speed[:, 1], [0.25, 0.5, 0.75])
            print(", ".join(f"{name} {np.median(s):,.1f} {unit}" for name, s in zip(work, speed.T)) + f": {ratio:.1f} times ({low:.1f}-{high:.1f}), {torch.get_num_threads()} threads")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peers"]:
        peers(*sys.argv[2:3])
    elif len(sys.argv) > 1:
        print(__doc__)
    else:
        main()
