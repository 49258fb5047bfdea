"""A schedule of sizes in a sampling loop like that of a pipeline, with schedulers of diffusers and a denoiser that is always right."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from reelquant._errors import CalibrationError, RecipeError, UnsupportedError
from reelquant.models.following import Following
from reelquant.models.noise import PREDICTIONS, Level, check_scheduler
from reelquant.models.rescale import low_band, resized
from reelquant.models.resolution import check_pipeline
from reelquant.policies import ChangeResolution

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS: dict[str, tuple[str, dict[str, Any], str]] = {  # name -> class, config, what the denoiser gives
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {}, "flow_prediction"),
    "flow euler, shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "flow_prediction"),
    "flow unipc": ("UniPCMultistepScheduler", FLOW, "flow_prediction"),
    "unipc": ("UniPCMultistepScheduler", {}, "epsilon"),
    "dpm++": ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
    "ddim": ("DDIMScheduler", {"clip_sample": False}, "epsilon"),
    "ddim, velocity": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}, "v_prediction"),
    "euler": ("EulerDiscreteScheduler", {}, "epsilon"),
    "euler, velocity": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
}
DOWN_AND_UP = ChangeResolution(({"share": 0.3}, {"share": 0.4, "scale": 0.5}, {"share": 0.3}))
TWICE = ChangeResolution(({"share": 0.6}, {"share": 0.4, "scale": 2.0, "restart": 0.5, "guide": 0.5}))


def scheduler_of(name: str) -> Any:
    kind, config, _ = SCHEDULERS[name]
    return getattr(diffusers, kind)(**config)


def noise(seeds: list[int], size: int = 16) -> Tensor:
    return torch.stack([torch.randn(4, 2, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def clean_like(x: Tensor) -> Tensor:
    """The clip that the denoiser always sees: a number for every channel, in any size."""
    return torch.tensor([0.5, -1.0, 0.25, 2.0]).view(1, 4, 1, 1, 1).expand_as(x)


def level_of(scheduler: Any, number: int, timestep: Tensor) -> Level:
    """Of the latents that enter a step, by the textbook and not by asking."""
    if hasattr(scheduler, "scale_noise") or scheduler.config.get("use_flow_sigmas"):
        return Level(1 - float(timestep) / 1000, float(timestep) / 1000)
    if hasattr(scheduler, "init_noise_sigma") and "Euler" in type(scheduler).__name__:
        return Level(1.0, float(scheduler.sigmas[number]))
    product = float(scheduler.alphas_cumprod[int(timestep)])
    return Level(product**0.5, (1 - product) ** 0.5)


def run(scheduler: Any, prediction: str, seeds: list[int], steps: int = 10) -> tuple[list[Tensor], list[Level], Tensor]:
    """The loop of a pipeline: latents that entered every step, their levels, and the final ones."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = noise(seeds) * (scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else 1)
    entered, levels = [], []
    for number, timestep in enumerate(timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        level = level_of(scheduler, number, timestep)
        output = PREDICTIONS[prediction].output(clean_like(x), x, level)
        entered.append(x)
        levels.append(level)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return entered, levels, x


def followed(name: str, schedule: ChangeResolution, seeds: list[int], steps: int = 10) -> tuple[list[Tensor], list[Level], Tensor]:
    scheduler = scheduler_of(name)
    one = Following(scheduler, schedule, grain=1)
    one.install()
    try:
        return run(scheduler, SCHEDULERS[name][2], seeds, steps)
    finally:
        one.remove()
        assert not {"step", "set_timesteps"} & set(vars(scheduler))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' UniPC
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("schedule", [DOWN_AND_UP, TWICE], ids=["down and up", "twice"])
def test_latents_enter_every_step_with_the_noise_of_that_step(name: str, schedule: ChangeResolution) -> None:
    entered, levels, final = followed(name, schedule, [1, 2])
    sizes = [16] * 3 + [8] * 4 + [16] * 3 if schedule is DOWN_AND_UP else [16] * 6 + [32] * 4
    assert [x.shape[-1] for x in entered] == sizes
    for x, level in zip(entered, levels, strict=True):
        drawn = (x - level.alpha * clean_like(x)) / level.sigma
        assert 0.85 < float(drawn.std()) < 1.15  # at least 1024 numbers: ten standard errors are 0.22
    torch.testing.assert_close(final, clean_like(final), rtol=0, atol=2e-2)  # the smallest sigma of some schedulers is above 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' DPM++
@pytest.mark.parametrize("name", ["flow euler", "flow unipc", "dpm++", "ddim"])
def test_one_size_changes_nothing_bit_for_bit(name: str) -> None:
    same = ChangeResolution(({"share": 0.5}, {"share": 0.5, "scale": 1.0}))
    plain = run(scheduler_of(name), SCHEDULERS[name][2], [3])
    found = followed(name, same, [3])
    assert all(torch.equal(a, b) for a, b in zip([*plain[0], plain[2]], [*found[0], found[2]], strict=True))


def test_a_clip_does_not_depend_on_those_beside_it() -> None:
    together = followed("flow euler", DOWN_AND_UP, [5, 6])[0]
    alone = followed("flow euler", DOWN_AND_UP, [6])[0]
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-5)
    assert not torch.equal(together[3][0], together[3][1])


def test_a_multistep_solver_forgets_latents_of_another_size() -> None:
    scheduler = scheduler_of("flow unipc")
    one = Following(scheduler, DOWN_AND_UP, grain=1)
    one.install()
    orders = []
    step = scheduler.step

    def heard(*args: Any, **kwargs: Any) -> Any:
        made = step(*args, **kwargs)
        orders.append(scheduler.this_order)
        return made

    vars(scheduler)["step"] = heard
    run(scheduler, "flow_prediction", [1])
    assert [orders[first] for first in (0, 3, 7)] == [1, 1, 1] and max(orders) == 2


def test_guidance_keeps_the_low_frequencies_of_the_smaller_clip() -> None:
    """A denoiser that sees zeros as soon as the clip is large: while it is guided, the estimate has the clip that the low stage left."""
    scheduler = scheduler_of("flow euler")
    one = Following(scheduler, TWICE, grain=1)
    one.install()
    scheduler.set_timesteps(10)
    x, kept = noise([1]), []
    for timestep in scheduler.timesteps:
        level = Level(1 - float(timestep) / 1000, float(timestep) / 1000)
        clean = clean_like(x) if x.shape[-1] == 16 else torch.zeros_like(x)
        before, output = x, (x - clean) / level.sigma
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
        kept.append((before, x, level))
    (first, second, level), (_, last, _) = kept[6], kept[-1]
    after = Level(1 - float(scheduler.timesteps[7]) / 1000, float(scheduler.timesteps[7]) / 1000)
    velocity = (second - first) / (after.sigma - level.sigma)
    torch.testing.assert_close(low_band(first - level.sigma * velocity), clean_like(first), rtol=0, atol=1e-4)
    torch.testing.assert_close(last, torch.zeros_like(last), rtol=0, atol=1e-4)  # the guided half of the stage is over


@pytest.mark.parametrize(("details", "hold"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, 0.25), (0.5, 1.0)])
def test_details_and_what_is_held_come_back_with_their_size(details: float, hold: float) -> None:
    """A denoiser that sees a board of zeros and twos, and a grey of three in half the size: back come both."""
    stages = ({"share": 0.3}, {"share": 0.4, "scale": 0.5}, {"share": 0.3, "details": details, "hold": hold})
    scheduler = scheduler_of("flow euler")
    one = Following(scheduler, ChangeResolution(stages), grain=1)
    one.install()
    scheduler.set_timesteps(10)
    x = noise([1])
    board = (torch.arange(16).view(16, 1) + torch.arange(16)).remainder(2).mul(2.0).expand_as(x)
    for number, timestep in enumerate(scheduler.timesteps[:7]):
        assert x.shape[-1] == (16 if number < 3 else 8)
        clean = board if number < 3 else torch.full_like(x, 3.0)
        x = scheduler.step((x - clean) / (float(timestep) / 1000), timestep, x, return_dict=False)[0]
    assert one.left is not None
    torch.testing.assert_close(one.left, 3.0 + details * (board - 1.0) + hold * (1.0 - 3.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["flow euler", "ddim"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_noise_that_was_in_the_clip_goes_on(name: str, share: float) -> None:
    """A denoiser that always sees the same clip: at full size the noise stays what it was, half of the size has its averages."""
    stages = ({"share": 0.3}, {"share": 0.4, "scale": 0.5, "noise": share}, {"share": 0.3, "noise": share})
    entered, levels, _ = followed(name, ChangeResolution(stages), [1, 2])
    drawn = [(x - level.alpha * clean_like(x)) / level.sigma for x, level in zip(entered, levels, strict=True)]
    averages = drawn[0].unflatten(-1, (8, 2)).unflatten(-3, (8, 2)).mean((-1, -3))
    for found, kept in ((drawn[3], averages / averages.std((1, 2, 3, 4), keepdim=True)), (drawn[7], drawn[0])):
        alike = float((found * kept).mean() / kept.square().mean())
        assert alike == pytest.approx(share**0.5, abs=0.15)  # new noise is like any other by 1 / sqrt(1024), at most
        assert found.std().item() == pytest.approx(1, abs=0.1)
    if share == 1:
        torch.testing.assert_close(drawn[7], drawn[0], rtol=0, atol=2e-3)


def test_noise_of_a_clip_does_not_depend_on_those_beside_it() -> None:
    stages = ({"share": 0.3}, {"share": 0.4, "scale": 0.5, "noise": 1.0}, {"share": 0.3, "noise": 1.0})
    together, alone = (followed("flow euler", ChangeResolution(stages), seeds)[0] for seeds in ([5, 6], [6]))
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-5)


def test_the_low_band_by_hand() -> None:
    clip = torch.tensor([[1.0, 3.0, 0.0, 0.0, 5.0], [5.0, 7.0, 0.0, 4.0, 7.0]])[None, None]
    expected = torch.tensor([[4.0, 4.0, 1.0, 1.0, 6.0], [4.0, 4.0, 1.0, 1.0, 6.0]])
    assert torch.equal(low_band(clip)[0, 0], expected)
    assert torch.equal(low_band(low_band(clip)), low_band(clip))


def test_clips_shrink_by_areas_and_stay_what_they_are_in_their_own_size() -> None:
    clip = torch.arange(16.0).reshape(1, 1, 1, 4, 4)
    assert resized(clip, (2, 2), "bicubic").flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resized(clip, (4, 4), "bicubic") is clip and resized(clip, (8, 8), "bicubic").shape == (1, 1, 1, 8, 8)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_outputs_and_estimates_of_a_prediction_are_inverse(name: str) -> None:
    clean, noisy, level = torch.randn(2, 3), torch.randn(2, 3), Level(0.6, 1.7)
    there = PREDICTIONS[name].output(clean, noisy, level)
    torch.testing.assert_close(PREDICTIONS[name].clean(there, noisy, level), clean)


def test_shifted_levels_by_hand() -> None:
    scheduler = scheduler_of("flow euler")
    one = Following(scheduler, ChangeResolution(({"share": 0.5}, {"share": 0.5, "scale": 0.5, "shift": 3.0})), grain=1)
    one.install()
    scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    # from 0.5 on: 0.5 f(1), 0.5 f(0.5) with f(u) = 3 u / (1 + 2 u)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 750.0, 500.0, 375.0]))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.75, 0.5, 0.375, 0.0]))


def test_levels_that_are_no_timesteps_cannot_be_shifted() -> None:
    one = Following(scheduler_of("ddim"), ChangeResolution(({"share": 0.5}, {"share": 0.5, "shift": 2.0})), grain=1)
    with pytest.raises(UnsupportedError, match="drop 'shift'"):
        one.set_timesteps(10)


def test_sizes_are_multiples_of_the_grain() -> None:
    one = Following(scheduler_of("flow euler"), DOWN_AND_UP, grain=2)
    one.size = (90, 52)
    assert [one._target(stage) for stage in DOWN_AND_UP.sizes] == [(90, 52), (44, 26), (90, 52)]


@pytest.mark.parametrize(("steps", "counts"), [(20, [6, 8, 6]), (10, [3, 4, 3]), (4, [1, 2, 1]), (3, [1, 1, 1])])
def test_every_stage_has_steps(steps: int, counts: list[int]) -> None:
    assert DOWN_AND_UP.counts(steps) == counts
    assert DOWN_AND_UP.fewer(steps) == pytest.approx(steps / (counts[0] + counts[1] / 4 + counts[2]))


def test_more_stages_than_steps_are_refused() -> None:
    with pytest.raises(CalibrationError, match="3 stages needs as many steps, and the pipeline takes 2"):
        DOWN_AND_UP.counts(2)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"share": 0.5}, {"share": 0.4}], "add up to 1, got 0.9"),
        ([{"share": 0.5, "scale": 0.5}, {"share": 0.5}], "first stage"),
        ([{"share": 0.5, "details": 0.5}, {"share": 0.5}], "first stage"),
        ([{"share": 0.5}, {"share": 0.5, "scale": 9}], "'scale' of a stage"),
        ([{"share": 0.5}, {"share": 0.5, "details": 2}], "'details' of a stage"),
        ([{"share": 0.5}, {"share": 0.5, "hold": -1}], "'hold' of a stage"),
        ([{"share": 0.5}, {"share": 0.5, "noise": 1.5}], "'noise' of a stage"),
        ([{"share": 0.5, "noise": 0.5}, {"share": 0.5}], "first stage"),
        ([{"share": 0.5}, {"share": 0.5, "size": 2}], "has no 'size'"),
        ([{"scale": 1.0}], "mapping like"),
        ([], "add up to 1"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(stages: list[dict[str, float]], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ChangeResolution(tuple(stages))


def test_packed_latents_are_refused() -> None:
    one = Following(scheduler_of("flow euler"), DOWN_AND_UP, grain=1)
    one.set_timesteps(10)
    with pytest.raises(UnsupportedError, match=r"\[1, 64, 8\].*tokens are packed"):
        one.step(torch.zeros(1, 64, 8), torch.tensor(1000.0), torch.zeros(1, 64, 8))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("FlowMatchHeunDiscreteScheduler", "2 calls a step"),
        ("EDMEulerScheduler", "no estimate of the clean clip"),
        ("CogVideoXDPMScheduler", "old_pred_original_sample"),
    ],
)
def test_schedulers_whose_steps_cannot_be_told_apart_are_refused(kind: str, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        check_scheduler(getattr(diffusers, kind)())


def test_what_cannot_add_noise_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="not all of step, set_timesteps and add_noise"):
        check_scheduler(SimpleNamespace(step=None, set_timesteps=None))


def test_schedulers_that_repeat_timesteps_are_refused() -> None:
    one = Following(diffusers.PNDMScheduler(), DOWN_AND_UP, grain=1)
    with pytest.raises(UnsupportedError, match="repeats a timestep"):
        one.set_timesteps(10)


def test_pipelines_with_pictures_as_conditions_are_refused() -> None:
    class Pipe(SimpleNamespace):
        def __call__(self, prompt: str, image: Any) -> None: ...

    with pytest.raises(UnsupportedError, match="Pipe takes 'image'"):
        check_pipeline(Pipe(scheduler=scheduler_of("ddim")))


def test_pipelines_see_what_the_scheduler_takes() -> None:
    scheduler = scheduler_of("ddim")
    Following(scheduler, DOWN_AND_UP, grain=1).install()
    assert "eta" in inspect.signature(scheduler.step).parameters
    assert "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters
