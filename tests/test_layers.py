"""The layers of the library: who may import whom, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mamljax

ROOT = Path(mamljax.__file__).parent
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FOUNDATION = {"types", "checks", "files"}
ALLOWED = {
    "types": set(),
    "files": set(),
    "checks": {"types"},
    "losses": {"types"},
    "data": FOUNDATION,
    "models": {"types", "checks", "distributions"},
    "convolution": {"types"},
    "image_models": {"types", "convolution"},
    "mixed": {"types"},
    "inner": {"types", "checks", "mixed", "rules"},
    "rules": {"types", "checks"},
    "tasks": {"types", "checks", "closures"},
    "devices": {"types"},
    "closures": set(),
    "outer": {"types", "checks", "devices"},
    "run_directory": {"files"},
    "checkpoint": FOUNDATION | {"run_directory"},
    "record": FOUNDATION | {"run_directory", "checkpoint"},
    "loop": {"types", "checks", "devices"},
    "divergence": {"types"},
    "interruption": set(),
    "programs": FOUNDATION | {"closures", "devices", "loop"},
    "train": FOUNDATION
    | {"run_directory", "checkpoint", "record", "devices", "loop", "programs", "divergence", "interruption"},
    "evaluate": FOUNDATION | {"closures", "devices"},
    "figures": set(),
    "report": FOUNDATION | {"__version__", "record", "figures"},
    "maml": FOUNDATION | {"losses", "models", "inner", "rules", "outer"},
    "maml_plus_plus": FOUNDATION | {"inner", "rules", "outer", "maml"},
    "imaml": FOUNDATION | {"inner", "rules", "outer", "maml"},
    "proto_maml": FOUNDATION | {"models", "inner", "rules", "outer", "maml", "comparison"},
    "reptile": FOUNDATION | {"inner", "rules", "outer", "maml"},
    "distributions": set(),
    "comparison": FOUNDATION,
    "baselines": FOUNDATION | {"distributions", "losses", "models", "inner", "rules", "outer", "maml", "comparison"},
    "rl": FOUNDATION | {"distributions", "models", "inner", "rules", "outer", "devices"},
}


def parts_imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mamljax":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mamljax.")]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_layers(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    imported = set(parts_imported(ast.parse(path.read_text()))) - {part}
    assert imported <= ALLOWED.get(part, set()), f"{path} imports {imported - ALLOWED.get(part, set())}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_models_import_flax(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert path.name in ("models.py", "image_models.py") or not any("flax" in ast.unparse(node) for node in imports)


@pytest.mark.parametrize("experiment", ["sinusoid", "few_shot", "navigation"])
def test_an_experiment_begins_without_what_only_a_few_need(experiment):
    """Some of these packages take longer to import than JAX."""
    code = f"import sys, {experiment}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=EXPERIMENTS, capture_output=True, text=True, check=True)
    assert not {"matplotlib", "scipy.stats", "flax.nnx", "mujoco", "tensorflow"} & set(run.stdout.split())


def test_maml_is_read_in_under_500_lines():
    files = [ROOT / "types.py", ROOT / "inner.py", ROOT / "maml.py", EXPERIMENTS / "sinusoid.py"]
    assert sum(len(file.read_text().splitlines()) for file in files) < 500
