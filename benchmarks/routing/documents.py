"""Pages of the operating system's documentation packages, as the documents of two tenants.

    python -m benchmarks.routing.documents [--cache FOLDER]

Packages are downloaded by apt (Debian 12's names) and unpacked into the cache folder, not installed. Which pages are
taken follows from their paths and lengths alone, and the same page is taken of each version of a product.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.routing.html_text import read_html

CHARACTERS = (1_000, 12_000)
"""Least and most of a page's text: shorter ones say too little, longer ones take long to embed."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "imprint-benchmarks" / "routing"
OURS, OTHERS = "tenant-a", "tenant-b"
TAIL = re.compile(r"\s+[—-]\s+(?:LLVM \d+ documentation|Apache HTTP Server Version [\d.]+)$|\(\d\)$")
NUMBER = re.compile(r"^(?:(?:Chapter|Appendix|Part) \w+\.|[A-Z]?[\d.]+\.)\s+")


@dataclass(frozen=True)
class Source:
    """A manual in a package. `pages` of it are documents of the tenant; `left_out` more are only asked about.

    `skipped` is a pattern of paths that are no pages to read.
    """

    package: str
    product: str
    folder: str
    tenant: str
    pages: int
    left_out: int
    skipped: str = r"index\.html$|genindex|search\.html"

    @property
    def name(self) -> str:
        """The product with its version, such as "llvm-14", for paths."""
        return self.product.lower().replace(" ", "-")


_LLVM_SKIPPED = r"index\.html$|genindex|search\.html|^AMDGPU/"
SOURCES = (
    Source("postgresql-doc-15", "PostgreSQL 15", "usr/share/doc/postgresql-doc-15/html", OURS, 240, 50,
           r"index\.html$|^biblio|^release|^acronyms|-history\.html$"),
    Source("git-doc", "Git 2.39", "usr/share/doc/git-doc", OURS, 100, 30, r"index\.html$|^RelNotes|^docs\.html$"),
    Source("llvm-14-doc", "LLVM 14", "usr/share/doc/llvm-14-doc/html", OURS, 90, 25, _LLVM_SKIPPED),
    Source("llvm-19-doc", "LLVM 19", "usr/share/doc/llvm-19-doc/html", OURS, 90, 25, _LLVM_SKIPPED),
    Source("sqlite3-doc", "SQLite 3.40", "usr/share/doc/sqlite3", OTHERS, 100, 0,
           r"index\.html$|^releaselog|^syntax/|^c3ref/|^session/|^keyword_|^matrix/|^sitemap|^changes|^chronology"),
    Source("apache2-doc", "Apache HTTP Server 2.4", "usr/share/doc/apache2-doc/manual/en", OTHERS, 100, 0,
           r"index\.html$|^sitemap|^style/|quickreference|^mod/directives|^license"),
)


@dataclass(frozen=True)
class Page:
    """A page as a tenant would post it. `path` is the source's name and the file within it; `title` ends with the
    product and its version; `indexed` is false for those that are only asked about."""

    path: str
    product: str
    tenant: str
    title: str
    text: str
    indexed: bool = True

    @property
    def file(self) -> str:
        """The path without the product, the same in all versions of one."""
        return self.path.partition("/")[2]


def package_versions(sources: Sequence[Source] = SOURCES) -> dict[str, str]:
    """The version of each package that apt would take. Raises RuntimeError naming those that it does not know."""
    found = {}
    for source in sources:
        shown = subprocess.run(["apt-cache", "policy", source.package], capture_output=True, text=True, check=True)
        match = re.search(r"Candidate: (?!\(none\))(\S+)", shown.stdout)
        found[source.package] = match[1] if match else ""
    if missing := [package for package, version in found.items() if not version]:
        raise RuntimeError(f"apt does not offer {', '.join(missing)}; Debian 12 does, after `apt-get update`")
    return found


def unpack(source: Source, version: str, cache_folder: Path) -> Path:
    """The unpacked package, downloaded where it is not in the cache."""
    target = cache_folder / f"{source.package}_{version.replace(':', '%3a')}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.with_suffix(".part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        subprocess.run(["apt-get", "download", "-q", f"{source.package}={version}"], cwd=work, check=True,
                       capture_output=True)
        archive = next(work.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(work)], check=True)
        archive.unlink()
        work.rename(target)
    return target


def read_source(source: Source, unpacked: Path) -> list[Page]:
    """All pages of a manual that can be documents, in an order that says nothing: by a hash of their path."""
    folder = unpacked / source.folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{source.package} has no folder {source.folder}")
    pages, titles = [], set()
    for path in sorted(folder.rglob("*.html"), key=lambda path: _order(str(path.relative_to(folder)))):
        file = str(path.relative_to(folder))
        if re.search(source.skipped, file) or path.is_symlink():
            continue
        title, text = read_html(path.read_text(encoding="utf-8", errors="replace"))
        title = NUMBER.sub("", TAIL.sub("", title)).strip()
        if not title or title in titles or not CHARACTERS[0] <= len(text) <= CHARACTERS[1]:
            continue
        titles.add(title)
        pages.append(Page(f"{source.name}/{file}", source.product, source.tenant, f"{title} - {source.product}", text))
    return pages


def choose(pages: Sequence[Page], source: Source) -> list[Page]:
    """`source.pages` documents and `source.left_out` others. Which of them a page may be hangs on its file name, so
    that a page that is left out of one version is left out of all."""
    documents = [page for page in pages if not _is_left_out(page.file)][: source.pages]
    others = [replace(page, indexed=False) for page in pages if _is_left_out(page.file)][: source.left_out]
    return documents + others


@cache
def load(cache_folder: Path = CACHE) -> tuple[Page, ...]:
    """All pages, and those left out. Downloads what the cache lacks."""
    versions = package_versions()
    pages: list[Page] = []
    for source in SOURCES:
        pages += choose(read_source(source, unpack(source, versions[source.package], cache_folder)), source)
    return tuple(pages)


def _order(file: str) -> str:
    return hashlib.sha256(file.encode()).hexdigest()


def _is_left_out(file: str) -> bool:
    return _order(file)[0] in "012"


def main() -> None:
    """Fetch the packages and say what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    pages = load(options.cache)
    for source in SOURCES:
        mine = [page for page in pages if page.product == source.product]
        indexed = [page for page in mine if page.indexed]
        print(f"{source.product}: {len(indexed)} documents, {len(mine) - len(indexed)} left out, "
              f"{sum(len(page.text) for page in indexed):,} characters")


if __name__ == "__main__":
    main()
