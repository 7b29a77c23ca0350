"""The GPU executor: its layout and order on a simulated GPU, its outputs on a real one."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from missile.compiler.bind import bind
from missile.compiler.library import find_package
from missile.compiler.package import Buffer, BufferKind, ModelPackage, TensorSpec
from missile.errors import MisuseError, UnsupportedError
from missile.gpu import open_gpu
from missile.gpu.interface import Launch
from missile.probe import map_for, write_map
from missile.serving.config import parse_config
from missile.serving.engine.gpu import GpuExecutor
from missile.serving.engine.loop import EngineLoop
from missile.serving.engine.packages import copy_tensor, package_signature, tensor_view
from missile.serving.engine.planes import takes_planes
from missile.serving.link import CallKind, Link, Outcome
from missile.serving.tensors import BlockLayout, ModelSignature


class _Host:
    """Pinned memory's stand-in."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.zeros(nbytes, np.uint8)
        self.nbytes = nbytes


def test_channels_last_inputs_land_where_the_plan_reads_them() -> None:
    spec = TensorSpec(name="image", buffer="in", dtype="float16", shape=(2, 3, 4, 5), strides=(60, 1, 15, 3))
    host = _Host(16 + 2 * 120)
    view = tensor_view(host, spec, 16)  # type: ignore[arg-type]
    image = np.arange(120, dtype=np.float16).reshape(2, 3, 4, 5)
    view[...] = image
    assert host.array[:16].sum() == 0
    np.testing.assert_array_equal(host.array[16:].view(np.float16), image.transpose(0, 2, 3, 1).ravel())


def test_images_are_given_in_planes_and_turned_on_the_gpu(tmp_path: Path) -> None:
    """LS only; the kernel is the model's first, reads what the copy brings and writes where the model's own reads."""
    config = parse_config(TENANTS.format(ls="resnet34", be="resnet34", batch=1))
    gpu = open_gpu("sim:h100")
    before = gpu.memory_free()
    executor = GpuExecutor(memoryview(bytearray(1 << 20)), gpu, policy="missile")
    for slot, tenant in enumerate(config.tenants, start=1):
        executor.install(slot, tenant, executor.prepare(tenant, tmp_path))
    front, back = (executor._models[slot] for slot in (1, 2))
    spec = front.bound.package.inputs[0]
    assert spec.strides[1] == 1
    assert [model.inputs[0][0].strides[1] for model in (front, back)] == [2 * 224 * 224, 2]
    assert back.bound.input_address == back.bound.addresses[spec.buffer] + spec.offset
    first = front.bound.operations[0]
    assert isinstance(first, Launch)
    assert first.kernel.name == "missile_interleave"
    reads, writes = (int.from_bytes(param, "little") for param in first.params)
    assert reads == front.bound.input_address
    assert writes == front.bound.addresses[spec.buffer] + spec.offset
    assert len(front.bound.operations) == 1 + len(front.bound.package.steps)
    for slot in (1, 2):
        executor.unload(slot)
    assert gpu.memory_free() == before
    executor.close()


@pytest.mark.parametrize(
    ("shape", "strides", "taken"),
    [
        ((2, 3, 4, 5), (60, 1, 15, 3), True),
        ((2, 3, 4, 5), (60, 20, 5, 1), False),  # in planes already
        ((2, 3, 4, 5), (64, 1, 16, 3), False),  # with gaps
        ((2, 9, 4, 5), (180, 1, 45, 9), False),  # many channels
        ((2, 1, 4, 5), (20, 1, 5, 1), False),
        ((2, 3, 20), (60, 1, 3), True),
        ((2, 3), (3, 1), False),
        ((70_000, 3, 2), (6, 1, 3), False),  # more images than a grid has rows
    ],
)
def test_which_inputs_are_turned(shape: tuple[int, ...], strides: tuple[int, ...], taken: bool) -> None:
    spec = TensorSpec(name="x", buffer="b", dtype="float16", shape=shape, strides=strides)
    assert takes_planes([spec]) is taken
    assert takes_planes([]) is False
    assert (
        takes_planes([spec, TensorSpec(name="y", buffer="b", dtype="float16", shape=(2, 3), strides=(3, 1))]) is False
    )


def _package(**changes: Any) -> ModelPackage:
    spec = TensorSpec(name="x", buffer="b", dtype="float16", shape=(4, 3), strides=(3, 1))
    values: dict[str, Any] = {
        "name": "m", "batch": 4, "gpu": "g", "arch": "sm_90", "inputs": (spec,), "outputs": (spec,), "buffers": (),
        "kernels": (), "steps": (),
    }  # fmt: skip
    return ModelPackage(**{**values, **changes})


def test_signatures_come_from_packages() -> None:
    signature = package_signature(_package())
    assert (signature.max_batch, signature.inputs[0].datatype, signature.inputs[0].shape) == (4, "FP16", (3,))
    with pytest.raises(UnsupportedError, match="no batch in dimension 0"):
        package_signature(_package(batch=2))
    assert package_signature(_package(), ["y"]).outputs[0].name == "y"
    with pytest.raises(MisuseError, match="2 outputs are named but package 'm' gives 1"):
        package_signature(_package(), ["y", "z"])
    whole = package_signature(_package(batch=1), batched=False)
    assert (whole.max_batch, whole.inputs[0].shape) == (0, (4, 3))
    given = Buffer(id="b", kind=BufferKind.INPUT, nbytes=24, first=0, last=0)
    with pytest.raises(UnsupportedError, match="a model has to give a copy"):
        package_signature(_package(buffers=(given,)))


TENANTS = """
[[tenant]]
name = "front"
model = "{ls}"
class = "LS"
slo_ms = 20

[[tenant]]
name = "back"
model = "{be}"
class = "BE"
batch = {{max = {batch}}}
"""


class _Client:
    """The front end's side of a link whose engine runs on a thread of this process."""

    def __init__(self, executor_of: Any, folder: Path) -> None:
        self.link, theirs = Link.create(64 << 20)
        descriptors = (self.link.memory_fd, self.link.call_bell.descriptor, self.link.answer_bell.descriptor)
        self.engine_link = Link.attach(*(os.dup(d) for d in descriptors), theirs.detach())
        self.failure: list[BaseException] = []

        def run() -> None:
            try:
                EngineLoop(self.engine_link, executor_of(self.engine_link.arena), folder).run()
            except BaseException as error:
                self.failure.append(error)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def load(self, slot: int, tenant: Any, seconds: float = 400.0) -> dict[str, Any]:
        return self.ask({"op": "load", "slot": slot, "tenant": tenant.model_dump(by_alias=True)}, seconds)

    def ask(self, message: dict[str, Any], seconds: float = 30.0) -> dict[str, Any]:
        """The engine's reply on the control line."""
        self.link.control.send(message)
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up and not self.failure:
            if self.link.control.pending():
                reply = self.link.control.receive()
                assert reply is not None
                if reply["op"] != "facts":
                    return reply
            time.sleep(0.005)
        raise AssertionError(self.failure or "no reply in time")

    def call(self, number: int, slot: int, batch: int, offset: int) -> None:
        assert self.link.calls.push(CallKind.INFER, slot, number, batch, offset, 0, time.monotonic_ns(), 0)
        self.link.call_bell.ring()

    def answer(self, seconds: float = 30.0) -> tuple[int, ...]:
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up and not self.failure:
            if (fields := self.link.answers.pop()) is not None:
                return fields
            time.sleep(0)
        raise AssertionError(self.failure or "no answer")

    def stop(self) -> None:
        self.link.control.send({"op": "stop"})
        self.thread.join(30)
        assert not self.failure


def test_channels_last_copies_equal_plain_ones() -> None:
    rng = np.random.default_rng(1)
    for shape in ((2, 3, 4, 5), (2, 9, 4, 5), (3, 4), (2, 1, 3)):
        plain = rng.integers(0, 255, shape).astype(np.uint8)
        last = np.moveaxis(np.zeros(np.moveaxis(plain, 1, -1).shape, np.uint8), -1, 1)
        copy_tensor(last, plain)
        np.testing.assert_array_equal(last, plain)
        back = np.zeros_like(plain)
        copy_tensor(back, last)
        np.testing.assert_array_equal(back, plain)


def _recorded() -> dict[str, int]:
    from missile.compiler.library import recorded_packages

    return dict(recorded_packages())


POLICIES = ("streams", "priority", "partition", "missile:copies=off", "missile:copies=on")


@pytest.mark.parametrize("policy", POLICIES)
def test_both_classes_are_answered_on_a_simulated_gpu(policy: str, tmp_path: Path) -> None:
    """Order, padding and bookkeeping; a simulated GPU computes nothing. The BE tenant's tensors pass through the thread."""
    config = parse_config(TENANTS.format(ls="resnet34", be="densenet161", batch=_recorded()["densenet161"]))
    executors = []

    def make(arena: memoryview) -> GpuExecutor:
        executors.append(GpuExecutor(arena, open_gpu("sim:h100"), policy=policy))
        return executors[0]

    client = _Client(make, tmp_path)
    for slot, tenant in enumerate(config.tenants, start=1):
        reply = client.load(slot, tenant)
        assert reply["op"] == "loaded", reply
    assert [model.aside for model in executors[0]._models.values()] == [False, True]
    order: dict[int, list[int]] = {1: [], 2: []}
    sent = 0
    for wave in range(6):
        for number in range(20 * wave, 20 * wave + 20):
            slot = 1 + number % 2
            client.call(number, slot, 1 if slot == 1 else 1 + number % 7, (16 << 20) * (number % 4))
            sent += 1
        for _ in range(20):
            fields = client.answer()
            assert fields[1] == Outcome.DONE, fields
            order[1 + fields[0] % 2].append(fields[0])
    assert order[1] == sorted(order[1])
    assert order[2] == sorted(order[2])
    assert len(order[1]) + len(order[2]) == sent
    facts = executors[0].tenant_facts(2)
    sms = executors[0].facts.sms
    assert facts.sms_granted is not None
    assert 0 < facts.sms_granted <= sms
    assert 0.0 <= (facts.sms_used or 0.0) <= sms
    assert (facts.preemptions is not None) is policy.startswith("missile")
    assert facts.link_granted == (0.5 if policy.endswith("copies=on") else None)
    assert facts.link_used is None or (0.0 <= facts.link_used <= 1.0 and facts.link_granted)
    client.stop()


def test_tenants_come_and_go_while_others_serve(tmp_path: Path) -> None:
    """Requests that are on their way when the policy is set up anew are answered, each by its own model."""
    config = parse_config(TENANTS.format(ls="resnet34", be="densenet161", batch=_recorded()["densenet161"]))
    front, back = config.tenants
    client = _Client(lambda arena: GpuExecutor(arena, open_gpu("sim:h100"), policy="partition"), tmp_path)
    assert client.load(1, front)["op"] == "loaded"
    numbers = iter(range(10_000))
    for round_ in range(3):
        asked = [next(numbers) for _ in range(30)]
        for number in asked:
            client.call(number, 1, 1, (1 << 20) * (number % 32))
        assert client.load(2 + round_, back)["op"] == "loaded"
        more = [next(numbers) for _ in range(4)]
        for number in more:
            client.call(number, 2 + round_, 2, (40 << 20))
        done = [client.answer() for _ in range(34)]
        assert sorted(fields[0] for fields in done) == asked + more
        assert {fields[1] for fields in done} == {Outcome.DONE}
        assert client.ask({"op": "unload", "slot": 2 + round_})["op"] == "unloaded"
    client.stop()


def test_colors_are_granted_kept_apart_and_given_back(tmp_path: Path) -> None:
    with open_gpu("sim:h100") as gpu:
        write_map(map_for(gpu, cache=tmp_path, interference=False), tmp_path / "map.json")
    gpu = open_gpu("sim:h100")
    before = gpu.memory_free()
    executor = GpuExecutor(memoryview(bytearray(1 << 20)), gpu, policy="missile", channel_map=tmp_path / "map.json")

    def install(slot: int, kind: str, colors: list[int], more: str = "") -> None:
        text = f'[[tenant]]\nname = "t{slot}"\nmodel = "resnet34"\nclass = "{kind}"\ncolors = {colors}\n{more}\n'
        (tenant,) = parse_config(text + ("slo_ms = 20\n" if kind == "LS" else "")).tenants
        executor.install(slot, tenant, executor.prepare(tenant, tmp_path))

    install(1, "LS", [1, 0])
    install(2, "BE", [2, 3, 4])
    assert [executor.tenant_facts(slot).colors for slot in (1, 2)] == [(0, 1), (2, 3, 4)]
    assert [executor.tenant_facts(slot).preemptions for slot in (1, 2)] == [None, 0]  # colored, and can be preempted
    assert executor.tenant_facts(2).guard_hits is None
    held = gpu.memory_free()
    with pytest.raises(MisuseError, match="'t1' and 't3' share some of their colors"):
        install(3, "BE", [1, 2])
    with pytest.raises(MisuseError, match="color"):
        install(3, "BE", [200])
    assert gpu.memory_free() == held
    executor.unload(1)
    install(3, "BE", [1, 5], "count_escapes = true")
    assert executor.tenant_facts(3).guard_hits == 0
    for slot in (2, 3):
        executor.unload(slot)
    assert gpu.memory_free() == before
    executor.close()


def test_translated_code_is_made_aside_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which code is needed is known when the memory is there; the engine's thread does not wait for it."""
    from missile.compiler.preemptible_code import PreemptibleKernels
    from missile.serving.engine import binding

    with open_gpu("sim:h100") as gpu:
        write_map(map_for(gpu, cache=tmp_path, interference=False), tmp_path / "map.json")
    package, _ = find_package("resnet34", 1, open_gpu("sim:h100").info)
    made: list[tuple[Any, str]] = []

    def color(package: ModelPackage, directory: Path, shape: Any, **_: Any) -> None:
        made.append((shape, threading.current_thread().name))

    monkeypatch.setattr(binding.Binder, "_package", lambda self, tenant, folder: (package, tmp_path))
    monkeypatch.setattr(binding, "colored_kernels", color)
    monkeypatch.setattr(binding, "is_colored", lambda directory, shape, **_: shape in [one for one, _ in made])
    monkeypatch.setattr(binding, "is_preemptible", lambda directory, shape=None: True)
    monkeypatch.setattr(
        binding, "preemptible_kernels", lambda package, directory, shape=None: PreemptibleKernels(shape, {})
    )
    text = '[[tenant]]\nname = "t"\nmodel = "resnet34"\nclass = "BE"\ncolors = [1, 2]\n'
    (tenant,) = parse_config(text).tenants
    client = _Client(
        lambda arena: GpuExecutor(arena, open_gpu("sim:h100"), policy="missile", channel_map=tmp_path / "map.json"),
        tmp_path,
    )
    for slot in (1, 2):
        assert client.load(slot, tenant)["op"] == "loaded"
        client.call(slot, slot, 1, 0)
        assert client.answer()[1] == Outcome.DONE
        assert client.ask({"op": "unload", "slot": slot})["op"] == "unloaded"
    (shape, thread), *again = made
    assert thread != client.thread.name
    assert [one for one, _ in again] in ([], [shape])  # what is kept is read, by whoever wants it
    client.stop()


HOSTED = """
[[tenant]]
name = "{name}"
model = "{model}"
class = "{kind}"
residency = "host"
weight = 2.0
batch = {{max = {batch}}}
{more}
"""


@pytest.mark.parametrize("policy", ["priority", "missile"])
def test_weights_come_in_from_the_host_within_the_budget(policy: str, tmp_path: Path) -> None:
    """Two hosted models of which one fits at a time, beside one on the device; they come and go."""
    batch = _recorded()["densenet161"]
    (front,) = parse_config(TENANTS.format(ls="resnet34", be="resnet34", batch=1)).tenants[:1]
    quick, bulk = (
        parse_config(HOSTED.format(name=name, model=model, kind=kind, batch=size, more=more)).tenants[0]
        for name, model, kind, size, more in (
            ("quick", "resnet34", "LS", 1, "slo_ms = 50"),
            ("bulk", "densenet161", "BE", batch, ""),
        )
    )
    gpu = open_gpu("sim:h100")
    before = gpu.memory_free()
    budget = 64 << 20  # resnet34 has 42 MiB of weights, densenet161 55
    executors = []

    def make(arena: memoryview) -> GpuExecutor:
        executors.append(GpuExecutor(arena, gpu, policy=policy, swap_bytes=budget))
        return executors[0]

    client = _Client(make, tmp_path)
    for slot, tenant in enumerate((front, quick, bulk), start=1):
        reply = client.load(slot, tenant)
        assert reply["op"] == "loaded", reply
    assert any("weights on the host" in note for note in reply["notes"])
    numbers = iter(range(10_000))
    for _ in range(4):
        asked = []
        for slot, size in ((2, 1), (3, 3), (1, 1), (2, 1), (1, 1)):
            asked.append(next(numbers))
            client.call(asked[-1], slot, size, (8 << 20) * len(asked))
        answers = [client.answer() for _ in asked]
        assert sorted(fields[0] for fields in answers) == asked
        assert {fields[1] for fields in answers} == {Outcome.DONE}
        for fields in answers:
            assert min(fields[4:8]) >= 0
    facts = [executors[0].tenant_facts(slot) for slot in (1, 2, 3)]
    assert facts[0].cold_starts is None
    assert all((one.cold_starts or 0) >= 2 for one in facts[1:])  # each has displaced the other
    assert [one.link_granted for one in facts] == ([0.2, 0.4, 0.4] if policy == "missile" else [None] * 3)
    assert facts[2].preemptions == (0 if policy == "missile" else None)  # hosted, and can be preempted
    assert client.ask({"op": "unload", "slot": 3})["op"] == "unloaded"
    client.call(next(numbers), 2, 1, 0)
    assert client.answer()[1] == Outcome.DONE
    assert client.ask({"op": "unload", "slot": 2})["op"] == "unloaded"
    client.call(next(numbers), 1, 1, 0)
    assert client.answer()[1] == Outcome.DONE
    assert client.ask({"op": "unload", "slot": 1})["op"] == "unloaded"
    assert gpu.memory_free() == before
    client.stop()


def test_what_can_not_be_hosted_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    gpu = open_gpu("sim:h100")
    before = gpu.memory_free()

    def install(more: str, swap_bytes: int) -> None:
        executor = GpuExecutor(memoryview(bytearray(1 << 20)), gpu, policy="missile", swap_bytes=swap_bytes)
        (tenant,) = parse_config(HOSTED.format(name="h", model="resnet34", kind="BE", batch=1, more=more)).tenants
        executor.install(1, tenant, executor.prepare(tenant, tmp_path))

    with pytest.raises(MisuseError, match=r"needs server\.swap_mib"):
        install("", 0)
    with pytest.raises(MisuseError, match=r"server\.swap_mib is 1"):
        install("", 1 << 20)
    with pytest.raises(UnsupportedError, match="colored memory"):
        install("colors = [0, 1]", 64 << 20)
    assert gpu.memory_free() == before


def test_a_tenant_that_does_not_fit_leaves_the_others_serving(tmp_path: Path) -> None:
    config = parse_config(TENANTS.format(ls="resnet34", be="bert_large", batch=_recorded()["bert_large"]))
    gpu = open_gpu("sim:h100")
    client = _Client(lambda arena: GpuExecutor(arena, gpu, policy="priority"), tmp_path)
    assert client.load(1, config.tenants[0])["op"] == "loaded"
    hog = gpu.allocate(gpu.memory_free() - (64 << 20))
    reply = client.load(2, config.tenants[1])
    assert reply["op"] == "failed"
    assert "'back'" in reply["error"]
    client.call(7, 1, 1, 0)
    assert client.answer()[:2] == (7, Outcome.DONE)
    hog.free()
    assert client.load(3, config.tenants[1])["op"] == "loaded"
    client.stop()


def test_what_a_gpu_cannot_serve_is_refused(tmp_path: Path) -> None:
    executor = GpuExecutor(memoryview(bytearray(4096)), open_gpu("sim:h100"), policy="priority")
    for line in ('model = "net.pt2"', 'model = "m:make"', 'model = "resnet34"\nweights = "a.safetensors"'):
        (tenant,) = parse_config(f'[[tenant]]\nname = "a"\nclass = "BE"\n{line}\n').tenants
        with pytest.raises(UnsupportedError, match="Tenant 'a'"):
            executor.prepare(tenant, tmp_path)
    executor.close()


FACTORY = """
import torch
from torch import nn

def small(batch):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                        nn.Linear(256, 10))
    return net.half(), torch.zeros(batch, 3, 64, 64, dtype=torch.float16)
"""


def _ask(client: _Client, signature: ModelSignature, slot: int, image: Any, offset: int = 0) -> Any:
    """One request's output, float32, (batch, values)."""
    batch = len(image)
    layout = BlockLayout.of(signature, batch)
    start = offset + layout.inputs[0]
    client.link.arena[start : start + image.nbytes] = image.tobytes()
    client.call(100 * slot + batch, slot, batch, offset)
    assert client.answer()[1] == Outcome.DONE
    start = offset + layout.outputs[0]
    raw = bytes(client.link.arena[start : start + layout.output_sizes[0]])
    return np.frombuffer(raw, np.float16).reshape(batch, -1).astype(np.float32)


def _run_directly(model: str, batch: int, image: Any) -> Any:
    """What the compiled package gives for `image`, run by itself on a stream."""
    gpu = open_gpu("cuda:0")
    package, directory = find_package(model, batch, gpu.info)
    bound = bind(package, directory, gpu, tenant="alone")
    inputs, outputs = gpu.allocate_host(bound.input_bytes), gpu.allocate_host(bound.output_bytes)
    inputs.array[:] = 0
    tensor_view(inputs, package.inputs[0], 0)[: len(image)] = image
    stream = gpu.create_stream()
    stream.copy_to_device(bound.input_address, inputs)
    stream.launch_graph(bound.graph)
    stream.copy_to_host(outputs, bound.output_address)
    stream.synchronize()
    found = tensor_view(outputs, package.outputs[0], 0)[: len(image)].astype(np.float32)
    gpu.close()
    return found.reshape(len(image), -1)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["priority", "partition", "missile"])
def test_served_outputs_are_the_packages_own(policy: str, tmp_path: Path) -> None:
    """Whole and padded batches, bit for bit what the same packages give when they are run directly."""
    config = parse_config(TENANTS.format(ls="resnet34", be="densenet161", batch=32))
    client = _Client(lambda arena: GpuExecutor(arena, open_gpu("cuda:0"), policy=policy), tmp_path)
    signatures = {}
    for slot, tenant in enumerate(config.tenants, start=1):
        reply = client.load(slot, tenant)
        assert reply["op"] == "loaded", reply
        signatures[slot] = ModelSignature.from_json(reply["signature"])
    rng = np.random.default_rng(0)
    for slot, batch in ((1, 1), (2, 1), (2, 3), (2, 32), (2, 2)):
        image = rng.standard_normal((batch, 3, 224, 224)).astype(np.float16)
        tenant = config.tenants[slot - 1]
        ours = _ask(client, signatures[slot], slot, image)
        expected = _run_directly(tenant.model, tenant.batch.max, image)
        np.testing.assert_array_equal(ours, expected, err_msg=f"{tenant.model}, batch {batch}")
    client.stop()


@pytest.mark.gpu
def test_colored_tenants_give_the_same_bits(tmp_path: Path) -> None:
    """Two tenants in colors of their own, side by side. Needs a channel map in the cache, or a minute to measure one."""
    text = TENANTS.format(ls="resnet34", be="resnet34", batch=1)
    text = text.replace('class = "LS"', 'class = "LS"\ncolors = [0, 2, 5]').replace('"BE"', '"BE"\ncolors = [1, 3, 4]')
    client = _Client(lambda arena: GpuExecutor(arena, open_gpu("cuda:0"), policy="missile"), tmp_path)
    for slot, tenant in enumerate(parse_config(text).tenants, start=1):
        reply = client.load(slot, tenant)
        assert reply["op"] == "loaded", reply
    signature = ModelSignature.from_json(reply["signature"])
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float16)
    expected = _run_directly("resnet34", 1, image)
    for slot in (1, 2, 1):
        np.testing.assert_array_equal(_ask(client, signature, slot, image), expected)
    client.stop()


@pytest.mark.gpu
def test_hosted_weights_give_the_same_bits(tmp_path: Path) -> None:
    """Cold and warm: two hosted models of which one fits at a time, beside one on the device."""
    (front,) = parse_config(TENANTS.format(ls="resnet34", be="resnet34", batch=1)).tenants[:1]
    hosted = [
        parse_config(HOSTED.format(name=name, model=model, kind="BE", batch=size, more="")).tenants[0]
        for name, model, size in (("one", "resnet34", 1), ("two", "densenet161", 32))
    ]
    client = _Client(
        lambda arena: GpuExecutor(arena, open_gpu("cuda:0"), policy="missile", swap_bytes=64 << 20), tmp_path
    )
    signatures = {}
    for slot, tenant in enumerate((front, *hosted), start=1):
        reply = client.load(slot, tenant)
        assert reply["op"] == "loaded", reply
        signatures[slot] = ModelSignature.from_json(reply["signature"])
    rng = np.random.default_rng(0)
    sizes = {1: 1, 2: 1, 3: 3}
    images = {slot: rng.standard_normal((n, 3, 224, 224)).astype(np.float16) for slot, n in sizes.items()}
    models = {1: ("resnet34", 1), 2: ("resnet34", 1), 3: ("densenet161", 32)}
    expected = {slot: _run_directly(*models[slot], image) for slot, image in images.items()}
    for slot in (2, 2, 3, 1, 2, 3, 3, 1):
        np.testing.assert_array_equal(_ask(client, signatures[slot], slot, images[slot]), expected[slot])
    client.stop()


@pytest.mark.gpu
def test_a_factory_of_ones_own_is_compiled_and_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("MISSILE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "gpu_serving_models.py").write_text(FACTORY)
    (tenant,) = parse_config(
        '[[tenant]]\nname = "own"\nmodel = "gpu_serving_models:small"\nclass = "BE"\nbatch = {max = 4}'
    ).tenants
    client = _Client(lambda arena: GpuExecutor(arena, open_gpu("cuda:0"), policy="priority"), tmp_path)
    reply = client.load(1, tenant)
    assert reply["op"] == "loaded", reply
    monkeypatch.syspath_prepend(tmp_path)
    from gpu_serving_models import small

    module = small(4)[0].cuda().eval()
    rng = np.random.default_rng(0)
    for batch in (1, 3, 4):
        image = rng.standard_normal((batch, 3, 64, 64)).astype(np.float16)
        ours = _ask(client, ModelSignature.from_json(reply["signature"]), 1, image)
        with torch.inference_mode():
            eager = module(torch.from_numpy(image).cuda()).float().cpu().numpy()
        assert np.linalg.norm(ours - eager) / np.linalg.norm(eager) < 1e-2
    client.stop()
