"""ConvNN layers in place of the convolutions of any network, with the weights of these or with new ones.

    model = timm.create_model('resnet50', pretrained=True)
    print(convnn_timm.convert(model, where='layer3.*', branch_ratio=0.25))

A converted timm model stays a timm model: what timm saves of it rebuilds it (models/convnn_converted.py).
"""
import copy
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import Conv2dSame
from timm.models import get_model_input_config

from .layers.aligned import Aligned
from .layers.base import check_number
from .layers.from_conv import window_arguments
from .layers.registry import (
    REGISTRY, check_arguments, create_layer_for, first_modules, layer_type, rearranges_channels)
from .macs import count_macs, count_parameters

__all__ = ['ConversionReport', 'convert']

Where = Union[None, str, Sequence[str], Callable[[str, nn.Module], bool]]

STARTS = ('conv', 'random')
MANY_TIMES = 10  # a network that costs so many times more is warned of
# What the convolution, not the caller, decides.
FROM_CONV = ('kernel_size', 'stride', 'dilation', 'groups', 'bias')
# Methods that timm.utils.reparameterize_model calls: of each module the first that it has.
REPARAMETERIZE = ('fuse', 'reparameterize', 'switch_to_deploy')


@dataclass
class ConversionReport:
    """What `convert` did."""
    layer: str
    replaced: List[str] = field(default_factory=list)  # names of modules
    skipped: Dict[str, str] = field(default_factory=dict)  # names of convolutions that stay, and why
    parameters: Tuple[int, int] = (0, 0)  # before and after
    macs: Optional[Tuple[int, int]] = None  # before and after; None if the model does not say how large its images are
    input_size: Optional[Tuple[int, int, int]] = None  # of the image for which macs are counted

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f'{self.layer} in place of {_list(self.replaced)}']
        lines += [f'  left: {reason}: {names}' for reason, names in _by_reason(self.skipped)]
        lines += [f'  parameters: {before / 1e6:.2f} M before, {after / 1e6:.2f} M after']
        if self.macs:
            size, (before, after) = ' x '.join(map(str, self.input_size)), self.macs
            lines += [f'  multiply-accumulates at {size}: {before / 1e9:.3f} G before, {after / 1e9:.3f} G after']
        return '\n'.join(lines)


def convert(
        model: nn.Module,
        layer: str = 'convnn_branching',
        where: Where = None,
        init: str = 'conv',
        **layer_args,
) -> ConversionReport:
    """Replace convolutions of a network, in place, by ConvNN layers.

    Square convolutions with odd kernels, 3 x 3 or larger, are replaced. Stride, padding, dilation, groups and bias are
    kept, so every map keeps its size. A grouped convolution becomes a branching layer only if the branches can divide
    the outputs of each group. A depthwise one cannot be divided: use 'convnn' for it.

    What cannot be replaced stays, and the report says why. Convolutions that share a parameter with another module stay
    too, and those that reparameterisation will fold into others: reparameterise first
    (`model = timm.utils.reparameterize_model(model)`), then convert. (timm cannot rebuild a reparameterised model by
    its name: keep the code that made it, and load its weights there.)

    Args:
        model: Any network; a timm model stays one in all respects.
        layer: One of `convnn_timm.layers.LAYER_TYPES`, except 'conv2d'.
        where: Which convolutions: names with the wildcards of `fnmatch` (a list, or one string with commas), or a
            function of name and module. All by default.
        init: How the layers start. 'random': with their own initialisation. 'conv', for 'convnn' and
            'convnn_branching': with the weights of the convolution. If neighbours are chosen by location
            (`similarity_type='Loc'`, `magnitude_type='euclidean'`), the network then computes what it did, with K,
            padding and candidates at their defaults. If they are chosen by similarity, the centre of the window becomes
            the weight of the position itself, and the other taps, by their distance from the centre, those of the
            ranks: train the network further. A branching layer divides the outputs between its branches. Its 1x1
            convolution, if any, starts as the identity (for groups, a permutation), so that the convolution's share
            stays.
        **layer_args: Arguments of the layer. `K` is the size of the window by default, `padding` reaches as far as it.

    Returns:
        What was replaced, what was not and why, and what it costs.

    Raises:
        ValueError: Nothing was replaced: there is no such layer or start, or a name fits no convolution. The model is
            as it was.
        TypeError: An argument that the layers do not have, or that comes from the convolution.
    """
    _check(layer, init, layer_args)
    if isinstance(model, nn.Conv2d):
        raise ValueError('a convolution cannot be replaced in place: put it into a Sequential')
    if hasattr(model, '_orig_mod'):  # of torch.compile
        raise ValueError('the model is compiled: convert it first, then compile it')
    if isinstance(model, nn.parallel.DistributedDataParallel):  # which would not synchronise the new parameters
        raise ValueError('the model is wrapped in DistributedDataParallel: convert it first, then wrap it')
    if isinstance(where, str):
        where = [pattern.strip() for pattern in where.split(',')]
    elif isinstance(where, Sequence):
        where = list(where)  # a list, which timm can save
    if not (where is None or callable(where) or isinstance(where, list) and all(isinstance(n, str) for n in where)):
        raise TypeError(f'`where` must be names or a function, got {where!r}')
    report, new, possible, in_use = ConversionReport(layer), {}, [], _used_elsewhere(model)
    for name, conv in _convolutions(model):
        reason = _why_not(conv, layer, init, layer_args) or in_use.get(conv, '')
        possible += [] if reason else [name]
        if where is None or _selects(where, name, conv):
            if reason:
                report.skipped[name] = reason
            else:
                new[conv] = None
                report.replaced.append(name)
    if not new:
        raise ValueError(_nothing(where, layer, possible, report.skipped))
    if isinstance(where, list):
        names = [name for name, _ in _convolutions(model)]
        if idle := [pattern for pattern in where if not any(fnmatchcase(name, pattern) for name in names)]:
            raise ValueError(f'no convolution is named {", ".join(idle)}; there are {_list(names)}')

    report.input_size = _input_size(model)
    before = _cost(model, report.input_size)
    for conv in new:
        new[conv] = _create(conv, layer, init, layer_args)
    for module in list(model.modules()):
        for name, child in module._modules.items():  # (named_children names a module only once)
            if child in new:
                setattr(module, name, new[child])
    _record(model, dict(layer=layer, where=report.replaced if callable(where) else where, init=init, **layer_args))
    after = _cost(model, report.input_size)
    report.parameters = before[0], after[0]
    report.macs = (before[1], after[1]) if before[1] and after[1] else None
    if report.macs and after[1] > MANY_TIMES * before[1]:
        warnings.warn(
            f'the model takes {after[1] / before[1]:.0f} times as many multiply-accumulates as before: choose '
            'convolutions of smaller maps with `where`, or fewer candidates with sampling_type and num_samples')
    return report


# Which convolutions

def _check(layer: str, init: str, layer_args: Dict[str, Any]) -> None:
    layers = [name for name, record in REGISTRY.items() if record.is_own]
    if layer not in layers:
        raise ValueError(f'unknown layer {layer!r}, valid are {", ".join(layers)}')
    if init not in STARTS:
        raise ValueError(f'unknown init {init!r}, valid are {", ".join(STARTS)}')
    if taken := [name for name in FROM_CONV if name in layer_args]:
        raise TypeError(f'{", ".join(taken)}: comes from the convolution that is replaced, leave it out')
    check_arguments(layer_args)
    shuffled = layer_args.get('shuffle_pattern', 'NA') != 'NA'
    if shuffled and layer_args['shuffle_pattern'] != 'BA':
        pattern = layer_args['shuffle_pattern']
        raise ValueError(f"shuffle_pattern={pattern!r} changes the size of the map: use 'BA' or 'NA'")
    check_number('branch_ratio', layer_args.get('branch_ratio', 0.5), 0, 1)
    starts = layer_type(layer).start is not None
    if init == 'conv' and (shuffled or not starts):
        what = f'{layer} with a pixel shuffle' if starts else layer
        raise ValueError(f"{what} cannot start from a convolution's weights: choose init='random'")
    if init == 'conv':
        if layer_args.get('neighbor_init', 'random') != 'random':
            raise ValueError("init='conv' starts from the convolution's weights: leave out neighbor_init, or choose "
                             "init='random'")


def _convolutions(model: nn.Module) -> Iterator[Tuple[str, nn.Conv2d]]:
    """The convolutions of a network, except those inside of this package's layers."""
    own, inside = tuple(record.cls for record in REGISTRY.values() if record.is_own), set()
    for name, module in model.named_modules():
        if isinstance(module, own):
            inside.update(module.modules())
        elif isinstance(module, nn.Conv2d) and module not in inside:
            yield name, module


def _selects(where: Where, name: str, conv: nn.Module) -> bool:
    return bool(where(name, conv)) if callable(where) else any(fnmatchcase(name, pattern) for pattern in where)


def _why_not(conv: nn.Conv2d, layer: str, init: str, layer_args: Dict[str, Any]) -> str:
    """Why a layer cannot stand in for a convolution; '' if it can."""
    (height, width), arguments = conv.kernel_size, layer_type(layer).arguments
    if height == width == 1:
        return 'a 1 x 1 kernel has no neighbours'
    if height != width:
        return f'the kernel is {height} x {width}, not square'
    if height % 2 == 0:
        return f'the kernel is {height} x {width}, and an even one has no centre'
    if type(conv) not in (nn.Conv2d, Conv2dSame):
        return f'{type(conv).__name__} does more than a convolution'
    if any(value for name, value in vars(conv).items() if name.endswith('_hooks')):
        return 'it has hooks, which would be lost'
    if 'forward' in vars(conv) or '_conv_forward' in vars(conv):
        return 'its forward was replaced, which would be lost'
    if conv._buffers or conv._modules or conv._parameters.keys() != {'weight', 'bias'}:
        return 'it holds other tensors than a weight and a bias, which would be lost'
    for parameter in conv.parameters():
        if type(parameter) is not nn.Parameter:
            return f'its parameters are {type(parameter).__name__}s, which would be lost'
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return 'its parameters have hooks, which would be lost'
    for name in 'stride', 'dilation':
        if len(set(getattr(conv, name))) > 1:
            return f'{name}={getattr(conv, name)} differs between the axes'
        if name not in ('stride', *arguments) and conv.dilation[0] > 1:
            return f'it is dilated, which {layer} is not'
    if conv.padding_mode != 'zeros':
        return f'padding_mode={conv.padding_mode!r}, the layer pads with zeros'
    if conv.groups > 1 and 'groups' not in arguments:
        return f'it has groups, which {layer} has not'
    if conv.groups > 1 and init == 'conv' and layer_args.get('aggregation_type') == 'Loc_Col':
        return "coordinates ('Loc_Col') cannot be divided between its groups: choose init='random'"
    if 'branch_ratio' in arguments and int(conv.out_channels * layer_args.get('branch_ratio', 0.5)) % conv.groups:
        count = conv.out_channels // conv.groups
        return f'its groups have {count} output{"s"[:count - 1]} each, which branch_ratio does not divide between ' \
            f"the branches: choose another one, or layer='convnn'"
    side_by_side = 'branch_mix' in arguments and not layer_args.get('branch_mix', True)
    if conv.groups > 1 and init == 'conv' and side_by_side:
        return "without branch_mix its groups' outputs would change places: choose init='random'"
    try:
        _create_layer(conv, layer, layer_args, 'meta')
    except ValueError as error:
        return str(error)
    return ''


def _used_elsewhere(model: nn.Module) -> Dict[nn.Module, str]:
    """Convolutions whose weights another module also uses, or will change, each with the reason to leave it."""
    owners, reasons = defaultdict(list), {}
    for name, module in model.named_modules():
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                # Tied parameters are one object, or after `b.weight.data = a.weight.data` two with the same memory.
                address = parameter.data_ptr() if type(parameter) is nn.Parameter else 0
                owners[address or id(parameter)].append((module, name, kind))
    for shared in owners.values():
        for module, name, kind in shared:
            if others := [f'{other}.{its}' for _, other, its in shared if (other, its) != (name, kind)]:
                reasons[module] = f'it shares its {kind} with {_list(others)}'
    for module in model.modules():
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m not in reasons]
        if isinstance(getattr(module, 'merged', None), bool):  # an adapter, of peft or loralib
            reasons |= dict.fromkeys(convs, 'an adapter will merge into it: merge that first, then convert')
        elif convs and (method := next((name for name in REPARAMETERIZE if hasattr(module, name)), None)):
            reasons |= dict.fromkeys(
                _folded(module, method, convs),
                'reparameterisation will fold it into another one: `model = timm.utils.reparameterize_model(model)` '
                'first, then convert')
    return reasons


def _folded(module: nn.Module, method: str, convs: List[nn.Conv2d]) -> List[nn.Conv2d]:
    """The convolutions that a method of a module removes or changes, as seen by calling it on a copy."""
    copies = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if type(tensor) in (nn.Parameter, torch.Tensor) and tensor.is_floating_point():
            # 0.5, not 1: multiplying by the variance and weight of a batch norm must show
            copy_ = torch.full_like(tensor.detach(), 0.5, device='cpu' if tensor.is_meta else None)
            copies[id(tensor)] = nn.Parameter(copy_) if isinstance(tensor, nn.Parameter) else copy_
    trial = copy.deepcopy(module, copies).eval()  # `copies` then has the copied modules too
    try:
        result = getattr(trial, method)()
    except Exception:  # called before, or another kind of method: reparameterize_model raises too
        return []
    kept = set(result.modules() if isinstance(result, nn.Module) else trial.modules())

    def stays(conv: nn.Conv2d) -> bool:
        before, after = conv._parameters, copies[id(conv)]._parameters
        return copies[id(conv)] in kept and all(
            after.get(name) is copies.get(id(parameter)) and (parameter is None or (after[name] == 0.5).all())
            for name, parameter in before.items())

    return [conv for conv in convs if not stays(conv)]


def _nothing(where: Where, layer: str, possible: List[str], skipped: Dict[str, str]) -> str:
    """Why nothing was replaced."""
    if skipped:
        which = '' if where is None else ' that `where` selects'
        lines = [f'{layer} can replace none of the convolutions{which}:']
        lines += [f'  {reason}: {names}' for reason, names in _by_reason(skipped)]
    elif where is None:
        return 'the model has no Conv2d'
    else:
        what = 'the function' if callable(where) else ', '.join(map(repr, where))
        lines = [f'`where` selects no convolution ({what})']
    return '\n'.join(lines + [f'  it can replace: {", ".join(possible) or "none in this model"}'])


def _by_reason(skipped: Dict[str, str]) -> List[Tuple[str, str]]:
    names = defaultdict(list)
    for name, reason in skipped.items():
        names[reason].append(name)
    return [(reason, _list(found)) for reason, found in names.items()]


def _list(names: List[str]) -> str:
    shown = ', '.join(name or 'the model itself' for name in names[:4])
    return shown if len(names) <= 4 else f'{shown} and {len(names) - 4} more'


# The new layers

def _create(conv: nn.Conv2d, layer: str, init: str, layer_args: Dict[str, Any]) -> nn.Module:
    """The layer in place of a convolution, whose output has the size of the convolution's."""
    new = _create_layer(conv, layer, layer_args, conv.weight.device, conv.weight.dtype)
    if init == 'conv':
        layer_type(layer).start(new, conv)
    new.train(conv.training)
    for name, parameter in new.named_parameters():
        source = conv.bias if conv.bias is not None and name.endswith('bias') else conv.weight
        if not source.requires_grad:
            parameter.requires_grad_(False)
    side, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    half = dilation * (side // 2)
    if isinstance(conv, Conv2dSame) or conv.padding == 'same':
        padding = (half, half) if stride == 1 else None
    else:
        padding = (0, 0) if conv.padding == 'valid' else conv.padding
    return new if padding == (half, half) else Aligned(new, side, stride, dilation, padding).train(conv.training)


def _create_layer(conv: nn.Conv2d, layer: str, layer_args: Dict[str, Any], device, dtype=None) -> nn.Module:
    args = window_arguments(conv, by_location=layer_args.get('similarity_type') == 'Loc')
    return create_layer_for(conv, layer, **{**args, **layer_args}, device=device, dtype=dtype)


# The model around them

def _input_size(model: nn.Module) -> Optional[Tuple[int, int, int]]:
    if not getattr(model, 'pretrained_cfg', None):
        return None
    return tuple(get_model_input_config(model)['input_size'])


def _cost(model: nn.Module, input_size: Optional[Tuple[int, int, int]]) -> Tuple[int, Optional[int]]:
    """Parameters, and multiply-accumulates if they can be counted, without memory for either."""
    parameters = count_parameters(model)
    if input_size is None:
        return parameters, None
    empty = {id(p): nn.Parameter(torch.empty_like(p, device='meta'), p.requires_grad) for p in model.parameters()}
    empty |= {id(b): torch.empty_like(b, device='meta') for b in model.buffers()}
    try:
        return parameters, count_macs(copy.deepcopy(model, empty), input_size)
    except Exception:  # a network may refuse any image, and this is only for the report
        return parameters, None


def _record(model: nn.Module, conversion: Dict[str, Any]) -> None:
    """Let timm save the model as a base architecture with its arguments, and conversions."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if not cfg or 'architecture' not in cfg:
        return
    first = get_model_input_config(model)['first_conv'] or ()
    first = [first] if isinstance(first, str) else first
    first = tuple(part for name in first for part in _adapted(model, name, conversion))
    model._traits = {**getattr(model, '_traits', {}), 'first_conv': first}  # what timm reads before pretrained_cfg
    args = dict(getattr(model, '_model_args', {}))
    base, before = args.pop('base', cfg['architecture']), conversions(args.pop('convert', []))
    model._model_args = dict(base=base, convert=[*before, conversion], **args)
    model.pretrained_cfg = model.default_cfg = dict(cfg, architecture='convnn_converted')


def _adapted(model: nn.Module, name: str, conversion: Dict[str, Any]) -> Sequence[str]:
    """The modules of a first layer, converted or not, that timm adapts to another number of input channels."""
    layer = dict(model.named_modules()).get(name)  # a feature extractor has other names
    if isinstance(layer, Aligned):
        layer, name = layer.layer, f'{name}.layer'
    if not isinstance(layer, layer_type(conversion['layer']).cls):
        return [name]
    return [] if rearranges_channels(layer) else first_modules(conversion['layer'], name)


def conversions(convert: Union[Mapping[str, Any], Sequence[Mapping[str, Any]]]) -> List[Dict[str, Any]]:
    """The arguments of one or several conversions, as a list of dictionaries.

    Raises:
        TypeError: `convert` is something else.
    """
    several = [convert] if isinstance(convert, Mapping) else convert
    if not isinstance(several, Sequence) or not all(isinstance(one, Mapping) for one in several):
        raise TypeError(f'convert={convert!r}: give the arguments of `convnn_timm.convert`, or a list of such')
    return [dict(one) for one in several]
