"""What hostile servers cost: `python -m benchmarks.hostile > benchmarks/results/DATE-hostile.md`.

The cases and the way they are measured are those of tests/pipelines/hostile.py: each image is fetched and decoded in
fresh processes, by the client and the decoder of the real fetch.
"""

import os
import platform
import subprocess

from pairs.process import ROOT
from tests.pipelines.hostile import LIMITS, SERVERS, URLS, cost, raw_server

HEAD = """# Hostile URLs and servers

`python -m benchmarks.hostile` at commit {commit}, Python {python}, {cores} cores of {machine}, load {load:.1f}.

{urls} URLs are refused before a socket exists (they stand with their reasons in tests/pipelines/hostile.py). These
{servers} servers on loopback are reached. A URL may cost {deadline} s and {megabytes:.0f} MB here, an image
4 million pixels.
Memory is what the process grows by, up to its peak: of the fetch, and of the decoder where it comes to that.

| server | outcome | seconds | fetch, MB | decoder, MB | requests |
| --- | --- | ---: | ---: | ---: | ---: |"""


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    told = {"commit": commit.stdout.strip(), "python": platform.python_version(), "machine": platform.machine()}
    numbers = {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "urls": len(URLS)}
    limits = {"servers": len(SERVERS), "deadline": LIMITS.deadline_s, "megabytes": LIMITS.max_bytes / 1e6}
    print(HEAD.format(**told, **numbers, **limits))
    for name, (talk, reasons) in SERVERS.items():
        with raw_server(talk()) as (port, asked):
            seen = cost(port)
        assert seen.outcome in reasons, (name, seen)
        decoder = "" if seen.decoder_bytes is None else f"{seen.decoder_bytes / 1e6:.1f}"
        memory = f"{seen.fetch_bytes / 1e6:.1f} | {decoder}"
        print(f"| {name} | {seen.outcome} | {seen.seconds:.2f} | {memory} | {len(asked)} |")


if __name__ == "__main__":
    main()
