"""What is compared with the full cache, and the correction for how many comparisons were made."""

import pytest

from analysis.paired import holm


def test_holm_is_worked_by_hand():
    # sorted 0.01 x 3, 0.02 x 2, 0.04 x 1, then running maxima
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_the_correction_of_no_comparison_is_none():
    assert holm([]) == []
