"""What is around quantized layers in a model: attention, fused activations, feed-forwards in blocks of tokens, tracing. What a single layer
computes does not belong here (:mod:`reelquant.nn.runners`)."""
