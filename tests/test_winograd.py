"""Training with 3x3 convolutions by Winograd's algorithm: the same network as with torch's."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from convnn_timm.macs import count_macs

SCRIPT = Path(__file__).parents[1] / 'train_scripts' / 'winograd.py'
pytestmark = pytest.mark.skipif(
    sys.platform != 'linux' or not any(map(shutil.which, ('c++', 'g++', 'clang++'))),
    reason='winograd.py needs Linux and a C++ compiler')


@pytest.fixture(scope='module')
def winograd(load_script):
    module = load_script('winograd')
    direct = nn.Conv2d._conv_forward
    module.use_winograd()
    yield module
    nn.Conv2d._conv_forward = direct


@pytest.mark.parametrize('batch, inputs, outputs, height, width, chunk', [
    (16, 8, 8, 1, 1, None),
    (16, 16, 24, 7, 9, None),
    (17, 24, 16, 10, 4, 40_000),  # several chunks, the last one smaller
    (20, 8, 56, 32, 32, 1),  # an image at a time
])
def test_values_and_gradients_are_those_of_the_convolution(
        winograd, monkeypatch, batch, inputs, outputs, height, width, chunk):
    if chunk:
        monkeypatch.setattr(winograd, 'CHUNK', chunk)
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    x = torch.randn(batch, inputs, height, width, requires_grad=True)
    y = layer(x)
    assert type(y.grad_fn).__name__ == 'ConvolutionBackward'
    gradient = torch.randn_like(y)
    results = y, *torch.autograd.grad(y, (x, layer.weight), gradient)

    exact = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    y = torch.conv2d(*exact, padding=1)
    expected = y, *torch.autograd.grad(y, exact, gradient.double())
    for value, wanted in zip(results, expected):
        assert (value - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize('layer, batch', [
    (nn.Conv2d(8, 8, 3, padding=1), 16),  # a bias
    (nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False), 16),
    (nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), 16),
    (nn.Conv2d(8, 8, 3, padding=1, bias=False, padding_mode='reflect'), 16),
    (nn.Conv2d(8, 8, 1, bias=False), 16),
    (nn.Conv2d(8, 12, 3, padding=1, bias=False), 16),
    (nn.Conv2d(8, 8, 3, padding=1, bias=False).double(), 16),
    (nn.Conv2d(8, 8, 3, padding=1, bias=False), 1),
])
def test_other_convolutions_are_left_to_torch(winograd, layer, batch):
    x = torch.randn(batch, 8, 6, 6, dtype=layer.weight.dtype)
    y = layer(x)
    assert type(y.grad_fn).__name__ == 'ConvolutionBackward0'
    if layer.padding_mode == 'zeros':
        assert y.equal(torch.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups))


def test_under_autocast_the_dtype_is_torchs(winograd):
    layer, x = nn.Conv2d(8, 8, 3, padding=1, bias=False), torch.randn(16, 8, 6, 6)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_run_names_the_script_and_counts_what_a_convolution_costs(tmp_path):
    flags = (
        '--data-dir cifar --model resnet18_conv2d --num-classes 10 --batch-size 16 '
        '--epochs 1 --no-amp --opt sgd --lr 0.01 --workers 0 --output . --experiment run').split()
    for split in 'train', 'validation':
        for label in range(10):
            folder = tmp_path / 'cifar' / split / str(label)
            folder.mkdir(parents=True)
            for image in range(2):
                Image.new('RGB', (32, 32), (label * 20, image, 0)).save(folder / f'{image}.png')
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, 'PYTHONPATH': str(SCRIPT.parents[1])})
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'run' / 'environment.json').read_text())
    assert record['command'] == 'python train_scripts/winograd.py ' + ' '.join(flags)
    model = timm.create_model('resnet18_conv2d', num_classes=10)
    assert f' {count_macs(model) / 1e9:.4f} GMACs' in (tmp_path / 'run' / 'model.txt').read_text()
