"""What all tests share: the processor's cores, and the same random numbers in every run."""
import os

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers > 1:  # each starts processes of its own. torch reads this when it is imported, and never again
    os.environ['OMP_NUM_THREADS'] = str(max(1, (os.cpu_count() or 1) // workers))

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Random weights are those of seed 0 whichever tests ran before: a bound that holds, holds in every run."""
    torch.manual_seed(0)
