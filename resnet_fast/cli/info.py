"""`resnet-fast info`: what is here, what runs where and why not elsewhere, and whether it works.

Exit code 1 if something that should work is broken: a usable backend gives wrong numbers, an extension that is there
does not load, an environment variable names no backend or no stage. A missing extension, GPU or compiler is a state,
not a fault.

JSON: {"schema": "resnet_fast.info/1", "versions", "cpu", "gpus", "commit", "environment_variables", "directories": [],
"backends": [{"backend", "device", "dtype", "op", "usable", "kernel", "reason"}], "native_build": {...} or null,
"frozen_cpu": {dtype: what computes it}, "pool": {...},
"tuned": [{"device", "rows", "library_rows", "files": [], "reason"}],
"fallbacks": [...],
"self_test": [{"backend", "device", "op", "mode", "match", "ratio", "reason"}], "broken": [reasons]}
"""

import argparse
import importlib.machinery
from pathlib import Path

import torch
from rich.table import Table

from .. import _log, cpus, dispatch, extension, gpus, memory, numerics, training
from ..backends import direct, units, winograd
from ..kernels import tables
from ..kernels.winograd import NAME as WINOGRAD
from ..kernels.winograd import NAME_OF_DOTS
from ..problems import dtype_name
from . import checks, environment, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    output.add_json_argument(parser, "all of it")


def run(args: argparse.Namespace) -> int:
    """Collect, test, print. Returns 1 if something is broken."""
    output.check_writable(args.json)
    report = collect()
    if args.json != "-":
        _print(report)
    if args.json:
        output.write_json(report, args.json)
    return 1 if report["broken"] else 0


def collect() -> dict:
    """The whole report, as in the module's docstring."""
    broken = [*_variable_faults(), *_extension_faults()]
    self_test = _self_test()
    broken += [
        f"self-test: backend {row['backend']} on {row['device']}, {row['op']}, {row['mode']}: {row['reason']}"
        for row in self_test
        if not row["match"]
    ]
    return {
        "schema": "resnet_fast.info/1",
        **environment.record(),
        "directories": environment.directories(),
        "backends": _backends(),
        "native_build": extension.build_info(),
        "frozen_cpu": _frozen_cpu(),
        "pool": memory.memory_stats(),
        "tuned": _tuned(),
        "fallbacks": list(_log.said()),
        "self_test": self_test,
        "broken": broken,
    }


def _variable_faults() -> list[str]:
    faults = []
    for check in (dispatch.requested, training.requested):
        try:
            check()
        except ValueError as error:
            faults.append(str(error))
    return faults


def _extension_faults() -> list[str]:
    """An extension file that is there has to load."""
    reason = extension.available()
    if reason is None:
        return []
    package = Path(dispatch.__file__).parent
    loadable = {f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    for path in sorted(package.glob("_C*.so")):
        if path.name in loadable:
            return [f"{path} is there but cannot be used: {reason}"]
        return [f"{path} was built for another Python than this one, which loads {min(loadable, key=len)}: {reason}"]
    return []


def _tuned() -> list[dict]:
    """How much is measured for each GPU here and for the CPU, and in which files; without any, "auto" leaves GPUs to
    PyTorch, and convolutions on the CPU to rules (kernels/winograd.py, kernels/direct.py)."""
    found = [*(gpus.of_device(index) for index in range(torch.cuda.device_count())), cpus.here()]
    return [
        {
            "device": device.name,
            "rows": tables.count(device),
            "library_rows": tables.count_library(device),
            "files": [str(path) for path in tables.paths(device) if path.exists()],
            "reason": tables.why_none(device) or "",
        }
        for device in found
    ]


def _frozen_cpu() -> dict[str, str]:
    """What computes a frozen ResNet here, by dtype: AMX, AVX-512, or the library, with Winograd, and why."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    return {dtype_name(dtype): _frozen_cpu_by(dtype) for dtype in dtypes}


def _frozen_cpu_by(dtype: torch.dtype) -> str:
    reason = units.why_no_unit(dtype)
    text = units.unit_name() if reason is None else f"PyTorch's convolutions: {reason}"
    if not winograd.computes(dtype):
        return text
    name = NAME_OF_DOTS if winograd.by_dots(dtype) else WINOGRAD
    if (reason := winograd.why_not()) is not None:
        return f"{text}; no {name}: {reason}"
    measured = tables.count(cpus.here(), dtype_name(dtype)) > 0
    others = ", others directly," if dtype == direct.DTYPE else ""
    return f"{text}; 3x3s by {name}{others} where {'measured' if measured else 'predicted'} to be faster"


def _backends() -> list[dict]:
    rows = []
    for backend in dispatch.PRIORITY:
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for op in ("bn_act", "conv_bn_act", "residual_block", "residual_block_train"):
                    reason = dispatch.why_not(backend, op, device, dtype)
                    if reason is None and device not in environment.devices():
                        reason = f"no {device} device here"
                    kernel = None
                    if reason is None:
                        by_request = dispatch.why_not_auto(backend, op, device, dtype)
                        kernel = "; ".join(filter(None, (dispatch.load(backend).kernel(op, device, dtype), by_request)))
                    row = {"backend": backend, "device": device, "dtype": dtype_name(dtype), "op": op}
                    rows.append(row | {"usable": reason is None, "kernel": kernel, "reason": reason})
    return rows


def _self_test() -> list[dict]:
    """Every usable backend: each op forward and backward, with batch and with running statistics, against float64."""
    rows = []
    for device in environment.devices():
        for backend in dispatch.PRIORITY:
            for case in checks.SELF_TEST:
                for mode in _modes(backend, case.op, device):
                    row = {"backend": backend, "device": device, "op": case.op, "mode": mode}
                    try:
                        comparisons = checks.check_op(case, mode, torch.float32, True, backend, device)
                        worst = numerics.worst(comparisons)
                        row |= {"match": worst.match, "ratio": worst.ratio, "reason": "" if worst.match else str(worst)}
                    except Exception as error:  # a broken backend may fail in any way, and this is where it is told
                        row |= {"match": False, "ratio": None, "reason": f"{type(error).__name__}: {error}"}
                    rows.append(row)
    return rows


def _modes(backend: str, op: str, device: str) -> list[str]:
    """The modes of `op` that `backend` has everything for, forward and backward."""
    needed = {"train": (f"{op}_train", f"{op}_backward"), "eval": (op, f"{op}_backward")}
    return [
        mode
        for mode, names in needed.items()
        if all(dispatch.why_not(backend, name, device, torch.float32) is None for name in names)
    ]


def _print(report: dict) -> None:
    console = output.console
    _print_pairs("versions", report["versions"] | {"commit": report["commit"] or "not a git checkout"})
    cpu = report["cpu"]
    devices = {f"gpu {gpu['index']}": _words(gpu) for gpu in report["gpus"]} or {"gpu": "none"}
    onednn = [word for word in ("bf16", "fp16") if cpu[f"onednn_{word}"]]
    _print_pairs(
        "devices",
        {
            "cpu": f"{cpu['model']}, {cpu['cores']} cores ({cpu['usable_cores']} usable), {cpu['memory_gib']} GiB",
            "torch threads": f"{cpu['threads']} (interop {cpu['interop_threads']})",
            "cpu capability": f"{cpu['capability']}; {' '.join(cpu['isa']) or 'no vector flags known'}",
            "oneDNN": f"yes, also {', '.join(onednn)}"
            if cpu["onednn"] and onednn
            else "yes"
            if cpu["onednn"]
            else "no",
        }
        | devices,
    )
    _print_pairs("frozen models on the CPU", report["frozen_cpu"])
    table = Table("backend", "device", "op", "dtypes", "usable", "kernel, or why not", title="backends")
    table.title_justify = "left"
    for (backend, device, op, usable, text), dtypes in _grouped(report["backends"]).items():
        mark, style = ("yes", None) if usable else ("no", "dim")
        table.add_row(backend, device, op, ", ".join(dtypes), mark, text, style=style)
    console.print(table)
    _print_pairs("native build", report["native_build"] or {"resnet_fast._C": "not in use, see above"})
    _print_pairs("activation pool", report["pool"])
    tuned = {row["device"]: _tuned_words(row) for row in report["tuned"]}
    _print_pairs("tuned tables", tuned)
    _print_pairs("environment variables in force", report["environment_variables"] or {"none": ""})
    table = Table("directory", "path", "exists", "writable", title="directories", title_justify="left")
    for row in report["directories"]:
        table.add_row(row["what"], row["path"], *("yes" if row[key] else "no" for key in ("exists", "writable")))
    console.print(table)
    for message in report["fallbacks"]:
        console.print(f"said so far: {message}", markup=False)
    table = Table("backend", "device", "op", "mode", "error / allowed", "match", title="self-test against float64")
    table.title_justify = "left"
    for row in report["self_test"]:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        verdict = "[green]yes[/]" if row["match"] else "[bold red]NO[/]"
        table.add_row(row["backend"], row["device"], row["op"], row["mode"], ratio, verdict)
    console.print(table)
    for reason in report["broken"]:
        console.print(f"BROKEN: {reason}", style="bold red", markup=False)
    if not report["broken"]:
        console.print("everything that is here works", style="green")


def _tuned_words(row: dict) -> str:
    measured = f"{row['rows']} problems measured, {row['library_rows']} of them left to the library"
    return row["reason"] or f"{measured}, in {' and '.join(row['files'])}"


def _grouped(rows: list[dict]) -> dict[tuple, list[str]]:
    groups: dict[tuple, list[str]] = {}
    for row in rows:
        key = (row["backend"], row["device"], row["op"], row["usable"], row["kernel"] or row["reason"])
        groups.setdefault(key, []).append(row["dtype"])
    return groups


def _print_pairs(title: str, pairs: dict) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in pairs.items():
        table.add_row(str(key), ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    output.console.print(table)


def _words(pairs: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in pairs.items() if key != "index")
