"""What the benchmark times: depthwise layers as networks have them, and whole networks."""

import dataclasses
import re

import numpy as np

MODES = {  # of each family of layers
    "images": ("forward", "train"),
    "volumes": ("forward", "train"),
    "sequences": ("forward", "state", "train", "step-1", "step-16", "chunk"),
}
_PIECES = {"step-1": (1, (1,)), "step-16": (16, (1,)), "chunk": (1, (16,))}  # batch, size
# What follows a depthwise convolution in MobileNetV1 and V2, V3, EfficientNet and ConvNeXt.
ACTIVATIONS = ("relu6", "relu", "hard_silu", "silu", "linear")
NETWORK_MODES = ("infer", "train")
NETWORKS = ("MobileNetV2", "EfficientNetB0", "ConvNeXtTiny")  # of keras.applications


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, in float32, channels last: depthwise convolution, bias and activation.

    With the padding "causal", it is the convolution alone, and gives the next state too.
    """

    name: str
    batch: int
    size: tuple[int, ...]  # (l,), (h, w) or (d, h, w)
    channels: int
    kernel: tuple[int, ...]  # as long as `size`
    stride: int | tuple[int, ...]  # of every dimension, or of each
    padding: str = "same"
    activation: str = "relu6"  # one of `ACTIVATIONS`

    @property
    def label(self) -> str:
        """The name and the batch, which are unique together."""
        return f"{self.name}/{self.batch}"

    @property
    def sizes(self) -> str:
        """What the layer looks like, in one line."""
        parts = (*self.size, self.channels), self.kernel, np.atleast_1d(self.stride)
        other = "" if self.activation == "relu6" else f" {self.activation}"
        return "{} k{} s{}".format(*("x".join(map(str, part)) for part in parts)) + other

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the result, for images `(n, ho, wo, c)`."""
        reach = self.kernel if self.padding == "valid" else 1
        size = np.subtract(self.size, reach) // self.stride + 1
        return self.batch, *size.tolist(), self.channels

    def arrays(self, mode: str) -> tuple[np.ndarray, ...]:
        """Returns what the layer is called with, all of normal random numbers.

        Args:
          mode: one of the family's `MODES`.

        Returns:
          x, kernel `(*kernel, c, 1)`, and bias, or of a causal layer the state unless `mode` is
          "forward"; with "train", at last the cotangent of the result.
        """
        (batch, size), c = _PIECES.get(mode, (self.batch, self.size)), self.channels
        shapes = [(batch, *size, c), (*self.kernel, c, 1), (c,)]
        if self.padding == "causal":
            shapes[2:] = [] if mode == "forward" else [(batch, self.kernel[0] - 1, c)]
        shapes += [self.out_shape] if mode == "train" else []
        block = np.random.default_rng(0).standard_normal(65521, np.float32)  # prime: no stripes
        return tuple(np.resize(block, shape) for shape in shapes)


# The depthwise layers of keras.applications, each where it appears first: the size of the images,
# then channels, kernel size and stride of every layer on them. The strided layers of the MobileNets
# and of EfficientNet are a ZeroPadding2D followed by "valid" there, which pads as "same" does.
_LAYERS = """
MobileNetV1 112: 32k3s1 64k3s2, 56: 128k3s1 128k3s2, 28: 256k3s1 256k3s2, 14: 512k3s1 512k3s2
MobileNetV1 7: 1024k3s1
MobileNetV2 112: 96k3s2, 56: 144k3s1 144k3s2, 28: 192k3s1 192k3s2, 14: 384k3s1 576k3s1 576k3s2
MobileNetV2 7: 960k3s1
MobileNetV3 112: 16k3s1 16k3s2, 56: 72k3s1 72k3s2 72k5s2, 28: 88k3s1 96k5s2 120k5s1
MobileNetV3 14: 120k5s1 144k5s1 184k3s1 200k3s1 240k5s1 288k5s2 672k3s1, 7: 576k5s1 960k5s1
EfficientNet 56: 144k5s2, 28: 240k3s2 240k5s1, 14: 480k3s1 480k5s1 672k5s1 672k5s2
EfficientNet 7: 1152k3s1 1152k5s1
Xception 147: 64k3s1 128k3s1, 74: 128k3s1 256k3s1, 37: 256k3s1 728k3s1, 19: 728k3s1
Xception 10: 1024k3s1 1536k3s1
ConvNeXtTiny 56: 96k7s1, 28: 192k7s1, 14: 384k7s1, 7: 768k7s1
"""
_QUICK = """
MobileNetV1-1/1 MobileNetV1-7/1 MobileNetV1-9/32 MobileNetV2-1/1 MobileNetV2-2/8 MobileNetV2-8/32
MobileNetV3-8/1 EfficientNet-1/8 EfficientNet-6/1 Xception-2/1 ConvNeXtTiny-1/1 ConvNeXtTiny-4/32
"""
# Batch, length, channels, taps: short convolutions of recurrent models, and of a Conformer.
_SEQUENCES = [(1, 2048, 1024, 4), (1, 2048, 512, 31), (8, 512, 256, 4), (1, 600, 512, 31)]
_SEQUENCES += [(2, 1024, 768, 3), (4, 256, 1536, 2)]
# Batch, size, channels, window, strides: of networks for videos.
_VOLUMES = [(1, (8, 28, 28), 64, (3, 3, 3), 1), (2, (16, 14, 14), 96, (3, 3, 3), 1)]
_VOLUMES += [(1, (8, 56, 56), 24, window, 1) for window in ((1, 3, 3), (3, 1, 1))]
_VOLUMES += [(1, (8, 56, 56), 24, (3, 3, 3), (1, 2, 2))]


def layers(quick: bool = False, family: str = "images") -> list[Case]:
    """Returns the layers of a family.

    Args:
      quick: of the images, each with a batch of one and a larger one, only twelve.
      family: one of `MODES`.
    """
    if family == "sequences":
        sizes = enumerate(_SEQUENCES, 1)
        return [Case(f"causal-{i}", n, (s,), c, (k,), 1, "causal") for i, (n, s, c, k) in sizes]
    if family == "volumes":
        return [Case(f"volume-{i}", *sizes) for i, sizes in enumerate(_VOLUMES, 1)]
    found, count = [], {}
    for network, images in re.findall(r"(\w+) (.+)", _LAYERS):
        for side, on_them in re.findall(r"(\d+): ([^,]+)", images):
            for layer in on_them.split():
                channels, k, stride = map(int, re.split("[ks]", layer))
                count[network] = count.get(network, 0) + 1
                name, size = f"{network}-{count[network]}", (int(side),) * 2
                for batch in (1, 8 if size[0] > 14 else 32):
                    found.append(Case(name, batch, size, channels, (k, k), stride))
    return [case for case in found if not quick or case.label in _QUICK.split()]


def drawn(seed: int, count: int) -> list[Case]:
    """Returns random layers as networks have them, that nobody could have tuned for.

    Args:
      seed: of the random numbers; the same seed gives the same layers.
      count: how many layers.
    """
    rng, found = np.random.default_rng(seed), []
    follows = np.random.default_rng((seed, 1))
    while len(found) < count:
        side, channels = int(rng.integers(7, 113)), int(rng.integers(24, 961))
        k, stride, batch = (int(rng.choice(few)) for few in ((3, 5, 7, 9), (1, 2), (1, 8, 32)))
        if batch * side**2 * channels <= 2**24 and k <= side:  # the images take 64 MiB at most
            name = f"drawn-{seed}-{len(found) + 1}"
            sizes = batch, (side, side), channels, (k, k), stride
            found.append(Case(name, *sizes, activation=str(follows.choice(ACTIVATIONS))))
    return found
