"""`convnn-timm COMMAND`, which `python -m convnn_timm COMMAND` is too: the parser, and what an error becomes.

What a user can get wrong raises `UserError` and becomes one line; a traceback means a bug.
"""
import argparse
import difflib
import importlib
import io
import os
import sys
from typing import Callable, Dict, Iterable, List, NoReturn, Optional

from convnn_timm import __version__
from convnn_timm.errors import UserError

from . import export_onnx, hub, inspect, predict, start, train
from .terminal import INTERRUPTED, CommandError, importing, report

__all__ = ['build_parser', 'main']

GROUPS = {  # of commands in the help, and the files that hold them
    'first steps': (start,),
    'use a network': (predict, inspect, export_onnx),
    'train': (train,),
    'publish weights': (hub,),
}


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command.

    Args:
        argv: The words after `convnn-timm`, those of this process by default.

    Returns:
        The exit status: 0, 1 for a failure, 2 for a wrong call, 130 if interrupted.
    """
    argv = (sys.argv[1:] if argv is None else list(argv)) or ['--help']
    try:
        try:
            if argv[0] == 'train':
                return train.train(argv[1:])
            args = parse(argv)
            if args.command is not train.run:
                return execute(args)
        except UserError as error:
            report(str(error), error.code)
            return error.code
        except BrokenPipeError:  # `convnn-timm list | head`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            if error.errno is None:  # not the system's
                raise
            report(f'{error.filename}: {error.strerror}' if error.filename else error.strerror)
            return 1
        return train.run(args)  # the errors of a script are its own
    except KeyboardInterrupt:
        report('interrupted', INTERRUPTED)
        return INTERRUPTED


def parse(argv: List[str]) -> argparse.Namespace:
    parser = build_parser()
    if not argv[0].startswith('-') and argv[0] not in parser.commands:
        raise CommandError(unknown_command(argv[0], parser.commands), code=2)
    return parser.parse_args(argv)


def unknown_command(name: str, commands: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, commands)
    hint = f'did you mean {" or ".join(close)}?' if close else 'there are ' + ', '.join(commands)
    return f'unknown command {name!r}; {hint} (see convnn-timm --help)'


def execute(args: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # print what the terminal cannot show as \x.., not fail
        sys.stdout.reconfigure(errors='backslashreplace')
    if args.command is not start.quickstart:  # which reports its steps itself
        with importing('PyTorch'):
            importlib.import_module('timm')
    return args.command(args) or 0


class Parser(argparse.ArgumentParser):
    """argparse with examples in their own layout, and errors without the usage text in front."""
    commands: Dict[str, 'Parser'] = {}

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f'{message} (see {self.prog} --help)', code=2)


def build_parser() -> Parser:
    """The parser of all commands; each file of `GROUPS` adds its own."""
    parser = Parser(
        prog='convnn-timm',
        usage='convnn-timm COMMAND ...',
        description='Convolution over nearest neighbours (ConvNN) for timm.',
        epilog='New here? Run `convnn-timm quickstart`.\nEach command explains itself: `convnn-timm predict --help`.',
    )
    parser.add_argument('--version', action='version', version=f'convnn-timm {__version__}')
    commands = parser.add_subparsers(prog=parser.prog, metavar='COMMAND', required=True, help=argparse.SUPPRESS)
    parser.commands = commands.choices

    def add(name: str, command: Callable, summary: str, examples: str) -> Parser:
        parser.description += f'\n  {name:<13}{summary}'
        sub = commands.add_parser(
            name,
            description=summary[0].upper() + summary[1:] + '.',
            epilog='examples:\n' + '\n'.join(f'  convnn-timm {line}' for line in examples.splitlines()),
        )
        sub.set_defaults(command=command)
        return sub

    for title, files in GROUPS.items():
        parser.description += f'\n\n{title}:'
        for file in files:
            file.add_commands(add)
    return parser
