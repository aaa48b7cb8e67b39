"""Measuring an experiment over several seeds, and the means of its numbers.

These functions are not in __main__.py, which worker processes cannot import.
"""
import importlib
import os
import pkgutil

import numpy as np
import torch

import experiments
from config import assign
from experiments.registry import EXPERIMENTS
from formats.sources import short_name
from runtime import distributed, lock, signals, workers


def load_experiments():
    """Import every module of this folder, which registers its experiments.  -> EXPERIMENTS"""
    for module in pkgutil.iter_modules(experiments.__path__):
        if module.name != "__main__":
            importlib.import_module(f"experiments.{module.name}")
    return EXPERIMENTS


def data_folder(entry, config):
    """The folder of the runs: experiments of one base on the same data share it."""
    name = entry.base if config.data.train == ("world",) else short_name(config.data.train[0])
    return os.path.join(config.out_dir, name)


def measure_seed(name, config, slot, threads):
    """One seed, perhaps in a worker process.  -> its rows, or False if it was stopped"""
    entry = load_experiments()[name]
    torch.set_num_threads(threads)
    try:
        return entry.measure(config, slot)
    except signals.Stopped:
        return False
    finally:
        lock.release_all()  # two experiments that wait for each other's seeds would wait forever


def measure_seeds(entry, seeds, config, on_seed):
    """Measure every seed, in worker processes where that pays; raises Stopped.

    on_seed(seed, rows) is called as soon as a seed has ended
    """
    num_cores = config.threads or torch.get_num_threads()
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    num_workers = min(config.train.workers or (1 if on_gpu else num_cores), len(seeds))
    if distributed.world_size() > 1:
        num_workers = 1  # the ranks are what works side by side
    folder = data_folder(entry, config)
    jobs = []
    for i, seed in enumerate(seeds):
        seed_config = assign(config, "seed", seed)
        seed_config = assign(seed_config, "out_dir", f"{folder}/seed_{seed}")
        threads = max(1, num_cores // num_workers)
        slot = 0
        if num_workers > 1:
            slot = 1 + i % num_workers  # line of the progress bar
            seed_config = assign(seed_config, "train.workers", threads)  # of its share of the cores
        jobs.append((entry.name, seed_config, slot, threads))
    if num_workers > 1:
        workers.parallel_map(
            measure_seed, jobs, num_workers, lambda i, rows: on_seed(seeds[i], rows)
        )
        return
    if distributed.world_size() > 1:
        return deal_out(seeds, jobs, on_seed)
    for seed, job in zip(seeds, jobs):
        rows = measure_seed(*job)
        if rows is False:
            raise signals.Stopped
        on_seed(seed, rows)


def deal_out(seeds, jobs, on_seed):
    """Each rank of torchrun measures its own seeds alone; all get the rows of all."""
    n = distributed.world_size()
    for start in range(0, len(seeds), n):
        own = start + distributed.rank()
        rows = None
        with distributed.alone():
            if own < len(seeds):
                rows = measure_seed(*jobs[own])
        if rows is False:
            raise signals.Stopped
        for source, seed in enumerate(seeds[start:start + n]):
            on_seed(seed, distributed.agree(rows, source))


def summarize(runs):
    """Mean and standard error over seeds of every number; a column may be missing in some seeds.

    runs: [{row: {column: number or list}}] -> {row: {column: {"mean", "se"}}}, se None for one seed
    """
    summary = {}
    for row in runs[0]:
        columns = {}
        for run in runs:
            columns |= dict.fromkeys(run[row])
        for column in columns:
            values = [run[row][column] for run in runs if column in run[row]]
            columns[column] = mean_and_se(values[:1] if column.startswith("points") else values)
        summary[row] = columns
    return summary


def mean_and_se(values):
    """[number or list of numbers] -> {"mean", "se"}; points of a picture have no mean over seeds"""
    values = np.array(values, float)
    if len(values) == 1:
        return {"mean": values[0].tolist(), "se": None}
    se = values.std(0, ddof=1) / len(values) ** 0.5
    return {"mean": values.mean(0).tolist(), "se": se.tolist()}
