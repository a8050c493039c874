"""The quickstart: its photographs, its data, its folder, its pictures, and all of it in one go."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from convnn_timm import cli, quickstart as qs
from convnn_timm.models._weights import WeightsError


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('quickstart') / 'digits'
    qs.write_digits(folder)
    return folder


def test_digits_are_the_scans(digits):
    scans, targets = load_digits(return_X_y=True)
    files = {int(p.stem): p for p in digits.rglob('*.png')}
    assert sorted(files) == list(range(1797))
    for i in range(0, 1797, 100):
        image = Image.open(files[i])
        assert image.size == (16, 16) and image.mode == 'L'
        assert files[i].parent.name == str(targets[i])
        small = np.array(image.resize((8, 8), Image.Resampling.BOX)) * (16 / 255)
        assert np.abs(small - scans[i].reshape(8, 8)).mean() < 1.5


def test_split_is_stratified_and_fixed(digits, tmp_path):
    held_out = [len(list((digits / 'validation' / str(d)).iterdir())) for d in range(10)]
    assert sum(held_out) == 360 and set(held_out) <= {35, 36, 37}
    qs.write_digits(tmp_path / 'again')
    assert all((tmp_path / 'again' / p.relative_to(digits)).is_file() for p in digits.rglob('*.png'))


def test_interrupted_writing_is_repeated(tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError('no space left')

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, 'save', full_disk)
        with pytest.raises(OSError):
            qs.write_digits(tmp_path / 'digits')
    assert not (tmp_path / 'digits').exists()
    qs.write_digits(tmp_path / 'digits')
    assert len(list(tmp_path.rglob('*.png'))) == 1797


def test_only_its_own_folder(tmp_path):
    (tmp_path / 'empty').mkdir()
    for folder in (tmp_path / 'new' / 'deep', tmp_path / 'empty'):
        qs.claim_folder(folder)
        qs.claim_folder(folder)
    (tmp_path / 'file').touch()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'README.txt').write_text('Do not touch.')
    for folder in (tmp_path / 'file', tmp_path / 'mine'):
        with pytest.raises(qs.QuickstartError, match='is not from a quickstart; choose another folder with --output'):
            qs.claim_folder(folder)


def test_it_says_what_it_takes_before_it_writes(tmp_path, monkeypatch, capsys):
    def claim(folder):
        out = capsys.readouterr().out
        assert f'All goes to {tmp_path}: up to 0.5 GB on the disk' in out and 'Delete' not in out  # it may be another's
        raise qs.QuickstartError('seen')

    monkeypatch.setattr(qs, 'claim_folder', claim)
    with pytest.raises(qs.QuickstartError, match='seen'):
        qs.quickstart(tmp_path)


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(qs.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=4e8))
    with pytest.raises(qs.QuickstartError, match='has 0.40 GB left, up to 0.5 are needed; choose another folder'):
        qs.claim_folder(tmp_path / 'new')


def test_interrupted_training_goes_on_later(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('convnn_timm.train.engine.train', stop)
    with pytest.raises(qs.QuickstartError, match='^interrupted; run the quickstart again to go on$') as stopped:
        qs.train_digits(tmp_path / 'digits', tmp_path / 'run')
    assert stopped.value.code == 130


@pytest.mark.parametrize('wrong', [0, 1, 360])
def test_picture(digits, tmp_path, wrong):
    paths = sorted((digits / 'validation').rglob('*.png'))
    readings = [qs.Reading(p, p.parent.name, 'x' if i < wrong else p.parent.name) for i, p in enumerate(paths)]
    qs.draw(readings, tmp_path / 'sheet.png')
    sheet = np.array(Image.open(tmp_path / 'sheet.png').convert('RGB')).astype(int)
    assert sheet.shape[0] > 500 and sheet.shape[1] > 800
    red = (sheet[..., 0] - sheet[..., 1:].max(-1) > 100).sum()
    assert (red > 500) == (wrong > 0)


class CatDetector(torch.nn.Module):
    """Finds the cat where there is much red and little blue."""
    pretrained_cfg = dict(input_size=(3, 32, 32), crop_pct=1.0, label_names=['bird', 'cat', 'dog', 'frog'])

    def forward(self, x):
        warmth = (x[:, 0] - x[:, 2]).mean(dim=(1, 2))
        return torch.stack([-warmth, 20 * warmth - 4, 0 * warmth, warmth - 9], dim=1)


@pytest.fixture
def cat_detector(monkeypatch):
    """The model that the quickstart loads, whatever has been published."""
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: CatDetector())


def test_photographs_are_named_and_drawn(cat_detector, tmp_path, capsys):
    qs.show_photographs(tmp_path / 'photographs.png')
    out = capsys.readouterr().out
    cat, horse = [line.split(':')[1].strip() for line in out.splitlines() if line.count('%') == 3]
    assert cat.startswith('cat ') and not horse.startswith('cat ')
    assert 'answers with one of these, whatever it sees: bird, cat, dog, frog.' in out and 'photographs.png' in out
    picture = Image.open(tmp_path / 'photographs.png')
    assert picture.size[0] > 1000 and picture.size[1] > 500


def test_the_published_weights_see_the_cat_and_the_horse(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('CONVNN_TIMM_ZOO', str(Path(__file__).parents[1] / 'model_cards'))
    qs.show_photographs(tmp_path / 'photographs.png')
    cat, horse, *_ = capsys.readouterr().out.splitlines()
    assert cat.split()[:3] == ['a', 'cat:', 'cat'] and horse.split()[:6] == 'the outline of a horse: horse'.split()
    assert Image.open(tmp_path / 'photographs.png').size[0] > 1000


def test_photographs_come_with_packages_that_are_required():
    """All are there, so a missing one is a package that no longer ships it; a cat is among them."""
    guesses = qs.name_photographs(CatDetector())
    assert [guess.title for guess in guesses] == list(qs.PHOTOGRAPHS) and guesses[0].title == 'a cat'
    for guess in guesses:
        assert guess.seen.shape == (3, 32, 32) and 0 <= guess.seen.min() < guess.seen.max() <= 1
        probabilities = [p for _, p in guess.answers]
        assert probabilities == sorted(probabilities, reverse=True) and len(probabilities) == 3


@pytest.mark.parametrize('error', [
    WeightsError('convnn-timm/x is not in the cache, and the Hub cannot be reached.\nTry again with a connection'),
    RuntimeError('No pretrained weights exist for x.')])
def test_without_weights_it_says_so_and_goes_on(monkeypatch, tmp_path, capsys, error):
    def fail(name, pretrained):
        raise error

    monkeypatch.setattr(timm, 'create_model', fail)
    qs.show_photographs(tmp_path / 'photographs.png')
    line, = capsys.readouterr().out.splitlines()
    assert line.strip() == f'Left out, no trained weights can be had: {" ".join(str(error).split())}'
    assert not (tmp_path / 'photographs.png').exists()


QUICK = ['--model', 'test_resnet']  # a small model of timm's: seconds, not minutes


@pytest.fixture
def without_photographs(monkeypatch):
    monkeypatch.setattr(qs, 'show_photographs', lambda picture: print(picture))


def test_the_whole_story(without_photographs, tmp_path, capsys):
    """With a small model of timm's; the second call finds everything done."""
    train_args = [*QUICK, '--epochs', '15', '--lr', '0.01', '--opt', 'adamw']
    accuracy = qs.quickstart(tmp_path, train_args)
    assert accuracy >= 95
    out = capsys.readouterr().out
    assert f'{tmp_path}/photographs.png' in out.splitlines()
    assert '1,437 to train on, 360 held out' in out and f'reads {accuracy:.2f} % of the 360' in out
    assert (tmp_path / 'predictions.png').read_bytes().startswith(b'\x89PNG')

    commands = [line.split()[1:] for line in out.splitlines() if line.startswith('  convnn-timm ')]
    assert [c[0] for c in commands] == ['predict', 'list', 'train']
    assert cli.main([*commands[0], '--topk', '1']) == 0
    answers = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 37 and answers.count('3') > 30

    weights = (tmp_path / 'run' / 'model' / 'model.safetensors').read_bytes()
    assert qs.quickstart(tmp_path, train_args) == accuracy
    assert (tmp_path / 'run' / 'model' / 'model.safetensors').read_bytes() == weights


def test_below_the_goal(without_photographs, tmp_path):
    with pytest.raises(qs.QuickstartError, match=r'95 % is the goal.*curve.png.*delete'):
        qs.quickstart(tmp_path, [*QUICK, '--epochs', '1', '--lr', '1e-9', '--warmup-epochs', '0'])
    assert (tmp_path / 'predictions.png').is_file()
    with pytest.raises(qs.QuickstartError, match=r'(?s)ended early: .*lr.*Run the quickstart again'):
        qs.quickstart(tmp_path, [*QUICK, '--epochs', '1', '--lr', '1', '--warmup-epochs', '0'])


@pytest.mark.slow
def test_the_real_thing(tmp_path, capsys):
    assert cli.main(['quickstart', '--output', str(tmp_path / 'quickstart')]) == 0
