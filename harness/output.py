"""Lines that nobody has to read: whoever listened may go away, the work goes on."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def say(text: str, file: TextIO | None) -> bool:
    """Write one line and flush; False once the stream is gone (closed pipe, full disk), which is then silenced.

    Characters that the stream's encoding lacks are written as backslash escapes.
    """
    if file is None:  # Python's own sign for a stream that was closed before it started
        return False
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        file.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        file.flush()
    except (OSError, ValueError):  # ValueError: a Python file object that was closed
        mute(file)
        return False
    return True


def settle(file: TextIO | None) -> None:
    """Flush what a command wrote. A reader who left is no error; any other failure raises OSError.

    Without this the interpreter would flush at exit, fail there, print noise and exit with 120.
    """
    if file is None or file.closed:
        return
    try:
        file.flush()
    except OSError as e:
        mute(file)
        if not isinstance(e, BrokenPipeError):
            raise


def mute(file: TextIO | None) -> None:
    """Point the stream's descriptor at /dev/null, for this process and those it becomes or starts."""
    try:
        fd = file.fileno() if file is not None else -1
        if fd >= 0:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, fd)
            os.close(nowhere)
    except (OSError, ValueError):
        return  # not backed by a descriptor: nothing will be flushed at exit either


def note(text: str) -> None:
    """One line on standard output, if anybody listens."""
    say(text, sys.stdout)
