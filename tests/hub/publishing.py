"""A published weight made in seconds, and what tests change in the records and files of one."""
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import convnn_timm
from convnn_timm import hub
from convnn_timm import cli
from convnn_timm.hub import exporting
from convnn_timm.models import _weights
from convnn_timm.train.engine import main as train

NAME = 'resnet18_convnn_branching.cifar10'
PROJECT = f'convnn-timm/{NAME}'
WEIGHTS = 'model.safetensors'
CLASSES = ('bee', 'cat', 'dog')
PACKAGE = Path(convnn_timm.__file__).parent


def publish(root: Path) -> None:
    """Fill a folder: `images`, in `output` two runs of seconds, in `cards` a published weight, its `manifest.json`."""
    noise = np.random.default_rng(0)
    for split, count in (('train', 16), ('validation', 8)):
        for channel, name in enumerate(CLASSES):
            (root / 'images' / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 160, (16, 16, 3)).astype(np.uint8)
                pixels[..., channel] += 40
                Image.fromarray(pixels).save(root / 'images' / split / name / f'{i}.png')
    flags = (
        f'-c cifar10 --data-dir {root}/images --img-size 16 -b 8 --epochs 2 --warmup-epochs 0 --opt sgd --workers 0 '
        f'--no-amp --device cpu --output {root}/output')
    for model in ('resnet18_convnn_branching', 'resnet18_conv2d'):
        train([*flags.split(), '--model', model, '--experiment', model])
    with pytest.MonkeyPatch.context() as patch:
        make_checkout(root / 'checkout', patch)
        _weights.MANIFEST.write_text('[]\n')
        patch.setattr(exporting, 'MEASURED_SECONDS', 0.01)
        hub.export(
            root / 'output' / 'resnet18_convnn_branching', 'cifar10', twin=root / 'output' / 'resnet18_conv2d',
            data_note='made of noise', seeds=[repeat(root / 'output' / 'resnet18_convnn_branching', 1)],
            dataset_id='uoft-cs/cifar10', dataset_split='test', license='mit')
        _weights.MANIFEST.rename(root / 'manifest.json')
    (root / 'checkout' / 'model_cards').rename(root / 'cards')


def make_checkout(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Let a new folder be the checkout that the package is imported from."""
    (root / 'model_cards').mkdir(parents=True)
    (root / 'convnn_timm' / 'models').mkdir(parents=True)
    (root / 'pyproject.toml').touch()
    patch.setattr(_weights, 'PACKAGE', root / 'convnn_timm')
    patch.setattr(_weights, 'MANIFEST', root / 'convnn_timm' / 'models' / 'manifest.json')


def repeat(run: Path, seed: int, points: float = 5., **args) -> Path:
    """A run folder as the same training with another seed would leave it, after so many points more or less."""
    folder = Path(shutil.copytree(run, run.with_name(f'{run.name}-{seed}')))
    recorded = yaml.safe_load((run / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({**recorded, 'seed': seed, 'experiment': folder.name, **args}))
    set_top1(folder, last_top1(run) + points)
    return folder


def last_top1(folder: Path) -> float:
    return float(list(csv.DictReader((folder / 'summary.csv').open()))[-1]['eval_top1'])


def set_top1(folder: Path, top1: float) -> None:
    set_last(folder, 'eval_top1', top1)


def set_last(folder: Path, column: str, value: float) -> None:
    """Change what a run recorded after its last epoch."""
    set_column(folder, column, value, slice(-1, None))


def set_column(folder: Path, column: str, value: float, epochs: slice = slice(1, None)) -> None:
    """Change what a run recorded after each epoch."""
    lines = [line.split(',') for line in (folder / 'summary.csv').read_text().splitlines()]
    for line in lines[epochs]:
        line[lines[0].index(column)] = str(value)
    (folder / 'summary.csv').write_text('\n'.join(map(','.join, lines)) + '\n')


def error_of(capsys, *argv):
    assert cli.main([str(word) for word in argv]) != 0
    return capsys.readouterr().err


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def make_other(folder):
    """Give a folder other weights, which are whole: a classifier without bias, and the golden logits of that."""
    weights, golden = (load_file(folder / name) for name in (WEIGHTS, 'golden.safetensors'))
    golden['logits'] -= weights['fc.bias'].double()
    weights['fc.bias'].zero_()
    save_file(weights, folder / WEIGHTS, metadata={'format': 'pt'})
    save_file(golden, folder / 'golden.safetensors')


def digest_of(session):
    """What `load` prints of the published weights, loaded from the folder they were exported to."""
    line, = session(f'load("local-dir:{session.folder}")').lines
    assert line.startswith('loaded')
    return line


def blocks_of(card):
    """Code that runs the Python blocks of a card."""
    return f"""
import re
text = Path({str(card / 'README.md')!r}).read_text()
for code in re.findall(r'^```python\\n(.*?)^```', text, re.DOTALL | re.MULTILINE):
    exec(code, {{}})
    print('ran')
"""
