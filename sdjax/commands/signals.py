"""Ctrl-C and SIGTERM: a command ends at once, whatever it is doing, with one line and nothing half-written.

An exception in the main thread could not do that: it is lost where it meets a callback of the garbage collector, is a
traceback in the middle of an import, and waits for a compiler.
"""

import os
import signal
import threading

from sdjax import files
from sdjax.runtime.signals import SIGNALS


def leave_at_signals() -> None:
    """From here on the process ends at these signals, with status 128 + the signal, unless another handler is set."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, _noticed)
    threading.Thread(target=_watch, args=(reader,), name="sdjax signals", daemon=True).start()


def _noticed(signum: int, frame: object) -> None:
    """The thread acts."""


def _watch(reader: int) -> None:
    """Ends the process at the first of the signals that is not another handler's."""
    while True:
        [signum] = os.read(reader, 1)
        if signal.getsignal(signum) is _noticed:
            try:
                files.discard_unfinished()
                os.write(2, b"interrupted\n")
            finally:
                os._exit(128 + signum)
