"""A small CIFAR-10 classifier in ONNX, with images to calibrate and to test it."""

from pathlib import Path

import numpy as np

__all__ = ["CLASSES", "MEAN", "STD", "calibration", "evaluation", "model_path", "preprocess"]

#: Class names in the order of the labels and logits.
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

#: Mean and standard deviation per channel (RGB) of the training images scaled to 0..1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """Path of the ONNX model.

    Its input ``input`` is float32 of shape (N, 3, 32, 32), as `preprocess` makes it; its
    output ``logits`` is float32 of shape (N, 10). N is free.
    """
    return _HERE / "model.onnx"


def preprocess(images: np.ndarray) -> np.ndarray:
    """Turn RGB images into what the model takes: ``(RGB / 255 - MEAN) / STD``.

    Parameters
    ----------
    images : numpy.ndarray
        uint8, shape (N, 32, 32, 3), channels in the order red, green, blue.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, 3, 32, 32), C-contiguous.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"expected uint8 images of shape (N, H, W, 3), got {images.dtype} {images.shape}"
        )
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    scaled = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def calibration() -> tuple[np.ndarray, np.ndarray]:
    """512 training images, for choosing ranks; the model was trained on them too.

    Returns
    -------
    inputs : numpy.ndarray
        float32, shape (512, 3, 32, 32), preprocessed.
    labels : numpy.ndarray
        int64, shape (512,), values 0 to 9.
    """
    return _load("calibration.npz")


def evaluation() -> tuple[np.ndarray, np.ndarray]:
    """The first 1,000 images of the CIFAR-10 test set, never trained on.

    Returns
    -------
    inputs : numpy.ndarray
        float32, shape (1000, 3, 32, 32), preprocessed.
    labels : numpy.ndarray
        int64, shape (1000,), values 0 to 9.
    """
    return _load("test.npz")


def _load(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(_HERE / name) as data:
        return preprocess(data["images"]), data["labels"].astype(np.int64)
