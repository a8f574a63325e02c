"""How much memory a program takes: the peak of its process and all its children, shared pages counted once."""

import contextlib
import threading
import time

import psutil


def pss_bytes(process: psutil.Process) -> int:
    """Memory of a process and its children."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += one.memory_full_info().pss
    return total


class Peak(threading.Thread):
    """Looks 5 times a second, from `start()` on, at this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        while True:
            self.bytes = max(self.bytes, pss_bytes(psutil.Process()))
            time.sleep(0.2)
