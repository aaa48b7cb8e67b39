"""The matrix products of some work, run again alone: a floor under the time that the work takes.

The time of all products, with operands that the work had, is what remains of a training step or of
sampling where everything else costs nothing.  The products of attention count, and with them all
reads of a KV cache.  Products in the padding count too, so a floor says nothing about waste.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")
ATTENTION = "scaled_dot_product"  # forward or backward, fused or, in inference mode, as a whole
KEPT = 8  # operands of one shape that take turns, so that they do not all come from the cache


class Products(TorchDispatchMode):
    """Records the matrix products of what runs inside.

    calls: {kind of product and shapes of its operands: [how many, operands of the first few]}
    """

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in PRODUCTS or ATTENTION in name:
            operands = [*args, *(kwargs or {}).values()]
            key = (function, tuple(describe(x) for x in operands))
            call = self.calls.setdefault(key, [0, []])
            call[0] += 1
            if len(call[1]) < KEPT:
                call[1].append((args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def describe(operand):
    """What the cost of a product depends on: shape and layout of a tensor, or the option itself"""
    if isinstance(operand, torch.Tensor):
        return operand.shape, operand.stride(), operand.dtype
    return str(operand)


def record_products(work):
    """Run work() -> a function that computes its matrix products again, and nothing else"""
    with Products() as products:
        work()

    @torch.no_grad()
    def run_products():
        for (function, _), (count, operands) in products.calls.items():
            for i in range(count):
                args, kwargs = operands[i % len(operands)]
                function(*args, **kwargs)

    return run_products
