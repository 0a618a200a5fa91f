"""Which backend runs, and what is said where one cannot."""

import pytest
import torch
from conftest import native_expected, native_missing

from resnet_fast import BackendUnavailable, dispatch, extension, functional

CALL = ("bn_act", "cpu", torch.float32)


def unplug(monkeypatch, reason="the cable is unplugged"):
    monkeypatch.setattr(dispatch.load("native"), "why_not", lambda *call: reason)
    dispatch.clear_cache()


def test_native_is_there_where_a_build_was_asked_for():
    if not native_expected():
        pytest.skip("no native build was asked for (RESNET_FAST_BUILD, RESNET_FAST_EXPECT_NATIVE)")
    assert native_missing() is None


def test_the_reference_runs_everything():
    for op in ("bn_act", "conv_bn_act_train"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert dispatch.why_not("reference", op, "cpu", dtype) is None
    assert dispatch.PRIORITY[-1] == "reference"


def test_auto_takes_the_first_that_can_run(monkeypatch, native):
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    dispatch.clear_cache()
    assert dispatch.select(*CALL) == "native"
    unplug(monkeypatch)
    assert dispatch.select(*CALL) == "reference"


def test_argument_goes_before_environment(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "native")
    assert dispatch.select(*CALL, "reference") == "reference"
    assert dispatch.requested("auto") == "native"


def test_environment_goes_before_priority(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "reference")
    assert dispatch.select(*CALL) == "reference"
    monkeypatch.setenv("RESNET_FAST_BACKEND", "")
    assert dispatch.requested("auto") == "auto"


@pytest.mark.parametrize("name", ["cudnn", "Native", "reference "])
def test_unknown_names_say_who_asked(name, monkeypatch):
    with pytest.raises(ValueError) as raised:
        dispatch.select(*CALL, name)
    assert str(raised.value) == f"backend={name!r} is not a backend; it must be one of: auto, triton, native, reference"
    monkeypatch.setenv("RESNET_FAST_BACKEND", name)
    with pytest.raises(ValueError, match=f"RESNET_FAST_BACKEND='{name}' is not a backend"):
        functional.bn_act(torch.ones(1, 2, 3, 3), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="is not a backend"):
        dispatch.why_not(name, *CALL)


def test_explicit_backend_that_cannot_run_raises(monkeypatch):
    unplug(monkeypatch)
    with pytest.raises(BackendUnavailable) as raised:
        dispatch.select(*CALL, "native")
    assert str(raised.value) == (
        "backend='native' cannot run bn_act on cpu torch.float32: the cable is unplugged. Usable here: reference."
    )
    monkeypatch.setenv("RESNET_FAST_BACKEND", "native")
    with pytest.raises(BackendUnavailable, match="unplugged"):
        functional.bn_act(torch.ones(1, 2, 3, 3), torch.zeros(2), torch.ones(2))


def test_why_not_fused_names_every_faster_backend(monkeypatch):
    unplug(monkeypatch)
    assert dispatch.why_not_fused(*CALL) == "triton: Triton kernels run on GPUs; native: the cable is unplugged"


def test_native_says_what_it_cannot_do(native):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert dispatch.why_not(native, "bn_act", "cpu", dtype) is None
    assert "int32" in dispatch.why_not(native, "bn_act", "cpu", torch.int32)
    assert "xpu" in dispatch.why_not(native, "bn_act", "xpu", torch.float32)


def test_backends_have_the_same_functions_and_arguments():
    from resnet_fast import ops

    for name in dispatch.PRIORITY:
        module = dispatch.load(name)
        for function in ("available", "why_not", "why_not_auto", "kernel"):
            assert callable(getattr(module, function)), f"{name}.{function}"
        for op in ops.NAMES:  # a backend may lack an op, and then says so, whatever else is right or wrong
            assert callable(getattr(module, op, None)) or dispatch.why_not(name, op, "cpu", torch.float32)
        assert isinstance(module.kernel(*CALL), str)


def test_native_schemas_are_the_library_schemas_without_backend(native):
    from resnet_fast import ops

    extension.load()
    in_python = {  # put together of several native ops
        "conv_bn_shortcut_act", "residual_block_train", "residual_block_backward", "stem_train", "stem_backward",
    }  # fmt: skip
    more = {"residual_block": ["winograd", "direct", "unit"], "stem": ["direct", "unit"]}  # which the backend fills in
    for name in set(ops.NAMES) - in_python:
        ours = getattr(torch.ops.resnet_fast, name).default._schema
        theirs = getattr(torch.ops.resnet_fast_native, name).default._schema
        alike = len(ours.arguments) - 1
        assert [(a.name, str(a.type)) for a in ours.arguments[:-1]] == [
            (a.name, str(a.type)) for a in theirs.arguments[:alike]
        ]
        assert [a.name for a in theirs.arguments[alike:]] == more.get(name, [])
        assert [str(r.type) for r in ours.returns] == [str(r.type) for r in theirs.returns]
        assert not theirs.is_mutable
