"""The trainer's arguments and recipes."""
import argparse
import difflib
import importlib.resources
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
import yaml
from timm.utils import ParseKwargs

from convnn_timm.errors import UserError

__all__ = ['UsageError', 'build_parser', 'defaults', 'find_recipe', 'parse_args', 'recipe_names']

EXAMPLES = """Train an image classifier. The flags are timm's; the new or different ones are explained.

    convnn-timm train -c finetune photos/
    convnn-timm train -c cifar10 --data-dir cifar10/
    convnn-timm train -c cifar10 --dataset torch/cifar10 --dataset-download --data-dir data/
    torchrun --nproc_per_node 2 -m convnn_timm train -c cifar10 --data-dir cifar10/
    convnn-timm train -c output/RUN/args.yaml --resume auto
    convnn-timm train --evaluate output/RUN
    convnn-timm train --model resnet50 --pretrained --convert 'where=layer3.*' branch_ratio=0.25 --data-dir flowers/
"""

_logger = logging.getLogger(__name__)

# Every flag with its default, timm's where timm has the flag; a type stands for no default.
ARGUMENTS = {
    'data': dict(
        data_dir=str, dataset='', dataset_download=False, train_split='train', val_split='validation', holdout=0,
        holdout_share=0.2, holdout_id='', cache=True, workers=min(4, os.cpu_count() or 1)),
    'model': dict(
        model='resnet50', model_kwargs={}, convert={}, pretrained=False, initial_checkpoint='', num_classes=int, gp=str,
        img_size=int, input_size=[int] * 3, crop_pct=float, mean=[float], std=[float], interpolation='', drop=0.,
        drop_path=float, grad_checkpointing=False, channels_last=False, torchcompile=str),
    'device': dict(device='cuda' if torch.cuda.is_available() else 'cpu', amp=False, amp_dtype='float16'),
    'optimizer': dict(
        batch_size=128, validation_batch_size=int, grad_accum_steps=1, opt='sgd', opt_eps=float, opt_betas=[float],
        opt_kwargs={}, momentum=0.9, weight_decay=2e-5, clip_grad=float, clip_mode='norm', layer_decay=float,
        layer_decay_min_scale=0., layer_decay_no_opt_scale=float),
    'schedule': dict(
        epochs=300, sched='cosine', sched_on_updates=False, lr=float, lr_base=0.1, lr_base_size=256, lr_base_scale='',
        lr_noise=[float], lr_noise_pct=0.67, lr_noise_std=1., lr_cycle_mul=1., lr_cycle_decay=0.5, lr_cycle_limit=1,
        lr_k_decay=1., warmup_lr=1e-5, warmup_epochs=5, warmup_prefix=False, min_lr=0., cooldown_epochs=0,
        decay_milestones=[90, 180, 270], decay_epochs=90., decay_rate=0.1),
    'augmentation and regularization': dict(
        no_aug=False, crop_padding=int, crop_padding_mode='constant', crop_off_epoch=0, train_sizes=[int],
        train_crop_mode=str, scale=[0.08, 1.], ratio=[3. / 4., 4. / 3.], hflip=0.5, hflip_mode='random', vflip=0.,
        color_jitter=0.4, aa=str, train_interpolation='random', reprob=0., remode='pixel', recount=1, mixup=0.,
        cutmix=0., mixup_prob=1., mixup_switch_prob=0.5, mixup_mode='batch', mixup_off_epoch=0, smoothing=0.1),
    'moving average of the weights': dict(model_ema=False, model_ema_decay=0.9998, model_ema_warmup=False),
    'run': dict(
        seed=42, output='output', experiment='', resume='', checkpoint_hist=10, log_interval=50),
}
HELP = dict(
    data_dir='folder with a folder of images for each class in it, or with train/<class>/ and validation/<class>/',
    dataset='another data set of timm, e.g. torch/cifar10',
    holdout='evaluate on this many images of the training set instead, the same for every seed; '
            'the validation set is not read',
    holdout_share='share of the images to evaluate on where DIR has a folder for each class only',
    holdout_id='of the names of those images, written by a run, which does not go on with others',
    cache='keep decoded images in memory if a split takes less than 1 GB and --crop-padding and flips are all '
          'that is done to them',
    model='a network of timm; `convnn-timm list` names those with ConvNN',
    model_kwargs='e.g. K=5 sampling_type=random num_samples=32',
    convert='replace convolutions of the model, after its weights are loaded: arguments of convnn_timm.convert, e.g. '
            'layer=convnn_branching where=layer3.*,layer4.* K=9',
    initial_checkpoint='weights to start from',
    num_classes='default: as many as the data has',
    input_size='channels height width; default: the model\'s',
    drop='dropout rate of the head',
    device='default: cuda if there is one, else cpu',
    batch_size='images per step and process; at most all training images',
    opt_kwargs='further arguments of the optimizer',
    lr='default: --lr-base times --batch-size / --lr-base-size',
    no_aug='no augmentation, whatever the other flags say',
    crop_padding='the CIFAR crop: pad by this many pixels, crop at random to the input size; replaces '
                 '--train-crop-mode, --scale and --ratio',
    crop_padding_mode='what those pixels are: black, or the image mirrored at its edges',
    crop_off_epoch='turn that crop off after this many epochs, so that the last ones see whole images; 0 never',
    hflip_mode='flip at random, or each image in every other epoch',
    train_sizes='side in pixels that the training images are shrunk to in the first epochs, one number for each; the '
                'epochs after them see the input size',
    model_ema='the average is what is evaluated and saved',
    experiment='folder in --output for the run; default: date and model',
    resume='checkpoint to continue, or auto: the last one in the run folder if there is one',
    checkpoint_hist='epochs to keep besides the last',
    log_interval='batches between two lines of progress',
)
SHORT = dict(batch_size='-b', validation_batch_size='-vb', workers='-j')
COUNT = dict(input_size=3, scale=2, ratio=2, model_kwargs='*', convert='+', opt_kwargs='*', torchcompile='?')
# What timm would refuse late, in words of its own, or not at all.
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
CHOICES = dict(
    interpolation=INTERPOLATIONS, amp_dtype=('float16', 'bfloat16'), clip_mode=('norm', 'value', 'agc'),
    lr_base_scale=('linear', 'sqrt'), train_crop_mode=('rrc', 'rkrc', 'rkrr'),
    train_interpolation=(*INTERPOLATIONS, 'random'), remode=('pixel', 'rand', 'const'),
    crop_padding_mode=('constant', 'reflect'), hflip_mode=('random', 'alternate'), mixup_mode=('batch', 'pair', 'elem'))
RANGES = {
    '1 or more': (lambda x: x >= 1, (
        'batch_size', 'checkpoint_hist', 'epochs', 'grad_accum_steps', 'log_interval', 'recount', 'train_sizes',
        'validation_batch_size')),
    '0 or more': (lambda x: x >= 0, (
        'crop_off_epoch', 'crop_padding', 'cutmix', 'holdout', 'mixup', 'seed', 'workers')),
    'from 0 to 1': (lambda x: 0 <= x <= 1, (
        'hflip', 'mixup_prob', 'mixup_switch_prob', 'model_ema_decay', 'reprob', 'vflip')),
    'more than 0 and less than 1': (lambda x: 0 < x < 1, ('holdout_share',)),
    '0 or more and less than 1': (lambda x: 0 <= x < 1, ('drop', 'drop_path', 'smoothing')),
    'more than 0 and at most 1': (lambda x: 0 < x <= 1, ('crop_pct',)),
}
# Recipe keys of timm's trainer that make no difference here, so that one recipe runs in both.
TIMM_ONLY = {'device_modules', 'dist_bn', 'eval_metric', 'no_prefetcher', 'pin_mem', 'worker_seeding'}


class UsageError(UserError):
    """Arguments, files or data that do not fit together; the message says what to do."""


def build_parser() -> argparse.ArgumentParser:
    """The trainer's arguments."""
    parser = argparse.ArgumentParser(
        prog='convnn-timm train',
        usage='convnn-timm train [-c RECIPE] [DIR] [FLAG ...]',
        description=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='recipe: a YAML file, or one of '
                        f'{", ".join(recipe_names())}; the command line overrides it')
    parser.add_argument('--evaluate', default='', metavar='RUN', help='only evaluate the finished run in this folder')
    parser.add_argument('data', nargs='?', metavar='DIR', help='same as --data-dir')
    for title, arguments in ARGUMENTS.items():
        group = parser.add_argument_group(title)
        for name, default in arguments.items():
            sample = default[0] if isinstance(default, list) else default
            kind, typed = kind_of(sample), isinstance(sample, type)
            text = HELP.get(name, '')
            if not (typed or default in ('', {}, False) or 'default' in text):
                text = f'{text} (default: {default})'.strip()
            options = dict(default=None if typed else default, help=text)
            if kind is bool:  # --amp and --no-amp, so that the command line can undo a recipe
                options['action'] = 'store_true' if name.startswith('no_') else argparse.BooleanOptionalAction
            elif kind is dict:
                options.update(action=ParseKwargs, metavar='KEY=VALUE')
            else:
                sort = {int: 'N', float: 'X', str: 'TEXT'}[kind]
                options.update(type=kind, metavar='|'.join(CHOICES.get(name, [sort])))
            if name in COUNT or isinstance(default, list):
                options['nargs'] = COUNT.get(name, '+')
            if name == 'torchcompile':
                options['const'] = 'inductor'
            group.add_argument(*filter(None, [SHORT.get(name)]), '--' + name.replace('_', '-'), **options)
            if name == 'no_aug':
                group.add_argument(
                    '--aug', dest=name, action='store_false', default=default, help='undoes --no-aug of a recipe')
    return parser


def defaults() -> Dict[str, Any]:
    """Every argument as it is by default: so were, in a run, those that its trainer did not know yet."""
    return vars(build_parser().parse_args([]))


def recipe_names() -> List[str]:
    """Names of the recipes in this package."""
    folder = importlib.resources.files(__package__) / 'recipes'
    return sorted(path.name.removesuffix('.yaml') for path in folder.iterdir() if path.name.endswith('.yaml'))


def find_recipe(name: str) -> Path:
    """The file ``name``, else the package's recipe of that name."""
    path = Path(name)
    if not path.is_file() and name.removesuffix('.yaml') in recipe_names():
        path = importlib.resources.files(__package__) / 'recipes' / (name.removesuffix('.yaml') + '.yaml')
    if not path.is_file():
        raise UsageError(f'no recipe {name!r}: neither a file nor one of {", ".join(recipe_names())}')
    return path


def read_recipe(name: str, known: Sequence[str]) -> Dict[str, Any]:
    """Read a recipe; its keys must be among ``known``."""
    try:
        recipe = yaml.safe_load(find_recipe(name).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f'recipe {name}: {" ".join(str(error).split())}') from error
    if not isinstance(recipe, dict):
        raise UsageError(f'recipe {name}: expected lines "argument: value"')
    for key in sorted(map(str, set(recipe) - set(known) - TIMM_ONLY)):
        close = difflib.get_close_matches(key, known, 1)
        raise UsageError(f'recipe {name}: unknown key {key!r}' + (f', did you mean {close[0]!r}?' if close else ''))
    for key in recipe:
        check_type(f'recipe {name}', key, recipe[key])
    return {key: value for key, value in recipe.items() if key in known}


def kind_of(default: Any) -> type:
    """Of a default value; a type stands for no default."""
    return default if isinstance(default, type) else type(default)


def check_type(source: str, key: str, value: Any) -> None:
    """What the parser makes of a text it also makes of a recipe's; the rest must have the right type already."""
    default = next((arguments[key] for arguments in ARGUMENTS.values() if key in arguments), None)
    kind = kind_of(default)
    each, count = kind_of(default[0]) if kind is list else None, COUNT.get(key)
    numbers = ' '.join(filter(None, [str(count or ''), 'integers' if each is int else 'numbers']))
    types, words = {
        bool: (bool, 'true or false'), dict: (dict, 'names with values'), list: (list, f'a list of {numbers}'),
        int: ((int, str), 'an integer'), float: ((int, float, str), 'a number'),
    }.get(kind, ((str, int, float), 'text'))
    fits = isinstance(value, types) and not (isinstance(value, bool) and kind in (int, float))
    if each and fits:
        fits = all(isinstance(number, (int, each)) for number in value) and count in (None, len(value))
    if default is not None and value is not None and not fits:
        raise UsageError(f'{source}: {key} must be {words}, not {value!r}')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line; it overrides the recipe, which overrides the defaults."""
    parser = build_parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('-c', '--config', default='')
    first.add_argument('--evaluate', default='')
    for name in 'experiment', 'img-size', 'input-size', 'model-kwargs', 'output', 'resume':
        first.add_argument('--' + name, nargs='*')
    given, _ = first.parse_known_args(argv)
    record = os.path.join(given.evaluate, 'args.yaml') if given.evaluate else ''
    if record and not os.path.isfile(record):
        raise UsageError(f'{given.evaluate} is no run folder: it has no args.yaml')
    if given.config or record:
        recipe = read_recipe(given.config or record, list(vars(parser.parse_args([]))))
        file = Path(given.config)
        if file.name == 'args.yaml' and given.resume == ['auto'] and not (given.experiment or given.output):
            folder = file.parent if file.parent.name else file.parent.resolve()
            recipe.update(output=str(folder.parent), experiment=folder.name)  # of the run, wherever it is now
        if given.model_kwargs is not None:
            names = [word.partition('=')[0] for word in given.model_kwargs]
            lost = [f'{key}={value}' for key, value in (recipe.get('model_kwargs') or {}).items() if key not in names]
            if lost:
                _logger.warning(f'--model-kwargs replaces those of the recipe, which had {" ".join(lost)} too')
        parser.set_defaults(**recipe)
    try:
        args = parser.parse_args(argv)
    except ValueError as error:
        parser.error(f'--model-kwargs, --opt-kwargs and --convert take KEY=VALUE ... ({error})')
    if given.img_size and not given.input_size and args.input_size:  # a recipe's, which timm prefers
        args.input_size = [args.input_size[0], args.img_size, args.img_size]
    args.data_dir = args.data or args.data_dir
    if not args.data_dir:
        parser.error(f'which images? --data-dir DIR, a {HELP["data_dir"]}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: there is none here; try --device cpu')
    if args.sched == 'plateau':
        parser.error('--sched plateau is not supported: it would fit the schedule to the images of the evaluation')
    check_values(parser, args)
    return args


def check_values(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values out of range, from wherever they come, before anything is made."""
    for name, valid in CHOICES.items():
        value = getattr(args, name)
        if value and value not in valid:
            parser.error(f'--{name.replace("_", "-")} must be one of {", ".join(valid)}, got {value}')
    for words, (fits, names) in RANGES.items():
        for name in names:
            value = getattr(args, name)
            if not all(number is None or fits(number) for number in (value if isinstance(value, list) else [value])):
                parser.error(f'--{name.replace("_", "-")} must be {words}, got {value}')
    if args.crop_off_epoch and args.crop_padding is None:
        parser.error('--crop-off-epoch turns off the crops of --crop-padding, which is not given')
    if args.opt_betas and len(args.opt_betas) < 2:
        parser.error(f'--opt-betas must be two numbers or more, got {args.opt_betas}')
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f'--mixup and --cutmix pair the images: --batch-size must be even, got {args.batch_size}')
