"""The frame of every command: arguments, signals, one-line errors instead of tracebacks."""
import signal
import sys

import torch

import config as configuration
from config import ConfigError
from data import DataError
from runtime import stages, workers

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_cli(work):
    """Call work() -> exit code

    0: done.  2: an error of the user's (settings, data, files, memory), printed in one line.
    130, 143: stopped by Ctrl-C or SIGTERM, with the state saved; a second signal stops at once.
    """
    workers.stop_signal = 0
    before = [signal.signal(number, workers.request_stop) for number in SIGNALS]
    try:
        work()
    except (workers.Stopped, KeyboardInterrupt):
        print("stopped; the same command resumes from here", file=sys.stderr)
        return 128 + (workers.stop_signal or signal.SIGINT)
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:  # CUDA only: not run by CI
        print("error: the GPU's memory is full; raise --train.accumulate or lower the batch size",
              file=sys.stderr)
        return 2
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler or signal.SIG_DFL)
    return 0


def parse_args(argv):
    """Arguments of train.py and of experiments -> Config, stage or None"""
    path = None
    stage = None
    overrides = []
    for word in argv:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise ConfigError(
                f"{word!r}: every argument has the form --section.key=value; --help lists them"
            )
        if key == "config":
            path = value
        elif key == "stage":
            if value not in (*stages.STAGES, "export"):
                known = ", ".join(stages.STAGES)
                raise ConfigError(f"--stage={value}: must be one of {known}, export")
            stage = value
        else:
            overrides.append((key, value))
    return configuration.load(path, overrides), stage
