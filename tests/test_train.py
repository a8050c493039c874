"""The trainer: what it trains on, what it leaves behind, and that nothing it says depends on luck."""
import json
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from collections import Counter
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.optim import muon
from torch.overrides import TorchFunctionMode

from convnn_timm import convert
from convnn_timm.hub import publish as hub
from convnn_timm.train import engine as train, run_folder as train_folder
from convnn_timm.models import _weights
from convnn_timm.train.engine import evaluate, main, parse_args
from convnn_timm.train.flags import recipe_names
from convnn_timm.train.data import (
    FolderReader, MemoryBatches, class_names, class_numbers, create_batches, create_parts, holdout_split)
from convnn_timm.train.run_folder import read_summary, starts_alike

CLASSES = ('bee', 'cat', 'dog')


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """40 training and 17 validation images of each of three classes, 16x16, told apart by a colour."""
    root, noise = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, count in (('train', 40), ('validation', 17)):
        for channel, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 160, (16, 16, 3)).astype(np.uint8)
                pixels[..., channel] += 40
                Image.fromarray(pixels).save(root / split / name / f'{i}.png')
    return root


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


def printed_result(capsys):
    return capsys.readouterr().out.strip().splitlines()[-1]


def weights(folder):
    return torch.load(folder / 'last.pth.tar', weights_only=False)


def equal(a, b):
    """Equality of nested containers down to the last bit of the tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# The run folder

def test_run_folder_is_complete(run):
    files = {path.name for path in run.iterdir()}
    assert files == {
        'args.yaml', 'environment.json', 'summary.csv', 'curve.png', 'model.txt', 'last.pth.tar',
        'checkpoint-2.pth.tar', 'model',
    }
    assert {path.name for path in (run / 'model').iterdir()} == {'config.json', 'model.safetensors'}
    assert len({path.stat().st_mode for path in run.rglob('*') if path.is_file()}) == 1  # as the process's umask says
    config = json.loads((run / 'model' / 'config.json').read_text())
    assert config['num_classes'] == 3 and 'num_classes' not in config['model_args']
    header, *rows = (run / 'summary.csv').read_text().split()
    assert header.split(',') == [
        'epoch', 'train_loss', 'train_images_per_s', 'train_data_share', 'eval_loss', 'eval_top1', 'eval_top5',
        'eval_images', 'lr',
    ]
    assert [row.split(',')[0] for row in rows] == ['0', '1', '2']
    assert (run / 'model.txt').read_text().startswith('372,979 parameters, 0.00')
    with Image.open(run / 'curve.png') as curve:
        assert curve.format == 'PNG'


def test_it_learns(run):
    assert float((run / 'summary.csv').read_text().split()[-1].split(',')[5]) > 90


def test_environment_names_no_machine_and_no_folder_but_the_data(run, images):
    text = (run / 'environment.json').read_text()
    record = json.loads(text)
    assert record['torch'] == torch.__version__.split('+')[0]
    assert record['cpu_capability'] == torch.backends.cpu.get_cpu_capability()  # AVX512 or AVX2: a factor of six
    assert record['cpu_amx'] in (True, False)
    assert record['command'].startswith('convnn-timm train ')
    assert os.uname().nodename not in text
    assert str(run.parent) not in text and str(images) in text


def test_args_yaml_is_a_recipe_that_repeats_the_run(run, tmp_path):
    assert '&id' not in (run / 'args.yaml').read_text()
    again = main(['-c', str(run / 'args.yaml'), '--output', str(tmp_path), '--experiment', 'again'])
    assert equal(weights(run)['state_dict'], weights(again)['state_dict'])


def test_model_folder_loads_back_with_equal_logits(run):
    model = timm.create_model(f'local-dir:{run / "model"}', pretrained=True).eval()
    assert model.pretrained_cfg['input_size'] == (3, 16, 16)
    assert model.pretrained_cfg['label_names'] == list(CLASSES)
    twin = timm.create_model('test_resnet', num_classes=3).eval()
    twin.load_state_dict(weights(run)['state_dict'])
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), twin(x))


def test_model_folder_keeps_the_model_arguments(flags, tmp_path):
    folder = main([
        *flags, '--model', 'resnet18_convnn_branching', '--model-kwargs', 'K=3', 'branch_ratio=0.25', '--epochs', '1',
        '--batch-size', '60', '--channels-last', '--model-ema', '--output', str(tmp_path), '--experiment', 'run'])
    model = timm.create_model(f'local-dir:{folder / "model"}', pretrained=True)
    twin = timm.create_model('resnet18_convnn_branching', num_classes=3, K=3, branch_ratio=0.25)
    twin.load_state_dict(weights(folder)['state_dict_ema'])
    assert equal(model.state_dict(), twin.state_dict())
    assert str(model) == str(twin)


@pytest.fixture(scope='module')
def converted(flags, tmp_path_factory):
    """A finished run of a converted model."""
    return main([
        *flags, '--convert', 'where=layer3.*,layer4.*', 'K=3', 'branch_ratio=0.25', '--epochs', '2', '--output',
        str(tmp_path_factory.mktemp('converted')), '--experiment', 'run'])


def test_a_converted_model_is_recorded_and_rebuilt(converted, capsys):
    conversion = dict(where='layer3.*,layer4.*', K=3, branch_ratio=0.25)
    assert yaml.safe_load((converted / 'args.yaml').read_text())['convert'] == conversion
    assert json.loads((converted / 'model' / 'config.json').read_text())['architecture'] == 'convnn_converted'
    twin = timm.create_model('test_resnet', num_classes=3).eval()
    convert(twin, **conversion)
    twin.load_state_dict(weights(converted)['state_dict'])
    model = timm.create_model(f'local-dir:{converted / "model"}', pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    assert str(model) == str(twin) and torch.equal(model(x), twin(x))

    main(['--evaluate', str(converted)])
    last = (converted / 'summary.csv').read_text().split()[-1].split(',')
    assert printed_result(capsys) == f'top1 {float(last[5]):.2f} top5 100.00 (epoch 2, 51 images)'


def test_a_converted_run_is_resumed_by_its_own_arguments_only(converted, tmp_path):
    again = ['-c', str(converted / 'args.yaml'), '--output', str(tmp_path), '--experiment', 'copy']
    again += ['--resume', str(converted / 'last.pth.tar')]
    with pytest.raises(SystemExit, match='convert: .*0.25.* there, .*here'):
        main([*again, '--convert', 'K=3'])
    folder = main(again)
    assert equal(weights(converted)['state_dict'], load_file(folder / 'model' / 'model.safetensors'))


def test_arguments_without_conversion_are_recorded_as_ever(run):
    assert 'convert' not in yaml.safe_load((run / 'args.yaml').read_text())


def test_a_converted_run_is_exported(converted, run, tmp_path, monkeypatch):
    (tmp_path / 'manifest.json').write_text('[]')
    monkeypatch.setattr(_weights, 'MANIFEST', tmp_path / 'manifest.json')
    folder = hub.export(converted, 'colours', tmp_path, twin=run)
    assert folder.name == 'test_resnet_converted.colours' and not hub.check_folder(folder)
    card = (folder / 'README.md').read_text()
    assert "timm.create_model('hf-hub:convnn-timm/test_resnet_converted.colours', pretrained=True)" in card
    assert '| `test_resnet` | `where=layer3.*,layer4.* K=3 branch_ratio=0.25` |' in card
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    original = timm.create_model(f'local-dir:{converted / "model"}', pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), original(x), rtol=0, atol=0.02)  # half as many bytes


@pytest.mark.parametrize('conversion, message', [
    ('where=layer9.*', 'test_resnet: `where` selects no convolution .*layer9'),
    ('colour=3', 'test_resnet: unknown argument colour'),
    ('layer=attention', "test_resnet: unknown layer 'attention', valid are"),
])
def test_wrong_conversion(flags, tmp_path, conversion, message):
    with pytest.raises(SystemExit, match=message):
        main([*flags, '--convert', conversion, '--output', str(tmp_path)])


def test_checkpoint_is_timms(run):
    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(run / 'last.pth.tar'))
    assert equal(model.state_dict(), weights(run)['state_dict'])


def test_evaluating_a_run_repeats_its_result(run, capsys):
    main(['--evaluate', str(run)])
    last = (run / 'summary.csv').read_text().split()[-1].split(',')
    assert printed_result(capsys) == f'top1 {float(last[5]):.2f} top5 100.00 (epoch 3, 51 images)'


def test_export_recognises_a_run_of_timms_own_trainer(tmp_path):
    """Its args.yaml, summary.csv and checkpoints have the names of ours."""
    (tmp_path / 'args.yaml').write_text('model: resnet18_convnn\neval_metric: top1\nlog_wandb: false\n')
    (tmp_path / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,1.5,1.2,50,90,0.1\n')
    for name in 'last.pth.tar', 'model_best.pth.tar':
        (tmp_path / name).touch()
    with pytest.raises(hub.WeightsError) as error:
        hub.export(tmp_path, 'colours')
    assert f"{tmp_path} is a run of timm's train.py" in str(error.value)
    assert f'--model resnet18_convnn --checkpoint {tmp_path}/model_best.pth.tar' in str(error.value)


@pytest.mark.parametrize('parts, message', [
    (['last.pth.tar'], 'is not finished. To finish it: convnn-timm train -c .*args.yaml --resume auto'),
    (['summary.csv'], 'no checkpoint to finish one from'),
])
def test_evaluating_an_unfinished_run_says_how_to_finish_it(run, tmp_path, images, parts, message):
    (tmp_path / 'args.yaml').write_text(f'data_dir: {images}')
    for part in parts:
        shutil.copy(run / part, tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(['--evaluate', str(tmp_path)])


def test_an_interrupt_before_there_is_a_run(monkeypatch, capsys):
    monkeypatch.setattr(train, 'parse_args', Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match='^130$'):
        main([])
    assert capsys.readouterr().err == 'interrupted\n'


def test_every_image_counts_the_same():
    logits, targets = torch.randn(23, 7), torch.randint(7, (23,))
    metrics = evaluate(torch.nn.Identity(), zip(logits.split(10), targets.split(10)))
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert metrics['images'] == 23
    assert metrics['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    assert metrics['top1'] == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert metrics['top5'] == pytest.approx(100 * (ranks < 5).double().mean().item())


# Arguments

def test_command_line_beats_recipe_beats_default(tmp_path):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('epochs: 7\nlr: 1e-3\namp: true\ndevice_modules: [convnn_timm]\n')
    args = parse_args(['-c', str(recipe), 'somewhere', '--epochs', '9', '--no-amp'])
    assert (args.epochs, args.lr, args.amp, args.momentum, args.data_dir) == (9, 1e-3, False, 0.9, 'somewhere')


def test_command_line_beats_what_a_recipe_says_in_other_words(tmp_path, caplog):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('input_size: [1, 16, 16]\nno_aug: true\nmodel_kwargs: {K: 3, branch_ratio: 0.5}\n')
    args = parse_args(['-c', str(recipe), 'x', '--img-size', '32', '--aug', '--model-kwargs', 'K=5'])
    assert (args.input_size, args.no_aug, args.model_kwargs) == ([1, 32, 32], False, dict(K=5))
    assert 'replaces those of the recipe, which had branch_ratio=0.5 too' in caplog.text
    assert parse_args(['-c', str(recipe), 'x']).no_aug


def test_recipes_of_the_package():
    assert recipe_names() == ['cifar10', 'digits', 'finetune', 'imagenet', 'paper_resnet18', 'paper_vgg11']
    short, long = (vars(parse_args(['-c', name, 'x'])) for name in ('cifar10', 'cifar10.yaml'))
    assert {**short, 'config': ''} == {**long, 'config': ''}
    for name in recipe_names():
        args = parse_args(['-c', name, 'x'])
        kwargs = {**args.model_kwargs, 'device': 'meta', 'drop_rate': args.drop}
        timm.create_model(args.model, **kwargs)


@pytest.mark.parametrize('text, message', [
    ('epocs: 3', "unknown key 'epocs', did you mean 'epochs'?"),
    ('colour: red', "unknown key 'colour'"),
    ('- epochs', 'expected lines'),
    ('epochs: [', 'expected the node content'),
    ("amp: 'false'", "amp must be true or false, not 'false'"),
    ('epochs: 1.5', 'epochs must be an integer, not 1.5'),
    ('lr: [0.1]', 'lr must be a number, not [0.1]'),
    ('scale: 0.08', 'scale must be a list of 2 numbers, not 0.08'),
    ('model_kwargs: K=5', "model_kwargs must be names with values, not 'K=5'"),
    ('train_sizes: [16, half]', "train_sizes must be a list of integers, not [16, 'half']"),
    ('train_sizes: [16, 24.5]', 'train_sizes must be a list of integers, not [16, 24.5]'),
    ('ratio: [1]', 'ratio must be a list of 2 numbers, not [1]'),
    ('clip_mode: foo', '--clip-mode must be one of norm, value, agc, got foo'),
    ("hflip: '3'", '--hflip must be from 0 to 1, got 3.0'),
])
def test_wrong_recipe(tmp_path, text, message, capsys):
    (tmp_path / 'wrong.yaml').write_text(text)
    with pytest.raises(SystemExit) as error:
        main(['-c', str(tmp_path / 'wrong.yaml'), 'x'])
    assert message in f'{error.value} {capsys.readouterr().err}'


@pytest.mark.parametrize('argv, message', [
    (['-c', 'cifar11', 'x'], "no recipe 'cifar11': neither a file nor one of cifar10"),
    ([], '--data-dir DIR'),
    (['x', '--epoch', '3'], 'unrecognized arguments: --epoch'),
    (['x', '--sched', 'plateau'], 'plateau is not supported'),
    (['x', '--amp-dtype', 'float8'], '--amp-dtype must be one of float16, bfloat16, got float8'),
    (['x', '--interpolation', 'random'], '--interpolation must be one of nearest, '),
    (['x', '--train-interpolation', 'foo'], '--train-interpolation must be one of nearest, '),
    (['x', '--train-crop-mode', 'foo'], '--train-crop-mode must be one of rrc, rkrc, rkrr, got foo'),
    (['x', '--remode', 'foo'], '--remode must be one of pixel, rand, const'),
    (['x', '--mixup-mode', 'foo'], '--mixup-mode must be one of batch, pair, elem'),
    (['x', '--lr-base-scale', 'foo'], '--lr-base-scale must be one of linear, sqrt'),
    (['x', '--smoothing', '1'], '--smoothing must be 0 or more and less than 1, got 1.0'),
    (['x', '--model-ema-decay', '5'], '--model-ema-decay must be from 0 to 1'),
    (['x', '--crop-pct', '2'], '--crop-pct must be more than 0 and at most 1, got 2.0'),
    (['x', '--mixup', 'nan'], '--mixup must be 0 or more, got nan'),
    (['x', '--scale', '0.5'], 'argument --scale: expected 2 arguments'),
    (['x', '--opt-betas', '0.9'], '--opt-betas must be two numbers or more, got [0.9]'),
    (['x', '--cutmix', '1', '-b', '7'], '--mixup and --cutmix pair the images: --batch-size must be even, got 7'),
    (['/nowhere'], 'there is no folder /nowhere'),
    (['x', '--train-sizes', '8', '0'], '--train-sizes must be 1 or more, got [8, 0]'),
    (['x', '--epochs', '0'], '--epochs must be 1 or more, got 0'),
    (['x', '--workers', '-1'], '--workers must be 0 or more, got -1'),
    (['x', '--grad-accum-steps', '-1'], '--grad-accum-steps must be 1 or more'),
    (['x', '--model-kwargs', 'foo'], 'take KEY=VALUE'),
    (['x', '--dataset', 'cifar10'], '--dataset cifar10: name it with its source, e.g. torch/cifar10'),
    (['x', '--dataset', 'uoft-cs/cifar10'], 'e.g. torch/cifar10 or hfds/uoft-cs/cifar10'),
    (['x', '--crop-off-epoch', '2'], '--crop-off-epoch turns off the crops of --crop-padding, which is not given'),
    (['--evaluate', 'nowhere', 'x'], 'nowhere is no run folder: it has no args.yaml'),
])
def test_wrong_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code
    assert message in f'{error.value} {capsys.readouterr().err}'


@pytest.mark.parametrize('argv, message', [
    (['--val-split', 'test'], "no folder 'test': it has train, validation. Expected are .*see --train-split"),
    (['--val-split', 'test', '--dataset', 'torch/image_folder'], "no folder 'test': it has train, validation. Exp"),
    (['--train-split', 'train[:50%]', '--val-split', 'train[50%:]'], 'only hfds/ data sets have parts of a split'),
])
def test_a_missing_split_is_not_replaced_by_all_images(flags, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message):
        main([*flags, *argv, '--output', str(tmp_path)])


@pytest.mark.parametrize('argv, message', [
    (['--model', 'resnet18_convn'], r"unknown model 'resnet18_convn'; did you mean .*resnet18_convnn\b.*\?"),
    (['--model', 'resnet18_convnn', '--model-kwargs', 'colour=3'], 'resnet18_convnn: .*colour'),
    (['--model', 'resnet18_convnn', '--model-kwargs', 'K=0'], 'resnet18_convnn: .*K'),
    (['--model', 'resnet18_convnn', '--pretrained'], 'resnet18_convnn has no pretrained weights: --no-pretrained'),
])
def test_wrong_model(flags, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message):
        main([*flags, *argv, '--output', str(tmp_path)])


@pytest.mark.parametrize('argv, message', [
    (['--opt', 'bogus'], 'bogus'), (['--sched', 'bogus'], 'bogus'), (['--aa', 'bogus'], 'bogus'),
    (['--lr', '-1'], 'lr|rate'),
    (['--device', 'tpu'], 'tpu'), (['--initial-checkpoint', 'nowhere.pth'], 'nowhere.pth'),
    (['--model', 'resnet18_convnn', '--model-kwargs', 'K=500'], 'K=500 neighbours need as many tokens'),
    (['--output', __file__], 'Not a directory'), (['--input-size', '2', '16', '16'], 'image files have 1'),
])
def test_what_goes_wrong_before_the_first_epoch_is_said_in_a_line(flags, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message) as error:
        main([*flags, '--output', str(tmp_path / 'out'), *argv])
    assert len(str(error.value).splitlines()) == 1


def copied(images, folder):
    shutil.copytree(images, folder)
    return folder


@pytest.mark.parametrize('workers', ['0', '1'])
@pytest.mark.parametrize('cache', ['--cache', '--no-cache'])
def test_an_unreadable_image_is_not_replaced_by_another(flags, images, tmp_path, cache, workers):
    data = copied(images, tmp_path / 'data')
    bad = data / 'validation' / 'cat' / '3.png'
    bad.write_text('not an image')
    with pytest.raises(SystemExit) as error:
        main([*flags, cache, '--workers', workers, '--data-dir', str(data), '--output', str(tmp_path / 'out')])
    assert str(error.value) == f'error: {bad}: not an image'


def test_classes_that_differ_are_named(flags, images, tmp_path):
    data = copied(images, tmp_path / 'data')
    (data / 'validation' / 'cat').rename(data / 'validation' / 'Cat')
    with pytest.raises(SystemExit, match=r'(?s)different classes:.*only in train: cat.*only in validation: Cat'):
        main([*flags, '--data-dir', str(data), '--output', str(tmp_path / 'out')])
    for split in 'train', 'validation':
        for name in 'Cat', 'cat', 'dog':
            shutil.rmtree(data / split / name, ignore_errors=True)
    with pytest.raises(SystemExit, match='several classes, and has bee'):
        main([*flags, '--data-dir', str(data), '--output', str(tmp_path / 'out')])


def test_a_run_is_evaluated_on_its_own_classes_only(run, images, tmp_path):
    data = copied(images, tmp_path / 'data')
    for split in 'train', 'validation':
        (data / split / 'dog').rename(data / split / 'zebra')
    with pytest.raises(SystemExit, match='the model tells bee, cat, dog apart, the data has bee, cat, zebra'):
        main(['--evaluate', str(run), '--data-dir', str(data)])


def test_grey_images(flags, tmp_path, capsys):
    folder = main([*flags, '--input-size', '1', '16', '16', '--epochs', '1', '--output', str(tmp_path)])
    trained = printed_result(capsys)
    main(['--evaluate', str(folder)])
    assert printed_result(capsys) == trained
    config = json.loads((folder / 'model' / 'config.json').read_text())['pretrained_cfg']
    assert config['input_size'] == [1, 16, 16] and len(config['mean']) == len(config['std']) == 1


def test_clip_grad_0_clips_nothing(flags, tmp_path):
    ends = [
        main([*flags, *extra, '--epochs', '1', '--output', str(tmp_path), '--experiment', f'run{len(extra)}'])
        for extra in ([], ['--clip-grad', '0'])]
    assert equal(*(weights(end)['state_dict'] for end in ends))


def test_the_recipe_stays_with_the_run(flags, tmp_path):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('smoothing: 0.0  # mine\n')
    folder = main(['-c', str(recipe), *flags, '--epochs', '1', '--output', str(tmp_path)])
    assert (folder / 'recipe.yaml').read_text() == recipe.read_text()


def test_too_few_classes_and_images(flags, tmp_path):
    with pytest.raises(SystemExit, match='3 classes, --num-classes is 2'):
        main([*flags, '--num-classes', '2', '--output', str(tmp_path)])
    with pytest.raises(SystemExit, match='there are 120 training images'):
        main([*flags, '--holdout', '120', '--output', str(tmp_path)])


def test_nothing_is_overwritten(flags, run, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    before = {path: path.stat().st_mtime_ns for folder in (run, tmp_path) for path in folder.rglob('*')}
    for folder, resume in ((run, ''), (tmp_path, ''), (tmp_path, 'auto'), (tmp_path, str(run / 'last.pth.tar'))):
        with pytest.raises(SystemExit, match='is not empty: continue .* --resume auto, or choose another --experiment'):
            main([*flags, '--output', str(folder.parent), '--experiment', folder.name, '--resume', resume])
    assert before == {path: path.stat().st_mtime_ns for folder in (run, tmp_path) for path in folder.rglob('*')}


@pytest.mark.parametrize('argv, message', [
    (['--resume', 'auto'], 'name it with --experiment'),
    (['--resume', 'nothing.pth.tar'], 'nothing.pth.tar: there is no such file'),
])
def test_nothing_to_resume(flags, argv, message):
    with pytest.raises(SystemExit, match=message):
        main([*flags, *argv])


def test_weights_are_no_training_to_resume(flags, run, tmp_path):
    torch.save({'state_dict': weights(run)['state_dict']}, tmp_path / 'weights.pth')
    with pytest.raises(SystemExit, match='--initial-checkpoint can take its weights'):
        main([*flags, '--resume', str(tmp_path / 'weights.pth'), '--output', str(tmp_path)])


@pytest.mark.parametrize('name', [['--experiment', 'run'], []])
def test_of_two_runs_that_start_at_once_none_is_lost(flags, tmp_path, monkeypatch, name):
    """The second one begins and ends while the first one makes its model."""
    monkeypatch.setattr(train_folder, 'datetime', Mock(now=lambda: datetime(2026, 1, 2)))
    create_model, argv, second = train.create_model, [*flags, '--epochs', '1', '--output', str(tmp_path), *name], []

    def meanwhile(*args, **kwargs):
        monkeypatch.setattr(train, 'create_model', create_model)
        second.append(main([*argv, '--seed', '7']))
        return create_model(*args, **kwargs)

    monkeypatch.setattr(train, 'create_model', meanwhile)
    if name:
        with pytest.raises(SystemExit, match='run is not empty: '):
            main(argv)
    else:
        assert main(argv) == tmp_path / '20260102-000000-test_resnet-2'
    assert len(read_summary(second[0])) == 1
    assert yaml.safe_load((second[0] / 'args.yaml').read_text())['seed'] == 7


def test_a_record_without_checkpoint_is_not_begun_again(flags, run, tmp_path):
    for name in 'args.yaml', 'environment.json', 'summary.csv':
        shutil.copy(run / name, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match='is the record of a run without its checkpoint'):
        main(['-c', str(tmp_path / 'args.yaml'), '--resume', 'auto'])
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_run_goes_on_where_its_folder_is_now(flags, run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / 'moved')
    (tmp_path / 'moved' / 'summary.csv').unlink()
    for place, config in (tmp_path, 'moved/args.yaml'), (tmp_path / 'moved', 'args.yaml'):
        monkeypatch.chdir(place)
        assert main(['-c', config, '--resume', 'auto']).resolve() == tmp_path / 'moved'
    assert [path.name for path in tmp_path.iterdir()] == ['moved'] and (run / 'summary.csv').is_file()


def test_a_run_does_not_lose_its_later_epochs(flags, run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    torch.save({**weights(run), 'epoch': 0}, tmp_path / 'run' / 'early.pth.tar')
    with pytest.raises(SystemExit, match='would lose the epochs after early.pth.tar: choose another --experiment'):
        main([
            *flags, '--output', str(tmp_path), '--experiment', 'run',
            '--resume', str(tmp_path / 'run' / 'early.pth.tar')])


def test_a_resumed_run_needs_its_first_weights_no_more(flags, run, tmp_path):
    shutil.copy(run / 'last.pth.tar', tmp_path / 'first.pth.tar')
    folder = main([
        *flags, '--initial-checkpoint', str(tmp_path / 'first.pth.tar'), '--epochs', '1', '--output', str(tmp_path),
        '--experiment', 'run'])
    (tmp_path / 'first.pth.tar').unlink()
    main(['-c', str(folder / 'args.yaml'), '--resume', 'auto'])


def test_the_script_does_nothing_in_a_worker_that_imports_it():
    runpy.run_path(str(Path(__file__).parents[1] / 'train_scripts' / 'train.py'), run_name='__mp_main__')


def test_an_optimizer_of_second_order(flags, tmp_path):
    main([*flags, '--opt', 'adahessian', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'run'])


def test_resume_from_a_file_continues_in_another_folder(flags, run, tmp_path):
    folder = main([*flags, '--resume', str(run / 'last.pth.tar'), '--output', str(tmp_path), '--experiment', 'copy'])
    assert equal(weights(run)['state_dict'], load_file(folder / 'model' / 'model.safetensors'))


def test_resume_a_run_that_is_older_than_an_argument(flags, run, tmp_path):
    checkpoint = weights(run)
    del checkpoint['args'].crop_padding_mode
    torch.save(checkpoint, tmp_path / 'old.pth.tar')
    flags = [*flags, '--resume', str(tmp_path / 'old.pth.tar'), '--output', str(tmp_path)]
    with pytest.raises(SystemExit, match="crop_padding_mode: 'constant' there, 'reflect' here"):
        main([*flags, '--crop-padding-mode', 'reflect'])
    assert (main([*flags, '--experiment', 'new']) / 'model').is_dir()


def test_resume_refuses_other_arguments(flags, run):
    with pytest.raises(SystemExit) as error:
        main([
            *flags, '--output', str(run.parent), '--experiment', run.name, '--resume', 'auto', '--lr', '0.1',
            '--model-kwargs', 'K=3'])
    assert 'model_kwargs: {} there' in str(error.value) and 'lr: 0.05 there, 0.1 here' in str(error.value)
    assert '--initial-checkpoint' in str(error.value)


def test_resume_auto_starts_where_there_is_nothing_to_resume(flags, tmp_path):
    folder = main([*flags, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'new', '--resume', 'auto'])
    assert (folder / 'model').is_dir()


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(flags, tmp_path):
    with pytest.raises(SystemExit, match='the loss is .* choose a smaller --lr'):
        main([*flags, '--lr', '1e30', '--output', str(tmp_path), '--experiment', 'run'])
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()


def test_a_data_set_of_torchvision_has_the_channels_of_the_model(flags, tmp_path):
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for split in 'train', 't10k':
        images = torch.randint(256, (16, 28, 28), dtype=torch.uint8).numpy()
        head = struct.pack('>4i', 0x803, *images.shape)
        (raw / f'{split}-images-idx3-ubyte').write_bytes(head + images.tobytes())
        (raw / f'{split}-labels-idx1-ubyte').write_bytes(struct.pack('>2i', 0x801, 16) + bytes(range(10)) + bytes(6))
    flags = [
        *flags, '--data-dir', str(tmp_path), '--dataset', 'torch/mnist', '--epochs', '1', '--num-classes', '10',
        '--output', str(tmp_path / 'out'), '--experiment', 'run']
    with pytest.raises(SystemExit, match="torch/mnist has no split 'Train': it has train and validation"):
        main([*flags, '--train-split', 'Train'])  # not the test set
    main(flags)
    assert read_summary(tmp_path / 'out' / 'run')[-1]['eval_images'] == '16'


def test_a_class_with_several_names_is_one_class():
    imagenet = Mock(classes=[('crane',), ('tench', 'Tinca tinca'), ('crane',)], class_to_idx={'crane': 2, 'tench': 1})
    assert class_names(imagenet) == ['crane', 'tench, Tinca tinca', 'crane']


@pytest.mark.parametrize('cache', ['--cache', '--no-cache'])
def test_crops_are_of_what_the_evaluation_sees(flags, tmp_path, cache):
    """Not of a distorted image: the sides of a wide one are left out."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :8] = 255
    for split in ('train', 'validation'):
        (tmp_path / split / 'only').mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / 'only' / '0.png')
    args = parse_args([*flags, '--data-dir', str(tmp_path), '-b', '1', cache, '--crop-padding', '0', '--crop-pct', '1'])
    (train_batch, _), (eval_batch, _) = (next(iter(loader_of(args, train))) for train in (True, False))
    assert torch.equal(train_batch, eval_batch) and eval_batch.unique().numel() == 1


def test_weights_of_a_run_with_other_classes(flags, run, tmp_path):
    flags = [*flags, '--num-classes', '5', '--epochs', '1', '--output', str(tmp_path)]
    with pytest.raises(SystemExit) as error:
        main([*flags, '--initial-checkpoint', str(run / 'last.pth.tar')])
    message = str(error.value)
    assert f'--initial-checkpoint {run / "last.pth.tar"}: ' in message and 'size mismatch for fc.weight' in message
    assert '--model local-dir:RUN/model --pretrained' in message and len(message.splitlines()) == 1
    folder = main([*flags, '--model', f'local-dir:{run / "model"}', '--pretrained', '--experiment', 'tuned'])
    assert len(weights(folder)['state_dict']['fc.bias']) == 5


def test_signals_are_the_callers_again(flags):
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(SystemExit):
        main([*flags, '--model', 'zzzz'])
    assert [signal.getsignal(number) for number in numbers] == before


# Images

def test_holdout_is_stratified_and_always_the_same():
    targets = torch.randint(4, (1000,)).tolist()
    held_out = holdout_split(targets, 100)
    torch.manual_seed(5)
    assert held_out == holdout_split(targets, 100) and len(set(held_out)) == 100
    share = Counter(targets[i] for i in held_out)
    assert all(abs(share[c] - n / 10) <= 1 for c, n in Counter(targets).items())


def test_holdout_never_reads_the_validation_set(images, flags, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'train').symlink_to(images / 'train')  # and no validation/
    args = parse_args([*flags, '--data-dir', str(tmp_path / 'data'), '--holdout', '30'])
    train_part, eval_part, _ = create_parts(args)
    assert set(train_part.indices).isdisjoint(eval_part.indices)
    assert len(train_part) == 90
    assert Counter(eval_part.dataset[i][1] for i in eval_part.indices) == {0: 10, 1: 10, 2: 10}


def loader_of(args, train, **kwargs):
    part = create_parts(args)[0 if train else 1]
    config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation='bicubic', crop_pct=1.)
    return create_batches(part, args, config, torch.device('cpu'), train, **kwargs)


def test_images_from_memory_are_timms(flags):
    def load(cache, train):
        loader = loader_of(parse_args([*flags, '--no-aug', '-b', '1', cache]), train)
        return [images[0].numpy().tobytes() for images, _ in loader]
    assert load('--cache', False) == load('--no-cache', False)
    assert sorted(load('--cache', True)) == sorted(load('--no-cache', True))  # each in an order of its own


@pytest.mark.parametrize('mode', ['constant', 'reflect'])
@pytest.mark.parametrize('cache', ['--cache', '--no-cache'])
def test_crop_padding(flags, tmp_path, cache, mode):
    """Every offset of the crop is equally likely, both directions of the flip too; outside is black or a mirror."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for split in ('train', 'validation'):
        (tmp_path / split / 'only').mkdir(parents=True)
        for i in range(25 if split == 'train' else 1):
            Image.fromarray(np.repeat(pixels[..., None], 3, 2)).save(tmp_path / split / 'only' / f'{i}.png')
    args = parse_args([*flags, '--data-dir', str(tmp_path), '-b', '25', cache, '--crop-padding-mode', mode])
    loader, padded, crops, seen = loader_of(args, True), np.pad(pixels, 2, mode), {}, Counter()
    for y in range(5):
        for x in range(5):
            crop = padded[y:y + 16, x:x + 16]
            crops[crop.tobytes()], crops[crop[:, ::-1].tobytes()] = (y, x, False), (y, x, True)
    for epoch in range(40):
        if cache == '--cache':
            loader.loader.set_epoch(epoch)
        for batch, _ in loader:
            for image in (batch * 0.25 + 0.5).mul(255).round().byte()[:, 0].numpy():
                seen[crops[image.tobytes()]] += 1
    assert len(seen) == 50 and sum(seen.values()) == 1000
    assert max(seen.values()) < 45  # 20 expected, standard deviation 4.4


def test_images_are_flipped_in_every_other_epoch():
    images = torch.rand(400, 1, 1, 2).mul(255).byte()
    batches = MemoryBatches(images, torch.arange(400), 100, train=True, hflip=0.5, hflip_mode='alternate', seed=1)
    assert all(batch.dtype == torch.float32 for batch, _ in batches)  # whole ones, too: timm has nothing to convert
    flipped = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        flips = torch.empty(400, dtype=torch.bool)
        for x, which in batches:
            flips[which] = (x == images[which].flip(3)).flatten(1).all(1)
        flipped.append(flips)
    different = images[:, 0, 0, 0] != images[:, 0, 0, 1]
    first, *others = [flips[different] for flips in flipped]
    assert 0.4 < first.float().mean() < 0.6
    assert torch.equal(others[0], ~first) and torch.equal(others[1], first) and torch.equal(others[2], ~first)


@pytest.mark.parametrize('other', [['--no-cache'], ['--color-jitter', '0.4']])
def test_images_that_are_not_in_memory_cannot_take_turns(flags, tmp_path, other):
    with pytest.raises(SystemExit, match='--hflip-mode alternate needs the training images in memory: with --cache'):
        main([*flags, '--hflip-mode', 'alternate', *other, '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_an_image_is_mirrored_no_further_than_it_reaches(flags, tmp_path):
    with pytest.raises(SystemExit, match='--crop-padding 16: images of 16x16 cannot be mirrored so far'):
        main([*flags, '--crop-padding', '16', '--crop-padding-mode', 'reflect', '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())


# Own photographs

@pytest.fixture
def photos(images, tmp_path):
    """A folder for each class: 5 bees, 9 cats, 12 dogs, in several formats and sizes."""
    for name, count in zip(CLASSES, (5, 9, 12)):
        (tmp_path / 'photos' / name).mkdir(parents=True)
        for i in range(count):
            image = Image.open(images / 'train' / name / f'{i}.png').resize((40 + i, 30))
            image.save(tmp_path / 'photos' / name / f'{i}.{("png", "webp", "bmp", "tif")[i % 4]}')
    return tmp_path / 'photos'


def test_photographs_are_split_trained_resumed_and_evaluated(flags, photos, tmp_path, capsys, caplog):
    caplog.set_level('INFO', 'convnn_timm')
    for name in '.ipynb_checkpoints/x.png', 'cat/._0.png', 'cat/notes.txt', 'owl/.keep':
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_text('no image')
    folder = main([str(photos), *flags[2:], '-b', '64', '--output', str(tmp_path), '--experiment', 'run'])
    trained = printed_result(capsys)
    assert trained.endswith('(epoch 3, 5 images)')
    assert f'{photos}: left out 1 file: 1 .txt' in caplog.text and f'no images in {photos}/owl' in caplog.text
    assert '26 images of 3 classes; 5 of them, always the same, are held out' in caplog.text
    assert '21 training images do not fill a batch of 64: --batch-size is now 21' in caplog.text
    assert json.loads((folder / 'model' / 'config.json').read_text())['label_names'] == list(CLASSES)

    recorded = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (recorded['holdout'], recorded['holdout_share'], recorded['batch_size']) == (0, 0.2, 21)
    moved = photos.rename(tmp_path / 'moved')
    main(['--evaluate', str(folder), '--data-dir', str(moved)])
    assert printed_result(capsys) == trained
    moved = ['--resume', 'auto', '--data-dir', str(moved)]
    main(['-c', str(folder / 'args.yaml'), *moved])
    main([*flags, '-b', '64', *moved, '--output', str(tmp_path), '--experiment', 'run'])
    (tmp_path / 'moved' / 'bee' / '4.png').rename(tmp_path / 'moved' / 'bee' / '5.png')
    for argv in ['--evaluate', str(folder), *moved[2:]], ['-c', str(folder / 'args.yaml'), *moved]:
        with pytest.raises(SystemExit, match='moved holds other images than when the run began'):
            main(argv)


def test_the_recipe_for_photographs_starts_from_published_weights(photos, tmp_path, capsys):
    argv = ['-c', 'finetune', str(photos), '--img-size', '16', '--epochs', '1', '--output', str(tmp_path)]
    folder = main([*argv, '--lr', '1e-9', '--warmup-lr', '1e-9', '--experiment', 'run'])
    result = printed_result(capsys)
    tuned = load_file(folder / 'model' / 'model.safetensors')
    published = timm.create_model('resnet18_convnn_branching.cifar10', pretrained=True).state_dict()
    torch.testing.assert_close(tuned['layer4.0.conv1.branch2.weight'], published['layer4.0.conv1.branch2.weight'])
    assert tuned['fc.weight'].shape == (3, 512)
    main(['--evaluate', str(folder)])
    assert printed_result(capsys) == result


def test_photographs_are_held_out_of_every_class(photos):
    def split(*argv):
        args = parse_args([str(photos), *argv])
        train_part, eval_part, names = create_parts(args)
        assert names == list(CLASSES) and set(train_part.indices).isdisjoint(eval_part.indices)
        again = parse_args([str(photos), '--holdout', '0', '--holdout-share', str(args.holdout_share)])
        assert create_parts(again)[1].indices == eval_part.indices
        classes = class_numbers(eval_part.dataset)
        return [Counter(classes[i] for i in part.indices) for part in (train_part, eval_part)]

    assert split('--holdout', '13')[1].total() == 13
    assert split('--holdout', '1')[1] == {0: 1, 1: 1, 2: 1}
    assert split('--holdout', '25')[0] == {0: 1, 1: 1, 2: 1}
    assert split('--holdout-share', '0.5')[1].total() == 13


@pytest.mark.parametrize('folders, message', [
    (['a/cat', 'a/dog'], 'a folder of images for each of several classes, and has a$'),
    (['cat', 'dog', 'train'], "no folder 'validation': it has cat, dog, train. Expected are train/<class>/ and "),
    (['cat', 'dog', 'test'], "no folder 'train': it has cat, dog, test. Expected"),
    (['Train/cat', 'Train/dog', 'Val/cat', 'Val/dog'], "no folder 'train': it has Train, Val. Expected"),
    (['cat', ''], 'several classes, and has cat, and images outside of these folders$'),
    ([], 'there are no images in .*photos$'),
])
def test_a_folder_that_is_neither_of_classes_nor_of_splits(images, tmp_path, folders, message):
    (tmp_path / 'photos').mkdir()
    for i, name in enumerate(folders):
        (tmp_path / 'photos' / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(images / 'train' / 'cat' / '0.png', tmp_path / 'photos' / name / '0.png')
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path / 'photos'), '--model', 'test_resnet', '--output', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_a_class_of_one_photograph(photos, tmp_path):
    (photos / 'a\x1b[31mpe').mkdir()
    shutil.copy(photos / 'bee' / '0.png', photos / 'a\x1b[31mpe')
    with pytest.raises(SystemExit, match=r'one to evaluate on is the least, and there is only one of a\\x1b\[31mpe'):
        main([str(photos), '--output', str(tmp_path / 'out')])


def test_classes_of_splits_have_timms_numbers(images, tmp_path):
    """The folder that an image lies in is its class, and numbers are in the order of numbers."""
    for name in 'x/10', 'x/9', 'b', 'A', 'y/9':
        shutil.copytree(images / 'train' / 'cat', tmp_path / 'train' / name)
    timms = timm.data.create_dataset('', root=tmp_path, split='train').reader
    ours = FolderReader(str(tmp_path / 'train'))
    assert ours.class_to_idx == timms.class_to_idx == {'9': 0, '10': 1, 'A': 2, 'b': 3}
    assert ours.samples == timms.samples


# Other images in some epochs

@pytest.fixture
def batches(monkeypatch):
    """What the model is given: whether it trains, and the images."""
    seen = []

    def create(args, **kwargs):
        model = original(args, **kwargs)
        model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0])))
        return model

    original = train.create_model
    monkeypatch.setattr(train, 'create_model', create)
    return seen


def test_the_first_epochs_see_small_images(flags, tmp_path, batches):
    main([*flags, '--train-sizes', '8', '12', '--output', str(tmp_path)])
    trained, contrast = Counter(), {}
    for x in (x for training, x in batches if training):
        trained[x.shape[2:]] += len(x)
        contrast[x.shape[-1]] = x.diff(dim=-1).abs().mean()
    assert trained == {(8, 8): 112, (12, 12): 112, (16, 16): 112}  # of 120 images, in full batches
    assert {x.shape[2:] for training, x in batches if not training} >= {(16, 16)}
    assert contrast[8] < 0.7 * contrast[16]  # averages of the noise that the images are, not parts of it


@pytest.mark.parametrize('cache', ['--cache', '--no-cache'])
def test_the_last_epochs_see_whole_images(flags, tmp_path, batches, cache):
    def trained(*argv):  # in each epoch: images as bytes, those mirrored as they were
        batches.clear()
        main([*flags, cache, *argv, '--output', str(tmp_path), '--experiment', str(len(argv))])
        epochs = torch.stack([x for training, x in batches if training]).unflatten(0, (3, 7)).flatten(1, 2)
        return [[min(x.numpy().tobytes(), x.flip(2).numpy().tobytes()) for x in epoch] for epoch in epochs]

    whole = {image for epoch in trained('--crop-padding', '0', '--hflip', '0.5') for image in epoch}
    assert len(whole) == 120
    shares = [sum(image in whole for image in epoch) / 112 for epoch in trained('--crop-off-epoch', '2')]
    assert shares[0] < 0.2 and shares[1] < 0.2 and shares[2] == 1  # one of 25 crops is the whole image


def test_too_small_images(flags, tmp_path):
    with pytest.raises(SystemExit, match='--train-sizes 8: .*too small'):
        main([*flags, '--model', 'vgg11_conv2d', '--img-size', '32', '--train-sizes', '8', '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_compiling_is_announced(flags, tmp_path, caplog):
    caplog.set_level('INFO', 'convnn_timm')
    main([*flags, '--epochs', '1', '--torchcompile', 'eager', '--output', str(tmp_path)])
    assert 'the first batches take a while: eager compiles the model for them' in caplog.text


# Lower precision

@pytest.mark.parametrize('amp', [True, False])
def test_a_processor_without_bfloat16_is_told_from_others(flags, tmp_path, monkeypatch, caplog, amp):
    monkeypatch.setattr(train, 'is_emulated', lambda dtype: dtype == 'bfloat16')
    # Not 16 pixels: oneDNN's bfloat16 weight gradients are wrong where a strided convolution gets a map of one pixel.
    extra = ['--amp' if amp else '--no-amp', '--amp-dtype', 'bfloat16', '--img-size', '32']
    main([*flags, *extra, '--epochs', '1', '--device', 'cpu', '--output', str(tmp_path)])
    assert ('no instructions for bfloat16, which makes it very slow: --no-amp trains in float32' in caplog.text) == amp


@pytest.mark.parametrize('emulated, dtype', [(True, torch.float32), (False, torch.bfloat16)])
def test_muon_iterates_in_what_the_processor_computes_in(flags, tmp_path, monkeypatch, emulated, dtype):
    monkeypatch.setattr(train, 'is_emulated', lambda _: emulated)
    seen = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.addmm:
                seen.add(args[0].dtype)
            return func(*args, **kwargs or {})

    iterate = muon.zeropower_via_newtonschulz
    with Watch():
        main([*flags, '--opt', 'muon', '--no-amp', '--epochs', '1', '--device', 'cpu', '--output', str(tmp_path)])
    assert seen == {dtype} and muon.zeropower_via_newtonschulz is iterate


def test_emulation_is_not_guessed(monkeypatch):
    assert train.is_emulated('bfloat16') is not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert not train.is_emulated('bfloat16')  # nobody to ask


# Interruption

MEMORY = ['--model-ema', '--clip-grad', '1', '--grad-accum-steps', '2']
WORKERS = ['--no-cache', '--workers', '2', '--aa', 'rand-m9', '--mixup', '0.5', '--opt', 'adamw', '--lr', '1e-3']


@pytest.mark.parametrize('moment, call, epochs_done, extra', [
    pytest.param('utils.CheckpointSaver._save', 1, 0, MEMORY, id='first-row', marks=pytest.mark.slow),
    pytest.param('train.evaluate', 2, 1, MEMORY, id='steps', marks=pytest.mark.slow),
    pytest.param('utils.CheckpointSaver._save', 2, 1, WORKERS, id='row-of-summary'),
    pytest.param('os.replace', 2, 1, MEMORY, id='checkpoint-not-in-place'),
    pytest.param('train.save_for_hf', 1, 2, MEMORY, id='end', marks=pytest.mark.slow),
])
def test_killed_and_resumed_is_bit_identical(flags, tmp_path, moment, call, epochs_done, extra):
    """SIGKILL at the given call of a function, when so many epochs were done."""
    flags = [*flags, *extra, '--output', str(tmp_path), '--resume', 'auto', '--epochs', '2']
    script = textwrap.dedent(f"""
        import os, signal, sys
        from timm import utils
        from convnn_timm import train
        original, calls = {moment}, []
        def killing(*args, **kwargs):
            calls.append(1)
            if len(calls) == {call}:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        {moment} = killing
        train.main(sys.argv[1:])
    """)
    killed = subprocess.run([sys.executable, '-c', script, *flags, '--experiment', 'killed'], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert epochs_done == 0 or weights(tmp_path / 'killed')['epoch'] + 1 == epochs_done  # no finished epoch is lost
    resumed = main([*flags, '--experiment', 'killed'])
    whole = main([*flags, '--experiment', 'whole'])
    before, after = weights(whole), weights(resumed)
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'epoch'):
        assert equal(before.get(key), after.get(key)), key
    assert equal(load_file(whole / 'model' / 'model.safetensors'), load_file(resumed / 'model' / 'model.safetensors'))
    columns = [
        [row.split(',')[0::4] for row in (folder / 'summary.csv').read_text().split()] for folder in (whole, resumed)]
    assert columns[0] == columns[1]


def test_a_tuple_among_the_arguments_does_not_keep_a_run_from_going_on(flags, tmp_path):
    kwargs = ['channels=(16,16,16,16)', 'K=3']
    flags = [*flags, '--model', 'resnet18_convnn', '--model-kwargs', *kwargs, '--output', str(tmp_path)]
    folder = main([*flags, '--epochs', '1', '--experiment', 'run'])
    main(['-c', str(folder / 'args.yaml'), '--resume', 'auto'])
    assert not (folder / 'environment-1.json').exists()  # nothing was trained


def test_a_run_resumed_elsewhere_goes_on_there(flags, run, tmp_path, monkeypatch):
    flags = [*flags, '--epochs', '4', '--output', str(tmp_path), '--experiment', 'on']
    saved = torch.load(run / 'last.pth.tar', weights_only=False)
    saved['args'].epochs = 4
    torch.save(saved, tmp_path / 'last.pth.tar')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'train_one_epoch', Mock(side_effect=KeyboardInterrupt))
        train.train(parse_args([*flags, '--resume', str(tmp_path / 'last.pth.tar')]))
    folder = main([*flags, '--resume', 'auto'])
    assert weights(folder)['epoch'] == 3


SHORT = ['--epochs', '1', '--sched-on-updates', '--train-sizes', '12']
LONGER = ['--lr-cycle-limit', '2', '--lr-cycle-mul', '2', '--train-sizes', '12', '14', '--crop-off-epoch', '2']


@pytest.fixture(scope='module')
def short(flags, tmp_path_factory):
    """A finished run of one epoch."""
    output = tmp_path_factory.mktemp('short')
    return main([*flags, *SHORT, '--output', str(output), '--experiment', 'run'])


def test_a_finished_run_is_trained_further(flags, short, tmp_path, monkeypatch):
    """It ends as one that was to be so long from the start, bit for bit; the shorter one stays as it was."""
    def files():
        return {path: path.stat().st_mtime_ns for path in short.rglob('*')}

    flags, before = [*flags, *SHORT, *LONGER, '--output', str(tmp_path)], files()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='^130$'):
        patch.setattr(train, 'train_one_epoch', Mock(side_effect=KeyboardInterrupt))
        main([*flags, '--resume', str(short / 'last.pth.tar'), '--experiment', 'longer'])
    longer = main([*flags, '--resume', 'auto', '--experiment', 'longer'])
    whole = main([*flags, '--experiment', 'whole'])
    assert before == files()
    assert len(read_summary(longer)) == 3 and yaml.safe_load((longer / 'args.yaml').read_text())['lr_cycle_limit'] == 2
    for key in ('state_dict', 'optimizer', 'epoch'):
        assert equal(weights(longer)[key], weights(whole)[key]), key
    assert {file.name for file in longer.glob('environment*')} == {'environment.json', 'environment-1.json'}

    (tmp_path / 'manifest.json').write_text('[]')
    monkeypatch.setattr(_weights, 'MANIFEST', tmp_path / 'manifest.json')
    other = main([*flags, '--model', 'resnet18_conv2d', '--model-kwargs', 'channels=(8,8,8,8)', '--experiment', 'zoo'])
    card = (hub.export(other, 'colours', tmp_path) / 'README.md').read_text()
    assert '| epochs | 1 |' in card and '| lr_cycle_mul | 2.0 |' in card and 'last epoch (3)' in card


def test_a_run_resumed_elsewhere_records_no_part_that_came_later(flags, short, tmp_path):
    shutil.copytree(short, tmp_path / 'first')
    shutil.copy(short / 'environment.json', tmp_path / 'first' / 'environment-5.json')
    folder = main([
        *flags, *SHORT, '--output', str(tmp_path), '--experiment', 'copy',
        '--resume', str(tmp_path / 'first' / 'last.pth.tar')])
    assert [file.name for file in folder.glob('environment*')] == ['environment.json']


@pytest.mark.parametrize('argv, message', [
    (['--epochs', '2'], 'with other arguments:\n  epochs: 1 there, 2 here'),
    ([*LONGER, '--train-sizes', '10', '14'], 'with other arguments:'),
    ([*LONGER, '--opt', 'adamw'], 'with other arguments:'),
])
def test_a_run_is_trained_further_only_if_its_epochs_stay_as_they_were(flags, short, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message):
        main([
            *flags, *SHORT, *argv, '--output', str(tmp_path), '--experiment', 'longer',
            '--resume', str(short / 'last.pth.tar')])
    assert not (tmp_path / 'longer').exists()


@pytest.mark.parametrize('off, alike', [(2, True), (1, False)])
def test_two_epochs_with_crops_cannot_go_on_as_one(flags, off, alike):
    before = vars(parse_args([*flags, '--sched', 'none']))
    assert starts_alike(before, {**before, 'crop_off_epoch': off}, 2) is alike


def test_a_longer_run_does_not_replace_the_finished_one(flags, short):
    with pytest.raises(SystemExit, match='keeps its run .* lr_cycle_mul.* --resume .*last.pth.tar --experiment NAME'):
        main([
            *flags, *SHORT, *LONGER, '--output', str(short.parent), '--experiment', short.name, '--resume', 'auto'])


@pytest.mark.parametrize('number, extra', [
    (signal.SIGTERM, []),
    (signal.SIGINT, ['--no-cache', '--workers', '1']),
])
def test_a_signal_leaves_a_run_that_can_go_on(flags, tmp_path, number, extra):
    script = textwrap.dedent(f"""
        import os, sys
        from multiprocessing import active_children
        from convnn_timm import train
        original, calls = train.evaluate, []
        def terminating(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                batches = iter(args[1])
                images, _ = next(batches)
                for worker in active_children():  # they hear Ctrl-C too, and go on
                    os.kill(worker.pid, {number})
                assert len(images) + sum(len(images) for images, _ in batches) == 51
                os.kill(os.getpid(), {number})
            return original(*args, **kwargs)
        train.evaluate = terminating
        train.main(sys.argv[1:])
    """)
    ended = subprocess.run(
        [sys.executable, '-c', script, *flags, *extra, '--output', 'out', '--experiment', 'run'],
        capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 128 + number and 'Traceback' not in ended.stderr
    command = ended.stderr.strip().splitlines()[-1]
    assert command == 'interrupted; continue with: convnn-timm train -c out/run/args.yaml --resume auto'
    assert len((tmp_path / 'out' / 'run' / 'summary.csv').read_text().split()) == 2
    assert (tmp_path / 'out' / 'run' / 'curve.png').is_file()
    record = tmp_path / 'out' / 'run' / 'args.yaml'
    main(['-c', str(record), '--output', str(tmp_path / 'out'), '--resume', 'auto'])
    assert weights(record.parent)['epoch'] == 2


# Several processes

@pytest.mark.parametrize('cache', ['--cache', pytest.param('--no-cache', marks=pytest.mark.slow)])
def test_two_processes_end_with_equal_weights_and_count_every_image_once(flags, tmp_path, capsys, cache):
    (tmp_path / 'both.py').write_text(textwrap.dedent("""
        import os, sys, torch
        from convnn_timm import train
        original = train.evaluate
        def recording(model, loader, *args):
            metrics = original(model, loader, *args)
            torch.save((model.state_dict(), dict(metrics)), f'rank{os.environ["RANK"]}.pt')
            return metrics
        train.evaluate = recording
        train.main(sys.argv[1:])
    """))
    done = subprocess.run(
        [
            sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', 'both.py',
            *flags, cache, '--model-ema', '--device', 'cpu', '--epochs', '2', '--output', 'out', '--experiment', 'run',
        ],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    (state, metrics), (other_state, other_metrics) = (torch.load(tmp_path / f'rank{rank}.pt') for rank in (0, 1))
    assert equal(state, other_state) and metrics == other_metrics
    assert metrics['images'] == 51  # 26 in one, 25 in the other
    saved = weights(tmp_path / 'out' / 'run')
    assert equal(state, saved['state_dict_ema'])
    main(['--evaluate', str(tmp_path / 'out' / 'run')])
    assert printed_result(capsys) == done.stdout.strip().splitlines()[-1]


def test_processes_share_the_images_of_an_epoch():
    images = torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1).expand(50, 3, 4, 4)
    shares = [
        torch.cat([targets for _, targets in MemoryBatches(
            images, torch.arange(50), 8, train=True, seed=3, rank=rank, world_size=world_size)])
        for rank, world_size in ((0, 2), (1, 2), (0, 1))
    ]
    assert [len(share) for share in shares] == [24, 24, 48]
    assert torch.equal(torch.stack(shares[:2], 1).flatten(), shares[2])
    assert len(shares[2].unique()) == 48
