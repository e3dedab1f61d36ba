"""Independent jobs on several processes of this machine, one thread each, to the same bits for every number of them.

A job is a call of a module's function with plain values, which writes into a place of its own or returns plain values.
A worker that dies takes its pool with it: the jobs that are not done begin again in a new pool of one worker less (its
death was, as a rule, that memory ran out), each from whatever it has written; after `DEATHS` deaths an error says so.
"""

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.values.bar import bar

log = logging.getLogger("workbench")
DEATHS = 3
"""How many workers may die before the pool gives up."""
LEAST = 600 * 2**20
"""Bytes that a worker takes before it has done anything: Python and torch."""
CONTEXT = 600 * 2**20
"""Bytes that a process takes on an accelerator before it has put anything there."""
Told = Callable[[int, Any], None]
"""What is said of a finished job: its number among the jobs, and what it returned."""


@dataclass(kw_only=True)
class Pool:
    """How many processes work, and what the bar calls their jobs. Inside `with pool:` they are kept from one `run` to
    the next: each costs seconds of imports, and the loading of its models."""

    workers: int
    unit: str = "job"
    what: str = "jobs"
    need: int = LEAST
    """Bytes of memory that a worker needs; no more work than find room."""
    device: str = "cpu"
    """Where the workers compute: an accelerator is shared by them, and its memory too."""

    _kept: bool = field(default=False, init=False, repr=False)
    _processes: "_Processes | None" = field(default=None, init=False, repr=False)

    def __enter__(self) -> "Pool":
        self._kept = True
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = False
        self._end()

    def run(self, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], tell: Told = lambda _, __: None) -> None:
        """`work(*job)` of every job. `tell` is called here, in the order in which they end. Errors: the first of a job,
        when the others at work have been ended; `InputError` where workers die again and again."""
        if not jobs:
            return
        waiting, workers = dict(enumerate(jobs)), self.workers if self._kept else min(self.workers, len(jobs))
        if self._processes is None:
            self._processes = _Processes(min(fitting(workers, self.need), fitting_on(self.device, workers)))
        with bar(
            total=len(jobs), desc=f"{self.what}, {min(self._processes.count, len(jobs))} at once", unit=self.unit
        ) as progress:

            def told(number: int, value: Any) -> None:
                progress.update()
                tell(number, value)

            for deaths in range(DEATHS + 1):
                try:
                    self._processes.work(work, waiting, told)
                    if not self._kept:
                        self._end()
                    return
                except BrokenProcessPool:
                    workers = max(1, self._processes.count - 1)
                    self._end()
                    if deaths < DEATHS:
                        self._processes = _Processes(workers)
                        log.warning(
                            "a worker died (out of memory, or killed); its %s goes on from what it has written, with "
                            "--workers %d",
                            self.unit,
                            workers,
                        )
                except BaseException:
                    self._processes.terminate()  # what is cut off has its checkpoint
                    self._end()
                    raise
        raise InputError(
            f"workers died {DEATHS + 1} times (out of memory, or killed); what was done is kept: go on with --resume "
            "and fewer --workers."
        )

    def _end(self) -> None:
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.pool.shutdown(cancel_futures=True)


class _Processes:
    """Processes at work until one of them dies; they are started as jobs come."""

    def __init__(self, count: int) -> None:
        self.count, self._others = count, set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")  # a fork of a process that has computed with threads may hang
        self.pool = ProcessPoolExecutor(count, mp_context=context, initializer=_one_thread)

    def work(self, work: Callable[..., Any], waiting: dict[int, tuple[Any, ...]], tell: Told) -> None:
        """Jobs by number; what is done is taken from `waiting`."""
        futures: dict[Future[Any], int] = {self.pool.submit(work, *job): number for number, job in waiting.items()}
        for future in as_completed(futures):
            value = future.result()
            waiting.pop(futures[future])
            tell(futures[future], value)

    def terminate(self) -> None:
        """End them, whatever they do."""
        for worker in set(multiprocessing.active_children()) - self._others:
            worker.terminate()


def free_cores() -> int:
    """Cores that this process may use, less what others keep busy (the load of the last minute); at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, round(allowed - busy))


def number_of_workers(asked: int | str | None, device: str = "cpu") -> int | None:
    """Of `--workers`: a number, or for `auto` one for each free core, and none where fewer than two are free (one
    worker alone has one thread, and is slower than this process) or an accelerator computes (how many a small model
    leaves room for is the user's to say)."""
    if not isinstance(asked, str):
        return asked
    free = free_cores() if device == "cpu" else 1
    return free if free > 1 else None


def fitting(workers: int, need: int, *, free: int | None = None, where: str = "") -> int:
    """As many workers as memory has room for (`free`; None: this machine's); at least one."""
    free = free_memory() if free is None else free
    if free is None or workers * need <= free:
        return workers
    room = max(1, free // need)
    log.warning(
        "%d of %d workers: each needs about %.1f GB%s, and %.1f GB are free",
        room,
        workers,
        need / 1e9,
        where,
        free / 1e9,
    )
    return room


def fitting_on(device: str, workers: int) -> int:
    """As many workers as an accelerator's memory has room for, by what this process has held on it at most (the same
    models at work); all on the CPU, and where torch can't tell."""
    import torch  # here: the command line asks for the free cores before torch is wanted

    kind = torch.device(device).type
    module = None if kind == "cpu" else torch.get_device_module(kind)
    if module is None or not hasattr(module, "mem_get_info") or not hasattr(module, "max_memory_reserved"):
        return workers
    need, (free, _) = module.max_memory_reserved(device) + CONTEXT, module.mem_get_info(device)
    return fitting(workers, need, free=free, where=f" on {device}")


def free_memory() -> int | None:
    """Bytes that can be had without swapping, in this container where it is bounded; None where this can't be seen."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return min(free, _room_in_container() or free)


def _room_in_container() -> int | None:
    place = Path("/sys/fs/cgroup")
    try:
        most, used = ((place / name).read_text().strip() for name in ("memory.max", "memory.current"))
        lines = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) - int(used) + int(lines.get("inactive_file", 0))


def peak_memory() -> int:
    """Bytes that this process has held at most: what a worker needs that loads the same models."""
    try:
        import resource
    except ImportError:  # Windows
        return LEAST
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(LEAST, peak if sys.platform == "darwin" else 1024 * peak)


def _one_thread() -> None:
    """In a worker, at its start: an interruption is the parent's to handle."""
    import torch  # here: the command line asks for the free cores before torch is wanted

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
