"""Depthwise convolutions for JAX and Flax: Keras's layers, fast on CPU under every transformation.

- The convolution as a function: `depthwise_conv`, `depthwise_conv1d`, `depthwise_conv2d`,
  `depthwise_conv3d`; of causal sequences, piece by piece: `causal_conv1d`.
- The layers, for `flax.linen` here and for `flax.nnx` in `flax_dwconv.nnx`: `DepthwiseConv1D`,
  `DepthwiseConv2D`, `DepthwiseConv3D`, `SeparableConv1D`, `SeparableConv2D`.
- Models that know nothing of this package, made fast on CPU: `accelerate`.
- Training: `total_loss` sums the penalties of regularizers; `constrain` and `collect_constraints`
  apply weight constraints in an optax chain; `depthwise_kernels` makes masks for weight decay.
- What Keras's words mean: `initializers`, `activations`, `regularizers`, `constraints`, each with
  `get` and `serialize`.
- Trained weights: `keras_io` reads and writes Keras's layers, configs and files; `weights`
  converts those of PyTorch, Flax, Haiku and Equinox; `fold_batch_norm` makes layer and batch
  normalization one layer.
- Programs: `python -m flax_dwconv` is a demo, `python -m flax_dwconv.benchmark` the benchmark.
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
