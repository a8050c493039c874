"""What a network takes images for."""
from typing import List, Tuple

import torch
import torch.nn as nn
from timm.data import CustomDatasetInfo, DatasetInfoLabelMapper

from convnn_timm.models._weights import WeightsError

__all__ = ['classify']


@torch.inference_mode()
def classify(model: nn.Module, images: torch.Tensor, topk: int) -> List[List[Tuple[str, float]]]:
    """Name the most probable classes of images.

    Args:
        model: A network in evaluation mode, on any device.
        images: Its input (B, C, H, W).
        topk: How many classes of each image, at most.

    Returns:
        For each image, the names that came with the weights, or the classes' numbers where none came, and their
        probabilities, the highest first.

    Raises:
        WeightsError: The network answers with NaN or infinity.
    """
    names = model.pretrained_cfg.get('label_names')
    name_of = DatasetInfoLabelMapper(CustomDatasetInfo(names), 'name', fallback_format='{index}') if names else str
    device = next(model.parameters(), images).device
    probabilities = model(images.to(device)).softmax(dim=-1).cpu()
    if not probabilities.isfinite().all():
        raise WeightsError('the network answers with numbers that are not finite: its weights are damaged')
    best = probabilities.topk(min(topk, probabilities.shape[1]))
    return [
        [(str(name_of(index)), p) for index, p in zip(*row)]
        for row in zip(best.indices.tolist(), best.values.tolist())]
