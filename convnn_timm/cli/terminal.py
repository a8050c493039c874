"""What a command says beside its result, all of it on stderr."""
import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import Iterator

from convnn_timm.errors import UserError, printable

__all__ = ['INTERRUPTED', 'CommandError', 'announced', 'importing', 'note', 'one_line', 'report', 'say', 'wrong_values']

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
PATIENCE = 2.  # seconds of silence


class CommandError(UserError):
    """A command cannot do what it was asked for."""


def report(message: str, code: int = 1) -> None:
    sys.stdout.flush()  # what was said before comes first, also where both streams go to one file
    say(message if code == INTERRUPTED else f'error: {message}')


def note(message: str) -> None:
    say(f'note: {message}')


def say(message: str) -> None:
    print(f'convnn-timm: {printable(message, keep=chr(10))}', file=sys.stderr, flush=True)


@contextmanager
def announced(work: str) -> Iterator[None]:
    """Say what takes so long, once it has taken `PATIENCE` seconds."""
    timer = threading.Timer(PATIENCE, say, [f'{work} ...'])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def importing(what: str) -> Iterator[None]:
    """Announce a long import, which Ctrl-C ends with the process: as an exception, it may get lost in an extension."""
    def stop(*_) -> None:
        report('interrupted', INTERRUPTED)
        os._exit(INTERRUPTED)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    in_charge = usual and threading.current_thread() is threading.main_thread()  # others cannot set a handler
    if in_charge:
        signal.signal(signal.SIGINT, stop)
    try:
        with announced(f'loading {what}'):
            yield
    finally:
        if in_charge:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def wrong_values() -> Iterator[None]:
    """What the library refuses is for the user to correct."""
    try:
        yield
    except ValueError as error:
        raise CommandError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:299]}…'
