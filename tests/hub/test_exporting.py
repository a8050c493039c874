"""`convnn-timm export`: what is in the folder that it makes, what it refuses, and the line in the manifest."""
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from convnn_timm import hub
from convnn_timm import cli
from convnn_timm.hub import exporting
from convnn_timm.hub.card import read_card
from convnn_timm.hub.exporting import base_of
from convnn_timm.hub.manifest import make_entry
from convnn_timm.models import _weights
from convnn_timm.train.engine import main as train
from publishing import CLASSES, NAME, error_of, repeat, rewrite, set_top1


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
    assert len({path.stat().st_mode for path in folder.glob('*.*')}) == 1  # everybody may read the weights


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
    entry, = json.loads((published / 'manifest.json').read_text())
    file = published / 'cards' / NAME / 'model.safetensors'
    evaluation = json.loads((published / 'cards' / NAME / 'training' / 'evaluation.json').read_text())
    assert entry['name'] == NAME and entry['file'] == 'model.safetensors'
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


def test_published_tags_are_known_to_timm_beside_the_default_ones(manifest):
    entry, = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([entry, {**entry, 'name': 'resnet18_convnn.digits'}]))
    own = dict(url='', num_classes=10, input_size=(3, 32, 32))
    cfgs = _weights.with_weights({'resnet18_convnn.cifar10': own, NAME: own})
    published = dict(own, **{k: tuple(v) if isinstance(v, list) else v for k, v in entry['pretrained_cfg'].items()})
    published.update(hf_hub_id=entry['hub_id'], input_size=(3, 16, 16), num_classes=3)
    assert cfgs == {
        'resnet18_convnn.cifar10*': own, f'{NAME}*': published, 'resnet18_convnn.digits': published}


def test_the_twin_may_be_published_and_brings_its_seeds(published, manifest, results_table, tmp_path, monkeypatch):
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
    save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path / 'start', safe_serialization=True)
    run = converted_run(published, tmp_path, '--model', f'local-dir:{tmp_path}/start', '--pretrained')
    data = ModelCard.load(hub.export(run, 'noise', tmp_path / 'cards') / 'README.md').data
    assert data.license == 'apache-2.0'
