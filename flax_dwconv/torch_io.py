"""The name that 0.1.0 had for the converters of `flax_dwconv.weights`; new code imports that."""

from flax_dwconv.weights import from_flax as from_flax
from flax_dwconv.weights import from_torch as from_torch
from flax_dwconv.weights import to_flax as to_flax
from flax_dwconv.weights import to_torch as to_torch
