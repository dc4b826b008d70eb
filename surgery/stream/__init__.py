"""Streaming a plan: read ahead, compute on tiles, hand over in the order of the files.

Why so: one thread reads sources in file order and submits tiles; workers compute them, one torch
thread each, since torch's own threads collapse under contention; one thread hashes tensors; the
caller takes finished chunks in order. Bytes in flight are bounded by a budget, so the peak does not grow with the
tensor, the shard or the model, and tiles are the same whatever the budget, so the bytes are too.
"""

from surgery.stream.handover import Chunk, TensorHashes
from surgery.stream.hub import Earlier
from surgery.stream.resources import Resources
from surgery.stream.stream import Stream
from surgery.stream.whole import NOTHING, Begun

__all__ = ["NOTHING", "Begun", "Chunk", "Earlier", "Resources", "Stream", "TensorHashes"]
