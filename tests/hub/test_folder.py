"""`convnn-timm verify` of a folder says what differs from what was published."""
import json

import timm
import torch
from safetensors.torch import load, load_file, save, save_file

from convnn_timm import hub
from convnn_timm import cli
from convnn_timm.hub.folder import read_config
from convnn_timm.hub.manifest import make_entry
from publishing import NAME, error_of, rewrite


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
    assert "label_names is ['zebra', 'cat', 'dog'], published is ['bee', 'cat', 'dog']" in error_of(
        capsys, 'verify', card)
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


def test_a_folder_that_says_the_number_of_classes_twice_is_read(card):
    """As timm writes it."""
    config, entry = read_config(card), make_entry(card, NAME)
    twice = dict(config, model_args=dict(config['model_args'], num_classes=3))
    (card / 'config.json').write_text(json.dumps(twice))
    assert read_config(card) == config and make_entry(card, NAME) == entry
    assert hub.check_folder(card, entry) == []
    assert hub.check_folder(card, dict(entry, model_args=twice['model_args'])) == []
    assert timm.create_model(f'local-dir:{card}', pretrained=True).num_classes == 3
