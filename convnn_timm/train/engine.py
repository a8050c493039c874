"""The trainer for image classification, on timm's library: set-up, epochs, evaluation, end, and the command line.

docs/training.md says what differs from timm's train.py.
"""
import argparse
import copy
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm import utils
from timm.data import Mixup, resolve_data_config
from timm.loss import create_classification_loss
from timm.models import load_checkpoint, model_parameters, resume_checkpoint, save_for_hf
from timm.optim import create_optimizer_v2, muon, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from convnn_timm.conversion import convert
from convnn_timm.errors import UserError
from convnn_timm.images import printable
from convnn_timm.macs import count_macs
from convnn_timm.models._common import unknown_model
from convnn_timm.models._weights import check_reach
from .data import Part, check_class_names, check_classes, create_batches, create_parts, epoch_seed, fit_batch_size
from .flags import UsageError, build_parser, explained, parse_args
from .run_folder import (
    Saver, begin_run, describe, draw_curve, environment, open_run, read_summary, run_folder, state_classes_once,
    unfinished)

__all__ = ['UsageError', 'build_parser', 'evaluate', 'main', 'parse_args', 'train']

_logger = logging.getLogger(__name__)


class Scaler(utils.NativeScaler):
    """timm's gradient scaler, which also works switched off."""

    def __init__(self, enabled: bool):
        self._scaler = torch.amp.GradScaler(enabled=enabled)
        self.enabled = enabled


@dataclass
class Run:
    """What the epochs work on."""
    args: argparse.Namespace
    device: torch.device
    rank: int
    world_size: int
    names: Optional[List[str]]  # of the classes
    data_config: Dict[str, Any]
    train_loader: Any
    eval_loader: Any
    model: nn.Module
    forward: nn.Module  # the model, compiled and distributed where asked for
    result: nn.Module  # what is saved: the model, or the moving average of its weights
    evaluated: nn.Module  # the result, compiled where it is the model
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loss_fn: nn.Module
    scaler: Scaler
    autocast: Callable
    mixup_fn: Optional[Mixup]
    ema: Optional[utils.ModelEmaV3]
    saver: Saver
    folder: Path
    start: int  # epochs that are done
    epochs: int

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(len(self.train_loader) / self.args.grad_accum_steps)


def train(args: argparse.Namespace, command: Sequence[str] = ('convnn-timm', 'train')) -> Path:
    """Train a model.

    Args:
        args: From ``parse_args``.
        command: The words of the command line, for the record.

    Returns:
        The run folder; docs/training.md says what is in it.

    Raises:
        UsageError: If the arguments, the data and the run folder do not fit together.
    """
    with explained(OSError):
        run = set_up(args, command)
    try:
        for epoch in range(run.start, run.epochs):
            run_epoch(epoch, run)
    finally:
        if run.rank == 0 and (rows := read_summary(run.folder)):
            draw_curve(rows, run.folder / 'curve.png')
        if run.world_size > 1:
            dist.destroy_process_group()
    if run.rank == 0:
        save_model(run)
    return run.folder


# Set-up

def set_up(args: argparse.Namespace, command: Sequence[str]) -> Run:
    """Make what the epochs work on, and last the run's folder. What does not fit together shows before that."""
    device, rank, world_size = open_device(args)
    train_part, eval_part, names = open_images(args, rank, world_size)
    checkpoint = open_run(args, rank)

    utils.random_seed(args.seed)  # before the weights are drawn, and the same in every process
    model = create_model(args, resumed=bool(checkpoint))
    if names and len(names) > model.num_classes:
        raise UsageError(f'the data has {len(names)} classes, --num-classes is {model.num_classes}')
    data_config = create_data_config(args, model)
    with explained(RuntimeError, ValueError, of=args.model):  # the forward pass refuses maps that are too small
        description = describe(model, data_config['input_size']) if rank == 0 else ''
    check_sizes(args, model, data_config['input_size'][0])
    if args.grad_checkpointing:
        with explained(AssertionError, of=args.model):
            model.set_grad_checkpointing(True)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)

    train_loader = create_batches(train_part, args, data_config, device, True, rank, world_size)
    eval_loader = create_batches(eval_part, args, data_config, device)
    if not len(train_loader):
        raise UsageError(f'{len(train_part)} training images do not fill a batch: choose a smaller --batch-size')

    updates = math.ceil(len(train_loader) / args.grad_accum_steps)
    optimizer, scheduler, epochs = create_optimizer(args, model, updates, world_size)
    mixup_fn = create_mixup(args, model.num_classes)
    scaler = Scaler(args.amp and args.amp_dtype == 'float16' and device.type == 'cuda')
    ema = utils.ModelEmaV3(
        model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    start = 0
    if checkpoint:
        with explained(RuntimeError, ValueError, of=checkpoint):
            start = resume_checkpoint(model, checkpoint, optimizer, scaler, log_info=False)
            if ema is not None:
                load_checkpoint(ema.module, checkpoint, use_ema=True)
        if scheduler is not None:  # the checkpoint's may be the end of a shorter schedule
            scheduler.step(start)
            scheduler.step_update(start * updates)

    forward, result = model, ema.module if ema is not None else model
    if args.torchcompile:
        with explained(RuntimeError, of=f'--torchcompile {args.torchcompile}'):
            forward = torch.compile(model, backend=args.torchcompile)
        _logger.info(f'the first batches take a while: {args.torchcompile} compiles the model for them')
    evaluated = forward if ema is None else result
    if world_size > 1:
        forward = DistributedDataParallel(forward, device_ids=[device] if device.type == 'cuda' else None)

    own = rank == 0 and begin_run(args, checkpoint, start, description)
    folder = run_folder(args)
    saver = Saver(
        model,
        optimizer,
        args,
        model_ema=ema,
        amp_scaler=scaler if scaler.enabled else None,
        checkpoint_dir=str(folder),
        max_history=args.checkpoint_hist,
    )
    if own:
        saver.load_state_dict_from_checkpoint(checkpoint)
    if rank == 0:
        if start < epochs:
            record = folder / (f'environment-{start}.json' if start else 'environment.json')
            record.write_text(json.dumps(environment(args, command), indent=2) + '\n')
        _logger.info(f'{folder}: {description.splitlines()[0]}, {len(train_part):,} training images' + (
            f', continues after epoch {start}' if start else ''))
    return Run(
        args=args, device=device, rank=rank, world_size=world_size, names=names, data_config=data_config,
        train_loader=train_loader, eval_loader=eval_loader, model=model, forward=forward, result=result,
        evaluated=evaluated, optimizer=optimizer, scheduler=scheduler,
        loss_fn=create_classification_loss(smoothing=args.smoothing, soft_targets=mixup_fn is not None),
        scaler=scaler, autocast=create_autocast(args, device), mixup_fn=mixup_fn, ema=ema, saver=saver, folder=folder,
        start=start, epochs=epochs)


def open_device(args: argparse.Namespace) -> Tuple[torch.device, int, int]:
    """This process's device, its rank and the number of processes."""
    world = copy.copy(args)
    with explained(RuntimeError, ValueError):
        device = utils.init_distributed_device(world)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.benchmark = True
    elif device.type == 'cpu' and world.rank == 0 and args.amp and is_emulated(args.amp_dtype):
        _logger.warning(f'this processor has no instructions for {args.amp_dtype}, which makes it very slow: --no-amp '
                        'trains in float32')
    return device, world.rank, world.world_size


def open_images(args: argparse.Namespace, rank: int, world_size: int) -> Tuple[Part, Part, Optional[List[str]]]:
    """The images to train on, this process's share of those to evaluate on, and the names of the classes.

    The arguments get the batch size and the number of classes that go with them.
    """
    train_part, eval_part, names = create_parts(args)
    if names is not None:
        check_class_names(names, f'{printable(args.data_dir)}: the split {args.train_split!r}')
    fit_batch_size(args, len(train_part), world_size)
    eval_part.indices = eval_part.indices[rank::world_size]
    args.num_classes = args.num_classes or (len(names) if names else None)
    return train_part, eval_part, names


def create_model(args: argparse.Namespace, resumed: bool = False) -> nn.Module:
    """Create the model of the arguments, converted if they say so. A resumed run needs no weights from a file."""
    weights = '' if resumed else args.initial_checkpoint
    if ':' not in args.model and not timm.is_model(args.model):
        raise UsageError(unknown_model(args.model))
    if weights and not os.path.isfile(weights):
        raise UsageError(f'--initial-checkpoint {args.initial_checkpoint}: there is no such file')
    try:
        if args.pretrained and ':' not in args.model:
            check_reach(args.model)
        model = timm.create_model(
            args.model,
            pretrained=args.pretrained,
            in_chans=args.input_size[0] if args.input_size else 3,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            global_pool=args.gp,
            checkpoint_path=weights,
            **args.model_kwargs,
        )
        if args.convert:
            _logger.info(convert(model, **args.convert))
    except RuntimeError as error:
        if 'No pretrained weights exist' in str(error):
            raise UsageError(f'{args.model} has no pretrained weights: --no-pretrained draws random ones') from error
        message = ' '.join(str(error).split())
        if not weights:
            raise UsageError(message) from error
        raise UsageError(
            f'--initial-checkpoint {args.initial_checkpoint}: {message} (the model of a run with other classes or '
            'arguments: --model local-dir:RUN/model --pretrained)') from error
    except (AssertionError, LookupError, TypeError, ValueError) as error:  # arguments that the model cannot take
        raise UsageError(f'{args.model}: {" ".join(str(error).split())}') from error
    if not args.pretrained or args.initial_checkpoint:
        model.pretrained_cfg.pop('license', None)  # of other weights than these
    return model


def create_data_config(args: argparse.Namespace, model: nn.Module) -> Dict[str, Any]:
    """timm's; mean and standard deviation of as many channels as the images have."""
    data_config = resolve_data_config(vars(args), model=model)
    channels = data_config['input_size'][0]
    for name in ('mean', 'std'):
        values = data_config[name]
        if len(values) != channels:
            data_config[name] = (sum(values) / len(values),) * channels
    return data_config


def check_sizes(args: argparse.Namespace, model: nn.Module, channels: int) -> None:
    """Refuse training images that are too small for the model."""
    for side in sorted(set(args.train_sizes or ())):
        with explained(RuntimeError, ValueError, of=f'--train-sizes {side}'):
            count_macs(model, (channels, side, side))


def create_optimizer(
        args: argparse.Namespace,
        model: nn.Module,
        updates: int,
        world_size: int,
) -> Tuple[torch.optim.Optimizer, Any, int]:
    """Create the optimizer and its schedule, of so many updates an epoch; returns also the number of epochs."""
    args = copy.copy(args)
    if not args.lr:  # timm's rule
        scale = args.batch_size * world_size * args.grad_accum_steps / args.lr_base_size
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        square_root = args.lr_base_scale == 'sqrt' or not args.lr_base_scale and adaptive
        args.lr = args.lr_base * (scale ** 0.5 if square_root else scale)
    with explained(AssertionError, ImportError, RuntimeError, TypeError, ValueError, of=f'--opt {args.opt}'):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    with explained(AssertionError, ValueError, of=f'--sched {args.sched}'):
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    return optimizer, scheduler, epochs


def create_mixup(args: argparse.Namespace, num_classes: int) -> Optional[Mixup]:
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    ) if args.mixup or args.cutmix else None


def create_autocast(args: argparse.Namespace, device: torch.device) -> Callable:
    """Makes the context that the model runs in."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))


def is_emulated(dtype: str) -> bool:
    """Whether this machine's CPU lacks the instructions that oneDNN needs for the type."""
    check = dict(bfloat16='_is_mkldnn_bf16_supported', float16='_is_mkldnn_fp16_supported')[dtype]
    return torch.backends.mkldnn.is_available() and not getattr(torch.ops.mkldnn, check)()


# Epochs

def run_epoch(epoch: int, run: Run) -> None:
    """Train for one epoch, evaluate, and record both."""
    with no_emulation_in_muon(run.device):
        trained = train_one_epoch(epoch, run)
    if not math.isfinite(trained['loss']):
        raise UsageError(f'the loss is {trained["loss"]} in epoch {epoch + 1}: choose a smaller --lr')
    evaluated = evaluate(run.evaluated, run.eval_loader, run.autocast, run.args.channels_last)
    lr = mean_lr(run.optimizer)
    if run.scheduler is not None:
        run.scheduler.step(epoch + 1)
    if run.rank == 0:  # first the row: if the checkpoint does not follow, the row is dropped on resuming
        utils.update_summary(epoch, trained, evaluated, run.folder / 'summary.csv', lr=lr)
        run.saver.save_checkpoint(epoch)
        _logger.info(
            f'epoch {epoch + 1}/{run.epochs}: train loss {trained["loss"]:.4f}, eval loss {evaluated["loss"]:.4f}, '
            f'top1 {evaluated["top1"]:.2f}, top5 {evaluated["top5"]:.2f}, lr {lr:.2e}, '
            f'{trained["images_per_s"]:.0f} images/s, waited {trained["data_share"]:.1%} for data')


@contextmanager
def no_emulation_in_muon(device: torch.device):
    """timm's Muon iterates in bfloat16, and has no argument for that: in float32 where a CPU would emulate it."""
    iterate = muon.zeropower_via_newtonschulz
    if device.type == 'cpu' and is_emulated('bfloat16'):
        muon.zeropower_via_newtonschulz = partial(iterate, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = iterate


def train_one_epoch(epoch: int, run: Run) -> Dict[str, float]:
    """Train for one epoch; returns the mean loss, the speed and the share of time spent waiting for images."""
    args, loader = run.args, run.train_loader
    utils.random_seed(epoch_seed(args.seed, epoch), run.rank)
    sampler = getattr(loader.loader, 'sampler', loader.loader)
    if hasattr(sampler, 'set_epoch'):
        sampler.set_epoch(epoch)
    if run.mixup_fn is not None and args.mixup_off_epoch:
        run.mixup_fn.mixup_enabled = epoch < args.mixup_off_epoch

    side = args.train_sizes[epoch] if epoch < len(args.train_sizes or ()) else None
    steps, accum = len(loader), args.grad_accum_steps
    updates = epoch * run.updates_per_epoch
    seen, waited, loss_sum = 0, 0., 0.
    bar = tqdm(
        total=steps,
        desc=f'epoch {epoch + 1}',
        unit='batch',
        leave=False,
        disable=run.rank > 0 or not sys.stderr.isatty(),
    )
    run.forward.train()
    run.optimizer.zero_grad()
    start = mark = time.perf_counter()
    for step, (images, targets) in enumerate(loader):
        waited += time.perf_counter() - mark
        if side:
            images = F.interpolate(images, size=(side, side), mode='bilinear', antialias=True)
        if run.mixup_fn is not None:
            images, targets = run.mixup_fn(images, targets)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        group = min(accum, steps - step // accum * accum)  # batches of this update; the last may have fewer
        update = step % accum == group - 1

        with run.forward.no_sync() if run.world_size > 1 and not update else nullcontext():
            with run.autocast():
                logits = run.forward(images)
            loss = run.loss_fn(logits.float(), targets)
            run.scaler(
                loss / group,
                run.optimizer,
                clip_grad=args.clip_grad or None,
                clip_mode=args.clip_mode,
                parameters=model_parameters(run.model, exclude_head='agc' in args.clip_mode),
                create_graph=getattr(run.optimizer, 'is_second_order', False),
                need_update=update,
            )
        loss_sum += loss.detach() * len(images)
        seen += len(images)
        if update:
            updates += 1
            run.optimizer.zero_grad()
            if run.ema is not None:
                run.ema.update(run.model, step=updates)
            if run.scheduler is not None:
                run.scheduler.step_update(updates)

        if run.rank == 0 and (step % args.log_interval == 0 or step + 1 == steps):
            elapsed = time.perf_counter() - start
            line = f'loss {loss_sum.item() / seen:.4f}, {seen * run.world_size / elapsed:.0f} images/s, ' \
                f'waited {waited / elapsed:.1%} for data, lr {mean_lr(run.optimizer):.2e}'
            bar.set_postfix_str(line, refresh=False)
            if bar.disable:
                _logger.info(f'epoch {epoch + 1} [{step + 1}/{steps}] {line}')
        bar.update()
        mark = time.perf_counter()
    bar.close()
    elapsed = mark - start

    loss_mean = loss_sum / seen
    if run.world_size > 1:
        loss_mean = utils.reduce_tensor(loss_mean, run.world_size)
        for model in filter(None, [run.model, run.ema]):
            utils.distribute_bn(model, run.world_size, reduce=True)
    return OrderedDict(
        loss=loss_mean.item(), images_per_s=seen * run.world_size / elapsed, data_share=waited / elapsed)


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    return sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)


# Evaluation

def evaluate(
        model: nn.Module,
        loader,
        autocast: Callable = nullcontext,
        channels_last: bool = False,
) -> Dict[str, float]:
    """Evaluate a classifier on all images of a loader, or of the loaders of all processes together.

    Args:
        model: The classifier; it is left in evaluation mode.
        loader: Batches of normalized images and their classes, on the model's device.
        autocast: Makes the context that the model runs in.
        channels_last: Give the model images in that memory format.

    Returns:
        Means over the images: cross-entropy ``loss``, ``top1`` and ``top5`` in percent; and the number of ``images``.
    """
    model.eval()
    device = next(model.parameters(), torch.zeros(())).device
    batches = [torch.zeros(4, device=device)]
    with torch.inference_mode():
        for images, targets in loader:
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast():
                logits = model(images)
            loss = F.cross_entropy(logits.float(), targets, reduction='sum')
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            batches.append(torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_full((), len(images))]))
    sums = torch.stack(batches).cpu().double().sum(0)  # not every device has float64
    if dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
    loss, top1, top5, images = sums.tolist()
    return OrderedDict(loss=loss / images, top1=100 * top1 / images, top5=100 * top5 / images, images=int(images))


def evaluate_run(args: argparse.Namespace) -> Dict[str, float]:
    """Evaluate the model folder of a finished run, on the images that the run was evaluated on."""
    folder, rows = Path(args.evaluate) / 'model', read_summary(Path(args.evaluate))
    if not (folder / 'config.json').is_file() or not rows:
        raise UsageError(unfinished(Path(args.evaluate)))
    with explained(OSError):
        with explained(RuntimeError):
            device = torch.device(args.device)
        with explained(RuntimeError, ValueError, of=str(folder)):
            model = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        _, part, names = create_parts(args)
        check_classes(model, names)
        loader = create_batches(part, args, create_data_config(args, model), device)
    metrics = evaluate(model, loader, create_autocast(args, device), args.channels_last)
    print_result({**metrics, 'epoch': int(rows[-1]['epoch'])})
    return metrics


def print_result(row: Dict[str, float]) -> None:
    print(f'top1 {row["top1"]:.2f} top5 {row["top5"]:.2f} (epoch {row["epoch"] + 1:.0f}, {row["images"]:.0f} images)')


# The end

def save_model(run: Run) -> None:
    """Write the model folder, and print the last epoch's result."""
    folder, names = run.folder / 'model', run.names
    save_for_hf(
        copy.deepcopy(run.result).cpu().to(memory_format=torch.contiguous_format),  # safetensors takes no other
        folder,
        model_config=dict(label_names=names) if names and len(names) == run.model.num_classes else None,
        safe_serialization=True,
        data_config=run.data_config,
    )
    config = folder / 'config.json'
    config.write_text(json.dumps(state_classes_once(json.loads(config.read_text())), indent=2) + '\n')
    shutil.copymode(config, folder / 'model.safetensors')  # safetensors lets nobody but the owner read the file
    if rows := read_summary(run.folder):  # none if a finished run's checkpoint came without its summary
        print_result({name.removeprefix('eval_'): float(value) for name, value in rows[-1].items()})


# The command line

def main(argv: Optional[Sequence[str]] = None, command: str = 'convnn-timm train') -> Optional[Path]:
    """Run the command line; returns the run folder if it trained one.

    Args:
        argv: The words after the command, those of this process by default.
        command: What the run folder names as the program.

    Raises:
        SystemExit: With a message, for everything that the user can put right; with 128 and the number of the signal,
            as shells do, if interrupted: 130 for Ctrl-C.
    """
    process = os.getpid()

    def stop(number: int, _) -> None:
        # Ctrl-C reaches the workers that read images too: they end with this process, and not before it.
        if number != signal.SIGINT or os.getpid() == process:
            raise KeyboardInterrupt(number)

    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.ERROR if int(os.environ.get('RANK', 0)) else logging.INFO, format='%(message)s')
    logging.getLogger('timm').setLevel(logging.WARNING)
    args = None
    try:
        args = parse_args(argv)
        if args.evaluate:
            evaluate_run(args)
            return None
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in before:
                if before[number] is not signal.SIG_IGN:  # as in a shell's background
                    signal.signal(number, stop)
            return train(args, [*command.split(), *argv])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)  # the caller's again
    except UserError as error:  # an image may be read in the middle of an epoch
        raise SystemExit(f'error: {error}')
    except KeyboardInterrupt as error:
        message = 'interrupted'
        if args and not args.evaluate and args.experiment and (record := run_folder(args) / 'args.yaml').is_file():
            message += f'; continue with: convnn-timm train -c {shlex.quote(str(record))} --resume auto'
        print(message, file=sys.stderr)
        raise SystemExit(128 + (error.args[0] if error.args else signal.SIGINT)) from None


if __name__ == '__main__':
    main()
