"""Names and values of users in Markdown, shown as they are."""
import re
from typing import Any

__all__ = ['code', 'printable', 'text']


def printable(value: Any) -> str:
    """The value in one line, without control characters."""
    return ''.join(c if c.isprintable() else ' ' for c in str(value))


def text(value: Any) -> str:
    """Markdown that shows the value as it is. (A table escapes the bars in its cells.)"""
    return re.sub(r'([\\`*\[\]<>&~$#]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))', r'\\\1', printable(value))


def code(value: Any) -> str:
    """Markdown that shows the value as code."""
    value = printable(value)
    ticks = '`' * (1 + max(map(len, re.findall('`+', value)), default=0))
    return f'{ticks} {value} {ticks}' if '`' in value else f'{ticks}{value}{ticks}'
