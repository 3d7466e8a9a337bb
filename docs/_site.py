"""What the site has besides docs/: each file of the repository that a page links to, as a page of its own.

In a clone a link out of docs/ leads to a file. On the site it leads to ``repository/...``, with its text.
One to a file that does not exist is left as it is, and ``mkdocs build --strict`` fails.
"""

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"\]\(([^)#:\s]+)")
#: What a file is shown as.
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".toml": "toml"}


def page_of(path: Path) -> str:
    """Where the site has a file of the repository, relative to its root."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    inside = path.relative_to(ROOT).as_posix()
    return f"repository/{inside}" if path.suffix == ".md" else f"repository/{inside}.md"


def targets(source: Path, text: str) -> dict[str, Path]:
    """The links of a file to others of the repository that exist, of which one is not in docs/."""
    found = {link: Path(os.path.normpath(source.parent / link)) for link in LINK.findall(text)}
    return {
        link: path
        for link, path in found.items()
        if path.is_file() and path.is_relative_to(ROOT)
        if not (source.is_relative_to(DOCS) and path.is_relative_to(DOCS))
    }


def for_site(source: Path, text: str) -> str:
    """The text with links that are right on the site."""
    for link, path in targets(source, text).items():
        right = os.path.relpath(page_of(path), os.path.dirname(page_of(source)))
        text = re.sub(rf"\]\({re.escape(link)}(?=[)#])", f"]({right}", text)
    return text


def on_files(files: Any, config: Any) -> Any:
    """Add what is linked to, and what that links to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    known = set(waiting)
    while waiting:
        source = waiting.pop()
        text = source.read_text()
        if not source.is_relative_to(DOCS):
            if source.suffix == ".md":
                content = for_site(source, text)
            else:
                language = LANGUAGES.get(source.suffix, "")
                content = f"# {source.relative_to(ROOT)}\n\n````{language}\n{text}\n````\n"
            page = File.generated(config, page_of(source), content=content)
            page.inclusion = page.inclusion.NOT_IN_NAV
            files.append(page)
        if source.suffix == ".md":
            new = set(targets(source, text).values()) - known
            known |= new
            waiting += [path for path in new if not path.is_relative_to(DOCS)]
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """Turn links out of docs/ into links on the site."""
    source = DOCS / page.file.src_uri
    # The site's parser takes a fence with two words for text.
    markdown = re.sub(r"^( *```python) no-run$", r"\1", markdown, flags=re.M)
    return for_site(source, markdown) if source.is_file() else markdown
