"""What a user can put right. The command line prints the message, which says how, instead of a traceback."""
from typing import Optional

__all__ = ['UserError', 'printable']


class UserError(Exception):
    """A failure that is no bug; `code` is the exit status of a command, 2 for a wrong call, 1 for everything else."""
    code = 1

    def __init__(self, message: str = '', code: Optional[int] = None):
        super().__init__(message)
        if code is not None:
            self.code = code


def printable(text: object, keep: str = '') -> str:
    """Text as a terminal can show it: control characters and bytes that are no UTF-8 are escaped, except `keep`."""
    return ''.join(c if c.isprintable() or c in keep else c.encode('unicode_escape').decode() for c in str(text))
