"""`create_model(..., pretrained=True)`: where weights are found, which are used, and why others are not."""
import json
import shutil

import pytest
from safetensors.torch import save_file

from convnn_timm.hub.card import write_card
from convnn_timm.hub.folder import build_model, write_golden
from convnn_timm.hub.manifest import make_entry
from publishing import NAME, PROJECT, WEIGHTS, blocks_of, digest_of, files_of, make_other


@pytest.mark.parametrize('installed', [False, True])
def test_order_of_the_places_that_weights_are_loaded_from(session, checkout, on_the_hub, installed):
    """The folder named, then the package's own, then the Hub; a folder without that weight is passed over. The current
    folder is none of them."""
    own, project = checkout / ('convnn_timm/model_cards' if installed else 'model_cards'), checkout / 'pyproject.toml'
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


def test_a_hub_out_of_reach_is_said_at_once_in_one_line(session, out_of_reach):
    done = session(f"""
import time, timm
start = time.time()
try:
    timm.create_model({NAME!r}, pretrained=True)
except Exception as error:
    print(type(error).__name__, error.__cause__, error.__suppress_context__, error)
    print(time.time() - start)
for argv in (['verify', 'someone/mine'], ['pull', {NAME!r}], ['predict', 'x', '--model', 'hf-hub:someone/mine'],
             ['predict', 'x', '--model', 'resnet18.a1_in1k']):
    start = time.time()
    run(*argv)
    print(time.time() - start)
""", **out_of_reach)
    assert done.lines[0].startswith('WeightsError None True '), done.out
    assert all(float(seconds) < 5 for seconds in done.lines[1::2]) and done.lines[2::2] == ['status 1'] * 4, done.out
    messages = [done.lines[0], *done.err.splitlines()]
    repositories = PROJECT, 'someone/mine', PROJECT, 'someone/mine', 'timm/resnet18.a1_in1k'
    for message, repo in zip(messages, repositories, strict=True):
        assert f'{repo} is not in the cache, and the Hub (http://127.0.0.1:' in message
        assert 'cannot be reached. Try again with a connection; HF_HUB_ETAG_TIMEOUT=30 waits longer' in message


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

    said_revision = said()
    assert said_revision.startswith(f'{PROJECT}@{commit[::-1]}: 404') and 'Revision Not Found' in said_revision
    lacking = said(CONVNN_TIMM_NAMESPACE='empty')
    assert 'Entry Not Found for url' in lacking and 'model.safetensors' in lacking
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


@pytest.mark.parametrize('method, fault, times, message', [
    ('GET', 'cut', 99, 'peer closed connection'),
    ('GET', 'short', 99, 'Consistency check failed'),
    ('GET', 500, 99, "Server error '500 Internal Server Error'"),
    ('HEAD', 500, 99, "Server error '500 Internal Server Error'"),
    ('HEAD', 'cut', 99, 'Server disconnected'),
])
def test_a_download_that_fails_loads_nothing_and_can_be_repeated(session, on_the_hub, method, fault, times, message):
    digest = digest_of(session)
    on_the_hub.fail(method, '/lfs/' if method == 'GET' else '/resolve/', fault, times)
    failed = session(f'load({NAME!r}); run("pull", {NAME!r})')
    assert failed.lines[0].startswith('WeightsError: ') and message in failed.lines[0], failed.out
    assert failed.lines[1] == 'status 1' and message in failed.err and 'Traceback' not in failed.err, failed.err
    on_the_hub.faults.clear()
    assert session(f'load({NAME!r})').lines == [digest]


def test_predict_explains_what_is_wrong_with_a_repository(session, on_the_hub):
    done = session(f"""
run('predict', 'x.png', '--model', 'hf-hub:nobody/nothing')
run('predict', 'x.png', '--model', 'hf-hub:{PROJECT}@v9')
run('predict', 'x.png', '--model', {NAME!r})
""", HF_TOKEN='')
    assert "there is no repository nobody/nothing on the Hub" in done.err
    assert f'{PROJECT}@v9: 404' in done.err and 'Revision Not Found' in done.err and 'x.png: not found' in done.err


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


def test_every_python_block_of_a_card_runs_as_printed(session, on_the_hub):
    done = session(blocks_of(session.folder))
    assert done.lines.count('ran') == 3 and ' % ' in done.lines[0]
    shapes = [line for line in done.lines if line.startswith('(2,')]
    card = (session.folder / 'README.md').read_text().splitlines()
    assert shapes == [line[4:] for line in card if line.startswith('#   (')]


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
