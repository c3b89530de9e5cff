"""How a stage ends where something is wrong that is no fault of the code: a line on stderr and an exit status."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from stages.params import ParamsError

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO)
"""Errors that a system gives of a file that the user has to look at, not whoever wrote the code."""


class StageError(RuntimeError):
    """A stage cannot do its work, or found what it checks to be wrong: reported on one line, exit status 1."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full: the system's own, or one of a library that hides it in its words."""
    return getattr(error, "errno", None) in FULL or (any(os.strerror(number) in str(error) for number in FULL))


@contextlib.contextmanager
def reported(name: str) -> Iterator[None]:
    """Ends the process with one line on stderr for what is no fault of the code.

    Exit status: 2 for wrong parameters; 1 for what a stage cannot do, a full disk, a file that may not be used; 130 for
    Ctrl-C. Anything else keeps its traceback.
    """
    try:
        yield
    except ParamsError as error:
        end(str(error), 2)
    except StageError as error:
        end(f"{name}: {error}", 1)
    except KeyboardInterrupt:
        end(f"{name}: interrupted", 130)
    except Exception as error:
        place = getattr(error, "filename", None)
        if is_full(error):
            end(f"{name}: the disk is full{f' ({place})' if place else ''}: make room and run again", 1)
        if isinstance(error, OSError) and error.errno in REFUSED:
            end(f"{name}: {f'{place}: ' if place else ''}{error.strerror}", 1)
        raise


def end(line: str, status: int) -> NoReturn:
    """Ends the process with a line on stderr and this exit status."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)
