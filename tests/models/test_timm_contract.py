"""timm's own model tests, from the source distribution of the installed timm, pass for the models of this project.

A model counts as tested if every test function that timm runs for its own resnet18 (or vgg11) has run for it and
passed, without a skip. What timm runs for its own is collected from the same file without the plugin.

CONVNN_TIMM_TESTS_TIMM_SDIST may name an unpacked source distribution; otherwise pip fetches it, once, into pytest's
cache.
"""
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_names import ALL, LARGE
from timm_plugin import NEED_WEIGHTS, stands_for

DEFAULT = ['vgg11_convnn_branching', 'resnet18_convnn_branching']


@pytest.fixture
def timm_tests(pytestconfig, tmp_path) -> Path:
    """timm's tests/test_models.py in an empty folder, away from the rest of timm's sources and their configuration."""
    path = tmp_path / 'test_models.py'
    unpacked = os.environ.get('CONVNN_TIMM_TESTS_TIMM_SDIST')
    if unpacked:
        path.write_bytes(Path(unpacked, 'tests', 'test_models.py').read_bytes())
    else:
        with tarfile.open(fetch_timm(pytestconfig.cache.mkdir('timm'))) as archive:
            member = next(name for name in archive.getnames() if name.endswith('/tests/test_models.py'))
            path.write_bytes(archive.extractfile(member).read())
    (tmp_path / 'pytest.ini').write_text('[pytest]\n')
    return path


def fetch_timm(folder: Path) -> Path:
    """Downloads the source distribution of the installed timm unless the folder has it."""
    version = importlib.metadata.version('timm')
    archive = folder / f'timm-{version}.tar.gz'
    if not archive.exists():
        pip = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', ':all:', f'timm=={version}'],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if pip.returncode:
            stop = pytest.fail if os.environ.get('CI') == 'true' else pytest.skip
            stop(f'pip cannot fetch the tests of timm {version} (a skip, but a failure where CI=true):\n{pip.stdout}')
    return archive


def run_pytest(timm_tests: Path, *args: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ('GITHUB_ACTIONS', 'PYTEST_ADDOPTS')}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [env.get('PYTHONPATH')])])
    env.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=path)
    return subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'ignore', *args, timm_tests.name],
        cwd=timm_tests.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def functions_of_timm(timm_tests: Path) -> dict[str, set[str]]:
    """The test functions that timm applies to its own models which ours stand for."""
    names = ('resnet18', 'vgg11')
    listing = run_pytest(timm_tests, '--collect-only', '-k', ' or '.join(names)).stdout
    found = re.findall(rf'::(\w+)\[(?:.*-)?({"|".join(names)})(?:\.\w+)?(?:-.*)?\]', listing)
    functions = {name: {function for function, model in found if model == name} - NEED_WEIGHTS for name in names}
    assert all(len(found) >= 11 for found in functions.values()), listing  # that many in timm 1.0.31
    return functions


def functions_of_ours(timm_tests: Path, models: list[str]) -> dict[str, set[str]]:
    """The test functions that the models have passed. Fails if there is one that has not passed."""
    report = timm_tests.with_name(f'{models[0]}.xml')
    done = run_pytest(timm_tests, '-p', 'timm_plugin', f'--project-models={",".join(models)}', f'--junit-xml={report}')
    if done.returncode:
        pytest.fail(done.stdout, pytrace=False)
    passed = {model: set() for model in models}
    for case in ElementTree.parse(report).iter('testcase'):
        assert not list(case), ElementTree.tostring(case, 'unicode')  # such as <skipped>
        function, parameters = case.get('name').rstrip(']').split('[')
        model = next(model for part in parameters.split('-') if (model := part.split('.')[0]) in models)
        passed[model].add(function)
    return passed


def check(timm_tests: Path, models: list[str]) -> None:
    expected = functions_of_timm(timm_tests)
    workers = min(os.cpu_count(), 4)  # processes of one thread each
    shares = [share for share in (models[worker::workers] for worker in range(workers)) if share]
    with ThreadPoolExecutor() as pool:
        results = [pool.submit(functions_of_ours, timm_tests, share) for share in shares]
    passed = {model: functions for result in results for model, functions in result.result().items()}
    assert passed == {model: expected[stands_for(model)] for model in models}


@pytest.mark.timeout(900)
def test_default_models(timm_tests):
    check(timm_tests, DEFAULT)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_models(timm_tests):
    check(timm_tests, ALL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_models_for_224_pixels(timm_tests):
    check(timm_tests, LARGE)


@pytest.mark.parametrize('ci, outcome', [('true', pytest.fail.Exception), ('', pytest.skip.Exception)])
def test_without_network_it_fails_in_ci_and_is_skipped_elsewhere(ci, outcome, monkeypatch, tmp_path):
    monkeypatch.setenv('CI', ci)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    with pytest.raises(outcome, match='pip cannot fetch the tests of timm'):
        fetch_timm(tmp_path)
