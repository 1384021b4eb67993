"""A model larger than the device: layers pass through a few slots, the next arriving while the last one computes."""

from __future__ import annotations

from asyncload.layers._feed import FileFeed, SlabFeed
from asyncload.layers._layer import Layer
from asyncload.layers._scheduler import Fed, Ride, Scheduler, Sweep, Use
from asyncload.layers._slabs import Slabs
from asyncload.layers._slots import Slot

__all__ = [
    "Fed",
    "FileFeed",
    "Layer",
    "Ride",
    "Scheduler",
    "SlabFeed",
    "Slabs",
    "Slot",
    "Sweep",
    "Use",
]
