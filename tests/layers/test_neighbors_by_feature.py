"""Neighbours by feature: which tokens are chosen, among which candidates, and how groups share them."""
import pytest
import torch
import torch.nn as nn

from convnn_timm.layers import ConvNN1d, ConvNN2d, ConvNNAttention2d
from convnn_timm.ops import reference
from layer_examples import LAYERS_1D, LAYERS_2D, example, image


# Groups

@pytest.mark.parametrize('args', [
    dict(), dict(K=1), dict(stride=2), dict(aggregation_type='Loc_Col'), dict(magnitude_type='euclidean'),
    dict(sampling_type='random', num_samples=9), dict(similarity_type='Loc'), dict(aggregation_type='Loc_Col', K=1),
    dict(aggregation_type='Loc_Col', K=5, stride=2, padding=2, sampling_type='random', num_samples=6),
    dict(aggregation_type='Loc_Col', K=5, padding=2, sampling_type='spatial', num_samples=5),
    dict(similarity_type='Loc', magnitude_type='euclidean', K=49, padding=3),
    dict(similarity_type='Loc_Col', bias=False), dict(shuffle_pattern='B', shuffle_scale=2)])
@pytest.mark.parametrize('layer_type', [ConvNN1d, ConvNN2d])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_groups_are_blocks_of_channels_with_common_neighbours(layer_type, groups, args):
    channels = 8 - layer_type.axes if 'aggregation_type' in args else 8  # 8 with coordinates
    layer = layer_type(channels, 8, groups=groups, dtype=torch.float64, **args).eval()
    x = example(layer, (60,) if layer.axes == 1 else (12, 12))
    padded = layer.aggregated(layer.pad(layer.check_and_unshuffle(x)[0]))
    index, blocks = layer.neighbors(x), layer.weight.flatten(2).chunk(groups)
    tokens = padded.flatten(2).mT.chunk(groups, dim=2)
    y = torch.cat([reference.neighbor_conv(t, index, w) for t, w in zip(tokens, blocks, strict=True)], dim=2).mT
    y = y if layer.bias is None else y + layer.bias.unsqueeze(1)
    torch.testing.assert_close(layer(x).flatten(2), y, rtol=1e-12, atol=1e-12)


def test_groups_start_like_a_convolution():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, groups=4)
    torch.manual_seed(0)
    layer = ConvNN2d(8, 8, groups=4)
    assert torch.equal(layer.weight.view_as(conv.weight), conv.weight) and torch.equal(layer.bias, conv.bias)


# Selection by features

def test_the_token_itself_is_first_and_dead_tokens_take_the_lowest_indices():
    layer = ConvNN2d(3, 4, K=4, padding=0)
    index = layer.neighbors(torch.zeros(1, 3, 3, 3))
    assert index[0].tolist() == [[0, 1, 2, 3]] + [[1, 0, 2, 3], [2, 0, 1, 3]] + [[i, 0, 1, 2] for i in range(3, 9)]
    layer = ConvNN2d(3, 4, K=4, padding=1)  # positions of the 5 x 5 padded map: 0, 1, 2 are padding
    assert layer.neighbors(torch.zeros(1, 3, 3, 3))[0].tolist() == [
        [own, 0, 1, 2] for own in (6, 7, 8, 11, 12, 13, 16, 17, 18)]


@pytest.mark.parametrize('magnitude_type', ['cosine', 'euclidean'])
@pytest.mark.parametrize('K, padding, size', [
    (9, 1, (6, 6)), (9, 1, (2, 2)), (25, 2, (3, 4)), (12, 3, (1, 5)), (9, 1, (4, 1))])
def test_leaving_out_padded_tokens_changes_nothing(size, padding, K, magnitude_type):
    """Only the first K - 1 padded tokens are candidates. The definition, over all of them, selects the same."""
    layer = ConvNN2d(3, 4, K=K, padding=padding, magnitude_type=magnitude_type)
    x = image(2, 3, *size).round()  # with ties
    if magnitude_type == 'cosine':
        x = x * nn.functional.one_hot(torch.arange(torch.Size(size).numel()) % 3, 3).T.reshape(3, *size)  # exact norms
    tokens = nn.functional.pad(x, (padding,) * 4).flatten(2).mT
    queries = layer.queries(size, x.device)
    index, _ = reference.knn(tokens[:, queries], tokens, K - 1, magnitude_type, queries)
    assert torch.equal(layer.neighbors(x)[..., 1:], index)


@pytest.mark.parametrize('layer_type', LAYERS_1D[:2] + LAYERS_2D[:2])
@pytest.mark.parametrize('magnitude_type', ['cosine', 'euclidean'])
def test_permuting_tokens_permutes_the_output(layer_type, magnitude_type):
    layer = layer_type(5, 6, K=4, padding=0, magnitude_type=magnitude_type, dtype=torch.float64).eval()
    x = example(layer)
    permutation = torch.randperm(x[0, 0].numel())

    def permuted(x):
        return x.flatten(2)[..., permutation].view_as(x)

    torch.testing.assert_close(layer(permuted(x)), permuted(layer(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
def test_images_do_not_see_each_other(layer_type):
    layer = layer_type(5, 6, dtype=torch.float64).eval()
    x = example(layer)
    torch.testing.assert_close(layer(x.flip(0)), layer(x).flip(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1], rtol=1e-12, atol=1e-12)


def test_scale_of_an_image_does_not_matter_to_cosine_nor_to_loc_col():
    for args in dict(), dict(similarity_type='Loc_Col'), dict(similarity_type='Loc_Col', magnitude_type='euclidean'):
        layer = ConvNN2d(5, 6, **args)
        assert torch.equal(layer.neighbors(image(2, 5, 8, 8)), layer.neighbors(1000 * image(2, 5, 8, 8)))


@pytest.mark.parametrize('size', [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_loc_col_compares_features_of_unit_deviation_with_coordinates_of_one_pitch(size, metric):
    layer = ConvNN2d(3, 4, K=5, padding=0, similarity_type='Loc_Col', magnitude_type=metric, lambda_param=0.3)
    x, (H, W) = image(2, 3, *size), size
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij')
    pitch = 2 / (max(H, W) - 1)
    location = torch.stack([(column - (W - 1) / 2) * pitch, (row - (H - 1) / 2) * pitch]).expand(2, -1, -1, -1)
    features = x / (x.std(dim=(1, 2, 3), keepdim=True) + 1e-6)
    compared = torch.cat([0.3 * features, 0.7 * location], dim=1).flatten(2).mT
    index = reference.knn(compared, compared, 4, metric, exclude=torch.arange(H * W))[0]
    assert torch.equal(layer.neighbors(x)[:, :, 1:], index)


def test_loc_col_of_an_image_of_one_colour_selects_by_location():
    args, x = dict(K=5, padding=0, magnitude_type='euclidean'), torch.zeros(1, 3, 9, 9)
    both, location = (ConvNN2d(3, 4, similarity_type=by, **args).neighbors(x) for by in ('Loc_Col', 'Loc'))
    inner = torch.arange(81).view(9, 9)[1:-1, 1:-1].flatten()
    assert torch.equal(both[:, inner].sort().values, location[:, inner].sort().values)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_loc_col_of_a_narrow_dtype_compares_in_float32(dtype):
    layer, x = ConvNN2d(3, 4, similarity_type='Loc_Col'), image(2, 3, 12, 12, dtype=dtype)
    assert torch.equal(layer.neighbors(x), layer.neighbors(x.float()))


@pytest.mark.parametrize('metric, own', [('cosine', 1.1), ('euclidean', 0.1)])
@pytest.mark.parametrize('K', [1, 4, 25])
def test_attention_is_its_definition(metric, own, K):
    layer = ConvNNAttention2d(3, 4, K=K, magnitude_type=metric, attention_dropout=0., dtype=torch.float64)
    layer.weight.data = image(*layer.weight.shape, seed=1)
    x = nn.functional.pad(image(2, 3, 3, 3), (1,) * 4)  # 25 tokens
    keys, queries, values = (w(x).flatten(2).mT for w in (layer.w_k, layer.w_q, layer.w_v))
    index, score = reference.knn(keys, queries, 24, metric, exclude=torch.arange(25))
    index = torch.cat([torch.arange(25).expand(2, 25).unsqueeze(-1), index], -1)[..., :K]
    score = torch.cat([torch.full((2, 25, 1), own, dtype=torch.float64), score], -1)[..., :K].softmax(-1)
    y = reference.neighbor_conv(values, index, layer.weight.flatten(2), layer.bias, score, groups=layer.token_channels)
    y = layer.w_o(layer.pointwise_conv(y.mT.unflatten(2, (5, 5))[..., 1:-1, 1:-1]))
    torch.testing.assert_close(layer(image(2, 3, 3, 3)), y, rtol=1e-10, atol=1e-10)


def test_attention_counts_a_position_once_where_there_are_too_few_others():
    layer = ConvNNAttention2d(3, 4, padding=0, sampling_type='random', num_samples=8, dtype=torch.float64).eval()
    x = image(1, 3, 4, 4)
    again = layer.neighbors(x)[0, :, -1] == torch.arange(16)  # the candidates themselves
    before = layer(x)
    layer.weight.data[:, :, -1] *= -3
    changed = (layer(x) != before).any(1).flatten()
    assert again.sum() == 8 and torch.equal(changed, ~again)


def test_lambda_runs_from_location_to_features():
    x = image(2, 5, 9, 9)

    def neighbors(**args):
        return ConvNN2d(5, 6, K=5, padding=0, magnitude_type='euclidean', **args).neighbors(x).sort(-1).values

    location = neighbors(similarity_type='Loc_Col', lambda_param=0.)
    inner = torch.arange(81).view(9, 9)[1:-1, 1:-1].flatten()  # a cross of 5 wherever it is unique
    assert torch.equal(location[:, inner], neighbors(similarity_type='Loc')[:, inner])
    assert torch.equal(neighbors(similarity_type='Loc_Col', lambda_param=1.), neighbors(similarity_type='Col'))


# Sampling

def test_spatial_sampling_takes_a_grid_of_the_interior():
    layer = ConvNN2d(3, 4, K=5, padding=1, sampling_type='spatial', num_samples=3, sample_padding=1)
    chosen = layer.neighbors(image(4, 3, 9, 9))[..., 1:].unique()
    assert set(chosen.tolist()) == {(y + 1) * 11 + x + 1 for y in (1, 4, 7) for x in (1, 4, 7)}


def test_spatial_sampling_takes_all_rows_of_a_map_with_fewer():
    layer = ConvNN2d(3, 4, K=4, padding=0, sampling_type='spatial', num_samples=7)
    chosen = layer.neighbors(image(4, 3, 5, 9))[..., 1:].unique()
    assert set(chosen.tolist()) == {9 * y + x for y in range(5) for x in (0, 1, 2, 4, 5, 6, 8)}


def test_spatial_sampling_of_a_sequence_takes_a_grid_of_the_padded_signal():
    layer = ConvNN1d(3, 4, K=4, padding=1, sampling_type='spatial', num_samples=6)
    assert set(layer.neighbors(image(4, 3, 16))[..., 1:].unique().tolist()) == {0, 3, 6, 10, 13, 17}


def test_random_sampling_draws_anew_in_training_and_never_in_evaluation():
    layer = ConvNN2d(3, 4, K=5, sampling_type='random', num_samples=12)
    x = image(3, 3, 10, 10)
    drawn = [layer.train().neighbors(x) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert all(len(index[..., 1:].unique()) <= 12 for index in drawn)  # one draw for the whole batch
    torch.manual_seed(1)
    first = layer.neighbors(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer.neighbors(x))
    assert torch.equal(layer.eval().neighbors(x), layer.neighbors(x))
    assert 6 < len(layer.neighbors(x)[..., 1:].unique()) <= 12


def test_equal_random_samples_are_taken_in_the_order_of_the_map():
    layer = ConvNN2d(3, 4, K=4, padding=0, sampling_type='random', num_samples=8)
    for mode in True, True, True, False:
        assert (layer.train(mode).neighbors(torch.zeros(1, 3, 6, 6))[0, :, 1:].diff(dim=1) > 0).all()


@pytest.mark.parametrize('args', [
    dict(sampling_type='random', num_samples=200), dict(sampling_type='spatial', num_samples=11)])
def test_samples_that_cover_the_map_are_all(args):
    x = image(2, 3, 10, 10)
    torch.testing.assert_close(ConvNN2d(3, 4, **args).neighbors(x), ConvNN2d(3, 4).neighbors(x))
