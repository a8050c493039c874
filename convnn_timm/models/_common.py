"""What the model files share: keyword arguments, initialisation, default configuration, checks of a checkpoint."""
import difflib
import inspect
from typing import Any, Callable, Dict, Tuple, Type

import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from convnn_timm.layers import Branching2d, BranchingAttention2d, ConvNN2d, layer_arguments
from convnn_timm.layers.factory import check_arguments
from ._weights import find_weights, with_tag_arguments

__all__ = [
    'add_input_noise', 'cifar_cfg', 'check_complete', 'check_known', 'entrypoint', 'imagenet_cfg',
    'init_convnn_weights', 'sampled', 'split_layer_args', 'unknown_model']


def split_layer_args(kwargs: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Split a model's keyword arguments into those of its ConvNN layers and the rest."""
    layer_args = {name: value for name, value in kwargs.items() if name in layer_arguments()}
    return layer_args, {name: value for name, value in kwargs.items() if name not in layer_args}


def check_known(kwargs: Dict[str, Any], network: Type[nn.Module]) -> None:
    """Refuse what neither the layers nor timm's network take, which would not name the layers' arguments."""
    check_arguments(kwargs.keys() - inspect.signature(network).parameters.keys())


def sampled(layer_args: Dict[str, Any]) -> Dict[str, Any]:
    """Layer arguments of a model for 224x224 images: candidates on an 8x8 grid, unless the caller chooses.

    The first maps have 3136 tokens in a ResNet and 50176 in a VGG, too many to compare each with all. A grid is the
    same in every step; maps of 7x7 are smaller than it, and all their tokens are candidates.
    """
    return layer_args if 'sampling_type' in layer_args else {'sampling_type': 'spatial', 'num_samples': 8, **layer_args}


def init_convnn_weights(model: nn.Module) -> None:
    """Give ConvNN layers the initialisation that timm gives the convolutions beside them."""
    for m in model.modules():
        if isinstance(m, ConvNN2d):
            nn.init.kaiming_normal_(m.random_weight(), mode='fan_out', nonlinearity='relu')
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, (Branching2d, BranchingAttention2d)):
            m.init_pointwise()


def add_input_noise(x: torch.Tensor, std: float, training: bool) -> torch.Tensor:
    """Add Gaussian noise of that standard deviation in training."""
    return x + std * torch.randn_like(x) if training and std > 0 else x


def check_complete(state_dict: Dict[str, torch.Tensor], model: nn.Module, classifier: str) -> None:
    """Refuse a checkpoint without some of the model's tensors, the classifier's aside.

    timm loads without strictness when the number of classes differs, and would leave them random without a word.

    Raises:
        RuntimeError: Tensors are missing.
    """
    missing = [
        name for name in model.state_dict()
        if name not in state_dict
        and not name.startswith(f'{classifier}.') and not name.endswith('num_batches_tracked')]
    if missing:
        raise RuntimeError(
            f'the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, '
            f'among them {", ".join(missing[:3])}: '
            f'is it of another architecture, or were other model arguments used?')


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


def entrypoint(create: Callable[..., nn.Module], variant: str, module: str, doc: str) -> Callable[..., nn.Module]:
    """The function that timm registers for one variant, which finds its weights and their arguments."""

    def fn(pretrained: bool = False, **kwargs) -> nn.Module:
        whole = find_weights(variant, kwargs) if pretrained else with_tag_arguments(variant, kwargs)
        model = create(variant, pretrained=pretrained, **whole)
        # What timm saves of a model to build it again, beside the arguments that `create_model` was given.
        model._model_args = {
            name: value for name, value in whole.items() if name not in {*kwargs, 'pretrained_cfg_overlay'}}
        if not pretrained and isinstance(kwargs.get('pretrained_cfg'), (str, type(None))):
            model.pretrained_cfg.pop('label_names', None)  # of the published weights, which this model is without
        return model

    fn.__name__ = fn.__qualname__ = variant
    fn.__module__ = module
    fn.__doc__ = doc
    return fn


def unknown_model(name: str) -> str:
    """What to say of a name that timm does not know."""
    close = difflib.get_close_matches(name, timm.list_models(include_tags=True) + timm.list_models())
    hint = f'did you mean {", ".join(close)}?' if close else '`convnn-timm list` shows those of this package'
    return f'unknown model {name!r}; {hint}'
