"""The layers and networks of the paper's code, reproduced from stored inputs, weights, outputs and gradients."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import convnn_timm  # noqa: F401, registers the models
from convnn_timm import layers
from convnn_timm.ops import reference

GOLDEN = Path(__file__).parents[1] / 'golden'
CASES = {case['name']: case for case in json.loads((GOLDEN / 'layers.json').read_text())}
TENSORS = load_file(GOLDEN / 'layers.safetensors')
# Three cases hold exactly equal scores (of padded tokens, and of tokens that mirror each other). The original left them
# to chance. Its neighbours are stored: given them the layer must give its output, and ours must be as near as they are.
TIED = {name: index.long() for name, index in load_file(GOLDEN / 'ties.safetensors').items()}
NETWORKS = json.loads((GOLDEN / 'models.json').read_text())
MODEL_SUFFIX = {
    'Conv2d': 'conv2d', 'ConvNN': 'convnn', 'Branching': 'convnn_branching', 'Branching_Attn': 'convnn_branching_attn'}


def load_case(name):
    """The layer of a case with the original's weights, and the case's tensors, in float64."""
    arguments = {key: value for key, value in CASES[name].items() if key not in ('name', 'layer')}
    tensors = {key[len(name) + 1:]: value.double() for key, value in TENSORS.items() if key.startswith(f'{name}/')}
    layer = getattr(layers, CASES[name]['layer'])(**arguments, dtype=torch.float64).eval()
    layers.load_original_state_dict(layer, {k[len('param.'):]: v for k, v in tensors.items() if k.startswith('param.')})
    return layer, tensors


@pytest.mark.parametrize('name', CASES)
def test_layer(name, monkeypatch):
    layer, tensors = load_case(name)
    if name in TIED:
        positions = torch.arange(layer.pad(tensors['input'])[0, 0].numel())
        monkeypatch.setattr(layer, '_search', lambda x, size: (positions, TIED[name][..., 1:]))
    x = tensors['input'].requires_grad_()
    y = layer(x)
    y.backward(tensors['grad_output'])

    close = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, tensors['output'], **close)
    torch.testing.assert_close(x.grad, tensors['grad_input'], **close)
    grads = {key[len('grad.'):]: value for key, value in tensors.items() if key.startswith('grad.')}
    grads = layers.convert_original_state_dict(grads, layer)
    parameters = dict(layer.named_parameters())
    assert parameters and grads.keys() == parameters.keys()
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, grads[key], **close)


@pytest.mark.parametrize('name', TIED)
def test_ties_are_as_near_as_the_originals_neighbours(name):
    layer, tensors = load_case(name)
    ours = layer.neighbors(tensors['input'])
    theirs = TIED[name]
    assert not torch.equal(ours, theirs)
    assert torch.equal(ours[..., 0], theirs[..., 0])
    x, size = layer.check_and_unshuffle(tensors['input'])
    features = layer.similarity_features(layer.pad(x))
    tokens = features.flatten(2).mT
    query = tokens.index_select(1, layer.queries(size, x.device))
    index, score = reference.knn(query, tokens, tokens.shape[1], layer.magnitude_type)
    score = torch.zeros_like(score).scatter(-1, index, score)  # by position
    torch.testing.assert_close(
        score.gather(-1, ours[..., 1:]), score.gather(-1, theirs[..., 1:]), rtol=1e-12, atol=1e-12)


def test_all_cases_are_here():
    assert len(CASES) == 40 and len({case['layer'] for case in CASES.values()}) == 6


def original_state_dict(model):
    """A state dict with the original's names and shapes for one of our VGGs, filled by the golden networks' rule."""
    classifier = {'pre_logits.fc1': 'classifier.0', 'pre_logits.fc2': 'classifier.3', 'head.fc': 'classifier.6'}
    modules = dict(model.named_modules())
    state_dict = {}
    for name, value in model.state_dict().items():
        path, parameter = name.rsplit('.', 1)
        shape = tuple(value.shape)
        if path in classifier:
            path, shape = classifier[path], (shape[0], -1)[:len(shape)]
        elif isinstance(modules[path], layers.base.NeighborLayer):
            path, shape = f'{path}.conv1d_layer', shape[:3]  # (O, C, K)
        elif '.branch1.' in path:
            shape = shape[:3]  # the attention's projections are Conv1d
        value = value.reshape(shape)
        name = f'{path}.{parameter}'
        random = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(value.shape), dtype=np.float32)
        random = torch.from_numpy(np.asarray(random))
        if parameter == 'num_batches_tracked':
            state_dict[name] = torch.zeros((), dtype=value.dtype)
        elif parameter.startswith('running'):
            state_dict[name] = torch.full(value.shape, float(parameter == 'running_var'))
        elif value.ndim > 1:
            state_dict[name] = random * (2 / value[0].numel()) ** 0.5
        else:
            state_dict[name] = 1 + 0.1 * random if parameter == 'weight' else 0.1 * random
    return state_dict


def test_weights_of_another_layer_are_refused():
    """As many numbers, in another shape."""
    other = layers.ConvNN2d(6, 4, K=3, bias=False).state_dict()
    with pytest.raises(RuntimeError, match='size mismatch'):
        layers.load_original_state_dict(layers.ConvNN2d(4, 6, K=3, bias=False), other)


@pytest.mark.parametrize('i', range(len(NETWORKS)), ids=[network['layer'] for network in NETWORKS])
def test_network(i):
    network = NETWORKS[i]
    name = f"{network['model']}_{MODEL_SUFFIX[network['layer']]}"
    model = timm.create_model(name, **network['kwargs'], device='meta')
    assert sum(p.numel() for p in model.parameters()) == network['params']
    state_dict = original_state_dict(model)
    assert len(state_dict) == network['keys'] and set(network['first_keys']) <= state_dict.keys()
    # As a user would load it: through timm, whose loader calls the model file's checkpoint_filter_fn.
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict)).double().eval()
    tensors = load_file(GOLDEN / 'models.safetensors')
    with torch.no_grad():
        logits = model(tensors[f'{i}/input'].double())
    torch.testing.assert_close(logits, tensors[f'{i}/logits'], rtol=1e-8, atol=1e-8)
