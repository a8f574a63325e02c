"""The warm decoder processes of one fetch call, one per core, each fed an image at a time through a pipe.

Processes of our own instead of a pool of the standard library's, because there a decoder that crashes breaks the
whole pool: here it costs its own image, and the next one starts a new process. They start while the first images
are on their way, and nothing is pickled.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from pairs.process import ROOT, dies_with_us
from pipelines.fetch.client import Failure
from pipelines.fetch.decode import FRAME, Decoded, DecodeSpec

DECODE_S = 60.0


Decode = Callable[[bytes], Awaitable[Decoded | Failure]]


class Decoder:
    """One warm process, begun anew after a crash."""

    def __init__(self, spec: DecodeSpec) -> None:
        self._spec = spec
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pipelines.fetch.decode"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            preexec_fn=dies_with_us(),
        )
        await self._ask(asdict(self._spec), b"")

    async def decode(self, data: bytes) -> Decoded | Failure:
        """Never raises for what an image does to the process."""
        try:
            async with asyncio.timeout(DECODE_S):
                if self._process is None:
                    await self.start()
                facts, image = await self._ask({}, data)
        except TimeoutError:
            await self.stop()
            return Failure("permanent", "decode_time")
        except (asyncio.IncompleteReadError, ConnectionError):
            await self.stop()
            return Failure("permanent", "decoder_crash")
        except BaseException:  # a cancelled one would leave its answer in the pipe, for the next image
            await self.stop()
            raise
        reason = facts.pop("reason", None)
        return Failure("permanent", reason) if reason else Decoded(image, facts)

    async def _ask(self, facts: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        process = self._process
        assert process and process.stdin and process.stdout
        text = json.dumps(facts).encode()
        process.stdin.write(FRAME.pack(len(text), len(data)) + text)
        process.stdin.write(data)
        await process.stdin.drain()
        sizes = FRAME.unpack(await process.stdout.readexactly(FRAME.size))
        answer = await process.stdout.readexactly(sizes[0])
        return json.loads(answer), await process.stdout.readexactly(sizes[1])

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process:
            if process.returncode is None:
                process.kill()
            await process.wait()


@asynccontextmanager
async def decoders(spec: DecodeSpec, count: int) -> AsyncIterator[Decode]:
    """`count` warm processes; yields a function that decodes on whichever is free."""
    free: asyncio.Queue[Decoder] = asyncio.Queue()
    every = [Decoder(spec) for _ in range(count)]

    broken: list[BaseException] = []

    async def warm(decoder: Decoder) -> None:
        try:
            await decoder.start()
        except Exception as error:  # told to whoever decodes next
            broken.append(error)
        free.put_nowait(decoder)

    starts = [asyncio.create_task(warm(decoder)) for decoder in every]

    async def run(data: bytes) -> Decoded | Failure:
        decoder = await free.get()
        try:
            assert not broken, f"a decoder process did not start: {broken[0]!r}"
            return await decoder.decode(data)
        finally:
            free.put_nowait(decoder)

    try:
        yield run
    finally:
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        for decoder in every:
            await decoder.stop()
