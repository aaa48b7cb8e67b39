"""How fast everything is, beside its own matrix products, beside other libraries, and on a GPU.

    python -m tools.bench [--layers=4] [--width=256] [--rounds=7]
    python -m tools.bench growth [--out=growth.png]
    python -m tools.bench peers [FILE] [--only=WORK,...]
    python -m tools.bench gpu [--explore] [--only=SECTION,...]

The first prints a table for one CPU: training steps, sampling and PPO, each beside the same matrix
products alone (tools/speed.py).  `growth` prints and draws how the time grows with length, width,
members and pairs (tools/growth.py).  `peers` measures beside TRL and transformers, in environments
that tools/peers.py names.

`gpu` checks and times the code on one CUDA GPU in less than eight minutes and prints the result as
it goes.  Sections, in order; one that fails or runs out of its time prints one line, and the next
one begins:

    machine      rates of matrix products and of memory, which the other sections are measured by
    correctness  losses, gradients, sampling, PPO's first step, MetaRM: CUDA beside the CPU
    reward       training a reward model in the shapes of SmolLM2-135M and Llama-3.2-1B
    sampling     tokens a second with 1 to 256 rows, beside what memory allows
    ppo          an iteration: sampling, scoring, update
    shapes       the first step of a new batch length, under each attention kernel
    stages       train.py from SFT to export on a reduced configs/tiny.toml; frozen layers, LoRA
    memory       the error message where the memory is full

--explore adds kernels by time, the cost of the attention mask and other batch sizes to `reward`,
and attention alone under each kernel.  Weights and tokens are random where only time counts.
--device=cpu --tiny runs every section on a CPU at a size that means nothing, as a test.
"""
if __name__ == "__main__":  # a signal during the imports, which take seconds, is one line
    from runtime import signals
    signals.exit_at_once()

import contextlib
import signal
import sys
import time
from typing import Callable, NamedTuple

import torch

from config import ConfigError
from runtime import inputs
from runtime.cli import run_cli
from runtime.run import choose_kernels
from tools import gpu_checks, gpu_speed, growth, peers, speed
from tools.gpu_speed import Bench, describe_error, say


class Section(NamedTuple):
    work: Callable   # function of a Bench
    seconds: float   # after which it is cut off


SECTIONS = {
    "machine": Section(gpu_speed.machine, 30),
    "correctness": Section(gpu_checks.correctness, 90),
    "reward": Section(gpu_speed.reward, 220),
    "sampling": Section(gpu_speed.sampling, 50),
    "ppo": Section(gpu_speed.ppo_iteration, 45),
    "shapes": Section(gpu_checks.shapes, 30),
    "stages": Section(gpu_checks.stages, 80),
    "memory": Section(gpu_checks.memory, 15),
}
EXPLORING = 400  # seconds of `reward` with --explore
IN_ALL = 460     # seconds that all sections may take together


class OutOfTime(BaseException):
    """A section has used up its time.  No Exception: no `except Exception` must swallow it."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raise OutOfTime after so many seconds, and again every ten, should it be swallowed."""
    if not hasattr(signal, "setitimer"):  # Windows: not run by CI
        yield
        return

    def stop(number, frame):
        place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        raise OutOfTime(f"cut off after {seconds:.0f} s at {place}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(name, bench, deadline):
    """Run a section and print its time.  -> whether it came to its end"""
    say(f"\n== {name}")
    section = SECTIONS[name]
    start = time.perf_counter()
    limit = EXPLORING if name == "reward" and bench.explore else section.seconds
    limit = min(limit, deadline - start)
    if limit <= 0:
        say(f"{name} FAILED: no time is left; --only={name} runs it alone")
        return False
    is_whole = True
    try:
        with time_limit(limit):
            section.work(bench)
            gpu_speed.synchronize(bench.device)
    except OutOfTime as error:
        is_whole = False
        say(f"{name} FAILED: {error}")
    except Exception as error:
        is_whole = False
        say(f"{name} FAILED: {describe_error(error)}")
    gpu_speed.attempt(bench, f"what follows {name}", clean_up, bench.device)
    say(f"{name}: {time.perf_counter() - start:.0f} s")
    return is_whole


def clean_up(device):
    """Free what a section has left, and restore what open_run sets and the next one expects."""
    choose_kernels()
    torch.compiler.reset()
    gpu_speed.free_memory(device)


def parse_args(words):
    """-> function that measures, its arguments; raises ConfigError"""
    if words and words[0] == "gpu":
        return measure_gpu, parse_gpu_args(words[1:])
    if words and words[0] == "growth":
        return growth.compare_growth, parse_growth_args(words[1:])
    if words and words[0] == "peers":
        return peers.measure, peers.parse_args(words[1:])
    return print_table, parse_table_args(words)


def parse_growth_args(words):
    """-> path of the picture"""
    path = "growth.png"
    for word in words:
        if not word.startswith("--out=") or not word.endswith(".png"):
            raise ConfigError(f"{inputs.value_text(word)}: must be --out=FILE.png")
        path = word.removeprefix("--out=")
    return [path]


def parse_table_args(words):
    """-> layers, width, rounds"""
    options = {"layers": 4, "width": 256, "rounds": 7}
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in options or not value.isdecimal():
            raise ConfigError(f"{inputs.value_text(word)}: must be gpu, growth, peers, "
                              "--layers=N, --width=N or --rounds=N")
        options[name] = int(value)
    if min(options.values()) < 1 or options["width"] % 8:
        raise ConfigError("tools.bench: layers and rounds must be at least 1, the width a multiple "
                          "of 8 (4 heads of even width)")
    return options.values()


def print_table(layers, width, rounds):
    data = speed.make_data(torch.device("cpu"), layers=layers, width=width)
    speed.compare_works(data, rounds)


def parse_gpu_args(words):
    """-> names of sections, options of Bench"""
    names = list(SECTIONS)
    options = {"explore": False, "tiny": False, "device": "cuda"}
    for word in words:
        key, _, value = word.partition("=")
        if key == "--only":
            names = value.split(",")
            for name in names:
                if name not in SECTIONS:
                    raise ConfigError(f"{word}: must be one or more of {', '.join(SECTIONS)}")
        elif word in ("--device=cpu", "--device=cuda"):
            options["device"] = value
        elif word in ("--explore", "--tiny"):
            options[word[2:]] = True
        else:
            raise ConfigError(f"{inputs.value_text(word)}: must be --explore, --only=SECTION,..., "
                              "--device=cpu or --tiny")
    return names, options


def measure_gpu(names, options):
    """Run the sections and print which of them failed.  Raises ConfigError without a GPU."""
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise ConfigError("tools.bench gpu: this torch sees no CUDA device; nothing was measured "
                          "(--device=cpu --tiny is a test of the bench alone)")
    bench = Bench(torch.device(options["device"]), options["tiny"], options["explore"], {}, [])
    choose_kernels()
    start = time.perf_counter()
    failed = [name for name in names if not run_section(name, bench, start + IN_ALL)]
    say(f"\n{time.perf_counter() - start:.0f} s in all")
    say(f"sections that failed: {', '.join(failed) or 'none'}")
    say(f"checks that are NOT ok: {'; '.join(bench.failures) or 'none'}")


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0

    def work():
        measure, arguments = parse_args(argv)
        measure(*arguments)

    return run_cli(work, trains=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
