"""One torch thread (tiny nets run fastest so), and no hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import toys

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def kept_toys(tmp_path_factory):
    """Toys are trained once for all workers of a run, in the run's own temporary folder."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        toys.KEPT = tmp_path_factory.getbasetemp().parent / "toys"
