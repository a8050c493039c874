"""From a run folder to the folder of a published weight: evaluated, rounded if that costs nothing, with its card."""
import json
import os
import re
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import parse_model_name

from convnn_timm.models import _weights
from convnn_timm.models._weights import (
    WEIGHTS, WeightsError, checkout, find_entry, own_zoo, read_manifest, split_revision)
from convnn_timm.train.data import check_classes, create_batches, create_parts
from convnn_timm.train.engine import evaluate
from convnn_timm.train.flags import UsageError, parse_args
from convnn_timm.train.run_folder import environment, read_summary, unfinished
from .card import write_card
from .folder import CONFIG, GOLDEN, read_config, unknown_files, warn_of_empty_fields, write_golden
from .manifest import check_writable, is_listed, make_entry, write_entry, write_entry_file
from .records import Record, check_repetitions, copy_record, machine_name

__all__ = ['export']

# Weights are stored in float16 if that costs no more of the top-1 accuracy than this, in points.
HALF_PRECISION_LOSS = 0.05
MEASURED_SECONDS = 3.  # in which the speed of inference is measured


def export(
        run: Path,
        tag: str,
        output: Optional[Path] = None,
        twin: Optional[Path] = None,
        data_note: str = '',
        data_dir: str = '',
        device: str = 'cpu',
        force: bool = False,
        seeds: Sequence[Path] = (),
        dataset_id: str = '',
        dataset_name: str = '',
        dataset_split: str = '',
        license: str = '',
        base_model: str = '',
) -> Path:
    """Make the folder of a published weight from the run folder that trained it, and its line in the manifest.

    In the model_cards/ of a checkout, the line stands in the package's manifest, elsewhere in a file of the folder.
    The weights are evaluated on the whole evaluation split, in float32 and rounded to float16, and are stored rounded
    if that costs at most 0.05 points of top-1. A warning names what the card leaves empty.

    Args:
        run: Run folder of a finished training.
        tag: What the weights were trained on, the second half of the name.
        output: Folder in which to make `<arch>.<tag>/`: by default the checkout's model_cards/, without one the run
            folder.
        twin: Run folder of the convolution that was trained beside it, or the folder of its published weight, with
            which its repetitions come.
        data_note: What the card says about the data, besides its name.
        data_dir: Where the images are now, if they were moved.
        device: Where to evaluate.
        force: Replace a folder that is there, and a line of that name in the manifest.
        seeds: Run folders of the same training with other seeds, for the spread of its results.
        dataset_id: The data set's identifier on the Hub, if the run's `--dataset` does not name it.
        dataset_name: Its name, if it has no known one: else the card names the folder.
        dataset_split: The data set's name for the split that the run was evaluated on, if it is another.
        license: The Hub's identifier of the weights' licence; by default that of the pretrained weights which the run
            started from, if timm knows it.
        base_model: Repository on the Hub of the weights that the run started from; by default that of `--pretrained`.

    Returns:
        The folder.

    Raises:
        WeightsError: The run is not finished or not of this package, `twin` or one of `seeds` is of other data, one of
            `seeds` another training, the folder is there or holds files of somebody else, the images are not there or
            others, or the manifest is read-only.
    """
    output = output or (own_zoo() if checkout() else run)
    places = {folder: (folder, folder / 'model') for folder in (run, *seeds)}  # of a record, and of its model
    if twin:
        places[twin] = (twin / 'training', twin) if (twin / 'training').is_dir() else (twin, twin / 'model')
    config = check_runs(run, places)
    check_flags(tag, license, dataset_id, base_model)
    check_repetitions(run, seeds)
    name = f'{published_architecture(config)}.{tag}'
    folder = output / name
    check_free(folder, force)
    if listed := is_listed(output):
        check_writable()  # before the work is done

    args, model, loader, train_images = open_evaluation(run, data_dir, device)
    stored, results, state_dict = choose_precision(model, loader, args.channels_last)
    inference = measure_speed(model, tuple(config['pretrained_cfg']['input_size']), args)
    started = Record(run).args
    base_license = config['pretrained_cfg'].pop('license', '')  # of the weights that timm has for this architecture
    if not license and started['pretrained'] and not started['initial_checkpoint']:
        license = base_license
    config['pretrained_cfg'].update(tag=tag, **(dict(license=license) if license else {}))
    evaluation = dict(
        tag=tag, split=args.val_split, note=data_note, dataset_id=dataset_id, dataset_name=dataset_name,
        dataset_split=dataset_split, base_model=base_model or base_of(started), train_images=train_images,
        stored=stored, **results, inference=inference)
    new = output / f'.{name}.partial'
    shutil.rmtree(new, ignore_errors=True)  # of a call that was killed
    try:
        new.mkdir(parents=True)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
        save_file(state_dict, new / WEIGHTS, metadata={'format': 'pt'})
        write_golden(new)
        for file in WEIGHTS, GOLDEN:
            shutil.copymode(new / CONFIG, new / file)  # safetensors lets nobody else read them
        copy_record(run, new / 'training', seeds)
        if twin:
            record, _ = places[twin]
            copy_record(record, new / 'training' / 'twin', (record / 'seeds').glob('*'))
        (new / 'training' / 'evaluation.json').write_text(json.dumps(evaluation, indent=2) + '\n')
        write_card(new, name)
        entry = make_entry(new, name)
        if not listed:
            write_entry_file(entry, new)
        put_in_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if listed:
        write_entry(entry)
    warn_of_empty_fields(folder)
    return folder


# What is refused, before any work is done

def check_runs(run: Path, places: Dict[Path, Tuple[Path, Path]]) -> Dict[str, Any]:
    """Make sure that runs are finished and tell the same classes apart; returns the config.json of the first.

    Args:
        run: The run to export.
        places: Where the record and the model are, of this run and those beside it.
    """
    for folder, (record, model) in places.items():
        if not (model / WEIGHTS).is_file() or not read_summary(record):
            raise WeightsError(unfinished(folder))
    config = read_config(run / 'model')
    if not timm.models.is_model_in_modules(
            config['architecture'], ['convnn_converted', 'convnn_resnet', 'convnn_vgg']):
        raise WeightsError(f'{run} trained {config["architecture"]}, which is no model of this package')
    for folder, (_, model) in places.items():
        if read_config(model).get('label_names') != config.get('label_names'):
            raise WeightsError(f'{folder} tells other classes apart than {run}')
    return config


def check_flags(tag: str, license: str, dataset_id: str, base_model: str) -> None:
    if not re.fullmatch('[a-z0-9][a-z0-9_]*', tag):
        raise WeightsError(f'--tag {tag}: small letters, digits and underscores, such as cifar10')
    for flag, value, pattern, example in (
            ('--license', license, r'[a-z0-9.-]+', 'an identifier such as mit or apache-2.0, in small letters'),
            ('--dataset-id', dataset_id, r'[\w.-]+(/[\w.-]+)?', 'a data set on the Hub, such as uoft-cs/cifar10'),
            ('--base-model', base_model, r'[\w.-]+/[\w.-]+', 'a repository on the Hub, OWNER/NAME')):
        if value and not re.fullmatch(pattern, value):
            raise WeightsError(f'{flag} {value}: {example}')


def check_free(folder: Path, force: bool) -> None:
    """Make sure that nothing of somebody else is in the place of a new folder, and that its name is free."""
    name = folder.name
    if folder.is_symlink() or folder.is_file():
        raise WeightsError(f'{folder} is a link or a file, not a folder of weights: move it away')
    if folder.exists() and not force:
        raise WeightsError(f'{folder} is there already: --force replaces it, --output DIR makes it elsewhere')
    if others := unknown_files(folder):
        raise WeightsError(f'{folder} holds what export did not write, move it away: {", ".join(others[:5])}')
    if name in read_manifest() and not force:
        raise WeightsError(
            f'{name} is the name of other weights, which {_weights.MANIFEST} lists: choose another --tag, or use that '
            f'name all the same with --force')


def published_architecture(config: Dict[str, Any]) -> str:
    """First half of the name; converted models, which share an architecture, are called after their base."""
    if config['architecture'] == 'convnn_converted':
        return f'{config["model_args"]["base"].partition(".")[0]}_converted'
    return config['architecture']


# The work

def base_of(args: Dict[str, Any]) -> Optional[str]:
    """Repository on the Hub of the weights that a run started from, if its arguments tell and there is one."""
    if not args['pretrained'] or args['initial_checkpoint']:
        return None
    source, name = parse_model_name(args['model'])
    if source:
        return split_revision(name)[0] if source == 'hf-hub' else None
    if name == 'convnn_converted':
        name = args['model_kwargs'].get('base', 'resnet18')
    repo = timm.get_pretrained_cfg(name).hf_hub_id
    entry = find_entry(repo) if repo else None
    return None if entry and entry['revision'] is None else repo  # no repository before the first push


def open_evaluation(run: Path, data_dir: str, device: str) -> Tuple[Any, nn.Module, Any, int]:
    """The run's arguments and model, batches of its whole evaluation split, and how many images it was trained on."""
    moved = ['--data-dir', data_dir] if data_dir else []
    try:
        args = parse_args(['-c', str(run / 'args.yaml'), '--device', device, '--holdout', '0', *moved])
        train_part, part, names = create_parts(args)
        model = timm.create_model(f'local-dir:{run / "model"}', pretrained=True).to(device)
        check_classes(model, names)
        loader = create_batches(part, args, resolve_data_config(vars(args), model=model), torch.device(device))
    except UsageError as error:
        raise WeightsError(f'{run} cannot be evaluated: {error}. --data-dir says where its images are now') from error
    return args, model, loader, len(train_part) - Record(run).args['holdout']


def choose_precision(
        model: nn.Module,
        loader,
        channels_last: bool,
) -> Tuple[str, Dict[str, Any], Dict[str, torch.Tensor]]:
    """Evaluate a model as it is and with its weights rounded; returns the precision to store, results, weights."""
    if channels_last:
        model.to(memory_format=torch.channels_last)
    full = {key: value.cpu().clone().contiguous() for key, value in model.state_dict().items()}
    half = {key: value.half() if value.is_floating_point() else value for key, value in full.items()}
    weights, results = dict(float32=full, float16=half), {}
    for precision, state_dict in weights.items():
        model.load_state_dict(state_dict)
        results[precision] = evaluate(model, loader, channels_last=channels_last)
    loss = abs(results['float16']['top1'] - results['float32']['top1'])
    stored = 'float16' if loss <= HALF_PRECISION_LOSS else 'float32'
    return stored, results, weights[stored]


def measure_speed(model: nn.Module, size: Tuple[int, int, int], args: Any, batch_size: int = 64) -> Dict[str, Any]:
    """Images per second in inference, and the machine that this was measured on."""
    images = torch.randn(batch_size, *size, device=args.device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    model.eval()
    times = []
    with torch.inference_mode():
        model(images)  # warm-up
        while sum(times) < MEASURED_SECONDS:
            start = time.perf_counter()
            model(images).cpu()  # waits for a GPU
            times.append(time.perf_counter() - start)
    machine = machine_name(environment(args, []))
    return dict(images_per_s=batch_size / median(times), batch_size=batch_size, machine=machine)


def put_in_place(new: Path, folder: Path) -> None:
    """Rename a folder to a name whose former folder is removed only when the new one is there."""
    old = folder.with_name(f'.{folder.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
