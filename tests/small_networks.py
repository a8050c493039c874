"""Networks of two blocks, which export in seconds where whole ResNets take minutes, and photographs for them."""
import torch
import torch.nn as nn
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.models.resnet import downsample_conv
from torchvision.transforms.functional import normalize, to_tensor

from convnn_timm.models.convnn_resnet import ConvNNBasicBlock


def photos(n, size=16):
    """Parts of two photographs, (n, 3, size, size)."""
    parts = []
    for i in range(n):
        image = Image.fromarray(load_sample_image(('china.jpg', 'flower.jpg')[i % 2]))
        left, top = 70 * (i // 2), 25 * (i // 2)
        parts.append(to_tensor(image.crop((left, top, left + 160, top + 160)).resize((size, size))))
    return normalize(torch.stack(parts), 0.5, 0.25)


def two_blocks(layer, **layer_args):
    """A ResNet's stem, one block of each of two stages, and its head."""
    torch.manual_seed(0)
    options = dict(layer=layer, layer_args=dict(sampling_type='random', num_samples=32, **layer_args))
    return fit_norms(nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        ConvNNBasicBlock(32, 32, **options),
        ConvNNBasicBlock(32, 32, stride=2, downsample=downsample_conv(32, 32, 1, stride=2), **options),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))


def fit_norms(model):
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all that they see
    with torch.no_grad():
        model.train()(photos(16))
    return model.eval()
