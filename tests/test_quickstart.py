"""The quickstart: its data, its folder, its picture, and all of it in one go."""
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from convnn_timm import cli
from convnn_timm import quickstart as qs


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


@pytest.mark.parametrize('wrong', [0, 1, 360])
def test_picture(digits, tmp_path, wrong):
    paths = sorted((digits / 'validation').rglob('*.png'))
    readings = [qs.Reading(p, p.parent.name, 'x' if i < wrong else p.parent.name, 0.9) for i, p in enumerate(paths)]
    qs.draw(readings, tmp_path / 'sheet.png')
    sheet = np.array(Image.open(tmp_path / 'sheet.png').convert('RGB')).astype(int)
    assert sheet.shape[0] > 500 and sheet.shape[1] > 800
    red = (sheet[..., 0] - sheet[..., 1:].max(-1) > 100).sum()
    assert (red > 500) == (wrong > 0)


QUICK = ['--model', 'test_resnet']  # a small model of timm's: seconds, not minutes


def test_the_whole_story(tmp_path, capsys):
    """With a small model of timm's; the second call finds everything done."""
    train_args = [*QUICK, '--epochs', '15', '--lr', '0.01', '--opt', 'adamw']
    accuracy = qs.quickstart(tmp_path, train_args)
    assert accuracy >= 95
    out = capsys.readouterr().out
    assert '1,437 to train on, 360 held out' in out and f'reads {accuracy:.2f} % of the 360' in out
    assert (tmp_path / 'predictions.png').read_bytes().startswith(b'\x89PNG')

    commands = [line.split()[1:] for line in out.splitlines() if line.startswith('  convnn-timm ')]
    assert [c[0] for c in commands] == ['predict', 'list', 'train']
    assert cli.main([*commands[0], '--topk', '1']) == 0
    answers = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1::2]]
    assert len(answers) == 37 and answers.count('3') > 30

    weights = (tmp_path / 'run' / 'model' / 'model.safetensors').read_bytes()
    assert qs.quickstart(tmp_path, train_args) == accuracy
    assert (tmp_path / 'run' / 'model' / 'model.safetensors').read_bytes() == weights


def test_below_the_goal(tmp_path, capsys):
    with pytest.raises(qs.QuickstartError, match=r'95 % is the goal.*curve.png.*delete'):
        qs.quickstart(tmp_path, [*QUICK, '--epochs', '1', '--lr', '1e-9', '--warmup-epochs', '0'])
    assert (tmp_path / 'predictions.png').is_file()
    with pytest.raises(qs.QuickstartError, match=r'(?s)ended early: .*lr.*Run the quickstart again'):
        qs.quickstart(tmp_path, [*QUICK, '--epochs', '1', '--lr', '1', '--warmup-epochs', '0'])


@pytest.mark.slow
def test_the_real_thing(tmp_path, capsys):
    assert cli.main(['quickstart', '--output', str(tmp_path / 'quickstart')]) == 0
