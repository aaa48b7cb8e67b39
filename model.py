"""The transformer (Llama and its relatives), the language-modelling head and the reward head.

One row holds one prompt and its k branches, `[prompt | response 1 | ... | response k]`.  A response
attends to the prompt and to itself, never to a sibling, and its positions restart after the prompt;
so the prompt is computed once for all of them.

    tokens         (B, T)     token ids, -1 in the padding
    branch         (B, T)     0 in the prompt, 1..k in the responses, -1 in the padding;
                              None if k = 1 (plain causal attention)
    position       (B, T)     position for the rotary embedding; None counts 0, 1, 2, ...
    out_pos        (B, R)     positions whose output is needed; the last block computes queries and
                              its MLP only there
    inputs_embeds  (B, T, C)  what enters the lowest block, where it was computed before;
                              (B, R, C) at out_pos where no block is left

Parameter names are those of Hugging Face's LlamaForCausalLM and LlamaForSequenceClassification,
Qwen2's and Qwen3's.
Shapes: B rows, T tokens, R output positions, C width, H heads, D head width, V vocabulary.
"""
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from losses import autocast_device


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer; saved with every checkpoint, so that the model can be rebuilt."""
    vocab: int
    layers: int = 4
    heads: int = 4           # query heads
    kv_heads: int = 4        # key and value heads; fewer than heads: grouped-query attention
    width: int = 128
    hidden: int = 344        # width of the SwiGLU; 8/3 of the width is usual
    context: int = 512       # longest prompt + response, in tokens
    dropout: float = 0.0
    tied: bool = True        # output and input embedding are one matrix
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    head: int = 0            # head width; 0: width / heads
    rope_scaling: tuple = ()  # Llama 3's: factor, low and high frequency factor, original context
    frozen: int = 0          # lowest blocks that are not part of the model: pretrained/frozen.py
    qkv_bias: bool = False   # biases of queries, keys and values (Qwen2)
    qk_norm: bool = False    # queries and keys are normalised head by head (Qwen3)
    lora_rank: int = 0       # of the adapters on linear layers: pretrained/lora.py; 0: none
    lora_alpha: float = 0.0

    @property
    def head_width(self):
        return self.head or self.width // self.heads


def gather_positions(x, index):
    """x: (B, T, ...), index: (B, R) -> (B, R, ...): row b of the result is x[b, index[b]]."""
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[row, index]


def rotate(x, rope):
    """Rotary position embedding; the halves of a head are real and imaginary part.
    arXiv 2104.09864.

    x: (B, H, R, D); rope: cos and sin, each (B, R, D)
    """
    cos = rope[0][:, None]  # (B, 1, R, D)
    sin = rope[1][:, None]
    real, imaginary = x.chunk(2, dim=-1)
    turned = torch.cat((-imaginary, real), dim=-1)
    return (x * cos + turned * sin).type_as(x)


def branch_mask(branch, out_pos=None):
    """Attention mask of rows with branches -> (B, 1, R, T) bool, True = may attend.

    branch: (B, T); out_pos: (B, R) positions of the queries, None: all T
    """
    t = torch.arange(branch.shape[1], device=branch.device)
    q_pos = t.expand_as(branch) if out_pos is None else out_pos
    q_branch = gather_positions(branch, q_pos)[:, :, None]
    k_branch = branch[:, None, :]
    q_pos = q_pos[:, :, None]

    causal = q_pos >= t
    same_branch = (q_branch == k_branch) & (k_branch >= 0)
    to_prompt = (k_branch == 0) & (q_branch >= 0)
    itself = q_pos == t  # padding attends to itself alone: an empty softmax would be NaN
    return (causal & (same_branch | to_prompt) | itself)[:, None]


def causal_mask(out_pos, T):
    """Mask of the queries at out_pos (B, R) over T keys -> (B, 1, R, T) bool"""
    t = torch.arange(T, device=out_pos.device)
    return (out_pos[..., None] >= t)[:, None]


def attend_last(q, k, v, mask):
    """Attention of one query a row, the last token, to all keys.

    q: (B, H, 1, D); k, v: (B, kv_heads, T, D); mask: (B, 1, 1, T) bool -> (B, H, 1, D)

    Keys and values are read where they lie: the G = H / kv_heads heads that share them are G rows
    of one product.  On CPU this takes half the time of scaled_dot_product_attention.
    """
    B, kv_heads, T, D = k.shape
    if q.is_cuda:  # a single kernel; not run by CI
        q = q.reshape(B, kv_heads, -1, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, -1, 1, D)
    q = q.reshape(B * kv_heads, -1, D) * D ** -0.5
    scores = torch.bmm(q, k.flatten(0, 1).transpose(1, 2))  # (B kv_heads, G, T)
    scores = scores.view(B, -1, 1, T).masked_fill_(~mask, -torch.inf)
    p = scores.softmax(-1).view(B * kv_heads, -1, T)
    return torch.bmm(p, v.flatten(0, 1)).view(B, -1, 1, D)


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.heads = shape.heads
        self.kv_heads = shape.kv_heads
        self.D = shape.head_width
        bias = shape.qkv_bias
        self.q_proj = nn.Linear(shape.width, shape.heads * self.D, bias=bias)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * self.D, bias=bias)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * self.D, bias=bias)
        self.qk_norm = shape.qk_norm
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(self.D, eps=shape.norm_eps)
            self.k_norm = nn.RMSNorm(self.D, eps=shape.norm_eps)
        self.o_proj = nn.Linear(shape.heads * self.D, shape.width, bias=False)

    def forward(self, x, rope, mask, x_query=None, rope_query=None, cache=None):
        """x: (B, T, C) for keys and values; x_query: (B, R, C) for queries, None: x -> (B, R, C)"""
        if x_query is None:
            x_query = x
            rope_query = rope
        B, R, _ = x_query.shape
        q = self.q_proj(x_query).view(B, R, self.heads, self.D).transpose(1, 2)  # (B, H, R, D)
        k = self.k_proj(x).view(B, -1, self.kv_heads, self.D).transpose(1, 2)
        v = self.v_proj(x).view(B, -1, self.kv_heads, self.D).transpose(1, 2)
        if self.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q, rope_query)
        k = rotate(k, rope)
        if cache is not None:
            k, v = cache.append(self, k, v)
        if cache is not None and mask is not None and R == 1:
            y = attend_last(q, k, v, mask)
            return self.o_proj(y.reshape(B, 1, -1))
        if q.is_cuda and mask is not None and self.heads != self.kv_heads:
            # no fused kernel takes a mask and grouped heads at once; not run by CI
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, R, -1))


class MLP(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU, 2002.05202


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.mlp = MLP(shape)
        self.dropout = shape.dropout

    def forward(self, x, rope, mask, out_pos=None, cache=None):
        """x: (B, T, C) -> (B, T, C), or (B, R, C) at out_pos"""
        h = self.input_layernorm(x)
        x_query = None
        rope_query = None
        if out_pos is not None:
            x_query = gather_positions(h, out_pos)
            rope_query = (gather_positions(rope[0], out_pos), gather_positions(rope[1], out_pos))
            x = gather_positions(x, out_pos)
        x = x + self.drop(self.self_attn(h, rope, mask, x_query, rope_query, cache))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """Embedding, blocks and final norm.

    With shape.frozen > 0 only the blocks above the frozen ones are built, under their numbers in
    the whole model, and pretrained/frozen.py replaces `embed` by the frozen blocks' computation.
    """

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens: Any = None
        if not shape.frozen:
            # nn.Embedding() draws numbers, for which the device "meta" imports all of torch._dynamo
            weight = torch.empty(shape.vocab, shape.width)
            self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        blocks = {str(i): Block(shape) for i in range(shape.frozen, shape.layers)}
        self.layers = nn.ModuleDict(blocks)
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.gradient_checkpointing = False  # recompute each block in the backward pass, 1604.06174

    def embed(self, tokens, branch=None, position=None, cache=None, out_pos=None):
        """What enters the lowest block: (B, T) -> (B, T, C); padding is a vector of zeros.

        out_pos is given to a frozen trunk alone, where no block is left above it -> (B, R, C)
        """
        padding = (tokens < 0)[..., None]
        return self.embed_tokens(tokens.clamp(min=0)).masked_fill(padding, 0.0)

    def rope(self, position):
        """position: (B, T) -> cos and sin, each (B, T, D)"""
        D = self.shape.head_width
        exponent = torch.arange(0, D, 2, device=position.device) / D
        frequency = 1 / self.shape.rope_theta ** exponent  # rounded as Hugging Face's code does
        if self.shape.rope_scaling:
            frequency = scale_frequencies(frequency, *self.shape.rope_scaling)
        angle = position[..., None].float() * frequency  # (B, T, D / 2)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def forward(
        self, tokens, branch=None, position=None, out_pos=None, cache=None, inputs_embeds=None
    ):
        """-> final hidden states (B, R, C), or (B, T, C) if out_pos is None"""
        return self.norm(self.blocks(tokens, branch, position, out_pos, cache, inputs_embeds))

    def blocks(
        self, tokens, branch=None, position=None, out_pos=None, cache=None, inputs_embeds=None
    ):
        """The forward pass without the final norm."""
        T = tokens.shape[1]
        if position is None:
            position = torch.arange(T, device=tokens.device).expand_as(tokens)
        mask = None if cache is None else cache.mask()  # before embed appends to the cache
        rope = self.rope(position)
        blocks = list(self.layers.values())
        if inputs_embeds is not None:
            x = inputs_embeds.to(self.norm.weight.dtype)
        else:
            x = self.embed(tokens, branch, position, cache, None if blocks else out_pos)
        x = F.dropout(x, self.shape.dropout, self.training)
        if not blocks:
            return x

        if branch is not None and (len(blocks) > 1 or out_pos is None):
            mask = branch_mask(branch)
        for block in blocks[:-1]:
            x = self.run_block(block, x, rope, mask, None, cache)
        if out_pos is not None:  # the last block has fewer queries, and a mask for these alone
            mask = causal_mask(out_pos, T) if branch is None else branch_mask(branch, out_pos)
        return self.run_block(blocks[-1], x, rope, mask, out_pos, cache)

    def run_block(self, block, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def scale_frequencies(frequency, factor, low, high, context):
    """Llama 3.1's scaling: slow waves are stretched by `factor`, fast ones stay, others blend."""
    waves = context * frequency / (2 * math.pi)  # in the original context
    unscaled = ((waves - low) / (high - low)).clamp(0, 1)
    return frequency * (unscaled + (1 - unscaled) / factor)


class LanguageModel(nn.Module):
    """The policy: logits of the next token."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.model = Transformer(shape)
        if shape.tied and shape.frozen:
            self.lm_head: Any = None  # pretrained/frozen.py sets it to the frozen embedding
        else:
            self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)
        if shape.tied and not shape.frozen:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens, branch=None, position=None, out_pos=None, cache=None, inputs_embeds=None,
        mask=None,
    ):
        """-> logits (B, R, V), or (B, T, V) if out_pos is None

        mask: (B, R) bool, the places where logits are needed -> (n, V)
        """
        h = self.model(tokens, branch, position, out_pos, cache, inputs_embeds)
        return self.lm_head(h if mask is None else h[mask])


class RewardModel(nn.Module):
    """A linear head without bias on the final hidden state (arXiv 2401.06080, sec. 2.1).

    At each branch's last token, which is EOS, its output is the reward; at every response token it
    is the value of a critic.
    """

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.model = Transformer(shape)
        self.score = nn.Linear(shape.width, 1, bias=False)

    def forward(self, tokens, branch, position, out_pos, features=False, inputs_embeds=None):
        """-> (B, R) float32; with features also the final hidden states (B, R, C)"""
        h = self.model(tokens, branch, position, out_pos, inputs_embeds=inputs_embeds)
        with torch.autocast(autocast_device(h), enabled=False):
            rewards = self.score(h.float()).squeeze(-1)  # float32: reward differences are small
        return (rewards, h) if features else rewards


def init_weights(model, generator):
    """Normal with std (2 width)^-1/2; projections into the residual stream are smaller by depth,
    as in GPT-2.

    GPT-2's constant 0.02 equals this rule at a width of 1250; at a width of 128 it leaves facts
    unlearned (docs/log.md).
    """
    std = (2 * model.shape.width) ** -0.5
    residual_std = std * (2 * model.shape.layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = residual_std if into_residual else std
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
