"""Render self-contained HTML pages: one style, no scripts, no external files; every value is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def render_page(template: Path, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """Render ``template``, which extends ``page.html.j2``, with ``values``.

    Raises:
        jinja2.UndefinedError: the template names a value that is missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(**values)
