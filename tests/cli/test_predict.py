"""`predict`: probabilities, formats, and images that cannot be read."""
import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from convnn_timm import cli, inspect

NAMES = ['ant', 'bee', 'cat']


def test_predict_probabilities(run, model_folder, photo):
    model = timm.create_model(f'local-dir:{model_folder}', pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    x = (torch.tensor(np.array(Image.open(photo))).permute(2, 0, 1) / 255 - torch.tensor(config['mean'])[:, None, None])
    with torch.no_grad():
        p = model((x / torch.tensor(config['std'])[:, None, None])[None]).softmax(1)[0]

    status, out, err = run('predict', str(photo), '--model', f'local-dir:{model_folder}', '--device', 'cpu')
    assert (status, err) == (0, '')
    best = p.argsort(descending=True).tolist()
    assert out.splitlines() == [str(photo)] + [f'  {100 * p[i]:6.2f} %  {NAMES[i]}' for i in best]


def test_predict_topk_and_folders(run, model_folder, tmp_path):
    for name in ('b.png', 'a.JPG', 'deep/er/c.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 10)).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('not an image')
    _, out, _ = run('predict', str(tmp_path), '--model', f'local-dir:{model_folder}', '--topk', '1')
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / name) for name in ('a.JPG', 'b.png', 'deep/er/c.png')]
    assert all(line.endswith(tuple(NAMES)) for line in lines)


def odd_names(photo):
    """Copies of an image: one name is no UTF-8, one would colour the terminal and has two lines."""
    names = os.fsdecode(b'\xff.png'), '\x1b[31m, "red"\n.png'
    return [Path(shutil.copy(photo, photo.parent / name)) for name in names]


def test_predict_table_is_a_line_for_each_image(run, model_folder, photo):
    call = 'predict', str(photo.parent), '--model', f'local-dir:{model_folder}'
    odd_names(photo)
    _, out, _ = run(*call)
    assert len(out.splitlines()) == 3 and all(line.count('%') == 1 for line in out.splitlines())
    assert '\\x1b[31m, "red"\\n.png' in out and '\\udcff.png' in out and '\x1b' not in out
    _, out, _ = run(*call, '--topk', '2')
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


def test_predict_takes_images_in_batches(run, monkeypatch, model_folder, photo):
    monkeypatch.setattr('convnn_timm.cli.predict.BATCH', 2)
    sizes, classify = [], inspect.classify
    monkeypatch.setattr(inspect, 'classify', lambda m, pixels, k: sizes.append(len(pixels)) or classify(m, pixels, k))
    status, out, _ = run('predict', *[str(photo)] * 5, '--model', f'local-dir:{model_folder}')
    assert status == 0 and sizes == [2, 2, 1] and len(set(out.splitlines())) == 1


def test_predict_refuses_a_network_of_nan(run, photo, tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    torch.nn.init.constant_(model.fc.weight, float('nan'))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert 'numbers that are not finite' in run('predict', str(photo), '--model', f'local-dir:{tmp_path}')[2]


@pytest.mark.parametrize('mode, size', [
    ('1', (9, 40)), ('L', (1, 1)), ('LA', (24, 24)), ('P', (300, 20)), ('RGBA', (24, 24)), ('CMYK', (7, 7)),
    ('I;16', (9, 9)),
])
def test_predict_any_image(run, model_folder, tmp_path, mode, size):
    path = tmp_path / 'image.tiff'
    Image.new(mode, size).save(path)
    status, out, err = run('predict', str(path), '--model', f'local-dir:{model_folder}')
    assert (status, err) == (0, '') and len(out.splitlines()) == 4


def test_predict_goes_on_after_a_bad_image(run, model_folder, photo, tmp_path):
    (tmp_path / 'text.png').write_text('not an image')
    (tmp_path / 'half.png').write_bytes(photo.read_bytes()[:500])
    (tmp_path / 'empty').mkdir()
    bad = [tmp_path / name for name in ('text.png', 'half.png', 'gone.png', 'empty')]
    status, out, err = run('predict', *map(str, bad), str(photo), '--model', f'local-dir:{model_folder}')
    assert status == 1
    assert [line.split()[0] for line in out.splitlines()] == [str(photo)]
    complaints = ('not an image', 'cannot be read', 'not found', 'no images in this folder')
    for line, path, complaint in zip(err.splitlines(), bad, complaints, strict=True):
        assert line.startswith(f'convnn-timm: error: {path}: {complaint}')


def test_predict_needs_classes(error_of, photo, tmp_path):
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=0), tmp_path)
    assert 'has no classes to name' in error_of('predict', str(photo), '--model', f'local-dir:{tmp_path}')
