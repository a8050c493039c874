"""From a run to the folder of a published weight: what is in it, and that its card tells what the run recorded."""
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
from safetensors.torch import load, load_file, save

from convnn_timm import cli, hub
from convnn_timm.models import _weights
from convnn_timm.train import main as train

NAME = 'resnet18_convnn_branching.cifar10'
CLASSES = ('bee', 'cat', 'dog')
PACKAGE = Path(hub.__file__).parent


@functools.cache
def publish(base: Path) -> Path:
    """A copy of the package, and beside it `output` with two runs of seconds and `cards` with a published weight."""
    root, noise = base / 'published', np.random.default_rng(0)
    for split, count in (('train', 16), ('validation', 8)):
        for channel, name in enumerate(CLASSES):
            (root / 'images' / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 160, (16, 16, 3)).astype(np.uint8)
                pixels[..., channel] += 40
                Image.fromarray(pixels).save(root / 'images' / split / name / f'{i}.png')
    flags = (
        f'-c cifar10 --data-dir {root}/images --model-kwargs channels=8,8,16,16 sampling_type=random num_samples=32 '
        f'--img-size 16 -b 8 --epochs 2 --warmup-epochs 0 --workers 0 --no-amp --device cpu --output {root}/output')
    for model in ('resnet18_convnn_branching', 'resnet18_conv2d'):
        train([*flags.split(), '--model', model, '--experiment', model])
    shutil.copytree(PACKAGE, root / 'convnn_timm', ignore=shutil.ignore_patterns('__pycache__'))
    (root / 'convnn_timm' / 'manifest.json').write_text('[]\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_weights, 'MANIFEST', root / 'convnn_timm' / 'manifest.json')
        hub.export(
            root / 'output' / 'resnet18_convnn_branching', 'cifar10', root / 'cards',
            twin=root / 'output' / 'resnet18_conv2d', data_note='made of noise')
    return root


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    return publish(tmp_path_factory.getbasetemp())


@pytest.fixture
def manifest(published, monkeypatch, tmp_path):
    """A copy of the manifest, for this test."""
    copy = shutil.copy(published / 'convnn_timm' / 'manifest.json', tmp_path / 'manifest.json')
    monkeypatch.setattr(_weights, 'MANIFEST', Path(copy))
    return Path(copy)


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

def test_every_shipped_weight_is_whole_and_its_card_runs_as_printed():
    entries = json.loads((PACKAGE / 'manifest.json').read_text())
    folders = {path.parent.name: path.parent for path in (PACKAGE.parent / 'model_cards').glob('*/config.json')}
    assert set(folders) == {entry['name'] for entry in entries}
    for entry in entries:
        assert hub.check_folder(folders[entry['name']], entry) == []
        text = (folders[entry['name']] / 'README.md').read_text()
        for code in re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE):
            exec(compile(code, entry['name'], 'exec'), {})


def test_what_is_in_the_folder(published):
    folder = published / 'cards' / NAME
    files = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
    record = {'args.yaml', 'curve.png', 'environment.json', 'recipe.yaml', 'summary.csv'}
    assert files == {
        'README.md', 'config.json', 'golden.safetensors', 'model.safetensors', 'training/evaluation.json',
        *(f'training/{name}' for name in record), *(f'training/twin/{name}' for name in record)}
    assert [path.name for path in (published / 'cards').iterdir()] == [NAME]  # nothing half made
    for path in folder.rglob('*.*'):
        if path.suffix in ('.md', '.json', '.yaml', '.csv'):
            assert str(published) not in path.read_text(), f'{path} names a place on this machine'


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
    entry, = json.loads((published / 'convnn_timm' / 'manifest.json').read_text())
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
        monkeypatch.setattr(hub, 'evaluate', lambda *_, **__: dict(top1=next(top1)))
        precision, results, weights = hub.choose_precision(model, None, channels_last=True)
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
    assert 'there is no folder nowhere. --data-dir says where' in error_of(
        capsys, 'export', run, '--tag', 'cifar10', '--output', tmp_path, '--data-dir', 'nowhere')


def test_published_tags_are_known_to_timm_beside_the_default_ones(manifest):
    entry, = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([entry, {**entry, 'name': 'resnet18_convnn.digits'}]))
    names = _weights.tagged_names(['resnet18_convnn', 'resnet18_convnn_branching'])
    assert names == ['resnet18_convnn.cifar10', NAME, 'resnet18_convnn.digits']
    cfg = _weights.published_cfg(NAME)
    assert cfg['hf_hub_id'] == entry['hub_id'] and cfg['input_size'] == (3, 16, 16) and cfg['num_classes'] == 3
    assert _weights.published_cfg('resnet18_convnn.cifar10') == {}


# The card

def test_metadata_is_what_the_hub_asks_for(published):
    data = ModelCard.load(published / 'cards' / NAME / 'README.md').data
    evaluation = json.loads((published / 'cards' / NAME / 'training' / 'evaluation.json').read_text())
    assert data.library_name == 'timm' and data.pipeline_tag == 'image-classification' and data.license == 'mit'
    assert data.datasets == ['uoft-cs/cifar10'] and data.metrics == ['accuracy'] and data.model_name == NAME
    top1 = data.eval_results[0]
    assert top1.dataset_type == 'uoft-cs/cifar10' and top1.task_type == 'image-classification'
    assert top1.metric_value == round(evaluation[evaluation['stored']]['top1'], 2)


def test_the_card_tells_what_was_recorded(published):
    text = (published / 'cards' / NAME / 'README.md').read_text()
    titles = re.findall('^## (.*)', text, re.MULTILINE)
    assert titles == [
        'Model Details', 'Model Usage', 'Training', 'Evaluation', 'Limitations', 'Citation']
    assert 'More Information Needed' not in text and 'None' not in text
    model = timm.create_model(f'local-dir:{published}/cards/{NAME}', pretrained=True)
    assert f'**Parameters (M):** {sum(p.numel() for p in model.parameters()) / 1e6:.2f}' in text
    assert 'CIFAR-10 (made of noise)' in text and '3: bee, cat, dog' in text and '`num_samples=32`' in text
    assert '`epochs: 2`' in text and '`batch_size: 8`' in text  # where the run left its recipe
    assert 'On all 24 images of the split `validation`' in text
    for folder in ('training', 'training/twin'):
        last = (published / 'cards' / NAME / folder / 'summary.csv').read_text().split()[-1].split(',')
        model = yaml.safe_load((published / 'cards' / NAME / folder / 'args.yaml').read_text())['model']
        assert re.search(rf'\| `{model}` \|.*\| 0 \| 2 \| {float(last[5]):.2f} \| {float(last[6]):.2f} \|', text)
    assert 'The twin was trained with the same arguments.' in text


def test_the_card_says_where_the_twin_differs(published, card):
    file = card / 'training' / 'twin' / 'args.yaml'
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), 'lr': 0.3, 'device': 'mps'}))
    hub.write_card(card, NAME)
    assert 'with other arguments: `lr`: 0.1 here, 0.3 there.' in (card / 'README.md').read_text()


def test_a_card_without_twin_recipe_classes_or_known_data(card):
    shutil.rmtree(card / 'training' / 'twin')
    (card / 'training' / 'recipe.yaml').unlink()
    rewrite(card / 'config.json', label_names=None)
    rewrite(card / 'training' / 'evaluation.json', tag='noise', note='')
    hub.write_card(card, NAME)
    text = (card / 'README.md').read_text()
    assert 'twin' not in text and 'recipe' not in text and 'None' not in text and 'Trained on noise.' in text
    assert ModelCard.load(card / 'README.md').data.datasets is None


# verify

def test_verify_a_good_folder(published, manifest, capsys):
    assert cli.main(['verify', str(published / 'cards' / NAME)]) == 0
    assert 'hash, tensors and logits are right' in capsys.readouterr().out
    manifest.write_text('[]')
    assert cli.main(['verify', str(published / 'cards' / NAME)]) == 0
    assert 'no hash is known, tensors and logits are right' in capsys.readouterr().out


def test_verify_says_what_differs(manifest, card, capsys):
    weights, config = (card / 'model.safetensors').read_bytes(), (card / 'config.json').read_text()

    def damage(content):
        (card / 'model.safetensors').write_bytes(content)
        return error_of(capsys, 'verify', card)

    assert 'is damaged: its sha256 is' in damage(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert 'is damaged' in damage(weights[:1000])
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
    (card / 'golden.safetensors').unlink()
    assert 'has no golden.safetensors' in error_of(capsys, 'verify', card)
    assert 'is no published weight (none yet)' in error_of(capsys, 'verify', 'resnet18_convnn.cifar10')
