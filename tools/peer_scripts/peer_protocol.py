"""What the peer scripts have in common: one line of JSON answers each line of JSON on stdin.

The first line holds the settings; every other one names a method of the peer and its arguments.
Whatever the peer's libraries print on stdout goes nowhere.  Warnings and errors go to stderr.
"""
import json
import os
import sys


def serve(make_peer):
    """Answer requests until stdin ends.

    make_peer: function of the settings -> an object, whose method `versions` answers them
    """
    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    peer = None
    for line in sys.stdin:
        request = json.loads(line)
        if peer is None:
            peer = make_peer(**request)
            answer = peer.versions()
        else:
            method = request.pop("method")
            answer = getattr(peer, method)(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def silence():
    """No progress bars and no advice of transformers and datasets"""
    import datasets
    import transformers
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def training_arguments(folder, lr):
    """Arguments that both trainers of TRL have, as nanoreward trains: float32, AdamW, a constant
    learning rate; nothing is saved or reported."""
    return {
        "output_dir": folder,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
