"""Which neighbours layers choose, drawn."""
import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from convnn_timm.inspect import capture_neighbors, draw_neighbors, draw_stats, neighbor_stats, see
from convnn_timm.layers import ConvNN2d
from test_neighbors import LAYERS, LOC, tiny


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
