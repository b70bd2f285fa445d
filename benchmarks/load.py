"""From nothing to a model, and to its first word about a picture, in fresh processes with their imports; and the peak
of the memory.

    python benchmarks/load.py
    python benchmarks/load.py --model 13b --layers 40 --rounds 1 --sides "ours int4"
    python benchmarks/load.py --layers 32 --rounds 1 --sides "ours bfloat16"

The files stay in the page cache, as they do between two calls of the same command. The peak is VmHWM, files that are
mapped into memory among it; beside it stands its ratio to the bytes of the weights as they are held.
"""

import json
import subprocess
import sys
import time

import peers


def measure(name, folder):
    """In a process of its own, whose start the caller has noted: when the model was there, when it had read a picture
    and twenty words, behind which its first one is known.
    """
    kind, settings = peers.SIDES[name]
    side = peers.KINDS[kind](folder, **settings)
    loaded = time.time()
    side.prefill(20)
    size = peers.nbytes(side.model)
    print(json.dumps({"loaded": loaded, "said": time.time(), "peak": peers.full_size.high_water(), "bytes": size}))


def main():
    parser = peers.parser(__doc__, [peers.BASE, "ours bfloat16", "ours int8", "ours int4"])
    parser.add_argument("--measure", metavar="FOLDER", help="used by the benchmark itself")
    options = parser.parse_args()
    if options.measure:
        return measure(options.sides[0], options.measure)
    names, folder = peers.installed(options.sides), peers.checkpoint(options)
    results = {name: [] for name in names}
    try:
        for _ in range(options.rounds):
            for name in names:
                command = [sys.executable, __file__, "--measure", folder.name, "--sides", name]
                begin = time.time()
                got = json.loads(
                    subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
                )
                results[name].append({**got, "loaded": got["loaded"] - begin, "said": got["said"] - begin})
    finally:
        folder.cleanup()
    print(f"{peers.machine()}; {peers.what(options)} and the whole tower\n")
    columns = ["side", "loaded, s", "of transformers'", "first word about a picture, s", "of transformers'"]
    print(f"| {' | '.join([*columns, 'weights, GB', 'peak, GB', 'peak / weights'])} |")
    print(f"|{'---|' * 8}")
    for name, runs in results.items():
        base = results.get(peers.BASE, runs)
        cells = [name]
        for key in ("loaded", "said"):
            cells += [peers.spread([run[key] for run in runs], 1)]
            cells += [peers.spread([run[key] / other[key] for run, other in zip(runs, base, strict=True)])]
        size, peak = runs[0]["bytes"], max(run["peak"] for run in runs)
        print(f"| {' | '.join([*cells, f'{size / 1e9:.2f}', f'{peak / 1e9:.2f}', f'{peak / size:.3f}'])} |")


if __name__ == "__main__":
    main()
