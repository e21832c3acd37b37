"""Run a command that ends when the process that started it ends, even by SIGKILL.

    python -I attached.py PARENT COMMAND ...

PARENT is the id of that process. On Linux the kernel is asked for it (PR_SET_PDEATHSIG, which
outlives the exec); elsewhere the command outlives its parent, and the lock of its cell says so.
The file is run by its path and imports nothing of the package, so that it starts in no time.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        sys.exit(1)
    os.execv(command[0], command)
