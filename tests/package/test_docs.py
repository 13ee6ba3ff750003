"""The documentation: its Python is run, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [path for path in DOCUMENTS if "```python\n" in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page):
    """One block after the other, as a reader would paste them."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    if "torchvision" in code:
        pytest.importorskip("torchvision")
    exec(compile(code, str(page), "exec"), {})


def test_tour_lists_every_module():
    text = (ROOT / "docs" / "reading" / "tour.md").read_text()
    modules = {path.name for path in (ROOT / "proac_cuda").glob("*.py")} - {"__init__.py"}
    assert not {name for name in modules if f"/{name}`" not in text and f"`{name}`" not in text}


@pytest.mark.parametrize("page", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert not [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    missing = [
        name for name in ("sphinx", "myst_parser", "furo", "sphinx_copybutton") if not importlib.util.find_spec(name)
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; pip install '.[docs]'")
    ran = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
