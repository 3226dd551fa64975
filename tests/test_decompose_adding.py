"""The example of docs/adding-a-form.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from forms_support import conv, run_chain

from tvm_lowrank.geometry import ConvGeometry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding-a-form.md"


def test_example_follows_the_contract():
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {}
    exec(source, names)
    form = names["RowMean"]()
    geometry = ConvGeometry(4, 6, 9, 8, (3, 5), (2, 1), (1, 2, 1, 2), dilation=(1, 1))
    random = np.random.default_rng(0)
    inputs = random.normal(size=(2, 4, 9, 8))
    weight = random.normal(size=geometry.weight_shape)
    (rank,) = form.ranks(geometry, 8)
    factors = form.fitter(weight, geometry).fit(rank)
    whole = form.reconstruct(factors)
    assert np.linalg.norm(whole - weight) > 0.1
    value = run_chain(inputs, form.stages(geometry, rank), factors)
    np.testing.assert_allclose(value, conv(inputs, whole, geometry), atol=1e-9)
    equal_rows = np.repeat(weight[:, :, :1], 3, axis=2)
    exact = form.reconstruct(form.fitter(equal_rows, geometry).fit(1))
    np.testing.assert_allclose(exact, equal_rows, atol=1e-12)
    assert form.multiplications(geometry, 1) < geometry.multiplications
    assert "one row" in form.refuse(ConvGeometry(4, 6, 9, 8, (1, 5)))
    assert "depthwise" in form.refuse(ConvGeometry(4, 4, 9, 8, (3, 5), groups=4))
