"""From the Hub: fetch published weights, and verify them wherever they are."""
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from convnn_timm.models import _weights
from convnn_timm.models._weights import (
    WEIGHTS, OtherWeights, WeightsError, cached_file, check_file, explained, find_entry, is_out_of_reach,
    local_file, manifest_revision, read_manifest, split_revision)
from .folder import CARD, CONFIG, GOLDEN, check_folder, read_config
from .manifest import read_entry

__all__ = ['fetch', 'pull', 'verify']

_logger = logging.getLogger(__name__)


def verify(what: str) -> Tuple[Path, Optional[Dict[str, Any]], List[str]]:
    """Check a published weight wherever it is.

    Args:
        what: Name of a weight in the manifest, checked where loading finds it; a folder; or a repository,
            `owner/name[@revision]`.

    Returns:
        The folder with its files, its line in the manifest if there is one, and what `check_folder` finds.

    Raises:
        WeightsError: There is no such weight, or its files cannot be fetched.
    """
    if Path(what).is_dir():
        folder = Path(what)
        entry = read_entry(folder)
    else:
        entry, repo, revision = resolve(what)
        local = local_file(what) if what in read_manifest() else None
        folder = local.parent if local else fetch(repo, revision, needed=(CONFIG, WEIGHTS, GOLDEN, CARD))
    return folder, entry, check_folder(folder, entry)


def pull(what: str) -> Path:
    """Download a published weight to where loading looks for it, and replace what is damaged there.

    Args:
        what: Name of a weight in the manifest, or a repository, `owner/name[@revision]`.

    Returns:
        The file of weights, whole.

    Raises:
        WeightsError: It cannot be fetched, is damaged on the Hub too, or would take the place of other weights.
    """
    entry, repo, revision = resolve(what)
    by_name = entry is not None and what == entry['name']
    expected = entry['sha256'] if by_name else None  # a repository may hold newer weights than the manifest
    local = local_file(what) if by_name else None
    if local is None:
        file = fetch_weights(what, repo, revision, expected)
        if not by_name and (file.parent / CONFIG).is_file():
            read_config(file.parent)  # an hf-hub: name is loaded with it
        return file
    try:
        check_file(local, expected)
        return local
    except WeightsError as error:
        if may_be_other(local):
            raise WeightsError(
                f'{local} is not the published file, and nothing shows that it is damaged: it may hold other weights. '
                f'To fetch the published ones, move {local.parent} away first') from error
    whole = fetch_weights(what, repo, revision, expected)
    if is_readable(local):  # it may be somebody's own after all
        old = local.with_suffix('.replaced')
        os.replace(local, old)
        _logger.warning(f'{old} is what was there')
    with tempfile.TemporaryDirectory(dir=local.parent) as scratch:  # on the same disk, to replace it in one step
        os.replace(shutil.copy(whole, scratch), local)
    return local


def resolve(what: str) -> Tuple[Optional[Dict[str, Any]], str, Optional[str]]:
    """Line in the manifest, repository and revision of a name or a repository."""
    entries = read_manifest()
    if entry := entries.get(what):
        return entry, _weights.hub_id(entry), manifest_revision(entry)
    repo, revision = split_revision(what.removeprefix('hf-hub:'))
    if repo.count('/') != 1:
        known = ', '.join(entries) or 'none yet'
        raise WeightsError(f'{what} is no published weight ({known}), no folder, and no repository OWNER/NAME')
    return find_entry(what.removeprefix('hf-hub:')), repo, revision


def is_readable(file: Path) -> bool:
    """Whether a file holds tensors, whichever."""
    try:
        check_file(file)
    except WeightsError:
        return False
    return True


def may_be_other(file: Path) -> bool:
    """Whether a file that is not the published one may be weights of somebody's own."""
    if not is_readable(file):
        return False
    complete = all((file.parent / name).is_file() for name in (CONFIG, GOLDEN, CARD))
    return not complete or not check_folder(file.parent)


def fetch(repo: str, revision: Optional[str], folder: Optional[Path] = None, needed: Sequence[str] = ()) -> Path:
    """Download a repository, into the cache or a folder; returns where it is.

    Without connection, it is taken from the cache. A needed file that the cache lacks is an error, unless the
    repository lacks it too.
    """
    with explained(repo, revision):
        if folder is None and is_out_of_reach(repo, revision):
            return [cached_file(repo, name, revision).parent for name in needed][0]
        found = Path(snapshot_download(repo, revision=revision, local_dir=folder))
        for name in needed:  # the client takes what the cache has for the whole where it cannot ask
            if not (found / name).is_file():
                with suppress(RemoteEntryNotFoundError):
                    hf_hub_download(repo, name, revision=revision, local_dir=folder)
        return found


def fetch_weights(what: str, repo: str, revision: Optional[str], expected: Optional[str]) -> Path:
    """The weights of a repository, whole in the cache; if they were damaged there, they are downloaded again."""
    file = fetch(repo, revision, needed=(WEIGHTS,)) / WEIGHTS
    if not file.is_file():
        raise WeightsError(f'{repo} holds no {WEIGHTS}')
    try:
        check_file(file, expected, what)
    except OtherWeights:
        raise
    except WeightsError:
        file = download_again(file, repo, revision)
        check_file(file, expected, what)
    return file


def download_again(file: Path, repo: str, revision: Optional[str]) -> Path:
    """Download weights in place of a damaged file in the cache."""
    with explained(repo, revision):
        if is_out_of_reach(repo, revision):
            raise WeightsError(
                f'{file} is damaged, and the Hub ({constants.ENDPOINT}) cannot be reached. Try again with a connection')
        if not file.is_symlink():  # the client would leave it there
            file.unlink()
        return Path(hf_hub_download(repo, WEIGHTS, revision=revision, force_download=True))
