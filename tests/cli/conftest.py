"""Commands are called in this process; `run` has what they print."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from convnn_timm import cli
from convnn_timm.cli import terminal


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """No word of waiting, however slow the machine is."""
    monkeypatch.setattr(terminal, 'PATIENCE', 600.)


@pytest.fixture
def run(capsys):
    """Calls a command, and returns its status, its output and its errors."""
    def call(*argv):
        status = cli.main([str(word) for word in argv])
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def error_of(run):
    """Calls a command that fails with `status`, and returns its message: one line and nothing else."""
    def call(*argv, status=1):
        actual, out, err = run(*argv)
        assert (actual, out) == (status, ''), err
        assert err.startswith('convnn-timm: error: ') and err.count('\n') == 1, err
        return err
    return call


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
    """A small timm model saved as a folder, three classes, 24x24 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('model')
    model = timm.create_model('test_resnet', num_classes=3)
    config = dict(label_names=['ant', 'bee', 'cat'], pretrained_cfg=dict(input_size=(3, 24, 24), crop_pct=1.0))
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return folder


@pytest.fixture
def photo(tmp_path):
    """An image file."""
    path = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    return path
