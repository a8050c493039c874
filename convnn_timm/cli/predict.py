"""`predict`: the most probable classes of images."""
import argparse
import csv
import io
import itertools
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, Sequence, Tuple

from convnn_timm.errors import printable

from .loading import ReadableImages, find_device, find_images, load_model
from .terminal import CommandError, announced, note

BATCH = 16  # images at a time
Answer = Tuple[Path, List[Tuple[str, float]]]  # an image, and its most probable classes with their probabilities


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    sub = add(
        'predict', predict, 'classify images: the most probable classes of each',
        'predict cat.jpg --model local-dir:output/my-run/model\n'
        'predict photos/ more.png --model resnet18_convnn_branching --checkpoint last.pth.tar --topk 3\n'
        'predict photos/ --model hf-hub:someone/resnet18_convnn_branching.cifar10 --format csv > classes.csv')
    sub.add_argument('images', nargs='+', metavar='IMAGE', help='image file, or folder to search for images')
    sub.add_argument(
        '--model', required=True, metavar='NAME',
        help='model with weights: `local-dir:FOLDER` (the model/ folder of a run), `hf-hub:OWNER/NAME`, a timm name')
    sub.add_argument(
        '--checkpoint', metavar='FILE',
        help='weights for NAME, on images as NAME usually sees them; the names of the classes are those of its run')
    sub.add_argument(
        '--topk', type=int, metavar='K', help='classes for each image (default: 5, in a table of many images 1)')
    sub.add_argument(
        '--format', choices=('table', 'csv', 'json'), default='table',
        help='to read, or for programs: with a row or an entry for each class of each image (default: %(default)s)')
    sub.add_argument('--device', metavar='DEVICE', help='cpu, cuda, mps (default: cuda if there is one, else cpu)')


def predict(args: argparse.Namespace) -> int:
    import torch
    from convnn_timm.images import preprocessing
    from convnn_timm.inspect import classify

    if args.topk is not None and args.topk < 1:
        raise CommandError(f'--topk must be 1 or more, got {args.topk}', code=2)
    device = find_device(args.device)
    model = load_model(args.model, args.checkpoint).eval().to(device)
    if not model.num_classes:
        raise CommandError(f'{args.model} has no classes to name')
    if not model.pretrained_cfg.get('label_names'):
        note('the names of the classes are not known, their numbers stand for them')
    transform, mode, _ = preprocessing(model)
    paths = list(find_images(args.images))
    topk = args.topk or (1 if args.format == 'table' and len(paths) > 1 else 5)
    images = ReadableImages(paths, transform, mode)

    def answers() -> Iterator[Answer]:
        readable, waiting = iter(images), announced('classifying the first images')
        while batch := list(itertools.islice(readable, BATCH)):
            files, pixels = zip(*batch)
            with waiting:
                classes = classify(model, torch.stack(pixels), topk)
            yield from zip(files, classes)
            waiting = nullcontext()

    write = dict(table=print_table, csv=print_csv, json=print_json)[args.format]
    write(answers(), paths)
    return images.status


def print_table(answers: Iterable[Answer], paths: Sequence[Path]) -> None:
    """Print a block for a single image, a line for each of many."""
    width = max(len(printable(path)) for path in paths)
    for path, classes in answers:
        name, shown = printable(path), [f'{100 * p:6.2f} %  {printable(name)}' for name, p in classes]
        print('\n  '.join([name, *shown]) if len(paths) == 1 else '  '.join([f'{name:<{width}}', *shown]), flush=True)


def print_csv(answers: Iterable[Answer], paths: Sequence[Path]) -> None:
    """Print a row for each class of each image. The file names are those of the disk, byte for byte."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape')
    writer = csv.writer(sys.stdout, lineterminator='\n')
    writer.writerow(('image', 'rank', 'class', 'probability'))
    for path, classes in answers:
        writer.writerows(
            (path, rank, printable(name, keep='\n'), f'{p:.6g}') for rank, (name, p) in enumerate(classes, 1))
        sys.stdout.flush()


def print_json(answers: Iterable[Answer], paths: Sequence[Path]) -> None:
    """Print a list with an entry for each image, in ASCII."""
    print('[', end='')
    for i, (path, classes) in enumerate(answers):
        entry = dict(image=str(path), classes=[dict(name=name, probability=p) for name, p in classes])
        print(',\n ' if i else '\n ', json.dumps(entry), sep='', end='', flush=True)
    print('\n]')
