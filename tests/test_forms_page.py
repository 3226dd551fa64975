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
    new = forms.Row(
        "conv9", "8->8 3x1", 512, 2, 100, {"cp": [0.25, None], "shared_factor": [0.5, 0.1]}
    )
    forms.write("crepe-tiny", forms.section("crepe-tiny", [*first, new]))
    found = {row.layer: row for row in forms.finished("crepe-tiny", log, 2)}
    assert list(found) == [row.layer for row in first] + ["conv9"]
    assert found["conv9"].errors["cp"] == [pytest.approx(0.25, abs=1e-5), None]
    assert forms.finished("crepe-tiny", log, 1) == []


def test_all_digits_of_the_log_go_before_those_of_the_page(forms, tmp_path):
    row = forms.on_page("crepe-tiny")[0]
    log = tmp_path / "crepe-tiny.jsonl"
    row.errors["cp"] = [0.123456789, None]
    log.write_text(forms.json.dumps(forms.asdict(row)) + "\n")
    found = {r.layer: r for r in forms.finished("crepe-tiny", log, 2)}
    assert found[row.layer].errors["cp"][0] == 0.123456789


@pytest.fixture
def measured(forms, tmp_path, monkeypatch):
    """Runs the script on the demo with 8 samples, without measuring; gives the layers asked for."""
    monkeypatch.setattr(forms, "ROOT", tmp_path)
    demo = next(network for network in forms.NETWORKS if network.name == "demo")
    mod = forms.normalise(forms.load_model(demo.model))
    layers = forms.collect_layers(mod)
    monkeypatch.setattr(forms, "load_model", lambda path: mod)
    monkeypatch.setattr(forms, "normalise", lambda loaded: loaded)
    monkeypatch.setattr(forms, "collect_layers", lambda normalised: layers)

    def run(*options, stop=None, code=0):
        asked = []
        iterations = forms.POLISH_ITERATIONS

        def rows(mod, layers, taken, fit, held_out, refined):
            for layer in taken:
                asked.append(layer.name)
                if len(asked) == stop:
                    raise KeyboardInterrupt
                errors = {"cp": [0.2, 0.1]}
                shape = str(layer.geometry)
                yield forms.Row(layer.name, shape, len(fit), refined, iterations, errors)

        monkeypatch.setattr(forms, "rows", rows)
        monkeypatch.setattr(sys, "argv", ["forms.py", "demo", "--samples", "8", *options])
        if stop:
            with pytest.raises(KeyboardInterrupt):
                forms.main()
        else:
            assert forms.main() == code
        return asked

    return run


def test_an_interrupted_run_goes_on_with_what_is_missing(forms, measured, monkeypatch):
    before = {row.layer: row for row in forms.on_page("demo")}
    first = measured(stop=4)
    # The others stand as they were, each with the number of its samples.
    between = {row.layer: row for row in forms.on_page("demo")}
    assert {row.samples for row in before.values()} == {512}
    assert [name for name, row in between.items() if row.samples == 8] == sorted(first[:3])
    assert all(between[name] == before[name] for name in before if name not in first[:3])
    again = measured()
    assert again[0] == first[3]
    assert sorted(first[:3] + again) == sorted(before)
    assert {row.samples for row in forms.on_page("demo")} == {8}
    assert measured() == []
    monkeypatch.setattr(forms, "POLISH_ITERATIONS", 900)
    assert sorted(measured()) == sorted(before)
    assert {row.iterations for row in forms.on_page("demo")} == {900}


def test_chosen_layers_are_measured_in_the_order_given(forms, measured, capsys):
    assert measured("--layers", "conv5", "conv1") == ["conv5", "conv1"]
    assert measured("--layers", "conv5", "conv2") == ["conv2"]
    assert measured("--layers", "conv5", "conv2", "--fresh") == ["conv5", "conv2"]
    new = [row.layer for row in forms.on_page("demo") if row.samples == 8]
    assert new == ["conv1", "conv2", "conv5"]
    assert measured("--layers", "conv99", code=2) == []
    assert "demo has no layer conv99" in capsys.readouterr().out
