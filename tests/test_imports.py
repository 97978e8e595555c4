"""Looking at data must not cost the import of torch, and imports point downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "roomplan_lib"
HEAVY = {"torch", "transformers", "peft", "accelerate"}
# What each part may import of the others; the pipeline reads from left to right.
ALLOWED = {
    "geometry": set(),
    "files": set(),
    "config": set(),
    "system": set(),
    "watch": set(),
    "scenes": {"geometry", "files"},
    "actions": {"geometry", "scenes"},
    "samples": {"geometry", "files", "scenes", "actions"},
    "model": {"config", "files", "geometry", "actions"},
    "training": {"config", "files", "geometry", "scenes", "actions", "samples", "model", "system"},
    "evaluation": {"config", "files", "geometry", "scenes", "actions", "samples", "model", "training"},
    "viz": {"config", "geometry", "files", "scenes", "actions", "samples", "evaluation"},
    "doctor": {"config", "samples", "system", "training"},
    "download": {"files", "scenes"},
    "export": {"geometry", "files", "scenes", "actions", "viz"},
}


@pytest.mark.parametrize(
    "module", ["scenes.arkitscenes", "samples.validate", "actions", "viz", "export", "evaluation.scores"]
)
def test_data_and_figures_import_without_torch(module):
    code = f"import sys, roomplan_lib.{module}; print(sorted(sys.modules.keys() & {HEAVY!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_point_down(part):
    root = LIBRARY / part
    for path in root.rglob("*.py") if root.is_dir() else [root.with_suffix(".py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in filter(None, names):
                if name.startswith("roomplan_lib."):
                    target = name.split(".")[1]
                    assert target == part or target in ALLOWED[part], f"{path.name} imports {name}"
