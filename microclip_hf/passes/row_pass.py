"""One pass over photos: each process writes the rows of its share as they come, and an interrupted pass goes on."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ..data.photo_sources import PhotoSource
from ..machine import MAX_WORKERS, num_workers
from .photo_batches import Reader, RowBatch, RowBatches
from .row_parts import RowParts, WrittenRows


# Of work that a kill may cost, about, where a block takes longer.
MOST_SECONDS = 60
# How long processes wait for the slowest one.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class PassSettings:
    """How photos are read.

    Args:
        batch_size (`int`): photos that the model takes at once.
        num_workers (`int`, *optional*): processes that read photos for each that computes; 0 reads them in threads.
            Default: 0 on a CPU, else this process's share of the cores.
        title (`str`): of the progress bar.
        progress (`bool`): whether there is one.
    """

    batch_size: int = 32
    num_workers: int | None = None
    title: str = "Photos"
    progress: bool = True


def join_processes(device: torch.device) -> PartialState:
    """The processes of this launch, which on CPUs find each other too."""
    return PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def compute_rows(
    parts: RowParts,
    source: PhotoSource,
    read: Reader,
    compute: Callable[[RowBatch], pa.Table],
    device: torch.device,
    settings: PassSettings,
    in_threads: bool = True,
) -> None:
    """Write the rows that are missing, `compute` of each batch, to parts; every process of a launch must call it.

    The folder of parts must be one that all see. Afterwards it holds the rows of all photos. Photos are read
    `in_threads`, unless `read` can't be.

    Raises:
        ValueError: if the folder holds parts of other facts, or files of somebody else.
    """
    state = join_processes(device)
    if state.is_main_process:
        parts.create()
    state.wait_for_everyone()
    parts.check()
    found = [parts.find() if state.is_main_process else None]
    written: WrittenRows = broadcast_object_list(found)[0]
    process = (state.process_index, state.num_processes)
    batches = RowBatches(source, written, read, settings.batch_size, process, in_threads)
    with progress_bar(source, written, state, settings) as bar:
        write_parts(load_share(batches, settings, device), compute, parts, bar)
    state.wait_for_everyone()


def count_workers(settings: PassSettings, device: torch.device) -> int:
    """Processes that read photos for this one."""
    if settings.num_workers is not None:
        return min(settings.num_workers, MAX_WORKERS)
    # On a CPU the model itself needs the cores.
    return 0 if device.type == "cpu" else num_workers()


def load_batches(batches: RowBatches, workers: int, device: torch.device) -> Iterable[RowBatch]:
    """The batches, on their way to a device."""
    return batches.load(workers, pin_memory=device.type == "cuda")


def load_share(batches: RowBatches, settings: PassSettings, device: torch.device) -> Iterable[RowBatch]:
    """The batches of one of several processes, which must all call it."""
    # Readers share the rows by their number, so that all processes have as many.
    return load_batches(batches, min(gather_object([count_workers(settings, device)])), device)


def progress_bar(source: PhotoSource, written: WrittenRows, state: PartialState, settings: PassSettings) -> tqdm:
    """The first process's bar, of its share of the photos, those that an interrupted pass left included."""
    share = None if source.total is None else -(-source.total // state.num_processes)
    title = settings.title
    if state.num_processes > 1:
        title = f"{title} (of 1 in {state.num_processes} processes)"
    is_shown = settings.progress and state.is_main_process
    done = written.num_rows // state.num_processes
    return tqdm(desc=title, total=share, initial=done, unit="photo", disable=not is_shown)


def write_parts(
    batches: Iterable[RowBatch], compute: Callable[[RowBatch], pa.Table], parts: RowParts, bar: tqdm
) -> None:
    """Write blocks as they are complete, or what there is of them after `MOST_SECONDS`, and when interrupted; those of
    several workers come in turns. Batches are where they would be, whatever was written before.
    """
    blocks: dict[tuple[int, int, int], list[tuple[int, pa.Table]]] = {}

    def write(block: tuple[int, int, int]) -> None:
        firsts, tables = zip(*blocks.pop(block), strict=True)
        parts.write(block[0], firsts[0], pa.concat_tables(tables))

    last = time.monotonic()
    try:
        for batch in batches:
            block = (batch.shard, *batch.block)
            if batch.names:
                rows = compute(batch)
                blocks.setdefault(block, []).append((batch.first, rows))
                bar.update(len(batch.names))
            if time.monotonic() - last > MOST_SECONDS:
                for each in list(blocks):
                    write(each)
                last = time.monotonic()
            elif batch.is_last_of_block and block in blocks:
                write(block)
            if batch.end is not None:
                parts.write_end(batch.shard, batch.end)
    except KeyboardInterrupt as interrupt:
        for block in list(blocks):
            write(block)
        message = f"what was computed so far is in {parts.folder}, and the same command goes on"
        raise KeyboardInterrupt(message) from interrupt
