"""The frame of every command: arguments, signals, one-line errors instead of tracebacks."""
import os
import signal
import sys
from collections.abc import Callable

import config as configuration
from config import ConfigError
from data import DataError
from runtime import distributed, heartbeat, inputs, lock, signals, stages

IN_TRAINING = "raise --train.accumulate, or lower the batch size or --model.context"
IN_READING = "close other programs, or split the file into smaller ones"
BROKEN_PIPE = 13  # number of SIGPIPE, which Windows lacks


def run_cli(work: Callable, trains: bool = True) -> int:
    """Call work() -> exit code

    0: done.  2: an error of the user's (settings, data, files, memory), printed in one line.
    130, 143, 129: stopped by Ctrl-C, SIGTERM or SIGHUP.  141: training whose output nobody reads,
    as behind `| head`, stops there.
    trains: False for a command that has nothing to resume
    """
    inputs.escape_output()
    code = 0
    with signals.handled():
        try:
            distributed.join()
            work()
            sys.stdout.flush()
            distributed.leave()
        except signals.Stopped:
            signals.has_ended = True
            dead = heartbeat.dead_ranks() if signals.stop_signal == signal.SIGTERM else []
            if dead:  # torchrun has asked the others to stop
                say_once(death_text(dead))
                code = 2
            else:
                say_once("stopped; the same command resumes from here" if trains else "stopped")
                code = 128 + signal.SIGINT
        except KeyboardInterrupt:
            say_once("stopped at once; the same command resumes from the last checkpoint")
            code = 128 + signal.SIGINT
        except BrokenPipeError:  # the reader of stdout has closed it, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if trains:
                signals.say("stopped: the reader of the output has closed it; the same command "
                            "resumes from here")
                code = 128 + BROKEN_PIPE
        except (ConfigError, DataError, OSError) as error:
            say_once(inputs.error_text(error))
            code = 2
        except inputs.MEMORY_ERRORS as error:
            if distributed.is_lost(error):
                signals.has_ended = True
                say_once(lost_text(error))
            elif inputs.is_out_of_memory(error):
                remedy = IN_TRAINING if trains else IN_READING
                say_once(f"error: the memory is full; {remedy}")
            else:
                raise
            code = 2
        finally:
            signals.has_ended = True  # a signal now must not cut what is left to do
            lock.release_all()
        if signals.stop_signal and code != 2:
            code = 128 + signals.stop_signal
    return code


def say_once(text):
    """Print the line that ends a command; where several processes end, the first prints its own"""
    text = heartbeat.failure_text(text)
    if text:
        signals.say(text)


def lost_text(error):
    """Why a rank ends that has lost the connection to another"""
    dead = heartbeat.dead_ranks()
    if dead:
        return death_text(dead)
    if signals.should_stop():
        return "stopped; the same command resumes from the last checkpoint"
    reason = str(error).strip().partition("\n")[0]
    return (f"error: the ranks have lost each other ({reason}); the same command resumes from the "
            "last checkpoint")


def death_text(dead):
    return (f"error: another rank has died (rank {', '.join(map(str, dead))}); torchrun's report "
            "says how; the same command resumes from the last checkpoint")


def parse_args(argv):
    """Arguments of train.py and of experiments -> Config, stage or None"""
    path = None
    stage = None
    overrides = []
    for word in argv:
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and not equals:
            raise ConfigError(f"{inputs.value_text(word)}: has no value; write {word[:40]}=VALUE, "
                              "in one word; --help lists the settings")
        if not word.startswith("--"):
            raise ConfigError(
                f"{inputs.value_text(word)}: every argument has the form --section.key=value; "
                f"--help lists them"
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
    return configuration.load(path, overrides, print), stage
