"""The run of seconds that the trainer's tests share."""
import pytest
from image_folders import write_images

from convnn_timm.train.engine import main


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """40 training and 17 validation images of each of three classes, 16x16."""
    return write_images(tmp_path_factory.mktemp('images'), {'train': 40, 'validation': 17})


@pytest.fixture(scope='session')
def flags(images):
    """A run of seconds."""
    return [
        '--data-dir', str(images), '--model', 'test_resnet', '--img-size', '16', '-b', '16', '--epochs', '3',
        '--lr', '0.05', '--warmup-epochs', '0', '--workers', '0', '--crop-padding', '2', '--color-jitter', '0',
        '--drop', '0.3', '--checkpoint-hist', '1',
    ]


@pytest.fixture(scope='session')
def run(flags, tmp_path_factory):
    """A finished run."""
    return main([*flags, '--output', str(tmp_path_factory.mktemp('output')), '--experiment', 'run'])
