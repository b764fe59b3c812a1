"""How Imprint serves, in tables: hop by hop, against peers, with many adapters, cold, and with replicas.

    python -m benchmarks.serving [--only hops,peers,adapters,cold,replicas] [--packages DIR]

Each part writes `serving_<part>.md` and `.json`. Quiet machine needed; each part takes minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.serving import adapters, cold, hops, peers, replicas

PEERS = {"vllm": peers.STOCK, "vllm-lora": peers.WRAPPER, "ray-llm": peers.RAY_LLM}
PARTS = {"hops": hops, "peers": peers, "adapters": adapters, "cold": cold, "replicas": replicas}


def main() -> None:
    """Measure the chosen parts and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--rounds", type=int, default=3, help="of tables 1 and 2")
    parser.add_argument("--scale", type=float, default=1.0, help="of tables 1 to 3: less is shorter")
    parser.add_argument("--packages", default="", help="for Ray Serve LLM as a peer: folder made by `pip install "
                        "--no-deps --target DIR pyarrow jsonref jsonschema`")
    parser.add_argument("--against", default=",".join(PEERS), help=f"peers, of {', '.join(PEERS)}; the tables "
                        "against others stay as they are")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended, too
    names = options.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    against = options.against.split(",")
    if unknown := set(against) - set(PEERS):
        parser.error(f"--against: {', '.join(sorted(unknown))} is none of {', '.join(PEERS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        measure = PARTS[name].measure
        if name == "peers":
            measure = partial(measure, packages=options.packages, rounds=options.rounds, scale=options.scale,
                              against=[PEERS[one] for one in against])
        if name == "adapters":
            measure = partial(measure, seconds=60 * options.scale, warm_up_s=20 * options.scale)
        with tempfile.TemporaryDirectory() as folder:
            result = asyncio.run(measure(Path(folder)))
        if name == "peers":
            result["comparisons"] = peers.earlier(options.output / "serving_peers.json") | result["comparisons"]
        table = PARTS[name].report(result)
        (options.output / f"serving_{name}.md").write_text(table)
        (options.output / f"serving_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(table)


if __name__ == "__main__":
    main()
