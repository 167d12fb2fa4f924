from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mm_retriever
from mm_retriever import errors

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


def test_names_that_need_an_extra_are_there_without_it():
    """Only their constructors import FlagEmbedding, which takes eight seconds or is not installed."""
    code = "import mm_retriever; mm_retriever.BGEM3SparseEmbedding; mm_retriever.TextRerank"
    assert "FlagEmbedding" not in modules_loaded_by(code)


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


def test_the_files_of_the_readme_exist():
    """The tree in the README is the tree of the repository."""
    named = re.findall(r"^\| `([\w/]+(?:\.py|/))` \|", README, flags=re.MULTILINE)
    assert len(named) >= 12
    for name in named:
        home = (
            ROOT if name.split("/")[0] in {"integrations", "examples", "benchmarks", "tests"} else ROOT / "mm_retriever"
        )
        assert (home / name).exists(), name
    files = {path.name for path in (ROOT / "mm_retriever").glob("*.py")} - {"__init__.py"}
    assert files <= set(named), f"not in the README: {files - set(named)}"


def test_the_links_of_the_readme_lead_somewhere():
    """Pictures and files that the README points at are in the repository."""
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)|src=\"(?!https?://)([^\"]+)\"", README):
        path = next(part for part in target if part)
        assert (ROOT / path).exists(), path
