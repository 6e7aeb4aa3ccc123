"""Depthwise convolutions for JAX and Flax: Keras's layers, fast on CPU under every transformation.

To begin with, one layer of `flax.linen` and one of `flax.nnx`:

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import flax_dwconv
    >>> x = jnp.ones((8, 32, 32, 16))  # images, height, width, channels
    >>> layer = flax_dwconv.DepthwiseConv2D(3, padding="same", activation="relu")
    >>> y, variables = layer.init_with_output(jax.random.key(0), x)
    >>> layer = flax_dwconv.nnx.DepthwiseConv2D(16, 3, padding="same", rngs=nnx.Rngs(0))
    >>> layer(x).shape
    (8, 32, 32, 16)

What there is, by task; `help(flax_dwconv.accelerate)`, for instance, explains one name:

- A layer in a model: `DepthwiseConv1D`, `DepthwiseConv2D`, `DepthwiseConv3D`, `SeparableConv1D`,
  `SeparableConv2D`, for `flax.linen` here and for `flax.nnx` in `flax_dwconv.nnx`.
- A convolution without a layer: `depthwise_conv`, `depthwise_conv1d`, `depthwise_conv2d`,
  `depthwise_conv3d`; of causal sequences, piece by piece: `causal_conv1d`.
- A model that does not use this package, made fast on CPU as it is: `accelerate`.
- Training: `total_loss` sums the penalties of regularizers; `constrain` and `collect_constraints`
  apply weight constraints in an optax chain; `depthwise_kernels` makes masks for weight decay.
- What a layer's arguments accept, by Keras's names or as objects: `initializers`, `activations`,
  `regularizers`, `constraints`.
- Trained weights: `keras_io` reads and writes Keras's layers, configs and files; `weights`
  converts those of PyTorch, Flax, Haiku and Equinox; `fold_batch_norm` makes one layer of a layer
  and the batch normalization after it.
- Programs: `python -m flax_dwconv` is a demo, `python -m flax_dwconv.benchmark` the benchmark;
  both take `--help`.

README.md, beside this package in its source tree, is the introduction, with what is slower and what
the package does not do. `.github/API.md` there has the docstrings of all public names on one page.
"""

from flax_dwconv import activations as activations
from flax_dwconv import constraints as constraints
from flax_dwconv import initializers as initializers
from flax_dwconv import keras_io as keras_io
from flax_dwconv import nnx as nnx
from flax_dwconv import regularizers as regularizers
from flax_dwconv import torch_io as torch_io
from flax_dwconv import weights as weights
from flax_dwconv._losses import total_loss as total_loss
from flax_dwconv._lowering import accelerate as accelerate
from flax_dwconv._optim import collect_constraints as collect_constraints
from flax_dwconv._optim import constrain as constrain
from flax_dwconv._optim import depthwise_kernels as depthwise_kernels
from flax_dwconv.functional import causal_conv1d as causal_conv1d
from flax_dwconv.functional import depthwise_conv as depthwise_conv
from flax_dwconv.functional import depthwise_conv1d as depthwise_conv1d
from flax_dwconv.functional import depthwise_conv2d as depthwise_conv2d
from flax_dwconv.functional import depthwise_conv3d as depthwise_conv3d
from flax_dwconv.linen import DepthwiseConv1D as DepthwiseConv1D
from flax_dwconv.linen import DepthwiseConv2D as DepthwiseConv2D
from flax_dwconv.linen import DepthwiseConv3D as DepthwiseConv3D
from flax_dwconv.linen import SeparableConv1D as SeparableConv1D
from flax_dwconv.linen import SeparableConv2D as SeparableConv2D
from flax_dwconv.weights import fold_batch_norm as fold_batch_norm

__version__ = "0.2.0.dev0"

# What `from flax_dwconv import *` brings. The module `nnx` is not in it: it would take the name of
# `flax.nnx`.
__all__ = [
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "DepthwiseConv3D",
    "SeparableConv1D",
    "SeparableConv2D",
    "accelerate",
    "activations",
    "causal_conv1d",
    "collect_constraints",
    "constrain",
    "constraints",
    "depthwise_conv",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_conv3d",
    "depthwise_kernels",
    "fold_batch_norm",
    "initializers",
    "keras_io",
    "regularizers",
    "torch_io",
    "total_loss",
    "weights",
]
