"""A small Hugging Face Hub on the loopback interface, for tests: it speaks what the real client asks of it.

    with Hub() as hub:
        hub.add_user('hf_secret', 'alice')
        hub.fail('PUT', '/lfs/', 'cut')         # the next upload loses its connection
        subprocess.run(..., env={**os.environ, **hub.environment(home)})

Repositories live in memory: a branch or tag is the name of a commit, a commit a dictionary from paths to contents.
Large files go to and come from `localhost`, the Hub itself is `127.0.0.1`: like the real storage, another host.
"""
import base64
import hashlib
import json
import re
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union
from urllib.parse import unquote, urlsplit

__all__ = ['Hub', 'sha256']

LARGE = ('.safetensors', '.png', '.bin')  # suffixes of the files that the Hub keeps in large file storage (LFS)
User = namedtuple('User', 'name role orgs permissions')


class Failure(Exception):
    """An answer that is an error; `code` and `message` go into the headers that the client reads."""

    def __init__(self, status: int, code: str = '', message: str = ''):
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class Repository:
    """Commits by their id, and the ids that branches and tags stand for."""

    def __init__(self, private: bool):
        self.private, self.gated = private, False
        self.commits: Dict[str, Dict[str, bytes]] = {}
        self.branches: Dict[str, str] = {}
        self.tags: Dict[str, str] = {}
        self.commit('main', {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})

    def commit(self, branch: str, files: Dict[str, bytes]) -> str:
        commit = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str:
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise Failure(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return commit


class Hub:
    """The server; a context manager that starts and stops it.

    Attributes:
        repositories: By id, `owner/name`.
        log: What was asked, `'METHOD path'`, in order.
    """

    def __init__(self) -> None:
        self.repositories: Dict[str, Repository] = {}
        self.storage: Dict[str, bytes] = {}  # large files by their sha256
        self.users: Dict[str, User] = {}
        self.log: List[str] = []
        self.faults: List[list] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (Handler,), {'hub': self}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]

    def __enter__(self) -> 'Hub':
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: Optional[str] = None) -> Dict[str, str]:
        """Environment variables with which a process uses this Hub, and keeps its cache in `home`."""
        return dict(
            HF_ENDPOINT=f'http://127.0.0.1:{self.port}', HF_HOME=str(home), HF_TOKEN=token or '',
            HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE='0',
            NO_PROXY='127.0.0.1,localhost', no_proxy='127.0.0.1,localhost')

    def add_user(
            self,
            token: str,
            name: str,
            role: str = 'write',
            orgs: Union[Tuple[str, ...], Dict[str, str]] = (),
            permissions: Tuple[str, ...] = (),
    ) -> None:
        """Let `token` stand for a user.

        With the role `read` it cannot write; with the role `fineGrained`, if `permissions` hold `repo.write`. `orgs`
        are the user's organizations, with the role in each if it is not `write`.
        """
        orgs = orgs if isinstance(orgs, dict) else dict.fromkeys(orgs, 'write')
        self.users[token] = User(name, role, orgs, permissions)

    def add_repository(self, name: str, files: Dict[str, bytes], private: bool = False) -> str:
        """Make a repository with these files on `main`; returns the commit."""
        self.storage.update({sha256(content): content for path, content in files.items() if path.endswith(LARGE)})
        self.repositories[name] = Repository(private)
        return self.repositories[name].commit('main', dict(files))

    def files(self, name: str, revision: str = 'main') -> Dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.resolve(revision)]

    def asked(self, what: str) -> List[str]:
        """The requests so far in which `what` is found."""
        return [line for line in self.log if what in line]

    def fail(self, method: str, path: str, fault: Any, times: int = 1) -> None:
        """Make the next requests of that method, with a path in which the pattern `path` is found, fail.

        Args:
            method: HTTP method.
            path: Regular expression.
            fault: A status to answer; or `'cut'`: the connection breaks in the middle of the body; `'short'`: the body
                is half as long as it should be, and the headers agree with it; `'flip'`: one bit of it is wrong;
                `'after'`: the request is done, and then answered with 500.
            times: Number of requests.
        """
        self.faults.append([method, re.compile(path), fault, times])

    def take_fault(self, method: str, path: str) -> Any:
        with self.lock:
            for entry in self.faults:
                if entry[0] == method and entry[1].search(path) and entry[3] > 0:
                    entry[3] -= 1
                    return entry[2]


class Handler(BaseHTTPRequestHandler):
    """One connection. Each route is a method with a pattern for method and path; its groups are the arguments."""
    hub: Hub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def answer(self) -> None:
        self.path = urlsplit(self.path).path
        self.hub.log.append(f'{self.command} {self.path}')
        self.fault = self.hub.take_fault(self.command, self.path)
        try:
            if self.fault == 'cut' and self.command != 'GET':
                self.rfile.read(min(1000, int(self.headers.get('Content-Length') or 0)))
                return self.hang_up()
            self.body = self.read_body()
            if isinstance(self.fault, int):
                raise Failure(self.fault, message='injected')
            for pattern, route in ROUTES:
                if match := pattern.fullmatch(f'{self.command} {self.path}'):
                    reply = route(self, *map(unquote, match.groups()))
                    break
            else:
                raise Failure(404, message=f'no such route: {self.command} {self.path}')
            if self.fault == 'after':
                raise Failure(500, message='injected after the work was done')
            if reply is not None:
                self.send(200, json.dumps(reply).encode(), {'Content-Type': 'application/json'})
        except Failure as failure:
            headers = {'X-Error-Code': failure.code, 'X-Error-Message': failure.message}
            self.send(failure.status, b'{}', {name: value for name, value in headers.items() if value})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def send(self, status: int, body: bytes, headers: Dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    # Who may do what

    def user(self) -> Optional[User]:
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        if token and token not in self.hub.users:
            raise Failure(401, message='Invalid credentials in Authorization header')
        return self.hub.users.get(token)

    def readable(self, name: str) -> Repository:
        repository, user = self.hub.repositories.get(name), self.user()
        if repository is None or repository.private and not self.is_own(user, name):
            raise Failure(404 if user else 401, 'RepoNotFound', 'Repository not found')
        if repository.gated and not self.is_own(user, name):
            raise Failure(403 if user else 401, 'GatedRepo', f'Access to model {name} is restricted')
        return repository

    def writable(self, name: str) -> Repository:
        repository, user = self.readable(name), self.user()
        if user is None:
            raise Failure(401, message='Invalid username or password.')
        if not self.may_write(user, name):
            raise Failure(403, message=f'You do not have the required permissions to write to {name}')
        return repository

    @staticmethod
    def is_own(user: Optional[User], name: str) -> bool:
        return user is not None and name.split('/')[0] in (user.name, *user.orgs)

    def may_write(self, user: User, name: str) -> bool:
        allowed = user.role == 'write' or user.role == 'fineGrained' and 'repo.write' in user.permissions
        return allowed and self.is_own(user, name) and user.orgs.get(name.split('/')[0]) != 'read'

    # Routes

    def whoami(self) -> dict:
        user = self.user()
        if user is None:
            raise Failure(401, message='Invalid username or password.')
        token = dict(displayName='test', role=user.role)
        if user.role == 'fineGrained':
            entity = dict(type='user', name=user.name)
            token['fineGrained'] = {'scoped': [dict(entity=entity, permissions=list(user.permissions))], 'global': []}
        return dict(
            type='user', name=user.name, orgs=[dict(name=org, roleInOrg=role) for org, role in user.orgs.items()],
            auth=dict(type='access_token', accessToken=token))

    def create(self) -> dict:
        wanted = json.loads(self.body)
        user = self.user()
        if user is None:
            raise Failure(401, message='Invalid username or password.')
        name = f"{wanted.get('organization') or user.name}/{wanted['name']}"
        if not self.may_write(user, name):
            raise Failure(403, message='You do not have the rights to create a model under this namespace')
        url = {'url': f'http://127.0.0.1:{self.hub.port}/{name}'}
        if name in self.hub.repositories:
            self.send(409, json.dumps(url).encode(), {'Content-Type': 'application/json'})
            return None
        self.hub.repositories[name] = Repository(wanted.get('visibility') == 'private' or bool(wanted.get('private')))
        return url

    def validate(self) -> dict:
        return dict(errors=[], warnings=[])

    def model_info(self, name: str, revision: str = 'main') -> dict:
        repository = self.readable(name)
        commit = repository.resolve(revision)
        siblings = [dict(rfilename=entry['path'], **entry) for entry in describe(repository.commits[commit])]
        return dict(id=name, modelId=name, sha=commit, private=repository.private, siblings=siblings, tags=[])

    def tree(self, name: str, revision: str) -> list:
        repository = self.readable(name)
        return describe(repository.commits[repository.resolve(revision)])

    def refs(self, name: str) -> dict:
        repository = self.readable(name)
        return dict(converts=[], **{
            kind: [dict(name=ref, ref=ref, targetCommit=commit) for ref, commit in refs.items()]
            for kind, refs in (('branches', repository.branches), ('tags', repository.tags))})

    def create_branch(self, name: str, branch: str) -> dict:
        repository = self.writable(name)
        if branch in repository.branches:
            raise Failure(409, message='Reference already exists')
        start = json.loads(self.body or b'{}').get('startingPoint') or 'main'
        repository.branches[branch] = repository.resolve(start)
        return {}

    def create_tag(self, name: str, revision: str) -> dict:
        repository = self.writable(name)
        repository.tags[json.loads(self.body)['tag']] = repository.resolve(revision)
        return {}

    def preupload(self, name: str, revision: str) -> dict:
        repository = self.writable(name)
        present = {entry['path']: entry for entry in describe(repository.commits[repository.resolve(revision)])}
        files = []
        for file in json.loads(self.body)['files']:
            entry = present.get(file['path'], {})
            files.append(dict(
                path=file['path'], uploadMode='lfs' if file['path'].endswith(LARGE) else 'regular', shouldIgnore=False,
                oid=entry.get('lfs', entry).get('oid')))
        return dict(files=files)

    def lfs_batch(self, name: str) -> dict:
        self.writable(name)
        objects = []
        for wanted in json.loads(self.body)['objects']:
            if wanted['oid'] not in self.hub.storage:
                href = f"http://localhost:{self.hub.port}/lfs/{wanted['oid']}"
                verify = f'http://127.0.0.1:{self.hub.port}/{name}.git/info/lfs/verify'
                wanted['actions'] = dict(upload=dict(href=href), verify=dict(href=verify))
            objects.append(wanted)
        return dict(transfer='basic', objects=objects)

    def lfs_upload(self, oid: str) -> None:
        if sha256(self.body) != oid:
            raise Failure(400, message='the content is not what its name says')
        self.hub.storage[oid] = self.body
        self.send(200, b'', {})

    def lfs_verify(self, name: str) -> dict:
        if json.loads(self.body)['oid'] not in self.hub.storage:
            raise Failure(404, message='Object does not exist')
        return {}

    def commit(self, name: str, branch: str) -> dict:
        repository = self.writable(name)
        files = dict(repository.commits[repository.resolve(branch)])
        for line in self.body.splitlines():
            key, value = (json.loads(line)[part] for part in ('key', 'value'))
            if key == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile':
                files[value['path']] = self.hub.storage[value['oid']]
            elif key == 'deletedFile':
                del files[value['path']]
        commit = repository.commit(branch, files)
        return dict(commitUrl=f'http://127.0.0.1:{self.hub.port}/{name}/commit/{commit}', commitOid=commit)

    def file(self, name: str, revision: str, path: str) -> None:
        repository = self.readable(name)
        commit = repository.resolve(revision)
        content = repository.commits[commit].get(path)
        headers = {'X-Repo-Commit': commit}
        if content is None:
            self.send(404, b'', {**headers, 'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found'})
        elif path.endswith(LARGE):
            oid = sha256(content)
            self.send(302, b'', {
                **headers, 'X-Linked-Etag': f'"{oid}"', 'X-Linked-Size': len(content),
                'Location': f'http://localhost:{self.hub.port}/lfs/{oid}'})
        else:
            self.send_content(content, {**headers, 'ETag': f'"{git_sha1(content)}"'})

    def lfs_download(self, oid: str) -> None:
        self.send_content(self.hub.storage[oid], {'ETag': f'"{oid}"'})

    def send_content(self, content: bytes, headers: Dict[str, Any]) -> None:
        status = 200
        if asked := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or ''):
            status, content = 206, content[int(asked[1]):]
        if self.fault == 'flip':
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.fault == 'short':
            content = content[:len(content) // 2]
        if self.fault == 'cut':
            self.send_response(status)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) // 2])
            return self.hang_up()
        self.send(status, content, headers)


ID, REVISION, MODEL = '([^/]+/[^/]+)', '([^/]+)', '/api/models/([^/]+/[^/]+)'
ROUTES = [(re.compile(pattern), route) for pattern, route in (
    ('GET /api/whoami-v2', Handler.whoami),
    ('POST /api/repos/create', Handler.create),
    ('POST /api/validate-yaml', Handler.validate),
    (f'GET {MODEL}', Handler.model_info),
    (f'GET {MODEL}/revision/{REVISION}', Handler.model_info),
    (f'GET {MODEL}/tree/{REVISION}', Handler.tree),
    (f'GET {MODEL}/refs', Handler.refs),
    (f'POST {MODEL}/branch/{REVISION}', Handler.create_branch),
    (f'POST {MODEL}/tag/{REVISION}', Handler.create_tag),
    (f'POST {MODEL}/preupload/{REVISION}', Handler.preupload),
    (f'POST {MODEL}/commit/{REVISION}', Handler.commit),
    (f'POST /{ID}\\.git/info/lfs/objects/batch', Handler.lfs_batch),
    (f'POST /{ID}\\.git/info/lfs/verify', Handler.lfs_verify),
    ('PUT /lfs/([0-9a-f]+)', Handler.lfs_upload),
    ('GET /lfs/([0-9a-f]+)', Handler.lfs_download),
    (f'(?:GET|HEAD) /{ID}/resolve/{REVISION}/(.+)', Handler.file),
)]


def describe(files: Dict[str, bytes]) -> List[dict]:
    """The files of a commit as the Hub lists them."""
    entries = []
    for path, content in sorted(files.items()):
        entry = dict(type='file', path=path, oid=git_sha1(content), size=len(content))
        if path.endswith(LARGE):
            entry['lfs'] = dict(oid=sha256(content), sha256=sha256(content), size=len(content), pointerSize=134)
        entries.append(entry)
    return entries


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
