"""The command `convnn-timm`: parser.py reads it, terminal.py talks to the user, and each other file holds commands.

A command only parses, calls the library and prints. It imports what it needs when it runs, so `convnn-timm --help`
answers at once.
"""
from .parser import main

__all__ = ['main']
