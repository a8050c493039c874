"""`convnn-timm pull` and `verify` of what is on the Hub: damaged, newer, partial and missing files."""
import re
import time

import pytest

import hub_server
from hub_server import Handler, sha256
from publishing import NAME, PROJECT, WEIGHTS, digest_of, files_of, make_other


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


def test_newer_weights_are_not_called_damaged(session, on_the_hub):
    make_other(session.folder)
    on_the_hub.add_repository(PROJECT, files_of(session.folder))
    done = session(f"load({NAME!r}); run('pull', {NAME!r})")
    for line in (done.lines[0], done.err):
        assert 'is whole, but holds other weights' in line and 'update it' in line and 'damaged' not in line
    weights = sha256((session.folder / WEIGHTS).read_bytes())
    assert done.lines[1] == 'status 1' and len(on_the_hub.asked(f'GET /lfs/{weights}')) == 1


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


@pytest.mark.parametrize('env, fault, message', [
    ({'HF_HUB_OFFLINE': '1'}, None, 'offline mode is on. Unset HF_HUB_OFFLINE and run once: convnn-timm pull'),
    ({'HF_ENDPOINT': 'http://127.0.0.1:1'}, None, 'cannot be reached. Try again with a connection'),
    ({}, 500, "Server error '500 Internal Server Error'"),
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
    assert done.lines[0].startswith('WeightsError: someone/mine: ') and done.lines[1:] == ['status 1'] * 2
    assert 'error: someone/mine: ' in done.err and f'error: {PROJECT}: ' in done.err
    assert 'what was sent is kept' in done.err and 'Traceback' not in done.err
