from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import mm_retriever
from mm_retriever import errors

ROOT = Path(__file__).resolve().parent.parent
DESIGN = (ROOT / "docs" / "explanation" / "design.md").read_text(encoding="utf-8")
HEAVY = ("torch", "transformers", "pymilvus", "milvus_lite", "llama_index", "PIL", "numpy")


def modules_loaded_by(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after `code`."""
    probe = f"{code}\nimport sys; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy():
    """Our promise: `import mm_retriever` is instant."""
    assert modules_loaded_by("import mm_retriever").isdisjoint(HEAVY)


def test_the_help_of_the_command_line_loads_nothing_heavy():
    """Our promise: `mm-retriever --help` answers at once."""
    code = "from mm_retriever.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert modules_loaded_by(code).isdisjoint(HEAVY)


def test_every_public_name_is_there_and_listed():
    """The lazy table, `__all__` and `dir()` agree, and each name leads to an object."""
    assert sorted(mm_retriever._HOME) == mm_retriever.__all__
    assert set(mm_retriever.__all__) <= set(dir(mm_retriever))
    for name in mm_retriever.__all__:
        assert getattr(mm_retriever, name) is not None


NAMES_IN_EVERY_ORDER = """
import os, pkgutil, sys
from importlib import import_module
from types import ModuleType
import llama_index.core, pymilvus, torch, transformers  # once for both orders

def modules():
    for module in pkgutil.walk_packages(mm_retriever.__path__, "mm_retriever."):
        import_module(module.name)

def names():
    for name in mm_retriever.__all__:
        value = vars(mm_retriever).get(name) or getattr(mm_retriever, name)
        assert not isinstance(value, ModuleType), f"{name} is a module"
        assert value is getattr(import_module("mm_retriever." + mm_retriever._HOME[name]), name), name
        scope = {}
        exec(f"from mm_retriever import {name}", scope)
        assert scope[name] is value, name

for order in ([modules, names], [names, modules, names]):
    child = os.fork()
    if not child:
        import mm_retriever
        for step in order:
            step()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""


@pytest.mark.slow
def test_a_public_name_is_the_same_object_whatever_was_imported_before():
    """Python binds an imported submodule in its package, over an object of the same name."""
    done = subprocess.run([sys.executable, "-c", NAMES_IN_EVERY_ORDER], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["mm_retriever", "langchain_mm_retriever", "mcp_server_mm_retriever"])
def test_no_package_exports_a_name_that_a_submodule_has(package: str):
    """Except where the submodule stands aside for it, as the old place of `contact_sheet` does."""
    home = Path(importlib.util.find_spec(package).origin).parent
    for init in home.rglob("__init__.py"):
        tree = ast.parse(init.read_text(encoding="utf-8"))
        lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
        exported = {name for listed in lists for name in ast.literal_eval(listed)}
        beside = {path.stem for path in init.parent.iterdir()} - {"__init__"}
        assert not exported & beside, init


def test_names_that_need_an_extra_are_there_without_it():
    """Only their constructors import libraries that take eight seconds or are not installed."""
    code = "import mm_retriever; mm_retriever.BGEM3SparseEmbedding; mm_retriever.CrossEncoderRerank"
    assert not {"FlagEmbedding", "sentence_transformers"} & set(modules_loaded_by(code))


def test_an_unknown_name_is_an_attribute_error():
    """Python's own convention for modules."""
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        mm_retriever.Nothing  # noqa: B018


def test_every_error_is_ours_and_a_builtin():
    """Architecture: an own class also inherits the builtin it specialises, and prints its message unchanged."""
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and kind is not errors.MMRetrieverError:
            assert issubclass(kind, errors.MMRetrieverError), name
            assert str(kind("what, why, and the fix")) == "what, why, and the fix"
            assert any(base.__module__ == "builtins" and base is not Exception for base in kind.__mro__[1:-3]), name


def test_every_module_says_what_it_owns():
    """Architecture: each file opens with what it owns."""
    for path in (ROOT / "mm_retriever").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_the_table_of_files_is_the_tree_of_the_repository():
    """Each row of the design page exists, and each top-level module has a row."""
    named = re.findall(r"^\| `([\w/]+(?:\.py|/))` \|", DESIGN, flags=re.MULTILINE)
    assert len(named) >= 12
    for name in named:
        home = (
            ROOT if name.split("/")[0] in {"integrations", "examples", "benchmarks", "tests"} else ROOT / "mm_retriever"
        )
        assert (home / name).exists(), name
    files = {path.name for path in (ROOT / "mm_retriever").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert files <= set(named), f"not in docs/explanation/design.md: {files - set(named)}"


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_every_pinned_version_runs_on_every_python_that_is_promised(python: str) -> None:
    """Truth: what the installed packages say of themselves; numpy 2.4 is not for Python 3.10."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert python in SpecifierSet(project["requires-python"])
    assert f"Programming Language :: Python :: {python[:4]}" in project["classifiers"]
    for name, version in pins().items():
        with suppress(PackageNotFoundError):
            found = metadata(name)
            if found["Version"] == version:
                assert python in SpecifierSet(found.get("Requires-Python") or ""), name
    assert "3.10.14" not in SpecifierSet(project["requires-python"])


def test_the_pins_leave_room_for_the_readers_of_files_of_llama_index() -> None:
    """Truth: the requirements of llama-index-readers-file 0.7, without which SimpleDirectoryReader reads bytes."""
    assert pins()["pandas"] in SpecifierSet(">=2,<3")
    assert pins()["pypdf"] in SpecifierSet(">=6.1.3,<7")
    assert pins()["defusedxml"] in SpecifierSet(">=0.7.1")


def test_the_locked_versions_are_those_of_the_constraints():
    """`make lock` writes the hashes; a pin that was changed without it would install something else."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.lock").read_text(), re.MULTILINE))
    shared = {canonical(name) for name in pinned} & {canonical(name) for name in locked}
    assert len(shared) > 80
    pinned, locked = ({canonical(name): value for name, value in one.items()} for one in (pinned, locked))
    assert {name: locked[name] for name in shared} == {name: pinned[name] for name in shared}
    assert "--hash=sha256:" in (ROOT / "constraints.lock").read_text()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
