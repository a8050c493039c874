"""The trainer: what it learns, that it says what goes wrong, and that nothing depends on luck."""
import json
import os
import runpy
import signal
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
import yaml
from image_folders import CLASSES
from runs import equal, printed_result, weights
from safetensors.torch import load_file
from timm.optim import muon
from torch.overrides import TorchFunctionMode

from convnn_timm import convert
from convnn_timm import hub
from convnn_timm.models import _weights
from convnn_timm.train import engine
from convnn_timm.train.engine import evaluate, main


# Training and evaluation

def test_it_learns(run):
    assert float((run / 'summary.csv').read_text().split()[-1].split(',')[5]) > 90


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
        *flags, '--model', 'resnet18_convnn_branching', '--model-kwargs', 'K=3', 'channels=(8,8,8,8)', '--epochs', '1',
        '--batch-size', '60', '--channels-last', '--model-ema', '--output', str(tmp_path), '--experiment', 'run'])
    model = timm.create_model(f'local-dir:{folder / "model"}', pretrained=True)
    twin = timm.create_model('resnet18_convnn_branching', num_classes=3, K=3, channels=(8, 8, 8, 8))
    twin.load_state_dict(weights(folder)['state_dict_ema'])
    assert equal(model.state_dict(), twin.state_dict())
    assert str(model) == str(twin)


def test_checkpoint_is_timms(run):
    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(run / 'last.pth.tar'))
    assert equal(model.state_dict(), weights(run)['state_dict'])


def test_evaluating_a_run_repeats_its_result(run, capsys):
    main(['--evaluate', str(run)])
    last = (run / 'summary.csv').read_text().split()[-1].split(',')
    assert printed_result(capsys) == f'top1 {float(last[5]):.2f} top5 100.00 (epoch 3, 51 images)'


def test_every_image_counts_the_same():
    logits, targets = torch.randn(23, 7), torch.randint(7, (23,))
    metrics = evaluate(torch.nn.Identity(), zip(logits.split(10), targets.split(10)))
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert metrics['images'] == 23
    assert metrics['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    assert metrics['top1'] == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert metrics['top5'] == pytest.approx(100 * (ranks < 5).double().mean().item())


def test_a_run_is_evaluated_on_its_own_classes_only(run, images, tmp_path):
    data = shutil.copytree(images, tmp_path / 'data')
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


def test_an_optimizer_of_second_order(flags, tmp_path):
    main([*flags, '--opt', 'adahessian', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'run'])


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(flags, tmp_path):
    with pytest.raises(SystemExit, match='the loss is .* choose a smaller --lr'):
        main([*flags, '--lr', '1e30', '--output', str(tmp_path), '--experiment', 'run'])
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()


def test_compiling_is_announced(flags, tmp_path, caplog):
    caplog.set_level('INFO', 'convnn_timm')
    main([*flags, '--epochs', '1', '--torchcompile', 'eager', '--output', str(tmp_path)])
    assert 'the first batches take a while: eager compiles the model for them' in caplog.text


# Converted models

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


# What goes wrong

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
    (['--opt', 'bogus'], '--opt bogus: '), (['--sched', 'bogus'], '--sched bogus: '),
    (['--aa', 'bogus'], '--aa bogus: '), (['--opt-kwargs', 'foo=1'], "--opt sgd: .*unexpected keyword argument 'foo'"),
    (['--gp', 'bogus'], 'bogus'),
    (['--torchcompile', 'bogus'], '--torchcompile bogus: '), (['--dataset', 'torch/bogus'], '--dataset torch/bogus: '),
    (['--model', 'dla46_c', '--img-size', '32', '--grad-checkpointing'], 'gradient checkpointing not supported'),
    (['--resume', __file__], 'test_engine.py: '),
    (['--device', 'tpu'], 'tpu'), (['--initial-checkpoint', 'nowhere.pth'], 'nowhere.pth'),
    (['--model', 'resnet18_convnn', '--model-kwargs', 'K=500', 'channels=(8,8,8,8)'], 'K=500 neighbours need as many'),
    (['--output', __file__], 'Not a directory'), (['--input-size', '2', '16', '16'], 'image files have 1'),
])
def test_what_goes_wrong_before_the_first_epoch_is_said_in_a_line(flags, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message) as error:
        main([*flags, '--output', str(tmp_path / 'out'), *argv])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('place, bug', [
    ('fit_batch_size', TypeError), ('create_optimizer', KeyError), ('create_batches', AssertionError),
])
def test_a_bug_shows_its_traceback(flags, tmp_path, monkeypatch, place, bug):
    monkeypatch.setattr(engine, place, Mock(side_effect=bug))
    with pytest.raises(bug):
        main([*flags, '--output', str(tmp_path)])


def test_too_few_classes_and_images(flags, tmp_path):
    with pytest.raises(SystemExit, match='3 classes, --num-classes is 2'):
        main([*flags, '--num-classes', '2', '--output', str(tmp_path)])
    with pytest.raises(SystemExit, match='there are 120 training images'):
        main([*flags, '--holdout', '120', '--output', str(tmp_path)])


def test_weights_of_a_run_with_other_classes(flags, run, tmp_path):
    flags = [*flags, '--num-classes', '5', '--epochs', '1', '--output', str(tmp_path)]
    with pytest.raises(SystemExit) as error:
        main([*flags, '--initial-checkpoint', str(run / 'last.pth.tar')])
    message = str(error.value)
    assert f'--initial-checkpoint {run / "last.pth.tar"}: ' in message and 'size mismatch for fc.weight' in message
    assert '--model local-dir:RUN/model --pretrained' in message and len(message.splitlines()) == 1
    folder = main([*flags, '--model', f'local-dir:{run / "model"}', '--pretrained', '--experiment', 'tuned'])
    assert len(weights(folder)['state_dict']['fc.bias']) == 5


def test_an_interrupt_before_there_is_a_run(monkeypatch, capsys):
    monkeypatch.setattr(engine, 'parse_args', Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match='^130$'):
        main([])
    assert capsys.readouterr().err == 'interrupted\n'


def test_signals_are_the_callers_again(flags):
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(SystemExit):
        main([*flags, '--model', 'zzzz'])
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_script_does_nothing_in_a_worker_that_imports_it():
    runpy.run_path(str(Path(__file__).parents[2] / 'train_scripts' / 'train.py'), run_name='__mp_main__')


# Other images in some epochs

@pytest.fixture
def batches(monkeypatch):
    """What the model is given: whether it trains, and the images."""
    seen = []

    def create(args, **kwargs):
        model = original(args, **kwargs)
        model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0])))
        return model

    original = engine.create_model
    monkeypatch.setattr(engine, 'create_model', create)
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


def test_too_small_images(flags, tmp_path):
    with pytest.raises(SystemExit, match='--train-sizes 8: .*too small'):
        main([*flags, '--model', 'vgg11_conv2d', '--img-size', '32', '--train-sizes', '8', '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())


# Lower precision

@pytest.mark.parametrize('amp', [True, False])
def test_a_processor_without_bfloat16_is_told_from_others(flags, tmp_path, monkeypatch, caplog, amp):
    monkeypatch.setattr(engine, 'is_emulated', lambda dtype: dtype == 'bfloat16')
    # Not 16 pixels: oneDNN's bfloat16 weight gradients are wrong where a strided convolution gets a map of one pixel.
    extra = ['--amp' if amp else '--no-amp', '--amp-dtype', 'bfloat16', '--img-size', '32']
    main([*flags, *extra, '--epochs', '1', '--device', 'cpu', '--output', str(tmp_path)])
    assert ('no instructions for bfloat16, which makes it very slow: --no-amp trains in float32' in caplog.text) == amp


@pytest.mark.parametrize('emulated, dtype', [(True, torch.float32), (False, torch.bfloat16)])
def test_muon_iterates_in_what_the_processor_computes_in(flags, tmp_path, monkeypatch, emulated, dtype):
    monkeypatch.setattr(engine, 'is_emulated', lambda _: emulated)
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
    assert engine.is_emulated('bfloat16') is not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert not engine.is_emulated('bfloat16')  # nobody to ask


# Several processes

@pytest.mark.parametrize('cache', ['--cache', pytest.param('--no-cache', marks=pytest.mark.slow)])
def test_two_processes_end_with_equal_weights_and_count_every_image_once(flags, tmp_path, capsys, cache):
    (tmp_path / 'both.py').write_text(textwrap.dedent("""
        import os, sys, torch
        from convnn_timm.train import engine
        original = engine.evaluate
        def recording(model, loader, *args):
            metrics = original(model, loader, *args)
            torch.save((model.state_dict(), dict(metrics)), f'rank{os.environ["RANK"]}.pt')
            return metrics
        engine.evaluate = recording
        engine.main(sys.argv[1:])
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
