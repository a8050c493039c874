"""What a user can put right. The command line prints the message, which says how, instead of a traceback."""

__all__ = ['UserError']


class UserError(Exception):
    """A failure that is no bug; `code` is the exit status of a command, 2 for a wrong call, 1 for everything else."""
    code = 1
