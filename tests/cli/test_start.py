"""`list` and `info`."""
import pytest
import timm
import torch


def test_list(run):
    status, out, _ = run('list', 'resnet18_conv2d*')
    header, *rows = out.splitlines()
    assert status == 0 and header.split() == ['model', 'parameters', 'MACs', 'weights']
    assert [row.split()[0] for row in rows] == ['resnet18_conv2d', 'resnet18_conv2d_new']
    name, parameters, macs, unit, *weights = rows[0].split()
    model = timm.create_model(name, device='meta')
    assert parameters == f'{sum(p.numel() for p in model.parameters()):,}'
    assert 0.5 < float(macs) < 0.6 and unit == 'G'  # a ResNet-18 for 32x32 images
    assert weights == ['resnet18_conv2d.cifar10']


def test_list_shows_only_this_package(error_of):
    assert "no model matches 'convnn_converted'" in error_of('list', 'convnn_converted')  # has no size of its own
    assert "no model matches 'test_resnet'" in error_of('list', 'test_resnet')


@pytest.mark.parametrize('pattern, names', [
    ('34_convnn_a', ['resnet34_convnn_attn']),
    ('resnet18*_convnn', ['resnet18_convnn']),
    ('resnet18_conv2d.cifar10', ['resnet18_conv2d']),
    ('resnet18*.cifar10', ['resnet18_conv2d', 'resnet18_convnn_branching']),
])
def test_list_finds(run, pattern, names):
    status, out, _ = run('list', pattern)
    assert status == 0 and [row.split()[0] for row in out.splitlines()[1:]] == names


def test_list_names_what_is_near(error_of):
    assert 'did you mean resnet18_convnn' in error_of('list', 'rsnet18_convnn')
    assert 'did you mean resnet18_conv2d.cifar10' in error_of('list', 'resnet18_conv2.cifar10')
    assert '`convnn-timm list` shows them all' in error_of('list', 'zzzz')


def test_info(run):
    status, out, _ = run('info')
    assert status == 0
    assert f'torch            {torch.__version__}' in out
    assert any(line.split()[:3] == ['neighbor_conv', 'torch', 'yes'] for line in out.splitlines())
