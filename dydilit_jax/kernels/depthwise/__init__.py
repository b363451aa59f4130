"""Depthwise convolution on the token grid."""
