"""The warm decoder processes of one fetch call, one per core, fed through pipes.

Processes of our own instead of a pool of the standard library's, because there a decoder that crashes breaks the
whole pool: here it costs its own image, and the next one starts a new process. They start while the first images
are on their way, and nothing is pickled. While one image is decoded the next lie in the pipe already. The C library
is told to keep the memory of an image for the next one: to give it back and fault it in again costs 2.5 ms each.
"""

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from itertools import islice
from typing import NamedTuple

from pairs.process import ROOT, dies_with_us
from pipelines.fetch.decode import FRAME, Decoded, DecodeSpec
from pipelines.fetch.failures import Failure

DECODE_S = 60.0
DEPTH = 4  # images that one process has been sent
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}  # glibc's, bytes

Decode = Callable[[bytes], Awaitable[Decoded | Failure]]


class Job(NamedTuple):
    data: bytes
    answer: "asyncio.Future[Decoded | Failure]"


class Decoder:
    """One warm process, begun anew after a crash."""

    def __init__(self, spec: DecodeSpec) -> None:
        self._spec = spec
        self._process: asyncio.subprocess.Process | None = None
        self._feed: asyncio.WriteTransport | None = None  # a pipe, where asyncio would make a socket of less room
        self._sent = 0  # of the jobs under way, those that this process was given

    async def start(self) -> None:
        theirs, ours = os.pipe()
        self._feed, _ = await asyncio.get_running_loop().connect_write_pipe(asyncio.BaseProtocol, os.fdopen(ours, "wb"))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "pipelines.fetch.decode"),
                stdin=theirs,
                stdout=asyncio.subprocess.PIPE,
                cwd=ROOT,
                env=KEEP_MEMORY | os.environ,
                preexec_fn=dies_with_us(),
            )
        finally:
            os.close(theirs)
        self._write(json.dumps(asdict(self._spec)).encode())
        await self._read()

    async def work(self, todo: "asyncio.Queue[Job]", others: int) -> None:
        """Decodes what comes through `todo`, oldest first, and leaves to `others` decoders what they could begin."""
        jobs: deque[Job] = deque()
        while True:
            while not jobs or (len(jobs) < DEPTH and todo.qsize() > others):
                job = await todo.get()
                if not job.answer.done():  # else nobody waits for it any more
                    jobs.append(job)
            try:
                result = await self._first(jobs)
            except Exception as error:
                await self.stop()
                _settle(jobs.popleft(), error)
            else:
                _settle(jobs.popleft(), result)

    async def _first(self, jobs: deque[Job]) -> Decoded | Failure:
        """What becomes of the first of `jobs`; never raises for what an image does to the process. Those behind it are
        sent ahead, and sent again to the next process where this one doesn't live to see them."""
        try:
            async with asyncio.timeout(DECODE_S):
                if self._process is None:
                    await self.start()
                for job in islice(jobs, self._sent, None):
                    self._write(job.data)
                    self._sent += 1
                text, image = await self._read()
        except TimeoutError:
            await self.stop()
            return Failure("permanent", "decode_time")
        except (asyncio.IncompleteReadError, ConnectionError):
            await self.stop()
            return Failure("permanent", "decoder_crash")
        self._sent -= 1
        facts = json.loads(text)
        reason = facts.pop("reason", None)
        return Failure("permanent", reason) if reason else Decoded(image, facts)

    def _write(self, data: bytes) -> None:
        assert self._feed
        self._feed.write(FRAME.pack(len(data), 0))
        self._feed.write(data)

    async def _read(self) -> tuple[bytes, bytes]:
        assert self._process and self._process.stdout
        read = self._process.stdout.readexactly
        sizes = FRAME.unpack(await read(FRAME.size))
        return await read(sizes[0]), await read(sizes[1])

    async def stop(self) -> None:
        process, self._process, self._sent = self._process, None, 0
        if self._feed and not self._feed.is_closing():  # as it is once a process that died left it
            self._feed.abort()
        if process:
            if process.returncode is None:
                process.kill()
            await process.wait()


def _settle(job: Job, result: Decoded | Failure | Exception) -> None:
    if job.answer.done():  # cancelled meanwhile
        return
    if isinstance(result, Exception):
        job.answer.set_exception(result)
    else:
        job.answer.set_result(result)


@asynccontextmanager
async def decoders(spec: DecodeSpec, count: int) -> AsyncIterator[Decode]:
    """`count` warm processes; yields a function that decodes on whichever is free."""
    todo: asyncio.Queue[Job] = asyncio.Queue()
    every = [Decoder(spec) for _ in range(count)]

    async def live(decoder: Decoder) -> None:
        try:
            await decoder.start()
        except Exception as error:  # told to whoever decodes next
            while True:
                _settle(await todo.get(), AssertionError(f"a decoder process did not start: {error!r}"))
        await decoder.work(todo, count - 1)

    lives = [asyncio.create_task(live(decoder)) for decoder in every]

    async def run(data: bytes) -> Decoded | Failure:
        job = Job(data, asyncio.get_running_loop().create_future())
        todo.put_nowait(job)
        return await job.answer

    try:
        yield run
    finally:
        for task in lives:
            task.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        for decoder in every:
            await decoder.stop()
