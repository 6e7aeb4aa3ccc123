#!/usr/bin/env bash
# An attribute of an nnx module that once held an array cannot hold a plain object under `nnx.jit`.
#
# Versions: flax 0.12.8 with jax 0.10.2. The same on flax 0.12.12 with jax 0.12.0.1.
#
# One expects: whether an attribute is data or static follows from what it holds. A module whose
# attribute is a string or a function goes through `nnx.jit`.
#
# What happens: it follows from the first value. After an array or a submodule, the attribute stays
# data, also when a string takes its place, and `nnx.jit` fails with "Error interpreting argument",
# far from the line that assigned it. `None` works, and so does `del` before the new value.
#
# For depthwise convolutions: a layer whose bias is replaced by a name or by a function, like an
# activation that a converter puts there, works eagerly and in `nnx.split`, and fails once it is
# compiled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'EOF'
import flax
import jax
import jax.numpy as jnp
from flax import nnx

print(f"jax {jax.__version__}, flax {flax.__version__}")


class Layer(nnx.Module):
    def __init__(self, *values, delete=False):
        for value in values:
            if delete and hasattr(self, "a"):
                del self.a
            self.a = value


def compiles(what, layer):
    try:
        nnx.jit(lambda layer: jnp.ones(3))(layer)
    except TypeError as error:
        message = str(error).split(" to ")[0]
        assert message == "Error interpreting argument", error
        print(f"{what}: TypeError: {message} ...")
        return False
    print(f"{what}: compiles")
    return True


parameter = nnx.Param(jnp.ones(3))
assert compiles("a string", Layer("relu"))
assert not compiles("a parameter, then a string", Layer(parameter, "relu"))
assert not compiles("an array, then a function", Layer(jnp.ones(3), jax.nn.relu))
linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
assert not compiles("a layer, then a function", Layer(linear, jax.nn.relu))
assert compiles("a parameter, then None", Layer(parameter, None))
assert compiles("a parameter, del, then a string", Layer(parameter, "relu", delete=True))
EOF
