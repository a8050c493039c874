"""The command line: `convnn-timm COMMAND`, the same as `python -m convnn_timm COMMAND`.

A command imports what it needs when it runs, so `convnn-timm --help` answers at once. What a user can get wrong raises
`UserError` and becomes one line; a traceback means a bug.
"""
import argparse
import csv
import difflib
import fnmatch
import importlib
import io
import itertools
import json
import os
import sys
import tempfile
import threading
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Callable, Dict, Iterable, Iterator, List, NoReturn, Optional, Sequence, Tuple

from convnn_timm import __version__
from convnn_timm.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    import torch
    from torch import nn

__all__ = ['main']

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
Answer = Tuple[Path, List[Tuple[str, float]]]  # an image, and its most probable classes with their probabilities
GROUPS = {  # of the commands in the help
    'first steps': ('quickstart', 'list', 'info'),
    'use a network': ('predict', 'neighbors', 'stats', 'export-onnx'),
    'train': ('train', 'run'),
    'publish weights': ('export', 'push', 'verify', 'pull'),
}
PATIENCE = 2.  # seconds of silence
BATCH = 16  # images that `predict` classifies at a time


class CommandError(UserError):
    """A command cannot do what it was asked for."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """argparse with examples in their own layout, and errors without the usage text in front."""
    commands: Dict[str, 'Parser'] = {}

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f'{message} (see {self.prog} --help)', code=2)


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command.

    Args:
        argv: The words after `convnn-timm`, those of this process by default.

    Returns:
        The exit status: 0, 1 for a failure, 2 for a wrong call, 130 if interrupted.
    """
    argv = (sys.argv[1:] if argv is None else list(argv)) or ['--help']
    try:
        if argv[:1] == ['train']:
            return train(argv[1:])
        parser = build_parser()
        if not argv[0].startswith('-') and argv[0] not in parser.commands:
            raise CommandError(unknown_command(argv[0], parser.commands), code=2)
        args = parser.parse_args(argv)
        if args.command is not run:
            if isinstance(sys.stdout, io.TextIOWrapper):  # print what the terminal cannot show as \x.., not fail
                sys.stdout.reconfigure(errors='backslashreplace')
            if args.command is not quickstart:  # which reports its steps itself
                with announced('loading PyTorch'):
                    importlib.import_module('timm')
            return args.command(args) or 0
    except UserError as error:
        report(str(error), error.code)
        return error.code
    except KeyboardInterrupt:
        report('interrupted', INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:  # `convnn-timm list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        report(f'{error.filename}: {error.strerror}' if error.filename else error.strerror)
        return 1
    try:
        return run(args) or 0  # the script's errors are its own
    except KeyboardInterrupt:
        report('interrupted', INTERRUPTED)
        return INTERRUPTED


def unknown_command(name: str, commands: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, commands)
    hint = f'did you mean {" or ".join(close)}?' if close else 'there are ' + ', '.join(commands)
    return f'unknown command {name!r}; {hint} (see convnn-timm --help)'


def report(message: str, code: int = 1) -> None:
    sys.stdout.flush()  # what was said before comes first, also where both streams go to one file
    print(f'convnn-timm: {"" if code == INTERRUPTED else "error: "}{printable(message)}', file=sys.stderr)


def note(message: str) -> None:
    print(f'convnn-timm: note: {printable(message)}', file=sys.stderr)


@contextmanager
def announced(work: str) -> Iterator[None]:
    """Say on stderr what takes so long, once it has taken `PATIENCE` seconds."""
    timer = threading.Timer(PATIENCE, print, [f'convnn-timm: {printable(work)} ...'], dict(file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def printable(text: str, keep: str = '\n') -> str:
    """Escape what would control a terminal instead of being shown on it, and bytes that are no UTF-8."""
    return ''.join(c if c.isprintable() or c in keep else c.encode('unicode_escape').decode() for c in text)


def build_parser() -> Parser:
    parser = Parser(
        prog='convnn-timm',
        usage='convnn-timm COMMAND ...',
        description='Convolution over nearest neighbours (ConvNN) for timm.',
        epilog='New here? Run `convnn-timm quickstart`.\nEach command explains itself: `convnn-timm predict --help`.',
    )
    parser.add_argument('--version', action='version', version=f'convnn-timm {__version__}')
    commands = parser.add_subparsers(prog=parser.prog, metavar='COMMAND', required=True, help=argparse.SUPPRESS)
    parser.commands = commands.choices
    summaries = {}

    def add(name: str, command: Callable, summary: str, examples: str) -> Parser:
        summaries[name] = summary
        sub = commands.add_parser(
            name,
            description=summary[0].upper() + summary[1:] + '.',
            epilog='examples:\n' + '\n'.join(f'  convnn-timm {line}' for line in examples.splitlines()),
        )
        sub.set_defaults(command=command)
        return sub

    sub = add(
        'quickstart', quickstart, 'train on handwritten digits, in minutes, and look at the result',
        'quickstart\nquickstart --output /tmp/digits')
    sub.add_argument(
        '--output', default='convnn-quickstart', metavar='DIR',
        help='folder to make, of up to 0.5 GB (default: %(default)s)')

    sub = add(
        'list', list_models, 'list the models: parameters, multiply-accumulates, weights',
        "list\nlist branching\nlist 'resnet*_convnn'\nlist resnet18_convnn_branching.cifar10")
    sub.add_argument(
        'pattern', nargs='?', default='*', metavar='NAME',
        help='part of a name, or a whole one with * and ?; with a tag (`NAME.TAG`) one of the weights')

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

    sub = add(
        'export', export, 'make the folder of a weight to publish, with its card, from a run',
        'export output/my-run --tag cifar10\n'
        'export output/my-run --tag cifar10 --twin output/my-conv-run --data-note "JPEG re-encoding, quality 75"')
    sub.add_argument('run', type=Path, metavar='RUN', help='run folder of a finished training')
    sub.add_argument(
        '--tag', required=True, help='what the name ends with, such as cifar10 or cifar10_mine: <architecture>.TAG')
    sub.add_argument(
        '--output', type=Path, metavar='DIR',
        help='where to make it (default: model_cards of the checkout, RUN without one)')
    sub.add_argument(
        '--twin', type=Path, metavar='RUN',
        help='run of the convolution that the card compares it with, or the folder of its published weight')
    sub.add_argument(
        '--seeds', nargs='+', type=Path, default=(), metavar='RUN',
        help='runs of the same training with other seeds, for mean and spread')
    sub.add_argument(
        '--dataset-id', default='', metavar='OWNER/NAME',
        help='the data set on the Hub (default: that of a run with `--dataset torch/...` or `hfds/...`)')
    sub.add_argument(
        '--dataset-name', default='', metavar='TEXT', help='its name (default: a known one, or that of the folder)')
    sub.add_argument(
        '--dataset-split', default='', metavar='NAME', help='what it calls the split that the run was evaluated on')
    sub.add_argument(
        '--license', default='', metavar='ID',
        help="the weights' licence, such as mit or apache-2.0 (default: that of the --pretrained it began with)")
    sub.add_argument(
        '--base-model', default='', metavar='OWNER/NAME',
        help='the weights on the Hub that it began with (default: those of its --pretrained)')
    sub.add_argument('--data-note', default='', metavar='TEXT', help='what the card says about the images')
    sub.add_argument('--data-dir', default='', metavar='DIR', help='where the images are, if not where they were')
    sub.add_argument('--device', metavar='DEVICE', help='to evaluate on (default: cuda if there is one, else cpu)')
    sub.add_argument('--force', action='store_true', help='replace a folder that is there and its record')

    sub = add(
        'push', push, 'bring weights to the Hugging Face Hub, and check what arrived',
        'push model_cards/resnet18_convnn_branching.cifar10\n'
        'push --all --namespace me --private\n'
        'push model_cards/resnet18_convnn_branching.cifar10 --revision v1')
    sub.add_argument('folder', nargs='?', type=Path, metavar='DIR', help='folder that `export` made')
    sub.add_argument('--all', action='store_true', help='all folders in model_cards')
    sub.add_argument('--namespace', metavar='NAME', help='user or organization (default: that of the project)')
    sub.add_argument('--private', action='store_true', help='into a private repository')
    sub.add_argument('--revision', metavar='BRANCH', help='branch, made if it is not there (default: main)')

    sub = add(
        'verify', verify, 'check weights: hash, tensors, and logits that they must give',
        'verify resnet18_convnn_branching.cifar10\nverify model_cards/*/\nverify someone/resnet18_convnn.cifar10@v1')
    sub.add_argument('weights', nargs='+', metavar='WEIGHT', help='name, folder, or repository on the Hub')

    sub = add(
        'pull', pull, 'download weights, or replace damaged ones, to load them offline',
        'pull resnet18_convnn_branching.cifar10\npull someone/resnet18_convnn.cifar10@v1')
    sub.add_argument('weights', nargs='+', metavar='WEIGHT', help='name, or repository on the Hub')

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

    sub = add(
        'export-onnx', export_onnx, 'write an ONNX file, and compare it with PyTorch on photographs',
        'export-onnx local-dir:output/my-run/model -o model.onnx\n'
        'export-onnx resnet18_convnn_branching.cifar10 -o model.onnx --dynamic-batch --check cat.jpg dog.jpg\n'
        'export-onnx resnet50_convnn_branching_224 -o model.onnx --img-size 192 --batch 8')
    sub.add_argument('model', metavar='MODEL', help='as for `predict`, or a model without weights')
    sub.add_argument('-o', '--output', required=True, type=Path, metavar='OUT.onnx', help='file to make')
    sub.add_argument('--img-size', type=int, metavar='N', help="side of the images (default: the model's)")
    batch = sub.add_mutually_exclusive_group()
    batch.add_argument('--batch', type=int, default=1, metavar='N', help='images at a time (default: %(default)s)')
    batch.add_argument('--dynamic-batch', action='store_true', help='any number of images at a time')
    sub.add_argument('--opset', type=int, metavar='N', help="version of ONNX's operators (default: 20)")
    sub.add_argument(
        '--check', nargs='+', metavar='IMAGE',
        help='images to compare on, with onnxruntime (default: two photographs that come with scikit-learn)')
    sub.add_argument('--force', action='store_true', help='replace a file that is there')

    # Listed for the help only: `train` has a parser of its own.
    summaries['train'] = "train a model, with the arguments and recipes of timm's train.py"
    commands.add_parser('train', add_help=False)

    sub = add(
        'run', run, "run a script such as timm's, which then finds the models by name",
        'run validate.py --model resnet18_convnn --checkpoint last.pth.tar --data-dir data --device cpu\n'
        'run train.py --model resnet18_convnn_branching --data-dir data')
    sub.add_argument('script', metavar='SCRIPT', help='Python file')
    sub.add_argument('args', nargs=argparse.REMAINDER, metavar='ARGS', help='its arguments').required = False

    add('info', info, 'show versions, devices, and which implementations run here', 'info')

    for title, names in GROUPS.items():
        parser.description += '\n'.join([f'\n\n{title}:', *(f'  {name:<13}{summaries.pop(name)}' for name in names)])
    assert not summaries, f'in no group: {summaries}'
    return parser


def train(argv: List[str]) -> int:
    with announced('loading PyTorch'):
        from convnn_timm.train.engine import main
    try:
        main(argv)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise CommandError(stop.code.removeprefix('error: ')) from stop
        return stop.code or 0  # of --help, a wrong call or an interruption, of which the trainer has told
    return 0


def quickstart(args: argparse.Namespace) -> None:
    from convnn_timm.quickstart import quickstart
    quickstart(Path(args.output))


def list_models(args: argparse.Namespace) -> None:
    import timm
    from convnn_timm import models
    from convnn_timm.macs import count_macs, count_parameters

    pattern = args.pattern if set(args.pattern) & set('*?[') else f'*{args.pattern}*'
    rows = {}  # name of the model: of its weights
    for name in timm.list_models():
        if timm.model_entrypoint(name).__module__.startswith(models.__name__) and name != 'convnn_converted':
            rows[name] = timm.list_pretrained(f'{name}.*')
    tagged = '.' in pattern
    found = {
        name: matching(weights, pattern) if tagged else weights for name, weights in rows.items()
        if matching(weights if tagged else [name], pattern)}
    if not found:
        close = difflib.get_close_matches(args.pattern, [*rows, *itertools.chain(*rows.values())])
        hint = f'did you mean {" or ".join(close)}?' if close else '`convnn-timm list` shows them all'
        raise CommandError(f'no model matches {args.pattern!r}; {hint}')
    print(f'{"model":<32} {"parameters":>12} {"MACs":>9}  weights')
    for name, weights in found.items():
        model = timm.create_model(name, device='meta')  # shapes without memory
        macs = count_macs(model, model.pretrained_cfg['input_size'])
        shown = ', '.join(weights) or '-'
        print(f'{name:<32} {count_parameters(model):>12,} {macs / 1e9:>7.3f} G  {shown}', flush=True)


def matching(names: Iterable[str], pattern: str) -> List[str]:
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def info(args: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import version

    import torch
    from convnn_timm.ops import available_paths

    rows = [('python', platform.python_version()), ('torch', torch.__version__)]
    rows += [(name, version(name)) for name in ('torchvision', 'timm', 'convnn_timm', 'huggingface_hub')]
    rows += [('cpu', f'{os.cpu_count()} cores, {torch.get_num_threads()} threads used')]
    rows += [(f'cuda:{i}', torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    rows += [('mps', 'available')] if torch.backends.mps.is_available() else []
    for name, value in rows:
        print(f'{name:<16} {value}')

    print(f'\n{"operator":<16} {"path":<12} {"usable":<7} why')
    for op, path, usable, reason in available_paths():
        print(f'{op:<16} {path:<12} {"yes" if usable else "no":<7} {reason}')


def export(args: argparse.Namespace) -> None:
    from convnn_timm.hub import publish as hub
    from convnn_timm.models import _weights
    folder = hub.export(
        args.run, args.tag, args.output, args.twin, args.data_note, args.data_dir, str(find_device(args.device)),
        args.force, args.seeds, args.dataset_id, args.dataset_name, args.dataset_split, args.license,
        args.base_model)
    record = '' if (folder / hub.RECORD).is_file() else f', with a line in {_weights.MANIFEST}'
    print(f'{folder}{record}: it loads as local-dir:{folder}. Read README.md, then publish it with: '
          f'convnn-timm push {folder}')


def push(args: argparse.Namespace) -> int:
    from convnn_timm.hub import publish as hub
    if bool(args.folder) == args.all:
        raise CommandError('which weights? A folder, or --all', code=2)
    folders = hub.published_folders(Path('model_cards')) if args.all else [args.folder]
    if not folders:
        raise CommandError('there is no model_cards folder with weights here')
    status = 0
    for folder in folders:
        try:
            repo, commit, new = hub.push(folder, args.namespace, args.private, args.revision)
        except hub.WeightsError as error:
            report(f'{folder}: {error}' if args.all else str(error))
            status = 1
        else:
            print(f'{repo}: {"pushed" if new else "was there already"}, verified, commit {commit}', flush=True)
    return status


def verify(args: argparse.Namespace) -> int:
    from convnn_timm.hub import publish as hub
    status = 0
    for weight in args.weights:
        try:
            folder, entry, problems = hub.verify(weight)
        except hub.WeightsError as error:
            problems = [str(error)]
        for problem in problems:
            report(problem)
            status = 1
        if not problems:
            checked = 'hash, tensors and logits' if entry else 'no hash is known, tensors and logits'
            print(f'{weight}: {checked} are right ({folder})', flush=True)
    return status


def pull(args: argparse.Namespace) -> int:
    from convnn_timm.hub import publish as hub
    status = 0
    for weight in args.weights:
        try:
            print(f'{weight}: {hub.pull(weight)}', flush=True)
        except hub.WeightsError as error:
            report(str(error))
            status = 1
    return status


def run(args: argparse.Namespace) -> None:
    from convnn_timm.autoload import run_script
    run_script(args.script, args.args)


def predict(args: argparse.Namespace) -> int:
    from convnn_timm.images import ImageError, preprocessing, read_image

    if args.topk is not None and args.topk < 1:
        raise CommandError(f'--topk must be 1 or more, got {args.topk}', code=2)
    device = find_device(args.device)
    model = load_model(args.model, args.checkpoint).eval().to(device)
    if not model.num_classes:
        raise CommandError(f'{args.model} has no classes to name')
    name_of = class_names(model)
    if name_of is str:
        note('the names of the classes are not known, their numbers stand for them')
    transform, mode, _ = preprocessing(model)
    paths = list(find_images(args.images))
    topk = args.topk or (1 if args.format == 'table' and len(paths) > 1 else 5)

    status = 0

    def images() -> Iterator[Tuple[Path, 'torch.Tensor']]:
        nonlocal status
        for path in paths:
            try:
                yield path, transform(read_image(path, mode))
            except ImageError as error:
                report(str(error))
                status = error.code

    def answers() -> Iterator[Answer]:
        readable, work = images(), 'classifying the first images'
        while batch := list(itertools.islice(readable, BATCH)):
            with announced(work) if work else nullcontext():
                probabilities = classify(model, [pixels for _, pixels in batch], device)
            for (path, _), row in zip(batch, probabilities):
                best = row.topk(min(topk, len(row)))
                yield path, [(str(name_of(i)), p) for p, i in zip(best.values.tolist(), best.indices.tolist())]
            work = ''

    write = dict(table=print_table, csv=print_csv, json=print_json)[args.format]
    write(answers(), paths)
    return status


def classify(model: 'nn.Module', pixels: Sequence['torch.Tensor'], device: 'torch.device') -> 'torch.Tensor':
    """Probabilities of the classes of some images, (B, classes), on the CPU."""
    import torch
    with torch.inference_mode():
        probabilities = model(torch.stack(pixels).to(device)).softmax(dim=-1).cpu()
    if not probabilities.isfinite().all():
        raise CommandError('the network answers with numbers that are not finite: its weights are damaged')
    return probabilities


def print_table(answers: Iterable[Answer], paths: Sequence[Path]) -> None:
    """Print a block for a single image, a line for each of many."""
    width = max(len(printable(str(path), '')) for path in paths)
    for path, classes in answers:
        shown = [f'{100 * p:6.2f} %  {printable(name, "")}' for name, p in classes]
        name = printable(str(path), '')
        print('\n  '.join([name, *shown]) if len(paths) == 1 else '  '.join([f'{name:<{width}}', *shown]), flush=True)


def print_csv(answers: Iterable[Answer], paths: Sequence[Path]) -> None:
    """Print a row for each class of each image. The file names are those of the disk, byte for byte."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape')
    writer = csv.writer(sys.stdout, lineterminator='\n')
    writer.writerow(('image', 'rank', 'class', 'probability'))
    for path, classes in answers:
        writer.writerows((path, rank, printable(name), f'{p:.6g}') for rank, (name, p) in enumerate(classes, 1))
        sys.stdout.flush()


def print_json(answers: Iterable[Answer], paths: Sequence[Path]) -> None:
    """Print a list with an entry for each image, in ASCII."""
    print('[', end='')
    for i, (path, classes) in enumerate(answers):
        entry = dict(image=str(path), classes=[dict(name=name, probability=p) for name, p in classes])
        print(',\n ' if i else '\n ', json.dumps(entry), sep='', end='', flush=True)
    print('\n]')


def neighbors(args: argparse.Namespace) -> None:
    from convnn_timm.images import read_image
    from convnn_timm.inspect.visualize import capture_neighbors, draw_neighbors, neighbor_layers, see

    if not args.output.suffix:  # matplotlib would add one
        raise CommandError(f'{args.output} does not say which kind of picture: try {args.output}.png', code=2)
    if args.image.is_dir():
        raise CommandError(f'{args.image} is a folder: name one image in it, or measure all with `stats`', code=2)
    check_outputs([args.output], args.force)
    photo, device = read_image(args.image), find_device(args.device)
    points = args.point or [(photo.width // 2, photo.height // 2)]
    with wrong_values():
        model, transform, mode = load_neighbor_model(args.model, device)
        layers = None if args.all_layers else [args.layer or next(iter(neighbor_layers(model)))]
        view = see(photo.convert(mode), transform)
        with announced('finding the neighbours'):
            captured = capture_neighbors(model, view.pixels.unsqueeze(0), layers)
            figure = draw_neighbors(view, captured, points)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=110)
    print(args.output)


def stats(args: argparse.Namespace) -> int:
    import torch
    from convnn_timm.images import ImageError, read_image
    from convnn_timm.inspect.visualize import draw_stats, neighbor_stats, write_csv

    if args.limit < 1:
        raise CommandError(f'--limit must be 1 or more, got {args.limit}', code=2)
    if args.output.exists() and not args.output.is_dir():
        raise CommandError(f'{args.output} is a file, not a folder', code=2)
    table, plot = args.output / 'stats.csv', args.output / 'stats.png'
    check_outputs([table, plot], args.force)
    paths = list(find_images([str(args.images)]))
    paths = [paths[i * len(paths) // args.limit] for i in range(args.limit)] if args.limit < len(paths) else paths
    pixels, status, device = [], 0, find_device(args.device)
    with wrong_values():
        model, transform, mode = load_neighbor_model(args.model, device)
    for path in paths:
        try:
            pixels.append(transform(read_image(path, mode)))
        except ImageError as error:
            report(str(error))
            status = error.code
    if not pixels:
        return status
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
    return status


def export_onnx(args: argparse.Namespace) -> int:
    import torch
    from convnn_timm.inspect import onnx_export
    from convnn_timm.images import preprocessing

    opset = args.opset or onnx_export.OPSET
    newest = onnx_module('onnx').defs.onnx_opset_version()
    onnx_module('onnxscript')
    if not 18 <= opset <= newest:
        raise CommandError(f'--opset {opset}: torch and onnx write 18 to {newest} here', code=2)
    for flag, value in ('--batch', args.batch), ('--img-size', args.img_size):
        if value is not None and value < 1:
            raise CommandError(f'{flag} must be 1 or more, got {value}', code=2)
    runtime = onnx_module('onnxruntime', required=bool(args.check))
    check_outputs([args.output], args.force)
    with wrong_values():
        model = load_or_draw_model(args.model).eval()
        transform, mode, size = preprocessing(model, args.img_size)
        photos = {name: transform(photo) for name, photo in check_photos(args.check, mode)} if runtime else {}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        print(f'convnn-timm: exporting {args.model}, which takes minutes if it is large', file=sys.stderr)
        onnx_export.export_onnx(model, args.output, size, args.batch, args.dynamic_batch, opset)
    shape = ' x '.join(map(str, ('any number' if args.dynamic_batch else args.batch, *size)))
    print(f'{args.output}: opset {opset}, images {shape}, {args.output.stat().st_size / 1e6:.1f} MB')
    if any(getattr(layer, 'sampling_type', '') == 'random' for layer in model.modules()):
        print('convnn-timm: note: random candidates are those of every evaluation here, drawn once', file=sys.stderr)
    if not runtime:
        print('convnn-timm: note: not compared with PyTorch, for onnxruntime is missing', file=sys.stderr)
        return 0

    agreed = status = 0
    pixels, tolerance = torch.stack(list(photos.values())), onnx_export.TOLERANCE
    print(f'convnn-timm: comparing with PyTorch on {len(photos)} images', file=sys.stderr)
    differences, same_class = (found.tolist() for found in onnx_export.compare_onnx(model, args.output, pixels))
    for name, image, difference, same in zip(photos, pixels, differences, same_class):
        verdict = 'agrees'
        if not (difference <= tolerance and same):  # NaN too
            moved = onnx_export.sensitivity(model, image.unsqueeze(0)).item()
            status = status if moved > tolerance else 1
            verdict = 'DIFFERS'
            if moved > tolerance:
                verdict = f"tells nothing: PyTorch's own logits move by {moved:.1g} if pixels change by a millionth"
        agreed += verdict == 'agrees'
        found = 'same class' if same else 'ANOTHER CLASS'
        print(f'{name}: {found}, logits of onnxruntime and PyTorch are {difference:.1g} apart, {verdict}')
    print(f'{agreed} of {len(photos)} images agree to {tolerance:g}')
    if status:
        raise CommandError(f'{args.output} does not compute what {args.model} computes')
    return 0


def onnx_module(name: str, required: bool = True) -> Optional[ModuleType]:
    """Import a package that only `export-onnx` needs; None if it is missing and not required."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if required:
            raise CommandError(f'{name} is missing: pip install onnx onnxscript onnxruntime') from error


def check_photos(paths: Optional[List[str]], mode: str) -> Iterator[Tuple[str, 'Image.Image']]:
    """Photographs to compare on: those of the user, or scikit-learn's."""
    if paths:
        from convnn_timm.images import read_image
        for path in find_images(paths):
            yield str(path), read_image(path, mode)
    else:
        from convnn_timm.images import sample_photographs
        for name, photo in sample_photographs(mode).items():
            yield f'{name} of scikit-learn', photo


@contextmanager
def wrong_values() -> Iterator[None]:
    """What the library refuses is for the user to correct."""
    try:
        yield
    except ValueError as error:
        raise CommandError(one_line(error)) from error


def load_neighbor_model(name: str, device: 'torch.device') -> Tuple['nn.Module', Callable, str]:
    """Load a model whose layers choose neighbours, with random weights if it has none.

    Returns:
        The model, in evaluation on the device, its transform of images, and the mode of the images.
    """
    import timm
    from convnn_timm.images import preprocessing
    from convnn_timm.inspect.visualize import neighbor_layers

    if timm.is_model(name):
        with suppress(RuntimeError):  # an unknown tag, of which load_model will tell
            neighbor_layers(timm.create_model(name, device='meta'))  # before anything is downloaded
    model = load_or_draw_model(name)
    neighbor_layers(model)
    return model.eval().to(device), *preprocessing(model)[:2]


def load_or_draw_model(name: str) -> 'nn.Module':
    """Build a model with weights, random ones if there are no others."""
    import timm
    import torch

    weights = True
    if timm.is_model(name):
        with suppress(RuntimeError):
            config = timm.get_pretrained_cfg(name)
            weights = config is not None and config.has_weights
    if weights:
        return load_model(name)
    note(f'{name} has no published weights, its weights here are random')
    torch.manual_seed(0)
    return timm.create_model(name)


def check_outputs(paths: List[Path], force: bool) -> None:
    """Refuse what cannot be written, and to replace files without being told to, before any work is done."""
    for path in paths:
        if path.is_dir():
            raise CommandError(f'{path} is a folder: name a file')
        if path.exists() and not force:
            raise CommandError(f'{path} exists; --force replaces it')
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise CommandError(f'cannot write {path}: {folder}: {error.strerror}') from error


def point(text: str) -> Tuple[int, int]:
    try:
        x, y = map(int, text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no point: give x and y in pixels, such as 200,150') from None
    return x, y


def find_device(name: Optional[str]) -> 'torch.device':
    import torch

    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        tensor = torch.zeros(1, device=name)
        tensor.cpu()
        return tensor.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise CommandError(f'device {name!r} cannot be used: {one_line(error)}', code=2) from error


def load_model(name: str, checkpoint: Optional[str] = None) -> 'nn.Module':
    """Build a model with weights, published ones or those of a checkpoint file.

    Args:
        name: Name for `timm.create_model`: a registered model, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        checkpoint: Weights of the model called `name`; their number of classes may differ from its default.

    Raises:
        CommandError: If there is no such model, or no weights that fit.
    """
    import timm
    from convnn_timm.models._common import unknown_model
    from convnn_timm.models._weights import HUB_FAILURES, WeightsError, download, explain, explained, split_revision

    try:
        source, model_id = timm.models.parse_model_name(name)
    except ValueError as error:
        raise CommandError(str(error), code=2) from error
    if source is None and not timm.is_model(name):
        raise CommandError(unknown_model(name), code=2)
    if source == 'local-dir' and (Path(model_id) / 'model' / 'config.json').is_file():
        raise CommandError(f'{model_id} is the folder of a run, its model is local-dir:{model_id}/model', code=2)

    if source == 'hf-hub':
        repo = split_revision(model_id)
        with explained(*repo):
            download(repo[0], 'config.json', repo[1])  # timm's download would try for minutes where nothing answers

    kwargs = {}
    if checkpoint:
        if source is not None:
            raise CommandError(f'--checkpoint needs the name of an architecture; {name!r} has its own weights', code=2)
        kwargs = checkpoint_kwargs(name, checkpoint)
    try:
        with announced(f'loading {name}'):
            return timm.create_model(name, pretrained=True, **kwargs)
    except WeightsError:
        raise
    except Exception as error:
        if 'No pretrained weights exist' in str(error):
            raise CommandError(
                f'{name} has no published weights; train it (`convnn-timm train --model {name} ...`) and use '
                '`--model local-dir:RUN/model`, or name a file of weights with --checkpoint') from error
        if checkpoint:
            raise CommandError(
                f'{checkpoint} does not fit {name}: {one_line(error)} If the model was trained with other arguments, '
                'use the model/ folder of its run: --model local-dir:RUN/model') from error
        if source == 'hf-hub' and isinstance(error, HUB_FAILURES):
            raise CommandError(explain(error, *split_revision(model_id))) from error
        raise CommandError(f'cannot load {name}: {one_line(error)}') from error


def checkpoint_kwargs(name: str, checkpoint: str) -> dict:
    """Arguments that make `timm.create_model(name, pretrained=True)` take its weights from a file."""
    import timm
    import torch
    from timm.utils.checkpoint_saver import load_checkpoint_metadata

    if not Path(checkpoint).is_file():
        found = 'is a folder; name a file in it' if Path(checkpoint).is_dir() else 'not found'
        raise CommandError(f'checkpoint {checkpoint} {found}')
    if not Path(checkpoint).stat().st_size:
        raise CommandError(f'checkpoint {checkpoint} is an empty file')
    try:
        state_dict = timm.models.load_state_dict(checkpoint)
        saved = {} if checkpoint.endswith('.safetensors') else load_checkpoint_metadata(checkpoint)
    except Exception as error:
        raise CommandError(
            f'cannot read checkpoint {checkpoint}: it is damaged, or neither safetensors nor a file of `torch.save` '
            'with nothing but tensors and plain values') from error
    if not state_dict or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise CommandError(f'checkpoint {checkpoint} holds no weights: a state dict has names and tensors')
    config = timm.get_pretrained_cfg(name)
    head = state_dict.get(f'{config.classifier}.weight')
    num_classes = config.num_classes if head is None else len(head)
    # The class names of the published weights need not be those of this file.
    names = recorded_classes(Path(checkpoint), name, num_classes)
    overlay = dict(state_dict=state_dict, num_classes=num_classes, label_names=names)
    # A training's checkpoint knows the arguments of its model, not all of which show in the weights.
    training = getattr(saved.get('args'), '__dict__', {}) if isinstance(saved, dict) else {}
    return dict(training.get('model_kwargs', {}), pretrained_cfg_overlay=overlay, num_classes=num_classes)


def recorded_classes(checkpoint: Path, name: str, num_classes: int) -> Optional[List[str]]:
    """The class names in the folder of a checkpoint, or of its finished run; None if there are none for that model."""
    for config in checkpoint.parent / 'config.json', checkpoint.parent / 'model' / 'config.json':
        if not config.is_file():
            continue
        try:
            record = json.loads(config.read_bytes())
            architecture, names = record['architecture'], record.get('label_names')
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CommandError(f'{config} is damaged, it should say what classes the model tells apart') from error
        if architecture == name.partition('.')[0] and isinstance(names, list) and len(names) == num_classes:
            return names
    return None


def class_names(model: 'nn.Module') -> Callable[[int], str]:
    """Function from a class index to the name that came with the weights, or to the index where none came."""
    from timm.data import CustomDatasetInfo, DatasetInfoLabelMapper

    names = model.pretrained_cfg.get('label_names')
    return DatasetInfoLabelMapper(CustomDatasetInfo(names), 'name', fallback_format='{index}') if names else str


def find_images(paths: List[str]) -> Iterator[Path]:
    """Yield the files named, and the images in the folders named and below, sorted; says which files it leaves out."""
    from convnn_timm.images import printable, scan

    for path in map(Path, paths):
        if path.is_dir():
            found = scan(path)
            for note in found.notes():
                print(f'convnn-timm: note: {printable(path)}: {note}', file=sys.stderr)
            yield from found.images or [path]  # an empty folder is reported where it is read
        else:
            yield path


def one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:299]}…'
