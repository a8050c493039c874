"""A published weight's line in the manifest: made from its folder, and written where loading looks for it.

The package's manifest.json lists the weights in a checkout's model_cards/; models/_weights.py reads it. A weight
elsewhere has its line in a file of its folder, manifest-line.json.
"""
import json
import os
from pathlib import Path
from typing import Any, Dict, Optional

from convnn_timm.models import _weights
from convnn_timm.models._weights import WEIGHTS, WeightsError, checkout, namespace, own_zoo, read_manifest, sha256
from .folder import ENTRY, read_config, weight_name

__all__ = ['check_writable', 'is_listed', 'make_entry', 'read_entry', 'write_entry', 'write_entry_file']

# The parts of config.json that loading by name needs.
MANIFEST_CFG = ('num_classes', 'input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'label_names')


def is_listed(zoo: Path) -> bool:
    """Whether the package's manifest lists the weights in a folder of weights: in a checkout's own model_cards/."""
    return checkout() is not None and zoo.resolve() == own_zoo().resolve()


def make_entry(folder: Path, name: str) -> Dict[str, Any]:
    """The line of a folder's weight, which is not pushed yet."""
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
        commit=environment['commit'],
        hub_id=f'{namespace()}/{name}',
        revision=None,
        published=read_manifest().get(name, {}).get('published', False),
        model_args=config.get('model_args', {}),
        pretrained_cfg={key: known[key] for key in MANIFEST_CFG if key in known},
    )


def read_entry(folder: Path) -> Optional[Dict[str, Any]]:
    """The line in a folder, else the one of its name in the manifest; None if there is neither."""
    file = folder / ENTRY
    if not file.is_file():
        return read_manifest().get(weight_name(folder))
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f'{file} is damaged: {error}') from error


def write_entry_file(entry: Dict[str, Any], folder: Path) -> None:
    """Write a weight's line into its folder."""
    (folder / ENTRY).write_text(json.dumps(entry, indent=2) + '\n')


def write_entry(entry: Dict[str, Any]) -> None:
    """Add a line to the manifest, or replace the one of that name."""
    entries = sorted({**read_manifest(), entry['name']: entry}.values(), key=lambda e: e['name'])
    write_manifest('[\n' + ',\n'.join(map(json.dumps, entries)) + '\n]\n')


def check_writable() -> None:
    """Make sure that the manifest can be written, by writing it as it is."""
    write_manifest(_weights.MANIFEST.read_text())


def write_manifest(text: str) -> None:
    partial = _weights.MANIFEST.with_suffix('.partial')
    try:
        partial.write_text(text)
        os.replace(partial, _weights.MANIFEST)
    except OSError as error:
        raise WeightsError(f'cannot write {_weights.MANIFEST} ({error.strerror})') from error
