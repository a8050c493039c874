"""What ConvNN and ConvNN attention share: their arguments, and the way from a map to tokens and back."""
import operator
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F

from convnn_timm.ops.selection import METRICS
from .coordinates import append_coordinates
from .inputs import on_batch
from .pixel_shuffle import SHUFFLE_PATTERNS, shuffle, unshuffle
from .sampling import SAMPLING_TYPES, candidate_positions, ceil_div, inner_positions, padded
from .script import ScriptedWhole

__all__ = [
    'NeighborLayer', 'check_choice', 'check_groups', 'check_integer', 'check_number', 'map_to_tokens',
    'prepend_self', 'AGGREGATION_TYPES', 'SIMILARITY_TYPES',
]

SIMILARITY_TYPES = ('Col', 'Loc', 'Loc_Col')
AGGREGATION_TYPES = ('Col', 'Loc_Col')


def check_choice(name: str, value: Any, valid: Tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f'unknown {name} {value!r}, valid are {", ".join(map(repr, valid))}')


def check_integer(name: str, value: Any, least: int) -> None:
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f'{name} must be one integer, the same for all axes, got {value!r}') from None
    if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')


def check_number(name: str, value: Any, least: float, most: float) -> None:
    try:
        fits = least <= value <= most
    except TypeError:  # no number
        fits = False
    if not fits:
        raise ValueError(f'{name} must lie in [{least}, {most}], got {value!r}')


def check_groups(groups: int, channels: int, out_channels: int, coordinates: int) -> None:
    """Check that groups divide the aggregated channels, of which some may be coordinates, and the outputs."""
    check_integer('groups', groups, 1)
    if channels % groups or out_channels % groups:
        note = f" ({coordinates} of them coordinates of aggregation_type='Loc_Col')" if coordinates else ''
        raise ValueError(
            f'groups={groups} must divide both the {channels} channels that are aggregated{note} and the '
            f'{out_channels} output channels')


class NeighborLayer(ScriptedWhole):
    """Arguments, checks and token bookkeeping of a layer that selects neighbours.

    The steps of forward: `check_and_unshuffle`, `pad`, select, aggregate, `to_map`, `shuffle_output`. Tokens are the
    positions of the padded map in raster order. Every index counts them.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            K: int,
            stride: int,
            padding: int,
            dilation: int,
            sampling_type: str,
            num_samples: int,
            sample_padding: int,
            shuffle_pattern: str,
            shuffle_scale: int,
            magnitude_type: str,
            aggregation_type: str,
    ) -> None:
        super().__init__()
        check_choice('sampling_type', sampling_type, SAMPLING_TYPES)
        check_choice('shuffle_pattern', shuffle_pattern, SHUFFLE_PATTERNS)
        check_choice('magnitude_type', magnitude_type, METRICS)
        check_choice('aggregation_type', aggregation_type, AGGREGATION_TYPES)
        for name, value, least in (
                ('in_channels', in_channels, 1), ('out_channels', out_channels, 1), ('K', K, 1), ('stride', stride, 1),
                ('padding', padding, 0), ('dilation', dilation, 1), ('sample_padding', sample_padding, 0)):
            check_integer(name, value, least)
        check_integer('num_samples', num_samples, -1)
        if shuffle_pattern != 'NA':
            check_integer('shuffle_scale', shuffle_scale, 1)
        if sampling_type == 'all' and num_samples != -1:
            raise ValueError(
                f"sampling_type='all' takes every token: leave num_samples at -1 (got {num_samples}) "
                f"or choose 'random' or 'spatial'")
        if sampling_type != 'all':
            candidates = num_samples ** self.axes if sampling_type == 'spatial' and num_samples > 0 else num_samples
            if candidates < max(K - 1, 1):
                raise ValueError(
                    f'sampling_type={sampling_type!r} with num_samples={num_samples} gives {max(candidates, 0)} '
                    f'candidates, but K={K} needs at least {max(K - 1, 1)}')
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.K = K
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.sampling_type = sampling_type
        self.num_samples = num_samples
        self.sample_padding = sample_padding
        self.shuffle_pattern = shuffle_pattern
        self.shuffle_scale = shuffle_scale if shuffle_pattern != 'NA' else 1
        self.magnitude_type = magnitude_type
        self.aggregation_type = aggregation_type
        # Channels of a token when it is aggregated, and of an output token.
        squared = self.shuffle_scale ** self.axes
        self.token_channels = in_channels * (squared if 'B' in shuffle_pattern else 1)
        self.token_channels += self.axes if aggregation_type == 'Loc_Col' else 0
        self.token_out_channels = out_channels * (squared if shuffle_pattern in ('A', 'BA') else 1)

    def check_and_unshuffle(self, x: torch.Tensor) -> Tuple[torch.Tensor, Tuple[int, ...]]:
        """Unshuffle a batch and check that it has K tokens. Returns the maps and their size."""
        if self.shuffle_pattern in ('B', 'BA'):
            x = unshuffle(x, self.shuffle_scale)
        size = tuple(x.shape[2:])
        tokens = padded(size, self.padding).numel()
        if tokens < self.K:
            raise ValueError(
                f'K={self.K} neighbours need as many tokens, but a map of {" x ".join(map(str, size))} with '
                f'padding={self.padding} has {tokens}: use a larger input or a smaller K')
        return x, size

    def neighbors(self, x: torch.Tensor) -> torch.Tensor:
        """The K neighbours of every output position, as raster indices in the padded (and unshuffled) map.

        (B, Q, K) for a batch, (Q, K) for a single map.
        """
        return on_batch(lambda x: self._select(*self.check_and_unshuffle(x)), x, self.axes, self.in_channels)

    def _select(self, x: torch.Tensor, size: Tuple[int, ...]) -> torch.Tensor:
        """The neighbours (B, Q, K) that the output positions of maps x select."""
        raise NotImplementedError

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (self.padding,) * (2 * self.axes))

    def to_map(self, y: torch.Tensor, size: Tuple[int, ...]) -> torch.Tensor:
        """Output tokens (B, Q, C) of the unpadded map `size` as a map (B, C, *size / stride)."""
        # (Not unflatten: torch's TorchScript exporter to ONNX makes the batch that it sees there a constant.)
        return y.reshape(y.shape[0], *[ceil_div(n, self.stride) for n in size], y.shape[2]).movedim(self.axes + 1, 1)

    def shuffle_output(self, y: torch.Tensor) -> torch.Tensor:
        return shuffle(y, self.shuffle_scale) if self.shuffle_pattern in ('A', 'BA') else y

    def aggregated(self, x: torch.Tensor) -> torch.Tensor:
        """The padded map with the channels that are aggregated: with its coordinates for 'Loc_Col'."""
        return append_coordinates(x) if self.aggregation_type == 'Loc_Col' else x

    def queries(self, size: Tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Positions (Q,) that have an output."""
        return inner_positions(size, self.padding, self.stride, device)

    def candidates(
            self,
            size: Tuple[int, ...],
            queries: torch.Tensor,
            equal_padding: bool,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Positions (M,) that may be selected, and for every query (Q,) its own place among them or -1."""
        device = queries.device
        positions = candidate_positions(
            size, self.padding, self.K - 1, self.sampling_type, self.num_samples, self.sample_padding, equal_padding,
            self.training, device)
        place = torch.full((padded(size, self.padding).numel(),), -1, device=device)
        place = place.index_copy(0, positions, torch.arange(len(positions), device=device))
        return positions, place[queries]

    def extra_repr(self) -> str:
        text = f'{self.in_channels}, {self.out_channels}, K={self.K}, stride={self.stride}, padding={self.padding}'
        if self.dilation > 1:
            text += f', dilation={self.dilation}'
        text += f', {self.magnitude_type}, aggregation_type={self.aggregation_type}'
        if self.sampling_type != 'all':
            text += f', sampling_type={self.sampling_type}, num_samples={self.num_samples}'
        if self.shuffle_pattern != 'NA':
            text += f', shuffle_pattern={self.shuffle_pattern}, shuffle_scale={self.shuffle_scale}'
        return text


def map_to_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, *size) -> (B, T, C) in raster order; no copy for channels_last maps."""
    return x.movedim(1, x.ndim - 1).flatten(1, -2)


def prepend_self(queries: torch.Tensor, neighbors: Optional[torch.Tensor], batch: int) -> torch.Tensor:
    """Put every query's own position (Q,) before its other neighbours (B, Q, K - 1), if any: (B, Q, K)."""
    own = queries.unsqueeze(-1).expand(batch, -1, -1)
    return own if neighbors is None else torch.cat([own, neighbors], dim=-1)
