"""SimCSE and SwAV in the reward stage: a contrastive term beside the ranking loss.

    L = L_rm + beta L_cl                                 arXiv 2401.06080, sec. 3.1

One doubled batch holds every pair twice; dropout makes the copies two views, s and t.  The ranking
loss L_rm is taken on both views (their mean: the paper does not say whether mean or sum), the term
L_cl on the items

    pairs        h of the chosen and of the rejected response of every pair: (2B, C)
    difference   h_chosen - h_rejected and h_rejected - h_chosen of every pair: (2B, C)

where h is the final hidden state that the reward is computed from.
B pairs, N = 2B items, C width, K prototypes, Q queue.
"""
import math

import torch
import torch.nn as nn
from torch import Tensor

from losses import autocast_device, simcse, swav, unit_rows

TEMPERATURE = {"simcse": 0.05, "swav": 0.1}  # arXiv 2104.08821, 2006.09882; the paper gives none


def contrast_items(h, kind):
    """h: (B, 2, C) hidden states of chosen and rejected -> (2B, C) items"""
    if kind == "difference":
        d = h[:, 0] - h[:, 1]
        return torch.cat((d, -d))
    return h.flatten(0, 1)


class ContrastiveHead(nn.Module):
    """The contrastive term and SwAV's memory: prototypes, and past items of both views.

    Trained with the reward model, not saved.
    settings: the [contrast] section
    total: number of items in the whole training; prototypes are frozen for a share of it
    ranks: runtime/distributed.py, to take part in the losses of other processes' items, or None
    """

    def __init__(self, settings, width, generator, total=0, ranks=None):
        super().__init__()
        self.ranks = ranks
        self.settings = settings
        self.temperature = settings.temperature or TEMPERATURE[settings.term]
        self.items_seen = 0
        self.frozen_items = settings.frozen * total
        self.flat_checks = 0
        self.queue: Tensor
        if settings.term == "swav":
            prototypes = torch.randn(settings.prototypes, width, generator=generator)
            self.prototypes = nn.Parameter(unit_rows(prototypes))
            self.register_buffer("queue", torch.zeros(2, settings.queue, width))

    def get_extra_state(self):
        return self.items_seen

    def set_extra_state(self, items_seen):
        self.items_seen = items_seen

    def forward(self, h):
        """h: (2B, 2, C), view s before view t -> (2B,) loss of each item, also of other ranks"""
        h_s, h_t = h.chunk(2)
        if self.ranks is not None:
            h_s, h_t = self.ranks.gather(torch.stack((h_s, h_t), dim=1)).unbind(1)
        view_s = contrast_items(h_s, self.settings.items)
        view_t = contrast_items(h_t, self.settings.items)
        if self.settings.term == "simcse":
            loss = simcse(view_s, view_t, self.temperature)
        else:
            loss = self.swav_loss(view_s, view_t)
        return loss if self.ranks is None else self.ranks.count_once(loss)

    def swav_loss(self, view_s, view_t):
        """SwAV with a queue: past items take part in the codes, not in the loss.  -> (N,)"""
        N = len(view_s)
        with torch.no_grad():
            self.prototypes.copy_(unit_rows(self.prototypes))
        is_frozen = self.items_seen < self.frozen_items
        prototypes = self.prototypes.detach() if is_frozen else self.prototypes
        if self.ranks is not None:
            prototypes = self.ranks.divide_gradient(prototypes)
        queue_len = min(self.items_seen, self.settings.queue)
        views = torch.stack((unit_rows(view_s), unit_rows(view_t)))          # (2, N, C)
        with torch.autocast(autocast_device(views), enabled=False):  # epsilon magnifies rounding
            features = torch.cat((views, self.queue[:, :queue_len]), dim=1)  # (2, N + queue_len, C)
            scores_s, scores_t = features @ prototypes.T                     # (N + queue_len, K)
        loss = swav(
            scores_s, scores_t, self.temperature, self.settings.epsilon, self.settings.iterations
        )
        with torch.no_grad():
            newest_first = torch.cat((views, self.queue), dim=1)
            self.queue = newest_first[:, :self.settings.queue]
        self.items_seen += N
        return loss[:N]

    def collapse_warning(self, loss):
        """One line once SwAV has collapsed, else "".  loss: its mean since the last call

        Where all items are alike, each code is uniform and all prototypes are equally likely: the
        loss is 2 ln K and stays there.  A loss above that is no collapse: the views contradict
        each other.
        """
        if self.settings.term != "swav":
            return ""
        collapsed = 2 * math.log(self.settings.prototypes)
        is_flat = abs(loss - collapsed) < 0.01 * collapsed
        self.flat_checks = self.flat_checks + 1 if is_flat else 0
        if self.flat_checks != 3:
            return ""
        return (
            f"warning: swav's loss is stuck at {loss:.3f}, 2 ln K = {collapsed:.3f}: its items or "
            f"prototypes have collapsed; lower contrast.epsilon or lr, raise contrast.queue, or "
            f"freeze the prototypes at first (contrast.frozen)"
        )
