"""The transformer (Llama family), its reward head, and KV-cached sampling.

One row holds one prompt and its k branches, `[prompt | response 1 | ... | response k]`.  A response sees the prompt and
itself, never a sibling, and its positions restart after the prompt; so the prompt is computed once for all of them.

    tokens    (B, T)  token ids, -1 where there is only padding
    branch    (B, T)  0 in the prompt, 1..k in the responses, -1 in the padding; None if k = 1 (plain causal attention)
    position  (B, T)  what the rotary embedding sees; None counts 0, 1, 2, ...
    read      (B, R)  where the result is wanted; the last block asks nothing and runs no MLP anywhere else
    states    (B, T, C)  what the frozen blocks make of the tokens, where that is known; (B, R, C) if all blocks are frozen

Parameter names are those of Hugging Face's LlamaForCausalLM and LlamaForSequenceClassification.
Shapes: B rows, T tokens, R positions read, C width, H heads, D head width, V vocabulary.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    """The size of a transformer; saved with every checkpoint, so that it can be rebuilt."""
    vocab: int
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    width: int = 128
    hidden: int = 344        # of the SwiGLU; 8/3 of the width is the custom
    context: int = 512       # longest prompt + response, in tokens
    dropout: float = 0.0
    tied: bool = True        # output and input embedding are one matrix
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    head: int = 0            # width of a head; 0: width / heads
    rope_scaling: tuple = ()  # Llama 3's: factor, low and high frequency factor, original context; (): none
    frozen: int = 0          # so many of the lowest blocks, and then the embedding, are not the model's own: Transformer.below

    @property
    def head_width(self):
        return self.head or self.width // self.heads


def take(x, index):
    """x: (B, T, ...), index: (B, R) -> (B, R, ...): row b of the result is x[b, index[b]]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def rotate(x, rope):
    """Rotary positions, the two halves of a head as real and imaginary part.  arXiv 2104.09864

    x: (B, H, R, D); rope: cos and sin, each (B, R, D)
    """
    cos, sin = (part[:, None] for part in rope)  # (B, 1, R, D)
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).type_as(x)


def branch_mask(branch, read=None):
    """Which token may look at which.  branch: (B, T), read: (B, R) those that look, None: all -> (B, 1, R, T) bool, True = may attend

    Query q sees key t if t is not later and stands in the prompt or in q's own branch.  Padding sees itself alone (a row
    without any key would be NaN) and is seen by nobody.
    """
    t = torch.arange(branch.shape[1], device=branch.device)
    q = (t.expand_as(branch) if read is None else read)[..., None]
    query, key = take(branch, q[..., 0])[..., None], branch[:, None, :]
    return ((q >= t) & ((key == query) & (key >= 0) | (key == 0) & (query >= 0)) | (q == t))[:, None]


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.heads, self.kv_heads, self.D = shape.heads, shape.kv_heads, shape.head_width
        self.q_proj = nn.Linear(shape.width, shape.heads * self.D, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * self.D, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * self.D, bias=False)
        self.o_proj = nn.Linear(shape.heads * self.D, shape.width, bias=False)

    def forward(self, x, rope, mask, asking=None, asking_rope=None, cache=None):
        """x: (B, T, C) keys and values; asking: (B, R, C) queries, or None if all of x asks -> (B, R, C)"""
        if asking is None:
            asking, asking_rope = x, rope
        B, R, _ = asking.shape
        q = rotate(self.q_proj(asking).view(B, R, self.heads, self.D).transpose(1, 2), asking_rope)
        k = rotate(self.k_proj(x).view(B, -1, self.kv_heads, self.D).transpose(1, 2), rope)
        v = self.v_proj(x).view(B, -1, self.kv_heads, self.D).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, R, -1))


class MLP(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU, arXiv 2002.05202


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.mlp = MLP(shape)
        self.dropout = shape.dropout

    def forward(self, x, rope, mask, read=None, cache=None):
        """x: (B, T, C) -> (B, T, C), or (B, R, C) if only the positions in `read` are wanted"""
        h, asking, asking_rope = self.input_layernorm(x), None, None
        if read is not None:
            asking, asking_rope, x = take(h, read), tuple(take(part, read) for part in rope), take(x, read)
        x = x + self.drop(self.self_attn(h, rope, mask, asking, asking_rope, cache))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """below: the Transformer of the shape.frozen lowest blocks, one for all models that stand on it.  It stays out of parameters()
    and state_dict(), so that nothing ever trains, copies or saves it."""

    def __init__(self, shape, below=None):
        super().__init__()
        self.shape, self.below = shape, (below,)  # in a tuple torch does not see it
        self.embed_tokens = None if shape.frozen else nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(nn.Identity() if i < shape.frozen else Block(shape) for i in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.checkpointing = False  # keep each block's input alone and compute the block again on the way back (arXiv 1604.06174)

    def rope(self, position):
        """position: (B, T) -> cos, sin of shape (B, T, D)"""
        D = self.shape.head_width
        frequency = 1 / self.shape.rope_theta ** (torch.arange(0, D, 2, device=position.device) / D)  # rounded as Hugging Face's code does
        if self.shape.rope_scaling:  # slow waves are stretched by the factor, fast ones stay, those between are blended (Llama 3.1)
            factor, low, high, context = self.shape.rope_scaling
            stay = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # by the waves in the original context
            frequency = frequency * (stay + (1 - stay) / factor)
        angle = position[..., None].float() * frequency  # (B, T, D / 2)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def forward(self, tokens, branch=None, position=None, read=None, cache=None, states=None):
        """-> final hidden states (B, R, C), or (B, T, C) if read is None"""
        return self.norm(self.blocks(tokens, branch, position, read, cache, states))

    @torch.no_grad()
    def states_below(self, tokens, branch=None, position=None, read=None, cache=None):
        """What the frozen blocks make of the tokens -> (B, T, C); (B, R, C) if all blocks are frozen"""
        return self.below[0].blocks(tokens, branch, position, read if self.shape.frozen == self.shape.layers else None, cache)

    def blocks(self, tokens, branch=None, position=None, read=None, cache=None, states=None):
        """All but the last norm"""
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        mask = cache.mask(tokens.shape[1]) if cache is not None else None  # before the frozen blocks append to the cache
        rope = self.rope(position)
        if states is not None:
            x = states.to(self.norm.weight.dtype)
        elif self.shape.frozen:
            x = self.states_below(tokens, branch, position, read, cache)
        else:
            x = self.embed_tokens(tokens.clamp(min=0)).masked_fill((tokens < 0)[..., None], 0.0)  # padding is no token
        x = F.dropout(x, self.shape.dropout, self.training)
        if self.shape.frozen == self.shape.layers:
            return x
        *blocks, last = self.layers[self.shape.frozen:]
        if branch is not None and (blocks or read is None):
            mask = branch_mask(branch)
        for block in blocks:
            x = self.block(block, x, rope, mask, None, cache)
        if read is not None:  # a mask for the few queries that are left
            mask = (read[..., None] >= torch.arange(tokens.shape[1], device=tokens.device))[:, None] if branch is None else branch_mask(branch, read)
        return self.block(last, x, rope, mask, read, cache)

    def block(self, block, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class LanguageModel(nn.Module):
    """The policy: scores for the next token."""

    def __init__(self, shape, below=None):
        super().__init__()
        self.shape = shape
        self.model = Transformer(shape, below)
        self.lm_head = None if shape.tied and shape.frozen else nn.Linear(shape.width, shape.vocab, bias=False)
        if shape.tied and not shape.frozen:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, branch=None, position=None, read=None, cache=None, states=None):
        """-> logits (B, R, V)"""
        h = self.model(tokens, branch, position, read, cache, states)
        return F.linear(h, self.model.below[0].embed_tokens.weight) if self.lm_head is None else self.lm_head(h)


class RewardModel(nn.Module):
    """A linear head without bias on the final hidden state: rewards at each branch's last token (the paper, sec. 2.1),
    or, read at every response token, the values of a critic."""

    def __init__(self, shape, below=None):
        super().__init__()
        self.shape = shape
        self.model = Transformer(shape, below)
        self.score = nn.Linear(shape.width, 1, bias=False)

    def forward(self, tokens, branch, position, read, features=False, states=None):
        """-> (B, R) float32; with features also the final hidden states they are read from, (B, R, C)"""
        h = self.model(tokens, branch, position, read, states=states)
        kind = h.device.type if torch.amp.is_autocast_available(h.device.type) else "cpu"  # meta has none
        with torch.autocast(kind, enabled=False):  # differences of rewards are small: no rounding to bf16 here
            rewards = self.score(h.float()).squeeze(-1)
        return (rewards, h) if features else rewards


def init_weights(model, generator):
    """Normal, std (2 width)^-1/2; the two projections back into the residual stream less by depth, as in GPT-2.

    GPT-2's constant 0.02 is this rule at a width of 1250; at our width of 128 it left facts unlearned (LOG.md).
    """
    std = (2 * model.shape.width) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            back = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std * (2 * model.shape.layers) ** -0.5 if back else std
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

class Sample(NamedTuple):
    tokens: torch.Tensor    # (B, N) int64, -1 after the end; an ended row's last token is end-of-text
    logprob: torch.Tensor   # (B, N) under the distribution the token was drawn from; 0 after the end
    ended: torch.Tensor     # (B,) bool: stopped by end-of-text, not by the length limit


class Cache:
    """Keys and values of all layers, allocated once.  Row b holds `length[b]` tokens; a step appends one to every row."""

    def __init__(self, capacity, length):
        self.capacity = capacity
        self.length = length          # (B,) tokens in each row
        self.longest = capacity       # how much of the capacity a step has to look at; sample() keeps it tight
        self.k, self.v = {}, {}       # by attention layer, made at the first append, when dtype and device are known

    def append(self, layer, k, v):
        """k, v: (B, kv_heads, T, D) new keys and values -> all of them so far"""
        if layer not in self.k:       # the prompts, padded on the right; the padding is overwritten by what comes next
            for store, new in ((self.k, k), (self.v, v)):
                B, heads, T, D = new.shape
                store[layer] = new.new_zeros(B, heads, self.capacity, D)
                store[layer][:, :, :T] = new
            return k, v
        rows = torch.arange(len(k), device=k.device)
        self.k[layer][rows, :, self.length] = k[:, :, 0]
        self.v[layer][rows, :, self.length] = v[:, :, 0]
        return self.k[layer][:, :, :self.longest], self.v[layer][:, :, :self.longest]

    def mask(self, T):
        """None for the prompts (causal); (B, 1, 1, longest) for a step"""
        if not self.k:
            return None
        return (torch.arange(self.longest, device=self.length.device) <= self.length[:, None])[:, None, None]

    def keep(self, rows):
        """Forget all rows but these, each as often as it is named."""
        self.length = self.length[rows]
        for store in (self.k, self.v):
            for layer in store:
                store[layer] = store[layer][rows]


def sampling_logits(logits, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seen=None):
    """The distribution to draw from, as normalised log-probabilities.  (B, V) -> (B, V)

    In the usual order: repetition penalty (arXiv 1909.05858), temperature, top-k, top-p (arXiv 1904.09751).
    seen: (B, V) bool, the tokens of the prompt and of the answer so far; temperature 0 takes the likeliest token.
    """
    logits = logits.float()
    if repetition_penalty != 1.0:
        weakened = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, weakened, logits)
    if temperature == 0:
        top_k = 1
    else:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        order = logits.topk(top_k).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, logits.gather(-1, order))
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)  # keep what is needed to reach top_p
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    return logits.log_softmax(-1)


@torch.no_grad()
def sample(model, prompts, max_new, end, generator, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, min_new=0, copies=1):
    """Continue each prompt until `end`, which cannot come within the first min_new tokens, or for max_new tokens.

    prompts: lists of token ids, of any lengths; end: id of end-of-text; generator: a CPU torch.Generator
    copies: answers to each prompt, which is computed once for all of them
    -> Sample of (B, max_new), B = copies * prompts, the answers to one prompt next to each other

    All noise is drawn beforehand, one number per row and step, so that an answer depends on its own prompt and row
    number and not on its neighbours, nor on when these leave.  Rows that have ended leave the batch.
    """
    device = model.model.norm.weight.device
    B, longest = copies * len(prompts), max(map(len, prompts))
    capacity = longest + max_new
    if capacity > model.shape.context:
        raise ValueError(f"sample: {longest} prompt tokens + {max_new} new ones exceed the context of {model.shape.context}")
    noise = torch.rand(B, max_new, generator=generator, dtype=torch.float64).to(device)
    tokens = torch.full((len(prompts), longest), -1, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.as_tensor(prompt)
    tokens = tokens.to(device)
    out = torch.full((B, max_new), -1, dtype=torch.int64, device=device)
    logprob = torch.zeros(B, max_new, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    seen = None
    if repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), model.shape.vocab + 1, dtype=torch.bool, device=device)  # the last column takes the padding
        seen = seen.scatter(1, tokens.remainder(model.shape.vocab + 1), True)[:, :-1].repeat_interleave(copies, 0)

    cache = Cache(capacity, (tokens >= 0).sum(1))
    logits = model(tokens, read=cache.length[:, None] - 1, cache=cache)[:, 0].repeat_interleave(copies, 0)  # (B, V)
    if copies > 1:
        cache.keep(torch.arange(len(prompts), device=device).repeat_interleave(copies))
    live = torch.arange(B, device=device)   # which answer each row of the cache belongs to
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    for step in range(max_new):
        if step < min_new:
            logits[:, end] = -torch.inf
        logp = sampling_logits(logits, temperature, top_k, top_p, repetition_penalty, seen)
        cumulative = logp.double().exp().cumsum(-1)
        drawn = torch.searchsorted(cumulative, noise[live, step, None] * cumulative[:, -1:], right=True).clamp(max=logp.shape[-1] - 1)
        going = ~finished
        out[live[going], step] = drawn[going, 0]
        logprob[live[going], step] = logp.gather(1, drawn)[going, 0]
        finished = finished | (drawn[:, 0] == end)
        ended[live] = finished
        if step == max_new - 1 or finished.all():
            break
        if finished.float().mean() > 0.25:   # copying the cache costs; not worth it for a single row
            keep = (~finished).nonzero()[:, 0]
            live, drawn, finished = live[keep], drawn[keep], finished[keep]
            seen = None if seen is None else seen[keep]
            cache.keep(keep)
        if seen is not None:
            seen.scatter_(1, drawn, True)
        cache.longest = int(cache.length.max()) + 1
        logits = model(drawn, position=cache.length[:, None], cache=cache)[:, 0]
        cache.length = cache.length + 1
    return Sample(out, logprob, ended)
