"""What the model files share: keyword arguments, initialisation, default configurations, checks of a checkpoint."""
import difflib
import inspect
from typing import Any, Dict, Set, Tuple, Type

import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, get_model_traits, resolve_pretrained_cfg

from convnn_timm.layers import LAYER_TYPES, ConvNN2d, layer_arguments
from convnn_timm.layers.registry import check_arguments
from ._weights import WeightsError, find_weights, hub_id, local_file, named_entry

__all__ = [
    'add_input_noise', 'build_model', 'cifar_cfg', 'check_fits', 'check_known', 'imagenet_cfg', 'init_convnn_weights',
    'layer_of', 'unknown_model']

# Arguments that change nothing in what a trained network computes, and the number of classes, to which timm adapts
# weights.
NOT_OF_THE_WEIGHTS = {
    'num_classes', 'device', 'dtype', 'neighbor_init', 'zero_init_last', 'attention_dropout',
    'drop_rate', 'drop_path_rate', 'drop_block_rate', 'input_noise'}


def layer_of(architecture: str) -> str:
    """The layer that the name of an architecture ends with."""
    return architecture.partition('_')[2].removesuffix('_224')


def check_known(kwargs: Dict[str, Any], network: Type[nn.Module]) -> None:
    """Refuse arguments that neither the layers nor timm's network take. (timm's own error names only its own.)"""
    check_arguments(kwargs.keys() - inspect.signature(network).parameters.keys())


def init_convnn_weights(model: nn.Module) -> None:
    """Initialise ConvNN layers as timm initialises convolutions."""
    for m in model.modules():
        if isinstance(m, ConvNN2d):
            nn.init.kaiming_normal_(m.random_weight(), mode='fan_out', nonlinearity='relu')
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def add_input_noise(x: torch.Tensor, std: float, training: bool) -> torch.Tensor:
    """Add Gaussian noise of that standard deviation in training."""
    return x + std * torch.randn_like(x) if training and std > 0 else x


class UnfitError(RuntimeError):
    """A checkpoint does not hold the tensors of the model."""


def check_fits(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> None:
    """Refuse a checkpoint that lacks tensors of the model, has others, or has them in another shape.

    The classifier may differ, and the shapes of the first layers: timm adapts them. For another number of classes timm
    loads without strictness, and would skip in silence what does not fit.

    Raises:
        UnfitError: The checkpoint is of another network.
    """
    def shapes(tensors: Dict[str, torch.Tensor]) -> Dict[str, Tuple[int, ...]]:
        return {
            name: tuple(value.shape) for name, value in tensors.items()
            if name.rpartition('.')[0] not in heads and not name.endswith('num_batches_tracked')}

    heads, first = (
        (names,) if isinstance(names, str) else names or ()
        for names in (model.pretrained_cfg.get('classifier'), get_model_traits(model).get('first_conv')))
    own, found, kind = shapes(model.state_dict()), shapes(state_dict), type(model).__name__
    differing = {
        f'lacks {{}} tensors of {kind}': [name for name in own if name not in found],
        f'has {{}} tensors that {kind} lacks': [name for name in found if name not in own],
        f'has {{}} tensors of {kind} in another shape': [
            name for name in own
            if own[name] != found.get(name, own[name]) and name.rpartition('.')[0] not in first] + [
            name for name in (f'{head}.weight' for head in heads)
            if name in state_dict and name in (weights := model.state_dict())
            and state_dict[name].shape[1:] != weights[name].shape[1:]]}
    if problems := [
            f'{text.format(len(names))}, among them {", ".join(names[:3])}'
            for text, names in differing.items() if names]:
        raise UnfitError(
            f'the checkpoint {"; it ".join(problems)}: is it of another architecture, or were other model arguments '
            f'used?')


def cifar_cfg(**kwargs) -> Dict[str, Any]:
    """Default configuration of a model for CIFAR-10."""
    return {
        'url': '',
        'num_classes': 10, 'input_size': (3, 32, 32),
        'crop_pct': 1.0, 'interpolation': 'bilinear',
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        'license': 'mit', 'paper_ids': 'arXiv:2511.14137',
        'paper_name': 'Attention Via Convolutional Nearest Neighbors',
        'origin_url': 'https://github.com/mingikang31/Convolutional-Nearest-Neighbor',
        **kwargs
    }


def imagenet_cfg(**kwargs) -> Dict[str, Any]:
    """Default configuration of a model for ImageNet, as timm's networks have it."""
    return cifar_cfg(**{
        'num_classes': 1000, 'input_size': (3, 224, 224), 'crop_pct': 0.875,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        **kwargs
    })


def build_model(
        network: Type[nn.Module],
        variant: str,
        pretrained: bool,
        model_args: Dict[str, Any],
        kwargs: Dict[str, Any],
        **build_args,
) -> nn.Module:
    """Build a model, with weights if they are asked for.

    Args:
        network: Class of the model.
        variant: Name of the architecture, which ends with a layer's.
        pretrained: Load weights, those of the name or those that `kwargs` name.
        model_args: Arguments of the architecture, which those of the caller replace.
        kwargs: Arguments of the caller.
        **build_args: Arguments of the network and of timm's `build_model_with_cfg` that the caller cannot choose.

    Raises:
        WeightsError: The weights cannot be found, or are those of another network.
        TypeError: An argument that neither the layers nor the network has.
    """
    layer = layer_of(variant)
    if 'layer' in kwargs:
        raise TypeError(f'{variant} has {layer} layers, as its name says: for others create the model of that name')
    model_args = _beside(model_args, kwargs)
    asked, source, trained = {**model_args, **kwargs}, '', None
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        source, trained = cfg.hf_hub_id or cfg.file, kwargs.get('pretrained_model_args')
        if entry := named_entry(variant, cfg):
            source, trained = entry['name'], entry['model_args']
            differing = _differing(network, layer, model_args, trained, asked, set(trained) - {*kwargs, 'in_chans'})
            if differing:
                file = local_file(source)
                raise WeightsError(
                    f'{source} was trained with {_values(differing, 0)}, and {variant} has {_values(differing, 1)}: '
                    f'load it as {f"local-dir:{file.parent}" if file else f"hf-hub:{hub_id(entry)}"}, whose '
                    f'config.json has its arguments')
        asked = find_weights(variant, asked)
    layer_args = {name: asked.pop(name) for name in layer_arguments() if name in asked}
    try:
        model = build_model_with_cfg(
            network, variant, pretrained, layer=layer, layer_args=layer_args, **build_args, **asked)
    except UnfitError as error:
        differing = _differing(network, layer, model_args, trained, kwargs, set(kwargs)) if trained else {}
        if not differing:
            raise
        raise WeightsError(
            f'{source} was trained with {_values(differing, 0)}, you asked for {_values(differing, 1)}: its weights '
            f'do not fit that network. Leave the argument out, or train {variant} with it from the start') from error
    # timm saves these beside the arguments of `create_model`, so that the model can be built again.
    model._model_args = {
        name: value for name, value in model_args.items() if name in layer_arguments() and name not in kwargs}
    if not pretrained and isinstance(kwargs.get('pretrained_cfg'), (str, type(None))):
        model.pretrained_cfg.pop('label_names', None)  # they belong to the published weights
    return model


def _beside(model_args: Dict[str, Any], kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """An architecture's arguments without those that the caller's choices make senseless."""
    senseless = set()
    if kwargs.get('sampling_type', model_args.get('sampling_type')) != model_args.get('sampling_type'):
        senseless.add('num_samples')  # it belongs to the architecture's own sampling
    if kwargs.get('similarity_type') == 'Loc':
        senseless.add('neighbor_init')  # chosen by location, the position itself has no rank of its own
    return {name: value for name, value in model_args.items() if name not in senseless}


def _differing(
        network: Type[nn.Module],
        layer: str,
        model_args: Dict[str, Any],
        trained: Dict[str, Any],
        asked: Dict[str, Any],
        names: Set[str],
) -> Dict[str, Tuple[Any, Any]]:
    """Of these arguments, those whose value in training differs from the one asked for: both values."""
    defaults = {
        name: parameter.default for init in (*(cls.__init__ for cls in reversed(network.__mro__)), LAYER_TYPES[layer])
        for name, parameter in inspect.signature(init).parameters.items()
        if parameter.default is not parameter.empty}
    defaults.update(kernel_size=3, bias=network.layer_bias)
    first, second = ({**defaults, **model_args, **arguments} for arguments in (trained, asked))
    ignored = NOT_OF_THE_WEIGHTS | {*layer_arguments()} - {*layer_arguments(layer)}
    pairs = {name: (first[name], second[name]) for name in sorted(names & first.keys() & second.keys() - ignored)}
    return {name: (a, b) for name, (a, b) in pairs.items() if _plain(a) != _plain(b)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # as JSON has it


def _values(differing: Dict[str, Tuple[Any, Any]], which: int) -> str:
    return ', '.join(f'{name}={pair[which]}' for name, pair in differing.items())


def unknown_model(name: str) -> str:
    """What to say of a name that timm does not know."""
    close = difflib.get_close_matches(name, {*timm.list_models(include_tags=True), *timm.list_models()})
    hint = f'did you mean {", ".join(close)}?' if close else '`convnn-timm list` shows those of this package'
    return f'unknown model {name!r}; {hint}'
