"""Private and unstable interfaces of libraries are used in passes/compat alone."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3]
LIBRARIES = {"joblib", "loky", "nncf", "openvino", "torch", "transformers"}
# Modules without an underscore of which no documentation speaks.
UNSTABLE = (
    "nncf.common",
    "nncf.openvino",
    "nncf.quantization",
    "openvino.tools",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.modeling_utils",
    "transformers.models.auto",
)
# Attributes with an underscore that are documented: those of a named tuple, and `os._exit`.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def is_unstable(module: str) -> bool:
    parts = module.split(".")
    listed = any(f"{module}.".startswith(f"{name}.") for name in UNSTABLE)
    return parts[0] in LIBRARIES and (listed or any(map(is_private, parts)))


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def private_names(source: str) -> list[str]:
    """Imports of a library's private or unstable modules and names, and private attributes of anything but self and cls."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if is_unstable(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += filter(is_unstable, names)
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            found += [ast.unparse(node)] if node.attr not in DOCUMENTED else []
    return found


def test_only_compat_knows_private_names():
    compat = ROOT / "passes" / "compat"
    files = [
        path
        for folder in ("manifests", "calibration", "passes", "vlmconvert")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert files
    found = {
        str(path.relative_to(ROOT)): private_names(path.read_text(encoding="utf-8"))
        for path in files
        if not path.is_relative_to(compat)
    }
    assert {path: names for path, names in found.items() if names} == {}, (
        "move them to passes/compat, with a contract test"
    )


def test_private_names_are_found():
    for code, name in (
        ("import openvino._offline_transformations", "openvino._offline_transformations"),
        ("from openvino._offline_transformations import x", "openvino._offline_transformations.x"),
        ("from nncf.quantization.algorithms import x", "nncf.quantization.algorithms.x"),
        ("from transformers import conversion_mapping", "transformers.conversion_mapping"),
        ("from torch import _C", "torch._C"),
        ("config._attn_implementation = 1", "config._attn_implementation"),
        ("super()._reorder_cache()", "super()._reorder_cache"),
        ("self.model._x()", "self.model._x"),
    ):
        assert private_names(code) == [name]
    for code in (
        "self._x = cls._y",
        "from passes.export.ir import _x",
        "import nncf",
        "a.__dict__",
        "row._replace(x=1)",
    ):
        assert private_names(code) == []
