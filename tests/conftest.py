"""What all tests share: the processor's cores, the same random numbers in every run, and the scripts as modules."""
import importlib.util
import os
from pathlib import Path

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers > 1:  # each starts processes of its own. torch reads this when it is imported, and never again
    os.environ['OMP_NUM_THREADS'] = str(max(1, (os.cpu_count() or 1) // workers))

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Random weights are those of seed 0 whichever tests ran before: a bound that holds, holds in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def load_script():
    """Imports a file of train_scripts, which is no package, anew."""
    def load(name):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / 'train_scripts' / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def onnx_packages():
    for name in 'onnx', 'onnxscript', 'onnxruntime':
        pytest.importorskip(name, reason=f"needs {name}: pip install 'convnn-timm[test]'")
