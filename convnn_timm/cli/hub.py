"""Publish weights: `export`, `push`, `verify`, `pull`."""
import argparse
from pathlib import Path
from typing import Callable

from .loading import find_device
from .terminal import CommandError, report


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
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


def export(args: argparse.Namespace) -> None:
    from convnn_timm import hub
    from convnn_timm.models import _weights
    folder = hub.export(
        args.run, args.tag, args.output, args.twin, args.data_note, args.data_dir, str(find_device(args.device)),
        args.force, args.seeds, args.dataset_id, args.dataset_name, args.dataset_split, args.license,
        args.base_model)
    record = '' if (folder / hub.ENTRY).is_file() else f', with a line in {_weights.MANIFEST}'
    print(f'{folder}{record}: it loads as local-dir:{folder}. Read README.md, then publish it with: '
          f'convnn-timm push {folder}')


def push(args: argparse.Namespace) -> int:
    from convnn_timm import hub
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
    from convnn_timm import hub
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
    from convnn_timm import hub
    status = 0
    for weight in args.weights:
        try:
            print(f'{weight}: {hub.pull(weight)}', flush=True)
        except hub.WeightsError as error:
            report(str(error))
            status = 1
    return status
