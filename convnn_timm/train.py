""" Trainer for image classification, on timm's library.

Flags and recipe files are those of timm's train.py; what it adds is listed in train_scripts/README.md.

    convnn-timm train -c cifar10 --data-dir cifar10/
    convnn-timm train -c cifar10 --dataset torch/cifar10 --dataset-download --data-dir data/
    torchrun --nproc_per_node 2 -m convnn_timm train -c cifar10 --data-dir cifar10/
    convnn-timm train -c output/RUN/args.yaml --resume auto
    convnn-timm train --evaluate output/RUN
"""
import argparse
import copy
import csv
import difflib
import importlib.resources
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from timm import utils
from timm.data import Mixup, create_dataset, create_loader, create_transform, resolve_data_config
from timm.data.loader import PrefetchLoader
from timm.loss import create_classification_loss
from timm.models import load_checkpoint, model_parameters, resume_checkpoint, safe_model_name, save_for_hf
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torchvision import transforms
from tqdm import tqdm

from .macs import count_macs

__all__ = ['build_parser', 'evaluate', 'main', 'parse_args', 'train']

_logger = logging.getLogger(__name__)

# Images are kept decoded in memory if a split takes less than this.
MEMORY_LIMIT = 2 ** 30
# Recipe keys of timm's trainer that change nothing here, so that one recipe runs in both.
TIMM_ONLY = {'device_modules', 'dist_bn', 'eval_metric', 'no_prefetcher', 'pin_mem', 'worker_seeding'}
# Arguments that may differ between a run and its continuation.
FREE_ON_RESUME = {
    'checkpoint_hist', 'dataset_download', 'device', 'experiment', 'log_interval', 'output', 'resume', 'workers',
}


# Arguments

def build_parser() -> argparse.ArgumentParser:
    """The trainer's arguments: names and defaults of timm's train.py, where it has them."""
    parser = argparse.ArgumentParser(
        prog='convnn-timm train',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction  # --amp and --no-amp, so that the command line can undo a recipe
    kwargs = dict(nargs='*', action=utils.ParseKwargs, metavar='KEY=VALUE')

    parser.add_argument('-c', '--config', default='', metavar='FILE', help='recipe: a YAML file or a name of this '
                        'package (%s); the command line overrides it' % ', '.join(recipe_names()))
    parser.add_argument('--evaluate', default='', metavar='RUN', help='evaluate the finished run in this folder')

    group = parser.add_argument_group('data')
    group.add_argument('data', nargs='?', metavar='DIR', help='same as --data-dir')
    group.add_argument('--data-dir', metavar='DIR', help='folder with train/<class>/ and validation/<class>/')
    group.add_argument('--dataset', default='', metavar='NAME', help='another timm data set, e.g. torch/cifar10')
    group.add_argument('--dataset-download', action=flag, default=False, help='download a torch/ data set')
    group.add_argument('--train-split', default='train', metavar='NAME')
    group.add_argument('--val-split', default='validation', metavar='NAME')
    group.add_argument('--holdout', type=int, default=0, metavar='N', help='evaluate on N images split from the '
                       'training set, the same for every --seed; the validation set is not read')
    group.add_argument('--cache', action=flag, default=True, help='keep decoded images in memory if a split takes '
                       'less than 1 GB and is augmented by at most --crop-padding and flips')
    group.add_argument('-j', '--workers', type=int, default=min(4, os.cpu_count() or 1), metavar='N')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='resnet50', metavar='NAME')
    group.add_argument('--model-kwargs', default={}, **kwargs, help='e.g. K=5 sampling_type=random')
    group.add_argument('--pretrained', action=flag, default=False)
    group.add_argument('--initial-checkpoint', default='', metavar='PATH', help='weights to start from')
    group.add_argument('--num-classes', type=int, metavar='N', help='default: as many as the data has')
    group.add_argument('--gp', metavar='POOL', help='global pooling')
    group.add_argument('--img-size', type=int, metavar='N', help='default: the model\'s')
    group.add_argument('--input-size', type=int, nargs=3, metavar='N', help='channels, height, width')
    group.add_argument('--crop-pct', type=float, metavar='N', help='centre crop of the evaluation')
    group.add_argument('--mean', type=float, nargs='+')
    group.add_argument('--std', type=float, nargs='+')
    group.add_argument('--interpolation', default='', metavar='NAME')
    group.add_argument('--drop', type=float, default=0., metavar='PCT', help='dropout rate of the head')
    group.add_argument('--drop-path', type=float, metavar='PCT')
    group.add_argument('--grad-checkpointing', action=flag, default=False)
    group.add_argument('--channels-last', action=flag, default=False)
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND')

    group = parser.add_argument_group('device')
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                       help='default: cuda if there is one, else cpu (timm: always cuda)')
    group.add_argument('--amp', action=flag, default=False, help='mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'))

    group = parser.add_argument_group('optimizer')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='per process')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N')
    group.add_argument('--opt', default='sgd', metavar='NAME')
    group.add_argument('--opt-eps', type=float)
    group.add_argument('--opt-betas', type=float, nargs='+')
    group.add_argument('--opt-kwargs', default={}, **kwargs, help='further arguments of the optimizer')
    group.add_argument('--momentum', type=float, default=0.9)
    group.add_argument('--weight-decay', type=float, default=2e-5)
    group.add_argument('--clip-grad', type=float, metavar='NORM')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    group.add_argument('--layer-decay', type=float)
    group.add_argument('--layer-decay-min-scale', type=float, default=0.)
    group.add_argument('--layer-decay-no-opt-scale', type=float)

    group = parser.add_argument_group('schedule')
    group.add_argument('--epochs', type=int, default=300, metavar='N')
    group.add_argument('--sched', default='cosine', metavar='NAME')
    group.add_argument('--sched-on-updates', action=flag, default=False)
    group.add_argument('--lr', type=float, help='default: --lr-base, scaled by the batch size')
    group.add_argument('--lr-base', type=float, default=0.1)
    group.add_argument('--lr-base-size', type=int, default=256)
    group.add_argument('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'))
    group.add_argument('--lr-noise', type=float, nargs='+')
    group.add_argument('--lr-noise-pct', type=float, default=0.67)
    group.add_argument('--lr-noise-std', type=float, default=1.)
    group.add_argument('--lr-cycle-mul', type=float, default=1.)
    group.add_argument('--lr-cycle-decay', type=float, default=0.5)
    group.add_argument('--lr-cycle-limit', type=int, default=1)
    group.add_argument('--lr-k-decay', type=float, default=1.)
    group.add_argument('--warmup-lr', type=float, default=1e-5)
    group.add_argument('--warmup-epochs', type=int, default=5)
    group.add_argument('--warmup-prefix', action=flag, default=False)
    group.add_argument('--min-lr', type=float, default=0.)
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270])
    group.add_argument('--decay-epochs', type=float, default=90)
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1)
    group.add_argument('--cooldown-epochs', type=int, default=0)

    group = parser.add_argument_group('augmentation and regularization')
    group.add_argument('--no-aug', action='store_true', help='none, whatever the other flags say')
    group.add_argument('--crop-padding', type=int, metavar='PIXELS', help='the CIFAR crop: pad with zeros, crop at '
                       'random to the input size; replaces --train-crop-mode, --scale and --ratio')
    group.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'))
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.])
    group.add_argument('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.])
    group.add_argument('--train-interpolation', default='random')
    group.add_argument('--hflip', type=float, default=0.5)
    group.add_argument('--vflip', type=float, default=0.)
    group.add_argument('--color-jitter', type=float, default=0.4)
    group.add_argument('--aa', metavar='POLICY', help='AutoAugment, RandAugment, ...')
    group.add_argument('--reprob', type=float, default=0., help='random erasing')
    group.add_argument('--remode', default='pixel')
    group.add_argument('--recount', type=int, default=1)
    group.add_argument('--mixup', type=float, default=0.)
    group.add_argument('--cutmix', type=float, default=0.)
    group.add_argument('--mixup-prob', type=float, default=1.)
    group.add_argument('--mixup-switch-prob', type=float, default=0.5)
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'))
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N')
    group.add_argument('--smoothing', type=float, default=0.1)

    group = parser.add_argument_group('moving average of the weights; where it is on, it is what is evaluated and saved')
    group.add_argument('--model-ema', action=flag, default=False)
    group.add_argument('--model-ema-decay', type=float, default=0.9998)
    group.add_argument('--model-ema-warmup', action=flag, default=False)

    group = parser.add_argument_group('run')
    group.add_argument('--seed', type=int, default=42)
    group.add_argument('--output', default='', metavar='DIR', help='default: output')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder in --output; default: date and model')
    group.add_argument('--resume', default='', metavar='PATH', help='continue from this checkpoint; auto: from the '
                       'run folder\'s last one, if there is one')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='epochs to keep besides the last')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='batches between two lines of a log')
    return parser


def recipe_names() -> List[str]:
    """Names of the recipes in this package."""
    folder = importlib.resources.files(__package__) / 'recipes'
    return sorted(path.name[:-len('.yaml')] for path in folder.iterdir() if path.name.endswith('.yaml'))


def read_recipe(name: str, known: Sequence[str]) -> Dict[str, Any]:
    """Read the recipe in file ``name``, or the package's recipe of that name; its keys must be ``known``."""
    path = Path(name)
    if not path.is_file() and path.name.removesuffix('.yaml') in recipe_names() and path.name == name:
        path = importlib.resources.files(__package__) / 'recipes' / (name.removesuffix('.yaml') + '.yaml')
    if not path.is_file():
        raise SystemExit(f'no recipe {name!r}: neither a file nor one of {", ".join(recipe_names())}')
    recipe = yaml.safe_load(path.read_text()) or {}
    for key in set(recipe) - set(known) - TIMM_ONLY:
        close = difflib.get_close_matches(key, known, 1)
        raise SystemExit(f'recipe {name}: unknown key {key!r}' + (f', did you mean {close[0]!r}?' if close else ''))
    return {key: value for key, value in recipe.items() if key in known}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line; it overrides the recipe, which overrides the defaults."""
    parser = build_parser()
    names = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names.add_argument('-c', '--config', default='')
    names.add_argument('--evaluate', default='')
    given, _ = names.parse_known_args(argv)
    recipe = given.config or (os.path.join(given.evaluate, 'args.yaml') if given.evaluate else '')
    if recipe:
        parser.set_defaults(**read_recipe(recipe, list(vars(parser.parse_args([])))))
    args = parser.parse_args(argv)
    args.data_dir = args.data or args.data_dir
    if not args.data_dir:
        parser.error('which images? --data-dir DIR, a folder with train/<class>/ and validation/<class>/ in it')
    if args.sched == 'plateau':
        parser.error('--sched plateau is not supported: it would choose the schedule on the evaluated images')
    return args


# Data

class Part(torch.utils.data.Dataset):
    """Some images of a data set, with a transform of their own."""

    def __init__(self, dataset: torch.utils.data.Dataset, indices: Sequence[int]):
        self.dataset = dataset
        self.indices = indices
        self.transform = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Tuple[Any, int]:
        image, target = self.dataset[self.indices[i]]
        return self.transform(image), target


class MemoryBatches:
    """Batches of images that are held in memory, cropped and flipped as tensors.

    All random choices of an epoch are drawn from its seed before its first batch, for all images and processes alike.

    Args:
        images: All images, uint8 (N, C, H, W).
        targets: Their classes (N).
        train: Shuffle, crop, flip and drop the last incomplete batch.
        crop_padding: Width in pixels of the black border that a crop may reach into.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
    """

    def __init__(
            self,
            images: torch.Tensor,
            targets: torch.Tensor,
            batch_size: int,
            train: bool = False,
            crop_padding: int = 0,
            hflip: float = 0.,
            vflip: float = 0.,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
    ):
        self.images, self.targets, self.batch_size, self.train = images, targets, batch_size, train
        self.crop_padding, self.flips = crop_padding, torch.tensor([hflip, vflip])
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0

    def __len__(self) -> int:
        batches = len(self.images) / self.batch_size / self.world_size
        return math.floor(batches) if self.train else math.ceil(batches)

    def __iter__(self):
        if not self.train:
            yield from zip(self.images.split(self.batch_size), self.targets.split(self.batch_size))
            return
        count, device = len(self.images), self.images.device
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(count, generator=generator)
        corner = torch.randint(2 * self.crop_padding + 1, (2, count), generator=generator)
        flip = (torch.rand(count, 2, generator=generator) < self.flips).T
        order = order[:len(self) * self.batch_size * self.world_size][self.rank::self.world_size].to(device)
        corner, flip = corner.to(device), flip.to(device)
        for chosen in order.split(self.batch_size):
            yield self._augment(self.images[chosen], corner[:, chosen], flip[:, chosen]), self.targets[chosen]

    def _augment(self, images: torch.Tensor, corner: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        if self.crop_padding:
            height, width = images.shape[2:]
            padded = F.pad(images, [self.crop_padding] * 4)
            crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # every crop of every image, as a view
            images = crops[torch.arange(len(images), device=images.device), :, corner[0], corner[1]]
        for probability, flipped, dim in zip(self.flips, flip, (3, 2)):
            if probability > 0:
                images = torch.where(flipped[:, None, None, None], images.flip(dim), images)
        return images


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of an epoch's random choices; an epoch depends on nothing else but the weights it starts with."""
    return seed + 10_007 * (epoch + 1)


def holdout_split(targets: Sequence[int], count: int) -> List[int]:
    """Choose ``count`` images, the same fraction of each class, always the same ones.

    Raises:
        SystemExit: If so many cannot be taken from these images.
    """
    if not 0 < count < len(targets):
        raise SystemExit(f'--holdout {count}: there are {len(targets)} training images')
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).tolist()
    by_class = sorted(shuffled, key=lambda i: targets[i])  # stable: still shuffled within a class
    return sorted(by_class[i * len(targets) // count] for i in range(count))


def class_names(dataset: torch.utils.data.Dataset) -> Optional[List[str]]:
    """The data set's classes in the order of their numbers, if it knows them."""
    index = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return sorted(index, key=index.get) if index else None


def class_numbers(dataset: torch.utils.data.Dataset) -> List[int]:
    """The class of each image, without decoding it."""
    if hasattr(dataset, 'targets'):
        return list(dataset.targets)
    if hasattr(getattr(dataset, 'reader', None), 'samples'):
        return [target for _, target in dataset.reader.samples]
    raise SystemExit('--holdout needs a folder or a torch/ data set: this one does not list its classes')


def open_split(args: argparse.Namespace, split: str) -> torch.utils.data.Dataset:
    """Open one split of the data, without a transform."""
    if not args.dataset and not os.path.isdir(args.data_dir):
        raise SystemExit(f'there is no folder {args.data_dir}')
    channels = args.input_size[0] if args.input_size else 3
    dataset = create_dataset(
        args.dataset,
        root=args.data_dir,
        split=split,
        download=args.dataset_download,
        input_img_mode='RGB' if channels == 3 else 'L',
    )
    # Where a folder lacks the split, timm takes all of it, training and test images together.
    if not args.dataset and os.path.samefile(getattr(dataset.reader, 'root', os.devnull), args.data_dir):
        raise SystemExit(f'{args.data_dir} has no folder {split!r}: see --train-split, --val-split and --holdout')
    return dataset


def create_parts(args: argparse.Namespace) -> Tuple[Part, Part, Optional[List[str]]]:
    """Open the images to train on, those to evaluate on, and the names of their classes."""
    dataset = open_split(args, args.train_split)
    names = class_names(dataset)
    if args.holdout:
        held_out = holdout_split(class_numbers(dataset), args.holdout)
        rest = sorted(set(range(len(dataset))) - set(held_out))
        return Part(dataset, rest), Part(dataset, held_out), names
    evaluation = open_split(args, args.val_split)
    if class_names(evaluation) != names:
        raise SystemExit(f'{args.train_split} and {args.val_split} have different classes')
    return Part(dataset, range(len(dataset))), Part(evaluation, range(len(evaluation))), names


def read_images(part: Part, transform: Callable, workers: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Decode all images of a part, uint8 (N, C, H, W), and their classes (N)."""
    part.transform = transform
    images, targets, done = None, torch.empty(len(part), dtype=torch.long), 0
    for batch, classes in torch.utils.data.DataLoader(part, batch_size=256, num_workers=workers):
        if images is None:
            images = torch.empty(len(part), *batch.shape[1:], dtype=torch.uint8)
        images[done:done + len(batch)], targets[done:done + len(batch)] = batch, classes
        done += len(batch)
    return images, targets


def create_data_loader(
        part: Part,
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
        train: bool = False,
        rank: int = 0,
        world_size: int = 1,
):
    """Batches of normalized images on the device: from memory where that is possible, else by timm's loader."""
    batch_size = args.batch_size if train else args.validation_batch_size or args.batch_size
    normalize = dict(mean=data_config['mean'], std=data_config['std'], device=device)
    crop = dict(input_size=data_config['input_size'], interpolation=data_config['interpolation'])
    erase = dict(re_prob=args.reprob, re_mode=args.remode, re_count=args.recount) if train and not args.no_aug else {}
    fixed = create_transform(
        **crop, is_training=train, no_aug=True, crop_pct=data_config['crop_pct'], use_prefetcher=True)

    augments_pixels = train and not args.no_aug and (args.crop_padding is None or args.aa or args.color_jitter)
    if args.cache and not augments_pixels and len(part) * math.prod(data_config['input_size']) < MEMORY_LIMIT:
        _logger.info(f'reading {len(part)} images into memory')
        images, targets = read_images(part, fixed, args.workers)
        augment = {} if args.no_aug else dict(
            crop_padding=args.crop_padding, hflip=args.hflip, vflip=args.vflip)
        batches = MemoryBatches(
            images.to(device),
            targets.to(device),
            batch_size,
            **(dict(train=True, seed=args.seed, rank=rank, world_size=world_size, **augment) if train else {}),
        )
        return PrefetchLoader(batches, **normalize, **erase, channels=data_config['input_size'][0])

    if train and not args.no_aug:
        crop['interpolation'] = args.train_interpolation or crop['interpolation']
    loader = create_loader(
        part,
        **crop,
        **normalize,
        **erase,
        batch_size=batch_size,
        is_training=train,
        no_aug=args.no_aug,
        train_crop_mode=args.train_crop_mode if args.crop_padding is None else 'rrc',
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        crop_pct=data_config['crop_pct'],
        num_workers=args.workers,
        distributed=train and world_size > 1,
        persistent_workers=False,  # workers that live on would go on with their random numbers, not with the epoch's
    )
    if train and world_size > 1:
        loader.sampler.seed = args.seed
    if train and not args.no_aug and args.crop_padding is not None:
        random_crop = transforms.RandomCrop(data_config['input_size'][1:], padding=args.crop_padding)
        part.transform.transforms[:1] = [*fixed.transforms[:-1], random_crop]
    return loader


# Training and evaluation

@dataclass
class Setup:
    """What one epoch of training works on."""
    model: nn.Module
    forward: nn.Module  # the model, compiled and distributed where asked for
    optimizer: torch.optim.Optimizer
    loss_fn: nn.Module
    autocast: Callable
    scaler: Optional[utils.NativeScaler] = None
    ema: Optional[utils.ModelEmaV3] = None
    mixup_fn: Optional[Mixup] = None
    scheduler: Any = None
    rank: int = 0
    world_size: int = 1


def train_one_epoch(epoch: int, setup: Setup, loader, args: argparse.Namespace) -> Dict[str, float]:
    """Train for one epoch; returns the mean loss, the speed and the share of time spent waiting for data."""
    device = next(setup.model.parameters()).device
    utils.random_seed(epoch_seed(args.seed, epoch), setup.rank)
    batches = getattr(loader, 'loader', loader)
    if isinstance(batches, MemoryBatches):
        batches.epoch = epoch
    elif setup.world_size > 1:
        loader.sampler.set_epoch(epoch)
    if setup.mixup_fn is not None and args.mixup_off_epoch:
        setup.mixup_fn.mixup_enabled = epoch < args.mixup_off_epoch

    accum, count = args.grad_accum_steps, len(loader)
    updates = epoch * math.ceil(count / accum)
    seen, waited, loss_sum = 0, 0., torch.zeros((), device=device)
    setup.forward.train()
    setup.optimizer.zero_grad()
    bar = tqdm(
        total=count,
        desc=f'epoch {epoch + 1}',
        unit='batch',
        leave=False,
        disable=setup.rank > 0 or not sys.stderr.isatty(),
    )
    start = mark = time.perf_counter()
    for step, (images, targets) in enumerate(loader):
        waited += time.perf_counter() - mark
        if setup.mixup_fn is not None:
            images, targets = setup.mixup_fn(images, targets)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        group = min(accum, count - step // accum * accum)  # batches of this update, fewer in the last one
        update = step % accum == group - 1

        with setup.forward.no_sync() if setup.world_size > 1 and not update else nullcontext():
            with setup.autocast():
                logits = setup.forward(images)
            loss = setup.loss_fn(logits.float(), targets) / group
            clip = dict(
                parameters=model_parameters(setup.model, exclude_head='agc' in args.clip_mode),
                mode=args.clip_mode,
            )
            if setup.scaler is not None:
                setup.scaler(
                    loss,
                    setup.optimizer,
                    clip_grad=args.clip_grad,
                    clip_mode=args.clip_mode,
                    parameters=clip['parameters'],
                    need_update=update,
                )
            else:
                loss.backward()
        seen += len(images)
        loss_sum += loss.detach() * group * len(images)
        if update:
            if setup.scaler is None:
                if args.clip_grad is not None:
                    utils.dispatch_clip_grad(value=args.clip_grad, **clip)
                setup.optimizer.step()
            setup.optimizer.zero_grad()
            updates += 1
            if setup.ema is not None:
                setup.ema.update(setup.model, step=updates)
            if setup.scheduler is not None:
                setup.scheduler.step_update(updates)

        if setup.rank == 0 and (step % args.log_interval == 0 or step + 1 == count):
            elapsed = time.perf_counter() - start
            line = f'loss {loss_sum.item() / seen:.4f}, {seen * setup.world_size / elapsed:.0f} images/s, ' \
                f'data {waited / elapsed:.1%}, lr {setup.optimizer.param_groups[0]["lr"]:.2e}'
            if bar.disable:
                _logger.info(f'epoch {epoch + 1} [{step + 1}/{count}] {line}')
            bar.set_postfix_str(line, refresh=False)
        bar.update()
        mark = time.perf_counter()
    bar.close()

    loss_mean = (loss_sum / seen).double()
    if setup.world_size > 1:
        loss_mean = utils.reduce_tensor(loss_mean, setup.world_size)
        utils.distribute_bn(setup.model, setup.world_size, reduce=True)
        if setup.ema is not None:
            utils.distribute_bn(setup.ema, setup.world_size, reduce=True)
    elapsed = time.perf_counter() - start
    return OrderedDict(
        loss=loss_mean.item(), images_per_s=seen * setup.world_size / elapsed, data_share=waited / elapsed)


def evaluate(
        model: nn.Module,
        loader,
        autocast: Callable = nullcontext,
        channels_last: bool = False,
) -> Dict[str, float]:
    """Evaluate a model on all images of a loader, or of all processes' loaders together.

    Args:
        model: A classifier; is left in evaluation mode.
        loader: Batches of normalized images and classes, on the model's device.
        autocast: Makes the context that the model runs in.
        channels_last: Give the images in that memory format.

    Returns:
        Means over the images: cross-entropy ``loss``, ``top1`` and ``top5`` in percent; and the number of ``images``.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
    with torch.inference_mode():
        for images, targets in loader:
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast():
                logits = model(images)
            logits = logits.float()
            hit = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            loss = F.cross_entropy(logits, targets, reduction='sum')
            sums += torch.stack([loss, hit[:, 0].sum(), hit.sum(), torch.tensor(len(images), device=loss.device)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, top1, top5, images = sums.tolist()
    return OrderedDict(loss=loss / images, top1=100 * top1 / images, top5=100 * top5 / images, images=int(images))


# The run folder

class Saver(utils.CheckpointSaver):
    """timm's, but a checkpoint is replaced in one step: timm deletes the old one first."""

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)


def recorded_args(args: argparse.Namespace) -> Dict[str, Any]:
    """The arguments that make the run: what args.yaml holds."""
    return {k: v for k, v in vars(args).items() if k not in ('config', 'data', 'evaluate', 'resume')}


def environment(args: argparse.Namespace, argv: Sequence[str]) -> Dict[str, Any]:
    """What the run ran on and with; names neither the machine nor its folders, but for the data's."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = dirty = None
    try:
        if git(['git', 'ls-files', '--error-unmatch', Path(__file__).name]).returncode == 0:
            commit = git(['git', 'rev-parse', 'HEAD']).stdout.strip() or None
            dirty = bool(git(['git', 'status', '--porcelain']).stdout.strip())
    except OSError:
        pass  # no git on this machine
    cpuinfo = Path('/proc/cpuinfo').read_text() if os.path.exists('/proc/cpuinfo') else ''
    cpu = next((line.split(':')[1].strip() for line in cpuinfo.splitlines() if line.startswith('model name')), None)
    on_gpu = torch.device(args.device).type == 'cuda'
    shown = [a if a == args.data_dir or not os.path.isabs(a) else os.path.basename(a.rstrip('/')) for a in argv]
    return dict(
        command=' '.join(['convnn-timm', 'train', *shown]),
        commit=commit,
        uncommitted_changes=dirty,
        **{name: version(name) for name in ('convnn_timm', 'timm', 'torch', 'torchvision')},
        python=platform.python_version(),
        platform=f'{platform.system()} {platform.machine()}',
        cpu=cpu or platform.processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        processes=int(os.environ.get('WORLD_SIZE', 1)),
        started=datetime.now().isoformat(timespec='seconds'),
    )


def describe(model: nn.Module, input_size: Tuple[int, ...]) -> str:
    """Size and cost of a model, and its layers."""
    parameters = sum(p.numel() for p in model.parameters())
    macs = count_macs(model, input_size)
    size = 'x'.join(map(str, input_size))
    return f'{parameters:,} parameters, {macs / 1e9:.4f} GMACs for one {size} image\n\n{model}\n'


def draw_curve(summary: Path, file: Path) -> None:
    """Draw the losses and the accuracy of a summary.csv over the epochs."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    rows = list(csv.DictReader(summary.open()))
    epochs = [int(row['epoch']) + 1 for row in rows]
    figure = Figure(figsize=(9, 3.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    for key, label in (('train_loss', 'training'), ('eval_loss', 'evaluation')):
        left.plot(epochs, [float(row[key]) for row in rows], '.-', label=label)
    left.set(xlabel='epoch', ylabel='loss')
    left.legend()
    right.plot(epochs, [float(row['eval_top1']) for row in rows], '.-', color='C1')
    right.set(xlabel='epoch', ylabel='top-1 (%)', title=f'last: {float(rows[-1]["eval_top1"]):.2f}')
    figure.savefig(file, dpi=120)


def export(model: nn.Module, folder: Path, data_config: Dict[str, Any], names: Optional[List[str]]) -> None:
    """Write a timm model folder: ``timm.create_model('local-dir:<folder>', pretrained=True)``."""
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # safetensors takes no other
    save_for_hf(
        model,
        folder,
        model_config=dict(label_names=names) if names and len(names) == model.num_classes else None,
        safe_serialization=True,
        data_config=data_config,
    )


def result_line(metrics: Dict[str, Any], epoch: int) -> str:
    return f'top1 {float(metrics["top1"]):.2f} top5 {float(metrics["top5"]):.2f} ' \
        f'(epoch {epoch}, {int(metrics["images"])} images)'


def run_folder(args: argparse.Namespace) -> Path:
    """Where the run's files are."""
    return Path(args.output or 'output') / args.experiment


def open_run(args: argparse.Namespace, rank: int) -> Tuple[Path, str]:
    """The run's folder, and the checkpoint to continue from or ''.

    Raises:
        SystemExit: If the folder holds another run, or the checkpoint is not one of this run.
    """
    if args.resume == 'auto' and not args.experiment:
        raise SystemExit('--resume auto continues the run in --output/--experiment: name it with --experiment')
    args.experiment = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
    folder = run_folder(args)
    checkpoint = args.resume
    if checkpoint == 'auto':
        checkpoint = str(folder / 'last.pth.tar')
        checkpoint = checkpoint if os.path.exists(checkpoint) else ''
    elif checkpoint and not os.path.isfile(checkpoint):
        raise SystemExit(f'--resume {checkpoint}: there is no such file')
    if rank == 0 and not args.resume and folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f'{folder} is not empty: continue its run with --resume auto, or choose another --experiment')
    if checkpoint:
        before = vars(utils.load_checkpoint_metadata(checkpoint)['args'])
        now = recorded_args(args)
        changed = [k for k in now if k not in FREE_ON_RESUME and now[k] != before.get(k)]
        if changed:
            raise SystemExit('\n'.join([
                f'cannot continue {checkpoint}: its run has other arguments',
                *(f'  {k}: {before.get(k)!r} in the run, {now[k]!r} now' for k in changed),
                f'Continue it as it was with -c {folder}/args.yaml --resume auto, or start another run from its '
                f'weights with --initial-checkpoint {checkpoint}',
            ]))
    return folder, checkpoint


# Commands

def create_model(args: argparse.Namespace, num_classes: Optional[int]) -> nn.Module:
    """Create the model from the arguments."""
    return timm.create_model(
        args.model,
        pretrained=args.pretrained,
        in_chans=args.input_size[0] if args.input_size else 3,
        num_classes=num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        global_pool=args.gp,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )


def learning_rate(args: argparse.Namespace, world_size: int) -> float:
    """--lr, or --lr-base scaled as in timm's trainer."""
    if args.lr:
        return args.lr
    ratio = args.batch_size * world_size * args.grad_accum_steps / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    return args.lr_base * (ratio ** 0.5 if (args.lr_base_scale or ('linear', 'sqrt')[adaptive]) == 'sqrt' else ratio)


def create_autocast(args: argparse.Namespace, device: torch.device) -> Callable:
    """Makes the context the model runs in: --amp."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))


def train(args: argparse.Namespace, argv: Sequence[str] = ()) -> Path:
    """Train as ``args`` from ``parse_args`` say.

    Args:
        args: All arguments.
        argv: The command line, for the record.

    Returns:
        The run folder.

    Raises:
        SystemExit: With a message, where the arguments, the data or the run folder do not allow it.
    """
    world = copy.copy(args)
    device = utils.init_distributed_device(world)
    rank, world_size = world.rank, world.world_size
    folder, checkpoint = open_run(args, rank)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    train_part, eval_part, names = create_parts(args)
    eval_part.indices = eval_part.indices[rank::world_size]
    utils.random_seed(args.seed)  # before the weights are drawn, and the same ones in every process
    model = create_model(args, args.num_classes or (len(names) if names else None))
    if names and len(names) > model.num_classes:
        raise SystemExit(f'the data has {len(names)} classes, the model {model.num_classes}: see --num-classes')
    data_config = resolve_data_config(vars(args), model=model)
    summary = describe(model, data_config['input_size']) if rank == 0 else ''
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)

    train_loader = create_data_loader(train_part, args, data_config, device, True, rank, world_size)
    eval_loader = create_data_loader(eval_part, args, data_config, device)
    if len(train_loader) == 0:
        raise SystemExit(f'{len(train_part)} training images do not fill one batch: lower --batch-size')
    args_lr = copy.copy(args)
    args_lr.lr = learning_rate(args, world_size)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args_lr), **args.opt_kwargs)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(args),
        updates_per_epoch=math.ceil(len(train_loader) / args.grad_accum_steps),
    )
    mix = args.mixup > 0 or args.cutmix > 0
    setup = Setup(
        model=model,
        forward=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loss_fn=create_classification_loss(smoothing=args.smoothing, soft_targets=mix),
        autocast=create_autocast(args, device),
        rank=rank,
        world_size=world_size,
    )
    if mix:
        setup.mixup_fn = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=model.num_classes,
        )
    if args.amp and args.amp_dtype == 'float16' and device.type == 'cuda':
        setup.scaler = utils.NativeScaler(device=device.type)
    if args.model_ema:
        setup.ema = utils.ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    saver = Saver(
        model, optimizer, args, setup.ema, setup.scaler, checkpoint_dir=str(folder), max_history=args.checkpoint_hist)

    start_epoch = 0
    if checkpoint:
        start_epoch = resume_checkpoint(model, checkpoint, optimizer, setup.scaler, log_info=False)
        if setup.ema is not None:
            load_checkpoint(setup.ema.module, checkpoint, use_ema=True)
        if scheduler is not None:
            scheduler.step(start_epoch)
            scheduler.step_update(start_epoch * math.ceil(len(train_loader) / args.grad_accum_steps))
        _logger.info(f'continuing {folder} after epoch {start_epoch}')
    if args.torchcompile:
        setup.forward = torch.compile(model, backend=args.torchcompile)
    evaluated = setup.ema.module if setup.ema is not None else setup.forward
    if world_size > 1:
        setup.forward = nn.parallel.DistributedDataParallel(
            setup.forward, device_ids=[device] if device.type == 'cuda' else None)

    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint and Path(checkpoint).parent.samefile(folder):
            saver.load_state_dict_from_checkpoint(checkpoint)
        if not start_epoch:
            (folder / 'args.yaml').write_text(yaml.safe_dump(recorded_args(args), sort_keys=False))
            (folder / 'model.txt').write_text(summary)
        name = f'environment-{start_epoch}.json' if start_epoch else 'environment.json'
        (folder / name).write_text(json.dumps(environment(args, argv), indent=2) + '\n')
        utils.trim_summary(folder / 'summary.csv', start_epoch)
        _logger.info(f'{summary.splitlines()[0]}; {len(train_part)} training images; run folder {folder}')

    try:
        for epoch in range(start_epoch, epochs):
            train_metrics = train_one_epoch(epoch, setup, train_loader, args)
            if not math.isfinite(train_metrics['loss']):
                raise SystemExit(f'the loss is {train_metrics["loss"]} in epoch {epoch + 1}: lower --lr')
            lr = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
            eval_metrics = evaluate(evaluated, eval_loader, setup.autocast, args.channels_last)
            if scheduler is not None:
                scheduler.step(epoch + 1)
            if rank == 0:
                # The row first: one without a checkpoint is dropped on resuming.
                utils.update_summary(epoch, train_metrics, eval_metrics, folder / 'summary.csv', lr=lr)
                saver.save_checkpoint(epoch)
                _logger.info(
                    f'epoch {epoch + 1}/{epochs}: train loss {train_metrics["loss"]:.4f}, eval loss '
                    f'{eval_metrics["loss"]:.4f}, top1 {eval_metrics["top1"]:.2f}, top5 {eval_metrics["top5"]:.2f}, '
                    f'lr {lr:.2e}, {train_metrics["images_per_s"]:.0f} images/s, data {train_metrics["data_share"]:.1%}')
    finally:
        if rank == 0 and (folder / 'summary.csv').exists():
            draw_curve(folder / 'summary.csv', folder / 'curve.png')
        if world_size > 1:
            dist.destroy_process_group()

    if rank == 0:
        export(setup.ema.module if setup.ema is not None else model, folder / 'model', data_config, names)
        last = list(csv.DictReader((folder / 'summary.csv').open()))[-1]
        print(result_line({k.removeprefix('eval_'): v for k, v in last.items()}, epochs))
    return folder


def evaluate_run(args: argparse.Namespace) -> Dict[str, float]:
    """Evaluate the model folder of the finished run ``args.evaluate`` on the images that the run was evaluated on."""
    folder = Path(args.evaluate) / 'model'
    if not folder.is_dir():
        raise SystemExit(
            f'{args.evaluate} is not finished: continue it with -c {args.evaluate}/args.yaml --resume auto')
    device = torch.device(args.device)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    _, part, _ = create_parts(args)
    loader = create_data_loader(part, args, resolve_data_config(vars(args), model=model), device)
    metrics = evaluate(model, loader, create_autocast(args, device), args.channels_last)
    print(result_line(metrics, args.epochs))
    return metrics


def main(argv: Optional[Sequence[str]] = None) -> Optional[Path]:
    """Parse the command line and train, or evaluate a run; returns the run folder."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(argv)
    utils.setup_default_logging(default_level=logging.INFO if int(os.environ.get('RANK', 0)) == 0 else logging.ERROR)
    logging.getLogger('timm').setLevel(logging.WARNING)
    if args.evaluate:
        evaluate_run(args)
        return None

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return train(args, argv)
    except KeyboardInterrupt:
        record = run_folder(args) / 'args.yaml'
        raise SystemExit(
            f'interrupted; continue with: convnn-timm train -c {record} --resume auto' if record.is_file() else
            'interrupted before the run began')


if __name__ == '__main__':
    main()
