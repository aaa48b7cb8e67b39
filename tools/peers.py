"""python -m tools.peers [FILE] [--only=WORK,...] [--reward-python=PATH] [--ppo-python=PATH]

Training, sampling and PPO beside TRL and transformers, on the CPU, in float32.  Works:

    reward         a reward model on pairs of FILE or of the built-in world; RewardTrainer
    sampling       64 rows, 32 + 64 tokens; transformers' generate
    ppo            an iteration of 64 * (32 + 32) tokens, all answers of full length; PPOTrainer
    rollout        the same with 16 prompts of 8 to 64 tokens and 4 answers to each; half of the
                   answers end within 16 of at most 48 tokens
    ppo-small, rollout-small   with 2 layers of width 128; the others have 4 of width 256

Each peer runs in an environment of its own; later versions of TRL have no PPOTrainer any more:

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -q -r requirements-bench.txt
    python3 -m venv .venv-ppo && .venv-ppo/bin/pip install -q -r requirements-bench-ppo.txt

--reward-python and --ppo-python name the pythons of other environments.  A work whose environment
is missing is left out.

Both sides take turns in one run, with the same weights, token ids and number of threads; the first
turn of each is left out.  Loading, tokenizing and the peer's imports are not timed.  The ratio is
the peer's seconds by nanoreward's, in the median over the rounds, and its quartiles.

The last column shows that both sides compute the same.  reward: the losses of the first and of the
last of 20 steps from the same weights, on the same batches in the same order, and their mean.
sampling: nats a token, under one model, of what each side has sampled.  PPO: the mean losses of 20
steps, 5 epochs, from the same weights, on the same answers in the same minibatches.

AdamW has a constant learning rate, betas 0.9 and 0.95 and nanoreward's weight decay on both sides.
RewardTrainer draws its batches at random and nanoreward from rows of similar length, as each does
by default.  PPO has raw rewards, whitened advantages, unclipped gradients and 2 epochs of 4
minibatches on both sides.  Two differences are left: nanoreward reads the reward of an answer that
was cut at an EOS that it appends, and TRL at the last token, so that for the losses every answer
ends with EOS; and TRL adds the reward of an answer that ends early one place behind its EOS, where
it also trains the critic, so that the losses of `rollout` are near each other and not equal.

Answers end at the same rate on both sides because the weights say so: one channel of the residual
stream is constant, and the output row of EOS reads that channel alone (set_eos_probability).
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

import numpy as np
import torch

import config
import ppo
from common import make_optimizer
from config import ConfigError
from data import batches, encode_pairs
from formats.pairs import read_pairs
from generate import Generation, Sampling, generate
from model import LanguageModel, RewardModel, Shape, init_weights
from pretrained import export
from runtime import inputs
from runtime.cli import run_cli
from tokenizer import train_tokenizer
from tools import gpu_speed, speed
from tools.gpu_speed import Bench, say
from train import pair_loss

CPU = torch.device("cpu")
SCRIPTS = Path(__file__).parent / "peer_scripts"
ROUNDS = 5
STEPS = 20            # of the comparison of losses
TIMED_STEPS = 8       # of a round of reward training
PPO_LR = 3e-6         # TRL's default
PARITY_LR = 1e-4      # large enough for the losses to move within STEPS
SAMPLING_TOKENS = (64, 32, 64)  # rows, tokens of a prompt, new tokens


class Environment(NamedTuple):
    option: str
    python: str           # where it is, unless the option says otherwise
    requirements: str

    def remedy(self):
        folder = self.python.split("/")[0]
        return (f"python3 -m venv {folder} && {folder}/bin/pip install -q -r {self.requirements}; "
                f"or name another with {self.option}=PATH")


ENVIRONMENTS = {
    "reward": Environment("--reward-python", ".venv-trl/bin/python", "requirements-bench.txt"),
    "ppo": Environment("--ppo-python", ".venv-ppo/bin/python", "requirements-bench-ppo.txt"),
}


class Loss(NamedTuple):
    """A number that both sides compute from the same weights and data."""
    name: str
    ours: float
    theirs: float

    def text(self):
        return f"{self.name} {self.ours:.4f} / {self.theirs:.4f}"


class Sides(NamedTuple):
    """Both sides of a work, ready to run."""
    settings: dict      # the peer's, when it starts
    ours: Callable      # function of a round's number -> seconds of nanoreward's work
    request: Callable   # function of a round's number -> arguments of the peer's method `time`
    compare: Callable   # function of a Peer -> [Loss]
    amount: float = 0   # of units of work in a round
    unit: str = ""      # "": the seconds of a round are printed

    def text(self, seconds):
        if not self.unit:
            return f"{seconds:.2f} s"
        return f"{self.amount / seconds:,.1f} {self.unit}"


class Work(NamedTuple):
    title: str
    environment: str    # key of ENVIRONMENTS
    script: str
    prepare: Callable   # function of (pairs, tokenizer, folder for exported models) -> Sides


# --------------------------------------------------------------------------------------------------
# The peer's process


class PeerError(Exception):
    """A peer has ended; one line."""


class Peer:
    """A peer's process: one line of JSON answers each line of JSON."""

    def __init__(self, process, errors):
        self.process = process
        self.errors = errors   # file of what it wrote on stderr
        self.name = "the peer"

    def call(self, **request):
        """-> the answer, a dictionary.  Raises PeerError if the peer has ended."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:  # the pipe is closed; the rest is what readline finds
            pass
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise PeerError(self.describe_end())
        return json.loads(line)

    def describe_end(self):
        """Exit code and last line on stderr, in one line"""
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        last = lines[-1] if lines else "it printed no error"
        return inputs.one_line(f"{self.name} has ended with exit code {code}: {last}")


def peer_environment():
    """Variables of the peer's process: it must import nothing of ours and fetch nothing."""
    variables = dict(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME"):
        variables.pop(name, None)
    quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONUTF8": "1",
             "TOKENIZERS_PARALLELISM": "false"}
    return variables | quiet


@contextlib.contextmanager
def start_peer(python, script):
    """A Peer, whose process is killed at the end, however that comes.

    It has a session of its own, so that Ctrl-C reaches this process alone.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, encoding="utf-8", env=peer_environment(), start_new_session=True)
        try:
            yield Peer(process, errors)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # of a line that could not be flushed
                process.stdin.close()


# --------------------------------------------------------------------------------------------------
# Reward model

def peer_model(kind, tokenizer, device):
    shape = Shape(
        tokenizer.vocab_size, layers=4, heads=4, kv_heads=4, width=256, hidden=688, context=512)
    return init_weights(kind(shape), torch.Generator().manual_seed(0)).to(device)


def pairs_per_second(model, rows, seed, device):
    optimizer = make_optimizer(model.train(), "adamw", 1e-5, 0.1)
    start = time.perf_counter()
    for index in batches([len(row) for row in rows], speed.BATCH, seed):
        margin = torch.zeros(len(index))
        loss, _ = pair_loss(model, [rows[i] for i in index], margin, torch.ones(len(index)))
        optimizer.zero_grad(set_to_none=True)
        (loss / len(index)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return len(rows) / (time.perf_counter() - start)


def prepare_reward(pairs, tokenizer, folder):
    _, rows, _ = encode_pairs(tokenizer, pairs, 512)
    batch = speed.BATCH
    if len(rows) < STEPS * batch:
        raise ConfigError(f"tools.peers: there are {len(rows)} usable pairs, and {STEPS} steps "
                          f"need {STEPS * batch}; name a larger file")
    lr = 1e-5
    model = peer_model(RewardModel, tokenizer, CPU)
    export.save(folder, model, tokenizer)

    def choose(number, num_steps):
        order = np.random.default_rng(number).permutation(len(rows))
        return [rows[i] for i in order[:num_steps * batch]]

    def ours(number):
        chosen = choose(number, TIMED_STEPS)
        return len(chosen) / pairs_per_second(model, chosen, number, CPU)

    def request(number):
        return whole_texts(choose(number, TIMED_STEPS)) | {"lr": lr}

    def compare(peer):
        chosen = choose(0, STEPS)
        fresh = peer_model(RewardModel, tokenizer, CPU)
        losses = losses_of_steps(fresh, chosen, batch)
        theirs = peer.call(method="losses", **whole_texts(chosen), lr=PARITY_LR)["losses"]
        return [
            Loss("first", losses[0], theirs[0]),
            Loss("last", losses[-1], theirs[-1]),
            Loss("mean", float(np.mean(losses)), float(np.mean(theirs))),
        ]

    settings = {"model": str(folder), "threads": torch.get_num_threads(), "batch": batch}
    return Sides(settings, ours, request, compare, TIMED_STEPS * batch, "pairs/s")


def whole_texts(rows):
    """-> token ids of prompt and response, of the chosen and of the rejected ones"""
    sides = []
    for side in (0, 1):
        sides.append([[*row.prompt.tolist(), *row.responses[side].tolist()] for row in rows])
    return {"chosen": sides[0], "rejected": sides[1]}


def losses_of_steps(model, rows, batch):
    """Train on the rows in their order.  -> the loss of each step"""
    optimizer = make_optimizer(model.train(), "adamw", PARITY_LR, 0.1)
    losses = []
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        loss, _ = pair_loss(model, part, torch.zeros(len(part)), torch.ones(len(part)))
        loss = loss / len(part)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


# --------------------------------------------------------------------------------------------------
# Sampling


def prepare_sampling(pairs, tokenizer, folder):
    num_rows, prompt_len, new_tokens = SAMPLING_TOKENS
    model = peer_model(LanguageModel, tokenizer, CPU).eval()
    export.save(folder, model, tokenizer)
    sampling = Sampling(new_tokens, tokenizer.eos_id, min_new_tokens=new_tokens)

    def prompts(number):
        rng = np.random.default_rng(number)
        return rng.integers(0, tokenizer.eos_id, (num_rows, prompt_len)).tolist()

    def sample(number):
        return generate(model, prompts(number), sampling, torch.Generator().manual_seed(number))

    def ours(number):
        start = time.perf_counter()
        sample(number)
        return time.perf_counter() - start

    def request(number):
        return {"prompts": prompts(number), "seed": number}

    def compare(peer):
        tokens = torch.tensor(peer.call(method="time", **request(0))["tokens"])
        nats = nats_a_token(model, prompts(0), sample(0).tokens)
        return [Loss("nats a token", nats, nats_a_token(model, prompts(0), tokens))]

    settings = {
        "policy": str(folder), "threads": torch.get_num_threads(), "new_tokens": new_tokens}
    return Sides(settings, ours, request, compare, num_rows * new_tokens, "tokens/s")


@torch.no_grad()
def nats_a_token(model, prompts, tokens):
    """Mean negative log-probability of sampled tokens, all of one length"""
    rows = torch.cat((torch.tensor(prompts), tokens), 1)
    logprob = model(rows).log_softmax(-1)[:, -tokens.shape[1] - 1:-1]
    return -float(logprob.gather(2, tokens[..., None]).mean())


# --------------------------------------------------------------------------------------------------
# PPO


class Rollouts(NamedTuple):
    """What an iteration of PPO samples."""
    prompts: int          # different ones
    shortest: int         # tokens of a prompt
    longest: int
    answers: int          # to each prompt
    max_new_tokens: int
    median: int           # tokens of an answer; 0: all have full length

    def draw(self, number, eos_id):
        """-> token ids of the prompts, each as often as it gets answers"""
        rng = np.random.default_rng(number)
        prompts = []
        for _ in range(self.prompts):
            length = rng.integers(self.shortest, self.longest + 1)
            prompts += self.answers * [rng.integers(0, eos_id, length).tolist()]
        return prompts


FULL = Rollouts(64, 32, 32, answers=1, max_new_tokens=32, median=0)
REAL = Rollouts(16, 8, 64, answers=4, max_new_tokens=48, median=16)


def prepare_ppo(layers, width, rollouts):
    """-> function that prepares the work: 2 epochs of 4 minibatches on these rollouts"""
    def prepare(pairs, tokenizer, folder):
        return PpoWork(tokenizer, folder, layers, width, rollouts).sides()

    return prepare


class PpoWork:
    def __init__(self, tokenizer, folder, layers, width, rollouts):
        self.tokenizer = tokenizer
        self.folder = folder
        self.rollouts = rollouts
        self.shape = Shape(
            tokenizer.vocab_size, layers=layers, heads=4, kv_heads=4, width=width,
            hidden={128: 344, 256: 688}[width])
        self.timed = self.make(num_ppo_epochs=2, lr=PPO_LR)
        _, models, _ = self.timed
        export.save(f"{folder}/policy", models.policy, tokenizer)
        export.save(f"{folder}/reward", models.critic, tokenizer)
        self.moments = ppo.Moments()

    def make(self, num_ppo_epochs, lr):
        """-> a run without files, Models and Learners; their weights are the same at every call"""
        prompts = self.rollouts.prompts * self.rollouts.answers
        settings = config.Ppo(
            rollout_batch_size=prompts, max_new_tokens=self.rollouts.max_new_tokens,
            num_ppo_epochs=num_ppo_epochs, lr=lr, critic_lr=lr, normalize=False, whiten=True)
        bench = Bench(CPU, tiny=False, explore=False, rates={}, failures=[])
        run = gpu_speed.TimedRun(bench, dtype="float32", ppo_settings=settings)
        run.cfg = replace(run.cfg, train=replace(run.cfg.train, grad_clip=1e6))
        models, learners = gpu_speed.make_ppo(run, self.shape)
        run.tokenizer = self.tokenizer
        median = self.rollouts.median
        p = 1 - 0.5 ** (1 / median) if median else 0.0
        set_eos_probability(models.policy, self.tokenizer.eos_id, p)
        models.reference.load_state_dict(models.policy.state_dict())
        return run, models, learners

    def prompts(self, number):
        return self.rollouts.draw(number, self.tokenizer.eos_id)

    def ours(self, number):
        run, models, learners = self.timed
        parts, _ = gpu_speed.one_iteration(
            run, models, learners, self.prompts(number), self.moments, number)
        return sum(parts.values())

    def request(self, number):
        return {"prompts": self.prompts(number), "epochs": 2, "lr": PPO_LR}

    def compare(self, peer):
        """One iteration of STEPS steps on the same answers and minibatches"""
        epochs = STEPS // 4
        run, models, learners = self.make(epochs, PARITY_LR)
        prompts = self.prompts(0)
        tokens = self.sample_answers(models.policy, prompts)
        rng = np.random.default_rng(0)
        orders = [rng.permutation(len(prompts)).tolist() for _ in range(epochs)]
        next_order = iter(orders)

        def given_answers(*arguments, **options):
            ended = torch.ones(len(tokens), dtype=torch.bool)
            return Generation(tokens, torch.zeros(tokens.shape), ended)

        def given_order(*arguments, **options):
            return torch.tensor(next(next_order))

        with mock.patch.object(gpu_speed, "generate", given_answers), \
                mock.patch.object(ppo, "shuffle_prompts", given_order):
            _, ours = gpu_speed.one_iteration(run, models, learners, prompts, ppo.Moments(), 0)
        padded = tokens.masked_fill(tokens < 0, self.tokenizer.eos_id)
        theirs = peer.call(
            method="losses", prompts=prompts, responses=padded.tolist(), orders=orders,
            epochs=epochs, lr=PARITY_LR)
        return [
            Loss("policy", ours["policy_loss"], theirs["policy"]),
            Loss("value", ours["value_loss"], theirs["value"]),
        ]

    def sample_answers(self, policy, prompts):
        """-> token ids, -1 after the end; the last token of an answer that was cut becomes EOS"""
        eos_id = self.tokenizer.eos_id
        sampling = Sampling(self.rollouts.max_new_tokens, eos_id)
        answers = generate(policy, prompts, sampling, torch.Generator().manual_seed(0))
        tokens = answers.tokens.clone()
        last = (tokens >= 0).sum(1) - 1
        tokens[torch.arange(len(tokens)), last] = eos_id
        return tokens

    def sides(self):
        settings = {
            "policy": f"{self.folder}/policy", "reward": f"{self.folder}/reward",
            "threads": torch.get_num_threads(), "minibatches": 4,
            "answers": len(self.prompts(0)), "max_new_tokens": self.rollouts.max_new_tokens}
        return Sides(settings, self.ours, self.request, self.compare)


@torch.no_grad()
def set_eos_probability(policy, eos_id, p):
    """Give EOS the probability p on average over random tokens, whatever they are; 0: below 1e-9.

    Channel 0 of the residual stream becomes constant: it is the same in every embedding, and no
    block writes to it.  The output row of EOS, which is also its embedding, reads this channel
    alone.  After the final norm the channel varies a little with the norm of the others.
    """
    embedding = policy.model.embed_tokens.weight
    embedding[:, 0] = 4 * embedding.std()
    for block in policy.model.layers.values():
        for matrix in output_matrices(block):
            matrix[0] = 0.0
    embedding[eos_id] = 0.0
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(eos_id, (16, 32), generator=generator)
    h = policy.model(tokens).flatten(0, 1)
    channel = h[:, 0]
    logits = policy.lm_head(h)
    logits[:, eos_id] = -torch.inf
    others = logits.logsumexp(-1)
    low, high = (torch.tensor(-1e3), torch.tensor(1e3))
    for _ in range(60):
        middle = (low + high) / 2
        if (middle * channel - others).sigmoid().mean() < max(p, 1e-9):
            low = middle
        else:
            high = middle
    embedding[eos_id, 0] = low


def output_matrices(block):
    """The two matrices of a block that write to the residual stream"""
    names = ("o_proj.weight", "down_proj.weight")
    return [weight for name, weight in block.named_parameters() if name.endswith(names)]


# --------------------------------------------------------------------------------------------------
# The table


def ppo_work(layers, width, rollouts, text):
    title = f"PPO iteration, {layers} layers of width {width}, {text}"
    return Work(title, "ppo", "trl_ppo.py", prepare_ppo(layers, width, rollouts))


FULL_TEXT = "64 * (32 + 32) tokens"
REAL_TEXT = "16 prompts of 8 to 64 tokens, 4 answers of 16 of 48 in the median"
WORKS = {
    "reward": Work(
        "reward model, 4 layers of width 256, 16 pairs a step", "reward", "trl_reward.py",
        prepare_reward),
    "sampling": Work(
        "sampling, 4 layers of width 256, 64 rows, 32 + 64 tokens", "reward",
        "transformers_generate.py", prepare_sampling),
    "ppo-small": ppo_work(2, 128, FULL, FULL_TEXT),
    "rollout-small": ppo_work(2, 128, REAL, REAL_TEXT),
    "ppo": ppo_work(4, 256, FULL, FULL_TEXT),
    "rollout": ppo_work(4, 256, REAL, REAL_TEXT),
}


def measure(path=None, names=tuple(WORKS), pythons=None, rounds=ROUNDS):
    """Print the table, a row for each work that can be measured.

    path: a file of pairs; None: those of the built-in world
    pythons: {key of ENVIRONMENTS: path}, where it is not the default
    Raises ConfigError or DataError without FILE or any environment, and ConfigError after the table
    if a peer has ended in between.
    """
    pythons = find_pythons(names, pythons or {})
    pairs = read_pairs(path) if path else speed.world_pairs(2000)
    tokenizer = train_tokenizer(speed.texts_of(pairs), 4096)
    say(f"cpu, float32, torch {torch.__version__}; medians of {rounds} rounds; "
        "losses: nanoreward / peer")
    say("| work | nanoreward | peer | ratio | quartiles | threads | losses |")
    say("| --- | --- | --- | --- | --- | --- | --- |")
    failed = []
    for name in names:
        work = WORKS[name]
        if work.environment not in pythons:
            continue
        try:
            say(measure_work(work, pythons[work.environment], pairs, tokenizer, rounds))
        except PeerError as error:
            failed.append(name)
            say(f"{name} FAILED: {error}")
    if failed:
        raise ConfigError(f"tools.peers: not measured: {', '.join(failed)}; the lines above say "
                          "why")


def find_pythons(names, given):
    """-> {key of ENVIRONMENTS: path}; one line for each environment that is missing"""
    pythons = {}
    missing = []
    for key, environment in ENVIRONMENTS.items():
        works = [name for name in names if WORKS[name].environment == key]
        python = given.get(key, environment.python)
        if not works:
            continue
        if os.path.isfile(python):
            pythons[key] = os.path.abspath(python)
            continue
        line = f"there is no {python}, for {', '.join(works)}: {environment.remedy()}"
        missing.append(inputs.one_line(line))
        if key in given:
            raise ConfigError(f"{environment.option}: {missing[-1]}")
    if not pythons:
        raise ConfigError(f"tools.peers: {'; '.join(missing)}")
    for line in missing:
        say(f"left out: {line}")
    return pythons


def measure_work(work, python, pairs, tokenizer, rounds):
    """-> a row of the table"""
    with tempfile.TemporaryDirectory() as folder, \
            start_peer(python, SCRIPTS / work.script) as peer:
        sides = work.prepare(pairs, tokenizer, folder)
        threads = sides.settings["threads"]
        facts = peer.call(**sides.settings)
        peer.name = facts["name"]
        if facts["threads"] != threads:
            raise PeerError(f"{peer.name} runs {facts['threads']} threads, not {threads}")
        losses = ", ".join(loss.text() for loss in sides.compare(peer))
        seconds = take_turns(sides, peer, rounds)
    ours, theirs = np.median(seconds, axis=0)
    low, ratio, high = np.quantile(seconds[:, 1] / seconds[:, 0], [0.25, 0.5, 0.75])
    return (f"| {work.title} | {sides.text(ours)} | {peer.name} {sides.text(theirs)} "
            f"| {ratio:.2f} | {low:.2f}-{high:.2f} | {threads} | {losses} |")


def take_turns(sides, peer, rounds):
    """Ours, theirs, ours, theirs ...; the first of each is left out.  -> seconds (rounds, 2)"""
    seconds = []
    for number in range(rounds + 1):
        ours = sides.ours(number)
        theirs = peer.call(method="time", **sides.request(number))["seconds"]
        seconds.append((ours, theirs))
    return np.array(seconds[1:])


def parse_args(words):
    """-> the arguments of measure; raises ConfigError"""
    path = None
    names = tuple(WORKS)
    pythons = {}
    options = {environment.option: key for key, environment in ENVIRONMENTS.items()}
    for word in words:
        key, _, value = word.partition("=")
        if key == "--only":
            names = tuple(value.split(","))
            for name in names:
                if name not in WORKS:
                    raise ConfigError(f"{inputs.value_text(word)}: must be one or more of "
                                      f"{', '.join(WORKS)}")
        elif key in options and value:
            pythons[options[key]] = value
        elif word.startswith("-"):
            raise ConfigError(f"{inputs.value_text(word)}: must be --only=WORK,..., "
                              f"{' or '.join(f'{option}=PATH' for option in options)}")
        elif path is not None:
            raise ConfigError(f"{inputs.value_text(word)}: there is one FILE already, "
                              f"{inputs.value_text(path)}")
        else:
            path = word
    return path, names, pythons


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0

    def work():
        measure(*parse_args(argv))

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
