"""Settings of all tests: one thread, repeatable hypothesis examples, one seed before every test.

pyproject.toml puts the root of the repository and tests/ on the path.
"""
import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
