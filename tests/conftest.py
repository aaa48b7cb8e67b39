"""What all tests share: one thread, repeatable hypothesis examples, one seed before every test,
and one small finished run.

pyproject.toml puts the root of the repository and tests/ on the path.
"""
import signal

import hypothesis
import pytest
import torch
from helpers import go
from small_runs import copy_run

torch.set_num_threads(1)
# `nohup pytest` ignores SIGHUP, a script's `pytest &` SIGINT, and children inherit both.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of one finished run of the SMALL settings; what changes a file takes `copied`"""
    out = tmp_path_factory.mktemp("finished")
    assert go(out, "--log.figures=true") == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be changed"""
    return copy_run(finished, tmp_path / "run")
