"""The models and images that commands are given."""
import argparse
import os

import pytest
import timm
import torch
from PIL import Image, features

from convnn_timm.cli.loading import find_images, load_model


def test_model_errors(error_of, photo, model_folder, tmp_path):
    def error(*args, status=1):
        return error_of('predict', str(photo), *args, status=status)

    assert 'did you mean resnet18_convnn' in error('--model', 'resnet18_convn', status=2)
    assert '`convnn-timm list`' in error('--model', 'zzzz', status=2)
    assert "'local-dir:some/folder'" in error('--model', 'some/folder', status=2)
    assert 'convnn-timm train --model vgg11_convnn_attn' in error('--model', 'vgg11_convnn_attn')
    assert 'config.json' in error('--model', f'local-dir:{tmp_path}')
    (tmp_path / 'model').symlink_to(model_folder)
    assert f'{tmp_path} is the folder of a run, its model is local-dir:{tmp_path}/model' in error(
        '--model', f'local-dir:{tmp_path}', status=2)
    for device in 'gpu', 'hpu', 'meta':
        assert f"device '{device}'" in error('--model', f'local-dir:{model_folder}', '--device', device, status=2)

    checkpoint = tmp_path / 'last.pth.tar'
    assert f'{checkpoint} not found' in error('--model', 'test_resnet', '--checkpoint', str(checkpoint))
    assert f'{tmp_path} is a folder' in error('--model', 'test_resnet', '--checkpoint', str(tmp_path))
    checkpoint.touch()
    assert f'{checkpoint} is an empty file' in error('--model', 'test_resnet', '--checkpoint', str(checkpoint))
    for nothing in {}, dict(state_dict={}), dict(state_dict=dict(weight='heavy')):
        torch.save(nothing, checkpoint)
        assert f'{checkpoint} holds no weights' in error('--model', 'resnet18_conv2d', '--checkpoint', str(checkpoint))
    whole = timm.create_model('test_resnet', num_classes=4).state_dict()
    without = {name: tensor for name, tensor in whole.items() if name != 'conv1.1.weight'}
    for tensors, name in (without, 'conv1.1.weight'), ({**whole, 'foreign': torch.ones(1)}, 'foreign'):
        torch.save(tensors, checkpoint)
        assert f'"{name}"' in error('--model', 'test_resnet', '--checkpoint', str(checkpoint))
    checkpoint.write_text('nothing')
    assert f'cannot read checkpoint {checkpoint}' in error('--model', 'test_resnet', '--checkpoint', str(checkpoint))
    torch.save(timm.create_model('test_vit').state_dict(), checkpoint)
    assert '… If the model was trained with other arguments, use the model/ folder of its run' in error(
        '--model', 'test_resnet', '--checkpoint', str(checkpoint))
    assert 'has its own weights' in error(
        '--model', f'local-dir:{model_folder}', '--checkpoint', str(checkpoint), status=2)


def test_predict_with_checkpoint(run, error_of, photo, tmp_path):
    """Weights of a training run: as many classes as they have, called by index because their names are not known."""
    model = timm.create_model('test_resnet', num_classes=4)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'last.pth.tar')
    call = 'predict', str(photo), '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'last.pth.tar')
    status, out, err = run(*call)
    assert status == 0 and 'note: the names of the classes are not known' in err
    assert sorted(line.split()[-1] for line in out.splitlines()[1:]) == ['0', '1', '2', '3']

    def classes(count, architecture='test_resnet', names=('ant', 'bee', 'cat', 'dog')):
        """Called, beside the model of a finished run that tells so many classes apart."""
        timm.models.save_for_hf(
            timm.create_model(architecture, num_classes=count), tmp_path / 'model',
            model_config=dict(label_names=names[:count]), safe_serialization=True)
        return sorted(line.split()[-1] for line in run(*call)[1].splitlines()[1:])

    assert classes(4) == ['ant', 'bee', 'cat', 'dog']
    assert classes(3) == classes(4, 'test_vit') == ['0', '1', '2', '3']  # of other networks
    (tmp_path / 'model' / 'config.json').write_text('[')
    assert f"{tmp_path / 'model' / 'config.json'} is damaged" in error_of(*call)


@pytest.mark.parametrize('pretrained', [False, True])
def test_predict_builds_the_network_of_the_checkpoint(photo, tmp_path, pretrained):
    """Arguments that no tensor shows are in a training's checkpoint, timm's or this package's."""
    name = 'resnet18_convnn_branching'
    options = {} if pretrained else dict(magnitude_type='euclidean', sampling_type='spatial', num_samples=4, padding=0)
    model = timm.create_model(f'{name}.cifar10' if pretrained else name, num_classes=4, **options)
    args = argparse.Namespace(model=name, model_kwargs=options, pretrained=pretrained)
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    loaded = load_model(name, str(tmp_path / 'last.pth.tar'))
    assert str(loaded) == str(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_own_classes_are_not_called_by_the_names_of_the_published_weights():
    name = 'resnet18_convnn_branching'
    assert timm.create_model(name, pretrained=True).pretrained_cfg['label_names'][3] == 'cat'
    for own in name, f'{name}.cifar10':
        assert not timm.create_model(own).pretrained_cfg.get('label_names')


def test_what_a_folder_is_searched_for(capsys, tmp_path):
    """For all that Pillow decodes; what is hidden is not there, and the rest is counted."""
    seen = ['a.JPG', 'b.webp', 'c.bmp', 'd.tif', 'e.gif', 'f.jpeg'] + ['g.avif'] * features.check('avif')
    for name in seen:
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    for name in '.ipynb_checkpoints/x.png', '._a.jpg', 'h.heic', 'i.HEIC', 'j.txt', 'Makefile', 'k.h5', 'none/.keep':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('no image')
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'dead.png').symlink_to('nowhere')
    assert list(find_images([str(tmp_path)])) == [tmp_path / name for name in seen]
    assert capsys.readouterr().err == (
        f'convnn-timm: note: {tmp_path}: left out 7 files: '
        '2 .heic, 1 (broken link), 1 (no suffix), 1 (special file), 1 .h5, 1 .txt\n'
        f'convnn-timm: note: {tmp_path}: no images in {tmp_path}/none\n')
