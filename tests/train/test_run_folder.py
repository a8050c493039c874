"""The run folder: what a run leaves, and when and how it goes on."""
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from datetime import datetime
from unittest.mock import Mock

import pytest
import torch
import yaml
from PIL import Image
from runs import equal, weights
from safetensors.torch import load_file

from convnn_timm import hub
from convnn_timm.models import _weights
from convnn_timm.train import engine, run_folder
from convnn_timm.train.engine import main, parse_args
from convnn_timm.train.run_folder import read_summary


# What a run leaves

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


def test_arguments_without_conversion_are_recorded_as_ever(run):
    assert 'convert' not in yaml.safe_load((run / 'args.yaml').read_text())


def test_the_recipe_stays_with_the_run(flags, tmp_path):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('smoothing: 0.0  # mine\n')
    folder = main(['-c', str(recipe), *flags, '--epochs', '1', '--output', str(tmp_path)])
    assert (folder / 'recipe.yaml').read_text() == recipe.read_text()


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


# Nothing is lost

def test_nothing_is_overwritten(flags, run, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    before = {path: path.stat().st_mtime_ns for folder in (run, tmp_path) for path in folder.rglob('*')}
    for folder, resume in ((run, ''), (tmp_path, ''), (tmp_path, 'auto'), (tmp_path, str(run / 'last.pth.tar'))):
        with pytest.raises(SystemExit, match='is not empty: continue .* --resume auto, or choose another --experiment'):
            main([*flags, '--output', str(folder.parent), '--experiment', folder.name, '--resume', resume])
    assert before == {path: path.stat().st_mtime_ns for folder in (run, tmp_path) for path in folder.rglob('*')}


@pytest.mark.parametrize('name', [['--experiment', 'run'], []])
def test_of_two_runs_that_start_at_once_none_is_lost(flags, tmp_path, monkeypatch, name):
    """The second one begins and ends while the first one makes its model."""
    monkeypatch.setattr(run_folder, 'datetime', Mock(now=lambda: datetime(2026, 1, 2)))
    create_model, argv, second = engine.create_model, [*flags, '--epochs', '1', '--output', str(tmp_path), *name], []

    def meanwhile(*args, **kwargs):
        monkeypatch.setattr(engine, 'create_model', create_model)
        second.append(main([*argv, '--seed', '7']))
        return create_model(*args, **kwargs)

    monkeypatch.setattr(engine, 'create_model', meanwhile)
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


def test_a_run_does_not_lose_its_later_epochs(flags, run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    torch.save({**weights(run), 'epoch': 0}, tmp_path / 'run' / 'early.pth.tar')
    with pytest.raises(SystemExit, match='would lose the epochs after early.pth.tar: choose another --experiment'):
        main([
            *flags, '--output', str(tmp_path), '--experiment', 'run',
            '--resume', str(tmp_path / 'run' / 'early.pth.tar')])


# What is resumed

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


def test_a_run_goes_on_where_its_folder_is_now(flags, run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / 'moved')
    (tmp_path / 'moved' / 'summary.csv').unlink()
    for place, config in (tmp_path, 'moved/args.yaml'), (tmp_path / 'moved', 'args.yaml'):
        monkeypatch.chdir(place)
        assert main(['-c', config, '--resume', 'auto']).resolve() == tmp_path / 'moved'
    assert [path.name for path in tmp_path.iterdir()] == ['moved'] and (run / 'summary.csv').is_file()


def test_a_resumed_run_needs_its_first_weights_no_more(flags, run, tmp_path):
    shutil.copy(run / 'last.pth.tar', tmp_path / 'first.pth.tar')
    folder = main([
        *flags, '--initial-checkpoint', str(tmp_path / 'first.pth.tar'), '--epochs', '1', '--output', str(tmp_path),
        '--experiment', 'run'])
    (tmp_path / 'first.pth.tar').unlink()
    main(['-c', str(folder / 'args.yaml'), '--resume', 'auto'])


def test_resume_from_a_file_continues_in_another_folder(flags, run, tmp_path):
    folder = main([*flags, '--resume', str(run / 'last.pth.tar'), '--output', str(tmp_path), '--experiment', 'copy'])
    assert equal(weights(run)['state_dict'], load_file(folder / 'model' / 'model.safetensors'))


def test_resume_a_run_that_is_older_than_an_argument(flags, run, tmp_path):
    checkpoint = weights(run)
    del checkpoint['args'].crop_padding_mode
    checkpoint['args'].crop_off_epoch = 0
    torch.save(checkpoint, tmp_path / 'old.pth.tar')
    flags = [*flags, '--resume', str(tmp_path / 'old.pth.tar'), '--output', str(tmp_path)]
    with pytest.raises(SystemExit, match="crop_padding_mode: 'constant' there, 'reflect' here"):
        main([*flags, '--crop-padding-mode', 'reflect'])
    assert (main([*flags, '--experiment', 'new']) / 'model').is_dir()


def test_a_run_is_not_resumed_without_an_argument_that_it_used(flags, run, tmp_path):
    checkpoint = weights(run)
    checkpoint['args'].crop_off_epoch = 2
    torch.save(checkpoint, tmp_path / 'old.pth.tar')
    with pytest.raises(SystemExit, match='old.pth.tar: crop_off_epoch is 2, an argument of earlier versions'):
        main([*flags, '--resume', str(tmp_path / 'old.pth.tar'), '--output', str(tmp_path)])


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
        patch.setattr(engine, 'train_one_epoch', Mock(side_effect=KeyboardInterrupt))
        engine.train(parse_args([*flags, '--resume', str(tmp_path / 'last.pth.tar')]))
    folder = main([*flags, '--resume', 'auto'])
    assert weights(folder)['epoch'] == 3


# Interruption

MEMORY = ['--model-ema', '--clip-grad', '1', '--grad-accum-steps', '2']
WORKERS = ['--no-cache', '--workers', '2', '--aa', 'rand-m9', '--mixup', '0.5', '--opt', 'adamw', '--lr', '1e-3']


@pytest.mark.parametrize('moment, call, epochs_done, extra', [
    pytest.param('utils.CheckpointSaver._save', 1, 0, MEMORY, id='first-row', marks=pytest.mark.slow),
    pytest.param('engine.evaluate', 2, 1, MEMORY, id='steps', marks=pytest.mark.slow),
    pytest.param('utils.CheckpointSaver._save', 2, 1, WORKERS, id='row-of-summary'),
    pytest.param('os.replace', 2, 1, MEMORY, id='checkpoint-not-in-place'),
    pytest.param('engine.save_for_hf', 1, 2, MEMORY, id='end', marks=pytest.mark.slow),
])
def test_killed_and_resumed_is_bit_identical(flags, tmp_path, moment, call, epochs_done, extra):
    """SIGKILL at the given call of a function, when so many epochs were done."""
    flags = [*flags, *extra, '--output', str(tmp_path), '--resume', 'auto', '--epochs', '2']
    script = textwrap.dedent(f"""
        import os, signal, sys
        from timm import utils
        from convnn_timm.train import engine
        original, calls = {moment}, []
        def killing(*args, **kwargs):
            calls.append(1)
            if len(calls) == {call}:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        {moment} = killing
        engine.main(sys.argv[1:])
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


@pytest.mark.parametrize('number, extra', [
    (signal.SIGTERM, []),
    (signal.SIGINT, ['--no-cache', '--workers', '1']),
])
def test_a_signal_leaves_a_run_that_can_go_on(flags, tmp_path, number, extra):
    script = textwrap.dedent(f"""
        import os, sys
        from multiprocessing import active_children
        from convnn_timm.train import engine
        original, calls = engine.evaluate, []
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
        engine.evaluate = terminating
        engine.main(sys.argv[1:])
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


# Longer runs

SHORT = ['--epochs', '1', '--sched-on-updates', '--train-sizes', '12']
LONGER = ['--lr-cycle-limit', '2', '--lr-cycle-mul', '2', '--train-sizes', '12', '14']


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
        patch.setattr(engine, 'train_one_epoch', Mock(side_effect=KeyboardInterrupt))
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


def test_a_longer_run_does_not_replace_the_finished_one(flags, short):
    with pytest.raises(SystemExit, match='keeps its run .* lr_cycle_mul.* --resume .*last.pth.tar --experiment NAME'):
        main([
            *flags, *SHORT, *LONGER, '--output', str(short.parent), '--experiment', short.name, '--resume', 'auto'])
