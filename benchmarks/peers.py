"""Linear layers as others run them: what `benchmarks/linear.py` compares the native one with.

Each peer is made once per shape and thread count from the same weight and bias, and returns a
call without arguments. A package that is not installed is reported, never quietly left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """y = x Wᵀ + b in float32: x [M, K], weight [N, K], bias [N]."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    threads: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, K, N)."""
        return self.x.shape[0], self.x.shape[1], self.weight.shape[0]


@dataclass(frozen=True)
class Peer:
    """bits: of the weights that it reads."""

    name: str
    bits: int
    make: Callable[[Problem], Call]


def torch_float32(p: Problem) -> Call:
    """torch.nn.functional.linear."""
    return lambda: torch.nn.functional.linear(p.x, p.weight, p.bias)


def torch_bfloat16(p: Problem) -> Call:
    """The same in bfloat16, input included."""
    x, weight, bias = p.x.bfloat16(), p.weight.bfloat16(), p.bias.bfloat16()
    return lambda: torch.nn.functional.linear(x, weight, bias)


def torch_int8(p: Problem) -> Call:
    """quantize_dynamic: int8 weights, the input rounded at each call."""
    linear = torch.nn.Linear(p.weight.shape[1], p.weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(p.weight)
        linear.bias.copy_(p.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8
        )
    return lambda: quantized(p.x)


def _int4(weight: Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(nibbles uint8 [N, K] of value + 8, scale f32 [N, K / group])."""
    parts = weight.view(weight.shape[0], -1, group)
    scale = parts.abs().amax(-1) / 7
    q = (parts / scale.unsqueeze(-1)).round().clamp(-8, 7) + 8
    return q.view(weight.shape).to(torch.uint8).numpy(), scale.numpy()


def _onnx_session(nodes: list[Any], tensors: dict[str, np.ndarray], p: Problem) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    m, k, n = p.shape
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = p.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    bound = session.io_binding()
    bound.bind_cpu_input("x", p.x.numpy())
    bound.bind_output("y")
    return lambda: session.run_with_iobinding(bound)


def onnx_int4(group: int) -> Callable[[Problem], Call]:
    """MatMulNBits, accuracy level 4: the input rounded to int8 in blocks."""

    def make(p: Problem) -> Call:
        from onnx import helper

        _, k, n = p.shape
        q, scale = _int4(p.weight, group)
        packed = (q[:, 0::2] | q[:, 1::2] << 4).reshape(n, k // group, group // 2)
        node = helper.make_node(
            "MatMulNBits", ["x", "q", "scale", "", "", "bias"], ["y"], domain="com.microsoft",
            K=k, N=n, bits=4, block_size=group, accuracy_level=4,
        )  # fmt: skip
        tensors = {"q": packed, "scale": scale.reshape(-1), "bias": p.bias.numpy()}
        return _onnx_session([node], tensors, p)

    return make


def onnx_int8(p: Problem) -> Call:
    """DynamicQuantizeMatMul: int8 weights per column, the input rounded at each call."""
    from onnx import helper

    scale = p.weight.abs().amax(1) / 127
    q = (p.weight / scale.unsqueeze(1)).round().to(torch.int8).T.contiguous().numpy()
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "q", "scale", "zero", "bias"], ["y"], domain="com.microsoft"
    )
    zero = np.zeros(q.shape[1], dtype=np.int8)
    tensors = {"q": q, "scale": scale.numpy(), "zero": zero, "bias": p.bias.numpy()}
    return _onnx_session([node], tensors, p)


def _openvino_request(weight: Any, p: Problem, config: dict[str, Any]) -> Call:
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter(list(p.x.shape), np.float32, name="x")
    product = ops.matmul(x, weight, transpose_a=False, transpose_b=True)
    y = ops.add(product, ops.constant(p.bias.numpy()[None]))
    config = {"INFERENCE_NUM_THREADS": p.threads, "PERFORMANCE_HINT": "LATENCY", **config}
    compiled = openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", config)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(p.x.numpy(), shared_memory=True))
    return request.infer


def openvino_float32(p: Problem) -> Call:
    """Float32 all through."""
    from openvino import opset13 as ops

    config = {"INFERENCE_PRECISION_HINT": "f32"}
    return _openvino_request(ops.constant(p.weight.numpy()), p, config)


def openvino_int4(p: Problem) -> Call:
    """int4 weights in groups of 128, the input rounded to int8 in groups of as many."""
    import openvino
    from openvino import opset13 as ops

    _, k, n = p.shape
    q, scale = _int4(p.weight, 128)
    packed = q[:, 0::2] | q[:, 1::2] << 4
    stored = openvino.Tensor(packed, [n, k // 128, 128], openvino.Type.u4)
    integers = ops.convert(openvino.op.Constant(stored), "f16")
    centred = ops.subtract(integers, ops.constant(np.float16(8)))
    scaled = ops.multiply(centred, ops.constant(scale.astype(np.float16)[..., None]))
    whole = ops.reshape(scaled, ops.constant(np.array([n, k])), special_zero=False)
    weight = ops.convert(whole, "f32")
    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
    return _openvino_request(weight, p, config)


def ggml_q4_0(p: Problem) -> Call:
    """4-bit weights in groups of 32, the input rounded to int8 in groups of as many. No bias: the
    product alone."""
    import peers_ggml

    return peers_ggml.product(p.weight, p.x, p.threads)


PEERS = (
    Peer("torch fp32", 32, torch_float32),
    Peer("torch bf16", 16, torch_bfloat16),
    Peer("torch int8", 8, torch_int8),
    Peer("ort int8", 8, onnx_int8),
    Peer("ort int4 g32", 4, onnx_int4(32)),
    Peer("ort int4 g128", 4, onnx_int4(128)),
    Peer("openvino fp32", 32, openvino_float32),
    Peer("openvino int4", 4, openvino_int4),
    Peer("llama.cpp Q4_0", 4, ggml_q4_0),
)
