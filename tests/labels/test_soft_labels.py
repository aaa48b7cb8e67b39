"""The TRL script of docs/audit.md trains on the loss of losses.bradley_terry; it needs
requirements-bench.txt."""
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, tiny_reward
from review_pages import write_lines

from config import Config, assign
from data import collate, encode_row
from losses import bradley_terry
from pretrained import export
from runtime.vote_files import strength_lines
from strength import treat
from tokenizer import train_tokenizer
from tools.speed import texts_of, world_pairs

N = 12
METHOD = "soft_target_margin"


def script():
    """The Python code of the section "Soft labels" """
    text = (ROOT / "docs/audit.md").read_text()
    _, _, section = text.partition("\n## Soft labels\n")
    return re.search("```python\n(.*?)```", section, re.DOTALL)[1]


def replaced(code, old, new):
    assert code.count(old) == 1, old
    return code.replace(old, new)


def test_the_script_names_the_columns_of_strength_jsonl():
    """Also where TRL is not installed."""
    code = script()
    compile(code, "docs/audit.md", "exec")
    cfg = assign(Config(), "strength.method", METHOD)
    run = SimpleNamespace(cfg=cfg, train=SimpleNamespace(pairs=world_pairs(2)))
    mean = torch.tensor([1.0, -1.0])
    line = next(strength_lines(run, mean, mean, treat(mean, METHOD)))
    for column in ("prompt", "chosen", "rejected", "margin", "p"):
        assert column in line
    assert 'example["p"]' in code and 'inputs["margin"]' in code


def test_a_step_of_the_script_has_our_loss(tmp_path, monkeypatch):
    for name in ("trl", "transformers", "datasets"):
        pytest.importorskip(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from trl import RewardTrainer

    pairs = world_pairs(N)
    tokenizer = train_tokenizer(texts_of(pairs), 300)
    model = tiny_reward(vocab=300, context=256)
    export.save(str(tmp_path / "model"), model, tokenizer)
    rows = [encode_row(tokenizer, p.prompt, (p.chosen, p.rejected), 256) for p in pairs]
    batch = collate(rows)
    with torch.no_grad():
        chosen, rejected = model(batch.tokens, batch.branch, batch.position, batch.last).T

    mean = torch.linspace(-3, 3, N)
    labels = treat(mean, METHOD)
    cfg = assign(Config(), "strength.method", METHOD)
    run = SimpleNamespace(cfg=cfg, train=SimpleNamespace(pairs=pairs))
    lines = strength_lines(run, mean, mean.abs(), labels)
    path = write_lines(tmp_path / "strength.jsonl", *lines)

    code = replaced(script(), "out/clean/strength.jsonl", str(path))
    code = replaced(code, '"my_reward_model"', repr(str(tmp_path / "model")))
    settings = (
        f"{str(tmp_path / 'trl')!r}, max_steps=1, per_device_train_batch_size={N}, use_cpu=True, "
        "bf16=False, report_to='none', save_strategy='no', logging_steps=1, disable_tqdm=True"
    )
    code = replaced(code, 'RewardConfig("soft_labels")', f"RewardConfig({settings})")
    names = {}
    exec(code, names)

    logged = names["trainer"].state.log_history[0]["loss"]
    _, p, margin = labels
    ours = bradley_terry(chosen, rejected, margin, p).mean().item()
    assert logged == pytest.approx(ours, abs=1e-5)
    hard = bradley_terry(chosen, rejected, margin).mean().item()
    assert abs(hard - ours) > 0.1
    assert issubclass(names["SoftLabelTrainer"], RewardTrainer)
    assert names["trainer"].state.global_step == 1
