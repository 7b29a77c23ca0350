"""Rewriting and assembling in processes of their own, which have nothing in common with the one that asks.

Processes of `multiprocessing` would run the caller's main module again, or be copies of one that has a GPU open.

    python -m missile.compiler.color_worker < tasks > results       (both pickled: they come from and go to this package)
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace

from missile.coloring.carried import Carried
from missile.coloring.shape import Shape
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.overlap import Overlap, check_waits, make_overlapping
from missile.compiler.ptx.preempt import Look, Place, make_preemptible
from missile.compiler.ptx.rewrite import USUAL, Placement, rewrite
from missile.errors import InternalError, MissileError

__all__ = ["Task", "attempt", "color", "color_all", "color_each", "or_apart"]

_FEWEST = 4  # kernels: a process takes longer to start than fewer take to compile


@dataclass(frozen=True, slots=True)
class Task:
    """A kernel's PTX to be colored, and made preemptible or to overlap; each of it or none. arch: the GPU that it is for.

    shape: None for plain memory; placement: None for the usual one; aligned: bytes that its arguments are multiples of, and
    carried: what its launches carry (see `rewrite`). preempt, overlap: how, None where not. What is preempted can't overlap.
    """

    name: str
    ptx: str
    shape: Shape | None
    placement: Placement | None
    arch: str
    preempt: tuple[Look, Place] | None = None
    overlap: Overlap | None = None
    aligned: tuple[int, ...] = ()
    carried: Carried | None = None


def color(task: Task) -> bytes:
    """The cubin. UnsupportedError naming the kernel that can't be colored, preempted or overlap."""
    text = task.ptx
    if task.shape is not None:
        placement = task.placement or USUAL
        text = rewrite(
            text, task.shape, name=task.name, placement=placement, aligned=task.aligned, carried=task.carried
        ).ptx
    if task.preempt is not None:
        look, place = task.preempt
        text = make_preemptible(text, name=task.name, look=look, place=place)
    if task.overlap is not None:
        text = make_overlapping(text, task.overlap, name=task.name)
        check_waits(text, name=task.name, lookups_first=task.overlap.lookups_first)
    return assemble(text, arch=task.arch, name=task.name)


def color_all(tasks: Sequence[Task]) -> list[bytes]:
    """The cubins of `tasks`, in order, made on all cores. Raises the first error that there is."""
    results = color_each(tasks)
    for result in results:
        if isinstance(result, MissileError):
            raise result
    return [result for result in results if isinstance(result, bytes)]


def color_each(tasks: Sequence[Task], executor: Executor | None = None) -> list[bytes | MissileError]:
    """For each of `tasks` its cubin, or why there is none. executor: who does the work; None for processes on all cores."""
    if executor is not None:
        return list(executor.map(attempt, tasks))
    count = min(os.cpu_count() or 1, -(-len(tasks) // _FEWEST))
    if count <= 1:
        return [attempt(task) for task in tasks]
    with ThreadPoolExecutor(count) as waiting:
        parts = list(waiting.map(_run, [tasks[first::count] for first in range(count)]))
    return [parts[index % count][index // count] for index in range(len(tasks))]


def or_apart(
    tasks: Sequence[Task], done: Sequence[bytes | MissileError]
) -> tuple[dict[str, bytes], Mapping[str, MissileError]]:
    """What `color_each` did of tasks that should overlap, and why some can't, both by name. Those are made again without.

    Raises what they raise then.
    """
    apart = {task.name: error for task, error in zip(tasks, done, strict=True) if isinstance(error, MissileError)}
    again = iter(color_all([replace(task, overlap=None) for task in tasks if task.name in apart]))
    cubins = {
        task.name: made if isinstance(made, bytes) else next(again) for task, made in zip(tasks, done, strict=True)
    }
    return cubins, apart


def _run(tasks: Sequence[Task]) -> list[bytes | MissileError]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "missile.compiler.color_worker"],
        input=pickle.dumps(list(tasks)),
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise InternalError(f"A process that colors kernels ended with status {done.returncode}: {said[-1]}")
    results: list[bytes | MissileError] = pickle.loads(done.stdout)
    return results


def attempt(task: Task) -> bytes | MissileError:
    """`color`, with its error for a result."""
    try:
        return color(task)
    except MissileError as error:
        return error


def main() -> None:
    tasks = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps([attempt(task) for task in tasks]))


if __name__ == "__main__":
    main()
