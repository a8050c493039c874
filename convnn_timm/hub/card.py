"""The model card of a published weight, made from the files beside it: no figure in it is typed by hand.

Results come from training/, sizes and costs from the model that config.json describes. This file computes the values,
card_template.md has the words between them.
"""
import inspect
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from convnn_timm.conversion import convert
from convnn_timm.layers import layer_arguments
from convnn_timm.layers.registry import REGISTRY
from convnn_timm.macs import count_macs, count_parameters
from convnn_timm.models._common import layer_of
from convnn_timm.models._weights import namespace
from convnn_timm.train.data import EVAL_SPLITS
from convnn_timm.train.flags import defaults
from .folder import CARD, build_model, read_config
from .markdown import code, printable, text
from .records import PLACES, Record, accuracy, compared, read_runs

__all__ = ['Card', 'read_card', 'write_card']

# Data sets of `--dataset torch/NAME`: identifier on the Hub, name, and the name of the evaluation split there.
DATASETS = {
    'cifar10': ('uoft-cs/cifar10', 'CIFAR-10', 'test'),
    'cifar100': ('uoft-cs/cifar100', 'CIFAR-100', 'test'),
    'imagenet': ('ILSVRC/imagenet-1k', 'ImageNet-1k', 'validation'),
}
# How an argument of a layer changes it from the paper's form, which is that of the defaults.
DEPARTURES = {
    ('sampling_type', 'random'): 'neighbours are searched among {num_samples} random positions',
    ('sampling_type', 'spatial'): 'neighbours are searched among a grid of {num_samples} x {num_samples} positions',
    ('neighbor_init', 'zero'):
        'the weights of the neighbours start at zero, those of the positions themselves at random',
    ('branch_mix', False): 'the branches stand side by side, no 1x1 convolution mixes them',
}
# Arguments that branching layers had when published runs were made, whose convolutions were given them too.
FORMER_BRANCHING = {'branch_norm', 'pointwise_init'}
CYCLES = ('lr_cycle_limit', 'lr_cycle_mul', 'lr_cycle_decay')  # of the schedule, which repeats after `epochs`
CROPS = ('crop_padding', 'crop_padding_mode')  # without crop_padding, the mode means nothing
SHOWN = (
    'opt', 'lr', 'momentum', 'weight_decay', 'batch_size', 'sched', 'epochs', *CYCLES, 'warmup_epochs', 'smoothing',
    'train_sizes', *CROPS, 'hflip', 'hflip_mode', 'mixup', 'cutmix', 'drop', 'clip_grad', 'amp_dtype', 'model_ema')
TEMPLATE = Path(__file__).with_name('card_template.md')




def useful(layer: str, arguments: Dict[str, Any]) -> Dict[str, Any]:
    """A model's arguments without those that only other layers use: its own layer ignores them."""
    ignored = {*layer_arguments()} - {*layer_arguments(layer)} if layer in REGISTRY else set()
    if 'branching' not in layer:
        ignored |= FORMER_BRANCHING
    return {name: value for name, value in arguments.items() if name not in ignored}


@dataclass
class Card:
    """The values in a card, computed from the files that it is made from."""
    name: str
    config: Dict[str, Any]
    evaluation: Dict[str, Any]
    runs: List[Record]  # the run that made the weights, then its repetitions with other seeds
    twins: List[Record]  # the runs of the convolution twin, if there is one
    recipe: Optional[Dict[str, Any]]

    @cached_property
    def model(self) -> nn.Module:
        return build_model(self.config, 'meta').eval()  # only shapes are needed

    @property
    def layer(self) -> str:
        """What replaces the 3x3 convolutions: a layer of the registry, or 'converted' in another network."""
        return layer_of(self.config['architecture'])

    @property
    def kind(self) -> str:
        """What distinguishes the model from other image classifiers."""
        known = REGISTRY.get(self.layer)
        return known.kind if known else 'whose convolutions ConvNN layers replaced'

    @property
    def layer_args(self) -> Dict[str, Any]:
        """The model's arguments that its layers use."""
        known = layer_arguments(self.layer) if self.layer in REGISTRY else ()
        return {name: value for name, value in self.config.get('model_args', {}).items() if name in known}

    @property
    def has_name(self) -> bool:
        """Whether the architecture's name alone creates this network, so that the weights load by name."""
        if self.layer == 'converted':
            return False
        named = timm.create_model(
            self.config['architecture'], device='meta', num_classes=self.model.num_classes, in_chans=self.size[0])
        return str(named) == str(self.model)

    @property
    def run(self) -> Record:
        return self.runs[0]

    @property
    def size(self) -> List[int]:
        return self.config['pretrained_cfg']['input_size']

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @cached_property
    def macs(self) -> int:
        return count_macs(self.model, tuple(self.size))

    @property
    def arguments(self) -> List[str]:
        given = useful(self.layer, self.config.get('model_args', {}))
        return [code(f'{key}={value}') for key, value in given.items()]

    @property
    def form(self) -> str:
        """How the model's layers differ from the paper's."""
        known = REGISTRY.get(self.layer)
        if known is None:
            return 'as the arguments say'
        if not known.is_own:
            return 'convolutions of PyTorch'
        parameters, given = inspect.signature(known.cls).parameters, self.layer_args
        changes = []
        for name, value in given.items():
            if words := DEPARTURES.get((name, value)):
                changes.append(words.format(**given))
            elif value != parameters[name].default and name != 'num_samples':
                changes.append(f'`{name}` is {value}, not {parameters[name].default}')
        standard = 'as in the paper, with its standard arguments'
        return f'{standard}, except that {"; ".join(changes)}' if changes else standard

    @cached_property
    @torch.no_grad()
    def shapes(self) -> Dict[str, Any]:
        """Shapes of the model's outputs for two images."""
        features, maps = self.model.forward_intermediates(torch.zeros(2, *self.size, device='meta'))
        return dict(
            features=tuple(features.shape),
            embeddings=tuple(self.model.forward_head(features, pre_logits=True).shape),
            maps=[tuple(feature.shape) for feature in maps])

    @cached_property
    def dataset(self) -> Tuple[str, str, str]:
        """Identifier on the Hub or '', name, and evaluation split or '' for images held out of the training folder.

        They are those that `export` was given, else the run's.
        """
        args, told = self.run.args, self.evaluation
        source, _, given = args['dataset'].partition('/')
        hub_id = given if source.lower() == 'hfds' and given.count('/') == 1 else ''
        folder, split = Path(args['data_dir']).name, '' if args['holdout_id'] else told['split']
        name = given or (f'the folder {folder}' if folder else 'a folder')
        if source.lower() == 'torch' and given.lower() in DATASETS:
            hub_id, name, own_split = DATASETS[given.lower()]
            split = own_split if split in EVAL_SPLITS else split
        if told.get('dataset_id'):
            hub_id = told['dataset_id']
            name = next((known for id, known, _ in DATASETS.values() if id == hub_id), hub_id)
        return hub_id, told.get('dataset_name') or name, told.get('dataset_split') or split

    @property
    def data(self) -> str:
        note = self.evaluation['note']
        return f'{self.dataset[1]} ({note})' if note else self.dataset[1]

    @property
    def changed(self) -> List[str]:
        """The run's arguments that differ from its recipe."""
        args = self.run.args
        expected = {**defaults(), **self.recipe, 'num_classes': args['num_classes']}  # which the data tell
        return [
            code(f'{key}: {value}') for key, value in args.items() if key not in PLACES and value != expected.get(key)]

    @property
    def shown(self) -> Dict[str, Any]:
        """The arguments that the card lists."""
        args = self.run.args
        unused = {None, False} if args['amp'] else {None, False, args['amp_dtype']}
        silent = {*(CYCLES if args['lr_cycle_limit'] <= 1 else ()), *(() if args['crop_padding'] else CROPS)}
        values = {key: args[key] for key in SHOWN if key not in silent}
        values = {key: ' '.join(map(str, v)) if isinstance(v, list) else v for key, v in values.items()}
        return {key: text(value) for key, value in values.items() if value not in unused}

    @property
    def differences(self) -> List[str]:
        """The arguments in which the twin's training differs."""
        here, there = self.run.args, self.twins[0].args
        keys = {*here, *there} - PLACES - {'model', 'model_kwargs', 'convert'}
        return [
            f'`{key}`: {text(here.get(key))} here, {text(there.get(key))} there'
            for key in sorted(keys) if here.get(key) != there.get(key)]

    @cached_property
    def timed(self) -> Optional[Tuple[Record, Record]]:
        """A run and a twin whose speeds compare; None without any."""
        return compared(self.runs, self.twins)

    @property
    def step_time(self) -> str:
        """Time of a training step as a multiple of the twin's; a dash if they do not compare."""
        return f'{self.timed[1].speed / self.timed[0].speed:.1f} x' if self.timed else '–'

    @property
    def comparison(self) -> List[Tuple[Any, ...]]:
        """Rows of the model and its twin."""
        twin, size = twin_model(self.twins[0].args)
        return [
            comparison_row(self.runs, self.parameters, self.macs, self.step_time),
            comparison_row(self.twins, count_parameters(twin), count_macs(twin, size), '1' if self.timed else '–')]


def comparison_row(runs: Sequence[Record], parameters: int, macs: int, step_time: str) -> Tuple[Any, ...]:
    args = runs[0].args
    arguments = useful(layer_of(args['model']), {**args['model_kwargs'], **args['convert']})
    return (
        code(args['model']), code(' '.join(f'{key}={value}' for key, value in arguments.items())) if arguments else '',
        ', '.join(str(run.args['seed']) for run in runs), runs[0].epochs, accuracy(runs), accuracy(runs, 'eval_top5'),
        f'{parameters / 1e6:.2f}', f'{macs / 1e9:.4f}', step_time)


def twin_model(args: Dict[str, Any]) -> Tuple[nn.Module, Tuple[int, ...]]:
    """The model that a run's arguments describe, without memory for its weights, and its input size."""
    kwargs = useful(layer_of(args['model']), args['model_kwargs'])
    if args['input_size']:
        kwargs['in_chans'] = args['input_size'][0]
    model = timm.create_model(args['model'], device='meta', num_classes=args['num_classes'], **kwargs)
    if args['convert']:
        convert(model, **args['convert'])
    return model, timm.data.resolve_data_config(args, model=model)['input_size']


def read_card(folder: Path, name: str) -> Card:
    """Read what a card is made from.

    Args:
        folder: The folder of a published weight.
        name: Name of the weight, `<arch>.<tag>`.
    """
    twin, recipe = folder / 'training' / 'twin', folder / 'training' / 'recipe.yaml'
    return Card(
        name=name,
        config=read_config(folder),
        evaluation=json.loads((folder / 'training' / 'evaluation.json').read_text()),
        runs=read_runs(folder / 'training'),
        twins=read_runs(twin) if twin.is_dir() else [],
        recipe=yaml.safe_load(recipe.read_text()) if recipe.is_file() else None,
    )


def write_card(folder: Path, name: str) -> None:
    """Write README.md into the folder of a published weight, which holds everything else."""
    card = read_card(folder, name)
    made = ModelCard.from_template(
        metadata(card), template_path=str(TEMPLATE), card=card,
        link=f'hf-hub:{namespace()}/{name}', accuracy=accuracy, text=text, code=code)
    (folder / CARD).write_text(f'{made.content}\n', encoding='utf-8')


def metadata(card: Card) -> ModelCardData:
    measured = card.evaluation[card.evaluation['stored']]
    dataset_id, name, split = card.dataset
    return ModelCardData(
        license=card.config['pretrained_cfg'].get('license'),
        base_model=card.evaluation.get('base_model'),
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'convnn'],
        datasets=[dataset_id] if dataset_id else None,
        metrics=['accuracy'],
        model_name=card.name,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset_id or (printable(name) if card.run.args['dataset'] else 'imagefolder'),
                dataset_name=printable(card.data),
                dataset_split=split or None,
                metric_type='accuracy',
                metric_name=label,
                metric_value=round(measured[key], 2),
            )
            for label, key in (('top-1', 'top1'), ('top-5', 'top5'))],
    )
