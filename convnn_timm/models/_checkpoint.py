"""Read the weights of a training from a file, with what the training recorded about them."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import torch
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ._weights import WeightsError

__all__ = ['checkpoint_kwargs', 'recorded_classes']


def checkpoint_kwargs(name: str, checkpoint: Path) -> Dict[str, Any]:
    """Arguments that make `timm.create_model(name, pretrained=True)` take its weights from a file.

    Args:
        name: An architecture; the number of classes is that of the file.
        checkpoint: A safetensors file, or one of `torch.save` such as a training writes.

    Raises:
        WeightsError: There is no such file, it cannot be read or holds no weights, or the record beside it is damaged.
    """
    if not checkpoint.is_file():
        found = 'is a folder; name a file in it' if checkpoint.is_dir() else 'not found'
        raise WeightsError(f'checkpoint {checkpoint} {found}')
    if not checkpoint.stat().st_size:
        raise WeightsError(f'checkpoint {checkpoint} is an empty file')
    try:
        state_dict = timm.models.load_state_dict(str(checkpoint))
        saved = {} if checkpoint.suffix == '.safetensors' else load_checkpoint_metadata(str(checkpoint))
    except Exception as error:
        raise WeightsError(
            f'cannot read checkpoint {checkpoint}: it is damaged, or neither safetensors nor a file of `torch.save` '
            'with nothing but tensors and plain values') from error
    if not state_dict or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise WeightsError(f'checkpoint {checkpoint} holds no weights: a state dict has names and tensors')

    config = timm.get_pretrained_cfg(name)
    head = state_dict.get(f'{config.classifier}.weight')
    num_classes = config.num_classes if head is None else len(head)
    # The classes of the published weights need not be those of this file.
    classes = recorded_classes(checkpoint, name, num_classes)
    overlay = dict(state_dict=state_dict, num_classes=num_classes, label_names=classes)
    # Some arguments of a model do not show in its weights. A training's checkpoint has them all.
    training = getattr(saved.get('args'), '__dict__', {}) if isinstance(saved, dict) else {}
    return dict(training.get('model_kwargs', {}), pretrained_cfg_overlay=overlay, num_classes=num_classes)


def recorded_classes(checkpoint: Path, name: str, num_classes: int) -> Optional[List[str]]:
    """The class names in the folder of a checkpoint, or of its finished run; None if there are none for that model."""
    for config in checkpoint.parent / 'config.json', checkpoint.parent / 'model' / 'config.json':
        if not config.is_file():
            continue
        try:
            record = json.loads(config.read_bytes())
            architecture, names = record['architecture'], record.get('label_names')
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise WeightsError(f'{config} is damaged, it should say what classes the model tells apart') from error
        if architecture == name.partition('.')[0] and isinstance(names, list) and len(names) == num_classes:
            return names
    return None
