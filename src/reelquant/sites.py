"""Addresses inside a denoiser: what discovery finds, and the one matcher that every recipe pattern goes through.

Nothing here imports torch: a map of a model is plain data that can be printed, compared and stored.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from reelquant._errors import SiteError, nearest
from reelquant._regex import safe

Role = Literal["main", "temporal", "prompt", "constant", "entry", "exit"]
ROLES: tuple[Role, ...] = ("main", "temporal", "prompt", "constant", "entry", "exit")
PLACES = ("last", "end")  # of a layer among the blocks: fields of Layer
Part = Literal["weight", "input", "output"]
AttentionRole = Literal["self", "cross"]


def by_component(source: str) -> tuple[str, str]:
    """``"transformer_2=qvd-w4a8"`` as component and the rest; no component for ``"qvd-w4a8"`` and for files with ``=`` in their path."""
    name, equals, rest = source.partition("=")
    return (name, rest) if equals and name.isidentifier() and not Path(source).expanduser().is_file() else ("", source)


class Addressed(Protocol):
    """What a pattern can name.

    Attributes:
        roles: every role that things of this sort have.
    """

    roles: ClassVar[tuple[str, ...]]

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def role(self) -> str: ...

    @property
    def last(self) -> bool: ...

    @property
    def end(self) -> bool: ...


@dataclass(frozen=True)
class Site:
    """One tensor of one layer: the thing that gets a :class:`~reelquant.formats.QuantSpec`."""

    layer: str
    part: Part
    role: Role


@dataclass(frozen=True)
class Layer:
    """One quantizable layer (linear or convolution) as discovery saw it.

    Attributes:
        name: dotted module path inside the denoiser.
        kind: class name of the module (``Linear``, ``Conv2d`` ...).
        role: what the input depends on. ``main``: the latent. ``temporal``: the timestep and not the latent. ``prompt``: conditioning
            only, constant over the steps. ``constant``: nothing. ``entry``: reads the latent itself, ``exit``: the last layer.
        depends: the denoiser arguments that move the input, a subset of ``latent timestep prompt image other``.
        shape: shape of the weight.
        input_shape: shape of the input in the probing run.
        channel_axis: axis of the input that holds the input channels (-1 for linear layers, 1 for convolutions).
        calls: how many times the layer ran in one call of the denoiser (0: never).
        order: position of the first call, -1 if it never ran.
        last: whether it lies in the last block, of a block that is built of lists in the last member of one of them.
        end: whether it lies anywhere in the last block.
        heads_out: heads of attention whose values are its output channels, if nothing but the mixing of tokens lies between them and the
            one layer that reads them: channels of a head may be mixed here and unmixed there. 0 otherwise.
        heads_in: the same of the layer that reads them.
    """

    roles: ClassVar[tuple[str, ...]] = ROLES
    name: str
    kind: str
    role: Role
    depends: frozenset[str]
    shape: tuple[int, ...]
    input_shape: tuple[int, ...] = ()
    channel_axis: int = -1
    calls: int = 1
    order: int = 0
    last: bool = False
    end: bool = False
    heads_out: int = 0
    heads_in: int = 0


@dataclass(frozen=True)
class AttentionSite:
    """A module that asks for attention, as discovery saw it.

    Attributes:
        name: dotted path of the innermost module that was running; empty for the denoiser itself.
        kind: its class name.
        role: ``cross`` if no layer that depends on the latent made the keys: a text, a picture, an embedding. ``self`` otherwise; joint
            attention over text and latent is ``self``.
    """

    roles: ClassVar[tuple[str, ...]] = ("self", "cross")
    last: ClassVar[bool] = False  # not known
    end: ClassVar[bool] = False
    name: str
    kind: str
    role: AttentionRole


@dataclass(frozen=True)
class Group:
    """Layers that read the very same tensor (q/k/v, gate/up), and who wrote it.

    Attributes:
        layers: names in call order.
        role: role shared by the layers.
        producer: module whose output is that tensor, or None.
        producer_kind: class name of the producer, or None.
        foldable: True if a per-channel scale can move into the producer: it is an affine norm and only this group reads its output.
        fold_shift: True if a per-channel shift can move there too: it also has a bias.
        seam: channel at which a ``torch.cat`` joined a skip connection to this input (Q-Diffusion's split), or None.
        source: layer whose output channels are the channels of this tensor: a factor there is a factor here. That holds for values,
            because attention mixes tokens only, and for the ungated half of a feed-forward. Nobody else reads them. Or None.
        source_row: the first output channel of the source that counts, if it has more than this tensor has.
    """

    layers: tuple[str, ...]
    role: Role
    producer: str | None = None
    producer_kind: str | None = None
    foldable: bool = False
    seam: int | None = None
    fold_shift: bool = False
    source: str | None = None
    source_row: int = 0

    @property
    def name(self) -> str:
        """The first layer names the group."""
        return self.layers[0]


@dataclass(frozen=True)
class DenoiserMap:
    """Everything reelquant knows about a denoiser, observed by running it.

    Attributes:
        cls: class name of the denoiser.
        layers: every linear and convolution by name, in execution order.
        groups: a partition of the layers that ran.
        blocks: module paths in execution order (reconstruction, caching, streaming work block by block).
        apart: modules inside of blocks that are called from outside of them (DiT asks the first block's norm for the embedding of all).
        timestep_argument, latent_argument, prompt_argument: names of the denoiser's forward arguments, or None.
        attention: the modules that ask for attention, in execution order.
    """

    cls: str
    layers: dict[str, Layer]
    groups: tuple[Group, ...]
    blocks: tuple[str, ...] = ()
    timestep_argument: str | None = "timestep"
    latent_argument: str | None = "hidden_states"
    prompt_argument: str | None = "encoder_hidden_states"
    notes: tuple[str, ...] = field(default=())
    apart: tuple[str, ...] = ()
    attention: tuple[AttentionSite, ...] = ()

    def group_of(self, layer: str) -> Group:
        """The group a layer belongs to."""
        for group in self.groups:
            if layer in group.layers:
                return group
        raise SiteError(f"layer '{layer}' is in no group of {self.cls}; {nearest(layer, self.layers)}")

    def by_role(self, role: Role) -> tuple[str, ...]:
        """Names of the layers with this role, in execution order."""
        return tuple(layer.name for layer in self.layers.values() if layer.role == role)


def matches(pattern: str, layer: Addressed) -> bool:
    r"""Does a pattern name this layer, or this place of attention?

    A pattern is alternatives separated by ``|``; each is one of: ``role:temporal``; ``class:Conv2d``; ``block:last`` (of a UNet the last
    member of each list in its last block) or ``block:end`` (all of the last block); ``re:REGEX`` (full match on the name); a glob
    (``blocks.*.attn1.to_q``); an exact name, which also stands for everything below it (``blocks.0``); ``maybe:GLOB`` for layers that not
    every denoiser has. A leading ``!`` negates a
    term and binds tightest; terms joined by ``&`` must all hold. A regex may hold ``|`` and ``&``, so it runs to the end of the pattern and
    comes last: ``role:main & re:blocks\.(0|1)\..*``. Roles of attention are ``self`` and ``cross``.

    Raises:
        SiteError: for an unknown role, an invalid regex or an empty term.
    """
    return any(all(_term(term, layer) for term in option) for option in _options(pattern))


def _options(pattern: str) -> list[list[str]]:
    """Alternatives of a pattern, each a list of terms."""
    head, mark, regex = pattern.partition("re:")
    options = [option.split("&") for option in head.split("|")]
    options[-1][-1] += mark + regex
    return [[_named(term.strip(), pattern) for term in option] for option in options]


def _named(term: str, pattern: str) -> str:
    if not term.lstrip("! "):
        raise SiteError(f"pattern '{pattern}' has an empty term; write a layer name, a glob, re:, role:, class: or block:")
    return term


def _term(term: str, layer: Addressed) -> bool:
    positive = term.lstrip("! ")
    if positive != term:
        return _term(positive, layer) != (term[: len(term) - len(positive)].count("!") % 2 == 1)
    if term.startswith("role:"):
        role = term[5:].strip()
        if role not in layer.roles:
            raise SiteError(f"unknown role in pattern '{term}'; {nearest(role, layer.roles)}")
        return layer.role == role
    if term.startswith("class:"):
        return layer.kind == term[6:].strip()
    if term.startswith("block:"):
        if (place := term[6:].strip()) not in PLACES:
            raise SiteError(f"pattern '{term}' names no place of blocks; {nearest(place, PLACES)}")
        return bool(getattr(layer, place))
    if term.startswith("re:"):
        return _fits(term[3:], layer.name)
    term = term.removeprefix("maybe:").strip()
    return layer.name == term or layer.name.startswith(term + ".") or fnmatch.fnmatchcase(layer.name, term)


def _fits(text: str, name: str) -> bool:
    try:
        return safe(text).fullmatch(name) is not None
    except ValueError as error:
        raise SiteError(f"'re:{text:.200}' {error}") from None


def select(pattern: str, layers: Iterable[Addressed], noun: str = "layers") -> tuple[str, ...]:
    """Names of the layers (or of what ``noun`` says) that a pattern matches.

    Raises:
        SiteError: if an alternative that names layers (not by role, class, block or ``maybe:``) matches none; the message gives the
            nearest name.
    """
    known = list(layers)
    for option in _options(pattern):
        strict = not all(term.lstrip("! ").startswith(("role:", "class:", "block:", "maybe:")) for term in option)
        if strict and not any(all(_term(term, layer) for term in option) for layer in known):
            written = " & ".join(option)
            raise SiteError(f"pattern '{written}' matches none of {len(known)} {noun}; {nearest(written, (x.name for x in known))}")
    return tuple(layer.name for layer in known if matches(pattern, layer))
