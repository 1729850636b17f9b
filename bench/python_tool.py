"""The python tool: how long a call takes once the kernel is warm, and how long the first one takes.

    python bench/python_tool.py [--calls 200] [--starts 10]

Claims: a round trip under 50 ms (median), a cold start under 1.5 s (median).
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence

from freehold.tools.python import PythonTool


async def measure(calls: int, starts: int) -> dict[str, object]:
    began = time.perf_counter()
    tool = PythonTool()
    made = time.perf_counter() - began
    cold = []
    for _ in range(starts):
        session = await tool.open()
        began = time.perf_counter()
        await session.call("python", "1 + 1")
        cold.append(time.perf_counter() - began)
        await session.aclose()
    session = await tool.open()
    await session.call("python", "1 + 1")
    warm = {"value": "n = 1 + 1; n", "print": "print('x' * 1000)", "file": "open('x', 'w').write('x')"}
    trips = {}
    for name, code in warm.items():
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            await session.call("python", code)
            times.append((time.perf_counter() - began) * 1e3)
        trips[name] = _summary(times)
    await session.aclose()
    return {
        "made_ms": round(made * 1e3, 1),
        "cold_ms": _summary([value * 1e3 for value in cold]),
        "round_trip_ms": trips,
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "p95": round(ordered[int(0.95 * (len(ordered) - 1))], 1),
        "max": round(ordered[-1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--starts", type=int, default=10)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.calls, options.starts)), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
