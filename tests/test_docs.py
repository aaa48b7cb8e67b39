"""README, docs/, comments of configs/ and module docstrings: commands, settings, names, links."""
import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mutants
import pytest
import same_numbers
import torch
from faults import fuzz
from faults.runs import parse_args
from helpers import HH_SMALL, ROOT, write_pairs
from small_runs import opened

import config
import ppo
import sample
import train
from common import member_names, reward_model_from_sft, save_model
from config import Config
from experiments.__main__ import main as experiments_main
from experiments.__main__ import parse_seeds
from experiments.seeds import load_experiments
from formats.pairs import ADAPTERS
from runtime import cli, stages
from runtime.stages import STAGES
from tools import audit, bench, peers, rewardbench, score

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
CODE_FOLDERS = ("experiments", "formats", "labels", "pretrained", "runtime", "tools")
MODULES = sorted(ROOT.glob("*.py"))
for name in CODE_FOLDERS:
    MODULES += sorted((ROOT / name).glob("*.py"))
MODULES += [ROOT / "tests/mutants.py", ROOT / "tests/same_numbers.py"]
HISTORY = ROOT / "docs/log.md"  # dated entries keep the names of their time


def label(path):
    return str(path.relative_to(ROOT))


def split_page(path):
    """A Markdown page -> lines of its code blocks, lines outside them"""
    code = []
    text = []
    inside = False
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside:
            code.append(line)
        else:
            text.append(line)
    return code, text


def code_spans(path):
    _, text = split_page(path)
    return [span for line in text for span in re.findall(r"`([^`]+)`", line)]


# --------------------------------------------------------------------------------------------------
# Finding the commands

PYTHON = r"(?:\S*/)?python3? "


def commands_of_page(path):
    """Whole commands of code blocks and of code in a line of text"""
    code, _ = split_page(path)
    lines = [*code, *code_spans(path)]
    return [line for line in lines if re.match(PYTHON, line)]


def commands_of_config(path):
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines()]
    spans = re.findall(r"`([^`\n]+)`", path.read_text())
    return [line for line in (*lines, *spans) if re.match(PYTHON, line)]


def commands_of_module(path):
    """Lines of a module's docstring that begin with a command, and code in its lines"""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    lines = [line.strip() for line in text.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", text)
    return [line for line in (*lines, *spans) if re.match(PYTHON, line)]


def all_commands():
    """-> [(place, command)], without repetitions"""
    found = {}
    sources = [(PAGES, commands_of_page), (CONFIGS, commands_of_config)]
    sources.append((MODULES, commands_of_module))
    for paths, commands_of in sources:
        for path in paths:
            for command in commands_of(path):
                found[label(path), command] = None
    return list(found)


COMMANDS = all_commands()


def split_command(command):
    """A line of shell -> its commands, each a list of words

    Comments, redirections, brackets around optional words, and what follows a colon are left out.
    """
    parts = []
    for part in re.split(r"\s#|\s<\s", command)[0].split("&&"):
        words = []
        for word in re.sub(r"[\[\]]", "", part).split():
            words.append(word.rstrip(":"))
            if word.endswith(":"):
                break
        parts.append(words)
    return parts


# --------------------------------------------------------------------------------------------------
# Checking them: a function for each program, which raises an error for a wrong word

EXAMPLES = {  # what stands for a value -> a value
    "NAME": "headline",
    "--stage=NAME": f"--stage={STAGES[0]}",
    "--config=FILE": "--config=configs/tiny.toml",
    "--only=SECTION,...": "--only=machine,reward",
    "--only=WORK,...": "--only=reward,ppo",
    "--only=NAME,NAME": f"--only={next(iter(same_numbers.CONFIGURATIONS))}",
}
ELLIPSES = ("…", "...", "--section.key=value")


def check_settings(words):
    """Words of train.py's command line; old names of settings are errors here."""
    for word in words:
        key = word.removeprefix("--").partition("=")[0]
        assert key not in config.RENAMED, f"{word}: {key} is the old name"
    if "--help" not in words:
        cli.parse_args(words)


def check_experiment(words):
    if not words:
        return
    name, *options = words
    assert name in load_experiments(), f"{name}: no such experiment"
    settings = []
    for word in options:
        if word.startswith("--seeds="):
            parse_seeds(word.removeprefix("--seeds="))
        elif word not in ("--full", "--add"):
            settings.append(word)
    check_settings(settings)


def check_sample(words):
    sample.parse_options(words, sample.OPTIONS)


def check_score(words):
    sample.parse_options([word for word in words if word.startswith("--")], score.OPTIONS)
    assert len([word for word in words if not word.startswith("--")]) == 1


def check_rewardbench(words):
    options = [word for word in words if word.startswith("--")]
    sample.parse_options(options, rewardbench.OPTIONS)
    assert len(options) < len(words), "no file"


def check_audit(words):
    options = [word for word in words if word.startswith("-")]
    assert len(options) < len(words), "no file"
    check_settings([word for word in options if not re.fullmatch(r"--show=\d+", word)])


def check_compare(words):
    assert words and all(word.endswith(".json") for word in words)


def check_no_words(words):
    assert not words


def check_pytest(words):
    assert words == ["-q", "-n", "2"]


def check_venv(words):
    assert len(words) == 1 and words[0] in (".venv", ".venv-trl", ".venv-ppo")


PROGRAMS = {
    "train.py": check_settings,
    "sample.py": check_sample,
    "world.py": check_no_words,
    "tests/mutants.py": mutants.parse_args,
    "tests/same_numbers.py": same_numbers.parse,
    "tests/faults/damage.py": parse_args,
    "tests/faults/fuzz.py": fuzz.parse_args,
    "tests/faults/kills.py": parse_args,
    "tests/faults/writes.py": parse_args,
    "-m experiments": check_experiment,
    "-m tools.audit": check_audit,
    "-m tools.bench": bench.parse_args,
    "-m tools.compare": check_compare,
    "-m tools.peers": peers.parse_args,
    "-m tools.rewardbench": check_rewardbench,
    "-m tools.scaling": check_no_words,
    "-m tools.score": check_score,
    "-m pytest": check_pytest,
    "-m venv": check_venv,
}


def check_program(program):
    """The program is one of PROGRAMS, and its file or module exists."""
    assert program in PROGRAMS, f"{program}: no such program"
    if program.startswith("-m "):
        assert importlib.util.find_spec(program.removeprefix("-m "))
    else:
        assert (ROOT / program).is_file()


def check_command(words):
    """One command, which begins with python or pip."""
    if words[0].endswith("/pip"):
        *options, requirements = words[1:]
        assert options == ["install", "-q", "-r"]
        assert (ROOT / requirements).is_file()
        return
    assert re.fullmatch(PYTHON.strip(), words[0]), f"{words[0]}: neither python nor pip"
    count = 3 if words[1] == "-m" else 2
    program = " ".join(words[1:count])
    check_program(program)
    arguments = [EXAMPLES.get(word, word) for word in words[count:] if word not in ELLIPSES]
    PROGRAMS[program](arguments)


@pytest.mark.parametrize("place, command", COMMANDS, ids=[" ".join(item) for item in COMMANDS])
def test_command_is_accepted(place, command, monkeypatch):
    monkeypatch.chdir(ROOT)  # configs/ is named from there
    for words in split_command(command):
        check_command(words)


def test_commands_are_found_in_every_kind_of_place():
    places = {place for place, _ in COMMANDS}
    assert {"README.md", "docs/audit.md", "configs/tiny.toml", "tools/score.py"} <= places
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("command", [
    "python train.py --config=configs/none.toml",
    "python train.py --config=configs/tiny.toml --ppo.kl_coeff=0.1",
    "python train.py --config=configs/tiny.toml --ppo.kl=0.1",
    "python train.py --ppo.kl_coef=high",
    "python train.py --stage=rewards",
    "python -m experiments decile",
    "python -m experiments deciles --seeds=three",
    "python -m tools.label my_pairs.jsonl",
    "python -m tools.score my_pairs.jsonl",
    "python sample.py --run=out/tiny --model=sft",
    "python tests/mutants.py --samples=12",
    "python bench.py",
    ".venv/bin/pip install -q -r requirement.txt",
])
def test_wrong_commands_are_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        for words in split_command(command):
            check_command(words)


def test_programs_in_sentences_of_docstrings_exist():
    for path in MODULES:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for program in re.findall(r"\bpython3? (-m [\w.]+|[\w/]+\.py)\b", text):
            if program != "-m tools.NAME":
                check_program(program)


# --------------------------------------------------------------------------------------------------
# Running the fast ones


def run_python(*words):
    """Run a command in a process of its own -> what it prints"""
    result = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_lists_every_setting(capsys):
    assert train.main(["--help"]) == 0
    out = capsys.readouterr().out
    for key in config.keys():
        assert f"--{key}=" in out


def test_experiments_are_those_of_their_page(capsys):
    assert experiments_main([]) == 0
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.M)
    rows = [line for line in split_page(ROOT / "docs/experiments.md")[1] if line[:3] == "| `"]
    documented = []
    for row in rows:
        documented += re.findall(r"`(\w+)`", row.split("|")[1])
    assert sorted(listed) == sorted(documented) == sorted(load_experiments())


def test_layouts_of_data_are_those_of_their_page():
    text = split_page(ROOT / "docs/formats.md")[1]
    rows = {line.split("|")[1].strip(): line for line in text if line.startswith("|")}
    for adapter in ADAPTERS:
        for key in adapter.keys:
            assert f"`{key}`" in rows[adapter.name]


def test_world_prints_pairs():
    assert "gold difference" in run_python("world.py")


def test_audit_prints_its_table(tmp_path, capsys):
    path = write_pairs(tmp_path / "my_pairs.jsonl", n=20)
    assert audit.main([str(path)]) == 0
    assert "layout of my_pairs.jsonl: explicit prompt (20)" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Settings, functions and files that the pages name

PAGE_LABELS = [label(path) for path in PAGES]
OPTIONS = {
    "config", "stage", "seeds", "full", "add", "help", "show", *sample.OPTIONS, *score.OPTIONS,
    *rewardbench.OPTIONS, "shutdown-timeout",  # of torchrun
}
FILE_TYPES = {"gz", "json", "jsonl", "md", "png", "pt", "py", "safetensors", "toml"}
SECTIONS = {key.partition(".")[0] for key in config.keys() if "." in key}
CORE = {path.stem for path in ROOT.glob("*.py")}


def check_option(word):
    """A word --key=value, or --key alone, of some command of the project."""
    if word in ELLIPSES:
        return
    key, _, value = word.removeprefix("--").partition("=")
    if key in OPTIONS:
        if key == "stage" and value != "NAME":
            assert value in (*STAGES, "export")
        return
    assert key in config.keys(), f"{word}: no such option"
    if value and value != "…":
        config.assign(Config(), key, value)


def is_metric(name):
    """Whether the code writes a number under this name."""
    return any(f'"{name}"' in (ROOT / file).read_text() for file in ("evaluate.py", "train.py"))


def check_name(owner, name, value):
    """SECTION.setting, an old name of one, or MODULE.function"""
    key = f"{owner}.{name}"
    if key in config.keys():
        if value:
            config.assign(Config(), key, value)
        return
    if key in config.RENAMED:
        return
    assert owner in CORE, f"{key}: no such setting"
    assert hasattr(importlib.import_module(owner), name), f"{key}: no such setting or function"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_LABELS)
def test_options_and_names_exist(page):
    if page == HISTORY:
        return
    for span in code_spans(page):
        words = span.split()
        if words and all(word.startswith("--") for word in words):
            for word in words:
                check_option(word)
        match = re.fullmatch(r"([a-z]+)\.(\w+)(?: = (\S+))?", span)
        if not match or match[1] not in SECTIONS | CORE or match[2] in FILE_TYPES:
            continue
        if page.name != "metrics.md" or not is_metric(match[2]):
            check_name(*match.groups())


@pytest.mark.parametrize("page", PAGES, ids=PAGE_LABELS)
def test_files_of_the_repository_exist(page):
    if page == HISTORY:
        return
    folders = ("assets", "configs", "docs", "results", "tests", *CODE_FOLDERS)
    for span in code_spans(page):
        is_path = span.partition("/")[0] in folders and re.fullmatch(r"[\w./]+", span)
        if "NAME" not in span and (is_path or re.fullmatch(r"\w+\.py", span)):
            assert (ROOT / span).exists(), span


# --------------------------------------------------------------------------------------------------
# Links


def anchors(path):
    """The anchors that GitHub makes of the headings of a page."""
    _, text = split_page(path)
    found = set()
    for line in text:
        if line.startswith("#"):
            heading = line.lstrip("#").strip().lower()
            found.add(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=PAGE_LABELS)
def test_links_and_pictures_resolve(page):
    _, text = split_page(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join(text))
    for target in targets:
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{target}: no such file"
        assert path.is_relative_to(ROOT), f"{target}: outside the repository"
        if anchor:
            assert anchor in anchors(path), f"{target}: no such heading"


def test_every_page_is_in_the_index():
    text = (ROOT / "docs/README.md").read_text()
    for path in PAGES[1:]:
        if path.name != "README.md":
            assert f"({path.relative_to(ROOT / 'docs')})" in text, label(path)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_LABELS)
def test_no_path_of_one_machine(page):
    assert not re.search(r"(?<![\w.:/])/(home|mnt|root|tmp|Users)/", page.read_text())


# --------------------------------------------------------------------------------------------------
# README


def test_the_line_counts_of_the_readme_are_true():
    for name, count in re.findall(r"^(\w+\.py) +(\d+) ", README.read_text(), re.MULTILINE):
        true = len((ROOT / name).read_text().splitlines())
        assert abs(int(count) - true) <= 0.05 * true, f"{name} has {true} lines"


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_readme_has_two_commands_of_one_line():
    lines = [line for line in README.read_text().splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert "train.py --config=configs/tiny.toml" in lines[0]
    assert "-m pytest" in lines[1]
    for line in lines:
        assert len(split_command(line)) == 3


def test_readme_counts_the_lines_of_the_core():
    listed = re.findall(r"^(\w+\.py) +(\d+) ", README.read_text(), re.M)
    assert len(listed) == 12
    for name, count in listed:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(int(count) - lines) <= 0.15 * lines, f"{name} has {lines} lines, not {count}"


# --------------------------------------------------------------------------------------------------
# docs/walkthrough.md


def read_walks():
    """The walks of the page: the hops, the small functions inside them, the counts in its text.

    A function is written as "file.py: function".
    """
    walks = []
    for part in (ROOT / "docs/walkthrough.md").read_text().split("\n## ")[1:]:
        hops = re.findall(r"^\d+\. `([\w/]+\.py: [\w.]+)`", part, re.M)
        line = re.search(r"^\* Inside the hops: (.*)$", part, re.M)[1]
        inner = []
        for file, names in re.findall(r"in `([\w/]+\.py)` ([^;]+)", line):
            inner += [f"{file}: {name}" for name in re.findall(r"`([\w.]+)`", names)]
        num_hops, num_files = re.search(r"That is (\d+) hops in (\d+) files", part).groups()
        num_inner = re.search(r"these \d+, (\d+) small ones", part)[1]
        counts = (int(num_hops), int(num_files), int(num_inner))
        walks.append(SimpleNamespace(hops=hops, inner=inner, counts=counts))
    return walks


class Arrived(Exception):
    """backward() has been called: the end of both walks."""


def arrive(*arguments, **options):
    raise Arrived


def trace(work, start):
    """Call work() until backward() -> functions of the repository in order of first call

    start: name of the function that the walk begins with
    """
    names = {}  # in order of first call
    started = False

    def record(frame, event, argument):
        nonlocal started
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(f"{ROOT}/"):
            return
        started = started or code.co_name == start
        file = Path(code.co_filename).relative_to(ROOT)
        name = code.co_qualname.replace("<locals>.", "")
        if started and "<" not in name and file.parts[0] not in (".venv", "tests"):
            names[f"{file}: {name}"] = None

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        with pytest.raises(Arrived):
            work()
    finally:
        sys.setprofile(before)
    return list(names)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """-> function that opens a run with a tokenizer, models that are not trained, and votes"""
    folder = tmp_path_factory.mktemp("walk")
    path = write_pairs(folder / "pairs.jsonl")

    def open_walk():
        return opened(folder / "out", f"--data.train={path}", small=HH_SMALL)

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports what is slow under a profiler
    run = open_walk()
    train.make_tokenizer(run)
    save_model(run, "sft", train.init_sft_model(run))
    save_model(run, "reward_flip", reward_model_from_sft(run))
    votes = {"train": torch.randn(2, len(run.train.rows))}
    votes["valid"] = torch.randn(2, len(run.valid.rows))
    run.save_tensors("gaps.pt", votes)
    members = {f"input {name}": "missing" for name in member_names(run.cfg)}
    stages.write_record(run.cfg.out_dir, "strength", members, {}, 0.0, {}, {})
    return open_walk


def compare_walk(walk, names):
    assert [name for name in names if name in walk.hops] == walk.hops
    assert set(walk.inner) <= set(names)
    assert not set(walk.inner) & set(walk.hops)
    num_files = len({hop.partition(":")[0] for hop in walk.hops})
    assert walk.counts == (len(walk.hops), num_files, len(walk.inner))


def test_walk_of_a_pair(untrained, monkeypatch):
    run = untrained()

    def train_reward():
        run.read_inputs()
        train.train_reward(run, "flip")

    monkeypatch.setattr(torch.Tensor, "backward", arrive)
    compare_walk(read_walks()[0], trace(train_reward, "read_pairs"))


def test_walk_of_a_prompt(untrained, monkeypatch):
    run = untrained()

    def train_policy():
        ppo.train_policy_loop(run, "policy_flip", "reward_flip")

    monkeypatch.setattr(torch.Tensor, "backward", arrive)
    names = trace(train_policy, "draw_rows")
    compare_walk(read_walks()[1], names)
    others = set(names) - {*read_walks()[1].hops, *read_walks()[1].inner}
    for_several = {"runtime/run.py: Run.shards", "runtime/run.py: Run.gathered"}
    bookkeeping = {name for name in others - for_several if "distributed.py" not in name}
    assert bookkeeping == {
        "runtime/run.py: Run.steps", "runtime/run.py: Run.autocast",
        "runtime/run.py: Run.check_finite", "runtime/signals.py: finishing_steps",
        "runtime/trackers.py: opened",
    }
