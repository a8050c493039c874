"""`convnn-timm push`: what it sends, what it refuses, and that it can be repeated after every failure."""
import json
import re
import shutil

import pytest

import hub_server
from hub_server import Handler
from publishing import NAME, PROJECT, WEIGHTS, blocks_of, digest_of, files_of


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
    assert third.endswith(commit) and len(hub.asked(f'POST /api/models/{PROJECT}/commit/main')) == 1
    expected = files_of(session.folder)
    assert {k: v for k, v in hub.files(PROJECT).items() if k != '.gitattributes'} == expected == {
        k: v for k, v in hub.files(PROJECT, 'v1').items() if k != '.gitattributes'}
    assert len(hub.asked('PUT /lfs/')) == len([name for name in expected if name.endswith(('.safetensors', '.png'))])
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


def test_push_removes_what_is_no_longer_there_and_sends_what_changed(session, on_the_hub):
    others = {'notes.md': b'of others', 'checkpoints/last.bin': b'of others'}
    old = {'pytorch_model.bin': b'old', 'README.md': b'old', 'training/old.csv': b'old', **others}
    on_the_hub.add_repository(PROJECT, {**files_of(session.folder), **old})
    done = session("os.chdir('checkout'); run('push', '--all')", token='hf_write')
    assert 'pushed, verified' in done.out and 'status 0' in done.out, done.err
    files = on_the_hub.files(PROJECT)
    assert files.keys() - files_of(session.folder).keys() == others.keys()
    assert files['README.md'] == (session.folder / 'README.md').read_bytes()
    assert not on_the_hub.asked('PUT')


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
    assert hub.files(f'alice/{NAME}').keys() == {'notes.md'} and not hub.asked('PUT')


def test_push_of_no_folder(session):
    done = session("run('push', 'cards/nothing')")
    assert done.lines == ['status 1'] and 'there is no folder cards/nothing' in done.err


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
    ('POST', '/api/repos/create', 403, 1, f'{PROJECT}: 403 Forbidden: injected.'),
    ('GET', '/api/whoami', 500, 1, "convnn-timm: Server error '500 Internal Server Error'"),
    ('POST', '/preupload/', 500, 99, f"{PROJECT}: Server error '500 Internal Server Error'"),
    ('POST', '/branch/', 500, 99, f"{PROJECT}@v1: Server error '500 Internal Server Error'"),
    ('POST', '/commit/', 401, 1, f'the Hub does not know your token, asked for {PROJECT}: log in with'),
    ('POST', '/commit/', 500, 1, f"{PROJECT}: Server error '500 Internal Server Error'"),
    ('POST', '/commit/', 'after', 1, f"{PROJECT}: Server error '500 Internal Server Error'"),
    ('POST', '/commit/', 'cut', 1, f'{PROJECT}: Server disconnected'),
    ('PUT', '/lfs/', 'cut', 99, f'{PROJECT}: '),
    ('GET', '/api/models/', 404, 1, f"{PROJECT}: Client error '404 Not Found'"),
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
    sent = len(hub.asked('PUT'))
    again = session(f"run('push', {str(session.folder)!r}{branch})", token='hf_write')
    assert again.lines[1:] == ['status 0'], again.err
    files = hub.files(PROJECT, 'v1' if branch else 'main')
    assert {k: v for k, v in files.items() if k != '.gitattributes'} == files_of(session.folder)
    if path == '/commit/':  # what had arrived is not sent twice
        assert len(hub.asked('PUT')) == sent


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


def test_push_from_an_installed_copy_records_the_commit_beside_the_weights(session, hub, checkout):
    before = session.manifest.read_text()
    try:
        (checkout / 'pyproject.toml').unlink()
        words = ('push', 'push', 'verify')
        done = session('\n'.join(f"run({word!r}, {str(session.folder)!r})" for word in words), 'hf_write')
    finally:
        (checkout / 'pyproject.toml').touch()
    assert done.lines[1::2] == ['status 0'] * 3 and 'was there already' in done.lines[2], done.err
    record, (entry,) = json.loads((session.folder / 'manifest-line.json').read_text()), json.loads(before)
    assert record == {**entry, 'revision': hub.repositories[PROJECT].branches['main']}
    assert session.manifest.read_text() == before and 'manifest-line.json' not in hub.files(PROJECT)


def test_the_card_of_somebody_else_runs_where_the_name_is_unknown(session, hub):
    session(f"run('push', {str(session.folder)!r}, '--namespace', 'alice')", token='hf_other')
    (session.folder / 'README.md').write_bytes(hub.files(f'alice/{NAME}')['README.md'])
    session.manifest.write_text('[]')
    assert session(blocks_of(session.folder)).lines.count('ran') == 3
