"""Python runs this file in every process that has its folder on PYTHONPATH: it traces the engine process of a server.

MANYLORA_TRACE names the file. It gets a line for each step that brought something: when the step began and ended, how
many outputs it brought, the processor time that the threads for HTTP had taken by then, and how long tracing took after
the step before, all in seconds.
"""

import os
import sys

if "MANYLORA_TRACE" in os.environ and "manylora.server.engine_process" in sys.orig_argv:
    import functools
    import json
    import threading
    import time
    from pathlib import Path

    from manylora.text.engine import Engine

    _HTTP_THREADS = ("reader", "intake", "call", "sender")
    _trace = open(os.environ["MANYLORA_TRACE"], "a", buffering=1)  # as long as the process
    _step = Engine.step

    def _http_cpu_s() -> float:
        total = 0
        for thread in threading.enumerate():
            if thread.name.startswith(_HTTP_THREADS):
                total += int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
        return total / 1e9

    _tracing_s = 0.0

    @functools.wraps(_step)
    def _traced(engine: Engine) -> object:
        global _tracing_s
        began = time.perf_counter()
        outputs = _step(engine)
        ended = time.perf_counter()
        if outputs:
            _trace.write(json.dumps([began, ended, len(outputs), _http_cpu_s(), _tracing_s]) + "\n")
        _tracing_s = time.perf_counter() - ended
        return outputs

    Engine.step = _traced  # type: ignore[assignment, method-assign]
