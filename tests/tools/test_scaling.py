"""What several GPUs hold and send, as docs/scaling.md has it."""
from pathlib import Path

import pytest
from helpers import TINY, tiny

from tools import scaling

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_printed_tables(capsys):
    assert scaling.main([]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "docs/scaling.md").read_text()


def test_sizes_are_those_of_the_model():
    model = tiny()
    sizes = scaling.sizes_of(TINY)
    assert sizes.all == sum(p.numel() for p in model.parameters())
    assert sizes.block == sum(p.numel() for p in model.model.layers["1"].parameters())
    assert sizes.all == TINY.layers * sizes.block + sizes.rest


def test_shards_of_many_ranks_leave_what_is_gathered():
    sizes = scaling.Sizes(1000, 100, 300)
    assert scaling.training_bytes(sizes, 1, True) == 16_000
    assert scaling.training_bytes(sizes, 10 ** 9, True) == pytest.approx(4 * (300 + 100 + 300))
    assert scaling.ppo_bytes(sizes, 1, False) == 40_000
    assert scaling.ppo_bytes(sizes, 10 ** 9, True) == pytest.approx(4 * 1000)


def test_what_is_sent_grows_to_two_or_three_times_the_weights():
    sizes = scaling.Sizes(1000, 100, 300)
    assert scaling.sent_bytes(sizes, 1, False) == 0
    assert scaling.sent_bytes(sizes, 2, False) == 4000
    assert scaling.sent_bytes(sizes, 10 ** 9, True) == pytest.approx(12_000)
    assert scaling.efficiency(100, 1, 1.0, False) == 1
    assert scaling.efficiency(6400, 8, 1e9, True) < scaling.efficiency(6400, 8, 1e9, False) < 1
