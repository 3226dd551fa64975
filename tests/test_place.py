"""Places of times: kernels of large networks are timed as these run them, and priced apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cost_support import Counted, layer
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.isa import AVX512
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank import place
from tvm_lowrank.cost import machine, timing
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.model import AnalyticModel, reading_rate
from tvm_lowrank.cost.rotation import rotation
from tvm_lowrank.cost.sampling import recorded_by_size
from tvm_lowrank.frontend import load_model
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.place import LARGE, SMALL, Place, network_size
from tvm_lowrank.planner import Options, search
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.shipped import condense
from tvm_lowrank.target import host_target, parse_target

WIDE = ConvGeometry(1024, 1024, 7, 7, (3, 3), padding=(1, 1, 1, 1))  # of 36 MiB
NARROW = ConvGeometry(64, 64, 7, 7, (3, 3), padding=(1, 1, 1, 1))


def test_a_network_is_large_from_its_weights_on():
    assert network_size([NARROW] * 100) == network_size([]) == SMALL
    assert network_size([None, NARROW] * 114) == LARGE == network_size([WIDE])


def test_a_place_says_what_it_is():
    assert str(Place("chip", 2)) == "chip, 2 threads"
    assert str(Place("chip", 2, True, LARGE)) == "chip, 2 threads, in large networks, shipped"


def records(path, network=SMALL, name="chip", shipped=()):
    return TuningRecords(path, "avx512", 2, machine=name, network=network, shipped=shipped)


def test_times_of_small_and_large_networks_are_kept_apart(tmp_path):
    path = tmp_path / "records.jsonl"
    records(path).add("w", {"tile": 7}, 10.0)
    large = records(path, LARGE)
    assert large.time("w", {"tile": 7}) is None and large.measured("w") == []
    large.add("w", {"tile": 7}, 40.0)
    large.add("w", {"tile": 8}, 30.0)
    large.add_race("w", [({"tile": 7}, 41.0), ({"tile": 8}, 31.0)])
    sizes = [json.loads(line).get("network") for line in path.read_text().splitlines()]
    assert sizes == [None, LARGE, LARGE, LARGE, LARGE]
    for size, times in ((SMALL, [10.0]), (LARGE, [30.0, 40.0])):
        again = records(path, size)
        assert [us for _, us in again.measured("w")] == times
        assert again.places() == [Place("chip", 2), Place("chip", 2, False, LARGE)]
        assert (again.race("w", [{"tile": 8}, {"tile": 7}]) is None) == (size == SMALL)


def test_schedules_are_taken_from_networks_of_the_same_size_only(tmp_path):
    path, sink = tmp_path / "records.jsonl", tmp_path / "condensed.jsonl"
    records(path).add("w", {"kernel": "direct", "tile": 7}, 10.0)
    records(path, LARGE).add("w", {"kernel": "direct", "tile": 8}, 40.0)
    assert condense(path, sink, keep=1) == 2
    for source in (path, sink):
        for size, tile in ((SMALL, 7), (LARGE, 8)):
            other = records(None, size, "another", [source])
            assert [schedule["tile"] for schedule in other.elsewhere("w")] == [tile]


class Told(Counted):
    """Knows of which networks it was asked kernels."""

    def __init__(self):
        super().__init__()
        self.networks = set()

    def ask(self, request):
        self.networks.add(request["network"])
        return super().ask(request)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_timer_asks_for_kernels_of_networks_of_its_size(size, monkeypatch):
    monkeypatch.setattr(machine, "copy_microseconds", lambda: 10_000.0)
    worker = Told()
    timer = KernelTimer(parse_target("llvm:skylake-avx512"), records(None, size), worker=worker)
    assert timer.roofline().network == (LARGE << 20 if size == LARGE else 0)
    assert timer.chain([NARROW]) > 0 and worker.networks == {size}


def test_weights_of_a_large_network_come_from_where_it_has_its_place():
    readings = ((8 << 20, 100.0), (32 << 20, 60.0), (128 << 20, 20.0))
    small, large = (Roofline(200.0, 20.0, readings, size) for size in (0, LARGE << 20))
    for size in (1 << 16, 32 << 20):
        assert reading_rate(large, size) == pytest.approx(20.0) != reading_rate(small, size)
    assert reading_rate(small, 1 << 16) == pytest.approx(100.0)
    workload = layer(512, 7)
    schedules = [space[0].to_json() for space in spaces(workload, AVX512).values()]
    slow, fast = (AnalyticModel(r, AVX512, 2).predict(workload, schedules) for r in (large, small))
    assert (slow > 1.1 * fast).all()


def test_layers_of_recorded_networks_go_by_their_size(tmp_path):
    files = {"small": [NARROW], "large": [WIDE, NARROW], "batches": [WIDE.with_batch(2)]}
    files["long"] = [WIDE.with_batch(8)]  # takes too long
    for name, layers in files.items():
        for geometry in layers:
            key = ConvWorkload(geometry, 16, ("bias",)).key()
            records(tmp_path / f"{name}.jsonl").add(key, {"kernel": "direct"}, 1.0)
    found = recorded_by_size(sorted(tmp_path.glob("*.jsonl")))
    assert {*found[SMALL]} == {NARROW, WIDE.with_batch(2)} and {*found[LARGE]} == {WIDE, NARROW}


KERNEL = [("data", (1, 4, 4)), ("weights", (1000, 25)), ("bias", (25,)), ("output", (1, 4, 4))]


def addresses(calls, index):
    return [np.from_dlpack(arguments[index]).ctypes.data for (arguments,) in calls]


@pytest.mark.parametrize(("size", "copies"), [(SMALL, 32), (LARGE, 1342)])
def test_calls_take_turns_among_as_much_as_a_network_has(size, copies):
    turns = rotation([KERNEL], size)
    calls = [next(turns) for _ in range(copies + 1)]
    begins = addresses(calls, 1)
    assert begins[-1] == begins[0] and len({*begins}) == copies
    apart = np.diff(sorted({*begins}))
    assert (apart >= 4 * 25_000).all() and (np.array(begins) % 64 == 0).all()
    for index in (0, 2, 3):
        assert len({*addresses(calls, index)}) == 1
    assert all(
        tuple(each.shape) == shape for each, (_, shape) in zip(calls[0][0], KERNEL, strict=True)
    )


def test_what_takes_turns_finds_other_weights_and_the_same_maps():
    maps = {}
    first, second = (next(rotation([KERNEL], LARGE, start, maps)) for start in (0.0, 0.5))
    apart = np.subtract(*(addresses([call], 1)[0] for call in (second, first)))
    assert apart == pytest.approx(LARGE << 19, rel=0.01)
    assert addresses([first], 0) == addresses([second], 0)


def test_the_map_that_a_kernel_writes_is_read_by_the_next():
    after = [("data", (1, 4, 4)), ("weights", (7,)), ("output", (2,))]
    (one, other), (again, _) = (next(rotation([KERNEL, after], SMALL)) for _ in range(2))
    assert np.from_dlpack(one[3]).ctypes.data == np.from_dlpack(other[0]).ctypes.data
    assert np.from_dlpack(one[1]).ctypes.data != np.from_dlpack(other[1]).ctypes.data
    assert again[3].shape == one[3].shape


def test_a_compiled_kernel_reads_the_copy_that_it_is_given():
    target = host_target()
    isa = machine_of(target)
    workload = ConvWorkload(ConvGeometry(32, 32, 8, 8, (1, 1)), isa.block)
    schedule = spaces(workload, isa)["direct"][0].to_json()
    request = {"workload": workload.to_json(), "schedule": schedule}
    request["target"] = json.loads(str(target))
    (kernel,) = timing._compiled(timing._name(request))
    turns, found = rotation([kernel.parameters], LARGE), []
    index = next(i for i, (name, _) in enumerate(kernel.parameters) if name.startswith("weights"))
    for scale in (1.0, 2.0):
        (arguments,) = next(turns)
        np.from_dlpack(arguments[index])[...] = scale
        kernel.call(*arguments)
        found.append(arguments[-1].numpy())
    assert np.abs(found[0]).max() > 0
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # without data, and of noise
def test_a_search_measures_for_the_size_of_its_network(small, tmp_path, monkeypatch):
    mod, path = load_model(small), tmp_path / "records.jsonl"
    options = Options(forms=("dense",), algorithms=("direct",), trials=1)
    monkeypatch.setattr(place, "SMALL", 0)  # every network is large
    search(mod, options=options, records=path)
    sizes = {json.loads(line).get("network") for line in path.read_text().splitlines()}
    assert sizes == {LARGE}
