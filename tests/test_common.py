"""common.py: seeds, device, optimizer, saved models, rows, scoring, sampling.

The run is one without any training: a tokenizer and an initialised model in a folder.
"""
import json
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, FakeRun, random_rows, same, tiny, tiny_reward, write_pairs

import common
import config
import world
from common import (
    compile_blocks,
    encode_set,
    load_model,
    make_optimizer,
    make_sampling,
    member_names,
    pick_device,
    pick_dtype,
    policy_prompts,
    reward_diffs,
    reward_model_from_sft,
    sample_answers,
    save_model,
    score_rows,
    seed_from,
    set_lr,
    sft_rows,
    strip_eos,
    training_prompts,
)
from config import ConfigError
from data import DataError, Pair, collate, encode_prompt
from generate import Sampling, generate
from model import LanguageModel, RewardModel, init_weights
from runtime.run import open_run
from tokenizer import train_tokenizer

EPS = torch.finfo(torch.float32).eps
WORDS = [
    "threads=1", "world.pairs=30", "world.valid=12", "world.demonstrations=20", "model.context=256",
    "ppo.max_new_tokens=12",
]


def settings(*words):
    return config.load(overrides=[word.split("=", 1) for word in (*WORDS, *words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, an SFT model that is not trained, and a reward model"""
    folder = tmp_path_factory.mktemp("run")
    rows, _ = world.pairs(30, 0, world.Noise())
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], 300)
    (folder / "encoding.json").write_text(tokenizer.to_json())
    run = open_run(settings(f"out_dir={folder}"))
    shape = dict(vocab=300, context=256, kv_heads=2, tied=False)
    save_model(run, "sft", tiny(**shape))
    save_model(run, "reward_baseline", tiny_reward(seed=1, **shape))
    return folder


@pytest.fixture
def run(folder):
    return open_run(settings(f"out_dir={folder}"))


def run_with(folder, *words):
    return open_run(settings(f"out_dir={folder}", *words))


def test_seeds_never_change():
    """Or nothing that an old run trained could be trained again.  Values of revision e442778."""
    assert seed_from("0 reward 3") == 9699323712064701281
    assert seed_from("1 member_02 é") == 5077462213491639977


# ----------------------------------------------------------------------------------------------
# Device and precision


def has_cuda(monkeypatch, answer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: answer)


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch):
    has_cuda(monkeypatch, False)
    assert pick_device(settings()).type == "cpu"
    has_cuda(monkeypatch, True)
    assert pick_device(settings()).type == "cuda"
    assert pick_device(settings("device=cuda")).type == "cuda"
    assert pick_device(settings("device=cpu")).type == "cpu"


def test_a_missing_gpu_is_one_line(monkeypatch):
    has_cuda(monkeypatch, False)
    with pytest.raises(ConfigError, match="device = 'cuda': .* use device=cpu") as error:
        pick_device(settings("device=cuda"))
    assert "\n" not in str(error.value)


def test_the_precision_is_float32_on_a_cpu_and_half_on_a_gpu(monkeypatch):
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    assert pick_dtype(settings(), cpu) == torch.float32
    assert pick_dtype(settings("dtype=bf16"), cpu) == torch.bfloat16
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
        assert pick_dtype(settings(), cuda) == dtype
    assert pick_dtype(settings("dtype=float32"), cuda) == torch.float32
    assert pick_dtype(settings("dtype=fp16"), cuda) == torch.float16
    with pytest.raises(ConfigError, match="dtype = 'fp16': on CPU use float32 or bf16"):
        pick_dtype(settings("dtype=fp16"), cpu)


# ----------------------------------------------------------------------------------------------
# Optimizer


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_weight_decay_is_on_matrices_only(name):
    model = tiny_reward()
    extra = torch.nn.Parameter(torch.ones(3, 4))  # a matrix, such as SwAV's prototypes
    optimizer = make_optimizer(model, name, 0.01, 0.1, [extra])
    decay = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in decay
            decay[id(parameter)] = group["weight_decay"]
        assert group["lr"] == 0.01
    assert decay.pop(id(extra)) == 0
    for parameter in model.parameters():
        assert decay.pop(id(parameter)) == (0.1 if parameter.dim() > 1 else 0)
    assert decay == {}


def test_adamw_has_the_betas_of_large_language_models():
    """(0.9, 0.95), as in GPT-3 (arXiv 2005.14165) and Llama; torch's default is 0.999."""
    optimizer = make_optimizer(tiny_reward(), "adamw", 0.01, 0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2


def test_steps_of_sgd_grow_with_the_gradient():
    """Two steps with momentum 0.9: lr (g + (0.9 g + g)); AdamW's do not depend on the scale of g"""
    for name, ratio in (("sgd", 10.0), ("adamw", 1.0)):
        moved = []
        for scale in (1.0, 10.0):
            model = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.zeros_(model.weight)
            optimizer = make_optimizer(model, name, 0.5, 0.0)
            for _ in range(2):
                model.weight.grad = torch.full((1, 1), 0.25 * scale)
                optimizer.step()
            moved.append(-float(model.weight.detach()))
        assert moved[1] / moved[0] == pytest.approx(ratio)
        if name == "sgd":
            assert moved[0] == pytest.approx(0.5 * 0.25 * (1 + 1.9))


def test_a_step_of_adamw_is_its_equations():
    """Two steps in float64 numbers, with decay of the matrix and without for the vector:

        p <- p (1 - lr decay);  m, v <- averages of g, g^2 with beta 0.9, 0.95
        p <- p - lr m^ / (sqrt(v^) + 1e-8),  m^ and v^ corrected for their start at 0
    """
    model = torch.nn.Linear(3, 2)
    start = {}
    for name, parameter in model.named_parameters():
        start[name] = parameter.detach().double()
    optimizer = make_optimizer(model, "adamw", 0.5, 0.1)
    gradients = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}
    for step in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.1 if name == "weight" else 0.0
        p = start[name]
        m = torch.zeros_like(p)
        v = torch.zeros_like(p)
        for step in range(2):
            g = gradients[name][step].double()
            m = 0.9 * m + 0.1 * g
            v = 0.95 * v + 0.05 * g ** 2
            m_hat = m / (1 - 0.9 ** (step + 1))
            v_hat = v / (1 - 0.95 ** (step + 1))
            p = p * (1 - 0.5 * decay) - 0.5 * m_hat / (v_hat.sqrt() + 1e-8)
        # about 12 float32 roundings a step, of numbers up to about 2
        torch.testing.assert_close(parameter.detach().double(), p, atol=2 * 12 * 2 * EPS, rtol=0)


def test_set_lr_changes_all_groups():
    optimizer = make_optimizer(tiny_reward(), "adamw", 0.01, 0.1)
    assert set_lr(optimizer, 0.25) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# ----------------------------------------------------------------------------------------------
# Models


def test_a_saved_model_is_checked_without_the_compiler():
    """Its import takes seconds, in every process that loads a model."""
    code = """if True:
        import sys, torch
        from model import RewardModel, Shape
        with torch.device("meta"):
            model = RewardModel(Shape(vocab=8, layers=1, heads=1, kv_heads=1, width=8, hidden=8))
        assert model.model.embed_tokens.weight.requires_grad
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("kind", [LanguageModel, RewardModel])
def test_a_saved_model_is_loaded_in_eval_mode(run, kind):
    model = tiny(kind, vocab=300, context=256, kv_heads=1, dropout=0.5).train()
    save_model(run, "one", model)
    loaded = load_model(run, kind, "one")
    assert not loaded.training
    assert loaded.shape == model.shape
    assert same(loaded.state_dict(), model.state_dict())


def saved_state(kind=RewardModel, **shape):
    model = tiny(kind, vocab=300, context=256, kv_heads=1)
    return {"shape": asdict(model.shape) | shape, "model": model.state_dict()}


@pytest.mark.parametrize("state", [
    torch.zeros(2, 30), [], {}, {"shape": 3, "model": {}}, saved_state(LanguageModel),
    saved_state(width=64), saved_state(layers=10 ** 9), saved_state(heads=0),
    saved_state(width="a"), saved_state(depth=3), saved_state(vocab=-1),
    saved_state() | {"model": {"score.weight": 1}}, saved_state() | {"model": None},
], ids=[
    "tensor", "list", "nothing", "shape of a number", "language model", "other width",
    "many layers", "no heads", "text for a width", "unknown size", "negative size", "number",
    "no weights",
])
@pytest.mark.filterwarnings("error")
def test_a_file_that_holds_no_model_of_the_kind_is_named(run, state):
    run.save_tensors("other.pt", state)
    with pytest.raises(OSError, match="other.pt: holds no RewardModel; delete it and run"):
        load_model(run, RewardModel, "other")


def test_a_model_of_an_older_version_names_neither_itself_nor_its_vocabulary(run):
    run.save_tensors("old.pt", saved_state())
    load_model(run, RewardModel, "old")


def test_reward_models_start_from_sft_with_one_head(run, folder):
    sft = load_model(run, LanguageModel, "sft")
    model = reward_model_from_sft(run)
    assert same(model.model.state_dict(), sft.model.state_dict())
    expected = init_weights(RewardModel(sft.shape), torch.Generator().manual_seed(run.cfg.seed))
    assert torch.equal(model.score.weight, expected.score.weight)
    torch.rand(3)  # the head depends on run.cfg.seed alone
    assert torch.equal(reward_model_from_sft(run).score.weight, model.score.weight)
    other_seed = reward_model_from_sft(run_with(folder, "seed=1"))
    assert not torch.equal(other_seed.score.weight, model.score.weight)


def test_a_reward_model_may_change_the_shape(run):
    model = reward_model_from_sft(run, dropout=0.25)
    plain = reward_model_from_sft(run)
    assert model.shape.dropout == 0.25 and plain.shape.dropout == 0
    assert {block.dropout for block in model.model.layers.values()} == {0.25}
    assert same(model.state_dict(), plain.state_dict())


def test_blocks_are_compiled_once_for_all_and_share_their_parameters(monkeypatch):
    """Six blocks make two graphs: of the last one, which has fewer queries, and of the others."""
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    compile_anything = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda block, dynamic: compile_anything(block, backend=counter,
                                                                  dynamic=dynamic))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    model = tiny_reward(layers=6).train()
    compiled = compile_blocks(model)
    assert torch._dynamo.config.recompile_limit == 64  # dropout, sizes, one pair: more than 8
    for seed in (1, 2, 3):  # of other lengths
        batch = collate(random_rows(3, 2, seed=seed))
        arguments = (batch.tokens, batch.branch, batch.position, batch.last)
        torch.testing.assert_close(compiled(*arguments), model(*arguments))
    assert counter.frame_count == 2
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in model.parameters()]
    assert compiled.uncompiled[0] is model


def test_members_are_numbered_from_zero():
    assert member_names(settings("ensemble.members=3")) == ["member_00", "member_01", "member_02"]


# ----------------------------------------------------------------------------------------------
# Rows


PAIRS = [
    Pair("\n\nHuman: A?\n\nAssistant:", " yes", " no", source="f:1"),
    Pair("\n\nHuman: A?\n\nAssistant:", " no", " no", source="f:2"),
    Pair("\n\nHuman: B?\n\nAssistant:", " no", " no", source="f:3"),
    Pair("\n\nHuman: B?\n\nAssistant:", " no" * 300, " no", source="f:4"),
    Pair("\n\nHuman: B?\n\nAssistant:", " no", " yes", source="f:5"),
]


def test_dropped_pairs_are_counted_and_listed(run, capsys):
    encoded = encode_set(run, "mine", PAIRS)
    assert encoded.pairs == [PAIRS[0], PAIRS[4]]
    assert len(encoded.rows) == 2
    path = run.path("dropped_mine.jsonl")
    with open(path) as file:
        listed = [json.loads(line) for line in file]
    assert [line["source"] for line in listed] == ["f:2", "f:3", "f:4"]
    assert "identical" in listed[0]["reason"]
    head, *reasons = capsys.readouterr().out.splitlines()
    assert head == f"data: mine: 2 pairs kept, 3 dropped, all listed in {path}"
    assert [reason.split(":", 2)[:2] for reason in reasons] == [
        ["  2 like f", "2"], ["  1 like f", "4"],
    ]


def test_workers_do_not_report_dropped_pairs_again(folder, capsys):
    run = open_run(settings(f"out_dir={folder}"), slot=1)
    assert len(encode_set(run, "silent", PAIRS).rows) == 2
    assert capsys.readouterr().out == ""
    assert not (folder / "dropped_silent.jsonl").exists()


def test_a_set_without_a_usable_pair_is_an_error(run):
    with pytest.raises(DataError, match="^f:2: chosen and .*; no pair of mine is left$") as error:
        encode_set(run, "mine", PAIRS[1:4])
    assert "\n" not in str(error.value)
    assert encode_set(run, "mine", []).rows == []


def test_sft_trains_on_the_worlds_demonstrations_or_on_chosen_responses(folder, tmp_path):
    def text(tokens):
        return run.tokenizer.decode(tokens.tolist())

    run = run_with(folder, "world.p_right=0.5")
    rows = sft_rows(run)
    demos = world.demonstrations(20, 0, 0.5, items=run.cfg.world.items)
    assert len(rows) == 20
    for row, demo in zip(rows, demos):
        response, = row.responses
        assert text(response[:-1]) == demo["response"]
        assert demo["prompt"].endswith(text(row.prompt))

    path = write_pairs(tmp_path / "pairs.jsonl", 40)
    run = run_with(folder, f"data.train={path}")
    rows = sft_rows(run)
    assert len(rows) == len(run.train.pairs) < 40
    for row, pair in zip(rows, run.train.pairs):
        response, = row.responses
        assert text(response[:-1]) == pair.chosen


def test_sft_learns_the_held_out_domains_that_ppo_trains_on(folder):
    plain = sft_rows(run_with(folder))
    run = run_with(folder, "ppo.domains=programs,arithmetic", "world.demonstrations=30")
    rows = sft_rows(run)
    assert len(rows) == 30 + 2 * 30 // len(world.TRAIN_DOMAINS)
    assert len(plain) == 20
    last = run.tokenizer.decode(rows[30].prompt.tolist())
    assert "rogram" in last  # "Write a program"


# ----------------------------------------------------------------------------------------------
# Scoring


def score_alone(model, row):
    batch = collate([row])
    with torch.no_grad():
        return model(
            batch.tokens, batch.branch, batch.position, batch.last, features=True
        )


def test_scores_come_in_the_order_of_the_rows(run):
    """Rows are sorted by length and scored in batches, of 32 on a CPU."""
    model = tiny_reward()
    model.model.double()
    rows = random_rows(300, 2, 0)
    rewards = score_rows(run, model, rows)
    hidden = score_rows(run, model, rows, features=True)
    assert rewards.shape == (300, 2) and hidden.shape == (300, 2, 32)
    assert rewards.dtype == hidden.dtype == torch.float32
    assert not rewards.requires_grad
    weight = model.score.weight[0].abs().double()
    for i in range(0, 300, 7):
        expected_rewards, expected_hidden = score_alone(model, rows[i])
        # hidden states are float64 rounded to float32; the head: see test_model.py
        torch.testing.assert_close(hidden[i].double(), expected_hidden[0], atol=1e-12, rtol=EPS)
        bound = 33 * EPS * (expected_hidden.abs() @ weight).max().item()
        torch.testing.assert_close(rewards[i], expected_rewards[0], atol=bound, rtol=0)


def test_rows_of_a_pass_may_have_different_numbers_of_answers(run):
    """The caller may say which rows share a pass; a row has its rewards in front."""
    model = tiny_reward()
    rows = random_rows(9, 3, 0) + random_rows(5, 1, 1)
    index_batches = [np.array([0, 13, 1, 2]), np.arange(9, 13), np.arange(3, 9)]
    rewards = score_rows(run, model, rows, index_batches=index_batches)
    assert rewards.shape == (14, 3)
    for row, mine in zip(rows, rewards):
        alone = score_rows(run, model, [row])[0]
        torch.testing.assert_close(mine[:len(alone)], alone)


def test_reward_diffs_are_chosen_less_rejected(run):
    model = load_model(run, RewardModel, "reward_baseline")
    rows = random_rows(9, 2, 0)
    rewards = score_rows(run, model, rows)
    assert torch.equal(reward_diffs(run, model, rows), rewards[:, 0] - rewards[:, 1])
    assert torch.equal(reward_diffs(run, "reward_baseline", rows), rewards[:, 0] - rewards[:, 1])
    assert reward_diffs(run, "missing", []).shape == (0,)


# ----------------------------------------------------------------------------------------------
# Sampling


def test_ppo_trains_on_the_training_prompts_or_on_new_ones_of_its_domains(folder):
    run = run_with(folder)
    assert training_prompts(run) == run.train.pairs
    run = run_with(folder, "ppo.domains=programs")
    pairs = training_prompts(run)
    assert len(pairs) == 30
    assert all("rogram" in pair.prompt for pair in pairs)
    # the seed string keeps the word that it had when it was first used
    demos = world.demonstrations(30, "0 asked", domains=("programs",))
    assert [pair.prompt for pair in pairs] == [demo["prompt"] for demo in demos]


def test_prompts_of_a_policy_are_distinct_and_leave_room_for_the_response(run):
    long = "\n\nHuman: " + "Why so? " * 200 + "\n\nAssistant:"
    texts = ["\n\nHuman: B?\n\nAssistant:", long, "\n\nHuman: A?\n\nAssistant:"]
    pairs = [Pair(text, "", "") for text in (*texts, *reversed(texts))]
    prompts = policy_prompts(run, pairs)
    assert [text for text, _ in prompts] == texts
    room = 256 - 12 - 1
    for text, ids in prompts:
        assert ids == encode_prompt(run.tokenizer, text, room)
    assert len(prompts[1][1]) == room


SECTIONS = ("ppo", "meta", "evaluate")


@pytest.mark.parametrize("section", SECTIONS)
def test_sampling_takes_its_settings_from_the_section(section):
    """Every setting of one section differs from those of the others and from the default."""
    words = ["ppo.min_new_tokens=3", "ppo.max_new_tokens=11"]
    for i, name in enumerate(SECTIONS):
        words.append(f"{name}.temperature={0.5 + i / 8}")
        words.append(f"{name}.top_p={0.25 + i / 8}")
        words.append(f"{name}.repetition_penalty={1.25 + i / 8}")
    cfg = settings(*words)
    run = FakeRun(cfg=cfg, tokenizer=SimpleNamespace(eos_id=7, end_ids=[7]))
    i = SECTIONS.index(section)
    assert make_sampling(run, getattr(cfg, section)) == Sampling(
        max_new_tokens=11, eos_id=7, temperature=0.5 + i / 8, top_p=0.25 + i / 8,
        repetition_penalty=1.25 + i / 8, min_new_tokens=3,
    )


@pytest.mark.parametrize("section, top_p, penalty", [
    ("ppo", 1.0, 1.0), ("evaluate", 0.9, 1.0), ("meta", 0.9, 1.1),  # 0.9 and 1.1 are the paper's
])
def test_sampling_by_default(section, top_p, penalty):
    cfg = settings()
    run = FakeRun(cfg=cfg, tokenizer=SimpleNamespace(eos_id=7, end_ids=[7]))
    sampling = make_sampling(run, getattr(cfg, section))
    assert (sampling.top_p, sampling.repetition_penalty) == (top_p, penalty)
    assert sampling.min_new_tokens == 0


@pytest.fixture
def prompts(run):
    return policy_prompts(run, run.train.pairs)[:10]


@pytest.mark.parametrize("section", SECTIONS)
def test_top_p_and_repetition_penalty_of_a_section_reach_the_sampler(folder, section):
    """A tiny top_p leaves only the likeliest token; a large penalty leaves hardly a token twice.
    """
    words = {"plain": "1", "top_p": "0.001", "repetition_penalty": "100"}
    texts = {}
    rows = {}
    for name, value in words.items():
        key = "repetition_penalty" if name == "plain" else name
        run = run_with(
            folder, f"{section}.top_p=1", f"{section}.repetition_penalty=1",
            f"{section}.{key}={value}", f"{section}.temperature=0.1", "ppo.min_new_tokens=11",
        )
        prompts = policy_prompts(run, run.train.pairs)[:10]
        sampling = make_sampling(run, getattr(run.cfg, section))
        texts[name], rows[name] = sample_answers(run, "sft", prompts, 0, sampling)
    greedy = Sampling(12, run.tokenizer.eos_id, temperature=0, min_new_tokens=11)
    greedy_texts, _ = sample_answers(run, "sft", prompts, 0, greedy)
    assert texts["top_p"] == greedy_texts != texts["plain"]
    assert num_repeated(rows["plain"]) > 20
    assert num_repeated(rows["repetition_penalty"]) < 5


def num_repeated(rows):
    """Number of response tokens that the prompt or the response has before"""
    count = 0
    for row in rows:
        before = set(row.prompt.tolist())
        for token in row.responses[0].tolist():
            count += token in before
            before.add(token)
    return count


def test_answers_are_those_of_generate_without_eos(run, prompts):
    sampling = make_sampling(run, run.cfg.ppo)
    texts, rows = sample_answers(run, "sft", prompts, 3, sampling, num_samples=2)
    policy = load_model(run, LanguageModel, "sft")
    ids = [ids for _, ids in prompts]
    generation = generate(policy, ids, sampling, torch.Generator().manual_seed(3), 2)
    responses = strip_eos(generation.tokens, sampling)
    assert texts == [run.tokenizer.decode(response) for response in responses]
    assert len(rows) == 10
    for i, row in enumerate(rows):
        assert row.prompt.tolist() == ids[i]
        own = responses[2 * i:2 * i + 2]
        expected = [[*response, run.tokenizer.eos_id] for response in own]
        assert [response.tolist() for response in row.responses] == expected


def test_answers_to_many_prompts_continue_one_generator(run, prompts):
    """64 prompts x 2 samples are sampled at once: the next ones draw what comes after them."""
    sampling = make_sampling(run, run.cfg.ppo)
    many = (prompts * 7)[:66]
    texts, _ = sample_answers(run, "sft", many, 5, sampling, num_samples=2)
    generator = torch.Generator().manual_seed(5)
    first, _ = sample_answers(run, "sft", many[:64], generator, sampling, num_samples=2)
    rest, _ = sample_answers(run, "sft", many[64:], generator, sampling, num_samples=2)
    assert texts == first + rest
    again, _ = sample_answers(run, "sft", many, 5, sampling, num_samples=2)
    other, _ = sample_answers(run, "sft", many, 6, sampling, num_samples=2)
    assert texts == again != other


def test_prompts_that_are_answered_together_are_of_similar_length(run, monkeypatch):
    batches_seen = []

    def recorded(policy, prompt_ids, *arguments):
        batches_seen.append([len(ids) for ids in prompt_ids])
        return generate(policy, prompt_ids, *arguments)

    monkeypatch.setattr(common, "generate", recorded)
    ids = run.train.rows[0].prompt.tolist()
    prompts = []
    for number in range(150):
        length = 3 if number % 2 else len(ids)
        prompts.append((f"prompt {number}", ids[:length]))
    _, rows = sample_answers(run, "sft", prompts, 0, make_sampling(run, run.cfg.ppo))
    assert [len(row.prompt) for row in rows] == [len(ids) for _, ids in prompts]
    assert batches_seen == [[3] * 75 + [len(ids)] * 53, [len(ids)] * 22]


def test_eos_and_padding_are_stripped():
    tokens = torch.tensor([[3, 5, 7], [7, -1, -1], [3, 7, -1]])
    assert strip_eos(tokens, Sampling(9, 7)) == [[3, 5], [], [3]]


def test_a_closed_response_ends_with_one_eos(run, prompts):
    sampling = make_sampling(run, run.cfg.ppo)._replace(max_new_tokens=40)
    _, rows = sample_answers(run, "sft", prompts, 0, sampling)
    lengths = []
    for row in rows:
        response, = row.responses
        assert isinstance(response, np.ndarray)
        assert (response == run.tokenizer.eos_id).sum() == 1
        assert response[-1] == run.tokenizer.eos_id
        lengths.append(len(response))
    assert max(lengths) <= 41
