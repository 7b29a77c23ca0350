"""PyTorch's Inductor made to write a whole model as Triton kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from missile.compiler.convolution import convolution_lowering
from missile.compiler.tuning import TuningTable, choose_tiles
from missile.errors import UnsupportedError
from missile.workloads.models import BuiltModel

__all__ = ["compile_triton_only", "foreign_operators"]

_SETTINGS: dict[str, Any] = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "TRITON",
    "max_autotune_conv_backends": "TRITON",
    "autotune_in_subproc": False,
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
    "benchmark_epilogue_fusion": False,  # else every fusion decision compiles and measures variants
    "triton.num_decompose_k_splits": 0,  # those go through a vendor's batched product
    "freezing": True,
    "freezing_discard_parameters": False,  # the eager model is still needed, to compare with
    "layout_optimization": True,
    "force_layout_optimization": True,  # the default declines it for models with many depthwise convolutions
    "shape_padding": False,
    "use_static_cuda_launcher": False,  # it keeps neither PTX nor the compiled kernel
    "allow_buffer_reuse": False,  # lifetimes stay exact; the package's own planner shares memory
    "fx_graph_cache": False,  # its key knows nothing of our lowerings and choices
}


def compile_triton_only(
    model: BuiltModel, table: TuningTable, *, measuring: AbstractContextManager[object] | None = None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Compile `model` for its example inputs; returns a function that runs it and gives its outputs.

    UnsupportedError naming the operator when it can't be compiled, or not without a vendor's kernel.
    """
    from torch._inductor.utils import run_and_get_code

    with _triton_only(table, measuring), torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(model.module, fullgraph=True, dynamic=False)
        try:
            _, sources = run_and_get_code(compiled, *model.inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Inductor's and Dynamo's own, of many kinds
            raise UnsupportedError(f"Model {model.name!r} can't be compiled: {_reason(error)}.") from error
    foreign = foreign_operators("\n".join(sources))
    if foreign:
        raise UnsupportedError(
            f"Model {model.name!r} can't be compiled to Triton kernels alone: {', '.join(foreign)} would run elsewhere."
        )

    def run() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return model.outputs_of(compiled(*model.inputs))

    return run


def foreign_operators(source: str) -> list[str]:
    """The operators that Inductor's generated code calls instead of a Triton kernel, sorted."""
    calls = re.findall(r"(?:^|=)\s*(?:extern_kernels\.(\w+)|torch\.ops\.([\w.]+))\(", source, re.MULTILINE)
    return sorted({(extern or operator).removesuffix(".default") for extern, operator in calls})


@contextmanager
def _triton_only(table: TuningTable, measuring: AbstractContextManager[object] | None) -> Iterator[None]:
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with ExitStack() as stack:
        stack.enter_context(config.patch(_SETTINGS))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the only form made of operators that Inductor can write
        reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        # Its products stay in fp16 (with fp32 sums), as in the fused forms; else they run in fp32, without matrix units.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        stack.callback(torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, reduced)
        stack.enter_context(choose_tiles(table, measuring=measuring))
        stack.enter_context(convolution_lowering())
        yield


def _reason(error: BaseException) -> str:
    """The operator and what it said, in one line."""
    text = str(error)
    target = re.search(r"target: ([\w.]+)", text)
    message = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    message = re.sub(r"^\w*(?:Exception|Error): ", "", message)[:200].rstrip(".")
    return f"operator {target[1].removesuffix('.default')}: {message}" if target else message
