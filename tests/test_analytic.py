"""The roofline's prices of the algorithms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.geometry import ConvGeometry

MACHINE = Roofline(gflops=220.0, gigabytes=40.0)
BOTH = {"direct": 1.0, "winograd": 1.0}


def layer(channels, size, kernel=(3, 3), stride=1):
    padding = tuple(k // 2 for k in kernel) * 2
    return ConvGeometry(channels, channels, size, size, kernel, (stride, stride), padding)


def gain(geometry):
    direct = MACHINE.microseconds([geometry], 16)
    return direct / MACHINE.microseconds([geometry], 16, BOTH)


@pytest.mark.parametrize(
    ("geometry", "low", "high"),
    [
        # Measured: 3.4, 3.2 and 2.8 for maps of 56, 28 and 14; 1.2 at most for cold weights at 7.
        (layer(64, 56), 3.0, 4.0),
        (layer(128, 28), 2.8, 4.0),
        (layer(256, 14), 2.4, 3.6),
        (layer(512, 7), 1.0, 1.8),
        # Along one axis the products fall to a half at most, for F(4, 3).
        (layer(64, 56, (3, 1)), 1.3, 2.3),
        (layer(64, 56, stride=2), 1.0, 1.0),
        (layer(64, 56, (1, 1)), 1.0, 1.0),
    ],
)
def test_winograd_is_priced_as_it_was_measured(geometry, low, high):
    assert low <= gain(geometry) <= high


def test_what_is_measured_slower_is_priced_slower():
    geometry = layer(64, 56)
    both = MACHINE.microseconds([geometry], 16, BOTH)
    assert MACHINE.microseconds([geometry], 16, BOTH | {"winograd": 2.0}) == pytest.approx(2 * both)
    slow = BOTH | {"winograd": 99.0}
    assert MACHINE.microseconds([geometry], 16, slow) == MACHINE.microseconds([geometry], 16)


def test_stages_add_up_and_lanes_count_whole():
    first, second = layer(64, 28), layer(64, 28, (1, 1))
    assert MACHINE.microseconds([first, second], 16, BOTH) == pytest.approx(
        MACHINE.microseconds([first], 16, BOTH) + MACHINE.microseconds([second], 16, BOTH)
    )
    narrow = replace(first, out_channels=17)
    assert MACHINE.microseconds([narrow], 16) == pytest.approx(
        MACHINE.microseconds([replace(first, out_channels=32)], 16), rel=0.02
    )
