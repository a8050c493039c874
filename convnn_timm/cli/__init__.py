"""The command `convnn-timm`."""
from .commands import main

__all__ = ['main']
