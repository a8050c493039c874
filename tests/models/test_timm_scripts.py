"""timm's own scripts, unmodified, find the models. TIMM_SCRIPTS names the folder that they were copied to.

timm's packages do not contain its scripts: take train.py, validate.py, inference.py and benchmark.py from its
repository and copy them out of the checkout, which would otherwise be imported in place of the installed timm.
"""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPTS = os.environ.get('TIMM_SCRIPTS')
MODEL = 'resnet18_convnn_branching'
CLASSES = ('ant', 'bee', 'cat')

pytestmark = pytest.mark.skipif(not SCRIPTS, reason="set TIMM_SCRIPTS to a folder with timm's train.py, ...")


def run(script: str, *args, autoload: bool = True) -> str:
    command = [sys.executable, Path(SCRIPTS, script), '--model', MODEL, '--device', 'cpu', *args]
    env = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': str(int(autoload))}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    random = np.random.default_rng(0)
    for split, count in ('train', 8), ('validation', 4):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{name}{number}.png')
    return folder


def train(images, folder, *args, **kwargs):
    run('train.py', '--data-dir', images, '--num-classes', len(CLASSES), '--epochs', 1, '--warmup-epochs', 0,
        '--batch-size', 8, '--workers', 1, '--output', folder, '--experiment', 'run', *args, **kwargs)
    return folder / 'run'


@pytest.fixture(scope='module')
def checkpoint(images, tmp_path_factory):
    return train(images, tmp_path_factory.mktemp('output')) / 'last.pth.tar'


def summary(folder):
    with open(folder / 'summary.csv') as file:
        epoch, = csv.DictReader(file)
    return {name: float(value) for name, value in epoch.items()}


def test_train(checkpoint):
    epoch = summary(checkpoint.parent)
    assert epoch['train_loss'] > 0 and 0 <= epoch['eval_top1'] <= 100


def test_validate_repeats_the_accuracy_of_train(images, checkpoint):
    printed = run('validate.py', images, '--num-classes', len(CLASSES), '--checkpoint', checkpoint, '--workers', 1)
    result = json.loads(printed.split('--result')[1])
    assert result['model'] == MODEL
    assert result['top1'] == pytest.approx(summary(checkpoint.parent)['eval_top1'], abs=0.01)


def test_inference(images, checkpoint, tmp_path):
    pytest.importorskip('pandas')  # the script needs it
    run('inference.py', images / 'validation', '--num-classes', len(CLASSES), '--checkpoint', checkpoint,
        '--workers', 1, '--results-dir', tmp_path, '--results-file', tmp_path / 'result')
    with open(tmp_path / 'result.csv') as file:
        assert len(list(csv.DictReader(file))) == 4 * len(CLASSES)


def test_benchmark():
    printed = run('benchmark.py', '--batch-size', 4, '--num-warm-iter', 1, '--num-bench-iter', 5, '--no-retry')
    result = json.loads(printed.split('--result')[1])
    assert result['infer_samples_per_sec'] > 0 and result['train_samples_per_sec'] > 0


def test_train_with_device_modules(images, tmp_path):
    folder = train(images, tmp_path, '--device-modules', 'convnn_timm', autoload=False)
    assert (folder / 'last.pth.tar').exists()


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_train_distils_a_published_twin(images, checkpoint, tmp_path, kind):
    folder = train(
        images, tmp_path, '--kd-model-name', 'resnet18_conv2d.cifar10', '--kd-distill-type', kind,
        '--distill-loss-weight', 100, '--model-ema')
    assert 'state_dict_ema' in torch.load(folder / 'last.pth.tar', weights_only=False)
    assert summary(folder)['train_loss'] > 2 * summary(checkpoint.parent)['train_loss']  # the teacher's part
