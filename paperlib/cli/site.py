"""Build the documentation as a web site in runs/site: README, docs, notebooks with their stored outputs, and a page for
every module from its docstrings.

Modules are imported, nothing else is executed. A broken link or a missing reference is an error (exit code 1), and what
was built before stays. The folder can be opened or served as it is, by GitHub Pages too.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from paperlib.paths import folder_of, root

GENERATOR = ("sphinx", "myst_nb", "pydata_sphinx_theme")
SHOWN = ("README.md", "LICENSE", "CITATION.cff", "docs", "notebooks", "figures", "paperlib/models/references")
LEFT_OUT = shutil.ignore_patterns(".*", "stages", "*.safetensors")
# the first page's contents; the last line adds whatever the others do not name
CONTENTS = """
```{toctree}
:hidden:
:glob:

docs/findings
docs/usage
notebooks/index
Modules <paperlib/index>
docs/*
```
"""
FOLDER = """{title}
{line}

.. toctree::
   :glob:

   *
"""
MODULE = """{title}
{line}

.. automodule:: {name}
   :members:
   :exclude-members: model_config
"""
PACKAGE = """
.. autosummary::

   {modules}

.. toctree::
   :hidden:
   :glob:

   *
   {folders}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def execute(options: argparse.Namespace) -> int:
    if name := missing():
        raise ValueError(f"{name} is not installed: pip install -e '.[notebooks,site]' -c constraints.txt")
    target = folder_of("runs") / "site"
    with tempfile.TemporaryDirectory() as folder:
        pages, html = Path(folder) / "pages", Path(folder) / "html"
        lay_out(pages)
        strict = ["--fail-on-warning", "--quiet", "--doctree-dir", Path(folder) / "doctrees"]
        built = subprocess.run([sys.executable, "-m", "sphinx", *strict, "-c", root() / "docs", pages, html])
        if built.returncode:
            return 1
        fresh = target.with_name("site.new")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.move(html, fresh)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    print(target / "index.html")
    return 0


def missing() -> str | None:
    """The first package that a site needs and that is not installed."""
    return next((name for name in GENERATOR if not find_spec(name)), None)


def lay_out(pages: Path) -> None:
    """The sources in a new folder as they lie in the project: README as the first page, a page for every module where
    its file is, and one for every folder of pages."""
    for name in SHOWN:
        source, copy = root() / name, pages / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy, ignore=LEFT_OUT) if source.is_dir() else shutil.copy(source, copy)
    with (pages / "README.md").rename(pages / "index.md").open("a", encoding="utf-8") as first:
        first.write(CONTENTS)
    for name, title in (("notebooks", "Notebooks"), ("paperlib/models/references", "Reference networks")):
        (pages / name / "index.rst").write_text(FOLDER.format(title=title, line="=" * len(title)))
    for path in sorted((root() / "paperlib").rglob("*.py")):
        place = path.relative_to(root())
        if path.name == "__init__.py":
            _write(pages / place.with_name("index.rst"), place.parent, PACKAGE.format(**_inside(path.parent)))
        elif path.name != "__main__.py":
            _write(pages / place.with_suffix(".rst"), place.with_suffix(""))


def _write(page: Path, module: Path, more: str = "") -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    text = MODULE.format(title=module.name, line="=" * len(module.name), name=".".join(module.parts))
    page.write_text(text + more, encoding="utf-8")


def _inside(package: Path) -> dict[str, str]:
    """Modules and folders of a package, as lines."""
    inside = sorted(package.glob("[!_.]*"))
    modules = [path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()]
    folders = [f"{path.name}/index" for path in inside if path.is_dir()]
    return {"modules": "\n   ".join(modules), "folders": "\n   ".join(folders)}
