"""`python -m benchmarks NAME` prints one JSON object; `all` runs every benchmark and writes benchmarks/results.json."""

import json
import os
import platform
import sys
from pathlib import Path

from benchmarks import (
    attribute_edges,
    busy_neighbour,
    cka_pairs,
    cold_start,
    demo,
    distill_step,
    eliminating,
    explorer_head,
    patching,
    programs,
    shared_prefix,
    study_throughput,
)
from workbench import storage
from workbench.storage.provenance import commit

BENCHMARKS = {
    "attribute-edges": attribute_edges.run,
    "cka-pairs": cka_pairs.run,
    "distill-step": distill_step.run,
    **patching.RUNS,
    **eliminating.RUNS,
    "programs": programs.run,
    "cold-start": cold_start.run,
    "busy-neighbour": busy_neighbour.run,
    "study-throughput": study_throughput.run,
    "shared-prefix": shared_prefix.run,
    "explorer-head": explorer_head.run,
    "demo": demo.run,
}


def processor() -> str:
    """Its name, as the system gives it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def main() -> int:
    """Run the named benchmark, or all."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in (*BENCHMARKS, "all"):
        print(f"usage: python -m benchmarks NAME, with NAME one of: all, {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    results = []
    for key, run in BENCHMARKS.items():
        if name in (key, "all"):
            results.append(run() | {"processor": processor(), "cores": os.cpu_count(), "commit": commit()})
            print(json.dumps(results[-1]), flush=True)
    if name == "all":
        storage.write_json(Path(__file__).parent / "results.json", results)
    return 0


if __name__ == "__main__":  # workers of a benchmark import this file
    sys.exit(main())
