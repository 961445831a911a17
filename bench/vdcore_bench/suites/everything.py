"""The default set of ``vdcore bench``, breadth first, until the time is over.

Every operator, then compiled peers, masks, the cost of a call, memory over frames, further dtypes, modes and workloads.
"""

from __future__ import annotations

import time
from dataclasses import replace

from vdcore_bench.measure.journal import Journal, Watch
from vdcore_bench.suites import Options, masks, memory, no_gpu, operators, overhead

# Nothing new begins after so many seconds, and after so many of the profile. Beside busy processes on 2 cores the last
# job, plots and the report took 20 s more: the whole ends within eight minutes.
SECONDS, PROFILE_SECONDS = 440.0, 80.0


def run(options: Options, journal: Journal, watch: Watch) -> None:
    options = replace(options, until=time.monotonic() + SECONDS)
    for step in operators.FIRST:
        operators.run_step(step, options, journal, watch)
    if no_gpu(options) is None:
        short = replace(masks.EVERY, rounds=masks.FEW_ROUNDS)
        masks.sweep(journal, watch, options.device, of=short, until=options.until)
        overhead.run(options, journal, watch)
    until = min(options.until, time.monotonic() + PROFILE_SECONDS)
    memory.profile((memory.WORKLOAD,), options, journal, watch, time_limit=memory.SHORT, until=until)
    for step in operators.THEN:
        operators.run_step(step, options, journal, watch)
