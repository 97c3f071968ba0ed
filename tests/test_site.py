"""The documentation as a web site: it builds strictly, every link in it resolves, and nothing comes from outside."""

import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from paperlib import cli, paths
from paperlib.cli import site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(site.missing() is not None, reason="no generator: pip install -e '.[notebooks,site]'"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site of this project: its folder, and the tags of every page with their attributes."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERLIB_RUNS", str(runs))
        assert cli.main(["site"]) == 0
    pages = [path for path in sorted((runs / "site").rglob("*.html")) if path.parent.name != "_static"]
    return runs / "site", {path: tags(path.read_text()) for path in pages}


def tags(page):
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda name, attributes: found.append((name, dict(attributes)))
    parser.feed(page)
    return found


def test_every_page_notebook_and_module_is_there(built):
    folder, _ = built
    root = paths.root()
    sources = [*root.glob("docs/*.md"), *root.glob("notebooks/*.ipynb"), *root.glob("paperlib/**/[!_]*.py")]
    assert len(sources) > 50
    for source in (root / "index", *sources, *root.glob("paperlib/models/references/*.md")):
        assert (folder / source.relative_to(root)).with_suffix(".html").is_file(), source


def test_every_link_resolves(built):
    _, pages = built
    ids = {path: {had["id"] for _, had in page if "id" in had} for path, page in pages.items()}
    links = [(path, had["href"]) for path, page in pages.items() for name, had in page if name == "a" and "href" in had]
    inside = [(path, link) for path, link in links if link != "#" and not re.match(r"\w+:", link)]
    assert len(inside) > 1000
    for path, link in inside:
        address, _, anchor = unquote(link).partition("#")
        target = (path.parent / address).resolve() if address else path
        assert target.is_file() and (not anchor or anchor in ids[target]), (path, link)


def test_nothing_comes_from_outside(built):
    folder, pages = built
    for path, page in pages.items():
        asked = [had[key] for _, had in page for key in ("src", "srcset", "data", "poster") if key in had]
        asked += [had["href"] for name, had in page if name == "link" and had["href"] != "#"]
        for address in asked:
            assert address.startswith("data:") or (path.parent / address.partition("?")[0]).is_file(), (path, address)
    for path in folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s+)['\"]?(https?:)?//", path.read_text()), path


def test_formulas_and_stored_outputs_are_shown(built):
    folder, pages = built
    names = [name for name, _ in pages[folder / "notebooks" / "02_snr_per_encoder.html"]]
    assert names.count("math") > 5 and names.count("img") > 5 and names.count("table") > 5


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_page_follows_the_reader(built, browser, scheme, width):
    """The pictures are those of the reader's colours and width, no script complains or asks outside."""
    folder, _ = built
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said, requests = [], []
    page.on("console", lambda message: message.type in ("error", "warning") and said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((folder / "index.html").as_uri())
    pictures = page.locator("article img:visible")
    names = [pictures.nth(i).get_attribute("src").rpartition("/")[2] for i in range(pictures.count())]
    form = "-narrow" * (width == 390) + "-dark" * (scheme == "dark")
    assert names == [f"hero{form}.png", f"anatomy{form}.png"]
    assert all(pictures.nth(i).evaluate("image => image.naturalWidth > 300") for i in range(2))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert "made by" not in page.locator("body").inner_text()  # the marks between which tables are made
    assert said == [] and all(address.startswith(("file:", "data:")) for address in requests)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A project with one page each, and a function that builds its site with a link in README."""
    for name in ("docs", "notebooks", "figures", "paperlib/models/references"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("LICENSE", "CITATION.cff", "pyproject.toml", "docs/conf.py", "docs/site.css"):
        shutil.copy(paths.root() / name, tmp_path / name)
    for name in ("docs/findings", "docs/usage", "docs/more", "notebooks/01", "paperlib/models/references/network"):
        (tmp_path / f"{name}.md").write_text("# Title\n\n## A heading\n")
    for name in ("__init__", "module", "models/__init__", "models/module"):
        (tmp_path / "paperlib" / f"{name}.py").write_text('"""A module."""\n__version__ = "1"\n')
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)

    def build(*links):
        (tmp_path / "README.md").write_text("# Title\n\n" + "".join(f"[link]({link})\n" for link in links))
        return cli.main(["site"])

    return build


def test_a_broken_link_is_an_error_and_the_old_site_stays(small, tmp_path, capfd):
    assert small("docs/usage.md#a-heading", "notebooks", "paperlib/module.py", "LICENSE") == 0
    first = (tmp_path / "runs" / "site" / "index.html").read_text()
    assert small("docs/usage.md#nowhere", "docs/nothing.md", "no_module.py") == 1
    said = capfd.readouterr().err
    assert all(word in said for word in ("nowhere", "docs/nothing", "no_module"))
    assert (tmp_path / "runs" / "site" / "index.html").read_text() == first
