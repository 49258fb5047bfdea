import math

import pytest
import torch

from reelquant._errors import MeasurementError
from reelquant.evidence import bootstrap, psnr
from reelquant.evidence.fidelity import ssim


def test_psnr_of_a_known_error() -> None:
    reference = torch.zeros(2, 3, 3, 4, 4)
    test = reference.clone()
    test[0] += 0.1  # mse 0.01: 20 dB
    test[1, 0, 0, 0, 0] = 0.6  # mse 0.36 / 144 = 0.0025
    assert psnr(reference, test).tolist() == pytest.approx([20.0, -10 * math.log10(0.0025)], abs=1e-4)


def test_equal_clips_score_the_ceiling_and_stay_finite() -> None:
    clips = torch.rand(3, 2, 3, 4, 4)
    assert psnr(clips, clips).tolist() == [100.0] * 3


def test_clips_of_different_shapes_are_refused() -> None:
    with pytest.raises(MeasurementError, match=r"\(1, 2, 3, 4, 4\) and \(1, 3, 3, 4, 4\)"):
        psnr(torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 3, 3, 4, 4))


@pytest.mark.parametrize(("height", "width"), [(11, 11), (12, 30), (40, 17)])
def test_ssim_is_that_of_torchmetrics(height: int, width: int) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    reference = torch.nn.functional.avg_pool2d(torch.rand(4, 3, height + 4, width + 4), 5, 1)
    test = (reference + 0.05 * torch.randn(reference.shape)).clamp(0, 1)
    test[0] = reference[0]
    reference[1] = test[1] = 0.3  # flat: variances are zero but for rounding
    found = ssim(reference, test)
    assert found == pytest.approx(float(theirs(test.double(), reference.double(), data_range=1.0)), abs=1e-9)
    assert 0.5 < found < 0.95
    assert ssim(reference, reference) == pytest.approx(1.0, abs=1e-12)


def test_bootstrap_of_equal_values_has_no_width() -> None:
    found = bootstrap([7.0] * 5)
    assert (found.mean, found.low, found.high) == (7.0, 7.0, 7.0)


def test_bootstrap_is_the_normal_interval_of_a_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    found = bootstrap(values)
    error = float(values.std()) / math.sqrt(400)
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-6)
    # 2000 resamples place a 2.5 % quantile to about 5 % of the standard error
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.2 * error)


def test_bootstrap_repeats_itself_and_follows_its_seed() -> None:
    values = torch.arange(10.0)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)


def test_bootstrap_of_nothing_is_refused() -> None:
    with pytest.raises(MeasurementError, match="no clips"):
        bootstrap([])
