"""Map a function over independent tasks, as Ray tasks or on the workers of a distillation.

Both put `shared` into the object store once for a call of `map`, and hold no reference to it once the call has ended.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray

from fbpc_ray.core.allocator import keep_freed_memory
from fbpc_ray.core.numerics import numerics
from fbpc_ray.execution.ray.connection import get, put
from fbpc_ray.execution.ray.placement import Resources
from fbpc_ray.execution.ray.scheduling import LossCounter, MapKey
from fbpc_ray.execution.ray.worker_pool import Job, WorkerPool

Function = Callable[[Any, Any, str], Any]
_calls = itertools.count()


@ray.remote
def _task(function: Function, shared: Any, item: Any, device: str) -> Any:
    keep_freed_memory()
    with numerics(1, device):
        return function(shared, item, device)


def map_as_tasks(
    function: Function, shared: Any, items: Sequence[Any], device: str, need: Resources, check: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    """Yield (index, value) as each Ray task ends.

    Args:
        need: of each task.
        check: called between two waits; may raise, which cancels the tasks that are left.
    """
    task = _task.options(num_cpus=need.cpus, num_gpus=need.gpus)
    reference = put(shared)
    pending = {task.remote(function, reference, item, device): index for index, item in enumerate(items)}
    del reference
    try:
        while pending:
            check()
            for done in ray.wait(list(pending), num_returns=1, timeout=0.5)[0]:
                yield pending.pop(done), get(done)
    finally:
        for unfinished in pending:
            ray.cancel(unfinished, force=True)


def map_on_pool(
    function: Function, shared: Any, items: Sequence[Any], pool: WorkerPool, check: Callable[[], None],
    put: Callable[[Any], Any] = put,
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Yield (index, value) as each task ends on the workers of `pool`. Raises UserError for a task lost too often."""
    reference, losses, call = put(shared), LossCounter(), next(_calls)
    todo = list(range(len(items)))
    left = len(todo)
    while left:
        check()
        while todo and pool.submit(Job(MapKey(call, todo[0]), partial(_submit, function, reference, items[todo[0]]))):
            todo.pop(0)
        for result in pool.results():
            if not isinstance(result.key, MapKey) or result.key.call != call:
                continue
            index = result.key.index
            if result.lost:
                losses.add(index, "a task", result.lost, "fix the cluster and run again")
                todo.append(index)
            else:
                left -= 1
                yield index, result.value


def _submit(function: Function, shared: Any, item: Any, actor: Any) -> Any:
    return actor.call.remote(function, shared, item)
