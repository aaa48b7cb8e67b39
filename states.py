"""What the frozen layers make of each text: computed once, and kept in a folder for all trainings that stand on them.

    --model.init=DIR --model.train_layers=n      the n uppermost blocks are trained, with what follows; 0: norm and head alone

The blocks below are the same in the SFT model, every reward model, policy and critic.  A response sees its prompt and itself, so
states belong to a prompt, or to a response with its prompt, and not to a row: those of a pair serve the swapped pair, and SFT on the chosen
answer alone, as well.  Where all blocks are frozen, only the state at each response's last token is wanted.

    model.states/KEY/NAME.safetensors     states (N, C); digests (parts, 16) of the texts they are of; stops (parts,), where each ends

KEY stands for the layers, the precision and the kind of device; all else changes states by rounding alone.  In a run of half precision they are
kept as bfloat16.  A folder that is no longer wanted can be deleted.
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

CHUNK, BATCH = 2 ** 25, 16  # numbers a file (what is lost when the power fails), rows computed at once
SETTING = "--model.states, or give --model.states= to compute them anew at every step"
ALL_THREADS = torch.get_num_threads()  # before a process among several is given its share


@torch.no_grad()
def compute(run, rows, device=None):
    """Rows -> the same with states, in memory of the device, the run's own unless given; rows as they are where no layer is frozen"""
    out, whole = [], run.config.model.train_layers > 0
    for start in range(0, len(rows) if run.below else 0, BATCH):
        part = [Row(*row[:2]) for row in rows[start:start + BATCH]]
        batch = data.collate(part).to(run.device)
        with run.autocast():
            x = run.below.blocks(*batch[:3], None if whole else batch.last)
        for row, states in zip(part, x):
            lengths = [len(row.prompt), *map(len, row.responses)] if whole else [0, *[1] * len(row.responses)]
            out.append(Row(*row[:2], states[:sum(lengths)].to(device or run.device, copy=True).split(lengths)))  # a copy lets the padding go
    return out if run.below else rows


def digests(row):
    """Names of the states of a row: of the prompt, and of each response after this prompt -> [bytes]"""
    name = lambda *tokens: hashlib.blake2b(b"|".join(np.asarray(t, np.int32).tobytes() for t in tokens), digest_size=16).digest()
    return [name(row.prompt), *(name(row.prompt, response) for response in row.responses)]


def folder_of(run):
    m = run.config.model
    key = {"init": pretrained.digest(m.init), "frozen": m.layers - m.train_layers, "of": m.layers, "dtype": str(run.dtype), "device": run.device.type, "format": files.FORMAT}
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
def alone(folder, threads):
    """Of several processes that want the same states, one computes them, with all cores, and the others wait for it."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, "lock"), "w")
    except OSError as error:
        raise files.cannot_write(folder, error, SETTING) from None
    before = torch.get_num_threads()
    with lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)  # gone with the process, however that ends
        except ImportError:  # Windows: each computes its own; what is written twice does no harm
            pass
        for name in os.listdir(folder):
            if name.endswith(".part"):  # of a process that was killed while it saved
                os.remove(os.path.join(folder, name))
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


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
        with alone(folder, run.config.threads or ALL_THREADS):
            known = read(folder)
            add(run, name, sorted(filter(is_new, rows), key=len), known, first, should_stop)
        known = read(folder)
    of = lambda row: tuple(known[d] for d in digests(row)[first:])
    return [Row(*row[:2], (torch.zeros(0, m.width, dtype=(s := of(row))[0].dtype),) * first + s) for row in rows]


def add(run, name, rows, known, first, should_stop):
    """Compute the states of rows and write those that are not known."""
    m, folder, dtype = run.config.model, folder_of(run), torch.float32 if run.dtype == torch.float32 else torch.bfloat16
    numbers = lambda row: m.width * (len(row.responses) if first else len(row))
    size, free = sum(map(numbers, rows)) * dtype.itemsize, shutil.disk_usage(folder).free
    if size > 0.9 * free:
        raise ConfigError(f"model.states = {m.states!r}: the states of {name} take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; free some space, "
                          "name another folder, or give --model.states= to compute them anew at every step")
    with run.bar(sum(map(len, rows)), f"states of {name}") as bar:
        while rows:
            if should_stop():
                raise Stopped
            parts, room = {}, CHUNK
            while rows and (room > 0 or not parts):
                part, rows = rows[:BATCH], rows[BATCH:]
                for row in compute(run, part):
                    parts |= {d: s.to("cpu", dtype) for d, s in zip(digests(row)[first:], row.states[first:]) if d not in known}
                    bar.update(len(row))
                room -= sum(map(numbers, part))
            tensors = {"states": torch.cat(list(parts.values())), "digests": torch.tensor([list(d) for d in parts], dtype=torch.uint8),
                       "stops": torch.tensor([len(s) for s in parts.values()]).cumsum(0)}
            path = os.path.join(folder, f"{files.digest([d.hex() for d in parts])}.safetensors")
            known |= dict.fromkeys(parts)
            parts.clear()
            files.save(path, lambda file: file.write(to_safetensors(tensors)), SETTING)
