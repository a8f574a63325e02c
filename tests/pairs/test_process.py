"""Children end with their parent, whatever number it has, and an orphan's at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pairs.process import ROOT, child, dies_with_us

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
FAMILY = """
import subprocess, sys, time
from pairs.process import child
with child([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(50)"]):
    time.sleep(50)
"""
AS_ONE = """
import os, subprocess, sys
from pairs.process import dies_with_us
print(os.getpid(), subprocess.run([sys.executable, "-c", "print('lived')"], preexec_fn=dies_with_us()).returncode)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_child_dies_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while not gone(pid):
        assert time.monotonic() < until, "the child outlived its parent"
        time.sleep(0.01)


def test_a_parent_may_have_the_id_1() -> None:
    """As the first process of a container has: here of a process namespace, where this machine lets us make one."""
    command = ["unshare", "-rpf", "--kill-child", sys.executable, "-c", AS_ONE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "unshare" in done.stderr:
        pytest.skip(f"no namespace here: {done.stderr.strip()}")
    assert done.stdout.split() == ["lived", "1", "0"], done.stderr


def test_the_child_of_another_ends_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the parent died between fork and exec, and a subreaper took the child."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22)
        begin = dies_with_us()
    assert subprocess.run(["echo", "lived"], preexec_fn=begin, capture_output=True).stdout == b""


def test_a_child_has_no_input_and_the_files_it_is_to_keep(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.stdin.read() == '', os.write(int(sys.argv[1]), b'kept'))"
    with (tmp_path / "file").open("wb") as file:
        command = [sys.executable, "-c", code, str(file.fileno())]
        with child(command, stdout=subprocess.PIPE, keep=[file.fileno()]) as process:
            assert process.communicate(timeout=20)[0] == b"True 4\n"
    assert (tmp_path / "file").read_bytes() == b"kept"
