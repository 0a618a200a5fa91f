"""The contenders that `resnet-fast bench` lacks, each as a `contenders.Variant` of the same network, or why it is none.

Every one gives PyTorch's answer in PyTorch's dtype: engines that compute in bfloat16 hand out float32 logits, which are
rounded as autocast's are. They get as many threads as PyTorch, and the images in the layout that they take.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from resnet_fast import optimize
from resnet_fast.cli.contenders import Setting, Variant

from . import jemalloc

REQUESTS_A_THREAD = 2
"""Batches in flight for each thread in one call of OpenVINO's throughput mode."""


@dataclass(frozen=True)
class Other:
    """make(setting) is its `prepare`; packages are what it imports. layout: of the images it gets. context: by setting,
    None for none."""

    label: str
    make: Callable[[Setting], Callable[[nn.Module], Callable[[Tensor], Tensor]]]
    packages: tuple[str, ...] = ()
    layout: torch.memory_format = torch.channels_last
    context: Callable[[Setting], contextlib.AbstractContextManager] | None = None
    why_not: Callable[[Setting], str | None] = lambda setting: None
    in_flight: bool = False

    def reason(self, setting: Setting) -> str | None:
        """Why it cannot take part here; None where it can."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            return f"{' and '.join(missing)} not installed: pip install 'resnet-fast[peers]'"
        return self.why_not(setting)

    def variant(self, name: str, setting: Setting) -> Variant:
        """As `contenders.inference` takes it."""
        context = contextlib.nullcontext if self.context is None else functools.partial(self.context, setting)
        images = setting.images.contiguous(memory_format=self.layout)
        repeats = REQUESTS_A_THREAD * torch.get_num_threads() if self.in_flight else 1
        return Variant(name, self.label, self.make(setting), images, context, repeats)


def training(setting: Setting) -> Iterator[Variant]:
    """PyTorch's fused SGD behind the stock network and behind ours."""
    how = {"images": setting.images, "context": setting.autocast, "sgd": {"fused": True}}
    yield Variant("eager_fused_sgd", "eager channels_last, fused SGD", lambda model: model, **how)
    ours = functools.partial(optimize, backend=setting.backend)
    yield Variant("fast_fused_sgd", "ours, optimize(), fused SGD", ours, **how)


def _folded(setting: Setting) -> Callable:
    """`fuse_conv_bn_eval` on every pair in float32, then one cast: more exact and faster than under autocast."""

    def prepare(model: nn.Module) -> Callable[[Tensor], Tensor]:
        dtype = setting.amp_dtype or torch.float32
        network = fuse(model).to(dtype, memory_format=torch.channels_last)
        return lambda images: network(images.to(dtype))

    return prepare


def _onednn_graph(setting: Setting) -> Callable:
    """Traced under autocast, as PyTorch's documentation has it, so that the graph holds the casts."""

    def prepare(model: nn.Module) -> Callable[[Tensor], Tensor]:
        torch.jit.enable_onednn_fusion(True)
        torch._C._jit_set_autocast_mode(False)
        with torch.no_grad(), _uncached_autocast(setting):
            traced = torch.jit.freeze(torch.jit.trace(model, setting.images))
            for _ in range(3):  # profiled, then compiled
                traced(setting.images)
        if "oneDNNFusionGroup" not in str(torch.jit.last_executed_optimized_graph()):
            raise RuntimeError("oneDNN Graph took none of the layers")
        return traced

    return prepare


def _uncached_autocast(setting: Setting):
    return torch.autocast("cpu", setting.amp_dtype, enabled=setting.amp_dtype is not None, cache_enabled=False)


def _openvino(hint: str, setting: Setting) -> Callable:
    def prepare(model: nn.Module) -> Callable[[Tensor], Tensor]:
        import openvino

        images = setting.images.contiguous()
        settings = {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_PRECISION_HINT": "bf16" if setting.amp_dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        converted = openvino.convert_model(model, example_input=images, input=list(images.shape))
        compiled = openvino.Core().compile_model(converted, "CPU", settings)
        dtype = setting.amp_dtype or torch.float32
        if hint == "LATENCY":
            request = compiled.create_infer_request()
            return lambda x: _tensor(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0], dtype)
        return functools.partial(_in_flight, openvino.AsyncInferQueue(compiled), dtype)

    return prepare


def _in_flight(queue, dtype: torch.dtype, images: Tensor) -> Tensor:
    """Several batches at once, as many at a time as OpenVINO finds best; the logits of one that finished."""
    for _ in range(REQUESTS_A_THREAD * torch.get_num_threads()):
        queue.start_async([images.numpy()], share_inputs=True)
    queue.wait_all()
    return _tensor(queue[0].get_output_tensor(0).data, dtype)


def _onnxruntime(setting: Setting) -> Callable:
    def prepare(model: nn.Module) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        program = torch.onnx.export(model, (setting.images.contiguous(),), dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads spin as they do by default, but no longer than a call lasts: others have their turn then.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model_bytes = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"])
        (source,) = session.get_inputs()
        return lambda images: _tensor(session.run(None, {source.name: images.numpy()})[0], torch.float32)

    return prepare


def _tensor(logits, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(logits).to(dtype)


def _not_under_jemalloc(setting: Setting) -> str | None:
    return "it ends the process under jemalloc, with free(): invalid pointer (2026.4.1)" if jemalloc.loaded() else None


def _float32_alone(setting: Setting) -> str | None:
    return None if setting.amp_dtype is None else "its CPU provider has no bfloat16 convolution"


_ENGINE = {"layout": torch.contiguous_format}
_OPENVINO = {"packages": ("openvino",), "why_not": _not_under_jemalloc, **_ENGINE}

INFERENCE = {
    "folded": Other("eager channels_last, BN folded", _folded),
    "onednn_graph": Other("TorchScript + oneDNN Graph", _onednn_graph, context=_uncached_autocast),
    "openvino_latency": Other("OpenVINO, latency", functools.partial(_openvino, "LATENCY"), **_OPENVINO),
    "openvino_throughput": Other(
        "OpenVINO, throughput", functools.partial(_openvino, "THROUGHPUT"), in_flight=True, **_OPENVINO
    ),
    "onnxruntime": Other(
        "ONNX Runtime", _onnxruntime, ("onnxruntime", "onnx", "onnxscript"), **_ENGINE, why_not=_float32_alone
    ),
}
"""By name, in the order they are shown."""
