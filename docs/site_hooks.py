"""What the site shows of the repository outside docs/, for mkdocs.

Pages link to files of the repository by relative paths, as one reads them there. On the site
README.md is the first page, and what pages link to outside docs/ stands where the repository has
it: Markdown as a page, a folder as a list of its files, pictures and CSV as they are, source as a
page with its text.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hf_prefix_patch import __all__ as PUBLIC  # noqa: E402
from hf_prefix_patch import cli  # noqa: E402

COMMANDS = "<!-- the commands -->"
"""On a page: the help of every command of the command line."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+")
_FILE_NAME = re.compile(r"\[([-\w]+\.md)\]\(([^)#\s]+)")
_NAME = re.compile(rf"<(?:a|h\d|pre)\b.*?</(?:a|h\d|pre)>|<code>({'|'.join(PUBLIC)})</code>", re.S)
_AS_THEY_ARE = (".md", ".csv", ".png", ".svg")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".jsonl": "json"}
_DOCS = "docs/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README and what is linked to outside docs/, and what that links to in turn."""
    found = {"README.md"} | {_DOCS + file.src_uri for file in files.documentation_pages()}
    waiting = list(found)
    while waiting:
        path = waiting.pop()
        content = _content(ROOT / path)
        if not path.startswith(_DOCS):
            files.append(File.generated(config, _on_site(path), content=content))
        if isinstance(content, str):
            targets = {_in_repository(path, link) for link in _LINK.findall(content)}
            new = {target for target in targets - found if (ROOT / target).exists()}
            found |= new
            waiting += [target for target in new if not _is_asset_of_docs(target)]
    config.extra["repository_paths"] = {_on_site(path): path for path in found}
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links by the paths of the site; the help of the commands where it is asked for."""
    here = page.file.src_uri
    path = config.extra["repository_paths"][here]

    def moved(link: re.Match[str]) -> str:
        target = _in_repository(path, link[0])
        if not (ROOT / target).exists():
            return link[0]  # strict mode tells of it
        return posixpath.relpath(_on_site(target), posixpath.dirname(here) or ".")

    markdown = _FILE_NAME.sub(lambda link: _titled(link, path, config), markdown)
    return _LINK.sub(moved, markdown).replace(COMMANDS, _help_of_commands())


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Public names in code type lead to what the API page says of them."""
    api = files.src_uris["api.md"].url_relative_to(page.file)

    def linked(found: re.Match[str]) -> str:
        if found[1] is None:  # in a link, a heading or a block of code
            return found[0]
        return f'<a href="{api}#hf_prefix_patch.{found[1]}">{found[0]}</a>'

    return _NAME.sub(linked, html)


def _titled(link: re.Match[str], path: str, config: MkDocsConfig) -> str:
    """A link whose text is the name of a page, with its title there instead."""
    target = _on_site(_in_repository(path, link[2]))
    title = _titles(config.nav).get(target, link[1])
    return f"[{title}]({link[2]}"


def _titles(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Titles that the navigation gives to pages."""
    titles = {}
    for entry in entries:
        ((title, below),) = entry.items()
        titles |= _titles(below) if isinstance(below, list) else {below: title}
    return titles


def _in_repository(page: str, link: str) -> str:
    """Where a link on a page leads, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _is_asset_of_docs(path: str) -> bool:
    return path.startswith(_DOCS) and not path.endswith(".md")


def _on_site(path: str) -> str:
    """Where the site has a file or folder of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith(_DOCS):
        return path.removeprefix(_DOCS)
    if (ROOT / path).is_dir():
        return f"{path}/index.md"
    return path if path.endswith(_AS_THEY_ARE) else f"{path}.md"


def _content(path: Path) -> str | bytes:
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        lines = (
            f"- [{file.name}]({path.name}/{file.name})"
            for file in sorted(path.iterdir())
            if _shown(file)
        )
        return "\n".join([f"# {name}", "", *lines, ""])
    if path.suffix == ".md":
        return path.read_text()
    if path.suffix in _AS_THEY_ARE:
        return path.read_bytes()
    text = path.read_text().rstrip()
    return f"# {name}\n\n~~~~{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n~~~~\n"


def _shown(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _help_of_commands() -> str:
    """Of the whole and of each command, as they print it."""
    os.environ["COLUMNS"] = "88"  # or lines are as long as the terminal of whoever builds is wide
    sections = []
    for words in [[], *([name] for name in cli.COMMANDS)]:
        text = io.StringIO()
        with redirect_stdout(text), suppress(SystemExit):
            cli.main([*words, "--help"])
        title = " ".join(["hf-prefix-patch", *words])
        sections.append(f"## {title}\n\n~~~~text\n{text.getvalue().rstrip()}\n~~~~\n")
    return "\n".join(sections)
