import cmath
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import loop
from data import Row, collate
from helpers import random_rows, tiny, tiny_reward
from losses import bradley_terry
from model import Attention, Shape, branch_mask, sample, sampling_logits

cached = functools.cache(tiny_reward)


@torch.no_grad()
def rewards(model, rows):
    batch = collate(rows)
    return model(*batch[:3], read=batch.last)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Branches: one row of k responses is k rows of one

@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("k", [1, 2, 5])
@settings(max_examples=8)
@given(seed=st.integers(0, 10 ** 6))
def test_rewards_of_a_row_are_those_of_each_response_alone(k, kv_heads, seed):
    model, rows = cached(kv_heads=kv_heads), random_rows(4, k, seed)
    together = rewards(model, rows)
    assert together.shape == (4, k)
    alone = torch.cat([rewards(model, [Row(row.prompt, (response,))]) for row in rows for response in row.responses])
    close(together.flatten(), alone.flatten())


def test_a_reward_is_float32_and_differs_between_responses():
    """Otherwise the equalities in this file would say nothing."""
    r = rewards(cached(), random_rows(20, 2, 0))
    assert r.dtype == torch.float32
    assert (r[:, 0] - r[:, 1]).abs().median() > 0.05


def test_a_reward_depends_on_every_token_it_may_see():
    model, (row,) = cached(), random_rows(1, 2, 3)
    other = lambda tokens, i: [(t + 1) % 24 if j == i else t for j, t in enumerate(tokens)]
    base = rewards(model, [row])
    for i in range(len(row.prompt)):
        assert ((rewards(model, [Row(other(row.prompt, i), row.responses)]) - base).abs() > 1e-5).all()
    for i in range(len(row.responses[1])):
        change = (rewards(model, [Row(row.prompt, (row.responses[0], other(row.responses[1], i)))]) - base)[0].abs()
        assert change[0] == 0 and change[1] > 1e-5


@pytest.mark.parametrize("k", [1, 2, 5])
def test_rewards_do_not_move_with_order_size_or_neighbours(k):
    model, rows = cached(kv_heads=2), random_rows(12, k, 7)
    base = rewards(model, rows)
    order = torch.randperm(12)
    close(rewards(model, [rows[i] for i in order]), base[order])
    close(torch.cat([rewards(model, rows[i:i + 5]) for i in range(0, 12, 5)]), base)
    close(rewards(model, rows[:1] + random_rows(9, k, 8))[:1], base[:1])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_padding_is_seen_by_nobody(k):
    model, batch = cached(), collate(random_rows(6, k, 11))
    padding = batch.tokens < 0
    assert padding.any()
    wider = [None if part is None else F.pad(part, (0, 9), value=value) for part, value in zip(batch[:3], (-1, -1, 0))]
    poisoned = batch.tokens.where(~padding, torch.randint(24, padding.shape))
    elsewhere = batch.position.where(~padding, torch.randint(64, padding.shape))
    with torch.no_grad():
        base = model(*batch[:3], read=batch.last)
        close(model(*wider, read=batch.last), base)
        close(model(poisoned, batch.branch, elsewhere, read=batch.last), base)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer against its definition, one number at a time

def may_look(branch, query, key):
    if branch[query] < 0:
        return query == key
    return key <= query and branch[key] in (0, branch[query])


def turned(x, position, theta):
    """Rotary embedding of one head's vector: entries i and i + D/2 are one complex number, turned by its own speed."""
    half = len(x) // 2
    z = [complex(x[i], x[i + half]) * cmath.exp(1j * position * theta ** (-i / half)) for i in range(half)]
    return torch.tensor([c.real for c in z] + [c.imag for c in z], dtype=x.dtype)


def explicit_attention(w, prefix, x, branch, position, shape):
    """x: (T, C) -> (T, C), by loops over heads, queries and keys"""
    T, D = len(x), shape.width // shape.heads
    q, k, v = ((x @ w[f"{prefix}.{name}_proj.weight"].T).view(T, -1, D) for name in "qkv")
    y = torch.zeros(T, shape.heads, D, dtype=x.dtype)
    for h in range(shape.heads):
        g = h // (shape.heads // shape.kv_heads)  # neighbouring query heads share a key head
        keys = [turned(k[t, g], position[t], shape.rope_theta) for t in range(T)]
        for t in range(T):
            seen = [s for s in range(T) if may_look(branch, t, s)]
            query = turned(q[t, h], position[t], shape.rope_theta)
            weight = torch.stack([query @ keys[s] / math.sqrt(D) for s in seen]).softmax(0)
            y[t, h] = sum(a * v[s, g] for a, s in zip(weight, seen))
    return y.view(T, -1) @ w[f"{prefix}.o_proj.weight"].T


def explicit_transformer(w, tokens, branch, position, shape):
    """Hidden states of one row, from the Llama equations."""
    norm = lambda x, name: x / (x.square().mean(-1, keepdim=True) + shape.norm_eps).sqrt() * w[name]
    x = torch.stack([w["embed_tokens.weight"][t] if t >= 0 else torch.zeros(shape.width) for t in tokens])
    for i in range(shape.layers):
        p = f"layers.{i}"
        x = x + explicit_attention(w, f"{p}.self_attn", norm(x, f"{p}.input_layernorm.weight"), branch, position, shape)
        h = norm(x, f"{p}.post_attention_layernorm.weight")
        gate = h @ w[f"{p}.mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ w[f"{p}.mlp.up_proj.weight"].T)) @ w[f"{p}.mlp.down_proj.weight"].T
    return norm(x, "norm.weight")


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_the_transformer_is_its_definition(kv_heads):
    model = cached(kv_heads=kv_heads).model
    batch = collate(random_rows(3, 2, 5))
    hidden = model(*batch[:3])
    for b in range(3):
        expected = explicit_transformer(model.state_dict(), batch.tokens[b].tolist(), batch.branch[b].tolist(),
                                        batch.position[b].tolist(), model.shape)
        real = batch.tokens[b] >= 0
        close(hidden[b][real], expected[real])


@torch.no_grad()
def test_attention_is_an_explicit_softmax():
    shape = Shape(vocab=1, heads=4, kv_heads=2, width=16)
    attention, x = Attention(shape).double(), torch.randn(1, 7, 16, dtype=torch.float64)
    branch, position = [0, 0, 1, 1, 2, 2, -1], [0, 1, 2, 3, 2, 3, 0]
    angle = torch.tensor([[p * 10_000 ** (-i / 2) for i in (0, 1, 0, 1)] for p in position], dtype=torch.float64)[None]
    y = attention(x, (angle.cos(), angle.sin()), branch_mask(torch.tensor([branch])))
    w = {f"self_attn.{name}": value for name, value in attention.state_dict().items()}
    close(y[0], explicit_attention(w, "self_attn", x[0], branch, position, shape), 1e-12)


def test_branch_mask_is_its_definition():
    branch = torch.tensor([[0, 0, 1, 1, 2, 3, -1, -1], [0, 1, 1, 1, 1, 2, 3, 3], [0, 0, 0, 1, 2, 3, 3, -1]])
    mask = branch_mask(branch)
    assert mask.shape == (3, 1, 8, 8)
    for b, row in enumerate(branch.tolist()):
        assert mask[b, 0].tolist() == [[may_look(row, q, t) for t in range(8)] for q in range(8)]
    read = torch.tensor([[3, 5], [0, 7], [6, 6]])
    for b, row in enumerate(branch.tolist()):
        assert branch_mask(branch, read)[b, 0].tolist() == [[may_look(row, q, t) for t in range(8)] for q in read[b].tolist()]


@pytest.mark.parametrize("k", [1, 3])  # without and with a branch mask
@torch.no_grad()
def test_reading_few_positions_is_the_whole_computation_gathered(k):
    model, batch = cached(kv_heads=2).model, collate(random_rows(5, k, 2))
    read = torch.randint(batch.tokens.shape[1], (5, 6)).where(torch.rand(5, 6) < 0.9, 0)  # in any order, some twice
    whole, part = model(*batch[:3]), model(*batch[:3], read=read)
    assert part.shape == (5, 6, 32)
    real = torch.gather(batch.tokens, 1, read) >= 0
    close(part[real], torch.stack([whole[b, read[b]] for b in range(5)])[real], 1e-6)


@torch.no_grad()
def test_later_tokens_do_not_move_earlier_logits():
    model, tokens = tiny(), torch.randint(24, (2, 12))
    base = model(tokens)
    for t in (0, 5, 11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 24
        difference = (model(changed) - base).abs().amax(-1)
        assert (difference[:, :t] < 1e-6).all() and (difference[:, t:] > 1e-4).all()


# ---------------------------------------------------------------------------------------------------------------------
# Parameters, dropout, devices

def test_parameters_have_hugging_face_names_and_shapes():
    block = {"input_layernorm.weight": (32,), "self_attn.q_proj.weight": (32, 32), "self_attn.k_proj.weight": (16, 32),
             "self_attn.v_proj.weight": (16, 32), "self_attn.o_proj.weight": (32, 32), "post_attention_layernorm.weight": (32,),
             "mlp.gate_proj.weight": (40, 32), "mlp.up_proj.weight": (40, 32), "mlp.down_proj.weight": (32, 40)}
    body = {"model.embed_tokens.weight": (24, 32), "model.norm.weight": (32,)}
    body |= {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in block.items()}
    shapes = lambda model: {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes(tiny(kv_heads=2, tied=False)) == body | {"lm_head.weight": (24, 32)}  # LlamaForCausalLM
    assert shapes(tiny_reward(kv_heads=2)) == body | {"score.weight": (1, 32)}           # LlamaForSequenceClassification


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_share_memory(tied):
    model = tiny(tied=tied)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied


def test_init_weights_depends_on_the_generator_alone():
    flat = lambda seed: torch.cat([p.flatten() for p in tiny(seed=seed).parameters()])
    first = flat(3)
    torch.rand(5)
    assert torch.equal(first, flat(3)) and not torch.equal(first, flat(4))


def test_init_weights_scales_by_width_and_depth():
    model = tiny(width=64, hidden=160, layers=2)
    std = 128 ** -0.5
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.model.layers[1].mlp.down_proj.weight.std().item() == pytest.approx(std / 2, rel=0.05)


def test_without_dropout_two_passes_in_train_mode_are_equal():
    model, rows = tiny_reward().train(), random_rows(4, 2, 0)
    assert torch.equal(rewards(model, rows), rewards(model, rows))


def test_with_dropout_two_passes_differ_in_train_mode_alone():
    model, rows = tiny_reward(dropout=0.3).train(), random_rows(4, 2, 0)
    assert ((rewards(model, rows) - rewards(model, rows)).abs() > 1e-4).all()
    model.eval()
    assert torch.equal(rewards(model, rows), rewards(model, rows))
    assert torch.equal(rewards(model, rows), rewards(tiny_reward(), rows))


@pytest.mark.parametrize("quiet", ["blocks", "embedding"])
def test_dropout_is_on_the_embedding_and_in_the_blocks(quiet):
    model, rows = tiny_reward(dropout=0.3).train(), random_rows(4, 2, 0)
    if quiet == "blocks":
        for block in model.model.layers:
            block.dropout = 0.0
    else:
        model.model.shape = dataclasses.replace(model.shape, dropout=0.0)
    assert not torch.equal(rewards(model, rows), rewards(model, rows))


@pytest.mark.parametrize("k", [1, 2])
def test_a_reward_step_makes_no_tensor_on_another_device(k):
    """`meta` has no data, and refuses to be mixed with the CPU."""
    model, batch = tiny_reward(kv_heads=2, dropout=0.1).train().to("meta"), collate(random_rows(4, k, 0)).to("meta")
    r = model(*batch[:3], read=batch.last)
    assert r.device.type == "meta" and r.shape == (4, k)
    r.sum().backward()
    assert all(p.grad.device.type == "meta" for p in model.parameters())


def test_a_language_model_step_makes_no_tensor_on_another_device():
    model, tokens = tiny(kv_heads=2).train().to("meta"), torch.zeros(2, 5, dtype=torch.int64, device="meta")
    for logits in (model(tokens), model(tokens, read=tokens[:, :2])):
        assert logits.device.type == "meta"
        logits.sum().backward()


def test_pair_loss_sums_bradley_terry_over_the_batch():
    model, rows = cached(), random_rows(6, 2, 1)
    margin, p = torch.randn(6), torch.rand(6)
    loss, extra = loop.pair_loss(model, rows, margin, p)
    chosen, rejected = rewards(model, rows).unbind(1)
    close(loss, bradley_terry(chosen, rejected, margin, p).sum())
    assert extra["accuracy"] == (chosen > rejected).sum()
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    model.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: the distribution

def declared(logits, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0, seen=()):
    """The distribution to draw from, one token at a time -> list of probabilities.  Without ties."""
    x = [(l / penalty if l > 0 else l * penalty) if i in seen else l for i, l in enumerate(logits)]
    order = sorted(range(len(x)), key=lambda i: -x[i])
    if temperature == 0:
        return [float(i == order[0]) for i in range(len(x))]
    weight = {i: math.exp((x[i] - x[order[0]]) / temperature) for i in order[:top_k or None]}
    total, before, kept = sum(weight.values()), 0.0, {}
    for i, w in weight.items():  # from the likeliest on, until top_p is reached
        if top_p == 1.0 or before < top_p:
            kept[i] = w
        before += w / total
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(x))]


WAYS = [dict(), dict(temperature=0.5), dict(temperature=0), dict(top_k=3), dict(top_p=0.6), dict(penalty=1.5),
        dict(temperature=0.7, top_k=5, top_p=0.8, penalty=1.3)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_sampling_logits_is_its_definition(way):
    logits = 2 * torch.randn(20, 9)
    seen = torch.rand(20, 9) < 0.4
    names = {"penalty": "repetition_penalty"}
    p = sampling_logits(logits, **{names.get(k, k): v for k, v in way.items()}, seen=seen).exp()
    for b in range(20):
        close(p[b], torch.tensor(declared(logits[b].tolist(), **way, seen=seen[b].nonzero()[:, 0].tolist())))


def test_truncations_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    of = lambda **way: sampling_logits(logits, **way).exp()[0]
    close(of(top_k=2), torch.tensor([0, 4 / 7, 3 / 7, 0]))
    close(of(top_k=4), of())
    close(of(top_p=0.3), torch.tensor([0, 1.0, 0, 0]))                  # the likeliest is always kept
    close(of(top_p=0.5), torch.tensor([0, 4 / 7, 3 / 7, 0]))            # the token that crosses top_p is kept
    close(of(top_k=3, top_p=0.7), torch.tensor([0, 4 / 7, 3 / 7, 0]))   # of the three, 7/9 is enough


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]])
    close(sampling_logits(logits, repetition_penalty=2.0, seen=seen), torch.tensor([[1.0, -4.0, 1.0]]).log_softmax(-1))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: the loop

# The matrices are not tied here, or every token's likeliest successor would be itself.
writer = functools.cache(lambda **shape: tiny(tied=False, seed=1, **shape))
NEVER = -9  # an end-of-text that no model says
PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], [9, 8], [5, 5, 5, 5, 20, 21, 22, 23, 0, 1, 2], [7, 1, 7]]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def naive_greedy(model, prompt, max_new, end):
    answer = []
    while len(answer) < max_new and end not in answer:
        answer.append(int(model(torch.tensor([prompt + answer]))[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("max_new", [1, 15])
def test_greedy_sampling_with_a_cache_is_the_naive_loop(kv_heads, max_new):
    model = writer(kv_heads=kv_heads)
    prompts = PROMPTS + random_prompts(25)
    endless = [naive_greedy(model, p, max_new, NEVER) for p in prompts]
    assert len(set(map(tuple, endless))) > 10  # the model does not say one thing to all
    end = endless[1][max_new // 2]  # some rows end, at different steps
    drawn = sample(model, prompts, max_new, end, generator(), temperature=0)
    expected = [naive_greedy(model, p, max_new, end) for p in prompts]
    assert drawn.tokens.tolist() == [answer + [-1] * (max_new - len(answer)) for answer in expected]
    assert drawn.ended.tolist() == [answer[-1] == end for answer in expected]
    assert drawn.ended.any() and (max_new == 1 or not drawn.ended.all())
    assert (drawn.logprob == 0).all()  # the likeliest token is certain


def random_prompts(n, seed=4):
    return [row.prompt.tolist() for row in random_rows(n, 1, seed)]


@pytest.mark.parametrize("way", WAYS, ids=str)
@torch.no_grad()
def test_logprobs_are_those_of_the_declared_distribution(way):
    """Also after rows have left the batch: of 30 answers many end early."""
    model, prompts = writer(kv_heads=2), PROMPTS + random_prompts(25)
    names = {"penalty": "repetition_penalty"}
    drawn = sample(model, prompts, 10, 4, generator(), **{names.get(k, k): v for k, v in way.items()})
    for prompt, answer, logprob in zip(prompts, drawn.tokens.tolist(), drawn.logprob):
        answer = [t for t in answer if t >= 0]
        logits = model(torch.tensor([prompt + answer]))[0].tolist()
        for i, token in enumerate(answer):
            p = declared(logits[len(prompt) + i - 1], **way, seen=prompt + answer[:i])
            assert logprob[i].item() == pytest.approx(math.log(p[token]), abs=1e-4)


@pytest.mark.parametrize("way", [dict(), dict(repetition_penalty=1.5, min_new=3)], ids=str)
def test_several_answers_to_a_prompt_are_those_to_so_many_copies_of_it(way):
    model = writer()
    once = sample(model, PROMPTS, 12, 4, generator(), copies=3, **way)
    copied = sample(model, [p for p in PROMPTS for _ in range(3)], 12, 4, generator(), **way)
    assert torch.equal(once.tokens, copied.tokens) and torch.equal(once.ended, copied.ended) and len(set(map(tuple, once.tokens.tolist()))) > 10
    close(once.logprob, copied.logprob)


@torch.no_grad()
def test_an_answer_does_not_depend_on_its_neighbours():
    model = writer()
    first = sample(model, PROMPTS, 12, 4, generator())
    assert first.ended.any() and not first.ended.all()
    other = [PROMPTS[0], [2] * 20, PROMPTS[2], [6], [11, 12]]  # rows 0 and 2 keep their prompt and their place
    second = sample(model, other, 12, 4, generator())
    for row in (0, 2):
        assert torch.equal(first.tokens[row], second.tokens[row])
        close(first.logprob[row], second.logprob[row])
    assert not torch.equal(first.tokens[1], second.tokens[1])


def test_an_answer_ends_with_its_first_end_of_text():
    drawn = sample(writer(), [[i % 24] for i in range(200)], 20, 4, generator())
    ends = 0
    for tokens, logprob, ended in zip(drawn.tokens.tolist(), drawn.logprob, drawn.ended.tolist()):
        n = tokens.index(-1) if -1 in tokens else len(tokens)
        assert ended == (4 in tokens) and n > 0
        assert 4 not in tokens[:n - 1] and (n == 20 or tokens[n - 1] == 4)
        assert tokens[n:] == [-1] * (20 - n) and (logprob[n:] == 0).all() and (logprob[:n] < 0).all()
        ends += ended
    assert 20 < ends < 200


def test_sampling_stays_within_the_length_limit_and_fills_the_context():
    drawn = sample(writer(), [[1] * 60, [2]], 4, NEVER, generator())
    assert drawn.tokens.shape == drawn.logprob.shape == (2, 4)
    assert (drawn.tokens >= 0).all() and not drawn.ended.any()


def test_more_than_the_context_is_refused():
    with pytest.raises(ValueError, match="60 prompt tokens . 5 new ones exceed the context of 64"):
        sample(writer(), [[1] * 60, [2]], 5, NEVER, generator())


def test_sampling_draws_from_its_generator_alone():
    state = torch.get_rng_state()
    draw = lambda seed: sample(writer(), PROMPTS, 8, NEVER, generator(seed)).tokens
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("way", [dict(), dict(temperature=0.5, top_k=4)], ids=str)
@torch.no_grad()
def test_frequencies_of_two_tokens_are_their_probabilities(way):
    """Chi-square over all 36 pairs of tokens."""
    n, model = 6000, tiny(vocab=6, layers=2, width=16, tied=False)
    drawn = sample(model, [[2, 3]] * n, 2, NEVER, generator(), **way)
    counts = torch.zeros(6, 6).index_put_(tuple(drawn.tokens.T), torch.ones(n), accumulate=True)
    p = torch.zeros(6, 6)
    for a, first in enumerate(declared(model(torch.tensor([[2, 3]]))[0, -1].tolist(), **way)):
        p[a] = first * torch.tensor(declared(model(torch.tensor([[2, 3, a]]))[0, -1].tolist(), **way))
    assert (counts[p == 0] == 0).all()
    chi_square = ((counts - n * p) ** 2 / (n * p))[p > 0].sum().item()
    freedom = int((p > 0).sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # mean and four standard deviations
    assert counts.max() < 0.9 * n
