"""A module traced once, and written as a program of torch.export or of ONNX."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from rtb_rl.errors import InputError
from rtb_rl.rl.export.module import ExportedPolicy

Format = Literal["onnx", "torch"]
FACTS = "rtb_rl"
"""The key of the policy's facts in ONNX; in .pt2 the extra file of this name and `.json`."""
TRACED_ROWS = 4
SOURCES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def needed_for(format: str, *, reading: bool = False) -> None:
    """InputError unless the packages for a format are installed, or there is no such format."""
    if format not in ("onnx", "torch"):
        raise InputError(f"format {format!r} is neither onnx nor torch; give one of these")
    writing = ("onnx", "onnxscript")
    names = ("onnxruntime", *(() if reading else writing)) if format == "onnx" else ()
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"ONNX files need {name}, which is not installed ({error}); run: pip install"
                " 'rtb-rl[export]'" + ("" if reading else ", or use --format torch")
            ) from error


def traced(module: ExportedPolicy) -> ExportedProgram:
    """The module as a program for any batch.

    InputError where it can't be traced, which a critic of one's own may be the reason for.
    """
    noise = torch.zeros(module.draws, TRACED_ROWS * module.candidates, len(module.low))
    inputs = torch.zeros(TRACED_ROWS, module.observation_size), noise
    batch = Dim("batch", min=1)
    each = batch if module.candidates == 1 else module.candidates * batch
    shapes = {"observations": {0: batch}, "noise": {1: each}}
    try:
        with _quietly(), torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=True)
    except Exception as error:
        raise InputError(
            f"the policy can't be traced ({_first_line(error)}); a critic of your own has to be a"
            " torch module of plain tensor operations, without branches on values"
        ) from error
    _forget_sources(program)
    return program


def torch_bytes(program: ExportedProgram, facts: str) -> bytes:
    """A .pt2 file, with the facts beside the program."""
    buffer = io.BytesIO()
    with _quietly():
        torch.export.save(program, buffer, extra_files={f"{FACTS}.json": facts})
    return buffer.getvalue()


def onnx_bytes(program: ExportedProgram, facts: str) -> bytes:
    """An .onnx file, weights included, with the facts in its metadata.

    InputError where ONNX lacks an operation of the program.
    """
    try:
        with _quietly():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["observations", "noise"],
                output_names=["actions"],
                dynamic_shapes={"observations": {0: "batch"}, "noise": {1: "rows"}},
            )
    except Exception as error:
        raise InputError(
            f"ONNX can't express the policy ({_first_line(error)}); use --format torch"
        ) from error
    assert converted is not None
    converted.model.metadata_props[FACTS] = facts
    return converted.model_proto.SerializeToString()


def _forget_sources(program: ExportedProgram) -> None:
    """Leave out which lines of which files an operation came from: paths of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            for key in SOURCES:
                node.meta.pop(key, None)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Nothing of what torch's exporters say; their errors are raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
