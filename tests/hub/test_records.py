"""What runs recorded, as it is copied beside weights, compared and averaged."""
import json
import shutil
from pathlib import Path

import pytest
import yaml

from convnn_timm import hub
from convnn_timm.hub.records import Record, copy_record
from publishing import repeat, rewrite, set_last


def test_a_record_names_no_places(published, tmp_path):
    """Whatever letters they have, and in a run whose recipe is the record of another."""
    run, recipe = tmp_path / 'run', 'epochs: 2  # few\ndata_dir: images\n'
    shutil.copytree(published / 'output' / 'resnet18_convnn_branching', run)
    args = yaml.safe_load((run / 'args.yaml').read_text())
    args.update(data_dir='/home/josé müller/images', output='/output', initial_checkpoint='/data/images/w.pth')
    (run / 'args.yaml').write_text(yaml.safe_dump(args, sort_keys=False))
    command = f'train -c cfg/output.yaml --data-dir {args["data_dir"]} --output=/output pre/data/images/w.pth'
    rewrite(run / 'environment.json', command=command)
    for written, copied in ((run / 'args.yaml').read_text(), None), (recipe, recipe):
        (run / 'recipe.yaml').write_text(written)
        copy_record(run, tmp_path / f'record-{bool(copied)}')
        folder = tmp_path / f'record-{bool(copied)}'
        assert (folder / 'recipe.yaml').read_text() == (copied or (folder / 'args.yaml').read_text())
    record = yaml.safe_load((folder / 'args.yaml').read_text())
    assert record == {**args, 'data_dir': 'images', 'output': 'output', 'initial_checkpoint': 'w.pth'}
    assert json.loads((folder / 'environment.json').read_text())['command'] == (
        'train -c cfg/output.yaml --data-dir images --output=output pre/data/images/w.pth')


def test_repetitions_are_the_same_training_with_other_seeds(published, tmp_path):
    run = published / 'output' / 'resnet18_convnn_branching'

    def refused(folder):
        with pytest.raises(hub.WeightsError) as error:
            hub.export(run, 'cifar10', tmp_path / 'cards', seeds=[folder])
        return str(error.value)

    copy = Path(shutil.copytree(run, tmp_path / 'run'))
    assert f'{copy} and {run} have the same seed, 0' in refused(copy)
    other = repeat(copy, 1, lr=0.3, epochs=9)
    assert f'{other} is no repetition of {run}: they differ in epochs, lr' in refused(other)
    shorter = repeat(copy, 2)
    (shorter / 'summary.csv').write_text('\n'.join((copy / 'summary.csv').read_text().splitlines()[:2]) + '\n')
    assert f'{shorter} has 1 epochs, {run} 2' in refused(shorter)
    fewer = repeat(copy, 3)
    set_last(fewer, 'eval_images', 12)
    assert f'{fewer} was evaluated on 12 images, {run} on 24' in refused(fewer)
    rewrite(fewer / 'model' / 'config.json', label_names=['ant', 'cat', 'dog'])
    assert f'{fewer} tells other classes apart than {run}' in refused(fewer)
    with pytest.raises(hub.WeightsError, match='tells other classes apart'):
        hub.export(run, 'cifar10', tmp_path / 'cards', twin=fewer)
    (shorter / 'summary.csv').unlink()
    assert f'{shorter} is not finished' in refused(shorter)
    assert not (tmp_path / 'cards').exists()


def test_a_slowed_epoch_does_not_count_as_the_speed(card, tmp_path):
    training = shutil.copytree(card / 'training', tmp_path / 'training')
    columns, *_ = (training / 'summary.csv').read_text().splitlines()
    rows = [','.join(speed if name == 'train_images_per_s' else '0' for name in columns.split(','))
            for speed in ('100.0', '2.0', '90.0')]
    (training / 'summary.csv').write_text('\n'.join([columns, *rows]) + '\n')
    run = Record(training)
    assert run.speed == 90
    run.args['train_sizes'] = [8]  # a first epoch of smaller images does not count either
    assert run.speed == 46
