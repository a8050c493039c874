"""Shapes, gradients, dtypes, and numbers that are not finite."""
from functools import partial

import pytest
import torch

from convnn_timm.layers import (
    Branching1d, Branching2d, ConvNN1d, ConvNN2d, ConvNNAttention1d, ConvNNAttention2d, CoordConv2d, PixelShuffle1d,
    PixelUnshuffle1d)
from layer_examples import LAYERS_1D, LAYERS_2D, LOC, example, image


# Shapes, gradients, precision

@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
@pytest.mark.parametrize('args', [
    dict(), dict(stride=2), dict(stride=3, K=4, padding=2), dict(K=1), dict(aggregation_type='Loc_Col'),
    dict(magnitude_type='euclidean'), dict(sampling_type='random', num_samples=9), dict(bias=False),
    dict(sampling_type='spatial', num_samples=8), dict(shuffle_pattern='BA', shuffle_scale=2, stride=2)])
def test_shapes_and_gradcheck(layer_type, args):
    layer = layer_type(2, 4, dtype=torch.float64, **args).eval()
    size = (12, 8) if layer.axes == 2 else (20,)
    x = image(1, 2, *size).requires_grad_()
    assert layer(x).shape == (1, 4, *(-(-n // args.get('stride', 1)) for n in size))
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize('layer_type', [ConvNN1d, ConvNN2d, Branching1d, Branching2d])
@pytest.mark.parametrize('args', [
    dict(dilation=2, groups=2), dict(dilation=3, stride=2, groups=2, padding=3, K=4, **LOC),
    dict(groups=2, sampling_type='random', num_samples=8),
    dict(sampling_type='spatial', num_samples=8, similarity_type='Loc_Col')])
def test_gradcheck_of_groups_and_dilation(layer_type, args):
    layer = layer_type(4, 4, dtype=torch.float64, **args).eval()
    x = image(1, 4, *((12, 8) if layer.axes == 2 else (20,))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize('pattern, channels, size', [('B', 4, 4), ('A', 4, 16), ('BA', 4, 8)])
def test_shuffle_patterns(pattern, channels, size):
    for layer in (ConvNN2d(3, 4, shuffle_pattern=pattern, shuffle_scale=2), CoordConv2d(
            3, 4, shuffle_pattern=pattern, shuffle_scale=2)):
        assert layer(image(1, 3, 8, 8, dtype=torch.float32)).shape == (1, channels, size, size)


def test_pixel_shuffle_1d_is_undone():
    x = image(2, 6, 12)
    assert PixelUnshuffle1d(3)(x).shape == (2, 18, 4)
    assert torch.equal(PixelShuffle1d(3)(PixelUnshuffle1d(3)(x)), x)
    for layer in PixelShuffle1d(3), PixelUnshuffle1d(3):
        assert torch.equal(layer(x[0]), layer(x)[0]) and torch.equal(torch.jit.script(layer)(x[0]), layer(x)[0])
        with pytest.raises(ValueError, match=r'expected an input \(B, C, T\) or \(C, T\), got \(12,\)'):
            layer(x[0, 0])
    with pytest.raises(ValueError, match='12 tokens are not divisible by the downscale factor 5'):
        PixelUnshuffle1d(5)(x)
    with pytest.raises(ValueError, match='6 channels are not divisible by the upscale factor 4'):
        PixelShuffle1d(4)(x)


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
def test_evaluation_is_deterministic_and_training_drops_attention(layer_type):
    attention = {'attention_dropout': 0.5} if 'Attention' in layer_type.__name__ else {}
    layer = layer_type(3, 4, sampling_type='random', num_samples=10, **attention)
    x = example(layer).float()
    assert torch.equal(layer.eval()(x), layer(x))
    if attention:
        layer = layer_type(3, 4, **attention).train()  # no sampling: only dropout can differ
        assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize('layer_type', [
    *[partial(ConvNN2d, similarity_type=similarity_type, **args)
      for similarity_type in ('Col', 'Loc', 'Loc_Col') for args in (dict(), dict(groups=4))],
    ConvNNAttention1d, partial(ConvNNAttention2d, aggregation_type='Loc_Col')])
def test_autocast_selects_the_neighbours_of_float32(layer_type):
    layer = layer_type(16, 8).eval()
    x = image(2, 16, *(12,) * layer.axes, dtype=torch.float32)
    expected = layer.neighbors(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(layer.neighbors(x), expected)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
def test_autocast_leaves_float64(layer_type):
    layer = layer_type(3, 4, dtype=torch.float64).eval()
    x = example(layer)
    outside = layer(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(layer(x), outside) and outside.dtype == torch.float64


@pytest.mark.parametrize('value', [torch.inf, torch.nan])
def test_what_is_not_finite_stays_with_those_that_select_it(value):
    layer = ConvNN2d(2, 3, padding=3, sampling_type='random', num_samples=20).eval()
    x = image(1, 2, 8, 8, dtype=torch.float32)
    x[0, :, 0, 0] = value
    index = layer.neighbors(x)[0]
    wrong = ~layer(x).isfinite().all(1).flatten()
    assert torch.equal(wrong, (index == 3 * 14 + 3).any(1)) and 0 < wrong.sum() < 64


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_narrow_dtypes_train(layer_type, dtype):
    layer = layer_type(3, 4, dtype=dtype)
    y = layer(example(layer).to(dtype))
    y.float().sum().backward()
    assert y.dtype == dtype and all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize('layer_type', LAYERS_2D)
def test_nan_gives_nan_and_no_index_error(layer_type):
    layer = layer_type(3, 4).eval()
    x = image(2, 3, 6, 6, dtype=torch.float32)
    x[0, :, 2, 2] = float('nan')
    y = layer(x)
    assert y[0, :, 2, 2].isnan().all() and not y[1].isnan().any()


@pytest.mark.parametrize('layer_type', LAYERS_2D)
def test_channels_last_gives_the_same(layer_type):
    layer = layer_type(8, 8).eval()
    x = image(2, 8, 6, 6, dtype=torch.float32)
    y = layer(x)
    layer = layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), y)


# Errors

def test_a_single_neighbour_is_dropped_like_others():
    layer, x = ConvNNAttention2d(3, 4, K=1, attention_dropout=0.5).train(), image(2, 3, 8, 8, dtype=torch.float32)
    assert not torch.equal(layer(x), layer(x))
