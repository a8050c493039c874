"""ConvNN attention: neighbours are found, and weighted, by learned projections."""
import math
from typing import List, Optional, Tuple

import torch
import torch.nn as nn

from convnn_timm.ops import knn, neighbor_conv
from .base import NeighborLayer, check_number, map_to_tokens, prepend_self
from .projection import Projection1d, Projection2d

__all__ = ['ConvNNAttention1d', 'ConvNNAttention2d']

# A token's score with itself: above any cosine, and above any negative squared distance.
OWN_SCORE = {'cosine': 1.1, 'euclidean': 0.1}


class _ConvNNAttention(NeighborLayer):
    """Attention over the K nearest neighbours of every position.

    A position's neighbours are itself, then the candidates whose query projections are nearest to its key projection.
    A softmax over the K scores (cosine similarity, or negative squared distance) weighs the value projections. A
    depthwise convolution over neighbour ranks, a 1x1 convolution and the output projection follow. Gradient flows
    through the scores.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        K: Neighbours per position, itself included.
        stride: Step between output positions; all positions stay candidates.
        padding: Zeros around the map. Padded positions are candidates, but not outputs.
        sampling_type: Candidates: 'all', 'random' or 'spatial', see `ConvNN2d`.
        num_samples: See `ConvNN2d`; -1 for 'all'.
        sample_padding: Distance of the 'spatial' grid from the border.
        shuffle_pattern: Pixel-unshuffle the input ('B'), pixel-shuffle the output ('A'), both ('BA') or none ('NA').
        shuffle_scale: Factor of the shuffle.
        magnitude_type: 'cosine' similarity or squared 'euclidean' distance.
        aggregation_type: Project features ('Col') or features with their coordinates ('Loc_Col').
        attention_dropout: Dropout of the attention weights in training.
        bias: Learn a bias in the depthwise and the 1x1 convolution.

    Shapes: (B, in_channels, *size) -> (B, out_channels, *ceil(size / stride)), without a shuffle. B may be left out.

    Raises:
        ValueError: As `ConvNN2d` does.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            K: int = 9,
            stride: int = 1,
            padding: int = 1,
            sampling_type: str = 'all',
            num_samples: int = -1,
            sample_padding: int = 0,
            shuffle_pattern: str = 'NA',
            shuffle_scale: int = 1,
            magnitude_type: str = 'cosine',
            aggregation_type: str = 'Col',
            attention_dropout: float = 0.1,
            bias: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            in_channels, out_channels, K, stride, padding, 1, sampling_type, num_samples, sample_padding,
            shuffle_pattern, shuffle_scale, magnitude_type, aggregation_type)
        check_number('attention_dropout', attention_dropout, 0, 1)
        conv = nn.Conv2d if self.axes == 2 else nn.Conv1d
        C, O = self.token_channels, self.token_out_channels
        projection = Projection2d if self.axes == 2 else Projection1d
        self.w_q = projection(C, C, 1, bias=False, **dd)
        self.w_k = projection(C, C, 1, bias=False, **dd)
        self.w_v = conv(C, C, 1, bias=False, **dd)
        if K == 1:  # the only neighbour is the position itself, whatever they compute
            self.w_q.requires_grad_(False)
            self.w_k.requires_grad_(False)
        self.attention_dropout = attention_dropout
        self.attn_drop = nn.Dropout(attention_dropout)
        # Depthwise, one weight per channel and neighbour rank.
        self.weight = nn.Parameter(torch.empty((C, 1, K) + (1,) * (self.axes - 1), **dd))
        self.bias = nn.Parameter(torch.empty(C, **dd)) if bias else None
        self.pointwise_conv = conv(C, O, 1, bias=bias, **dd)
        self.w_o = conv(O, O, 1, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Depthwise weights start at 1: plain attention. (The projections initialise themselves.)"""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.K)
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.jit.unused
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        x, size = self.check_and_unshuffle(x)
        x = self.aggregated(self.pad(x))
        index, attention = self._attend(x, size)
        values = map_to_tokens(self.w_v(x))
        y = neighbor_conv(values, index, self.weight.flatten(2), self.bias, attention, groups=self.token_channels)
        return self.shuffle_output(self.w_o(self.pointwise_conv(self.to_map(y, size))))

    def tensors(self) -> List[Optional[torch.Tensor]]:
        return [
            self.weight, self.bias, self.w_q.weight, self.w_k.weight, self.w_v.weight, self.pointwise_conv.weight,
            self.pointwise_conv.bias, self.w_o.weight]

    def _select(self, x: torch.Tensor, size: Tuple[int, ...]) -> torch.Tensor:
        return self._attend(self.aggregated(self.pad(x)), size)[0]

    def _attend(self, x: torch.Tensor, size: Tuple[int, ...]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Neighbours (B, Q, K) of the kept positions of the padded map x, and their attention weights."""
        B, queries, tokens = x.shape[0], self.queries(size, x.device), map_to_tokens(x)
        if self.K == 1:
            index = prepend_self(queries, None, B)
            return index, self.attn_drop(torch.ones_like(index, dtype=x.dtype))
        positions, own_place = self.candidates(size, queries, equal_padding=self.aggregation_type == 'Col')
        key, query = self._project(self.w_k, tokens, queries), self._project(self.w_q, tokens, positions)
        if key.dtype != query.dtype:  # one of the projections was replaced by a module that follows autocast
            wider = torch.promote_types(key.dtype, query.dtype)
            key, query = key.to(wider), query.to(wider)
        place, others = knn(key, query, self.K - 1, self.magnitude_type, own_place)
        others = others.masked_fill(place == own_place.unsqueeze(-1), -torch.inf)  # too few candidates
        score = torch.cat([torch.full_like(others[..., :1], OWN_SCORE[self.magnitude_type]), others], dim=-1)
        return prepend_self(queries, positions[place], B), self.attn_drop(score.softmax(dim=-1))

    def _project(self, projection: nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Project the tokens at positions (M,) to be compared: (B, M, C). The module sees a map one token wide."""
        x = tokens.index_select(1, positions).transpose(1, 2)
        return map_to_tokens(projection(x.unsqueeze(-1) if self.axes == 2 else x))

    def extra_repr(self) -> str:
        return super().extra_repr() + ('' if self.bias is not None else ', bias=False')


class ConvNNAttention1d(_ConvNNAttention):
    __doc__ = _ConvNNAttention.__doc__.replace('of every position.', 'of every position of a sequence (B, C, T).', 1)
    axes = 1


class ConvNNAttention2d(_ConvNNAttention):
    __doc__ = _ConvNNAttention.__doc__.replace('of every position.', 'of every position of an image (B, C, H, W).', 1)
    axes = 2
