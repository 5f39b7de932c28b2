"""Operations on tensors that the mixers are made of: one folder each, a pure-torch reference in every one.

ops.ssd             Mamba2's scan: one scalar decay a head
ops.selective_scan  Mamba1's scan: one decay a channel and state entry
ops.causal_conv     the short depthwise convolution before either scan
ops.gated_norm      the per-head RMSNorm of a gated output after Mamba2's scan
"""
