"""The trainer's arguments: one record for each flag, the command line, and recipes."""
import argparse
import difflib
import importlib.resources
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
import yaml
from timm.utils import ParseKwargs

from convnn_timm.errors import UserError

__all__ = [
    'FLAGS', 'Flag', 'UsageError', 'build_parser', 'complete', 'defaults', 'explained', 'find_recipe', 'parse_args',
    'places', 'recipe_names']

_logger = logging.getLogger(__name__)


class UsageError(UserError):
    """Arguments, files or data that do not fit together; the message says what to do."""


@contextmanager
def explained(*errors: Type[Exception], of: str = ''):
    """Around a call of a library that raises these errors for what the user can put right: say it in one line."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        message = ' '.join(str(error).split()) or type(error).__name__
        raise UsageError(f'{of}: {message}' if of else message) from error


# Which values a number may have: how it is said, and the test.
RANGES = {
    '0 or more': lambda x: x >= 0,
    '1 or more': lambda x: x >= 1,
    'more than 0': lambda x: x > 0,
    'from 0 to 1': lambda x: 0 <= x <= 1,
    'from 0 to 512': lambda x: 0 <= x <= 512,
    'from 0 to 2147483647': lambda x: 0 <= x < 2 ** 31,
    '0 or more and less than 1': lambda x: 0 <= x < 1,
    'more than 0 and at most 1': lambda x: 0 < x <= 1,
    'more than 0 and less than 1': lambda x: 0 < x < 1,
}
# What an argument is to a run.
TRAINING = 'training'  # it changes what is trained: it stays when a run is resumed, and cards compare it
SCHEDULE = 'schedule'  # likewise, but it may change epochs to come and leave alone those that are done
DRAWS = 'draws'  # it changes which random numbers are drawn: it stays when a run is resumed, and cards ignore it
PLACE = 'place'  # it changes where a run reads, writes and computes: free on resuming, and cards ignore it
CALL = 'call'  # it belongs to one call, not to the run, and is not recorded


@dataclass(frozen=True)
class Flag:
    """One argument of the trainer, on the command line and in recipes."""
    name: str
    default: Any = None  # timm's where timm has the argument
    kind: Optional[type] = None  # type of the value, or of each value of a list; by default that of the default
    help: str = ''
    within: str = ''  # a key of RANGES
    choices: Tuple[str, ...] = ()
    count: Union[int, str, None] = None  # number of values, or as in argparse
    role: str = TRAINING
    null: bool = False  # null has a meaning of its own, though the default is something
    short: str = ''
    const: Any = None  # value of the flag without a value

    def __post_init__(self):
        example = self.default[0] if isinstance(self.default, list) else self.default
        object.__setattr__(self, 'kind', self.kind or type(example))

    @property
    def option(self) -> str:
        return '--' + self.name.replace('_', '-')

    @property
    def is_list(self) -> bool:
        return self.count is not None and self.kind in (int, float)

    @property
    def may_be_nothing(self) -> bool:
        return self.null or not self.default

    def add_to(self, parser: argparse._ArgumentGroup) -> None:
        """Add the flag to the command line."""
        text = self.help
        if not (self.default is None or self.default in ('', {}, False) or 'default' in text):
            text = f'{text} (default: {self.default})'.strip()
        options = dict(default=self.default, help=text)
        if self.kind is bool:  # --amp and --no-amp, so that the command line can undo a recipe
            options['action'] = 'store_true' if self.name.startswith('no_') else argparse.BooleanOptionalAction
        elif self.kind is dict:
            options.update(action=ParseKwargs, metavar='KEY=VALUE')
        else:
            value = {int: 'N', float: 'X', str: 'TEXT'}[self.kind]
            options.update(type=self.kind, metavar='|'.join(self.choices or [value]))
        if self.count is not None:
            options['nargs'] = self.count
        if self.const is not None:
            options['const'] = self.const
        parser.add_argument(*filter(None, [self.short]), self.option, **options)

    def read(self, value: Any) -> Any:
        """Return a recipe's value as the parser takes it, or raise `UsageError`.

        A number may be text, which the parser reads like the command line's. Null is the default where that is nothing.
        """
        if value is None and self.may_be_nothing:
            return None if self.null else self.default
        if self.is_list:
            numbers = (int,) if self.kind is int else (int, float)
            fits = isinstance(value, list) and all(type(number) in numbers for number in value)
            fits = fits and (isinstance(self.count, str) or len(value) == self.count)
        else:
            types = {
                bool: (bool,), dict: (dict,), int: (int, str), float: (int, float, str), str: (str, int, float)}
            fits = type(value) in types[self.kind]
        if not fits:
            raise UsageError(f'{self.name} must be {self.words}, not {value!r}')
        return str(value) if self.kind is str else value

    @property
    def words(self) -> str:
        """What a recipe must say."""
        if self.is_list:
            number = f'{self.count} ' if isinstance(self.count, int) else ''
            return f'a list of {number}{"integers" if self.kind is int else "numbers"}'
        return {
            bool: 'true or false', dict: 'names with values', int: 'an integer', float: 'a number', str: 'text',
        }[self.kind]

    def check(self, value: Any) -> None:
        """Raise `UsageError` for a value out of range, wherever it comes from."""
        if self.choices and value not in self.choices and (value or not self.may_be_nothing):
            raise UsageError(f'{self.option} must be one of {", ".join(self.choices)}, got {value}')
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if self.within and not all(map(RANGES[self.within], numbers)):
            raise UsageError(f'{self.option} must be {self.within}, got {value}')


INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
# In the order of the help and of args.yaml.
GROUPS = {
    'data': [
        Flag('data_dir', kind=str, role=PLACE, help='folder with a folder of images for each class in it, or with '
             'train/<class>/ and validation/<class>/'),
        Flag('dataset', '', help='another data set of timm, e.g. torch/cifar10'),
        Flag('dataset_download', False, role=PLACE),
        Flag('train_split', 'train'),
        Flag('val_split', 'validation'),
        Flag('holdout', 0, within='0 or more', help='evaluate on this many images of the training set instead, the '
             'same for every seed; the validation set is not read'),
        Flag('holdout_share', 0.2, within='more than 0 and less than 1', help='share of the images to evaluate on '
             'where DIR has a folder for each class only'),
        Flag('holdout_id', '', help='of the names of those images, written by a run, which does not go on with others'),
        Flag('cache', True, role=DRAWS, help='keep decoded images in memory if a split takes less than 1 GB and '
             '--crop-padding and flips are all that is done to them'),
        Flag('workers', min(4, os.cpu_count() or 1), within='from 0 to 512', role=PLACE, short='-j'),
    ],
    'model': [
        Flag('model', 'resnet50', help='a network of timm; `convnn-timm list` names those with ConvNN'),
        Flag('model_kwargs', {}, count='*', help='e.g. K=5 sampling_type=random num_samples=32'),
        Flag('convert', {}, count='+', help='replace convolutions of the model, after its weights are loaded: '
             'arguments of convnn_timm.convert, e.g. layer=convnn_branching where=layer3.*,layer4.* K=9'),
        Flag('pretrained', False),
        Flag('initial_checkpoint', '', help='weights to start from'),
        Flag('num_classes', kind=int, within='0 or more', help='default: as many as the data has'),
        Flag('gp', kind=str),
        Flag('img_size', kind=int, within='1 or more'),
        Flag('input_size', kind=int, count=3, within='1 or more', help="channels height width; default: the model's"),
        Flag('crop_pct', kind=float, within='more than 0 and at most 1'),
        Flag('mean', kind=float, count='+'),
        Flag('std', kind=float, count='+', within='more than 0'),
        Flag('interpolation', '', choices=INTERPOLATIONS),
        Flag('drop', 0., within='0 or more and less than 1', help='dropout rate of the head'),
        Flag('drop_path', kind=float, within='0 or more and less than 1'),
        Flag('grad_checkpointing', False),
        Flag('channels_last', False),
        Flag('torchcompile', kind=str, count='?', const='inductor'),
    ],
    'device': [
        Flag('device', 'cuda' if torch.cuda.is_available() else 'cpu', role=PLACE,
             help='default: cuda if there is one, else cpu'),
        Flag('amp', False),
        Flag('amp_dtype', 'float16', choices=('float16', 'bfloat16')),
    ],
    'optimizer': [
        Flag('batch_size', 128, within='1 or more', short='-b', help='images per step and process; at most all '
             'training images'),
        Flag('validation_batch_size', kind=int, within='1 or more', short='-vb'),
        Flag('grad_accum_steps', 1, within='1 or more'),
        Flag('opt', 'sgd'),
        Flag('opt_eps', kind=float, within='0 or more'),
        Flag('opt_betas', kind=float, count='+', within='from 0 to 1'),
        Flag('opt_kwargs', {}, count='*', help='further arguments of the optimizer'),
        Flag('momentum', 0.9, within='0 or more'),
        Flag('weight_decay', 2e-5, within='0 or more'),
        Flag('clip_grad', kind=float, within='0 or more'),
        Flag('clip_mode', 'norm', choices=('norm', 'value', 'agc')),
        Flag('layer_decay', kind=float, within='0 or more'),
        Flag('layer_decay_min_scale', 0., within='0 or more'),
        Flag('layer_decay_no_opt_scale', kind=float, within='0 or more'),
    ],
    'schedule': [
        Flag('epochs', 300, within='1 or more', role=SCHEDULE),
        Flag('sched', 'cosine'),
        Flag('sched_on_updates', False),
        Flag('lr', kind=float, within='0 or more', help='default: --lr-base times --batch-size / --lr-base-size'),
        Flag('lr_base', 0.1, within='0 or more'),
        Flag('lr_base_size', 256, within='1 or more'),
        Flag('lr_base_scale', '', choices=('linear', 'sqrt')),
        Flag('lr_noise', kind=float, count='+', within='0 or more'),
        Flag('lr_noise_pct', 0.67, within='0 or more'),
        Flag('lr_noise_std', 1., within='0 or more'),
        Flag('lr_cycle_mul', 1., within='more than 0', role=SCHEDULE),
        Flag('lr_cycle_decay', 0.5, within='0 or more', role=SCHEDULE),
        Flag('lr_cycle_limit', 1, within='1 or more', role=SCHEDULE),
        Flag('lr_k_decay', 1., within='more than 0'),
        Flag('warmup_lr', 1e-5, within='0 or more'),
        Flag('warmup_epochs', 5, within='0 or more'),
        Flag('warmup_prefix', False),
        Flag('min_lr', 0., within='0 or more'),
        Flag('cooldown_epochs', 0, within='0 or more', role=SCHEDULE),
        Flag('decay_milestones', [90, 180, 270], count='+', within='0 or more', role=SCHEDULE),
        Flag('decay_epochs', 90., within='more than 0', role=SCHEDULE),
        Flag('decay_rate', 0.1, within='0 or more', role=SCHEDULE),
    ],
    'augmentation and regularization': [
        Flag('no_aug', False, help='no augmentation, whatever the other flags say'),
        Flag('crop_padding', kind=int, within='0 or more', help='the CIFAR crop: pad by this many pixels, crop at '
             'random to the input size; replaces --train-crop-mode, --scale and --ratio'),
        Flag('crop_padding_mode', 'constant', choices=('constant', 'reflect'), help='what those pixels are: black, or '
             'the image mirrored at its edges'),
        Flag('train_sizes', kind=int, count='+', within='1 or more', role=SCHEDULE, help='side in pixels that the '
             'training images are shrunk to in the first epochs, one number for each; the epochs after them see the '
             'input size'),
        Flag('train_crop_mode', kind=str, choices=('rrc', 'rkrc', 'rkrr')),
        Flag('scale', [0.08, 1.], count=2, within='more than 0', null=True),
        Flag('ratio', [3. / 4., 4. / 3.], count=2, within='more than 0', null=True),
        Flag('hflip', 0.5, within='from 0 to 1'),
        Flag('hflip_mode', 'random', choices=('random', 'alternate'), help='flip at random, or each image in every '
             'other epoch'),
        Flag('vflip', 0., within='from 0 to 1'),
        Flag('color_jitter', 0.4, within='0 or more', null=True),
        Flag('aa', kind=str),
        Flag('train_interpolation', 'random', choices=(*INTERPOLATIONS, 'random'), null=True),
        Flag('reprob', 0., within='from 0 to 1'),
        Flag('remode', 'pixel', choices=('pixel', 'rand', 'const')),
        Flag('recount', 1, within='1 or more'),
        Flag('mixup', 0., within='0 or more'),
        Flag('cutmix', 0., within='0 or more'),
        Flag('mixup_prob', 1., within='from 0 to 1'),
        Flag('mixup_switch_prob', 0.5, within='from 0 to 1'),
        Flag('mixup_mode', 'batch', choices=('batch', 'pair', 'elem')),
        Flag('mixup_off_epoch', 0, within='0 or more'),
        Flag('smoothing', 0.1, within='0 or more and less than 1'),
    ],
    'moving average of the weights': [
        Flag('model_ema', False, help='the average is what is evaluated and saved'),
        Flag('model_ema_decay', 0.9998, within='from 0 to 1'),
        Flag('model_ema_warmup', False),
    ],
    'run': [
        Flag('seed', 42, within='from 0 to 2147483647'),
        Flag('output', 'output', role=PLACE),
        Flag('experiment', '', role=PLACE, help='folder in --output for the run; default: date and model'),
        Flag('resume', '', role=CALL, help='checkpoint to continue, or auto: the last one in the run folder if there '
             'is one'),
        Flag('checkpoint_hist', 10, within='1 or more', role=PLACE, help='epochs to keep besides the last'),
        Flag('log_interval', 50, within='1 or more', role=PLACE, help='batches between two lines of progress'),
    ],
}
FLAGS = {flag.name: flag for flags in GROUPS.values() for flag in flags}

# Recipe keys of timm's trainer that make no difference here, so that one recipe runs in both.
TIMM_ONLY = {'device_modules', 'dist_bn', 'eval_metric', 'no_prefetcher', 'pin_mem', 'worker_seeding'}
# Arguments of earlier versions, which runs recorded, with the value that left them unused.
RETIRED = {'crop_off_epoch': 0}


def defaults() -> Dict[str, Any]:
    """Every argument as it is by default."""
    return {name: flag.default for name, flag in FLAGS.items()}


def places() -> Set[str]:
    """Names of the arguments that change where a run reads, writes and computes, not what it trains."""
    return {name for name, flag in FLAGS.items() if flag.role in (DRAWS, PLACE, CALL)}


def without_unused(recorded: Dict[str, Any]) -> Dict[str, Any]:
    """Leave out the `RETIRED` arguments that a run recorded and did not use."""
    return {name: value for name, value in recorded.items() if name not in RETIRED or value != RETIRED[name]}


def complete(recorded: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of a run; those that its trainer did not know yet were as they are by default."""
    return {**defaults(), **without_unused(recorded)}


def check_retired(source: str, arguments: Dict[str, Any]) -> None:
    """Refuse arguments that this version cannot follow."""
    for name in RETIRED.keys() & without_unused(arguments).keys():
        value = arguments[name]
        raise UsageError(f'{source}: {name} is {value!r}, an argument of earlier versions that this one lacks')


EXAMPLES = """Train an image classifier. The flags are timm's; the new or different ones are explained.

    convnn-timm train -c finetune photos/
    convnn-timm train -c cifar10 --data-dir cifar10/
    convnn-timm train -c cifar10 --dataset torch/cifar10 --dataset-download --data-dir data/
    torchrun --nproc_per_node 2 -m convnn_timm train -c cifar10 --data-dir cifar10/
    convnn-timm train -c output/RUN/args.yaml --resume auto
    convnn-timm train --evaluate output/RUN
    convnn-timm train --model resnet50 --pretrained --convert 'where=layer3.*' branch_ratio=0.25 --data-dir flowers/
"""


def build_parser() -> argparse.ArgumentParser:
    """The trainer's command line."""
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
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            flag.add_to(group)
            if flag.name == 'no_aug':
                group.add_argument(
                    '--aug', dest='no_aug', action='store_false', default=False, help='undoes --no-aug of a recipe')
    return parser


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


def read_recipe(name: str) -> Dict[str, Any]:
    """Read a recipe, or the arguments that a run recorded."""
    source = f'recipe {name}'
    with explained(OSError, UnicodeDecodeError, yaml.YAMLError, of=source):
        recipe = yaml.safe_load(find_recipe(name).read_text())
    if not isinstance(recipe, dict):
        raise UsageError(f'{source}: expected lines "argument: value"')
    check_retired(source, recipe)
    known = [*FLAGS, 'data']
    for key in sorted(map(str, recipe.keys() - known - TIMM_ONLY - RETIRED.keys())):
        close = difflib.get_close_matches(key, known, 1)
        raise UsageError(f'{source}: unknown key {key!r}' + (f', did you mean {close[0]!r}?' if close else ''))
    arguments = {'data_dir': recipe['data']} if recipe.get('data') else {}
    try:
        return arguments | {key: FLAGS[key].read(value) for key, value in recipe.items() if key in FLAGS}
    except UsageError as error:
        raise UsageError(f'{source}: {error}') from None


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line; it overrides the recipe, which overrides the defaults."""
    parser = build_parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('-c', '--config', default='')
    first.add_argument('--evaluate', default='')
    for name in 'experiment', 'img-size', 'input-size', 'model', 'model-kwargs', 'output', 'resume':
        first.add_argument('--' + name, nargs='*')
    given, _ = first.parse_known_args(argv)
    record = os.path.join(given.evaluate, 'args.yaml') if given.evaluate else ''
    if record and not os.path.isfile(record):
        raise UsageError(f'{given.evaluate} is no run folder: it has no args.yaml')
    if given.config or record:
        recipe = read_recipe(given.config or record)
        file = Path(given.config)
        if file.name == 'args.yaml' and given.resume == ['auto'] and not (given.experiment or given.output):
            folder = file.parent if file.parent.name else file.parent.resolve()
            recipe.update(output=str(folder.parent), experiment=folder.name)  # of the run, wherever it is now
        if given.model_kwargs is not None:
            names = [word.partition('=')[0] for word in given.model_kwargs]
            lost = [f'{key}={value}' for key, value in recipe.get('model_kwargs', {}).items() if key not in names]
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
    try:
        check_values(args)
    except UsageError as error:
        parser.error(str(error))
    if not (given.config or record or given.model):
        parser.error(
            'which network? -c NAME takes a recipe, such as finetune, which starts from the published weights; '
            '--model NAME trains another network (convnn-timm list)')
    return args


def check_values(args: argparse.Namespace) -> None:
    """Refuse values out of range and values that do not go together, before anything is made."""
    if not args.data_dir:
        raise UsageError(f'which images? --data-dir DIR, a {FLAGS["data_dir"].help}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise UsageError(f'--device {args.device}: there is none here; try --device cpu')
    if args.sched == 'plateau':
        raise UsageError('--sched plateau is not supported: it would fit the schedule to the images of the evaluation')
    for flag in FLAGS.values():
        flag.check(getattr(args, flag.name))
    if args.opt_betas and len(args.opt_betas) < 2:
        raise UsageError(f'--opt-betas must be two numbers or more, got {args.opt_betas}')
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UsageError(f'--mixup and --cutmix pair the images: --batch-size must be even, got {args.batch_size}')
