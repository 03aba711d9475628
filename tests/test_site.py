"""The pages that `make site` makes: whole, with every link and picture, and nothing that comes from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-c", "site", ".", out]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path: BeautifulSoup(path.read_text(), "html.parser") for path in site.rglob("*.html")}


def test_every_notebook_and_every_model_with_a_ledger_has_a_page(site, pages):
    notebooks = [f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")]
    ledgers = [f"figures/{path.parent.name}/README.html" for path in (ROOT / "figures").glob("*/claims.json")]
    assert all((site / page).is_file() for page in (*notebooks, *ledgers, "CONTRIBUTING.html"))
    (refresh,) = pages[site / "index.html"].select("meta[http-equiv=refresh]")
    assert refresh["content"] == "0; url=README.html"


def test_links_resolve_and_their_anchors_are_there(pages):
    anchors = []
    for path, page in pages.items():
        for link in (urlsplit(tag["href"]) for tag in page.select("a[href]")):
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            assert link.scheme or target.is_file(), f"{path.name} links to {link.geturl()}"
            if link.fragment and target in pages and not link.scheme:
                assert pages[target].find(id=unquote(link.fragment)), f"{path.name} links to {link.geturl()}"
                anchors.append(link.fragment)
    assert len(anchors) > 50


def test_pictures_scripts_and_styles_lie_beside_the_pages(pages):
    for path, page in pages.items():
        needed = [tag["src"] for tag in page.select("img[src], script[src], iframe[src]")]
        needed += [tag["href"] for tag in page.select("link[rel~=stylesheet], link[rel~=icon]")]
        for link in (urlsplit(name) for name in needed if not name.startswith("data:")):
            assert not link.scheme, f"{path.name} fetches {link.geturl()}"
            assert (path.parent / unquote(link.path)).is_file(), f"{path.name} shows {link.geturl()}"
    n_pictures = sum(len(page.select("img[src]")) for page in pages.values())
    n_committed = len(list((ROOT / "figures").glob("*/[0-9][0-9]-*.png")))
    assert n_pictures > n_committed > 20  # each once on its model's page, and the notebooks show the default model's


def test_formulas_are_formulas_and_prose_is_not(pages, site):
    n_formulas = sum(len(page.select("math")) for page in pages.values())
    sources = "".join(path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert n_formulas > len(re.findall(r"\\\\tilde h", sources)) / 2 > 10
    for path in pages:
        page = BeautifulSoup(path.read_text(), "html.parser")
        for tag in page.select("code, pre, math, script, style"):
            tag.extract()
        assert not re.search(r"\$[^$]*\\[a-z]+[^$]*\$|\\tilde|\\lambda", page.get_text()), path.name
