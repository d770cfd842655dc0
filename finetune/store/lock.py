"""The kernel's lock on an open file or folder. It ends with its process, however that dies.

The library `filelock` does not fit: it opens and empties its own file, and we lock folders and files with content. Without locks in
the file system it uses a file as a lock, and a killed process leaves that behind.
"""

import errno
import fcntl
import os
from pathlib import Path

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def take(descriptor: int, is_waiting: bool = False) -> bool:
    """Takes the lock until the descriptor and its copies are closed; False if the file system has no locks.

    BlockingIOError if another process holds it, unless this one waits.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock on a file; False also without a file, or without locks in the file system."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        take(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
