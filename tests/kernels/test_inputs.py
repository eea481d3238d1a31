"""The operators' argument list is stated once, in `dti_kernels/inputs.py`: schemas and the C struct follow it, and nobody spells it again."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch

import dti_kernels
from dti_kernels.cpu import build, compiled
from dti_kernels.inputs import Gradients, Inputs

PACKAGE = Path(dti_kernels.__file__).parent
PUBLIC = {("windowed_attn.py", "windowed_attn"), ("reference.py", "windowed_attn_reference")}


def test_schemas_are_the_fields() -> None:
    saved = ("grad_out", "out", "lse", "slopes_grad")
    for operator, arguments, results in (
        (torch.ops.dti.windowed_attn_fwd, Inputs._fields, ("out", "lse")),
        (torch.ops.dti.windowed_attn_bwd, (*Inputs._fields, *saved), Gradients._fields),
    ):
        schema = operator.default._schema
        assert tuple(argument.name for argument in schema.arguments) == arguments
        assert tuple(result.name for result in schema.returns) == results


def test_a_gradient_is_named_after_its_input() -> None:
    assert {name.removeprefix("d") for name in Gradients._fields} < set(Inputs._fields)
    x = Inputs(*(torch.full((1,), i) for i in range(len(Inputs._fields))))
    assert [int(of) for of in x.differentiable(slopes_grad=True)] == [0, 1, 2, 3, 4, 5, 7]
    assert x.differentiable(slopes_grad=False)[-1] is None


def test_the_struct_of_cpp_has_the_fields_in_their_order() -> None:
    """Its size is checked when a library is loaded; two pointers that change places would keep it."""
    headers = "".join(path.read_text() for path in build.SOURCES.glob("*.h"))
    (body,) = re.findall(r"struct Arguments \{(.*?)\};", headers, re.S)
    declared = re.findall(r"(\w+)\s*(?=[,;])", re.sub(r"//.*", "", body))
    assert declared == [name for name, _ in compiled._Arguments._fields_]


def test_only_the_public_functions_spell_the_arguments() -> None:
    """Ten functions did, each with ten tensors, and some in another order."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or any(
                "jit" in ast.unparse(of) for of in node.decorator_list
            ):
                continue
            arguments = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
            if {"q", "k", "v"} <= arguments and arguments & {"k_sum", "rows", "keys", "layout"}:
                found.add((str(path.relative_to(PACKAGE)), node.name))
    assert found == PUBLIC
