"""What the site takes from the code when it is built, so that it is written once."""

import re
from dataclasses import fields

from peft import LoraConfig

from peft_queryable import QueryableLoraConfig

FIELDS_MARK = "<!-- fields of QueryableLoraConfig -->"


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


def on_page_content(html: str, **kwargs) -> str:
    """Docstrings write [`Name`] as PEFT's do; here the brackets would stay."""
    return re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
