"""Keras's `DepthwiseConv2D` for JAX and Flax."""

from flax_dwconv import activations as activations
from flax_dwconv import constraints as constraints
from flax_dwconv import initializers as initializers
from flax_dwconv import keras_io as keras_io
from flax_dwconv import nnx as nnx
from flax_dwconv import regularizers as regularizers
from flax_dwconv import torch_io as torch_io
from flax_dwconv._lowering import accelerate as accelerate
from flax_dwconv._layer import total_loss as total_loss
from flax_dwconv._optim import collect_constraints as collect_constraints
from flax_dwconv._optim import constrain as constrain
from flax_dwconv.functional import depthwise_conv2d as depthwise_conv2d
from flax_dwconv.linen import DepthwiseConv2D as DepthwiseConv2D
