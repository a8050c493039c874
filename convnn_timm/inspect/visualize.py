"""See which neighbours the layers of a network choose, on a photograph and over many images.

    captured = capture_neighbors(model, view.pixels.unsqueeze(0))  # of view = see(photo, transform)
    draw_neighbors(view, captured, [(320, 200)]).savefig('neighbors.png')
    draw_stats(neighbor_stats(model, loader)).savefig('stats.png')

neighbors.py finds what is drawn. Points are (x, y) in pixels of the photograph.
"""
from typing import TYPE_CHECKING, Dict, NamedTuple, Sequence, Tuple

import torch

from .neighbors import LayerNeighbors, LayerStats, window_neighbors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = ['View', 'draw_neighbors', 'draw_stats', 'see']


class View(NamedTuple):
    """A photograph as a network gets it, resized and cropped: image position = scale * photo position + shift."""
    photo: 'Image.Image'
    image: 'Image.Image'
    pixels: torch.Tensor  # (C, H, W), normalised: the network's input
    scale: Tuple[float, float]
    shift: Tuple[float, float]

    def locate(self, point: Tuple[float, float]) -> Tuple[float, float]:
        """Where a point (x, y) of the photograph lies in the image.

        Raises:
            ValueError: Outside the photograph, or cropped away.
        """
        x, y = (f'{v:g}' for v in point)
        if not all(0 <= v < n for v, n in zip(point, self.photo.size)):
            raise ValueError(f'point {x},{y} is outside the image, which has {_by(self.photo.size)} pixels')
        inside = tuple(s * (v + .5) + t for v, s, t in zip(point, self.scale, self.shift))  # of the pixel, its centre
        if not all(0 <= v < n for v, n in zip(inside, self.image.size)):
            left, top, right, bottom = self.box()
            raise ValueError(
                f'point {x},{y} is cropped away: the network sees {left:.0f} <= x < {right:.0f} and '
                f'{top:.0f} <= y < {bottom:.0f} of this image')
        return inside

    def box(self) -> Tuple[float, float, float, float]:
        """Left, top, right and bottom of the image in pixels of the photograph."""
        corners = ((0, 0), self.image.size)
        return tuple((v - t) / s for corner in corners for v, s, t in zip(corner, self.scale, self.shift))


def see(photo: 'Image.Image', transform) -> View:
    """Apply timm's transform for evaluation (`timm.data.create_transform`) and keep track of where pixels go."""
    from PIL import Image
    from timm.data.transforms import CenterCropOrPad
    from torchvision.transforms import CenterCrop

    image, scale, shift = photo, (1., 1.), (0., 0.)
    for step in transform.transforms:
        value = step(image)
        if not isinstance(value, Image.Image):
            break
        if isinstance(step, (CenterCrop, CenterCropOrPad)):
            shift = tuple(t + _centred(old, new) for t, old, new in zip(shift, image.size, value.size))
        else:
            ratio = [new / old for new, old in zip(value.size, image.size)]
            scale, shift = (tuple(v * r for v, r in zip(values, ratio)) for values in (scale, shift))
        image = value
    return View(photo, image, transform(photo), scale, shift)


def _centred(old: int, new: int) -> int:
    """How far pixels move when a side is padded or cropped around its centre, rounded as torchvision does."""
    return (new - old) // 2 if new > old else -round((old - new) / 2)


def draw_neighbors(
        view: View,
        captured: Dict[str, LayerNeighbors],
        points: Sequence[Tuple[float, float]],
        sample: int = 0,
) -> 'Figure':
    """Draw the neighbours of the positions under some points, as cells of each layer's map.

    Beside a single layer stands the window of its convolution; each of several layers has the window's outline only.

    Args:
        view: The photograph, see `see`.
        captured: What `capture_neighbors` found for `view.pixels`.
        points: Pixels (x, y) of the photograph.
        sample: Which image of the captured batch this is.

    Raises:
        ValueError: The network does not see a point.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    places = [view.locate(point) for point in points]
    panels = [(name, chosen._replace(index=chosen.index[sample:sample + 1])) for name, chosen in captured.items()]
    if len(captured) == 1:
        window = window_neighbors(panels[0][1])
        dilated = f', dilation {window.dilation}' if window.dilation > 1 else ''
        panels.append((f'Conv2d {_by([window.window] * 2)}{dilated}', window))
    columns, inches = min(len(panels) + 1, 6), 3.6 if len(captured) == 1 else 2.6
    rows = -(-(len(panels) + 1) // columns)  # for each point: the photograph, then the panels
    ranks = max(neighbors.index.shape[2] for _, neighbors in panels)
    colors = ScalarMappable(Normalize(-0.5, ranks - 0.5), colormaps['plasma'].resampled(ranks))

    figure = Figure(figsize=(inches * columns + 0.8, (inches + 0.8) * rows * len(points)), layout='constrained')
    figure.get_layout_engine().set(h_pad=0.1)
    grid = figure.subplots(rows * len(points), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for i, (point, place) in enumerate(zip(points, places)):
        photo, *others = grid[i * rows:(i + 1) * rows].flat
        _draw_photo(photo, view, point)
        at = [v / n for v, n in zip(place, view.image.size)]
        for axes, (name, neighbors) in zip(others, panels):
            _draw_panel(axes, view, name, neighbors, at, colors)
    bar = figure.colorbar(colors, ax=grid, shrink=min(1., 3 / len(grid)), aspect=25, pad=0.01)
    bar.set_label('rank of the neighbour: which weight it gets')
    bar.set_ticks(range(0, ranks, -(-ranks // 16)))
    return figure


def _draw_photo(axes: 'Axes', view: View, point: Tuple[float, float]) -> None:
    from matplotlib.patches import Rectangle

    axes.set_title(f'point {point[0]:g},{point[1]:g}\nframe: seen as {_by(view.image.size)} pixels')
    axes.imshow(view.photo, cmap='gray', vmin=0, vmax=255, extent=(0, view.photo.width, view.photo.height, 0))
    left, top, right, bottom = view.box()
    for color, width in (('white', 3), ('black', 1)):  # visible on any photograph
        axes.add_patch(Rectangle(
            (left, top), right - left, bottom - top, fill=False, edgecolor=color, lw=width, clip_on=False))
    for color, width in (('black', 4), ('white', 2)):
        axes.plot(
            point[0] + 0.5, point[1] + 0.5, 'o', markersize=11, markerfacecolor='none', markeredgecolor=color,
            markeredgewidth=width)


def _draw_panel(
        axes: 'Axes',
        view: View,
        title: str,
        neighbors: LayerNeighbors,
        at: Sequence[float],
        colors: 'ScalarMappable',
) -> None:
    """Draw the neighbours of the position `at`, (x, y) as shares of the image's sides, with the padding around."""
    from matplotlib.patches import Rectangle

    (height, width), stride = neighbors.size, neighbors.stride
    reach = neighbors.dilation * (neighbors.window // 2)  # of the convolution's window
    position = torch.tensor([int(v * n) for v, n in zip(reversed(at), (height, width))])
    query = int((neighbors.query - position).square().sum(dim=-1).argmin())  # the nearest position that has neighbours
    row, column = neighbors.query[query].tolist()
    margin = max(neighbors.padding, reach)
    frame = (-0.5, width - 0.5, height - 0.5, -0.5)

    axes.axis('on')
    axes.set_title(f'{title}\n{_by((width, height))} tokens' + (f', stride {stride}' if stride > 1 else ''))
    axes.set(xticks=[], yticks=[], facecolor='0.85')
    axes.imshow(view.image, cmap='gray', vmin=0, vmax=255, extent=frame, interpolation='nearest')
    axes.imshow([[1.]], cmap='gray', vmin=0, vmax=1, extent=frame, alpha=0.35)  # paler, so that colours stand out
    axes.set(xlim=(-0.5 - margin, width - 0.5 + margin), ylim=(height - 0.5 + margin, -0.5 - margin))
    for rank, (r, c) in enumerate(neighbors.index[0, query].tolist()):
        axes.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, facecolor=colors.to_rgba(rank), edgecolor='white', lw=0.7))
    axes.add_patch(Rectangle(
        (column - reach - 0.5, row - reach - 0.5), 2 * reach + 1, 2 * reach + 1, fill=False, edgecolor='black', lw=1.3,
        linestyle=(0, (2, 1))))
    for slant in (0.25, -0.25):  # a cross on the position itself
        axes.plot([column - 0.25, column + 0.25], [row - slant, row + slant], color='white', lw=1.5)
    if outside := int(neighbors.in_padding[0, query].sum()):
        axes.set_xlabel(f'{outside} of {neighbors.index.shape[2]} in the padding')


def _by(size: Sequence[int]) -> str:
    return ' x '.join(map(str, size))


def draw_stats(stats: Sequence[LayerStats]) -> 'Figure':
    """Draw how far, how much inside the window and how concentrated the neighbours are, layer by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout='constrained')
    figure.suptitle(
        f'Neighbours in {stats[0].images} images: between convolution (its window) and attention (any token)')
    panels = (
        ('Mean distance, tokens', ('distance', 'window_distance', 'uniform_distance')),
        ('Share of the neighbours inside the window', ('inside', None, 'uniform_inside')),
        ('Largest hub: share of the positions that chose it', ('hub_share', 'window_hub_share', None)),
        ('Hubness: skewness of the k-occurrence', ('hub_skewness', 'window_hub_skewness', None)),
    )
    styles = (('chosen neighbours', 'tab:blue', '-o'), ('convolution window', 'black', '--'), ('any token', '0.6', ':'))
    x, names = range(len(stats)), [line.layer for line in stats]
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (title, fields) in zip(grid.flat, panels):
        for field, (label, color, style) in zip(fields, styles):
            if field or 'inside' in fields:
                values = [getattr(line, field) if field else 1. for line in stats]
                axes.plot(x, values, style, color=color, label=label)
        axes.set_title(title)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
        axes.set_xticks(x, [f'{name}  {line.width}x{line.height}' for name, line in zip(names, stats)], rotation=90)
    grid[0, 0].legend()
    return figure
