"""The page of forms is also its own record: what stands on it is read back, and added to."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def forms(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("forms_page")
    page = tmp_path / "forms.md"
    page.write_text(module.PAGE.read_text())
    monkeypatch.setattr(module, "PAGE", page)
    yield importlib.import_module("forms")
    for name in ("forms", "forms_page"):
        sys.modules.pop(name, None)


@pytest.fixture
def page(forms):
    return sys.modules["forms_page"].PAGE


NAMES = ["resnet20-cifar10", "vgg6-cifar10", "resnet50-imagenet", "crepe-tiny", "demo"]


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_written_as_they_were_read(forms, page, name):
    before = page.read_text()
    rows = forms.on_page(name)
    assert len(rows) > 3
    forms.write(name, forms.section(name, rows))
    assert page.read_text() == before


def test_the_summary_counts_what_stands_on_the_page(forms, page):
    before = page.read_text()
    names = [network.name for network in forms.NETWORKS]
    forms.write("overall", forms.overall([row for name in names for row in forms.on_page(name)]))
    assert page.read_text() == before


def test_a_layer_is_added_to_those_on_the_page(forms, tmp_path):
    first = forms.on_page("crepe-tiny")
    log = tmp_path / "crepe-tiny.jsonl"
    new = forms.Row("conv9", "8->8 3x1", 512, 2, {"cp": [0.25, None], "shared_factor": [0.5, 0.1]})
    forms.write("crepe-tiny", forms.section("crepe-tiny", [*first, new]))
    found = {row.layer: row for row in forms.finished("crepe-tiny", log, 512, 2)}
    assert list(found) == [row.layer for row in first] + ["conv9"]
    assert found["conv9"].errors["cp"] == [pytest.approx(0.25, abs=1e-5), None]
    assert forms.finished("crepe-tiny", log, 96, 2) == []


def test_all_digits_of_the_log_go_before_those_of_the_page(forms, tmp_path):
    row = forms.on_page("crepe-tiny")[0]
    log = tmp_path / "crepe-tiny.jsonl"
    row.errors["cp"] = [0.123456789, None]
    log.write_text(forms.json.dumps(forms.asdict(row)) + "\n")
    found = {r.layer: r for r in forms.finished("crepe-tiny", log, 512, 2)}
    assert found[row.layer].errors["cp"][0] == 0.123456789


def test_an_interrupted_run_goes_on_with_what_is_missing(forms, tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["forms.py", "demo", "--samples", "8", "--refined", "1"])
    asked = []

    def rows(mod, layers, taken, fit, held_out, refined):
        asked.append([layer.name for layer in taken])
        for layer in taken:
            if len(asked) == 1 and layer is taken[3]:
                raise KeyboardInterrupt
            yield forms.Row(layer.name, str(layer.geometry), len(fit), refined, {"cp": [0.2, 0.1]})

    monkeypatch.setattr(forms, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        forms.main()
    assert len(forms.on_page("demo")) == 3
    assert forms.main() == 0
    assert asked[1] == asked[0][3:]
    assert {row.layer for row in forms.on_page("demo")} == set(asked[0])
