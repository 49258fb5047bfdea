"""A stretch of blocks is computed at some steps only; at the others, what it is expected to do stands for it.

Papers: FORA (arXiv 2407.01425) reuses the outputs of attention and feed-forward layers for several steps. Delta-DiT (arXiv 2406.01125)
reuses the change that a stretch of blocks makes, so that what earlier blocks computed at this step is not lost. TaylorSeer (arXiv
2503.06923) forecasts instead of repeating. CacheQuant (arXiv 2503.01323) fits what it reuses to recorded features. DeepCache (arXiv
2312.00858) keeps the output of a UNet's deep blocks, Faster Diffusion (arXiv 2312.09608) those of its encoder. Ours is one mechanism
with these as its settings. Deviations: every tensor that flows through a chain of blocks has a change of its own (hidden states and
text); so has every call of a step (the two halves of guidance); the steps at which Delta-DiT's stretch moves from the last to the first
blocks are told by their timesteps; ProfilingDiT (arXiv 2504.03140) looks at attention maps for the blocks that can be reused, ours at
how much their change differs from step to step; fitted are weights of the last results, the same for all channels (CacheQuant: a scale
and an offset for every channel of the last one); a UNet's blocks are kept or computed as a whole (DeepCache cuts between their layers);
steps of Faster Diffusion do not run in parallel. A step can also be computed because the blocks before the stretch say that much has
changed, see :mod:`reelquant.reuse.criteria`; or a schedule is planned from the size of what the blocks change, see
:mod:`reelquant.reuse.magnitude`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.nn import get_module
from reelquant.reuse.criteria import check_criterion
from reelquant.reuse.history import check_order
from reelquant.reuse.installed import InstalledBlocks
from reelquant.reuse.magnitude import computed_at
from reelquant.reuse.planned import planned, recorded
from reelquant.reuse.profile import steadiest
from reelquant.reuse.reuse import Reuse
from reelquant.reuse.schedule import Schedule
from reelquant.reuse.stretch import Stretch
from reelquant.stages import ModelWork

MEASURED = {
    "profiled": "profile its blocks; give a stretch instead of 'profiled'",
    "magnitude": "measure what its blocks change; give 'every' or 'at' instead of 'magnitude'",
    "budget": "plan; give a schedule instead of 'budget'",
}
"""Parameters that need sampled clips -> what for, and what to give instead."""


@dataclass(frozen=True)
class BlockReuse(Reuse):
    """Compute a stretch of consecutive blocks at some steps only.

    Where more than half of the blocks are a list of one class, the stretch lies in this chain, and the change that it makes is kept.
    Elsewhere (in UNets, and where other blocks run between those of the list) the stretch lies in all blocks in the order in which they
    run, and the output of each of them is kept. Without a stretch it is the answer of the denoiser that is kept; nothing is computed at
    other steps then.

    A call under autograd computes everything. A new trajectory begins when the timestep rises, or when the latents change in shape, dtype
    or device; after an interrupted clip, call ``reset()`` of what is installed.

    Attributes:
        every: the stretch is computed at every n-th step; 1 computes it always, bit for bit.
        first: so many steps at the start are always computed. There is no rule for the last steps: a denoiser does not know how many
            are left.
        at: timesteps at which the stretch is computed instead of every n-th, falling; see :class:`reelquant.reuse.schedule.Schedule`.
            ``reelquant tune`` finds them.
        stretch: the share of the blocks, from 0 to 1; blocks that lie partly inside belong to it. Empty: the whole answer of the denoiser.
        order: 0 repeats the last result, 1 and 2 forecast from the last two and three; see :class:`reelquant.reuse.history.History`.
        fitted: weights of the last ``order + 1`` results at steps that are not computed, instead of those of the polynomial: for every such
            step its timestep and the weights, oldest first, all in one list. ``reelquant tune`` fits them. Timesteps that are not listed
            get the polynomial.
        threshold: the stretch is also computed where the signal of the criterion has changed by more than this since it was last computed:
            the mean absolute difference over the mean absolute value. 0 leaves this test out. ``every`` then says after how many steps the
            stretch is computed at the latest.
        criterion: ``change`` compares what enters the stretch with that of the last computed step, ``sum`` adds up its changes from step
            to step, ``content`` those of the latents without their noise.
        magnitude: instead of a schedule of every n-th step, one whose pauses cost so much at most, planned while quantizing from the size
            of what the blocks change, see :mod:`reelquant.reuse.magnitude`. ``every`` then says how long a pause may be. 0 for none.
        profiled: instead of a stretch, this share of the blocks of a chain: those whose change differs least from step to step, see
            :mod:`reelquant.reuse.profile`. 0 for none.
        budget: instead of a schedule, the share of the steps at which the stretch is computed; which ones, and the weights of the last
            ``order + 1`` results at the others, is planned on held-out clips while quantizing, see :mod:`reelquant.reuse.planned`. 0 for
            none.
        rounded: results are kept in 8 bits, with a scale for every row of their last axis (a token of a transformer): a quarter of the
            memory of float32.
        late: another stretch, which takes the place of ``stretch`` late in a trajectory; empty for none.
        boundary: ``late`` begins at this share of the first timestep.
    """

    every: int = 2
    first: int = 1
    at: tuple[float, ...] = ()
    stretch: tuple[float, ...] = (0.25, 0.75)
    order: int = 0
    fitted: tuple[float, ...] = ()
    threshold: float = 0.0
    criterion: str = "change"
    magnitude: float = 0.0
    profiled: float = 0.0
    budget: float = 0.0
    rounded: bool = False
    late: tuple[float, ...] = ()
    boundary: float = 0.5
    always: ClassVar[Mapping[str, Any]] = {"every": 1}

    def __post_init__(self) -> None:
        _ = self.schedule
        check_order(self.order)
        check_criterion(self.criterion)
        if len(self.fitted) % (self.order + 2):
            raise RecipeError(
                f"'fitted' of reuse 'blocks' lists a timestep and {self.order + 1} weights for every step, {self.order + 2} numbers each, "
                f"got {len(self.fitted)} numbers"
            )
        for name, part in {"stretch": self.stretch, "late": self.late}.items():
            if part and (len(part) != 2 or not 0 <= part[0] < part[1] <= 1):
                raise RecipeError(f"'{name}' of reuse 'blocks' is a start and an end, like [0.25, 0.75], got {list(part)}")
        if (self.late or self.profiled) and not self.stretch:
            raise RecipeError("reuse 'blocks' without a stretch keeps the whole answer; drop 'late' and 'profiled', or give a stretch")
        if not self.threshold >= 0:
            raise RecipeError(f"'threshold' of reuse 'blocks' is a relative change like 0.1, or 0 for none, got {self.threshold}")
        if not self.threshold and self.criterion != "change":
            raise RecipeError(f"'criterion' of reuse 'blocks' belongs to a threshold, and there is none; add one, or drop {self.criterion}")
        if not self.magnitude >= 0:
            raise RecipeError(f"'magnitude' of reuse 'blocks' is the cost of a pause like 0.06, or 0 for none, got {self.magnitude}")
        if self.magnitude and (self.at or self.profiled or self.late or self.threshold):
            raise RecipeError("'magnitude' of reuse 'blocks' plans a schedule of its own; drop 'at', 'profiled', 'late' and 'threshold'")
        if not 0 <= self.profiled <= 1:
            raise RecipeError(f"'profiled' of reuse 'blocks' is a share of the blocks, 0 to 1, got {self.profiled}")
        if self.profiled and self.late:
            raise RecipeError(f"'profiled' of reuse 'blocks' takes the place of stretches; drop it, or 'late': {list(self.late)}")
        self._check_budget()
        if not 0 < self.boundary < 1:
            raise RecipeError(f"'boundary' of reuse 'blocks' lies between 0 and 1, got {self.boundary}")

    def _check_budget(self) -> None:
        if not 0 <= self.budget <= 1:
            raise RecipeError(f"'budget' of reuse 'blocks' is a share of the steps, above 0 and up to 1, or 0 for none, got {self.budget}")
        others = {"at": self.at, "fitted": self.fitted, "threshold": self.threshold, "profiled": self.profiled, "late": self.late}
        if self.budget and (given := next((name for name, value in others.items() if value), None)):
            raise RecipeError(f"'budget' of reuse 'blocks' plans when one stretch is computed; drop it, or '{given}'")

    @property
    def schedule(self) -> Schedule:
        """When the stretch is computed."""
        return Schedule(self.every, self.first, tuple(self.at))

    @property
    def rows(self) -> list[tuple[float, ...]]:
        """:attr:`fitted` by step."""
        width = self.order + 2
        return [tuple(self.fitted[start : start + width]) for start in range(0, len(self.fitted), width)]

    @property
    def in_memory(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return next((f"reuse 'blocks' samples it to {why}" for name, why in MEASURED.items() if getattr(self, name)), None)

    @property
    def needs_data(self) -> bool:
        return any(getattr(self, name) for name in MEASURED)

    def held_out_runs(self, steps: int) -> int:
        return int(self.needs_data)

    def facts(self, work: ModelWork) -> dict[str, Any]:
        """Paths of the blocks in execution order, what is kept of them, and the names of two arguments of the denoiser.

        ``late`` are the blocks of the late stretch, where there is one; ``runs`` the blocks in groups of consecutive ones, if they are
        more than one stretch; ``at`` and ``fitted`` what was planned.
        """
        found, always = self._where(work), BlockReuse(every=1, stretch=self.stretch)
        if self.budget:
            return found | planned(work, found, always, self.budget, self.order)
        if self.magnitude:
            errors = recorded(work, found, always, "magnitude")
            return found | {"at": computed_at(errors, self.magnitude, first=self.first, longest=self.every)}
        return found

    def _where(self, work: ModelWork) -> dict[str, Any]:
        """The facts that discovery knows, and those of profiled blocks."""
        timestep, latent = work.map.timestep_argument, work.map.latent_argument
        if timestep is None or latent is None:
            raise UnsupportedError(f"reuse 'blocks' follows the timestep, and '{work.component}' has none; use it for a denoiser")
        if not self.stretch:
            return {"blocks": [""], "keeps": "answer", "timestep": timestep, "latent": latent}
        chain = chain_of(work.denoiser, work.map.blocks)
        blocks = chain or list(work.map.blocks)
        common = {"keeps": "change" if chain else "outputs", "timestep": timestep, "latent": latent}
        if self.profiled:
            if chain is None:
                raise UnsupportedError(f"'profiled' of reuse 'blocks' needs a chain of blocks, and {work.map.cls} has none; give a stretch")
            chosen = steadiest(work, chain, self.profiled, BlockReuse(every=1), {"blocks": chain} | common)
            return {"blocks": chosen, "runs": _runs(chain, chosen)} | common
        late = {"late": _inside(blocks, self.late, work.map.cls)} if self.late else {}
        chosen = _inside(blocks, self.stretch, work.map.cls)
        return {"blocks": chosen} | common | late

    @property
    def remembers(self) -> int:
        return self.order + 1

    def widest(self, work: ModelWork) -> tuple[BlockReuse, dict[str, Any]]:
        """Profiled blocks keep most where none of them are neighbours: each has a change of its own then."""
        if not self.profiled:
            plain = replace(self, budget=0.0, magnitude=0.0)
            return plain, plain.facts(work)
        plain = replace(self, profiled=0.0, stretch=(0.0, 1.0))
        facts = plain.facts(work)
        blocks = facts["blocks"]
        alone = blocks[::2][: max(round(self.profiled * len(blocks)), 1)]
        return plain, facts | {"blocks": alone, "runs": [[name] for name in alone]}

    def install(self, model: nn.Module, facts: Mapping[str, Any]) -> InstalledBlocks:
        own = {name: tuple(facts[name]) for name in ("at", "fitted") if name in facts}
        acting = replace(self, budget=0.0, magnitude=0.0, **own) if own else self
        return InstalledBlocks(model, facts, acting.stretched, self.boundary)

    def stretched(self) -> Stretch:
        """What the blocks of a stretch share, with nothing to reuse yet."""
        return Stretch(self.schedule, self.order, self.rows, self.threshold, self.criterion, rounded=self.rounded)


def _inside(blocks: Sequence[str], stretch: Sequence[float], cls: str) -> list[str]:
    """The blocks of a stretch."""
    start, end = (share * len(blocks) for share in stretch)
    chosen = [*blocks[int(start) : int(-(-end // 1))]]
    if len(chosen) < 2:
        raise UnsupportedError(
            f"reuse 'blocks' needs two blocks or more, and the stretch {list(stretch)} of the {len(blocks)} blocks of {cls} holds "
            f"{len(chosen)}; give a wider stretch"
        )
    return chosen


def _runs(chain: Sequence[str], chosen: Sequence[str]) -> list[list[str]]:
    """Some blocks of a chain in groups of consecutive ones."""
    groups = itertools.groupby(chain, key=lambda name: name in chosen)
    return [list(names) for wanted, names in groups if wanted]


def chain_of(denoiser: nn.Module, blocks: Sequence[str]) -> list[str] | None:
    """The list that holds more than half of the blocks; None without one, or if its blocks differ in class, or others run between them.

    A UNet has as many blocks up as down, so it has no such list, even if all of its blocks down are of one class.
    """
    homes = [name.rpartition(".")[0] for name in blocks]
    home = max(homes, key=homes.count, default="")
    own = [name for name in blocks if name.rpartition(".")[0] == home]
    kinds = {type(get_module(denoiser, name)) for name in own}
    if 2 * len(own) <= len(blocks) or len(kinds) != 1 or not isinstance(get_module(denoiser, home), nn.ModuleList):
        return None
    first = blocks.index(own[0])
    return own if [*blocks[first : first + len(own)]] == own else None
