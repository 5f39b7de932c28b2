"""Operations on tensors: one folder each, with a pure-torch reference (the truth) and, where it pays, Triton kernels.

ops.ssd               Mamba2's scan: one scalar decay a head
ops.selective_scan    Mamba1's scan: one decay a channel and state entry
ops.causal_conv       the short depthwise convolution before either scan
ops.ssd_replay        Mamba2 over new tokens that may yet be rejected: one read of the state, no write
ops.selective_replay  the same for Mamba1
ops.conv_replay       the convolution over such tokens
ops.mamba2_step       a plain step of Mamba2, from convolution to gated norm in one
ops.mamba1_step       new tokens of Mamba1, from dt_proj to the gated output in one, whether they stand or not
ops.ring              where each row stands in the rings of recent tokens that these four keep
ops.gated_norm        the per-head RMSNorm of a gated output after Mamba2's scan
ops.add_norm          a sublayer's output added to the stream, and the norm that follows, in one
ops.linear_kl         the loss of a student against a teacher through the output heads, logits never held whole
ops.linear_logprob    log-probabilities of labels through the output head, logits never held whole either
ops.head_chunks       what these two share: products with an output head, a chunk of positions at a time
ops.squared_error     the loss of alignment
ops.swiglu            the gated activation of an MLP
ops.rope              rotary position embedding
ops.decode_attention  attention of one query a row over fixed buffers
ops.draw              drawing tokens from logits
"""
