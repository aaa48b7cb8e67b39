"""MetaRM: train a reward model on labelled pairs so that it also tells apart what the current policy says.

    1. theta' = theta + eta grad J(theta)    ascent: spread the rewards of the policy's own answers, which have no labels
    2. g = grad L(theta')                    what the labelled pairs ask of a model that has done so
    3. theta <- theta - alpha g              from theta, not from theta'

J is `losses.difference` on k sampled responses per prompt, L the reward model's loss; their prompts need not match.
Step 3 is the optimiser's:

    gradients = meta_gradient(model.parameters(), lambda: difference(...).mean(), lambda: bradley_terry(...).mean(), eta)
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad = gradient
    optimiser.step()

Source: arXiv 2401.06080, the part on MetaRM, and arXiv 2405.00438.
"""
import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def meta_gradient(parameters, difference_loss, pair_loss, eta, second_order=False):
    """The gradient of L at theta + eta grad J(theta), to be applied at theta.

        first order (the paper)    g = grad L(theta')
        second order               g + eta H g, H the Hessian of J at theta: the derivative through step 1 as well

    parameters: any iterable of trained parameters; difference_loss, pair_loss: without arguments -> scalar J, L
    returns a list of gradients, one per parameter; zeros where a closure does not use it

    Parameters hold their old values bit for bit afterwards, also when a closure raises, and no .grad is touched.  Each
    closure is called once, J first; each draws its own dropout masks, and H is of the J that the step was taken with.
    Buffers that a forward pass moves (running means) are not put back; the models here have none.

    A loss that is scaled for float16 gives gradients with the same scale; divide eta by the scale of J.

    Second order differentiates a backward pass.  The fused kernels of scaled_dot_product_attention cannot do that, so J runs
    on the plain one; nor can torch.compile, so give J the model as it was before.  The graph of J stays in memory meanwhile.
    """
    parameters = list(parameters)  # a generator can be gone through only once
    if len({id(p) for p in parameters}) < len(parameters) or not all(p.requires_grad for p in parameters):
        raise ValueError("meta_gradient: parameters are frozen or listed twice; give those that require a gradient, each once")
    theta = [p.detach().clone() for p in parameters]  # restored by copy: p + g - g is not p
    try:
        with sdpa_kernel(SDPBackend.MATH) if second_order else contextlib.nullcontext():
            ascent = gradient(difference_loss(), parameters, create_graph=second_order)
        # Through .data autograd does not notice.  It need not: J's graph is used again only when theta stands there again.
        for p, step in zip(parameters, ascent):
            p.data.add_(eta * step.detach())
        torch.clear_autocast_cache()  # within one autocast, L would otherwise meet theta again, cast when J was computed
        g = [v.clone() for v in gradient(pair_loss(), parameters)]  # autograd may hand out one tensor twice; clipping is in place
    finally:
        for p, old in zip(parameters, theta):
            p.data.copy_(old)
        torch.clear_autocast_cache()
    if second_order:  # H is symmetric: g H = H g is one backward pass through grad J
        through = [(step, v) for step, v in zip(ascent, g) if step.requires_grad]  # not where J is linear or blind
        if through:
            steps, vectors = zip(*through)
            g = [a + eta * h for a, h in zip(g, gradient(steps, parameters, vectors))]
    return g


def gradient(outputs, parameters, vectors=None, create_graph=False):
    return torch.autograd.grad(outputs, parameters, vectors, create_graph=create_graph, materialize_grads=True)
