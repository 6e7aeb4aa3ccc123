"""The benchmark, `python -m flax_dwconv.benchmark`: how fast this package is beside its peers.

A run measures and gives a JSON document (`driver`); a report is made of such a document (`report`).
What is timed is in `cases`, who is timed in `peers`.

Layers are of one family. On images and volumes they are convolution, bias and relu6: "forward" is
the result, "train" the result and its gradients to input, kernel and bias. On sequences they are a
causal convolution and give the state for the next piece too: "forward" begins without a state,
"state" and "train" with one, "step-1" and "step-16" are one position of one sequence and of
sixteen, "chunk" is sixteen positions of one sequence. PyTorch and a hand-written sum of shifts are
their peers.

Networks are those of `keras.applications` with random weights: "infer" is the model, "train" the
loss, its gradients and a step of SGD. On JAX they run plain, inside `accelerate`, and inside
`accelerate` with `pointwise=True`.

`--scan` draws convolutions at random instead, and lists those that are slow or large (`scan`).
"""
