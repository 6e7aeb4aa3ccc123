"""What the benchmark times: depthwise layers as networks have them, and whole networks."""

import dataclasses
import re

import numpy as np

LAYER_MODES = ("forward", "train")
NETWORK_MODES = ("infer", "train")
NETWORKS = ("MobileNetV2", "EfficientNetB0", "ConvNeXtTiny")  # of keras.applications


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer: depthwise convolution, bias and relu6, in float32, channels last."""

    name: str
    batch: int
    size: tuple[int, ...]  # of the images: (h, w)
    channels: int
    kernel: tuple[int, ...]  # (kh, kw)
    stride: int  # of every dimension
    padding: str = "same"

    @property
    def label(self) -> str:
        """The name and the batch, which are unique together."""
        return f"{self.name}/{self.batch}"

    @property
    def sizes(self) -> str:
        """What the layer looks like, in one line."""
        image, kernel = (*self.size, self.channels), self.kernel
        return f"{'x'.join(map(str, image))} k{'x'.join(map(str, kernel))} s{self.stride}"

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the result, `(n, ho, wo, c)`."""
        reach = self.kernel if self.padding == "valid" else (1,) * len(self.size)
        size = ((s - r) // self.stride + 1 for s, r in zip(self.size, reach, strict=True))
        return self.batch, *size, self.channels

    def arrays(self, flip: bool = False) -> tuple[np.ndarray, ...]:
        """Returns x, kernel `(kh, kw, c, 1)`, bias and cotangent, all of normal random numbers.

        Args:
          flip: mirrors images and kernel, so that "same" pads more at the start than at the end.
        """
        block = np.random.default_rng(0).standard_normal(65521, np.float32)  # prime: no stripes
        x = np.resize(block, (self.batch, *self.size, self.channels))
        kernel = np.resize(block, (*self.kernel, self.channels, 1))
        bias, g = np.resize(block, self.channels), np.resize(block, self.out_shape)
        if flip:
            axes = tuple(range(x.ndim - 1))
            x, kernel, g = np.flip(x, axes[1:]), np.flip(kernel, axes[:-1]), np.flip(g, axes[1:])
        return tuple(np.ascontiguousarray(array) for array in (x, kernel, bias, g))


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


def layers(quick: bool = False) -> list[Case]:
    """Returns the layers, each with a batch of one and a larger one; or twelve of these."""
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
    while len(found) < count:
        side, channels = int(rng.integers(7, 113)), int(rng.integers(24, 961))
        k, stride, batch = (int(rng.choice(few)) for few in ((3, 5, 7, 9), (1, 2), (1, 8, 32)))
        if batch * side**2 * channels <= 2**24 and k <= side:  # the images take 64 MiB at most
            name = f"drawn-{seed}-{len(found) + 1}"
            found.append(Case(name, batch, (side, side), channels, (k, k), stride))
    return found
