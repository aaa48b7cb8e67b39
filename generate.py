"""Sampling responses with a KV cache.

Shapes: B responses, N new tokens at most, V vocabulary.
"""
from typing import Any, NamedTuple

import torch

LIKELIEST = 512  # tokens that are sorted first to find a nucleus


class Sampling(NamedTuple):
    """How responses are sampled; all but the first two are off by default."""
    max_new_tokens: int
    eos_id: int
    temperature: float = 1.0          # 0: the likeliest token
    top_p: float = 1.0                # nucleus sampling, arXiv 1904.09751
    repetition_penalty: float = 1.0   # arXiv 1909.05858
    min_new_tokens: int = 0           # EOS has no probability before
    more_eos: tuple = ()              # ids of further tokens that end a response

    @property
    def end_ids(self):
        return [self.eos_id, *self.more_eos]


class Generation(NamedTuple):
    tokens: torch.Tensor    # (B, N) int64, -1 after the end; EOS is the last token of an ended row
    logprob: torch.Tensor   # (B, N) under the distribution sampled from; 0 after the end
    ended: torch.Tensor     # (B,) bool: ended by EOS, not by the length limit


class KVCache:
    """Keys and values of all layers; a step appends one token to every row, at the same place.

    A row is [prompt | padding up to the longest prompt | sampled tokens | room]; masked places cost
    a little time.  The memory of a layer grows by a few tokens at a time and is read whole.  The
    first tokens of each row of a larger memory take twice as long to read, because what the
    processor prefetches is not what comes next (docs/log.md).
    """
    GROWTH = 16  # tokens; a larger number reads more that is masked, a smaller copies more often

    def __init__(self, prompts):
        """prompts: (B, T) token ids, -1 in the padding"""
        self.prompt_length = (prompts >= 0).sum(1)  # (B,)
        self.longest = prompts.shape[1]
        self.used = self.longest  # tokens of each row, padding included
        # (1,) where the present step writes; a tensor, so that a CUDA graph can move it
        self.place = torch.full_like(self.prompt_length[:1], self.longest - 1)
        self.k = {}  # by attention layer: (B, kv_heads, capacity, D)
        self.v = {}

    def make_room(self, num_tokens):
        """Let num_tokens tokens fit into each row."""
        for store in (self.k, self.v):
            for layer, old in store.items():
                B, heads, capacity, D = old.shape
                if capacity < num_tokens:
                    growth = max(self.GROWTH, num_tokens - capacity)
                    room = old.new_zeros(B, heads, growth, D)
                    store[layer] = torch.cat((old, room), dim=2)

    def start_step(self):
        """Go to the place of the next token."""
        self.used += 1
        self.make_room(self.used)
        self.place += 1

    def position(self):
        """-> (B, 1) positions of the step's tokens, which follow the prompt without its padding"""
        return self.prompt_length[:, None] + self.place - self.longest

    def append(self, layer, k, v):
        """k, v: (B, kv_heads, T, D) of the new tokens -> those of all so far, (.., capacity, D)"""
        if layer not in self.k:  # the prompts
            self.k[layer] = k
            self.v[layer] = v
        else:
            self.k[layer].index_copy_(2, self.place, k)
            self.v[layer].index_copy_(2, self.place, v)
        return self.k[layer], self.v[layer]

    def mask(self):
        """Attention mask of a step, (B, 1, 1, capacity) bool; None for the prompts: causal"""
        if not self.k:
            return None
        capacity = next(iter(self.k.values())).shape[2]
        t = torch.arange(capacity, device=self.place.device)
        in_prompt = t < self.prompt_length[:, None]
        is_sampled = (t >= self.longest) & (t <= self.place)
        return (in_prompt | is_sampled)[:, None, None]

    def keep(self, rows):
        """Keep only these rows, each as often as it is listed."""
        self.prompt_length = self.prompt_length[rows]
        for store in (self.k, self.v):
            for layer in store:
                store[layer] = store[layer][rows]


class Decoder:
    """Logits of the next token, one step after another.

    On CUDA all steps but the first are one CUDA graph, whose many small kernels are launched at
    once, not one by one; the rows and the room of the cache then stay as they are.  Not run by CI.
    """

    def __init__(self, model, cache, capacity):
        self.model = model
        self.cache = cache
        has_shards = hasattr(model, "reshard")  # FSDP2's hooks cannot be captured
        self.uses_graph = cache.place.is_cuda and not has_shards
        self.graph: Any = None
        self.is_warm = False  # a first step has shown CUDA what a step needs
        if self.uses_graph:
            cache.make_room(capacity)

    def step(self, token):
        """token: (rows, 1) ids, appended to the cache -> logits of the token after it, (rows, V)"""
        if not self.uses_graph or not self.is_warm:
            self.is_warm = True
            return self.run(token)
        if self.graph is None:
            self.capture(token)
        self.token.copy_(token)
        self.graph.replay()
        return self.logits

    def run(self, token):
        self.cache.start_step()
        return self.model(token, position=self.cache.position(), cache=self.cache)[:, 0]

    def capture(self, token):
        self.token = token.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.run(self.token)


def sampling_probs(logits, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seen=None):
    """Probabilities of the distribution to sample from, float32.  (B, V) -> (B, V)

    Order as usual: repetition penalty, temperature, top-p.
    seen: (B, V) bool, the tokens of the prompt and of the response so far
    """
    logits = logits.float()
    if repetition_penalty != 1.0:
        shrunk = logits / repetition_penalty
        grown = logits * repetition_penalty
        penalised = torch.where(logits > 0, shrunk, grown)
        logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, likeliest, 1.0)
    logits = logits / temperature
    if top_p < 1.0:
        logits = keep_nucleus(logits, top_p)
    return logits.softmax(-1)


def keep_nucleus(logits, top_p):
    """Logits outside the smallest set of likeliest tokens with a mass of top_p become -inf.

    The set is nearly always small, so the likeliest tokens are sorted, not the vocabulary; more of
    them only where the mass is not reached.  (B, V) -> (B, V)
    """
    vocab = logits.shape[-1]
    log_total = logits.logsumexp(-1, keepdim=True)
    count = LIKELIEST
    while True:
        ordered, order = logits.topk(min(count, vocab))
        p = (ordered - log_total).exp()
        mass_before = p.cumsum(-1) - p
        is_outside = mass_before >= top_p
        if count >= vocab or is_outside[:, -1].all():
            break
        count *= 8
    ordered = ordered.masked_fill(is_outside, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)


@torch.inference_mode()
def generate(model, prompts, sampling, generator, num_samples=1, own=None, noise=None):
    """Sample num_samples responses to each prompt, until EOS or for max_new_tokens tokens.

    prompts: lists of token ids, of any lengths
    generator: a CPU torch.Generator; None where noise is given
    own: indices of the prompts that are answered, by this of several processes; None: all
    noise: of draw_noise, for these prompts; None: drawn from generator
    -> Generation of B = num_samples * len(prompts) rows, those of one prompt next to each other
    Raises ValueError where prompt and response do not fit into the context.

    A prompt is computed once for all its responses, also where it is given several times.  All
    noise is drawn beforehand, one number per row and step, so a response depends on its own prompt
    and row number and not on other rows.
    Rows that have ended leave the batch, but on CUDA, where the steps are one graph.
    The result is not for autograd (torch.inference_mode).
    """
    device = model.model.norm.weight.device
    N = sampling.max_new_tokens
    if noise is None:
        noise = draw_noise(len(prompts), num_samples, sampling, generator)
    if own is not None:
        noise = noise[list(own)]
        prompts = [prompts[i] for i in own]
    noise = noise.flatten(0, 1).to(device)  # (B, N)
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    tokens = pad_prompts(list(distinct)).to(device)  # (different prompts, T)
    B = num_samples * len(prompts)
    check_context(model.shape.context, tokens.shape[1], N)
    out = torch.full((B, N), -1, dtype=torch.int64, device=device)
    logprob = torch.zeros(B, N, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    prompt_of = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
    prompt_of = prompt_of.repeat_interleave(num_samples)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = tokens_seen(tokens, model.shape.vocab)[prompt_of]

    cache = KVCache(tokens)
    last = cache.prompt_length[:, None] - 1
    logits = model(tokens, out_pos=last, cache=cache)[prompt_of, 0]  # (B, V)
    if len(distinct) < B:
        cache.keep(prompt_of)
    decoder = Decoder(model, cache, capacity=tokens.shape[1] + N)

    ends = torch.tensor(sampling.end_ids, device=device)
    row_of = torch.arange(B, device=device)  # response that each row of the cache belongs to
    done = torch.zeros(B, dtype=torch.bool, device=device)
    for step in range(N):
        if step < sampling.min_new_tokens:
            logits[:, ends] = -torch.inf
        p = sampling_probs(
            logits, sampling.temperature, sampling.top_p, sampling.repetition_penalty, seen
        )
        next_token = draw(p, noise[row_of, step, None])  # (rows, 1)
        out[row_of, step] = next_token[:, 0].masked_fill(done, -1)
        logprob[row_of, step] = p.gather(1, next_token)[:, 0].log().masked_fill(done, 0.0)
        done = done | torch.isin(next_token[:, 0], ends)
        ended[row_of] = done
        if step == N - 1 or done.all():
            break
        if not decoder.uses_graph and done.float().mean() > 0.25:  # idle rows cost less than copies
            keep_idx = (~done).nonzero()[:, 0]
            row_of = row_of[keep_idx]
            next_token = next_token[keep_idx]
            done = done[keep_idx]
            seen = None if seen is None else seen[keep_idx]
            cache.keep(keep_idx)
        if seen is not None:
            seen.scatter_(1, next_token, True)
        logits = decoder.step(next_token)
    return Generation(out, logprob, ended)


def draw_noise(num_prompts, num_samples, sampling, generator):
    """One uniform number for each token to be sampled -> (num_prompts, num_samples, N) float64"""
    return torch.rand(
        num_prompts, num_samples, sampling.max_new_tokens, generator=generator, dtype=torch.float64
    )


def check_context(context, prompt_len, new_len):
    if prompt_len + new_len > context:
        raise ValueError(f"generate: {prompt_len} prompt tokens + {new_len} new ones exceed the "
                         f"context of {context}")


def draw(p, noise):
    """Inverse transform sampling: (rows, V) probabilities, (rows, 1) uniform noise -> (rows, 1) ids

    The cumulative sum is float64: in float32 the last of many tokens would be drawn too rarely.
    """
    cumulative = p.cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True)
    return token.clamp(max=p.shape[-1] - 1)


def pad_prompts(prompts):
    """Lists of token ids -> (B, T) int64, padded on the right with -1"""
    tokens = torch.full((len(prompts), max(map(len, prompts))), -1, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.as_tensor(prompt)
    return tokens


def tokens_seen(tokens, vocab):
    """(B, T) token ids, -1 in the padding -> (B, V) bool, True for each token of the row"""
    seen = torch.zeros(len(tokens), vocab + 1, dtype=torch.bool, device=tokens.device)
    index = tokens.remainder(vocab + 1)  # padding goes to the extra column
    return seen.scatter(1, index, True)[:, :-1]
