"""python llava.py again and again: a clean process has imported torch once, and forks for each command.

Used by test_hostile_cli.py. The process holds torch and the modules and nothing of pytest, so that neither the memory
that a command takes nor the memory that is left to it depends on what the other tests have left behind.
"""

import contextlib
import functools
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
}  # which may unbuffer stdout
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SECONDS = 20  # what a command may take of the processor


class Forks:
    """The process, from outside."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=ENVIRONMENT, **pipes)

    def run(self, *arguments, given=b"", room=None, closed=(), prepare=""):
        """python llava.py with these arguments → its status, out and err, and the most MB that it added to its
        beginning.

        given: standard input. room: how many MB of addresses it may add. closed: standard streams that it does not
        have. prepare: Python that runs in front, and knows os and signal.
        """
        arguments = list(map(str, arguments))
        job = {"arguments": arguments, "given": given.hex(), "room": room, "closed": closed, "prepare": prepare}
        print(json.dumps(job), file=self.process.stdin)
        found = SimpleNamespace(**json.loads(self.process.stdout.readline()))
        late = (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL)
        assert found.status not in late, f"it waits for something, or takes over {SECONDS} s"
        return found

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def held(what):
    """How many MB this process holds: VmRSS, of memory; VmSize, of addresses."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def command(streams, start, arguments, room, closed, prepare, **_):
    """The whole life of a fork: python llava.py with the given streams."""
    status = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for number in closed:
            os.close(number)
        signal.alarm(10 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        text = functools.partial(open, encoding="utf-8", closefd=False)
        sys.stdin, sys.stdout, sys.stderr = (
            None if number in closed else text(number, mode, errors=errors)
            for number, (mode, errors) in enumerate([("r", "strict"), ("w", "strict"), ("w", "backslashreplace")])
        )
        sys.argv = ["llava.py", *arguments]
        exec(prepare, {"os": os, "signal": signal})
        os.pwrite(start, str(held("VmRSS")).encode(), 0)
        if room:
            limit = int(held("VmSize") + room) << 20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        runpy.run_path(str(ROOT / "llava.py"), run_name="__main__")
        status = 0
    except SystemExit as left:
        status = left.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):
                stream.flush()
        os._exit(status)


def serve():
    """A line of JSON for each command, and one back."""
    for line in sys.stdin:
        job = json.loads(line)
        start, *streams = [os.memfd_create(name) for name in ("start", "in", "out", "err")]
        os.pwrite(streams[0], bytes.fromhex(job["given"]), 0)
        child = os.fork()
        if not child:
            command(streams, start, **job)
        _, status, usage = os.wait4(child, 0)
        begun, out, err = (os.pread(stream, 10**7, 0).decode() for stream in (start, *streams[1:]))
        for stream in (start, *streams):
            os.close(stream)
        # a fork's peak begins with what the process before it holds: what it adds is its own
        added = usage.ru_maxrss / 1024 - float(begun or 0)
        print(
            json.dumps({"status": os.waitstatus_to_exitcode(status), "out": out, "err": err, "added": added}),
            flush=True,
        )


if __name__ == "__main__":
    if sys.stdin.isatty() or sys.argv[1:]:
        sys.exit("this is started by the tests, which speak to it through a pipe")
    sys.path[0] = str(ROOT)
    import llava  # noqa: F401 (once, for all forks)
    from extras import beams, chat, checks, choices, cli, each, hub, speed, turn  # noqa: F401

    serve()
