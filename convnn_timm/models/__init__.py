"""timm model files. Importing this package registers all models with timm."""
from .convnn_resnet import ConvNNResNet
from .convnn_vgg import ConvNNVGG

__all__ = ['ConvNNResNet', 'ConvNNVGG']
