"""The recipe's reference, for editors and for people: written from the schema, so that it cannot be wrong."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from finetune.config.describe import Listed, chosen_by, is_section, kinds, options, sections, wanted_of
from finetune.config.schema import Recipe
from finetune.config.section import fields

PREAMBLE = """\
# What a recipe may say

<!-- Written by `finetune schema --markdown > docs/recipes.md`; change finetune/config/schema.py instead. -->

A recipe is a YAML file that decides everything about a run. `finetune validate RECIPE.yaml` checks it without loading
a model, `finetune plan RECIPE.yaml` says what it would do, `finetune train RECIPE.yaml` does it. An unknown key is an
error, and all errors are reported at once, each with its line:

```
star.yaml:6: adapter.rank must be a positive integer, not 'sixteen'
star.yaml:9: train.lr is not a key; did you mean 'learning_rate'?
```

- **Inheriting.** `extends: other.yaml`, relative to the file it stands in, takes over that file's keys. Sections merge,
  lists are replaced, and a section that names another `kind` is replaced as a whole.
- **Overriding.** `finetune train RECIPE.yaml train.steps=200 data.concepts.0.folder=pictures adapter.kind=full`. The
  values are YAML and win over the file.
- **Paths** are relative to the folder that the command runs in; only `extends` is relative to its file.
- **Words and numbers** are read as in YAML 1.2: `no` is a word, `1e-4` a number, true and false are `true` and `false`.
- **Editors** complete and check recipes with `finetune schema > recipe.schema.json` and a first line
  `# yaml-language-server: $schema=recipe.schema.json`.

The recipe as it was run, with every default written out, is kept as `recipe.lock.yaml` in the output folder. It is a
recipe too.
"""


def json_schema() -> str:
    """The JSON Schema of a recipe file, ``extends`` included."""
    found = Recipe.model_json_schema()
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe whose keys this one inherits, relative to this file.",
    }
    # what is required may stand in the file that is extended
    found["anyOf"] = [{"required": found.pop("required")}, {"required": ["extends"]}]
    return json.dumps(found, indent=2) + "\n"


def markdown() -> str:
    """The reference: one heading and one table per section."""
    return "\n".join([PREAMBLE, *(_section(listed) for listed in sections())])


def _section(listed: Listed) -> str:
    rows = [
        f"| `{name}` | {_cell(wanted_of(field))} | {_default(field)} | {_cell(field.description or '')} |"
        for name, field in fields(listed.section).items()
    ]
    table = ["| Key | Value | Default | |", "|---|---|---|---|", *rows]
    doc = " ".join((listed.section.__doc__ or "").split())
    return "\n".join([f"## {_title(listed)}", "", doc, "", *table, ""])


def _title(listed: Listed) -> str:
    if not listed.path:
        return "The recipe"
    kind = f", {listed.section.chosen_by} `{listed.kind}`" if listed.kind else ""
    return f"`{listed.path}`{', each' if listed.repeated else ''}{kind}"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    if value is PydanticUndefined or value is None:
        return ""
    if any(is_section(option) for option in options(field.annotation)):
        if not kinds(field.annotation):
            return ""
        key = chosen_by(field.annotation)
        return f"{key} `{value[key]}`"
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
