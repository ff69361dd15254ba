"""What a verification worker can no longer do once it has started: a hook of the interpreter.

The last line behind readers that evaluate no text at all: should a library try to compile a text,
start a process, open a socket or change a file, it gets a `PermissionError` instead.
"""

from __future__ import annotations

import os
import sys

_FORBIDDEN = [
    "os.chmod",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.startfile",
    "os.symlink",
    "os.system",
    "os.truncate",
    "pickle.find_class",
    "pty.spawn",
    "shutil.copyfile",
    "shutil.move",
    "shutil.rmtree",
    "socket.__new__",
    "subprocess.Popen",
    "urllib.Request",
]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Whose texts are their own: imports, generated classes, sympy's numerical functions and products of
# monomials.
_MAY_COMPILE = {
    "_frozen_importlib_external",
    "importlib._bootstrap_external",
    "collections",
    "dataclasses",
    "sympy.polys.monomials",
    "sympy.utilities.lambdify",
}


def seal() -> None:
    """Forbids this process, for good, to run texts, start processes, connect or write files."""
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple) -> None:
    """Raises PermissionError for what a worker has no business doing."""
    if event == "compile":
        caller = sys._getframe(1).f_globals.get("__name__")
        if args[0] is not None and caller not in _MAY_COMPILE:
            raise PermissionError("a verification worker runs no text")
    elif event == "open":
        if isinstance(args[2], int) and args[2] & _WRITES:
            raise PermissionError("a verification worker writes no file")
    elif event in _FORBIDDEN:
        raise PermissionError(f"a verification worker may not do {event}")
