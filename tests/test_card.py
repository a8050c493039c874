"""From a run to the folder of a published weight: what is in it, and that its card tells what the run recorded."""
import csv
import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load, load_file, save, save_file
from timm.models import save_for_hf

from convnn_timm import cli, hub
from convnn_timm.hub import exporting
from convnn_timm.hub.card import read_card, write_card
from convnn_timm.hub.exporting import base_of
from convnn_timm.hub.folder import read_config
from convnn_timm.hub.manifest import make_entry
from convnn_timm.hub.records import Record, copy_record
from convnn_timm.models import _weights
from convnn_timm.train.engine import main as train

NAME = 'resnet18_convnn_branching.cifar10'
CLASSES = ('bee', 'cat', 'dog')
PACKAGE = Path(hub.__file__).parents[1]
ROOT = Path(__file__).parents[1]
SHIPPED = {folder.name: folder for folder in hub.published_folders(ROOT / 'model_cards')}


@functools.cache
def publish(base: Path) -> Path:
    """A checkout with a copy of the package, in `output` two runs of seconds, and in `cards` a published weight.

    Its `model_cards` is empty, so the weight is not found there.
    """
    root, noise = base / 'published', np.random.default_rng(0)
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
    shutil.copytree(PACKAGE, root / 'convnn_timm', ignore=shutil.ignore_patterns('__pycache__', 'model_cards'))
    (root / 'convnn_timm' / 'models' / 'manifest.json').write_text('[]\n')
    with pytest.MonkeyPatch.context() as patch:
        make_checkout(root, patch)
        hub.export(
            root / 'output' / 'resnet18_convnn_branching', 'cifar10', twin=root / 'output' / 'resnet18_conv2d',
            data_note='made of noise', seeds=[repeat(root / 'output' / 'resnet18_convnn_branching', 1)],
            dataset_id='uoft-cs/cifar10', dataset_split='test', license='mit')
    (root / 'model_cards').rename(root / 'cards')
    (root / 'model_cards').mkdir()
    return root


def make_checkout(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Let a folder be the checkout that the package is imported from."""
    (root / 'model_cards').mkdir(parents=True)
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


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    return publish(tmp_path_factory.getbasetemp())


@pytest.fixture
def manifest(published, monkeypatch, tmp_path):
    """The manifest of a checkout of this test's own, without weights."""
    make_checkout(tmp_path / 'checkout', monkeypatch)
    _weights.MANIFEST.parent.mkdir(parents=True)
    return Path(shutil.copy(published / 'convnn_timm' / 'models' / 'manifest.json', _weights.MANIFEST))


@pytest.fixture
def card(published, tmp_path):
    """A copy of the published folder, for this test."""
    return Path(shutil.copytree(published / 'cards' / NAME, tmp_path / 'cards' / NAME))


def error_of(capsys, *argv):
    assert cli.main([str(word) for word in argv]) != 0
    return capsys.readouterr().err


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# The folder

def test_the_manifest_and_the_folders_name_the_same_weights():
    assert set(SHIPPED) == {entry['name'] for entry in json.loads((ROOT / 'convnn_timm' / 'models' / 'manifest.json').read_text())}
    assert sum((folder / 'model.safetensors').stat().st_size for folder in SHIPPED.values()) < 100e6


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_card_and_line_of_the_manifest_are_those_of_the_files(name, tmp_path):
    folder = shutil.copytree(SHIPPED[name], tmp_path / name)
    write_card(folder, name)
    assert (folder / 'README.md').read_text() == (SHIPPED[name] / 'README.md').read_text()
    entry, = (e for e in json.loads((ROOT / 'convnn_timm' / 'models' / 'manifest.json').read_text()) if e['name'] == name)
    assert {**make_entry(folder, name), 'hub_id': entry['hub_id'], 'revision': entry['revision']} == entry


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_weight_is_whole(name):
    entry, = (e for e in json.loads((ROOT / 'convnn_timm' / 'models' / 'manifest.json').read_text()) if e['name'] == name)
    assert hub.check_folder(SHIPPED[name], entry) == []


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_weight_loads_in_transformers(name):
    transformers = pytest.importorskip('transformers')
    model = transformers.TimmWrapperForImageClassification.from_pretrained(SHIPPED[name], dtype=torch.float32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x).logits, timm.create_model(name, pretrained=True).eval()(x))


def test_a_folder_that_says_the_number_of_classes_twice_is_read(card):
    """As timm writes it."""
    config, entry = read_config(card), make_entry(card, NAME)
    twice = dict(config, model_args=dict(config['model_args'], num_classes=3))
    (card / 'config.json').write_text(json.dumps(twice))
    assert read_config(card) == config and make_entry(card, NAME) == entry
    assert hub.check_folder(card, entry) == []
    assert hub.check_folder(card, dict(entry, model_args=twice['model_args'])) == []
    assert timm.create_model(f'local-dir:{card}', pretrained=True).num_classes == 3


@pytest.mark.parametrize('name', SHIPPED)
def test_the_card_of_a_shipped_weight_runs_as_printed(name, monkeypatch):
    monkeypatch.setenv('CONVNN_TIMM_ZOO', str(ROOT / 'model_cards'))
    text = (SHIPPED[name] / 'README.md').read_text()
    blocks = re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3 and 'More Information Needed' not in text
    for code in blocks:
        exec(compile(code, name, 'exec'), {})


def test_what_is_in_the_folder(published):
    folder = published / 'cards' / NAME
    files = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
    record = {'args.yaml', 'curve.png', 'environment.json', 'recipe.yaml', 'summary.csv'}
    assert files == {
        'README.md', 'config.json', 'golden.safetensors', 'model.safetensors', 'training/evaluation.json',
        *(f'training/{part}{name}' for part in ('', 'twin/', 'seeds/1/') for name in record)}
    assert [path.name for path in (published / 'cards').iterdir()] == [NAME]  # nothing half made
    for path in folder.rglob('*.*'):
        if path.suffix in ('.md', '.json', '.yaml', '.csv'):
            assert str(published) not in path.read_text(), f'{path} names a place on this machine'


def test_a_record_names_no_places(published, tmp_path):
    """Whatever letters they have, and in a run whose recipe is the record of another."""
    run, recipe = tmp_path / 'run', 'epochs: 2  # few\ndata_dir: images\n'
    shutil.copytree(published / 'output' / 'resnet18_convnn_branching', run)
    args = yaml.safe_load((run / 'args.yaml').read_text())
    args.update(data_dir='/home/josé müller/images', output='/output', initial_checkpoint='/data/images/w.pth')
    (run / 'args.yaml').write_text(yaml.safe_dump(args, sort_keys=False))
    command = f'train -c cfg/output.yaml --data-dir {args["data_dir"]} --output=/output pre/data/images/w.pth'
    rewrite(run / 'environment.json', command=command)
    for written, copied in ((run / 'args.yaml').read_text(), None), (recipe, recipe):
        (run / 'recipe.yaml').write_text(written)
        copy_record(run, tmp_path / f'record-{bool(copied)}')
        folder = tmp_path / f'record-{bool(copied)}'
        assert (folder / 'recipe.yaml').read_text() == (copied or (folder / 'args.yaml').read_text())
    record = yaml.safe_load((folder / 'args.yaml').read_text())
    assert record == {**args, 'data_dir': 'images', 'output': 'output', 'initial_checkpoint': 'w.pth'}
    assert json.loads((folder / 'environment.json').read_text())['command'] == (
        'train -c cfg/output.yaml --data-dir images --output=output pre/data/images/w.pth')


def test_everybody_may_read_the_weights(published):
    modes = {path.stat().st_mode for path in (published / 'cards' / NAME).glob('*.*')}
    assert len(modes) == 1


def test_the_folder_is_a_timm_model_with_the_arguments_of_the_run(published):
    folder = published / 'cards' / NAME
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    run = timm.create_model(f'local-dir:{published}/output/resnet18_convnn_branching/model', pretrained=True)
    assert model.layer1[0].conv1.extra_repr() == run.layer1[0].conv1.extra_repr()
    assert model.pretrained_cfg['label_names'] == list(CLASSES) and model.pretrained_cfg['tag'] == 'cifar10'
    stored = load_file(folder / 'model.safetensors')['fc.weight'].dtype
    for loaded, trained in zip(model.state_dict().values(), run.state_dict().values(), strict=True):
        rounded = trained.to(stored).float() if trained.is_floating_point() else trained
        assert torch.equal(loaded, rounded)


def test_the_line_in_the_manifest(published):
    entry, = json.loads((published / 'convnn_timm' / 'models' / 'manifest.json').read_text())
    file = published / 'cards' / NAME / 'model.safetensors'
    evaluation = json.loads((published / 'cards' / NAME / 'training' / 'evaluation.json').read_text())
    assert entry['name'] == NAME and entry['file'] == 'model.safetensors' and entry['dataset'] == 'cifar10'
    assert entry['size'] == file.stat().st_size and entry['sha256'] == _weights.sha256(file)
    assert entry['top1'] == round(evaluation[evaluation['stored']]['top1'], 4)
    assert entry['hub_id'] == f'{_weights.NAMESPACE}/{NAME}' and entry['revision'] is None
    assert entry['model_args']['num_samples'] == 32 and entry['pretrained_cfg']['input_size'] == [3, 16, 16]


def test_weights_are_rounded_only_where_it_costs_nothing(published, monkeypatch):
    """The evaluation is replaced: whether rounding costs anything is then known."""
    model = timm.create_model('resnet18_conv2d', channels=(8, 8, 16, 16))
    for cost, stored, dtype in ((0.05, 'float16', torch.float16), (0.06, 'float32', torch.float32)):
        top1 = iter((90.0, 90.0 - cost))
        monkeypatch.setattr(exporting, 'evaluate', lambda *_, **__: dict(top1=next(top1)))
        precision, results, weights = exporting.choose_precision(model, None, channels_last=True)
        assert precision == stored and weights['fc.weight'].dtype == dtype
        assert weights['bn1.num_batches_tracked'].dtype == torch.int64


def test_golden_inputs_are_noise_and_two_photographs(published):
    golden = load_file(published / 'cards' / NAME / 'golden.safetensors')
    assert golden['inputs'].shape == (3, 3, 16, 16) and golden['logits'].shape == (3, 3)
    assert abs(golden['inputs'][0].std() - 1) < 0.1 and not torch.equal(golden['inputs'][1], golden['inputs'][2])
    model = timm.create_model(f'local-dir:{published}/cards/{NAME}', pretrained=True).eval().double()
    torch.testing.assert_close(model(golden['inputs'].double()), golden['logits'])


def test_what_export_refuses(published, manifest, capsys, tmp_path):
    run, cards = published / 'output' / 'resnet18_convnn_branching', published / 'cards'
    assert 'is there already: --force replaces it' in error_of(
        capsys, 'export', run, '--tag', 'cifar10', '--output', cards)
    assert 'small letters, digits' in error_of(capsys, 'export', run, '--tag', 'CIFAR 10', '--output', tmp_path)
    unfinished = Path(shutil.copytree(run, tmp_path / 'unfinished', ignore=shutil.ignore_patterns('model')))
    assert f'convnn-timm train -c {unfinished}/args.yaml --resume auto' in error_of(
        capsys, 'export', unfinished, '--tag', 'cifar10', '--output', tmp_path)
    foreign = Path(shutil.copytree(run, tmp_path / 'foreign'))
    rewrite(foreign / 'model' / 'config.json', architecture='resnet18')
    assert 'trained resnet18, which is no model of this package' in error_of(
        capsys, 'export', foreign, '--tag', 'cifar10', '--output', tmp_path)
    (foreign / 'model' / 'config.json').write_text('{"architecture":')
    assert f'{foreign}/model/config.json is damaged: ' in error_of(
        capsys, 'export', foreign, '--tag', 'cifar10', '--output', tmp_path)
    assert 'there is no folder nowhere. --data-dir says where' in error_of(
        capsys, 'export', run, '--tag', 'noise', '--output', tmp_path, '--data-dir', 'nowhere')
    for split in ('train', 'validation'):
        for name in CLASSES:
            shutil.copytree(published / 'images' / split / name, tmp_path / 'pets' / split / f'a {name}')
    assert 'tells bee, cat, dog apart, the data has a bee, a cat, a dog. --data-dir says where' in error_of(
        capsys, 'export', run, '--tag', 'noise', '--output', tmp_path, '--data-dir', tmp_path / 'pets')
    before = manifest.read_text()
    assert 'is the name of other weights' in error_of(capsys, 'export', run, '--tag', 'cifar10', '--output', tmp_path)
    for flag, value in (('--dataset-id', 'my photos'), ('--license', 'MIT'), ('--base-model', 'resnet18')):
        assert f'{flag} {value}: a' in error_of(
            capsys, 'export', run, '--tag', 'noise', '--output', tmp_path, flag, value)
    assert manifest.read_text() == before and not (tmp_path / NAME).exists()


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(exporting, 'open_evaluation', lambda *_: pytest.fail('the evaluation was begun'))


def test_export_replaces_nothing_that_it_did_not_write(published, manifest, card, capsys, tmp_path, no_evaluation):
    call = ('export', published / 'output' / NAME.split('.')[0], '--tag', 'cifar10', '--force', '--output', card.parent)
    (card / '.git').mkdir()
    for file in ('notes.txt', '.git/HEAD'):
        (card / file).write_text('mine')
        assert f'{card} holds what export did not write, move it away: {file}' in error_of(capsys, *call)
        (card / file).unlink()
    card.rename(tmp_path / 'elsewhere')
    card.symlink_to(tmp_path / 'elsewhere')
    assert f'{card} is a link or a file' in error_of(capsys, *call)
    assert (tmp_path / 'elsewhere' / 'model.safetensors').is_file()


def test_a_manifest_that_cannot_be_written_is_known_before_the_evaluation(
        published, manifest, capsys, tmp_path, no_evaluation):
    manifest.with_suffix('.partial').mkdir()
    assert f'cannot write {manifest} (Is a directory)' in error_of(
        capsys, 'export', published / 'output' / 'resnet18_conv2d', '--tag', 'noise')


def test_an_installed_copy_records_weights_beside_them_and_stays_as_it_is(
        published, manifest, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'MEASURED_SECONDS', 0.01)
    (tmp_path / 'checkout' / 'pyproject.toml').unlink()
    before = manifest.read_text()
    run = Path(shutil.copytree(published / 'output' / 'resnet18_conv2d', tmp_path / 'run'))
    assert cli.main(['export', str(run), '--tag', 'noise']) == 0
    folder = run / 'resnet18_conv2d.noise'
    out = capsys.readouterr().out
    assert out.startswith(f'{folder}: it loads as local-dir:{folder}.') and 'manifest' not in out
    assert json.loads((folder / 'manifest-line.json').read_text()) == make_entry(folder, folder.name)
    assert manifest.read_text() == before and not any((tmp_path / 'checkout' / 'model_cards').iterdir())
    assert cli.main(['verify', str(folder)]) == 0  # by the hash that is recorded there
    assert 'hash, tensors and logits are right' in capsys.readouterr().out
    assert cli.main(['export', str(run), '--tag', 'noise', '--force']) == 0
    (folder / 'manifest-line.json').write_text('{')
    assert f'{folder}/manifest-line.json is damaged: ' in error_of(capsys, 'verify', folder)
    assert 'is the name of other weights' in error_of(
        capsys, 'export', published / 'output' / NAME.split('.')[0], '--tag', 'cifar10', '--output', tmp_path)


def test_the_manifest_lists_what_is_in_the_checkouts_own_model_cards(published, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'MEASURED_SECONDS', 0.01)
    run, before = published / 'output' / 'resnet18_conv2d', manifest.read_text()
    elsewhere = hub.export(run, 'noise', tmp_path / 'elsewhere')
    assert (elsewhere / 'manifest-line.json').is_file() and manifest.read_text() == before
    here = hub.export(run, 'noise')
    assert here.parent == tmp_path / 'checkout' / 'model_cards' and not (here / 'manifest-line.json').exists()
    entries = {entry['name']: entry for entry in json.loads(manifest.read_text())}
    assert set(entries) == {here.name, NAME} and not entries[here.name]['published']
    manifest.write_text(json.dumps([dict(entry, published=True) for entry in entries.values()]))
    hub.export(run, 'noise', force=True)  # is as published as it was
    assert _weights.published_names() == [here.name, NAME]


@pytest.mark.parametrize('step', ['write_card', 'make_entry'])
def test_an_interrupted_export_leaves_nothing(published, manifest, capsys, tmp_path, monkeypatch, step):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = manifest.read_text()
    monkeypatch.setattr(exporting, 'MEASURED_SECONDS', 0.01)
    monkeypatch.setattr(exporting, step, interrupt)
    run = published / 'output' / 'resnet18_conv2d'
    assert 'interrupted' in error_of(capsys, 'export', run, '--tag', 'noise', '--output', tmp_path / 'cards')
    assert not list((tmp_path / 'cards').iterdir()) and manifest.read_text() == before


def test_an_old_folder_is_kept_until_the_new_one_is_there(card):
    files = sorted(path.name for path in card.iterdir())
    with pytest.raises(FileNotFoundError):
        exporting.put_in_place(card.parent / 'new', card)
    kept, = card.parent.iterdir()
    assert sorted(path.name for path in kept.iterdir()) == files and hub.published_folders(card.parent) == []


def test_repetitions_are_the_same_training_with_other_seeds(published, tmp_path):
    run = published / 'output' / 'resnet18_convnn_branching'

    def refused(folder):
        with pytest.raises(hub.WeightsError) as error:
            hub.export(run, 'cifar10', tmp_path / 'cards', seeds=[folder])
        return str(error.value)

    copy = Path(shutil.copytree(run, tmp_path / 'run'))
    assert f'{copy} and {run} have the same seed, 0' in refused(copy)
    other = repeat(copy, 1, lr=0.3, epochs=9)
    assert f'{other} is no repetition of {run}: they differ in epochs, lr' in refused(other)
    shorter = repeat(copy, 2)
    (shorter / 'summary.csv').write_text('\n'.join((copy / 'summary.csv').read_text().splitlines()[:2]) + '\n')
    assert f'{shorter} has 1 epochs, {run} 2' in refused(shorter)
    fewer = repeat(copy, 3)
    set_last(fewer, 'eval_images', 12)
    assert f'{fewer} was evaluated on 12 images, {run} on 24' in refused(fewer)
    rewrite(fewer / 'model' / 'config.json', label_names=['ant', 'cat', 'dog'])
    assert f'{fewer} tells other classes apart than {run}' in refused(fewer)
    with pytest.raises(hub.WeightsError, match='tells other classes apart'):
        hub.export(run, 'cifar10', tmp_path / 'cards', twin=fewer)
    (shorter / 'summary.csv').unlink()
    assert f'{shorter} is not finished' in refused(shorter)
    assert not (tmp_path / 'cards').exists()


def test_published_tags_are_known_to_timm_beside_the_default_ones(manifest):
    entry, = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([entry, {**entry, 'name': 'resnet18_convnn.digits'}]))
    own = dict(url='', num_classes=10, input_size=(3, 32, 32))
    cfgs = _weights.with_weights({'resnet18_convnn.cifar10': own, NAME: own})
    published = dict(own, **{k: tuple(v) if isinstance(v, list) else v for k, v in entry['pretrained_cfg'].items()})
    published.update(hf_hub_id=entry['hub_id'], input_size=(3, 16, 16), num_classes=3)
    assert cfgs == {
        'resnet18_convnn.cifar10*': own, f'{NAME}*': published, 'resnet18_convnn.digits': published}


# The card

def test_metadata_is_what_the_hub_asks_for(published):
    data = ModelCard.load(published / 'cards' / NAME / 'README.md').data
    evaluation = json.loads((published / 'cards' / NAME / 'training' / 'evaluation.json').read_text())
    assert data.library_name == 'timm' and data.pipeline_tag == 'image-classification' and data.license == 'mit'
    assert data.datasets == ['uoft-cs/cifar10'] and data.metrics == ['accuracy'] and data.model_name == NAME
    top1 = data.eval_results[0]
    assert top1.dataset_split == 'test'  # as the Hub calls it, in the folder it is `validation`
    assert top1.dataset_type == 'uoft-cs/cifar10' and top1.dataset_name == 'CIFAR-10 (made of noise)'
    assert top1.task_type == 'image-classification'
    assert top1.metric_value == round(evaluation[evaluation['stored']]['top1'], 2)


def test_the_card_tells_what_was_recorded(published):
    text = (published / 'cards' / NAME / 'README.md').read_text()
    titles = re.findall('^## (.*)', text, re.MULTILINE)
    assert titles == [
        'Model Details', 'Model Usage', 'Training', 'Evaluation', 'Limitations', 'Citation']
    assert 'More Information Needed' not in text and 'None' not in text
    evaluation = json.loads((published / 'cards' / NAME / 'training' / 'evaluation.json').read_text())
    model = timm.create_model(f'local-dir:{published}/cards/{NAME}', pretrained=True)
    assert f'**Parameters (M):** {sum(p.numel() for p in model.parameters()) / 1e6:.2f}' in text
    assert 'CIFAR-10 (made of noise)' in text and '3: bee, cat, dog' in text and '`num_samples=32`' in text
    assert '`epochs: 2`' in text and '`batch_size: 8`' in text  # where the run left its recipe
    assert 'On all 24 images of the split `test`' in text
    speed = evaluation['inference']
    assert f'{speed["images_per_s"]:.0f} images/s, float32, batches of 64, on {speed["machine"]}' in text
    for folder in ('training', 'training/twin'):
        last = (published / 'cards' / NAME / folder / 'summary.csv').read_text().split()[-1].split(',')
        model = yaml.safe_load((published / 'cards' / NAME / folder / 'args.yaml').read_text())['model']
        seeds, points = (r'0, 1', r' ± \d+\.\d\d') if folder == 'training' else ('0', '')
        top1 = last_top1(published / 'cards' / NAME / folder) + (2.5 if folder == 'training' else 0)
        assert re.search(rf'\| `{model}` \|.*\| {seeds} \| 2 \| {top1:.2f}{points} \| {float(last[6]):.2f}', text)
    assert 'The twin was trained with the same arguments.' in text
    assert 'Of several seeds these are the mean and the sample standard deviation' in text


def test_the_card_says_how_far_seeds_differ(card):
    training = card / 'training'
    repeat(training / 'seeds' / '1', 2).rename(training / 'seeds' / '2')
    for folder, top1 in ((training, 90.), (training / 'seeds' / '1', 91.), (training / 'seeds' / '2', 92.5)):
        set_top1(folder, top1)
    write_card(card, NAME)
    text = (card / 'README.md').read_text()
    assert 'The same training with 3 seeds, as recorded after the last epoch.' in text
    assert 'sample standard deviation: **91.17 ± 1.26**' in text and '| 1 | 91.00 |' in text and '1 seed:' not in text
    shutil.rmtree(training / 'seeds')
    write_card(card, NAME)
    text = (card / 'README.md').read_text()
    assert 'one run with 1 seed: how far others would differ from it was not measured' in text and '±' not in text
    assert 'Of several seeds' not in text


def test_seeds_beyond_nine_are_in_order(card):
    seeds = card / 'training' / 'seeds'
    for seed in (10, 2):
        repeat(seeds / '1', seed).rename(seeds / str(seed))
    write_card(card, NAME)
    assert '| 0, 1, 2, 10 | 2 |' in (card / 'README.md').read_text()


def test_the_twin_may_be_published_and_brings_its_seeds(published, manifest, results_table, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'MEASURED_SECONDS', 0.01)
    hybrid, conv = (published / 'output' / f'resnet18_{layer}' for layer in ('convnn_branching', 'conv2d'))
    conv = Path(shutil.copytree(conv, tmp_path / 'conv'))
    set_top1(conv, 92.)
    twin = hub.export(conv, 'noise', tmp_path / 'cards', seeds=[repeat(conv, 4, points=1.)])
    folder = hub.export(hybrid, 'noise', tmp_path / 'cards', twin=twin)
    assert {path.name for path in (folder / 'training' / 'twin').iterdir()} == {
        'args.yaml', 'curve.png', 'environment.json', 'recipe.yaml', 'seeds', 'summary.csv'}
    text = (folder / 'README.md').read_text()
    assert re.search(r'\| `resnet18_conv2d` \|.*\| 0, 4 \| 2 \| 92\.50 ± 0\.71 \|', text)
    assert 'Of several seeds these are the mean and the sample standard deviation' in text
    assert 'This is one run with 1 seed' in text and 'One run says little' in text  # of the weights themselves
    assert '`resnet18_conv2d` 92.50 ± 0.71' in results_table.zoo_row(read_card(folder, folder.name), '')
    assert hub.check_folder(folder) == []


@pytest.mark.parametrize('architecture, model_args, text', [
    ('resnet18_convnn', {'sampling_type': 'all', 'K': 9}, 'as in the paper, with its standard arguments\n'),
    ('resnet18_convnn_branching_224', dict(
        sampling_type='random', num_samples=64, branch_mix=False, K=5, global_pool='avg'),
     'except that neighbours are searched among 64 random positions; the branches stand side by side, no 1x1 '
     'convolution mixes them; `K` is 5, not 9\n'),
    ('resnet18_conv2d', dict(sampling_type='random', in_chans=3), 'convolutions of PyTorch\n'),
    ('convnn_converted', dict(base='test_resnet', convert=dict(branch_ratio=0.25)), 'as the arguments say\n')])
def test_the_card_says_in_which_form_the_layers_are(card, architecture, model_args, text):
    rewrite(card / 'config.json', architecture=architecture, model_args=model_args)
    write_card(card, NAME)
    arguments, line = re.findall(r'^- \*\*(?:Architecture|Layers):\*\* (.*\n)', (card / 'README.md').read_text(), re.MULTILINE)
    assert line.endswith(text)
    if architecture == 'resnet18_conv2d':  # which has no use for it
        assert arguments == '`resnet18_conv2d`, `in_chans=3`\n'


def test_the_card_says_where_the_twin_differs(published, card):
    file = card / 'training' / 'twin' / 'args.yaml'
    args = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**args, 'lr': 0.3, 'device': 'mps'}))
    write_card(card, NAME)
    assert f'with other arguments: `lr`: {args["lr"]} here, 0.3 there.' in (card / 'README.md').read_text()
    set_last(file.parent, 'eval_images', 12)
    write_card(card, NAME)
    assert '0.3 there, and evaluated on 12 images, not 24. Both' in (card / 'README.md').read_text()


def test_step_times_are_compared_on_one_machine(card):
    def text():
        write_card(card, NAME)
        return (card / 'README.md').read_text()

    training, twin = card / 'training', card / 'training' / 'twin'
    (twin / 'seeds').mkdir()
    repeat(twin, 1).rename(twin / 'seeds' / '1')
    for run, speed in ((training, 100.), (training / 'seeds' / '1', 100.), (twin, 140.), (twin / 'seeds' / '1', 250.)):
        set_column(run, 'train_images_per_s', speed)
    assert 'with seed 0, both on ' in text() and '| 1.4 x |\n' in text() and 'do not compare' not in text()
    rewrite(twin / 'environment.json', gpu='H200')
    assert 'with seed 1, both on ' in text() and '| 2.5 x |\n' in text()
    for run in (training / 'seeds' / '1', twin / 'seeds' / '1'):  # resumed on another machine, which epoch was where?
        shutil.copy(twin / 'environment.json', run / 'environment-1.json')
    assert 'No run and its twin were trained on one machine' in text() and text().count('| – |\n') == 2
    assert 'images/s in training' not in text().partition('### Model Comparison')[2]


def test_what_an_older_trainer_did_not_know_was_as_by_default(card):
    args = yaml.safe_load((card / 'training' / 'args.yaml').read_text())
    assert args.pop('lr_k_decay') == 1
    (card / 'training' / 'twin' / 'args.yaml').write_text(yaml.safe_dump(args))
    write_card(card, NAME)
    assert 'The twin was trained with the same arguments.' in (card / 'README.md').read_text()


def test_the_card_says_that_epochs_were_trained_on_smaller_images(card):
    file = card / 'training' / 'args.yaml'
    assert 'train_sizes' not in (card / 'README.md').read_text()
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), 'train_sizes': [8, 12]}))
    write_card(card, NAME)
    assert '\n| train_sizes | 8 12 |\n' in (card / 'README.md').read_text()
    assert re.search(r'by training/recipe\.yaml with .*`train_sizes: \[8, 12\]`', (card / 'README.md').read_text())


@pytest.mark.parametrize('crop_padding, rows', [
    (2, '| crop_padding | 2 |\n| crop_padding_mode | reflect |\n'), (0, ''), (None, '')])
def test_the_card_says_how_images_were_cropped(card, crop_padding, rows):
    file = card / 'training' / 'args.yaml'
    crops = dict(crop_padding=crop_padding, crop_padding_mode='reflect')
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **crops}))
    write_card(card, NAME)
    text = (card / 'README.md').read_text()
    assert rows in text and text.count('| crop_') == rows.count('| crop_')


def test_a_card_without_twin_recipe_or_classes(card):
    shutil.rmtree(card / 'training' / 'twin')
    shutil.rmtree(card / 'training' / 'seeds')
    (card / 'training' / 'recipe.yaml').unlink()
    rewrite(card / 'config.json', label_names=None)
    rewrite(card / 'training' / 'evaluation.json', note='')
    write_card(card, NAME)
    text = (card / 'README.md').read_text()
    assert 'twin' not in text and 'recipe' not in text and 'None' not in text
    assert 'Trained on CIFAR-10: 48 images in 3 classes.' in text and '**Classes:** 3\n' in text


@pytest.mark.parametrize('args, told, name, hub_id, split', [
    ({}, {}, 'the folder images', None, 'validation'),  # though the tag is cifar10
    (dict(data_dir='.'), {}, 'a folder', None, 'validation'),
    ({}, dict(dataset_name='Pets'), 'Pets', None, 'validation'),
    ({}, dict(dataset_id='me/pets'), 'me/pets', 'me/pets', 'validation'),
    ({}, dict(dataset_id='me/pets', dataset_name='Pets', dataset_split='dev'), 'Pets', 'me/pets', 'dev'),
    ({}, dict(dataset_id='uoft-cs/cifar100', dataset_split='test'), 'CIFAR-100', 'uoft-cs/cifar100', 'test'),
    (dict(dataset='torch/cifar10'), {}, 'CIFAR-10', 'uoft-cs/cifar10', 'test'),
    (dict(dataset='torch/cifar10'), dict(split='train'), 'CIFAR-10', 'uoft-cs/cifar10', 'train'),
    (dict(dataset='torch/places365'), {}, 'places365', None, 'validation'),
    (dict(dataset='hfds/me/pets'), {}, 'me/pets', 'me/pets', 'validation'),
    (dict(dataset='hfds/pets'), {}, 'pets', None, 'validation'),
])
def test_the_data_is_what_the_run_and_the_user_say_it_is(card, args, told, name, hub_id, split):
    """A tag alone says nothing, and no identifier on the Hub is made up."""
    unknown = dict(dataset_id='', dataset_name='', dataset_split='')
    rewrite(card / 'training' / 'evaluation.json', **{**unknown, 'tag': 'cifar10', **told})
    file = card / 'training' / 'args.yaml'
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **args}))
    write_card(card, NAME)
    data, text = ModelCard.load(card / 'README.md').data, (card / 'README.md').read_text()
    classes = '' if hub_id else ' (bee, cat, dog)'
    assert f'Trained on {name} (made of noise): 48 images in 3 classes{classes}.\n' in text
    assert f'On all 24 images of the split `{split}` of {name} (made of noise)' in text
    assert data.datasets == (hub_id and [hub_id])
    result = data.eval_results[0]
    assert result.dataset_type == hub_id or not hub_id and '/' not in result.dataset_type
    assert result.dataset_name == f'{name} (made of noise)' and result.dataset_split == split


def test_names_do_not_break_the_card(card, results_table):
    names = ['a|b', '- c', 'd\n\n# e', '*f*', '_g_h_', '`i`', '<b>', 'j\x07\udcff', '[k](l)']
    rewrite(card / 'config.json', label_names=names)
    rewrite(card / 'training' / 'evaluation.json', dataset_id='', dataset_name='x: "y"\n---\n|z`', note='')
    args = card / 'training' / 'args.yaml'
    recorded = yaml.safe_load(args.read_text())
    args.write_text(yaml.safe_dump({**recorded, 'initial_checkpoint': 'a`b\n.pt', 'opt': 'a|b'}))
    write_card(card, NAME)
    text, clean = (card / 'README.md').read_text(), ModelCard.load(card / 'README.md').data
    shown = r'a|b, - c, d  \# e, \*f\*, \_g_h\_, \`i\`, \<b\>, j  , \[k\](l)'
    assert f'**Classes:** 3: {shown}\n' in text and f'3 classes ({shown}).\n' in text
    assert clean.eval_results[0].dataset_name == 'x: "y" --- |z`' and 'Trained on x: "y" --- |z\\`: 48' in text
    assert 'from the weights in `` a`b .pt ``.' in text and '\n| opt | a\\|b |\n' in text
    assert results_table.markdown(['a|b'], [['c|d']]) == '| a\\|b |\n|---|\n| c\\|d |\n'


@pytest.mark.parametrize('args, repository', [
    (dict(model='resnet18.a1_in1k'), 'timm/resnet18.a1_in1k'),
    (dict(model='test_resnet'), 'timm/test_resnet.r160_in1k'),
    (dict(model='convnn_converted', model_kwargs=dict(base='resnet18.a1_in1k')), 'timm/resnet18.a1_in1k'),
    (dict(model='hf-hub:me/net@v1'), 'me/net'),
    (dict(model='local-dir:net'), None),
    (dict(model='resnet18_conv2d'), None),
    (dict(model=NAME), None),  # its repository does not exist yet
    (dict(model='resnet18.a1_in1k', pretrained=False), None),
    (dict(model='resnet18.a1_in1k', initial_checkpoint='other.safetensors'), None),
])
def test_the_base_model_is_what_the_run_started_from(args, repository):
    assert base_of(dict(pretrained=True, initial_checkpoint='', model_kwargs={}) | args) == repository


def converted_run(published: Path, output: Path, *flags: str) -> Path:
    return train([
        '--data-dir', f'{published}/images', *flags, '--convert',
        *'where=layer1.* sampling_type=random num_samples=8 K=3'.split(), '--img-size', '64', '-b', '8', '--opt', 'sgd',
        '--lr', '0.01', *'--epochs 1 --warmup-epochs 0 --workers 0 --no-amp --device cpu'.split(),
        '--output', str(output), '--experiment', 'run'])


def test_no_licence_and_no_start_is_assumed(published, manifest, capsys, caplog, tmp_path, monkeypatch):
    """From the weights that the training starts from to logits that the command checks."""
    monkeypatch.setattr(exporting, 'MEASURED_SECONDS', 0.01)
    start = tmp_path / 'start.safetensors'
    save_file(timm.create_model('test_resnet', num_classes=3).state_dict(), start)
    run = converted_run(published, tmp_path, '--model', 'test_resnet', '--initial-checkpoint', str(start))
    assert 'license' not in json.loads((run / 'model' / 'config.json').read_text())['pretrained_cfg']
    call = ['export', str(run), '--tag', 'noise']
    assert cli.main(call) == 0
    folder = tmp_path / 'checkout' / 'model_cards' / 'test_resnet_converted.noise'
    assert f'{folder}, with a line in {manifest}: it loads as local-dir:{folder}' in capsys.readouterr().out
    for field, flag in (
            ('licence', 'license'), ('data set on the Hub', 'dataset-id'),
            ('base model, though the training started from weights', 'base-model')):
        assert f'{folder}: the card names no {field}; `convnn-timm export --{flag}` fills it in' in caplog.text
    card = ModelCard.load(folder / 'README.md')
    assert card.data.license is None and card.data.datasets is None and card.data.base_model is None
    assert 'On the folder images, from the weights in `start.safetensors`. All arguments' in card.content
    assert "timm.create_model('hf-hub:convnn-timm/test_resnet_converted.noise', pretrained=True)" in card.content
    assert cli.main(['verify', str(folder)]) == 0
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).layer1[0].conv1.branch1.num_samples == 8

    caplog.clear()
    told = ['--license', 'cc-by-4.0', '--base-model', 'me/start', '--dataset-id', 'me/noise']
    assert cli.main([*call, '--force', *told]) == 0 and not caplog.text
    data = ModelCard.load(folder / 'README.md').data
    assert (data.license, data.base_model, data.datasets) == ('cc-by-4.0', 'me/start', ['me/noise'])


def test_a_fine_tuned_network_keeps_the_licence_of_its_start(published, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'MEASURED_SECONDS', 0.01)
    save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path / 'start', safe_serialization=True)
    run = converted_run(published, tmp_path, '--model', f'local-dir:{tmp_path}/start', '--pretrained')
    data = ModelCard.load(hub.export(run, 'noise', tmp_path / 'cards') / 'README.md').data
    assert data.license == 'apache-2.0'


# The tables of results

@pytest.fixture(scope='module')
def results_table(load_script):
    return load_script('results_table')


def test_tables_in_the_repository_are_what_the_command_writes(results_table):
    for file, text in results_table.tables().items():
        assert file.read_text() == text, f'{file}: run python train_scripts/results_table.py'


def test_a_slowed_epoch_does_not_count_as_the_speed(card, tmp_path):
    training = shutil.copytree(card / 'training', tmp_path / 'training')
    columns, *_ = (training / 'summary.csv').read_text().splitlines()
    rows = [','.join(speed if name == 'train_images_per_s' else '0' for name in columns.split(','))
            for speed in ('100.0', '2.0', '90.0')]
    (training / 'summary.csv').write_text('\n'.join([columns, *rows]) + '\n')
    run = Record(training)
    assert run.speed == 90
    run.args['train_sizes'] = [8]  # a first epoch of smaller images does not count either
    assert run.speed == 46


def test_table_of_published_weights(results_table, manifest, card, tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / 'model_cards'):
        folder.mkdir(exist_ok=True)
        (folder / 'README.md').write_text('before\n<!-- zoo -->\nold\n<!-- /zoo -->\nafter\n')
    (tmp_path / 'train_scripts' / 'results').mkdir(parents=True)

    def zoo(file='README.md'):
        text = results_table.tables(tmp_path)[tmp_path / file]
        assert re.fullmatch('before\n<!-- zoo -->\n.*\n<!-- /zoo -->\nafter\n', text, re.DOTALL) and 'old' not in text
        return text

    assert 'No weights are published yet.' in zoo()
    shutil.copytree(card, tmp_path / 'model_cards' / NAME)
    (tmp_path / 'model_cards' / f'.{NAME}.partial').mkdir()  # an export was killed
    shutil.copy(card / 'config.json', tmp_path / 'model_cards' / f'.{NAME}.partial')
    shutil.copytree(card, tmp_path / 'model_cards' / 'resnet18_convnn_branching.toy')  # is in no line of the manifest
    training = tmp_path / 'model_cards' / NAME / 'training'
    for folder, top1 in ((training, 90.), (training / 'seeds' / '1', 91.), (training / 'twin', 92.5)):
        set_top1(folder, top1)
    set_column(training, 'train_images_per_s', 100.)
    set_column(training / 'twin', 'train_images_per_s', 140.)
    assert 'No weights are published yet.' in zoo()  # these were exported, no more
    entry, = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([dict(entry, published=True)]))
    row, = (line for line in zoo().splitlines() if line.startswith(f'| [`{NAME}`](model_cards/{NAME}) |'))
    cells = [cell.strip() for cell in row.split('|')[2:-1]]
    assert cells[:6] == ['90.50 ± 0.71', '2 seeds', '`resnet18_conv2d` 92.50', '11.2 M', '0.142 G', '2']
    assert re.fullmatch(r'1\.4 x, on .* threads?', cells[6]) and 'toy' not in zoo()
    assert f'| [`{NAME}`]({NAME}) |' in zoo('model_cards/README.md') and 'CIFAR-10 (made of noise)' in zoo()
    shutil.rmtree(training / 'seeds')
    shutil.rmtree(training / 'twin')
    assert '| 90.00 | 1 seed |  |' in zoo() and '| 2 | – |\n' in zoo()
    (tmp_path / 'README.md').write_text('no marks')
    with pytest.raises(SystemExit, match='README.md needs the lines <!-- zoo --> and <!-- /zoo -->'):
        zoo()


# verify

def test_verify_a_good_folder(published, manifest, capsys):
    assert cli.main(['verify', str(published / 'cards' / NAME)]) == 0
    assert 'hash, tensors and logits are right' in capsys.readouterr().out
    manifest.write_text('[]')
    assert cli.main(['verify', str(published / 'cards' / NAME)]) == 0
    assert 'no hash is known, tensors and logits are right' in capsys.readouterr().out


def test_verify_says_what_differs(manifest, card, capsys):
    weights, config = (card / 'model.safetensors').read_bytes(), (card / 'config.json').read_text()
    published_line = manifest.read_text()

    def damage(content):
        (card / 'model.safetensors').write_bytes(content)
        return error_of(capsys, 'verify', card)

    assert 'it is damaged, or holds other weights (its sha256 is' in damage(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert 'is cut short' in damage(weights[:1000])
    (card / 'model.safetensors').write_bytes(weights)
    (card / 'config.json').write_text(config.replace('"bee"', '"zebra"'))
    assert "label_names is ['zebra', 'cat', 'dog'], published is ['bee', 'cat', 'dog']" in error_of(capsys, 'verify', card)
    (card / 'config.json').write_text(config)
    manifest.write_text('[]')  # from here on without a hash
    assert 'is cut short or no safetensors file' in damage(weights[:1000])
    tensors = load(weights)
    tensors['fc.bias'] += 0.01
    assert 'logits differ from the golden ones by up to' in damage(save(tensors))
    del tensors['fc.bias']
    assert 'lacks fc.bias' in damage(save(tensors))
    (card / 'model.safetensors').write_bytes(weights)
    rewrite(card / 'config.json', architecture='resnet18_conv2d')
    assert 'has layer1.0.conv1.branch1.weight, the model has not' in error_of(capsys, 'verify', card)
    (card / 'config.json').write_text(config.replace('num_samples', 'samples'))
    assert 'describes no model' in error_of(capsys, 'verify', card)
    (card / 'config.json').write_text(config.replace('"num_samples": 32', '"num_samples": 40'))
    assert 'logits differ' in error_of(capsys, 'verify', card)
    rewrite(card / 'config.json', pretrained_cfg=None, model_args=json.loads(config)['model_args'])
    assert cli.main(['verify', str(card)]) == 0  # nothing of it is needed
    manifest.write_text(published_line)
    assert 'input_size is None, published is [3, 16, 16]' in error_of(capsys, 'verify', card)
    (card / 'config.json').write_text(config[:100])
    assert f'{card}/config.json is damaged: ' in error_of(capsys, 'verify', card)
    (card / 'config.json').write_text(config)
    golden = load_file(card / 'golden.safetensors')
    save_file({**golden, 'inputs': golden['inputs'][:, :1].contiguous()}, card / 'golden.safetensors')
    assert f'{card}/golden.safetensors: the model takes no inputs as these are' in error_of(capsys, 'verify', card)
    manifest.write_text('[]')
    save_file(dict(inputs=torch.zeros(1, 3, 16, 16)), card / 'golden.safetensors')
    assert 'holds inputs, not inputs and logits' in error_of(capsys, 'verify', card)
    (card / 'golden.safetensors').unlink()
    assert 'has no golden.safetensors' in error_of(capsys, 'verify', card)
    assert 'is no published weight (none yet)' in error_of(capsys, 'verify', 'resnet18_convnn.cifar10')
