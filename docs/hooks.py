"""What the site takes from the code and from other packages when it is built, so that it is kept once."""

import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url
from peft import LoraConfig

from peft_queryable import QueryableLoraConfig

FIELDS_MARK = "<!-- fields of QueryableLoraConfig -->"
MATHJAX = "assets/tex-svg.js"


def on_files(files, config, **kwargs):
    """MathJax, from the package django-static-mathjax: readers load nothing from elsewhere."""
    (package,) = find_spec("mathjax").submodule_search_locations
    source = Path(package, "static/mathjax/es5/tex-svg.js")
    files.append(File.generated(config, MATHJAX, abs_src_path=str(source)))
    return files


def field_table() -> str:
    """Fields that `QueryableLoraConfig` has beside LoraConfig's: name, type, default and help text."""
    inherited = LoraConfig.__dataclass_fields__
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(QueryableLoraConfig):
        if field.name not in inherited:
            lines.append(f"| `{field.name}` | `{field.type}` | `{field.default!r}` | {field.metadata['help']} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **kwargs) -> str:
    return markdown.replace(FIELDS_MARK, field_table())


def on_page_content(html: str, page, **kwargs) -> str:
    """Docstrings write [`Name`] as PEFT's do; here the brackets would stay. Pages with formulas load MathJax."""
    html = re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
    if 'class="arithmatex"' in html:
        html += f'<script defer src="{get_relative_url(MATHJAX, page.url)}"></script>'
    return html
