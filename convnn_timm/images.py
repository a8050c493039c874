"""Image files become pixels by one rule, in training and in prediction."""
from pathlib import Path
from typing import IO, Dict, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError

__all__ = ['ImageError', 'image_mode', 'read_image', 'sample_photographs']


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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f'{path}: cannot be read: {" ".join(str(error).split())[:300]}') from error
    if image.mode.startswith('I;16'):  # Pillow would clip it to 8 bits
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ImageError(f'{path}: its pixels have 32 bits, of unknown range: save it with 8 or 16')
    return ImageOps.exif_transpose(image).convert(mode)
