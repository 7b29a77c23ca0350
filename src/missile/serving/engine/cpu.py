"""The CPU device: real outputs through PyTorch. LS batches run at once, BE batches on a thread beside them.

There is no isolation here: both use the same cores and caches. It is for trying things out, and for tests.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from missile.errors import MisuseError
from missile.serving.config import TenantConfig
from missile.serving.engine.executor import Batch, DeviceFacts, Loaded, TenantFacts
from missile.serving.engine.models import (
    OpenedModel,
    check_batch,
    flatten,
    model_signature,
    open_model,
    output_signatures,
)
from missile.serving.link import ring
from missile.serving.tensors import DATATYPES, ModelSignature

__all__ = ["CpuExecutor"]


@dataclass(slots=True)
class _Model:
    tenant: TenantConfig
    module: Any
    signature: ModelSignature
    memory_bytes: int
    dtypes: tuple[Any, ...]  # torch's, of the inputs
    output_dtypes: tuple[Any, ...]


class CpuExecutor:
    """Runs batches whose tensors lie in `arena`. threads: PyTorch's, for one operator; 0 leaves its choice."""

    def __init__(self, arena: memoryview, *, threads: int = 0) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        self._torch = torch
        self._arena = arena
        self._models: dict[int, _Model] = {}
        self._finished: deque[Batch] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._work: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._busy = False
        self._worker = threading.Thread(target=self._run_be, name="missile-be", daemon=True)
        self._worker.start()

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(
            device="cpu",
            name=f"CPU, {os.cpu_count()} cores, PyTorch {self._torch.__version__}",
            simulated=False,
            isolation="none: this is the CPU device; tenants share its cores and caches",
        )

    @property
    def bell(self) -> int:
        return self._bell

    @property
    def polling(self) -> bool:
        return False

    def prepare(self, tenant: TenantConfig, folder: Path) -> _Model:
        torch = self._torch
        opened = open_model(tenant, folder)
        outputs = self._try_out(tenant, opened)
        signature = model_signature(tenant, opened, outputs)
        memory = sum(t.numel() * t.element_size() for t in (*opened.module.parameters(), *opened.module.buffers()))
        return _Model(
            tenant,
            opened.module,
            signature,
            memory,
            tuple(getattr(torch, DATATYPES[t.datatype].torch) for t in signature.inputs),
            tuple(getattr(torch, DATATYPES[t.datatype].torch) for t in signature.outputs),
        )

    def install(self, slot: int, tenant: TenantConfig, prepared: _Model) -> Loaded:
        self._models[slot] = prepared
        notes: tuple[str, ...] = ("served on the CPU: real outputs, no isolation",)
        if tenant.residency == "host":
            notes += ("residency = host has no meaning on the CPU device",)
        return Loaded(prepared.signature, prepared.memory_bytes, notes)

    def _try_out(self, tenant: TenantConfig, opened: OpenedModel) -> Any:
        """Run once on zeros: it warms the model up and shows its outputs."""
        torch = self._torch
        sizes = [opened.fixed_batch] if opened.fixed_batch else [1, min(2, tenant.batch.max)]
        check_batch(tenant, opened)
        for batch in sizes:
            zeros = [
                torch.zeros(
                    (batch, *t.shape) if tenant.batched else t.shape, dtype=getattr(torch, DATATYPES[t.datatype].torch)
                )
                for t in opened.inputs
            ]
            with torch.inference_mode():
                result = opened.module(*zeros)
            outputs = output_signatures(tenant, result, batch)
        return outputs

    def unload(self, slot: int) -> None:
        self._models.pop(slot, None)

    def tune(self, slot: int, tenant: TenantConfig) -> None:
        self._models[slot].tenant = tenant

    def free(self, latency_sensitive: bool) -> bool:
        return latency_sensitive or not self._busy

    def start(self, batch: Batch, *, latency_sensitive: bool) -> None:
        if latency_sensitive:
            self._execute(batch)
            self._finished.append(batch)
        else:
            self._busy = True
            self._work.put(batch)

    def poll(self, attend: Callable[[], bool]) -> list[Batch]:
        ended = []
        while self._finished:
            ended.append(self._finished.popleft())
        return ended

    def tenant_facts(self, slot: int) -> TenantFacts:
        return TenantFacts(memory_bytes=self._models[slot].memory_bytes)

    def close(self) -> None:
        self._work.put(None)
        self._worker.join(timeout=5.0)

    def _run_be(self) -> None:
        while (batch := self._work.get()) is not None:
            self._execute(batch)
            self._busy = False
            self._finished.append(batch)
            ring(self._bell)

    def _execute(self, batch: Batch) -> None:
        model = self._models[batch.slot]
        batch.start_ns = time.monotonic_ns()
        try:
            self._run(model, batch, range(len(batch.calls)))
        except Exception as error:  # a model may raise anything; only its own requests fail
            if len(batch.calls) == 1:
                batch.errors[0] = _sentence(model, error)
            else:
                self._run_one_by_one(model, batch)
        batch.end_ns = time.monotonic_ns()
        batch.execute_ns = batch.execute_ns or batch.end_ns
        batch.executed_ns = batch.executed_ns or batch.end_ns

    def _run_one_by_one(self, model: _Model, batch: Batch) -> None:
        """A merged batch failed: find out whose request it was, and spare the others."""
        for index in range(len(batch.calls)):
            try:
                self._run(model, batch, range(index, index + 1))
            except Exception as error:
                batch.errors[index] = _sentence(model, error)

    def _run(self, model: _Model, batch: Batch, which: range) -> None:
        torch = self._torch
        signature = model.signature
        columns = []
        for position, tensor in enumerate(signature.inputs):
            parts = []
            for index in which:
                call, layout = batch.calls[index], batch.layouts[index]
                start = call.offset + layout.inputs[position]
                size = layout.input_sizes[position]
                shape = signature.shape(tensor, call.batch)
                if size:
                    flat = torch.frombuffer(self._arena[start : start + size], dtype=model.dtypes[position])
                    parts.append(flat.view(shape))
                else:
                    parts.append(torch.empty(shape, dtype=model.dtypes[position]))
            columns.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        batch.execute_ns = time.monotonic_ns()
        with torch.inference_mode():
            results = [value for _, value in flatten(model.module(*columns))]
        batch.executed_ns = time.monotonic_ns()
        self._write(model, batch, which, results)

    def _write(self, model: _Model, batch: Batch, which: range, results: list[Any]) -> None:
        torch = self._torch
        signature = model.signature
        items = sum(max(1, batch.calls[index].batch) for index in which)
        for position, (tensor, value) in enumerate(zip(signature.outputs, results, strict=True)):
            expected = signature.shape(tensor, items)
            if tuple(value.shape) != expected or value.dtype != model.output_dtypes[position]:
                raise MisuseError(f"output {tensor.name!r} has shape {list(value.shape)}, not {list(expected)}")
            row = 0
            for index in which:
                call, layout = batch.calls[index], batch.layouts[index]
                size = layout.output_sizes[position]
                part = value[row : row + call.batch] if signature.max_batch and len(which) > 1 else value
                row += call.batch
                if size:
                    start = call.offset + layout.outputs[position]
                    target = torch.frombuffer(self._arena[start : start + size], dtype=value.dtype)
                    target.view(part.shape).copy_(part)


def _sentence(model: _Model, error: Exception) -> str:
    """What went wrong, in one line. A model's own message may quote inputs, so only its first line and little of it."""
    first = (str(error).splitlines() or [""])[0][:200]
    return f"The model of tenant {model.tenant.name!r} failed: {type(error).__name__}: {first}"
