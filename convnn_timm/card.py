"""The model card of a published weight, made from the files beside it: no figure in it is typed by hand.

The figures come from training/ (what the run, its repetitions with other seeds and its twin recorded, and
evaluation.json), sizes and costs from the model that config.json describes.
"""
import inspect
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCardData

from .conversion import convert
from .layers import LAYER_TYPES, layer_arguments
from .macs import count_macs, count_parameters
from .models._weights import WeightsError, namespace
from .train_args import defaults
from .train_folder import FREE_ON_RESUME, NOT_RECORDED, read_summary

__all__ = [
    'PLACES', 'Card', 'Record', 'accuracy', 'build_model', 'compared', 'machine_name', 'read_card', 'read_config',
    'write_card']

# Data sets by what the tag begins with, before an underscore: identifier on the Hub, name, and what the split to
# evaluate on is called there.
DATASETS = {
    'cifar10': ('uoft-cs/cifar10', 'CIFAR-10', 'test'),
    'cifar100': ('uoft-cs/cifar100', 'CIFAR-100', 'test'),
    'in1k': ('ILSVRC/imagenet-1k', 'ImageNet-1k', 'validation'),
}
# Models by the layer in their name.
KINDS = {
    'conv2d': 'with convolutions, the baseline of the ConvNN models',
    'conv2d_new': 'with convolutions that can see coordinates',
    'convnn': 'whose layers convolve over the most similar positions of the map (ConvNN)',
    'convnn_attn': 'whose layers attend to the most similar positions of the map (ConvNN attention)',
    'convnn_branching': 'whose layers join a convolution with one over the most similar positions of the map (ConvNN)',
    'convnn_branching_attn': 'whose layers join a convolution with attention to the most similar positions (ConvNN)',
    'converted': 'whose convolutions ConvNN layers replaced',
}
# What arguments of a layer change in the form that it has in the paper, which is that of its defaults.
DEPARTURES = {
    ('sampling_type', 'random'): 'neighbours are searched among {num_samples} random positions',
    ('sampling_type', 'spatial'): 'neighbours are searched among a grid of {num_samples} x {num_samples} positions',
    ('neighbor_init', 'zero'):
        'the weights of the neighbours start at zero, those of the positions themselves at random',
    ('branch_norm', True): 'the outputs of both branches are normalised before they are mixed',
    ('branch_mix', False): 'the branches stand side by side, no 1x1 convolution mixes them',
    ('pointwise_init', 'identity'): 'the 1x1 convolution that mixes the branches starts as the identity',
    ('pointwise_init', 'zero'): "the 1x1 convolution that mixes the branches starts without ConvNN's outputs",
}
# Arguments that change where a run reads, writes and computes, not what. (Without cache the crops are others, of the
# same kind.)
PLACES = {'cache', *FREE_ON_RESUME, *NOT_RECORDED}
CYCLES = ('lr_cycle_limit', 'lr_cycle_mul', 'lr_cycle_decay')  # of the schedule, which repeats after `epochs`
CROPS = ('crop_padding', 'crop_padding_mode', 'crop_off_epoch')  # the last two mean nothing without the first
SHOWN = (
    'opt', 'lr', 'momentum', 'weight_decay', 'batch_size', 'sched', 'epochs', *CYCLES, 'warmup_epochs', 'smoothing',
    'train_sizes', *CROPS, 'hflip', 'hflip_mode', 'mixup', 'cutmix', 'drop', 'clip_grad', 'amp_dtype', 'model_ema')
CITATION = r"""@article{kang2025attention,
  title   = {Attention Via Convolutional Nearest Neighbors},
  author  = {Kang, Mingi and Farias Sales Rocha Neto, Jeov{\'a}},
  journal = {arXiv preprint arXiv:2511.14137},
  year    = {2025}
}"""


def read_config(folder: Path) -> Dict[str, Any]:
    """The folder's config.json."""
    file = folder / 'config.json'
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f'{file} is damaged: {error}') from error


def build_model(config: Dict[str, Any], device: str = 'cpu') -> nn.Module:
    """The model that a config.json describes, with its weights as drawn."""
    return timm.create_model(config['architecture'], device=device, **config.get('model_args', {}))


class Record:
    """What a run recorded: its arguments, the rows of its summary, its environments, those of resumed parts last."""

    def __init__(self, folder: Path):
        later = sorted(folder.glob('environment-*.json'), key=lambda file: int(file.stem.partition('-')[2]))
        files = [folder / 'environment.json', *later]
        self.args = {**defaults(), **yaml.safe_load((folder / 'args.yaml').read_text())}
        self.summary = read_summary(folder)
        self.environments = [json.loads(file.read_text()) for file in files]

    def last(self, column: str) -> float:
        return float(self.summary[-1][column])

    @property
    def epochs(self) -> int:
        return int(self.last('epoch')) + 1

    @property
    def images(self) -> int:
        """How many images it was evaluated on."""
        return int(float(self.summary[-1]['eval_images']))

    @property
    def speed(self) -> float:
        """Images a second in training, in the median epoch of full-size images: other programs may have slowed some."""
        rows = self.summary[len(self.args['train_sizes'] or ()):] or self.summary
        return median(float(row['train_images_per_s']) for row in rows)

    def epoch_seconds(self, images: int) -> float:
        """Seconds that an epoch of so many images takes in training, at that speed."""
        return images / self.speed

    @property
    def machine(self) -> str:
        return ', then '.join(dict.fromkeys(map(machine_name, self.environments)))


def read_runs(folder: Path) -> List[Record]:
    """What is recorded of a training in a folder, and of its repetitions in the folder's seeds/."""
    repetitions = sorted((folder / 'seeds').glob('*'), key=lambda path: int(path.name))
    return [Record(path) for path in (folder, *repetitions)]


def compared(runs: Sequence[Record], twins: Sequence[Record]) -> Tuple[Record, Record]:
    """A run and a twin whose speeds compare, if there are such: of the same seed, on the same machine."""
    same = ((run, twin) for run in runs for twin in twins
            if run.args['seed'] == twin.args['seed'] and run.machine == twin.machine)
    return next(same, (runs[0], twins[0]))


def accuracy(runs: Sequence[Record], column: str = 'eval_top1') -> str:
    """What runs recorded after their last epoch: mean, and sample standard deviation if they are several."""
    values = [run.last(column) for run in runs]
    return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def layer_of(architecture: str) -> str:
    """The layer in a model's name, a key of `KINDS`."""
    return architecture.partition('_')[2].removesuffix('_224')


def useful(layer: str, arguments: Dict[str, Any]) -> Dict[str, Any]:
    """A model's arguments without those of other layers, which its own take and ignore."""
    ignored = {*layer_arguments()} - {*layer_arguments(layer)} if layer in LAYER_TYPES else ()
    return {name: value for name, value in arguments.items() if name not in ignored}


def machine_name(environment: Dict[str, Any]) -> str:
    """The processor that an environment.json names."""
    threads, capability = environment['threads'], environment.get('cpu_capability')
    vectors = f' with {capability}' if capability else ''
    if environment.get('cpu_amx'):
        vectors += ' and AMX'
    return environment['gpu'] or f'{environment["cpu"]}{vectors}, {threads} thread{"s" if threads > 1 else ""}'


@dataclass
class Card:
    """The files that the card is made from."""
    name: str
    config: Dict[str, Any]
    evaluation: Dict[str, Any]
    runs: List[Record]  # that which made the weights, and its repetitions with other seeds
    twins: List[Record]  # the same of the convolution, if there is one
    recipe: Optional[Dict[str, Any]]

    @cached_property
    def model(self) -> nn.Module:
        return build_model(self.config, 'meta').eval()  # shapes without memory

    @property
    def layer(self) -> str:
        """What stands for the 3x3 convolutions, a key of `KINDS`."""
        return layer_of(self.config['architecture'])

    @property
    def layer_args(self) -> Dict[str, Any]:
        """Those of the model's arguments that its layers have a use for."""
        known = layer_arguments(self.layer) if self.layer in LAYER_TYPES else ()
        return {name: value for name, value in self.config.get('model_args', {}).items() if name in known}

    @property
    def run(self) -> Record:
        return self.runs[0]

    @property
    def size(self) -> List[int]:
        return self.config['pretrained_cfg']['input_size']

    @property
    def on_the_hub(self) -> Tuple[str, str, str]:
        """The data set, as in `DATASETS`."""
        tag = self.evaluation['tag']
        return DATASETS.get(tag.partition('_')[0], (tag, tag, self.evaluation['split']))

    @property
    def dataset(self) -> str:
        return self.on_the_hub[1]

    @property
    def data(self) -> str:
        note = self.evaluation['note']
        return f'{self.dataset} ({note})' if note else self.dataset


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
    parts = [f'---\n{metadata(card).to_yaml()}\n---', f'# Model card for {name}']
    parts += [section(card) for section in (details, usage, training, evaluation, limitations)]
    parts += [f'## Citation\n\n```bibtex\n{CITATION}\n```']
    (folder / 'README.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')


def metadata(card: Card) -> ModelCardData:
    measured = card.evaluation[card.evaluation['stored']]
    dataset_id, _, split = card.on_the_hub
    return ModelCardData(
        license=card.config['pretrained_cfg'].get('license') or 'mit',  # a converted network keeps its own
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'convnn'],
        datasets=[dataset_id] if '/' in dataset_id else None,
        metrics=['accuracy'],
        model_name=card.name,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset_id,
                dataset_name=card.data,
                dataset_split=split,
                metric_type='accuracy',
                metric_name=label,
                metric_value=round(measured[key], 2),
            )
            for label, key in (('top-1', 'top1'), ('top-5', 'top5'))],
    )


def details(card: Card) -> str:
    channels, height, width = card.size
    names = card.config.get('label_names')
    arguments = ', '.join(
        f'`{key}={value}`' for key, value in useful(card.layer, card.config.get('model_args', {})).items())
    speed = card.evaluation['inference']
    return f"""An image classifier for timm, {KINDS[card.layer]}. Trained on {card.data}.

## Model Details

- **Model type:** image classification, feature backbone
- **Parameters (M):** {count_parameters(card.model) / 1e6:.2f}
- **GMACs:** {count_macs(card.model, tuple(card.size)) / 1e9:.4f}, every operator counted
- **Image size:** {height} x {width}, {channels} channels
- **Classes:** {card.model.num_classes}{f': {", ".join(names)}' if names else ''}
- **Architecture:** `{card.config["architecture"]}`, {arguments or "no arguments"}
- **Layers:** {form(card)}
- **Inference:** {speed["images_per_s"]:.0f} images/s, float32, batches of {speed["batch_size"]}, on {speed["machine"]}
- **Weights:** {card.evaluation["stored"]}, safetensors
- **Paper:** Attention Via Convolutional Nearest Neighbors: https://arxiv.org/abs/2511.14137
- **Original:** https://github.com/mingikang31/Convolutional-Nearest-Neighbor"""


def form(card: Card) -> str:
    """In which form the model has its layers, in a sentence."""
    if card.layer == 'conv2d':
        return 'convolutions of PyTorch'
    if card.layer not in LAYER_TYPES:
        return 'as the arguments say'
    parameters, given = inspect.signature(LAYER_TYPES[card.layer]).parameters, card.layer_args
    if not given.get('branch_mix', True):  # then there is nothing that it would start
        given = {name: value for name, value in given.items() if name != 'pointwise_init'}
    changes = []
    for name, value in given.items():
        if text := DEPARTURES.get((name, value)):
            changes.append(text.format(**given))
        elif value != parameters[name].default and name != 'num_samples':
            changes.append(f'`{name}` is {value}, not {parameters[name].default}')
    return 'as in the paper, with its standard arguments' + (f', except that {"; ".join(changes)}' if changes else '')


def usage(card: Card) -> str:
    name, (channels, height, width) = card.name, card.size
    grey = ".convert('L')" if channels == 1 else ''
    label = "model.pretrained_cfg['label_names'][index]" if card.config.get('label_names') else 'index.item()'
    images = torch.zeros(2, channels, height, width, device='meta')
    with torch.no_grad():
        features = card.model.forward_features(images)
        embeddings = card.model.forward_head(features, pre_logits=True)
        maps = card.model.forward_intermediates(images, intermediates_only=True)
    listed = '\n'.join(f'#   {tuple(feature.shape)}' for feature in maps)
    source = f'hf-hub:{namespace()}/{name}'
    if card.layer == 'converted':
        where, name = 'It rebuilds the network from its base and the conversion.', source
    else:
        where = f'A version of it that does not know the name of these weights loads them as `{source}`.'
    return f"""## Model Usage

The architecture is in the package `convnn_timm`, which must be installed.
{where}

### Image Classification

```python
import convnn_timm  # registers the architecture with timm
import timm
import torch
from PIL import Image
from skimage.data import chelsea

model = timm.create_model('{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

image = Image.fromarray(chelsea()){grey}  # a cat; or Image.open(...)
with torch.no_grad():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=-1)[0]

for probability, index in zip(*probabilities.topk({min(5, card.model.num_classes)})):
    print(f'{{100 * probability:5.1f}} %', {label})
```

### Feature Map Extraction

```python
import convnn_timm
import timm
import torch

model = timm.create_model('{name}', pretrained=True, features_only=True).eval()

for feature in model(torch.randn(2, {channels}, {height}, {width})):
    print(tuple(feature.shape))

{listed}
```

### Image Embeddings

```python
import convnn_timm
import timm
import torch

model = timm.create_model('{name}', pretrained=True, num_classes=0).eval()  # without the classifier

images = torch.randn(2, {channels}, {height}, {width})
embeddings = model(images)  # {tuple(embeddings.shape)}
features = model.forward_features(images)  # {tuple(features.shape)}, before the pooling
```"""


def training(card: Card) -> str:
    args, environment = card.run.args, card.run.environments[0]
    on = f'On {card.data}'
    if args['holdout']:
        on += f', without {args["holdout"]} of the training images, which were held out'
    if card.recipe:
        expected = {**defaults(), **card.recipe, 'num_classes': args['num_classes']}  # which come from the data
        changed = [
            f'`{key}: {value}`' for key, value in args.items() if key not in PLACES and value != expected.get(key)]
        on += f', by training/recipe.yaml {"with " + ", ".join(changed) if changed else "unchanged"}'
    if args['initial_checkpoint']:
        on += f', from the weights in `{Path(args["initial_checkpoint"]).name}`'
    elif args['pretrained']:
        on += f', from the pretrained weights of `{args["model"]}`'
    unused = {None, False} if args['amp'] else {None, False, args['amp_dtype']}
    silent = {*(CYCLES if args['lr_cycle_limit'] <= 1 else ()), *(() if args['crop_padding'] else CROPS)}
    keys = [key for key in SHOWN if key not in silent]
    shown = {key: ' '.join(map(str, value)) if isinstance(value := args[key], list) else value for key in keys}
    rows = '\n'.join(f'| {key} | {value} |' for key, value in shown.items() if value not in unused)
    versions = ', '.join(f'{name} {environment[name]}' for name in ('timm', 'torch', 'convnn_timm'))
    commits = dict.fromkeys(
        e['commit'] + (' with uncommitted changes' if e['uncommitted_changes'] else '')
        for e in card.run.environments if e['commit'])
    commit = f' at commit {", then ".join(commits)}' if commits else ''
    small = ' of full-size images' if args['train_sizes'] else ''
    return f"""## Training

{on}. All arguments are in training/args.yaml, the epochs in training/summary.csv and training/curve.png.

| argument | value |
|---|---|
{rows}

- **Machine:** {card.run.machine}: {card.run.speed:.0f} images/s in training, in the median epoch{small}
- **Software:** {versions}{commit}
- **Command:** `{environment["command"]}`
- **To repeat it:** `convnn-timm train -c training/args.yaml --data-dir DIR`, with all arguments as they were"""


def evaluation(card: Card) -> str:
    measured, stored = card.evaluation, card.evaluation['stored']
    rows = '\n'.join(
        f'| {precision}{", these" if precision == stored else ""} | {measured[precision]["top1"]:.2f} '
        f'| {measured[precision]["top5"]:.2f} | {measured[precision]["loss"]:.4f} |'
        for precision in ('float32', 'float16'))
    split = card.on_the_hub[2]
    return f"""## Evaluation

On all {measured[stored]["images"]:,} images of the split `{split}` of {card.data}, mean over the images.
The weights are those of the last epoch ({card.run.epochs}), not of the best one; seed {card.run.args["seed"]}.

| weights | top-1 | top-5 | loss |
|---|---|---|---|
{rows}

{seeds(card)}{comparison(card)}"""


def seeds(card: Card) -> str:
    """How much the result depends on the seed, as the runs recorded it."""
    if len(card.runs) == 1:
        return 'This is one run with 1 seed: how far others would differ from it was not measured.'
    rows = '\n'.join(
        f'| {run.args["seed"]} | {run.last("eval_top1"):.2f} | {run.last("eval_top5"):.2f} |' for run in card.runs)
    return f"""### Seeds

The same training with {len(card.runs)} seeds, as recorded after the last epoch{held_out(card.run)}.
Top-1, mean and sample standard deviation: **{accuracy(card.runs)}**.

| seed | top-1 | top-5 |
|---|---|---|
{rows}"""


def held_out(run: Record) -> str:
    return ', on images held out of the training set' if run.args['holdout'] else ''


def comparison(card: Card) -> str:
    """The twin's figures beside the model's, both as their runs recorded them."""
    if not card.twins:
        return ''
    run, twin = card.run, card.twins[0]
    keys = {*run.args, *twin.args} - PLACES - {'model', 'model_kwargs', 'convert'}
    different = [
        f'`{key}`: {run.args.get(key)} here, {twin.args.get(key)} there'
        for key in sorted(keys) if run.args.get(key) != twin.args.get(key)]
    arguments = f'other arguments: {"; ".join(different)}' if different else 'the same arguments'
    if twin.images != run.images:
        arguments += f', and evaluated on {twin.images:,} images, not {run.images:,}'
    timed = compared(card.runs, card.twins)
    rows = '\n'.join(map(comparison_row, (card.runs, card.twins), timed))
    spread = '' if len(card.runs) == len(card.twins) == 1 else (
        '\nOf several seeds these are the mean and the sample standard deviation.')
    machine, other = (record.machine for record in timed)
    speeds = f'Speeds are those of seed {timed[0].args["seed"]}, on {machine}.'
    if other != machine:
        speeds = f'The speeds do not compare: they are those on {machine}, and of the twin on {other}.'
    return f"""

### Model Comparison

The twin was trained with {arguments}. Both as recorded after the last
epoch of training{held_out(run)}.{spread}

| model | arguments | seeds | epochs | top-1 | top-5 | parameters (M) | GMACs | images/s in training |
|---|---|---|---|---|---|---|---|---|
{rows}

{speeds}"""


def comparison_row(runs: Sequence[Record], timed: Record) -> str:
    args = runs[0].args
    kwargs = dict(args['model_kwargs'])
    if args['input_size']:
        kwargs['in_chans'] = args['input_size'][0]
    model = timm.create_model(args['model'], device='meta', num_classes=args['num_classes'], **kwargs)
    if args['convert']:
        convert(model, **args['convert'])
    size = timm.data.resolve_data_config(args, model=model)['input_size']
    arguments = useful(layer_of(args['model']), {**args['model_kwargs'], **args['convert']})
    cells = [
        f'`{args["model"]}`', ' '.join(f'{key}={value}' for key, value in arguments.items()),
        ', '.join(str(run.args['seed']) for run in runs), runs[0].epochs, accuracy(runs), accuracy(runs, 'eval_top5'),
        f'{count_parameters(model) / 1e6:.2f}', f'{count_macs(model, size) / 1e9:.4f}', f'{timed.speed:.0f}']
    return f'| {" | ".join(map(str, cells))} |'


def limitations(card: Card) -> str:
    trained = 'measured at that size, and trained at it and smaller ones' if card.run.args.get('train_sizes') else (
        'trained and measured at that size')
    lines = [
        f'- It knows the classes of {card.dataset} and answers with one of them whatever an image shows.',
        f'- Images are resized to {card.size[1]} x {card.size[2]} pixels. It was {trained}.',
        '- Robustness, calibration and fairness were not measured.',
    ]
    if len(card.runs) == 1:
        lines += ['- One run says little about small differences between models: runs with other seeds differ too.']
    sampling = card.layer_args.get('sampling_type', 'all')
    if 'convnn' in card.layer and sampling == 'all':
        lines += ['- Each position is compared with every other one: the cost grows with the square of their number.']
    if sampling == 'random':
        lines += ['- Similar positions are searched among random ones. In evaluation these are the same on each call.']
    return '## Limitations\n\n' + '\n'.join(lines)
