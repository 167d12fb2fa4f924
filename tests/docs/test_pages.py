"""README and documentation: every block runs, every link leads somewhere, every public name has its place."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from mm_retriever import errors
from mm_retriever.demo import catalogue_queries
from mm_retriever.demo.catalogue import write_catalogue
from tests.support.pages import PAGES, ROOT, blocks, run

QUICK = ("README.md", "tutorial.md")  # the others are slow tests
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/reference").glob("*.md")))


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `mm-retriever demo` leaves in demo/, with 60 products for 900."""
    folder = tmp_path_factory.mktemp("pages")
    write_catalogue(folder / "demo" / "catalogue", count=60, size=128)
    catalogue_queries(folder / "demo" / "queries")
    return folder


RUNNABLE = [
    pytest.param(page, id=str(page.relative_to(ROOT)), marks=() if page.name in QUICK else pytest.mark.slow)
    for page in PAGES
    if blocks(page)
]


# what LlamaIndex's agents do to themselves
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince211")
@pytest.mark.parametrize("page", RUNNABLE)
def test_every_block_of_a_page_runs(page: Path, catalogue: Path, tmp_path: Path, monkeypatch) -> None:
    """As a reader copies them, from the first to the last, in a folder with the demonstration's catalogue."""
    shutil.copytree(catalogue, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run(page)


GENERATED = {ROOT / "docs" / "reference" / f"{name}.md" for name in ("command-line", "environment", "models")}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """Files only: `make docs` checks anchors too."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", text):
        place = (page.parent / target).resolve()
        assert place.exists() or place in GENERATED, target


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    folder = ROOT / "docs"
    shown = [
        page for page in (*PAGES, *GENERATED) if folder in page.parents and folder / "listings" not in page.parents
    ]
    pages = {str(page.relative_to(folder)) for page in shown}
    assert not [page for page in sorted(pages) if f" {page}\n" not in navigation]


def test_the_images_of_the_documentation_are_small() -> None:
    """So that a clone stays small."""
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "assets").iterdir()) < 400_000


@pytest.mark.parametrize(
    "package",
    ["mm_retriever", "langchain_mm_retriever", "mcp_server_mm_retriever", "web_mm_retriever"],
)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    named = set(re.findall(rf"^::: {package}\.(?:\w+\.)*(\w+)$", REFERENCE, re.MULTILINE))
    if "::: mm_retriever.errors" in REFERENCE:
        named |= set(vars(errors))
    assert set(import_module(package).__all__) <= named


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code() -> None:
    """A heading quotes what a reader searches for."""
    page = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall("“(.+?)”", "\n".join(re.findall("^### .*$", page, re.MULTILINE)))
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mm_retriever").rglob("*.py"))
    assert len(quoted) > 12
    assert not [words for words in quoted if words not in source]


def test_every_extra_is_described() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == set(project["optional-dependencies"])


def test_the_deployment_files_name_what_there_is() -> None:
    """No container engine runs them here: that they are YAML, name their services and copy existing files is all."""
    deploy = ROOT / "docs" / "deploy"
    services = yaml.safe_load((deploy / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
    copied = re.findall(r"^COPY (.+) \S+$", (deploy / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name


def environment_variables() -> set[str]:
    """What the source asks the environment for, and what options of commands take from it."""
    found: set[str] = set()
    for folder in ("mm_retriever", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "envvar" and isinstance(node.value, ast.Constant):
                    found.add(node.value.value)
                if (
                    isinstance(node, ast.Call)
                    and ast.unparse(node.func).startswith(("os.environ.", "os.getenv"))
                    and node.args
                ):
                    name = node.args[0]
                    found |= {name.value} if isinstance(name, ast.Constant) else set()
    return found


def test_every_environment_variable_is_named() -> None:
    names = environment_variables()
    assert "MM_RETRIEVER_TOKEN" in names and "XDG_CACHE_HOME" in names
    page = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["environment"]()
    assert not {name for name in names if f"`{name}`" not in page}
