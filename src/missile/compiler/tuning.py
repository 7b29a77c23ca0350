"""What tuning found, kept as data, and Inductor told to use it.

One JSON file per GPU model in `autotune/`: the best tile of every matrix product and convolution that was measured, by
shapes and strides, and the best block sizes of every fused kernel, by the hash of its source. A problem in the table is
compiled once, with that choice; one that is not is measured over `tiles.candidates` and added.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from missile.compiler.tiles import Problem, Tile, candidates
from missile.errors import MisuseError
from missile.files import write_whole

__all__ = ["AUTOTUNE", "TuningTable", "choose_tiles", "table_path"]

AUTOTUNE = Path(__file__).parent / "autotune"
_FORMAT = 1


@dataclass(slots=True)
class TuningTable:
    """tiles: problem key -> best tile. blocks: hash of a fused kernel's source -> its block sizes, warps and stages.

    measured: how many entries this process added.
    """

    gpu: str
    tiles: dict[str, Tile] = field(default_factory=dict)
    blocks: dict[str, dict[str, int]] = field(default_factory=dict)
    measured: int = 0

    @classmethod
    def load(cls, path: Path, gpu: str) -> TuningTable:
        """The table at `path`; an empty one when there is none. MisuseError for a broken file."""
        try:
            raw = json.loads(path.read_text())
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']!r}")
            tiles = {key: Tile(*values) for key, values in raw["tiles"].items()}
            return cls(raw["gpu"], tiles, dict(raw["blocks"]))
        except FileNotFoundError:
            return cls(gpu)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MisuseError(f"The tuning table {path} can't be read: {error}.") from error

    def find(self, key: str) -> Tile | None:
        """The tile for a problem: its own, or that of a problem that differs in the length of its sums alone, and little.

        (Consecutive layers of a DenseNet are such problems: 82 of them, of which a dozen need measuring.)
        """
        if (tile := self.tiles.get(key)) is not None:
            return tile
        shape, length = _split_length(key)
        if not length:
            return None
        near = [
            (abs(math.log(other / length)), name)
            for name in self.tiles
            for rest, other in (_split_length(name),)
            if rest == shape and other and 0.75 < other / length < 1.34
        ]
        return self.tiles[min(near)[1]] if near else None

    def merge(self, other: TuningTable) -> None:
        """Take over `other`'s entries; its choice wins where both have one."""
        self.tiles.update(other.tiles)
        self.blocks.update(other.blocks)

    def save(self, path: Path) -> None:
        """Write, whole or not at all, sorted so that differences between versions are readable."""
        tiles = {key: list(astuple(self.tiles[key])) for key in sorted(self.tiles)}
        blocks = {key: self.blocks[key] for key in sorted(self.blocks)}
        lines = [
            "{",
            f'"format": {_FORMAT},',
            f'"gpu": {json.dumps(self.gpu)},',
            '"tiles": {',
            ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in tiles.items()),
            "},",
            '"blocks": {',
            ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in blocks.items()),
            "}}",
        ]
        write_whole(path, "\n".join(lines) + "\n")


def table_path(gpu: str) -> Path:
    """Where the table of a GPU model lies."""
    return AUTOTUNE / f"{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}.json"


@contextmanager
def choose_tiles(
    table: TuningTable, *, count: int = 5, measuring: AbstractContextManager[object] | None = None
) -> Iterator[None]:
    """While active, Inductor's tile and block choices come from `table`, and what is measured goes into it.

    count: how many candidates to try for a problem that is not in the table.
    measuring: entered around each measurement (a lock, where several processes share the GPU).
    """
    from torch._inductor import config, select_algorithm
    from torch._inductor.runtime import benchmarking, triton_heuristics
    from torch._inductor.virtualized import V

    from missile.compiler.timing import quick_ns

    guard = measuring or nullcontext()
    chooser = _make_choices(table, count)
    autotuner = triton_heuristics.CachingAutotuner
    tune_blocks = autotuner.autotune_to_one_config
    selector = select_algorithm.get_algorithm_selector_cache()

    def measure_ms(run: Callable[[], Any], *_: Any, **__: Any) -> float:
        # Instead of Inductor's own measurement, which takes ten times longer and sees how busy the host is.
        run()
        with guard:
            return quick_ns(run) * 1e-6

    def tune_and_remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = tune_blocks(self, *args, **kwargs)
        _remember_blocks(table, self)
        return result

    def remember(timings: Mapping[Any, float], name: str, nodes: Any, *_: Any) -> None:
        if chooser.problem and timings:
            table.tiles[chooser.problem] = _tile_of(min(timings, key=lambda choice: timings[choice]))
            table.measured += 1

    with ExitStack() as stack:
        stack.enter_context(V.set_choices_handler(chooser))
        stack.enter_context(mock.patch.object(benchmarking.benchmarker, "benchmark_gpu", measure_ms))
        stack.enter_context(mock.patch.object(autotuner, "autotune_to_one_config", tune_and_remember))
        stack.enter_context(config.patch(autotune_lookup_table=dict(table.blocks)))
        select_algorithm.add_feedback_saver(remember)
        stack.callback(selector.feedback_saver_fns.remove, remember)
        yield


def _make_choices(table: TuningTable, count: int) -> Any:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.triton_compat import Config
    from torch._inductor.template_heuristics.registry import get_template_heuristic
    from torch._inductor.template_heuristics.triton import GemmConfig

    class Choices(InductorChoices):  # type: ignore[misc]
        """Candidates from the table, or from the cost model. `problem`: the key of what is being chosen for."""

        problem = ""
        convolution: tuple[str, Problem] | None = None  # set by the convolution lowering around each call

        def get_ktc(self, kernel_inputs: Any, template: Any, op_name: str, *rest: Any, **kwargs: Any) -> Any:
            nodes = kernel_inputs.nodes()
            m, n, k = (int(size) for size in kernel_inputs.mnk_symbolic())
            first = [int(size) for size in nodes[-2].get_size()]
            batch = first[0] if len(first) == 3 else 1
            layouts = " ".join(f"{_sizes(node)}@{_strides(node)}" for node in nodes)
            self.problem = f"{op_name} {layouts} {str(kernel_inputs.dtype()).removeprefix('torch.')}"
            heuristic = get_template_heuristic(template.uid, kernel_inputs.device_type, op_name)
            if hasattr(heuristic, "mm_configs"):
                tiles = self._tiles(Problem(m, n, k, batch))
                heuristic.mm_configs = [GemmConfig(t.m, t.n, t.k, t.stages, t.warps) for t in tiles]
            return super().get_ktc(kernel_inputs, template, op_name, *rest, **kwargs)

        def get_conv_configs(self, device_type: str | None = "cuda") -> Any:
            if self.convolution is None:
                return super().get_conv_configs(device_type)
            self.problem, problem = self.convolution
            # Inductor limits its convolution template to 4 warps, except for 1x1 kernels.
            tiles = self._tiles(problem, max_warps=8 if problem.taps == 1 else 4)
            configs = [
                Config({"BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k}, num_stages=t.stages, num_warps=t.warps)
                for t in tiles
            ]
            return lambda *_, **__: iter(configs)

        def _tiles(self, problem: Problem, max_warps: int = 8) -> tuple[Tile, ...]:
            known = table.find(self.problem)
            return (known,) if known else candidates(problem, count=count, max_warps=max_warps)

    return Choices()


def _split_length(key: str) -> tuple[str, int]:
    """A matrix product's key without the length of its sums (sizes and strides both tell it), and that; 0 for others.

    Keys of `mm` and `addmm` end in `MxK@... KxN@... dtype`.
    """
    match = re.fullmatch(r"((?:add)?mm .*?)(\d+)x(\d+)@(\d+)x(\d+) (\d+)x(\d+)@(\d+)x(\d+) (\w+)", key)
    if match is None or match[3] != match[6]:
        return key, 0
    strides = ("1" if stride == "1" else "k" for stride in match.group(4, 5))
    shape = f"{match[1]}{match[2]}x{match[7]} {'x'.join(strides)} {match[8] == '1'} {match[10]}"
    return shape, int(match[3])


def _tile_of(choice: Any) -> Tile:
    info = choice.info_dict()
    m, k, n = (int(side) for side in re.findall(r"-?\d+", str(info["tile_shape"])))
    return Tile(m, n, k, int(info["num_stages"]), int(info["num_warps"]))


def _remember_blocks(table: TuningTable, autotuner: Any) -> None:
    from torch._inductor.runtime.triton_heuristics import generate_lookup_hash_from_source_code

    source = autotuner.fn.src
    if "_fused_" not in source:  # Inductor looks only such kernels up
        return
    config = autotuner.launchers[0].config
    key = generate_lookup_hash_from_source_code(str(autotuner.size_hints), source)
    blocks = {name: int(value) for name, value in config.kwargs.items() if "BLOCK" in name}
    table.blocks[key] = {**blocks, "num_warps": config.num_warps, "num_stages": config.num_stages}
    table.measured += 1


def _sizes(node: Any) -> str:
    return _numbers(node.get_size())


def _strides(node: Any) -> str:
    return _numbers(node.get_stride())


def _numbers(values: Any) -> str:
    return "x".join(str(int(value)) for value in values)
