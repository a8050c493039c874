"""What the models promise beyond timm's own tests (test_timm_contract.py) and the golden networks (tests/layers)."""
import json
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import group_parameters, resolve_model_input_args, save_for_hf
from timm.optim import create_optimizer_v2

import convnn_timm  # noqa: F401, registers the models
from convnn_timm.layers import Branching2d, ConvNN2d, ConvNNAttention2d, layer_arguments
from convnn_timm.models._weights import WeightsError
from convnn_timm.train.flags import parse_args
from model_names import ALL as NAMES, LARGE as NAMES_224, VARIANTS

NARROW = dict(channels=(16, 16, 16, 16), zero_init_last=False)  # a ResNet that is quick, and shows its blocks at once


def images(n=2, size=32, channels=3, dtype=torch.float32):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize('name', ['resnet18_convnn_branching', 'vgg11_convnn_branching'])
def test_a_networks_own_initialisation_keeps_the_start_that_was_asked_for(name):
    model = timm.create_model(name, neighbor_init='zero')
    layers = [m for m in model.modules() if isinstance(m, Branching2d)]
    assert layers
    for layer in layers:
        neighbors = layer.branch1.weight
        assert (neighbors[:, :, 1:] == 0).all()
        assert neighbors[:, :, 0].std().item() == pytest.approx((2 / len(neighbors)) ** 0.5, rel=0.2)


def test_all_names_are_registered_with_their_configuration():
    assert len(NAMES) == 36 and set(NAMES) <= set(timm.list_models())
    assert sum((timm.list_models('*_224', module=f'convnn_{net}') for net in ('resnet', 'vgg')), []) == NAMES_224
    for name in NAMES:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == 'cifar10' and cfg.num_classes == 10 and cfg.input_size == (3, 32, 32) and cfg.crop_pct == 1.0
        assert cfg.mean == (0.4914, 0.4822, 0.4465) and cfg.std == (0.2470, 0.2435, 0.2616)
        assert cfg.interpolation == 'bilinear' and cfg.pool_size == ((1, 1) if 'vgg' in name else (4, 4))
    for name in NAMES_224:
        cfg = timm.get_pretrained_cfg(name)
        assert not cfg.tag and not cfg.has_weights and cfg.num_classes == 1000 and cfg.input_size == (3, 224, 224)
        assert cfg.mean == IMAGENET_DEFAULT_MEAN and cfg.std == IMAGENET_DEFAULT_STD and cfg.crop_pct == 0.875
        assert cfg.interpolation == 'bilinear' and cfg.pool_size == (7, 7)


@pytest.mark.parametrize('name', [
    name if name.startswith(('resnet18', 'vgg11')) else pytest.param(name, marks=pytest.mark.slow)
    for name in NAMES + NAMES_224])
def test_every_layer_argument_is_a_keyword_of_every_model(name):
    arguments = dict(
        K=4, kernel_size=5, padding=2, dilation=2, groups=1, sampling_type='random', num_samples=16, sample_padding=1,
        shuffle_pattern='BA', shuffle_scale=1, magnitude_type='euclidean', similarity_type='Loc_Col',
        aggregation_type='Loc_Col', lambda_param=0.3, neighbor_init='zero', branch_ratio=0.25,
        branch_mix=False, attention_dropout=0.2, bias=True)
    assert set(arguments) == set(layer_arguments())
    with torch.device('meta'):
        model = timm.create_model(name, **arguments, num_classes=10, input_noise=0.1, device='meta')
        assert model(images().to('meta')).shape == (2, 10)
        with pytest.raises(TypeError, match='unknown argument k; layer arguments are .*padding, .*K, '):
            timm.create_model(name, k=9, device='meta')


@pytest.mark.parametrize('name, count', [
    ('vgg11_convnn_branching', 130_015_690), ('vgg11_convnn', 128_812_810), ('vgg11_conv2d', 128_812_810)])
def test_parameter_counts_of_the_paper(name, count):
    assert sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) == count


def test_networks_start_as_timms_do():
    """Convolutions by He's rule, biases at zero, and in a VGG's head a dropout of a half."""
    resnet, vgg = (timm.create_model(name) for name in ('resnet18_convnn', 'vgg11_convnn_branching'))
    assert resnet.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    layers = [module for module in vgg.modules() if isinstance(module, ConvNN2d)]
    assert len(layers) == 8 and all((layer.bias == 0).all() for layer in layers) and vgg.drop_rate == 0.5


@pytest.mark.parametrize('depth', ['resnet18', 'vgg11'])
def test_a_network_that_selects_by_location_is_its_convolution_twin(depth):
    options = NARROW if depth == 'resnet18' else {}
    twin = timm.create_model(f'{depth}_conv2d', **options).double().eval()
    model = timm.create_model(
        f'{depth}_convnn', similarity_type='Loc', magnitude_type='euclidean', **options).double().eval()
    weights = {name: value.view_as(model.state_dict()[name]) for name, value in twin.state_dict().items()}
    model.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(model(images(dtype=torch.float64)), twin(images(dtype=torch.float64)))


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_a_model_for_224_pixels_that_selects_by_location_is_timms_network(name):
    """With timm's weights, those of each 3x3 convolution divided between two branches that stand side by side."""
    twin = timm.create_model(name, zero_init_last=False).double().eval()
    model = timm.create_model(
        f'{name}_convnn_branching_224', sampling_type='all', similarity_type='Loc',
        magnitude_type='euclidean').double().eval()
    weights, replaced = model.state_dict(), 0
    for key, value in twin.state_dict().items():
        if key in weights:
            weights[key] = value
        else:
            layer, first = key.removesuffix('.weight'), len(value) // 8
            weights[f'{layer}.branch1.weight'] = value[:first].view_as(weights[f'{layer}.branch1.weight'])
            weights[f'{layer}.branch2.weight'] = value[first:]
            replaced += 1
    assert replaced == 16
    model.load_state_dict(weights)
    with torch.no_grad():
        x = images(1, size=96, dtype=torch.float64)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name, own', [
    ('resnet18_convnn_branching', ('random', 32)), ('resnet50_convnn_branching_224', ('random', 32)),
    ('vgg11_convnn_branching_224', ('spatial', 8)), ('vgg11_convnn_branching', ('all', -1))])
def test_candidates_are_the_architectures_unless_told_otherwise(name, own):
    def sampling(**options):
        layer = next(m for m in timm.create_model(name, device='meta', **options).modules() if isinstance(m, ConvNN2d))
        return layer.sampling_type, layer.num_samples

    assert sampling() == own and sampling(sampling_type='all') == ('all', -1)
    assert sampling(sampling_type=own[0]) == own
    if own[0] != 'all':
        assert sampling(num_samples=12) == (own[0], 12)
    assert sampling(sampling_type='spatial', num_samples=6) == ('spatial', 6)


@pytest.mark.parametrize('name', ['resnet18_convnn_branching', 'resnet34_convnn_branching', *NAMES_224[:3]])
def test_resnets_with_branches_have_the_published_form(name):
    model = timm.create_model(name, device='meta')
    layers = [m for m in model.modules() if isinstance(m, Branching2d)]
    assert len(layers) == {'resnet18': 16, 'resnet34': 32, 'resnet50': 16}[name.partition('_')[0]]
    for layer in layers:
        assert layer.branch_ratio == 0.125 and layer.pointwise_conv is None
        assert layer.branch1.neighbor_init == 'zero' and layer.branch1.num_samples == 32
        assert layer.branch1.sampling_type == 'random'
    assert timm.create_model('resnet18_conv2d').layer1[0].bn2.weight.all()  # no block starts silent, the twin's neither


def test_choices_that_the_published_form_gives_way_to():
    """By location, no neighbour is the position itself."""
    model = timm.create_model('resnet18_convnn_branching', similarity_type='Loc', device='meta')
    assert model.layer1[0].conv1.branch1.neighbor_init == 'random'


def test_the_recipe_of_the_papers_form_is_that_of_the_layers_defaults():
    args = parse_args(['-c', 'paper_resnet18', 'x'])
    layer = timm.create_model(args.model, device='meta', **args.model_kwargs).layer2[0].conv1
    assert str(layer) == str(Branching2d(64, 128, stride=2, bias=False))


STEP = """
import resource, sys, timm, torch
model = timm.create_model(sys.argv[1])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 224, 224)), torch.arange(8)).backward()
optimizer.step()
unit = 2 ** 30 if sys.platform == 'darwin' else 2 ** 20  # Linux counts in KiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='there is no resource module on Windows')
@pytest.mark.parametrize('name', NAMES_224)
def test_a_training_step_at_224_pixels_fits_in_8_gb(name):
    done = subprocess.run([sys.executable, '-c', STEP, name], capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < 8, done.stdout + done.stderr


@pytest.mark.parametrize('layer', VARIANTS)
def test_every_parameter_of_a_resnet_gets_a_gradient(layer):
    model = timm.create_model(f'resnet18_{layer}', drop_path_rate=0.1, drop_rate=0.1, **NARROW)
    model(images(4)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    if layer.endswith('attn'):  # with cosine scores, a projection's gradient may be tiny, never missing
        without = [name for name in without if dict(model.named_parameters())[name].grad is None]
    assert not without


@pytest.mark.parametrize('name, options', [
    ('resnet18_convnn_branching', dict(NARROW)),
    ('resnet18_convnn_attn', dict(NARROW, attention_dropout=0.3)),
    ('vgg11_convnn_branching', dict(drop_rate=0., mlp_ratio=0.01, sampling_type='random', num_samples=16))])
def test_gradient_checkpointing_gives_the_same_gradients(name, options):
    model = timm.create_model(name, **options).train()
    layer = next(m for m in model.modules() if isinstance(m, (ConvNN2d, ConvNNAttention2d)))
    grads, computed = [], []
    layer.register_forward_hook(lambda *_: computed.append(enable))
    for enable in False, True:
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert computed == [False, True, True]  # once more in backward
    for plain, checkpointed in zip(*grads):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name, reductions, channels', [
    ('resnet18_convnn_branching', [1, 1, 2, 4, 8], [64, 64, 128, 256, 512]),
    ('resnet50_convnn_branching_224', [2, 4, 8, 16, 32], [64, 256, 512, 1024, 2048]),
    ('vgg11_convnn', [1, 2, 4, 8, 16, 32], [64, 128, 256, 512, 512, 512])])
def test_features(name, reductions, channels):
    model = timm.create_model(name, features_only=True).eval()
    assert model.feature_info.reduction() == reductions and model.feature_info.channels() == channels
    with torch.no_grad():
        for feature, reduction, c in zip(model(images()), reductions, channels, strict=True):
            assert feature.shape == (2, c, 32 // reduction, 32 // reduction)


def test_classifier_and_input_options():
    model = timm.create_model(
        'resnet18_convnn_branching', num_classes=7, in_chans=1, global_pool='max', drop_path_rate=0.2, **NARROW).eval()
    assert model(images(channels=1)).shape == (2, 7)
    model.reset_classifier(3)
    assert model(images(channels=1)).shape == (2, 3) and model.global_pool.pool_type == 'max'
    assert model.layer4[1].drop_path is not None
    assert model(images(size=20, channels=1)).shape == (2, 3)  # any size that holds K tokens
    model = timm.create_model('resnet18_convnn', layers=(1, 2, 1, 1), block_args=dict(attn_layer='se'), **NARROW).eval()
    assert [len(model.layer1), len(model.layer2)] == [1, 2] and model.layer1[0].se is not None
    assert isinstance(model.layer1[0].conv1, ConvNN2d) and model(images()).shape == (2, 10)
    for fixed in 'stem_type', 'stem_width', 'cardinality':
        with pytest.raises(TypeError, match=f'fixed stem and cardinality: it takes no {fixed}'):
            timm.create_model('resnet18_convnn', **{fixed: 8})
    for fixed in 'norm_layer', 'conv_layer':
        with pytest.raises(TypeError, match=f'fixed layers: it takes no {fixed}'):
            timm.create_model('vgg11_convnn', **{fixed: torch.nn.BatchNorm2d})
    for layer in 'conv2d', 'conv2d_new', 'convnn_branching':
        with pytest.raises(ValueError, match='kernel_size must be odd, .* got 4'):
            timm.create_model(f'resnet18_{layer}', kernel_size=4)


@pytest.mark.parametrize('name', ['resnet18_convnn_branching', 'vgg11_convnn_branching'])
def test_layer_decay_groups_the_layers(name):
    model = timm.create_model(name, device='meta')
    groups = group_parameters(model, model.group_matcher(coarse=False))
    assert len(groups) > 5
    with torch.device('meta'):
        optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, layer_decay=0.5)
    assert len({group['lr_scale'] for group in optimizer.param_groups}) > 5


def test_input_noise_is_added_in_training_only():
    for name, options in ('resnet18_conv2d', NARROW), ('vgg11_conv2d', dict(drop_rate=0.)):
        model = timm.create_model(name, input_noise=0.5, **options)
        x, seen = images(), []
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
        first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model.train()(torch.zeros_like(x))
        assert 0.45 < seen[0].std() < 0.55


# Checkpoints

def test_pretrained_without_weights_says_so():
    unpublished = dict(hf_hub_id=None)  # whatever has been published
    with pytest.raises(RuntimeError, match='No pretrained weights exist for resnet18_convnn'):
        timm.create_model('resnet18_convnn', pretrained=True, pretrained_cfg_overlay=unpublished)


@pytest.mark.parametrize('name, options', [
    ('resnet18_convnn_branching', dict(NARROW, K=5, sampling_type='random', num_samples=32)),
    ('resnet18_convnn_attn', dict(NARROW, aggregation_type='Loc_Col'))])
def test_a_saved_folder_rebuilds_the_model(name, options, tmp_path):
    model = timm.create_model(name, num_classes=4, **options).eval()
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True).eval()
    assert loaded.layer1[0].conv1.extra_repr() == model.layer1[0].conv1.extra_repr()
    assert torch.equal(loaded(images()), model(images()))


def test_weights_are_adapted_to_one_input_channel():
    """Summed over colours, as timm does for a convolution, in both branches."""
    model = timm.create_model('vgg11_convnn_branching')
    grey = timm.create_model(
        'vgg11_convnn_branching', pretrained=True, in_chans=1,
        pretrained_cfg_overlay=dict(state_dict=model.state_dict()))
    for name in 'branch1', 'branch2':
        expected = getattr(model.features[0], name).weight.sum(1, keepdim=True)
        torch.testing.assert_close(getattr(grey.features[0], name).weight, expected)
    assert torch.equal(grey.features[4].branch1.weight, model.features[4].branch1.weight)
    assert grey.eval()(images(channels=1)).shape == (2, 10)


@pytest.mark.parametrize('options', [
    dict(shuffle_pattern='BA', shuffle_scale=2), dict(aggregation_type='Loc_Col')])
@pytest.mark.parametrize('layer', ['conv2d_new', 'convnn', 'convnn_branching'])
def test_weights_that_cannot_be_adapted_to_one_input_channel(layer, options):
    if layer == 'convnn_branching':
        options = dict(options, branch_ratio=0.25)
    model = timm.create_model(f'vgg11_{layer}', mlp_ratio=0.01, **options)
    args = dict(options, pretrained=True, mlp_ratio=0.01, pretrained_cfg_overlay=dict(state_dict=model.state_dict()))
    with pytest.raises(RuntimeError, match='cannot be adapted to another number of input channels'):
        timm.create_model(f'vgg11_{layer}', in_chans=1, **args)
    timm.create_model(f'vgg11_{layer}', **args)


@pytest.mark.parametrize('name', ['resnet18_convnn_branching', 'resnet18_conv2d'])
def test_one_name_is_one_network(name):
    """With and without weights, with and without the tag, and as timm's scripts resolve it."""
    def shapes(model):
        return {key: value.shape for key, value in model.state_dict().items()}

    model = timm.create_model(name, pretrained=True)
    others = [
        timm.create_model(name), timm.create_model(f'{name}.cifar10'), timm.create_model(f'{name}.cifar10', True),
        timm.create_model(**resolve_model_input_args(name, {}, pretrained=True)),
        timm.create_model(**resolve_model_input_args(f'{name}.cifar10', {}))]
    for other in others:
        assert str(other) == str(model) and shapes(other) == shapes(model)


@pytest.mark.parametrize('options, trained, asked', [
    (dict(K=5), 'K=9', 'K=5'), (dict(branch_ratio=0.25, num_classes=3), 'branch_ratio=0.125', 'branch_ratio=0.25'),
    (dict(channels=(16, 16, 16, 16), device='cpu'), 'channels=(64, 128, 256, 512)', 'channels=(16, 16, 16, 16)'),
    (dict(branch_mix=True, num_classes=3), 'branch_mix=False', 'branch_mix=True'),
    (dict(layers=(1, 1, 1, 1)), 'layers=(2, 2, 2, 2)', 'layers=(1, 1, 1, 1)'),
    (dict(kernel_size=5), 'kernel_size=3', 'kernel_size=5'), (dict(bias=True), 'bias=False', 'bias=True'),
    (dict(global_pool='catavgmax'), 'global_pool=avg', 'global_pool=catavgmax')])
def test_weights_for_other_arguments_are_refused_in_words(options, trained, asked):
    with pytest.raises(WeightsError) as error:
        timm.create_model('resnet18_convnn_branching', pretrained=True, **options)
    assert str(error.value) == (
        f'resnet18_convnn_branching.cifar10 was trained with {trained}, you asked for {asked}: its weights do not fit '
        'that network. Leave the argument out, or train resnet18_convnn_branching with it from the start')


def test_another_layer_is_another_name():
    with pytest.raises(TypeError, match='resnet18_convnn has convnn layers, as its name says'):
        timm.create_model('resnet18_convnn', layer='convnn_attn')


def test_arguments_that_no_tensor_shows_may_be_tried_with_published_weights():
    model = timm.create_model(
        'resnet18_convnn_branching', pretrained=True, num_samples=64, magnitude_type='euclidean', padding=0)
    layer, own = model.layer3[0].conv1, timm.create_model('resnet18_convnn_branching', pretrained=True)
    assert (layer.branch1.num_samples, layer.branch1.magnitude_type, layer.branch1.padding) == (64, 'euclidean', 0)
    assert torch.equal(layer.branch1.weight, own.layer3[0].conv1.branch1.weight)


def test_saved_weights_for_other_arguments_are_refused_in_words(tmp_path):
    save_for_hf(timm.create_model('resnet18_convnn', K=5, **NARROW), tmp_path / 'saved', safe_serialization=True)
    with pytest.raises(WeightsError, match='saved was trained with K=5, you asked for K=9: '):
        timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True, K=9)


@pytest.mark.parametrize('name, form', [
    ('resnet18_convnn_branching', dict()),
    ('resnet18_convnn_branching_224', dict(sampling_type='spatial', num_samples=8))])
def test_a_folder_saved_when_the_papers_form_was_the_default_rebuilds_that(name, form, tmp_path):
    """Its config.json names only the arguments that were given then."""
    paper = dict(dict(sampling_type='all', branch_ratio=0.5, branch_mix=True, neighbor_init='random'), **form)
    model = timm.create_model(name, **paper, **NARROW).eval()
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    file = tmp_path / 'saved' / 'config.json'
    config = json.loads(file.read_text())
    config['model_args'] = {k: v for k, v in config['model_args'].items() if k not in (*paper, 'num_samples')}
    file.write_text(json.dumps(config))
    loaded = timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True).eval()
    assert str(loaded) == str(model)
    save_for_hf(loaded, tmp_path / 'again', safe_serialization=True)
    assert str(timm.create_model(f'local-dir:{tmp_path}/again', pretrained=True)) == str(model)


@pytest.mark.parametrize('name, options', [
    ('resnet18_convnn_branching', {}), ('resnet18_convnn_branching', dict(branch_mix=True, K=4)),
    ('vgg11_convnn_branching_224', dict(mlp_ratio=0.01))])
def test_a_config_has_what_an_architecture_has_by_itself(name, options, tmp_path):
    """So that it is rebuilt as it was, whatever the architecture will have one day."""
    save_for_hf(timm.create_model(name, **options), tmp_path / 'saved', safe_serialization=True)
    args = json.loads((tmp_path / 'saved' / 'config.json').read_text())['model_args']
    own = dict(sampling_type='spatial', num_samples=8) if 'vgg' in name else dict(
        branch_ratio=0.125, neighbor_init='zero', sampling_type='random', num_samples=32, branch_mix=False)
    assert args.items() >= {**own, **options}.items()
    assert str(timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True)) == str(
        timm.create_model(name, **options))


@pytest.mark.parametrize('name, strides', [
    ('resnet18_convnn_branching_224', (8, 16, 32)), ('resnet50_convnn_branching_224', (8, 16, 32)),
    ('resnet18_conv2d', (2, 4, 8)), ('resnet18_convnn_branching', (2, 4, 8))])
def test_output_stride(name, strides):
    for stride in strides:
        model = timm.create_model(name, output_stride=stride, features_only=True, channels=(8, 8, 8, 8)).eval()
        with torch.no_grad():
            maps = model(images(1, size=4 * strides[2]))
        assert [4 * strides[2] // f.shape[-1] for f in maps] == model.feature_info.reduction()
        assert model.feature_info.reduction()[-1] == stride
        last = model.layer4[1].conv2  # of what would be a stride, both branches have the dilation
        for layer in (last.branch1, last.branch2) if 'convnn' in name else (last,):
            assert layer.dilation in (strides[2] // stride, (strides[2] // stride,) * 2)
    with pytest.raises(ValueError, match=f'unknown output_stride 3, valid are None, {strides[0]}, '):
        timm.create_model(name, output_stride=3)


def test_published_weights_with_a_smaller_output_stride():
    """A dilated network sees, at every second position, what it saw with the stride, but for the borders."""
    name, x = 'resnet18_conv2d', images(1, size=64)
    with torch.no_grad():
        coarse, fine = (
            timm.create_model(name, pretrained=True, output_stride=stride).eval().forward_features(x)
            for stride in (None, 4))
    assert fine.shape[-1] == 2 * coarse.shape[-1]
    torch.testing.assert_close(fine[..., ::2, ::2], coarse, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match='convnn_attn layers have no dilation, so output_stride must be 8'):
        timm.create_model('resnet18_convnn_attn', output_stride=4)


def test_a_dilated_network_of_neighbours_by_feature_needs_k_tokens_only():
    """Its last map of 4 x 4 has 36 tokens with the padding, 4 or fewer in steps of the dilation."""
    model = timm.create_model('resnet18_convnn', output_stride=2, **NARROW).eval()
    assert model.layer4[1].conv2.dilation == 4 and model.forward_features(images(size=8)).shape[-2:] == (4, 4)


def test_a_checkpoint_with_other_tensors_is_refused():
    """Also where timm would load without strictness, for other classes."""
    model = timm.create_model('resnet18_convnn', bias=True, **NARROW)
    weights = dict(pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(state_dict=model.state_dict()))
    with pytest.raises(RuntimeError, match='has 16 tensors that ConvNNResNet lacks, among them layer1.0.conv1.bias'):
        timm.create_model('resnet18_convnn', **weights, **NARROW)
    with pytest.raises(RuntimeError, match='has 16 tensors of ConvNNResNet in another shape, among them layer1'):
        timm.create_model('resnet18_convnn', bias=True, K=4, **weights, **NARROW)


def test_a_checkpoint_that_lacks_tensors_is_an_error_and_not_a_silent_load():
    model = timm.create_model('resnet18_convnn', **NARROW)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith('layer3.')}
    message = 'the checkpoint lacks 25 tensors of ConvNNResNet, among them layer3.0.conv1.weight'
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(
            'resnet18_convnn', pretrained=True, num_classes=5,
            pretrained_cfg_overlay=dict(state_dict=weights), **NARROW)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith('fc.')}
    loaded = timm.create_model(
        'resnet18_convnn', pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(state_dict=weights), **NARROW)
    assert torch.equal(loaded.layer3[0].conv1.weight, model.layer3[0].conv1.weight)
