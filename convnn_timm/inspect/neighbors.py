"""Which neighbours the ConvNN layers of a network choose: captured for some images, measured over many.

Positions are (row, column) on the map that a layer receives, after its pixel-unshuffle if it has one. What lies
outside the map is padding.
"""
import csv
import re
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from convnn_timm.layers.aligned import Aligned
from convnn_timm.layers.base import NeighborLayer
from convnn_timm.macs import evaluation_mode

__all__ = [
    'LayerNeighbors', 'LayerStats', 'capture_neighbors', 'neighbor_layers', 'neighbor_stats', 'window_neighbors',
    'write_csv',
]


class LayerNeighbors(NamedTuple):
    """The K neighbours that one layer chose for each of Q positions, in a batch of images."""
    index: torch.Tensor  # (B, Q, K, 2), row and column of each neighbour, in order of rank
    query: torch.Tensor  # (Q, 2), row and column of each position
    size: Tuple[int, int]  # rows and columns of the map
    stride: int  # between positions that choose
    padding: int  # around the map
    window: int  # side of the convolution that the layer stands for
    dilation: int = 1  # of the layer and its window

    @property
    def in_padding(self) -> torch.Tensor:
        """Which neighbours are padding, (B, Q, K)."""
        return ((self.index < 0) | (self.index >= torch.tensor(self.size))).any(dim=-1)


def neighbor_layers(model: nn.Module) -> Dict[str, NeighborLayer]:
    """The layers of a network that choose neighbours in images, by name; for a branching layer, the name of the whole.

    Raises:
        ValueError: There are none.
    """
    layers = {
        re.sub(r'(^|\.)branch1$', '', name): module for name, module in model.named_modules()
        if isinstance(module, NeighborLayer) and module.axes == 2}
    if not layers:
        raise ValueError(f'{type(model).__name__} has no ConvNN layers: there are no neighbours to look at')
    return layers


@torch.no_grad()
def capture_neighbors(
        model: nn.Module,
        images: torch.Tensor,
        layers: Optional[Sequence[str]] = None,
) -> Dict[str, LayerNeighbors]:
    """Run a network in evaluation mode and note which neighbours its layers choose. The network stays as it was.

    Args:
        model: A network, in any mode, on any device.
        images: Its input (B, C, H, W).
        layers: Names of layers, see `neighbor_layers`; all of them by default.

    Returns:
        Neighbours, on the CPU, by the name of the layer.

    Raises:
        ValueError: The network has no such layers.
    """
    found, captured = neighbor_layers(model), {}
    if unknown := [name for name in layers or () if name not in found]:
        raise ValueError(f'no layer {", ".join(map(repr, unknown))}; layers with neighbours are {", ".join(found)}')

    def watch(name: str, layer: NeighborLayer):
        parent = model.get_submodule(name.rpartition('.')[0])
        aligned, sizes = parent if isinstance(parent, Aligned) else None, []
        if aligned:
            handles.append(aligned.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[2:]))))

        def note(_, args):
            neighbors = _neighbors_of(layer, args[0], _window(model, name, layer))
            captured[name] = _unaligned(neighbors, aligned, sizes[-1]) if aligned else neighbors

        handles.append(layer.register_forward_pre_hook(note))

    handles = []
    for name, layer in found.items():
        if not layers or name in layers:
            watch(name, layer)
    weight = next(iter(found.values())).weight
    try:
        with evaluation_mode(model):
            model(images.to(weight.device, weight.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return captured


def window_neighbors(neighbors: LayerNeighbors) -> LayerNeighbors:
    """The neighbours of a convolution in the layer's place: its window around each position, (1, Q, k * k, 2)."""
    side = neighbors.dilation * (torch.arange(neighbors.window) - neighbors.window // 2)
    return neighbors._replace(index=neighbors.query.unsqueeze(1).add(torch.cartesian_prod(side, side)).unsqueeze(0))


def _window(model: nn.Module, name: str, layer: NeighborLayer) -> int:
    """Side of the convolution that a layer stands for: the one beside it, else the smallest that covers K tokens."""
    beside = getattr(model.get_submodule(name), 'branch2', None)
    return beside.kernel_size[0] if beside is not None else next(k for k in range(1, 2 ** 16, 2) if k * k >= layer.K)


def _neighbors_of(layer: NeighborLayer, x: torch.Tensor, window: int) -> LayerNeighbors:
    index = layer.neighbors(x).cpu()
    scale, p = layer.shuffle_scale if 'B' in layer.shuffle_pattern else 1, layer.padding
    height, width = (n // scale for n in x.shape[2:])
    row = width + 2 * p
    query = torch.cartesian_prod(*(torch.arange(0, n, layer.stride) for n in (height, width)))
    return LayerNeighbors(
        torch.stack([index // row - p, index % row - p], dim=-1), query, (height, width), layer.stride, p, window,
        layer.dilation)


def _unaligned(neighbors: LayerNeighbors, aligned: Aligned, size: Tuple[int, int]) -> LayerNeighbors:
    """Positions on the map of that size, before `aligned` padded it, without the outputs that it cuts off."""
    front, behind, first, kept = (
        torch.tensor(values) for values in zip(*(aligned.align(n, axis) for axis, n in enumerate(size))))
    output = neighbors.query // neighbors.stride
    remains = ((output >= first) & (output < first + kept)).all(dim=-1)
    return neighbors._replace(
        index=neighbors.index[:, remains] - front, query=neighbors.query[remains] - front, size=size,
        padding=neighbors.padding + int(torch.cat([front, behind]).max()))


class LayerStats(NamedTuple):
    """Where a layer looks, averaged over images.

    `window_*` are the values of the convolution that it stands for. `uniform_*` are those of attention, which takes
    every token of the map alike. A position is not counted as its own neighbour, nor is padding, except in `padding`.
    """
    layer: str
    height: int  # of the map
    width: int
    stride: int
    K: int
    window: int  # side of the convolution
    images: int
    distance: float  # mean, in tokens
    window_distance: float
    uniform_distance: float
    inside: float  # share of the neighbours that lie in the window
    uniform_inside: float
    padding: float  # share of the neighbours that are padding
    hub_share: float  # share of the positions that chose the token chosen most often
    window_hub_share: float
    hub_skewness: float  # of the k-occurrence (how many positions chose a token): above 0, a few tokens are hubs
    window_hub_skewness: float


def neighbor_stats(model: nn.Module, batches: Union[torch.Tensor, Iterable]) -> List[LayerStats]:
    """Measure the neighbours that the layers of a network choose. The network stays as it was.

    Args:
        model: A network.
        batches: Its input (B, C, H, W), or a loader of batches, with or without targets. All images have one size.

    Raises:
        ValueError: The network has no ConvNN layers, or there are no images.
    """
    measured, shapes = {name: [] for name in neighbor_layers(model)}, {}
    for batch in [batches] if isinstance(batches, torch.Tensor) else batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        for name, neighbors in capture_neighbors(model, images).items():
            measured[name].append(_measure(neighbors))
            shapes[name] = neighbors._replace(index=neighbors.index[:1])
    if not shapes:
        raise ValueError('there are no images to measure neighbours in')
    stats = []
    for name, shape in shapes.items():
        values = {key: torch.cat([m[key] for m in measured[name]]) for key in measured[name][0]}
        values = {key: value.nanmean().item() for key, value in values.items()}
        values |= {f'window_{key}': value.item() for key, value in _measure(window_neighbors(shape)).items()}
        values |= {f'uniform_{key}': value for key, value in _measure_uniform(shape).items()}
        values |= dict(
            layer=name, height=shape.size[0], width=shape.size[1], stride=shape.stride, K=shape.index.shape[2],
            window=shape.window, images=sum(len(m['distance']) for m in measured[name]))
        stats.append(LayerStats(**{field: values[field] for field in LayerStats._fields}))
    return stats


def _measure(neighbors: LayerNeighbors) -> Dict[str, torch.Tensor]:
    """Fields of `LayerStats` for each image, (B,); NaN where no position has a neighbour that counts."""
    offset = neighbors.index - neighbors.query.unsqueeze(1)
    others = (offset != 0).any(dim=-1)
    counted = others & ~neighbors.in_padding
    number = counted.sum(dim=(1, 2))
    inside = (offset.abs() <= neighbors.dilation * (neighbors.window // 2)).all(dim=-1)

    height, width = neighbors.size
    token = (neighbors.index[..., 0] * width + neighbors.index[..., 1]).where(counted, 0).flatten(1)
    chosen = torch.zeros(len(token), height * width).double().scatter_add_(1, token, counted.flatten(1).double())
    centred = chosen - chosen.mean(dim=1, keepdim=True)
    return dict(
        distance=offset.double().norm(dim=-1).mul(counted).sum(dim=(1, 2)) / number,
        inside=(inside & counted).sum(dim=(1, 2)) / number,
        padding=1 - number / others.sum(dim=(1, 2)),
        hub_share=chosen.amax(dim=1) / len(neighbors.query),
        hub_skewness=centred.pow(3).mean(dim=1) / centred.pow(2).mean(dim=1).pow(1.5).clamp(min=1e-12),
    )


def _measure_uniform(neighbors: LayerNeighbors) -> Dict[str, float]:
    """Distance and share inside the window of all other tokens, from how often each step along an axis occurs."""
    rows, columns = (
        query.unique().unsqueeze(1).sub(torch.arange(n)).abs().flatten().bincount()
        for query, n in zip(neighbors.query.T, neighbors.size))
    often = rows.unsqueeze(1) * columns.double()
    often[0, 0] = 0  # the position itself
    length = torch.cartesian_prod(*(torch.arange(len(steps)).double() for steps in (rows, columns))).norm(dim=-1)
    reach = neighbors.dilation * (neighbors.window // 2) + 1
    return dict(
        distance=((often.flatten() * length).sum() / often.sum()).item(),
        inside=(often[:reach, :reach].sum() / often.sum()).item())


def write_csv(stats: Sequence[LayerStats], path: Path) -> None:
    """Write one line for each layer. The columns are the fields of `LayerStats`."""
    with open(path, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(LayerStats._fields)
        writer.writerows([f'{v:.6g}' if isinstance(v, float) else v for v in line] for line in stats)
