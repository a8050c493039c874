"""ConvNN: convolution over nearest neighbours.

Every position gathers its K most similar positions, by feature ('Col'), by location ('Loc') or by both ('Loc_Col'),
itself first, and applies one weight per neighbour rank. Chosen by location alone this is an ordinary convolution.

Paper: `Attention Via Convolutional Nearest Neighbors` - https://arxiv.org/abs/2511.14137
"""
import itertools
import math
from functools import lru_cache
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from convnn_timm.ops import grid_neighbors, knn_index, neighbor_conv
from convnn_timm.ops._common import widen
from .base import (
    SIMILARITY_TYPES, NeighborLayer, check_choice, check_groups, check_number, map_to_tokens, prepend_self)
from .coordinates import centered_positions, similarity_coordinates
from .sampling import ceil_div, padded, raster, unpadded_positions

__all__ = ['ConvNN1d', 'ConvNN2d']

NEIGHBOR_INITS = ('random', 'zero')
# The arguments on which neighbours by location depend.
BY_LOCATION = (
    'K', 'stride', 'padding', 'dilation', 'sampling_type', 'num_samples', 'sample_padding', 'magnitude_type')


class _ConvNN(NeighborLayer):
    """Convolution over the K nearest neighbours of every position.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        K: Neighbours per position, itself included.
        stride: Step between output positions; all positions stay candidates.
        padding: Zeros around the map. Padded positions are candidates, but not outputs.
        dilation: Of 'Loc' by euclidean distance among all tokens, which is a dilated convolution: positions choose
            among those a multiple of so many steps away on each axis. Other 'Loc' refuses it, neighbours by feature
            ('Col', 'Loc_Col') ignore it.
        groups: Blocks of channels that are convolved separately, as in a convolution. All channels are compared.
        sampling_type: Candidates: 'all' positions; 'random': `num_samples` positions, one draw for the whole batch,
            from torch's generator in training and the same draw in every evaluation; 'spatial': a regular grid of
            `num_samples` positions per axis. Where `num_samples` exceeds the map, all are candidates.
        num_samples: See sampling_type; -1 for 'all'.
        sample_padding: Distance of the 'spatial' grid from the border.
        shuffle_pattern: Pixel-unshuffle the input ('B'), pixel-shuffle the output ('A'), both ('BA') or none ('NA').
        shuffle_scale: Factor of the shuffle.
        magnitude_type: 'cosine' similarity or squared 'euclidean' distance.
        similarity_type: Compare features ('Col'), locations ('Loc') or both ('Loc_Col').
        aggregation_type: Aggregate features ('Col') or features with their coordinates ('Loc_Col').
        lambda_param: Weight of the features against 1 - lambda_param of the coordinates in 'Loc_Col' similarity.
        neighbor_init: How the weights of all ranks but the position itself start: 'random' (the paper's) or 'zero', so
            that the layer starts as a 1x1 convolution and learns to use its neighbours.
        bias: Learn a bias.

    Shapes: (B, in_channels, *size) -> (B, out_channels, *ceil(size / stride)), without a shuffle. B may be left out.

    Raises:
        ValueError: At construction for invalid arguments; in forward for a wrong rank or number of channels, a map not
            divisible by the shuffle scale, or one with fewer tokens than K.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            K: int = 9,
            stride: int = 1,
            padding: int = 1,
            dilation: int = 1,
            groups: int = 1,
            sampling_type: str = 'all',
            num_samples: int = -1,
            sample_padding: int = 0,
            shuffle_pattern: str = 'NA',
            shuffle_scale: int = 1,
            magnitude_type: str = 'cosine',
            similarity_type: str = 'Col',
            aggregation_type: str = 'Col',
            lambda_param: float = 0.5,
            neighbor_init: str = 'random',
            bias: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            in_channels, out_channels, K, stride, padding, dilation, sampling_type, num_samples, sample_padding,
            shuffle_pattern, shuffle_scale, magnitude_type, aggregation_type)
        check_choice('similarity_type', similarity_type, SIMILARITY_TYPES)
        check_choice('neighbor_init', neighbor_init, NEIGHBOR_INITS)
        check_number('lambda_param', lambda_param, 0, 1)
        if neighbor_init == 'zero' and similarity_type == 'Loc':
            raise ValueError(
                "neighbor_init='zero' leaves a weight to the position itself alone, which has no rank of its own in "
                "similarity_type='Loc': leave out neighbor_init, or select by 'Col' or 'Loc_Col'")
        self.similarity_type = similarity_type
        if similarity_type == 'Loc' and dilation > 1 and not self.chooses_by_distance:
            raise ValueError(
                f"dilation={dilation} needs the window that similarity_type='Loc' has with magnitude_type='euclidean' "
                f"and sampling_type='all' only: choose these, or leave dilation at 1")
        coordinates = self.axes if aggregation_type == 'Loc_Col' else 0
        check_groups(groups, self.token_channels, self.token_out_channels, coordinates)
        self.groups = groups
        self.lambda_param = lambda_param
        self.neighbor_init = neighbor_init
        # As many dimensions as a convolution's weight, so that timm can adapt its input channels.
        shape = (self.token_out_channels, self.token_channels // groups, K) + (1,) * (self.axes - 1)
        self.weight = nn.Parameter(torch.empty(shape, **dd))
        self.bias = nn.Parameter(torch.empty(self.token_out_channels, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of torch's convolutions."""
        weight = self.random_weight()
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def random_weight(self) -> torch.Tensor:
        """The part of the weight that starts random, for the caller to fill in place. The rest is set to zero."""
        weight = self.weight.detach()
        if self.neighbor_init == 'zero':
            weight[:, :, 1:].zero_()
            return weight[:, :, :1]
        return weight

    @torch.jit.unused
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return self.shuffle_output(self._convolve(*self.check_and_unshuffle(x)))

    def _convolve(self, x: torch.Tensor, size: Tuple[int, ...]) -> torch.Tensor:
        """The map x convolved over neighbours, by the cheapest way that there is."""
        window = self._convolution_window()
        if window is not None:
            return self._convolve_window(self.aggregated(self.pad(x)), window)
        if self.K == 1:
            return self._pointwise(self._to_aggregate(x), size, self.weight)
        if self.similarity_type == 'Loc':
            index = self._select(x, size)
        else:
            positions, place = self._search(self._to_compare(x), size)
            if 2 * len(positions) < padded(size, self.padding).numel():
                return self._aggregate_few(self._to_aggregate(x), size, positions, place)
            index = prepend_self(self.queries(size, x.device), positions[place], x.shape[0])
        tokens = map_to_tokens(self.aggregated(self.pad(x)))
        return self.to_map(neighbor_conv(tokens, index, self.weight.flatten(2), self.bias, groups=self.groups), size)

    def _aggregate_few(
            self,
            x: torch.Tensor,
            size: Tuple[int, ...],
            positions: torch.Tensor,
            place: torch.Tensor,
    ) -> torch.Tensor:
        """Aggregate over neighbours that are all among few candidates (M,), `place` (B, Q, K - 1) of them: a map.

        Only rank 0, the position itself, needs the whole map. It is a 1x1 convolution.
        """
        own, others = self.weight.split([1, self.K - 1], dim=2)
        y = neighbor_conv(self._tokens_at(positions, x, size), place, others.flatten(2), groups=self.groups)
        return self._pointwise(x, size, own) + self.to_map(y, size)

    def _select(self, x: torch.Tensor, size: Tuple[int, ...]) -> torch.Tensor:
        if self.similarity_type == 'Loc':
            return self._select_by_location(size, x.device).expand(x.shape[0], -1, -1)
        return self._own_and_search(self._to_compare(x), size)

    # These two pad the map only where its padding gets coordinates. Below, a map that is larger than `size` is padded.

    def _to_compare(self, x: torch.Tensor) -> torch.Tensor:
        return self.similarity_features(self.pad(x)) if self.similarity_type == 'Loc_Col' else x

    def _to_aggregate(self, x: torch.Tensor) -> torch.Tensor:
        return self.aggregated(self.pad(x)) if self.aggregation_type == 'Loc_Col' else x

    def _pointwise(self, x: torch.Tensor, size: Tuple[int, ...], weight: torch.Tensor) -> torch.Tensor:
        """The kept positions convolved with the weight of rank 0: a map."""
        if tuple(x.shape[2:]) != size:
            for axis, n in enumerate(size, start=2):
                x = x.narrow(axis, self.padding, n)
        for axis in range(2, x.ndim):  # a strided convolution of few channels_last channels crashed torch
            x = x[(slice(None),) * axis + (slice(None, None, self.stride),)]
        conv = F.conv2d if self.axes == 2 else F.conv1d
        return conv(x, weight, self.bias, groups=self.groups)

    def _tokens_at(self, positions: torch.Tensor, x: torch.Tensor, size: Tuple[int, ...]) -> torch.Tensor:
        """Tokens (B, M, C) at positions of the padded map."""
        if tuple(x.shape[2:]) != size:
            return map_to_tokens(x).index_select(1, positions)
        place, inside = unpadded_positions(positions, size, self.padding)
        return map_to_tokens(x).index_select(1, place).masked_fill(~inside.unsqueeze(-1), 0)

    @torch.no_grad()
    def similarity_features(self, x: torch.Tensor) -> torch.Tensor:
        """What is compared, of the padded map x: its features, for 'Loc_Col' scaled and joined with coordinates."""
        if self.similarity_type != 'Loc_Col':
            return x
        x = widen(x)
        features = x / (x.std(dim=tuple(range(1, x.ndim)), keepdim=True) + 1e-6)
        coordinates = similarity_coordinates(tuple(x.shape[2:]), x.device).to(x.dtype)
        coordinates = coordinates.expand(x.shape[0], *coordinates.shape)
        return torch.cat([self.lambda_param * features, (1 - self.lambda_param) * coordinates], dim=1)

    def _own_and_search(self, features: torch.Tensor, size: Tuple[int, ...]) -> torch.Tensor:
        """Raster indices (B, Q, K) by the features that are compared, own position first."""
        queries = self.queries(size, features.device)
        if self.K == 1:
            return prepend_self(queries, None, features.shape[0])
        positions, place = self._search(features, size)
        return prepend_self(queries, positions[place], features.shape[0])

    @torch.no_grad()
    def _search(self, features: torch.Tensor, size: Tuple[int, ...]) -> Tuple[torch.Tensor, torch.Tensor]:
        """The candidates' raster indices (M,), and which of them are a position's other neighbours (B, Q, K - 1)."""
        queries = self.queries(size, features.device)
        positions, own_place = self.candidates(size, queries, equal_padding=self.similarity_type == 'Col')
        candidates = self._tokens_at(positions, features, size)
        all_ask = self.stride == 1 and tuple(features.shape[2:]) == size
        query = map_to_tokens(features) if all_ask else self._tokens_at(queries, features, size)
        return positions, knn_index(query, candidates, self.K - 1, self.magnitude_type, own_place)

    def _select_by_location(self, size: Tuple[int, ...], device: torch.device) -> torch.Tensor:
        """(1, Q, K) in raster order, equal for all images. Found once, unless candidates are drawn anew."""
        drawn = self.sampling_type == 'random' and self.training
        standard_only = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()  # no operators of this package
        if drawn or standard_only:
            return self._find_by_location(size, device)
        return _neighbors_by_location(size, device, *[getattr(self, name) for name in BY_LOCATION])

    def _find_by_location(self, size: Tuple[int, ...], device: torch.device) -> torch.Tensor:
        """(1, Q, K) in raster order. The nearest by distance among all tokens are known without a search."""
        if self.chooses_by_distance:
            return self._nearest(size, device).unsqueeze(0)
        on = device if device.type != 'mps' else None  # mps has no float64: the CPU searches
        positions = centered_positions(padded(size, self.padding), on)
        return self._own_and_search(positions.unsqueeze(0), size).sort(dim=-1).values.to(device)

    def _nearest(self, size: Tuple[int, ...], device: torch.device) -> torch.Tensor:
        """(Q, K): the nearest positions to each query, of those a multiple of `dilation` away on each axis."""
        if self.dilation == 1:
            start, stop = (self.padding,) * self.axes, tuple(self.padding + n for n in size)
            return grid_neighbors(padded(size, self.padding), self.K, start, self.stride, stop, device)
        position = raster(padded(size, self.padding), device)
        nearest = position.new_empty(*position.shape, self.K)
        # Rows and columns see those with their own remainder by dilation. These are the remainders that queries have.
        remainders = [sorted({(self.padding + i) % self.dilation for i in range(0, n, self.stride)}) for n in size]
        for phase in itertools.product(*remainders):
            every = tuple(slice(first, None, self.dilation) for first in phase)
            grid = position[every]
            if grid.numel() < self.K:
                raise ValueError(
                    f'K={self.K} neighbours need as many tokens in steps of dilation={self.dilation}, but a map of '
                    f'{" x ".join(map(str, size))} with padding={self.padding} has {grid.numel()}: use a larger input '
                    f'or padding, or a smaller K or dilation')
            nearest[every] = grid.flatten()[grid_neighbors(grid.shape, self.K, device=device)].view(*grid.shape, -1)
        return nearest.flatten(0, -2)[self.queries(size, device)]

    @property
    def chooses_by_distance(self) -> bool:
        """Whether neighbours are the nearest places among all, a window wherever it fits into the padded map."""
        return (
            self.similarity_type == 'Loc' and self.magnitude_type == 'euclidean' and self.sampling_type == 'all')

    def _convolution_window(self) -> Optional[int]:
        """Side of the window that every position's neighbours fill, if they do. Then the layer is a convolution."""
        side = round(self.K ** (1 / self.axes))
        is_window = (
            self.chooses_by_distance
            # The k x k nearest form a square for k = 1, 3, 5 only: a corner of 7 x 7 is farther away than 4 steps.
            and side ** self.axes == self.K and side % 2 == 1 and (self.axes == 1 or side <= 5)
            and self.padding >= self.dilation * (side // 2))
        return side if is_window else None

    def _convolve_window(self, x: torch.Tensor, window: int) -> torch.Tensor:
        margin = self.padding - self.dilation * (window // 2)
        for axis in range(2, x.ndim):
            x = x.narrow(axis, margin, x.shape[axis] - 2 * margin)
        weight = self.weight.flatten(2).unflatten(2, [window] * self.axes)
        conv = F.conv2d if self.axes == 2 else F.conv1d
        return conv(x, weight, self.bias, self.stride, dilation=self.dilation, groups=self.groups)

    def extra_repr(self) -> str:
        text = f'{super().extra_repr()}, similarity_type={self.similarity_type}'
        if self.groups > 1:
            text += f', groups={self.groups}'
        if self.similarity_type == 'Loc_Col':
            text += f', lambda_param={self.lambda_param}'
        if self.neighbor_init != 'random':
            text += f', neighbor_init={self.neighbor_init}'
        return text + ('' if self.bias is not None else ', bias=False')


class ConvNN1d(_ConvNN):
    __doc__ = _ConvNN.__doc__.replace('of every position.', 'of every position of a sequence (B, C, T).', 1)
    axes = 1


class ConvNN2d(_ConvNN):
    __doc__ = _ConvNN.__doc__.replace('of every position.', 'of every position of an image (B, C, H, W).', 1)
    axes = 2


# Neighbours found inside a CUDA graph would lie in its memory, and what is remembered outlives the graph.
@torch.library.custom_op(
    'convnn_timm::neighbors_by_location', mutates_args=(), tags=[torch.Tag.cudagraph_unsafe])
def _neighbors_by_location(
        size: List[int],
        device: torch.device,
        K: int,
        stride: int,
        padding: int,
        dilation: int,
        sampling_type: str,
        num_samples: int,
        sample_padding: int,
        magnitude_type: str,
) -> torch.Tensor:
    """Neighbours (1, Q, K) by location, remembered. As an operator, so that compiled networks remember them too."""
    arguments = K, stride, padding, dilation, sampling_type, num_samples, sample_padding, magnitude_type
    return _remembered(tuple(size), device, *arguments).clone()  # the caller may write into its copy


@_neighbors_by_location.register_fake
def _(size, device, K, stride, *_):
    return torch.empty((1, math.prod(ceil_div(n, stride) for n in size), K), dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _remembered(size: Tuple[int, ...], device: torch.device, *arguments) -> torch.Tensor:
    layer_type = ConvNN1d if len(size) == 1 else ConvNN2d
    layer = layer_type(1, 1, similarity_type='Loc', device='meta', **dict(zip(BY_LOCATION, arguments)))
    return layer.eval()._find_by_location(size, device)
