"""The worker's main loop: one job a line on stdin, one answer a line on stdout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles one job; a failure becomes an answer too."""
    from accel import codegen
    from accel.trace import SegmentGraph

    try:
        graph = SegmentGraph.from_json(job["graph"])
        plan = codegen.compile_graph(graph, out_dir=Path(job["out_dir"]))
    except Exception as error:  # whatever went wrong, the program must hear of it
        return {"id": job["id"], "error": f"{type(error).__name__}: {error}"[:2000]}
    return {"id": job["id"], "plan": plan}


def main() -> None:
    # Answers must not mix with what libraries print: keep stdout for ourselves.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.nice(5)
    import torch

    torch.set_num_threads(1)
    import accel.codegen  # noqa: F401  (imported early, while the program still records)

    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
