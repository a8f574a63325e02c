"""Decoder processes: they turn encoded images into patches, in memory that they share with the trainer.

`python -m training.decoding SOCKET PIXELS`: a job comes in as pickle (from us, whom it may trust) with the file of the
stream's memory beside it, and a byte for each image goes out: what decodes untrusted images is never unpickled. So a
batch is copied nowhere between decoder and model. Started by hand, as multiprocessing's spawn would import torch again
in each. A decoder's memory is limited by the largest picture that the tables tell; it dies with the trainer.
"""

import contextlib
import mmap
import os
import queue
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from subprocess import DEVNULL, Popen

import cv2
import numpy as np

from pairs.errors import PairmillError
from pairs.process import ROOT, child, limit_memory
from training.pixels import Item, Look, Pixels, fill

BASE_BYTES, BYTES_PER_PIXEL = 512 << 20, 24  # of all copies that are alive at once, with room
PORTION = 16  # images that a decoder gets at a time
Worker = tuple["Popen[bytes]", Connection]


class Decoders:
    """`count` decoder processes. `pixels` is what the largest picture has."""

    def __init__(self, count: int, look: Look, pixels: int) -> None:
        self._look, self._free = look, queue.SimpleQueue[Worker]()
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                self._free.put(_start(stack, pixels))
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def fill(self, memory: int, width: int, items: Sequence[Item], told: Callable[[], str]) -> list[bool]:
        """As `pixels.fill`, by whichever decoder is free, for neighbours in the stream (T, `width`) in a memory's file.
        `told` names the images in the message about a decoder that died."""
        process, pipe = self._free.get()
        try:
            pipe.send((width, [tuple(item) for item in items], tuple(self._look)))
            send_handle(pipe, memory, process.pid)
            return [bool(byte) for byte in pipe.recv_bytes()]
        except (EOFError, OSError) as error:
            code = process.wait()
            raise PairmillError(
                expected=f"decoder process {process.pid} to decode {told()}",
                found=f"it died with exit code {code}"
                + (" (killed, perhaps for want of memory)" if code == -9 else ""),
                remedy="run the same command again: it resumes after the last checkpoint; if this comes back, run "
                "`pairmill verify`, or forget the pair that kills it",
            ) from error
        finally:
            self._free.put((process, pipe))


def _start(stack: contextlib.ExitStack, pixels: int) -> Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {"PYTHONPATH": places, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "training.decoding", str(theirs.fileno()), str(pixels)]
        running = child(command, environment=settings, stdout=DEVNULL, keep=[theirs.fileno()], patience_s=1)
        process = stack.enter_context(running)
    return process, stack.enter_context(Connection(ours.detach()))


def main(handle: int, pixels: int) -> None:
    """The life of a decoder: it ends when the trainer hangs up."""
    cv2.setNumThreads(1)
    limit_memory(BASE_BYTES + BYTES_PER_PIXEL * pixels)
    with Connection(handle) as pipe:
        while True:
            try:
                width, items, look = pipe.recv()
            except EOFError:
                return
            memory = recv_handle(pipe)
            fine = _fill(memory, width, [Item(*item) for item in items], Look(*look))
            os.close(memory)
            pipe.send_bytes(fine)


def _fill(memory: int, width: int, items: Sequence[Item], look: Look) -> bytes:
    """Maps no more of the stream than the images' rows, which are neighbours."""
    first, end = items[0].start, items[-1].start + items[-1].looked_at(look)
    start = first * width // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(memory, end * width - start, offset=start) as shared:
        rows: Pixels = np.frombuffer(shared, np.uint8, offset=first * width - start).reshape(-1, width)
        fine = bytes(fill(rows, item._replace(start=item.start - first), look) for item in items)
        del rows  # the memory can't be let go while something looks at it
    return fine


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
