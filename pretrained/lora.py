"""LoRA: the weights of a pretrained model stay as they are, and every linear layer of its trained
blocks gets a small adapter.  arXiv 2106.09685.

    --model.init=DIR --model.lora_rank=8 --model.lora_alpha=16

    y = x Wᵀ + alpha / rank · (x Aᵀ) Bᵀ        W (out, in), A (rank, in), B (out, rank)

A is random and B zero at first, so training starts from the pretrained model.  Adapters and reward
head are all that is trained, copied between models and saved in NAME.pt.  The other weights are
buffers outside parameters() and state_dict(), those of frozen.load_base, shared by all models of a
process.  A and B are float32 and have PEFT's names.
"""
from dataclasses import replace

import torch
import torch.nn as nn

from common import build_model
from model import LanguageModel
from pretrained import hub, weights


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: (..., in) -> (..., out)"""

    def __init__(self, layer, rank, alpha):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        self.scale = alpha / rank

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.scale * self.lora_A(x))

    def merged_weight(self):
        """-> W + alpha / rank · B A, (out, in) float32"""
        return self.weight.float() + self.scale * self.lora_B.weight @ self.lora_A.weight


def build(kind, shape, device="meta", base=None):
    """A model (LanguageModel or RewardModel) with uninitialised adapters and reward head.

    base: {name: tensor}, the model's other weights; None: of no use but to see names and shapes
    """
    with torch.device("meta"):  # takes no memory
        model = kind(shape)
        blocks = model.model.layers
        for path, layer in list(blocks.named_modules()):
            if isinstance(layer, nn.Linear):
                blocks.set_submodule(path, LoraLinear(layer, shape.lora_rank, shape.lora_alpha))
    for name, tensor in model.state_dict().items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        delattr(module, attribute)
        if "lora_" in name or name == "score.weight":
            parameter = nn.Parameter(torch.empty_like(tensor, device=device))
            module.register_parameter(attribute, parameter)
        else:
            shared = tensor if base is None else base[name]
            module.register_buffer(attribute, shared, persistent=False)
    return model


def load_language_model(run):
    """The language model of model.init with new adapters, which change nothing yet."""
    m = run.cfg.model
    shape = replace(
        weights.shape_of(hub.directory(m.init)), context=m.context, dropout=m.dropout,
        frozen=weights.num_frozen(m), lora_rank=m.lora_rank, lora_alpha=m.lora_alpha,
    )
    model = build_model(run, LanguageModel, shape)
    generator = torch.Generator().manual_seed(run.cfg.seed)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            noise = 2 * torch.rand(layer.lora_A.weight.shape, generator=generator) - 1
            with torch.no_grad():
                layer.lora_A.weight.copy_(noise * layer.in_features ** -0.5)  # as in PEFT
                layer.lora_B.weight.zero_()
    return model


def merged_tensors(model):
    """-> {name: tensor} of the same function without adapters, a frozen trunk's left out"""
    tensors = dict(model.named_buffers()) | model.state_dict()
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            tensors[f"{path}.weight"] = layer.merged_weight()
    return {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
