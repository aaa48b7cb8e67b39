"""A run: one configuration, its data, its output folder, and the bookkeeping of its stages.

The core calls these methods; a reader who wants to learn the method may skip this file.
"""
import contextlib
import copy
import functools
import math
import os
import sys
import time
from dataclasses import asdict
from typing import NamedTuple

import torch
from tqdm import tqdm

import config
from common import encode_set, pick_device, pick_dtype
from config import Config, ConfigError
from data import DataError, load_ood, load_pairs
from formats import sources
from runtime import distributed, figures, files, signals, stages, trackers, workers
from runtime.audit import audit_text
from runtime.signals import Stopped
from tokenizer import Tokenizer

ALL_THREADS = torch.get_num_threads()  # before a worker process is given its share
SAVING_SHARE = 0.02  # of the time may be spent on checkpoints


class Known(NamedTuple):
    """What is known of a piece of work in this run."""
    depends: dict      # what it depends on now
    reason: str        # why it has to be done; "" if it is up to date
    fingerprint: str   # identifies its result for the work that reads it
    inputs: tuple = ()  # names of the work it reads


def choose_kernels():
    """Precision of float32 products and kernels of attention, for the whole process."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, 0.3 s, for every new length


def open_run(cfg: Config, slot: int = 0) -> "Run":
    """slot: line of the terminal for progress bars; 0 for the main process.  -> Run"""
    device = pick_device(cfg)
    distributed.check_device(device)
    dtype = pick_dtype(cfg, device)
    choose_kernels()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    return Run(cfg, device, dtype, slot)


class Run(distributed.Ranks):
    def __init__(self, cfg, device, dtype, slot=0):
        self.cfg = cfg
        self.device = device
        self.dtype = dtype
        self.compile = cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda"
        self.slot = slot
        self.selected = ()      # stages to run; (): all
        self.dry_run = False    # needs() only notes what it would answer
        self.is_worker = False  # its parent has printed the reasons
        self.known = {}         # name -> Known
        self.last_checked = None
        self.in_work = None     # name whose outputs are being written
        self.written = []       # its outputs so far
        self.facts = {}         # output -> size and sha256, by the records that were read
        self.has_read_all = False  # records
        self.started = {}       # name -> time when its work began
        self.saved_at = time.time()
        self.data_status = status_of_data(cfg)
        self.save_seconds = 0.0  # that the last checkpoint took
        self.tracker = None     # of the work whose steps are being done; trackers.py
        self.step = 0           # that is being done, the first is 1

    def with_settings(self, changes):
        """A copy under other settings, {"ppo.kl_coef": 0.0, ...}; it shares data and records."""
        other = copy.copy(self)
        for key, value in changes.items():
            other.cfg = config.assign(other.cfg, key, value)
        return other

    # ------------------------------------------------------------------------------------------
    # Device

    def autocast(self):
        enabled = self.dtype != torch.float32
        # its cache would keep a copy of every block that FSDP2 has gathered
        cache = not self.shards
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=cache)

    def make_scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    # ------------------------------------------------------------------------------------------
    # Models that are spread over the ranks

    @property
    def shards(self):
        return self.cfg.train.shard == "full" and self.world_size > 1

    def shard(self, model):
        """A model that is to be trained -> the same model, its weights spread over the ranks"""
        if not self.shards:
            return model
        from runtime import sharding
        return sharding.shard(model, self.device)

    def gathered(self, model):
        """Within it each rank has all weights of the model, and calls it as often as it likes."""
        if not self.shards:
            return contextlib.nullcontext()
        from runtime import sharding
        return sharding.gathered(model)

    def whole(self, value):
        """Tensors, also in dictionaries -> the same without shards"""
        if not self.shards:
            return value
        from runtime import sharding
        return sharding.whole(value)

    def whole_to_save(self, value):
        """The same, what had shards in the memory of rank 0, which saves it; None elsewhere"""
        if not self.shards:
            return value
        from runtime import sharding
        return sharding.whole(value, lambda x: x.cpu() if self.rank == 0 else None)

    # ------------------------------------------------------------------------------------------
    # Data, each read or computed once

    @functools.cached_property
    def tokenizer(self):
        path = self.path("encoding.json")
        self.check_unchanged("encoding.json")
        try:
            with open(path) as file:
                return Tokenizer.from_json(file.read())
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(
                f"{path}: not a readable tokenizer ({error}); delete it and run the same command "
                f"again"
            ) from None

    @functools.cached_property
    def pairs(self):
        return load_pairs(self.cfg)

    @functools.cached_property
    def ood_pairs(self):
        return load_ood(self.cfg, self.pairs["train"])

    @functools.cached_property
    def train(self):
        return encode_set(self, "train", self.pairs["train"])

    @functools.cached_property
    def valid(self):
        return encode_set(self, "valid", self.pairs["valid"])

    @functools.cached_property
    def ood(self):
        return {name: encode_set(self, name, pairs) for name, pairs in self.ood_pairs.items()}

    def read_rows(self):
        """Tokenise all pairs now: of several ranks the first one says which are dropped."""
        return self.train, self.valid

    def read_inputs(self):
        """Read every input file now: a mistake in one must not show after hours of training.

        Raises ConfigError for a file that the run itself writes, or a tracker that is missing.
        """
        trackers.check(self.cfg)
        out_dir = os.path.realpath(self.cfg.out_dir)
        for path in (*self.cfg.data.train, *self.cfg.data.valid, *self.cfg.data.ood):
            folder, name = os.path.split(os.path.realpath(path))
            if folder == out_dir and files.OWN_FILES.fullmatch(name):
                raise ConfigError(f"{path}: is a file that the run writes; copy it to another "
                                  "folder, or name another --out_dir")
        return self.pairs, self.ood_pairs

    def check_data_unchanged(self):
        """Raise DataError if a data file is not what it was when this run began.

        Files are read at one time and hashed at another, and worker processes read them again:
        a record must not hold a result of other data than it says.
        """
        for path, status in self.data_status.items():
            if file_status(path) != status:
                raise DataError(f"{path}: has changed since this run began; run the same command "
                                "again")

    def contents_of(self, paths):
        """What work depends on where it reads files: {"contents of PATH": digest}"""
        out = {}
        for path in paths:
            digests = []
            for file in sources.files_of(path) if sources.is_there(path) else ():
                digests.append(files.file_digest(file.path))
            if digests:
                digest = digests[0] if len(digests) == 1 else files.digest(digests)
                out[f"contents of {path}"] = digest
        return out

    # ------------------------------------------------------------------------------------------
    # Which work is to be done

    def needs(self, name, settings, inputs=(), outputs=None, extra=None, check=None):
        """Whether NAME has to be made now.  Writes nothing.

        settings: dotted settings that the work depends on; inputs: names of the work it reads
        outputs: files whose presence shows that it is done, NAME.pt unless given
        extra: anything else it depends on, {what: value}
        check: function of the run that raises an error where the work could not be done
        Raises ConfigError where --stage leaves out an input that is not up to date.
        """
        depends = {key: stages.setting_value(self.cfg, key) for key in settings}
        depends["format"] = files.FORMAT
        depends |= extra or {}
        for i in inputs:
            depends[f"input {i}"] = self.fingerprint(i)
        record = self.read_record(name)
        outputs = [f"{name}.pt"] if outputs is None else outputs
        reason = stages.stale_reason(record, depends, DEFAULTS)
        if record is None and stages.has_record(self.cfg.out_dir, name):
            reason = "again: its record is damaged"
        reason = reason or self.damage(record, outputs)
        fingerprint = files.digest(depends) if reason else record["fingerprint"]
        reason, fingerprint = distributed.agree((reason, fingerprint))
        self.known[name] = Known(depends, reason, fingerprint, tuple(inputs))
        self.last_checked = name
        if not reason or not self.is_selected(name):
            return False
        self.check_inputs(name, inputs)
        if check is not None:
            check(self)
        if self.dry_run:
            return False
        signals.stop_if_asked()
        if reason != "new" and not self.is_worker:
            tqdm.write(f"{name}: {reason}")
        self.started[name] = time.time()
        self.in_work = name
        self.written = []
        return True

    def damage(self, record, outputs):
        """What is wrong with the outputs of recorded work, in words; "" if nothing is."""
        facts = record.get("outputs", {})
        for output in {**facts, **dict.fromkeys(outputs)}:
            if output in facts:
                change = files.what_changed(self.path(output), facts[output])
            else:  # a record of an older version
                change = "" if os.path.exists(self.path(output)) else "is gone"
            if change:
                return f"again: {output} {change}"
        return ""

    def report_skipped(self):
        """Print what is up to date, a line a stage."""
        for stage in stages.STAGES:
            if self.selected and stage not in self.selected:
                continue
            names = [name for name in self.known if stages.stage_of(name) == stage]
            skipped = [name for name in names if not self.known[name].reason]
            if not names:
                why = "meta.rounds is 0" if stage == "meta" else f"{stage}.methods is empty"
                if self.selected:
                    print(f"{stage}: nothing to do, {why}")
            if skipped:
                listed = f" ({', '.join(skipped)})" if len(names) > 1 else ""
                print(f"{stage}: up to date{listed}")
            if "audit" in skipped and self.slot == 0:
                print(audit_text(self.load_json("audit.json")))
            if "clean" in skipped and self.slot == 0:
                for line in self.load_json("trust.json")["text"]:
                    print(f"clean: {line}")

    def is_selected(self, name):
        return not self.selected or stages.stage_of(name) in self.selected

    def check_inputs(self, name, inputs):
        """Raise ConfigError where --stage leaves out an input that is out of date.

        Rounds take turns between two stages: an input that waits for selected work is no error yet,
        but only when this work is reached and the input is still out of date.
        """
        for i in inputs:
            reason = self.known[i].reason if i in self.known else ""
            if reason and not self.is_selected(i) and not self.waits_for_selected(i):
                why = "missing" if reason == "new" else reason
                raise ConfigError(
                    f"--stage={stages.stage_of(name)}: needs {i}, which is {why}; run "
                    f"--stage={stages.stage_of(i)} first, or leave --stage out"
                )

    def waits_for_selected(self, name):
        for i in self.known[name].inputs:
            is_stale = i in self.known and bool(self.known[i].reason)
            if is_stale and (self.is_selected(i) or self.waits_for_selected(i)):
                return True
        return False

    def fingerprint(self, name):
        if name in self.known:
            return self.known[name].fingerprint
        record = self.read_record(name)
        return record["fingerprint"] if record else "missing"

    def read_record(self, name):
        """The record of finished work, settings under their present names; None if there is none"""
        record = stages.read_record(self.cfg.out_dir, name)
        if record is not None:
            self.facts |= record.get("outputs", {})
            record["depends"] = with_present_names(record["depends"].items())
            table = record.get("config")
            settings = config.flatten(table) if isinstance(table, dict) else []
            record["settings"] = with_present_names(settings)
        return record

    def record_finished(self, name, metrics):
        """Write the record, remove the checkpoint, print one line."""
        self.check_data_unchanged()
        depends = self.known[name].depends
        seconds = time.time() - self.started[name]
        if self.rank == 0:
            outputs = {output: files.output_facts(self.path(output)) for output in self.written}
            stages.write_record(
                self.cfg.out_dir, name, depends, asdict(self.cfg), seconds, metrics,
                {"outputs": outputs, "tokenizer": self.tokenizer_digest()},
            )
            if os.path.exists(self.path(f"{name}.ckpt")):
                os.remove(self.path(f"{name}.ckpt"))
        else:
            outputs = {}
        self.facts |= distributed.agree(outputs)
        self.known[name] = Known(depends, "", files.digest(depends))
        self.in_work = None
        metrics_text = "".join(
            f", {key} {value:.3f}" for key, value in metrics.items() if isinstance(value, float)
        )
        tqdm.write(f"{name}: {seconds:.1f} s{metrics_text}")

    def tokenizer_digest(self):
        """sha256 of encoding.json, which sample.py compares; "" before there is one"""
        path = self.path("encoding.json")
        return files.output_facts(path)["sha256"] if os.path.isfile(path) else ""

    def parallel(self, function, items):
        """Call function(run, item) for every item, in worker processes where that pays.

        Small models leave most of a CPU idle: several are trained at once, each with its share of
        the threads.  The share does not depend on how many are left to do: sums are rounded in
        another order by another number of threads, and a resumed run must end with the same bits.
        function is a stage: it begins with needs() and is defined in a module.
        """
        items = list(items)
        stale = self.stale_work(function, items)  # {item: name}
        if self.dry_run or not stale:
            return
        if self.world_size > 1:
            self.deal_out(function, stale)
            return
        threads = torch.get_num_threads()
        on_cpu = self.device.type == "cpu" and not self.compile
        num_workers = self.cfg.train.workers or (threads if on_cpu else 1)
        share = max(1, threads // min(num_workers, len(items)))
        num_workers = min(num_workers, len(stale))
        if num_workers == 1:
            torch.set_num_threads(share)
            try:
                for item in stale:
                    function(self, item)
            finally:
                torch.set_num_threads(threads)
            return
        jobs = []
        for i, (item, name) in enumerate(stale.items()):
            if self.known[name].reason != "new":
                tqdm.write(f"{name}: {self.known[name].reason}")
            slot = 1 + i % num_workers
            jobs.append((self.cfg, function, item, slot, share, self.data_status))
        workers.parallel_map(run_in_worker, jobs, num_workers)
        self.stale_work(function, stale)  # reads the new records

    def deal_out(self, function, stale):
        """Each rank makes its own items alone; what would leave ranks idle is made by all."""
        items = list(stale)
        num_whole = 0 if self.shards else len(items) // self.world_size * self.world_size
        for item in items[:num_whole]:
            if self.known[stale[item]].reason != "new":
                tqdm.write(f"{stale[item]}: {self.known[stale[item]].reason}")
        own, _ = distributed.share(items[:num_whole])
        if num_whole:
            self.read_rows()
        with distributed.alone():
            for item in own:
                function(self, item)
        distributed.wait()
        self.stale_work(function, items)  # reads the new records
        for item in items[num_whole:]:
            function(self, item)

    def stale_work(self, function, items):
        """Items for which a stage has work to do -> {item: name of the work}"""
        was_dry_run = self.dry_run
        self.dry_run = True
        stale = {}
        try:
            for item in items:
                function(self, item)
                name = self.last_checked
                if self.known[name].reason and self.is_selected(name):
                    stale[item] = name
        finally:
            self.dry_run = was_dry_run
        return stale

    # ------------------------------------------------------------------------------------------
    # Files

    def path(self, name):
        return os.path.join(self.cfg.out_dir, name)

    def before_output(self, output):
        """A record must not outlive the outputs that it describes."""
        if self.in_work is not None and self.rank == 0:
            stages.remove_record(self.cfg.out_dir, self.in_work)
            if output not in self.written:
                self.written.append(output)
        return self.path(output)

    def save(self, function, name, value):
        """Save an output by a function of runtime/files.py.  Rank 0 writes; the others wait."""
        path = self.before_output(name)
        value = self.whole_to_save(value)
        if self.rank == 0:
            function(path, value)
        distributed.wait()

    def save_text(self, name, text):
        self.save(files.save_text, name, text)

    def save_json(self, name, value):
        self.save(files.save_json, name, value)

    def save_jsonl(self, name, records):
        self.save(files.save_jsonl, name, records)

    def save_tensors(self, name, state):
        self.save(files.save_tensors, name, state)

    def save_editable(self, name, records):
        """Save a JSONL file that people edit: one that was edited is kept under another name."""
        if self.rank > 0:
            distributed.wait()  # in save
            return
        path = self.path(name)
        facts = self.facts_of(name)
        is_ours = facts is not None and not files.what_changed(path, facts)
        kept = None
        if os.path.exists(path) and not is_ours:
            kept = files.set_aside(path)
        self.save_jsonl(name, records)
        if kept and files.same_content(path, kept):
            os.remove(kept)
        elif kept:
            tqdm.write(f"{path}: was changed by hand; it is kept as {kept}")

    def draw(self, name, function, *arguments, **options):
        """Draw figures/NAME.png by a function of runtime/figures.py -> whether it is drawn

        It is not without log.figures or matplotlib.
        """
        if self.rank > 0:
            return self.cfg.log.figures
        output = f"figures/{name}.png"
        path = self.before_output(output)
        is_drawn = self.cfg.log.figures and figures.draw(
            function, *arguments, path=path, **options)
        if not is_drawn:
            self.written.remove(output)
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)  # a picture of former numbers
        signals.stop_if_asked()
        return is_drawn

    def load_json(self, name):
        self.check_unchanged(name)
        return files.load_json(self.path(name))

    def load_jsonl(self, name):
        self.check_unchanged(name)
        return files.load_jsonl(self.path(name))

    def load_tensors(self, name, device="cpu"):
        self.check_unchanged(name)
        return files.load_tensors(self.path(name), device)

    def check_unchanged(self, name):
        """Raise OSError unless a file is as its record describes it."""
        facts = self.facts_of(name)
        change = files.what_changed(self.path(name), facts) if facts else ""
        if change:
            raise OSError(f"{self.path(name)}: {change}; run the training command again, which "
                          "makes it again")

    def facts_of(self, name):
        """Size and sha256 of an output by the records, or None"""
        if name not in self.facts and not self.has_read_all:
            for work in stages.record_names(self.cfg.out_dir):
                self.read_record(work)
            self.has_read_all = True
        return self.facts.get(name)

    def resume(self, name, parts):
        """Load NAME.ckpt, the state of work that was stopped, into its parts.

        parts: {key: model, optimizer, ...} -> the rest of the state; {} if there is no checkpoint,
        or one that is damaged or of other settings
        """
        self.saved_at = time.time()
        state = self.read_checkpoint(name)
        steps = distributed.of_each_rank(state.get("step", 0))
        if len(set(steps)) > 1:
            raise ConfigError(
                f"{self.path(name)}.ckpt: the ranks read different states of it (steps "
                f"{', '.join(f'{step:.0f}' for step in steps)}); put out_dir on a disk that all of "
                "them share, and run the same command again"
            )
        if not state:
            return {}
        for key, part in parts.items():
            if self.shards:
                from runtime import sharding
                sharding.load_state(part, state.pop(key))
            else:
                part.load_state_dict(state.pop(key))
        tqdm.write(f"{name}: resumes at step {state['step']}")
        return state

    def read_checkpoint(self, name):
        """-> what NAME.ckpt holds, but its fingerprint; {} as in resume"""
        path = self.path(f"{name}.ckpt")
        if not os.path.exists(path):
            return {}
        state = files.load_state(path, "cpu" if self.shards else self.device)
        if state is None:
            tqdm.write(f"{name}: {path} is damaged or of an older version; begins anew")
            return {}
        if state.pop("fingerprint") != files.digest(self.known[name].depends):
            return {}
        return state

    def save_checkpoint(self, name, parts, **state):
        """Save NAME.ckpt; after Ctrl-C raise Stopped.  state: "step" and what resume returns"""
        start_time = time.time()
        state["fingerprint"] = files.digest(self.known[name].depends)
        for key, part in parts.items():
            state[key] = self.whole_to_save(part.state_dict())
        if self.rank == 0:
            files.save_state(self.path(f"{name}.ckpt"), state)
        self.saved_at = time.time()
        self.save_seconds = self.saved_at - start_time
        stop, = distributed.any_rank(signals.should_stop())  # and all wait until it is saved
        if stop:
            raise Stopped

    def stop_if_asked(self):
        signals.stop_if_asked()

    def should_save(self):
        """After a signal, or if the last checkpoint is old; saving takes 2 % of the time at most"""
        interval = 60 * self.cfg.train.checkpoint_minutes
        if interval:
            interval = max(interval, self.save_seconds / SAVING_SHARE)
        is_due = time.time() - self.saved_at > interval and self.rank == 0
        return any(distributed.any_rank(signals.should_stop(), is_due))

    # ------------------------------------------------------------------------------------------
    # Progress

    def log(self, **record):
        """Append a line to log.jsonl; the tracker gets it as well."""
        if self.rank > 0:
            return
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}
        files.append_line(self.path("log.jsonl"), rounded)
        if self.tracker is not None:
            self.tracker.log(rounded, record.get("step", self.step))

    def bar(self, total, name, start=0):
        """A progress bar; where the output is no terminal, a line a minute"""
        is_terminal = sys.stderr.isatty()
        kind = tqdm if is_terminal else ProgressLines
        return kind(
            total=total, initial=start, desc=name, disable=distributed.true_rank() > 0,
            position=self.slot, leave=False, smoothing=0.1, dynamic_ncols=is_terminal,
            **({} if is_terminal else LINE_OPTIONS),
        )

    def steps(self, name, start, total):
        """Step numbers from start on, with a progress bar and the tracker."""
        with (
            signals.finishing_steps(),
            self.bar(total, name, start) as self.progress,
            trackers.opened(self, name, start),
        ):
            self.meter = Meter(total)
            for step in range(start, total):
                self.step = step + 1
                yield step
                self.progress.update()

    def add(self, count=0, tokens=0, **sums):
        """Add to the averages of the next log line.  count: what the sums are divided by"""
        self.meter.add(count, tokens, sums)

    def check_finite(self, name, step, **values):
        """Raise ConfigError if a number is not finite.  values: what it is, and the number

        The work ends at this step, and the last state on disk stays.
        """
        for what, value in values.items():
            if math.isfinite(value):
                continue
            section = stages.stage_of(name)
            lr = {"ppo": "ppo.lr and ppo.critic_lr", "": "its lr"}.get(section, f"{section}.lr")
            other = "" if self.dtype == torch.float32 else ", or use --dtype=float32"
            raise ConfigError(f"{name}: {what.replace('_', ' ')} is {float(value)} at step {step}; "
                              f"lower {lr}{other}")

    def check_step(self, name, step, grad_norm, parameters):
        """check_finite of a step of the training loop: its loss, gradient and weights"""
        values = {"the_loss": self.meter.sums["loss"]}
        if self.dtype != torch.float16:  # there the scaler leaves out steps that overflow
            values["the_gradient"] = grad_norm
        values["a_weight"] = torch.nn.utils.get_total_norm(parameters)
        values = self.whole(values)
        numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
        self.check_finite(name, step + 1, **dict(zip(values, numbers)))

    def log_step(self, name, step, **more):
        """Every hundredth of the steps: write a log line.  -> averages since the last one, or None
        """
        if not self.meter.is_due(step):
            return None
        averages, tokens_per_s = self.meter.flush()
        shown = {key: f"{value:.3f}" for key, value in averages.items()}
        self.progress.set_postfix(shown | {"tokens/s": f"{tokens_per_s:,.0f}"}, refresh=False)
        values = {key: float(value) for key, value in self.whole(more).items()}
        self.log(
            stage=name, step=step + 1, steps=self.meter.total, **averages, **values,
            tokens_per_s=tokens_per_s,
        )
        return averages


LINE_OPTIONS = {
    "mininterval": 60, "maxinterval": 60, "delay": 60,  # seconds
    "bar_format": "{desc}: {n_fmt} of {total_fmt}, {remaining} left",
}


class ProgressLines(tqdm):
    """A progress bar as lines of text, for a file or a pipe"""

    def display(self, msg=None, pos=None):
        if msg != "":  # what clears a bar
            self.fp.write(f"{self}\n")


class Meter:
    """Averages and speed since the last log line."""

    def __init__(self, total):
        self.total = total
        self.every = max(1, total // 100)
        self.reset()

    def reset(self):
        self.sums = {}
        self.count = 0
        self.tokens = 0
        self.since = time.time()

    def add(self, count, tokens, sums):
        self.count += count
        self.tokens += tokens
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value  # stays on the device

    def is_due(self, step):
        return (step + 1) % self.every == 0 or step + 1 == self.total

    def flush(self):
        sums = distributed.total([float(value) for value in self.sums.values()])
        averages = {name: value / self.count for name, value in zip(self.sums, sums)}
        tokens_per_s = self.tokens / (time.time() - self.since)
        self.reset()
        return averages, tokens_per_s


# ----------------------------------------------------------------------------------------------
# Worker processes


def status_of_data(cfg):
    """-> {path of a data file: its size and time}"""
    paths = (*cfg.data.train, *cfg.data.valid, *cfg.data.ood, cfg.data.decisions,
             cfg.strength.votes)
    return {path: file_status(path) for path in paths if os.path.isfile(path)}


def file_status(path):
    """-> size and time of the last change; None if there is no such file"""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


@functools.cache
def run_of_worker(cfg, slot):
    run = open_run(cfg, slot)
    run.is_worker = True
    return run


def run_in_worker(cfg, function, item, slot, threads, data_status):
    """In a process of its own -> False if it was stopped"""
    run = run_of_worker(cfg, slot)
    run.data_status = data_status  # of its parent
    run.check_data_unchanged()
    torch.set_num_threads(threads)  # this process has its share of the threads only
    try:
        function(run, item)
    except Stopped:
        return False
    return True


def with_present_names(items):
    """[(setting, value)], perhaps under old names -> dictionary"""
    return {config.renamed(key): value for key, value in items}


def default_settings():
    out = {}
    for key in config.keys():
        out[key] = stages.setting_value(config.Config(), key)
    return out


DEFAULTS = default_settings()
