"""Registers the models with timm, in whatever order packages are imported, and runs scripts that do not know them.

PyTorch calls `install` at the end of `import torch` (entry point in the group `torch.backends`), and so does
`import convnn_timm`. It imports nothing but leaves a finder on `sys.meta_path`. As soon as `timm.models` has been
executed, the finder imports `convnn_timm.models`, which registers the models, and goes away.
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` keeps PyTorch from calling; `import convnn_timm` and `run_script` still work.

Who sees an error if the models cannot be registered:

* `import torch` and `import timm` never fail: the finder turns whatever goes wrong into one warning.
* `import convnn_timm` when timm is already there raises it, and so do `run_script` and `import convnn_timm.models`:
  their caller asked for the models. After the finder's warning, only the last two do: Python executes a package once.
"""
import functools
import importlib
import os
import re
import sys
import warnings

_TIMM_REQUIRED = (1, 0, 31)


class _RegisterAfterTimm:
    """Finder whose loader of `timm.models` registers the models after it has executed that package.

    The models need all of `convnn_timm.layers`. So the layers must not import timm, which would import the models.
    """

    def find_spec(self, name, path=None, target=None):
        if name != 'timm.models':
            return None
        try:
            others = (finder for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
            if spec is not None:
                spec.loader.exec_module = functools.partial(self._execute, spec.loader.exec_module)
            return spec
        except Exception as error:
            _warn(error)
            return None  # Python goes on to the other finders, as if this one had never been

    def _execute(self, exec_module, module):
        del module.__spec__.loader.exec_module  # the loader is its own again
        exec_module(module)
        _register_or_warn()


_finder = _RegisterAfterTimm()


def install() -> None:
    """Registers the models as soon as timm has been imported. Imports nothing before that, and never raises."""
    if 'timm.models' in sys.modules:
        _register_or_warn()
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def register() -> None:
    """Registers the models with timm now.

    Raises:
        ImportError: timm is older than this package needs, or whatever else importing the models raises.
    """
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    require_timm()
    importlib.import_module('convnn_timm.models')


def require_timm() -> None:
    """Raises ImportError with the way out if timm is older than this package needs."""
    import timm.version
    version = timm.version.__version__
    if tuple(map(int, re.findall(r'\d+', version)[:3])) < _TIMM_REQUIRED:
        required = '.'.join(map(str, _TIMM_REQUIRED))
        raise ImportError(
            f'convnn_timm needs timm {required} or newer, found {version} in {os.path.dirname(timm.version.__file__)}: '
            f"pip install --upgrade 'timm>={required}'")


def timm_is_imported() -> bool:
    """Whether `timm.models` has been executed to its end."""
    module = sys.modules.get('timm.models')
    return module is not None and not getattr(module.__spec__, '_initializing', False)


def run_script(script: str, args: list[str]) -> None:
    """Runs a Python script as `python SCRIPT ARGS` would, with the models registered.

    As with `python`, the script's folder comes first in the search for modules: a script inside a checkout of timm
    imports that checkout's timm, not the installed one. Copy timm's scripts out of it first.

    Args:
        script: Path of the script, such as timm's train.py.
        args: Its command line arguments.

    Raises:
        SystemExit: With status 2 if there is no such file, else as the script does.
        ImportError: The models cannot be registered.
    """
    if not os.path.isfile(script):
        print(f'convnn-timm: error: no such script: {script}', file=sys.stderr)
        raise SystemExit(2)
    import runpy
    sys.argv = [script, *args]
    sys.path.insert(0, os.path.dirname(os.path.realpath(script)))
    register()
    runpy.run_path(script, run_name='__main__')


def _register_or_warn() -> None:
    try:
        register()
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(
        f'convnn_timm could not register its models with timm ({type(error).__name__}: {error}). timm works without '
        f'them; `import convnn_timm.models` shows the full error.', RuntimeWarning, stacklevel=2)
