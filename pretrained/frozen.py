"""The frozen trunk: the lowest blocks of a pretrained model, shared by all models of a process.

    --model.init=DIR --model.train_layers=n    the n uppermost blocks are trained, with norm and
                                               head; 0: norm and head alone

The blocks below are the same in the SFT model and in every reward model, policy and critic.  Their
output, called inputs_embeds as in Hugging Face's code, enters the trained blocks.  It is computed
before training, or once a rollout, and travels in Row; for prompts and sampled tokens the trunk
runs inside the model.

A response attends to its prompt and to itself, so inputs_embeds belong to a prompt, or to a
response after its prompt, not to a row: those of a pair serve the swapped pair, and SFT on the
chosen response, as well.  Where all blocks are frozen, only the vector at each response's last
token is needed.

The store holds them for all runs; a folder that is no longer needed can be deleted:

    model.embeds_dir/KEY/NAME.safetensors
        states   (N, C)             inputs_embeds of all parts (prompts and responses), joined
        digests  (parts, 16) uint8  names of the parts, from their tokens
        stops    (parts,)           where each part ends in `states`

KEY depends on the frozen weights, the tokenizer's files, the precision and the kind of device;
everything else changes inputs_embeds by rounding alone.  A run in half precision stores bfloat16.
"""
import contextlib
import functools
import glob
import hashlib
import os
import shutil
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

import data
from config import ConfigError
from data import Row
from model import LanguageModel
from pretrained import hub, weights
from pretrained.weights import num_frozen
from runtime import files, signals
from runtime.run import ALL_THREADS

BATCH_SIZE = 16          # rows computed at once
FILE_NUMBERS = 2 ** 25   # numbers in a file of the store: at most these are lost at a power failure
LOCK_SECONDS = 1.0       # between two checks for Ctrl-C while another process computes
REMEDY = ("name another folder with --model.embeds_dir, or give --model.embeds_dir= to compute "
          "them anew at every step")


# --------------------------------------------------------------------------------------------------
# The trunk

@functools.cache
def load_trunk(folder, num_layers, context, device, dtype):
    """Embedding and num_layers lowest blocks of a pretrained model, one copy a process.

    -> Transformer without final norm.  Its Linear weights have the precision of the run, to which
    autocast would convert them at every step; trained blocks keep float32 master weights.
    """
    trunk = weights.load(folder, LanguageModel, device, context=context).model
    trunk.shape = replace(trunk.shape, layers=num_layers)
    for name in list(trunk.layers):
        if int(name) >= num_layers:
            del trunk.layers[name]
    trunk.norm = torch.nn.Identity()
    convert_linear(trunk.layers, dtype)
    return trunk.requires_grad_(False).eval()


def convert_linear(layers, dtype):
    for module in layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)


def trunk_of(run, num_layers=None):
    """Trunk of num_layers blocks, by default those the configuration freezes.  None for 0 blocks"""
    settings = run.cfg.model
    if num_layers is None:
        num_layers = num_frozen(settings)
    if num_layers == 0:
        return None
    folder = hub.directory(settings.init)
    return load_trunk(folder, num_layers, settings.context, run.device, run.dtype)


@functools.cache
def load_base(folder, num_layers, device, dtype):
    """Weights of a pretrained model above its num_layers lowest blocks, one copy a process.

    -> {name: tensor}, in the precisions of a trunk; the models of pretrained/lora.py share them
    """
    whole = weights.load(folder, LanguageModel, device)
    convert_linear(whole.model.layers, dtype)
    tensors = whole.state_dict()
    with torch.device("meta"):
        above = LanguageModel(replace(whole.shape, frozen=num_layers))
    return {name: tensors[name] for name in above.state_dict()}


def base_of(run, num_layers):
    return load_base(hub.directory(run.cfg.model.init), num_layers, run.device, run.dtype)


def load_language_model(run):
    """The language model of model.init; with train_layers only its uppermost blocks are trained,
    with lora_rank only adapters."""
    m = run.cfg.model
    if m.lora_rank:
        from pretrained import lora
        return lora.load_language_model(run)
    folder = hub.directory(m.init)
    model = weights.load(folder, LanguageModel, run.device, context=m.context, dropout=m.dropout)
    if m.train_layers < 0:
        return model
    whole = model.state_dict()
    trained = LanguageModel(replace(model.shape, frozen=num_frozen(m))).to(run.device)
    attach(trained, trunk_of(run))
    trained.load_state_dict({name: whole[name] for name in trained.state_dict()})
    return trained


def attach(model, trunk):
    """Let a model with shape.frozen blocks missing compute them by the trunk.  -> the same model

    The trunk stays outside parameters() and state_dict(): nothing trains, copies or saves it.
    """
    if trunk is None:
        return model
    model.trunk = (trunk,)  # torch does not register modules inside a tuple
    model.model.embed = functools.partial(run_trunk, trunk)
    if isinstance(model, LanguageModel) and model.lm_head is None:
        model.lm_head = functools.partial(F.linear, weight=trunk.embed_tokens.weight)  # tied
    return model


@torch.no_grad()
def run_trunk(trunk, tokens, branch=None, position=None, cache=None, out_pos=None):
    """Output of the frozen blocks: (B, T) -> (B, T, C), or (B, R, C) at out_pos.

    A KV cache holds their layers too.
    """
    return trunk(tokens, branch, position, out_pos, cache)


@torch.no_grad()
def embed_rows(run, rows, device=None):
    """Compute inputs_embeds of rows, in memory.  -> [Row]; the rows unchanged if nothing is frozen

    device: of the result, the run's own by default
    """
    trunk = trunk_of(run)
    if trunk is None:
        return rows
    last_only = run.cfg.model.train_layers == 0
    out = []
    for start in range(0, len(rows), BATCH_SIZE):
        bare = [Row(row.prompt, row.responses) for row in rows[start:start + BATCH_SIZE]]
        batch = data.collate(bare).to(run.device)
        out_pos = batch.last if last_only else None
        with run.autocast():
            embeds = trunk(batch.tokens, batch.branch, batch.position, out_pos)  # (B, T or k, C)
        for row, vectors in zip(bare, embeds):
            lengths = part_lengths(row, last_only)
            vectors = vectors[:sum(lengths)]
            vectors = vectors.to(device or run.device, copy=True)  # a copy frees the padding
            out.append(Row(row.prompt, row.responses, vectors.split(lengths)))
    return out


def part_lengths(row, last_only):
    """Number of vectors for the prompt and for each response"""
    if last_only:
        return [0] + [1] * len(row.responses)
    return [len(row.prompt)] + [len(response) for response in row.responses]


# --------------------------------------------------------------------------------------------------
# The store

def load_or_compute(run, name, rows):
    """Rows -> the same with inputs_embeds from the store, computed first where they are missing

    name: of the rows, for the progress bar and messages
    Raises Stopped if a stop was requested, between two files or while another process computes;
    ConfigError if the disk has no room; OSError if a file cannot be read or written.
    """
    settings = run.cfg.model
    if settings.train_layers < 0 or not settings.embeds_dir:
        return rows
    folder = store_folder(run)
    store = read_store(folder)
    if missing_rows(run, rows, store):
        with store_lock(run, folder):
            store = read_store(folder)  # another process may have filled it meanwhile
            missing = sorted(missing_rows(run, rows, store), key=len)
            if missing:
                add_to_store(run, name, folder, missing, store)
        store = read_store(folder)
    return [with_embeds(run, row, store) for row in rows]


def store_folder(run):
    settings = run.cfg.model
    key = {
        "init": hub.digest(settings.init),
        "frozen": num_frozen(settings),
        "of": settings.layers,
        "dtype": str(run.dtype),
        "device": run.device.type,
        "format": files.FORMAT,
    }
    return os.path.join(settings.embeds_dir, files.digest(key))


def row_digests(row):
    """Names of a row's parts: of the prompt, and of each response after this prompt -> [bytes]"""
    digests = [tokens_digest(row.prompt)]
    for response in row.responses:
        digests.append(tokens_digest(row.prompt, response))
    return digests


def tokens_digest(*parts):
    raw = [np.asarray(tokens, np.int32).tobytes() for tokens in parts]
    return hashlib.blake2b(b"|".join(raw), digest_size=16).digest()


def stored_digests(run, row):
    """Names of the parts that the store needs: without the prompt where no block is trained"""
    digests = row_digests(row)
    return digests[1:] if run.cfg.model.train_layers == 0 else digests


def missing_rows(run, rows, store):
    missing = []
    for row in rows:
        if any(digest not in store for digest in stored_digests(run, row)):
            missing.append(row)
    return missing


def with_embeds(run, row, store):
    """The row with its inputs_embeds from the store; none for the prompt if it has none there"""
    embeds = tuple(store[digest] for digest in stored_digests(run, row))
    if run.cfg.model.train_layers == 0:
        no_prompt = torch.zeros(0, run.cfg.model.width, dtype=embeds[0].dtype)
        embeds = (no_prompt, *embeds)
    return Row(row.prompt, row.responses, embeds)


def read_store(folder):
    """-> {digest: inputs_embeds (n, C), memory-mapped}.  Raises OSError for a damaged file."""
    store = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
        hub.check_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                states = file.get_tensor("states")
                digests = file.get_tensor("digests").numpy()
                stops = [0, *file.get_tensor("stops").tolist()]
            is_whole = len(digests) == len(stops) - 1 and stops[-1] == len(states)
            if not is_whole or states.dim() != 2 or stops != sorted(stops):
                raise OSError("its tensors do not fit each other")
        except (OSError, SafetensorError, TypeError) as error:
            raise OSError(
                f"{path}: not a readable file of embeddings ({error}); delete it and run the same "
                "command again"
            ) from None
        for digest, start, stop in zip(digests, stops, stops[1:]):
            store[digest.tobytes()] = states[start:stop]
    return store


@contextlib.contextmanager
def store_lock(run, folder):
    """Lock of a folder: of several processes one computes, with all threads, the others wait."""
    lock = FileLock(os.path.join(folder, "lock"))
    try:
        os.makedirs(folder, exist_ok=True)
        acquire(lock, run)
    except OSError as error:
        raise files.cannot_write(folder, error, REMEDY) from None
    num_threads = torch.get_num_threads()
    try:
        files.remove_leftovers(folder)
        if run.slot > 0:  # a worker process has its share only, and the others may wait for it
            torch.set_num_threads(run.cfg.threads or ALL_THREADS)
        yield
    finally:
        torch.set_num_threads(num_threads)
        lock.release()


def acquire(lock, run):
    """Wait for the lock.  Raises Stopped if a stop is requested meanwhile."""
    while not lock.is_locked:
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            signals.stop_if_asked()


def add_to_store(run, name, folder, rows, store):
    """Compute inputs_embeds of rows and write the parts that are not in the store, file by file."""
    check_disk(run, name, folder, rows)
    with signals.finishing_steps(), run.bar(sum(map(len, rows)), f"embeddings of {name}") as bar:
        while rows:
            if signals.should_stop():
                raise signals.Stopped
            parts, rows = compute_file(run, rows, store, bar)
            store |= dict.fromkeys(parts)  # their names are enough
            write_file(folder, parts)


def check_disk(run, name, folder, rows):
    """Raise ConfigError unless the inputs_embeds of rows fit on the disk."""
    embeds_dir = run.cfg.model.embeds_dir
    size = sum(count_numbers(run, row) for row in rows) * store_dtype(run).itemsize
    free = shutil.disk_usage(folder).free
    if size > 0.9 * free:
        raise ConfigError(
            f"model.embeds_dir = {embeds_dir!r}: the embeddings of {name} take {size / 1e9:.1f} "
            f"GB, and {free / 1e9:.1f} GB are free; free some space, name another folder, or give "
            "--model.embeds_dir= to compute them anew at every step"
        )


def count_numbers(run, row):
    last_only = run.cfg.model.train_layers == 0
    return run.cfg.model.width * sum(part_lengths(row, last_only))


def store_dtype(run):
    return torch.float32 if run.dtype == torch.float32 else torch.bfloat16


def compute_file(run, rows, store, bar):
    """Compute rows until a file is full.  -> {digest: inputs_embeds (n, C)}, remaining rows"""
    parts = {}
    room = FILE_NUMBERS
    while rows and (room > 0 or not parts):
        batch = rows[:BATCH_SIZE]
        rows = rows[BATCH_SIZE:]
        for row in embed_rows(run, batch):
            digests = stored_digests(run, row)
            embeds = row.inputs_embeds[-len(digests):]
            for digest, vectors in zip(digests, embeds):
                if digest not in store:
                    parts[digest] = vectors.to("cpu", store_dtype(run))
            bar.update(len(row))
        room -= sum(count_numbers(run, row) for row in batch)
    return parts, rows


def write_file(folder, parts):
    """parts: {digest: inputs_embeds (n, C)}, emptied to free memory before the file is written"""
    name = files.digest([digest.hex() for digest in parts])
    lengths = torch.tensor([len(vectors) for vectors in parts.values()])
    tensors = {
        "states": torch.cat(list(parts.values())),
        "digests": torch.tensor([list(digest) for digest in parts], dtype=torch.uint8),
        "stops": lengths.cumsum(0),
    }
    parts.clear()

    def write(file):
        file.write(to_safetensors(tensors))

    files.save(os.path.join(folder, f"{name}.safetensors"), write, REMEDY)
