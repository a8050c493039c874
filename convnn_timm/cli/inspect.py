"""Which neighbours a network chooses: `neighbors` draws them for an image, `stats` measures them over many."""
import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Optional, Tuple

from .loading import ReadableImages, check_outputs, find_device, find_images, load_or_draw_model
from .terminal import CommandError, announced, wrong_values

if TYPE_CHECKING:
    from torch import nn


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    sub = add(
        'neighbors', neighbors, 'draw which neighbours the layers choose on an image',
        'neighbors cat.jpg --model local-dir:output/my-run/model --point 200,150 -o neighbors.png\n'
        'neighbors cat.jpg --model resnet18_convnn_branching.cifar10 --layer layer2.0.conv1 --point 200,150 -o 2.png\n'
        'neighbors cat.jpg --model resnet18_convnn_branching.cifar10 --all-layers -o sheet.png')
    sub.add_argument('image', type=Path, metavar='IMAGE', help='image file')
    sub.add_argument('--model', required=True, metavar='NAME', help='as for `predict`, or a model without weights')
    which = sub.add_mutually_exclusive_group()
    which.add_argument('--layer', metavar='LAYER', help='name of the layer (default: the first with neighbours)')
    which.add_argument('--all-layers', action='store_true', help='a sheet of all layers')
    sub.add_argument(
        '--point', nargs='+', action='extend', type=point, metavar='X,Y',
        help='pixels of the image whose neighbours to draw, from its upper left corner (default: the centre)')
    sub.add_argument('-o', '--output', required=True, type=Path, metavar='OUT.png', help='picture to make')
    sub.add_argument('--force', action='store_true', help='replace a picture that is there')
    sub.add_argument('--device', metavar='DEVICE', help='cpu, cuda, mps (default: cuda if there is one, else cpu)')

    sub = add(
        'stats', stats, 'measure where the layers look, between convolution and attention',
        'stats data/validation --model local-dir:output/my-run/model\n'
        'stats photos/ --model resnet34_convnn_branching -o untrained --limit 64')
    sub.add_argument('images', type=Path, metavar='IMAGE_FOLDER', help='folder to search for images')
    sub.add_argument('--model', required=True, metavar='NAME', help='as for `predict`, or a model without weights')
    sub.add_argument(
        '-o', '--output', type=Path, default='neighbor-stats', metavar='DIR',
        help='folder for stats.csv and stats.png (default: %(default)s)')
    sub.add_argument(
        '--limit', type=int, default=256, metavar='N', help='take N of the images, evenly (default: %(default)s)')
    sub.add_argument('--force', action='store_true', help='replace files that are there')
    sub.add_argument('--device', metavar='DEVICE', help='cpu, cuda, mps (default: cuda if there is one, else cpu)')


def point(text: str) -> Tuple[int, int]:
    try:
        x, y = map(int, text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no point: give x and y in pixels, such as 200,150') from None
    return x, y


def neighbors(args: argparse.Namespace) -> None:
    from convnn_timm.images import read_image
    from convnn_timm.inspect import capture_neighbors, draw_neighbors, neighbor_layers, see

    if not args.output.suffix:  # matplotlib would add one
        raise CommandError(f'{args.output} does not say which kind of picture: try {args.output}.png', code=2)
    if args.image.is_dir():
        raise CommandError(f'{args.image} is a folder: name one image in it, or measure all with `stats`', code=2)
    check_outputs([args.output], args.force)
    photo = read_image(args.image)
    points = args.point or [(photo.width // 2, photo.height // 2)]
    model, transform, mode = load_neighbor_model(args.model, args.device)
    layers = None if args.all_layers else [args.layer or next(iter(neighbor_layers(model)))]
    with wrong_values():
        view = see(photo.convert(mode), transform)
        with announced('finding the neighbours'):
            captured = capture_neighbors(model, view.pixels.unsqueeze(0), layers)
            figure = draw_neighbors(view, captured, points)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=110)
    print(args.output)


def stats(args: argparse.Namespace) -> int:
    import torch
    from convnn_timm.inspect import draw_stats, neighbor_stats, write_csv

    if args.limit < 1:
        raise CommandError(f'--limit must be 1 or more, got {args.limit}', code=2)
    if args.output.exists() and not args.output.is_dir():
        raise CommandError(f'{args.output} is a file, not a folder', code=2)
    table, plot = args.output / 'stats.csv', args.output / 'stats.png'
    check_outputs([table, plot], args.force)
    paths = list(find_images([str(args.images)]))
    paths = [paths[i * len(paths) // args.limit] for i in range(args.limit)] if args.limit < len(paths) else paths
    model, transform, mode = load_neighbor_model(args.model, args.device)
    images = ReadableImages(paths, transform, mode)
    pixels = [image for _, image in images]
    if not pixels:
        return images.status
    with wrong_values():
        with announced(f'finding the neighbours in {len(pixels)} images'):
            lines = neighbor_stats(model, torch.stack(pixels).split(16))
        args.output.mkdir(parents=True, exist_ok=True)
        write_csv(lines, table)
        draw_stats(lines).savefig(plot, dpi=110)

    print(
        f'{"layer":<24} {"map":>9}  {"distance":>8} {"window":>7} {"any":>7}  {"inside":>7}  {"padding":>7}  '
        f'{"largest hub":>11}')
    for line in lines:
        print(
            f'{line.layer:<24} {line.width:>4}x{line.height:<4}  {line.distance:8.2f} {line.window_distance:7.2f} '
            f'{line.uniform_distance:7.2f}  {line.inside:7.1%}  {line.padding:7.1%}  {line.hub_share:11.1%}')
    print(f'{len(pixels)} images: {table}, {plot}')
    return images.status


def load_neighbor_model(name: str, device: Optional[str]) -> Tuple['nn.Module', Callable, str]:
    """Load a model whose layers choose neighbours, with random weights if it has none.

    Returns:
        The model, in evaluation on the device, its transform of images, and the mode of the images.
    """
    import timm
    from convnn_timm.images import preprocessing
    from convnn_timm.inspect import neighbor_layers

    device = find_device(device)
    with wrong_values():
        if timm.is_model(name):
            with suppress(RuntimeError):  # an unknown tag, of which load_model will tell
                neighbor_layers(timm.create_model(name, device='meta'))  # before anything is downloaded
        model = load_or_draw_model(name)
        neighbor_layers(model)
        return model.eval().to(device), *preprocessing(model)[:2]
