"""timm model files. Importing this package registers all models with timm."""
from . import convnn_converted  # noqa: F401
from .convnn_resnet import ConvNNResNet
from .convnn_vgg import ConvNNVGG

__all__ = ['ConvNNResNet', 'ConvNNVGG']
