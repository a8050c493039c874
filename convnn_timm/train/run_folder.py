"""The run folder: what is in it besides the model, and whether a run may go on in it."""
import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import yaml
from timm import utils
from timm.models import safe_model_name
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from convnn_timm.macs import count_macs, count_parameters
from .flags import CALL, FLAGS, PLACE, SCHEDULE, UsageError, check_retired, complete, explained, find_recipe

__all__ = [
    'Saver', 'begin_run', 'describe', 'draw_curve', 'environment', 'open_run', 'read_summary', 'recorded', 'run_folder',
    'state_classes_once', 'unfinished', 'without_folders']

# Files of a run that was killed before its first checkpoint.
FIRST_EPOCH = {
    'args.yaml', 'recipe.yaml', 'environment.json', 'model.txt', 'summary.csv', 'curve.png', 'tmp.pth.tar'}


class Saver(utils.CheckpointSaver):
    """timm's saver, which deletes the old checkpoint first. This one replaces it in one step."""

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)


def run_folder(args: argparse.Namespace) -> Path:
    """The run's folder; the folder of all runs before `begin_run` has given the run a name."""
    return Path(args.output) / args.experiment


def recorded(args: argparse.Namespace) -> Dict[str, Any]:
    """What args.yaml says: the arguments that make the run, `convert` only if it is given."""
    return {
        name: getattr(args, name) for name, flag in FLAGS.items()
        if flag.role != CALL and (name != 'convert' or args.convert)}


def open_run(args: argparse.Namespace, rank: int) -> str:
    """Find the checkpoint to continue from, or ''. Nothing is written.

    Raises:
        UsageError: If the folder holds another run or later epochs than the checkpoint, or if this is from a run with
            other arguments, unless they only make it longer and the folder is a new one.
    """
    auto = args.resume == 'auto'
    if auto and not args.experiment:
        raise UsageError('--resume auto continues the run in --output/--experiment: name it with --experiment')
    folder = run_folder(args)
    checkpoint = folder / 'last.pth.tar' if auto else Path(args.resume)
    found = checkpoint.is_file()
    if args.resume and not auto and not found:
        raise UsageError(f'--resume {checkpoint}: there is no such file')
    files = {path.name for path in folder.iterdir()} if args.experiment and folder.is_dir() else set()
    own = checkpoint.parent.resolve() == folder.resolve() if found else auto and files <= FIRST_EPOCH
    if rank == 0 and files and not own:
        raise not_empty(folder)
    if not found:
        if rank == 0 and len(read_summary(folder)) > 1:  # the row of an epoch is there before its checkpoint
            raise UsageError(f'{folder} is the record of a run without its checkpoint: choose another --experiment')
        return ''
    with explained(EOFError, RuntimeError, UnpicklingError, of=str(checkpoint)):
        saved = utils.load_checkpoint_metadata(checkpoint)
    last = folder / 'last.pth.tar'
    if own and not auto and last.is_file() and utils.load_checkpoint_metadata(last)['epoch'] > saved.get('epoch', 0):
        raise UsageError(
            f'{folder} would lose the epochs after {checkpoint.name}: choose another --experiment to go on from there')
    if 'args' not in saved:
        raise UsageError(f'{checkpoint} holds no training to resume, but --initial-checkpoint can take its weights')
    check_retired(str(checkpoint), vars(saved['args']))
    # In args.yaml a tuple is a list.
    before, now = (
        complete(json.loads(json.dumps(vars(arguments), default=str))) for arguments in (saved['args'], args))
    changed = [name for name, flag in FLAGS.items() if flag.role not in (PLACE, CALL) and now[name] != before[name]]
    later = changed and all(FLAGS[name].role == SCHEDULE for name in changed)
    if later and starts_alike(before, now, saved['epoch'] + 1):
        if own:
            raise UsageError(
                f'{folder} keeps its run as it is. To train it further with {", ".join(changed)} changed, give the '
                f'longer run a folder of its own: --resume {checkpoint} --experiment NAME')
    elif changed:
        raise UsageError('\n'.join([
            f'{checkpoint} is from a run with other arguments:',
            *(f'  {name}: {before.get(name)!r} there, {now[name]!r} here' for name in changed),
            f'Continue that run with -c {checkpoint.parent / "args.yaml"} --resume auto, '
            f'or start a new one from its weights with --initial-checkpoint {checkpoint}',
        ]))
    return str(checkpoint)


def unfinished(folder: Path) -> str:
    """What to say of a run without a model."""
    args = yaml.safe_load((folder / 'args.yaml').read_text()) if (folder / 'args.yaml').is_file() else None
    if isinstance(args, dict) and 'eval_metric' in args:  # an argument that is recorded by timm and not here
        weights = next((name for name in ('model_best.pth.tar', 'last.pth.tar') if (folder / name).is_file()), 'FILE')
        return f"{folder} is a run of timm's train.py, which records neither classes nor environment. Its weights " \
            f'load with --model {args.get("model")} --checkpoint {folder / weights}; to export it, train with ' \
            'the same flags by convnn-timm train'
    if not (folder / 'last.pth.tar').is_file():
        return f'{folder} holds no finished run, and no checkpoint to finish one from'
    return f'{folder} is not finished. To finish it: convnn-timm train -c {folder}/args.yaml --resume auto'


def not_empty(folder: Path) -> UsageError:
    return UsageError(f'{folder} is not empty: continue its run with --resume auto, or choose another --experiment')


def begin_run(args: argparse.Namespace, checkpoint: str, start: int, description: str) -> bool:
    """Write what a run has before its first epoch. Where it goes on, drop the rows of epochs to be done again.

    Args:
        args: The run's arguments; gives it a name if it has none.
        checkpoint: From `open_run`.
        start: The epochs that are done.
        description: For model.txt.

    Returns:
        Whether the run goes on in its own folder.

    Raises:
        UsageError: If another run has begun there since `open_run`.
    """
    source, folder = Path(checkpoint).parent, make_folder(args)
    own = bool(checkpoint) and source.samefile(folder)
    if not own:
        text = yaml.safe_dump(recorded(args), sort_keys=False)
        try:
            with (folder / 'args.yaml').open('w' if args.resume == 'auto' else 'x') as file:
                file.write(text)
        except FileExistsError:
            raise not_empty(folder) from None
        if checkpoint:  # the new run can be resumed from its first moment
            torch.save({**utils.load_checkpoint_metadata(checkpoint), 'args': args}, folder / 'tmp.pth.tar')
            os.replace(folder / 'tmp.pth.tar', folder / 'last.pth.tar')
            parts = [
                file for file in source.glob('environment*.json') if int(file.stem.partition('-')[2] or 0) <= start]
            for file in *source.glob('summary.csv'), *parts:
                shutil.copy(file, folder)
        (folder / 'model.txt').write_text(description)
        if args.config:
            (folder / 'recipe.yaml').write_bytes(find_recipe(args.config).read_bytes())
    utils.trim_summary(folder / 'summary.csv', start)
    return own


def make_folder(args: argparse.Namespace) -> Path:
    """Make the run's folder. A run without a name gets date and model, and a number if another run has these."""
    if args.experiment:
        run_folder(args).mkdir(parents=True, exist_ok=True)
        return run_folder(args)
    name, number = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}', 1
    while True:
        args.experiment = name if number == 1 else f'{name}-{number}'
        try:
            run_folder(args).mkdir(parents=True)
            return run_folder(args)
        except FileExistsError:
            number += 1


def starts_alike(before: Dict[str, Any], now: Dict[str, Any], epochs: int) -> bool:
    """Whether the first epochs of two trainings that differ in their schedule are the same."""
    def first(arguments: Dict[str, Any], updates: int = 10) -> List[Tuple[float, Optional[int]]]:
        args = argparse.Namespace(**arguments)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr or args.lr_base)
        scheduler, total = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
        sizes, seen = args.train_sizes or [], []
        for epoch in range(min(epochs, total)):
            size = sizes[epoch] if epoch < len(sizes) else None
            for update in range(updates):
                seen.append((optimizer.param_groups[0]['lr'], size))
                if scheduler is not None:
                    scheduler.step_update(epoch * updates + update + 1)
            if scheduler is not None:
                scheduler.step(epoch + 1)
        return seen

    return first(before) == first(now)


def environment(args: argparse.Namespace, command: Sequence[str]) -> Dict[str, Any]:
    """What the run ran on. It names neither the machine nor its users, and no folder but the data's."""
    def git(*words: str) -> Optional[str]:
        try:
            done = subprocess.run(('git', *words), cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git('ls-files', '--error-unmatch', Path(__file__).name)  # not those of another checkout around it
    cpuinfo = file.read_text() if (file := Path('/proc/cpuinfo')).is_file() else ''
    cpus = [line for line in cpuinfo.splitlines() if 'model name' in line]
    on_gpu = torch.device(args.device).type == 'cuda'
    words = [word if word.rpartition('=')[2] == args.data_dir else without_folders(word) for word in command]
    return dict(
        command=' '.join(words),
        started=f'{datetime.now():%Y-%m-%d %H:%M}',
        commit=git('rev-parse', 'HEAD') if tracked else None,
        uncommitted_changes=bool(git('status', '--porcelain')) if tracked else None,
        **{name: version(name) for name in ('convnn_timm', 'timm', 'torch', 'torchvision')},
        python=platform.python_version(),
        platform=f'{platform.system()} {platform.machine()}',
        cpu=cpus[0].split(':')[1].strip() if cpus else platform.processor(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_amx='amx_bf16' in cpuinfo,  # multiplies in bfloat16
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        processes=int(os.environ.get('WORLD_SIZE', 1)),
        gpu=torch.cuda.get_device_name() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
    )


def without_folders(word: str) -> str:
    """A word of a command; of an absolute path only the last part."""
    flag, equals, value = word.rpartition('=') if word.startswith('--') else ('', '', word)
    return flag + equals + Path(value).name if os.path.isabs(value) else word


def describe(model: nn.Module, input_size: Tuple[int, int, int]) -> str:
    """Size and cost of a model in the first line, then its layers."""
    gmacs = count_macs(model, input_size) / 1e9
    image = f'{"x".join(map(str, input_size))} image'
    return f'{count_parameters(model):,} parameters, {gmacs:.4f} GMACs for a {image}\n\n{model}\n'


def state_classes_once(config: Dict[str, Any]) -> Dict[str, Any]:
    """A timm config.json without the number of classes among `model_args`, where timm repeats it.

    transformers passes both to timm, which is an error. timm itself reads the one outside.
    """
    if 'num_classes' not in config or 'num_classes' not in config.get('model_args', {}):
        return config
    args = {name: value for name, value in config['model_args'].items() if name != 'num_classes'}
    return {**config, 'model_args': args}


def draw_curve(rows: List[Dict[str, str]], file: Path) -> None:
    """Draw loss and accuracy over the epochs of a summary.csv."""
    from matplotlib.figure import Figure  # needs neither a display nor a global state
    epochs = [int(row['epoch']) + 1 for row in rows]
    figure = Figure(figsize=(9, 3.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [float(row['train_loss']) for row in rows], '.-', label='training')
    left.plot(epochs, [float(row['eval_loss']) for row in rows], '.-', label='evaluation')
    left.set(xlabel='epoch', ylabel='loss')
    left.legend()
    right.plot(epochs, [float(row['eval_top1']) for row in rows], '.-', color='C1')
    right.set(xlabel='epoch', ylabel='top-1 (%)', title=f'last epoch: {float(rows[-1]["eval_top1"]):.2f}')
    figure.savefig(file, dpi=120)


def read_summary(folder: Path) -> List[Dict[str, str]]:
    """Rows of the run's summary.csv, none if it has none yet."""
    path = folder / 'summary.csv'
    return list(csv.DictReader(path.open())) if path.is_file() else []
