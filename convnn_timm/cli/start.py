"""First steps: `quickstart`, `list`, `info`."""
import argparse
import difflib
import fnmatch
import itertools
import os
from pathlib import Path
from typing import Callable, Iterable, List

from .terminal import CommandError


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
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

    add('info', info, 'show versions, devices, and which implementations run here', 'info')


def quickstart(args: argparse.Namespace) -> None:
    from convnn_timm.quickstart import quickstart
    quickstart(Path(args.output))


def list_models(args: argparse.Namespace) -> None:
    import timm
    from convnn_timm import models
    from convnn_timm.macs import count_macs, count_parameters

    pattern = args.pattern if set(args.pattern) & set('*?[') else f'*{args.pattern}*'
    weights_of = {
        name: timm.list_pretrained(f'{name}.*') for name in timm.list_models()
        if timm.model_entrypoint(name).__module__.startswith(models.__name__) and name != 'convnn_converted'}
    tagged = '.' in pattern
    found = {
        name: matching(weights, pattern) if tagged else weights for name, weights in weights_of.items()
        if matching(weights if tagged else [name], pattern)}
    if not found:
        close = difflib.get_close_matches(args.pattern, [*weights_of, *itertools.chain(*weights_of.values())])
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
