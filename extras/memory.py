"""How much memory this process may take: of the machine, of its control groups (a container's limit), by ulimit.

A process that takes more is killed without a word, or fails somewhere in the middle. Linux tells all of it in files.
"""

import itertools
import os
import re
from pathlib import Path

MACHINE, GROUP = "this machine", "its control group, as a container has one"
ULIMITS = {  # by ulimit: its line of proc/self/limits, and that of proc/self/status with what is taken of it already
    "ulimit -v": ("Max address space", "VmSize"),
    "ulimit -d": ("Max data size", "VmData"),
}  # Linux ignores the one of resident memory, ulimit -m
GROUPS = {  # version of control groups → where they are found, and the files of limits: of what kills, what slows down
    1: ("sys/fs/cgroup/memory", ["memory.limit_in_bytes"]),
    2: ("sys/fs/cgroup", ["memory.max", "memory.high"]),
}


def limit(processes=1, root="/"):
    """The strictest limit → (bytes, what sets it), or None where nothing is known.

    processes: how many share the machine and the control group; ulimit counts for each of them. root: where proc and
    sys stand.
    """
    limits = []
    if hasattr(os, "sysconf"):
        limits.append((os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes, MACHINE))
    limits += [(size // processes, GROUP) for size in group_limits(root)]
    for whose, (line, of_it) in ULIMITS.items():
        most = re.search(rf"^{line} +(\d+)", text(root, "proc/self/limits"), re.M)
        if most:  # what is mapped already counts, too: with torch alone more than half a gigabyte
            taken = re.search(rf"^{of_it}:\s+(\d+) kB", text(root, "proc/self/status"), re.M)
            limits.append((max(0, int(most[1]) - 1024 * int(taken[1] if taken else 0)), whose))
    return min(limits, default=None)


def group_limits(root):
    """The limits of the control groups that this process is in: its own one, and all those above it."""
    for line in text(root, "proc/self/cgroup").splitlines():  # "4:memory:/a/b" of version 1, "0::/a/b" of version 2
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top, files = GROUPS[2 if number == "0" else 1]
        own = Path(path.strip("/"))
        # a container sees its group as the root, while the path may be the one outside: it then leads nowhere
        for folder, file in itertools.product({own, *own.parents, Path()}, files):
            number = text(root, f"{top}/{folder}/{file}").strip()
            if number.isdigit():  # "max" where there is none
                yield int(number)


def text(root, name):
    """What a file of the system says, nothing if it is not there."""
    try:
        with open(Path(root, name)) as file:
            return file.read()
    except (OSError, ValueError):
        return ""
