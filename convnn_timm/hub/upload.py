"""To the Hub: push the folder of a published weight, and check what arrived."""
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Optional, Tuple, Union

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

from convnn_timm.models import _weights
from convnn_timm.models._weights import FORMATS, WeightsError, checkout, explained, namespace
from .download import fetch
from .folder import (
    CARD, ENTRY, check_folder, files_of, is_exported, unknown_files, warn_of_empty_fields, weight_name)
from .manifest import read_entry, write_entry, write_entry_file

__all__ = ['push']

NEW_TOKEN = f'{constants.ENDPOINT}/settings/tokens makes one with write access'


def push(
        folder: Path,
        owner: Optional[str] = None,
        private: bool = False,
        revision: Optional[str] = None,
) -> Tuple[str, str, bool]:
    """Bring a published weight's folder to the Hub, check what arrived there, and record its commit.

    The client sends and commits only what differs, so an interrupted call can be repeated.

    Args:
        folder: The folder, its name that of the weight.
        owner: User or organization, the project's by default.
        private: Make a private repository; one that is there already must be private.
        revision: Branch, made if it is not there; `main` by default.

    Returns:
        Repository, commit, and whether the commit is new.

    Raises:
        WeightsError: No token, no right to write, damaged files, or the Hub failed.
    """
    owner = owner or namespace()
    name = weight_name(folder)
    repo = f'{owner}/{name}'
    if not folder.is_dir():
        raise WeightsError(f'there is no folder {folder}')
    check_access(owner)  # before any file is read
    entry = read_entry(folder)
    if entry is None:
        raise WeightsError(f'{name} is not in the manifest: make its folder with convnn-timm export')
    problems = [f'{folder / path} is not a file that export writes: move it away' for path in unknown_files(folder)]
    if problems := problems or check_folder(folder, entry):
        raise WeightsError('\n'.join(['nothing was sent:', *problems]))
    warn_of_empty_fields(folder)

    api, files = HfApi(), files_for(repo, folder)
    with explained(repo, revision, ', what was sent is kept'):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise WeightsError(
                f'{repo} is there already, and public: nothing was sent. {constants.ENDPOINT}/{repo}/settings makes it '
                f'private')
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.model_info(repo, revision=revision)
        others = [file.rfilename for file in before.siblings or () if file.rfilename not in files]
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        operations += [CommitOperationDelete(path) for path in others if is_replaced(path)]
        commit = api.create_commit(repo, operations, commit_message=f'Upload {name}', revision=revision).oid

    check_remote(repo, commit, files, entry)
    entry = dict(entry, hub_id=repo, revision=commit)
    if checkout() and not (folder / ENTRY).is_file():
        write_entry(entry)
    elif _weights.PACKAGE not in folder.resolve().parents:  # an installed copy stays as it is
        write_entry_file(entry, folder)
    return repo, commit, commit != before.sha


def check_access(owner: str) -> None:
    """Make sure that there is a token, that the Hub knows it, and that it may write under that name."""
    if not get_token():
        raise WeightsError(f'you are not logged in: run `hf auth login`, or set HF_TOKEN; {NEW_TOKEN}')
    with explained(owner):
        user = HfApi().whoami()
    token = (user.get('auth') or {}).get('accessToken', {})
    if token.get('role') == 'read' or 'repo.write' not in str(token.get('fineGrained', 'repo.write')):
        raise WeightsError(f"the token of {user['name']} can only read: {NEW_TOKEN}")
    roles = {user['name']: 'admin', **{org['name']: org.get('roleInOrg') for org in user.get('orgs', [])}}
    own = [name for name, role in roles.items() if role != 'read']
    if owner not in own:
        raise WeightsError(f"{user['name']} may not write to {owner}: choose --namespace {' or '.join(own)}")


def files_for(repo: str, folder: Path) -> Dict[str, Union[Path, bytes]]:
    """What the repository of a folder's weight holds: its files, and a card that names this repository.

    The card's code names it too, except in the project's own: its weights have a name in each installed package.
    """
    name, link = re.escape(weight_name(folder)), f'hf-hub:{repo}'
    card = re.sub(rf'hf-hub:[\w.-]+/{name}(?![\w-])', link, (folder / CARD).read_text(encoding='utf-8'))
    if repo.partition('/')[0] != _weights.NAMESPACE:
        card = re.sub(rf"create_model\('{name}'", f"create_model('{link}'", card)
    return {**{path: file for path, file in files_of(folder).items() if path != ENTRY}, CARD: card.encode()}


def content_of(file: Union[Path, bytes]) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def is_replaced(path: str) -> bool:
    """Whether a push removes a file that its folder lacks: one of a former export, or other weights. The rest stays."""
    return is_exported(path) or '/' not in path and PurePosixPath(path).suffix in FORMATS


def check_remote(repo: str, commit: str, files: Dict[str, Union[Path, bytes]], entry: Dict[str, Any]) -> None:
    """Download what was pushed, compare each file, and compute the golden logits with it."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = fetch(repo, commit, Path(scratch) / entry['name'])
        arrived = files_of(copy)
        problems = [
            f'{path} differs from the file that was sent' for path, file in files.items()
            if path not in arrived or arrived[path].read_bytes() != content_of(file)]
        problems += check_folder(copy, entry)
    if problems:
        raise WeightsError('\n'.join([f'{repo} is not what was sent, and is not recorded. Push again:', *problems]))
