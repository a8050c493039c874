"""The command line, called in process: what it prints, what it returns, what a person sees when something is wrong."""
import argparse
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image, features

from convnn_timm import __version__
from convnn_timm.cli import commands as cli
from convnn_timm.cli.commands import load_model
from convnn_timm.images import ImageError, read_image

NAMES = ['ant', 'bee', 'cat']


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
    """A small timm model saved as a folder, three classes, 24x24 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('model')
    model = timm.create_model('test_resnet', num_classes=3)
    config = dict(label_names=NAMES, pretrained_cfg=dict(input_size=(3, 24, 24), crop_pct=1.0))
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return folder


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """No word of waiting, however slow the machine is."""
    monkeypatch.setattr(cli, 'PATIENCE', 600.)


@pytest.fixture
def photo(tmp_path):
    """An image file, and its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    path = tmp_path / 'photo.png'
    Image.fromarray(pixels).save(path)
    return path


def run(capsys, *argv):
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def error_of(capsys, *argv, status=1):
    """The message of a call that fails with `status`; it is one line and nothing else."""
    actual, _, err = run(capsys, *argv)
    assert actual == status, err
    assert err.startswith('convnn-timm: error: ') and err.count('\n') == 1, err
    return err


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / 'file').touch()
    assert f"{tmp_path / 'file'}" in (message := error_of(capsys, 'quickstart', '--output', str(tmp_path / 'file/digits')))
    assert 'Not a directory' in message


def test_what_is_not_the_systems_fault_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise ConnectionError('of our own making')

    monkeypatch.setattr(cli, 'list_models', fail)
    with pytest.raises(ConnectionError):
        cli.main(['list'])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['--version'])
    assert (stop.value.code, capsys.readouterr().out) == (0, f'convnn-timm {__version__}\n')


def test_help_shows_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines if line.startswith('  ')]
    assert sorted(shown[:-2]) == sorted(cli.build_parser().commands)  # the last two are options


@pytest.mark.parametrize('command', [None, '', 'list', 'info', 'run', 'predict', 'quickstart', 'export-onnx'])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([] if command is None else [*command.split(), '--help'])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert 'train' in out if not command else f'examples:\n  convnn-timm {command}' in out


def test_module_helps_without_torch():
    """`python -m convnn_timm` is the same command, and its help does not wait for PyTorch."""
    code = 'import sys, runpy; sys.argv = ["convnn-timm", "--help"]\n' \
           'try: runpy.run_module("convnn_timm", run_name="__main__")\n' \
           'finally: assert not {"torch", "timm"} & set(sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'quickstart' in done.stdout, done.stderr


def test_wrong_calls(capsys):
    assert 'required: SCRIPT (see' in error_of(capsys, 'run', status=2)
    assert "unknown command 'prdict'; did you mean predict?" in error_of(capsys, 'prdict', status=2)
    assert 'there are quickstart, list, ' in error_of(capsys, 'zzz', status=2)
    assert "'csw'" in error_of(capsys, 'predict', 'a.png', '--model', 'resnet18', '--format', 'csw', status=2)
    assert '. is a folder: name one image in it' in error_of(
        capsys, 'neighbors', '.', '--model', 'resnet18', '-o', 'a.png', status=2)
    assert 'convnn-timm predict --help' in error_of(capsys, 'predict', 'a.png', status=2)
    assert '--topk' in error_of(capsys, 'predict', 'a.png', '--model', 'resnet18', '--topk', '0', status=2)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize('command, inside', [
    ('list', 'timm.list_models'), ('run conftest.py', 'convnn_timm.autoload.run_script'),
])
def test_interrupted(capsys, monkeypatch, command, inside):
    monkeypatch.setattr(inside, interrupt)
    assert run(capsys, *command.split()) == (130, '', 'convnn-timm: interrupted\n')


@pytest.mark.parametrize('command, lines', [
    ('predict a.png --model resnet18_convnn', 1), ('train --data-dir data', 1), ('list', 3)])
def test_ctrl_c(command, lines):
    """While the process imports, and while it works: after its first lines."""
    code = f'import sys; from convnn_timm.cli import main; print(flush=True); sys.exit(main({command.split()}))'
    process = subprocess.Popen(
        [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(lines):
        process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and err.endswith('convnn-timm: interrupted\n') and 'Traceback' not in err, err


def test_long_silence_is_explained(capsys, monkeypatch):
    with cli.announced('loading a model'):
        pass
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(cli, 'PATIENCE', 0.)
    with cli.announced('loading a model'):
        threading.Event().wait(0.2)
    assert capsys.readouterr().err == 'convnn-timm: loading a model ...\n'


def test_control_characters_do_not_reach_the_terminal(capsys):
    cli.report('\x1b[31mred\udcff\nséparé')
    assert capsys.readouterr().err == 'convnn-timm: error: \\x1b[31mred\\udcff\nséparé\n'


def test_train_and_run_hand_their_arguments_over(capsys, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, 'convnn_timm.train.engine', types.SimpleNamespace(main=seen.append))
    assert cli.main(['train', '--model', 'resnet18', '--help']) == 0
    assert seen == [['--model', 'resnet18', '--help']]

    def refuse(argv):
        raise SystemExit('error: no such recipe')

    monkeypatch.setitem(sys.modules, 'convnn_timm.train.engine', types.SimpleNamespace(main=refuse))
    assert error_of(capsys, 'train') == 'convnn-timm: error: no such recipe\n'

    monkeypatch.setattr('convnn_timm.autoload.run_script', lambda *args: seen.append(args), raising=False)
    assert cli.main(['run', 'train.py', '--lr', '0.1', '--help', 'data']) == 0
    assert seen[1:] == [('train.py', ['--lr', '0.1', '--help', 'data'])]


def test_list(capsys):
    status, out, _ = run(capsys, 'list', 'resnet18_conv*')
    header, *rows = out.splitlines()
    assert status == 0 and header.split() == ['model', 'parameters', 'MACs', 'weights']
    assert len(rows) == 7
    name, parameters, macs, unit, *weights = next(row for row in rows if row.startswith('resnet18_conv2d ')).split()
    model = timm.create_model(name)
    assert parameters == f'{sum(p.numel() for p in model.parameters()):,}'
    assert 0.5 < float(macs) < 0.6 and unit == 'G'  # a ResNet-18 for 32x32 images
    assert weights == ['resnet18_conv2d.cifar10']


def test_list_shows_only_this_package(capsys):
    assert "no model matches 'convnn_converted'" in error_of(capsys, 'list', 'convnn_converted')  # has no size of its own
    assert "no model matches 'test_resnet'" in error_of(capsys, 'list', 'test_resnet')


@pytest.mark.parametrize('pattern, names', [
    ('34_convnn_a', ['resnet34_convnn_attn']),
    ('resnet18*_convnn', ['resnet18_convnn']),
    ('resnet18_conv2d.cifar10', ['resnet18_conv2d']),
    ('resnet18*.cifar10', ['resnet18_conv2d', 'resnet18_convnn_branching']),
])
def test_list_finds(capsys, pattern, names):
    status, out, _ = run(capsys, 'list', pattern)
    assert status == 0 and [row.split()[0] for row in out.splitlines()[1:]] == names


def test_list_names_what_is_near(capsys):
    assert 'did you mean resnet18_convnn' in error_of(capsys, 'list', 'rsnet18_convnn')
    assert 'did you mean resnet18_conv2d.cifar10' in error_of(capsys, 'list', 'resnet18_conv2.cifar10')
    assert '`convnn-timm list` shows them all' in error_of(capsys, 'list', 'zzzz')


def test_info(capsys):
    status, out, _ = run(capsys, 'info')
    assert status == 0
    assert f'torch            {torch.__version__}' in out
    assert any(line.split()[:3] == ['neighbor_conv', 'torch', 'yes'] for line in out.splitlines())


def test_predict_probabilities(capsys, model_folder, photo):
    model = timm.create_model(f'local-dir:{model_folder}', pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    x = (torch.tensor(np.array(Image.open(photo))).permute(2, 0, 1) / 255 - torch.tensor(config['mean'])[:, None, None])
    with torch.no_grad():
        p = model((x / torch.tensor(config['std'])[:, None, None])[None]).softmax(1)[0]

    status, out, err = run(capsys, 'predict', str(photo), '--model', f'local-dir:{model_folder}', '--device', 'cpu')
    assert (status, err) == (0, '')
    best = p.argsort(descending=True).tolist()
    assert out.splitlines() == [str(photo)] + [f'  {100 * p[i]:6.2f} %  {NAMES[i]}' for i in best]


def test_predict_topk_and_folders(capsys, model_folder, tmp_path):
    for name in ('b.png', 'a.JPG', 'deep/er/c.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 10)).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('not an image')
    _, out, _ = run(capsys, 'predict', str(tmp_path), '--model', f'local-dir:{model_folder}', '--topk', '1')
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / name) for name in ('a.JPG', 'b.png', 'deep/er/c.png')]
    assert all(line.endswith(tuple(NAMES)) for line in lines)


def odd_names(photo):
    """Copies of an image: one name is no UTF-8, one would colour the terminal and has two lines."""
    names = os.fsdecode(b'\xff.png'), '\x1b[31m, "red"\n.png'
    return [Path(shutil.copy(photo, photo.parent / name)) for name in names]


def test_predict_table_is_a_line_for_each_image(capsys, model_folder, photo):
    call = 'predict', str(photo.parent), '--model', f'local-dir:{model_folder}'
    odd_names(photo)
    _, out, _ = run(capsys, *call)
    assert len(out.splitlines()) == 3 and all(line.count('%') == 1 for line in out.splitlines())
    assert '\\x1b[31m, "red"\\n.png' in out and '\\udcff.png' in out and '\x1b' not in out
    _, out, _ = run(capsys, *call, '--topk', '2')
    assert len(out.splitlines()) == 3 and all(line.count('%') == 2 for line in out.splitlines())


def test_predict_for_programs(capfdbinary, model_folder, photo):
    """Both formats have the file names as they are on the disk, and nothing but data on stdout."""
    bad = photo.parent / 'text.png'
    bad.write_text('not an image')
    call = 'predict', str(photo), str(bad), *map(str, odd_names(photo)), '--model', f'local-dir:{model_folder}'
    expected = [str(photo), *map(str, odd_names(photo))]

    def output(form):
        assert cli.main([*call, '--format', form]) == 1
        out, err = capfdbinary.readouterr()
        assert err.count(b'not an image') == 1 and err.count(b'\n') == 1
        return out

    entries = json.loads(output('json'))
    assert [entry['image'] for entry in entries] == expected
    for entry in entries:
        assert sorted(c['name'] for c in entry['classes']) == NAMES
        assert sum(c['probability'] for c in entry['classes']) == pytest.approx(1)

    text = output('csv').decode('utf-8', 'surrogateescape')
    rows = list(csv.DictReader(io.StringIO(text, newline='')))
    assert [row['image'] for row in rows[::3]] == expected and [row['rank'] for row in rows] == ['1', '2', '3'] * 3
    for entry, best in zip(entries, rows[::3], strict=True):
        assert best['class'] == entry['classes'][0]['name']
        assert float(best['probability']) == pytest.approx(entry['classes'][0]['probability'], abs=1e-4)


def test_predict_takes_images_in_batches(capsys, monkeypatch, model_folder, photo):
    monkeypatch.setattr(cli, 'BATCH', 2)
    sizes, classify = [], cli.classify
    monkeypatch.setattr(cli, 'classify', lambda m, pixels, d: sizes.append(len(pixels)) or classify(m, pixels, d))
    status, out, _ = run(capsys, 'predict', *[str(photo)] * 5, '--model', f'local-dir:{model_folder}')
    assert status == 0 and sizes == [2, 2, 1] and len(set(out.splitlines())) == 1


def test_predict_refuses_a_network_of_nan(capsys, photo, tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    torch.nn.init.constant_(model.fc.weight, float('nan'))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert 'numbers that are not finite' in run(capsys, 'predict', str(photo), '--model', f'local-dir:{tmp_path}')[2]


@pytest.mark.parametrize('mode, size', [
    ('1', (9, 40)), ('L', (1, 1)), ('LA', (24, 24)), ('P', (300, 20)), ('RGBA', (24, 24)), ('CMYK', (7, 7)),
    ('I;16', (9, 9)),
])
def test_predict_any_image(capsys, model_folder, tmp_path, mode, size):
    path = tmp_path / 'image.tiff'
    Image.new(mode, size).save(path)
    status, out, err = run(capsys, 'predict', str(path), '--model', f'local-dir:{model_folder}')
    assert (status, err) == (0, '') and len(out.splitlines()) == 4


def test_images_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)[:3]).save(tmp_path / 'lying.png', exif=exif)
    assert read_image(tmp_path / 'lying.png').size == (3, 4)


def test_numbers_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / 'float.tiff')
    with pytest.raises(ImageError, match='float.tiff: its pixels have 32 bits, of unknown range'):
        read_image(tmp_path / 'float.tiff')


def test_linked_folders_are_read_once(tmp_path, photo):
    """Under their own name where they have one in the folder; nothing above the folder is read."""
    folder = tmp_path / 'folder'
    for name in 'elsewhere', 'folder/own':
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(photo, tmp_path / name / 'one.png')
    shutil.copy(photo, tmp_path / 'above.png')
    for name, target in ('linked', 'elsewhere'), ('again', 'folder/own'), ('back', 'folder'), ('own/up', '.'):
        (folder / name).symlink_to(tmp_path / target)
    assert list(cli.find_images([str(folder)])) == [folder / 'linked' / 'one.png', folder / 'own' / 'one.png']


def test_what_a_folder_is_searched_for(capsys, tmp_path):
    """For all that Pillow decodes; what is hidden is not there, and the rest is counted."""
    seen = ['a.JPG', 'b.webp', 'c.bmp', 'd.tif', 'e.gif', 'f.jpeg'] + ['g.avif'] * features.check('avif')
    for name in seen:
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    for name in '.ipynb_checkpoints/x.png', '._a.jpg', 'h.heic', 'i.HEIC', 'j.txt', 'Makefile', 'k.h5', 'none/.keep':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('no image')
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'dead.png').symlink_to('nowhere')
    assert list(cli.find_images([str(tmp_path)])) == [tmp_path / name for name in seen]
    assert capsys.readouterr().err == (
        f'convnn-timm: note: {tmp_path}: left out 7 files: '
        '2 .heic, 1 (broken link), 1 (no suffix), 1 (special file), 1 .h5, 1 .txt\n'
        f'convnn-timm: note: {tmp_path}: no images in {tmp_path}/none\n')


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'scandir', Mock(side_effect=PermissionError(13, 'Permission denied', str(tmp_path))))
    with pytest.raises(ImageError, match=f'{tmp_path}: cannot be read: Permission denied'):
        list(cli.find_images([str(tmp_path)]))


def test_the_first_picture_of_several_is_read(tmp_path):
    first, second = (Image.new('RGB', (2, 2), colour) for colour in ('white', 'black'))
    for name in 'two.gif', 'two.tif':
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert np.array(read_image(tmp_path / name)).min() == 255


def test_a_file_name_cannot_garble_the_terminal(tmp_path):
    name = 'a\x1b[31m\n\u202eb\udcff.png'
    (tmp_path / name).write_text('no image')
    with pytest.raises(ImageError) as error:
        read_image(tmp_path / name)
    assert str(error.value) == fr'{tmp_path}/a\x1b[31m\n\u202eb\udcff.png: not an image'


def test_16_bits_are_scaled(tmp_path):
    path = tmp_path / 'deep.png'
    Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16)).save(path)
    assert np.array(read_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_predict_goes_on_after_a_bad_image(capsys, model_folder, photo, tmp_path):
    (tmp_path / 'text.png').write_text('not an image')
    (tmp_path / 'half.png').write_bytes(photo.read_bytes()[:500])
    (tmp_path / 'empty').mkdir()
    bad = [tmp_path / name for name in ('text.png', 'half.png', 'gone.png', 'empty')]
    status, out, err = run(capsys, 'predict', *map(str, bad), str(photo), '--model', f'local-dir:{model_folder}')
    assert status == 1
    assert [line.split()[0] for line in out.splitlines()] == [str(photo)]
    complaints = ('not an image', 'cannot be read', 'not found', 'no images in this folder')
    for line, path, complaint in zip(err.splitlines(), bad, complaints, strict=True):
        assert line.startswith(f'convnn-timm: error: {path}: {complaint}')


def test_predict_with_checkpoint(capsys, photo, tmp_path):
    """Weights of a training run: as many classes as they have, called by index because their names are not known."""
    model = timm.create_model('test_resnet', num_classes=4)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'last.pth.tar')
    call = 'predict', str(photo), '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'last.pth.tar')
    status, out, err = run(capsys, *call)
    assert status == 0 and 'note: the names of the classes are not known' in err
    assert sorted(line.split()[-1] for line in out.splitlines()[1:]) == ['0', '1', '2', '3']

    def classes(count, architecture='test_resnet', names=('ant', 'bee', 'cat', 'dog')):
        """Called, beside the model of a finished run that tells so many classes apart."""
        timm.models.save_for_hf(
            timm.create_model(architecture, num_classes=count), tmp_path / 'model',
            model_config=dict(label_names=names[:count]), safe_serialization=True)
        return sorted(line.split()[-1] for line in run(capsys, *call)[1].splitlines()[1:])

    assert classes(4) == ['ant', 'bee', 'cat', 'dog']
    assert classes(3) == classes(4, 'test_vit') == ['0', '1', '2', '3']  # of other networks
    (tmp_path / 'model' / 'config.json').write_text('[')
    assert f"{tmp_path / 'model' / 'config.json'} is damaged" in error_of(capsys, *call)


@pytest.mark.parametrize('pretrained', [False, True])
def test_predict_builds_the_network_of_the_checkpoint(capsys, photo, tmp_path, pretrained):
    """Arguments that no tensor shows are in a training's checkpoint, timm's or this package's."""
    name = 'resnet18_convnn_branching'
    options = {} if pretrained else dict(magnitude_type='euclidean', sampling_type='spatial', num_samples=4, padding=0)
    model = timm.create_model(f'{name}.cifar10' if pretrained else name, num_classes=4, **options)
    args = argparse.Namespace(model=name, model_kwargs=options, pretrained=pretrained)
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    loaded = load_model(name, str(tmp_path / 'last.pth.tar'))
    assert str(loaded) == str(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_own_classes_are_not_called_by_the_names_of_the_published_weights():
    name = 'resnet18_convnn_branching'
    assert timm.create_model(name, pretrained=True).pretrained_cfg['label_names'][3] == 'cat'
    for own in name, f'{name}.cifar10':
        assert not timm.create_model(own).pretrained_cfg.get('label_names')


def test_images_with_a_damaged_exif_block_are_read(tmp_path):
    for number, exif in enumerate((b'Exif\0\0garbage!garbage!', b'Exif\0\0II*\0')):
        Image.new('RGB', (5, 4)).save(tmp_path / f'{number}.png', exif=exif)
        assert read_image(tmp_path / f'{number}.png').size == (5, 4)


def test_predict_needs_classes(capsys, photo, tmp_path):
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=0), tmp_path)
    assert 'has no classes to name' in error_of(capsys, 'predict', str(photo), '--model', f'local-dir:{tmp_path}')


def test_errors_of_a_script_are_its_own(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('open("missing.txt")')
    with pytest.raises(FileNotFoundError, match='missing.txt'):
        cli.main(['run', str(script)])


def test_model_errors(capsys, photo, model_folder, tmp_path):
    def error(*args, status=1):
        return error_of(capsys, 'predict', str(photo), *args, status=status)

    assert 'did you mean resnet18_convnn' in error('--model', 'resnet18_convn', status=2)
    assert '`convnn-timm list`' in error('--model', 'zzzz', status=2)
    assert "'local-dir:some/folder'" in error('--model', 'some/folder', status=2)
    assert 'convnn-timm train --model vgg11_convnn_attn' in error('--model', 'vgg11_convnn_attn')
    assert 'config.json' in error('--model', f'local-dir:{tmp_path}')
    (tmp_path / 'model').symlink_to(model_folder)
    assert f'{tmp_path} is the folder of a run, its model is local-dir:{tmp_path}/model' in error(
        '--model', f'local-dir:{tmp_path}', status=2)
    for device in 'gpu', 'hpu', 'meta':
        assert f"device '{device}'" in error('--model', f'local-dir:{model_folder}', '--device', device, status=2)

    checkpoint = tmp_path / 'last.pth.tar'
    assert f'{checkpoint} not found' in error('--model', 'test_resnet', '--checkpoint', str(checkpoint))
    assert f'{tmp_path} is a folder' in error('--model', 'test_resnet', '--checkpoint', str(tmp_path))
    checkpoint.touch()
    assert f'{checkpoint} is an empty file' in error('--model', 'test_resnet', '--checkpoint', str(checkpoint))
    for nothing in {}, dict(state_dict={}), dict(state_dict=dict(weight='heavy')):
        torch.save(nothing, checkpoint)
        assert f'{checkpoint} holds no weights' in error('--model', 'resnet18_conv2d', '--checkpoint', str(checkpoint))
    whole = timm.create_model('test_resnet', num_classes=4).state_dict()
    without = {name: tensor for name, tensor in whole.items() if name != 'conv1.1.weight'}
    for tensors, name in (without, 'conv1.1.weight'), ({**whole, 'foreign': torch.ones(1)}, 'foreign'):
        torch.save(tensors, checkpoint)
        assert f'"{name}"' in error('--model', 'test_resnet', '--checkpoint', str(checkpoint))
    checkpoint.write_text('nothing')
    assert f'cannot read checkpoint {checkpoint}' in error('--model', 'test_resnet', '--checkpoint', str(checkpoint))
    torch.save(timm.create_model('test_vit').state_dict(), checkpoint)
    assert '… If the model was trained with other arguments, use the model/ folder of its run' in error(
        '--model', 'test_resnet', '--checkpoint', str(checkpoint))
    assert 'has its own weights' in error(
        '--model', f'local-dir:{model_folder}', '--checkpoint', str(checkpoint), status=2)


# export-onnx

@pytest.fixture
def onnx_packages():
    for name in 'onnx', 'onnxscript', 'onnxruntime':
        pytest.importorskip(name, reason=f"needs {name}: pip install 'convnn-timm[test]'")


def test_export_onnx(capsys, model_folder, photo, tmp_path, onnx_packages):
    out = tmp_path / 'made' / 'model.onnx'
    status, printed, err = run(
        capsys, 'export-onnx', f'local-dir:{model_folder}', '-o', str(out), '--dynamic-batch', '--check', str(photo))
    made, compared, summary = printed.splitlines()
    assert status == 0 and made.startswith(f'{out}: opset 20, images any number x 3 x 24 x 24, ')
    exporting, comparing = err.splitlines()
    assert exporting == f'convnn-timm: exporting local-dir:{model_folder}, which takes minutes if it is large'
    assert comparing == 'convnn-timm: comparing with PyTorch on 1 images'
    assert [file.name for file in out.parent.iterdir()] == ['model.onnx']
    assert compared.startswith(f'{photo}: same class, logits of onnxruntime') and compared.endswith(' apart, agrees')
    assert summary == '1 of 1 images agree to 0.0001'


@pytest.fixture
def no_export(monkeypatch, onnx_packages):
    """export-onnx without its slow part: an empty file, and onnxruntime's logits as far off as the test says."""
    monkeypatch.setattr('convnn_timm.inspect.onnx_export.export_onnx', lambda model, path, *args: path.write_bytes(b''))

    def compare(difference, moved=0., same=True):
        monkeypatch.setattr(
            'convnn_timm.inspect.onnx_export.compare_onnx',
            lambda m, p, x: (torch.full((len(x),), difference), torch.full((len(x),), same)))
        monkeypatch.setattr('convnn_timm.inspect.onnx_export.sensitivity', lambda m, x: torch.full((len(x),), moved))
    return compare


def test_export_onnx_tells_a_wrong_file_from_equal_neighbors(capsys, model_folder, tmp_path, no_export):
    call = 'export-onnx', f'local-dir:{model_folder}', '--force', '-o', str(tmp_path / 'model.onnx')
    no_export(0.5)
    status, out, err = run(capsys, *call)
    assert status == 1 and out.count('0.5 apart, DIFFERS') == 2 and '0 of 2 images agree' in out
    assert f'model.onnx does not compute what local-dir:{model_folder} computes' in err
    no_export(float('nan'))
    assert run(capsys, *call)[0] == 1
    no_export(0.5, moved=0.3)
    status, out, err = run(capsys, *call)
    assert status == 0 and 'error' not in err and 'own logits move by 0.3 if pixels change by a millionth' in out


def test_export_onnx_takes_another_class_for_a_difference(capsys, model_folder, tmp_path, no_export):
    """Be the logits as near as they may; unless PyTorch itself is as unsteady there."""
    call = 'export-onnx', f'local-dir:{model_folder}', '--force', '-o', str(tmp_path / 'model.onnx')
    no_export(1e-6, same=False)
    status, out, err = run(capsys, *call)
    assert status == 1 and out.count('ANOTHER CLASS, logits of onnxruntime and PyTorch are 1e-06 apart, DIFFERS') == 2
    assert '0 of 2 images agree' in out and 'does not compute what' in err
    no_export(1e-6, moved=0.3, same=False)
    status, out, _ = run(capsys, *call)
    assert status == 0 and out.count('ANOTHER CLASS') == 2 and '0 of 2 images agree' in out


@pytest.mark.parametrize('place, message', [
    ('', 'is a folder: name a file'), ('file/model.onnx', 'Not a directory'),
    pytest.param('/proc/model.onnx', 'cannot write /proc/model.onnx', marks=pytest.mark.skipif(
        not os.path.isdir('/proc'), reason='needs a folder that nobody can write to'))])
def test_export_onnx_finds_what_it_cannot_write_before_the_work(
        capsys, model_folder, tmp_path, monkeypatch, onnx_packages, place, message):
    monkeypatch.setattr('convnn_timm.inspect.onnx_export.export_onnx', lambda *args: pytest.fail('has begun'))
    (tmp_path / 'file').touch()
    call = 'export-onnx', f'local-dir:{model_folder}', '--force', '-o', str(tmp_path / place)
    assert message in error_of(capsys, *call)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_export_onnx_notes(capsys, tmp_path, monkeypatch, no_export):
    no_export(0.)
    options = dict(channels=(8, 8, 8, 8), sampling_type='random', num_samples=16)
    model = timm.create_model('resnet18_convnn', **options)
    timm.models.save_for_hf(model, tmp_path, model_args=options, safe_serialization=True)
    call = 'export-onnx', f'local-dir:{tmp_path}', '-o', str(tmp_path / 'model.onnx'), '--force'
    assert 'random candidates are those of every evaluation' in run(capsys, *call)[2]
    assert 'has no published weights' in run(capsys, 'export-onnx', 'resnet18_conv2d_new', *call[2:])[2]
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    status, _, err = run(capsys, *call)
    assert status == 0 and 'not compared with PyTorch, for onnxruntime is missing' in err


def test_export_onnx_in_another_size_keeps_the_channels(capsys, tmp_path, onnx_packages):
    timm.models.save_for_hf(timm.create_model('test_resnet', in_chans=1, num_classes=2), tmp_path)
    status, out, _ = run(
        capsys, 'export-onnx', f'local-dir:{tmp_path}', '-o', str(tmp_path / 'model.onnx'), '--img-size', '64')
    assert status == 0 and 'images 1 x 1 x 64 x 64' in out and '2 of 2 images agree' in out


def test_export_onnx_errors(capsys, model_folder, photo, tmp_path, monkeypatch, onnx_packages):
    def error(*args, model=f'local-dir:{model_folder}', status=1):
        return error_of(capsys, 'export-onnx', model, '-o', str(tmp_path / 'model.onnx'), *args, status=status)

    assert "unknown model 'resnet18_convn'" in error(model='resnet18_convn', status=2)
    assert '--opset 11: torch and onnx write 18 to ' in error('--opset', '11', status=2)
    assert '--batch must be 1 or more, got 0' in error('--batch', '0', status=2)
    assert '--img-size must be 1 or more' in error('--img-size', '-3', status=2)
    assert 'not allowed with' in error('--batch', '2', '--dynamic-batch', status=2)
    (tmp_path / 'text.png').write_text('not an image')
    assert 'text.png: not an image' in error('--check', str(tmp_path / 'text.png'))
    options = dict(channels=(8, 8, 8, 8), K=10)
    timm.models.save_for_hf(
        timm.create_model('resnet18_convnn', **options), tmp_path, model_args=options, safe_serialization=True)
    status, _, err = run(
        capsys, 'export-onnx', f'local-dir:{tmp_path}', '-o', str(tmp_path / 'model.onnx'), '--img-size', '8')
    assert status == 1 and 'K=10 neighbours need as many tokens, but a map of 1 x 1 with padding=1 has 9' in err
    assert not (tmp_path / 'model.onnx').exists()
    (tmp_path / 'model.onnx').touch()
    assert '--force replaces it' in error()
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    assert 'onnxruntime is missing: pip install' in error('--check', str(photo))
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    assert 'onnxscript is missing: pip install onnx onnxscript' in error()
    monkeypatch.setitem(sys.modules, 'onnx', None)
    assert 'onnx is missing: pip install onnx onnxscript onnxruntime' in error()


def test_quickstart_failure_is_one_line(capsys, tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    assert 'choose another folder with --output' in error_of(capsys, 'quickstart', '--output', str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']
