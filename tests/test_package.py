"""What an installed copy of the package holds, as setuptools reads it from pyproject.toml."""
from pathlib import Path

import pytest

from convnn_timm.models._weights import WEIGHTS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch):
    """The command that copies the package's files, configured."""
    pytest.importorskip('setuptools')
    from setuptools import Distribution
    from setuptools.config.pyprojecttoml import apply_configuration

    monkeypatch.chdir(ROOT)
    command = apply_configuration(Distribution(), 'pyproject.toml').get_command_obj('build_py')
    command.ensure_finalized()
    command.manifest_files = {}  # not looked for: that would write into the checkout
    return command


def test_every_folder_of_the_package_is_installed(build):
    folders = {path.parent for path in Path('convnn_timm').rglob('*.*') if '__pycache__' not in path.parts}
    assert {*build.packages} - {'convnn_timm.model_cards'} == {'.'.join(folder.parts) for folder in folders}
    assert Path(build.get_package_dir('convnn_timm.model_cards')).resolve() == ROOT / 'model_cards'


def test_the_published_weights_come_with_the_package(build):
    names = build.find_data_files('convnn_timm.model_cards', 'model_cards')
    weights = [folder for folder in Path('model_cards').iterdir() if folder.is_dir() and folder.name[0] != '.']
    expected = {path for folder in weights for path in folder.rglob('*') if path.is_file()}
    assert len(weights) >= 2 and {*map(Path, names)} == expected
    assert all(folder / WEIGHTS in expected for folder in weights)
    assert sum(path.stat().st_size for path in expected) < 100e6
