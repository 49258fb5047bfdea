"""The forms of the page, in gradio. What happens on a click is a few calls into the other modules; nothing is computed here."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import gradio as gr
from jinja2 import Environment, StrictUndefined
from markupsafe import escape

from reelquant._errors import ReelQuantError
from reelquant.recipes.text import names, read_text
from reelquant.recipes.usual import FIRST
from reelquant.serve import commands, evaluations, plan
from reelquant.serve.commands import DTYPES, new_number
from reelquant.serve.folder import Model
from reelquant.serve.routes import Served, asset
from reelquant.serve.work import Launch

PROMPT = "a large red circle moving right on a black background"
NO_PLAN = '<p class="rq-quiet">The plan says what every layer becomes and what the work takes. Nothing is written before you start.</p>'
NO_CLIPS = '<p class="rq-quiet">Both clips start from the same noise.</p>'
NO_GATE = "none"
GATES = (NO_GATE, "strict", "default", "loose")
METRICS = ("quick", "default")  # quick needs no downloaded networks


Fresh = Callable[[list[Model], bool], Any]
"""Makes a list again from the models in the folder; True if the page has just been opened."""


def blocks(served: Served, start: Launch) -> gr.Blocks:
    """The page.

    Args:
        served: what the forms work on.
        start: starts the process of a plan.
    """
    with gr.Blocks(title="reelquant", analytics_enabled=False) as page:
        with gr.Row():
            gr.HTML(f'<div class="rq-top"><h1>reelquant</h1><code>{escape(served.folder.root)}</code></div>', min_width=200)
            refresh = gr.Button("Refresh lists", size="sm", elem_id="rq-refresh", scale=0, min_width=130)
        with gr.Row():
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Quantize"):
                    lists = _quantize(served, start)
                with gr.Tab("Compare"):
                    lists |= _compare(served)
                with gr.Tab("Evaluate"):
                    lists |= _evaluate(served)
            with gr.Column(scale=3, min_width=320):
                gr.HTML('<div class="rq-jobs"><h2>Jobs</h2><rq-jobs></rq-jobs></div>')
        for event, first in ((page.load, True), (refresh.click, False)):
            show = functools.partial(_lists, served, list(lists.values()), first)
            event(show, None, list(lists), show_progress="hidden", api_visibility="private")
    return page


def _lists(served: Served, fresh: list[Fresh], first: bool) -> list[Any]:
    models = served.folder.models()
    return [one(models, first) for one in fresh]


def told(act: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with what reelquant raises shown as one sentence on the page. Texts in it may come from files, and are escaped."""

    @functools.wraps(act)
    def wrapped(*given: Any) -> Any:
        try:
            return act(*given)
        except ReelQuantError as error:
            raise gr.Error(str(escape(str(error))), duration=None, print_exception=False) from None

    return wrapped


def _choices(found: list[Model], kinds: tuple[bool, ...]) -> list[tuple[str, str]]:
    return [(one.label, one.name) for one in found if one.quantized in kinds]


def _models(label: str, *kinds: bool) -> tuple[gr.Dropdown, Fresh]:
    """A list of models of some kinds (quantized or not), and what makes it again."""

    def fresh(found: list[Model], first: bool) -> Any:
        choices = _choices(found, kinds)
        return gr.update(choices=choices, value=choices[0][1]) if first and choices else gr.update(choices=choices)

    return gr.Dropdown([], label=label, min_width=240), fresh


def _machine() -> list[Any]:
    with gr.Accordion("Machine", open=False), gr.Row():
        return [gr.Textbox("cpu", label="Device", min_width=100), gr.Dropdown(list(DTYPES), label="Float parts", min_width=130)]


# ------------------------------------------------------------------------------------------------------------------ quantize


def _quantize(served: Served, start: Launch) -> dict[Any, Any]:
    with gr.Row():
        model, models = _models("Float pipeline", False)
        recipe = gr.Dropdown([FIRST], label="Recipe", value=FIRST, min_width=240)
    about = gr.HTML(_about(FIRST))
    with gr.Row():
        name = gr.Textbox(label="Name of the new folder", placeholder="made from pipeline and recipe", min_width=240)
        memory = gr.Textbox(label="Most memory", placeholder="what is free, or 8GB", min_width=240)
    inputs = [model, recipe, name, memory, *_machine()]
    known = gr.State(None)
    with gr.Row():
        look, begin = gr.Button("Show the plan"), gr.Button("Quantize", variant="primary", interactive=False)
    shown = gr.HTML(NO_PLAN)

    def planned(*given: Any) -> tuple[Any, ...]:
        form = _form(given)
        document = plan.made(served.folder, start, form)
        ready = form | {"resumable": plan.resumable(document)}
        return _render("plan.html.jinja", parts=plan.parts(document)), ready, gr.update(interactive=True)

    def begun(form: dict[str, Any] | None) -> tuple[Any, ...]:
        if form is not None:
            served.queue.add(commands.quantize(served.folder, form))
        return None, gr.update(interactive=False)

    look.click(told(planned), inputs, [shown, known, begin], api_visibility="private")
    begin.click(told(begun), known, [known, begin], show_progress="hidden", api_visibility="private")
    changed = [one.change for one in inputs]
    gr.on(
        changed,
        lambda: (NO_PLAN, None, gr.update(interactive=False)),
        None,
        [shown, known, begin],
        show_progress="hidden",
        api_visibility="private",
    )
    recipe.change(_about, recipe, about, show_progress="hidden", api_visibility="private")
    return {model: models, recipe: lambda *_: gr.update(choices=[(commands.shown(one), one) for one in served.folder.recipes()])}


def _form(given: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("model", "recipe", "name", "max_memory", "device", "dtype"), given, strict=True))


def _about(recipe: str | None) -> str:
    """What the library says of a recipe."""
    if recipe not in names():
        return f'<p class="rq-quiet">{"a recipe file of this folder" if recipe else ""}</p>'
    found = read_text(recipe)
    return f'<p class="rq-quiet">{escape(" ".join(str(found.get("summary") or "").split()))}</p>'


# ------------------------------------------------------------------------------------------------------------------- compare


def _compare(served: Served) -> dict[Any, Any]:
    quantized, floats, fresh = _pair(served)
    prompt = gr.Textbox(PROMPT, label="Prompt", lines=2)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, min_width=90)
        steps = gr.Textbox(label="Steps", placeholder="the usual", min_width=90)
    inputs = [floats, quantized, prompt, seed, steps, *_machine()]
    make = gr.Button("Make both clips", variant="primary")
    earlier = gr.Dropdown([], label="Comparisons so far")
    player = gr.HTML(NO_CLIPS)

    def begun(*given: Any) -> tuple[Any, str]:
        number = new_number()
        form = dict(zip(("float", "quantized", "prompt", "seed", "steps", "device", "dtype"), given, strict=True)) | {"number": number}
        work = commands.compare(served.folder, form)
        served.comparisons.begin(number, form)
        served.queue.add(work, number)
        return gr.update(choices=_earlier(served), value=number), _player(number)

    make.click(told(begun), inputs, [earlier, player], show_progress="hidden", api_visibility="private")
    earlier.input(told(_player), earlier, player, show_progress="hidden", api_visibility="private")
    return fresh | {earlier: lambda *_: gr.update(choices=_earlier(served))}


def _earlier(served: Served) -> list[tuple[str, str]]:
    def label(one: dict[str, Any]) -> str:
        prompt = textwrap.shorten(str(one.get("prompt")), 44, placeholder=" ...")
        return f"{commands.shown(str(one.get('quantized')))}: {prompt}, seed {one.get('seed')}"

    return [(label(one), number) for number, one in served.comparisons.all().items()]


def _player(number: str | None) -> str:
    return f'<rq-player number="{commands.checked(number)}"></rq-player>' if number else NO_CLIPS


def _pair(served: Served) -> tuple[Any, Any, dict[Any, Any]]:
    """A quantized pipeline and a float one. The one that it was made from is chosen along with it."""
    with gr.Row():
        quantized, models = _models("Quantized pipeline", True)
        floats, others = _models("Float pipeline", False)

    def source(name: str | None) -> Any:
        found = next((one.source for one in served.folder.models() if one.name == name), "")
        return gr.update(value=found) if found else gr.skip()

    quantized.change(source, quantized, floats, show_progress="hidden", api_visibility="private")
    return quantized, floats, {quantized: models, floats: others}


# ------------------------------------------------------------------------------------------------------------------ evaluate


def _evaluate(served: Served) -> dict[Any, Any]:
    quantized, floats, fresh = _pair(served)
    with gr.Row():
        clips = gr.Number(8, label="Clips", precision=0, minimum=1, min_width=90)
        steps = gr.Textbox(label="Steps", placeholder="the usual", min_width=90)
        gate = gr.Dropdown(list(GATES), value="default", label="Gate", min_width=110)
        metrics = gr.Dropdown(list(METRICS), label="Metrics", min_width=110)
    inputs = [floats, quantized, clips, steps, gate, metrics, *_machine()]
    begin = gr.Button("Evaluate", variant="primary")
    gr.HTML('<div class="rq-plan"><h3>Evaluations in this folder</h3></div>')
    listed = gr.HTML("")
    chosen = gr.Dropdown([], label="Look at a report here")
    frame = gr.HTML("")

    def begun(*given: Any) -> None:
        form = dict(zip(("float", "quantized", "clips", "steps", "gate", "metrics", "device", "dtype"), given, strict=True))
        served.queue.add(commands.evaluate(served.folder, form | {"gate": "" if form["gate"] == NO_GATE else form["gate"]}))

    def report(name: str | None) -> str:
        if not name:
            return ""
        evaluations.report(served.folder, name)
        return f'<div class="rq-report"><iframe title="report of {escape(name)}" src="/reelquant/reports/{quote(name)}"></iframe></div>'

    begin.click(told(begun), inputs, None, show_progress="hidden", api_visibility="private")
    chosen.input(told(report), chosen, frame, show_progress="hidden", api_visibility="private")
    rows = {listed: lambda *_: _render("evaluations.html.jinja", rows=evaluations.rows(served.folder))}
    return fresh | rows | {chosen: lambda *_: gr.update(choices=served.folder.evaluations())}


@functools.cache
def _template(name: str) -> Any:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(asset(name))


def _render(name: str, **given: Any) -> str:
    return _template(name).render(**given)
