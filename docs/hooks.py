"""Hooks of mkdocs.yml: the README is the start page, and links out of docs/ lead to the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Return a page with links that mkdocs can resolve, and the README in place of ``index.md``."""
    path, source = page.file.src_uri, ""
    if path == "index.md":
        markdown, source = README.read_text(encoding="utf-8"), "README.md"
    folder = posixpath.dirname(source or f"docs/{path}")

    def resolved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if not target.startswith("docs/"):
            return f"]({config['repo_url']}/blob/main/{target}"
        return f"]({posixpath.relpath(target, posixpath.dirname(f'docs/{path}'))}"

    return LINK.sub(resolved, markdown)
