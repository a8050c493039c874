"""`export-onnx`: its verdicts, its notes, and what it refuses before the work."""
import os
import sys

import pytest
import timm
import torch


def test_export_onnx(run, model_folder, photo, tmp_path, onnx_packages):
    out = tmp_path / 'made' / 'model.onnx'
    status, printed, err = run(
        'export-onnx', f'local-dir:{model_folder}', '-o', str(out), '--dynamic-batch', '--check', str(photo))
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


def test_export_onnx_tells_a_wrong_file_from_equal_neighbors(run, model_folder, tmp_path, no_export):
    call = 'export-onnx', f'local-dir:{model_folder}', '--force', '-o', str(tmp_path / 'model.onnx')
    no_export(0.5)
    status, out, err = run(*call)
    assert status == 1 and out.count('0.5 apart, DIFFERS') == 2 and '0 of 2 images agree' in out
    assert f'model.onnx does not compute what local-dir:{model_folder} computes' in err
    no_export(float('nan'))
    assert run(*call)[0] == 1
    no_export(0.5, moved=0.3)
    status, out, err = run(*call)
    assert status == 0 and 'error' not in err and 'own logits move by 0.3 if pixels change by a millionth' in out


def test_export_onnx_takes_another_class_for_a_difference(run, model_folder, tmp_path, no_export):
    """Be the logits as near as they may; unless PyTorch itself is as unsteady there."""
    call = 'export-onnx', f'local-dir:{model_folder}', '--force', '-o', str(tmp_path / 'model.onnx')
    no_export(1e-6, same=False)
    status, out, err = run(*call)
    assert status == 1 and out.count('ANOTHER CLASS, logits of onnxruntime and PyTorch are 1e-06 apart, DIFFERS') == 2
    assert '0 of 2 images agree' in out and 'does not compute what' in err
    no_export(1e-6, moved=0.3, same=False)
    status, out, _ = run(*call)
    assert status == 0 and out.count('ANOTHER CLASS') == 2 and '0 of 2 images agree' in out


@pytest.mark.parametrize('place, message', [
    ('', 'is a folder: name a file'), ('file/model.onnx', 'Not a directory'),
    pytest.param('/proc/model.onnx', 'cannot write /proc/model.onnx', marks=pytest.mark.skipif(
        not os.path.isdir('/proc'), reason='needs a folder that nobody can write to'))])
def test_export_onnx_finds_what_it_cannot_write_before_the_work(
        error_of, model_folder, tmp_path, monkeypatch, onnx_packages, place, message):
    monkeypatch.setattr('convnn_timm.inspect.onnx_export.export_onnx', lambda *args: pytest.fail('has begun'))
    (tmp_path / 'file').touch()
    call = 'export-onnx', f'local-dir:{model_folder}', '--force', '-o', str(tmp_path / place)
    assert message in error_of(*call)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_export_onnx_notes(run, tmp_path, monkeypatch, no_export):
    no_export(0.)
    options = dict(channels=(8, 8, 8, 8), sampling_type='random', num_samples=16)
    model = timm.create_model('resnet18_convnn', **options)
    timm.models.save_for_hf(model, tmp_path, model_args=options, safe_serialization=True)
    call = 'export-onnx', f'local-dir:{tmp_path}', '-o', str(tmp_path / 'model.onnx'), '--force'
    assert 'random candidates are those of every evaluation' in run(*call)[2]
    assert 'has no published weights' in run('export-onnx', 'resnet18_conv2d_new', *call[2:])[2]
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    status, _, err = run(*call)
    assert status == 0 and 'not compared with PyTorch, for onnxruntime is missing' in err


def test_export_onnx_in_another_size_keeps_the_channels(run, tmp_path, onnx_packages):
    timm.models.save_for_hf(timm.create_model('test_resnet', in_chans=1, num_classes=2), tmp_path)
    status, out, _ = run(
        'export-onnx', f'local-dir:{tmp_path}', '-o', str(tmp_path / 'model.onnx'), '--img-size', '64')
    assert status == 0 and 'images 1 x 1 x 64 x 64' in out and '2 of 2 images agree' in out


def test_export_onnx_errors(run, error_of, model_folder, photo, tmp_path, monkeypatch, onnx_packages):
    def error(*args, model=f'local-dir:{model_folder}', status=1):
        return error_of('export-onnx', model, '-o', str(tmp_path / 'model.onnx'), *args, status=status)

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
        'export-onnx', f'local-dir:{tmp_path}', '-o', str(tmp_path / 'model.onnx'), '--img-size', '8')
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
