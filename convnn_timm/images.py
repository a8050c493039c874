"""Image files become pixels by one rule, in training and in prediction."""
import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING, Callable, Dict, Optional, Tuple, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError

if TYPE_CHECKING:
    import torch.nn as nn

__all__ = ['ImageError', 'image_mode', 'preprocessing', 'read_image', 'sample_photographs']


class ImageError(UserError, ValueError):
    """A file that cannot be read as an image; the message names it."""

    def __init__(self, message: str):
        # A DataLoader raises its worker's error anew, with the worker's traceback as the message: its last line counts.
        super().__init__(message.rpartition(f'{ImageError.__qualname__}: ')[2].strip())


def image_mode(channels: int) -> str:
    """Pillow's name for images of so many channels.

    Raises:
        ImageError: There is none.
    """
    if channels not in (1, 3):
        raise ImageError(f'the model takes {channels} channels: image files have 1 (grey) or 3')
    return 'L' if channels == 1 else 'RGB'


def preprocessing(model: 'nn.Module', img_size: Optional[int] = None) -> Tuple[Callable, str, Tuple[int, int, int]]:
    """What images go through before a model, Pillow's mode of them, and the size (C, H, W) that they come out in."""
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, model=model)
    if img_size:
        config = resolve_data_config({'input_size': (config['input_size'][0], img_size, img_size)}, model=model)
    return create_transform(**config, is_training=False), image_mode(config['input_size'][0]), config['input_size']


def sample_photographs(mode: str = 'RGB') -> Dict[str, Image.Image]:
    """Two photographs that come with scikit-learn, by their names."""
    from sklearn.datasets import load_sample_image
    return {name: Image.fromarray(load_sample_image(name)).convert(mode) for name in ('china.jpg', 'flower.jpg')}


def read_image(file: Union[str, Path, IO[bytes]], mode: str = 'RGB') -> Image.Image:
    """Read an image file in a mode of Pillow's, upright as its EXIF orientation says; 16 bits are scaled to 8.

    Raises:
        ImageError: No file, no image, a damaged one, or one of numbers whose range the file does not say.
    """
    path = file if isinstance(file, (str, Path)) else getattr(file, 'name', file)
    try:
        image = Image.open(file)
        image.load()
    except FileNotFoundError as error:
        raise ImageError(f'{path}: not found') from error
    except IsADirectoryError as error:
        raise ImageError(f'{path}: no images in this folder') from error
    except UnidentifiedImageError as error:
        raise ImageError(f'{path}: not an image') from error
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f'{path}: cannot be read: {" ".join(str(error).split())[:300]}') from error
    if image.mode.startswith('I;16'):  # Pillow would clip it to 8 bits
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ImageError(f'{path}: its pixels have 32 bits, of unknown range: save it with 8 or 16')
    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, RuntimeError, SyntaxError, ValueError, struct.error):
        pass  # a damaged EXIF block says nothing about the orientation
    return image.convert(mode)
