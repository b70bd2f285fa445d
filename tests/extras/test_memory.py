"""The memory that this process may take, on machines that are laid out as files."""

import os
import subprocess
import sys

import pytest
from reference import ROOT

from extras import memory

GB = 10**9
PAGE = os.sysconf("SC_PAGE_SIZE")
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max address space         {}            unlimited            bytes
Max file locks            unlimited            unlimited            locks
"""
MACHINE, GROUP, ULIMIT = memory.MACHINE, memory.GROUP, memory.ULIMIT
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
CASES = {  # what the machine says → the limit, and whose it is
    "nothing": ({}, (100 * GB, MACHINE)),
    "version 2": ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": f"{2 * GB}\n"}, (2 * GB, GROUP)),
    "version 2, no limit": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n"}, (100 * GB, MACHINE)),
    "version 2, an outer group is stricter": (
        {"proc/self/cgroup": "0::/a/b/c\n", f"{V2}/a/b/c/memory.max": f"{4 * GB}\n", f"{V2}/a/b/memory.max": "max\n",
         f"{V2}/a/memory.max": f"{GB}\n"},
        (GB, GROUP),
    ),
    "version 2, a container that sees its group as the root": (
        {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{3 * GB}\n"}, (3 * GB, GROUP)),
    "version 2, a path that leads out of what is seen": (
        {"proc/self/cgroup": "0::/../../x\n", f"{V2}/memory.max": f"{3 * GB}\n"}, (3 * GB, GROUP)),
    "version 1": (
        {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/1\n",
         f"{V1}/docker/1/memory.limit_in_bytes": f"{GB}\n"},
        (GB, GROUP),
    ),
    "version 1, mounted without its path": (
        {"proc/self/cgroup": "4:hugetlb,memory:/docker/1\n", f"{V1}/memory.limit_in_bytes": f"{GB}\n"}, (GB, GROUP)),
    "version 1, no limit": (
        {"proc/self/cgroup": "4:memory:/\n", f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"},
        (100 * GB, MACHINE),
    ),
    "version 1, another controller's group": (
        {"proc/self/cgroup": "5:cpu:/x\n", f"{V1}/x/memory.limit_in_bytes": f"{GB}\n"}, (100 * GB, MACHINE)),
    "both versions": (
        {"proc/self/cgroup": "4:memory:/d\n0::/d\n", f"{V1}/d/memory.limit_in_bytes": f"{GB}\n"}, (GB, GROUP)),
    "larger than the machine": (
        {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{300 * GB}\n"}, (100 * GB, MACHINE)),
    "ulimit": (
        {"proc/self/limits": LIMITS.format(8 * GB), "proc/self/statm": "1000 9 9 9 0 9 0\n"},
        (8 * GB - 1000 * PAGE, ULIMIT),
    ),
    "ulimit that is used up": (
        {"proc/self/limits": LIMITS.format(GB), "proc/self/statm": f"{GB} 9 9 9 0 9 0\n"}, (0, ULIMIT)),
    "no ulimit": ({"proc/self/limits": LIMITS.format("unlimited")}, (100 * GB, MACHINE)),
    "a group, and a stricter ulimit": (
        {"proc/self/limits": LIMITS.format(GB), "proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{3 * GB}\n"},
        (GB, ULIMIT),
    ),
    "nonsense": ({"proc/self/cgroup": "x\n::\n0:memory\n\n", f"{V2}/memory.max": "abc\n"}, (100 * GB, MACHINE)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_strictest_limit_counts(tmp_path, monkeypatch, case):
    files, expected = CASES[case]
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 100 * GB // PAGE, "SC_PAGE_SIZE": PAGE}[name])
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    there, whose = memory.limit(root=tmp_path)
    assert whose == expected[1] and abs(there - expected[0]) < PAGE  # 100 GB are no whole pages


@pytest.mark.parametrize("case, expected", [
    ("nothing", (25 * GB, MACHINE)),
    ("version 2", (GB // 2, GROUP)),
    ("ulimit", (8 * GB - 1000 * PAGE, ULIMIT)),  # each process has it for itself
    ("a group, and a stricter ulimit", (3 * GB // 4, GROUP)),
])  # fmt: skip
def test_processes_share_the_machine_and_the_group(tmp_path, monkeypatch, case, expected):
    test_the_strictest_limit_counts(tmp_path, monkeypatch, case)
    there, whose = memory.limit(processes=4, root=tmp_path)
    assert whose == expected[1] and abs(there - expected[0]) < PAGE


def test_a_system_without_such_files(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert memory.limit(root=tmp_path) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="needs Linux")
def test_a_real_ulimit(tmp_path):
    code = "from extras import memory; print(*memory.limit(), sep=chr(10))"
    command = f'ulimit -v 500000 && exec "{sys.executable}" -c "{code}"'
    found = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    there, whose = found.stdout.split("\n")[:2]
    assert whose == ULIMIT and 0 < int(there) < 500_000 * 1024
