"""The kernel's lock on an open file or folder, which ends with its process, however that dies.

Not the library `filelock`: it opens, and empties, a file of its own, while folders and files with content are locked here. And where
there are no locks it takes a file for one, which a killed process leaves behind.
"""

import errno
import fcntl

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def take(descriptor: int, is_waiting: bool = False) -> bool:
    """Whether the lock is ours now, until the descriptor and its copies are closed; False where the file system has no locks.

    BlockingIOError where another process holds it, unless this one is to wait.
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
