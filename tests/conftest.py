"""Puts the repository's root on the path, and makes every test start from the same state."""
import os
import sys

import hypothesis
import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
