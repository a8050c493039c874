"""Which positions of a padded map ask (queries) and which may be chosen (candidates): raster indices, ascending.

Everything here depends on shapes only, never on values. `size` is the unpadded map, (T,) or (H, W).
"""
import itertools
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

__all__ = [
    'SAMPLING_TYPES', 'Lattice', 'candidate_positions', 'ceil_div', 'in_output_order', 'inner_positions', 'lattices',
    'unpadded_positions',
]

SAMPLING_TYPES = ('all', 'random', 'spatial')


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for a >= 0. (ONNX rounds the usual -(-a // b) towards 0 when a is a traced size.)"""
    return (a + b - 1) // b


class Steps(NamedTuple):
    """Positions on one axis. (`range` would make their number a constant of a compiled network.)"""
    start: int
    stop: int
    step: int

    @property
    def number(self) -> int:
        return ceil_div(self.stop - self.start, self.step)


class Lattice(NamedTuple):
    """Every dilation-th position of the padded map on each axis: without dilation, the whole map.

    They choose among themselves, as if the lattice were a padded map of its own. On each axis it has these positions:
    """
    whole: Tuple[Steps, ...]  # all of them
    inner: Tuple[Steps, ...]  # those that are not padding
    queries: Tuple[Steps, ...]  # those that ask
    outputs: Tuple[Steps, ...]  # where in the output map these are

    @property
    def padded_size(self) -> Tuple[int, ...]:
        """Of the map, not only of the lattice."""
        return tuple(steps.stop for steps in self.whole)

    @property
    def size(self) -> Tuple[int, ...]:
        return tuple(steps.number for steps in self.whole)

    @property
    def inner_size(self) -> Tuple[int, ...]:
        return tuple(steps.number for steps in self.inner)

    @property
    def tokens(self) -> int:
        return torch.Size(self.size).numel()

    @property
    def dilation(self) -> int:
        return self.whole[0].step

    def own(self, positions: Sequence[int]) -> Tuple[int, ...]:
        """Where in the lattice a position of the padded map is, one number for each axis."""
        return tuple((i - steps.start) // steps.step for i, steps in zip(positions, self.whole))

    def positions(self, places: torch.Tensor) -> torch.Tensor:
        """Raster indices in the padded map of raster indices in the lattice."""
        return places if self.dilation == 1 else _span(self.padded_size, self.whole, places.device)[places]

    def query_positions(self, device: Optional[torch.device] = None) -> torch.Tensor:
        return _span(self.padded_size, self.queries, device)

    def output_positions(self, device: Optional[torch.device] = None) -> torch.Tensor:
        return _span([steps.stop for steps in self.outputs], self.outputs, device)


def lattices(size: Tuple[int, ...], padding: int, stride: int = 1, dilation: int = 1) -> List[Lattice]:
    """The lattices that hold queries: dilation ** axes of them, fewer with a stride that steps over some."""
    period = dilation // math.gcd(stride, dilation)  # so many outputs on, a query is on the same lattice again

    def steps(n: int, output: int) -> Tuple[Steps, Steps, Steps, Steps]:
        query, end = padding + output * stride, padding + n
        return (
            Steps(query % dilation, end + padding, dilation),
            Steps(query - output * stride // dilation * dilation, end, dilation),
            Steps(query, end, period * stride),
            Steps(output, ceil_div(n, stride), period))

    axes = [[steps(n, first) for first in range(period) if first == 0 or first * stride < n] for n in size]
    return [Lattice(*zip(*chosen)) for chosen in itertools.product(*axes)]


def in_output_order(lattices: Sequence[Lattice], found: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join what the queries of each lattice have found, (B, Q, k) each, in the order of the outputs."""
    if len(found) == 1:
        return found[0]
    outputs = torch.cat([lattice.output_positions(found[0].device) for lattice in lattices])
    return torch.cat(found, dim=1).index_select(1, outputs.argsort())


def inner_positions(
        size: Tuple[int, ...],
        padding: int,
        stride: int = 1,
        device: Optional[torch.device] = None,
) -> torch.Tensor:
    """Raster indices, in the padded map, of the unpadded positions 0, stride, 2 stride, ... of each axis."""
    steps = [Steps(padding, padding + n, stride) for n in size]
    return _span([n + 2 * padding for n in size], steps, device)


def unpadded_positions(
        positions: torch.Tensor,
        size: Tuple[int, ...],
        padding: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Raster indices, in the unpadded map, of positions (M,) of the padded one, and whether they lie in it."""
    places = F.pad(_raster(size, positions.device), [padding] * (2 * len(size)), value=-1).flatten()[positions]
    return places.clamp_min(0), places >= 0


def candidate_positions(
        lattice: Lattice,
        k: int,
        sampling_type: str,
        num_samples: int,
        sample_padding: int,
        equal_padding: bool,
        training: bool,
        device: Optional[torch.device] = None,
) -> torch.Tensor:
    """Raster indices, in the padded map, of the tokens of a lattice that may become neighbours.

    Args:
        lattice: Where they lie. In what follows it is the map.
        k: How many neighbours will be selected.
        sampling_type: 'all'; 'random': `num_samples` tokens of the padded map, drawn from torch's generator in training
            and the same pseudo-random ones in every evaluation; 'spatial': a regular grid of `num_samples` positions
            per axis, from `sample_padding` to the far side less `sample_padding`: of the unpadded map's in 2-D, of the
            padded signal's in 1-D (as in the paper's code). A number that exceeds the map selects 'all'.
        equal_padding: Padded tokens are all alike to the similarity. Then only the first k of them can ever be selected
            (equal scores go to the lower index), and `all` leaves out the others.

    Raises:
        ValueError: The grid has fewer than k positions.
    """
    tokens = lattice.tokens
    if sampling_type == 'random' and num_samples <= tokens:
        order = torch.randperm(tokens, device=device) if training else _scrambled(tokens, device).argsort()
        return lattice.positions(order[:num_samples].sort().values)
    if sampling_type == 'spatial' and num_samples <= max(lattice.inner_size):
        return _grid(lattice, k, num_samples, sample_padding, device)
    if equal_padding and lattice.inner_size != lattice.size:
        return _without_equal_padding(lattice, k, device)
    return lattice.positions(torch.arange(tokens, device=device))


def _without_equal_padding(lattice: Lattice, k: int, device: Optional[torch.device]) -> torch.Tensor:
    """The inner positions and the first k of the padding, ascending.

    In raster order the padding lies before the first inner row, in equal gaps between the rows, and after the last.
    """
    first = lattice.own([steps.start for steps in lattice.inner])
    row, width = lattice.size[-1], lattice.inner_size[-1]
    rows = lattice.inner_size[0] if len(first) == 2 else 1
    before = first[0] * row + first[1] if len(first) == 2 else first[0]
    inner = _span(lattice.padded_size, lattice.inner, device)
    if k <= before:  # on all but the smallest maps
        return torch.cat([lattice.positions(torch.arange(k, device=device)), inner])
    gap = row - width
    pad = torch.arange(min(k, lattice.tokens - rows * width), device=device)
    passed = ((pad - before) // max(gap, 1)).clamp(0, rows - 1) if gap else rows - 1  # gaps
    pad = torch.where(pad < before, pad, pad + width * (passed + 1))
    return torch.cat([lattice.positions(pad), inner]).sort().values


def _grid(
        lattice: Lattice,
        k: int,
        num_samples: int,
        sample_padding: int,
        device: Optional[torch.device],
) -> torch.Tensor:
    flat = len(lattice.size) == 1
    spanned, size = (lattice.whole, lattice.size) if flat else (lattice.inner, lattice.inner_size)
    axes = []
    for n in size:
        first, last = sample_padding, n - 1 - sample_padding
        count = max(0, min(num_samples, last - first + 1))
        axes.append(first + torch.arange(count, device=device) * (last - first) // max(count - 1, 1))
    found = torch.Size(len(axis) for axis in axes).numel()
    if found < k:
        steps, lower = '', ' or K'
        if lattice.dilation > 1:
            steps, lower = f' in steps of dilation={lattice.dilation}', ', dilation or K'
        raise ValueError(
            f'the sampling grid has {found} positions on a map of {" x ".join(map(str, size))}{steps}, but {k} '
            f'neighbours are to be selected: raise num_samples={num_samples}, or lower '
            f'sample_padding={sample_padding}{lower}')
    axes = [steps.start + steps.step * axis for steps, axis in zip(spanned, axes)]
    return _raster(lattice.padded_size, device)[torch.meshgrid(*axes, indexing='ij')].flatten()


def _span(size: Sequence[int], axes: Sequence[Steps], device: Optional[torch.device]) -> torch.Tensor:
    """Raster indices, in a map of that size, of the positions that `axes` span."""
    return _raster(size, device)[tuple(slice(*steps) for steps in axes)].flatten()


def _raster(size: Sequence[int], device: Optional[torch.device]) -> torch.Tensor:
    """A map of that size whose values are its raster indices."""
    return torch.arange(torch.Size(size).numel(), device=device).view(*size)


def _scrambled(n: int, device: Optional[torch.device]) -> torch.Tensor:
    """n distinct pseudo-random integers, the same ones always (a 32-bit integer hash, which is one to one)."""
    x = torch.arange(1, n + 1, device=device)
    for multiplier, shift in ((0x9E3779B1, 15), (0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        x = (x * multiplier) & 0xFFFFFFFF
        x = x ^ (x >> shift)
    return x
