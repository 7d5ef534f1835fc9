"""Presentation times of decoded frames: those of the container, repaired if they are missing or wrong."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

_WITHOUT_PTS = "avi"
"""FFmpeg's name of the container that stores one slot per frame instead of presentation times."""

_WITHOUT_DURATIONS = "mov"
"""Part of FFmpeg's name of the container that stores differences of decoding times instead of durations."""


class FrameTimestamps:
    """Assigns a presentation timestamp to each frame of one stream, in ticks of its time base.

    Most containers store presentation timestamps (pts). If those decrease more often than the decoding timestamps
    (dts), as in old files with B-frames, the dts are used instead. FFmpeg has the same rule.

    AVI stores neither: packet n has slot n, and the timestamps that FFmpeg derives are wrong for B-frames. Frames leave
    the decoder in presentation order, so the nth frame gets the nth slot.
    """

    def __init__(self, container_format: str) -> None:
        """Start before the first packet.

        Args:
            container_format: FFmpeg's name of the container, e.g. "avi" or "mov,mp4,m4a,3gp,3g2,mj2".
        """
        self._slots: list[int] | None = [] if container_format == _WITHOUT_PTS else None  # heap of unused slots
        self._has_durations = _WITHOUT_DURATIONS not in container_format.split(",")
        self._delay = 0  # largest distance seen between a frame's slot and that of the packet that released it
        self._last_pts: int | None = None
        self._last_dts: int | None = None
        self._faulty_pts = self._faulty_dts = 0
        self._first_pts: int | None = None
        self._first_dts: int | None = None
        self._last_stamp: int | None = None
        self._end: int | None = None  # end of the packet with that timestamp
        self._last_duration = 0  # duration of the last stored packet
        self._decoding_end: int | None = None  # end of the last stored packet

    def add_packet(self, packet: Packet[Any]) -> int | None:
        """Record a packet before it is decoded, and return its timestamp; None if it has none."""
        stamp = packet.pts if self._slots is None else packet.dts
        if stamp is None:
            return None
        if not packet.size:  # repeats the previous frame
            self._extend(packet, stamp)
            return None
        if self._slots is not None:
            heapq.heappush(self._slots, stamp)
        self._first_pts = stamp if self._first_pts is None else min(self._first_pts, stamp)
        if packet.dts is not None:
            self._first_dts = packet.dts if self._first_dts is None else self._first_dts
        if not getattr(packet, "is_discard", False):  # discarded packets are outside the edit list
            self._extend(packet, stamp)
        return stamp

    def _extend(self, packet: Packet[Any], stamp: int) -> None:
        """Move the end of the last frame to the end of a packet if that is later."""
        if self._last_stamp is None or stamp >= self._last_stamp:
            self._last_stamp, self._end = stamp, stamp + (packet.duration or 0)
        if packet.dts is not None:
            self._last_duration = packet.duration or 0
            self._decoding_end = packet.dts + self._last_duration

    @property
    def start(self) -> int | None:
        """Earliest timestamp of the packets so far; None without packets."""
        return self._first_pts

    @property
    def end(self) -> int | None:
        """Timestamp at which the last frame ends, according to the packets so far; None without packets."""
        if self._last_stamp is None or self._has_durations or self._decoding_end is None:
            return self._end
        end = self._decoding_end + (self._first_pts or 0) - (self._first_dts or 0)
        # In some files the durations add up to less than the last timestamp. Then use the duration of the last packet.
        return end if end > self._last_stamp else self._last_stamp + self._last_duration

    def skip_damaged(self, released_at: int | None) -> None:
        """Drop the slots of packets that produced no frame.

        Args:
            released_at: Decoding timestamp of the first frame after the damage.
        """
        if self._slots is None or released_at is None:
            return
        while len(self._slots) > 1 and self._slots[0] < released_at - self._delay:
            heapq.heappop(self._slots)

    def of(self, frame: VideoFrame) -> int | None:
        """Return the timestamp of the next frame in presentation order; None if it cannot be derived."""
        if self._slots is not None:
            slot = heapq.heappop(self._slots) if self._slots else None
            if slot is not None and frame.dts is not None:
                self._delay = max(self._delay, frame.dts - slot)
            return slot
        pts, dts = frame.pts, frame.dts
        if pts is not None and self._last_pts is not None:
            self._faulty_pts += pts <= self._last_pts
        if dts is not None and self._last_dts is not None:
            self._faulty_dts += dts <= self._last_dts
        self._last_pts = pts if pts is not None else self._last_pts
        self._last_dts = dts if dts is not None else self._last_dts
        if pts is not None and (self._faulty_pts <= self._faulty_dts or dts is None):
            return pts
        return dts
