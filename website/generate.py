"""Pages of the docs that are written from the code: the verbs of the command line, and the keys of recipes.

Run it from the repository root::

    python -m website.generate

It writes ``docs/cli.md`` and ``docs/recipe-keys.md``. A test compares both with the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.models
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from reelquant.formats import FORMATS, RANGES
from reelquant.recipes.axes import AXES, keyed_stages
from reelquant.recipes.recipe import Calibrate, Defaults, Recipe, Rule, Search, Step, TensorRecipe

VALUES = {"str": "TEXT", "int": "NUMBER", "float": "NUMBER", "path": "PATH"}
DOCS = Path(__file__).parents[1] / "docs"
_TAG = re.compile(r"\[/?(?:bold|cyan|dim|green|yellow|red)\]")
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a table."""
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"
    yield ""


def _cell(text: str) -> str:
    """A cell in one line. Bars are written so that every reader of Markdown takes them for letters, also in code."""
    parts = " ".join(text.split()).split("`")
    code = (f"<code>{part.replace('<', '&lt;')}</code>" if "|" in part else f"`{part}`" for part in parts[1::2])
    whole = "".join(piece for pair in zip(parts[::2], [*code, ""], strict=True) for piece in pair)
    return whole.replace("|", "&#124;")


# --------------------------------------------------------------------------------------------------------------------- command line


CLI = """# Command line

Every verb with its options, as `reelquant VERB --help` shows them. This page is written by `python -m website.generate`.

`--debug`, `--plugin MODULE` and `--version` stand before the verb. With `--json` a verb prints one JSON document. Exit codes:
0 done; 1 an error, or a gate that was missed; 2 wrong usage; 130 Ctrl-C; 143 SIGTERM.
"""


def cli_page() -> str:
    """The page of the command line."""
    lines = [CLI]
    for name, (text, parameters) in verbs().items():
        lines += [f"## {name}", "", *_help(text), *_arguments(parameters), *_options(parameters)]
    return "\n".join(lines).rstrip() + "\n"


def verbs() -> dict[str, tuple[str, list[Parameter]]]:
    """The help of every verb and its parameters, by name."""
    from reelquant.cli import app

    found = {}
    for registered in app.registered_commands:
        verb: Any = registered.callback
        parameters = [Parameter.of(one) for one in inspect.signature(verb, eval_str=True).parameters.values()]
        found[registered.name or verb.__name__.replace("_", "-")] = (verb.__doc__ or "", parameters)
    return found


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a verb."""

    name: str
    info: typer.models.ParameterInfo
    kind: str
    default: Any

    @classmethod
    def of(cls, one: inspect.Parameter) -> Parameter:
        kind, info = typing.get_args(one.annotation)[:2]
        return cls(one.name, info, _kind(kind), one.default)

    @property
    def names(self) -> list[str]:
        """How an option is written; ``--run/--no-run`` is one name."""
        given = [self.info.default, *(getattr(self.info, "param_decls", None) or ())]  # typer takes the first name for a default
        named = [name for name in given if isinstance(name, str) and name.startswith("-")]
        return named or [f"--{self.name.replace('_', '-')}"]


def _kind(annotation: Any) -> str:
    """One word for a type: what it is a list of, or optional."""
    inner = [one for one in typing.get_args(annotation) if one is not type(None)]
    return _kind(inner[0]) if inner else annotation.__name__.lower()


def _help(text: str) -> Iterator[str]:
    """Paragraphs of a help; those that hold commands are blocks of code."""
    for block in inspect.cleandoc(text).split("\n\n"):
        plain = _TAG.sub("", block.replace("\b", "")).strip()
        if block.strip().startswith("[cyan]"):
            yield from ("```", *(line.strip() for line in plain.splitlines()), "```", "")
        elif plain and plain != "Examples":
            yield from (_escaped(_TAG.sub(_code, block).strip().replace("\n", " ")), "")


def _code(found: re.Match[str]) -> str:
    return "`" if "cyan" in found[0] else "**" if "bold" in found[0] else ""


def _escaped(text: str) -> str:
    """Text in which only code in backticks may hold the brackets of HTML."""
    parts = text.split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def _arguments(parameters: list[Parameter]) -> Iterator[str]:
    found = [one for one in parameters if isinstance(one.info, typer.models.ArgumentInfo)]
    rows = [(f"`{one.info.metavar or one.name.upper()}`", _escaped(one.info.help or "")) for one in found]
    if rows:
        yield from table(("argument", "meaning"), rows)


def _options(parameters: list[Parameter]) -> Iterator[str]:
    found = [one for one in parameters if isinstance(one.info, typer.models.OptionInfo) and not one.info.hidden]
    yield from table(("option", "value", "default", "meaning"), map(_option, found))


def _option(one: Parameter) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in one.names)
    value = "" if one.kind == "bool" else f"`{one.info.metavar or VALUES.get(one.kind, one.kind.upper())}`"
    silent = one.default in (None, False, "", inspect.Parameter.empty) or callable(one.default)
    return names, value, "" if silent else f"`{one.default}`", _escaped(one.info.help or "")


# ------------------------------------------------------------------------------------------------------------------------- recipes


KEYS = """# Recipe keys

A recipe is a YAML file. This page lists every key, every stage and every number format. It is written by `python -m website.generate`
from the classes that read recipes. An unknown key is an error that gives the nearest name. `reelquant recipes NAME --yaml` prints a recipe
to start from. [adding-a-method.md](adding-a-method.md) explains how the parts work together, and [methods.md](methods.md) shows the recipes
of the library.

A file may begin with `extends: NAME`: it then changes that recipe key by key.
"""
MODELS: dict[str, tuple[type[BaseModel], str]] = {
    "The recipe": (Recipe, "top level"),
    "Numbers of a tensor": (TensorRecipe, "`defaults.weight`, `defaults.input`, `rules[].weight`, `rules[].input`"),
    "Defaults": (Defaults, "`defaults`"),
    "Rules": (Rule, "`rules[]`"),
    "Calibration": (Calibrate, "`calibrate`"),
    "Search": (Search, "`search`"),
    "Steps": (Step, "`steps[]`"),
}
KEYED = """A step names one stage: `{transform: shift, center: mid, on: "role:main"}`. Every further key is a parameter of the stage, and
`on` says for which layers. A list of values is a choice that the search makes. Some stages have a key of their own at the top level:
"""


def keys_page() -> str:
    """The page of recipe keys."""
    lines = [KEYS]
    for title, (model, where) in MODELS.items():
        lines += [f"## {title}", "", f"Where: {where}.", "", _prose(model), "", *_fields(model)]
    lines += ["## Stages by axis", "", *_keyed()]
    for axis, its in AXES.items():
        lines += [f"### {axis}", ""]
        for name, member in its.members.items():
            lines += [f"#### `{{{axis}: {name}}}`", "", _prose(member), "", *_parameters(member)]
    lines += ["## Number formats", "", *_formats(), "## Ranges", "", *_ranges()]
    return "\n".join(lines).rstrip() + "\n"


def _prose(kind: type) -> str:
    """The docstring of a class up to its sections, for Markdown."""
    text = re.split(r"\n\n?(?:Attributes|Args|Papers?|Example)s?:", inspect.getdoc(kind) or "")[0]
    code = _ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2]}`", text.replace("``", "`"))
    return _escaped("\n\n".join(" ".join(part.split()) for part in code.split("\n\n")))


def _meanings(kind: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of attributes, by name."""
    found: dict[str, str] = {}
    for one in kind.__mro__:
        section = (inspect.cleandoc(one.__doc__ or "") + "\n\n").partition("Attributes:\n")[2].partition("\n\n")[0]
        for names, words in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            for name in names.split(", "):
                found.setdefault(name, _escaped(_ROLE.sub(r"`\1`", " ".join(words.split())).replace("``", "`")))
    return found


def _fields(model: type[BaseModel]) -> Iterator[str]:
    meanings = _meanings(model)
    rows = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        kind = model.__annotations__.get(name, "") if isinstance(model.__annotations__.get(name), str) else str(field.annotation)
        rows.append((f"`{name}`", f"`{_either(kind.partition(' = ')[0])}`", default, meanings.get(name, "")))
    yield from table(("key", "kind", "default", "meaning"), rows)


def _either(kind: str) -> str:
    """A type in words: tables of Markdown have bars of their own."""
    return kind.replace(" | ", " or ")


def _default(value: Any) -> str:
    if value is PydanticUndefined or value is dataclasses.MISSING:
        return "required"
    if isinstance(value, BaseModel):
        return "see below"
    if value is None:
        return "`null`"
    if value in ((), "", {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _keyed() -> Iterator[str]:
    yield from (*KEYED.splitlines(), "")
    yield from table(("key", "stage"), ((f"`{key}`", f"`{{{axis}: {name}}}`") for key, (axis, name) in keyed_stages().items()))


def _parameters(member: Any) -> Iterator[str]:
    meanings = _meanings(member)
    rows = [
        (
            f"`{field.name}`",
            f"`{_either(str(field.type))}`",
            _default("" if field.default == "" else field.default),
            meanings.get(field.name, ""),
        )
        for field in dataclasses.fields(member)
    ]
    if rows:
        yield from table(("parameter", "kind", "default", "meaning"), rows)


def _formats() -> Iterator[str]:
    families: dict[str, list[str]] = {}
    makers: dict[str, Callable[[], Any]] = {}
    for name, make in FORMATS.items():
        family = f"{type(make()).__name__}{name.startswith('u')}"  # int and uint are one class
        families.setdefault(family, []).append(name)
        makers.setdefault(family, make)
    what = {family: _prose(type(make())).split("\n\n")[0] for family, make in makers.items()}
    rows = ((", ".join(f"`{name}`" for name in names), what[family]) for family, names in families.items())
    yield from table(("names", "what"), rows)
    yield "Granularities: `tensor`, `channel`, `group-64`, `token`, `sample`, `frame-16`; numbers may be others."
    yield ""


def _ranges() -> Iterator[str]:
    for name, rule in RANGES.items():
        kind: Any = rule
        yield from (f"### `range: {name}`", "", _prose(kind).split("\n\n")[0], "", *_parameters(kind))


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_page, "recipe-keys.md": keys_page}


def main() -> None:
    """Write the pages."""
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
