"""Whole networks beside stock ones: three optimiser steps in training and in eval, and the detection backbone.

In float64 both are the same computation in another order, so every output, gradient, weight and buffer must agree over
three steps (models.assert_trains_alike says how nearly); a wrong factor anywhere shows at once. float32 and bfloat16
are judged by their own error.
"""

import copy

import pytest
import torch
import torchvision
from cases import draw
from conftest import native_missing
from models import assert_trains_alike, count_fused_calls, fast_blocks, first_tensor, lively, pair
from numerics import assert_all_match
from torch import nn

import resnet_fast

NETWORKS = {  # name -> model, image size
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 40),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), 33),
    "resnext50_32x4d": (lambda: torchvision.models.resnext50_32x4d(num_classes=10), 33),
    "wide_resnet50_2": (lambda: torchvision.models.wide_resnet50_2(num_classes=10), 33),
    "fcn_resnet50": (lambda: segmentation("fcn_resnet50"), 33),
    "deeplabv3_resnet50": (lambda: segmentation("deeplabv3_resnet50"), 33),
}
ONCE = ("wide_resnet50_2", "fcn_resnet50", "deeplabv3_resnet50")  # costly: one step, on the fastest backend
TWIN = "resnet50"  # resnext50_32x4d has its blocks, with groups: on the fastest backend, too


def segmentation(name):
    make = getattr(torchvision.models.segmentation, name)
    return make(weights=None, weights_backbone=None, num_classes=3)


def network(name):
    torch.manual_seed(4)
    make, size = NETWORKS[name]
    return lively(make()), size


@pytest.mark.parametrize("name", NETWORKS)
def test_training(name, backend):
    if name in (TWIN, *ONCE):
        leave_to_native(backend)
    model, size = network(name)
    stock_model, fast_model = pair(model.double().train(), backend)
    images = [draw((2, 3, size, size), torch.float64, "channels_last") for _ in range(3)]
    with count_fused_calls() as calls:
        assert_trains_alike(without_dropout(stock_model), without_dropout(fast_model), images, 1 if name in ONCE else 3)
    assert calls() >= 16


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "fcn_resnet50"])
def test_fine_tuning_in_eval_mode(name, backend):
    if name == TWIN:
        leave_to_native(backend)
    model, size = network(name)
    stock_model, fast_model = pair(model.double().eval(), backend)
    images = [draw((2, 3, size, size), torch.float64) for _ in range(3)]
    assert_trains_alike(stock_model, fast_model, images, 1 if name in ONCE else 3)


def leave_to_native(backend):
    if backend == "reference" and native_missing() is None:
        pytest.skip("the native backend takes it")


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_inference(name, dtype, backend):
    model, size = network(name)
    stock_model, fast_model = pair(model.to(dtype).eval(), backend)
    exact_model = copy.deepcopy(stock_model).double()
    x = draw((4, 3, size, size), dtype, "channels_last")
    with torch.no_grad():
        ours, theirs, exact = fast_model(x), stock_model(x), exact_model(x.double())
    assert_all_match({"logits": ours}, {"logits": theirs}, {"logits": exact})
    assert exact.std() > 1e-3, "logits that are all alike would match whatever the blocks do"


def test_float32_training_is_as_near_to_float64_as_stock(backend):
    """One step of resnet18: every gradient's and buffer's error against float64 beside stock PyTorch's.

    No value is near a ReLU's kink, where rounding would decide which of two gradients, far apart, is compared."""
    model, _ = network("resnet18")
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.clamp_(-1, 1)
            module.bias.data.fill_(12.0)
            if not name.endswith(("bn2", "downsample.1")):  # what is joined stays above zero
                module.bias.data[::2] = -12.0
    stock_model, fast_model = pair(model.train(), backend)
    exact_model = copy.deepcopy(stock_model).double()
    x = draw((4, 3, 64, 64), torch.float32, "channels_last")
    results = []
    for network_ in (fast_model, stock_model, exact_model):
        y = network_(x.to(network_.fc.weight.dtype))
        y.square().sum().backward()
        results.append({name: parameter.grad for name, parameter in network_.named_parameters()})
        results[-1] |= {name: buffer for name, buffer in network_.named_buffers() if "running" in name}
        results[-1]["y"] = y
    ours, theirs, exact = (torch.cat([t.detach().double().flatten() for t in result.values()]) for result in results)
    error, stock_error = (ours - exact).norm(), (theirs - exact).norm()
    assert error <= 2 * stock_error, (
        f"relative error {error / exact.norm():.3g}, PyTorch's {stock_error / exact.norm():.3g}"
    )
    assert stock_error <= 1e-3 * exact.norm()


def test_detection_backbone_with_frozen_batch_norm(backend):
    """fasterrcnn_resnet50_fpn: FrozenBatchNorm2d, whose eps is 0 in older checkpoints, trained through the backbone."""
    torch.manual_seed(4)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None,
                                                                 trainable_backbone_layers=3).backbone  # fmt: skip
    if not any(type(module).__name__ == "FrozenBatchNorm2d" for module in model.modules()):
        body = torchvision.models.resnet50(norm_layer=torchvision.ops.misc.FrozenBatchNorm2d)
        model.body = torchvision.models._utils.IntermediateLayerGetter(body, model.body.return_layers)
    torchvision.models.detection._utils.overwrite_eps(model, 0.0)
    stock_model, fast_model = pair(lively(model).double(), backend)
    assert {type(module.bn1).__name__ for module in fast_blocks(fast_model)} == {"FrozenBatchNorm2d"}
    assert {module.bn1.eps for module in fast_blocks(fast_model)} == {0.0}
    x = draw((1, 3, 64, 64), torch.float64)
    outputs, grads = [], []
    for backbone in (stock_model, fast_model):
        features = backbone(x)
        outputs.append(features)
        sum(feature.square().mean() for feature in features.values()).backward()
        grads.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    torch.testing.assert_close(dict(outputs[1]), dict(outputs[0]), rtol=1e-7, atol=1e-9)
    assert len(grads[0]) > 20
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_whole_detector(backend):
    torch.manual_seed(4)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5,
                                                                 min_size=96, max_size=128)  # fmt: skip
    stock_model, fast_model = pair(lively(model).double().eval(), backend)
    image = [torch.rand(3, 100, 120, dtype=torch.float64)]
    with torch.no_grad():
        theirs, ours = stock_model(image)[0], fast_model(image)[0]
    assert theirs["boxes"].shape[0] > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_every_torchvision_resnet_is_known():
    """resnet18 to 152, resnext, wide_resnet and the segmentation models: all their blocks, on the meta device."""
    counts = {
        "resnet18": 8,
        "resnet34": 16,
        "resnet50": 16,
        "resnet101": 33,
        "resnet152": 50,
        "resnext50_32x4d": 16,
        "resnext101_32x8d": 33,
        "resnext101_64x4d": 33,
        "wide_resnet50_2": 16,
        "wide_resnet101_2": 33,
    }
    with torch.device("meta"):
        for name, count in counts.items():
            model = resnet_fast.optimize(getattr(torchvision.models, name)(), backend="reference", strict=True)
            assert (len(fast_blocks(model)), model.resnet_fast_report.fused) == (count, count), name
        for name in ("fcn_resnet101", "deeplabv3_resnet101"):
            assert len(fast_blocks(resnet_fast.optimize(segmentation(name), backend="reference", strict=True))) == 33


def test_dilated_backbones_run_fused(backend):
    """replace_stride_with_dilation, as the segmentation models use it."""
    torch.manual_seed(4)
    model = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True], num_classes=5)
    stock_model, fast_model = pair(lively(model).double().eval(), backend)
    x = draw((1, 3, 48, 48), torch.float64)
    with torch.no_grad():
        theirs, ours = first_tensor(stock_model(x)), first_tensor(fast_model(x))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
