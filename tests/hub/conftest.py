"""A published weight, and processes that talk to the Hub of hub_server.py with the real client.

The client reads its settings when it is imported, so each piece of code runs in a process of its own, forked from one
that has PyTorch loaded. The package there is a copy with a manifest of its own.
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from convnn_timm.hub import exporting
from convnn_timm.models import _weights
from hub_server import Hub
from publishing import NAME, PACKAGE, PROJECT, files_of, make_checkout, publish

FORKS = r"""
import json, os, sys, time, traceback
import convnn_timm.layers, filelock, safetensors.torch, torch, torchvision, tqdm.auto, yaml
time.sleep = lambda seconds: None  # the client waits before it tries again
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        os.environ.update(job['env'])
        os.chdir(job['cwd'])
        for stream, name in ((1, 'out'), (2, 'err')):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        status = 0
        try:
            exec(job['code'], {})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# What the code of every test starts with: `run` for a command, `load` for timm, which print what a user sees.
PRELUDE = """
import hashlib, os, shutil, sys
from pathlib import Path
from convnn_timm import cli

def run(*argv):
    sys.stderr.flush()
    print('status', cli.main(list(argv)), flush=True)

def load(name, **kwargs):
    import timm
    try:
        model = timm.create_model(name, pretrained=True, **kwargs).eval()
    except Exception as error:
        print(f'{type(error).__name__}: {error}', flush=True)
    else:
        digest = hashlib.sha256(b''.join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()
        conv = model.layer1[0].conv1
        print('loaded', digest, getattr(getattr(conv, 'branch1', conv), 'num_samples', None), flush=True)
        return model

def cached():
    return next(Path(os.environ['HF_HOME']).glob('hub/models--*/snapshots/*/model.safetensors'))

def flip(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
"""


# A published weight

@pytest.fixture(scope='session')
def published(tmp_path_factory):
    """The folder that `publish` fills, once for all of pytest-xdist's workers; nobody changes anything in it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'published'
    with FileLock(f'{root}.lock'):
        if not (root / 'cards').is_dir():  # made last
            publish(root)
    return root


@pytest.fixture
def manifest(published, monkeypatch, tmp_path):
    """The manifest of a checkout of this test's own, which lists the published weight and holds none."""
    make_checkout(tmp_path / 'checkout', monkeypatch)
    return Path(shutil.copy(published / 'manifest.json', _weights.MANIFEST))


@pytest.fixture
def card(published, tmp_path):
    """A copy of the published folder, for this test."""
    return Path(shutil.copytree(published / 'cards' / NAME, tmp_path / 'cards' / NAME))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """An export measures the speed of inference for a moment only."""
    monkeypatch.setattr(exporting, 'MEASURED_SECONDS', 0.01)


@pytest.fixture(scope='module')
def results_table(load_script):
    return load_script('results_table')


# The Hub

@pytest.fixture
def hub():
    """A Hub with the project's owner, somebody else, and some who can only read what the project has."""
    with Hub() as hub:
        hub.add_user('hf_write', 'maintainer', orgs=('convnn-timm',))
        hub.add_user('hf_other', 'alice')
        hub.add_user('hf_read', 'convnn-timm', role='read')
        hub.add_user('hf_fine', 'maintainer', 'fineGrained', ('convnn-timm',), ('repo.content.read',))
        hub.add_user('hf_member', 'bob', orgs={'convnn-timm': 'read', 'lab': 'write'})
        yield hub


@pytest.fixture
def on_the_hub(hub, published):
    """The Hub with the published weight in the project's repository."""
    hub.add_repository(PROJECT, files_of(published / 'cards' / NAME))
    return hub


@pytest.fixture(params=['refused', 'silent'])
def out_of_reach(request):
    """Environment with a Hub that refuses the connection, or takes it and says nothing."""
    with socket.create_server(('127.0.0.1', 0)) as silent:
        port = 1 if request.param == 'refused' else silent.getsockname()[1]
        yield dict(HF_ENDPOINT=f'http://127.0.0.1:{port}', HF_HUB_ETAG_TIMEOUT='1', HF_HUB_DISABLE_TELEMETRY='0')


# Processes of a user

@pytest.fixture(scope='session')
def checkout(published, tmp_path_factory):
    """A checkout that holds no weights, for the processes of this worker: a copy of the package and the manifest."""
    root = tmp_path_factory.mktemp('checkout')
    shutil.copytree(PACKAGE, root / 'convnn_timm', ignore=shutil.ignore_patterns('__pycache__', 'model_cards'))
    shutil.copy(published / 'manifest.json', root / 'convnn_timm' / 'models')
    (root / 'model_cards').mkdir()
    (root / 'pyproject.toml').touch()
    return root


@pytest.fixture(scope='session')
def forks(checkout):
    """A process that has PyTorch loaded, and whose children run code with the copy of the package."""
    env = {**os.environ, 'PYTHONPATH': str(checkout), 'OMP_NUM_THREADS': '1'}
    for name in ('CONVNN_TIMM_ZOO', 'CONVNN_TIMM_NAMESPACE', 'HF_TOKEN', 'HF_HUB_OFFLINE'):
        env.pop(name, None)
    with subprocess.Popen(
            [sys.executable, '-c', FORKS], env=env, cwd=checkout, stdin=-1, stdout=-1, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def session(forks, checkout, published, tmp_path, hub):
    """Runs code as a user would, with the Hub, a cache of the test's own and the published weight in no place."""
    manifest, cards = checkout / 'convnn_timm' / 'models' / 'manifest.json', tmp_path / 'checkout' / 'model_cards'
    before = manifest.read_text()
    shutil.copytree(published / 'cards', cards)

    def run(code, token=None, **env):
        job = dict(code=PRELUDE + code, cwd=str(tmp_path), env={**hub.environment(tmp_path / 'home', token), **env})
        print(json.dumps(job), file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
        out, err = (tmp_path / 'out').read_text(), (tmp_path / 'err').read_text()
        err = re.sub('^convnn-timm: loading .*\n', '', err, flags=re.MULTILINE)  # said where that takes seconds
        assert status == 0, err
        return SimpleNamespace(out=out, err=err, lines=out.splitlines())

    run.cards, run.folder, run.manifest = cards, cards / NAME, manifest
    yield run
    manifest.write_text(before)
