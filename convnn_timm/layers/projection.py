"""1x1 convolutions in full precision, for what is compared: a rank may depend on every bit."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from convnn_timm.ops._common import no_autocast

__all__ = ['Projection1d', 'Projection2d']


class _Projection(nn.Module):
    """1x1 convolution that computes in the dtype of its weight, under autocast too.

    It is computed as a matrix product: by default a GPU convolves float32 with fewer bits.
    """

    @torch.jit.unused
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, channels = self.weight.flatten(1), -1 - len(self.kernel_size)
        on_meta = x.device.type == 'meta'  # meta knows no autocast
        if x.dtype != weight.dtype and not on_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        with no_autocast(x):
            return F.linear(x.transpose(channels, -1), weight, self.bias).transpose(channels, -1)


class Projection1d(_Projection, nn.Conv1d):
    __doc__ = _Projection.__doc__


class Projection2d(_Projection, nn.Conv2d):
    __doc__ = _Projection.__doc__
