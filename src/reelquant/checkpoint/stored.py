"""What ``config.json`` says about a quantized denoiser: enough to build its empty layers, start its clock and check what was loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from reelquant._errors import CheckpointError, RecipeError, UnsupportedError
from reelquant._plugins import load_installed
from reelquant._remarks import remark
from reelquant._version import __version__
from reelquant.checkpoint.needs import IMPORT_FIRST, check_here, needed
from reelquant.checkpoint.verify import layer_sum, tile_checksum
from reelquant.clock import FEWEST, MOST, NAME, OWN, Apart, Clock, Inputs, Pairs, Widths
from reelquant.models.pipelines import mark_quantized
from reelquant.nn import LAYERS, AttentionPlan, LayerLayout, QuantLayer, asked_attention, buffer_shapes, quantized_layers, scaled_logits
from reelquant.policies import ChangeResolution, resolution_of
from reelquant.policies.step_policy import POLICY, RUNTIME, protected_slots, written_policy
from reelquant.reuse import stored_reuse

METHOD = "reelquant"
BITS = {"inputs": "input_bits", "weights": "weight_bits"}  # fields of Widths -> keys of slots, a number for each step; 0: as stored
FORMAT_VERSION = 1
OPTIONAL: dict[str, type] = {
    "recipe": dict,
    "recipe_digest": str,
    "tool_version": str,
    "slots": dict,
    "sums": dict,
    "reuse": dict,
    "plugins": dict,
    "logits": dict,
    RUNTIME: dict,
    "resolution": dict,
}
TEXTS = ("ignore", "checksums", "sums", "plugins")  # hold texts and nothing else
REQUIRED: dict[str, type] = {"format_version": int, "config_groups": dict, "ignore": list, "checksums": dict}
WISHES = ("modules_to_not_convert", "modules_dtype_dict", "group_size")  # of a model that was quantized while loading
KNOWN = {"quant_method", "attention", *WISHES, *OPTIONAL, *REQUIRED}


@dataclass(frozen=True)
class Slots:
    """The calibrated timesteps, in sampling order, the denoiser's argument that carries the timestep, and the bits of steps: of some groups
    of layers, and of all others."""

    timesteps: tuple[float, ...]
    argument: str
    protected: tuple[int, ...] = ()
    inputs: Inputs = "float"
    pairs: Pairs | None = None
    latent: str | None = None
    widths: tuple[Widths, ...] = ()
    apart: tuple[Apart, ...] = ()

    def clock(self) -> Clock:
        """The clock of a loaded denoiser."""
        return Clock(self.timesteps, self.protected, self.inputs, self.pairs, self.latent, self.widths, self.apart)

    def to_json(self) -> dict[str, Any]:
        """Plain data; nothing of protection and guidance where there is none."""
        protection = {"protected": list(self.protected), "protected_inputs": self.inputs} if self.protected else {}
        guidance = {"pairs": self.pairs, "latent": self.latent} if self.pairs else {}
        groups = [{"layers": list(group.layers), **_written(group.widths)} for group in self.apart]
        bits = _written(self.widths) | ({"groups": groups} if groups else {})
        return {"timesteps": list(self.timesteps), "argument": self.argument, **protection, **guidance, **bits}


def _written(widths: Sequence[Widths]) -> dict[str, list[int]]:
    """Bits of steps under the keys of slots; nothing of what is as stored at all of them."""
    bits = {key: [getattr(one, name) for one in widths] for name, key in BITS.items()}
    return {key: numbers for key, numbers in bits.items() if any(numbers)}


@dataclass(frozen=True)
class Stored:
    """The content of ``quantization_config``.

    Attributes:
        layers: layout of every quantized layer, in the order of the model.
        checksums: one :func:`tile_checksum` per quantized layer.
        ignore: linear and convolution layers that stay float.
        slots: what the clock needs, or None for data-free models.
        attention: what attention rounds, or None.
        sums: one :func:`layer_sum` per quantized layer; empty in folders of older versions.
        reuse: what is not computed at every step: options and facts by name, see :mod:`reelquant.reuse`.
        recipe, recipe_digest: the whole recipe as a mapping that ``load_recipe`` reads, and its hash.
        tool_version: the reelquant that wrote this.
        logits: usual numbers of tokens by place, see :class:`reelquant.nn.ScaledLogits`; empty where attention does not follow them.
        plugins: what layers need of others, see :data:`reelquant.checkpoint.needs.TABLES` -> the module that has it.
        resolution: the schedule of sizes that our own verbs sample with, or None.
    """

    layers: dict[str, LayerLayout]
    checksums: dict[str, str]
    ignore: tuple[str, ...] = ()
    slots: Slots | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_digest: str = ""
    tool_version: str = ""
    attention: AttentionPlan | None = None
    reuse: Mapping[str, Any] = field(default_factory=dict)
    sums: Mapping[str, str] = field(default_factory=dict)
    plugins: Mapping[str, str] = field(default_factory=dict)
    logits: Mapping[str, int] = field(default_factory=dict)
    resolution: ChangeResolution | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; layers of one layout share a group. Nothing of attention where it is float."""
        attention = {} if self.attention is None else {"attention": self.attention.to_json()}
        reuse = {"reuse": dict(self.reuse)} if self.reuse else {}
        plugins = {"plugins": dict(self.plugins)} if self.plugins else {}
        resolution = {} if self.resolution is None else {"resolution": self.resolution.to_json()}
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "tool_version": self.tool_version,
            "recipe": dict(self.recipe),
            "recipe_digest": self.recipe_digest,
            "config_groups": self._groups(),
            "ignore": list(self.ignore),
            "slots": self.slots and self.slots.to_json(),
            "checksums": dict(self.checksums),
            **({"sums": dict(self.sums)} if self.sums else {}),
            **attention,
            **reuse,
            **plugins,
            **({"logits": dict(self.logits)} if self.logits else {}),
            **(written_policy(self.recipe) if self.slots is not None and self.slots.protected else {}),
            **resolution,
        }

    def _groups(self) -> dict[str, dict[str, Any]]:
        members: dict[LayerLayout, list[str]] = {}
        for name, layout in self.layers.items():
            members.setdefault(layout, []).append(name)
        return {f"group_{i}": {"targets": names, **layout.to_json()} for i, (layout, names) in enumerate(members.items())}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stored:
        """Read :meth:`to_json` back.

        Raises:
            CheckpointError: naming the key that is missing or wrong, or the plug-in that has to be imported first.
        """
        load_installed()
        _check_keys(data)
        check_here(data.get("plugins") or {})
        layers = _layouts(data["config_groups"])
        if missing := sorted(set(layers) - set(data["checksums"])):
            raise CheckpointError(f"quantization_config has no checksum for layer '{missing[0]}'; save the model again with reelquant.save")
        stored = cls(
            layers,
            dict(data["checksums"]),
            tuple(data["ignore"]),
            _slots(data.get("slots"), data.get(RUNTIME) or {}),
            data.get("recipe") or {},
            data.get("recipe_digest", ""),
            data.get("tool_version", ""),
            _attention(data),
            data.get("reuse") or {},
            data.get("sums") or {},
            data.get("plugins") or {},
            data.get("logits") or {},
            None if data.get("resolution") is None else ChangeResolution.from_json(data["resolution"]),
        )
        stored._check_slots()
        return stored

    def _check_slots(self) -> None:
        count = len(self.slots.timesteps) if self.slots else 0
        for name, layout in self.layers.items():
            if layout.steps > 1 and layout.steps != count:
                raise CheckpointError(
                    f"layer '{name}' has parameters for {layout.steps} denoising steps, quantization_config.slots lists {count}"
                )
        named = Counter(name for group in (self.slots.apart if self.slots else ()) for name in group.layers)
        if wrong := sorted(name for name, count in named.items() if count > 1 or name not in self.layers):
            raise CheckpointError(
                f"quantization_config.slots.groups gives bits to '{wrong[0]:.80}', which has to be a quantized layer and in one group"
            )


def describe(
    model: nn.Module,
    recipe: Mapping[str, Any],
    digest: str,
    checksums: Mapping[str, str] | None = None,
    sums: Mapping[str, str] | None = None,
) -> Stored:
    """What has to be stored about a model whose layers are quantized; ``checksums`` and ``sums`` of layers whose tensors are elsewhere.

    Raises:
        UnsupportedError: if an adapter wraps layers, or weights of quantized ones are offloaded.
    """
    _check_unwrapped(model)
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if checksums is None and layer.weight.device.type == "meta":
            raise UnsupportedError(f"the weight of layer '{name}' is offloaded; take it back (pipe.remove_all_hooks()) before saving")
    kept = [name for name, part in model.named_modules() if isinstance(part, tuple(LAYERS)) and not isinstance(part, QuantLayer)]
    checksums = {name: tile_checksum(layer) if checksums is None else checksums[name] for name, layer in layers.items()}
    sums = {name: layer_sum(layer) if sums is None else sums[name] for name, layer in layers.items()}
    layouts = {name: layer.layout for name, layer in layers.items()}
    reuse = stored_reuse(model)
    asked, plugins = asked_attention(model), needed(layouts.values(), reuse)
    facts = (asked, reuse, sums, plugins, scaled_logits(model), resolution_of(model))
    return Stored(layouts, checksums, tuple(kept), _clock_slots(model), recipe, digest, __version__, *facts)


def _attention(data: Mapping[str, Any]) -> AttentionPlan | None:
    """What the key ``attention`` of a checkpoint says."""
    try:
        return None if data.get("attention") is None else AttentionPlan.from_json(data["attention"])
    except RecipeError as error:
        raise CheckpointError(f"quantization_config: {error}; written by a newer version?") from None


def _check_unwrapped(model: nn.Module) -> None:
    """Adapters rename the tensors of float layers, too."""
    for name, _ in model.named_modules():
        if name.endswith(".base_layer"):
            raise UnsupportedError(
                f"layer '{name.removesuffix('.base_layer')}' is wrapped by an adapter; unload the adapters (pipe.unload_lora_weights()) "
                "before saving"
            )


def adopt(model: nn.Module, recipe: Any = None) -> None:
    """Describe a model that was quantized in memory in its own config, so that stock diffusers can save it, and must not cast it.

    Args:
        model: a model of diffusers or transformers with quantized layers; calling this again renews the description.
        recipe: the :class:`~reelquant.recipes.recipe.Recipe` that was followed; None keeps what the model says about itself.

    Raises:
        UnsupportedError: if adapters wrap layers, or the model is of neither library.
    """
    if not (hasattr(model, "save_pretrained") and hasattr(model, "config")):
        raise UnsupportedError(
            f"{type(model).__name__} is not a model of diffusers or transformers: it has no config to describe its layers in"
        )
    before = getattr(model.config, "quantization_config", None) or {}
    before = before if isinstance(before, dict) else before.to_dict()
    mapping, digest = before.get("recipe", {}), before.get("recipe_digest", "")
    if recipe is not None:
        mapping, digest = recipe.model_dump(mode="json", exclude_unset=True), recipe.digest()
    mark_quantized(model, describe(model, mapping, digest).to_json())


def _clock_slots(model: nn.Module) -> Slots | None:
    clock = getattr(model, NAME, None)
    if not isinstance(clock, Clock):
        return None
    times, guidance, layers = tuple(clock.timesteps.tolist()), (clock.pairs, clock.latent), quantized_layers(model)
    apart = [group._replace(layers=tuple(name for name in group.layers if name in layers)) for group in clock.apart]
    return Slots(times, clock.argument, clock.protected_slots, clock.inputs, *guidance, clock.widths, tuple(apart))


def _check_keys(data: Mapping[str, Any]) -> None:
    for key, kind in REQUIRED.items():
        if key not in data:
            raise CheckpointError(f"quantization_config lacks '{key}' (it has: {', '.join(sorted(data))}); save the model again")
        _check_kind(key, data[key], kind)
        if key == "format_version" and data[key] != FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has format_version {data[key]}, this reelquant reads {FORMAT_VERSION}: upgrade reelquant"
            )
    for key, kind in OPTIONAL.items():
        if data.get(key) is not None:
            _check_kind(key, data[key], kind)
    if any(type(count) is not int or count < 1 for count in (data.get("logits") or {}).values()):
        raise CheckpointError(f"quantization_config.logits holds numbers of tokens, got {data['logits']!r:.60}; save the model again")
    if unknown := sorted(str(key) for key in data.keys() - KNOWN):
        written = data.get("tool_version")
        what = f"quantization_config has the settings {', '.join(unknown)[:200]}, which reelquant {__version__} does not know"
        if written == __version__:
            raise CheckpointError(f"{what}, and which says that it was written by this version: it is damaged; download or save it again")
        remark(f"{what}; they are kept, and change nothing (written by reelquant {written!s:.40})")


def _check_kind(key: str, value: Any, kind: type) -> None:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not isinstance(value, kind) or (key in TEXTS and not all(isinstance(one, str) for one in inner)):
        raise CheckpointError(f"quantization_config.{key} must be a {kind.__name__}, got {value!r:.60}")


WIDTH = 1 << 20
"""Of a layer that stands for all of a group while its layout is read: blocks of channels of any width divide it."""


def _layouts(groups: Mapping[str, Any]) -> dict[str, LayerLayout]:
    found: dict[str, LayerLayout] = {}
    for group, content in groups.items():
        try:
            layout = LayerLayout.from_json({key: value for key, value in content.items() if key != "targets"})
            names = [str(name) for name in content["targets"]]
            buffer_shapes((1, WIDTH), layout, WIDTH)  # reads every word of the layout
        except RecipeError as error:  # a name that no table has
            raise CheckpointError(f"quantization_config.config_groups.{group} cannot be read: {error}; {IMPORT_FIRST}") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"quantization_config.config_groups.{group} is damaged: {type(error).__name__}: {error}") from None
        if twice := sorted(set(names) & set(found)):
            raise CheckpointError(f"quantization_config.config_groups.{group} names layer '{twice[0]}' a second time")
        found |= dict.fromkeys(names, layout)
    return found


def _widths(data: Mapping[str, Any], steps: int) -> tuple[Widths, ...]:
    given = {name: data[key] for name, key in BITS.items() if key in data}
    for name, bits in given.items():
        if len(bits) != steps or any(type(one) is not int or (one != OWN and not FEWEST <= one <= MOST) for one in bits):
            raise ValueError(f"{BITS[name]} {bits!r:.60}")
    return tuple(Widths(**dict(zip(given, numbers, strict=True))) for numbers in zip(*given.values(), strict=True))


def _slots(data: Any, runtime: Mapping[str, Any]) -> Slots | None:
    """The slots; where they protect no step, those are protected that a policy of other programs names."""
    if data is None:
        return None
    try:
        times = tuple(float(time) for time in data["timesteps"])
        asked = protected_slots(runtime, len(times)) if POLICY in runtime and not data.get("protected") else ()
        found = Slots(
            times,
            str(data["argument"]),
            tuple(int(slot) for slot in data.get("protected", asked)),
            data.get("protected_inputs", "float"),
            data.get("pairs"),
            data.get("latent"),
            _widths(data, len(times)),
            tuple(Apart(tuple(map(str, one["layers"])), _widths(one, len(times))) for one in data.get("groups", ())),
        )
        if found.inputs not in get_args(Inputs) or any(slot not in range(len(found.timesteps)) for slot in found.protected):
            raise ValueError(f"protected {list(found.protected)}, {found.inputs!r}")
        if found.pairs not in (None, *get_args(Pairs)):
            raise ValueError(f"pairs {found.pairs!r}")
        return found
    except RecipeError as error:
        raise CheckpointError(f"quantization_config.{RUNTIME}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"quantization_config.slots is damaged: {type(error).__name__}: {error}") from None
