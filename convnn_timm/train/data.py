"""The trainer's images: which ones, and how they become batches."""
import argparse
import hashlib
import logging
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import ImageDataset, create_dataset, create_loader, create_transform
from timm.data.dataset_factory import _search_split
from timm.data.loader import PrefetchLoader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from convnn_timm.images import image_mode, printable, read_image, scan
from .flags import FLAGS, UsageError, explained

__all__ = [
    'MemoryBatches', 'Part', 'check_class_names', 'check_classes', 'create_batches', 'create_parts', 'epoch_seed',
    'fit_batch_size', 'holdout_split']

_logger = logging.getLogger(__name__)

# Sources of data sets whose images can be read in any order.
SOURCES = ('torch', 'hfds')
# timm's names of splits.
EVAL_SPLITS = ('val', 'valid', 'validation', 'eval', 'evaluation', 'test')
TRAIN_SPLITS = ('train', 'training')

# A split is kept decoded in memory if it takes less than this.
MEMORY_LIMIT = 2 ** 30


class FolderReader(ReaderImageFolder):
    """timm's reader of folders, for the images that `scan` finds. Classes have the numbers that timm gives them.

    Args:
        root: The folder.
        flat: The folders directly in ``root`` are the classes, not the folders that the images lie in.
    """

    def __init__(self, root: str, flat: bool = False):
        found, self.root = scan(root), root
        for note in found.notes():
            _logger.info(f'{printable(root)}: {note}')
        if not found.images:
            raise UsageError(f'there are no images in {printable(root)}')
        folders = [image.relative_to(root).parts[:-1] or ('',) for image in found.images]
        labels = [parts[0 if flat else -1] for parts in folders]
        self.class_to_idx = {name: i for i, name in enumerate(sorted(sorted(set(labels)), key=natural_key))}
        self.samples = sorted(
            ((str(image), self.class_to_idx[label]) for image, label in zip(found.images, labels)),
            key=lambda sample: natural_key(sample[0]))

    def fingerprint(self) -> str:
        """Return a hash of the names of the images. It stays when the folder moves."""
        names = sorted(Path(self.filename(i)).as_posix() for i in range(len(self)))
        return hashlib.sha256(os.fsencode('\n'.join(names))).hexdigest()[:12]


class Part(torch.utils.data.Dataset):
    """Some images of a data set, with a transform of their own."""

    def __init__(self, dataset: torch.utils.data.Dataset, indices: Sequence[int]):
        self.dataset = dataset
        self.indices = indices
        self.transform = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Tuple[Any, int]:
        if isinstance(getattr(self.dataset, 'reader', None), ReaderImageFolder):
            # timm's dataset would give the next image in place of one that it cannot read.
            file, target = self.dataset.reader[self.indices[i]]
            with file:
                image = read_image(file, self.dataset.input_img_mode)
        else:
            image, target = self.dataset[self.indices[i]]
            image = image.convert(self.dataset.input_img_mode)
        return self.transform(image), target


def create_parts(args: argparse.Namespace) -> Tuple[Part, Part, Optional[List[str]]]:
    """Open the images to train on, those to evaluate on, and the names of the classes if the data knows them.

    Where a folder of classes is split, the arguments record how: ``holdout_share`` and ``holdout_id``.
    """
    if is_flat(args):
        return split_flat(args)
    train_set = open_split(args, args.train_split)
    everything = range(len(train_set))
    names = class_names(train_set)
    if args.holdout:
        held_out = holdout_split(class_numbers(train_set), args.holdout)
        return Part(train_set, sorted(set(everything) - set(held_out))), Part(train_set, held_out), names
    eval_set = open_split(args, args.val_split)
    if class_names(eval_set) != names:
        here, there = set(map(printable, names or ())), set(map(printable, class_names(eval_set) or ()))
        raise UsageError('\n'.join([
            f'the splits {args.train_split!r} and {args.val_split!r} have different classes:',
            *(f'  only in {split}: {", ".join(sorted(only))}'
              for split, only in ((args.train_split, here - there), (args.val_split, there - here)) if only)]))
    return Part(train_set, everything), Part(eval_set, range(len(eval_set))), names


def is_flat(args: argparse.Namespace) -> bool:
    """Whether the data is a folder of classes: no folder in it is named like a split, in small or capital letters."""
    splits_are_named = any(getattr(args, name) != FLAGS[name].default for name in ('train_split', 'val_split'))
    if args.dataset or splits_are_named or not os.path.isdir(args.data_dir):
        return False
    return not any(name.lower() in TRAIN_SPLITS + EVAL_SPLITS for name in folders_in(args.data_dir))


def folders_in(folder: str) -> List[str]:
    """Names of the folders in a folder that are not hidden."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))


def split_flat(args: argparse.Namespace) -> Tuple[Part, Part, List[str]]:
    """Split the images of a folder of classes."""
    dataset, folder = open_folder(args, args.data_dir, flat=True), printable(args.data_dir)
    names, targets = class_names(dataset), class_numbers(dataset)
    check_class_names(names, folder)
    fingerprint = dataset.reader.fingerprint()
    if args.holdout_id not in ('', fingerprint):
        raise UsageError(
            f'{folder} holds other images than when the run began, so that those held out cannot be told: put them '
            f"back as they were, or start a new run (with --holdout-id '' if from this run's arguments)")
    if args.holdout:
        holdout_split(targets, args.holdout)  # raises if there are too few images
        args.holdout_share, args.holdout = args.holdout / len(targets), 0
    args.holdout_id = fingerprint
    held_out = share_split(targets, args.holdout_share, names)
    _logger.info(
        f'{folder}: {len(targets):,} images of {len(names)} classes; {len(held_out):,} of them, always the same, are '
        f'held out to evaluate on (--holdout-share {args.holdout_share:.3g})')
    return Part(dataset, sorted(set(range(len(targets))) - set(held_out))), Part(dataset, held_out), names


def check_class_names(names: Sequence[str], where: str) -> None:
    """Make sure that there are several classes, and no image outside of their folders."""
    if len(names) < 2 or '' in names:
        found = ', '.join(printable(name) for name in names if name) or 'none'
        loose = ', and images outside of these folders' if '' in names else ''
        raise UsageError(f'{where} must have a folder of images for each of several classes, and has {found}{loose}')


def open_folder(args: argparse.Namespace, folder: str, flat: bool = False) -> ImageDataset:
    """Open a folder of images."""
    return ImageDataset(folder, FolderReader(folder, flat), input_img_mode=input_mode(args))


def input_mode(args: argparse.Namespace) -> str:
    """Pillow's mode of the model's images."""
    return image_mode(args.input_size[0] if args.input_size else 3)


def open_split(args: argparse.Namespace, split: str) -> torch.utils.data.Dataset:
    """Open one split of the data."""
    source = args.dataset.partition('/')[0].lower()
    if args.dataset and (source == args.dataset.lower() or source not in SOURCES):
        raise UsageError(
            f'--dataset {args.dataset}: name it with its source, e.g. torch/cifar10 or hfds/uoft-cs/cifar10; for '
            'folders of images leave it out')
    if '[' in split and source != 'hfds':
        raise UsageError(f'{split!r}: only hfds/ data sets have parts of a split; --holdout evaluates on a part')
    if not args.dataset and not os.path.isdir(args.data_dir):
        raise UsageError(f'there is no folder {printable(args.data_dir)}')
    if not args.dataset:
        # Where a folder lacks the split, timm opens all of it, training and test images together.
        folder = _search_split(args.data_dir, split)
        if os.path.samefile(folder, args.data_dir):
            raise missing_split(args, split)
        return open_folder(args, folder)
    with explained(AssertionError, ImportError, RuntimeError, ValueError, of=f'--dataset {args.dataset}'):
        dataset = create_dataset(args.dataset, root=args.data_dir, split=split, download=args.dataset_download)
    dataset.input_img_mode = input_mode(args)  # torchvision's data sets have none
    if type(dataset) is ImageFolder and os.path.samefile(dataset.root, args.data_dir):  # all of the folder
        raise missing_split(args, split)
    # timm opens the test set of torchvision's data sets for every name of a split that it does not know.
    if getattr(dataset, 'train', None) is False and split not in EVAL_SPLITS:
        raise UsageError(f'{args.dataset} has no split {split!r}: it has train and validation')
    return dataset


def missing_split(args: argparse.Namespace, split: str) -> UsageError:
    found = ', '.join(map(printable, folders_in(args.data_dir))) or 'no folders'
    return UsageError(
        f'{printable(args.data_dir)} has no folder {split!r}: it has {found}. Expected are train/<class>/ and '
        'validation/<class>/ (or see --train-split, --val-split and --holdout); or a folder for each class, none with '
        f'a name like {", ".join(TRAIN_SPLITS + EVAL_SPLITS)}')


def class_names(dataset: torch.utils.data.Dataset) -> Optional[List[str]]:
    """Names of the classes in the order of their numbers."""
    classes = getattr(dataset, 'classes', None)
    if classes and not isinstance(classes[0], str):  # torchvision's ImageNet, where a class has several names
        return [', '.join(names) for names in classes]
    numbers = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return sorted(numbers, key=numbers.get) if numbers else None


def check_classes(model: nn.Module, names: Optional[Sequence[str]]) -> None:
    """Make sure that a trained model knows the classes of the data, in that order, as far as both have names."""
    known = model.pretrained_cfg.get('label_names')
    if known and names and list(known) != list(names):
        known, names = (', '.join(map(printable, each)) for each in (known, names))
        raise UsageError(f'the model tells {known} apart, the data has {names}')


def class_numbers(dataset: torch.utils.data.Dataset) -> List[int]:
    """The class of each image, without decoding it."""
    if hasattr(dataset, 'targets'):
        return [int(target) for target in dataset.targets]
    if hasattr(dataset, 'reader') and hasattr(dataset.reader, 'samples'):
        return [target for _, target in dataset.reader.samples]
    raise UsageError('--holdout needs a folder or a torch/ data set: this one does not list the classes of its images')


def holdout_split(targets: Sequence[int], count: int) -> List[int]:
    """Choose ``count`` of the images with these classes: the same fraction of each class, and always the same ones."""
    if not 0 < count < len(targets):
        raise UsageError(f'--holdout {count}: there are {len(targets)} training images')
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).tolist()
    by_class = sorted(shuffled, key=targets.__getitem__)  # stable, so still shuffled within a class
    return sorted(by_class[i * len(targets) // count] for i in range(count))


def share_split(targets: Sequence[int], share: float, names: Sequence[str]) -> List[int]:
    """Choose about that share of the images as `holdout_split` does, but at least one of each class, and never all."""
    count = min(max(round(share * len(targets)), 1), len(targets) - 1)
    held_out, classes = set(holdout_split(targets, count)), defaultdict(list)
    for i, target in enumerate(targets):
        classes[target].append(i)
    if single := [printable(names[target]) for target, images in classes.items() if len(images) < 2]:
        raise UsageError(
            f'one image to train on and one to evaluate on is the least, and there is only one of {", ".join(single)}')
    for images in classes.values():
        if held_out.isdisjoint(images):
            held_out.add(images[0])
        elif held_out.issuperset(images):
            held_out.remove(images[0])
    return sorted(held_out)


def fit_batch_size(args: argparse.Namespace, images: int, world_size: int) -> None:
    """Make batches no larger than the training images allow."""
    most = images // world_size
    if args.mixup or args.cutmix:
        most -= most % 2  # they pair the images
    if 0 < most < args.batch_size:
        _logger.info(f'{images} training images do not fill a batch of {args.batch_size}: --batch-size is now {most}')
        args.batch_size = most


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of all random choices of an epoch, which so depends on nothing else but the weights it starts with."""
    return seed + 10_007 * (epoch + 1)


class MemoryBatches:
    """Batches of images that are held in memory, cropped and flipped as tensors.

    The random choices of an epoch are drawn before its first batch, for all images and the same in all processes.

    Args:
        images: All images, uint8 (N, C, H, W).
        targets: Their classes (N).
        batch_size: Images of one batch of one process.
        train: Shuffle, crop and flip, leave out the last incomplete batch, and take this process's share.
        crop_padding: Width in pixels of the border that a crop may reach into.
        crop_padding_mode: ``constant``, a black border, or ``reflect``, the image mirrored at its edge.
        hflip: Probability of a horizontal flip.
        hflip_mode: ``random``, or ``alternate``, with which no two epochs in a row flip the same half of the images.
        vflip: Probability of a vertical flip.
    """

    def __init__(
            self,
            images: torch.Tensor,
            targets: torch.Tensor,
            batch_size: int,
            train: bool = False,
            crop_padding: int = 0,
            crop_padding_mode: str = 'constant',
            hflip: float = 0.,
            hflip_mode: str = 'random',
            vflip: float = 0.,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
    ):
        self.images, self.targets, self.batch_size, self.train = images, targets, batch_size, train
        self.crop_padding, self.crop_padding_mode = crop_padding, crop_padding_mode
        self.flips, self.hflip_mode = (hflip, vflip), hflip_mode
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        if self.train:
            return len(self.images) // (self.batch_size * self.world_size)
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        if not self.train:
            yield from zip(self.images.split(self.batch_size), self.targets.split(self.batch_size))
            return
        count, device = len(self.images), self.images.device
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(count, generator=generator)[:len(self) * self.batch_size * self.world_size]
        corner = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=generator).to(device)
        chance = torch.rand(count, 2, generator=generator)
        if self.hflip_mode == 'alternate':  # an image's chance is always the same, but moves by half in odd epochs
            first = torch.rand(count, generator=torch.Generator().manual_seed(self.seed))
            chance[:, 0] = (first + self.epoch % 2 / 2) % 1
        chance = chance.to(device)
        for i in order[self.rank::self.world_size].to(device).split(self.batch_size):
            # As floats: timm converts bytes on a CUDA stream of its own, and their memory may be reused before that.
            yield self._augment(self.images[i].float(), corner[i], chance[i]), self.targets[i]

    def _augment(self, images: torch.Tensor, corner: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        if self.crop_padding:
            height, width = images.shape[2:]
            padded = F.pad(images, [self.crop_padding] * 4, self.crop_padding_mode)
            crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of all crops
            images = crops[torch.arange(len(images), device=images.device), :, corner[:, 0], corner[:, 1]]
        for dim, flip, value in zip((3, 2), self.flips, chance.unbind(1)):
            if flip:
                images = torch.where(value[:, None, None, None] < flip, images.flip(dim), images)
        return images


def read_images(part: Part, transform: Callable, workers: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Decode all images of a part, uint8 (N, C, H, W), and their classes (N)."""
    _logger.info(f'reading {len(part):,} images into memory')
    part.transform = transform
    images = torch.empty(len(part), *part[0][0].shape, dtype=torch.uint8)
    targets = torch.empty(len(part), dtype=torch.long)
    batches, start = torch.utils.data.DataLoader(part, batch_size=32, num_workers=workers), 0
    for batch, classes in tqdm(batches, 'reading', unit='batch', leave=False, disable=not sys.stderr.isatty()):
        end = start + len(batch)
        images[start:end], targets[start:end] = batch, classes
        start = end
    return images, targets


def create_batches(
        part: Part,
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
        train: bool = False,
        rank: int = 0,
        world_size: int = 1,
):
    """Normalized batches on the device: from memory where the arguments allow it, else from timm's loader.

    Args:
        part: The images; those to evaluate on are this process's own.
        args: The trainer's arguments.
        data_config: From ``timm.data.resolve_data_config``.
        device: Where the batches go.
        train: Augment, shuffle, and share the images between the processes.
        rank: This process.
        world_size: Number of processes.
    """
    size, interpolation, crop_pct = (data_config[key] for key in ('input_size', 'interpolation', 'crop_pct'))
    normalize = dict(mean=data_config['mean'], std=data_config['std'], device=device)
    batch_size = args.batch_size if train else args.validation_batch_size or args.batch_size
    augment = train and not args.no_aug
    crop_padding = args.crop_padding if augment else None
    if crop_padding and args.crop_padding_mode == 'reflect' and crop_padding >= min(size[1:]):
        raise UsageError(f'--crop-padding {crop_padding}: images of {size[1]}x{size[2]} cannot be mirrored so far')
    erase = dict(re_prob=args.reprob, re_mode=args.remode, re_count=args.recount) if augment else {}
    # Crops are of the image that the evaluation sees; timm's training without augmentation distorts it to a square.
    plain = create_transform(
        size,
        is_training=train and crop_padding is None,
        no_aug=True,
        interpolation=interpolation,
        crop_pct=1. if train else crop_pct,
        use_prefetcher=True,
    )

    simple = not augment or (crop_padding is not None and not args.aa and not args.color_jitter)
    if args.cache and simple and len(part) * math.prod(size) < MEMORY_LIMIT:
        images, targets = read_images(part, plain, args.workers)
        batches = MemoryBatches(
            images.to(device),
            targets.to(device),
            batch_size,
            train=train,
            crop_padding=crop_padding or 0,
            crop_padding_mode=args.crop_padding_mode,
            hflip=args.hflip if augment else 0.,
            hflip_mode=args.hflip_mode,
            vflip=args.vflip if augment else 0.,
            seed=args.seed,
            rank=rank,
            world_size=world_size,
        )
        return PrefetchLoader(batches, channels=size[0], **normalize, **erase)

    if augment and args.hflip_mode == 'alternate':
        raise UsageError(
            '--hflip-mode alternate needs the training images in memory: with --cache, with --crop-padding (0 for no '
            f'crops), without --aa and --color-jitter, and less than {MEMORY_LIMIT >> 30} GB of them. Else choose '
            '--hflip-mode random')
    with explained(AssertionError, LookupError, ValueError, of=f'--aa {args.aa}'):
        loader = create_loader(
            part,
            size,
            batch_size,
            is_training=train,
            no_aug=not augment,
            train_crop_mode=args.train_crop_mode if crop_padding is None else 'rrc',
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=args.train_interpolation if augment and args.train_interpolation else interpolation,
            crop_pct=crop_pct,
            num_workers=args.workers,
            pin_memory=device.type == 'cuda',
            distributed=train and world_size > 1,
            persistent_workers=False,  # so that each epoch's begin with the epoch's seed
            **normalize,
            **erase,
        )
    if train and world_size > 1:
        loader.sampler.seed = args.seed
    if crop_padding is not None:  # instead of timm's first step, which is its crop
        crop = transforms.RandomCrop(size[1:], padding=crop_padding, padding_mode=args.crop_padding_mode)
        part.transform.transforms[:1] = [*plain.transforms[:-1], crop]
    return loader
