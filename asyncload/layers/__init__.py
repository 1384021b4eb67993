"""A model larger than the device: layers pass through a few slots, the next arriving while the last one computes."""

from __future__ import annotations

from asyncload.layers._feed import FileFeed, Settle, SlabFeed
from asyncload.layers._layer import Layer
from asyncload.layers._link import link_rate
from asyncload.layers._native_feed import NativeSlabFeed
from asyncload.layers._scheduler import Scheduler
from asyncload.layers._slabs import Slabs
from asyncload.layers._slots import Slot
from asyncload.layers._stats import LayerRecord, LayerTiming, PassStats, lower_bound, measure_pass, record_pass
from asyncload.layers._sweep import Fed, Ride, Sweep, Use, Work
from asyncload.layers._threads import add_threads
from asyncload.layers._trace import trace, write_trace

__all__ = [
    "Fed",
    "FileFeed",
    "Layer",
    "LayerRecord",
    "LayerTiming",
    "NativeSlabFeed",
    "PassStats",
    "Ride",
    "Scheduler",
    "Settle",
    "SlabFeed",
    "Slabs",
    "Slot",
    "Sweep",
    "Use",
    "Work",
    "add_threads",
    "link_rate",
    "lower_bound",
    "measure_pass",
    "record_pass",
    "trace",
    "write_trace",
]
