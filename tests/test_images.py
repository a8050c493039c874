"""Image files become pixels."""
import os
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from convnn_timm.images import ImageError, read_image, scan


def test_images_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)[:3]).save(tmp_path / 'lying.png', exif=exif)
    assert read_image(tmp_path / 'lying.png').size == (3, 4)


def test_images_with_a_damaged_exif_block_are_read(tmp_path):
    for number, exif in enumerate((b'Exif\0\0garbage!garbage!', b'Exif\0\0II*\0')):
        Image.new('RGB', (5, 4)).save(tmp_path / f'{number}.png', exif=exif)
        assert read_image(tmp_path / f'{number}.png').size == (5, 4)


def test_numbers_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / 'float.tiff')
    with pytest.raises(ImageError, match='float.tiff: its pixels have 32 bits, of unknown range'):
        read_image(tmp_path / 'float.tiff')


def test_16_bits_are_scaled(tmp_path):
    path = tmp_path / 'deep.png'
    Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16)).save(path)
    assert np.array(read_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_the_first_picture_of_several_is_read(tmp_path):
    first, second = (Image.new('RGB', (2, 2), colour) for colour in ('white', 'black'))
    for name in 'two.gif', 'two.tif':
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert np.array(read_image(tmp_path / name)).min() == 255


def test_a_file_name_cannot_garble_the_terminal(tmp_path):
    name = 'a\x1b[31m\n\u202eb\udcff.png'
    (tmp_path / name).write_text('no image')
    with pytest.raises(ImageError) as error:
        read_image(tmp_path / name)
    assert str(error.value) == fr'{tmp_path}/a\x1b[31m\n\u202eb\udcff.png: not an image'


def test_linked_folders_are_read_once(tmp_path):
    """Under their own name where they have one in the folder; nothing above the folder is read."""
    folder = tmp_path / 'folder'
    for name in 'elsewhere', 'folder/own':
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'one.png').touch()
    (tmp_path / 'above.png').touch()
    for name, target in ('linked', 'elsewhere'), ('again', 'folder/own'), ('back', 'folder'), ('own/up', '.'):
        (folder / name).symlink_to(tmp_path / target)
    assert scan(folder).images == [folder / 'linked' / 'one.png', folder / 'own' / 'one.png']


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'scandir', Mock(side_effect=PermissionError(13, 'Permission denied', str(tmp_path))))
    with pytest.raises(ImageError, match=f'{tmp_path}: cannot be read: Permission denied'):
        scan(tmp_path)
