"""The base class of every stage, and the table of the places in a run where a stage may act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from reelquant._errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from reelquant.sites import DenoiserMap
    from reelquant.stages.block import BlockWork
    from reelquant.stages.group import GroupView
    from reelquant.stages.layer import LayerWork, Solution, Specs, StageSite
    from reelquant.stages.model import ModelWork

Scope = Literal["layer", "group", "block", "model"]


class Hook(NamedTuple):
    """A place in a run.

    Attributes:
        scope: what one call of the hook looks at.
        when: the moment, in words for documents and error messages.
    """

    scope: Scope
    when: str


HOOKS: dict[str, Hook] = {
    "before_observing": Hook("model", "before the float model is sampled for calibration"),
    "before_choosing": Hook("model", "after the float reference was sampled, before candidates are tried"),
    "choose_specs": Hook("model", "before anything is built: other formats for some layers"),
    "rewrite": Hook("group", "rewriting: an exact change of an input that several layers read"),
    "split": Hook("layer", "rewriting: a part of the weight leaves the codes for tensors of the stage's own"),
    "solve_layer": Hook("layer", "solving: codes of a weight, scales of an input"),
    "solve_block": Hook("block", "solving: better codes for all layers of a block at once"),
    "after_installing": Hook("model", "after all quantized layers are in the model"),
    "before_check": Hook("model", "right before the final check samples"),
    "after_check": Hook("model", "after the final check"),
}
"""Every hook of :class:`Stage`, in the order in which the engine calls them."""


class Stage:
    """One thing that a recipe does. Members are frozen dataclasses; their fields are the parameters that recipes write.

    A member overrides the hooks it takes part in. The engine calls hooks and knows no member by name.

    Attributes:
        statistics: names in :data:`reelquant.observe.STATISTICS` that the stage wants of every input it touches.
        samples: whether the stage needs a calibration pass, even if it wants no statistic.
        exclusive: at most one exclusive stage of the same axis per layer, or per recipe if the stage takes no ``on``.
        key: a top-level key of recipes that stands for this stage, beside a line in ``steps``; None for no such key.
        default_on: the layers a step touches if it has no ``on``.
        takes_on: whether a step may have an ``on``; False for stages that act on the denoiser as a whole.
        in_memory: why the stage needs the whole model in memory, or None if it works from disk to disk as well.
        untrainable: what the stage makes of a layer that gradients cannot follow, in words; None if they can.
        fills: ``rows`` and ``columns`` of a weight: where all weights are zero, the stage may make them something else.
    """

    statistics: ClassVar[frozenset[str]] = frozenset()
    samples: ClassVar[bool] = True
    exclusive: ClassVar[bool] = False
    key: ClassVar[str | None] = None
    default_on: ClassVar[str] = "role:main | role:entry | role:exit"
    takes_on: ClassVar[bool] = True
    in_memory: ClassVar[str | None] = None
    untrainable: ClassVar[str | None] = None
    fills: ClassVar[frozenset[str]] = frozenset()

    @property
    def records(self) -> int:
        """How many calls of the denoiser the stage wants recorded, arguments and outputs."""
        return 0

    @property
    def needs_data(self) -> bool:
        """Whether the stage, with its options, cannot work in a recipe without calibration."""
        return self.samples

    @property
    def resamples(self) -> bool:
        """Whether these calls are made by the pipeline as earlier stages leave it, sampled once more for them, instead of the float one.

        For stages that act in :meth:`solve_block`. What the float model gives for such calls is still known, see
        :attr:`reelquant.stages.BlockWork.calls`.
        """
        return False

    @classmethod
    def hooks(cls) -> tuple[str, ...]:
        """The hooks this stage overrides, in the order of a run."""
        return tuple(name for name in HOOKS if getattr(cls, name) is not getattr(Stage, name))

    @classmethod
    def parse_key(cls, value: Any) -> Mapping[str, Any] | None:
        """Parameters for what a recipe writes under :attr:`key`; None if that value means that the stage is off."""
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise RecipeError(f"'{cls.key}' takes a mapping of parameters, got {value!r}")
        return value

    def supports(self, site: StageSite) -> str | None:
        """Why this stage cannot work on a layer, or None. Asked for every layer it touches before anything is sampled."""
        del site
        return None

    def units(self, map_: DenoiserMap) -> Sequence[str]:
        """The parts of a denoiser that :meth:`solve_block` works on, as module paths in execution order; its blocks by default."""
        return map_.blocks

    def needs(self, site: StageSite) -> frozenset[str]:
        """Statistics wanted of this layer's input; :attr:`statistics` unless a member knows that some are of no use here."""
        del site
        return self.statistics

    def draft(self) -> Stage:
        """A cheap stand-in for trials of a search."""
        return self

    def peak_bytes(self, rows: int, width: int) -> int:
        """Memory at the peak of :meth:`solve_layer` or :meth:`rewrite` for a weight ``[rows, width]``, beyond copies of the weight."""
        del rows, width
        return 0

    def stored_bytes(self, site: StageSite) -> int:
        """What the stage adds to the storage of a layer, beyond codes, scales and bias (for estimates)."""
        del site
        return 0

    def leaves_out(self, site: StageSite) -> frozenset[str]:
        """Whether the stage makes some of the ``rows`` or ``columns`` of a layer's weight zero, so that they are not stored."""
        del site
        return frozenset()

    def stored_by_step(self, site: StageSite) -> int:
        """What the stage stores of a layer for every step of the sampler, bytes at most (for estimates)."""
        del site
        return 0

    def held_out_runs(self, steps: int) -> int:
        """How often the stage samples the held-out texts with a sampler of so many steps (for estimates)."""
        del steps
        return 0

    def own_calls(self, layers: int) -> int:
        """What the stage computes of the denoiser beside samples and replayed calls, in calls of the denoiser, at most (for estimates).

        Work on parts counts by what the parts together are of the denoiser, and a backward pass like two calls.

        Args:
            layers: how many quantized layers the stage touches.
        """
        del layers
        return 0

    def outlook(self, device: str) -> str | None:
        """What is known before the run of what the stage will do on a type of device, in words for plans; None for nothing."""
        del device
        return None

    def loaded(self, name: str, model: nn.Module, map_: DenoiserMap) -> None:
        """Act on a model that was quantized while its weights were loaded, when no hook is called because nothing is sampled.

        Args:
            name: what the recipe calls this stage.
            model: with all its layers.
            map_: what discovery knows.
        """

    # --- hooks, in the order of a run ---------------------------------------------------------------------------------------

    def before_observing(self, work: ModelWork) -> None:
        """Install what changes what the sampler computes; calibration and the float reference of layers then see it."""

    def before_choosing(self, work: ModelWork) -> None:
        """Set up the clock, or install what only the quantized model has."""

    def choose_specs(self, work: ModelWork) -> Mapping[str, Specs]:
        """Other specs by layer name; layers that are not named keep theirs."""
        del work
        return {}

    def rewrite(self, group: GroupView) -> GroupView:
        """The group after one more exact rewrite of its input."""
        return group

    def split(self, layer: LayerWork) -> LayerWork:
        """The layer with a smaller weight to round, and with the tensors that hold the rest."""
        return layer

    def solve_layer(self, layer: LayerWork) -> LayerWork:
        """The layer with codes, or with other scales of its input."""
        return layer

    def solve_block(self, block: BlockWork) -> Mapping[str, Solution]:
        """Better codes by path inside of the part (the keys of ``block.layers``); layers that are not named keep theirs."""
        del block
        return {}

    def after_installing(self, work: ModelWork) -> None:
        """Act on the model whose layers are quantized."""

    def before_check(self, work: ModelWork) -> None:
        """Get ready for the final check."""

    def after_check(self, work: ModelWork) -> None:
        """Add to the report what the final check showed."""


def register(table: dict[str, type[Any]], axis: str, name: str, member: type[Stage]) -> None:
    """Add a member to the table of an axis under a new name (plug-ins).

    Raises:
        RecipeError: if the name is taken.
    """
    if name in table:
        raise RecipeError(f"{axis} '{name}' exists already; choose another name")
    table[name] = member
