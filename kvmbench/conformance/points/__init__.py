"""All points, in the order they are shown."""

from __future__ import annotations

from kvmbench.conformance.point import Point, Topic
from kvmbench.conformance.points import breakpoints, kvm_breakpoints, kvm_exits, kvm_steps, steps

TOPICS: tuple[Topic, ...] = (
    kvm_breakpoints.TOPIC,
    kvm_steps.TOPIC,
    kvm_exits.TOPIC,
    steps.TOPIC,
    breakpoints.TOPIC,
)
POINTS: tuple[Point, ...] = tuple(point for topic in TOPICS for point in topic.points)
