"""ONNX files compute what their networks compute. Networks are small by default; `-m slow` runs whole ones."""
import pytest
import timm
import torch
import torch.nn as nn

from convnn_timm.inspect.onnx_export import TOLERANCE, compare_onnx, export_onnx, sensitivity
from small_networks import fit_norms, photos, two_blocks


def agreement(model, path, size, dynamic):
    export_onnx(model, path, (3, size, size), batch=3, dynamic_batch=dynamic)
    images = photos(16, size)
    difference, same = compare_onnx(model, path, images)
    assert same[difference <= TOLERANCE].all()
    return difference, images


@pytest.mark.parametrize('layer, dynamic', [
    ('convnn_branching', True), ('convnn_attn', False), pytest.param('convnn', True, marks=pytest.mark.slow)])
def test_onnx_agrees_on_photographs(layer, dynamic, tmp_path, onnx_packages):
    """To 1e-4: most, and all on which PyTorch agrees with itself after a change of a millionth."""
    model = two_blocks(layer)
    difference, images = agreement(model, tmp_path / 'model.onnx', 16, dynamic)
    stable = sensitivity(model, images) <= TOLERANCE
    assert stable.sum() >= 4 and difference[stable].max() <= TOLERANCE
    assert (difference <= TOLERANCE).sum() >= 8
    assert compare_onnx(two_blocks(layer, K=5), tmp_path / 'model.onnx', images)[0].min() > TOLERANCE


def test_many_images_are_compared_in_parts(tmp_path, onnx_packages):
    model, sizes = two_blocks('conv2d'), []
    export_onnx(model, tmp_path / 'model.onnx', (3, 16, 16), dynamic_batch=True)
    model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    difference, same = compare_onnx(model, tmp_path / 'model.onnx', torch.rand(40, 3, 16, 16))
    assert same.all() and difference.shape == (40,) and difference.max() < TOLERANCE and max(sizes) <= 16


def test_what_cannot_be_exported(tmp_path, onnx_packages):
    class Eigenvalues(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x)  # which ONNX has not

    message = 'torch cannot export this network with any number of images; try a fixed one: .*eig'
    with pytest.raises(ValueError, match=message):
        export_onnx(Eigenvalues().eval(), tmp_path / 'model.onnx', (3, 4, 4), dynamic_batch=True)
    with pytest.raises(ValueError, match="no images of 64x64: Input height .64. doesn't match model"):
        export_onnx(timm.create_model('vit_tiny_patch16_224'), tmp_path / 'model.onnx', (3, 64, 64))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('layer, options', [
    ('convnn', dict(zero_init_last=True)),  # without, PyTorch moves each of these images by more itself
    ('convnn_attn', {}), ('convnn_branching', {})])
def test_onnx_of_a_whole_network_agrees_on_photographs(layer, options, tmp_path, onnx_packages):
    model = fit_norms(timm.create_model(f'resnet18_{layer}', num_classes=5, **options))
    difference, images = agreement(model, tmp_path / 'model.onnx', 32, True)
    stable = sensitivity(model, images) <= TOLERANCE
    assert stable.sum() >= 4 and difference[stable].max() <= TOLERANCE
