"""What the frozen layers make of each text: computed once, and kept in a folder for all trainings that stand on them.

    --model.init=DIR --model.train_layers=n      the n uppermost blocks are trained, with what follows; 0: norm and head alone

The blocks below are the same in the SFT model, every reward model, policy and critic.  A response sees its prompt and itself, so
states belong to a prompt, or to a response with its prompt, and not to a row: those of a pair serve the swapped pair, and SFT on the chosen
answer alone, as well.  Where all blocks are frozen, only the state at each response's last token is wanted.

    model.states/KEY/NAME.safetensors     states (N, C); digests (parts, 16) of the texts they are of; stops (parts,), where each ends

KEY stands for the layers and the precision; nothing else changes states.
"""
import contextlib
import glob
import hashlib
import os
import shutil

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

import data
import files
import pretrained
from config import ConfigError
from data import Row
from files import Stopped

CHUNK, BATCH = 256, 16  # rows a file: what is lost when the power fails; rows computed at once


@torch.no_grad()
def compute(run, rows):
    """Rows -> the same with states, in memory on the run's device; rows as they are where no layer is frozen"""
    out, whole = [], run.config.model.train_layers > 0
    for start in range(0, len(rows) if run.below else 0, BATCH):
        part = [Row(*row[:2]) for row in rows[start:start + BATCH]]
        batch = data.collate(part).to(run.device)
        with run.autocast():
            x = run.below.blocks(*batch[:3], None if whole else batch.last)
        for row, states in zip(part, x):
            lengths = [len(row.prompt), *map(len, row.responses)] if whole else [0, *[1] * len(row.responses)]
            out.append(Row(*row[:2], states[:sum(lengths)].split(lengths)))
    return out if run.below else rows


def digests(row):
    """Names of the states of a row: of the prompt, and of each response after this prompt -> [bytes]"""
    name = lambda *tokens: hashlib.blake2b(b"|".join(np.asarray(t, np.int32).tobytes() for t in tokens), digest_size=16).digest()
    return [name(row.prompt), *(name(row.prompt, response) for response in row.responses)]


def folder_of(run):
    m = run.config.model
    key = {"init": pretrained.digest(m.init), "frozen": m.layers - m.train_layers, "of": m.layers, "dtype": str(run.dtype), "format": files.FORMAT}
    return os.path.join(m.states, files.digest(key))


def read(folder):
    """-> {digest: states (n, C), mapped from the file}"""
    known = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
        try:
            with safe_open(path, framework="pt") as file:
                states, names, stops = (file.get_tensor(name) for name in ("states", "digests", "stops"))
                stops = [0, *stops.tolist()]
                if len(names) != len(stops) - 1 or stops[-1] != len(states):
                    raise OSError("its parts do not match")
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path}: not a readable file of states ({error}); delete it and run the same command again") from None
        known |= {name.tobytes(): states[a:b] for name, a, b in zip(names.numpy(), stops, stops[1:])}
    return known


@contextlib.contextmanager
def alone(folder):
    """Of several processes that want the same states, one computes them and the others wait for it."""
    with open(os.path.join(folder, "lock"), "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)  # gone with the process, however that ends
        except ImportError:  # Windows: each computes its own; what is written twice does no harm
            pass
        yield


def kept(run, name, rows, should_stop=lambda: False):
    """Rows -> the same with states, read from the folder, or computed first where they are not there

    Raises Stopped if should_stop() between two files; ConfigError if the disk has no room.
    """
    m = run.config.model
    if m.train_layers < 0 or not m.states:
        return rows
    folder, first = folder_of(run), int(m.train_layers == 0)  # without the prompt's, where only last tokens count
    known = read(folder)
    is_new = lambda row: any(d not in known for d in digests(row)[first:])
    if any(map(is_new, rows)):
        os.makedirs(folder, exist_ok=True)
        with alone(folder):
            known = read(folder)
            add(run, name, sorted(filter(is_new, rows), key=len), folder, first, should_stop)
        known = read(folder)
    of = lambda row: tuple(known[d] for d in digests(row)[first:])
    return [Row(*row[:2], (torch.zeros(0, m.width, dtype=(s := of(row))[0].dtype),) * first + s) for row in rows]


def add(run, name, rows, folder, first, should_stop):
    """Compute and write the states of rows, a file for every CHUNK of them."""
    dtype = torch.float32 if run.dtype == torch.float32 else torch.bfloat16
    size = sum(2 if first else len(row) for row in rows) * run.config.model.width * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if size > 0.9 * free:
        raise ConfigError(f"model.states = {run.config.model.states!r}: the states of {name} take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; free some space, "
                          "name another folder, or give --model.states= to compute them anew at every step")
    with run.bar(sum(map(len, rows)), f"states of {name}") as bar:
        for start in range(0, len(rows), CHUNK):
            if should_stop():
                raise Stopped
            parts = {}
            for i in range(start, min(start + CHUNK, len(rows)), BATCH):
                for row in compute(run, rows[i:min(i + BATCH, start + CHUNK)]):
                    parts |= zip(digests(row)[first:], (s.to(dtype).cpu() for s in row.states[first:]))
                    bar.update(len(row))
            tensors = {"states": torch.cat(list(parts.values())), "digests": torch.tensor([list(d) for d in parts], dtype=torch.uint8),
                       "stops": torch.tensor([len(s) for s in parts.values()]).cumsum(0)}
            files.save(os.path.join(folder, f"{files.digest([d.hex() for d in parts])}.safetensors"), lambda file: file.write(to_safetensors(tensors)))
