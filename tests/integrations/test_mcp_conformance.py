"""The MCP server before programs that we did not write: the protocol's own conformance suite, and its inspector.

Truth: `@modelcontextprotocol/conformance` and `@modelcontextprotocol/inspector` from npm, versions pinned. Of the
suite's scenarios for servers those are run that any server can pass; the others call tools, prompts and resources that
only the suite's own example server has.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mcp.server", reason='needs the extra "mcp"')
from mcp_server_mm_retriever import http_app

from tests.integrations.test_mcp_http import serving
from tests.support.mcp import ENVIRONMENT

pytestmark = pytest.mark.slow

CONFORMANCE = "@modelcontextprotocol/conformance@0.1.13"  # the last that runs on Node 20
INSPECTOR = "@modelcontextprotocol/inspector@2.12.0"
SCENARIOS = (
    "server-initialize",
    "ping",
    "tools-list",
    "resources-list",
    "prompts-list",
    "server-sse-multiple-streams",
    "dns-rebinding-protection",
)


@pytest.fixture(scope="module")
def npm(tmp_path_factory) -> Callable[[str, str], Path]:
    """Installs a package, without running anything of it; gives the path of its command."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no Node on this machine")

    def install(package: str, command: str) -> Path:
        folder = tmp_path_factory.mktemp("npm")
        (folder / "package.json").write_text("{}")
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        done = subprocess.run(
            ["npm", "install", *options, package], cwd=folder, capture_output=True, text=True, timeout=180
        )
        if done.returncode:
            pytest.skip(f"npm gave no {package}: {done.stderr[-200:]}")
        return folder / "node_modules" / ".bin" / command

    return install


@pytest.fixture(scope="module")
def conformance(npm) -> Path:
    return npm(CONFORMANCE, "conformance")


@pytest.fixture(scope="module")
def inspector(npm) -> Path:
    return npm(INSPECTOR, "mcp-inspector")


def test_the_scenarios_that_any_server_can_pass(search, conformance, tmp_path):
    with serving(http_app(search)) as url:
        for scenario in SCENARIOS:
            command = [conformance, "server", "--url", url, "--scenario", scenario, "--output-dir", tmp_path / scenario]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
            (checks,) = (tmp_path / scenario).rglob("checks.json")
            results = [check["status"] for check in json.loads(checks.read_text())]
            assert set(results) <= {"SUCCESS", "INFO"}, checks.read_text()
            assert "SUCCESS" in results


def inspect(inspector: Path, target: list[str], *options: str) -> dict:
    command = [inspector, "--cli", *target, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


CALL = ("--method", "tools/call", "--tool-name")


def listed_and_searched(inspector: Path, target: list[str]) -> str:
    """The id of what is found first."""
    tools = inspect(inspector, target, "--method", "tools/list")["tools"]
    assert [tool["name"] for tool in tools] == ["search_images", "find_similar", "describe_image"]
    found = inspect(inspector, target, *CALL, "search_images", "--tool-arg", "text=a mug", "top_k=2")
    assert [block["type"] for block in found["content"]] == ["text", *["text", "image", "resource_link"] * 2]
    return json.loads(found["content"][1]["text"].split(" | id ")[1].split(" | ")[0])


def test_the_inspector_lists_and_calls_every_tool_over_http(search, inspector):
    with serving(http_app(search)) as url:
        id_ = listed_and_searched(inspector, [url])
        similar = inspect(inspector, [url], *CALL, "find_similar", "--tool-arg", f"result={id_}", "top_k=1")
        assert '"mug"' in similar["content"][1]["text"]
        described = inspect(inspector, [url], *CALL, "describe_image", "--tool-arg", f"image={id_}")
        assert id_ in described["content"][0]["text"]
        templates = inspect(inspector, [url], "--method", "resources/templates/list")["resourceTemplates"]
    assert [one["uriTemplate"] for one in templates] == ["image://indexed/{node_id}", "image://view/{node_id}"]


def test_the_inspector_lists_and_searches_over_stdio(db, inspector, tmp_path):
    """It starts the command for each call, as its configuration says; of the environment it passes on only that."""
    environment = {name: ENVIRONMENT[name] for name in ("HF_HUB_OFFLINE", "PYTHONPATH")} | {"OMP_NUM_THREADS": "1"}
    arguments = ["-m", "mm_retriever.cli", "mcp", "--db", str(db)]
    server = {"command": sys.executable, "args": arguments, "env": environment}
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"photos": server}}))
    listed_and_searched(inspector, ["--config", str(config), "--server", "photos"])
