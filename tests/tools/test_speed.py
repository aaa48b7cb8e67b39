"""python -m tools.bench without words: every kind of work runs, and the table is complete."""
import numpy as np
import pytest
import torch
from helpers import one_line

from tools import bench, floors, speed

STEPS = [
    "reward model, 16 pairs",
    "... simcse",
    "... simcse on differences",
    "... swav, K = 50, a queue of 256",
    "... swav on differences, K = 20",
    "... MetaRM, first order",
    "... MetaRM, second order",
    "SFT, 16 answers",
]
OTHERS = [
    "sampling, answers: 1",
    "sampling, answers: 16",
    "sampling, answers: 64",
    "sampling, answers: 256",
    "PPO, rollout of 64 answers",
    "PPO, update",
]


@pytest.fixture(scope="module")
def data():
    data = speed.make_data(torch.device("cpu"), num_pairs=40)
    small = speed.replace(data.shape, width=16, hidden=24, heads=2, kv_heads=1)
    return data._replace(shape=small)


def test_the_table_has_a_line_for_each_kind_of_work(data, capsys):
    speed.compare_works(data, rounds=2)
    where, head, *lines, note = capsys.readouterr().out.splitlines()
    assert where.startswith("2 layers of width 16, cpu")
    assert head.split()[:4] == ["work", "ms", "products", "ratio"]
    assert [line[:36].rstrip() for line in lines] == STEPS + OTHERS
    for name, line in zip(STEPS + OTHERS, lines):
        milliseconds, products, ratio, _, *multiple = line[36:].split()
        assert min(float(milliseconds), float(products), float(ratio)) > 0
        assert len(multiple) == (name in STEPS[:-1])  # steps of reward models alone
    assert lines[0].split()[-1] == "1.00"


@pytest.mark.parametrize("kind", STEPS)
def test_each_step_changes_the_model_and_stays_finite(data, kind, monkeypatch):
    models = []
    build = speed.init_weights

    def remember(model, generator):
        models.append(build(model, generator))
        return models[-1]

    monkeypatch.setattr(speed, "init_weights", remember)
    step = speed.make_works(data)[kind]
    model = models[STEPS.index(kind)]
    before = [p.detach().clone() for p in model.parameters()]
    step()
    for old, new in zip(before, model.parameters()):
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)


def test_all_steps_of_reward_models_train_on_the_same_pairs(data, monkeypatch):
    """A multiple within a round compares equal work."""
    seen = []
    pair_loss = speed.pair_loss

    def remember(model, rows, *more):
        seen.append([id(row) for row in rows])
        return pair_loss(model, rows, *more)

    monkeypatch.setattr(speed, "pair_loss", remember)
    works = speed.make_works(data)
    for name in STEPS[:-1]:
        works[name]()
    assert len(seen) == len(STEPS) - 1 and all(ids == seen[0] for ids in seen)
    works[STEPS[0]]()
    assert seen[-1] != seen[0]


def test_answers_end_after_a_third_of_the_limit_in_the_median(data):
    policy = speed.make_policy(data)
    prompts = speed.make_prompts(data, 400)
    assert len(prompts) == 400
    assert all(prompts[i] == prompts[i + 1] == prompts[i + 3] for i in range(0, 400, 4))
    sampling = speed.Sampling(speed.LIMIT, data.eos_id)
    answers = speed.generate(policy, prompts, sampling, torch.Generator().manual_seed(0))
    lengths = (answers.tokens >= 0).sum(1).numpy()
    third = speed.LIMIT / 3
    # standard error of a median, 1 / (2 density sqrt(n)): a geometric law of this median has a
    # density of ln 2 / (2 third) there, so 1.25 third / sqrt(400), and one token for rounding
    assert abs(np.median(lengths) - third) < 4 * 1.25 * third / 20 + 1


def test_products_of_a_known_function_are_recorded_and_run_again():
    a = torch.randn(5, 7, requires_grad=True)
    b = torch.randn(7, 3)

    def work():
        ((a @ b) ** 2).sum().backward()  # one product forward, one backward: b needs no gradient

    with floors.Products() as products:
        work()
    shapes = [operands[0][0] for _, operands in products.calls]
    assert sum(count for count, _ in products.calls.values()) == 2
    assert sorted(map(tuple, shapes)) == [(5, 3), (5, 7)]

    again = floors.record_products(work)
    with floors.Products() as products:
        again()
    assert sum(count for count, _ in products.calls.values()) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_attention_of_prompts_is_a_product_of_sampling_too(mode):
    q = torch.randn(1, 2, 6, 4)
    with mode(), floors.Products() as products:
        for is_causal in (True, False):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=is_causal)
    counts = [count for (function, _), (count, _) in products.calls.items()
              if "scaled_dot_product" in function.overloadpacket.__name__]
    assert counts == [1, 1]  # apart, since they cost differently


def test_seconds_have_a_row_for_each_round_after_the_warm_up():
    calls = []
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = speed.time_works(works, torch.device("cpu"), rounds=3, warmup=2)
    assert seconds.shape == (3, 2, 2) and (seconds >= 0).all()
    assert calls == ["a", "b"] * 6  # once to record the products, and five rounds


@pytest.mark.parametrize("words, part", [
    (["cpu"], "must be gpu"),
    (["--layers=two"], "must be gpu"),
    (["--layers=0"], "at least 1"),
    (["--width=20"], "multiple of 8"),
])
def test_wrong_words_are_one_line(words, part, capsys):
    assert bench.main(words) == 2
    one_line(capsys, part)
