""" Trainer for image classification, on timm's library.

Its arguments are in train_args.py, its images in train_data.py, the run folder in train_folder.py.
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
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

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
from .flags import UsageError, build_parser, parse_args
from .data import check_class_names, check_classes, create_batches, create_parts, epoch_seed, fit_batch_size
from .run_folder import (
    Saver, begin_run, describe, draw_curve, environment, open_run, read_summary, run_folder, state_classes_once,
    unfinished)

__all__ = ['UsageError', 'build_parser', 'evaluate', 'main', 'parse_args', 'train']

_logger = logging.getLogger(__name__)


# Training and evaluation

class Scaler(utils.NativeScaler):
    """timm's gradient scaler, which also works switched off."""

    def __init__(self, enabled: bool):
        self._scaler = torch.amp.GradScaler(enabled=enabled)
        self.enabled = enabled


@dataclass
class Setup:
    """What the epochs work on."""
    model: nn.Module
    forward: nn.Module  # the model, compiled and distributed where asked for
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loss_fn: nn.Module
    scaler: Scaler
    autocast: Callable
    mixup_fn: Optional[Mixup] = None
    ema: Optional[utils.ModelEmaV3] = None
    rank: int = 0
    world_size: int = 1


def train_one_epoch(epoch: int, setup: Setup, loader, args: argparse.Namespace) -> Dict[str, float]:
    """Train for one epoch; returns the mean loss, the speed and the share of time spent waiting for images."""
    utils.random_seed(epoch_seed(args.seed, epoch), setup.rank)
    sampler = getattr(loader.loader, 'sampler', loader.loader)
    if hasattr(sampler, 'set_epoch'):
        sampler.set_epoch(epoch)
    if setup.mixup_fn is not None and args.mixup_off_epoch:
        setup.mixup_fn.mixup_enabled = epoch < args.mixup_off_epoch

    side = args.train_sizes[epoch] if epoch < len(args.train_sizes or ()) else None
    steps, accum = len(loader), args.grad_accum_steps
    updates = epoch * math.ceil(steps / accum)
    seen, waited, loss_sum = 0, 0., 0.
    bar = tqdm(
        total=steps,
        desc=f'epoch {epoch + 1}',
        unit='batch',
        leave=False,
        disable=setup.rank > 0 or not sys.stderr.isatty(),
    )
    setup.forward.train()
    setup.optimizer.zero_grad()
    start = mark = time.perf_counter()
    for step, (images, targets) in enumerate(loader):
        waited += time.perf_counter() - mark
        if side:
            images = F.interpolate(images, size=(side, side), mode='bilinear', antialias=True)
        if setup.mixup_fn is not None:
            images, targets = setup.mixup_fn(images, targets)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        group = min(accum, steps - step // accum * accum)  # batches of this update; the last may have fewer
        update = step % accum == group - 1

        with setup.forward.no_sync() if setup.world_size > 1 and not update else nullcontext():
            with setup.autocast():
                logits = setup.forward(images)
            loss = setup.loss_fn(logits.float(), targets)
            setup.scaler(
                loss / group,
                setup.optimizer,
                clip_grad=args.clip_grad or None,
                clip_mode=args.clip_mode,
                parameters=model_parameters(setup.model, exclude_head='agc' in args.clip_mode),
                create_graph=getattr(setup.optimizer, 'is_second_order', False),
                need_update=update,
            )
        loss_sum += loss.detach() * len(images)
        seen += len(images)
        if update:
            updates += 1
            setup.optimizer.zero_grad()
            if setup.ema is not None:
                setup.ema.update(setup.model, step=updates)
            if setup.scheduler is not None:
                setup.scheduler.step_update(updates)

        if setup.rank == 0 and (step % args.log_interval == 0 or step + 1 == steps):
            elapsed = time.perf_counter() - start
            line = f'loss {loss_sum.item() / seen:.4f}, {seen * setup.world_size / elapsed:.0f} images/s, ' \
                f'waited {waited / elapsed:.1%} for data, lr {mean_lr(setup.optimizer):.2e}'
            bar.set_postfix_str(line, refresh=False)
            if bar.disable:
                _logger.info(f'epoch {epoch + 1} [{step + 1}/{steps}] {line}')
        bar.update()
        mark = time.perf_counter()
    bar.close()
    elapsed = mark - start

    loss_mean = loss_sum / seen
    if setup.world_size > 1:
        loss_mean = utils.reduce_tensor(loss_mean, setup.world_size)
        for model in filter(None, [setup.model, setup.ema]):
            utils.distribute_bn(model, setup.world_size, reduce=True)
    return OrderedDict(
        loss=loss_mean.item(), images_per_s=seen * setup.world_size / elapsed, data_share=waited / elapsed)


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
    sums = torch.stack(batches).cpu().double().sum(0)  # not on every device there are doubles
    if dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
    loss, top1, top5, images = sums.tolist()
    return OrderedDict(loss=loss / images, top1=100 * top1 / images, top5=100 * top5 / images, images=int(images))


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    return sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)


def print_result(row: Dict[str, float]) -> None:
    print(f'top1 {row["top1"]:.2f} top5 {row["top5"]:.2f} (epoch {row["epoch"] + 1:.0f}, {row["images"]:.0f} images)')


# Commands

@contextmanager
def explained():
    """While a run is set up, what goes wrong is in the arguments, the data or the files: say it in one line."""
    try:
        yield
    except UsageError:
        raise
    except (
            ArithmeticError, AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        raise UsageError(' '.join(str(error).split()) or type(error).__name__) from error


def create_model(args: argparse.Namespace, resumed: bool = False) -> nn.Module:
    """Create the model of the arguments, converted if they say so. A resumed run needs no weights from a file."""
    weights = '' if resumed else args.initial_checkpoint
    if ':' not in args.model and not timm.is_model(args.model):
        raise UsageError(unknown_model(args.model))
    if weights and not os.path.isfile(weights):
        raise UsageError(f'--initial-checkpoint {args.initial_checkpoint}: there is no such file')
    try:
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
        if not args.pretrained or args.initial_checkpoint:
            model.pretrained_cfg.pop('license', None)  # of other weights than these
        return model
    except RuntimeError as error:
        if 'No pretrained weights exist' in str(error):
            raise UsageError(f'{args.model} has no pretrained weights: --no-pretrained draws random ones') from error
        if not weights:
            raise
        raise UsageError(
            f'--initial-checkpoint {args.initial_checkpoint}: {" ".join(str(error).split())} (the model of a run with '
            'other classes or arguments: --model local-dir:RUN/model --pretrained)') from error
    except (TypeError, ValueError) as error:  # an argument that the model does not know, or a wrong value
        raise UsageError(f'{args.model}: {error}') from error


def create_data_config(args: argparse.Namespace, model: nn.Module) -> Dict[str, Any]:
    """timm's; mean and standard deviation of as many channels as the images have."""
    data_config = resolve_data_config(vars(args), model=model)
    channels = data_config['input_size'][0]
    for name in ('mean', 'std'):
        values = data_config[name]
        if len(values) != channels:
            data_config[name] = (sum(values) / len(values),) * channels
    return data_config


def create_autocast(args: argparse.Namespace, device: torch.device) -> Callable:
    """Makes the context that the model runs in."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))


def is_emulated(dtype: str) -> bool:
    """Whether this machine's CPU lacks the instructions that oneDNN needs for the type."""
    check = dict(bfloat16='_is_mkldnn_bf16_supported', float16='_is_mkldnn_fp16_supported')[dtype]
    return torch.backends.mkldnn.is_available() and not getattr(torch.ops.mkldnn, check)()


def warn_of_emulation(args: argparse.Namespace) -> None:
    """On a CPU without instructions for it, a step in lower precision takes far longer than in float32."""
    if args.amp and is_emulated(args.amp_dtype):
        _logger.warning(f'this processor has no instructions for {args.amp_dtype}, which makes it very slow: --no-amp '
                        'trains in float32')


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


def create_setup(
        args: argparse.Namespace,
        model: nn.Module,
        steps: int,
        device: torch.device,
        rank: int,
        world_size: int,
) -> Tuple[Setup, int]:
    """Create what trains the model; returns it and the number of epochs."""
    args = copy.copy(args)
    if not args.lr:  # timm's rule
        scale = args.batch_size * world_size * args.grad_accum_steps / args.lr_base_size
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        square_root = args.lr_base_scale == 'sqrt' or not args.lr_base_scale and adaptive
        args.lr = args.lr_base * (scale ** 0.5 if square_root else scale)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=math.ceil(steps / args.grad_accum_steps))
    mixup_fn = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=model.num_classes,
    ) if args.mixup or args.cutmix else None
    return Setup(
        model=model,
        forward=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loss_fn=create_classification_loss(smoothing=args.smoothing, soft_targets=mixup_fn is not None),
        scaler=Scaler(args.amp and args.amp_dtype == 'float16' and device.type == 'cuda'),
        autocast=create_autocast(args, device),
        mixup_fn=mixup_fn,
        ema=utils.ModelEmaV3(
            model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None,
        rank=rank,
        world_size=world_size,
    ), epochs


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
    with explained():
        world = copy.copy(args)
        device = utils.init_distributed_device(world)
        rank, world_size = world.rank, world.world_size
        train_part, eval_part, names = create_parts(args)
        if names is not None:
            check_class_names(names, f'{printable(args.data_dir)}: the split {args.train_split!r}')
        fit_batch_size(args, len(train_part), world_size)
        eval_part.indices = eval_part.indices[rank::world_size]
        args.num_classes = args.num_classes or (len(names) if names else None)
        checkpoint = open_run(args, rank)
        if device.type == 'cuda':
            torch.set_float32_matmul_precision('high')
            torch.backends.cudnn.benchmark = True
        elif device.type == 'cpu' and rank == 0:
            warn_of_emulation(args)

        utils.random_seed(args.seed)  # before the weights are drawn, and the same in every process
        model = create_model(args, resumed=bool(checkpoint))
        if names and len(names) > model.num_classes:
            raise UsageError(f'the data has {len(names)} classes, --num-classes is {model.num_classes}')
        data_config = create_data_config(args, model)
        description = describe(model, data_config['input_size']) if rank == 0 else ''
        for side in sorted(set(args.train_sizes or ())):
            try:
                count_macs(model, (data_config['input_size'][0], side, side))
            except (RuntimeError, ValueError) as error:
                raise UsageError(f'--train-sizes {side}: {error}') from error
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
        model.to(device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        train_loader = create_batches(train_part, args, data_config, device, True, rank, world_size)
        eval_loader = create_batches(eval_part, args, data_config, device)
        if not len(train_loader):
            raise UsageError(f'{len(train_part)} training images do not fill a batch: choose a smaller --batch-size')

        setup, epochs = create_setup(args, model, len(train_loader), device, rank, world_size)
        start = 0
        if checkpoint:
            start = resume_checkpoint(model, checkpoint, setup.optimizer, setup.scaler, log_info=False)
            if setup.ema is not None:
                load_checkpoint(setup.ema.module, checkpoint, use_ema=True)
            if setup.scheduler is not None:  # the checkpoint's may be the end of a shorter schedule
                setup.scheduler.step(start)
                setup.scheduler.step_update(start * math.ceil(len(train_loader) / args.grad_accum_steps))
        result = setup.ema.module if setup.ema is not None else model
        if args.torchcompile:
            setup.forward = torch.compile(model, backend=args.torchcompile)
            _logger.info(f'the first batches take a while: {args.torchcompile} compiles the model for them')
        evaluated = setup.forward if setup.ema is None else result
        if world_size > 1:
            setup.forward = DistributedDataParallel(
                setup.forward, device_ids=[device] if device.type == 'cuda' else None)

        own = rank == 0 and begin_run(args, checkpoint, start, description)
        folder = run_folder(args)
        saver = Saver(
            model,
            setup.optimizer,
            args,
            model_ema=setup.ema,
            amp_scaler=setup.scaler if setup.scaler.enabled else None,
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

    try:
        for epoch in range(start, epochs):
            with no_emulation_in_muon(device):
                train_metrics = train_one_epoch(epoch, setup, train_loader, args)
            if not math.isfinite(train_metrics['loss']):
                raise UsageError(f'the loss is {train_metrics["loss"]} in epoch {epoch + 1}: choose a smaller --lr')
            eval_metrics = evaluate(evaluated, eval_loader, setup.autocast, args.channels_last)
            lr = mean_lr(setup.optimizer)
            if setup.scheduler is not None:
                setup.scheduler.step(epoch + 1)
            if rank == 0:  # first the row: if the checkpoint does not follow, the row is dropped on resuming
                utils.update_summary(epoch, train_metrics, eval_metrics, folder / 'summary.csv', lr=lr)
                saver.save_checkpoint(epoch)
                _logger.info(
                    f'epoch {epoch + 1}/{epochs}: train loss {train_metrics["loss"]:.4f}, '
                    f'eval loss {eval_metrics["loss"]:.4f}, top1 {eval_metrics["top1"]:.2f}, '
                    f'top5 {eval_metrics["top5"]:.2f}, lr {lr:.2e}, {train_metrics["images_per_s"]:.0f} images/s, '
                    f'waited {train_metrics["data_share"]:.1%} for data')
    finally:
        rows = read_summary(folder)
        if rank == 0 and rows:
            draw_curve(rows, folder / 'curve.png')
        if world_size > 1:
            dist.destroy_process_group()

    if rank == 0:
        save_for_hf(
            copy.deepcopy(result).cpu().to(memory_format=torch.contiguous_format),  # safetensors takes no other
            folder / 'model',
            model_config=dict(label_names=names) if names and len(names) == model.num_classes else None,
            safe_serialization=True,
            data_config=data_config,
        )
        config = folder / 'model' / 'config.json'
        config.write_text(json.dumps(state_classes_once(json.loads(config.read_text())), indent=2) + '\n')
        # safetensors lets nobody but the owner read the file
        shutil.copymode(folder / 'model' / 'config.json', folder / 'model' / 'model.safetensors')
        if rows:  # none if a finished run's checkpoint came without its summary
            print_result({name.removeprefix('eval_'): float(rows[-1][name]) for name in rows[-1]})
    return folder


def evaluate_run(args: argparse.Namespace) -> Dict[str, float]:
    """Evaluate the model folder of a finished run, on the images that the run was evaluated on."""
    folder, rows = Path(args.evaluate) / 'model', read_summary(Path(args.evaluate))
    if not (folder / 'config.json').is_file() or not rows:
        raise UsageError(unfinished(Path(args.evaluate)))
    with explained():
        device = torch.device(args.device)
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        _, part, names = create_parts(args)
        check_classes(model, names)
        loader = create_batches(part, args, create_data_config(args, model), device)
    metrics = evaluate(model, loader, create_autocast(args, device), args.channels_last)
    print_result({**metrics, 'epoch': int(rows[-1]['epoch'])})
    return metrics


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
