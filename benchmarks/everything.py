"""All tables of one machine, in the order in which benchmarks/README.md has them: each command, then what it prints.

    python benchmarks/everything.py > tables.md
    python benchmarks/everything.py --only decode growth

Under two hours on two cores. What a command prints to stderr is shown as it runs; if one fails, the next ones go on.
"""

import argparse
import shlex
import subprocess
import sys

import peers

COMMANDS = [
    "decode.py --picture benchmarks/decode.png",
    "decode.py --model smollm2",
    "batch.py --batches 1 4 8 16",
    "parts.py",
    "prefill.py --rounds 4",
    "chat.py --rounds 3",
    "load.py --rounds 3",
    "growth.py --rounds 3 --picture benchmarks/growth.png",
    "quality.py",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [command.split(".")[0] for command in COMMANDS]
    parser.add_argument("--only", nargs="+", choices=sorted(set(names)), default=names, metavar="NAME", help=str(names))
    options = parser.parse_args()
    print(f"# {peers.machine()}", flush=True)
    failed = []
    for name, command in zip(names, COMMANDS, strict=True):
        if name in options.only:
            print(f"\n    python benchmarks/{command}\n", flush=True)
            script, *rest = shlex.split(command)
            if subprocess.run([sys.executable, peers.HERE / script, *rest], cwd=peers.HERE.parent).returncode:
                failed.append(command)
    if failed:
        raise SystemExit(f"these failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
