"""docs/inference.md: its code for transformers runs, and gives what this project gives."""
import json
import re
import runpy

import pytest
import torch
from helpers import ROOT, tiny, tiny_reward

from data import encode_prompt
from generate import Sampling, generate
from pretrained import export
from tokenizer import train_tokenizer
from tools import score

QUESTION = {"role": "user", "content": "How do I save money?"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """-> the folder that the code of the page was run in, its variables, policy and tokenizer"""
    pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/inference.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    tokenizer = train_tokenizer(blocks, 300)
    policy = tiny(vocab=tokenizer.vocab_size, context=128)
    folder = tmp_path_factory.mktemp("page")
    models = {"policy_flip": policy, "reward_flip": tiny_reward(1, vocab=tokenizer.vocab_size)}
    for name, model in models.items():
        export.save(folder / "out/tiny/export" / name, model, tokenizer)
    (folder / "page.py").write_text("\n".join(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        variables = runpy.run_path(str(folder / "page.py"))
    return folder, variables, policy, tokenizer


def test_its_rewards_are_those_of_tools_score(page):
    """Of a pair, of a prompt with a response, and of messages"""
    folder, variables, _, _ = page
    prompt = variables["prompt"]
    lines = [
        {"prompt": prompt, "chosen": " Spend less.", "rejected": " No idea."},
        {"prompt": prompt, "response": " No idea."},
        {"messages": [QUESTION, {"role": "assistant", "content": "Spend less."}]},
    ]
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert score.main([f"--model={folder}/out/tiny/export/reward_flip", str(path)]) == 0
    scored = (folder / "mine.scored.jsonl").read_text().splitlines()
    pair, answer, dialogue = map(json.loads, scored)
    good, bad = variables["rewards"].tolist()
    assert abs(good - bad) > 1e-3
    assert (pair["reward_chosen"], pair["reward_rejected"]) == pytest.approx((good, bad), abs=1e-5)
    assert answer["reward"] == pytest.approx(bad, abs=1e-5)
    assert dialogue["reward"] == pytest.approx(float(variables["reward"]), abs=1e-5)
    assert dialogue["reward"] == pytest.approx(good, abs=1e-5)
    assert variables["scores"] == pytest.approx([good, bad], abs=1e-5)


def test_its_answer_is_that_of_the_policy(page):
    _, variables, policy, tokenizer = page
    ids = encode_prompt(tokenizer, variables["prompt"], 80)
    greedy = Sampling(max_new_tokens=48, eos_id=tokenizer.eos_id, temperature=0)
    tokens = generate(policy, [ids], greedy, torch.Generator()).tokens[0].tolist()
    answer = [token for token in tokens if token not in (-1, tokenizer.eos_id)]
    assert len(answer) > 3 and variables["answer"] == tokenizer.decode(answer)


def test_a_text_that_is_too_long_loses_its_beginning(page):
    _, variables, _, tokenizer = page
    prompt = "\n\nHuman: " + "save money " * 40 + "\n\nAssistant:"
    text = prompt + " Spend less." + tokenizer.eos
    ids = variables["tokenizer"](text, truncation=True)["input_ids"]
    whole = [*encode_prompt(tokenizer, prompt + " Spend less.", 1000), tokenizer.eos_id]
    assert len(whole) > 64 and ids == whole[-64:]
