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
Max data size             {data}            unlimited            bytes
Max resident set          1000                 unlimited            bytes
Max address space         {space}            unlimited            bytes
Max file locks            unlimited            unlimited            locks
"""
MACHINE, GROUP = memory.MACHINE, memory.GROUP
SPACE, DATA = memory.ULIMITS


def limited(space="unlimited", data="unlimited", space_taken=0, data_taken=0):
    """What Linux tells about a process that has these limits, and has taken so many kB."""
    status = f"VmPeak:\t99999999 kB\nVmSize:\t{space_taken} kB\nVmData:\t{data_taken:8} kB\n"
    return {"proc/self/limits": LIMITS.format(space=space, data=data), "proc/self/status": status}


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
    "version 2, throttled below its limit": (
        {"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": f"{4 * GB}\n", f"{V2}/a/memory.high": f"{2 * GB}\n"},
        (2 * GB, GROUP),
    ),
    "version 2, an outer group is throttled": (
        {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.high": "max\n", f"{V2}/a/memory.high": f"{GB}\n"},
        (GB, GROUP),
    ),
    "version 1, an outer group is stricter": (
        {"proc/self/cgroup": "4:memory:/a/b\n", f"{V1}/a/b/memory.limit_in_bytes": f"{4 * GB}\n",
         f"{V1}/a/memory.limit_in_bytes": f"{GB}\n", f"{V1}/a/memory.soft_limit_in_bytes": "1\n"},
        (GB, GROUP),
    ),
    "ulimit": (limited(space=8 * GB, space_taken=1000), (8 * GB - 1000 * 1024, SPACE)),
    "ulimit that is used up": (limited(space=GB, space_taken=GB), (0, SPACE)),
    "ulimit of data": (limited(data=8 * GB, space_taken=GB, data_taken=1000), (8 * GB - 1000 * 1024, DATA)),
    "ulimit of data that is used up": (limited(data=GB, data_taken=GB), (0, DATA)),
    "both, the address space is stricter": (
        limited(space=2 * GB, data=2 * GB, space_taken=500_000), (2 * GB - 512_000_000, SPACE)),
    "both, data are stricter": (limited(space=3 * GB, data=GB, space_taken=500_000, data_taken=1000), (
        GB - 1000 * 1024, DATA)),
    "no ulimit": (limited(), (100 * GB, MACHINE)),
    "a group, and a stricter ulimit": (
        limited(space=GB) | {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{3 * GB}\n"}, (GB, SPACE)),
    "ulimit, and nothing about what is taken": (
        {"proc/self/limits": LIMITS.format(space=GB, data=2 * GB)}, (GB, SPACE)),
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
    ("ulimit", (8 * GB - 1000 * 1024, SPACE)),  # each process has it for itself
    ("a group, and a stricter ulimit", (3 * GB // 4, GROUP)),
    ("both, data are stricter", (GB - 1000 * 1024, DATA)),
])  # fmt: skip
def test_processes_share_the_machine_and_the_group(tmp_path, monkeypatch, case, expected):
    test_the_strictest_limit_counts(tmp_path, monkeypatch, case)
    there, whose = memory.limit(processes=4, root=tmp_path)
    assert whose == expected[1] and abs(there - expected[0]) < PAGE


def test_a_system_without_such_files(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert memory.limit(root=tmp_path) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="needs Linux")
@pytest.mark.parametrize("option, name", [("-v", SPACE), ("-d", DATA)])
def test_a_real_ulimit(option, name):
    code = "from extras import memory; print(*memory.limit(), sep=chr(10))"
    command = f'ulimit {option} 500000 && exec "{sys.executable}" -c "{code}"'
    found = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    there, whose = found.stdout.split("\n")[:2]
    assert whose == name and 0 < int(there) < 500_000 * 1024
