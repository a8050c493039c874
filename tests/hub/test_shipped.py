"""The weights that come with the package: whole, as their cards say, and usable as printed there."""
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch

from convnn_timm import hub
from convnn_timm.hub.card import write_card
from convnn_timm.hub.manifest import make_entry
from convnn_timm.models._weights import read_manifest

ROOT = Path(__file__).parents[2]
SHIPPED = {folder.name: folder for folder in hub.published_folders(ROOT / 'model_cards')}


def test_the_manifest_and_the_folders_name_the_same_weights():
    assert SHIPPED.keys() == read_manifest().keys()
    assert sum((folder / 'model.safetensors').stat().st_size for folder in SHIPPED.values()) < 100e6


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_card_and_line_of_the_manifest_are_those_of_the_files(name, tmp_path):
    folder = shutil.copytree(SHIPPED[name], tmp_path / name)
    write_card(folder, name)
    assert (folder / 'README.md').read_text() == (SHIPPED[name] / 'README.md').read_text()
    entry = read_manifest()[name]
    assert {**make_entry(folder, name), 'hub_id': entry['hub_id'], 'revision': entry['revision']} == entry


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_weight_is_whole(name):
    entry = read_manifest()[name]
    assert hub.check_folder(SHIPPED[name], entry) == []


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_weight_loads_in_transformers(name):
    transformers = pytest.importorskip('transformers')
    model = transformers.TimmWrapperForImageClassification.from_pretrained(SHIPPED[name], dtype=torch.float32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x).logits, timm.create_model(name, pretrained=True).eval()(x))


@pytest.mark.parametrize('name', SHIPPED)
def test_the_card_of_a_shipped_weight_runs_as_printed(name, monkeypatch):
    monkeypatch.setenv('CONVNN_TIMM_ZOO', str(ROOT / 'model_cards'))
    text = (SHIPPED[name] / 'README.md').read_text()
    blocks = re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3 and 'More Information Needed' not in text
    for code in blocks:
        exec(compile(code, name, 'exec'), {})
