"""From a run folder to a published weight: export, push, verify, pull.

A published weight is a folder `<arch>.<tag>/`, and the same files are its repository on the Hub, whose name the card
there has:

    config.json           timm's: architecture, model arguments, preprocessing, names of the classes
    model.safetensors     the weights
    golden.safetensors    inputs and the logits that belong to them
    README.md             the model card, made by card.py from the other files
    training/             what the run recorded, evaluation.json, in seeds/ what its repetitions with other seeds
                          recorded, and in twin/ the same of its convolution twin

The package's manifest.json has a line for each weight in a checkout's model_cards/; models/_weights.py reads it where
the weights are loaded. Outside of a checkout that line is a file beside the weights, manifest-line.json.
"""
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import timm
import torch
import torch.nn as nn
import yaml
from huggingface_hub import (
    CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download, snapshot_download)
from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config

import convnn_timm.models  # noqa: F401, registers the models
from .card import PLACES, Record, base_of, build_model, empty_fields, machine_name, read_config, write_card
from convnn_timm.images import image_mode, sample_photographs
from convnn_timm.models import _weights
from convnn_timm.models._weights import (
    FORMATS, WEIGHTS, OtherWeights, WeightsError, cached_file, check_file, checkout, explain, explained, find_entry,
    is_out_of_reach, local_file, manifest_revision, namespace, own_zoo, read_manifest, sha256, split_revision)
from convnn_timm.train.engine import evaluate
from convnn_timm.train.flags import UsageError, parse_args
from convnn_timm.train.data import check_classes, create_batches, create_parts
from convnn_timm.train.run_folder import environment, read_summary, state_classes_once, unfinished, without_folders

__all__ = ['WeightsError', 'check_folder', 'export', 'published_folders', 'pull', 'push', 'verify']

_logger = logging.getLogger(__name__)

# Published are half as many bytes if that costs no more of the top-1 accuracy than this, in points.
HALF_PRECISION_LOSS = 0.05
# Between golden logits and those computed again; both in float64, where machines differ by far less.
GOLDEN_TOLERANCE = 1e-6
MEASURED_SECONDS = 3.  # in which the speed of inference is measured
NEW_TOKEN = f'{constants.ENDPOINT}/settings/tokens makes one with write access'
CONFIG, GOLDEN, CARD = 'config.json', 'golden.safetensors', 'README.md'
RECORD = 'manifest-line.json'  # beside weights that the package's manifest does not list
# The parts of config.json that loading by name needs, see models/_weights.py.
MANIFEST_CFG = ('num_classes', 'input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'label_names')


# Export

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
    """Make the folder of a published weight from the run folder that trained it, and record it.

    In the model_cards/ of a checkout, its record is a line in the package's manifest, elsewhere a file in the folder.
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
        dataset_split: What the split that the run was evaluated on is called in the data set, if not as in the run.
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
    for folder, (record, model) in places.items():
        if not (model / WEIGHTS).is_file() or not read_summary(record):
            raise WeightsError(unfinished(folder))
    if not re.fullmatch('[a-z0-9][a-z0-9_]*', tag):
        raise WeightsError(f'--tag {tag}: small letters, digits and underscores, such as cifar10')
    for flag, value, pattern, example in (
            ('--license', license, r'[a-z0-9.-]+', 'an identifier such as mit or apache-2.0, in small letters'),
            ('--dataset-id', dataset_id, r'[\w.-]+(/[\w.-]+)?', 'a data set on the Hub, such as uoft-cs/cifar10'),
            ('--base-model', base_model, r'[\w.-]+/[\w.-]+', 'a repository on the Hub, OWNER/NAME')):
        if value and not re.fullmatch(pattern, value):
            raise WeightsError(f'{flag} {value}: {example}')
    config = read_config(run / 'model')
    if not timm.models.is_model_in_modules(
            config['architecture'], ['convnn_converted', 'convnn_resnet', 'convnn_vgg']):
        raise WeightsError(f'{run} trained {config["architecture"]}, which is no model of this package')
    for folder, (_, model) in places.items():
        if read_config(model).get('label_names') != config.get('label_names'):
            raise WeightsError(f'{folder} tells other classes apart than {run}')
    check_seeds(run, seeds)
    name = f'{published_architecture(config)}.{tag}'
    folder = output / name
    if folder.is_symlink() or folder.is_file():
        raise WeightsError(f'{folder} is a link or a file, not a folder of weights: move it away')
    if folder.exists() and not force:
        raise WeightsError(f'{folder} is there already: --force replaces it, --output DIR makes it elsewhere')
    if others := strangers(folder):
        raise WeightsError(f'{folder} holds what export did not write, move it away: {", ".join(others[:5])}')
    if name in read_manifest() and not force:
        raise WeightsError(
            f'{name} is the name of other weights, which {_weights.MANIFEST} lists: choose another --tag, or use that '
            f'name all the same with --force')
    listed = checkout() is not None and output.resolve() == own_zoo().resolve()
    if listed:  # that it can be written is known before the work is done
        write_manifest(_weights.MANIFEST.read_text())

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
        entry = manifest_entry(new, name)
        if not listed:
            write_record(entry, new)
        put_in_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if listed:
        write_entry(entry)
    warn_of_empty_fields(folder)
    return folder


def warn_of_empty_fields(folder: Path) -> None:
    """Say what the card of a published weight leaves empty, and how to fill it."""
    for field, flag in empty_fields(folder).items():
        _logger.warning(f'{folder}: the card names no {field}; `convnn-timm export {flag}` fills it in')


def put_in_place(new: Path, folder: Path) -> None:
    """Rename a folder; one that has its name is removed when the new one is there."""
    old = folder.with_name(f'.{folder.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def manifest_entry(folder: Path, name: str) -> Dict[str, Any]:
    """The line of a folder in the manifest."""
    config, record = read_config(folder), folder / 'training'
    evaluation, environment = (
        json.loads((record / file).read_text()) for file in ('evaluation.json', 'environment.json'))
    results = evaluation[evaluation['stored']]
    known = {**config['pretrained_cfg'], **config}
    return dict(
        name=name,
        file=WEIGHTS,
        size=(folder / WEIGHTS).stat().st_size,
        sha256=sha256(folder / WEIGHTS),
        top1=round(results['top1'], 4),
        top5=round(results['top5'], 4),
        dataset=evaluation['tag'],
        commit=environment['commit'],
        hub_id=f'{namespace()}/{name}',
        revision=None,
        published=read_manifest().get(name, {}).get('published', False),
        model_args=config.get('model_args', {}),
        pretrained_cfg={key: known[key] for key in MANIFEST_CFG if key in known},
    )


def published_architecture(config: Dict[str, Any]) -> str:
    """First half of the name; converted models, which share an architecture, are called after their base."""
    if config['architecture'] == 'convnn_converted':
        return f'{config["model_args"]["base"].partition(".")[0]}_converted'
    return config['architecture']


def check_seeds(run: Path, seeds: Sequence[Path]) -> None:
    """Make sure that runs are the same training, each with a seed of its own."""
    first, used = Record(run), {}
    for folder in (run, *seeds):
        record = Record(folder)
        args, seed = record.args, record.args['seed']
        keys = {*first.args, *args} - PLACES - {'seed'}
        if different := [key for key in sorted(keys) if first.args.get(key) != args.get(key)]:
            raise WeightsError(f'{folder} is no repetition of {run}: they differ in {", ".join(different)}')
        if record.epochs != first.epochs:
            raise WeightsError(f'{folder} has {record.epochs} epochs, {run} {first.epochs}')
        if record.images != first.images:
            raise WeightsError(f'{folder} was evaluated on {record.images} images, {run} on {first.images}')
        if seed in used:
            raise WeightsError(f'{folder} and {used[seed]} have the same seed, {seed}')
        used[seed] = folder


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
    """Images a second in inference, and where that was."""
    images = torch.randn(batch_size, *size, device=args.device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    model.eval()
    times = []
    with torch.inference_mode():
        model(images)  # what is only done once is not counted
        while sum(times) < MEASURED_SECONDS:
            start = time.perf_counter()
            model(images).cpu()  # waits for a GPU
            times.append(time.perf_counter() - start)
    machine = machine_name(environment(args, []))
    return dict(images_per_s=batch_size / median(times), batch_size=batch_size, machine=machine)


def copy_record(run: Path, folder: Path, seeds: Iterable[Path] = ()) -> None:
    """Copy what a run and its repetitions recorded, without the places of files on the machine that they ran on."""
    folder.mkdir(parents=True)
    for name in ('summary.csv', 'curve.png', 'args.yaml', 'recipe.yaml'):
        if (run / name).is_file():
            shutil.copy(run / name, folder)
    for file in folder.glob('*.yaml'):
        args = yaml.safe_load(file.read_text(encoding='utf-8'))
        named = {key: without_folders(value) if isinstance(value, str) else value for key, value in args.items()}
        if named != args:
            file.write_text(yaml.safe_dump(named, sort_keys=False))
    args = yaml.safe_load((run / 'args.yaml').read_text())
    absolute = [value for value in args.values() if isinstance(value, str) and os.path.isabs(value)]
    for file in run.glob('environment*.json'):
        record = json.loads(file.read_text())
        for path in absolute:  # as a whole word, which may have spaces in it
            record['command'] = re.sub(
                rf'(?<![^\s=]){re.escape(path)}(?!\S)', lambda _: Path(path).name, record['command'])
        record['command'] = ' '.join(map(without_folders, record['command'].split(' ')))
        (folder / file.name).write_text(json.dumps(record, indent=2) + '\n')
    for repetition in seeds:
        copy_record(repetition, folder / 'seeds' / str(Record(repetition).args['seed']))


def write_golden(folder: Path) -> None:
    """Write inputs, one of seeded noise and photographs as the model sees them, and their logits."""
    config = read_config(folder)
    size = tuple(config['pretrained_cfg']['input_size'])
    data_config = resolve_data_config(pretrained_cfg=config['pretrained_cfg'])
    transform = create_transform(**data_config, is_training=False)
    photographs = sample_photographs(image_mode(size[0]))
    noise = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    inputs = torch.stack([torch.from_numpy(noise), *map(transform, photographs.values())])
    model = build_model(config)
    model.load_state_dict(load_file(folder / WEIGHTS))
    tensors = dict(inputs=inputs, logits=golden_logits(model, inputs))
    save_file(tensors, folder / GOLDEN, metadata={'inputs': ', '.join(('noise (seed 0)', *photographs))})


@torch.no_grad()
def golden_logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Logits in float64, where machines agree which neighbour is nearer, even if another is nearly as near."""
    return model.double().eval()(inputs.double())


def read_entry(folder: Path) -> Optional[Dict[str, Any]]:
    """The record beside the weights of a folder, else the manifest's line of that name."""
    record = folder / RECORD
    if not record.is_file():
        return read_manifest().get(own_name(folder))
    try:
        return json.loads(record.read_text())
    except ValueError as error:
        raise WeightsError(f'{record} is damaged: {error}') from error


def write_record(entry: Dict[str, Any], folder: Path) -> None:
    """Record a weight beside it."""
    (folder / RECORD).write_text(json.dumps(entry, indent=2) + '\n')


def write_entry(entry: Dict[str, Any]) -> None:
    """Add a line to the manifest, or replace the one of that name."""
    entries = sorted({**read_manifest(), entry['name']: entry}.values(), key=lambda e: e['name'])
    write_manifest('[\n' + ',\n'.join(map(json.dumps, entries)) + '\n]\n')


def write_manifest(text: str) -> None:
    partial = _weights.MANIFEST.with_suffix('.partial')
    try:
        partial.write_text(text)
        os.replace(partial, _weights.MANIFEST)
    except OSError as error:
        raise WeightsError(f'cannot write {_weights.MANIFEST} ({error.strerror})') from error


def published_folders(zoo: Path) -> List[Path]:
    """The folders of published weights in a folder, without those with a dot, which an export left that was killed."""
    return sorted(file.parent for file in zoo.glob(f'[!.]*/{CONFIG}'))


# Verify

def check_folder(folder: Path, entry: Optional[Dict[str, Any]] = None) -> List[str]:
    """Check the files of a published weight.

    Args:
        folder: The folder.
        entry: Its line in the manifest; without one there is no hash to compare with.

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
    if entry:
        found = {**(config.get('pretrained_cfg') or {}), **config}
        published = state_classes_once({'model_args': entry['model_args'], **entry['pretrained_cfg']})
        if problems := [
                f'{folder / CONFIG}: {key} is {found.get(key)}, published is {value}'
                for key, value in published.items() if found.get(key) != value]:
            return problems
    if problems := compare_tensors(folder / WEIGHTS, model):
        return problems

    model.load_state_dict(load_file(folder / WEIGHTS))
    golden = load_file(folder / GOLDEN)
    if golden.keys() != {'inputs', 'logits'}:
        return [f'{folder / GOLDEN} holds {", ".join(golden) or "nothing"}, not inputs and logits']
    try:
        logits = golden_logits(model, golden['inputs'])
    except (IndexError, RuntimeError, ValueError) as error:
        return [f'{folder / GOLDEN}: the model takes no inputs as these are: {error}']
    if logits.shape != golden['logits'].shape:
        return [f'{folder}: logits are {tuple(logits.shape)}, golden ones {tuple(golden["logits"].shape)}']
    difference = (logits - golden['logits']).abs().max().item()
    if not difference <= GOLDEN_TOLERANCE:
        return [f'{folder}: logits differ from the golden ones by up to {difference:.2g}']
    return []


def compare_tensors(file: Path, model: nn.Module) -> List[str]:
    """What differs between the names and shapes in a file and those of a model."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with safe_open(file, 'pt') as f:
        found = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    problems = [f'{file} lacks {name}' for name in expected.keys() - found.keys()]
    problems += [f'{file} has {name}, the model has not' for name in found.keys() - expected.keys()]
    problems += [
        f'{file}: {name} has the shape {found[name]}, the model {expected[name]}'
        for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return sorted(problems)


def verify(what: str) -> Tuple[Path, Optional[Dict[str, Any]], List[str]]:
    """Check a published weight wherever it is.

    Args:
        what: Name of a weight in the manifest, checked where loading finds it; a folder; or a repository,
            `owner/name[@revision]`.

    Returns:
        The folder with its files, its line in the manifest if there is one, and what `check_folder` finds.

    Raises:
        WeightsError: There is no such weight, or its files cannot be fetched.
    """
    if Path(what).is_dir():
        folder = Path(what)
        entry = read_entry(folder)
    else:
        entry, repo, revision = resolve(what)
        local = local_file(what) if what in read_manifest() else None
        folder = local.parent if local else fetch(repo, revision, needed=(CONFIG, WEIGHTS, GOLDEN, CARD))
    return folder, entry, check_folder(folder, entry)


def resolve(what: str) -> Tuple[Optional[Dict[str, Any]], str, Optional[str]]:
    """Line in the manifest, repository and revision of a name or a repository."""
    entries = read_manifest()
    if entry := entries.get(what):
        return entry, _weights.hub_id(entry), manifest_revision(entry)
    repo, revision = split_revision(what.removeprefix('hf-hub:'))
    if repo.count('/') != 1:
        known = ', '.join(entries) or 'none yet'
        raise WeightsError(f'{what} is no published weight ({known}), no folder, and no repository OWNER/NAME')
    return find_entry(what.removeprefix('hf-hub:')), repo, revision


def fetch(repo: str, revision: Optional[str], folder: Optional[Path] = None, needed: Sequence[str] = ()) -> Path:
    """Download a repository, into the cache or a folder; returns where it is.

    Without connection, that is what the cache has of it. If it lacks needed files, it is an error, unless the
    repository lacks them too.
    """
    with explained(repo, revision):
        if folder is None and is_out_of_reach(repo, revision):
            return [cached_file(repo, name, revision).parent for name in needed][0]
        found = Path(snapshot_download(repo, revision=revision, local_dir=folder))
        for name in needed:
            if not (found / name).is_file():
                with suppress(RemoteEntryNotFoundError):
                    hf_hub_download(repo, name, revision=revision, local_dir=folder)
        return found


# Pull

def pull(what: str) -> Path:
    """Download a published weight to where loading looks for it, and replace what is damaged there.

    Args:
        what: Name of a weight in the manifest, or a repository, `owner/name[@revision]`.

    Returns:
        The file of weights, whole.

    Raises:
        WeightsError: It cannot be fetched, is damaged on the Hub too, or would take the place of other weights.
    """
    entry, repo, revision = resolve(what)
    by_name = entry is not None and what == entry['name']
    expected = entry['sha256'] if by_name else None  # a repository is asked for as it is now
    local = local_file(what) if by_name else None
    if local is None:
        file = fetch_weights(what, repo, revision, expected)
        if not by_name and (file.parent / CONFIG).is_file():
            read_config(file.parent)  # an hf-hub: name is loaded with it
        return file
    try:
        check_file(local, expected)
        return local
    except WeightsError as error:
        if may_be_other(local):
            raise WeightsError(
                f'{local} is not the published file, and nothing shows that it is damaged: it may hold other weights. '
                f'To fetch the published ones, move {local.parent} away first') from error
    whole = fetch_weights(what, repo, revision, expected)
    if is_readable(local):  # whether it is damaged cannot be known for certain
        old = local.with_suffix('.replaced')
        os.replace(local, old)
        _logger.warning(f'{old} is what was there')
    with tempfile.TemporaryDirectory(dir=local.parent) as scratch:  # on the same disk, to replace it in one step
        os.replace(shutil.copy(whole, scratch), local)
    return local


def is_readable(file: Path) -> bool:
    """Whether a file holds tensors, whichever."""
    try:
        check_file(file)
    except WeightsError:
        return False
    return True


def may_be_other(file: Path) -> bool:
    """Whether a file that is not the published one may be weights of somebody's own."""
    if not is_readable(file):
        return False
    complete = all((file.parent / name).is_file() for name in (CONFIG, GOLDEN, CARD))
    return not complete or not check_folder(file.parent)


def fetch_weights(what: str, repo: str, revision: Optional[str], expected: Optional[str]) -> Path:
    """The weights of a repository, whole in the cache; if they were damaged there, they are downloaded again."""
    file = fetch(repo, revision, needed=(WEIGHTS,)) / WEIGHTS
    if not file.is_file():
        raise WeightsError(explain(EntryNotFoundError(), repo, revision))
    try:
        check_file(file, expected, what)
    except OtherWeights:
        raise
    except WeightsError:
        file = download_again(file, repo, revision)
        check_file(file, expected, what)
    return file


def download_again(file: Path, repo: str, revision: Optional[str]) -> Path:
    """Download weights in place of a file in the cache."""
    with explained(repo, revision):
        if is_out_of_reach(repo, revision):
            raise WeightsError(
                f'{file} is damaged, and the Hub ({constants.ENDPOINT}) cannot be reached. Try again with a connection')
        if not file.is_symlink():  # the client would leave it there
            file.unlink()
        return Path(hf_hub_download(repo, WEIGHTS, revision=revision, force_download=True))


# Push

def push(
        folder: Path,
        owner: Optional[str] = None,
        private: bool = False,
        revision: Optional[str] = None,
) -> Tuple[str, str, bool]:
    """Bring a published weight's folder to the Hub, check what arrived there, and record its commit.

    What is there already is not sent again, so an interrupted call can be repeated. If nothing differs, nothing is
    committed.

    Args:
        folder: The folder, its name that of the weight.
        owner: User or organization, the project's by default.
        private: Make a private repository; one that is there already must be private.
        revision: Branch, made if it is not there; `main` by default.

    Returns:
        Repository, commit, and whether the commit is new.

    Raises:
        WeightsError: No token, no right to write, damaged files, or the Hub failed.
    """
    owner = owner or namespace()
    name = own_name(folder)
    repo = f'{owner}/{name}'
    check_access(owner)  # before any file is read
    entry = read_entry(folder)
    if entry is None:
        raise WeightsError(f'{name} is not in the manifest: make its folder with convnn-timm export')
    problems = [f'{folder / path} is not a file that export writes: move it away' for path in strangers(folder)]
    if problems := problems or check_folder(folder, entry):
        raise WeightsError('\n'.join(['nothing was sent:', *problems]))
    warn_of_empty_fields(folder)

    api, files = HfApi(), files_for(repo, folder)
    with explained(repo, revision, ', what was sent is kept'):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise WeightsError(
                f'{repo} is there already, and public: nothing was sent. {constants.ENDPOINT}/{repo}/settings makes it '
                f'private')
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = list(changes(api, repo, revision, files))
        if operations:
            commit = api.create_commit(repo, operations, commit_message=f'Upload {name}', revision=revision).oid
        else:
            commit = api.repo_info(repo, revision=revision).sha

    check_remote(repo, commit, files, entry)
    entry = dict(entry, hub_id=repo, revision=commit)
    if checkout() and not (folder / RECORD).is_file():
        write_entry(entry)
    elif _weights.PACKAGE not in folder.resolve().parents:  # an installed copy stays as it is
        write_record(entry, folder)
    return repo, commit, bool(operations)


def check_access(owner: str) -> None:
    """Make sure that there is a token, that the Hub knows it, and that it may write under that name."""
    if not get_token():
        raise WeightsError(f'you are not logged in: run `hf auth login`, or set HF_TOKEN; {NEW_TOKEN}')
    with explained(owner):
        user = HfApi().whoami()
    token = (user.get('auth') or {}).get('accessToken', {})
    if token.get('role') == 'read' or 'repo.write' not in str(token.get('fineGrained', 'repo.write')):
        raise WeightsError(f"the token of {user['name']} can only read: {NEW_TOKEN}")
    roles = {user['name']: 'admin', **{org['name']: org.get('roleInOrg') for org in user.get('orgs', [])}}
    own = [name for name, role in roles.items() if role != 'read']
    if owner not in own:
        raise WeightsError(f"{user['name']} may not write to {owner}: choose --namespace {' or '.join(own)}")


def files_for(repo: str, folder: Path) -> Dict[str, Union[Path, bytes]]:
    """What a repository of the folder's weight holds: its files, but for the card, which names that repository.

    Its code too, unless it is the project's, whose weights have a name in each installed package.
    """
    name, link = re.escape(own_name(folder)), f'hf-hub:{repo}'
    card = re.sub(rf'hf-hub:[\w.-]+/{name}(?![\w-])', link, (folder / CARD).read_text(encoding='utf-8'))
    if repo.partition('/')[0] != _weights.NAMESPACE:
        card = re.sub(rf"create_model\('{name}'", f"create_model('{link}'", card)
    return {**{path: file for path, file in files_of(folder).items() if path != RECORD}, CARD: card.encode()}


def content_of(file: Union[Path, bytes]) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def changes(api: HfApi, repo: str, revision: Optional[str], files: Dict[str, Union[Path, bytes]]) -> Iterator[Any]:
    """What brings files to the repository."""
    remote = {
        file.path: file.lfs.sha256 if file.lfs else file.blob_id
        for file in api.list_repo_tree(repo, recursive=True, revision=revision) if hasattr(file, 'blob_id')}
    for path, file in files.items():
        content = content_of(file)
        oids = hashlib.sha256(content).hexdigest(), hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
        if remote.get(path) not in oids:
            yield CommitOperationAdd(path, file)
    for path in sorted(remote.keys() - files.keys()):  # what others added stays, but for weights that these replace
        if is_exported(path) or '/' not in path and PurePosixPath(path).suffix in FORMATS:
            yield CommitOperationDelete(path)


def is_exported(path: str) -> bool:
    """Whether `export` writes a file of that name, relative to the folder."""
    file = PurePosixPath(path)
    if file.parts[0] == 'training':
        return file.suffix in ('.csv', '.json', '.png', '.yaml') and not any(p.startswith('.') for p in file.parts)
    return path in (CONFIG, GOLDEN, WEIGHTS, 'README.md')


def strangers(folder: Path) -> List[str]:
    """What else is in the folder: nobody meant to publish that."""
    return [
        path for path, file in files_of(folder).items()
        if path != RECORD and (not is_exported(path) or file.is_symlink())]


def own_name(folder: Path) -> str:
    """The name of a folder, or of the link to it, that was given."""
    return Path(os.path.abspath(folder)).name


def files_of(folder: Path) -> Dict[str, Path]:
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob('*')) if file.is_file()}


def check_remote(repo: str, commit: str, files: Dict[str, Union[Path, bytes]], entry: Dict[str, Any]) -> None:
    """Download what was pushed, compare each file, and compute the golden logits with it."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = fetch(repo, commit, Path(scratch) / entry['name'])
        arrived = files_of(copy)
        problems = [
            f'{path} differs from the file that was sent' for path, file in files.items()
            if path not in arrived or arrived[path].read_bytes() != content_of(file)]
        problems += check_folder(copy, entry)
    if problems:
        raise WeightsError('\n'.join([f'{repo} is not what was sent, and is not recorded. Push again:', *problems]))
