"""Operators that TensorRT does not import: what the parser of TensorRT-RTX 1.7 says to each ONNX operator."""

from __future__ import annotations

QOPERATORS = frozenset(
    "QLinearConv QLinearMatMul QGemm QLinearAdd QLinearMul QLinearSub QLinearConcat QLinearAveragePool "
    "QLinearGlobalAveragePool QLinearLeakyRelu QLinearSigmoid QLinearSoftmax QLinearReduceMean QLinearWhere QAttention "
    "MatMulIntegerToFloat QOrderedMatMul QOrderedGelu QOrderedLayerNormalization QOrderedAttention".split()
)
"""Operators that compute on integers and carry scales as operands."""

DYNAMIC = frozenset(
    "DynamicQuantizeLinear MatMulInteger ConvInteger DynamicQuantizeMatMul DynamicQuantizeLSTM MatMulInteger16".split()
)
"""Operators of quantization at run time."""

UNSUPPORTED = frozenset(
    "AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress "
    "ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger "
    "MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement "
    "OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty "
    "SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat "
    "StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique".split()
)
"""Operators of ONNX's own domain that the parser says it does not know."""

NO_PLUGIN = frozenset("NonZero NonMaxSuppression RoiAlign".split())
"""Operators that the parser knows and for which it then finds no kernel or plugin."""

CONTRIB = frozenset(
    "Attention DequantizeLinear QuantizeLinear Gelu GroupQueryAttention MatMulNBits MultiHeadAttention RotaryEmbedding "
    "SimplifiedLayerNormalization SkipSimplifiedLayerNormalization LayerNormalization".split()
)
"""Operators of the domain com.microsoft that the parser knows."""
