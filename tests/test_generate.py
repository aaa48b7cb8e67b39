"""generate.py: the distribution that is sampled from, and the loop with its KV cache.

Models compute in float64 here, so that the naive loop and the one with a cache choose the same
tokens on every processor.  sampling_probs itself is float32, as in training.
"""
import contextlib
import functools
import math

import pytest
import torch
from helpers import random_rows, tiny

import generate as generate_module
from generate import (
    Decoder,
    KVCache,
    Sampling,
    draw,
    generate,
    pad_prompts,
    sampling_probs,
    tokens_seen,
)
from model import attend_last

EPS = torch.finfo(torch.float32).eps
NEVER = -9  # an EOS that no model samples
PROMPTS = [
    [3],
    [1, 2, 3, 4, 5, 6, 7],
    [9, 8],
    [5, 5, 5, 5, 20, 21, 22, 23, 0, 1, 2],
    [7, 1, 7],
]
OPTIONS = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=0),
    dict(top_p=0.6),
    dict(repetition_penalty=1.5),
    dict(temperature=0.7, top_p=0.8, repetition_penalty=1.3),
]


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ----------------------------------------------------------------------------------------------
# The distribution


def declared(logits, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seen=()):
    """The distribution to sample from, one token at a time -> list of V probabilities; no ties

    logits: list; seen: tokens of the prompt and of the response so far
    """
    x = list(logits)
    for i in set(seen):
        x[i] = x[i] / repetition_penalty if x[i] > 0 else x[i] * repetition_penalty

    def minus_logit(i):
        return -x[i]

    order = sorted(range(len(x)), key=minus_logit)
    if temperature == 0:
        return [float(i == order[0]) for i in range(len(x))]
    weight = [math.exp((x[i] - x[order[0]]) / temperature) for i in range(len(x))]
    kept = [0.0] * len(x)
    mass_before = 0.0
    for i in order:  # from the likeliest on, until top_p is reached
        if top_p == 1.0 or mass_before < top_p:
            kept[i] = weight[i]
        mass_before += weight[i] / sum(weight)
    return [w / sum(kept) for w in kept]


def rounding(logits, temperature=1.0, top_p=1.0, repetition_penalty=1.0):
    """Largest error of a float32 log-probability, and of a probability, of sampling_probs

    logits: of any shape, V in the last dimension.  The logits are rounded three times (to float32,
    by the penalty, by the temperature) relative to their size; the sum of V exponentials, its
    logarithm and the difference add V + 4 roundings.  Each is at most eps / 2.
    """
    if temperature == 0:
        return 0.0
    size = logits.abs().max().item() * repetition_penalty / temperature
    bound = EPS / 2 * (3 * size + size + logits.shape[-1] + 4)
    assert bound < 1e-5
    return bound


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sampling_probs_are_their_definition(options):
    logits = 2 * torch.randn(20, 9)
    seen = torch.rand(20, 9) < 0.4
    p = sampling_probs(logits, **options, seen=seen)
    for b in range(20):
        seen_tokens = seen[b].nonzero()[:, 0].tolist()
        expected = torch.tensor(declared(logits[b].tolist(), **options, seen=seen_tokens))
        close(p[b], expected, rounding(logits, **options))


def test_top_p_by_hand():
    p = [0.1, 0.4, 0.3, 0.2]
    logits = torch.tensor([p]).log()
    expected = {
        1.0: p,
        0.3: [0.0, 1.0, 0.0, 0.0],                # the likeliest token is always kept
        0.5: [0.0, 4 / 7, 3 / 7, 0.0],            # the token that crosses top_p is kept
        0.8: [0.0, 4 / 9, 3 / 9, 2 / 9],
        0.95: p,
    }
    for top_p in expected:
        kept = sampling_probs(logits, top_p=top_p)[0]
        close(kept, torch.tensor(expected[top_p]), rounding(logits))


def test_top_p_over_a_large_vocabulary():
    """Kept are the likeliest tokens, of which all but the last have less mass than top_p."""
    sizes = {8.0: (1, 511), 1.0: (513, 4095), 0.1: (4097, 6000)}  # by the spread of the logits
    logits = torch.tensor(list(sizes))[:, None] * torch.randn(3, 6000)
    p = logits.double().softmax(-1)
    kept = sampling_probs(logits, top_p=0.9) > 0
    for row, is_kept, (least, most) in zip(p, kept, sizes.values()):
        assert least <= is_kept.sum() <= most
        assert row[is_kept].min() >= row[~is_kept].max()
        mass = row[is_kept].sum()
        assert mass - row[is_kept].min() - 6000 * EPS < 0.9 < mass + 6000 * EPS


def test_top_p_applies_after_the_temperature():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    p = torch.tensor([0.1, 0.4, 0.3, 0.2]) ** 4
    assert p[1] / p.sum() > 0.7 > 0.4
    kept = sampling_probs(logits, temperature=0.25, top_p=0.7)[0]
    assert kept.tolist() == [0, 1, 0, 0]


def test_a_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    p = sampling_probs(logits, repetition_penalty=2.0, seen=seen)
    expected = torch.tensor([[1.0, -4.0, 1.0]]).softmax(-1)
    close(p, expected, rounding(logits, repetition_penalty=2.0))


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(3, 9).bfloat16()
    options = dict(temperature=0.7, top_p=0.9)
    p = sampling_probs(logits, **options)
    assert p.dtype == torch.float32
    assert torch.equal(p, sampling_probs(logits.float(), **options))


def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_the_noise():
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(6, 4)
    noise = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 1e-12], dtype=torch.float64)
    assert draw(p, noise[:, None])[:, 0].tolist() == [0, 0, 2, 2, 3, 3]


def test_a_last_token_of_small_probability_can_be_drawn():
    """The cumulative sum is float64: in float32 it would be 1 before this token."""
    p = torch.tensor([[1 - 1e-9, 1e-9]]).expand(2, 2)
    noise = torch.tensor([[1 - 2e-9], [1 - 0.5e-9]], dtype=torch.float64)
    assert draw(p, noise)[:, 0].tolist() == [0, 1]


# ----------------------------------------------------------------------------------------------
# The loop


@functools.cache
def writer(**shape):
    """Embeddings are not tied here, or every token's likeliest successor would be itself."""
    return tiny(tied=False, seed=1, **shape).double()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(model, prompts, max_new_tokens, eos_id, seed=0, num_samples=1, **options):
    sampling = Sampling(max_new_tokens, eos_id, **options)
    return generate(model, prompts, sampling, generator(seed), num_samples)


def random_prompts(n, seed=4):
    return [row.prompt.tolist() for row in random_rows(n, 1, seed)]


@torch.no_grad()
def naive_greedy(model, prompt, max_new_tokens):
    answer = []
    while len(answer) < max_new_tokens:
        logits = model(torch.tensor([prompt + answer]))[0, -1]
        answer.append(int(logits.argmax()))
    return answer


def up_to(answer, eos_id):
    """What remains of a greedy answer that ends with its first eos_id"""
    return answer[:answer.index(eos_id) + 1] if eos_id in answer else answer


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("max_new_tokens", [1, 15])
def test_greedy_sampling_with_a_cache_is_the_naive_loop(kv_heads, max_new_tokens):
    model = writer(kv_heads=kv_heads)
    prompts = PROMPTS + random_prompts(25)
    endless = [naive_greedy(model, prompt, max_new_tokens) for prompt in prompts]
    assert len(set(map(tuple, endless))) > 10  # the model does not answer all prompts alike
    eos_id = endless[1][max_new_tokens // 2]   # some rows end, at different steps
    generation = sampled(model, prompts, max_new_tokens, eos_id, temperature=0)
    expected = [up_to(answer, eos_id) for answer in endless]
    padded = [answer + [-1] * (max_new_tokens - len(answer)) for answer in expected]
    assert generation.tokens.tolist() == padded
    assert generation.ended.tolist() == [answer[-1] == eos_id for answer in expected]
    assert generation.ended.any()
    assert max_new_tokens == 1 or not generation.ended.all()
    assert (generation.logprob == 0).all()  # the likeliest token is certain


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_log_probabilities_are_those_of_the_declared_distribution(options):
    """Also after rows have left the batch: of 30 responses many end early."""
    model = writer(kv_heads=2)
    prompts = PROMPTS + random_prompts(25)
    generation = sampled(model, prompts, 10, 4, **options)
    for prompt, tokens, logprob in zip(prompts, generation.tokens.tolist(), generation.logprob):
        response = [t for t in tokens if t >= 0]
        logits = model(torch.tensor([prompt + response]))[0]
        for i, token in enumerate(response):
            seen = prompt + response[:i]
            p = declared(logits[len(seen) - 1].tolist(), **options, seen=seen)
            expected = pytest.approx(math.log(p[token]), abs=rounding(logits, **options))
            assert logprob[i].item() == expected


MORE_OPTIONS = [dict(), dict(repetition_penalty=1.5, min_new_tokens=3)]


@pytest.mark.parametrize("options", MORE_OPTIONS, ids=str)
def test_several_samples_of_a_prompt_are_those_of_as_many_copies_of_it(options):
    model = writer()
    copies = []
    for prompt in PROMPTS:
        copies += [prompt] * 3
    once = sampled(model, PROMPTS, 12, 4, num_samples=3, **options)
    copied = sampled(model, copies, 12, 4, **options)
    assert torch.equal(once.tokens, copied.tokens)
    assert torch.equal(once.ended, copied.ended)
    assert len(set(map(tuple, once.tokens.tolist()))) > 10
    close(once.logprob, copied.logprob, 1e-5)


def test_any_of_several_ends_ends_a_response():
    """The same noise: a response is cut at the first of the ends, none of which comes early."""
    model = writer()
    whole = sampled(model, PROMPTS, 12, 4).tokens.tolist()
    other = next(row[1] for row in whole if row[1] not in (-1, 4))
    several = sampled(model, PROMPTS, 12, 4, more_eos=(other,))
    for row, cut, ended in zip(whole, several.tokens.tolist(), several.ended.tolist()):
        expected = []
        for token in row:
            if token >= 0:
                expected.append(token)
            if token in (4, other):
                break
        assert [token for token in cut if token >= 0] == expected
        assert ended == (expected[-1] in (4, other))
    late = sampled(model, PROMPTS, 12, 4, more_eos=(other,), min_new_tokens=5)
    assert not torch.isin(late.tokens[:, :5], torch.tensor([4, other])).any()


def test_a_prompt_that_is_given_several_times_is_computed_once():
    model = writer()
    rows = []
    model.model.layers["0"].register_forward_hook(lambda block, args, out: rows.append(len(out)))
    sampled(model, PROMPTS * 2, 2, 4)
    distinct = len(set(map(tuple, PROMPTS)))
    assert rows[0] == distinct and max(rows[1:]) > distinct


@torch.no_grad()
def test_a_response_does_not_depend_on_its_neighbours():
    model = writer()
    first = sampled(model, PROMPTS, 12, 4)
    assert first.ended.any() and not first.ended.all()
    # rows 0 and 2 keep their prompt and their place
    other = [PROMPTS[0], [2] * 20, PROMPTS[2], [6], [11, 12]]
    second = sampled(model, other, 12, 4)
    for row in (0, 2):
        assert torch.equal(first.tokens[row], second.tokens[row])
        close(first.logprob[row], second.logprob[row], 1e-5)
    assert not torch.equal(first.tokens[1], second.tokens[1])


def test_a_response_ends_with_its_first_eos():
    generation = sampled(writer(), [[i % 24] for i in range(200)], 20, 4)
    tokens = generation.tokens.tolist()
    for row, logprob, ended in zip(tokens, generation.logprob, generation.ended.tolist()):
        n = row.index(-1) if -1 in row else len(row)
        assert n > 0
        assert ended == (4 in row)
        assert 4 not in row[:n - 1]
        assert n == 20 or row[n - 1] == 4
        assert row[n:] == [-1] * (20 - n)
        assert (logprob[:n] < 0).all()
        assert (logprob[n:] == 0).all()
    assert 20 < generation.ended.sum() < 200


def test_no_response_ends_before_min_new_tokens():
    model = tiny(tied=False, seed=1)
    model.lm_head.weight.data[4] = 30 * torch.randn(32).sign()  # every other response ends at once
    shortest = {}
    for n in (0, 4):
        generation = sampled(model.double(), random_prompts(40), 7, 4, min_new_tokens=n)
        lengths = []
        for row in generation.tokens.tolist():
            response = [t for t in row if t >= 0]
            assert 4 not in response[:n]
            lengths.append(len(response))
        assert generation.logprob.isfinite().all()
        shortest[n] = min(lengths)
    assert shortest == {0: 1, 4: 5}  # EOS itself is the fifth token


def test_sampling_stays_within_the_length_limit_and_fills_the_context():
    generation = sampled(writer(), [[1] * 60, [2]], 4, NEVER)
    assert generation.tokens.shape == generation.logprob.shape == (2, 4)
    assert (generation.tokens >= 0).all()
    assert not generation.ended.any()


def test_more_than_the_context_is_refused():
    message = "60 prompt tokens . 5 new ones exceed the context of 64"
    with pytest.raises(ValueError, match=message):
        sampled(writer(), [[1] * 60, [2]], 5, NEVER)


def test_sampling_draws_from_its_generator_alone():
    def tokens(seed):
        return sampled(writer(), PROMPTS, 8, NEVER, seed=seed).tokens

    state = torch.get_rng_state()
    assert torch.equal(tokens(1), tokens(1))
    assert not torch.equal(tokens(1), tokens(2))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.5, top_p=0.8)], ids=str)
@torch.no_grad()
def test_frequencies_of_two_tokens_are_their_probabilities(options):
    """Chi-square over all 36 pairs of tokens"""
    n = 6000
    model = tiny(vocab=6, layers=2, width=16, tied=False).double()
    generation = sampled(model, [[2, 3]] * n, 2, NEVER, **options)
    counts = torch.zeros(6, 6)
    for first, second in generation.tokens.tolist():
        counts[first, second] += 1
    p = torch.zeros(6, 6)
    p_first = declared(model(torch.tensor([[2, 3]]))[0, -1].tolist(), **options)
    for a in range(6):
        logits = model(torch.tensor([[2, 3, a]]))[0, -1]
        p[a] = p_first[a] * torch.tensor(declared(logits.tolist(), **options))
    assert (counts[p == 0] == 0).all()
    chi_square = ((counts - n * p) ** 2 / (n * p))[p > 0].sum().item()
    freedom = int((p > 0).sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # mean and four standard deviations
    assert counts.max() < 0.9 * n


# ----------------------------------------------------------------------------------------------
# Parts


def test_prompts_are_padded_on_the_right_and_their_tokens_counted_as_seen():
    tokens = pad_prompts([[3, 1], [2]])
    assert tokens.tolist() == [[3, 1], [2, -1]]
    assert tokens_seen(tokens, 4).tolist() == [
        [False, True, False, True],
        [False, False, True, False],
    ]


def test_a_cache_appends_behind_the_longest_prompt(monkeypatch):
    monkeypatch.setattr(KVCache, "GROWTH", 2)
    cache = KVCache(torch.tensor([[1, -1, -1], [1, 2, 3]]))
    assert cache.mask() is None  # the prompts attend causally
    prompt = torch.arange(1.0, 7.0).view(2, 1, 3, 1)
    k, v = cache.append("layer", prompt, -prompt)
    assert torch.equal(k, prompt) and torch.equal(v, -prompt)
    cache.start_step()
    assert cache.position().tolist() == [[1], [3]]
    assert cache.mask().tolist() == [
        [[[True, False, False, True, False]]],
        [[[True, True, True, True, False]]],
    ]
    new = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1)
    k, v = cache.append("layer", new, -new)
    assert k.flatten(1).tolist() == [[1, 2, 3, 10, 0], [4, 5, 6, 20, 0]]
    assert torch.equal(v, -k)
    cache.keep(torch.tensor([1, 1]))
    cache.start_step()
    k, _ = cache.append("layer", new, new)
    assert k.flatten(1).tolist() == [[4, 5, 6, 20, 10], [4, 5, 6, 20, 20]]
    assert cache.position().tolist() == [[4], [4]]
    assert cache.mask().tolist() == [[[[True] * 5]], [[[True] * 5]]]


@pytest.mark.parametrize("num_tokens, capacity", [(3, 3), (4, 5), (9, 9)])
def test_a_cache_grows_by_some_tokens_or_by_as_many_as_are_asked_for(
    monkeypatch, num_tokens, capacity
):
    monkeypatch.setattr(KVCache, "GROWTH", 2)
    cache = KVCache(torch.tensor([[1, 2, 3]]))
    cache.append("layer", torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1))
    cache.make_room(num_tokens)
    assert cache.k["layer"].flatten().tolist() == [1, 1, 1] + [0] * (capacity - 3)
    assert cache.v["layer"].flatten().tolist() == [1, 1, 1] + [0] * (capacity - 3)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_of_the_last_token_is_that_of_torch(kv_heads):
    q = torch.randn(3, 4, 1, 8, dtype=torch.float64)
    k = torch.randn(3, kv_heads, 6, 8, dtype=torch.float64)
    v = torch.randn(3, kv_heads, 6, 8, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([1, 4, 6])[:, None, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    close(attend_last(q, k, v, mask), expected, 1e-12)


def test_several_positions_of_a_prompt_are_read_beside_a_cache():
    model = writer(kv_heads=2)
    tokens = pad_prompts(PROMPTS)
    out_pos = torch.tensor([[0, 1]]).expand(len(PROMPTS), 2)
    cache = KVCache(tokens)
    close(model(tokens, out_pos=out_pos, cache=cache), model(tokens, out_pos=out_pos), 1e-12)


def test_a_long_response_that_grows_the_cache_often_is_the_naive_loop(monkeypatch):
    model = writer(kv_heads=2)
    monkeypatch.setattr(KVCache, "GROWTH", 3)
    generation = sampled(model, PROMPTS, 20, NEVER, temperature=0)
    assert generation.tokens.tolist() == [naive_greedy(model, prompt, 20) for prompt in PROMPTS]


class FakeGraph:
    """What torch.cuda.graph records is computed again by replay(); here on the CPU."""

    def replay(self):
        self.decoder.logits.copy_(self.decoder.run(self.decoder.token))


class GraphDecoder(Decoder):
    """As on CUDA, where the cache has room for all tokens and ended rows stay."""

    def __init__(self, model, cache, capacity):
        super().__init__(model, cache, capacity)
        cache.make_room(capacity)
        self.uses_graph = True

    def capture(self, token):
        place = self.cache.place.clone()
        used = self.cache.used
        super().capture(token)
        self.graph.decoder = self
        self.cache.place.copy_(place)  # a graph is recorded, not run
        self.cache.used = used


@pytest.mark.parametrize("eos", [NEVER, 3])
def test_steps_that_are_one_graph_are_the_same_steps(monkeypatch, eos):
    model = writer(kv_heads=2)
    expected = sampled(model, PROMPTS, 12, eos, temperature=1.5)
    monkeypatch.setattr(generate_module, "Decoder", GraphDecoder)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    generation = sampled(model, PROMPTS, 12, eos, temperature=1.5)
    assert generation.tokens.tolist() == expected.tokens.tolist()
    assert generation.ended.tolist() == expected.ended.tolist()
    assert eos == NEVER or 0 < generation.ended.sum() and (generation.tokens == -1).any()
    close(generation.logprob, expected.logprob, 1e-6)


def test_sampling_follows_the_weights_of_the_model():
    model = tiny(tied=False, seed=1).double()
    sampled(model, PROMPTS, 4, NEVER)
    for parameter, other in zip(model.parameters(), tiny(tied=False, seed=2).parameters()):
        parameter.data.copy_(other)
    generation = sampled(model, PROMPTS, 8, NEVER, temperature=0)
    assert generation.tokens.tolist() == [naive_greedy(model, prompt, 8) for prompt in PROMPTS]


def test_rare_last_tokens_of_a_large_vocabulary_are_drawn_as_often_as_declared():
    """In float32 the cumulative sum of 50,000 tokens would lose tokens whose p is below its eps."""
    V = 50_000
    p = torch.full((1, V), 4e-8)
    p[0, 0] = 1 - 4e-8 * (V - 1)
    last = 1 - 4e-8 * (torch.arange(500.0, dtype=torch.float64) + 0.5)  # middles of intervals
    token = draw(p.expand(500, V), last[:, None])[:, 0]
    off = (token - (V - 1 - torch.arange(500))).abs()
    assert off.max() <= 1  # p of the first token is rounded to float32
