"""Losses that say what their value over a window is made of; see common.losses.protocol."""

from common.losses.protocol import kind, whole_batch, window_value

__all__ = ["kind", "whole_batch", "window_value"]
