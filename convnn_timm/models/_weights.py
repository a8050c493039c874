"""Published weights: which exist, where their files are, and whether a file is whole.

manifest.json has an entry for each; `convnn-timm export` and `push` write it in a checkout. A file's hash is compared
with its entry before the weights are used: neither timm nor the Hub's client notices wrong content of the right size.
"""
import hashlib
import json
import logging
import os
import re
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from huggingface_hub import (
    constants, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url, try_to_load_from_cache)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model_in_modules, resolve_pretrained_cfg

from convnn_timm.errors import UserError

__all__ = [
    'FORMATS', 'HUB_FAILURES', 'MODEL_CARDS', 'WEIGHTS', 'OtherWeights', 'WeightsError', 'cached_file', 'check_file',
    'check_reach', 'checkout', 'download', 'explain', 'explained', 'find_entry', 'find_weights', 'hub_id',
    'is_out_of_reach', 'local_file', 'manifest_revision', 'named_entry', 'namespace', 'own_zoo', 'published_names',
    'read_manifest', 'sha256', 'split_revision', 'with_weights']

_logger = logging.getLogger(__name__)

NAMESPACE = 'convnn-timm'  # owner of the repositories on the Hub
PACKAGE = Path(__file__).parents[1]
MANIFEST = Path(__file__).with_name('manifest.json')
MODEL_CARDS = 'model_cards'  # folder of the published weights: in a checkout's root, else in the installed package
WEIGHTS = 'model.safetensors'
FORMATS = {'.safetensors', '.bin', '.pt', '.pth', '.tar'}  # suffixes of the files of weights that timm opens

# Seconds that the Hub may take to answer before it counts as out of reach; HF_HUB_ETAG_TIMEOUT sets another number.
PATIENCE = 3
# What the Hub's client raises when something outside this program fails.
HUB_FAILURES = (HTTPError, OSError, EntryNotFoundError, HFValidationError)
# What its transfers raise besides: RuntimeError of hf_xet, ValueError where the storage refuses a file. Either may wrap
# one of the failures above, which then says more.
TRANSFER_FAILURES = (*HUB_FAILURES, RuntimeError, ValueError)


class WeightsError(UserError, RuntimeError):
    """Weights cannot be found, fetched or trusted; the message says what to do."""


class OtherWeights(WeightsError):
    """A file matches the Hub's hash of it, but not the manifest's."""


# The manifest

def read_manifest() -> Dict[str, Dict[str, Any]]:
    """The weights that this version knows, by name `<arch>.<tag>`."""
    return {entry['name']: entry for entry in json.loads(MANIFEST.read_text())}


def published_names() -> List[str]:
    """Names of the weights that the project publishes. The manifest of a checkout may hold others, for a trial."""
    return [name for name, entry in read_manifest().items() if entry['published']]


def namespace() -> str:
    """Owner of the repositories: `CONVNN_TIMM_NAMESPACE`, else the project."""
    return os.environ.get('CONVNN_TIMM_NAMESPACE') or NAMESPACE


def hub_id(entry: Dict[str, Any]) -> str:
    """Repository of a published weight on the Hub."""
    return f'{namespace()}/{entry["name"]}' if os.environ.get('CONVNN_TIMM_NAMESPACE') else entry['hub_id']


def manifest_revision(entry: Dict[str, Any]) -> Optional[str]:
    """Commit that holds this weight; None if it was not pushed, or was pushed to another namespace."""
    return entry['revision'] if hub_id(entry) == entry['hub_id'] else None


def find_entry(repo: str) -> Optional[Dict[str, Any]]:
    """The manifest's entry for a repository; with `@revision`, only if the manifest has that revision."""
    repo, revision = split_revision(repo)
    for entry in read_manifest().values():
        if hub_id(entry) == repo and revision in (None, manifest_revision(entry)):
            return entry
    return None


def split_revision(repo: str) -> Tuple[str, Optional[str]]:
    repo, _, revision = repo.partition('@')
    return repo, revision or None


def with_weights(cfgs: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Add the weights in the manifest to a model file's configurations.

    Args:
        cfgs: The default configuration of each architecture, by `<arch>.<tag>`, or by `<arch>` if it has no tag.

    Returns:
        The configurations of further tags, then the defaults, marked by a star: with it, timm's `generate_default_cfgs`
        keeps them the default, whichever tags have weights.
    """
    published = {}
    for name, entry in read_manifest().items():
        cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in entry['pretrained_cfg'].items()}
        published[name] = dict(cfg, hf_hub_id=entry['hub_id'])
    default = {f'{name}*' if '.' in name else f'{name}.*': {**cfg, **published.get(name, {})}
               for name, cfg in cfgs.items()}
    architectures = {name.partition('.')[0]: cfg for name, cfg in cfgs.items()}
    further = {
        name: {**architectures[name.partition('.')[0]], **cfg} for name, cfg in published.items()
        if name not in cfgs and name.partition('.')[0] in architectures}
    return {**further, **default}


def named_entry(variant: str, cfg: PretrainedCfg) -> Optional[Dict[str, Any]]:
    """The manifest's entry for the weights of a configuration; None if it names other weights, or none."""
    entry = read_manifest().get(f'{variant}.{cfg.tag}')
    others = cfg.state_dict is not None or cfg.file or cfg.source == 'hf-hub'
    return entry if entry and not others and cfg.hf_hub_id == entry['hub_id'] else None


# Files

def checkout() -> Optional[Path]:
    """Root of the source tree that the package is imported from; None if it is an installed copy."""
    root = PACKAGE.parent
    return root if (root / 'pyproject.toml').is_file() and (root / MODEL_CARDS).is_dir() else None


def own_zoo() -> Path:
    """Folder of the weights that came with the package."""
    return (checkout() or PACKAGE) / MODEL_CARDS


def local_file(name: str) -> Optional[Path]:
    """The weight in the folder that `CONVNN_TIMM_ZOO` names, else the package's own; None if it is in neither.

    Raises:
        WeightsError: `CONVNN_TIMM_ZOO` names no folder.
    """
    zoo = os.environ.get('CONVNN_TIMM_ZOO')
    if zoo and not Path(zoo).is_dir():
        raise WeightsError(f'CONVNN_TIMM_ZOO={zoo}: there is no such folder. Correct or unset the variable.')
    files = [Path(folder) / name / WEIGHTS for folder in (zoo, own_zoo()) if folder]
    return next((file for file in files if file.is_file()), None)


def sha256(file: Union[str, Path]) -> str:
    digest = hashlib.sha256()
    with open(file, 'rb') as f:
        while block := f.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


def check_file(file: Path, expected: Optional[str] = None, source: str = '') -> None:
    """Make sure that a safetensors file is what was published.

    Args:
        file: The file.
        expected: Its sha256. Where it is not given, a link into the Hub's cache has it: large files are named by it.
        source: What `convnn-timm pull` fetches it by: a name or a repository.

    Raises:
        OtherWeights: The file is whole in the Hub's cache, but is not the one expected.
        WeightsError: The file is damaged, no safetensors file, or another.
    """
    what = f'{file} of {source}' if source else str(file)
    unused = '. None of it was used' if source else ''
    repair = f'{unused}. Fetch it again: convnn-timm pull {source}' if source else ''
    try:
        with safe_open(file, 'pt'):
            pass
    except SafetensorError as error:
        raise WeightsError(f'{what} is cut short or no safetensors file ({error}){repair}') from error
    own = Path(os.readlink(file)).name if file.is_symlink() else ''
    own = own if re.fullmatch('[0-9a-f]{64}', own) else ''
    expected = expected or own
    if not expected or (found := sha256(file)) == expected:
        return
    hashes = f'its sha256 is {found[:12]}…, published is {expected[:12]}…'
    if found == own:
        raise OtherWeights(
            f'{what} is whole, but holds other weights than this version of convnn_timm knows ({hashes}): update it, '
            f'or load these as hf-hub:OWNER/NAME')
    if own:
        raise WeightsError(f'{what} is damaged: {hashes}{repair}')
    keep = f'{unused}. If it is damaged, convnn-timm pull {source} replaces it; other weights load as ' \
        f'local-dir:{file.parent}' if source else ''
    raise WeightsError(f'{what} is not the published file: it is damaged, or holds other weights ({hashes}){keep}')


def find_weights(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Find and check the weights of a model that is created with `pretrained=True`.

    Published weights come from a local folder (`local_file`), else from the Hub. Weights that the caller names are
    fetched and checked if they are a repository, and opened if they are a file.

    Args:
        variant: Name of the architecture.
        kwargs: Arguments of timm's entrypoint.

    Returns:
        Arguments that lead timm to the checked file; those given, if there are no weights.

    Raises:
        WeightsError: The weights cannot be fetched, or are damaged.
    """
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    if cfg.state_dict is None and cfg.file:
        check_named(Path(cfg.file))
        return kwargs
    if cfg.state_dict is not None or not cfg.hf_hub_id:
        return kwargs

    entry = named_entry(variant, cfg)
    by_name = entry is not None
    if by_name:
        source, repo, revision, file = entry['name'], hub_id(entry), manifest_revision(entry), local_file(entry['name'])
    else:  # hf-hub:OWNER/NAME
        entry, source, file = find_entry(cfg.hf_hub_id), cfg.hf_hub_id, None
        repo, revision = split_revision(source)
    if file is None:
        hint = '. The weights of this version are not on the Hub yet: install the package again, which brings them, ' \
            'or set CONVNN_TIMM_ZOO to the model_cards of a checkout' if entry and entry['revision'] is None else ''
        with explained(repo, revision, hint):
            file = download(repo, WEIGHTS, revision, kwargs.get('cache_dir'))
    try:
        check_file(file, entry and entry['sha256'], source)
    except WeightsError as error:
        # Whoever names a repository without a commit gets its newest weights, whole by the Hub's own hash.
        newer = not (by_name or revision) and (
            isinstance(error, OtherWeights) or not file.is_symlink() and sha256(file) == hub_sha256(repo))
        if newer:
            _logger.warning(f'hf-hub:{repo} holds other weights than those that this version of convnn_timm lists')
        elif cache := kwargs.get('cache_dir'):
            raise type(error)(f'{error} (with HF_HUB_CACHE={cache}, where this file is)') from None
        else:
            raise
    return dict(kwargs, pretrained_cfg_overlay=dict(overlay, source='', file=str(file)))


def check_named(path: Path) -> None:
    """Make sure that a file or folder that the caller names holds weights; a safetensors file must be whole."""
    if path.is_dir():
        if not any(file.suffix in FORMATS for file in path.iterdir()):
            raise WeightsError(f'{path} holds no weights ({WEIGHTS})')
        path = path / WEIGHTS
    elif not path.is_file():
        raise WeightsError(f'there is no file {path}')
    if path.suffix == '.safetensors' and path.is_file():
        check_file(path)


def download(repo: str, name: str, revision: Optional[str] = None, cache_dir: Optional[str] = None) -> Path:
    """Bring a file of a repository into the cache; if the Hub is out of reach, it must be there already."""
    if is_out_of_reach(repo, revision):
        return cached_file(repo, name, revision, cache_dir)
    return Path(hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir))


def cached_file(repo: str, name: str, revision: Optional[str] = None, cache_dir: Optional[str] = None) -> Path:
    """A file of a repository in the cache.

    (`hf_hub_download` with `local_files_only` sends a request of its own and waits for the answer.)
    """
    file = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
    if not isinstance(file, str):
        raise LocalEntryNotFoundError(f'{name} of {repo} is not in the cache')
    return Path(file)


def patience() -> int:
    return constants.HF_HUB_ETAG_TIMEOUT if os.environ.get('HF_HUB_ETAG_TIMEOUT') else PATIENCE


def is_out_of_reach(repo: str, revision: Optional[str] = None) -> bool:
    """Whether the Hub does not answer: the connection fails, or nothing comes within `patience()` seconds.

    The Hub's client would try for half a minute where the connection is refused, and for minutes where a server is
    silent. In offline mode nothing is asked: the client refuses at once.
    """
    refused = threading.Event()

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repo, WEIGHTS, revision=revision), timeout=patience())
        except HfHubHTTPError:
            pass  # an answer
        except HTTPError as error:
            while error is not None and not isinstance(error, OSError):  # which the system raises without connection
                error = error.__cause__ or error.__context__
            if error is not None:
                refused.set()
        except Exception:
            pass  # the client will meet and report it

    if constants.HF_HUB_OFFLINE:
        return False
    # In a thread, which can be left behind: looking up a name has no time limit, and a server may send byte by byte.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience())
    return asking.is_alive() or refused.is_set()


def check_reach(name: str) -> None:
    """Make sure that timm can load a network's weights from the Hub or its cache; it would try for a minute.

    Args:
        name: Name of a network in timm. (Those of this package look for their weights themselves.)

    Raises:
        WeightsError: The Hub is out of reach, and the weights are not in the cache.
    """
    own = is_model_in_modules(name, {'convnn_resnet', 'convnn_vgg'})
    cfg = None if own else get_pretrained_cfg(name)
    repo = cfg.hf_hub_id if cfg else None
    files = WEIGHTS, 'pytorch_model.bin'  # timm takes the second where the first is missing
    if repo and not any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
        if is_out_of_reach(repo):
            with explained(repo):
                cached_file(repo, WEIGHTS)


def hub_sha256(repo: str) -> str:
    """The Hub's hash of the weights in a repository, or ''. (A cache without links does not know it.)"""
    try:
        return get_hf_file_metadata(hf_hub_url(repo, WEIGHTS), timeout=patience()).etag or ''
    except TRANSFER_FAILURES:
        return ''


@contextmanager
def explained(repo: str, revision: Optional[str] = None, hint: str = '') -> Iterator[None]:
    """Turn a failed transfer into a WeightsError with the words of `explain` and a hint."""
    try:
        yield
    except WeightsError:
        raise
    except TRANSFER_FAILURES as error:
        # For a missing entry or offline mode the client's error adds nothing.
        cause = None if isinstance(error, (EntryNotFoundError, OfflineModeIsEnabled)) else error
        raise WeightsError(explain(error, repo, revision) + hint) from cause


def explain(error: BaseException, repo: str, revision: Optional[str] = None) -> str:
    """Say in one line what went wrong with a repository: a next step where there is one, else the client's message.

    Args:
        error: One of `TRANSFER_FAILURES`.
        repo: The repository, `owner/name`, or only its owner.
        revision: Its branch, tag or commit.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    answer = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    whole, hub = f'{repo}@{revision}' if revision else repo, constants.ENDPOINT
    log_in = 'log in with `hf auth login`, or set HF_TOKEN'

    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        if '/' not in repo:
            return 'offline mode is on: unset HF_HUB_OFFLINE'
        return f'{whole} is not in the cache, and offline mode is on. Unset HF_HUB_OFFLINE and run once: ' \
            f'convnn-timm pull {whole}'
    if answer is None and isinstance(error, LocalEntryNotFoundError):
        return f'{whole} is not in the cache, and the Hub ({hub}) cannot be reached. Try again with a connection; ' \
            'HF_HUB_ETAG_TIMEOUT=30 waits longer for a slow one'
    if isinstance(answer, GatedRepoError):
        return f'{repo} is for those who were given access: ask for it at {hub}/{repo}, and {log_in}'
    if isinstance(answer, RepositoryNotFoundError):
        hidden = 'your token may not see it' if get_token() else f'you must {log_in}'
        return f'there is no repository {repo} on the Hub ({hub}), or it is private and {hidden}'
    if answer is not None and answer.response.status_code == 401:
        return f'the Hub does not know {"your token" if get_token() else "you"}, asked for {whole}: {log_in}'
    said = ' '.join(str(answer or error).split()) or type(error).__name__
    return f'{whole}: {said[:500]}'
