"""Image files become pixels by one rule, in training and in prediction."""
import os
import struct
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import (
    IO, TYPE_CHECKING, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, NoReturn, Optional, Tuple, Union)

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError, printable

if TYPE_CHECKING:
    import torch.nn as nn

__all__ = [
    'ImageError', 'Scan', 'image_mode', 'image_suffixes', 'preprocessing', 'printable', 'read_image',
    'sample_photographs', 'scan']

# Formats that Pillow recognises, but needs another program or library to decode.
UNDECODED = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}


class ImageError(UserError, ValueError):
    """A file that cannot be read as an image; the message names it."""

    def __init__(self, message: str):
        # A DataLoader raises its worker's error again with the traceback as the message. The last line is ours.
        super().__init__(printable(message.rpartition(f'{ImageError.__qualname__}: ')[2].strip()))


class Scan(NamedTuple):
    """What `scan` found in a folder."""
    images: List[Path]
    left_out: Counter  # number of other files, by their kind
    empty: List[Path]  # topmost folders that add no image

    def notes(self) -> List[str]:
        """Return one line on the files that were left out, and one on the folders without images."""
        lines = []
        if self.left_out:
            kinds = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
            kinds = ', '.join(f'{count} {printable(kind)}' for kind, count in kinds)
            count = self.left_out.total()
            lines.append(f'left out {count} file{"s" * (count > 1)}: {kinds}')
        if self.empty:
            more = ', ...' * (len(self.empty) > 10)
            lines.append(f'no images in {", ".join(map(printable, self.empty[:10]))}{more}')
        return lines


@lru_cache
def image_suffixes() -> FrozenSet[str]:
    """Return the file suffixes, in small letters, of the formats that this Pillow can decode."""
    kinds = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in kinds.items() if kind in Image.OPEN and kind not in UNDECODED)


def scan(folder: Union[str, Path]) -> Scan:
    """Search a folder and the folders below for images.

    What is hidden, with a name that begins with a dot, is ignored. Links are followed, but each folder is read once.

    Raises:
        ImageError: A folder cannot be read.
    """
    folder = Path(folder)
    images, left_out, folders = [], Counter(), []
    for place, names in walk(folder):
        folders.append(place)
        for name in names:
            file = place / name
            if not file.is_file():
                left_out['(broken link)' if file.is_symlink() else '(special file)'] += 1
            elif file.suffix.lower() in image_suffixes():
                images.append(file)
            else:
                left_out[file.suffix.lower() or '(no suffix)'] += 1
    full = {parent for image in images for parent in image.parents}
    empty = [place for place in folders if place not in full and place.parent in full]
    return Scan(sorted(images), left_out, sorted(empty))


def walk(folder: Path) -> Iterator[Tuple[Path, List[str]]]:
    """Yield each folder and the names of its files, those of linked folders last; a folder met again has no names."""
    def refuse(error: OSError) -> NoReturn:
        raise ImageError(f'{error.filename}: cannot be read: {error.strerror}') from error

    seen = set(map(str, folder.resolve().parents))  # a link that leads out of the folder and back
    starts = [folder]
    for start in starts:  # grows
        for place, folders, names in os.walk(start, onerror=refuse):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                names = []
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith('.'))
            starts += [path for path in (Path(place, name) for name in folders) if path.is_symlink()]
            yield Path(place), [name for name in names if not name.startswith('.')]


def image_mode(channels: int) -> str:
    """Pillow's mode for images of so many channels.

    Raises:
        ImageError: Image files have none for it.
    """
    if channels not in (1, 3):
        raise ImageError(f'the model takes {channels} channels: image files have 1 (grey) or 3')
    return 'L' if channels == 1 else 'RGB'


def preprocessing(model: 'nn.Module', img_size: Optional[int] = None) -> Tuple[Callable, str, Tuple[int, int, int]]:
    """How images become a model's input.

    Returns:
        timm's transform for evaluation, Pillow's mode for the images, and the size (C, H, W) of the input.
    """
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
    """Read an image file in a mode of Pillow's, turned upright by its EXIF orientation; 16 bits are scaled to 8.

    Raises:
        ImageError: There is no file, or no image in it, or it is damaged, or its pixels have an unknown range.
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
