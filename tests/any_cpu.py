"""Run the tests marked `numerical` with the kernels that other CPUs would take, each with one thread and with two.

python tests/any_cpu.py

A line for each way, with pytest's summary, and its output where a test fails. It ends with 1 if any failed, after
all. PyTorch, oneDNN and MKL each choose their kernels by themselves. What doesn't know a variable ignores it.
"""

import os
import subprocess
import sys

import torch


LEVELS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",  # on AMD's CPUs the variable above does nothing
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2",
    },
    # And whatever oneDNN and MKL take here.
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
}


def available_levels() -> list[str]:
    """Up to what PyTorch finds here; of CPUs that aren't x86 the default alone."""
    names = list(LEVELS)
    highest = torch.backends.cpu.get_cpu_capability().lower()
    return names[: names.index(highest) + 1] if highest in names else names[:1]


def run(name: str, variables: dict[str, str]) -> bool:
    """Run the tests; whether none failed."""
    command = [sys.executable, "-m", "pytest", "-m", "numerical and not slow", "--disable-warnings", "--tb=short"]
    result = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if result.returncode != 0:
        print(result.stdout, result.stderr)
    summary = result.stdout.strip().splitlines()[-1]
    print(f"{name}: {summary}", flush=True)
    return result.returncode == 0


def main() -> None:
    ways = {
        f"{level}, threads: {count}": {**LEVELS[level], "TEST_THREADS": str(count)}
        for level in available_levels()
        for count in (1, 2)
    }
    ways["MKL_CBWR=COMPATIBLE, threads: 1"] = {"MKL_CBWR": "COMPATIBLE"}
    passed = [run(name, variables) for name, variables in ways.items()]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
