"""Experiments with KVM that notebooks show and benchmarks print: each makes data, and draws nothing."""
