"""`train`, and `run` for scripts that know nothing of this package."""
import argparse
from typing import Callable, List

from .terminal import CommandError, importing


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    # For the help only: `train` has a parser of its own.
    add('train', train, "train a model, with the arguments and recipes of timm's train.py", 'train')

    sub = add(
        'run', run, "run a script such as timm's, which then finds the models by name",
        'run validate.py --model resnet18_convnn --checkpoint last.pth.tar --data-dir data --device cpu\n'
        'run train.py --model resnet18_convnn_branching --data-dir data')
    sub.add_argument('script', metavar='SCRIPT', help='Python file')
    sub.add_argument('args', nargs=argparse.REMAINDER, metavar='ARGS', help='its arguments').required = False


def train(argv: List[str]) -> int:
    with importing('PyTorch'):
        from convnn_timm.train.engine import main
    try:
        main(argv)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise CommandError(stop.code.removeprefix('error: ')) from stop
        return stop.code or 0  # of --help, a wrong call or an interruption, of which the trainer has told
    return 0


def run(args: argparse.Namespace) -> int:
    from convnn_timm.autoload import run_script
    run_script(args.script, args.args)
    return 0
