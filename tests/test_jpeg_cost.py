"""The training that measures what the JPEG re-encoding costs, on a few images, and its committed output."""
import argparse
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

RESULTS = Path(__file__).parents[1] / 'train_scripts' / 'results'


@pytest.fixture
def script(load_script):
    return load_script('jpeg_cost')


@pytest.fixture
def data(tmp_path):
    """Noise on three colours, a class each."""
    for split, count in (('train', 40), ('validation', 10)):
        for channel in range(3):
            (tmp_path / split / str(channel)).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(180, (3, 32, 32), dtype=torch.uint8)
                image[channel] += 70
                to_pil_image(image).save(tmp_path / split / str(channel) / f'{i}.png')
    return tmp_path


def test_a_few_epochs_tell_colours_apart(script, data, monkeypatch, capsys):
    monkeypatch.setattr(script, 'BATCH_SIZE', 16)
    args = dict(data_dir=str(data), dataset='', dataset_download=False, epochs=2.5, seed=0, device='cpu')
    row = script.main(argparse.Namespace(**args))[-1]
    assert row.startswith('| the folder | ') and all(float(value) > 90 for value in re.findall(r'\d+\.\d+', row)), row
    printed = capsys.readouterr().out
    assert '120 images, seed 0, evaluated once, on all 30 test images' in printed
    assert '- commit: ' in printed and '- cpu: ' in printed


def test_the_stem_whitens_patches(script):
    images = F.avg_pool2d(torch.randn(500, 3, 33, 33), 2, 1) * torch.tensor([1., 2., 3.]).view(3, 1, 1)
    model = script.Net()
    model.whiten(images)
    outputs = F.conv2d(images, model[0].weight).movedim(1, 3).reshape(-1, 24)
    torch.testing.assert_close(outputs[:, :12].T @ outputs[:, :12] / len(outputs), torch.eye(12), atol=0.02, rtol=0)
    torch.testing.assert_close(outputs[:, 12:], -outputs[:, :12])
    assert not model[0].weight.requires_grad


def test_crops_reach_every_corner(script):
    image = torch.arange(36. * 36).view(1, 1, 36, 36)
    corners = script.crop(image.expand(2000, 3, 36, 36))[:, 0, 0, 0]
    assert set(corners.tolist()) == {36. * y + x for y in range(5) for x in range(5)}


def test_the_committed_table_is_of_the_whole_data(script):
    table = (RESULTS / 'jpeg_cost.md').read_text()
    assert f'{script.EPOCHS} epochs on 50,000 images' in table and 'on all 10,000 test images' in table
    assert f'| {script.ORIGINAL:.2f} |' in table
    assert re.search(r'- commit: [0-9a-f]{40}\n- uncommitted_changes: False\n', table)
