"""Which neighbours layers choose: captured, measured and drawn, and the two commands that do it."""
import copy
import csv
import math
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform

import convnn_timm.models  # noqa: F401, registers the models
from convnn_timm import convert
from convnn_timm.cli import commands as cli
from convnn_timm.layers import Branching2d, ConvNN2d, ConvNNAttention2d
from convnn_timm.inspect.visualize import (
    LayerStats,
    capture_neighbors,
    draw_neighbors,
    draw_stats,
    neighbor_layers,
    neighbor_stats,
    see,
    window_neighbors,
)

CHANNELS = (8, 8, 16, 16)
LAYERS = [f'layer{stage}.{block}.conv{conv}' for stage in range(1, 5) for block in range(2) for conv in (1, 2)]
LOC = dict(similarity_type='Loc', magnitude_type='euclidean', sampling_type='all')


def tiny(layer='convnn_branching', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f'resnet18_{layer}', channels=CHANNELS, **kwargs)


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


# Capture

@pytest.mark.parametrize('layer', ['convnn', 'convnn_attn', 'convnn_branching', 'convnn_branching_attn'])
def test_layers_are_named_like_the_convolutions_they_replace(layer):
    assert list(neighbor_layers(tiny(layer))) == LAYERS


def test_no_layers():
    for model in (tiny('conv2d'), tiny(branch_ratio=0)):
        with pytest.raises(ValueError, match='no ConvNN layers'):
            capture_neighbors(model, images(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no layer 'layer9'; layers with neighbours are layer1.0.conv1, "):
        capture_neighbors(tiny(), images(1, 3, 32, 32), ['layer9'])


@pytest.mark.parametrize('fails', [False, True])
def test_model_is_untouched(fails):
    model = tiny(sampling_type='random', num_samples=50, zero_init_last=False).train()
    model.layer1.eval()  # as of a network that is partly frozen
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    x, random = images(2, 3, 32, 32), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            capture_neighbors(model, images(2, 5, 32, 32))
    else:
        capture_neighbors(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected = tiny(sampling_type='random', num_samples=50, zero_init_last=False).eval()(x)
    assert torch.equal(model.eval()(x), expected)


def test_positions_on_a_map_with_known_neighbors():
    """Three values, each at two places: a position's nearest neighbour is its twin. Rows, columns, padding, stride."""
    x = torch.zeros(1, 1, 4, 6)
    twins = {(0, 0): (3, 5), (2, 4): (1, 1), (0, 2): (3, 1)}
    for value, (one, other) in enumerate(twins.items(), 1):
        x[(0, 0, *one)] = x[(0, 0, *other)] = 10. * value
    layer = ConvNN2d(1, 1, K=2, stride=2, padding=2, magnitude_type='euclidean')
    (name, found), = capture_neighbors(layer, x).items()
    assert (name, found.size, found.stride, found.padding, found.window) == ('', (4, 6), 2, 2, 3)
    assert found.query.tolist() == [[r, c] for r in (0, 2) for c in (0, 2, 4)]
    chosen = {tuple(query): neighbors for query, neighbors in zip(found.query.tolist(), found.index[0].tolist())}
    for query, twin in twins.items():
        assert chosen[query] == [list(query), list(twin)]
    # All other positions are zero, as padding is: the first padded token comes first.
    assert chosen[0, 4] == [[0, 4], [-2, -2]]
    assert found.in_padding[0].any(dim=-1).tolist() == [query not in twins for query in chosen]


def test_shuffled_map():
    found = capture_neighbors(ConvNN2d(2, 4, shuffle_pattern='BA', shuffle_scale=2, **LOC), images(1, 2, 8, 12))['']
    assert found.size == (4, 6) and torch.equal(found.index, window_neighbors(found).index)


def test_window_is_dilated_as_the_layer_is():
    for layer_type, stride in (ConvNN2d, 3), (Branching2d, 1):
        layer = layer_type(2, 4, padding=2, dilation=2, stride=stride, **LOC)
        found, = capture_neighbors(nn.Sequential(layer), images(1, 2, 8, 11)).values()
        assert found.dilation == 2 and torch.equal(found.index, window_neighbors(found).index)
        line, = neighbor_stats(nn.Sequential(layer), images(1, 2, 8, 11))
        assert line.inside == 1 and line.distance == pytest.approx(line.window_distance)


@pytest.mark.parametrize('layer, window', [
    (Branching2d(2, 4, kernel_size=5), 5), (Branching2d(2, 4, branch_ratio=1), 3), (ConvNN2d(2, 4, K=10), 5),
    (ConvNN2d(2, 4, K=5), 3), (ConvNNAttention2d(2, 4, K=1), 1)])
def test_window(layer, window):
    for name in '', '0', 'mybranch1':
        model = nn.Sequential(OrderedDict({name: layer})) if name else layer
        (found_name, found), = capture_neighbors(model, images(1, 2, 8, 8)).items()
        assert (found_name, found.window) == (name, window)


@pytest.mark.parametrize('conv', [
    nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 5, stride=3, padding=1), nn.Conv2d(2, 4, 3, stride=2, padding=4),
    nn.Conv2d(2, 4, 3, padding=(0, 1), dilation=2)], ids=str)
@pytest.mark.parametrize('layer', ['convnn', 'convnn_branching'])
def test_positions_are_those_of_the_map_before_a_converted_layer_pads_it(conv, layer):
    """Where a convolution pads more or less than half its window."""
    k, (stride, _), (d, _) = conv.kernel_size[0], conv.stride, conv.dilation
    model = nn.Sequential(copy.deepcopy(conv))
    convert(model, layer, **LOC)
    x = images(2, 2, 13, 18)
    (name, found), = capture_neighbors(model, x).items()
    rows, columns = (
        torch.arange(out) * stride - padding + d * (k // 2) for out, padding in zip(conv(x).shape[2:], conv.padding))
    assert found.size == (13, 18) and torch.equal(found.query, torch.cartesian_prod(rows, columns))
    assert torch.equal(found.index, window_neighbors(found).index.expand_as(found.index))
    line, = neighbor_stats(model, x)
    assert line.inside == 1 and line.distance == pytest.approx(line.window_distance)


@pytest.mark.parametrize('layer', ['convnn', 'convnn_branching'])
def test_by_location_the_neighbors_are_the_window(layer):
    captured = capture_neighbors(tiny(layer, **LOC), images(2, 3, 32, 32))
    assert list(captured) == LAYERS
    for name, found in captured.items():
        assert torch.equal(found.index, window_neighbors(found).index.expand_as(found.index)), name
        assert found.stride == (2 if name in ('layer2.0.conv1', 'layer3.0.conv1', 'layer4.0.conv1') else 1)


# Measure

def test_by_location_stats_are_those_of_the_window():
    for line in neighbor_stats(tiny(**LOC), images(2, 3, 32, 32)):
        assert line.inside == 1 and line.distance == pytest.approx(line.window_distance)
        assert line.hub_share == line.window_hub_share and line.hub_skewness == pytest.approx(line.window_hub_skewness)
        assert line.uniform_distance > line.distance and line.uniform_inside < 1


def test_any_token_of_a_dilated_layer_is_one_that_it_may_choose():
    """A row of five: the even positions see (2, 4), (2, 2), (2, 4) steps away, the odd ones 2 each."""
    line, = neighbor_stats(ConvNN2d(1, 1, K=2, padding=0, dilation=2), images(1, 1, 1, 5))
    assert line.uniform_distance == pytest.approx(20 / 8) and line.uniform_inside == pytest.approx(6 / 8)
    assert line.window_distance == 2


@pytest.mark.parametrize('stride', [1, 2])
def test_any_token_is_measured_from_where_a_converted_layer_looks(stride):
    """Also from outside the map."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=stride, padding=4))
    convert(model, 'convnn', **LOC)
    x = images(1, 2, 7, 9)
    found, = capture_neighbors(model, x).values()
    steps = found.query.unsqueeze(1) - torch.cartesian_prod(torch.arange(7), torch.arange(9))
    steps = steps[(steps != 0).any(dim=-1)]
    line, = neighbor_stats(model, x)
    assert line.uniform_distance == pytest.approx(steps.double().norm(dim=-1).mean().item())
    assert line.uniform_inside == pytest.approx((steps.abs() <= 1).all(dim=-1).double().mean().item())


def test_stats_of_known_neighbors():
    """A row of four tokens that choose, in this order, the tokens 3, 2 (or 3, the same distance), 1, 1."""
    layer = ConvNN2d(1, 1, K=2, padding=0, magnitude_type='euclidean')
    x = torch.tensor([[[[0., 3., 4., 2.]]]])
    line, = neighbor_stats(layer, x)
    assert (line.layer, line.height, line.width, line.K, line.window, line.images) == ('', 1, 4, 2, 3, 1)
    assert line.distance == pytest.approx((3 + 1 + 1 + 2) / 4)
    assert line.inside == 2 / 4 and line.padding == 0
    assert line.uniform_distance == pytest.approx(20 / 12) and line.uniform_inside == pytest.approx(6 / 12)
    assert line.window_distance == 1 and line.window_hub_share == 2 / 4
    assert line.hub_share == 2 / 4  # token 1 is chosen twice; occurrences are 0, 2, 1, 1
    assert line.hub_skewness == pytest.approx(0)


def test_hubs_and_padding():
    """A token in the middle is every other's nearest; zeros are like padding, and choose that."""
    hub = torch.tensor([[1., 0.], [0., 1.], [-1., 0.], [0., -1.], [0.1, 0.1]]).T.reshape(1, 2, 1, 5)
    line, = neighbor_stats(ConvNN2d(2, 1, K=2, padding=0, magnitude_type='euclidean'), hub)
    assert line.hub_share == 4 / 5 and line.hub_skewness > 1 > line.window_hub_skewness
    line, = neighbor_stats(ConvNN2d(1, 1, K=3, magnitude_type='euclidean'), torch.zeros(2, 1, 3, 3))
    assert line.padding == 1 and math.isnan(line.distance) and line.hub_share == 0


def test_stats_of_a_loader():
    model, x = tiny(), images(5, 3, 32, 32)
    whole = neighbor_stats(model, x)
    parts = neighbor_stats(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(5)), 2))
    for a, b in zip(whole, parts, strict=True):
        assert a.layer == b.layer and a.images == b.images == 5
        assert a[7:] == pytest.approx(b[7:], rel=0.05, abs=0.05)  # selection may differ by batch where scores are equal
    with pytest.raises(ValueError, match='no images'):
        neighbor_stats(model, [])


# Draw

def evaluation(size=32, **kwargs):
    return create_transform(size, is_training=False, interpolation='bilinear', **kwargs)


@pytest.mark.parametrize('size', [(32, 32), (100, 64), (47, 90), (20, 13)])
@pytest.mark.parametrize('crop', [
    dict(crop_pct=1.), dict(crop_pct=0.875), dict(crop_pct=1., crop_mode='squash'),
    dict(crop_pct=0.9, crop_mode='border')])
def test_points_follow_the_transform(size, crop):
    """A bright block of the photograph is found where the point at its centre is said to be."""
    width, height = size
    pixels = np.zeros((height, width), np.uint8)
    x, y, r = round(0.6 * width), round(0.4 * height), max(1, min(size) // 16)
    pixels[y - r:y + r + 1, x - r:x + r + 1] = 255
    view = see(Image.fromarray(pixels).convert('RGB'), evaluation(mean=(0, 0, 0), **crop))  # 'border' is black then
    assert view.image.size == (32, 32) and view.pixels.shape == (3, 32, 32)
    bright = np.asarray(view.image.convert('L'), dtype=float)
    rows, columns = np.indices(bright.shape)
    centre = (bright * (columns + .5)).sum() / bright.sum(), (bright * (rows + .5)).sum() / bright.sum()
    assert view.locate((x, y)) == pytest.approx(centre, abs=0.35)


def test_points_outside():
    view = see(Image.new('RGB', (64, 32)), evaluation(crop_pct=1.))
    assert view.locate((16, 0)) == (0.5, 0.5) and view.locate((47, 31)) == (31.5, 31.5)
    for x, y in ((64, 0), (0, 32), (-1, 0)):
        with pytest.raises(ValueError, match=f'point {x},{y} is outside the image, which has 64 x 32 pixels'):
            view.locate((x, y))
    for point in ((15, 3), (48, 3)):
        with pytest.raises(ValueError, match='is cropped away: the network sees 16 <= x < 48 and 0 <= y < 32'):
            view.locate(point)


def cells(axes):
    """Upper left corners (column, row) of the neighbours drawn, in order of rank; the window's outline comes last."""
    return [tuple(v + 0.5 for v in patch.get_xy()) for patch in axes.patches[:-1]]


def test_drawn_neighbors():
    """A stride, a point, padding: the cells are the neighbours of the position that covers the point."""
    view = see(Image.new('RGB', (64, 32)), evaluation(crop_pct=1.))
    captured = capture_neighbors(tiny(**LOC), view.pixels.unsqueeze(0), ['layer3.0.conv1'])
    figure = draw_neighbors(view, captured, [(16, 0), (47, 15)])
    photo, layer, window = figure.axes[:3]
    assert photo.get_title().startswith('point 16,0')
    assert layer.get_title() == 'layer3.0.conv1\n16 x 16 tokens, stride 2'
    assert window.get_title().startswith('Conv2d 3 x 3\n')
    around = [(c, r) for r in (-1, 0, 1) for c in (-1, 0, 1)]
    assert cells(layer) == cells(window) == around
    assert layer.get_xlabel() == '5 of 9 in the padding'
    assert layer.get_xlim() == (-1.5, 16.5) and layer.get_ylim() == (16.5, -1.5)  # the padding is in the picture
    assert cells(figure.axes[4]) == [(c + 14, r + 6) for c, r in around] and not figure.axes[4].get_xlabel()


def test_drawn_window_of_a_dilated_layer():
    view = see(Image.new('RGB', (32, 32)), evaluation(crop_pct=1.))
    captured = capture_neighbors(ConvNN2d(3, 4, padding=2, dilation=2, **LOC), view.pixels.unsqueeze(0))
    figure = draw_neighbors(view, captured, [(5, 9)])
    _, layer, window = figure.axes[:3]
    assert window.get_title().startswith('Conv2d 3 x 3, dilation 2\n')
    assert cells(layer) == cells(window) == [(c, r) for r in (7, 9, 11) for c in (3, 5, 7)]
    outline = layer.patches[-1]
    assert (*outline.get_xy(), outline.get_width(), outline.get_height()) == (2.5, 6.5, 5, 5)
    assert layer.get_xlim() == (-2.5, 33.5)


def test_sheet(tmp_path):
    view = see(Image.new('L', (32, 32)), evaluation(crop_pct=1., mean=(0.5,), std=(0.5,)))
    model = tiny(in_chans=1)
    figure = draw_neighbors(view, capture_neighbors(model, view.pixels.unsqueeze(0)), [(3, 3)])
    titles = [axes.get_title().split('\n')[0] for axes in figure.axes]
    assert titles[:17] == ['point 3,3', *LAYERS]
    draw_stats(neighbor_stats(model, view.pixels.unsqueeze(0))).savefig(tmp_path / 'stats.png')


# Commands

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A small network saved as a folder, as training saves it."""
    folder = tmp_path_factory.mktemp('model')
    model = tiny()
    config = dict(pretrained_cfg=dict(input_size=(3, 32, 32), num_classes=10), model_args=dict(channels=CHANNELS))
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return f'local-dir:{folder}'


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photos' / 'photo.png'
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def run(capsys, *argv):
    status = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out, err


def error_of(capsys, *argv, status=1):
    actual, out, err = run(capsys, *argv)
    assert (actual, out) == (status, '')
    assert err.startswith('convnn-timm: error: ') and err.count('\n') == 1, err
    return err


def test_neighbors_command(capsys, trained, photo, tmp_path):
    out = tmp_path / 'new' / 'neighbors.png'
    call = ('neighbors', photo, '--model', trained, '--device', 'cpu', '-o', out)
    assert run(capsys, *call) == (0, f'{out}\n', '')
    small = Image.open(out).size
    assert f'{out} exists; --force' in error_of(capsys, *call)
    assert run(capsys, *call, '--force', '--layer', 'layer2.0.conv1', '--point', '20,0', '30,39')[0] == 0
    assert Image.open(out).size[1] == 2 * small[1]  # a row for each point
    assert run(capsys, *call, '--force', '--all-layers')[0] == 0
    assert Image.open(out).size[0] > small[0]


def test_neighbors_command_errors(capsys, trained, photo, tmp_path):
    def error(*args, image=photo, model=trained, status=1):
        return error_of(capsys, 'neighbors', image, '--model', model, '-o', tmp_path / 'o.png', *args, status=status)

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
        assert complaint in error_of(capsys, 'neighbors', photo, '--model', trained, '-o', out)
    folder = tmp_path / 'a.png'
    folder.mkdir()
    assert f'{folder} is a folder: name a file' in error_of(
        capsys, 'neighbors', photo, '--model', trained, '-o', folder, '--force')
    assert 'try sheet.png' in error_of(capsys, 'neighbors', photo, '--model', trained, '-o', 'sheet', status=2)


def test_untrained_model(capsys, photo, tmp_path, monkeypatch):
    """Weights are random, and said to be; the same in each call."""
    config = timm.get_pretrained_cfg('resnet18_convnn')
    config.hf_hub_id = config.file = config.url = None  # whatever has been published
    monkeypatch.setattr(timm, 'get_pretrained_cfg', lambda name: config)
    pictures = []
    for name in ('a.png', 'b.png'):
        status, _, err = run(capsys, 'neighbors', photo, '--model', 'resnet18_convnn', '-o', tmp_path / name)
        assert status == 0
        assert err == 'convnn-timm: note: resnet18_convnn has no published weights, its weights here are random\n'
        pictures.append(np.asarray(Image.open(tmp_path / name)))
    assert (pictures[0] == pictures[1]).all()


def test_stats_command(capsys, trained, photo, tmp_path):
    for i in range(4):
        Image.new('RGB', (40 + i, 50), (60 * i, 99, 9)).save(photo.parent / f'{i}.jpg')
    (photo.parent / 'text.png').write_text('not an image')
    folder = tmp_path / 'deep' / 'stats'
    call = ('stats', photo.parent, '--model', trained, '--device', 'cpu', '-o', folder)
    status, out, err = run(capsys, *call)
    assert status == 1 and err == f'convnn-timm: error: {photo.parent / "text.png"}: not an image\n'
    assert out.splitlines()[-1] == f'5 images: {folder / "stats.csv"}, {folder / "stats.png"}'
    with open(folder / 'stats.csv', newline='') as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == LayerStats._fields and [line[0] for line in lines] == LAYERS
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == LAYERS
    assert all(line[header.index('images')] == '5' for line in lines)
    assert Image.open(folder / 'stats.png').size[0] > 500

    assert 'exists; --force' in error_of(capsys, *call)
    status, out, _ = run(capsys, *call, '--force', '--limit', '2')
    assert status == 0 and out.splitlines()[-1].startswith('2 images')


def test_stats_command_errors(capsys, trained, photo, tmp_path):
    (tmp_path / 'empty').mkdir()
    out = tmp_path / 'out'
    assert 'no images in this folder' in error_of(capsys, 'stats', tmp_path / 'empty', '--model', trained, '-o', out)
    assert '--limit' in error_of(capsys, 'stats', photo.parent, '--model', trained, '--limit', '0', status=2)
    assert 'no ConvNN layers' in error_of(capsys, 'stats', photo.parent, '--model', 'resnet18', '-o', out)
    assert not out.exists()
    out.write_text('a file')
    assert f'{out} is a file' in error_of(capsys, 'stats', photo.parent, '--model', trained, '-o', out, status=2)


@pytest.mark.parametrize('command', ['neighbors', 'stats'])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, '--help'])
    assert stop.value.code == 0 and f'examples:\n  convnn-timm {command}' in capsys.readouterr().out
