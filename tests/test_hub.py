"""Weights from and to the Hub: the real client, timm and the commands talk to the server of hub_server.py.

The client reads its settings when it is imported, so each test runs its code in processes of its own, forked from one
that has PyTorch loaded; the package there is a copy with a manifest of its own (`publish` in test_card.py).
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import hub_server
from convnn_timm.hub.card import write_card
from convnn_timm.hub.folder import build_model, write_golden
from convnn_timm.hub.manifest import make_entry
from hub_server import Handler, Hub, sha256
from test_card import NAME, publish

WEIGHTS = 'model.safetensors'
PROJECT = f'convnn-timm/{NAME}'
FORKS = r"""
import json, os, sys, time, traceback
import torch, torchvision
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


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    return publish(tmp_path_factory.getbasetemp())


@pytest.fixture(scope='module')
def forks(published):
    """A process that has PyTorch loaded, and whose children run code with the copy of the package."""
    env = {**os.environ, 'PYTHONPATH': str(published), 'OMP_NUM_THREADS': '1'}
    for name in ('CONVNN_TIMM_ZOO', 'CONVNN_TIMM_NAMESPACE', 'HF_TOKEN', 'HF_HUB_OFFLINE'):
        env.pop(name, None)
    with subprocess.Popen(
            [sys.executable, '-c', FORKS], env=env, cwd=published, stdin=-1, stdout=-1, text=True) as process:
        yield process
        process.stdin.close()


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
    hub.add_repository(PROJECT, files_of(published / 'cards' / NAME))
    return hub


@pytest.fixture
def session(forks, published, tmp_path, request):
    """Runs code as a user would, with the Hub, a cache of the test's own and the published weight in no place."""
    manifest, cards = published / 'convnn_timm' / 'models' / 'manifest.json', tmp_path / 'checkout' / 'model_cards'
    before = manifest.read_text()
    shutil.copytree(published / 'cards', cards)
    hub = request.getfixturevalue('hub')

    def run(code, token=None, **env):
        job = dict(code=PRELUDE + code, cwd=str(tmp_path), env={**hub.environment(tmp_path / 'home', token), **env})
        print(json.dumps(job), file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
        out, err = (tmp_path / 'out').read_text(), (tmp_path / 'err').read_text()
        assert status == 0, err
        return SimpleNamespace(out=out, err=err, lines=out.splitlines())

    run.cards, run.folder, run.manifest = cards, cards / NAME, manifest
    yield run
    manifest.write_text(before)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def digest_of(session):
    """What `load` prints of the published weights, loaded from the folder they were exported to."""
    line, = session(f'load("local-dir:{session.folder}")').lines
    assert line.startswith('loaded')
    return line


def posted(hub, what):
    return [line for line in hub.log if what in line]


# Push

def test_push_pull_and_load_again(session, hub):
    """The whole way, by each of the names that timm has for it."""
    done = session(f"""
run('push', {str(session.folder)!r}, '--revision', 'v1')
run('push', {str(session.folder)!r})
run('push', {str(session.folder)!r})
""", token='hf_write')
    assert done.lines[1::2] == ['status 0'] * 3, done.err
    first, second, third = done.lines[::2]
    assert 'pushed, verified, commit' in first and 'pushed' in second and 'was there already, verified' in third
    commit = hub.repositories[PROJECT].branches['main']
    assert third.endswith(commit) and len(posted(hub, f'POST /api/models/{PROJECT}/commit/main')) == 1
    expected = files_of(session.folder)
    assert {k: v for k, v in hub.files(PROJECT).items() if k != '.gitattributes'} == expected == {
        k: v for k, v in hub.files(PROJECT, 'v1').items() if k != '.gitattributes'}
    assert len(posted(hub, 'PUT /lfs/')) == len([name for name in expected if name.endswith(('.safetensors', '.png'))])
    entry, = json.loads(session.manifest.read_text())
    assert entry['revision'] == commit and entry['hub_id'] == PROJECT

    names = NAME, NAME.split('.')[0], f'hf-hub:{PROJECT}', f'hf-hub:{PROJECT}@v1', f'hf-hub:{PROJECT}@{commit}'
    digest = digest_of(session)
    loaded = session('\n'.join(f'load({name!r})' for name in names) + f"""
run('verify', {NAME!r}, '{PROJECT}@v1')
run('pull', {NAME!r})
import timm
from huggingface_hub import HfApi
info = HfApi().model_info('{PROJECT}', files_metadata=True)
print(info.sha, *[f'{{file.rfilename}}:{{file.size}}' for file in info.siblings])
print(timm.list_pretrained('resnet18_conv*'), timm.get_pretrained_cfg({NAME!r}).label_names)
""")
    assert loaded.lines[:5] == [digest] * 5 and digest.endswith(' 32'), loaded.out
    assert 'hash, tensors and logits are right' in loaded.lines[5] and loaded.lines[7] == 'status 0', loaded.err
    sha, *siblings = loaded.lines[-2].split()
    assert sha == commit and {f'{name}:{len(content)}' for name, content in expected.items()} < set(siblings)
    assert loaded.lines[-1] == f"['{NAME}'] ('bee', 'cat', 'dog')"

    hub.log.clear()
    offline = session(f'load({NAME!r}); load("hf-hub:{PROJECT}")', HF_HUB_OFFLINE='1')
    assert offline.lines == [digest] * 2 and not hub.log


def test_a_converted_network_comes_back_from_the_hub(session, hub, tmp_path):
    session("""
import timm
from timm.models import save_for_hf
from convnn_timm import convert
model = timm.create_model('test_resnet', num_classes=3)
convert(model, where='layer1.*', sampling_type='random', num_samples=5, K=3)
save_for_hf(model, 'converted', safe_serialization=True)
""")
    hub.add_repository('alice/converted', files_of(tmp_path / 'converted'))
    here, there = session('load("local-dir:converted"); load("hf-hub:alice/converted")').lines
    assert here == there and there.startswith('loaded') and there.endswith(' 5')


def test_push_removes_what_is_no_longer_there_and_sends_what_changed(session, on_the_hub):
    others = {'notes.md': b'of others', 'checkpoints/last.bin': b'of others'}
    old = {'pytorch_model.bin': b'old', 'README.md': b'old', 'training/old.csv': b'old', **others}
    on_the_hub.add_repository(PROJECT, {**files_of(session.folder), **old})
    done = session("os.chdir('checkout'); run('push', '--all')", token='hf_write')
    assert 'pushed, verified' in done.out and 'status 0' in done.out, done.err
    files = on_the_hub.files(PROJECT)
    assert files.keys() - files_of(session.folder).keys() == others.keys()
    assert files['README.md'] == (session.folder / 'README.md').read_bytes()
    assert not posted(on_the_hub, 'PUT')


def test_push_says_what_the_card_leaves_empty(session, hub):
    card = session.folder / 'README.md'
    text = card.read_text()
    card.write_text(text.replace('license: mit\n', '').replace('datasets:\n- uoft-cs/cifar10\n', ''))
    args = session.folder / 'training' / 'args.yaml'
    args.write_text(args.read_text().replace('pretrained: false', 'pretrained: true'))
    push = f"run('push', {str(session.folder)!r})"
    done = session(push, token='hf_write')
    assert 'status 0' in done.out
    for field, flag in ('licence', 'license'), ('data set on the Hub', 'dataset-id'), ('base model, ', 'base-model'):
        assert re.search(f'the card names no {field}.*; `convnn-timm export --{flag}` fills it in', done.err)
    card.write_text(text.replace('license: mit', 'license: [mit'))
    done = session(push, token='hf_write')
    assert f'error: {card}: its metadata cannot be read' in done.err and 'status 1' in done.out
    card.write_text(text)
    args.write_text(args.read_text().replace('pretrained: true', 'pretrained: false'))
    assert 'names no' not in session(push, token='hf_write').err


def test_push_as_somebody_else_and_private(session, hub):
    done = session(f"run('push', {str(session.folder)!r}, '--namespace', 'alice', '--private')", token='hf_other')
    assert 'status 0' in done.out, done.err
    assert hub.repositories[f'alice/{NAME}'].private
    assert json.loads(session.manifest.read_text())[0]['hub_id'] == f'alice/{NAME}'
    # On the Hub the card names the repository that it is in, and says otherwise what the folder's says.
    local, card = (session.folder / 'README.md').read_text(), hub.files(f'alice/{NAME}')['README.md'].decode()
    assert f'`hf-hub:{PROJECT}`' in local
    assert card == local.replace(PROJECT, f'alice/{NAME}').replace(
        f"create_model('{NAME}'", f"create_model('hf-hub:alice/{NAME}'")
    by_hand = f'By hand, and hf-hub:someone/{NAME}_else is another.\n'
    (session.folder / 'README.md').write_text(local + by_hand)
    push = f"run('push', {str(session.folder)!r}, '--namespace', 'alice', '--private')\n"
    again = session(push * 2, token='hf_other')
    assert 'pushed, verified' in again.lines[0] and 'was there already' in again.lines[2], again.err
    assert hub.files(f'alice/{NAME}')['README.md'].decode() == card + by_hand
    private = session(f'load("hf-hub:alice/{NAME}")')
    assert 'RepositoryNotFoundError' in private.out
    assert session(f'load({NAME!r})').out.startswith(
        f'WeightsError: there is no repository alice/{NAME} on the Hub (http://127.0.0.1:')
    assert session(f'load({NAME!r})', token='hf_other').lines == [digest_of(session)]


def test_push_makes_nothing_public_that_was_to_be_private(session, hub):
    hub.add_repository(f'alice/{NAME}', {'notes.md': b''})
    done = session(f"run('push', {str(session.folder)!r}, '--namespace', 'alice', '--private')", token='hf_other')
    assert done.lines == ['status 1']
    assert f'error: alice/{NAME} is there already, and public: nothing was sent. http://127.0.0.1' in done.err
    assert hub.files(f'alice/{NAME}').keys() == {'notes.md'} and not posted(hub, 'PUT')


@pytest.mark.parametrize('token, message', [
    ('', 'you are not logged in: run `hf auth login`, or set HF_TOKEN; '),
    ('hf_wrong', 'the Hub does not know your token'),
    ('hf_read', 'the token of convnn-timm can only read: http'),
    ('hf_fine', 'the token of maintainer can only read: http'),
    ('hf_other', 'alice may not write to convnn-timm: choose --namespace alice'),
    ('hf_member', 'bob may not write to convnn-timm: choose --namespace bob or lab\n'),
])
def test_push_asks_who_you_are_before_it_reads_weights(session, hub, token, message):
    (session.folder / WEIGHTS).unlink()
    done = session(f"run('push', {str(session.folder)!r})", token=token)
    assert done.lines == ['status 1'] and done.err.startswith('convnn-timm: error: ' + message), done.err
    assert set(hub.log) <= {'GET /api/whoami-v2'}


def test_push_without_connection(session, hub):
    done = session(f"run('push', {str(session.folder)!r})", token='hf_write', HF_HUB_OFFLINE='1')
    assert done.lines == ['status 1'] and 'error: offline mode is on: unset HF_HUB_OFFLINE\n' in done.err


def test_push_with_a_token_for_some_things(session, hub):
    hub.add_user('hf_writer', 'maintainer', role='fineGrained', orgs=('convnn-timm',), permissions=('repo.write',))
    done = session(f"run('push', {str(session.folder)!r})", token='hf_writer')
    assert 'pushed, verified' in done.out, done.err


def test_push_all_goes_on_after_a_folder_that_fails(session, hub):
    other = NAME.replace('cifar10', 'a_copy')
    shutil.copytree(session.folder, session.cards / other)
    (session.cards / other / WEIGHTS).write_bytes(b'damaged')  # the first of them
    shutil.copytree(session.folder, session.cards / f'.{NAME}.partial')  # of an export that was killed
    entry, = json.loads(session.manifest.read_text())
    session.manifest.write_text(json.dumps([entry, {**entry, 'name': other, 'hub_id': f'convnn-timm/{other}'}]))
    done = session("os.chdir('checkout'); run('push', '--all')", token='hf_write')
    assert len(done.lines) == 2 and done.lines[0].startswith(f'{PROJECT}: pushed') and done.lines[1] == 'status 1'
    assert f'convnn-timm: error: model_cards/{other}: nothing was sent:' in done.err and 'partial' not in done.err
    assert set(hub.repositories) == {PROJECT}
    line = {e['name']: e['revision'] for e in json.loads(session.manifest.read_text())}
    assert line == {NAME: hub.repositories[PROJECT].branches['main'], other: None}


def test_push_sends_nothing_that_is_damaged_or_unknown(session, hub):
    done = session(f"""
folder = Path({str(session.folder)!r})
run('push', str(folder.rename(folder.parent / 'other.cifar10')))
flip(folder.parent / 'other.cifar10' / 'model.safetensors')
run('push', str((folder.parent / 'other.cifar10').rename(folder)))
run('push')
""", token='hf_write')
    assert done.lines == ['status 1', 'status 1', 'status 2']
    assert 'other.cifar10 is not in the manifest: make its folder with convnn-timm export' in done.err
    assert 'nothing was sent:' in done.err and 'is damaged' in done.err and 'A folder, or --all' in done.err
    assert set(hub.log) == {'GET /api/whoami-v2'}


def test_push_publishes_nothing_that_export_did_not_write(session, hub):
    (session.folder / '.env').write_text('TOKEN=secret')
    (session.folder / 'training' / 'link.csv').symlink_to('/etc/hostname')
    done = session(f"run('push', {str(session.folder)!r})", token='hf_write')
    assert done.lines == ['status 1'] and 'nothing was sent' in done.err
    assert f'{session.folder}/.env is not a file that export writes' in done.err and 'link.csv' in done.err
    assert PROJECT not in hub.repositories


@pytest.mark.parametrize('method, path, fault, times, message', [
    ('POST', '/api/repos/create', 403, 1, f'the Hub does not let you do that with {PROJECT} (403)'),
    ('GET', '/api/whoami', 500, 1, 'is out of order: it answered 500'),
    ('POST', '/preupload/', 500, 99, 'is out of order: it answered 500'),
    ('POST', '/objects/batch', 500, 99, 'is out of order: it answered 500'),
    ('POST', '/branch/', 500, 99, 'is out of order: it answered 500'),
    ('POST', '/commit/', 401, 1, f'the Hub does not know your token, asked for {PROJECT}'),
    ('POST', '/commit/', 500, 1, 'is out of order: it answered 500'),
    ('POST', '/commit/', 'after', 1, 'is out of order: it answered 500'),
    ('POST', '/commit/', 'cut', 1, 'broke off'),
    ('PUT', '/lfs/', 'cut', 99, 'broke off'),
    ('PUT', '/lfs/', 403, 1, 'the Hub does not let you do that'),
    ('GET', '/tree/', 404, 1, f'refused what was asked of {PROJECT}: it answered 404'),
    ('POST', '/commit/', 409, 1, f'refused what was asked of {PROJECT}: it answered 409'),
    ('POST', '/commit/', 429, 1, f'answers no more requests for now (429), asked for {PROJECT}'),
    ('GET', '/lfs/', 'flip', 1, 'is not what was sent, and is not recorded. Push again:'),
])
def test_push_continues_after_a_fault(session, hub, method, path, fault, times, message):
    before = session.manifest.read_text()
    branch = ", '--revision', 'v1'" if path == '/branch/' else ''
    hub.fail(method, path, fault, times)
    failed = session(f"run('push', {str(session.folder)!r}{branch})", token='hf_write')
    assert failed.lines == ['status 1'] and message in failed.err and 'Traceback' not in failed.err, failed.err
    assert session.manifest.read_text() == before
    hub.faults.clear()
    sent = len(posted(hub, 'PUT'))
    again = session(f"run('push', {str(session.folder)!r}{branch})", token='hf_write')
    assert again.lines[1:] == ['status 0'], again.err
    files = hub.files(PROJECT, 'v1' if branch else 'main')
    assert {k: v for k, v in files.items() if k != '.gitattributes'} == files_of(session.folder)
    if path == '/commit/':  # what had arrived is not sent twice
        assert len(posted(hub, 'PUT')) == sent


def test_push_says_which_objects_the_storage_refuses(session, hub, monkeypatch):
    def refuse(handler, name):
        error = dict(code=403, message='storage quota exceeded')
        return dict(transfer='basic', objects=[{**o, 'error': error} for o in json.loads(handler.body)['objects']])

    monkeypatch.setattr(hub_server, 'ROUTES', [
        (pattern, refuse if route is Handler.lfs_batch else route) for pattern, route in hub_server.ROUTES])
    done = session(f"run('push', {str(session.folder)!r})", token='hf_write')
    assert done.lines == ['status 1'] and 'Traceback' not in done.err
    message, = (line for line in done.err.splitlines() if line.startswith(f'convnn-timm: error: {PROJECT}: '))
    assert 'storage quota exceeded' in message and 'what was sent is kept' in message


def test_push_from_an_installed_copy_records_the_commit_beside_the_weights(session, hub, published):
    before = session.manifest.read_text()
    try:
        (published / 'pyproject.toml').unlink()
        words = ('push', 'push', 'verify')
        done = session('\n'.join(f"run({word!r}, {str(session.folder)!r})" for word in words), 'hf_write')
    finally:
        (published / 'pyproject.toml').touch()
    assert done.lines[1::2] == ['status 0'] * 3 and 'was there already' in done.lines[2], done.err
    record, (entry,) = json.loads((session.folder / 'manifest-line.json').read_text()), json.loads(before)
    assert record == {**entry, 'revision': hub.repositories[PROJECT].branches['main']}
    assert session.manifest.read_text() == before and 'manifest-line.json' not in hub.files(PROJECT)


# Loading

@pytest.mark.parametrize('installed', [False, True])
def test_order_of_the_places_that_weights_are_loaded_from(session, published, on_the_hub, installed):
    """The folder named, then the package's own, then the Hub; a folder without that weight is passed over. The current
    folder is none of them."""
    own, project = published / ('convnn_timm/model_cards' if installed else 'model_cards'), published / 'pyproject.toml'
    digest = digest_of(session)
    on_the_hub.log.clear()
    try:
        if installed:
            project.unlink()
        shutil.copytree(session.cards, own, dirs_exist_ok=True)
        done = session(f"os.chdir('/'); load({NAME!r}); run('verify', {NAME!r})")
        assert done.lines[0] == digest and str(own) in done.lines[1] and done.lines[2] == 'status 0', done.err
        assert session(f'load({NAME!r})', CONVNN_TIMM_ZOO=str(session.cards)).lines == [digest]
        (session.folder / WEIGHTS).write_bytes(b'the folder named is asked first')
        assert 'is cut short' in session(f'load({NAME!r})', CONVNN_TIMM_ZOO=str(session.cards)).out
        assert not on_the_hub.log
        assert session(f"os.chdir('checkout'); run('verify', '{PROJECT}')", HF_HOME='other').lines[1] == 'status 0'
        assert on_the_hub.log  # who names a repository means it
    finally:
        project.touch()
        shutil.rmtree(own / NAME)
    (session.folder / WEIGHTS).unlink()
    assert session(f'load({NAME!r})', CONVNN_TIMM_ZOO=str(session.cards)).lines == [digest]
    assert on_the_hub.log[-1].startswith('GET /lfs/')
    (session.folder / WEIGHTS).write_bytes(b'nobody looks here')
    assert session(f"os.chdir('checkout'); load({NAME!r})").lines == [digest]
    lost = session(f'load({NAME!r})', CONVNN_TIMM_ZOO='nowhere')
    assert lost.lines == [
        'WeightsError: CONVNN_TIMM_ZOO=nowhere: there is no such folder. Correct or unset the variable.']


@pytest.fixture(params=['refused', 'silent'])
def out_of_reach(request):
    """Environment with a Hub that refuses the connection, or takes it and says nothing."""
    with socket.create_server(('127.0.0.1', 0)) as silent:
        port = 1 if request.param == 'refused' else silent.getsockname()[1]
        yield dict(HF_ENDPOINT=f'http://127.0.0.1:{port}', HF_HUB_ETAG_TIMEOUT='1', HF_HUB_DISABLE_TELEMETRY='0')


def test_a_hub_out_of_reach_is_said_at_once_in_one_line(session, out_of_reach):
    done = session(f"""
import time, timm
start = time.time()
try:
    timm.create_model({NAME!r}, pretrained=True)
except Exception as error:
    print(type(error).__name__, error.__cause__, error.__suppress_context__, error)
    print(time.time() - start)
for argv in (['verify', 'someone/mine'], ['pull', {NAME!r}], ['predict', 'x', '--model', 'hf-hub:someone/mine']):
    start = time.time()
    run(*argv)
    print(time.time() - start)
""", **out_of_reach)
    assert done.lines[0].startswith('WeightsError None True '), done.out
    assert all(float(seconds) < 5 for seconds in done.lines[1::2]) and done.lines[2::2] == ['status 1'] * 3, done.out
    messages = [done.lines[0], *done.err.splitlines()]
    assert len(messages) == 4, done.err
    for message, repo in zip(messages, (PROJECT, 'someone/mine', PROJECT, 'someone/mine')):
        assert f'{repo} is not in the cache, and the Hub (http://127.0.0.1:' in message
        assert 'cannot be reached. Try again with a connection; HF_HUB_ETAG_TIMEOUT=30 waits longer' in message


def test_the_cache_serves_while_the_hub_is_out_of_reach(session, on_the_hub, out_of_reach):
    """And what is damaged there stays until there is something to replace it."""
    digest = digest_of(session)
    session(f"run('verify', '{PROJECT}')", HF_HUB_DISABLE_SYMLINKS='1')
    done = session(f"""
load({NAME!r})
run('verify', '{PROJECT}')
run('pull', '{PROJECT}')
flip(cached())
run('pull', {NAME!r})
print(cached().is_file())
""", **out_of_reach)
    assert done.lines[0] == digest and done.lines[2::2] == ['status 0', 'status 0', 'True'], done.out
    assert done.lines[5] == 'status 1' and 'is damaged, and the Hub (http' in done.err, done.err
    assert 'cannot be reached. Try again with a connection' in done.err and 'Traceback' not in done.err


def test_another_namespace(session, hub, published):
    hub.add_repository(f'lab/{NAME}', files_of(published / 'cards' / NAME))
    digest = digest_of(session)
    assert session(f'load({NAME!r})', CONVNN_TIMM_NAMESPACE='lab').lines == [digest]
    late = f"import timm, convnn_timm.models\nos.environ['CONVNN_TIMM_NAMESPACE'] = 'lab'\nload({NAME!r})"
    assert session(late).lines == [digest]  # set when the models are registered already
    hub.repositories.clear()
    assert session(late, CONVNN_TIMM_ZOO=str(session.cards)).lines == [digest]


def test_arguments_and_weights_of_the_caller_come_first(session, on_the_hub):
    done = session(f"""
model = load({NAME!r}, num_samples=16)
load({NAME!r}, num_classes=7, in_chans=1)
load({NAME!r}, pretrained_cfg_overlay=dict(state_dict=model.state_dict()), num_classes=3)
load('resnet18_convnn')
load({NAME!r}, K=5)
import timm, torch
features = timm.create_model({NAME!r}, pretrained=True, features_only=True)
print([tuple(f.shape) for f in features(torch.zeros(1, 3, 16, 16))])
print(timm.create_model({NAME!r}, channels=(16, 16, 16, 24)).num_features)
""")
    samples = [line.rpartition(' ')[2] for line in done.lines]
    assert samples[:3] == ['16', '32', '32'] and all(line.startswith('loaded') for line in done.lines[:3])
    assert done.lines[3].startswith('RuntimeError: No pretrained weights exist for resnet18_convnn')
    assert done.lines[4].startswith(f'WeightsError: {NAME} was trained with K=9, you asked for K=5')
    assert '(1, 512, 2, 2)]' in done.lines[-2] and done.lines[-1] == '24'


def test_weights_of_another_network_than_their_name_load_from_their_folder(session, hub):
    """By the name of the architecture alone timm would build another network."""
    name, own = 'resnet18_convnn_branching.mine', dict(channels=(16, 16, 16, 16), magnitude_type='euclidean')
    folder = make_published(session, name, **own)
    hub.add_repository(f'convnn-timm/{name}', files_of(folder))
    done = session(f"""
load({name!r})
load('local-dir:{folder}')
load({name!r}, channels=(16, 16, 16, 16), magnitude_type='euclidean')
load({name!r}, channels=(16, 16, 16, 16))
os.environ.pop('CONVNN_TIMM_ZOO')
load({name!r})
load('hf-hub:convnn-timm/{name}')
run('verify', {name!r})
import timm
print(timm.create_model({name!r}).num_features)
""" + blocks_of(folder), CONVNN_TIMM_ZOO=str(session.cards))
    assert done.lines[0] == (
        f'WeightsError: {name} was trained with channels=[16, 16, 16, 16], magnitude_type=euclidean, and '
        f'resnet18_convnn_branching has channels=(64, 128, 256, 512), magnitude_type=cosine: load it as '
        f'local-dir:{folder}, whose config.json has its arguments')
    assert done.lines[1].startswith('loaded') and done.lines[1] == done.lines[2] == done.lines[5]
    assert 'was trained with magnitude_type=euclidean, and resnet18_convnn_branching has' in done.lines[3]
    assert f'load it as hf-hub:convnn-timm/{name}, whose' in done.lines[4]
    assert done.out.count('status 0') == 1 and '512' in done.lines and done.lines.count('ran') == 3


def test_a_damaged_file_is_never_used_and_pull_repairs_it(session, on_the_hub):
    """Of the right size: in the cache, on the way, and in a folder."""
    digest = digest_of(session)
    on_the_hub.fail('GET', '/lfs/', 'flip')
    done = session(f"""
load({NAME!r})
load({NAME!r})
load('hf-hub:{PROJECT}')
run('verify', {NAME!r})
run('pull', {NAME!r})
load({NAME!r})
flip(cached())
load({NAME!r}, num_classes=5)
run('pull', '{PROJECT}')
load('hf-hub:{PROJECT}')
os.environ['CONVNN_TIMM_ZOO'] = {str(session.cards)!r}
file = Path({str(session.folder / WEIGHTS)!r})
file.write_bytes(file.read_bytes()[:-8] + b'\\xff' * 8)  # NaN
load({NAME!r})
run('pull', {NAME!r})
load({NAME!r})
""")
    damaged = [line for line in done.lines if line.startswith('WeightsError')]
    assert len(damaged) == 5 and all('its sha256 is ' in line and 'None of it was used' in line for line in damaged)
    assert all('is damaged: ' in line and 'Fetch it again: convnn-timm pull ' in line for line in damaged[:4]), done.out
    assert 'it is damaged, or holds other weights' in damaged[4]
    assert f'If it is damaged, convnn-timm pull {NAME} replaces it; other weights load as local-dir:' in damaged[4]
    assert WEIGHTS in damaged[0] and damaged[0].endswith(f'convnn-timm pull {NAME}')
    assert damaged[2].endswith(f'convnn-timm pull {PROJECT}')
    assert [line for line in done.lines if line.startswith('loaded')] == [digest] * 3
    assert done.out.count('status 0') == 3 and done.out.count('status 1') == 1 and 'is damaged' in done.err
    # No scratch files beside the repaired one, but what it replaced, which might have been somebody's.
    assert len(list(session.folder.iterdir())) == 6 and 'model.replaced is what was there' in done.err
    assert (session.folder / 'model.replaced').read_bytes()[-8:] == b'\xff' * 8


def make_published(session, name, **model_args):
    """The folder of other published weights, which the manifest lists; returns it."""
    folder = shutil.copytree(session.folder, session.cards / name)
    config = json.loads((folder / 'config.json').read_text())
    config.update(architecture=name.split('.')[0], model_args={**config['model_args'], **model_args})
    config['pretrained_cfg'].update(tag=name.split('.')[1], input_size=[3, 32, 32])
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(build_model(config).state_dict(), folder / WEIGHTS, metadata={'format': 'pt'})
    write_golden(folder)
    write_card(folder, name)
    session.manifest.write_text(json.dumps([make_entry(folder, name)]))
    return folder


def make_other(folder):
    """Give a folder other weights, which are whole: a classifier without bias, and the golden logits of that."""
    weights, golden = (load_file(folder / name) for name in (WEIGHTS, 'golden.safetensors'))
    golden['logits'] -= weights['fc.bias'].double()
    weights['fc.bias'].zero_()
    save_file(weights, folder / WEIGHTS, metadata={'format': 'pt'})
    save_file(golden, folder / 'golden.safetensors')


def test_newer_weights_are_not_called_damaged(session, on_the_hub):
    make_other(session.folder)
    on_the_hub.add_repository(PROJECT, files_of(session.folder))
    done = session(f"load({NAME!r}); run('pull', {NAME!r})")
    for line in (done.lines[0], done.err):
        assert 'is whole, but holds other weights' in line and 'update it' in line and 'damaged' not in line
    weights = sha256((session.folder / WEIGHTS).read_bytes())
    assert done.lines[1] == 'status 1' and len(posted(on_the_hub, f'GET /lfs/{weights}')) == 1


@pytest.mark.parametrize('owner, env', [('convnn-timm', {}), ('lab', {'CONVNN_TIMM_NAMESPACE': 'lab'})])
def test_newer_weights_load_by_the_name_of_their_repository(session, hub, owner, env):
    """Whole by the Hub's own hash, with a config.json of their own: with a warning, and by no other name."""
    repo = f'{owner}/{NAME}'
    make_other(session.folder)
    hub.add_repository(repo, files_of(session.folder))
    done = session(
        f"load('hf-hub:{repo}'); run('pull', '{repo}'); load({NAME!r}); load('local-dir:{session.folder}')", **env)
    assert done.lines[0] == done.lines[4] and done.lines[2] == 'status 0', done.err
    assert 'is whole, but holds other weights' in done.lines[3]
    assert done.err.count(f'hf-hub:{repo} holds other weights than those that this version of convnn_timm lists') == 1
    damaged = session(f"flip(cached()); load('hf-hub:{repo}')", **env)
    assert 'is damaged' in damaged.out


def test_a_cache_without_links(session, on_the_hub):
    """As on Windows: what is damaged there is fetched again, and newer weights are told from damaged ones."""
    done = session(f"""
load({NAME!r})
flip(cached())
load({NAME!r})
run('pull', {NAME!r})
load({NAME!r})
flip(cached())
load('hf-hub:{PROJECT}')
run('pull', {NAME!r})
assert not cached().is_symlink()
""", HF_HUB_DISABLE_SYMLINKS='1')
    loaded, damaged = ([line for line in done.lines if line.startswith(word)] for word in ('loaded', 'WeightsError'))
    assert loaded == [digest_of(session)] * 2 and done.out.count('status 0') == 2, done.out
    assert len(damaged) == 2 and all('its sha256 is ' in line for line in damaged)
    make_other(session.folder)
    on_the_hub.add_repository(PROJECT, files_of(session.folder))
    newer = session(f"load('hf-hub:{PROJECT}'); load('local-dir:{session.folder}')", HF_HUB_DISABLE_SYMLINKS='1')
    assert newer.lines[0] == newer.lines[1] and 'holds other weights than those' in newer.err


def test_a_cache_of_the_callers_own(session, on_the_hub):
    done = session(f"""
os.environ['HF_HUB_CACHE'] = 'mine'
load({NAME!r}, cache_dir='mine')
flip(next(Path('mine').glob('models--*/snapshots/*/model.safetensors')))
load({NAME!r}, cache_dir='mine')
""")
    assert done.lines[1].endswith(f'convnn-timm pull {NAME} (with HF_HUB_CACHE=mine, where this file is)')
    done = session(f"run('pull', {NAME!r}); load({NAME!r}, cache_dir='mine')", HF_HUB_CACHE='mine')
    assert done.lines[1:] == ['status 0', digest_of(session)]


def test_fine_tuned_weights_are_saved_with_the_arguments_that_they_came_with(session, on_the_hub):
    done = session(f"""
import timm, torch
model = load({NAME!r}, num_classes=5)
timm.models.save_for_hf(model, 'saved', safe_serialization=True)
again = load('local-dir:saved')
x = torch.randn(2, *model.pretrained_cfg['input_size'])
print(torch.equal(model(x), again(x)))
""")
    assert done.lines[0] == done.lines[1] and done.lines[2] == 'True'


@pytest.mark.parametrize('missing', [None, 'golden.safetensors', 'README.md'])
def test_pull_replaces_no_weights_of_somebodys_own(session, on_the_hub, missing):
    """What lies in a folder of that name is replaced only if it is seen to be damaged."""
    make_other(session.folder)
    if missing:
        (session.folder / missing).unlink()
    own = files_of(session.folder)
    done = session(f"run('pull', {NAME!r}); load('local-dir:{session.folder}')", CONVNN_TIMM_ZOO=str(session.cards))
    assert done.lines[0] == 'status 1' and done.lines[1].startswith('loaded')
    assert 'it may hold other weights' in done.err and f'move {session.folder} away first' in done.err
    assert files_of(session.folder) == own and not on_the_hub.log


def test_a_name_says_that_its_weights_are_not_on_the_hub(session, hub):
    line, = session(f'load({NAME!r})').lines
    assert 'The weights of this version are not on the Hub yet' in line and 'CONVNN_TIMM_ZOO' in line


def test_a_folder_without_weights(session, hub):
    line, = session(f"load({NAME!r}, pretrained_cfg_overlay=dict(file='{session.folder}/typo.safetensors'))").lines
    assert line.startswith('WeightsError') and f'there is no file {session.folder}/typo.safetensors' in line
    (session.folder / WEIGHTS).unlink()
    (session.folder / 'golden.safetensors').unlink()
    line, = session(f"load('local-dir:{session.folder}')").lines
    assert line.startswith('WeightsError') and f'{session.folder} holds no weights ({WEIGHTS})' in line


def test_a_repository_that_the_manifest_does_not_know_is_checked_too(session, on_the_hub):
    """A large file in the cache is named by its hash."""
    on_the_hub.add_repository('someone/mine', files_of(session.folder))
    on_the_hub.add_repository('someone/cut', {**files_of(session.folder), WEIGHTS: b'123'})
    done = session(f"""
load('hf-hub:someone/mine')
flip(cached())
load('hf-hub:someone/mine')
load('hf-hub:someone/cut')
load('local-dir:{session.folder}')
Path('{session.folder}/model.safetensors').write_bytes(b'123')
load('local-dir:{session.folder}')
""")
    good, damaged, cut, local, local_cut = done.lines
    assert good.startswith('loaded') and 'is damaged' in damaged and damaged.endswith('convnn-timm pull someone/mine')
    assert 'is cut short or no safetensors file' in cut and cut.endswith('convnn-timm pull someone/cut')
    assert local.startswith('loaded') and f'{session.folder}/{WEIGHTS} is cut short' in local_cut


@pytest.mark.parametrize('method, fault, times, message', [
    ('GET', 'cut', 99, 'broke off at'),
    ('GET', 'short', 99, 'broke off at'),
    ('GET', 500, 99, 'is out of order: it answered 500'),
    ('HEAD', 500, 99, 'is out of order: it answered 500'),
    ('HEAD', 403, 99, 'the Hub does not let you do that with'),
    ('HEAD', 'cut', 99, 'broke off at'),
])
def test_a_download_that_fails_loads_nothing_and_can_be_repeated(session, on_the_hub, method, fault, times, message):
    digest = digest_of(session)
    on_the_hub.fail(method, '/lfs/' if method == 'GET' else '/resolve/', fault, times)
    failed = session(f'load({NAME!r}); run("pull", {NAME!r})')
    assert failed.lines[0].startswith('WeightsError: ') and message in failed.lines[0], failed.out
    assert failed.lines[1] == 'status 1' and message in failed.err and 'Traceback' not in failed.err, failed.err
    on_the_hub.faults.clear()
    assert session(f'load({NAME!r})').lines == [digest]


def test_what_can_be_wrong_with_a_repository(session, hub, published):
    """One message for each, with what to do about it."""
    manifest = json.loads(session.manifest.read_text())
    hub.add_repository(f'empty/{NAME}', {'config.json': b'{}', 'pytorch_model.bin': b'pickle'})
    hub.add_repository(f'secret/{NAME}', files_of(published / 'cards' / NAME), private=True)
    commit = hub.add_repository(PROJECT, files_of(published / 'cards' / NAME))
    session.manifest.write_text(json.dumps([{**manifest[0], 'revision': commit[::-1]}]))

    def said(token=None, **env):
        line, = session(f'load({NAME!r})', token, **env).lines
        return line.removeprefix('WeightsError: ')

    assert said() == f"{PROJECT} has no revision '{commit[::-1]}'; " \
        f'http://127.0.0.1:{hub.port}/{PROJECT}/commits/main lists those it has'
    assert 'holds no weights: it lacks config.json or model.safetensors' in said(CONVNN_TIMM_NAMESPACE='empty')
    assert 'you must log in with `hf auth login`, or set HF_TOKEN' in said(CONVNN_TIMM_NAMESPACE='nobody')
    assert 'there is no repository secret/' in said(CONVNN_TIMM_NAMESPACE='secret')
    assert 'your token may not see it' in said('hf_other', CONVNN_TIMM_NAMESPACE='secret')
    assert 'the Hub does not know your token' in said('hf_wrong', CONVNN_TIMM_NAMESPACE='secret')
    hub.repositories[f'secret/{NAME}'].private, hub.repositories[f'secret/{NAME}'].gated = False, True
    for token in None, 'hf_other':
        ask = f'secret/{NAME} is for those who were given access: ask for it at http://127.0.0.1:{hub.port}/secret/'
        assert ask in said(token, CONVNN_TIMM_NAMESPACE='secret')
    assert f'Unset HF_HUB_OFFLINE and run once: convnn-timm pull {PROJECT}@' in said(HF_HUB_OFFLINE='1')
    assert 'cannot be reached. Try again with a connection' in said(HF_ENDPOINT='http://127.0.0.1:1')


@pytest.mark.parametrize('env, fault, message', [
    ({'HF_HUB_OFFLINE': '1'}, None, 'offline mode is on. Unset HF_HUB_OFFLINE and run once: convnn-timm pull'),
    ({'HF_ENDPOINT': 'http://127.0.0.1:1'}, None, 'cannot be reached. Try again with a connection'),
    ({}, 500, 'is out of order: it answered 500'),
])
def test_a_cache_that_has_only_part_of_a_repository(session, on_the_hub, env, fault, message):
    """The client then takes it for the whole: what is missing is not missing on the Hub."""
    on_the_hub.add_repository('someone/mine', files_of(session.folder))
    on_the_hub.fail('GET', '/lfs/', 'cut', 99)
    session("load('hf-hub:someone/mine')")  # config.json arrives
    on_the_hub.faults.clear()
    session(f'load({NAME!r})')  # fetches nothing but the weights
    if fault:
        on_the_hub.fail('GET', '/api/models/', fault, 99)
        on_the_hub.fail('HEAD', '/resolve/', fault, 99)
    done = session(f"run('pull', 'someone/mine'); run('verify', {NAME!r}); run('pull', {NAME!r})", **env)
    assert done.lines[:2] == ['status 1'] * 2 and done.lines[3] == 'status 0', done.err
    assert [line for line in done.err.splitlines() if line.startswith('convnn-timm')] == [
        line for line in done.err.splitlines() if message in line] and done.err.count(message) == 2, done.err
    assert 'holds no weights' not in done.err and 'has no' not in done.err


def test_verify_of_a_repository_that_lacks_files(session, hub):
    files = files_of(session.folder)
    del files['golden.safetensors']
    hub.add_repository('someone/mine', files)
    done = session("run('verify', 'someone/mine'); run('verify', 'someone/mine')")
    assert done.lines == ['status 1'] * 2 and done.err.count('has no golden.safetensors') == 2


def test_pull_and_verify_go_on_after_one_that_fails(session, on_the_hub):
    done = session(f"run('pull', 'nobody/x', {NAME!r}); run('verify', 'nobody/x', {NAME!r})")
    assert [line.partition(':')[0] for line in done.lines] == [NAME, 'status 1', NAME, 'status 1']
    assert done.err.count('there is no repository nobody/x') == 2


def test_pull_and_verify_name_a_config_that_is_cut_short(session, hub):
    files = files_of(session.folder)
    hub.add_repository('someone/mine', {**files, 'config.json': files['config.json'][:100]})
    done = session("run('pull', 'someone/mine'); run('verify', 'someone/mine')")
    assert done.lines == ['status 1'] * 2 and 'Traceback' not in done.err
    messages = [line for line in done.err.splitlines() if line.startswith('convnn-timm: error: ')]
    assert len(messages) == 2 and all(
        'models--someone--mine' in line and '/config.json is damaged: ' in line for line in messages)


def test_storage_that_cannot_be_reached(session, hub, monkeypatch):
    """hf_xet then raises a plain RuntimeError: on the way here and there."""
    cas, token, expiry = 'http://127.0.0.1:1', 'token', int(time.time()) + 3600
    nowhere = {
        'X-Xet-Hash': 'a' * 64, 'X-Xet-Refresh-Route': f'http://127.0.0.1:{hub.port}/xet', 'X-Xet-Cas-Url': cas,
        'X-Xet-Access-Token': token, 'X-Xet-Token-Expiration': str(expiry)}

    def send(handler, status, body, headers, send=Handler.send):
        send(handler, status, body, {**headers, **nowhere} if status == 302 or 'xet' in handler.path else headers)

    monkeypatch.setattr(Handler, 'send', send)
    answer = dict(casUrl=cas, accessToken=token, exp=expiry)
    monkeypatch.setattr(hub_server, 'ROUTES', [*hub_server.ROUTES, (re.compile('GET .*/xet.*'), lambda *_: answer)])
    hub.add_repository('someone/mine', files_of(session.folder))
    done = session(f"""
load('hf-hub:someone/mine')
run('pull', 'someone/mine')
run('push', {str(session.folder)!r})
""", token='hf_write', HF_HUB_DISABLE_XET='0', HF_XET_CLIENT_RETRY_MAX_ATTEMPTS='1')
    message = "the connection to the Hub's storage broke off at "
    assert done.lines[0].startswith(f'WeightsError: {message}someone/mine: ') and done.lines[1:] == ['status 1'] * 2
    assert f'error: {message}someone/mine' in done.err and f'error: {message}{PROJECT}' in done.err
    assert 'what was sent is kept' in done.err and 'Traceback' not in done.err


def test_predict_explains_what_is_wrong_with_a_repository(session, on_the_hub):
    done = session(f"""
run('predict', 'x.png', '--model', 'hf-hub:nobody/nothing')
run('predict', 'x.png', '--model', 'hf-hub:{PROJECT}@v9')
run('predict', 'x.png', '--model', {NAME!r})
""", HF_TOKEN='')
    assert "there is no repository nobody/nothing on the Hub" in done.err
    assert f"{PROJECT} has no revision 'v9'" in done.err and 'x.png: not found' in done.err


def blocks_of(card):
    """Code that runs the Python blocks of a card."""
    return f"""
import re
text = Path({str(card / 'README.md')!r}).read_text()
for code in re.findall(r'^```python\\n(.*?)^```', text, re.DOTALL | re.MULTILINE):
    exec(code, {{}})
    print('ran')
"""


def test_every_python_block_of_a_card_runs_as_printed(session, on_the_hub):
    done = session(blocks_of(session.folder))
    assert done.lines.count('ran') == 3 and ' % ' in done.lines[0]
    shapes = [line for line in done.lines if line.startswith('(2,')]
    card = (session.folder / 'README.md').read_text().splitlines()
    assert shapes == [line[4:] for line in card if line.startswith('#   (')]


def test_the_card_of_somebody_else_runs_where_the_name_is_unknown(session, hub):
    session(f"run('push', {str(session.folder)!r}, '--namespace', 'alice')", token='hf_other')
    (session.folder / 'README.md').write_bytes(hub.files(f'alice/{NAME}')['README.md'])
    session.manifest.write_text('[]')
    assert session(blocks_of(session.folder)).lines.count('ran') == 3


def test_the_card_of_a_model_for_224_pixels_runs_as_printed(session):
    folder = make_published(session, 'resnet18_convnn_branching_224.noise')
    done = session(blocks_of(folder), CONVNN_TIMM_ZOO=str(session.cards))
    assert done.lines.count('ran') == 3 and ' % ' in done.lines[0]


def test_a_tag_is_no_architectures_default_for_having_weights_alone(session):
    """The architecture's name stands for what it always did."""
    names = ['resnet18_conv2d.noise', 'resnet18_convnn_branching_224.noise', 'vgg11_convnn_branching_224.noise']
    entry, = json.loads(session.manifest.read_text())
    session.manifest.write_text(json.dumps([{**entry, 'name': name} for name in names]))
    done = session(f"""
import convnn_timm.models, timm
print(timm.list_pretrained('*.noise'))
for name in {names}:
    own, plain = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(name.split('.')[0])
    print(own.label_names, plain.num_classes, plain.input_size, plain.label_names, bool(plain.has_weights))
""")
    assert done.lines[0] == str(names)
    assert done.lines[1] == "('bee', 'cat', 'dog') 10 (3, 32, 32) None False"
    assert done.lines[2:] == ["('bee', 'cat', 'dog') 1000 (3, 224, 224) None False"] * 2
