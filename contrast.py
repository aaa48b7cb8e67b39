"""Contrastive terms in the reward stage: representations that hold where the reward alone has not been taught.

    L = L_rm + beta L_cl                                 arXiv 2401.06080, sec. 4

One doubled batch holds every pair twice; dropout makes the copies two views, s and t.  The ranking loss L_rm is taken on both
(their mean: the paper does not say whether mean or sum), the term L_cl on the items

    pairs        h of the chosen and of the rejected answer of every pair: (2B, C)
    difference   h_chosen - h_rejected and h_rejected - h_chosen of every pair: (2B, C)

where h is the final hidden state that the reward is read from.  B pairs, N = 2B items, C width, K prototypes, Q queue.
"""
import math

import torch
import torch.nn as nn

from losses import direction, simcse, swav

TEMPERATURE = {"simcse": 0.05, "swav": 0.1}  # of arXiv 2104.08821 and 2006.09882; the paper gives none


def items_of(h, kind):
    """h: (B, 2, C) states of chosen and rejected -> (2B, C) items to contrast"""
    if kind == "difference":
        d = h[:, 0] - h[:, 1]
        return torch.cat((d, -d))
    return h.flatten(0, 1)


class Contrast(nn.Module):
    """The term of a reward model in training, with what SwAV has to remember: its prototypes, and past items of both views.

    Trained beside the reward model and thrown away with the training.
    settings: the [contrast] section; total: items of the whole training, of which a share finds the prototypes frozen
    """

    def __init__(self, settings, width, generator, total=0):
        super().__init__()
        self.s = settings
        self.temperature = settings.temperature or TEMPERATURE[settings.term]
        self.seen, self.frozen, self.flat = 0, settings.frozen * total, 0
        if settings.term == "swav":
            self.prototypes = nn.Parameter(direction(torch.randn(settings.prototypes, width, generator=generator)))
            self.register_buffer("past", torch.zeros(2, settings.queue, width))

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, seen):
        self.seen = seen

    def forward(self, h):
        """h: (2B, 2, C), one view after the other -> (2B,) loss of each item"""
        s, t = (items_of(view, self.s.items) for view in h.chunk(2))
        if self.s.term == "simcse":
            return simcse(s, t, self.temperature)
        with torch.no_grad():
            self.prototypes.copy_(direction(self.prototypes))
        prototypes = self.prototypes if self.seen >= self.frozen else self.prototypes.detach()
        kept = min(self.seen, self.s.queue)
        views = torch.stack((direction(s), direction(t)))                        # (2, N, C)
        kind = h.device.type if torch.amp.is_autocast_available(h.device.type) else "cpu"  # meta has none
        with torch.autocast(kind, enabled=False):  # Sinkhorn divides scores by 0.05: no rounding to bf16 before that
            scores = torch.cat((views, self.past[:, :kept]), dim=1) @ prototypes.T   # (2, N + kept, K)
        loss = swav(*scores, self.temperature, self.s.epsilon, self.s.iterations)[:len(s)]
        with torch.no_grad():
            self.past = torch.cat((views, self.past), dim=1)[:, :self.s.queue]   # newest first
        self.seen += len(s)
        return loss

    def stuck(self, loss):
        """What to say once the term has collapsed, or "".  loss: its mean since the last call; calls are far apart

        Where all items look alike, each code is uniform and every prototype as likely as the next: 2 ln K, and there it stays.  (A
        loss above that is no collapse: the views contradict each other.)
        """
        if self.s.term != "swav":
            return ""
        level = 2 * math.log(self.s.prototypes)
        self.flat = self.flat + 1 if abs(loss - level) < 0.01 * level else 0
        return "" if self.flat != 3 else (
            f"warning: swav's loss is stuck at {loss:.3f}, 2 ln K = {level:.3f}: its items or prototypes have collapsed; "
            f"lower contrast.epsilon or lr, raise contrast.queue, or freeze the prototypes at first (contrast.frozen)")
