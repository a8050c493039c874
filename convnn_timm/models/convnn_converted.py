"""One name for every timm model whose convolutions `convnn_timm.convert` replaced, so that timm can rebuild it.

    timm.create_model('convnn_converted', base='resnet50', convert=dict(where='layer3.*', branch_ratio=0.25))

is `timm.create_model('resnet50')` after `convert(model, where='layer3.*', branch_ratio=0.25)`. A converted model has
this name when timm saves it; its `local-dir:` or `hf-hub:` name rebuilds it.
"""
from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import timm
import torch
import torch.nn as nn
from timm.models import (
    PretrainedCfg, _registry, build_model_with_cfg, generate_default_cfgs, get_arch_name, get_pretrained_cfg, is_model,
    register_model, resolve_pretrained_cfg)

from convnn_timm import conversion
from ._common import check_fits
from ._weights import check_reach, find_weights

__all__ = []

default_cfgs = generate_default_cfgs({'convnn_converted': {}})  # the base has its own


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Accept the state dict of a model that was converted in the same way."""
    check_fits(state_dict, model)
    return state_dict


def _build(base: str, convert: List[Dict[str, Any]], pretrained: bool, **kwargs) -> nn.Module:
    if pretrained:
        check_reach(base)
    model = timm.create_model(base, pretrained=pretrained, **kwargs)
    for arguments in convert:
        conversion.convert(model, **arguments)
    return model


@register_model
def convnn_converted(
        pretrained: bool = False,
        base: str = 'resnet18',
        convert: Union[Mapping[str, Any], Sequence[Mapping[str, Any]]] = {},
        pretrained_cfg: Optional[Union[str, Dict[str, Any]]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[str] = None,
        **kwargs,
) -> nn.Module:
    """A timm model with ConvNN layers in place of its convolutions.

    With `pretrained=True`, a model that is created by a `local-dir:` or `hf-hub:` name, or with a file of weights, gets
    those. Otherwise the base gets its pretrained weights before it is converted.

    Args:
        base: Name of the timm model, with or without a tag, of those that `timm.list_models` knows.
        convert: Arguments of `convnn_timm.convert`, or a list of such for several conversions in turn.
        **kwargs: Arguments of the base.

    Raises:
        ValueError: There is no such base.
        TypeError: `convert` holds something else.
    """
    if not isinstance(base, str) or not is_model(base) or get_arch_name(base) == 'convnn_converted':
        raise ValueError(
            f'base={base!r} is no model of timm: give a name that timm.list_models knows, without a source (hf-hub:)')
    convert = conversion.conversions(convert)
    asked = resolve_pretrained_cfg('convnn_converted', pretrained_cfg, pretrained_cfg_overlay)
    own = pretrained and bool(asked.has_weights or asked.state_dict)
    if own:
        pretrained_cfg_overlay = find_weights('convnn_converted', dict(
            pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay, cache_dir=cache_dir,
        ))['pretrained_cfg_overlay']
    saved = isinstance(pretrained_cfg, dict) and PretrainedCfg(**pretrained_cfg).has_weights
    cfg = pretrained_cfg if saved else get_pretrained_cfg(base).to_dict()
    if kwargs.get('features_only'):  # by default the levels of the base
        kwargs['out_indices'] = timm.create_model(base, **{**kwargs, 'device': 'meta'}).feature_info.out_indices
    return build_model_with_cfg(
        partial(_build, base, convert, pretrained and not own),
        'convnn_converted',
        own,
        pretrained_cfg=dict(cfg, architecture='convnn_converted'),
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cls='getter'),
        cache_dir=cache_dir,
        **kwargs,
    )


# Saved models need this name, but nobody chooses it from a list: timm.list_models leaves out the names in this table.
# (Should timm drop the table, the name is listed.)
getattr(_registry, '_deprecated_models', {})['convnn_converted'] = None
