"""Bad input: one table of (call, exception, the whole message), and junk for every argument."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flax_dwconv import DepthwiseConv2D, depthwise_conv2d

KEY = jax.random.key(0)
X = np.ones((2, 6, 5, 3), np.float32)
K = np.ones((3, 3, 3, 1), np.float32)


def conv(x=X, kernel=K, **options):
    return depthwise_conv2d(x, kernel, **options)


def layer(kernel_size=3, **options):
    return DepthwiseConv2D(kernel_size, **options)


def init(x=X, **options):
    return layer(**options).init(KEY, x)


def apply(other, x=X, **options):
    return layer(**options).apply(init(x, **options), other)


def penalties(**options):
    return layer(**options).apply(init(**options), X, mutable=["losses"])


def shape(*sizes, **options):
    return layer(**options).compute_output_shape(sizes)


def config(**entries):
    return DepthwiseConv2D.from_config({"kernel_size": 3} | entries)


def zeros(*sizes):
    return np.zeros(sizes, np.float32)


ERRORS = [
    # The pure function: arrays
    (
        lambda: conv([[1.0]]),
        TypeError,
        "`x` must be an array, got list.",
    ),
    (
        lambda: conv(kernel=3.0),
        TypeError,
        "`kernel` must be an array, got float.",
    ),
    (
        lambda: conv(None),
        TypeError,
        "`x` must be an array, got NoneType.",
    ),
    (
        lambda: conv("image"),
        TypeError,
        "`x` must be an array, got str.",
    ),
    (
        lambda: conv(zeros(6, 5)),
        ValueError,
        "`x` must have shape (*batch, h, w, c), got (6, 5).",
    ),
    (
        lambda: conv(zeros(6, 5), data_format="channels_first"),
        ValueError,
        "`x` must have shape (*batch, c, h, w), got (6, 5).",
    ),
    (
        lambda: conv(kernel=zeros(3, 3, 3)),
        ValueError,
        "`kernel` must have shape (kh, kw, c, m), got (3, 3, 3).",
    ),
    (
        lambda: conv(kernel=zeros(3, 3, 4, 1)),
        ValueError,
        "`x` and `kernel` must have the same number of channels, got (2, 6, 5, 3) with "
        "the channels on axis -1 and a `kernel` of shape (3, 3, 4, 1) with the "
        "channels on its last axis but one.",
    ),
    (
        lambda: conv(zeros(2, 3, 6, 5)),
        ValueError,
        "`x` and `kernel` must have the same number of channels, got (2, 3, 6, 5) with "
        "the channels on axis -1 and a `kernel` of shape (3, 3, 3, 1) with the "
        "channels on its last axis but one.",
    ),
    (
        lambda: conv(data_format="channels_first"),
        ValueError,
        "`x` and `kernel` must have the same number of channels, got (2, 6, 5, 3) with "
        "the channels on axis -3 and a `kernel` of shape (3, 3, 3, 1) with the "
        "channels on its last axis but one.",
    ),
    (
        lambda: conv(X.astype(np.float16)),
        TypeError,
        "`x` and `kernel` must have the same dtype, got float16 and float32.",
    ),
    (
        lambda: conv(X.astype(np.int32)),
        TypeError,
        "`x` and `kernel` must have the same dtype, got int32 and float32.",
    ),
    (
        lambda: conv(zeros(2, 2, 5, 3)),
        ValueError,
        "Computed output size would be zero or negative. The kernel does not fit into the"
        " input: got an input of shape (2, 2, 5, 3) with `kernel_size`=(3, 3), "
        "`strides`=(1, 1), `padding`='valid', `dilation_rate`=(1, 1).",
    ),
    (
        lambda: conv(dilation_rate=3),
        ValueError,
        "Computed output size would be zero or negative. The kernel does not fit into the"
        " input: got an input of shape (2, 6, 5, 3) with `kernel_size`=(3, 3), "
        "`strides`=(1, 1), `padding`='valid', `dilation_rate`=(3, 3).",
    ),
    (
        lambda: conv(padding=((-2, -2), (0, 0))),
        ValueError,
        "Computed output size would be zero or negative. The kernel does not fit into the"
        " input: got an input of shape (2, 6, 5, 3) with `kernel_size`=(3, 3), "
        "`strides`=(1, 1), `padding`=((-2, -2), (0, 0)), `dilation_rate`=(1, 1).",
    ),
    (
        lambda: conv(zeros(3, 3, 2), zeros(4, 1, 3, 1), data_format="channels_first"),
        ValueError,
        "Computed output size would be zero or negative. The kernel does not fit into the"
        " input: got an input of shape (3, 3, 2) with `kernel_size`=(4, 1), `strides`=(1,"
        " 1), `padding`='valid', `dilation_rate`=(1, 1).",
    ),
    (
        lambda: conv(zeros(2, 0, 5, 3)),
        ValueError,
        "Computed output size would be zero or negative. The kernel does not fit into the"
        " input: got an input of shape (2, 0, 5, 3) with `kernel_size`=(3, 3), "
        "`strides`=(1, 1), `padding`='valid', `dilation_rate`=(1, 1).",
    ),
    (
        lambda: conv(kernel=zeros(0, 3, 3, 1)),
        ValueError,
        "`kernel_size` must be a tuple of 2 integers > 0, got (0, 3).",
    ),
    # The pure function: options
    (
        lambda: conv(strides=0),
        ValueError,
        "`strides` must be a tuple of 2 integers > 0, got 0.",
    ),
    (
        lambda: conv(strides=-1),
        ValueError,
        "`strides` must be a tuple of 2 integers > 0, got -1.",
    ),
    (
        lambda: conv(strides=(1, 0)),
        ValueError,
        "`strides` must be a tuple of 2 integers > 0, got (1, 0).",
    ),
    (
        lambda: conv(strides=(1, 2, 3)),
        ValueError,
        "`strides` must be a tuple of 2 integers, or one integer, got (1, 2, 3).",
    ),
    (
        lambda: conv(strides=(1,)),
        ValueError,
        "`strides` must be a tuple of 2 integers, or one integer, got (1,).",
    ),
    (
        lambda: conv(strides=1.0),
        TypeError,
        "`strides` must be a tuple of 2 integers, or one integer, got 1.0.",
    ),
    (
        lambda: conv(strides=(1, 2.0)),
        TypeError,
        "`strides` must be a tuple of 2 integers, or one integer, got (1, 2.0).",
    ),
    (
        lambda: conv(strides=True),
        TypeError,
        "`strides` must be a tuple of 2 integers, or one integer, got True.",
    ),
    (
        lambda: conv(strides="2"),
        TypeError,
        "`strides` must be a tuple of 2 integers, or one integer, got '2'.",
    ),
    (
        lambda: conv(strides="22"),
        TypeError,
        "`strides` must be a tuple of 2 integers, or one integer, got '22'.",
    ),
    (
        lambda: conv(strides=None),
        TypeError,
        "`strides` must be a tuple of 2 integers, or one integer, got None.",
    ),
    (
        lambda: conv(strides={1: 2}),
        TypeError,
        "`strides` must be a tuple of 2 integers, or one integer, got {1: 2}.",
    ),
    (
        lambda: conv(dilation_rate=0),
        ValueError,
        "`dilation_rate` must be a tuple of 2 integers > 0, got 0.",
    ),
    (
        lambda: conv(dilation_rate=(2, -2)),
        ValueError,
        "`dilation_rate` must be a tuple of 2 integers > 0, got (2, -2).",
    ),
    (
        lambda: conv(dilation_rate=[1, 1, 1]),
        ValueError,
        "`dilation_rate` must be a tuple of 2 integers, or one integer, got [1, 1, 1].",
    ),
    (
        lambda: conv(dilation_rate=1.5),
        TypeError,
        "`dilation_rate` must be a tuple of 2 integers, or one integer, got 1.5.",
    ),
    (
        lambda: conv(padding="causal"),
        ValueError,
        "Causal padding is only supported for `DepthwiseConv1D` and `SeparableConv1D`: `padding` "
        "must be 'valid' or 'same', got 'causal'.",
    ),
    (
        lambda: conv(padding="full"),
        ValueError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got 'full'.",
    ),
    (
        lambda: conv(padding="reflect"),
        ValueError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got 'reflect'.",
    ),
    (
        lambda: conv(padding=-1),
        ValueError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, right)), got -1.",
    ),
    (
        lambda: conv(padding=1.5),
        TypeError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got 1.5.",
    ),
    (
        lambda: conv(padding=None),
        TypeError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got None.",
    ),
    (
        lambda: conv(padding=True),
        TypeError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got True.",
    ),
    (
        lambda: conv(padding=(1, -1)),
        ValueError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got (1, -1).",
    ),
    (
        lambda: conv(padding=(1, 1, 1)),
        ValueError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got (1, 1, 1).",
    ),
    (
        lambda: conv(padding=((1, 1), (1,))),
        ValueError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got ((1, 1), (1,)).",
    ),
    (
        lambda: conv(padding=((1, 1), (1, 1), (0, 0))),
        ValueError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got ((1, 1), (1, 1), (0, 0)).",
    ),
    (
        lambda: conv(padding=((1, 1), (1, 0.5))),
        TypeError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got ((1, 1), (1, 0.5)).",
    ),
    (
        lambda: conv(padding=("same", "valid")),
        TypeError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got ('same', 'valid').",
    ),
    (
        lambda: conv(preferred_element_type="garbage"),
        ValueError,
        "`preferred_element_type` must be a dtype or None, got 'garbage'.",
    ),
    (
        lambda: conv(preferred_element_type=3),
        TypeError,
        "`preferred_element_type` must be a dtype or None, got 3.",
    ),
    (
        lambda: conv(X > 0, K > 0),
        TypeError,
        "`x` must be floating, complex or integer, got bool.",
    ),
    (
        lambda: conv(data_format="NHWC"),
        ValueError,
        "`data_format` must be one of 'channels_first', 'channels_last', got 'NHWC'.",
    ),
    (
        lambda: conv(data_format=None),
        TypeError,
        "`data_format` must be one of 'channels_first', 'channels_last', got None.",
    ),
    (
        lambda: conv(data_format=1),
        TypeError,
        "`data_format` must be one of 'channels_first', 'channels_last', got 1.",
    ),
    (
        lambda: conv(method="fast"),
        ValueError,
        "`method` must be 'auto', 'lax' or 'taps', got 'fast'.",
    ),
    (
        lambda: conv(method=None),
        TypeError,
        "`method` must be 'auto', 'lax' or 'taps', got None.",
    ),
    (
        lambda: conv(method=["lax"]),
        TypeError,
        "`method` must be 'auto', 'lax' or 'taps', got ['lax'].",
    ),
    # The layer's constructor: geometry
    (
        lambda: layer(0),
        ValueError,
        "`kernel_size` must be a tuple of 2 integers > 0, got 0.",
    ),
    (
        lambda: layer(-3),
        ValueError,
        "`kernel_size` must be a tuple of 2 integers > 0, got -3.",
    ),
    (
        lambda: layer((3, 0)),
        ValueError,
        "`kernel_size` must be a tuple of 2 integers > 0, got (3, 0).",
    ),
    (
        lambda: layer((3, 3, 3)),
        ValueError,
        "`kernel_size` must be a tuple of 2 integers, or one integer, got (3, 3, 3).",
    ),
    (
        lambda: layer(3.0),
        TypeError,
        "`kernel_size` must be a tuple of 2 integers, or one integer, got 3.0.",
    ),
    (
        lambda: layer((3.0, 3.0)),
        TypeError,
        "`kernel_size` must be a tuple of 2 integers, or one integer, got (3.0, 3.0).",
    ),
    (
        lambda: layer("33"),
        TypeError,
        "`kernel_size` must be a tuple of 2 integers, or one integer, got '33'.",
    ),
    (
        lambda: layer(True),
        TypeError,
        "`kernel_size` must be a tuple of 2 integers, or one integer, got True.",
    ),
    (
        lambda: layer(None),
        TypeError,
        "`kernel_size` must be a tuple of 2 integers, or one integer, got None.",
    ),
    (
        lambda: layer(strides=0),
        ValueError,
        "`strides` must be a tuple of 2 integers > 0, got 0.",
    ),
    (
        lambda: layer(strides=(2, 2, 2)),
        ValueError,
        "`strides` must be a tuple of 2 integers, or one integer, got (2, 2, 2).",
    ),
    (
        lambda: layer(padding="causal"),
        ValueError,
        "Causal padding is only supported for `DepthwiseConv1D` and `SeparableConv1D`: `padding` "
        "must be 'valid' or 'same', got 'causal'.",
    ),
    (
        lambda: layer(padding="CAUSAL"),
        ValueError,
        "Causal padding is only supported for `DepthwiseConv1D` and `SeparableConv1D`: `padding` "
        "must be 'valid' or 'same', got 'CAUSAL'.",
    ),
    (
        lambda: layer(padding="full"),
        ValueError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got 'full'.",
    ),
    (
        lambda: layer(depth_multiplier=0),
        ValueError,
        "`depth_multiplier` must be an integer > 0, got 0.",
    ),
    (
        lambda: layer(depth_multiplier=-1),
        ValueError,
        "`depth_multiplier` must be an integer > 0, got -1.",
    ),
    (
        lambda: layer(depth_multiplier=1.5),
        TypeError,
        "`depth_multiplier` must be an integer > 0, got 1.5.",
    ),
    (
        lambda: layer(depth_multiplier=None),
        TypeError,
        "`depth_multiplier` must be an integer > 0, got None.",
    ),
    (
        lambda: layer(depth_multiplier=True),
        TypeError,
        "`depth_multiplier` must be an integer > 0, got True.",
    ),
    (
        lambda: layer(data_format="nhwc"),
        ValueError,
        "`data_format` must be one of 'channels_first', 'channels_last', got 'nhwc'.",
    ),
    (
        lambda: layer(dilation_rate=0),
        ValueError,
        "`dilation_rate` must be a tuple of 2 integers > 0, got 0.",
    ),
    (
        lambda: layer(dilation_rate=(1, 2, 3)),
        ValueError,
        "`dilation_rate` must be a tuple of 2 integers, or one integer, got (1, 2, 3).",
    ),
    (
        lambda: layer(strides=2, dilation_rate=2),
        ValueError,
        "`strides > 1` not supported in conjunction with `dilation_rate > 1`, got "
        "`strides`=(2, 2) and `dilation_rate`=(2, 2). `depthwise_conv2d` computes it.",
    ),
    (
        lambda: layer(strides=(2, 1), dilation_rate=(1, 2)),
        ValueError,
        "`strides > 1` not supported in conjunction with `dilation_rate > 1`, got "
        "`strides`=(2, 1) and `dilation_rate`=(1, 2). `depthwise_conv2d` computes it.",
    ),
    # The layer's constructor: the rest
    (
        lambda: layer(use_bias=None),
        TypeError,
        "`use_bias` must be a bool, got None.",
    ),
    (
        lambda: layer(use_bias=1),
        TypeError,
        "`use_bias` must be a bool, got 1.",
    ),
    (
        lambda: layer(use_bias="yes"),
        TypeError,
        "`use_bias` must be a bool, got 'yes'.",
    ),
    (
        lambda: layer(activation="rellu"),
        ValueError,
        "Could not interpret `activation` identifier: got 'rellu', did you mean 'relu'?",
    ),
    (
        lambda: layer(activation="qqqq"),
        ValueError,
        "Could not interpret `activation` identifier: got 'qqqq'.",
    ),
    (
        lambda: layer(activation=3),
        TypeError,
        "Could not interpret `activation` identifier: it must be a name, a config dict or"
        " a callable, got 3.",
    ),
    (
        lambda: layer(activation="threshold"),
        ValueError,
        "`activation` 'threshold' needs a config dict with 'threshold' and 'default_value'.",
    ),
    (
        lambda: layer(activation={"class_name": "ReLU", "config": {"slope": 1}}),
        ValueError,
        "`activation` 'ReLU' has no argument 'slope', did you mean 'negative_slope'?",
    ),
    (
        lambda: layer(depthwise_initializer="glorot"),
        ValueError,
        "Could not interpret `depthwise_initializer` identifier: got 'glorot', did you mean "
        "'glorot_uniform'?",
    ),
    (
        lambda: layer(depthwise_initializer=1.0),
        TypeError,
        "Could not interpret `depthwise_initializer` identifier: it must be a name, a config dict "
        "or a callable, got 1.0, did you mean `Constant(1.0)`?",
    ),
    (
        lambda: layer(depthwise_initializer={"config": {}}),
        ValueError,
        "Could not interpret `depthwise_initializer` identifier: a config dict needs a "
        "'class_name', got {'config': {}}.",
    ),
    (
        lambda: layer(bias_initializer="zeroes"),
        ValueError,
        "Could not interpret `bias_initializer` identifier: got 'zeroes', did you mean 'zeros'?",
    ),
    (
        lambda: layer(bias_initializer={"class_name": "Constant", "config": {"value": "x"}}),
        TypeError,
        "`bias_initializer`: `value` must be a finite number, got 'x'.",
    ),
    (
        lambda: layer(depthwise_regularizer="l3"),
        ValueError,
        "Could not interpret `depthwise_regularizer` identifier: got 'l3', did you mean 'l2'?",
    ),
    (
        lambda: layer(depthwise_regularizer=0.01),
        TypeError,
        "Could not interpret `depthwise_regularizer` identifier: it must be a name, a config dict "
        "or a callable, got 0.01, did you mean `L2(0.01)`?",
    ),
    (
        lambda: layer(depthwise_regularizer={"class_name": "L2", "config": {"l2": -1.0}}),
        ValueError,
        "`depthwise_regularizer`: `l2` must be a finite non-negative number, got -1.0.",
    ),
    (
        lambda: layer(depthwise_regularizer={"class_name": "L2", "config": {"l1": 1.0}}),
        ValueError,
        "`depthwise_regularizer` 'L2' has no argument 'l1', did you mean 'l2'?",
    ),
    (
        lambda: layer(bias_regularizer="L3"),
        ValueError,
        "Could not interpret `bias_regularizer` identifier: got 'L3', did you mean 'L2'?",
    ),
    (
        lambda: layer(activity_regularizer=["l1"]),
        TypeError,
        "Could not interpret `activity_regularizer` identifier: it must be a name, a config dict "
        "or a callable, got ['l1'].",
    ),
    (
        lambda: layer(depthwise_constraint="maxnorms"),
        ValueError,
        "Could not interpret `depthwise_constraint` identifier: got 'maxnorms', did you mean "
        "'maxnorm'?",
    ),
    (
        lambda: layer(depthwise_constraint={"class_name": "MaxNorm", "config": {"axis": 0.5}}),
        TypeError,
        "`depthwise_constraint`: `axis` must be an int or a tuple of different ints, got 0.5.",
    ),
    (
        lambda: layer(bias_constraint=2),
        TypeError,
        "Could not interpret `bias_constraint` identifier: it must be a name, a config dict or"
        " a callable, got 2, did you mean `MaxNorm(2.0)`?",
    ),
    (
        lambda: layer(dtype="float99"),
        ValueError,
        "`dtype` must be a floating dtype, got 'float99'.",
    ),
    (
        lambda: layer(dtype="int32"),
        ValueError,
        "`dtype` must be a floating dtype, got 'int32'.",
    ),
    (
        lambda: layer(dtype="complex64"),
        ValueError,
        "`dtype` must be a floating dtype, got 'complex64'.",
    ),
    (
        lambda: layer(dtype=3),
        TypeError,
        "`dtype` must be a floating dtype, got 3.",
    ),
    (
        lambda: layer(param_dtype=None),
        TypeError,
        "`param_dtype` must be a floating dtype, got None.",
    ),
    (
        lambda: layer(param_dtype="int8"),
        ValueError,
        "`param_dtype` must be a floating dtype, got 'int8'.",
    ),
    (
        lambda: layer(param_dtype="half-float"),
        ValueError,
        "`param_dtype` must be a floating dtype, got 'half-float'.",
    ),
    (
        lambda: layer(precision=7),
        TypeError,
        "`precision` must be a `jax.lax.Precision`, its name, a pair of them, or None, got 7.",
    ),
    (
        lambda: layer(precision=("high",)),
        ValueError,
        "`precision` must be a `jax.lax.Precision`, its name, a pair of them, or None, "
        "got ('high',).",
    ),
    (
        lambda: layer(precision=("high", "high", "high")),
        ValueError,
        "`precision` must be a `jax.lax.Precision`, its name, a pair of them, or None, "
        "got ('high', 'high', 'high').",
    ),
    (
        lambda: layer(method="fast"),
        ValueError,
        "`method` must be 'auto', 'lax' or 'taps', got 'fast'.",
    ),
    (
        lambda: layer(method=None),
        TypeError,
        "`method` must be 'auto', 'lax' or 'taps', got None.",
    ),
    # init and apply
    (
        lambda: init(zeros(6, 5, 3)),
        ValueError,
        "Inputs to `DepthwiseConv2D` should have rank 4, got the shape (6, 5, 3).",
    ),
    (
        lambda: init(zeros(1, 2, 6, 5, 3)),
        ValueError,
        "Inputs to `DepthwiseConv2D` should have rank 4, got the shape (1, 2, 6, 5, 3).",
    ),
    (
        lambda: init(3.0),
        TypeError,
        "`x` must be an array, got float.",
    ),
    (
        lambda: init([[1.0]]),
        TypeError,
        "`x` must be an array, got list.",
    ),
    (
        lambda: init(None),
        TypeError,
        "`x` must be an array, got NoneType.",
    ),
    (
        lambda: init(zeros(1, 6, 5, 0)),
        ValueError,
        "`channels` must be an integer > 0, got 0.",
    ),
    (
        lambda: init(zeros(1, 2, 5, 3)),
        ValueError,
        "Computed output size would be zero or negative. The kernel does not fit into the"
        " input: got an input of shape (1, 2, 5, 3) with `kernel_size`=(3, 3), "
        "`strides`=(1, 1), `padding`='valid', `dilation_rate`=(1, 1).",
    ),
    (
        lambda: init(zeros(1, 3, 6, 2), data_format="channels_first"),
        ValueError,
        "Computed output size would be zero or negative. The kernel does not fit into the"
        " input: got an input of shape (1, 3, 6, 2) with `kernel_size`=(3, 3), "
        "`strides`=(1, 1), `padding`='valid', `dilation_rate`=(1, 1).",
    ),
    (
        lambda: apply(zeros(2, 6, 5, 4)),
        ValueError,
        "The layer has a kernel for 3 channels: expected axis -1 of the input shape to "
        "have value 3, got the shape (2, 6, 5, 4).",
    ),
    (
        lambda: apply(zeros(6, 5, 3)),
        ValueError,
        "Inputs to `DepthwiseConv2D` should have rank 4, got the shape (6, 5, 3).",
    ),
    (
        lambda: apply(zeros(2, 4, 6, 5), zeros(2, 3, 6, 5), data_format="channels_first"),
        ValueError,
        "The layer has a kernel for 3 channels: expected axis -3 of the input shape to "
        "have value 3, got the shape (2, 4, 6, 5).",
    ),
    (
        lambda: apply(zeros(2, 2, 5, 3)),
        ValueError,
        "Computed output size would be zero or negative. The kernel does not fit into the"
        " input: got an input of shape (2, 2, 5, 3) with `kernel_size`=(3, 3), "
        "`strides`=(1, 1), `padding`='valid', `dilation_rate`=(1, 1).",
    ),
    (
        lambda: apply("image"),
        TypeError,
        "`x` must be an array, got str.",
    ),
    (
        lambda: penalties(depthwise_regularizer="orthogonal_regularizer"),
        ValueError,
        "Inputs to OrthogonalRegularizer must have rank 2, got an array of shape (3, 3, 3, 1).",
    ),
    (
        lambda: penalties(depthwise_regularizer=lambda w: w),
        ValueError,
        "`depthwise_regularizer` must return a scalar, got an array of shape (3, 3, 3, 1).",
    ),
    (
        lambda: penalties(activity_regularizer=lambda y: y[0]),
        ValueError,
        "`activity_regularizer` must return a scalar, got an array of shape (4, 3, 3).",
    ),
    (
        lambda: init(depthwise_initializer=np.ones((3, 3))),
        ValueError,
        "`depthwise_initializer` must be an array of the parameter's shape (3, 3, 3, 1), "
        "got an array of shape (3, 3).",
    ),
    (
        lambda: init(bias_initializer="identity"),
        ValueError,
        "`Identity` must initialize a matrix, got the shape (3,).",
    ),
    (
        lambda: shape(1, 9, 8),
        ValueError,
        "Inputs to `DepthwiseConv2D` should have rank 4, got the shape (1, 9, 8).",
    ),
    (
        lambda: shape(1, 9, 8, None),
        ValueError,
        "The channel dimension of the inputs to `DepthwiseConv2D` should be defined, got "
        "the shape (1, 9, 8, None), where axis -1 is the channel dimension.",
    ),
    (
        lambda: shape(None, None, 8, 3, data_format="channels_first"),
        ValueError,
        "The channel dimension of the inputs to `DepthwiseConv2D` should be defined, got "
        "the shape (None, None, 8, 3), where axis -3 is the channel dimension.",
    ),
    (
        lambda: shape(1, 9, 8, 0),
        ValueError,
        "`channels` must be an integer > 0, got 0.",
    ),
    (
        lambda: shape(1, 2, 8, 3),
        ValueError,
        "Computed output size would be zero or negative. The kernel does not fit into the"
        " input: got an input of shape (1, 2, 8, 3) with `kernel_size`=(3, 3), "
        "`strides`=(1, 1), `padding`='valid', `dilation_rate`=(1, 1).",
    ),
    (
        lambda: shape(1, 9, 8, "3"),
        TypeError,
        "`input_shape` must hold integers >= 0 or None, got (1, 9, 8, '3').",
    ),
    (
        lambda: layer().compute_output_shape(3),
        TypeError,
        "`input_shape` must be a tuple, got 3.",
    ),
    (
        lambda: layer().compute_output_shape("1983"),
        TypeError,
        "`input_shape` must be a tuple, got '1983'.",
    ),
    (
        lambda: shape(1, 9, 8, 3, activation="glu"),
        ValueError,
        "`activation` must fit the output, of shape (1, 7, 6, 3), got 'glu': axis size must be "
        "divisible by 2.",
    ),
    (
        lambda: shape(1, 9.0, 8, 3),
        TypeError,
        "`input_shape` must hold integers >= 0 or None, got (1, 9.0, 8, 3).",
    ),
    (
        lambda: layer().compute_output_shape((1, "9", 8, 3)),
        TypeError,
        "`input_shape` must hold integers >= 0 or None, got (1, '9', 8, 3).",
    ),
    (
        lambda: layer().compute_output_shape((1, -9, 8, 3)),
        ValueError,
        "`input_shape` must hold integers >= 0 or None, got (1, -9, 8, 3).",
    ),
    (
        lambda: layer(activation=abs, name="dw").get_config(),
        ValueError,
        "`activation` must have a Keras name to be serialized, got <built-in function abs>.",
    ),
    # from_config
    (
        lambda: DepthwiseConv2D.from_config(None),
        TypeError,
        "`config` must be a dict, got NoneType.",
    ),
    (
        lambda: DepthwiseConv2D.from_config([("kernel_size", 3)]),
        TypeError,
        "`config` must be a dict, got list.",
    ),
    (
        lambda: DepthwiseConv2D.from_config({}),
        ValueError,
        "`config` must have a `kernel_size`, got the keys [].",
    ),
    (
        lambda: DepthwiseConv2D.from_config({"class_name": "Conv2D", "config": {"kernel_size": 3}}),
        ValueError,
        "`config` must be of Keras's DepthwiseConv2D, got 'Conv2D'.",
    ),
    (
        lambda: DepthwiseConv2D.from_config({"class_name": "DepthwiseConv2D", "config": None}),
        TypeError,
        "`config` must be a dict, got NoneType.",
    ),
    (
        lambda: config(filters=3),
        ValueError,
        "`config` has unknown keys, got ['filters'].",
    ),
    (
        lambda: config(kernel_regularizer="l2", rate=2),
        ValueError,
        "`config` has unknown keys, got ['kernel_regularizer', 'rate'].",
    ),
    (
        lambda: config(kernel_size=0),
        ValueError,
        "`kernel_size` must be a tuple of 2 integers > 0, got 0.",
    ),
    (
        lambda: config(padding="full"),
        ValueError,
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, "
        "right)), got 'full'.",
    ),
    (
        lambda: config(strides=[2, 2], dilation_rate=[2, 2]),
        ValueError,
        "`strides > 1` not supported in conjunction with `dilation_rate > 1`, got "
        "`strides`=(2, 2) and `dilation_rate`=(2, 2). `depthwise_conv2d` computes it.",
    ),
    (
        lambda: config(activation="abc"),
        ValueError,
        "Could not interpret `activation` identifier: got 'abc'. "
        "`custom_objects={'abc': ...}` says what it stands for.",
    ),
    (
        lambda: config(depthwise_initializer={"class_name": "Glorot", "config": {}}),
        ValueError,
        "Could not interpret `depthwise_initializer` identifier: got 'Glorot', did you mean "
        "'GlorotUniform'?",
    ),
    (
        lambda: config(depthwise_initializer={"class_name": "STFT", "config": {"side": "real"}}),
        ValueError,
        "Could not interpret `depthwise_initializer` identifier: got 'STFT', which fills a kernel "
        "of shape (time, 1, frequency), as no depthwise layer has.",
    ),
    (
        lambda: config(depthwise_constraint={"class_name": "UnitNorm", "config": {"axes": 0}}),
        ValueError,
        "`depthwise_constraint` 'UnitNorm' has no argument 'axes', did you mean 'axis'?",
    ),
    (
        lambda: config(dtype="float99"),
        ValueError,
        "`dtype` must be a floating dtype, got 'float99'.",
    ),
    (
        lambda: config(dtype={"class_name": "DTypePolicy", "config": {}}),
        ValueError,
        "`dtype` must be a dtype or a policy with a name, got {'class_name': "
        "'DTypePolicy', 'config': {}}.",
    ),
    (
        lambda: config(dtype={"class_name": "DTypePolicy", "config": {"name": "mixed_int8"}}),
        ValueError,
        "`dtype` must be a floating dtype, got 'int8'.",
    ),
    (
        lambda: config(dtype="int8"),
        ValueError,
        "`dtype` must be a floating dtype, got 'int8'.",
    ),
    (
        lambda: config(name=3),
        TypeError,
        "`name` must be a string or None, got 3.",
    ),
    (
        lambda: DepthwiseConv2D.from_config({1: 2, "rate": 3}),
        ValueError,
        "`config` has unknown keys, got ['1', 'rate'].",
    ),
    (
        lambda: DepthwiseConv2D.from_config({"padding": "same", "name": "dw"}),
        ValueError,
        "`config` must have a `kernel_size`, got the keys ['name', 'padding'].",
    ),
]


@pytest.mark.parametrize("call, exception, message", ERRORS, ids=range(len(ERRORS)))
def test_error(call, exception, message):
    with pytest.raises(exception) as error:
        call()
    assert type(error.value) is exception
    assert str(error.value) == message


def test_messages_are_sentences_that_show_the_value():
    for _, _, message in ERRORS:
        assert any(
            words in message for words in ["got ", " has no argument ", " needs a config dict "]
        )
        assert message[-1] in ".?"


# Junk: whatever it is, it works or is refused as a value or a type, never otherwise.


class Odd:
    """Neither a number nor a sequence nor callable, with a repr of its own."""

    def __repr__(self):
        return "Odd()"


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=12),
    st.binary(max_size=4),
    st.sampled_from([*"01", "same", "l2", "relu", "float32", "\0", "é", "mixed_", "channels_last"]),
    st.builds(Odd),
    st.builds(object),
    st.sampled_from([Odd, int, dict, type, len, Ellipsis, NotImplemented, np, range(2)]),
    st.sampled_from(
        [np.int64(3), np.float32(2), np.bool_(True), np.str_("same"), np.datetime64(0, "s")]
    ),
    st.sampled_from(
        [np.zeros(0), np.ones((2, 2)), np.array("x"), np.array([None]), np.dtype("f4")]
    ),
)
CONFIGS = st.fixed_dictionaries(
    {"class_name": st.sampled_from(["L2", "ReLU", "Zeros", "MaxNorm", "DTypePolicy"]) | ATOMS},
    optional={
        "config": st.dictionaries(st.text(max_size=5), ATOMS, max_size=2) | ATOMS,
        "module": ATOMS,
    },
)
JUNK = st.recursive(
    ATOMS | CONFIGS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    ),
    max_leaves=6,
)

LAYER_ARGUMENTS = [
    *["kernel_size", "strides", "padding", "depth_multiplier", "data_format", "dilation_rate"],
    *["activation", "use_bias", "depthwise_initializer", "bias_initializer"],
    *["depthwise_regularizer", "bias_regularizer", "activity_regularizer"],
    *["depthwise_constraint", "bias_constraint", "dtype", "param_dtype", "precision", "method"],
]
FUNCTION_ARGUMENTS = [
    *["x", "kernel", "strides", "padding", "dilation_rate", "data_format", "precision"],
    *["preferred_element_type", "method"],
]

fuzz = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)


def refuses_or_works(call):
    try:
        return call()
    except (ValueError, TypeError) as error:
        assert str(error), "an error must say something"
        return None


@pytest.mark.parametrize("argument", LAYER_ARGUMENTS)
@fuzz
@given(junk=JUNK)
def test_junk_in_the_constructor(argument, junk):
    made = refuses_or_works(lambda: DepthwiseConv2D(**{"kernel_size": 3, argument: junk}))
    if made is not None:
        repr(made)
        assert made == made.clone()


@pytest.mark.filterwarnings("ignore:Read as None:UserWarning")
@pytest.mark.parametrize("argument", [*LAYER_ARGUMENTS, "name", "class_name", "config", "other"])
@fuzz
@given(junk=JUNK)
def test_junk_in_a_config(argument, junk):
    refuses_or_works(lambda: config(**{argument: junk}))


@fuzz
@given(junk=JUNK)
def test_junk_as_a_config(junk):
    refuses_or_works(lambda: DepthwiseConv2D.from_config(junk))


@pytest.mark.parametrize("argument", FUNCTION_ARGUMENTS)
@fuzz
@given(junk=JUNK)
def test_junk_for_the_function(argument, junk):
    """Traced only: a valid choice is compiled elsewhere."""
    arrays = {"x": X, "kernel": K} | ({argument: junk} if argument in ("x", "kernel") else {})
    options = {} if argument in arrays else {argument: junk}
    refuses_or_works(lambda: jax.eval_shape(lambda: depthwise_conv2d(**arrays, **options)))


@fuzz
@given(junk=JUNK)
def test_junk_as_the_input_of_the_layer(junk):
    layer = DepthwiseConv2D(3)
    refuses_or_works(lambda: jax.eval_shape(lambda: layer.init(KEY, junk)))
    refuses_or_works(lambda: layer.compute_output_shape(junk))
