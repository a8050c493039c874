"""`neighbors` and `stats`."""
import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from convnn_timm.inspect import LayerStats

CHANNELS = (8, 8, 16, 16)
LAYERS = [f'layer{stage}.{block}.conv{conv}' for stage in range(1, 5) for block in range(2) for conv in (1, 2)]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A small network saved as a folder, as training saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('model')
    model = timm.create_model('resnet18_convnn_branching', channels=CHANNELS)
    config = dict(pretrained_cfg=dict(input_size=(3, 32, 32), num_classes=10), model_args=dict(channels=CHANNELS))
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return f'local-dir:{folder}'


@pytest.fixture
def photo(tmp_path):
    """An image file, alone in its folder."""
    path = tmp_path / 'photos' / 'photo.png'
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_neighbors_command(run, error_of, trained, photo, tmp_path):
    out = tmp_path / 'new' / 'neighbors.png'
    call = ('neighbors', photo, '--model', trained, '--device', 'cpu', '-o', out)
    assert run(*call) == (0, f'{out}\n', '')
    small = Image.open(out).size
    assert f'{out} exists; --force' in error_of(*call)
    assert run(*call, '--force', '--layer', 'layer2.0.conv1', '--point', '20,0', '30,39')[0] == 0
    assert Image.open(out).size[1] == 2 * small[1]  # a row for each point
    assert run(*call, '--force', '--all-layers')[0] == 0
    assert Image.open(out).size[0] > small[0]


def test_neighbors_command_errors(error_of, trained, photo, tmp_path):
    def error(*args, image=photo, model=trained, status=1):
        return error_of('neighbors', image, '--model', model, '-o', tmp_path / 'o.png', *args, status=status)

    assert "no layer 'layer9'; layers with neighbours are layer1.0.conv1" in error('--layer', 'layer9')
    assert 'not allowed with' in error('--layer', LAYERS[0], '--all-layers', status=2)
    assert 'point 60,3 is outside the image, which has 60 x 40 pixels' in error('--point', '60,3')
    assert 'point 2,3 is cropped away: the network sees 10 <= x < 50' in error('--point', '2,3')
    assert "'2x3' is no point" in error('--point', '2x3', status=2)
    assert f'{tmp_path / "gone.png"}: not found' in error(image=tmp_path / 'gone.png')
    assert 'ResNet has no ConvNN layers' in error(model='resnet18')  # and nothing is downloaded
    assert 'did you mean' in error(model='resnet18_convn', status=2)
    assert 'Invalid pretrained tag (nowhere)' in error(model='resnet18_convnn.nowhere')
    assert not (tmp_path / 'o.png').exists()
    for out, complaint in (
            (tmp_path / 'o.zzz', 'not supported'), (photo / 'o.png', f'{photo}: ')):
        assert complaint in error_of('neighbors', photo, '--model', trained, '-o', out)
    folder = tmp_path / 'a.png'
    folder.mkdir()
    assert f'{folder} is a folder: name a file' in error_of(
        'neighbors', photo, '--model', trained, '-o', folder, '--force')
    assert 'try sheet.png' in error_of('neighbors', photo, '--model', trained, '-o', 'sheet', status=2)


def test_untrained_model(run, photo, tmp_path, monkeypatch):
    """Weights are random, and said to be; the same in each call."""
    config = timm.get_pretrained_cfg('resnet18_convnn')
    config.hf_hub_id = config.file = config.url = None  # whatever has been published
    monkeypatch.setattr(timm, 'get_pretrained_cfg', lambda name: config)
    pictures = []
    for name in ('a.png', 'b.png'):
        status, _, err = run('neighbors', photo, '--model', 'resnet18_convnn', '-o', tmp_path / name)
        assert status == 0
        assert err == 'convnn-timm: note: resnet18_convnn has no published weights, its weights here are random\n'
        pictures.append(np.asarray(Image.open(tmp_path / name)))
    assert (pictures[0] == pictures[1]).all()


def test_stats_command(run, error_of, trained, photo, tmp_path):
    for i in range(4):
        Image.new('RGB', (40 + i, 50), (60 * i, 99, 9)).save(photo.parent / f'{i}.jpg')
    (photo.parent / 'text.png').write_text('not an image')
    folder = tmp_path / 'deep' / 'stats'
    call = ('stats', photo.parent, '--model', trained, '--device', 'cpu', '-o', folder)
    status, out, err = run(*call)
    assert status == 1 and err == f'convnn-timm: error: {photo.parent / "text.png"}: not an image\n'
    assert out.splitlines()[-1] == f'5 images: {folder / "stats.csv"}, {folder / "stats.png"}'
    with open(folder / 'stats.csv', newline='') as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == LayerStats._fields and [line[0] for line in lines] == LAYERS
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == LAYERS
    assert all(line[header.index('images')] == '5' for line in lines)
    assert Image.open(folder / 'stats.png').size[0] > 500

    assert 'exists; --force' in error_of(*call)
    status, out, _ = run(*call, '--force', '--limit', '2')
    assert status == 0 and out.splitlines()[-1].startswith('2 images')


def test_stats_command_errors(error_of, trained, photo, tmp_path):
    (tmp_path / 'empty').mkdir()
    out = tmp_path / 'out'
    assert 'no images in this folder' in error_of('stats', tmp_path / 'empty', '--model', trained, '-o', out)
    assert '--limit' in error_of('stats', photo.parent, '--model', trained, '--limit', '0', status=2)
    assert 'no ConvNN layers' in error_of('stats', photo.parent, '--model', 'resnet18', '-o', out)
    assert not out.exists()
    out.write_text('a file')
    assert f'{out} is a file' in error_of('stats', photo.parent, '--model', trained, '-o', out, status=2)
