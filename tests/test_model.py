"""model.py: branches, the Llama equations one number at a time, parameters, dropout, devices.

Most comparisons run the transformer in float64, so that a wrong mask or position stands out
against rounding whatever the processor.  The reward head computes in float32 all the same.
"""
import cmath
import dataclasses
import functools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import random_rows, tiny, tiny_reward
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Row, collate
from model import Attention, Shape, Transformer, branch_mask

EPS = torch.finfo(torch.float32).eps
# Two float64 evaluations of the tiny transformer in different orders.  Rounding of a chain of
# 3 layers x 7 products over at most 40 terms: 2 x 21 x 40 x 1.1e-16 = 2e-13 of numbers up to 5.
DOUBLE = 1e-12


@functools.cache
def reward_model(**shape):
    """A tiny reward model whose transformer computes in float64"""
    model = tiny_reward(**shape)
    model.model.double()
    return model


class Scores(NamedTuple):
    rewards: torch.Tensor   # (B, k) float32
    hidden: torch.Tensor    # (B, k, C) float64, what the rewards are computed from
    bound: float            # largest difference of two float32 evaluations of the head


@torch.no_grad()
def score(model, rows):
    return score_batch(model, collate(rows))


@torch.no_grad()
def score_batch(model, batch):
    rewards, hidden = model(
        batch.tokens, batch.branch, batch.position, batch.last, features=True
    )
    # A sum of C products: each evaluation rounds the C hidden states once and the sum C times, by
    # eps / 2 each, relative to the sum of absolute values.
    weight = model.score.weight.abs().to(hidden.dtype)
    sums = F.linear(hidden.abs(), weight)
    bound = (hidden.shape[-1] + 1) * EPS * sums.max().item()
    assert bound < 3e-5
    return Scores(rewards, hidden, bound)


def rewards_of(model, rows):
    batch = collate(rows)
    with torch.no_grad():
        return model(batch.tokens, batch.branch, batch.position, batch.last)


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def check_equal(one, other):
    """Check that two Scores are equal but for rounding."""
    close(one.hidden, other.hidden, DOUBLE)
    close(one.rewards, other.rewards, max(one.bound, other.bound))


def select(scores, index):
    return Scores(scores.rewards[index], scores.hidden[index], scores.bound)


# ----------------------------------------------------------------------------------------------
# Branches: one row of k responses is k rows of one


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("k", [1, 2, 5])
@settings(max_examples=8)
@given(seed=st.integers(0, 10 ** 6))
def test_rewards_of_a_row_are_those_of_each_response_alone(k, kv_heads, seed):
    model = reward_model(kv_heads=kv_heads)
    rows = random_rows(4, k, seed)
    together = score(model, rows)
    assert together.rewards.shape == (4, k)
    for b, row in enumerate(rows):
        for j, response in enumerate(row.responses):
            alone = score(model, [Row(row.prompt, (response,))])
            close(together.hidden[b, j], alone.hidden[0, 0], DOUBLE)
            close(together.rewards[b, j], alone.rewards[0, 0], together.bound)


def test_a_reward_is_float32_and_differs_between_responses():
    """Otherwise the equalities in this file would say nothing."""
    for model in (reward_model(), tiny_reward()):
        rewards = score(model, random_rows(20, 2, 0)).rewards
        assert rewards.dtype == torch.float32
        assert (rewards[:, 0] - rewards[:, 1]).abs().median() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reward_head_computes_in_float32(dtype):
    """Under autocast, too: bfloat16 would round a reward by eps / 2 = 0.4 %."""
    model = tiny_reward()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        rewards, hidden, bound = score(model, random_rows(20, 2, 0))
    assert rewards.dtype == torch.float32
    exact = F.linear(hidden.double(), model.score.weight.double())[..., 0]
    close(rewards.double(), exact, bound)


def test_float32_gives_the_rewards_of_float64():
    """Or nothing that is tested in float64 here would hold for training.

    The head's bound, and a transformer of 21 chained products over up to 40 terms whose roundings
    are of either sign: 21 x sqrt(40) x eps / 2 of hidden states, times the weights they meet.
    """
    rows = random_rows(12, 3, 0)
    exact = score(reward_model(kv_heads=2), rows)
    single = score(tiny_reward(kv_heads=2), rows)
    head = reward_model(kv_heads=2).score.weight
    size = exact.hidden.abs().max().item() * head.norm().item()
    close(single.rewards, exact.rewards, exact.bound + 21 * 40 ** 0.5 * EPS / 2 * size)


def test_a_reward_depends_on_every_token_of_its_branch_and_no_other():
    model = reward_model()
    row, = random_rows(1, 2, 3)
    base = rewards_of(model, [row])

    def change(tokens, i):
        changed = tokens.copy()
        changed[i] = (changed[i] + 1) % 24
        return changed

    for i in range(len(row.prompt)):
        rewards = rewards_of(model, [Row(change(row.prompt, i), row.responses)])
        assert ((rewards - base).abs() > 1e-5).all()
    first, second = row.responses
    for i in range(len(second)):
        rewards = rewards_of(model, [Row(row.prompt, (first, change(second, i)))])
        of_first, of_second = (rewards - base)[0].abs()
        assert of_first == 0
        assert of_second > 1e-5


@pytest.mark.parametrize("k", [1, 2, 5])
def test_rewards_do_not_depend_on_order_batch_size_or_neighbours(k):
    model = reward_model(kv_heads=2)
    rows = random_rows(12, k, 7)
    base = score(model, rows)
    order = torch.randperm(12)
    check_equal(score(model, [rows[i] for i in order]), select(base, order))
    for start in range(0, 12, 5):
        part = slice(start, start + 5)
        check_equal(score(model, rows[part]), select(base, part))
    others = score(model, rows[:1] + random_rows(9, k, 8))
    check_equal(select(others, [0]), select(base, [0]))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_padding_changes_no_reward(k):
    model = reward_model()
    batch = collate(random_rows(6, k, 11))
    base = score_batch(model, batch)
    padding = batch.tokens < 0
    assert padding.any()
    wider = batch._replace(
        tokens=F.pad(batch.tokens, (0, 9), value=-1),
        branch=None if k == 1 else F.pad(batch.branch, (0, 9), value=-1),
        position=F.pad(batch.position, (0, 9), value=0),
    )
    check_equal(score_batch(model, wider), base)
    poisoned = batch._replace(
        tokens=batch.tokens.where(~padding, torch.randint(24, padding.shape)),
        position=batch.position.where(~padding, torch.randint(64, padding.shape)),
    )
    check_equal(score_batch(model, poisoned), base)


# ----------------------------------------------------------------------------------------------
# The transformer against its definition, one number at a time


def may_attend(branch, query, key):
    if branch[query] < 0:
        return query == key
    return key <= query and branch[key] in (0, branch[query])


def rotated(x, position, theta):
    """Rotary embedding of one head's vector (D,): entries i and i + D/2 are one complex number,
    which turns at its own speed."""
    half = len(x) // 2
    z = []
    for i in range(half):
        angle = position * theta ** (-i / half)
        z.append(complex(x[i], x[i + half]) * cmath.exp(1j * angle))
    return torch.tensor([c.real for c in z] + [c.imag for c in z], dtype=x.dtype)


def explicit_attention(weights, x, branch, position, shape):
    """x: (T, C) -> (T, C), by loops over heads, queries and keys.  weights: of the four matrices"""
    T = len(x)
    D = shape.width // shape.heads
    q, k, v = ((x @ weights[f"{name}_proj.weight"].T).view(T, -1, D) for name in "qkv")
    y = torch.zeros(T, shape.heads, D, dtype=x.dtype)
    for h in range(shape.heads):
        g = h // (shape.heads // shape.kv_heads)  # neighbouring query heads share a key head
        keys = [rotated(k[t, g], position[t], shape.rope_theta) for t in range(T)]
        for t in range(T):
            query = rotated(q[t, h], position[t], shape.rope_theta)
            attended = [s for s in range(T) if may_attend(branch, t, s)]
            scores = torch.stack([query @ keys[s] / math.sqrt(D) for s in attended])
            for weight, s in zip(scores.softmax(0), attended):
                y[t, h] += weight * v[s, g]
    return y.view(T, -1) @ weights["o_proj.weight"].T


def with_prefix(weights, prefix):
    """The part of a state dict whose names begin so, without that beginning"""
    part = {}
    for name, value in weights.items():
        if name.startswith(prefix):
            part[name.removeprefix(prefix)] = value
    return part


def explicit_transformer(weights, tokens, branch, position, shape):
    """Hidden states (T, C) of one row, from the Llama equations"""
    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + shape.norm_eps).sqrt() * weight

    x = torch.zeros(len(tokens), shape.width, dtype=torch.float64)
    for i, token in enumerate(tokens):
        if token >= 0:
            x[i] = weights["embed_tokens.weight"][token]
    for i in range(shape.layers):
        layer = with_prefix(weights, f"layers.{i}.")
        h = norm(x, layer["input_layernorm.weight"])
        x = x + explicit_attention(with_prefix(layer, "self_attn."), h, branch, position, shape)
        h = norm(x, layer["post_attention_layernorm.weight"])
        gate = h @ layer["mlp.gate_proj.weight"].T
        up = h @ layer["mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ layer["mlp.down_proj.weight"].T
    return norm(x, weights["norm.weight"])


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_the_transformer_is_its_definition(kv_heads):
    """Only the angles are float32: position x frequency, cosine and sine, 3 roundings of up to eps.

    They move a score of attention by as much, relatively, in each of 3 layers: 9 eps of the hidden
    states, doubled for their effect on the next layers.
    """
    model = reward_model(kv_heads=kv_heads).model
    batch = collate(random_rows(3, 2, 5))
    hidden = model(batch.tokens, batch.branch, batch.position)
    for b in range(3):
        expected = explicit_transformer(
            model.state_dict(), batch.tokens[b].tolist(), batch.branch[b].tolist(),
            batch.position[b].tolist(), model.shape,
        )
        is_real = batch.tokens[b] >= 0
        close(hidden[b][is_real], expected[is_real], 18 * EPS * expected.abs().max().item())


@torch.no_grad()
def test_attention_is_an_explicit_softmax():
    shape = Shape(vocab=1, heads=4, kv_heads=2, width=16)
    attention = Attention(shape).double()
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    branch = [0, 0, 1, 1, 2, 2, -1]
    position = [0, 1, 2, 3, 2, 3, 0]
    frequency = torch.tensor([10_000 ** (-i / 2) for i in (0, 1, 0, 1)], dtype=torch.float64)
    angle = torch.tensor(position)[None, :, None] * frequency
    y = attention(x, (angle.cos(), angle.sin()), branch_mask(torch.tensor([branch])))
    expected = explicit_attention(attention.state_dict(), x[0], branch, position, shape)
    close(y[0], expected, 1e-12)


def test_branch_mask_is_its_definition():
    branch = torch.tensor([
        [0, 0, 1, 1, 2, 3, -1, -1],
        [0, 1, 1, 1, 1, 2, 3, 3],
        [0, 0, 0, 1, 2, 3, 3, -1],
    ])
    out_pos = torch.tensor([[3, 5], [0, 7], [6, 6]])
    mask = branch_mask(branch)
    part = branch_mask(branch, out_pos)
    assert mask.shape == (3, 1, 8, 8)
    assert part.shape == (3, 1, 2, 8)
    for b, row in enumerate(branch.tolist()):
        expected = []
        for query in range(8):
            expected.append([may_attend(row, query, key) for key in range(8)])
        assert mask[b, 0].tolist() == expected
        assert part[b, 0].tolist() == [expected[query] for query in out_pos[b].tolist()]


@pytest.mark.parametrize("k", [1, 3])  # without and with a branch mask
@torch.no_grad()
def test_few_output_positions_are_the_whole_computation_gathered(k):
    model = reward_model(kv_heads=2).model
    batch = collate(random_rows(5, k, 2))
    T = batch.tokens.shape[1]
    out_pos = torch.randint(T, (5, 6)).where(torch.rand(5, 6) < 0.9, 0)  # any order, some twice
    whole = model(batch.tokens, batch.branch, batch.position)
    part = model(batch.tokens, batch.branch, batch.position, out_pos)
    assert part.shape == (5, 6, 32)
    is_real = torch.gather(batch.tokens, 1, out_pos) >= 0
    expected = torch.stack([whole[b, out_pos[b]] for b in range(5)])
    close(part[is_real], expected[is_real], DOUBLE)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits():
    model = tiny().double()
    tokens = torch.randint(24, (2, 12))
    base = model(tokens)
    for t in (0, 5, 11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 24
        difference = (model(changed) - base).abs().amax(-1)
        assert (difference[:, :t] < DOUBLE).all()
        assert (difference[:, t:] > 1e-4).all()


@torch.no_grad()
def test_embeddings_computed_before_stand_for_the_tokens():
    """inputs_embeds replaces the embedding, whatever the tokens are."""
    model = tiny().double()
    tokens = torch.randint(24, (2, 12))
    embeds = model.model.embed(tokens)
    close(model(torch.zeros_like(tokens), inputs_embeds=embeds), model(tokens), DOUBLE)
    padded = tokens.clone()
    padded[1, 9:] = -1
    assert (model.model.embed(padded)[1, 9:] == 0).all()


# ----------------------------------------------------------------------------------------------
# Parameters


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_parameters_have_hugging_face_names_and_shapes():
    block = {
        "input_layernorm.weight": (32,),
        "self_attn.q_proj.weight": (32, 32),
        "self_attn.k_proj.weight": (16, 32),
        "self_attn.v_proj.weight": (16, 32),
        "self_attn.o_proj.weight": (32, 32),
        "post_attention_layernorm.weight": (32,),
        "mlp.gate_proj.weight": (40, 32),
        "mlp.up_proj.weight": (40, 32),
        "mlp.down_proj.weight": (32, 40),
    }
    body = {"model.embed_tokens.weight": (24, 32), "model.norm.weight": (32,)}
    for i in range(3):
        for name, shape in block.items():
            body[f"model.layers.{i}.{name}"] = shape
    llama_for_causal_lm = body | {"lm_head.weight": (24, 32)}
    assert shapes_of(tiny(kv_heads=2, tied=False)) == llama_for_causal_lm
    llama_for_sequence_classification = body | {"score.weight": (1, 32)}
    assert shapes_of(tiny_reward(kv_heads=2)) == llama_for_sequence_classification


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_share_memory(tied):
    model = tiny(tied=tied)
    output = model.lm_head.weight.data_ptr()
    assert (output == model.model.embed_tokens.weight.data_ptr()) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied


def test_init_weights_depends_on_the_generator_alone():
    def weights(seed):
        return torch.cat([parameter.flatten() for parameter in tiny(seed=seed).parameters()])

    first = weights(3)
    torch.rand(5)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_init_weights_scales_by_width_and_depth():
    """10,240 weights each: their standard deviation is within 1 / sqrt(2 x 10,240) = 0.7 %."""
    model = tiny(width=64, hidden=160, layers=2)
    std = 128 ** -0.5
    first, second = model.model.layers.values()
    assert first.mlp.up_proj.weight.std().item() == pytest.approx(std, rel=0.05)
    assert second.mlp.down_proj.weight.std().item() == pytest.approx(std / 2, rel=0.05)
    assert second.self_attn.q_proj.weight.std().item() == pytest.approx(std, rel=0.05)
    assert second.self_attn.o_proj.weight.std().item() == pytest.approx(std / 2, rel=0.05)


# ----------------------------------------------------------------------------------------------
# Dropout


def test_without_dropout_two_passes_in_train_mode_are_equal():
    model = tiny_reward().train()
    rows = random_rows(4, 2, 0)
    assert torch.equal(rewards_of(model, rows), rewards_of(model, rows))


def test_with_dropout_two_passes_differ_in_train_mode_alone():
    model = tiny_reward(dropout=0.3).train()
    rows = random_rows(4, 2, 0)
    assert ((rewards_of(model, rows) - rewards_of(model, rows)).abs() > 1e-4).all()
    model.eval()
    assert torch.equal(rewards_of(model, rows), rewards_of(model, rows))
    assert torch.equal(rewards_of(model, rows), rewards_of(tiny_reward(), rows))


@pytest.mark.parametrize("without", ["blocks", "embedding"])
def test_dropout_is_on_the_embedding_and_in_the_blocks(without):
    model = tiny_reward(dropout=0.3).train()
    rows = random_rows(4, 2, 0)
    if without == "blocks":
        for block in model.model.layers.values():
            block.dropout = 0.0
    else:
        model.model.shape = dataclasses.replace(model.shape, dropout=0.0)
    assert not torch.equal(rewards_of(model, rows), rewards_of(model, rows))


# ----------------------------------------------------------------------------------------------
# Devices: `meta` has no data, and refuses to be mixed with the CPU


@pytest.mark.parametrize("k", [1, 2])
def test_a_reward_step_makes_no_tensor_on_another_device(k):
    model = tiny_reward(kv_heads=2, dropout=0.1).train().to("meta")
    batch = collate(random_rows(4, k, 0)).to("meta")
    rewards = model(batch.tokens, batch.branch, batch.position, batch.last)
    assert rewards.device.type == "meta"
    assert rewards.shape == (4, k)
    rewards.sum().backward()
    assert {parameter.grad.device.type for parameter in model.parameters()} == {"meta"}


def test_a_language_model_step_makes_no_tensor_on_another_device():
    model = tiny(kv_heads=2).train().to("meta")
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    for out_pos in (None, tokens[:, :2]):
        logits = model(tokens, out_pos=out_pos)
        assert logits.device.type == "meta"
        logits.sum().backward()


def test_a_head_may_be_wider_than_its_share_of_the_width():
    shape = Shape(24, width=32, heads=4, head=12)
    assert shape.head_width == 12
    assert Shape(24, width=32, heads=4).head_width == 8
    attention = Transformer(shape).layers["0"].self_attn
    assert attention.q_proj.out_features == 48
    assert attention.o_proj.in_features == 48
