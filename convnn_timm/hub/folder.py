"""The folder of a published weight, `<arch>.<tag>/`: what it holds, and whether that is right.

The weight's repository on the Hub has the same files:

    config.json           timm's: architecture, model arguments, preprocessing, names of the classes
    model.safetensors     the weights
    golden.safetensors    inputs, and the logits that the model computes from them
    README.md             the model card, made by card.py from the other files
    training/             the run's record and evaluation.json; in seeds/ the records of other seeds, in twin/ those of
                          the convolution twin
"""
import json
import logging
import os
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, Optional

import numpy as np
import timm
import torch
import torch.nn as nn
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config

import convnn_timm.models  # noqa: F401, registers the models
from convnn_timm.images import image_mode, sample_photographs
from convnn_timm.models._weights import WEIGHTS, WeightsError, check_file
from convnn_timm.train.run_folder import state_classes_once

__all__ = [
    'CARD', 'CONFIG', 'ENTRY', 'GOLDEN', 'build_model', 'check_folder', 'files_of', 'is_exported', 'published_folders',
    'read_config', 'unknown_files', 'warn_of_empty_fields', 'weight_name', 'write_golden']

_logger = logging.getLogger(__name__)

CONFIG, GOLDEN, CARD = 'config.json', 'golden.safetensors', 'README.md'
ENTRY = 'manifest-line.json'  # the manifest's line of a weight that the package's manifest does not list; not pushed
# Golden logits may differ by this much. They are computed in float64, where machines differ by far less.
GOLDEN_TOLERANCE = 1e-6


# What is in it

def published_folders(zoo: Path) -> List[Path]:
    """The folders of published weights in a folder; names with a dot in front are those of killed exports."""
    return sorted(file.parent for file in zoo.glob(f'[!.]*/{CONFIG}'))


def weight_name(folder: Path) -> str:
    """The name of the folder as it was given: a link is not followed."""
    return Path(os.path.abspath(folder)).name


def files_of(folder: Path) -> Dict[str, Path]:
    """The files in the folder and below, by their path relative to it."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob('*')) if file.is_file()}


def is_exported(path: str) -> bool:
    """Whether `export` writes a file of that name, relative to the folder."""
    file = PurePosixPath(path)
    if file.parts[0] == 'training':
        return file.suffix in ('.csv', '.json', '.png', '.yaml') and not any(p.startswith('.') for p in file.parts)
    return path in (CONFIG, GOLDEN, WEIGHTS, CARD)


def unknown_files(folder: Path) -> List[str]:
    """Files that `export` did not write: nobody meant to publish them, or to lose them."""
    return [
        path for path, file in files_of(folder).items()
        if path != ENTRY and (not is_exported(path) or file.is_symlink())]


def read_config(folder: Path) -> Dict[str, Any]:
    """The folder's config.json, in which the number of classes stands once (see `state_classes_once`)."""
    file = folder / CONFIG
    try:
        return state_classes_once(json.loads(file.read_text()))
    except ValueError as error:
        raise WeightsError(f'{file} is damaged: {error}') from error


def build_model(config: Dict[str, Any], device: str = 'cpu') -> nn.Module:
    """The model that a config.json describes, with random weights."""
    args = dict(config.get('model_args', {}), num_classes=config['num_classes'])
    return timm.create_model(config['architecture'], device=device, pretrained_model_args=args, **args)


def write_golden(folder: Path) -> None:
    """Write the golden inputs, seeded noise and photographs as the model sees them, and their logits."""
    config = read_config(folder)
    size = tuple(config['pretrained_cfg']['input_size'])
    transform = create_transform(
        **resolve_data_config(pretrained_cfg=config['pretrained_cfg']), is_training=False)
    photographs = sample_photographs(image_mode(size[0]))
    noise = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    inputs = torch.stack([torch.from_numpy(noise), *map(transform, photographs.values())])
    model = build_model(config)
    model.load_state_dict(load_file(folder / WEIGHTS))
    tensors = dict(inputs=inputs, logits=golden_logits(model, inputs))
    save_file(tensors, folder / GOLDEN, metadata={'inputs': ', '.join(('noise (seed 0)', *photographs))})


@torch.no_grad()
def golden_logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Logits in float64: rounding then never decides which of two near neighbours is nearer."""
    return model.double().eval()(inputs.double())


# Whether it is right

def check_folder(folder: Path, entry: Optional[Dict[str, Any]] = None) -> List[str]:
    """Check hash, configuration, tensors and golden logits of a published weight.

    Args:
        folder: The folder.
        entry: Its line in the manifest; without one, hash and configuration have nothing to be compared with.

    Returns:
        One sentence for each thing that is not as it should be.
    """
    missing = [name for name in (CONFIG, WEIGHTS, GOLDEN, CARD) if not (folder / name).is_file()]
    if missing:
        return [f'{folder} has no {", no ".join(missing)}']
    try:
        check_file(folder / WEIGHTS, entry and entry['sha256'])
        check_file(folder / GOLDEN)
        config = read_config(folder)
    except WeightsError as error:
        return [str(error)]
    try:
        model = build_model(config)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        return [f'{folder / CONFIG} describes no model: {error}']
    if problems := compare_config(folder, config, entry) or compare_tensors(folder / WEIGHTS, model):
        return problems
    model.load_state_dict(load_file(folder / WEIGHTS))
    return compare_logits(folder, model)


def compare_config(folder: Path, config: Dict[str, Any], entry: Optional[Dict[str, Any]]) -> List[str]:
    """How a configuration differs from the manifest's line, if there is one."""
    if not entry:
        return []
    found = {**(config.get('pretrained_cfg') or {}), **config}
    published = state_classes_once({'model_args': entry['model_args'], **entry['pretrained_cfg']})
    return [
        f'{folder / CONFIG}: {key} is {found.get(key)}, published is {value}'
        for key, value in published.items() if found.get(key) != value]


def compare_tensors(file: Path, model: nn.Module) -> List[str]:
    """How the names and shapes of the tensors in a file differ from those of a model."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with safe_open(file, 'pt') as f:
        found = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    problems = [f'{file} lacks {name}' for name in expected.keys() - found.keys()]
    problems += [f'{file} has {name}, the model has not' for name in found.keys() - expected.keys()]
    problems += [
        f'{file}: {name} has the shape {found[name]}, the model {expected[name]}'
        for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return sorted(problems)


def compare_logits(folder: Path, model: nn.Module) -> List[str]:
    """How a model's logits for the golden inputs differ from the golden ones."""
    file = folder / GOLDEN
    golden = load_file(file)
    if golden.keys() != {'inputs', 'logits'}:
        return [f'{file} holds {", ".join(golden) or "nothing"}, not inputs and logits']
    try:
        logits = golden_logits(model, golden['inputs'])
    except (IndexError, RuntimeError, ValueError) as error:
        return [f'{file}: the model takes no inputs as these are: {error}']
    if logits.shape != golden['logits'].shape:
        return [f'{folder}: logits are {tuple(logits.shape)}, golden ones {tuple(golden["logits"].shape)}']
    difference = (logits - golden['logits']).abs().max().item()
    if not difference <= GOLDEN_TOLERANCE:  # NaN is no small difference
        return [f'{folder}: logits differ from the golden ones by up to {difference:.2g}']
    return []


def warn_of_empty_fields(folder: Path) -> None:
    """Say which metadata the card leaves empty, and the flag of `export` that fills each."""
    try:
        data = ModelCard.load(folder / CARD).data
    except (ValueError, yaml.YAMLError) as error:
        raise WeightsError(f'{folder / CARD}: its metadata cannot be read: {error}') from error
    record = folder / 'training' / 'args.yaml'
    args = yaml.safe_load(record.read_text()) if record.is_file() else {}
    started = args.get('pretrained') or args.get('initial_checkpoint')
    for field, flag, value in (
            ('licence', '--license', data.license),
            ('data set on the Hub', '--dataset-id', data.datasets),
            ('base model, though the training started from weights', '--base-model', data.base_model or not started)):
        if not value:
            _logger.warning(f'{folder}: the card names no {field}; `convnn-timm export {flag}` fills it in')
