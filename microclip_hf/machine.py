"""What a process may use of its machine."""

import multiprocessing
import os


MAX_WORKERS = 16


def num_cores() -> int:
    """A process's share of the cores, 1 or more, of which a launch of several tells it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def num_threads(num_workers: int = 1) -> int:
    """How many threads read images in each of so many workers of a process."""
    return min(MAX_WORKERS, num_cores() // num_workers + 1)


def num_workers() -> int:
    """How many processes read images for one that feeds a device: its share of the cores, less the one that it needs
    itself; none where processes are spawned, which a script without `if __name__ == "__main__"` doesn't survive.
    """
    if (multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]) != "fork":
        return 0
    return max(1, min(MAX_WORKERS, num_cores() - 1))
